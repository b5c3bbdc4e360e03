"""Fine-tuning, from small tasks made here. Alone: python -m pytest tests/test_finetune.py"""

import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config
import finetune
import model as models
from antlm.checkpoint import file_sha256, save_checkpoint
from antlm.tokenizer import Tokenizer
from babylm.classifier import Classifier, LowRank
from babylm.glue import TASKS, Split, four_parts, join, measure, table, zero_shot_parts
from babylm.results import read_result, write_result
from config import UserError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
WORDS = "cat dog bird horse child teacher sees likes finds follows old young red small".split()

# ------------------------------------------------------------------------------------------ helpers


def make_model(backbone: str, vocab_size: int = 300) -> models.Transformer:
    torch.manual_seed(5)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, n_ff=48, n_bucket=4, max_position=8)
    return models.Transformer(models.ModelConfig(backbone, vocab_size, **sizes))


def make_run(
    folder: Path, corpus: str, backbone: str = "babyllama", schedule: str = "1_CLM+1_MLM"
) -> Path:
    """A run folder with an untrained model and the corpus's own tokenizer."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((Path(corpus) / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer(folder / "tokenizer.json")
    save_checkpoint(
        folder / "step_0000010.pt",
        make_model(backbone, tokenizer.vocab_size),
        step=10,
        boundary="line",
        settings=dict(schedule=schedule, block_size=16),
        tokenizer_sha256=tokenizer.sha256,
    )
    return folder


@pytest.fixture
def run(tmp_path, corpus) -> Path:
    return make_run(tmp_path / "run", corpus)


def sentences(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(n)]


def write_records(path: Path, records: list[dict]):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_glue(folder: Path, n_train: int = 32, n_valid: int = 16) -> Path:
    """cola asks whether "red" stands in a sentence, rte about two, mnli has three labels."""
    folder.mkdir()
    for split, n in (("train", n_train), ("valid", n_valid)):
        first = sentences(n, 1 + n)
        second = sentences(n, 2 + n)
        cola = []
        rte = []
        mnli = []
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            cola.append({"sentence": a, "label": int("red" in a)})
            same = ("red" in a) == ("red" in b)
            rte.append({"sentence1": a, "sentence2": b, "label": int(same)})
            mnli.append({"premise": a, "hypothesis": b, "label": i % 3})
        write_records(folder / f"cola.{split}.jsonl", cola)
        write_records(folder / f"rte.{split}.jsonl", rte)
        write_records(folder / f"mnli.{split}.jsonl", mnli)
    write_records(folder / "mnli-mm.valid.jsonl", mnli)  # the challenge has no train file of it
    return folder


@pytest.fixture
def glue(tmp_path) -> Path:
    return write_glue(tmp_path / "glue")


def tune(run: Path, *args, out: Path | None = None) -> dict:
    """Run finetune.py in this process and return the tasks of its result file."""
    out = out or run / "glue_10.json"
    finetune.main([str(run), f"--out={out}", *map(str, args)])
    return json.loads(out.read_text())["tasks"]


def make_split(n: int, n_classes: int = 2, seed: int = 1) -> Split:
    """Rows of 3 to 9 random tokens with arbitrary labels."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(4, 300, rng.integers(3, 10)).tolist() for _ in range(n)]
    return Split(ids, np.arange(n) % n_classes, list(range(n_classes)))


def make_settings(**changes) -> finetune.Settings:
    """Settings of a quick call, resolved for a model of both objectives."""
    values = dict(batch_rows=8, epochs=2, patience=0, lr=1e-2) | changes
    return finetune.Settings(**values).resolve("1_CLM+1_MLM")


def make_classifier(
    backbone: str = "babyllama", causal=(False, False), pool: str = "mean", dropout: float = 0.0
) -> Classifier:
    model = make_model(backbone)
    for p in model.parameters():  # as initialised, attention hardly matters
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    return Classifier(model, 2, list(causal), pool, dropout).eval()


# -------------------------------------------------------------------------------- inputs and scores


def test_the_longer_text_is_cut_first():
    """Token by token from the longer one, the second where they are equal."""
    for n, m, length in itertools.product(range(9), range(9), (2, 5, 8)):
        first = list(range(n))
        second = list(range(100, 100 + m))
        joined = join(first, second, length)
        while len(first) + len(second) > length:
            if len(first) > len(second):
                first.pop()
            else:
                second.pop()
        assert joined == first + second


def test_measures_of_two_classes_equal_their_formulas():
    rng = np.random.default_rng(1)
    labels = (rng.random(200) < 0.4).astype(int)
    for share in (0.1, 0.5, 0.9):
        guess = (rng.random(200) < share).astype(int)
        tp = int((labels & guess).sum())
        tn = int(((1 - labels) & (1 - guess)).sum())
        fp = int(guess.sum()) - tp
        fn = int(labels.sum()) - tp
        scores = measure(labels, guess, 2)
        assert scores["accuracy"] == pytest.approx((tp + tn) / 2)
        assert scores["f1"] == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn))
        mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        assert scores["mcc"] == pytest.approx(100 * mcc)


def test_correlation_is_zero_where_one_class_is_always_guessed():
    scores = measure(np.array([0, 1, 1, 1]), np.ones(4, int), 2)
    assert scores == pytest.approx(dict(accuracy=75, f1=600 / 7, mcc=0))


