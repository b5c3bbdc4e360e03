"""Every setting of every program does what its comment says.

python -m pytest tests/test_settings.py -k "finetune and lora"
python -m pytest tests/test_settings.py -m "not slow"           # without tools/

A row of the tables below names a setting, values for it, what is then seen, and how to see it: in a
real call on tiny material, seldom in what is printed. A setting without a row fails, and so does a
row without a setting: whoever adds a setting adds here what it changes.

The text has lines of eight tokens and fills 24 rows of 16 tokens, so that an epoch has three full
steps of eight rows, and all that is counted comes out even.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import statistics
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import experiment
import grammar
import numpy as np
import plot
import pytest
import torch
from conftest import read_metrics, train_here
from test_finetune import write_glue, write_records
from torch import Tensor, nn
from watch import Pass, Watcher

import config
import eval as evaluation
import finetune
import prepare
import sample
import schedule
import train
from antlm import IGNORE
from antlm.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from antlm.optim import OPTIMIZERS
from antlm.tokenizer import MASK, START, Tokenizer
from babylm import submit
from babylm.classifier import Classifier, LowRank
from babylm.results import write_result
from babylm.tasks import fingerprint, read_tasks
from config import UserError
from model import BACKBONES, ModelConfig, Transformer, bare_norm
from schedule import DECAYS
from tools import bench
from tools.peers import PEERS

# ------------------------------------------------------------------------------- how a row is tried


class Row(NamedTuple):
    """A setting, and what is seen at some of its values.

    expected: {value: what is seen}, or a tuple of values at each of which something else is seen;
    @name stands for the path of one of MATERIAL, @out for a new folder of each trial
    look: takes a Trial and returns what is seen
    others: further settings of the trials
    call: in place of that of the program
    """

    setting: str
    expected: dict | tuple
    look: Callable
    others: dict = {}
    call: Callable | None = None


class NamedAll(Exception):
    """A program is about to read its arguments, all of which it has named."""


def name_all(parser: argparse.ArgumentParser, args=None):
    """Stand in for parse_args()."""
    raise NamedAll({action.dest for action in parser._actions} - {"help"})


class Program(NamedTuple):
    """A program, and how its settings become the arguments of its command line.

    call: takes these arguments
    base: settings of all trials, unless a row says otherwise
    positional: settings without a name, in their order
    settings: the dataclass that config.load fills; None where argparse reads the arguments
    """

    call: Callable
    base: dict
    rows: list[Row]
    positional: tuple = ()
    settings: type | None = None

    def known(self) -> set[str]:
        """Return the names of all settings that the program has."""
        if self.settings:
            return {one.name for one in fields(self.settings)} | set(self.positional)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(NamedAll) as end:
            patch.setattr(argparse.ArgumentParser, "parse_args", name_all)
            self.call([])
        return end.value.args[0]

    def arguments(self, settings: dict, folder: Path) -> list[str]:
        """Return the arguments that give these settings; dicts go into an override file."""
        kinds = {}
        if self.settings:
            kinds = {one.name: one.type for one in fields(self.settings)}
        positional = []
        flags = []
        lines = []
        for name, value in settings.items():
            if kinds.get(name) is dict:
                lines.append(f"{name} = {value}\n")
            elif name in self.positional:
                positional += value if isinstance(value, tuple) else [value]
            elif self.settings:
                flags.append(f"--{name}={config.flag_text(value)}")
            elif isinstance(value, tuple):
                flags += [f"--{name}", *value]
            elif value is True:
                flags.append(f"--{name}")
            elif value is not False and value is not None:
                flags += [f"--{name}", value]
        if lines:
            override = folder.with_suffix(".py")
            override.write_text("".join(lines))
            positional.append(override)
        return list(map(str, positional + flags))


@dataclass
class Trial:
    """What one call of a program did.

    error: the line in which it ended, or ""
    compiled: the arguments of each torch.compile
    """

    folder: Path
    printed: str
    error: str
    passes: list[Pass]
    compiled: list[dict]

    @property
    def training(self) -> list[Pass]:
        return [one for one in self.passes if one.trains]

    @property
    def evaluation(self) -> list[Pass]:
        return [one for one in self.passes if not one.trains]


class Lab:
    """Material that trials share, made when it is first asked for, and the trials done so far."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.trials = {}

    def path(self, name: str) -> Path:
        """Return the path of a row of MATERIAL."""
        path = self.folder / name
        if not path.exists():
            MATERIAL[name](self, path)
        return path

    def resolve(self, value, out: Path):
        """Put paths in place of each @name."""
        if isinstance(value, tuple):
            return tuple(self.resolve(part, out) for part in value)
        if not isinstance(value, str):
            return value
        value = value.replace("@out", str(out))
        return re.sub(r"@(\w+)", lambda match: str(self.path(match[1])), value)

    def trial(self, program: Program, **settings) -> Trial:
        """Call a program with its base settings and these, once, and return what it did."""
        settings = program.base | settings
        key = (program.call, *sorted(settings.items(), key=str))
        if key not in self.trials:
            out = self.folder / f"trial_{len(self.trials)}"
            out.mkdir()
            settings = {name: self.resolve(value, out) for name, value in settings.items()}
            self.trials[key] = perform(program, settings, out)
        return self.trials[key]


