"""train.py as its users run it: real processes, real signals, real torchrun.

Alone: python -m pytest tests/test_train.py; without the processes: -m "not slow"
"""

import dataclasses
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plot
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    TINY,
    finish,
    read_losses,
    read_metrics,
    refusal,
    start,
    train_here,
    wait_for_line,
)
from kill import differences, same

import prepare
import schedule
import train
from antlm import metrics
from antlm.checkpoint import (
    checkpoints,
    load_checkpoint,
    load_model,
    load_newest,
    load_run,
    step_of,
)
from antlm.compiling import Choice, choose, missing_for_compile, product_speed
from antlm.distributed import find_device
from antlm.metrics import TrainingLog
from antlm.optim import guarded_step, make_optimizers
from config import UserError
from data import OBJECTIVES, Batches, Corpus, dropout_seed
from model import BACKBONES, ModelConfig, Transformer

TWO_PROCESSES = ("--standalone", "--nproc_per_node=2")


def process_ids(torchrun: subprocess.Popen) -> list[int]:
    """Return the ids of the processes that a torchrun has started, in the order of their ranks."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_text()
        ranks[int(child)] = int(re.search(r"(?:^|\0)RANK=(\d+)", environment)[1])
    return sorted(ranks, key=ranks.get)


def interrupt(after_step: int, number: int, *args: str) -> str:
    """Start train.py, send a signal once it has reported a step; return the rest of its output."""
    process = start(*args)
    wait_for_line(process, f"step {after_step}/")
    process.send_signal(number)
    return finish(process, code=128 + number)[0]


def assert_same_end(a: Path, b: Path):
    """Compare weights, optimizer and step of two runs bit for bit."""
    content_a = load_checkpoint(checkpoints(a)[0])
    content_b = load_checkpoint(checkpoints(b)[0])
    for key in ("step", "model", "average", "optimizer"):
        assert same(content_a[key], content_b[key]), key


def assert_close(a: Path, b: Path):
    """Compare the lines of two runs, which may differ by the order of additions only."""
    tolerance = {
        "loss": {"abs": 1e-4},
        "dev": {"abs": 1e-3},
        "grad_norm": {"rel": 1e-2},
        "lr": {},
        "mask_rate": {},
        "words": {},
    }
    lines_a = {(entry["step"], "dev" in entry): entry for entry in read_metrics(a)}
    lines_b = {(entry["step"], "dev" in entry): entry for entry in read_metrics(b)}
    assert lines_a.keys() == lines_b.keys()
    for key, entry in lines_a.items():
        assert entry.keys() == lines_b[key].keys()
        for name in tolerance.keys() & entry.keys():
            expected = pytest.approx(entry[name], **tolerance[name])
            assert lines_b[key][name] == expected, (key, name)


# --------------------------------------------------------------------------------- numbers of a run


@pytest.fixture
def short_run(corpus, tmp_path):
    """The arguments of a run of one epoch."""
    return [*TINY, "--schedule=1_CLM", f"--corpus={corpus}", f"--out_dir={tmp_path / 'run'}"]


def plain_loss(model, batches, objective: str, epoch: int, step: int, place, mask_rate: float):
    """Return the mean loss of rows as the formula reads."""
    batch = batches.batch(objective, epoch, step, place, mask_rate)
    logits = model(torch.from_numpy(batch.tokens), causal=OBJECTIVES[objective].causal)
    return F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten())


def plain_learning_rate(step: int, n_steps: int, n_warmup: int) -> float:
    """Return the linear decay from 1e-2 to a quarter of it, after a linear warmup."""
    if step < n_warmup:
        return 1e-2 * (step + 1) / n_warmup
    done = (step - n_warmup) / (n_steps - 1 - n_warmup)
    return 1e-2 * (0.25 + 0.75 * (1 - done))


# Every kind of phase, and no setting that matters at its default.
MIXED = [
    *TINY,
    "--schedule=1_1CLM:2MLM+1_MNTP",
    "--batch_rows=72",
    "--micro_rows=13",
    "--seed=4",
    "--lr=1e-2",
    "--lr_min_ratio=0.25",
    "--warmup=0.3",
    "--lr_decay=linear",
    "--mask_start=0.4",
    "--mask_end=0.2",
    "--eval_mask_rate=0.25",
    "--clip=1.5",
    "--save_every=1",
    "--keep=99",
]


@pytest.mark.slow
def test_every_step_is_what_its_number_says(corpus, tmp_path):
    """Compare losses, gradients, clipping, rates and dev losses of all steps with plain formulas.

    Each step begins at the weights and moments that the step before has saved.
    """
    train_here(*MIXED, f"--corpus={corpus}", f"--out_dir={tmp_path}")
    text = Corpus(corpus)
    batches = Batches(text.train, text.vocab_size, 16, 72, 4, max_mask_rate=0.4)
    steps = [entry for entry in read_metrics(tmp_path) if "loss" in entry]
    n_steps = 2 * batches.steps_per_epoch
    assert [entry["step"] for entry in steps] == list(range(1, n_steps + 1))

    torch.manual_seed(4)
    model = Transformer(ModelConfig("babyllama", text.vocab_size, 2, 2, 32, 48))
    moments = [torch.zeros_like(p) for p in optimizer_order(model)]
    clipped = []
    for step, entry in enumerate(steps):
        # the loss and its gradient: each objective's mean counts by its share of rows
        mask_rate = 0.4 - 0.2 * step / (n_steps - 1)
        place_in_epoch = divmod(step, batches.steps_per_epoch)
        n_rows = min(72, batches.n_rows - 72 * place_in_epoch[1])
        n_clm = round(n_rows / 3)
        places = {"MNTP": np.arange(n_rows)}
        if step < n_steps / 2:
            places = {"CLM": np.arange(n_clm), "MLM": np.arange(n_clm, n_rows)}
        losses = {}
        for objective, place in places.items():
            loss = plain_loss(model, batches, objective, *place_in_epoch, place, mask_rate)
            (loss * len(place) / n_rows).backward()
            losses[objective] = loss.item()
        grads = [p.grad for p in optimizer_order(model)]
        norm = math.sqrt(sum(grad.square().sum().item() for grad in grads))
        clipped.append(norm > 1.5)

        # what the line says
        lr = plain_learning_rate(step, n_steps, round(0.3 * n_steps))
        assert entry["loss"] == pytest.approx(losses, rel=1e-4)
        assert entry["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert entry["lr"] == pytest.approx(lr)
        assert entry["mask_rate"] == pytest.approx(mask_rate)

        # what the optimizer was given: beta1 times the old moments and the rest of the gradient
        content = load_checkpoint(tmp_path / f"step_{step + 1:07}.pt")
        (optimizer,) = content["optimizer"]
        for group in optimizer["param_groups"]:
            assert group["lr"] == pytest.approx(lr)
        for i, grad in enumerate(grads):
            expected = 0.9 * moments[i] + 0.1 * grad * min(1, 1.5 / norm)
            moments[i] = optimizer["state"][i]["exp_avg"]
            torch.testing.assert_close(moments[i], expected, rtol=1e-3, atol=1e-6)
        model = load_model(content)
    assert any(clipped) and not all(clipped)
    check_dev_losses(model, text, read_metrics(tmp_path)[-1]["dev"])


def check_dev_losses(model: Transformer, text: Corpus, dev_losses: dict[str, float]):
    """Compare with the plain formula at the mask rate of evaluation, which is one of its own."""
    dev = Batches(text.dev, text.vocab_size, 16, 16, 0, max_mask_rate=0.25)
    place = np.arange(min(16, dev.n_rows))
    assert dev_losses.keys() == {"CLM", "MLM", "MNTP"}
    with torch.no_grad():
        for objective, loss in dev_losses.items():
            expected = plain_loss(model, dev, objective, 0, 0, place, 0.25).item()
            assert loss == pytest.approx(expected, rel=1e-4)


def optimizer_order(model: Transformer) -> list:
    """Return the parameters as the optimizer's state numbers them."""
    (optimizer,) = make_optimizers(model, train.Settings(), torch.device("cpu"))
    params = []
    for group in optimizer.param_groups:
        params += group["params"]
    return params


