"""What tests that train share: a small corpus to learn, and ways to call train.py."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from kill import make_corpus

import config
import train
from config import UserError

ROOT = Path(__file__).parent.parent
TINY = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--n_ff=48",
    "--block_size=16",
    "--batch_rows=24",
    "--lr=3e-3",
    "--log_every=1",
    "--eval_rows=16",
    "--precision=float32",  # in bfloat16 the order of additions shows
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    return str(make_corpus(tmp_path_factory.mktemp("corpus"), n_lines=600))


@pytest.fixture(autouse=True, scope="session")
def signals_of_a_terminal():
    """Take signals as in a terminal: nohup, and the background of a shell, ignore some.

    The programs that tests start would inherit that.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Use one thread, since more only wait for each other in models this small.

    In fixtures of a module, too: on some CPUs the last bit of a sum depends on the threads.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def process_state():
    """Put back the threads and the signal handlers, which train.train sets."""
    n_threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    torch.set_num_threads(n_threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile is given in this test; they run uncompiled."""
    received = []

    def keep(graph, example_inputs):
        received.append(graph)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **kw: compile_module(module, backend=keep, **kw)
    )
    torch._dynamo.reset()
    yield received
    torch._dynamo.reset()


# ------------------------------------------------------------------------------ in this process


def train_here(*args: str):
    """Train in this process, without the seconds that an import of torch takes."""
    train.train(config.load(train.Settings, list(args)))


def refusal(*args: str) -> str:
    """Return the one line in which training in this process ends."""
    # not pytest.raises: it keeps the frames of the error, and with them the lock of the run
    try:
        train_here(*args)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    pytest.fail("trained to the end")


# ---------------------------------------------------------------------- in processes of their own


def start(*args: str, torchrun: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start train.py, by torchrun where there are arguments for it."""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", *torchrun]
    return subprocess.Popen(
        [*command, "train.py", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Wait for the end of a process; return what it printed and its error lines."""
    try:
        printed, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, printed + errors
    return printed, errors


def error_line(process: subprocess.Popen) -> str:
    """Wait for the end of a process that fails, and return the one line that it says."""
    errors = finish(process, code=1)[1]
    assert errors.startswith("train.py: ")
    assert errors.count("\n") == 1, errors
    return errors


def wait_for_line(process: subprocess.Popen, beginning: str):
    """Read what a process prints up to a line; fail where it ends or needs two minutes."""
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith(beginning):
                return
        pytest.fail(f"no line began with {beginning!r}: {process.communicate()}")
    finally:
        timer.cancel()


# ------------------------------------------------------------------------------ what a run leaves


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_losses(run: Path) -> dict[int, dict[str, float]]:
    """Return the training losses of each step that has a line."""
    return {entry["step"]: entry["loss"] for entry in read_metrics(run) if "loss" in entry}
