"""Call a program on tiny material with some of its settings, and see what it does.

What test_settings.py and test_flags.py share.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import small_challenge
import torch
from conftest import train_here
from test_finetune import write_glue, write_records
from torch import nn
from watch import Pass, Watcher

import config
import prepare
from antlm.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from antlm.tokenizer import Tokenizer
from config import UserError
from model import ModelConfig, Transformer

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
            return {field.name for field in fields(self.settings)} | set(self.positional)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(NamedAll) as end:
            patch.setattr(argparse.ArgumentParser, "parse_args", name_all)
            self.call([])
        return end.value.args[0]

    def arguments(self, settings: dict, folder: Path) -> list[str]:
        """Return the arguments that give these settings; dicts go into an override file."""
        kinds = {}
        if self.settings:
            kinds = {field.name: field.type for field in fields(self.settings)}
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
        return [forward for forward in self.passes if forward.trains]

    @property
    def evaluation(self) -> list[Pass]:
        return [forward for forward in self.passes if not forward.trains]


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
        """Call a program with its base settings and these, or recall what it did then."""
        settings = program.base | settings
        key = (program.call, *sorted(settings.items(), key=str))
        if key not in self.trials:
            out = Path(tempfile.mkdtemp(prefix="trial_", dir=self.folder))
            settings = {name: self.resolve(value, out) for name, value in settings.items()}
            self.trials[key] = perform(program, settings, out)
        return self.trials[key]

    def differences(self, program: Program, row: Row) -> list[tuple]:
        """Return what is not as a row says: value, what was seen, and what was expected.

        Or two values at which the same was seen, and what it was.
        """
        program = program._replace(call=row.call or program.call)
        seen = {}
        for value in row.expected:
            run = self.trial(program, **row.others | {row.setting: value})
            print(f"{row.setting} = {value}\n{run.printed}{run.error}")
            seen[value] = row.look(run)
        if isinstance(row.expected, dict):
            pairs = [(value, seen[value], expected) for value, expected in row.expected.items()]
            return [(value, a, b) for value, a, b in pairs if a != b]
        return [(a, b, seen[a]) for a, b in itertools.combinations(seen, 2) if seen[a] == seen[b]]


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


def cases(programs: dict[str, Program], slow: tuple = ()) -> list:
    """Return each row with its program, as pytest takes them.

    slow: names of programs whose rows take long
    """
    params = []
    for name, program in programs.items():
        marks = [pytest.mark.slow] if name in slow else []
        for row in program.rows:
            label = f"{name}-{row.setting}-{row.look.__name__}"
            params.append(pytest.param(program, row, id=label, marks=marks))
    return params


def as_program(main: Callable, arguments: list[str]):
    """Call a main() that reads the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *arguments])
        main()


# ------------------------------------------------------------------------------------- the material

BYTES = 260  # size of the vocabulary of bytes and special tokens, without merges
RATE = 1e-3
SMALL = dict(n_layer=1, n_head=2, n_embd=16, n_ff=24, block_size=16, batch_rows=8)

# A run of six steps, of which each moves every weight by RATE: Adam without memory.
TINY = dict(
    corpus="@corpus",
    out_dir="@out/run",
    **SMALL,
    n_bucket=4,
    max_position=8,
    schedule="2_CLM",
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
)


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
    settings = TINY | {"schedule": "1_CLM+1_MLM", "n_layer": 2} | settings
    settings |= {"corpus": lab.path("corpus"), "out_dir": path}
    with contextlib.redirect_stdout(io.StringIO()):
        train_here(*(f"--{name}={value}" for name, value in settings.items()))


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


def make_marks(lab: Lab, path: Path, seed: int = 1):
    """A run with the checkpoints that the rules name."""
    small_challenge.write_run(path, lab.path("corpus") / "tokenizer.json", seed)


def make_averaged_marks(lab: Lab, path: Path):
    """A run with those checkpoints, each of which has an average, too."""
    make_marks(lab, path)
    for checkpoint in checkpoints(path):
        content = load_checkpoint(checkpoint)
        half = {name: weight / 2 for name, weight in content["model"].items()}
        content["average"] = {"n": 2, "weights": half}
        torch.save(content, checkpoint)


def make_challenge(lab: Lab, path: Path, verb: str = "sees"):
    """One full set, one fast set and the words in context; in all pairs is this verb."""
    data = small_challenge.write_data(lab.folder / f"all_of_{path.name}")
    for name in ("full_eval/supplement_filtered", "fast_eval/supplement_fast", "full_eval/aoa"):
        shutil.copytree(data / name, path / name)
    for file in path.rglob("*.jsonl"):
        file.write_text(file.read_text().replace("sees", verb))


def write_tiny(lab: Lab, path: Path, backbone: str = "babyllama"):
    """An override file of a tiny model."""
    settings = SMALL | {"backbone": backbone, "n_bucket": 4, "max_position": 8}
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))


def call_export(arguments: list[str]):
    """Call export_hf.py, or skip the test where its library is missing."""
    pytest.importorskip("safetensors", reason="optional: pip install safetensors")
    import export_hf

    as_program(export_hf.main, arguments)


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
    "scored_run": partial(train_run, seed=3),  # results lie in its folder
    "averaged_run": partial(train_run, seed=4, average_share=1.0, lr=0.05),
    "dice": make_dice,
    "glue": lambda lab, path: write_glue(path),
    "short_glue": lambda lab, path: write_glue(path, n_train=24, n_valid=8),
    "pairs": make_pairs,
    "other_pairs": partial(make_pairs, seed=6),
    "marks": make_marks,
    "other_marks": partial(make_marks, seed=2),
    "averaged_marks": make_averaged_marks,
    "challenge": make_challenge,
    "other_challenge": partial(make_challenge, verb="hears"),
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
    return {forward.tokens.device.type for forward in run.passes}


def linear_dtypes(passes: list[Pass]) -> set[torch.dtype]:
    """The types of the results of all linear maps, but for the loss, which has a float32 sum."""
    dtypes = set()
    for forward in passes:
        dtypes |= {call.y.dtype for call in forward.of(nn.Linear)}
    return dtypes


def dtypes(run: Trial) -> tuple:
    """In training and in evaluation."""
    return linear_dtypes(run.training), linear_dtypes(run.evaluation)


def n_layers(run: Trial) -> set[int]:
    return {len(forward.attention) for forward in run.passes}


def row_lengths(run: Trial) -> set[int]:
    return {forward.tokens.size(1) for forward in run.passes}


def most_rows(run: Trial) -> int:
    return max(forward.tokens.size(0) for forward in run.passes)


def files(run: Trial) -> list[str]:
    """The files in the folder of the trial, by their names in it."""
    paths = sorted(path.relative_to(run.folder) for path in run.folder.rglob("*"))
    return [str(path) for path in paths if (run.folder / path).is_file()]


def is_refused(run: Trial) -> bool:
    return run.error != ""


CUDA = {"cuda"} if torch.cuda.is_available() else "refused"
FLOAT32 = ({torch.float32}, {torch.float32})
BFLOAT16 = ({torch.bfloat16}, {torch.bfloat16})


def near(value, tolerance: float = 1e-3):
    return pytest.approx(value, rel=tolerance, abs=1e-9)


def read_result(run: Trial) -> dict:
    return json.loads((run.folder / "result.json").read_text())