@pytest.mark.parametrize(
    "text", ["1_MLM", "1_MDLM", "1_CLM:MLM", "1_1CLM:15MNTP", "1_3CLM:1MLM:1MDNTP"]
)
@pytest.mark.parametrize("n_tokens", [17, 100, 257, 16 * 24 + 5, 16 * 24 * 2 + 16])
def test_the_shares_of_a_step_add_up_to_one(text, n_tokens):
    """Also where a short last step leaves an objective without a row, or without a hidden token."""
    (phase,) = schedule.parse(text)
    ids = np.arange(n_tokens, dtype=np.uint16) % 90 + 4
    processes = train.Processes("cpu")
    for seed in range(4):
        batches = Batches(ids, 94, 16, 24, seed)
        for step in range(batches.steps_per_epoch):
            micro_batches = batches.micro_batches(phase, 0, step, 0.15, micro_rows=7)
            n_rows = batches.split_rows(phase, step)
            factors = train.loss_factors(n_rows, micro_batches, processes)
            shares = dict.fromkeys(n_rows, 0.0)
            for part in micro_batches:
                shares[part.objective] += factors[part.objective] * part.n_scored
            if any(part.n_scored for part in micro_batches):
                assert sum(shares.values()) == pytest.approx(1)
            # objectives that score something stand to each other as their rows do
            scoring = [objective for objective in shares if shares[objective] > 0]
            for objective in scoring:
                ratio = n_rows[objective] / n_rows[scoring[0]]
                assert shares[objective] / shares[scoring[0]] == pytest.approx(ratio)


def test_a_dev_loss_of_nothing_is_left_out(short_run, tmp_path, capsys):
    settings = ["--schedule=1_CLM:MLM", "--block_size=4", "--mask_start=0.3", "--mask_end=0.3"]
    train_here(*short_run, *settings, "--eval_rows=1")
    dev = read_metrics(tmp_path / "run")[-1]["dev"]
    assert dev.keys() == {"CLM"}  # 0.15 of 4 tokens are less than one
    assert "MLM 0.000" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_average_is_that_of_the_weights_after_the_last_steps(corpus, tmp_path):
    """And what is evaluated and loaded is the average, while training goes on from the last."""
    args = [*TINY, "--schedule=1_CLM+1_MNTP", f"--corpus={corpus}", "--save_every=1", "--keep=99"]
    args += ["--eval_rows=16", "--eval_mask_rate=0.25", "--log_every=1"]
    train_here(*args, f"--out_dir={tmp_path / 'plain'}")
    train_here(*args, f"--out_dir={tmp_path / 'run'}", "--average_share=0.25")
    contents = [load_checkpoint(path) for path in reversed(checkpoints(tmp_path / "run"))]
    n_averaged = round(0.25 * len(contents))
    assert n_averaged > 1
    assert not any(content["average"] for content in contents[:-n_averaged])

    # the mean of so many, and no other weights than those of a run without an average
    plain = load_checkpoint(checkpoints(tmp_path / "plain")[0])
    assert same(contents[-1]["model"], plain["model"])
    assert contents[-1]["average"]["n"] == n_averaged
    for name, mean in contents[-1]["average"]["weights"].items():
        stacked = torch.stack([content["model"][name] for content in contents[-n_averaged:]])
        torch.testing.assert_close(mean, stacked.mean(0), rtol=1e-5, atol=1e-7)

    # what is used
    averaged = load_run(tmp_path / "run", weights="average")
    last = load_run(tmp_path / "run", weights="last")
    assert (averaged.weights, last.weights) == ("average", "last")
    for name, mean in contents[-1]["average"]["weights"].items():
        assert torch.equal(averaged.model.state_dict()[name], mean)
        assert torch.equal(last.model.state_dict()[name], contents[-1]["model"][name])
    text = Corpus(corpus)
    dev = [entry["dev"] for entry in read_metrics(tmp_path / "run") if "dev" in entry]
    check_dev_losses(averaged.model, text, dev[-1])