def perform(program: Program, settings: dict, folder: Path) -> Trial:
    arguments = program.arguments(settings, folder)
    printed = io.StringIO()
    error = ""
    with Watcher() as watcher, contextlib.redirect_stdout(printed):
        try:
            program.call(arguments)
        except (UserError, SystemExit) as end:
            error = str(end)
    return Trial(folder, printed.getvalue(), error, watcher.passes, watcher.compiled)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def as_program(main: Callable, arguments: list[str]):
    """Call a main() that reads the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *arguments])
        main()


# ------------------------------------------------------------------------------------- the material

BYTES = 260  # size of the vocabulary of bytes and special tokens, without merges


def write_text(path: Path, n_line: int, seed: int):
    """Write lines of two words of three letters, which are eight tokens each."""
    rng = random.Random(seed)
    lines = []
    for _ in range(n_line):
        words = ("".join(rng.choices("abcd", k=3)) for _ in range(2))
        lines.append(" ".join(words) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))


def make_texts(lab: Lab, path: Path):
    """Texts of 96, 32, 40 and 600 words."""
    write_text(path / "train.txt", 48, seed=1)
    write_text(path / "short.txt", 16, seed=2)
    write_text(path / "dev.txt", 20, seed=3)
    write_text(path / "long.txt", 300, seed=4)


def make_corpus(lab: Lab, path: Path, train_text: str = "train.txt", vocab_size: int = BYTES):
    texts = lab.path("texts")
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.prepare(
            [str(texts / train_text)], [str(texts / "dev.txt")], str(path), vocab_size=vocab_size
        )


def train_run(lab: Lab, path: Path, **settings):
    """Train for an epoch of each objective."""
    settings = TRAIN.base | {"schedule": "1_CLM+1_MLM", "n_layer": 2, "out_dir": path} | settings
    settings["corpus"] = lab.path("corpus")
    with contextlib.redirect_stdout(io.StringIO()):
        train_here(*TRAIN.arguments(settings, lab.folder))


def train_half(lab: Lab, path: Path):
    """A run that was stopped after three of six steps."""
    train_run(lab, path, schedule="2_CLM", n_layer=1)
    for checkpoint in checkpoints(path)[:3]:
        checkpoint.unlink()


LETTERS = {"a": math.log(1), "b": math.log(3), "c": math.log(0.5)}


def make_dice(lab: Lab, path: Path):
    """A run whose model says a, b and c with probabilities of 1, 3 and 0.5 in 4.5, always."""
    path.mkdir()
    tokenizer_json = lab.path("corpus") / "tokenizer.json"
    (path / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    tokenizer = Tokenizer(tokenizer_json)
    model = Transformer(ModelConfig("ltg_bert", BYTES, 1, 2, 16, 24, n_bucket=4, max_position=8))
    with torch.no_grad():
        model.embedding.tokens.weight.zero_()  # which is the output matrix, too
        model.head.vocab.bias.fill_(-1000.0)
        for letter, logit in LETTERS.items():
            model.head.vocab.bias[tokenizer.encode(letter)] = logit
    save_checkpoint(
        path / "step_0000010.pt",
        model,
        step=10,
        boundary="line",
        settings=dict(schedule="1_CLM", block_size=16),
        tokenizer_sha256=tokenizer.sha256,
    )


def make_pairs(lab: Lab, path: Path, seed: int = 5):
    """Five pairs of different sentences, all of seven letters."""
    write_text(path / "text.txt", 10, seed)
    lines = (path / "text.txt").read_text().splitlines()
    assert len(set(lines)) == 10
    records = []
    for good, bad in zip(lines[:5], lines[5:], strict=True):
        records.append({"sentence_good": good, "sentence_bad": bad})
    write_records(path / "order.jsonl", records)


def make_supplement(lab: Lab, path: Path):
    """As many pairs as the supplement of BLiMP has."""
    path.mkdir()
    records = []
    for i in range(submit.COUNTS["blimp_supplement"]):
        records.append({"sentence_good": f"Good {i}.", "sentence_bad": f"Bad {i}."})
    write_records(path / "hypernym.jsonl", records)


def make_scored(lab: Lab, path: Path, score: float = 1.0):
    """A run folder with scores of the supplement in two modes, and predictions of a GLUE task."""
    path.mkdir()
    items = read_tasks(str(lab.path("supplement")))
    subsets = {}
    for item in items:
        subset = subsets.setdefault(item.subset, {"items": 0, "scores": {}})
        subset["items"] += 1
        for mode, good in (("causal", score), ("masked", -score)):
            subset["scores"].setdefault(mode, []).append([good, 0.0])
    result = {"kind": "blimp", "options_sha256": fingerprint(items), "subsets": subsets}
    content = {"step": 10, "partial": False, "modes": ["causal", "masked"]}
    content |= {"task": str(lab.path("supplement")), "tasks": {"supplement": result}}
    for year in ("2024", "2025"):
        write_result(path / f"eval_supplement_10_{year}.json", content | {"protocol": year})


def write_tiny(lab: Lab, path: Path, backbone: str = "babyllama"):
    """An override file of a tiny model."""
    settings = SMALL | {"backbone": backbone, "n_bucket": 4, "max_position": 8}
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))


def export_run(lab: Lab, path: Path, run: str = "run"):
    with contextlib.redirect_stdout(io.StringIO()):
        call_export([str(lab.path(run)), str(path)])


MATERIAL = {
    "texts": make_texts,
    "corpus": make_corpus,
    "short_corpus": partial(make_corpus, train_text="short.txt"),
    "merged_corpus": partial(make_corpus, vocab_size=BYTES + 2),
    "run": train_run,
    "other_run": partial(train_run, seed=2),
    "half_run": train_half,
    "dice": make_dice,
    "glue": lambda lab, path: write_glue(path),
    "short_glue": lambda lab, path: write_glue(path, n_train=24, n_valid=8),
    "pairs": make_pairs,
    "other_pairs": partial(make_pairs, seed=6),
    "supplement": make_supplement,
    "scored": make_scored,
    "other_scored": partial(make_scored, score=-1.0),
    "override": lambda lab, path: path.write_text("lr = 0.125\n"),
    "tiny": write_tiny,
    "tiny_ltg": partial(write_tiny, backbone="ltg_bert"),
    "exported": export_run,
    "other_exported": partial(export_run, run="other_run"),
}

# ------------------------------------------------------------------------- seen in several programs


def devices(run: Trial):
    """The devices of the tokens, or "refused"."""
    if run.error:
        return "refused"
    return {one.tokens.device.type for one in run.passes}


def linear_dtypes(passes: list[Pass]) -> set[torch.dtype]:
    """The types of the results of all linear maps, but for the loss, which has a float32 sum."""
    dtypes = set()
    for one in passes:
        dtypes |= {call.y.dtype for call in one.of(nn.Linear)}
    return dtypes


def dtypes(run: Trial) -> tuple:
    """In training and in evaluation."""
    return linear_dtypes(run.training), linear_dtypes(run.evaluation)


def zeros(tensors: list[Tensor]) -> float:
    """The share of zeros."""
    return torch.cat([tensor.flatten() for tensor in tensors]).eq(0).float().mean().item()


def causal_passes(run: Trial) -> list[bool]:
    """Of each pass, whether its first layer keeps a query from later keys."""
    return [one.attention[0].causal for one in run.passes]


def n_layers(run: Trial) -> set[int]:
    return {len(one.attention) for one in run.passes}


def row_lengths(run: Trial) -> set[int]:
    return {one.tokens.size(1) for one in run.passes}


def most_rows(run: Trial) -> int:
    return max(one.tokens.size(0) for one in run.passes)


def files(run: Trial) -> list[str]:
    """The files in the folder of the trial, by their names in it."""
    paths = sorted(path.relative_to(run.folder) for path in run.folder.rglob("*"))
    return [str(path) for path in paths if (run.folder / path).is_file()]


def is_refused(run: Trial) -> bool:
    return run.error != ""


def movements(weights: list[dict[str, Tensor]]) -> list[float]:
    """How far a weight that moves went in each step: the median."""
    medians = []
    for before, after in itertools.pairwise(weights):
        moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).abs()
        moved = moved[moved > 0]
        medians.append(moved.median().item() if len(moved) else 0.0)
    return medians


def kept(before: Tensor, after: Tensor) -> float:
    """What part of a weight a step has left: the median."""
    return (after / before).median().item()


CUDA = {"cuda"} if torch.cuda.is_available() else "refused"
FLOAT32 = ({torch.float32}, {torch.float32})
BFLOAT16 = ({torch.bfloat16}, {torch.bfloat16})


def near(value, tolerance: float = 1e-3):
    return pytest.approx(value, rel=tolerance, abs=1e-9)


# ----------------------------------------------------------------------------------------- train.py


def call_train(arguments: list[str]):
    # a mark in the second step of 32 words; those of the challenge begin at a million
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "WORD_MARKS", [60])
        train_here(*arguments)


def run_folder(run: Trial) -> Path:
    return run.folder / "run"


def saved_steps(run: Trial) -> list[int]:
    return sorted(int(path.stem[5:]) for path in checkpoints(run_folder(run)))


def weights_by_step(run: Trial) -> list[dict[str, Tensor]]:
    """The weights before the first step, and after each."""
    weights = [one.weights for one in run.training]
    return [*weights, load_checkpoint(checkpoints(run_folder(run))[0])["model"]]


def rates(run: Trial) -> list[float]:
    """How far each step goes: without memory, Adam moves each weight by the learning rate."""
    return movements(weights_by_step(run))


def first_weights(run: Trial) -> list[float]:
    return run.training[0].weights["blocks.0.out.weight"].flatten().tolist()


def weights_after_a_step(run: Trial) -> list[float]:
    return run.training[1].weights["blocks.0.out.weight"].flatten().tolist()


def kept_of_matrix_embedding_norm(run: Trial) -> tuple:
    before, after = weights_by_step(run)[:2]
    names = ("blocks.0.out.weight", "embedding.tokens.weight", "blocks.0.attention_norm.weight")
    return tuple(kept(before[name], after[name]) for name in names)


def first_moments(run: Trial) -> tuple[float, float]:
    """The norm of the first moments, and the sum of the second ones, after one step."""
    states = []
    for optimizer in load_checkpoint(run_folder(run) / "step_0000001.pt")["optimizer"]:
        states += optimizer["state"].values()
    mean = math.sqrt(sum(state["exp_avg"].square().sum().item() for state in states))
    return mean, sum(state["exp_avg_sq"].sum().item() for state in states)


def gradient_norm(run: Trial) -> float:
    """The norm of the first gradient, before it is clipped."""
    return read_metrics(run_folder(run))[0]["grad_norm"]


def new_share_of_mean(run: Trial) -> float:
    return first_moments(run)[0] / gradient_norm(run)


def new_share_of_square(run: Trial) -> float:
    return first_moments(run)[1] / gradient_norm(run) ** 2


def clipped_norm(run: Trial) -> float:
    """The norm of the gradient that the optimizer is given."""
    return first_moments(run)[0]


def divisor(run: Trial) -> float:
    """What the gradient is divided by: almost eps, where that is far larger than the gradient."""
    before, after = weights_by_step(run)[:2]
    squares = sum((after[name] - before[name]).square().sum().item() for name in before)
    return gradient_norm(run) / math.sqrt(squares)


def tokens_in_an_epoch(run: Trial) -> int:
    return sum(one.tokens.numel() for one in run.training) // 2


def rows_in_a_step(run: Trial) -> int:
    steps = [entry["step"] for entry in read_metrics(run_folder(run))]
    return sum(len(one.tokens) for one in run.training) // max(steps)


def advice(run: Trial) -> str:
    return run.error.rpartition("make it with: ")[2]


def steps_trained(run: Trial):
    return "refused" if run.error else len(run.training)


def blocks(run: Trial) -> set[type]:
    """The kinds of blocks that the model is made of."""
    kinds = set()
    for backbone in BACKBONES.values():
        kinds |= {type(call.module) for call in run.training[0].of(backbone.block)}
    return kinds


def heads(run: Trial) -> set[int]:
    return {one.n_head for one in run.training[0].attention}


def width(run: Trial) -> int:
    return run.training[0].calls[0].y.size(-1)


def feed_forward_width(run: Trial) -> set[int]:
    block = run.training[0].of(BACKBONES["babyllama"].block)[0].module
    return {call.x.size(-1) for call in run.training[0].calls if call.module is block.down}


def is_one_matrix(run: Trial) -> bool:
    """Whether training has left one matrix that reads tokens and writes them."""
    weights = weights_by_step(run)[-1]
    return torch.equal(weights["embedding.tokens.weight"], weights["head.vocab.weight"])


def attention_dropout(run: Trial) -> tuple:
    """In training and in evaluation."""
    training = {one.attention[0].rate for one in run.training}
    return training, {one.attention[0].rate for one in run.evaluation}


def embeddings(passes: list[Pass]) -> list[Tensor]:
    """What the first block of LTG-BERT is given."""
    return [one.of(BACKBONES["ltg_bert"].block)[0].x for one in passes]


def embedding_dropout(run: Trial) -> tuple:
    """In training and in evaluation."""
    return zeros(embeddings(run.training)), zeros(embeddings(run.evaluation))


def dropped_places(run: Trial) -> list[bool]:
    return embeddings(run.training)[0].eq(0).flatten().tolist()


def ltg_embedding(run: Trial) -> nn.Module:
    return run.training[0].of(BACKBONES["ltg_bert"].embedding)[0].module


def n_positions(run: Trial) -> int:
    return len(ltg_embedding(run).relative)


def distances_in_last_bucket(run: Trial) -> int:
    """How many of the distances from 15 down have the bucket of 15."""
    _, (_, rows) = ltg_embedding(run)(torch.zeros(1, 16, dtype=torch.long), 0)
    return int((rows == rows[0]).sum())


def first_tokens(run: Trial) -> list[int]:
    return run.training[0].tokens.flatten().tolist()


def causal_steps(run: Trial) -> list[bool]:
    return [one.attention[0].causal for one in run.training]


def count_targets(one: Pass) -> int:
    return int((one.targets != IGNORE).sum())


def hidden_tokens(run: Trial) -> list[int]:
    """How many tokens each step hides."""
    return [count_targets(one) for one in run.training]


def hidden_in_evaluation(run: Trial) -> set[int]:
    return {count_targets(one) for one in run.evaluation if not one.attention[0].causal}


def spans_are_long(run: Trial) -> bool:
    """Whether <mask> comes in runs of more than 1.6 tokens; alone it has runs of about 1.25."""
    lengths = []
    for one in run.training:
        for row in one.tokens.tolist():
            groups = itertools.groupby(row, lambda token: token == MASK)
            lengths += [len(list(group)) for is_mask, group in groups if is_mask]
    return statistics.mean(lengths) > 1.6


def rows_evaluated(run: Trial) -> set[int]:
    return {len(one.tokens) for one in run.evaluation}


def steps_with(run: Trial, name: str) -> list[int]:
    return [entry["step"] for entry in read_metrics(run_folder(run)) if name in entry]


def log_steps(run: Trial) -> list[int]:
    return steps_with(run, "loss")


def dev_steps(run: Trial) -> list[int]:
    return steps_with(run, "dev")


def step_that_ends_it(run: Trial) -> int:
    return int(re.search(r"step (\d+): gradient norm", run.error)[1])


def compiled_passes(run: Trial) -> tuple:
    """How many models were compiled, and how many passes went by way of one, of how many."""
    n_called = sum(len(one.of(Transformer)) for one in run.passes)
    return len(run.compiled), n_called == len(run.training)


RATE = 1e-3
LTG = {"backbone": "ltg_bert"}
MASKED = {"schedule": "2_MLM"}
SPARSE = {"save_every": 1, "keep": 1}

TRAIN_ROWS = [
    # where from and where to
    Row("corpus", {"@corpus": 384, "@short_corpus": 128}, tokens_in_an_epoch),
    Row("corpus_command", {"magic": "magic", "more": "more"}, advice, {"corpus": "nowhere"}),
    Row("out_dir", {"@out/run": True, "@out/other": False}, lambda run: run_folder(run).exists()),
    Row("resume", {False: "refused", True: 3}, steps_trained, {"out_dir": "@half_run"}),
    # model
    Row("backbone", {name: {row.block} for name, row in BACKBONES.items()}, blocks),
    Row("n_layer", {1: {1}, 3: {3}}, n_layers),
    Row("n_head", {2: {2}, 4: {4}}, heads),
    Row("n_embd", {16: 16, 24: 24}, width),
    Row("n_ff", {24: {24}, 20: {20}}, feed_forward_width),
    Row("tied", {False: False, True: True}, is_one_matrix),
    Row("tied", {False: True, True: True}, is_one_matrix, LTG),
    Row("dropout", {0.0: ({0.0}, {0.0}), 0.5: ({0.5}, {0.0})}, attention_dropout),
    Row("dropout", {0.0: ({0.0}, {0.0}), 0.5: ({0.5}, {0.0})}, attention_dropout, LTG),
    Row("dropout", {0.0: (0, 0), 0.5: (near(0.5, 0.05), 0)}, embedding_dropout, LTG),
    Row("n_bucket", {4: 7, 6: 11}, n_positions, LTG),
    # by the formula of DeBERTa, distances from 5 on share the last of 6 buckets, or from 7 on
    Row("max_position", {8: 11, 16: 9}, distances_in_last_bucket, LTG | {"n_bucket": 6}),
    # objectives and batches
    Row(
        "schedule",
        {
            "2_CLM": [True] * 6,
            "1_CLM+1_MLM": [True] * 3 + [False] * 3,
            "1_CLM:MNTP": [True, False] * 3,
        },
        causal_steps,
    ),
    Row("block_size", {16: {16}, 12: {12}}, row_lengths),
    Row("batch_rows", {8: 8, 4: 4}, rows_in_a_step),
    Row("micro_rows", {8: 8, 4: 4}, most_rows),
    Row("mask_start", {0.125: [16] * 6, 0.25: [32, 28, 25, 22, 19, 16]}, hidden_tokens, MASKED),
    Row("mask_end", {0.125: [16] * 6, 0.25: [16, 19, 22, 25, 28, 32]}, hidden_tokens, MASKED),
    Row("mask_span", {1.0: False, 4.0: True}, spans_are_long, MASKED | {"mask_end": 0.5}),
    Row("seed", (1, 2), first_weights),
    Row("seed", (1, 2), first_tokens),
    Row("seed", (1, 2), dropped_places, LTG | {"dropout": 0.5}),
    # optimizer
    Row("optimizer", tuple(OPTIMIZERS), weights_after_a_step, {"weight_decay": 0.1}),
    Row("lr", {RATE: near([RATE] * 6), 4 * RATE: near([4 * RATE] * 6)}, rates),
    Row(
        "lr_min_ratio",
        {
            0.0: near([RATE * share for share in (1, 0.8, 0.6, 0.4, 0.2, 0)]),
            0.5: near([RATE * share for share in (1, 0.9, 0.8, 0.7, 0.6, 0.5)]),
        },
        rates,
        {"lr_decay": "linear"},
    ),
    Row(
        "lr_decay",
        {
            name: near([RATE * decay(step / 5) for step in range(6)])
            for name, decay in DECAYS.items()
        },
        rates,
        {"lr_min_ratio": 0.0},
    ),
    Row(
        "warmup",
        {0.0: near([RATE] * 6), 0.5: near([RATE * share for share in (1 / 3, 2 / 3, 1, 1, 1, 1)])},
        rates,
    ),
    Row("beta1", {0.0: near(1), 0.9: near(0.1)}, new_share_of_mean),
    Row("beta2", {0.0: near(1), 0.98: near(0.02)}, new_share_of_square),
    Row("eps", {1e3: near(1e3, 0.02), 1e4: near(1e4, 0.02)}, divisor, {"lr": 1.0}),
    Row(
        "weight_decay",
        {0.0: near((1, 1, 1), 0.01), 0.5 / 1e-6: near((0.5, 1, 1), 0.01)},
        kept_of_matrix_embedding_norm,
        {"lr": 1e-6},
    ),
    Row("clip", {0.01: near(0.01), 0.1: near(0.1)}, clipped_norm),
    Row("clip", {0.0: near(1), 1000.0: near(1)}, new_share_of_mean),
    Row("skip_nonfinite", {0: 2, 2: 4}, step_that_ends_it, {"lr": 1e30, "batch_rows": 4}),
    # logs and checkpoints
    Row("log_every", {1: [1, 2, 3, 4, 5, 6], 4: [1, 4, 6]}, log_steps),
    Row("eval_every", {0: [3, 6], 2: [2, 4, 6]}, dev_steps),
    Row("eval_rows", {8: {8}, 5: {5}}, rows_evaluated),
    Row("eval_mask_rate", {0.25: {32}, 0.5: {64}}, hidden_in_evaluation),
    Row(
        "save_every",
        {1: [1, 2, 3, 4, 5, 6], 4: [3, 4, 6]},
        saved_steps,
        {"schedule": "1_CLM+1_MLM"},
    ),
    Row("keep", {1: [6], 3: [4, 5, 6]}, saved_steps, {"save_every": 1}),
    Row("babylm_rules", {False: [6], True: [2, 6]}, saved_steps, SPARSE),
    Row("babylm_rules", {False: False, True: True}, is_refused, {"schedule": "11_CLM"}),
    # machine
    Row("device", {"cpu": {"cpu"}, "cuda": CUDA}, devices),
    Row("precision", {"float32": FLOAT32, "bfloat16": BFLOAT16}, dtypes),
    Row("compile", {"off": (0, True), "on": (1, True), "auto": (0, True)}, compiled_passes),
]

TRAIN = Program(
    call_train,
    dict(
        corpus="@corpus",
        out_dir="@out/run",
        n_layer=1,
        n_head=2,
        n_embd=16,
        n_ff=24,
        n_bucket=4,
        max_position=8,
        schedule="2_CLM",
        block_size=16,
        batch_rows=8,
        micro_rows=8,
        mask_start=0.125,
        mask_end=0.125,
        lr=RATE,
        lr_decay="constant",
        warmup=0.0,
        beta1=0.0,
        beta2=0.0,
        eps=1e-30,
        weight_decay=0.0,
        clip=0.0,
        log_every=1,
        eval_rows=8,
        save_every=1,
        keep=99,
        device="cpu",
        precision="float32",
    ),
    TRAIN_ROWS,
    settings=train.Settings,
)

# -------------------------------------------------------------------------------------- finetune.py


def read_result(run: Trial) -> dict:
    return json.loads((run.folder / "result.json").read_text())


def n_epochs(run: Trial) -> int:
    return len(re.findall(r"rte seed \d+  epoch", run.printed))


def items_of_an_epoch(run: Trial) -> tuple[int, int]:
    """In training and in evaluation."""
    n_trained = sum(len(one.tokens) for one in run.training)
    n_evaluated = sum(len(one.tokens) for one in run.evaluation)
    return n_trained // n_epochs(run), n_evaluated // n_epochs(run)


def tasks_done(run: Trial) -> list[str]:
    return list(read_result(run)["tasks"])


def seeds_done(run: Trial) -> list[str]:
    return list(read_result(run)["tasks"]["rte"]["seeds"])


def first_embedding(run: Trial) -> list[float]:
    return run.training[0].weights["embedding.tokens.weight"].flatten().tolist()


def first_head(run: Trial) -> list[float]:
    return run.training[0].weights["out.weight"].flatten().tolist()


def dropped_in_head(run: Trial) -> list[bool]:
    return head_inputs(run.training)[0].eq(0).flatten().tolist()


def causal_layers(run: Trial) -> list[bool]:
    return [attention.causal for attention in run.training[0].attention]


def pools(run: Trial) -> list[str]:
    """By which pools of the last block's result the head could have been given what it was."""
    last = run.training[0]
    classifier = last.of(Classifier)[0].module
    (dense,) = [call for call in last.calls if call.module is classifier.dense]
    x = last.of(BACKBONES["babyllama"].block)[-1].y
    vectors = {"start": x[:, 0], "mean": x.mean(1), "last": x[:, -1]}
    close = partial(torch.allclose, dense.x, rtol=1e-4, atol=1e-5)
    return [name for name, vector in vectors.items() if close(bare_norm(vector))]