def test_f1_of_three_classes_is_their_mean():
    """F1 of 1/2, 4/5 and 2/3 by hand."""
    scores = measure(np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 1, 2, 0]), 3)
    assert scores["f1"] == pytest.approx(100 * (1 / 2 + 4 / 5 + 2 / 3) / 3)
    assert scores["accuracy"] == pytest.approx(400 / 6)


def test_a_class_that_does_not_occur_has_no_part_in_the_mean_f1():
    assert measure(np.array([0, 1]), np.array([0, 1]), 3)["f1"] == 100
    assert measure(np.array([0, 1]), np.array([0, 2]), 3)["f1"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("n_classes", [3, 4])
def test_the_correlation_of_classes_is_that_of_their_indicators(n_classes):
    """As Gorodkin (2004) defines it: one covariance over all indicators, normalised."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, n_classes, 100)
    guess = np.where(rng.random(100) < 0.3, labels, rng.integers(0, n_classes, 100))
    true = np.eye(n_classes)[labels]
    guessed = np.eye(n_classes)[guess]
    true -= true.mean(0)
    guessed -= guessed.mean(0)
    expected = (true * guessed).sum() / math.sqrt((true**2).sum() * (guessed**2).sum())
    assert 0.1 < expected < 0.9
    assert measure(labels, guess, n_classes)["mcc"] == pytest.approx(100 * expected)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("n_classes", [2, 3, 4])
@pytest.mark.parametrize("n_items", [2, 5, 40])
def test_measures_are_those_of_scikit_learn(n_classes, n_items):
    """Few items, so that classes are missing among the labels, the predictions or both."""
    metrics = pytest.importorskip("sklearn.metrics", reason="optional: pip install scikit-learn")
    rng = np.random.default_rng(n_classes)
    average = "binary" if n_classes == 2 else "macro"
    for _ in range(20):
        labels = rng.integers(0, n_classes, n_items)
        guess = np.where(rng.random(n_items) < 0.5, labels, rng.integers(0, n_classes, n_items))
        expected = dict(
            accuracy=100 * metrics.accuracy_score(labels, guess),
            f1=100 * metrics.f1_score(labels, guess, average=average, zero_division=0),
            mcc=100 * metrics.matthews_corrcoef(labels, guess),
        )
        assert measure(labels, guess, n_classes) == pytest.approx(expected)


@pytest.mark.parametrize("task", TASKS)
def test_the_score_of_a_task_is_the_metric_that_the_challenge_reports(monkeypatch, task):
    metrics = {"cola": "mcc", "mrpc": "f1", "qqp": "f1"}  # score_predictions.py; others accuracy
    guess = np.array([0, 1, 1, 1])
    monkeypatch.setattr(finetune, "predict", lambda *_: (guess, 0.5))
    split = Split([[4]] * 4, np.array([0, 0, 1, 1]), [0, 1])
    result = finetune.evaluate(None, task, split, make_settings())
    assert result["score"] == result[metrics.get(task, "accuracy")]
    assert len({result["accuracy"], result["f1"], result["mcc"]}) == 3


def test_an_epoch_has_each_item_once_in_an_order_of_its_own():
    ids = [[0] * (1 + i % 7) for i in range(333)]
    first = finetune.batches(ids, 8, 12, 1)
    again = finetune.batches(ids, 8, 12, 1)
    assert sorted(np.concatenate(first)) == list(range(333))
    assert max(map(len, first)) == 8
    assert np.array_equal(np.concatenate(first), np.concatenate(again))
    for seed, epoch in ((12, 2), (13, 1)):
        other = finetune.batches(ids, 8, seed, epoch)
        assert sorted(np.concatenate(other)) == list(range(333))
        assert not np.array_equal(np.concatenate(first), np.concatenate(other))


# ----------------------------------------------------------------------------------- the classifier


@pytest.mark.parametrize("backbone", models.BACKBONES)
@pytest.mark.parametrize("causal", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("pool", ["start", "mean", "last"])
def test_padding_changes_nothing(backbone, causal, pool):
    classifier = make_classifier(backbone, causal, pool)
    ids = [list(range(4, 4 + n)) for n in (3, 9, 5)]
    together = classifier(*finetune.pad_rows(ids, np.arange(3), CPU))
    for row in range(3):
        alone = classifier(*finetune.pad_rows(ids, np.array([row]), CPU))
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", models.BACKBONES)
@pytest.mark.parametrize("causal", list(itertools.product([True, False], repeat=2)))
def test_opening_any_layer_lets_the_first_position_see_the_last(backbone, causal):
    classifier = make_classifier(backbone, causal, "start")
    tokens = torch.tensor([[1, 10, 11, 12], [1, 10, 11, 13]])
    first, second = classifier(tokens, torch.tensor([4, 4]))
    # rows of a batch may differ in their last bits
    unseen = torch.allclose(first, second, rtol=1e-6, atol=1e-6)
    assert unseen == all(causal)


def test_a_pool_reads_the_position_that_it_names():
    ids = [list(range(4, 12)), list(range(4, 8))]
    tokens, lengths = finetune.pad_rows(ids, np.arange(2), CPU)
    read = {}
    for pool in ("start", "mean", "last"):
        classifier = make_classifier(pool=pool)
        classifier.blocks = torch.nn.ModuleList()  # the embedding alone
        classifier.causal = []
        classifier.dense = torch.nn.Identity()
        classifier.out = torch.nn.Identity()
        read[pool] = classifier(tokens, lengths)
    x = classifier.embedding.tokens(tokens)
    vectors = dict(
        start=x[:, 0],
        last=torch.stack([x[0, 7], x[1, 3]]),
        mean=torch.stack([x[0].mean(0), x[1, :4].mean(0)]),
    )
    for pool, vector in vectors.items():
        expected = models.bare_norm(F.gelu(models.bare_norm(vector)))
        torch.testing.assert_close(read[pool], expected, msg=pool)


def test_an_adapter_counts_alpha_over_rank():
    linear = torch.nn.Linear(6, 5)
    adapter = LowRank(linear, rank=4, alpha=10.0, dropout=0.5).eval()
    torch.nn.init.normal_(adapter.up.weight)
    x = torch.randn(3, 6)
    change = x @ adapter.down.weight.T @ adapter.up.weight.T
    torch.testing.assert_close(adapter(x), linear(x) + 10 / 4 * change)


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_adapters_start_at_nothing_and_leave_the_weights_alone(backbone):
    tokens = torch.arange(4, 24).view(2, 10)
    lengths = torch.tensor([10, 7])
    classifier = make_classifier(backbone)
    before = classifier(tokens, lengths)
    classifier.add_adapters(rank=4, alpha=16.0, dropout=0.0)
    torch.testing.assert_close(classifier(tokens, lengths), before)

    weights = {name: p.clone() for name, p in classifier.named_parameters()}
    trained = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # at the first step only the half that is zero has a gradient
        classifier(tokens, lengths).square().sum().backward()
        optimizer.step()
    moved = [n for n, p in classifier.named_parameters() if not torch.equal(p, weights[n])]
    ups = [name for name in moved if name.endswith(".up.weight")]
    downs = [name for name in moved if name.endswith(".down.weight")]
    heads = [name for name in moved if name.startswith(("dense", "out"))]
    n_linear = sum(isinstance(m, LowRank) for m in classifier.modules())
    assert len(ups) == len(downs) == n_linear > 0
    assert len(moved) == len(ups) + len(downs) + len(heads)


def test_dropout_acts_in_training_only():
    classifier = make_classifier(dropout=0.5)
    split = make_split(16)
    rows = finetune.pad_rows(split.ids, np.arange(16), CPU)
    classifier.train()
    assert not torch.equal(classifier(*rows), classifier(*rows))
    _, first = finetune.predict(classifier, split, make_settings())
    _, second = finetune.predict(classifier, split, make_settings())
    assert first == second


# -------------------------------------------------------------------------------------- fine-tuning


class Recorder(torch.optim.SGD):
    """Keeps the rate and the gradients of each step."""

    def __init__(self, classifier: Classifier):
        super().__init__(classifier.parameters())
        self.rates = []
        self.gradients = []

    def step(self):
        group = self.param_groups[0]
        self.rates.append(group["lr"])
        gradients = [p.grad.flatten() for p in group["params"] if p.grad is not None]
        self.gradients.append(torch.cat(gradients).clone())
        super().step()


def test_each_step_has_the_clipped_gradient_of_its_batch_alone():
    """At a rate that moves nothing, the gradient of each batch can be computed again."""
    split = make_split(16)
    settings = make_settings(lr=1e-30)
    classifier = make_classifier()
    recorder = Recorder(classifier)
    finetune.train_epoch(classifier, recorder, split, settings, 12, 1)

    order = finetune.batches(split.ids, settings.batch_rows, 12, 1)
    norms = []
    for rows, gradient in zip(order, recorder.gradients, strict=True):
        classifier.zero_grad()
        logits, labels = finetune.classify(classifier, split, rows, settings)
        F.cross_entropy(logits, labels).backward()
        expected = torch.cat([p.grad.flatten() for p in classifier.parameters()])
        norms.append(float(expected.norm()))
        torch.testing.assert_close(gradient, expected / max(1, norms[-1]))
    assert max(norms) > 1


def test_the_rate_rises_and_falls_over_all_epochs():
    settings = make_settings(lr=8.0, epochs=2, batch_rows=4, warmup=0.25)
    classifier = make_classifier()
    recorder = Recorder(classifier)
    split = make_split(16)
    for epoch in (1, 2):
        finetune.train_epoch(classifier, recorder, split, settings, 12, epoch)
    assert recorder.rates == pytest.approx([4, 8, 8, 8 * 5 / 6, 8 * 4 / 6, 4, 8 * 2 / 6, 8 / 6])


def test_without_a_warm_up_the_first_rate_is_the_peak():
    settings = make_settings(lr=8.0)
    rates = [finetune.learning_rate(step, 4, settings) for step in range(4)]
    assert rates == [8, 6, 4, 2]


def test_a_cosine_falls_towards_a_tenth():
    """The points of cosine_schedule_with_warmup, whose warm-up begins a step earlier, at 0."""
    settings = make_settings(lr=10.0, lr_decay="cosine", warmup=0.25)
    rates = [finetune.learning_rate(step, 8, settings) for step in range(9)]
    root = math.sqrt(3) / 2  # of 30 degrees
    half = [5.5 + 4.5 * x for x in (1, root, 0.5, 0, -0.5, -root, -1)]
    assert rates == pytest.approx([5, 10, *half])


def test_without_clipping_the_optimizer_is_given_the_gradient_itself():
    split = make_split(8)
    norms = {}
    for clip in (0.0, 1e-3):
        classifier = make_classifier()
        recorder = Recorder(classifier)
        settings = make_settings(clip=clip, lr=1e-30)
        finetune.train_epoch(classifier, recorder, split, settings, 12, 1)
        norms[clip] = float(recorder.gradients[0].norm())
    classifier = make_classifier()
    logits, labels = finetune.classify(classifier, split, np.arange(8), settings)
    F.cross_entropy(logits, labels).backward()
    gradients = [p.grad.flatten() for p in classifier.parameters()]
    assert norms[0.0] == pytest.approx(float(torch.cat(gradients).norm()), rel=1e-4)
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_each_epoch_of_fine_tuning_has_an_order_of_its_own(monkeypatch):
    asked = []

    def batches(ids, batch_rows, seed, epoch):
        asked.append((seed, epoch))
        return [np.arange(len(ids))]

    monkeypatch.setattr(finetune, "batches", batches)
    split = make_split(8)
    finetune.finetune(make_model("babyllama"), split, {"rte": split}, make_settings(epochs=3), 7)
    assert asked == [(7, 1), (7, 2), (7, 3)]


class Script:
    """Stands in for predict: what each epoch predicts, and its loss."""

    def __init__(self, *epochs):
        self.epochs = epochs
        self.done = 0

    def __call__(self, classifier, split, settings):
        predictions, loss = self.epochs[self.done]
        self.done += 1
        return np.array(predictions), loss


def chosen_epoch(monkeypatch, script: Script, task: str = "rte", **settings) -> int:
    monkeypatch.setattr(finetune, "predict", script)
    monkeypatch.setattr(finetune, "train_epoch", lambda *_: 0.0)
    split = Split([[4, 5]] * 6, np.array([0, 0, 0, 0, 1, 1]), [0, 1])
    settings = make_settings(epochs=len(script.epochs), **settings)
    result = finetune.finetune(make_model("babyllama"), split, {task: split}, settings, 1)[task]
    assert result["predictions"] == script.epochs[result["epoch"] - 1][0]
    return result["epoch"]


@pytest.mark.parametrize(
    "select, patience, chosen, trained",
    [("f1", 1, 1, 2), ("metric", 1, 3, 4), ("loss", 1, 2, 3), ("f1", 0, 5, 5), ("loss", 0, 2, 5)],
)
def test_the_best_epoch_counts_and_patience_ends_it(monkeypatch, select, patience, chosen, trained):
    """F1 is best at first and last, accuracy rises with the third epoch, the loss is lowest in the
    second."""
    script = Script(
        ([1, 1, 1, 1, 1, 1], 0.9),
        ([0, 0, 0, 0, 0, 0], 0.3),
        ([0, 0, 0, 0, 0, 1], 0.5),
        ([0, 0, 0, 0, 0, 1], 0.6),
        ([0, 0, 0, 0, 1, 1], 0.7),
    )
    assert chosen_epoch(monkeypatch, script, select=select, patience=patience) == chosen
    assert script.done == trained


def test_a_gain_of_less_than_a_thousandth_counts_and_does_not_renew_patience(monkeypatch):
    guess = [0] * 6
    script = Script((guess, 0.5), (guess, 0.4991), (guess, 0.4982), (guess, 0.1))
    assert chosen_epoch(monkeypatch, script, select="loss", patience=2) == 3
    assert script.done == 3


def test_a_gain_of_more_than_a_thousandth_renews_patience(monkeypatch):
    guess = [0] * 6
    script = Script((guess, 0.5), (guess, 0.4989), (guess, 0.4978), (guess, 0.4967))
    assert chosen_epoch(monkeypatch, script, select="loss", patience=1) == 4


def test_three_classes_are_selected_by_accuracy():
    result = dict(score=1.0, accuracy=50.0, f1=20.0, loss=2.0)
    values = [finetune.selection_value(result, n, "f1") for n in (2, 3)]
    assert values == [0.2, 0.5]


BY_HEART = [
    ("babyllama", {}),
    ("ltg_bert", {}),
    ("babyllama", dict(mask="causal")),
    ("babyllama", dict(mask="causal", n_open=("1",))),
    ("babyllama", dict(pool="mean")),
    ("ltg_bert", dict(lora_rank=16)),
]


@pytest.mark.parametrize("backbone, changes", BY_HEART, ids=str)
def test_arbitrary_labels_are_learnt_by_heart(backbone, changes):
    split = make_split(16)
    settings = make_settings(epochs=40, batch_rows=16, dropout=0.0, lora_dropout=0.0, **changes)
    model = make_model(backbone)
    result = finetune.finetune(model, split, {"rte": split}, settings, 12)["rte"]
    assert result["accuracy"] == 100


# ----------------------------------------------------------------------------------- whole commands


@pytest.mark.slow
def test_a_rule_is_learnt_that_the_majority_class_misses(run, tmp_path):
    """Whether a word stands in a sentence: a third of the training sentences hold it."""
    glue = write_glue(tmp_path / "glue", n_train=96, n_valid=40)
    flags = ["--tasks=cola", "--lr=3e-3", "--epochs=30", "--patience=0", "--batch_rows=8"]
    result = tune(run, f"--data={glue}", *flags)["cola"]["seeds"]["12"]
    assert result["score"] == result["mcc"]
    assert result["score"] > 60
    labels = [record["label"] for record in read_records(glue / "cola.valid.jsonl")]
    right = np.mean(np.array(result["predictions"]) == labels)
    assert result["accuracy"] == pytest.approx(100 * right)


def test_a_second_call_does_only_what_is_missing(run, glue, capsys):
    flags = [f"--data={glue}", "--epochs=1"]
    first = tune(run, "--tasks=rte", *flags)
    both = tune(run, "--tasks=rte,cola", "--seeds=12,13", *flags)
    printed = capsys.readouterr().out
    assert both["rte"]["seeds"]["12"] == first["rte"]["seeds"]["12"]
    for line in ("rte seed 12", "rte seed 13", "cola seed 12", "cola seed 13"):
        assert printed.count(line) == 1
    tune(run, "--tasks=rte,cola", "--seeds=12,13", *flags)
    printed = capsys.readouterr().out
    assert printed.count("done before") == 2
    assert "seed" not in printed


def test_the_same_seed_gives_the_same_numbers(run, glue, tmp_path):
    flags = [f"--data={glue}", "--tasks=rte", "--epochs=2", "--seeds=12,13"]
    first = tune(run, *flags)["rte"]["seeds"]
    second = tune(run, *flags, out=tmp_path / "again.json")["rte"]["seeds"]
    assert first == second
    assert first["12"]["loss"] != first["13"]["loss"]


def test_a_stopped_call_has_saved_what_it_had_finished(run, glue, monkeypatch):
    flags = [f"--data={glue}", "--tasks=rte", "--epochs=1", "--seeds=12,13"]
    real = finetune.finetune

    def stop_at_13(model, train, valid, settings, seed):
        if seed == 13:
            raise KeyboardInterrupt
        return real(model, train, valid, settings, seed)

    monkeypatch.setattr(finetune, "finetune", stop_at_13)
    with pytest.raises(KeyboardInterrupt):
        tune(run, *flags)
    saved = json.loads((run / "glue_10.json").read_text())["tasks"]["rte"]["seeds"]
    assert list(saved) == ["12"]
    monkeypatch.setattr(finetune, "finetune", real)
    assert list(tune(run, *flags)["rte"]["seeds"]) == ["12", "13"]


def test_results_of_other_settings_or_weights_are_not_mixed(run, glue, tmp_path, corpus):
    flags = [f"--data={glue}", "--tasks=rte", "--epochs=1"]
    tune(run, *flags)
    with pytest.raises(UserError, match="holds rte with lr=5e-05, not 0.01"):
        tune(run, *flags, "--lr=0.01")
    other = make_run(tmp_path / "other", corpus, "ltg_bert")
    with pytest.raises(UserError, match="results of another checkpoint"):
        tune(other, *flags, out=run / "glue_10.json")


def test_results_from_before_a_setting_have_its_default(run, glue):
    flags = [f"--data={glue}", "--tasks=rte", "--epochs=1"]
    tune(run, *flags)
    result = read_result(run / "glue_10.json")
    for name in ("lr_decay", "clip"):
        del result["tasks"]["rte"]["settings"][name]
    write_result(run / "glue_10.json", result)
    assert list(tune(run, *flags, "--seeds=12,13")["rte"]["seeds"]) == ["12", "13"]
    with pytest.raises(UserError, match="holds rte with clip=1.0, not 0.0"):
        tune(run, *flags, "--clip=0")


def test_mnli_mm_is_scored_with_the_model_of_mnli(run, glue, capsys):
    rows = read_records(glue / "mnli-mm.valid.jsonl")  # the same texts get other labels
    write_records(glue / "mnli-mm.valid.jsonl", [{**row, "label": 1} for row in rows])
    flags = [f"--data={glue}", "--tasks=mnli-mm,mnli", "--epochs=2", "--limit=12"]
    tasks = tune(run, *flags)
    matched = tasks["mnli"]["seeds"]["12"]
    mismatched = tasks["mnli-mm"]["seeds"]["12"]
    assert mismatched["epoch"] == matched["epoch"]
    assert mismatched["predictions"] == matched["predictions"]
    share = mismatched["predictions"].count(1) / 12
    assert mismatched["accuracy"] == pytest.approx(100 * share)
    printed = capsys.readouterr().out
    assert "mnli: mnli.train.jsonl, 12 items (the first 12 only)" in printed
    assert "PARTIAL" in printed


def test_every_seed_starts_from_the_weights_of_the_run(run, glue, tmp_path):
    flags = [f"--data={glue}", "--tasks=rte", "--epochs=1", "--lr=0.01"]
    alone = tune(run, *flags, "--seeds=13", out=tmp_path / "alone.json")
    after = tune(run, *flags, "--seeds=12,13", out=tmp_path / "after.json")
    assert after["rte"]["seeds"]["13"] == alone["rte"]["seeds"]["13"]


def test_mnli_mm_is_added_to_a_result_of_mnli_alone(run, glue):
    flags = [f"--data={glue}", "--epochs=1", "--limit=12"]
    assert list(tune(run, *flags, "--tasks=mnli")) == ["mnli"]
    tasks = tune(run, *flags, "--tasks=mnli,mnli-mm")
    assert list(tasks["mnli-mm"]["seeds"]) == ["12"]


def test_the_measures_of_a_task_of_three_labels_are_those_of_its_predictions(run, glue):
    """F1 label by label, as its definition reads."""
    result = tune(run, f"--data={glue}", "--tasks=mnli", "--epochs=2")["mnli"]["seeds"]["12"]
    labels = [record["label"] for record in read_records(glue / "mnli.valid.jsonl")]
    pairs = list(zip(labels, result["predictions"], strict=True))
    values = []
    for label in range(3):
        hits = pairs.count((label, label))
        others = sum((a == label) != (b == label) for a, b in pairs)
        values.append(2 * hits / (2 * hits + others))
    assert len(set(values)) > 1, "any kind of mean would do"
    assert result["f1"] == pytest.approx(100 * statistics.mean(values))
    assert (
        result["score"]
        == result["accuracy"]
        == pytest.approx(100 * sum(a == b for a, b in pairs) / len(pairs))
    )


def test_inputs_are_cut_to_max_length(run, glue, capsys, monkeypatch):
    longest = []

    def finish(model, train, valid, settings, seed):
        longest.append(max(map(len, train.ids)))
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "finetune", finish)
    with pytest.raises(KeyboardInterrupt):
        tune(run, f"--data={glue}", "--tasks=rte", "--max_length=9")
    assert longest == [9]
    assert "cut to 9 tokens" in capsys.readouterr().out


def write_override(path: Path, **settings) -> Path:
    lines = [f"{name} = {value!r}" for name, value in settings.items()]
    path.write_text("\n".join(lines))
    return path


def test_a_task_may_have_its_own_settings(run, glue, tmp_path):
    override = write_override(
        tmp_path / "own.py", task_settings={"rte": dict(epochs=2, seeds=("7",), lr=1)}
    )
    tasks = tune(run, override, f"--data={glue}", "--tasks=rte,cola", "--epochs=1")
    assert tasks["rte"]["settings"]["epochs"] == 2
    assert tasks["cola"]["settings"]["epochs"] == 1
    assert list(tasks["rte"]["seeds"]) == ["7"]
    assert list(tasks["cola"]["seeds"]) == ["12"]


BAD_TASK_SETTINGS = [
    ({"snli": {}}, "task_settings: snli is not one of boolq"),
    ({"rte": 3}, "task_settings: rte must have a dict"),
    ({"rte": dict(epoch=2)}, "task_settings: rte: 'epoch' is none of data, seeds"),
    ({"rte": dict(epochs="2")}, "rte: epochs = '2' must be of type int"),
    ({"rte": dict(epochs=0)}, "rte: epochs must be greater than 0"),
    ({"rte": dict(device="cpu")}, "rte: 'device' is none of"),
    ({"mnli-mm": dict(lr=1.0)}, "mnli-mm is scored with the model of mnli"),
]


@pytest.mark.parametrize("task_settings, expected", BAD_TASK_SETTINGS, ids=str)
def test_task_settings_that_cannot_be_are_named(tmp_path, task_settings, expected):
    override = write_override(tmp_path / "own.py", task_settings=task_settings)
    with pytest.raises(UserError) as error:
        config.load(finetune.Settings, [str(override), "--tasks=rte"])
    assert expected in str(error.value)
    assert "own.py" in str(error.value)


@pytest.mark.parametrize("name", [file.name for file in (ROOT / "config/finetune").glob("*.py")])
def test_the_files_of_settings_load(name):
    settings = config.load(finetune.Settings, [str(ROOT / "config/finetune" / name)])
    for task, changes in settings.task_settings.items():
        for setting, value in changes.items():
            assert getattr(settings.by_task()[task], setting) == value


@pytest.mark.parametrize("year, pool", [("2025", "auto"), ("2026", "last")])
def test_fine_tuning_of_a_year_is_that_of_its_pipeline(year, pool):
    """As eval_finetuning.sh calls it, with what run.py and trainer.py leave fixed."""
    file = ROOT / f"config/finetune/glue_{year}.py"
    by_task = config.load(finetune.Settings, [str(file)]).by_task()
    assert set(by_task) == {"boolq", "mnli", "mrpc", "multirc", "qqp", "rte", "wsc"}
    for task, settings in by_task.items():
        assert settings.pool == pool
        assert settings.max_length == 512
        assert settings.batch_rows == (16 if task in ("boolq", "multirc") else 32)
        assert settings.epochs == (30 if task == "wsc" else 10)
        assert (settings.lr, settings.lr_decay, settings.warmup) == (3e-5, "cosine", 0.06)
        assert (settings.weight_decay, settings.clip, settings.dropout) == (0.01, 0, 0.1)
        assert (settings.patience, settings.select, settings.seeds) == (0, "metric", ("42",))


@pytest.mark.parametrize(
    "schedule, mask, pool",
    [("4_CLM", "causal", "last"), ("1_CLM+1_MLM", "full", "start"), ("1_MNTP", "full", "start")],
)
def test_the_mask_follows_what_the_model_has_learnt(schedule, mask, pool):
    settings = finetune.Settings().resolve(schedule)
    assert (settings.mask, settings.pool) == (mask, pool)
    assert finetune.Settings(pool="mean").resolve(schedule).pool == "mean"
    assert finetune.Settings(mask="full").resolve(schedule).mask == "full"


def test_a_causal_model_is_fine_tuned_under_a_causal_mask(tmp_path, corpus, glue):
    run = make_run(tmp_path / "run", corpus, schedule="4_CLM")
    settings = tune(run, f"--data={glue}", "--tasks=rte", "--epochs=1")["rte"]["settings"]
    assert (settings["mask"], settings["pool"]) == ("causal", "last")


# ------------------------------------------------------------------------------------------ reports


def fake_result(score: float) -> dict:
    """A seed whose score is none of its measures, which a table might take for it."""
    measures = dict(accuracy=score + 1, f1=score + 2, mcc=score + 3)
    return dict(score=score, **measures, loss=1.0, epoch=3, predictions=[])


def test_the_table_shows_means_and_deviations():
    tasks = {
        "rte": {"12": fake_result(60.0), "13": fake_result(70.0)},
        "cola": {"12": fake_result(20.0)},
    }
    lines = [line.split() for line in table(tasks).splitlines()]
    deviation = f"{statistics.stdev([60, 70]):.1f}"
    assert lines[2] == ["rte", "accuracy", "65.0", deviation, "66.0", "67.0", "68.0", "3", "3"]
    assert lines[3][:4] == ["cola", "mcc", "20.0", "-"]
    assert lines[-1] == ["mean", "of", "2", "tasks", "42.5"]  # of tasks, not of seeds


def write_zero_shot(run: Path, step: int, name: str, kind: str, n_subsets: int, score: float):
    subsets = {f"s{i}": {} for i in range(n_subsets)}
    task = {"kind": kind, "accuracy": {"causal": score}, "subsets": subsets}
    content = {"step": step, "partial": False, "protocol": "2025", "tasks": {name: task}}
    (run / f"eval_{name}_{step}.json").write_text(json.dumps(content))


@pytest.fixture
def scored(run) -> Path:
    """A run whose other parts of the macro average are 70, 50 and 60 percent."""
    write_zero_shot(run, 10, "blimp", "blimp", 67, 70.0)
    write_zero_shot(run, 10, "supplement", "blimp", 5, 50.0)
    write_zero_shot(run, 10, "ewok", "ewok", 11, 60.0)
    return run


def test_the_newest_result_of_a_part_counts_whatever_its_name(run):
    write_zero_shot(run, 10, "a", "blimp", 67, 70.0)
    write_zero_shot(run, 10, "b", "blimp", 67, 20.0)
    os.utime(run / "eval_b_10.json", (1e9, 1e9))
    assert zero_shot_parts(run, 10, "last") == {"causal 2025": {"BLiMP": 70.0}}


def write_tuned(run: Path, **changes):
    """Results of all tasks: 11 to 21 percent, with a mean of 16."""
    stored = finetune.Settings(**changes).resolve("1_CLM+1_MLM").stored()
    tasks = {}
    for i, task in enumerate(TASKS):
        seeds = {"12": fake_result(6.0 + i), "13": fake_result(16.0 + i)}
        tasks[task] = {"settings": stored, "seeds": seeds}
    sha256 = file_sha256(run / "step_0000010.pt")
    content = {"step": 10, "checkpoint_sha256": sha256, "tasks": tasks}
    write_result(run / "glue_10.json", content)


def test_the_printed_averages_are_those_of_the_scores(scored, capsys):
    write_tuned(scored)
    finetune.main([str(scored), "--seeds=12,13"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3].split() == ["mean", "of", "11", "tasks", "16.0"]
    parts = printed[-1].removeprefix("causal 2025: ").split("  ")
    assert set(parts[:4]) == {"BLiMP 70.0", "supplement 50.0", "EWoK 60.0", "GLUE 16.0"}
    assert parts[4] == "macro average 49.0"


def test_scores_of_a_part_of_the_lines_give_no_macro_average(scored, capsys):
    write_tuned(scored, limit=5)
    finetune.main([str(scored), "--limit=5"])
    assert "no macro average: GLUE not scored whole" in capsys.readouterr().out


def test_the_macro_average_names_what_is_missing(run):
    write_zero_shot(run, 10, "blimp", "blimp", 67, 70.0)
    write_zero_shot(run, 100, "blimp", "blimp", 67, 99.0)  # its name fits step 10, too
    expected = "causal 2025: BLiMP 70.0  no macro average: supplement, EWoK, GLUE not scored whole"
    assert four_parts(run, 10, "last", None) == expected
    write_zero_shot(run, 10, "supplement", "blimp", 5, 50.0)
    assert four_parts(run, 10, "last", 40.0).endswith("no macro average: EWoK not scored whole")


def test_some_tasks_give_no_macro_average(run, glue, capsys):
    tune(run, f"--data={glue}", "--tasks=rte", "--epochs=1")
    printed = capsys.readouterr().out
    assert "mean of 1 tasks" in printed
    assert "macro average" not in printed


# ----------------------------------------------------------------------------------- wrong use

BAD = [
    (["--tasks=rte,snli"], "tasks: 'snli' is not one of boolq"),
    (["--tasks="], "tasks must name at least one"),
    (["--tasks=mnli-mm"], "mnli-mm is scored with the model of mnli"),
    (["--tasks=sst2"], "holds 0 files sst2.train*.jsonl where one was expected"),
    (["--data=nowhere"], "nowhere: is not a folder"),
    (["--n_open=1"], "n_open opens layers of a causal mask"),
    (["--mask=causal", "--n_open=7", "--tasks=rte"], "layer 7, but the model's 2"),
    (["--seeds=x"], "seeds must be whole numbers"),
    (["--dropout=1"], "dropout must lie in [0, 1)"),
    (["--pool=first"], "pool = 'first' must be one of auto, start, mean, last"),
    (["--weights=best"], "weights = 'best' must be one of average, last"),
    (["--mask=none"], "mask = 'none' must be one of auto, full, causal"),
    (["--lr_decay=step"], "lr_decay = 'step' must be one of linear, cosine"),
    (["--select=last"], "select = 'last' must be one of f1, metric, loss"),
    (["--device=tpu"], "device = 'tpu' must be one of auto, cpu, cuda, mps"),
    (["--dtype=float16"], "dtype = 'float16' must be one of float32, bfloat16"),
    (["--max_length=7"], "max_length must be at least 8 tokens"),
    (["--lora_rank=-1"], "lora_rank must not be negative"),
    (["--lora_alpha=0"], "lora_alpha must be greater than 0"),
    (["--lora_dropout=1"], "lora_dropout must lie in [0, 1)"),
    (["--lr=0"], "lr must be greater than 0"),
    (["--warmup=1"], "warmup must lie in [0, 1)"),
    (["--weight_decay=-1"], "weight_decay must not be negative"),
    (["--clip=-1"], "clip must not be negative"),
    (["--batch_rows=0"], "batch_rows must be greater than 0"),
    (["--epochs=0"], "epochs must be greater than 0"),
    (["--patience=-1"], "patience must not be negative"),
    (["--limit=-1"], "limit must not be negative"),
]


def test_every_number_of_fine_tuning_has_a_value_that_is_refused():
    refused = {args[0].split("=")[0].removeprefix("--") for args, _ in BAD}
    numbers = {field.name for field in fields(finetune.Settings) if field.type in (int, float)}
    assert numbers <= refused


@pytest.mark.parametrize("args, expected", BAD, ids=str)
def test_wrong_use_is_named(run, glue, args, expected):
    with pytest.raises(UserError) as error:
        finetune.main([str(run), f"--data={glue}", *args])
    assert expected in str(error.value)


def test_rows_that_the_model_cannot_take_are_named(run, glue, monkeypatch):
    backbone = models.BACKBONES["babyllama"]._replace(max_tokens=lambda config: 64)
    monkeypatch.setitem(models.BACKBONES, "babyllama", backbone)
    with pytest.raises(UserError, match="max_length = 128, but the model takes at most 64"):
        finetune.main([str(run), f"--data={glue}", "--tasks=rte"])


BAD_LINES = [
    ({"sentence1": "a", "label": 0}, "texts sentence1, sentence2; 'sentence2' is missing"),
    ({"sentence1": "a", "sentence2": 3, "label": 0}, "'sentence2' is no text"),
    ({"sentence1": "a", "sentence2": "b"}, "label is None, not a whole number"),
    ({"sentence1": "a", "sentence2": "b", "label": True}, "label is True"),
]


@pytest.mark.parametrize("line, expected", BAD_LINES, ids=str)
def test_a_bad_line_is_named(run, glue, line, expected):
    records = read_records(glue / "rte.train.jsonl")
    write_records(glue / "rte.train.jsonl", [*records[:2], line, *records[2:]])
    with pytest.raises(UserError) as error:
        finetune.main([str(run), f"--data={glue}", "--tasks=rte"])
    assert expected in str(error.value)
    assert "rte.train.jsonl:3: " in str(error.value)


def test_labels_that_training_never_saw_are_named(run, glue):
    records = read_records(glue / "rte.valid.jsonl")
    records.append({"sentence1": "a", "sentence2": "b", "label": 7})
    write_records(glue / "rte.valid.jsonl", records)
    expected = r"rte.valid.jsonl:17: label is 7, not one of the train file's \[0, 1\]"
    with pytest.raises(UserError, match=expected):
        finetune.main([str(run), f"--data={glue}", "--tasks=rte"])


def test_one_class_is_refused(run, glue):
    records = read_records(glue / "rte.train.jsonl")
    write_records(glue / "rte.train.jsonl", [{**record, "label": 1} for record in records])
    with pytest.raises(UserError, match="every label is 1; a classifier needs two or more"):
        finetune.main([str(run), f"--data={glue}", "--tasks=rte"])


def test_a_model_that_diverges_ends_in_one_line():
    split = make_split(16)
    with pytest.raises(UserError, match="not finite; choose a smaller lr"):
        settings = make_settings(lr=1e30)
        finetune.finetune(make_model("babyllama"), split, {"rte": split}, settings, 1)


@pytest.mark.slow
def test_a_mistake_ends_the_program_in_one_line(run):
    command = [sys.executable, "finetune.py", str(run), "--tasks=snli"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("finetune.py: --tasks: tasks: 'snli' is not one of")
    assert len(done.stderr.splitlines()) == 1