@pytest.mark.slow
def test_the_end_of_a_phase_is_evaluated_however_seldom_the_rest(corpus, tmp_path):
    """There it shows what a phase has cost the other objective."""
    args = [*TINY, "--schedule=1_CLM+1_MLM+1_CLM", f"--corpus={corpus}", "--eval_every=1000"]
    train_here(*args, f"--out_dir={tmp_path}")
    dev = [entry for entry in read_metrics(tmp_path) if "dev" in entry]
    assert [entry["epoch"] for entry in dev] == [1, 2, 3]
    forgetting = plot.find_forgetting(plot.read_training(str(tmp_path)))
    assert [change.objective for change in forgetting] == ["CLM", "MLM"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["1_MLM", "1_CLM:MDNTP"])
def test_accumulation_changes_no_result(corpus, tmp_path, phase):
    args = [*TINY, f"--schedule={phase}", f"--corpus={corpus}"]
    train_here(*args, "--micro_rows=24", f"--out_dir={tmp_path / 'one'}")
    train_here(*args, "--micro_rows=5", f"--out_dir={tmp_path / 'five'}")
    assert_close(tmp_path / "one", tmp_path / "five")


def test_dropout_differs_from_step_to_step_and_between_micro_batches():
    seeds = set()
    for step in range(10):
        for objective in OBJECTIVES.values():
            for index in range(5):
                seeds.add(dropout_seed(1, step, objective, index))
    assert len(seeds) == 10 * len(OBJECTIVES) * 5


def test_every_pass_of_a_run_draws_a_dropout_of_its_own(short_run, corpus, monkeypatch):
    seeds = []
    forward = Transformer.forward

    def note_seed(model, *args, **kwargs):
        if model.training:
            seeds.append(torch.initial_seed())
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", note_seed)
    train_here(*short_run, "--schedule=1_CLM+1_CLM:MLM", "--micro_rows=9", "--seed=3")

    # of the step in the run, not of that in its epoch, and of objective and micro-batch
    text = Corpus(corpus)
    batches = Batches(text.train, text.vocab_size, 16, 24, 3)
    expected = []
    for epoch, phase in enumerate(schedule.parse("1_CLM+1_CLM:MLM")):
        for step in range(batches.steps_per_epoch):
            for part in batches.micro_batches(phase, epoch, step, 0.15, micro_rows=9):
                step_of_run = epoch * batches.steps_per_epoch + step
                objective = OBJECTIVES[part.objective]
                expected.append(dropout_seed(3, step_of_run, objective, part.index))
    assert seeds == expected
    assert len(set(seeds)) == len(seeds)


@pytest.mark.slow
def test_it_learns_and_the_folder_says_how(corpus, tmp_path, capsys):
    folder = tmp_path / "run"
    args = [*TINY, "--schedule=3_CLM+3_MLM", "--lr=1e-2", "--log_every=10"]
    train_here(*args, f"--corpus={corpus}", f"--out_dir={folder}")
    assert re.search(
        r"step 10/\d+  epoch 0\.\d+/6  3_CLM  CLM \d\.\d+  lr \S+  [\d,]+ tokens/s  \d+:\d\d left",
        capsys.readouterr().out,
    )
    # an evaluation each epoch, of the objective that is not yet trained, too
    dev = [entry["dev"] for entry in read_metrics(folder) if "dev" in entry]
    assert len(dev) == 6
    assert all(losses.keys() == {"CLM", "MLM"} for losses in dev)
    assert dev[2]["CLM"] < dev[0]["CLM"]
    assert dev[5]["MLM"] < dev[2]["MLM"]

    words = json.loads((Path(corpus) / "meta.json").read_text())["train"]["words"]
    assert read_metrics(folder)[-1]["words"] == 6 * words
    for name in ("train.py", "antlm/checkpoint.py", "config/quickstart.py"):
        assert (folder / "source" / name).read_text() == (ROOT / name).read_text()
    assert json.loads((folder / "settings.json").read_text())["lr"] == 1e-2
    assert (folder / "tokenizer.json").exists()
    assert len(checkpoints(folder)) == 2  # one for each phase end