def adapter_ranks(run: Trial) -> set[int]:
    return {len(call.module.down.weight) for call in run.training[0].of(LowRank)}


def embedding_moves(run: Trial) -> bool:
    """Whether what adapters leave alone is trained."""
    before, after = (one.weights["embedding.tokens.weight"] for one in run.training[:2])
    return not torch.equal(before, after)


def adapter_scale(run: Trial) -> float:
    """How often an adapter's product is added to the result of the matrix beside it."""
    adapter, x, y = run.evaluation[-1].of(LowRank)[0]
    with torch.inference_mode():
        change = adapter.up(adapter.down(x))
        return ((y - adapter.linear(x)) / change).median().item()


def adapter_inputs(passes: list[Pass]) -> list[Tensor]:
    inputs = []
    for one in passes:
        downs = [call.module.down for call in one.of(LowRank)]
        inputs += [call.x for call in one.calls if call.module in downs]
    return inputs


def adapter_dropout(run: Trial) -> tuple:
    """In training and in evaluation."""
    return zeros(adapter_inputs(run.training)), zeros(adapter_inputs(run.evaluation))


def head_inputs(passes: list[Pass]) -> list[Tensor]:
    """What the last matrix of a classifier is given."""
    inputs = []
    for one in passes:
        out = one.of(Classifier)[0].module.out
        inputs += [call.x for call in one.calls if call.module is out]
    return inputs


