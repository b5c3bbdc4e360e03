"""Fine-tuning and submission files, from small tasks made here. Alone: python -m pytest tests/test_finetune.py"""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune
import model as models
from antlm.checkpoint import save_checkpoint
from antlm.tokenizer import Tokenizer
from babylm.glue import four_parts, join, measure
from config import UserError

ROOT = Path(__file__).parent.parent
WORDS = "cat dog bird horse child teacher sees likes finds follows hears old young red small".split()


def make_model(backbone: str, vocab_size: int = 300, **sizes) -> models.Transformer:
    torch.manual_seed(5)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, n_ff=48, n_bucket=4, max_position=8) | sizes
    return models.Transformer(models.ModelConfig(backbone, vocab_size, **sizes))


def write(path: Path, records: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def sentences(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(n)]


@pytest.fixture
def run(tmp_path, corpus) -> Path:
    """A run folder with an untrained BabyLlama; the corpus's own tokenizer."""
    return make_run(tmp_path / "run", corpus, "babyllama")


def make_run(folder: Path, corpus: str, backbone: str, schedule: str = "1_CLM+1_MLM") -> Path:
    folder.mkdir()
    tokenizer = Path(corpus) / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    tokenizer = Tokenizer(tokenizer)
    save_checkpoint(folder / "step_0000010.pt", make_model(backbone, tokenizer.vocab_size), step=10, boundary="line",
                           settings=dict(schedule=schedule, block_size=16), tokenizer_sha256=tokenizer.sha256)
    return folder


@pytest.fixture
def glue(tmp_path) -> Path:
    """Three small tasks: cola asks whether "red" stands in the sentence, rte whether both hold it, mnli has three labels."""
    folder = tmp_path / "glue"
    for split, n in (("train", 96), ("valid", 40)):
        a, b = sentences(n, 1 + n), sentences(n, 2 + n)
        write(folder / f"cola.{split}.jsonl", [{"sentence": x, "label": int("red" in x)} for x in a])
        write(folder / f"rte.{split}.jsonl", [{"sentence1": x, "sentence2": y, "label": int(("red" in x) == ("red" in y))}
                                              for x, y in zip(a, b)])
        for name in ("mnli", "mnli-mm"):
            write(folder / f"{name}.{split}.jsonl", [{"premise": x, "hypothesis": y, "label": i % 3}
                                                     for i, (x, y) in enumerate(zip(a, b))])
    (folder / "mnli-mm.train.jsonl").unlink()  # the challenge has none
    return folder


def tune(*args) -> dict:
    """finetune.py in this process -> its result file."""
    finetune.main(list(map(str, args)))
    out = next((str(a)[6:] for a in args if str(a).startswith("--out=")), None)
    return json.loads((Path(out) if out else Path(args[0]) / "glue_10.json").read_text())


# --------------------------------------------------------------------------------------------- inputs and scores


def test_the_longer_text_is_cut_first():
    """Token by token from the longer one, the second where they are equal, as Hugging Face's longest_first."""
    for n, m, length in itertools.product(range(9), range(9), (2, 5, 8)):
        a, b = list(range(n)), list(range(100, 100 + m))
        expected = a[:], b[:]
        while sum(map(len, expected)) > length:
            (expected[0] if len(expected[0]) > len(expected[1]) else expected[1]).pop()
        assert join(a, b, length) == expected[0] + expected[1]


def test_measures_equal_their_formulas():
    rng = np.random.default_rng(1)
    for bias in (0.1, 0.5, 0.9):
        labels, guess = (rng.random(200) < 0.4).astype(int), (rng.random(200) < bias).astype(int)
        tp, tn = int((labels & guess).sum()), int(((1 - labels) & (1 - guess)).sum())
        fp, fn = int(guess.sum()) - tp, int(labels.sum()) - tp
        found = measure(labels, guess, 2)
        assert found["accuracy"] == pytest.approx((tp + tn) / 2)
        assert found["f1"] == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn))
        mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        assert found["mcc"] == pytest.approx(100 * mcc)
    always = measure(labels, np.ones(200, int), 2)  # one class always: Matthews correlation is 0 by convention
    assert always["mcc"] == 0 and always["accuracy"] == pytest.approx(labels.mean() * 100)
    perfect = measure(np.array([0, 1, 2]), np.array([0, 1, 2]), 3)
    assert perfect == pytest.approx(dict(accuracy=100, f1=100, mcc=100))
    assert measure(np.array([0, 1]), np.array([0, 0]), 2)["f1"] == 0