def test_speed_and_time_are_told_by_the_clock(short_run, tmp_path, monkeypatch, capsys):
    """Each of the 14 steps, of 24 x 16 tokens, takes ten seconds."""
    seconds = []

    def slow_step(*args):
        seconds.append(10)
        guarded_step(*args)

    clock = SimpleNamespace(time=lambda: sum(seconds))
    monkeypatch.setattr(train, "guarded_step", slow_step)
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(metrics, "time", clock)
    train_here(*short_run, "--log_every=4")
    printed = capsys.readouterr().out
    speeds = {}
    for entry in read_metrics(tmp_path / "run"):
        if "loss" in entry:
            speeds[entry["step"]] = entry["tokens_per_s"]
    assert speeds == dict.fromkeys((1, 4, 8, 12, 14), 38)
    assert re.findall(r"(\S+) tokens/s  (\S+) left", printed) == [
        ("38", "2:10"), ("38", "1:40"), ("38", "1:00"), ("38", "0:20"), ("38", "0:00")
    ]  # fmt: skip
    assert "in 2.3 minutes" in printed


@pytest.mark.slow
def test_babylm_rules(corpus, tmp_path, monkeypatch):
    """The first checkpoint that reaches a mark stays; words that are seen again count again."""
    monkeypatch.setattr(schedule, "WORD_MARKS", [1000, 2500, 9000])
    args = ["--schedule=2_MLM", "--save_every=1", "--keep=1", "--babylm_rules"]
    train_here(*TINY, *args, f"--corpus={corpus}", f"--out_dir={tmp_path}")
    words = {entry["step"]: entry["words"] for entry in read_metrics(tmp_path)}
    words_per_epoch = json.loads((Path(corpus) / "meta.json").read_text())["train"]["words"]
    assert 2500 < max(words.values()) == 2 * words_per_epoch < 9000

    expected = [max(words)]
    for mark in (1000, 2500):
        expected.append(min(step for step in words if words[step] >= mark))
    kept = {}
    for path in checkpoints(tmp_path):
        content = load_checkpoint(path)
        kept[content["step"]] = content["words"]
    assert kept == {step: words[step] for step in expected}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux about the processor")
def test_bfloat16_is_chosen_where_the_processor_has_instructions_for_it(short_run, capsys):
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1]
    expected = "float32"
    if {"avx512_bf16", "amx_bf16"} & set(flags.split()):
        expected = "bfloat16"
    train_here(*short_run, "--precision=auto", "--device=cpu")
    assert f"precision {expected}" in capsys.readouterr().out


# ------------------------------------------------------------------------------- stopping, going on


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_signal_and_resume_across_a_phase_switch_are_bit_exact(corpus, tmp_path, backbone):
    """SIGTERM in the first phase, SIGINT in the second, with accumulation and dropout."""
    args = [*TINY, "--schedule=2_CLM+2_MLM+1_CLM:MNTP", f"--corpus={corpus}", "--micro_rows=7"]
    args += [f"--backbone={backbone}", "--n_bucket=8"]
    if backbone == "ltg_bert":
        args += ["--dropout=0.1", "--optimizer=lamb"]
    uninterrupted = tmp_path / "uninterrupted"
    train_here(*args, f"--out_dir={uninterrupted}")
    losses = read_losses(uninterrupted)
    phase_steps = 2 * len(losses) // 5

    cut = [*args, f"--out_dir={tmp_path / 'cut'}"]
    printed = interrupt(5, signal.SIGTERM, *cut)
    assert "--resume" in printed
    assert 5 <= max(read_losses(tmp_path / "cut")) < phase_steps
    interrupt(phase_steps + 1, signal.SIGINT, *cut, "--resume")
    assert phase_steps < max(read_losses(tmp_path / "cut")) < 2 * phase_steps
    train_here(*cut, "--resume")
    assert_same_end(uninterrupted, tmp_path / "cut")
    assert read_losses(tmp_path / "cut") == losses  # every step has one line

    if backbone == "ltg_bert":  # without dropout, the first step already differs
        args += ["--schedule=1_CLM", "--dropout=0"]
        train_here(*args, f"--out_dir={tmp_path / 'no_dropout'}")
        assert read_losses(tmp_path / "no_dropout")[1] != losses[1]


def signal_at_call(function, at_call: int, counter: list):
    """Return a function that notes its calls, and at one of them sends this process SIGTERM."""

    def wrapper(*args, **kwargs):
        counter.append(1)
        if len(counter) == at_call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    return wrapper


def exit_code(*args: str) -> int:
    """Train in this process and return the code with which it is left."""
    # not pytest.raises: it keeps the frames of the error, and with them the lock of the run
    try:
        train_here(*args)
    except SystemExit as error:
        return error.code
    return 0


# log lines on several steps, evaluations in between, and several passes for each
INTERRUPTIBLE = [
    "--schedule=1_CLM+1_CLM:MLM",
    "--batch_rows=60",
    "--micro_rows=20",
    "--log_every=4",
    "--eval_every=3",
]


@pytest.mark.parametrize(
    "module, name, at_call, evaluated",
    [
        (train, "dropout_seed", 2, False),  # in the first step, after its first pass
        (train, "dropout_seed", 17, False),  # in a step, between two log lines
        (Batches, "batch", 24, True),  # while rows are made
        (Transformer, "forward", 21, False),  # in the evaluation after step 6, of CLM; MLM is left
        (Transformer, "forward", 22, True),  # in its last pass
    ],
)
def test_a_signal_between_passes_is_obeyed_and_loses_nothing(
    corpus, tmp_path, monkeypatch, module, name, at_call, evaluated
):
    """evaluated: whether the evaluation after step 6 has come to its end."""
    args = [*TINY, *INTERRUPTIBLE, f"--corpus={corpus}"]
    train_here(*args, f"--out_dir={tmp_path / 'uninterrupted'}")
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(module, name, signal_at_call(getattr(module, name), at_call, calls))
        assert exit_code(*args, f"--out_dir={tmp_path / 'cut'}") == 128 + signal.SIGTERM
    if name != "batch":  # a step makes all its batches before its first pass
        assert len(calls) == at_call
    dev_steps = [entry["step"] for entry in read_metrics(tmp_path / "cut") if "dev" in entry]
    assert (6 in dev_steps) == evaluated
    train_here(*args, f"--out_dir={tmp_path / 'cut'}", "--resume")
    assert differences(tmp_path / "uninterrupted", tmp_path / "cut") == []


