"""Runs that are killed, damaged, starved of disk, or started twice.

Alone: python -m pytest tests/test_kill.py; the long form of the first test:
python -m tests.kill --kills 50
"""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    TINY,
    error_line,
    finish,
    read_metrics,
    refusal,
    start,
    train_here,
    wait_for_line,
)
from kill import campaign, differences, make_corpus

from antlm.checkpoint import checkpoints, load_checkpoint

TWO_PHASES = [*TINY, "--schedule=1_CLM+1_MLM"]


@pytest.fixture
def disk(tmp_path):
    """The folder of a file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={8 << 20}", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def step_of(path: Path) -> int:
    return load_checkpoint(path)["step"]


# -------------------------------------------------------------------------------------------- kills


@pytest.mark.slow
def test_killed_runs_end_as_one_that_was_not(tmp_path):
    corpus = make_corpus(tmp_path, n_lines=360)
    count = campaign("ltg_bert", corpus, tmp_path, 2, random.Random(10))
    assert count["kills"] == 2
    assert count["runs"] >= 1


def flip_a_bit_of_the_weights(run: Path):
    path = checkpoints(run)[0]
    content = load_checkpoint(path)
    content["model"]["head.norm.weight"].view(torch.int32)[0] ^= 1
    torch.save(content, path)


def flip_a_bit_of_the_optimizer(run: Path):
    path = checkpoints(run)[0]
    content = load_checkpoint(path)
    moments = content["optimizer"][0]["state"][0]["exp_avg"]
    moments.view(torch.int32).view(-1)[0] ^= 1
    torch.save(content, path)


def change_a_loss(run: Path):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    entry = json.loads(lines[3])
    entry["loss"]["CLM"] *= 1 + 1e-12
    lines[3] = json.dumps(entry) + "\n"
    path.write_text("".join(lines))


def remove_a_checkpoint(run: Path):
    checkpoints(run)[1].unlink()


def leave_half_a_file(run: Path):
    (run / "source" / ".x.part").touch()


@pytest.mark.slow
def test_whatever_differs_between_two_runs_is_seen(corpus, tmp_path):
    """The other tests here rely on it."""
    expected = {
        flip_a_bit_of_the_weights: ": model",
        flip_a_bit_of_the_optimizer: ": optimizer",
        change_a_loss: "metrics.jsonl",
        remove_a_checkpoint: "checkpoints [",
        leave_half_a_file: "left behind",
    }
    run = tmp_path / "run"
    train_here(*TWO_PHASES, f"--corpus={corpus}", f"--out_dir={run}")
    for change, text in expected.items():
        changed = tmp_path / change.__name__
        shutil.copytree(run, changed)
        assert differences(run, changed) == []
        change(changed)
        (difference,) = differences(run, changed)
        assert text in difference


@pytest.mark.slow
def test_what_a_kill_may_leave_is_mended(corpus, tmp_path):
    """The worst moment of every write, made by hand."""
    uninterrupted = tmp_path / "uninterrupted"
    cut = tmp_path / "cut"
    args = [*TWO_PHASES, f"--corpus={corpus}", "--save_every=5"]
    train_here(*args, f"--out_dir={uninterrupted}")
    shutil.copytree(uninterrupted, cut)
    newest = checkpoints(cut)[0]
    newest.unlink()
    for name in (f".{newest.name}.part", ".metrics.jsonl.part", "source/config/.x.py.part"):
        (cut / name).write_bytes(b"half")
    (cut / "settings.json").write_bytes(b"")
    (cut / "tokenizer.json").write_bytes((cut / "tokenizer.json").read_bytes()[:100])
    (cut / "source" / "model.py").write_text("import has")
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": {"CL')

    train_here(*args, f"--out_dir={cut}", "--resume")
    assert differences(uninterrupted, cut) == []
    for name in ("tokenizer.json", "source/model.py"):
        assert (cut / name).read_bytes() == (uninterrupted / name).read_bytes()
    settings = json.loads((cut / "settings.json").read_text())
    assert settings["resume"] is True
    assert settings["out_dir"] == str(cut)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    corpus, tmp_path, capsys, flags
):
    uninterrupted = tmp_path / "uninterrupted"
    cut = tmp_path / "cut"
    args = [*TWO_PHASES, f"--corpus={corpus}"]
    train_here(*args, f"--out_dir={uninterrupted}")
    shutil.copytree(uninterrupted, cut)
    for path in checkpoints(cut):
        path.rename(path.with_name(f".{path.name}.part"))
    train_here(*args, f"--out_dir={cut}", *flags)
    assert f"run {cut}, starts at step 0 of" in capsys.readouterr().out
    assert differences(uninterrupted, cut) == []


@pytest.mark.slow
def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(corpus, tmp_path):
    args = [*TWO_PHASES, f"--corpus={corpus}", f"--out_dir={tmp_path}", "--keep=1"]
    train_here(*args)
    newest, before = checkpoints(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-100])
    process = start(*args, "--resume", "--save_every=1")
    wait_for_line(process, f"step {step_of(before) + 3}/")
    process.kill()
    process.communicate()

    damaged, *others = checkpoints(tmp_path)
    assert damaged == newest
    assert len(others) >= 2
    assert before in others
    assert all(load_checkpoint(path) for path in others)
    train_here(*args, "--resume")
    assert step_of(newest) == int(newest.stem.removeprefix("step_"))


# --------------------------------------------------------------------------------------------- disk


def fill(folder: Path):
    """Write until the disk is full to the last byte."""
    try:
        with open(folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        pass


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_spoils_nothing(corpus, tmp_path, disk):
    run = disk / "run"
    args = [*TWO_PHASES, f"--corpus={corpus}", "--keep=1"]
    flags = [*args, f"--out_dir={run}", "--save_every=4"]
    process = start(*flags)
    wait_for_line(process, "step 6/")
    fill(disk)
    message = error_line(process)
    assert message.startswith(f"train.py: {run}/")
    assert "No space left on device" in message
    assert "--resume" in message

    # what was saved is whole, and a start into the full disk leaves it so
    left = checkpoints(run)
    step = step_of(left[0])
    assert step >= 4
    assert list(run.glob(".*.part")) == []
    assert "No space left" in error_line(start(*flags, "--resume"))
    assert checkpoints(run) == left

    # with space again, the run goes on
    (disk / "filler").unlink()
    printed = finish(start(*flags, "--resume"))[0]
    assert f"starts at step {step} of" in printed
    train_here(*args, f"--out_dir={tmp_path / 'uninterrupted'}")
    assert differences(tmp_path / "uninterrupted", run) == []


@pytest.mark.slow
def test_metrics_that_cannot_be_written_end_the_run(corpus, disk):
    """Where no checkpoint is due."""
    run = disk / "run"
    args = [*TWO_PHASES, f"--corpus={corpus}", f"--out_dir={run}", "--schedule=9_CLM"]
    args += ["--save_every=1000"]
    process = start(*args)
    wait_for_line(process, "step 1/")
    fill(disk)
    assert "No space left on device" in error_line(process)
    n_lines = len((run / "metrics.jsonl").read_text().splitlines())

    (disk / "filler").unlink()
    train_here(*args, "--resume")
    steps = [entry["step"] for entry in read_metrics(run) if "loss" in entry]
    assert n_lines < len(steps)
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_named(corpus, disk):
    run = disk / "run"
    args = [*TWO_PHASES, f"--corpus={corpus}"]
    train_here(*args, f"--out_dir={run}")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    message = error_line(start(*args, f"--out_dir={run}", "--resume"))
    assert "Read-only file system" in message
    assert str(run) in message
    with pytest.raises(OSError, match="Read-only"):
        train_here(*args, f"--out_dir={disk / 'new'}")
    assert all(load_checkpoint(path) for path in checkpoints(run))


@pytest.mark.slow
def test_a_folder_that_vanishes_ends_the_run(corpus, tmp_path):
    run = tmp_path / "run"
    process = start(*TWO_PHASES, f"--corpus={corpus}", f"--out_dir={run}", "--schedule=20_CLM")
    wait_for_line(process, "step 3/")
    run.rename(tmp_path / "elsewhere")
    message = error_line(process)
    assert str(run) in message
    assert "No such file" in message


# ----------------------------------------------------------------------------- signals, second runs


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(corpus, tmp_path):
    args = [*TWO_PHASES, f"--corpus={corpus}", f"--out_dir={tmp_path}", "--schedule=400_CLM"]
    args += ["--save_every=3"]
    first = start(*args)
    wait_for_line(first, "step 4/")
    expected = f"{tmp_path}: another train.py is at work in it"
    assert refusal(*args).startswith(expected)
    assert refusal(*args, "--resume").startswith(expected)
    assert first.poll() is None  # undisturbed

    # the lock is gone with the process that held it
    first.kill()
    first.communicate()
    assert "was trained with lr=0.003, not 0.001" in refusal(*args, "--resume", "--lr=1e-3")


def catches_interrupts(process: subprocess.Popen) -> bool:
    """Whether SIGINT would run a handler of the process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(re.search(r"^SigCgt:\s*(\w+)", status, re.M)[1], base=16)
    return bool(caught & 1 << (signal.SIGINT - 1))


@pytest.mark.slow
def test_the_second_interrupt_ends_the_run_at_once(corpus, tmp_path):
    # a step takes seconds: one micro-batch for each row
    args = [*TWO_PHASES, f"--corpus={corpus}", f"--out_dir={tmp_path}", "--schedule=9_CLM"]
    args += ["--save_every=1", "--eval_every=99", "--n_layer=6", "--n_embd=128"]
    process = start(*args, "--micro_rows=1", "--batch_rows=480")
    wait_for_line(process, "step 1/")
    deadline = time.time() + 60
    while not checkpoints(tmp_path):
        assert time.time() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    while catches_interrupts(process):
        assert time.time() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)

    # no step was finished, nothing saved
    assert finish(process, code=-signal.SIGINT) == ("", "")
    (path,) = checkpoints(tmp_path)
    assert step_of(path) == 1