def test_an_epoch_has_each_item_once_in_a_new_order():
    ids = [[0] * (1 + i % 7) for i in range(333)]
    first, again, second = (finetune.batches(ids, 8, 12, epoch) for epoch in (1, 1, 2))
    assert sorted(np.concatenate(first)) == list(range(333)) == sorted(np.concatenate(second))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    assert max(map(len, first)) == 8


# ------------------------------------------------------------------------------------------------- the classifier


def classifier(backbone: str, causal: list[bool], pool: str, **settings) -> finetune.Classifier:
    model = make_model(backbone)
    for p in model.parameters():  # as initialised, attention hardly matters
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    return finetune.Classifier(model, 2, causal, pool, finetune.Settings(**settings)).eval()


@pytest.mark.parametrize("backbone", models.BACKBONES)
@pytest.mark.parametrize("causal", [[False, False], [True, True], [True, False]])
@pytest.mark.parametrize("pool", ["start", "mean", "last"])
def test_padding_changes_nothing(backbone, causal, pool):
    net = classifier(backbone, causal, pool)
    ids = [list(range(4, 4 + n)) for n in (3, 9, 5)]
    together = net(*finetune.rows_to_device(ids, np.arange(3), torch.device("cpu")))
    alone = torch.cat([net(*finetune.rows_to_device(ids, np.array([i]), torch.device("cpu"))) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", models.BACKBONES)
@pytest.mark.parametrize("causal, sees", [([True, True], False), ([True, False], True), ([False, True], True), ([False, False], True)])
def test_opening_any_layer_lets_the_first_position_see_the_last(backbone, causal, sees):
    net = classifier(backbone, causal, "start")
    tokens, lengths = torch.tensor([[1, 10, 11, 12], [1, 10, 11, 13]]), torch.tensor([4, 4])
    a, b = net(tokens, lengths)
    assert torch.equal(a, b) != sees


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_adapters_start_at_nothing_and_leave_the_weights_alone(backbone):
    full, low = (classifier(backbone, [False, False], "mean", lora_rank=rank) for rank in (0, 4))
    low.dense.load_state_dict(full.dense.state_dict())
    low.out.load_state_dict(full.out.state_dict())
    tokens, lengths = torch.arange(4, 24).view(2, 10), torch.tensor([10, 7])
    torch.testing.assert_close(full(tokens, lengths), low(tokens, lengths))
    before = {name: p.clone() for name, p in low.named_parameters()}
    trained = [p for p in low.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < sum(p.numel() for p in full.parameters()) / 2
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # at the first step only the half that is zero has a gradient
        low(tokens, lengths).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in low.named_parameters() if not torch.equal(p, before[name])}
    assert not any("linear" in name or "embedding" in name for name in moved)
    ups, downs = ([name for name in moved if name.endswith(f"{end}.weight")] for end in (".up", ".down"))
    assert len(ups) == len(downs) > 0


# ------------------------------------------------------------------------------------------------- whole commands


@pytest.mark.parametrize("backbone, flags", [
    ("babyllama", ["--mask=causal"]), ("babyllama", ["--mask=full", "--pool=mean"]), ("babyllama", ["--mask=causal", "--n_open=1"]),
    ("ltg_bert", []), ("ltg_bert", ["--lora_rank=16", "--lr=1e-2"])])
def test_64_examples_with_arbitrary_labels_are_learnt_by_heart(tmp_path, corpus, backbone, flags):
    rng = random.Random(3)
    for split in ("train", "valid"):
        write(tmp_path / f"rte.{split}.jsonl", [{"sentence1": a, "sentence2": b, "label": i % 2} for i, (a, b) in
                                                enumerate(zip(sentences(64, 7), sentences(64, 8)))])
    run = make_run(tmp_path / "run", corpus, backbone)
    result = tune(run, f"--data={tmp_path}", "--tasks=rte", "--lr=3e-3", "--epochs=60", "--patience=0", "--batch_rows=16",
                  "--dropout=0", "--lora_dropout=0", *flags)["tasks"]["rte"]["seeds"]["12"]
    assert result["accuracy"] == 100


def test_a_rule_is_learnt_that_the_majority_class_misses(run, glue):
    """Whether a word stands in a sentence: 32 of 96 training sentences hold it."""
    result = tune(run, f"--data={glue}", "--tasks=cola", "--lr=3e-3", "--epochs=30", "--patience=0", "--batch_rows=8")
    found = result["tasks"]["cola"]["seeds"]["12"]
    assert found["score"] == found["mcc"] > 60
    labels = [json.loads(line)["label"] for line in (glue / "cola.valid.jsonl").read_text().splitlines()]
    right = sum(a == b for a, b in zip(found["predictions"], labels))
    assert found["accuracy"] == pytest.approx(100 * right / len(labels))


def test_a_second_call_does_only_what_is_missing(run, glue, capsys):
    fast = [f"--data={glue}", "--epochs=1"]
    first = tune(run, "--tasks=rte", *fast)
    both = tune(run, "--tasks=rte,cola", "--seeds=12,13", *fast)
    said = capsys.readouterr().out
    assert both["tasks"]["rte"]["seeds"]["12"] == first["tasks"]["rte"]["seeds"]["12"]
    assert said.count("rte seed 12") == 1 and said.count("rte seed 13") == 1 and said.count("cola seed") == 2
    tune(run, "--tasks=rte,cola", "--seeds=12,13", *fast)
    assert "done before" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds rte with lr=5e-05, not 0.01"):
        tune(run, "--tasks=rte", "--lr=0.01", *fast)
    again = tune(run, "--tasks=rte", *fast, f"--out={run}/again.json")  # the same seed gives the same numbers
    assert again["tasks"]["rte"]["seeds"]["12"] == first["tasks"]["rte"]["seeds"]["12"]


def test_mnli_mm_is_scored_with_the_model_of_mnli(run, glue, capsys):
    rows = [json.loads(line) | {"label": 1} for line in (glue / "mnli-mm.valid.jsonl").read_text().splitlines()]
    write(glue / "mnli-mm.valid.jsonl", rows)  # the same texts with other labels
    result = tune(run, f"--data={glue}", "--tasks=mnli-mm,mnli --epochs=2", "--limit=30")
    its, matched = result["tasks"]["mnli-mm"]["seeds"]["12"], result["tasks"]["mnli"]["seeds"]["12"]
    assert its["epoch"] == matched["epoch"] and len(its["predictions"]) == 30
    assert its["predictions"] == matched["predictions"]
    assert its["accuracy"] == pytest.approx(100 * its["predictions"].count(1) / 30)
    assert "PARTIAL" in capsys.readouterr().out


def test_a_task_may_have_its_own_settings(run, glue):
    result = tune(run, f"--data={glue}", "--tasks=rte --epochs=2 --patience=0,cola", "--epochs=1")
    assert result["tasks"]["rte"]["settings"]["epochs"] == 2 and result["tasks"]["cola"]["settings"]["epochs"] == 1


def test_a_task_has_its_own_seeds_and_not_its_own_device(run, glue):
    result = tune(run, f"--data={glue}", "--tasks=rte --seeds=7,cola", "--epochs=1")
    assert [[*result["tasks"][name]["seeds"]] for name in ("rte", "cola")] == [["7"], ["12"]]
    for tasks, said in (("rte --device=cpu", "rte: device"), ("mnli,mnli-mm --lr=1", "mnli-mm: lr")):
        with pytest.raises(UserError, match=f"{said} cannot be set for this task alone"):
            tune(run, f"--data={glue}", f"--tasks={tasks}", "--epochs=1")


@pytest.mark.parametrize("select, patience, chosen, trained", [
    ("f1", 1, 1, 2), ("metric", 1, 3, 4), ("loss", 1, 2, 3), ("f1", 0, 5, 5), ("loss", 0, 2, 5)])
def test_the_best_epoch_counts_and_patience_ends_it(monkeypatch, select, patience, chosen, trained):
    """F1 is best at first and last, accuracy rises with the third epoch, the loss is lowest after the second."""
    labels = np.array([0, 0, 0, 0, 1, 1])
    script = [([1] * 6, 0.9), ([0] * 6, 0.3), ([0] * 5 + [1], 0.5), ([0] * 5 + [1], 0.6), ([0] * 4 + [1, 1], 0.7)]
    calls, split = iter(script), ([[1, 5, 6]] * 6, labels, [0, 1])

    def predict(*_):
        predictions, loss = next(calls)
        return np.array(predictions), loss

    monkeypatch.setattr(finetune, "predict", predict)
    s = finetune.Settings(select=select, patience=patience, epochs=5, batch_rows=6)
    found = finetune.finetune(make_model("babyllama"), split, {"rte": split}, [False] * 2, "start", s, 12)["rte"]
    assert found["epoch"] == chosen and found["predictions"] == script[chosen - 1][0] and len([*calls]) == 5 - trained


@pytest.mark.parametrize("schedule, mask, pool", [("4_CLM", "causal", "last"), ("1_CLM+1_MLM", "full", "start")])
def test_the_mask_follows_what_the_model_has_learnt(tmp_path, corpus, glue, schedule, mask, pool):
    run = make_run(tmp_path / "run", corpus, "babyllama", schedule)
    used = tune(run, f"--data={glue}", "--tasks=rte", "--epochs=1")["tasks"]["rte"]["settings"]
    assert (used["mask"], used["pool"]) == (mask, pool)


def test_the_macro_average_names_what_is_missing(run, glue, capsys):
    blimp = {"kind": "blimp", "accuracy": {"causal": 70.0}, "subsets": {f"s{i}": {} for i in range(67)}}
    whole = {"step": 10, "partial": False, "protocol": "2025", "tasks": {"blimp_filtered": blimp}}
    (run / "eval_blimp_filtered_10.json").write_text(json.dumps(whole))
    tune(run, f"--data={glue}", "--tasks=rte", "--epochs=1")
    assert "causal 2025: BLiMP 70.0  no macro average: supplement, EWoK, GLUE not scored whole" in capsys.readouterr().out
    five = blimp | {"accuracy": {"causal": 50.0}, "subsets": dict.fromkeys("abcde", {})}
    eleven = blimp | {"kind": "ewok", "accuracy": {"causal": 60.0}, "subsets": dict.fromkeys("abcdefghijk", {})}
    (run / "eval_more_10.json").write_text(json.dumps(whole | {"tasks": {"supplement": five, "ewok": eleven}}))
    (run / "eval_blimp_filtered_100.json").write_text(json.dumps(whole | {"step": 100}).replace("70.0", "99.0"))
    assert "macro average 55.0" in four_parts(run, 10, 40.0)  # not with the score of step 100


BAD = [
    (["--tasks=rte,snli"], "tasks: 'snli' is named twice or not one of boolq"),
    (["--tasks=rte --epoch=2"], "'epoch' is not a setting; did you mean 'epochs'"),
    (["--tasks=rte --epochs=0"], "tasks: rte: epochs = 0 must be greater than 0"),
    (["--tasks=mnli-mm"], "mnli-mm is scored with the model of mnli"),
    (["--tasks=sst2"], "holds 0 files sst2.train*.jsonl where one was expected"),
    (["--data=nowhere"], "nowhere: is not a folder"),
    (["--n_open=1"], "n_open"), (["--mask=causal", "--n_open=7", "--tasks=rte"], "layer 7, but the model's 2"),
    (["--seeds=1,1"], "seeds"), (["--seeds=x"], "seeds"), (["--dropout=1"], "dropout"), (["--pool=first"], "pool"),
]


@pytest.mark.parametrize("args, expected", BAD, ids=lambda x: str(x)[:40])
def test_wrong_use_ends_in_one_line(run, glue, args, expected):
    with pytest.raises((UserError)) as e:
        finetune.main([str(run), f"--data={glue}", *args])
    assert expected in str(e.value) and "\n" not in str(e.value)


LINES = [({"sentence1": "a", "label": 0}, "rte.train.jsonl:3: rte needs a label and the texts sentence1, sentence2; 'sentence2' is missing"),
         ({"sentence1": "a", "sentence2": 3, "label": 0}, "'sentence2' is no text"),
         ({"sentence1": "a", "sentence2": "b"}, "label is None, not a whole number"),
         ({"sentence1": "a", "sentence2": "b", "label": True}, "label is True"), ([], "a JSON object was expected")]


@pytest.mark.parametrize("line, expected", LINES, ids=lambda x: str(x)[:40])
def test_a_bad_line_is_named(run, glue, line, expected):
    lines = (glue / "rte.train.jsonl").read_text().splitlines()
    (glue / "rte.train.jsonl").write_text("\n".join([*lines[:2], json.dumps(line), *lines[2:]]))
    with pytest.raises(UserError) as e:
        finetune.main([str(run), f"--data={glue}", "--tasks=rte"])
    assert expected in str(e.value) and "\n" not in str(e.value)


def test_labels_that_training_never_saw_are_named(run, glue):
    with open(glue / "rte.valid.jsonl", "a") as f:
        f.write('{"sentence1": "a", "sentence2": "b", "label": 7}\n')
    with pytest.raises(UserError, match=r"rte.valid.jsonl:41: label is 7, not one of the train file's \[0, 1\]"):
        finetune.main([str(run), f"--data={glue}", "--tasks=rte"])


def test_as_a_program(run, glue):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "finetune.py", str(run), f"--data={glue}", "--tasks=cola,rte", "--epochs=1"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "mean of 2 tasks" in done.stdout, done.stderr
    done = subprocess.run([*command, "--lr=1e30", "--out=x.json"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "not finite" in done.stderr, done.stderr