def test_the_minutes_of_a_run_are_those_of_all_its_steps(short_run, monkeypatch, capsys):
    # every look at the clock, of which each log line takes one, is half a minute later
    clock = itertools.count(0, 30)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    train_here(*short_run)
    printed = capsys.readouterr().out
    n_lines = printed.count(" tokens/s ")
    minutes = float(re.search(r"in ([\d.]+) minutes", printed)[1])
    assert minutes >= n_lines / 2


@pytest.mark.parametrize("rank, share", [(0, 1), (1, 0)])
def test_the_saved_sums_of_a_log_line_go_on_in_one_process(rank, share):
    """A checkpoint has the sums of all processes; each of several would count them again."""
    run = types.SimpleNamespace(processes=types.SimpleNamespace(rank=rank))
    state = {"skipped": 2, "loss_sums": {"CLM": 3.0}, "counts": {"CLM": 4}}
    log = TrainingLog(run, None, None, ["CLM", "MLM"], state)
    assert log.loss_sums == {"CLM": 3.0 * share, "MLM": 0}
    assert log.counts == {"CLM": 4 * share, "MLM": 0}
    assert log.skipped == 2


def test_numbers_of_all_processes_are_summed_exactly():
    n_targets = 2**40 + 1  # more than a float32 tells from its neighbour
    assert train.Processes("cpu").sum([n_targets, 0.1]) == [n_targets, 0.1]


def test_a_process_that_is_stopped_for_another_ends_as_by_sigterm():
    signals = train.StopSignals()
    assert signals.exit_code() == 128 + signal.SIGTERM
    signals.receive(signal.SIGINT, None)
    assert signals.exit_code() == 128 + signal.SIGINT


def test_a_run_that_had_ended_says_so(short_run, capsys):
    train_here(*short_run)
    assert "minutes" in capsys.readouterr().out
    train_here(*short_run, "--resume")
    printed = capsys.readouterr().out
    assert "nothing was left to do" in printed
    assert "minutes" not in printed


@pytest.mark.slow
def test_every_shape_of_a_long_schedule_is_compiled(short_run, tmp_path, graphs):
    """More than the eight after which torch would go on uncompiled, each once for all layers."""
    mixes = [f"1_{weight}CLM:{12 - weight}MLM" for weight in (1, 2, 3, 4, 5)]
    small = [f"--schedule={'+'.join(mixes)}", "--n_layer=2", "--eval_rows=1", "--log_every=99"]
    train_here(*short_run, *small, "--compile=on")
    # CLM with 2, 4, 6, 8 and 10 rows, MLM with the rest of 24; evaluation builds nothing
    assert len(graphs) == 10
    # nothing in the checkpoint tells that the model was compiled
    content = load_checkpoint(checkpoints(tmp_path / "run")[0])
    model = Transformer(ModelConfig(**content["config"]))
    assert content["model"].keys() == model.state_dict().keys()