def head_dropout(run: Trial) -> tuple:
    """In training and in evaluation."""
    return zeros(head_inputs(run.training)), zeros(head_inputs(run.evaluation))


def first_rate(run: Trial) -> float:
    """How far the first step goes: whatever its memory, Adam moves by the learning rate."""
    return movements([one.weights for one in run.training[:2]])[0]


def kept_of_matrix_and_head(run: Trial) -> tuple:
    before, after = (one.weights for one in run.training[:2])
    return tuple(kept(before[name], after[name]) for name in ("blocks.0.out.weight", "dense.bias"))


def most_trained_rows(run: Trial) -> int:
    return max(len(one.tokens) for one in run.training)


def call_scripted(arguments: list[str]):
    """Fine-tune for three epochs, of which F1, the loss and the correlation prefer one each."""
    losses = iter((0.9, 0.3, 0.6))

    def predict(classifier, split, settings):
        loss = next(losses)
        guess = np.zeros(len(split.labels), int)
        if loss == 0.9:
            guess[:] = 1  # all that is true is found
        if loss == 0.6:
            guess[split.labels.argmax()] = 1  # all that is found is true
        return guess, loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "predict", predict)
        finetune.main(arguments)


def chosen_epoch(run: Trial) -> int:
    return read_result(run)["tasks"]["cola"]["seeds"]["12"]["epoch"]


