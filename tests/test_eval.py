"""Scores against a plain reference, readers, errors, samples, results. Alone: python -m pytest tests/test_eval.py"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import model as models
import prepare
from antlm.checkpoint import save_checkpoint
from antlm.tokenizer import END, MASK, PAD, START, Tokenizer, save_tokenizer, train_bpe
from babylm.tasks import Item, read_tasks
from config import UserError

ROOT = Path(__file__).parent.parent
BLIMP = ROOT.parent / "shared" / "data" / "eval" / "blimp_filtered"
TEXT = """The cats sleep in the garden and the dog sees them.
Zoë said the naïve café owner sleeps in Ærøskøbing.
Who have those men revealed they helped? The girl who sees the cats sleeps.
Schöne Grüße aus Köln, said the owner of the garden."""
BACKBONES = ("babyllama", "ltg_bert")
PAIRS = [("The cats sleep.", "The cats sleeps."), ("The dog sees them.", "The dog see them."),
         ("Who sees the girl?\nThe dog sees the girl.", "Who sees the girl?\nThe garden the sees."),
         ("Zoë sleeps in Köln.", "Zoë sleep in Köln."), ("The dog sees them.", "Them sees the dog.")]
CHOICES = [  # context, targets: multi-byte characters on both sides, and targets that start inside a token
    ("Zoë said the naïve", (" café owner sleeps.", " Grüße sleeps.")),
    ("The owner 🐟 of the café", (" schläft in Ærøskøbing 🐟.", " sees the dog.")),
    ("The cats sl", ("eep in the garden.", "eeps in the garden.")),
    ("The na", ("ïve café", "ï")), ("Sch", ("öne Grüße", "ö")),
    ("Line one.\nThe dog", (" sees them.\nThe cats", " sleep"))]
OPTIONS = [(s, 0) for pair in PAIRS for s in pair] + [(c + t, len(c)) for c, targets in CHOICES for t in targets]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    save_tokenizer(folder / "tokenizer.json", train_bpe(prepare.count_pieces([folder / "text.txt"]), 80))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.json")


def make_model(backbone: str, vocab_size: int = 340) -> models.Transformer:
    torch.manual_seed(5)
    model = models.Transformer(models.ModelConfig(backbone, vocab_size, n_layer=2, n_head=2, n_embd=32, n_ff=48,
                                                  n_bucket=4, max_position=8)).eval()
    for p in model.parameters():  # as initialised, all sentences of a length score nearly the same
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def model_of() -> dict:
    return {backbone: make_model(backbone) for backbone in BACKBONES}


@pytest.fixture
def make_run(tmp_path, folder, tokenizer):
    """A function that adds a checkpoint to a run folder, tmp_path / "run", and gives the folder."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())

    def make(model=None, step=10, schedule="1_CLM+1_MLM", **content) -> Path:
        content = dict(step=step, settings=dict(schedule=schedule, block_size=16), boundary="line",
                       tokenizer_sha256=tokenizer.sha256) | content
        save_checkpoint(run / f"step_{step:07}.pt", model or make_model("babyllama"), **content)
        return run

    return make