def test_without_a_compiler_a_run_is_refused_or_goes_on_uncompiled(short_run, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "needs a C++ compiler" in refusal(*short_run, "--compile=on")
    train_here(*short_run, "--compile=auto")
    assert "compile off" in capsys.readouterr().out
    # where a run would be long enough
    choice = choose("auto", train.Processes("cpu"), flops=1e18, n_shapes=1, dtype=torch.float32)
    assert choice == (False, "auto: it needs a C++ compiler (g++, or the one that CXX names)")


@pytest.mark.slow
def test_a_compiler_that_fails_costs_a_line():
    """In a process of its own: torch asks once which compiler there is."""
    code = """
import torch
from antlm.compiling import choose
from antlm.distributed import Processes
choice = choose("auto", Processes("cpu"), flops=1e18, n_shapes=1, dtype=torch.float32)
print(choice.compiled, choice.reason)
choose("on", Processes("cpu"), flops=1e18, n_shapes=1, dtype=torch.float32)
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CXX": "false"},  # a program that is there, and compiles nothing
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    problem = "a compiler that works (InvalidCxxCompiler: "
    assert process.stdout.startswith(f"False auto: it needs {problem}")
    last_line = process.stderr.splitlines()[-1]
    assert last_line.startswith(f"config.UserError: compile = 'on' needs {problem}")


@pytest.mark.slow
@pytest.mark.skipif(
    missing_for_compile(torch.device("cpu")) is not None, reason="needs a C++ compiler"
)
def test_auto_compiles_long_runs_on_a_cpu():
    processes = train.Processes("cpu")
    seconds = 1e16 / (0.6 * product_speed(processes.device, torch.float32))
    for n_shapes, compiled in ((1, True), (math.ceil(seconds / 50), False)):
        choice = choose("auto", processes, flops=1e16, n_shapes=n_shapes, dtype=torch.float32)
        assert choice.compiled == compiled
        assert re.search(r"about \d+ min of training without it, worth it from", choice.reason)


def test_a_machine_that_is_busy_with_other_work_is_mentioned():
    if not Path("/proc/stat").exists():
        pytest.skip("only Linux tells in /proc/stat how busy the machine is")
    processes = train.Processes("cpu")
    torch.set_num_threads(os.cpu_count())
    other_work = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        described = train.describe_machine(train.Settings(), processes, False, Choice(False, ""))
        torch.set_num_threads(1)
        described_alone = train.describe_machine(
            train.Settings(), processes, False, Choice(False, "")
        )
    finally:
        other_work.kill()
    assert "OMP_NUM_THREADS=1" in described
    assert "OMP_NUM_THREADS=1" not in described_alone


# Settings that make it another run; all others may change when a run goes on.
OTHER = {
    "init_from": "runs/other",
    "backbone": "ltg_bert",
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 16,
    "n_ff": 24,
    "tied": "true",
    "dropout": 0.1,
    "n_bucket": 8,
    "max_position": 256,
    "schedule": "1_MLM",
    "block_size": 8,
    "batch_rows": 12,
    "mask_start": 0.2,
    "mask_end": 0.2,
    "mask_decay": "cosine",
    "mask_span": 2,
    "seed": 2,
    "optimizer": "lamb",
    "lr": 1e-3,
    "lr_min_ratio": 0.2,
    "lr_decay": "linear",
    "lr_decay_share": 0.2,
    "warmup": 0.1,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 1e-7,
    "weight_decay": 0,
    "clip": 0,
    "average_share": 0.2,
}


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_settings_only(short_run, tmp_path):
    assert OTHER.keys() | train.FREE == {field.name for field in dataclasses.fields(train.Settings)}
    assert not OTHER.keys() & train.FREE
    train_here(*short_run)
    newest = checkpoints(tmp_path / "run")[0]
    for name, value in OTHER.items():
        message = refusal(*short_run, "--resume", f"--{name}={value}")
        assert message.startswith(f"{newest}: was trained with {name}=")


def test_a_run_goes_on_with_its_own_text_only(short_run, corpus, tmp_path):
    train_here(*short_run)
    folder = Path(corpus).parent
    prepare.prepare(
        [str(folder / "text.dev")],
        [str(folder / "text.train")],
        str(tmp_path / "other"),
        tokenizer=f"{corpus}/tokenizer.json",
    )
    message = refusal(*short_run, "--resume", f"--corpus={tmp_path / 'other'}")
    assert "another corpus" in message


@pytest.mark.slow
def test_a_run_goes_on_where_newer_settings_are_missing(short_run, tmp_path):
    """As in a checkpoint of an older train.py; they count as their defaults."""
    args = [*short_run, "--schedule=1_CLM+1_MLM"]
    train_here(*args)
    newest, before = checkpoints(tmp_path / "run")
    expected = load_checkpoint(newest)
    content = load_checkpoint(before)
    for name in ("skip_nonfinite", "babylm_rules", "beta1"):
        del content["settings"][name]
    torch.save(content, before)
    newest.unlink()
    assert "with beta1=0.9, not 0.8" in refusal(*args, "--resume", "--beta1=0.8")
    train_here(*args, "--resume")
    assert same(load_checkpoint(newest)["model"], expected["model"])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_skipped(short_run, tmp_path, capsys):
    args = [*short_run, "--schedule=1_CLM+1_MLM"]
    train_here(*args)
    newest, before = checkpoints(tmp_path / "run")
    expected = load_checkpoint(newest)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    train_here(*args, "--resume")
    printed = capsys.readouterr().out
    assert f"skipped {newest}" in printed
    assert f"starts at step {int(before.stem[5:])} of" in printed
    assert same(load_checkpoint(newest)["model"], expected["model"])

    for path in checkpoints(tmp_path / "run"):
        path.write_bytes(path.read_bytes()[:1000])
    assert "none of its 2 checkpoints is whole" in refusal(*args, "--resume")


def test_what_is_saved_among_damaged_checkpoints_stays(short_run, tmp_path, monkeypatch):
    """The newest few are those up to the step that is saved: later ones are damaged."""
    run = tmp_path / "run"
    args = [*short_run, "--save_every=2"]
    train_here(*args, "--keep=99")
    damaged = checkpoints(run)[:4]
    assert [step_of(path) for path in damaged] == [14, 12, 10, 8]
    for path in damaged:
        path.write_bytes(b"")

    # on from step 6, and stopped in the third step
    stopping = signal_at_call(train.dropout_seed, 3, [])
    with monkeypatch.context() as patch:
        patch.setattr(train, "dropout_seed", stopping)
        assert exit_code(*args, "--keep=2", "--resume") == 128 + signal.SIGTERM
    path, content = load_newest(run, warn=list)
    assert (step_of(path), content["step"]) == (9, 9)
    assert [step_of(path) for path in checkpoints(run)] == [14, 12, 10, 9, 8]


# ----------------------------------------------------------------------------------- bad beginnings


def test_a_run_is_not_overwritten(short_run, tmp_path):
    train_here(*short_run)
    message = refusal(*short_run)
    assert str(tmp_path / "run") in message
    assert "--resume" in message


def test_a_missing_corpus_is_named_with_the_command_that_makes_it(short_run):
    message = refusal(*short_run, "--corpus=nowhere")
    assert message.startswith("nowhere: ")
    assert "python prepare.py" in message


def test_a_block_longer_than_the_text_is_refused(short_run):
    message = refusal(*short_run, "--block_size=100000")
    assert "block_size 100000" in message


def test_a_mistake_in_the_code_is_not_blamed_on_a_checkpoint(short_run, monkeypatch):
    def mistaken(self, config, embedding):
        raise AttributeError("no such thing")

    monkeypatch.setattr(BACKBONES["babyllama"].head, "__init__", mistaken)
    with pytest.raises(AttributeError, match="no such thing"):
        train_here(*short_run)


# ---------------------------------------------------------------------------- numbers that go wrong


def test_steps_that_are_not_finite_are_skipped_counted_and_remembered(short_run, tmp_path):
    """Step 1 throws the weights far off, and all later ones overflow: step 1's weights stay."""
    run = tmp_path / "run"
    args = [*short_run, "--lr=1e30", "--clip=0", "--warmup=0", "--micro_rows=10"]
    args += ["--save_every=1", "--keep=9"]
    message = refusal(*args)
    assert "step 2: gradient norm nan is not finite" in message
    assert "--skip_nonfinite" in message
    assert [load_checkpoint(path)["step"] for path in checkpoints(run)] == [1]
    first = load_checkpoint(checkpoints(run)[0])

    # with 50 steps between lines the host looks late; the weights are safe all the same
    for allowed, log_every in ((2, 1), (5, 50)):
        flags = [f"--skip_nonfinite={allowed}", f"--log_every={log_every}"]
        message = refusal(*args, "--resume", *flags)
        assert f"step {allowed + 2}: gradient norm" in message
        newest = load_checkpoint(checkpoints(run)[0])
        assert (newest["step"], newest["log"]["skipped"]) == (allowed + 1, allowed)
        assert same(newest["model"], first["model"])
        for state, state_before in zip(newest["optimizer"], first["optimizer"], strict=True):
            assert same(state["state"], state_before["state"])

    # NaN is no JSON
    lines = (run / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [(e["step"], e["skipped"]) for e in entries[:3]] == [(1, 0), (2, 1), (3, 2)]
    assert entries[1]["grad_norm"] is None
    assert entries[1]["loss"] == {}


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_noticed_where_its_gradient_is(tmp_path):
    """The letter z, in one line of the text, cannot be predicted; both of two processes notice."""
    animals = "cat dog bird horse mouse".split()
    lines = []
    for a in animals:
        for b in animals:
            lines += [f"The {a} sees the {b} that the {c} hears." for c in animals]
    (tmp_path / "text.train").write_text("\n".join([*lines, "The zebra sees the cat.", *lines]))
    (tmp_path / "text.dev").write_text("\n".join(lines))
    train_files = [str(tmp_path / "text.train")]
    dev_files = [str(tmp_path / "text.dev")]
    prepare.prepare(train_files, dev_files, str(tmp_path / "corpus"), vocab_size=280)
    corpus = Corpus(str(tmp_path / "corpus"))
    (z,) = corpus.tokenizer.encode("z")

    # a checkpoint of step 1 that gives z a probability of zero
    run = tmp_path / "run"
    args = [*TINY, "--schedule=2_CLM", f"--corpus={corpus.folder}", f"--out_dir={run}"]
    args += ["--backbone=ltg_bert", "--n_bucket=8", "--micro_rows=1"]
    train_here(*args, "--save_every=1", "--keep=999")
    for path in checkpoints(run)[:-1]:
        path.unlink()
    (path,) = checkpoints(run)
    content = load_checkpoint(path)
    content["model"]["head.vocab.bias"][z] = -float("inf")
    torch.save(content, path)

    # which steps have it, in how many rows?
    batches = Batches(corpus.train, corpus.vocab_size, 16, 24, 1)
    expected = []
    for step in range(1, 2 * batches.steps_per_epoch):
        epoch, step_in_epoch = divmod(step, batches.steps_per_epoch)
        batch = batches.batch("CLM", epoch, step_in_epoch, np.arange(24), 0)
        n_rows = int((batch.targets == z).any(axis=1).sum())
        if n_rows > 0:
            expected.append((str(step + 1), str(n_rows)))
    assert expected

    assert f"step {expected[0][0]}: " in refusal(*args, "--resume")
    process = start(*args, "--resume", "--skip_nonfinite=9", torchrun=TWO_PROCESSES)
    printed = finish(process)[0]
    line = (
        r"^step (\d+): gradient norm nan is not finite, "
        r"nor the CLM loss of (\d+) micro-batch\(es\); skipped$"
    )
    assert re.findall(line, printed, re.M) == expected
    assert f"skipped {len(expected)}  lr" in printed
    end = load_checkpoint(checkpoints(run)[0])
    assert end["log"]["skipped"] == len(expected)
    del end["model"]["head.vocab.bias"]
    assert all(weight.isfinite().all() for weight in end["model"].values())


# -------------------------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.parametrize("n_processes, batch_rows", [(2, 24), (3, 25)])
def test_several_processes_do_what_one_does(corpus, tmp_path, n_processes, batch_rows):
    """Pure and mixed phases with accumulation; what several processes saved, one goes on with.

    Of 25 rows the four of CLM in a mix are too few for three processes, so that one has none.
    """
    args = [*TINY, "--schedule=1_CLM+1_1CLM:5MNTP+1_CLM:MDLM", f"--corpus={corpus}"]
    args += ["--micro_rows=5", "--average_share=0.5", f"--batch_rows={batch_rows}"]
    one = tmp_path / "one"
    several = tmp_path / "several"
    train_here(*args, f"--out_dir={one}")
    torchrun = ("--standalone", f"--nproc_per_node={n_processes}")
    _, errors = finish(start(*args, f"--out_dir={several}", torchrun=torchrun))
    assert "Warning" not in errors
    assert_close(one, several)
    checkpoints(several)[0].unlink()
    train_here(*args, f"--out_dir={several}", "--resume")
    assert_close(one, several)


def free_port() -> int:
    """Return a port that is free, below those that the kernel hands out."""
    for port in random.sample(range(20000, 30000), 50):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) != 0:
                return port
    pytest.fail("no free port")


@pytest.mark.parametrize(
    "cuda, mps, expected",
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_fastest_device_is_chosen(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device("auto").type == expected


def test_more_processes_than_gpus_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 3 on this machine finds 2 GPU"):
        train.Processes("cuda")


@pytest.mark.slow
def test_one_process_goes_on_as_two_nodes(corpus, tmp_path):
    """Two torchruns meet at an address and a port, as on two machines."""
    args = [*TINY, "--schedule=1_CLM:MLM+1_CLM+1_MNTP", f"--corpus={corpus}", "--micro_rows=5"]
    args += ["--backbone=ltg_bert", "--n_bucket=8"]
    uninterrupted = tmp_path / "uninterrupted"
    cut = tmp_path / "cut"
    for folder in (uninterrupted, cut):
        train_here(*args, f"--out_dir={folder}")
    for path in checkpoints(cut)[:2]:
        path.unlink()
    step = load_checkpoint(checkpoints(cut)[0])["step"]

    torchrun = ["--nnodes=2", "--nproc_per_node=1", "--local_addr=127.0.0.1", "--rdzv_id=7"]
    torchrun += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    flags = [*args, f"--out_dir={cut}", "--resume"]
    nodes = [start(*flags, torchrun=torchrun), start(*flags, torchrun=torchrun)]
    printed = "".join(finish(node)[0] for node in nodes)
    assert "2 process(es)" in printed
    assert f"run {cut}, starts at step {step} of" in printed
    assert_close(uninterrupted, cut)


@pytest.mark.slow
@pytest.mark.parametrize("receiver", ["torchrun", "second process", "all, as by Ctrl-C"])
def test_a_signal_stops_all_processes_after_the_same_step(corpus, tmp_path, receiver):
    """torchrun sends on what it receives, so that by Ctrl-C each process is told twice."""
    cut = tmp_path / "cut"
    args = [*TINY, "--schedule=9_CLM+1_MLM", f"--corpus={corpus}", "--micro_rows=5"]
    process = start(*args, f"--out_dir={cut}", torchrun=TWO_PROCESSES)
    wait_for_line(process, "step 4/")
    first, second = process_ids(process)
    receivers = {
        "torchrun": [process.pid],
        "second process": [second],
        "all, as by Ctrl-C": [first, second, process.pid],
    }
    for pid in receivers[receiver]:
        os.kill(pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "go on with the same command and --resume" in printed
    (saved,) = checkpoints(cut)
    assert 4 <= load_checkpoint(saved)["step"] < 50

    train_here(*args, f"--out_dir={cut}", "--resume")
    train_here(*args, f"--out_dir={tmp_path / 'uninterrupted'}")
    assert_close(tmp_path / "uninterrupted", cut)


def test_processes_that_see_different_folders_are_refused(short_run, tmp_path, monkeypatch):
    """As on two nodes whose out_dir is a disk of their own: the other one finds no checkpoint."""
    train_here(*short_run)
    one = train.Processes("cpu")
    two = types.SimpleNamespace(**vars(one) | {"world": 2}, sum=lambda numbers: numbers)
    two.wait = two.print = lambda *text: None
    monkeypatch.setattr(train, "Processes", lambda device: two)
    assert "must be one folder for all" in refusal(*short_run, "--resume")


@pytest.mark.slow
def test_killed_processes_are_started_again_by_torchrun(corpus, tmp_path):
    """One of two dies: both start again and go on untold. The other dies, too: all end."""
    killed = tmp_path / "killed"
    args = [*TINY, "--schedule=9_CLM+1_MLM", f"--corpus={corpus}", "--micro_rows=5"]
    args += ["--save_every=3"]
    flags = [*args, f"--out_dir={killed}"]
    process = start(*flags, torchrun=(*TWO_PROCESSES, "--max-restarts=1"))
    wait_for_line(process, "step 4/")
    os.kill(process_ids(process)[1], signal.SIGKILL)
    wait_for_line(process, f"{killed}: started again by torchrun")
    wait_for_line(process, f"run {killed}, starts at step ")
    wait_for_line(process, "step ")
    os.kill(process_ids(process)[0], signal.SIGKILL)
    began = time.time()
    errors = finish(process, code=1)[1]
    assert time.time() - began < 20
    assert "process 0: lost contact" in errors  # the first time
    assert "SIGKILL" in errors

    train_here(*flags, "--resume")
    train_here(*args, f"--out_dir={tmp_path / 'uninterrupted'}")
    assert_close(tmp_path / "uninterrupted", killed)


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_and_is_said_once(corpus, tmp_path):
    run = tmp_path / "run"
    args = [*TINY, "--schedule=20_CLM", f"--corpus={corpus}", f"--out_dir={run}"]
    process = start(*args, torchrun=TWO_PROCESSES)
    wait_for_line(process, "step 2/")
    run.rename(tmp_path / "elsewhere")  # process 0 writes there, process 1 does not
    began = time.time()
    errors = finish(process, code=1)[1]
    assert time.time() - began < 20
    (line,) = re.findall("^train.py: .*", errors, re.M)
    assert "No such file" in line


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_said_once(corpus, tmp_path):
    args = [*TINY, f"--corpus={corpus}", f"--out_dir={tmp_path}", "--n_head=3"]
    errors = finish(start(*args, torchrun=TWO_PROCESSES), code=1)[1]
    (line,) = re.findall("^train.py: .*", errors, re.M)
    assert "n_embd = 32 must be a multiple of n_head = 3" in line