ADAPTERS = {"lora_rank": 2}
COLA = {"tasks": "cola", "epochs": 3}

FINETUNE_ROWS = [
    Row("run", ("@run", "@other_run"), first_embedding),
    Row("data", {"@glue": (32, 16), "@short_glue": (24, 8)}, items_of_an_epoch),
    Row("tasks", {"rte": ["rte"], "rte,cola": ["cola", "rte"]}, tasks_done),
    Row("task_settings", {"{}": 2, "{'rte': dict(epochs=3)}": 3}, n_epochs),
    Row("seeds", {"12": ["12"], "12,13": ["12", "13"]}, seeds_done),
    Row("seeds", ("12", "13"), first_head),
    Row("seeds", ("12", "13"), first_tokens),
    Row("seeds", ("12", "13"), dropped_in_head, {"dropout": 0.5}),
    Row("out", {"@out/result.json": ["result.json"], "@out/b.json": ["b.json"]}, files),
    # what the model sees
    Row("mask", {"full": [False, False], "causal": [True, True]}, causal_layers),
    Row("n_open", {"": [True, True], "1": [True, False]}, causal_layers, {"mask": "causal"}),
    Row("pool", {"start": ["start"], "mean": ["mean"], "last": ["last"]}, pools),
    Row("max_length", {16: {16}, 12: {12}}, row_lengths),
    # what is learnt
    Row("lora_rank", {0: set(), 2: {2}, 3: {3}}, adapter_ranks),
    Row("lora_rank", {0: True, 2: False}, embedding_moves),
    Row("lora_alpha", {8.0: near(4, 0.01), 2.0: near(1, 0.01)}, adapter_scale, ADAPTERS),
    Row("lora_dropout", {0.0: (0, 0), 0.5: (near(0.5, 0.1), 0)}, adapter_dropout, ADAPTERS),
    Row("dropout", {0.0: (0, 0), 0.5: (near(0.5, 0.1), 0)}, head_dropout),
    Row("lr", {RATE: near(RATE, 0.01), 4 * RATE: near(4 * RATE, 0.01)}, first_rate),
    Row("warmup", {0.0: near(RATE, 0.01), 0.5: near(RATE / 4, 0.01)}, first_rate),
    Row(
        "weight_decay",
        {0.0: near((1, 1), 0.01), 0.5 / 1e-6: near((0.5, 0.5), 0.01)},
        kept_of_matrix_and_head,
        {"lr": 1e-6, "epochs": 1},
    ),
    Row("batch_rows", {8: 8, 16: 16}, most_trained_rows),
    Row("epochs", {2: 2, 3: 3}, n_epochs),
    Row("patience", {0: 4, 1: 2, 2: 3}, n_epochs, {"lr": 1e-30, "epochs": 4}),
    Row("select", {"f1": 1, "loss": 2, "metric": 3}, chosen_epoch, COLA, call_scripted),
    Row("limit", {0: (32, 16), 5: (5, 5)}, items_of_an_epoch),
    Row("device", {"cpu": {"cpu"}, "cuda": CUDA}, devices),
    Row("dtype", {"float32": FLOAT32, "bfloat16": BFLOAT16}, dtypes),
]

FINETUNE = Program(
    finetune.main,
    dict(
        run="@run",
        data="@glue",
        tasks="rte",
        out="@out/result.json",
        max_length=16,
        lora_dropout=0.0,
        dropout=0.0,
        lr=RATE,
        batch_rows=8,
        epochs=2,
        patience=0,
        device="cpu",
    ),
    FINETUNE_ROWS,
    positional=("run",),
    settings=finetune.Settings,
)

# ------------------------------------------------------------------------------------------ eval.py


def step_scored(run: Trial) -> int:
    return read_result(run)["step"]


def tasks_scored(run: Trial) -> list[str]:
    return list(read_result(run)["tasks"])


def scores(run: Trial) -> list[float]:
    """The scores of all options, in whatever mode."""
    (task,) = read_result(run)["tasks"].values()
    (scores,) = task["subsets"]["order"]["scores"].values()
    return scores


def questions(run: Trial) -> set[tuple]:
    """Whether a pass is causal, and how many tokens of a row it hides."""
    results = set()
    for one in run.passes:
        hidden = (one.tokens == MASK).sum(1)
        results |= {(one.attention[0].causal, n) for n in hidden.tolist()}
    return results


def begins_with_space(run: Trial) -> bool:
    """Whether there is one between the start token and the text."""
    tokenizer = Tokenizer(run.folder.parent / "run" / "tokenizer.json")
    starts = {tokenizer.decode(row[1:2]) for one in run.passes for row in one.tokens.tolist()}
    return starts == {" "}