def write_lines(path: Path, *records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def write_pairs(path: Path, pairs=PAIRS, **fields) -> Path:
    return write_lines(path, *({"sentence_good": good, "sentence_bad": bad} | fields for good, bad in pairs))


def main(*args) -> None:
    evaluation.main([*map(str, args), "--device", "cpu"])


def error(*args) -> str:
    """The line with which the program ends."""
    with pytest.raises(SystemExit) as stopped:
        main(*args)
    line = stopped.value.code
    assert isinstance(line, str) and line.startswith("eval.py: ") and "\n" not in line
    return line


# ------------------------------------------------------------------------------------------- against a reference


def reference(model, tokenizer, text: str, start: int, mode: str, protocol: str) -> float:
    """One option by the definitions: one token at a time, one forward pass of one row each."""
    if protocol == "2024" and not start:
        text = " " + text
    pieces = tokenizer.encode(text)
    if protocol == "2024" and start:  # the target begins after as many tokens as its context has alone
        first = len(tokenizer.encode(text[:start]))
    else:
        ends = [len(b"".join(tokenizer.bpe.decode_tokens_bytes(pieces[:i + 1]))) for i in range(len(pieces))]
        first = next(i for i, end in enumerate(ends) if end > len(text[:start].encode("utf-8")))
    ids = [START if tokenizer.decode([i]) == "\n" else i for i in pieces]  # boundary "line"
    if not (protocol == "2024" and mode == "causal" and start):
        ids, first = [START, *ids], first + 1
    values = []
    for i in range(first, len(ids)):
        if mode == "causal":
            logits = model(torch.tensor([ids[:i]]), causal=True)[0, -1]
        elif ids[i] == START:
            continue
        else:
            row = ids[:i] + [MASK] + ids[i + 1:]
            logits = model(torch.tensor([row]), causal=False)[0, i - 1 if mode == "mntp" else i]
        values.append(logits.double().log_softmax(-1)[ids[i]].item())
    return sum(values) / (len(values) if protocol == "2024" and mode != "causal" else 1)


@pytest.mark.parametrize("protocol", ["2025", "2024"])
@pytest.mark.parametrize("mode", ["causal", "masked", "mntp"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_scores_equal_a_plain_reference(model_of, tokenizer, backbone, mode, protocol):
    # 2024 counts the tokens of the context alone, which says something only where target and context meet at a token
    options = [o for o in OPTIONS if protocol == "2025" or not o[1] or o[0][o[1]] == " "]
    with torch.no_grad():
        expected = [reference(model_of[backbone], tokenizer, *option, mode, protocol) for option in options]
    ids, first = evaluation.encode(options, tokenizer, "line", protocol, mode)
    found = evaluation.score(model_of[backbone], ids, first, mode, ["x"] * len(ids), batch_tokens=64,
                             mean=protocol == "2024" and mode != "causal")
    assert found == pytest.approx(expected, abs=1e-4)
    assert len({round(x, 3) for x in expected}) > len(set(options)) / 2  # or agreement would say little


@pytest.mark.skipif(not BLIMP.is_dir(), reason="needs BLiMP as filtered for BabyLM beside the repository")
@pytest.mark.parametrize("mode", ["causal", "masked", "mntp"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_scores_of_real_pairs_equal_a_plain_reference(model_of, tokenizer, backbone, mode):
    """The first pair of every sixth BLiMP file."""
    options = [o for file in sorted(BLIMP.glob("*.jsonl"))[::6] for o in read_tasks(file, limit=1)[0].options]
    with torch.no_grad():
        expected = [reference(model_of[backbone], tokenizer, *option, mode, "2025") for option in options]
    ids, first = evaluation.encode(options, tokenizer, "line", "2025", mode)
    assert evaluation.score(model_of[backbone], ids, first, mode, ["x"] * len(ids)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("mode", ["causal", "masked", "mntp"])
def test_scores_do_not_depend_on_the_batch(model_of, tokenizer, mode):
    ids, first = evaluation.encode(OPTIONS, tokenizer, "line", "2025", mode)
    shapes, found = [], []
    hook = model_of["ltg_bert"].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    for n in (1, 23, 100, 100_000):
        found.append(evaluation.score(model_of["ltg_bert"], ids, first, mode, ["x"] * len(ids), batch_tokens=n))
        assert all(rows == 1 or rows * T <= n for rows, T in shapes)
        shapes.clear()
    hook.remove()
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)


def test_targets_start_where_hugging_face_offsets_say(folder, tokenizer):
    """The 2025 pipeline scores the tokens whose end, in characters, lies beyond the context."""
    hf = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    options = [(text, start) for text, _ in OPTIONS for start in range(1, len(text))]
    ids, first = evaluation.encode(options, tokenizer, "none", "2025", "causal")
    for (text, start), row, at in zip(options, ids, first):
        encoded = hf.encode(text)
        assert encoded.ids[1:] == row[1:].tolist()
        assert at == next(i for i, (_, end) in enumerate(encoded.offsets) if end > start), (text, start)


def test_texts_in_a_group_share_its_prefix_and_most_is_saved():
    """All ways to cut the sorted texts into groups are tried: none computes fewer tokens."""
    rng = random.Random(4)
    for _ in range(30):
        ids = [np.array([1, *(rng.randint(4, 6) for _ in range(rng.randint(1, 6)))]) for _ in range(7)]
        groups = evaluation.share_prefixes(ids)
        assert sorted(i for members, _ in groups for i in members) == list(range(7))
        assert all(len({tuple(ids[i][:prefix + 1]) for i in members}) == 1 for members, prefix in groups)

        def tokens(groups: list) -> int:  # inputs: all tokens but a text's last; the prefix once for a group
            return sum(prefix + sum(len(ids[i]) - 1 - prefix for i in members) for members, prefix in groups)

        order, least = sorted(range(7), key=lambda i: ids[i].tolist()), 1 << 60
        for cuts in itertools.product([False, True], repeat=6):
            parts = [[order[0]]]
            for i, cut in zip(order[1:], cuts):
                parts.append([i]) if cut else parts[-1].append(i)
            shared = [len(os.path.commonprefix([ids[i].tolist() for i in part])) - 1 for part in parts]
            least = min(least, tokens(list(zip(parts, shared))))
        assert tokens(groups) == least


def test_a_masked_row_is_computed_once(tokenizer):
    model, rows = make_model("babyllama"), []
    model.register_forward_pre_hook(lambda _, args: rows.extend(map(tuple, args[0].tolist())))
    sentences = [s for pair in PAIRS for s in pair]
    wanted = set()
    for s in sentences:
        ids = tokenizer.encode_text(s, "line")
        wanted |= {(*ids[:i], MASK, *ids[i + 1:]) for i in range(1, len(ids)) if ids[i] != START}
    ids, first = evaluation.encode([(s, 0) for s in sentences], tokenizer, "line", "2025", "masked")
    evaluation.score(model, ids, first, "masked", ["x"] * len(ids), batch_tokens=40)
    assert sorted(rows) == sorted(wanted)
    assert len(rows) < sum(len(row) - 1 for row in ids)  # "The dog sees them." is there twice, pairs share rows


def test_bfloat16_is_close_and_summed_in_float32(model_of, tokenizer):
    ids, first = evaluation.encode(OPTIONS, tokenizer, "line", "2025", "causal")
    exact, rough = (evaluation.score(model_of["babyllama"], ids, first, "causal", ["x"] * len(ids), dtype=dtype)
                    for dtype in (torch.float32, torch.bfloat16))
    assert rough == pytest.approx(exact, rel=0.05) and (rough != exact).any()
    row = tokenizer.encode_text("The cats sleep in the garden", "line")
    x, n = np.array([row]), len(row) - 1
    found = evaluation.log_probs(model_of["babyllama"], x[:, :-1], np.arange(n)[None], np.zeros(n, int), np.arange(n), x[0, 1:],
                                 causal=True, dtype=torch.bfloat16)
    assert (torch.as_tensor(found).bfloat16().double().numpy() != np.asarray(found)).any()  # single values keep their digits


# ------------------------------------------------------------------------------------------------------- readers


def test_each_kind_of_task_is_read(tmp_path):
    for file, record in {
            "blimp/a": dict(sentence_good="G.", sentence_bad="B.", linguistics_term="term"),
            "supplement/b": dict(sentence_good="A: x\nB: y", sentence_bad="A: x\nB: z"),
            "ewok/c": dict(Context1="Él vio.", Context2="No.", Target1="Sí.", Target2="Ya.", Domain="social"),
            "entity/regular": dict(input_prefix="Box 0 has ", options=["a", "b", "c"], numops=2),
            "comps/base": dict(prefix_acceptable="a sock", prefix_unacceptable="a tie", property_phrase="is warm."),
    }.items():
        write_lines(tmp_path / "t" / f"{file}.jsonl", record)
    found = [(i.task, i.group, i.subset, i.options) for i in read_tasks(str(tmp_path / "t"))]
    assert found == [
        ("blimp", "term", "a", [("G.", 0), ("B.", 0)]),
        ("comps", "", "base", [("a sock is warm.", 7), ("a tie is warm.", 6)]),
        ("entity", "regular", "regular_2_ops", [(f"Box 0 has {x}", 10) for x in "abc"]),
        ("ewok", "", "social", [("Él vio. Sí.", 7), ("Él vio. Ya.", 7)]),
        ("supplement", "", "b", [("A: x\nB: y", 0), ("A: x\nB: z", 0)])]


def test_lines_may_be_blank_and_end_in_crlf(tmp_path):
    line = b'{"sentence_good": "G.", "sentence_bad": "B."}'
    (tmp_path / "x.jsonl").write_bytes(b"\n" + line + b"\r\n\r\n" + line)
    items = read_tasks(str(tmp_path))
    assert [i.where.rpartition(":")[2] for i in items] == ["2", "4"]


def test_a_subset_whose_lines_name_several_groups_keeps_all_its_items(tmp_path):
    pairs = [dict(sentence_good="G.", sentence_bad="B.", linguistics_term=term) for term in ("g2", "g1", "g2")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    result = evaluation.summarize(read_tasks(str(tmp_path)), {"causal": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]})
    assert result["items"] == 3 and result["subsets"]["x"]["group"] == "g2"
    assert result["accuracy"]["causal"] == pytest.approx(200 / 3)


@pytest.mark.skipif(not BLIMP.is_dir(), reason="needs BLiMP as filtered for BabyLM beside the repository")
def test_the_real_blimp_is_read():
    items = read_tasks(str(BLIMP))
    assert len(items) == 59_875 and len({i.subset for i in items}) == 67 and len({i.group for i in items}) == 13
    assert sum(i.options[0] == i.options[1] for i in items) == 7
    scores = {m: [[0.0, -1.0]] * len(items) for m in ("causal", "masked", "mntp")}
    result = evaluation.summarize(items, scores)
    assert result["accuracy"]["causal"] == 100
    assert all(len(line) <= 100 for line in evaluation.table("blimp_filtered", result, list(scores)).splitlines())


BAD_LINES = {
    b"": "empty", b"\n \n": "empty", b"{broken": "t.jsonl:1: not JSON", b"[1, 2]": "t.jsonl:1: a JSON object",
    b'{"sentence_good": "x"}': "t.jsonl:1: field 'sentence_bad' must be text, it is missing",
    b'{"sentence_good": "x", "sentence_bad": "y"}\n{"sentence_good": 3, "sentence_bad": "y"}':
        "t.jsonl:2: field 'sentence_good' must be text, it is 3",
    b'{"sentence_good": "x", "sentence_bad": " "}': "t.jsonl:1: field 'sentence_bad'",
    b'{"sentence_good": "x", "sentence_bad": "\\ud83d"}': "t.jsonl:1: field 'sentence_bad'",
    b'{"sentence_good": "x", "sentence_bad": "\xff"}': "t.jsonl:1: not JSON in UTF-8",
    b"[" * 100_000: "t.jsonl:1: not JSON",
    b'{"Target1": "x", "Target2": "y", "Context1": "z", "Domain": "d"}': "field 'Context2'",
    b'{"input_prefix": "x", "options": ["a"], "numops": 1}': "field 'options' must be two or more texts",
    b'{"input_prefix": "x", "options": ["a", 1], "numops": 1}': "field 'options' must be two or more texts",
    b'{"input_prefix": "x", "options": ["a", "b"], "numops": "1"}': "field 'numops' must be a whole number",
    b'{"prefix_acceptable": "x", "prefix_unacceptable": "y"}': "field 'property_phrase'",
    b'{"question": "x"}': "sentence_good, Target1, input_prefix, prefix_acceptable",
}


@pytest.mark.parametrize("content", BAD_LINES, ids=lambda x: repr(x[:40]))
def test_a_bad_task_file_ends_in_one_line(tmp_path, make_run, content):
    (tmp_path / "t.jsonl").write_bytes(content)
    assert BAD_LINES[content] in error(make_run(), "--task", tmp_path / "t.jsonl")


# ------------------------------------------------------------------------------------------ points and averages


def item(group: str, subset: str, n_options: int = 2):
    return Item("here:1", "task", "blimp", group, subset, [("x", 0)] * n_options)


def test_ties_share_the_point_and_means_are_unweighted():
    items = [item("g", "large")] * 3 + [item("g", "small"), item("h", "five", 5)]
    result = evaluation.summarize(items, {"causal": [[-1, -2], [-3, -2], [-2, -2], [-5, -9], [-1, -1, -4, -1, -2]]})
    assert {s: x["accuracy"]["causal"] for s, x in result["subsets"].items()} == pytest.approx(
        {"large": 50, "small": 100, "five": 100 / 3})
    assert {s: x["ties"]["causal"] for s, x in result["subsets"].items()} == {"large": 1, "small": 0, "five": 1}
    assert result["groups"]["g"]["accuracy"]["causal"] == pytest.approx(75)
    assert result["accuracy"]["causal"] == pytest.approx((50 + 100 + 100 / 3) / 3)
    assert (result["items"], result["ties"]["causal"]) == (5, 2)


def test_a_tie_between_wrong_options_earns_nothing():
    result = evaluation.summarize([item("", "a", 3)], {"masked": [[-3, -1, -1]]})
    assert (result["accuracy"]["masked"], result["ties"]["masked"]) == (0, 0)


def test_identical_sentences_tie_in_every_mode(tmp_path, make_run):
    task = write_pairs(tmp_path / "same.jsonl", [("The cats sleep.", "The cats sleep.")] * 3)
    main(make_run(), "--task", task, "--mode", "causal", "masked", "mntp", "--out", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())["tasks"]["same"]
    assert set(result["accuracy"].values()) == {50} and set(result["ties"].values()) == {3}


# --------------------------------------------------------------------------------------------------- the program


def test_result_file_and_table(tmp_path, make_run, capsys):
    write_pairs(tmp_path / "all" / "blimp" / "verbs.jsonl", PAIRS[:2], linguistics_term="agreement")
    write_pairs(tmp_path / "all" / "blimp" / "order.jsonl", PAIRS[4:], linguistics_term="syntax")
    write_lines(tmp_path / "all" / "ewok" / "social.jsonl",
                *(dict(Context1=context, Context2="No.", Target1=good.strip(), Target2=bad.strip(), Domain="social")
                  for context, (good, bad) in CHOICES))
    write_lines(tmp_path / "all" / "glue" / "rte.jsonl", {"sentence1": "x", "label": 0})
    main(make_run(step=1234), "--task", tmp_path / "all")
    printed = capsys.readouterr()
    assert "rte.jsonl" in printed.err and "PARTIAL" not in printed.out
    result = json.loads((tmp_path / "run" / "eval_all_1234.json").read_text())
    settings = dict(step=1234, modes=["causal", "masked"], protocol="2025", limit=0, partial=False)
    assert {name: result[name] for name in settings} == settings
    assert result["checkpoint"].endswith("step_0001234.pt") and result["torch"] == torch.__version__
    assert {task: x["items"] for task, x in result["tasks"].items()} == {"blimp": 3, "ewok": len(CHOICES)}
    for task, x in result["tasks"].items():
        for mode in result["modes"]:
            means = []
            for s in x["subsets"].values():
                assert len(s["scores"][mode]) == s["items"]
                means.append(100 * sum(good > bad for good, bad in s["scores"][mode]) / s["items"])
                assert s["accuracy"][mode] == pytest.approx(means[-1])
            assert result["macro"][task][mode] == pytest.approx(sum(means) / len(means))
    row = re.search(r"^agreement +2 +([\d.]+) +0 +([\d.]+) +0\n  verbs +2 +([\d.]+)", printed.out, re.M)
    verbs = result["tasks"]["blimp"]["subsets"]["verbs"]
    assert float(row[1]) == float(row[3]) == round(verbs["accuracy"]["causal"], 1)


def test_a_result_of_other_settings_says_so_and_keeps_the_full_one(tmp_path, make_run, tokenizer, capsys):
    model = make_model("babyllama")
    run, task = make_run(model), write_pairs(tmp_path / "p" / "x.jsonl").parent
    main(run, "--task", task)
    full = (run / "eval_p_10.json").read_bytes()
    main(run, "--task", task, "--limit", 2)
    assert "PARTIAL: only the first 2 items" in capsys.readouterr().out
    part = json.loads((run / "eval_p_10_limit2.json").read_text())
    assert part["partial"] and part["limit"] == 2 and part["tasks"]["p"]["items"] == 2
    scores, all_scores = (r["tasks"]["p"]["subsets"]["x"]["scores"]["causal"] for r in (part, json.loads(full)))
    assert sum(scores, []) == pytest.approx(sum(all_scores[:2], []))
    main(run, "--task", task, "--protocol", "2024", "--mode", "causal", "masked")
    assert (run / "eval_p_10.json").read_bytes() == full
    scores = json.loads((run / "eval_p_10_causal_masked_2024.json").read_text())["tasks"]["p"]["subsets"]["x"]["scores"]
    for mode in ("causal", "masked"):
        with torch.no_grad():
            expected = [reference(model, tokenizer, s, 0, mode, "2024") for pair in PAIRS for s in pair]
        assert sum(scores[mode], []) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("schedule, modes", [
    ("2_CLM", ["causal"]), ("6_MLM", ["masked"]), ("1_1CLM:15MNTP", ["causal", "mntp"]),
    ("1_MLM+1_CLM", ["causal", "masked"])])
def test_the_schedule_gives_the_modes(tmp_path, make_run, schedule, modes):
    main(make_run(schedule=schedule), "--task", write_pairs(tmp_path / "x.jsonl"), "--out", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["modes"] == modes


@pytest.mark.parametrize("backbone", BACKBONES)
def test_texts_longer_than_a_training_row_are_scored_whole(tmp_path, make_run, tokenizer, capsys, backbone):
    model, long = make_model(backbone), "The owner of the garden sees the cats sleep " * 4 + "in Köln."
    assert len(tokenizer.encode(long)) > 2 * 16  # block_size
    task = write_pairs(tmp_path / "x.jsonl", [(long, "The dog sees them."), ("The dog.", "The cat.")])
    main(make_run(model), "--task", task, "--out", tmp_path / "out.json")
    assert "1 options are longer than the 16 tokens of a training row; scored whole" in capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())["tasks"]["x"]
    assert result["longer_than_training_rows"] == 1
    for mode in ("causal", "masked"):
        with torch.no_grad():
            expected = reference(model, tokenizer, long, 0, mode, "2025")
        assert result["subsets"]["x"]["scores"][mode][0][0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("mode", ["causal", "masked"])
def test_broken_weights_are_an_error_not_a_score(tmp_path, make_run, mode):
    model = make_model("babyllama")
    model.blocks[1].down.weight.data[0, 0] = float("nan")
    task = write_pairs(tmp_path / "x.jsonl")
    line = error(make_run(model), "--task", task, "--mode", mode)
    assert re.search(r"x\.jsonl:\d+: .*not finite", line)
    assert "not finite" in error(tmp_path / "run", "--sample", "")


def test_the_newest_whole_checkpoint_is_taken(tmp_path, make_run, capsys):
    make_run(step=5)
    run = make_run(step=20)
    broken = run / "step_0000020.pt"
    broken.write_bytes(broken.read_bytes()[:-500])
    main(run, "--task", write_pairs(tmp_path / "x.jsonl"))
    printed = capsys.readouterr()
    assert "step_0000005.pt: step 5" in printed.out and "skipped" in printed.err and str(broken) in printed.err
    assert str(broken) in error(broken, "--task", tmp_path / "x.jsonl")
    (run / "step_0000005.pt").write_bytes(b"")
    assert "holds no whole checkpoint" in error(run, "--task", tmp_path / "x.jsonl")
    assert "step_0000005.pt: damaged" in capsys.readouterr().err


def test_wrong_use_ends_in_one_line(tmp_path, make_run):
    run, task = make_run(), write_pairs(tmp_path / "x.jsonl")
    comps = write_lines(tmp_path / "c.jsonl", dict(prefix_acceptable="a", prefix_unacceptable="b", property_phrase="c"))
    (tmp_path / "nothing").mkdir()
    for args, part in (
            ([run], "--task"),
            ([tmp_path / "none", "--task", task], "none: cannot be read"),
            ([tmp_path / "nothing", "--task", task], "holds no whole checkpoint"),
            ([run, "--task", tmp_path / "no.jsonl"], "no.jsonl: does not exist"),
            ([run, "--task", tmp_path / "nothing"], "0 .jsonl file"),
            ([run, "--task", comps, "--protocol", "2024"], "comps"),
            ([run, "--task", task, "--mode", "casual"], "'casual'"),
            ([run, "--task", task, "--limit", "-1"], "--limit -1"),
            ([run, "--task", task, "--limit", "x"], "--limit"),
            ([run, "--task", task, "--out", tmp_path / "no" / "x.json"], "--out"),
            ([run, "--sample", "", "--temperature", "nan"], "--temperature"),
            ([run, "--sample", "", "--n", "0"], "--n 0")):
        assert part in error(*args)
    (run / "tokenizer.json").write_text((run / "tokenizer.json").read_text() + " ")
    assert "tokenizer.json: not the one" in error(run, "--task", task)
    (run / "tokenizer.json").unlink()
    assert "tokenizer.json: cannot be read" in error(run / "step_0000010.pt", "--task", task)


def test_a_checkpoint_of_another_format_ends_in_one_line(tmp_path, make_run):
    task = write_pairs(tmp_path / "x.jsonl")
    assert "not a checkpoint" in error(make_run(settings={}), "--task", task)
    assert "not a checkpoint" in error(make_run(settings=dict(schedule="4_XYZ", block_size=16)), "--task", task)
    assert "tokenizer.json: not the one" in error(make_run(make_model("babyllama", vocab_size=100)), "--task", task)


def test_a_target_without_tokens_to_hide_is_an_error(model_of, tokenizer):
    ids, first = evaluation.encode([("The dog\n", 7)], tokenizer, "line", "2025", "masked")
    assert evaluation.score(model_of["babyllama"], ids, first, "causal", ["here:7"])[0] < 0
    with pytest.raises(UserError, match="here:7.*masked"):
        evaluation.score(model_of["babyllama"], ids, first, "masked", ["here:7"])


def test_as_a_program(tmp_path, make_run):
    run, task = make_run(), write_pairs(tmp_path / "x.jsonl")

    def call(*args):
        return subprocess.run([sys.executable, "eval.py", *map(str, args), "--device", "cpu"], cwd=ROOT, text=True,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60)

    done = call(run, "--task", task, "--sample", "The", "--n", 2)
    assert done.returncode == 0 and "macro average of 1" in done.stdout and "--- 2" in done.stdout and not done.stderr
    task.write_text("{")
    done = call(run, "--task", task)
    assert done.returncode == 1 and re.fullmatch(r"eval\.py: .*x\.jsonl:1: .*\n", done.stderr)


# ------------------------------------------------------------------------------------------------------- samples


def biased(tokenizer, **bias) -> models.Transformer:
    """A model that much prefers some tokens, and has more of them than the tokenizer."""
    model = make_model("ltg_bert", vocab_size=tokenizer.vocab_size + 5)
    for token in (PAD, END, MASK, *range(tokenizer.vocab_size, tokenizer.vocab_size + 5)):
        model.head.vocab.bias.data[token] = 1000.0
    model.head.vocab.bias.data[START] = bias.get("start", -1000.0)
    return model


def test_samples_follow_the_seed_and_hold_no_special_token(make_run, tokenizer, capsys):
    run, printed = make_run(biased(tokenizer)), []
    for seed in (1, 1, 2):
        main(run, "--sample", "The dog", "--n", 3, "--tokens", 30, "--seed", seed)
        printed.append(capsys.readouterr().out.partition("\n")[2])
    assert printed[0] == printed[1] != printed[2]
    samples = re.split(r"^--- \d\n", printed[0], flags=re.M)[1:]
    assert len(samples) == 3 and all(len(s) > 30 and s.startswith("The dog") for s in samples)
    assert not re.search("<(pad|s|/s|mask)>", "".join(printed))


def test_samples_stop_where_a_text_would_start(make_run, tokenizer, capsys):
    main(make_run(biased(tokenizer, start=2000.0)), "--sample", "", "--n", 2)
    assert capsys.readouterr().out.partition("\n")[2] == "--- 1\n\n--- 2\n\n"


def test_samples_of_a_model_without_clm_come_with_a_note(make_run, capsys):
    main(make_run(schedule="2_MLM"), "--sample", "The", "--n", 1)
    assert "never learnt to predict the next token" in capsys.readouterr().out
