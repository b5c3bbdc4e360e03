"""What tests that train share: a small corpus with enough structure to learn, made here, and ways to call train.py."""

import random
import signal
import subprocess
import threading

import pytest
import torch

import config
import prepare
import train
from config import UserError


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(1)
    nouns, verbs = "cat dog bird horse child teacher".split(), "sees likes finds follows hears".split()
    for name, n in (("text.train", 600), ("text.dev", 80)):
        lines = (f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}." for _ in range(n))
        (folder / name).write_text("\n".join(lines) + "\n")
    prepare.prepare([str(folder / "text.train")], [str(folder / "text.dev")], str(folder / "corpus"), vocab_size=300)
    return str(folder / "corpus")


@pytest.fixture(autouse=True)
def as_before():
    """One thread, since for models this small more only wait for each other; handlers that train.train sets go back."""
    threads, handlers = torch.get_num_threads(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def until(process: subprocess.Popen, beginning: str):
    """Wait for a line of a process's output, two minutes at most."""
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        assert any(line.startswith(beginning) for line in process.stdout), process.communicate()
    finally:
        timer.cancel()


def once(*args: str):
    """Train in this process, without the seconds that an import of torch takes."""
    train.train(config.load(train.Settings, [*args]))


def refusal(*args: str) -> str:
    """The error in which training ends in this process."""
    try:
        once(*args)
    except UserError as e:
        return str(e)
    pytest.fail("trained to the end")