def items_scored(run: Trial) -> int:
    (task,) = read_result(run)["tasks"].values()
    return task["items"]


EVAL_ROWS = [
    Row("run", {"@run": 6, "@run/step_0000003.pt": 3}, step_scored),
    Row("run", ("@run", "@run/step_0000003.pt", "@other_run"), scores),
    Row("task", {"@pairs": ["pairs"], "@other_pairs": ["other_pairs"]}, tasks_scored),
    Row("task", ("@pairs", "@other_pairs"), scores),
    Row(
        "mode",
        {("causal",): {(True, 0)}, ("masked",): {(False, 1)}, ("mntp",): {(False, 1)}},
        questions,
    ),
    Row("mode", (("causal",), ("masked",), ("mntp",)), scores),
    Row("protocol", {"2025": False, "2024": True}, begins_with_space),
    Row("limit", {0: 5, 2: 2}, items_scored),
    Row("out", {"@out/result.json": ["result.json"], "@out/b.json": ["b.json"]}, files),
    Row("device", {"cpu": {"cpu"}, "cuda": CUDA}, devices),
    Row("dtype", {"float32": (set(), FLOAT32[1]), "bfloat16": (set(), BFLOAT16[1])}, dtypes),
    # rows of seven tokens, the last of which predicts nothing
    Row("batch_tokens", {0: 10, 14: 2, 30: 4}, most_rows),
]

EVAL = Program(
    partial(as_program, evaluation.main),
    dict(run="@run", task="@pairs", mode=("causal",), out="@out/result.json", device="cpu"),
    EVAL_ROWS,
    positional=("run",),
)

# ---------------------------------------------------------------------------------------- sample.py


def samples(run: Trial) -> list[str]:
    return re.findall(r"--- \d+\n(.*)", run.printed)


def n_samples(run: Trial) -> int:
    return len(samples(run))


def sample_lengths(run: Trial) -> set[int]:
    return set(map(len, samples(run)))


def letters(run: Trial) -> set[str]:
    return set("".join(samples(run)))


def share_of_b(run: Trial) -> float:
    text = "".join(samples(run))
    return text.count("b") / len(text)


def prompts(run: Trial) -> tuple:
    """What the first sample begins with, and the tokens of the first pass."""
    tokenizer = Tokenizer(run.folder.parent / "run" / "tokenizer.json")
    tokens = run.passes[0].tokens[0].tolist()
    return samples(run)[0][:2], tokenizer.decode(tokens[1:])


MANY = {"n": 25, "tokens": 14}

SAMPLE_ROWS = [
    Row("run", ("@dice", "@run"), letters),
    Row("prompt", {"ab": ("ab", "ab"), "ca": ("ca", "ca")}, prompts),
    Row("n", {2: 2, 3: 3}, n_samples),
    Row("tokens", {4: {4}, 6: {6}}, sample_lengths),
    # a, b and c with probabilities like 1, 3 and 0.5: to the power of one over the temperature
    Row(
        "temperature",
        {
            0: 1,
            0.5: pytest.approx(9 / (1 + 9 + 0.25), abs=0.08),
            2: pytest.approx(3**0.5 / (1 + 3**0.5 + 0.5**0.5), abs=0.08),
        },
        share_of_b,
        MANY,
    ),
    Row("top_k", {0: {"a", "b", "c"}, 1: {"b"}, 2: {"a", "b"}}, letters, {"n": 5}),
    Row("seed", (1, 2), samples),
    Row("device", {"cpu": {"cpu"}, "cuda": CUDA}, devices),
]

SAMPLE = Program(
    partial(as_program, sample.main),
    dict(run="@dice", n=3, tokens=14, temperature=1.0, top_k=0, device="cpu"),
    SAMPLE_ROWS,
    positional=("run",),
)

# --------------------------------------------------------------------------------------- prepare.py


def meta(run: Trial) -> dict:
    return json.loads((run.folder / "corpus" / "meta.json").read_text())


def train_words(run: Trial) -> int:
    return meta(run)["train"]["words"]


def dev_words(run: Trial) -> int:
    return meta(run)["dev"]["words"]


def vocabulary(run: Trial) -> int:
    return Tokenizer(run.folder / "corpus" / "tokenizer.json").vocab_size


def n_starts(run: Trial) -> int:
    tokens = np.fromfile(run.folder / "corpus" / "train.bin", meta(run)["train"]["dtype"])
    return int((tokens == START).sum())


def folders(run: Trial) -> list[str]:
    return sorted(path.name for path in run.folder.iterdir())


PREPARE_ROWS = [
    Row(
        "train",
        {("@texts/train.txt",): 96, ("@texts/train.txt", "@texts/short.txt"): 96 + 32},
        train_words,
    ),
    Row("dev", {("@texts/dev.txt",): 40, ("@texts/dev.txt", "@texts/short.txt"): 72}, dev_words),
    Row("out", {"@out/corpus": ["corpus"], "@out/other": ["other"]}, folders),
    Row("vocab_size", {BYTES: BYTES, BYTES + 2: BYTES + 2}, vocabulary),
    Row("boundary", {"line": 48, "document": 1, "none": 0}, n_starts),
    Row("tokenizer", {None: BYTES, "@merged_corpus/tokenizer.json": BYTES + 2}, vocabulary),
]

PREPARE = Program(
    partial(as_program, prepare.main),
    dict(train=("@texts/train.txt",), dev=("@texts/dev.txt",), out="@out/corpus", vocab_size=BYTES),
    PREPARE_ROWS,
    positional=("train",),
)

# ------------------------------------------------------------------------------ tools/experiment.py


def prepare_here(command: list[str]) -> SimpleNamespace:
    """Make a corpus as the command would, without the seconds that a process takes."""
    as_program(prepare.main, command[2:])
    return SimpleNamespace(returncode=0)


def call_experiment(arguments: list[str]):
    """Run an experiment whose runs are not started, but printed."""

    def call(program: str, args: list[str], log):
        print(f"called {json.dumps([program, *args])}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "call", call)
        patch.setattr(experiment.subprocess, "run", prepare_here)
        experiment.main(arguments)


def commands(run: Trial, program: str) -> list[list[str]]:
    """The arguments of each call of a program."""
    calls = [json.loads(text) for text in re.findall("^called (.*)", run.printed, re.M)]
    return [call[1:] for call in calls if call[0] == program]


def trained_settings(run: Trial) -> list[train.Settings]:
    return [config.load(train.Settings, args) for args in commands(run, "train.py")]


def trained_runs(run: Trial) -> list[str]:
    return [Path(settings.out_dir).name for settings in trained_settings(run)]


def trained_seeds(run: Trial) -> list[int]:
    return [settings.seed for settings in trained_settings(run)]


def trained_rates(run: Trial) -> set[float]:
    return {settings.lr for settings in trained_settings(run)}


def trained_objectives(run: Trial) -> list[str]:
    return [settings.schedule for settings in trained_settings(run)]


def trained_corpora(run: Trial) -> set[str]:
    return {Path(settings.corpus).name for settings in trained_settings(run)}


def flag_values(run: Trial, program: str, flag: str) -> set[str]:
    """What follows a flag in all calls of a program."""
    values = set()
    for args in commands(run, program):
        values.add(args[args.index(flag) + 1])
    return values


def scored_tasks(run: Trial) -> set[str]:
    return {Path(task).name for task in flag_values(run, "eval.py", "--task")}


def scored_limits(run: Trial) -> set[str]:
    return flag_values(run, "eval.py", "--limit")


def scored_modes(run: Trial) -> set[str]:
    return flag_values(run, "eval.py", "--mode")


def tuned(run: Trial, name: str) -> set[str]:
    """The values of a flag of finetune.py."""
    values = set()
    for args in commands(run, "finetune.py"):
        values |= {arg.partition("=")[2] for arg in args if arg.startswith(f"--{name}=")}
    return values


def tuned_tasks(run: Trial) -> set[str]:
    return tuned(run, "tasks")


def tuned_data(run: Trial) -> set[str]:
    return {Path(path).name for path in tuned(run, "data")}


def devices_of_all(run: Trial) -> set[str]:
    calls = commands(run, "train.py") + commands(run, "eval.py") + commands(run, "finetune.py")
    flags = [[arg for arg in args if arg.startswith("--device=")] for args in calls]
    assert len(flags) == 6
    return {flag for (flag,) in flags}


def compared_with(run: Trial) -> str:
    return re.search(r"\| minus (\w+)", run.printed)[1]


def made_words(run: Trial) -> tuple[int, int]:
    """Words for training and for development of the corpus that the experiment has made."""
    (folder,) = {settings.corpus for settings in trained_settings(run)}
    content = json.loads((Path(folder) / "meta.json").read_text())
    return content["train"]["words"], content["dev"]["words"]


def made_vocabulary(run: Trial) -> set[int]:
    folders = {settings.corpus for settings in trained_settings(run)}
    return {Tokenizer(Path(folder) / "tokenizer.json").vocab_size for folder in folders}


MAKE = {"corpus": ""}
SMALL = dict(n_layer=1, n_head=2, n_embd=16, n_ff=24, block_size=16, batch_rows=8)

EXPERIMENT_ROWS = [
    # what is compared
    Row("arms", {"{'x': {}}": ["x_1"], "{'x': {}, 'y': {}}": ["x_1", "y_1"]}, trained_runs),
    Row(
        "arms",
        {
            "{'x': dict(schedule='2_MLM')}": ["2_MLM"],
            "{'x': dict(schedule='1_CLM'), 'y': dict(schedule='1_MLM')}": ["1_CLM", "1_MLM"],
        },
        trained_objectives,
    ),
    Row("baseline", {"": "clm", "mlm": "mlm"}, compared_with),
    Row("seeds", {1: [1, 1], 2: [1, 1, 2, 2]}, trained_seeds),
    Row("first_seed", {1: [1, 1], 5: [5, 5]}, trained_seeds),
    Row("config", {"": {7e-4}, "@override": {0.125}}, trained_rates),
    Row("settings", {f"{SMALL}": {7e-4}, f"{SMALL | {'lr': 0.25}}": {0.25}}, trained_rates),
    Row(
        "unequal_epochs",
        {False: True, True: False},
        is_refused,
        {"arms": "{'x': dict(schedule='1_CLM'), 'y': dict(schedule='2_CLM')}"},
    ),
    # the text
    Row("corpus", {"@corpus": {"corpus"}, "@out/mine": {"mine"}}, trained_corpora),
    Row("text", {"@texts/train.txt": (96, 40), "@texts/long.txt": (600, 40)}, made_words, MAKE),
    Row("dev", {"@texts/dev.txt": (96, 40), "@texts/short.txt": (96, 32)}, made_words, MAKE),
    Row(
        "slice", {1: (600, 40), 3: (200, 40)}, made_words, {"corpus": "", "text": "@texts/long.txt"}
    ),
    Row("vocab_size", {BYTES: {BYTES}, BYTES + 2: {BYTES + 2}}, made_vocabulary, MAKE),
    # how it is scored
    Row(
        "tasks",
        {"@pairs": {"pairs"}, "@pairs,@other_pairs": {"pairs", "other_pairs"}},
        scored_tasks,
    ),
    Row("limit", {0: {"0"}, 3: {"3"}}, scored_limits),
    Row("modes", {"causal": {"causal"}, "masked": {"masked"}}, scored_modes),
    Row("glue", {"rte": {"rte"}, "rte,cola": {"rte,cola"}}, tuned_tasks),
    Row(
        "glue_data", {"@glue": {"glue"}, "@short_glue": {"short_glue"}}, tuned_data, {"glue": "rte"}
    ),
    # how it is run
    Row("out", {"@out/study": ["study"], "@out/other": ["other"]}, folders),
    Row("device", {"cpu": {"--device=cpu"}, "cuda": {"--device=cuda"}}, devices_of_all),
    Row("table", {False: [1, 1], True: []}, trained_seeds, {"out": "@out"}),
]

EXPERIMENT = Program(
    call_experiment,
    dict(
        arms="dict(clm=dict(schedule='1_CLM'), mlm=dict(schedule='1_MLM'))",
        settings=f"{SMALL}",
        seeds=1,
        corpus="@corpus",
        text="@texts/train.txt",
        dev="@texts/dev.txt",
        vocab_size=BYTES,
        tasks="@pairs",
        out="@out/study",
        device="cpu",
        glue_data="@glue",
    ),
    EXPERIMENT_ROWS,
    settings=experiment.Spec,
)

# ----------------------------------------------------------------------------------- tools/bench.py


class Threads:
    """Stands for a context of multiprocessing: processes that need no seconds to start."""

    Pipe = staticmethod(multiprocessing.Pipe)

    @staticmethod
    def Process(target: Callable, args: tuple, daemon: bool) -> threading.Thread:
        # the caller closes its copy of the pipe's end, so the thread needs another
        end = Connection(os.dup(args[0].fileno()))
        return threading.Thread(target=target, args=(end, *args[1:]), daemon=daemon)


def call_bench(arguments: list[str]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.multiprocessing, "get_context", lambda method: Threads)
        as_program(bench.main, arguments)


def cases(run: Trial) -> list[str]:
    """The names of the models that a line is printed for."""
    return re.findall(r"^(\S.*?),? (?:CLM|causal|masked),", run.printed, re.M)


def causal_training(run: Trial) -> set[bool]:
    return {one.attention[0].causal for one in run.training}


def causal_scoring(run: Trial) -> set[bool]:
    return {one.attention[0].causal for one in run.evaluation}


def n_compiled(run: Trial) -> int:
    return len(run.compiled)


def sees_peer(run: Trial) -> bool:
    return any(one.of(PEERS["ltg_bert"]) for one in run.training)


def n_steps(run: Trial) -> int:
    return len(run.training)


def rows_trained(run: Trial) -> set[int]:
    return {len(one.tokens) for one in run.training}


def n_threads(run: Trial) -> set[int]:
    return {one.n_thread for one in run.passes}


def kinds_of_pass(run: Trial) -> set[bool]:
    """Whether passes train."""
    return {one.trains for one in run.passes}


def pairs_scored(run: Trial) -> int:
    return int(re.search(r"(\d+) pairs, float32", run.printed)[1])


SCORING = {"scoring": "@pairs", "set": ("corpus=@corpus",)}

BENCH_ROWS = [
    Row("configs", {("@tiny",): ["tiny"], ("@tiny", "@tiny_ltg"): ["tiny", "tiny_ltg"]}, cases),
    Row("objectives", {("CLM",): {True}, ("MLM",): {False}}, causal_training),
    Row("compile", {("off",): 0, ("on",): 1, ("off", "on"): 1}, n_compiled),
    Row("peer", {False: False, True: True}, sees_peer, {"configs": ("@tiny_ltg",)}),
    Row("rows", {4: {4}, 6: {6}}, rows_trained),
    # two to warm up
    Row("steps", {1: 2 + 1, 3: 2 + 3}, n_steps),
    Row("rounds", {1: 2 + 1, 2: 2 + 2}, n_steps),
    Row("threads", {1: {1}, 2: {2}}, n_threads),
    Row("set", {("n_layer=1",): {1}, ("n_layer=2", "lr=0.1"): {2}}, n_layers),
    Row("scoring", {None: {True}, "@pairs": {False}}, kinds_of_pass, {"set": ("corpus=@corpus",)}),
    Row("modes", {("causal",): {True}, ("masked",): {False}}, causal_scoring, SCORING),
    Row("limit", {2: 2, 4: 4}, pairs_scored, SCORING),
]

BENCH = Program(
    call_bench,
    dict(
        configs=("@tiny",),
        objectives=("CLM",),
        rows=4,
        steps=1,
        rounds=1,
        threads=1,
        modes=("causal",),
    ),
    BENCH_ROWS,
    positional=("configs",),
)

# --------------------------------------------------------------------------------- tools/grammar.py


def sentences(run: Trial) -> list[str]:
    return (run.folder / "text" / "train.txt").read_text().splitlines()


def n_sentences(run: Trial) -> int:
    return len(sentences(run))


def grammar_pairs(run: Trial) -> list[str]:
    return [path.read_text() for path in sorted((run.folder / "text" / "pairs").iterdir())]


GRAMMAR_ROWS = [
    Row("out", {"@out/text": ["text"], "@out/other": ["other"]}, folders),
    Row("sentences", {100: 100, 150: 150}, n_sentences),
    Row("seed", (1, 2), sentences),
    Row("pairs_seed", (3, 4), grammar_pairs),
]

GRAMMAR = Program(
    partial(as_program, grammar.main),
    dict(out="@out/text", sentences=100),
    GRAMMAR_ROWS,
    positional=("out",),
)

# ------------------------------------------------------------------------------------ tools/plot.py


def call_plot(arguments: list[str]):
    pytest.importorskip("matplotlib", reason="optional: pip install matplotlib")
    as_program(plot.main, arguments)


def picture(run: Trial) -> bytes:
    (path,) = run.folder.iterdir()
    return path.read_bytes()


PLOT_ROWS = [
    Row("runs", (("@run",), ("@half_run",), ("@run", "@half_run")), picture),
    Row("out", {"@out/a.png": ["a.png"], "@out/b.svg": ["b.svg"]}, files),
]

PLOT = Program(call_plot, dict(runs=("@run",), out="@out/a.png"), PLOT_ROWS, positional=("runs",))

# -------------------------------------------------------- tools/export_hf.py and tools/import_hf.py


def call_export(arguments: list[str]):
    pytest.importorskip("transformers", reason="optional: pip install transformers")
    import export_hf

    as_program(export_hf.main, arguments)


def call_import(arguments: list[str]):
    pytest.importorskip("transformers", reason="optional: pip install transformers")
    import import_hf

    as_program(import_hf.main, arguments)


def exported_weights(run: Trial) -> bytes:
    return (run.folder / "model" / "model.safetensors").read_bytes()


def exported_folders(run: Trial) -> set[str]:
    """The folders of models."""
    return {str(path.parent.relative_to(run.folder)) for path in run.folder.rglob("config.json")}


def imported_weights(run: Trial) -> list[float]:
    (path,) = checkpoints(run.folder / "imported")
    return load_checkpoint(path)["model"]["blocks.0.out.weight"].flatten().tolist()


EXPORT_ROWS = [
    Row("run", ("@run", "@run/step_0000003.pt", "@other_run"), exported_weights),
    Row("out", {"@out/model": {"model"}, "@out/other": {"other"}}, exported_folders),
    Row("checkpoints", {False: {"model"}, True: {"model/main"}}, exported_folders),
]

EXPORT = Program(
    call_export, dict(run="@run", out="@out/model"), EXPORT_ROWS, positional=("run", "out")
)

IMPORT_ROWS = [
    Row("folder", ("@exported", "@other_exported"), imported_weights),
    Row("run", {"@out/imported": ["imported"], "@out/other": ["other"]}, folders),
]

IMPORT = Program(
    call_import,
    dict(folder="@exported", run="@out/imported"),
    IMPORT_ROWS,
    positional=("folder", "run"),
)

# --------------------------------------------------------------------------------- babylm/submit.py


def first_prediction(run: Trial) -> str:
    (path,) = run.folder.rglob("predictions.json")
    content = json.loads(path.read_text())
    return content["hypernym"]["predictions"][0]["pred"]


SUBMITTED = "sent/mine/main/zero_shot/{}/blimp/supplement_filtered/predictions.json"

SUBMIT_ROWS = [
    Row("run", {"@scored": "Good 0.", "@other_scored": "Bad 0."}, first_prediction),
    Row(
        "year",
        {"2025": [SUBMITTED.format("causal")], "2024": ["sent/mine_textonly_predictions.json.gz"]},
        files,
    ),
    Row("mode", {"causal": "Good 0.", "masked": "Bad 0."}, first_prediction),
    Row(
        "mode", {"causal": [SUBMITTED.format("causal")], "masked": [SUBMITTED.format("mlm")]}, files
    ),
    Row(
        "name",
        {
            "mine": [SUBMITTED.format("causal")],
            None: [SUBMITTED.format("causal").replace("mine", "scored")],
        },
        files,
    ),
    Row(
        "out",
        {
            "@out/sent": [SUBMITTED.format("causal")],
            "@out/other": [SUBMITTED.format("causal").replace("sent", "other")],
        },
        files,
    ),
    Row("incomplete", {False: True, True: False}, is_refused),
]

SUBMIT = Program(
    partial(as_program, submit.main),
    dict(run="@scored", year="2025", mode="causal", name="mine", out="@out/sent", incomplete=True),
    SUBMIT_ROWS,
    positional=("run",),
)


PROGRAMS = {
    "train": TRAIN,
    "finetune": FINETUNE,
    "eval": EVAL,
    "sample": SAMPLE,
    "prepare": PREPARE,
    "experiment": EXPERIMENT,
    "bench": BENCH,
    "grammar": GRAMMAR,
    "plot": PLOT,
    "export_hf": EXPORT,
    "import_hf": IMPORT,
    "submit": SUBMIT,
}
SLOW = ("plot", "export_hf", "import_hf", "submit")

# ---------------------------------------------------------------------------------------- the tests

CASES = []
for name, program in PROGRAMS.items():
    marks = [pytest.mark.slow] if name in SLOW else []
    for row in program.rows:
        label = f"{name}-{row.setting}-{row.look.__name__}"
        CASES.append(pytest.param(program, row, id=label, marks=marks))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_setting_has_a_row(name):
    program = PROGRAMS[name]
    assert {row.setting for row in program.rows} == program.known()


@pytest.mark.parametrize("program, row", CASES)
def test_a_setting_does_what_its_comment_says(lab, program, row):
    program = program._replace(call=row.call or program.call)
    seen = {}
    for value in row.expected:
        run = lab.trial(program, **row.others | {row.setting: value})
        print(f"{row.setting} = {value}\n{run.printed}{run.error}")
        seen[value] = row.look(run)
    if isinstance(row.expected, dict):
        assert seen == row.expected
        return
    for a, b in itertools.combinations(seen, 2):
        assert seen[a] != seen[b], (a, b)
