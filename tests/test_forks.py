"""Each fork of docs/forks.md applies and does what it says: python -m pytest tests/test_forks.py

A fork is tested in a copy of the project: train.py runs there as a program, and what it has to
prove is asked of its modules, which replace the project's own for that while.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare

ROOT = Path(__file__).parent.parent
FORKS = ROOT / "docs" / "forks"
PATCHES = sorted(patch.stem for patch in FORKS.glob("*.patch"))
# changed lines at most: what the design of the project promises
LIMITS = {"prefix_lm": 20, "ema": 15, "distillation": 30, "curriculum": 35, "gpt2": 75}

SMALL = [
    *("--n_layer=2", "--n_head=2", "--n_embd=32", "--n_ff=48", "--n_bucket=4", "--max_position=16"),
    *("--block_size=16", "--batch_rows=32", "--micro_rows=16", "--eval_rows=32", "--lr=3e-3"),
    *("--log_every=1", "--precision=float32", "--device=cpu"),
]


# ---------------------------------------------------------------------------------- making a fork


def make_fork(name: str, folder: Path) -> Path:
    """Copy the programs and the rooms they import, and apply a patch to the copy."""
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for room in ("antlm", "babylm", "config"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    apply_patch(name, folder)
    return folder


def apply_patch(name: str, folder: Path, *options: str):
    # a repository around the folder would make git leave out what lies outside of its root
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", *options, str(FORKS / f"{name}.patch")]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def start(fork: Path, *command: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, *command], cwd=fork, env=environment, text=True, **pipes
    )


def run(fork: Path, *command: str) -> str:
    """Run a program of the fork to its end and return what it printed."""
    process = start(fork, *command)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    return output


def error(fork: Path, *command: str) -> str:
    """Run a program of the fork that ends with an error, and return its only line."""
    process = start(fork, *command)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.count("\n") == 1, errors
    return errors


@contextlib.contextmanager
def modules(fork: Path):
    """Have imports in this block find the fork's modules instead of the project's."""
    rooms = {"antlm", "babylm", "config", *(file.stem for file in fork.glob("*.py"))}

    def forget() -> dict:
        names = [name for name in sys.modules if name.partition(".")[0] in rooms]
        return {name: sys.modules.pop(name) for name in names}

    originals = forget()
    sys.path.insert(0, str(fork))
    try:
        yield
    finally:
        sys.path.remove(str(fork))
        forget()
        sys.modules.update(originals)


def metrics(run_folder: Path, key: str) -> list[dict]:
    """Return the entries of this name, "loss" or "dev", in the log of a run."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [entry[key] for entry in map(json.loads, lines) if key in entry]


def objective_losses(run_folder: Path, objective: str) -> list[float]:
    return [loss[objective] for loss in metrics(run_folder, "loss") if objective in loss]


# -------------------------------------------------------------------------------------- all forks


def changed_lines(name: str) -> int:
    lines = (FORKS / f"{name}.patch").read_text().splitlines()
    return sum(
        line.startswith(("+", "-")) and not line.startswith(("+++", "---")) for line in lines
    )


def test_every_patch_has_a_limit():
    assert PATCHES == sorted(LIMITS)


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_applies_is_short_and_the_document_says_how_short(name):
    apply_patch(name, ROOT, "--check")
    n = changed_lines(name)
    assert n <= LIMITS[name]
    text = (ROOT / "docs" / "forks.md").read_text()
    assert re.search(rf"forks/{name}\.patch.*\b{n} lines", text), f"{name} has {n} lines"


# ------------------------------------------------------------------------------------ the forks


def changed_logits(model, tokens, place: int, **arguments) -> list[int]:
    """Return the positions whose logits depend on the token at a place."""
    other = tokens.clone()
    other[0, place] += 1
    with torch.inference_mode():
        difference = model(tokens, **arguments) - model(other, **arguments)
    return difference[0].abs().amax(-1).nonzero().flatten().tolist()


@pytest.mark.slow
def test_prefix_lm_opens_the_prefix_and_scores_what_follows(tmp_path, corpus):
    fork = make_fork("prefix_lm", tmp_path / "fork")
    run(fork, "train.py", *SMALL, f"--corpus={corpus}", "--schedule=2_PREFIX", "--out_dir=run")
    losses = objective_losses(fork / "run", "PREFIX")
    assert losses[-1] < 0.7 * losses[0]

    with modules(fork):
        from data import OBJECTIVES, Batches
        from model import ModelConfig, Transformer

        # the loss begins with the first token behind the prefix, which the prefix's last predicts
        rows = Batches(np.arange(4, 404, dtype=np.uint16), 500, 16, 25, seed=1)
        batch = rows.batch("PREFIX", 0, 0, np.arange(25), 0.15)
        assert len(set(batch.prefix.tolist())) > 5
        for tokens, targets, prefix in zip(batch.tokens, batch.targets, batch.prefix, strict=True):
            assert 0 <= prefix < 16
            first = max(0, prefix - 1)
            assert (targets[:first] == -100).all()
            assert (targets[first:-1] == tokens[first + 1 :]).all()

        # tokens of the prefix see each other, those behind it see no later one
        for backbone in ("babyllama", "ltg_bert"):
            sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_ff": 16}
            model = Transformer(ModelConfig(backbone, 30, **sizes)).eval()
            tokens = torch.arange(4, 12)[None]
            arguments = {"causal": OBJECTIVES["PREFIX"].causal, "prefix": torch.tensor([5])}
            assert changed_logits(model, tokens, 4, **arguments) == [0, 1, 2, 3, 4, 5, 6, 7]
            assert changed_logits(model, tokens, 5, **arguments) == [5, 6, 7]
            assert changed_logits(model, tokens, 7, **arguments) == [7]


@pytest.mark.slow
def test_the_average_of_ema_forgets_what_is_long_ago(tmp_path, corpus):
    fork = make_fork("ema", tmp_path / "fork")
    flags = (*SMALL, f"--corpus={corpus}", "--schedule=1_CLM", "--save_every=1", "--keep=1000")
    run(fork, "train.py", *flags, "--average_share=1", "--average_decay=0.8", "--out_dir=run")

    with modules(fork):
        from antlm.checkpoint import checkpoints, load_checkpoint

        # each average is the one before it, moved towards the weights of its step
        contents = [load_checkpoint(path) for path in reversed(checkpoints(fork / "run"))]
        assert len(contents) > 10
        for before, after in zip(contents, contents[1:], strict=False):
            share = max(0.2, 1 / after["step"])
            for name, average in before["average"]["weights"].items():
                expected = torch.lerp(average, after["model"][name], share)
                assert torch.equal(after["average"]["weights"][name], expected)
        assert not torch.equal(average, after["model"][name])


@pytest.mark.slow
def test_distillation_draws_the_student_to_its_teacher(tmp_path, corpus):
    fork = make_fork("distillation", tmp_path / "fork")
    flags = (*SMALL, f"--corpus={corpus}")
    teacher = ("--n_embd=64", "--schedule=3_CLM+3_MLM", f"--out_dir={fork}/teacher")
    run(ROOT, "train.py", *flags, *teacher)  # by the project as it is
    student = ("--schedule=3_CLM:MLM", "--teacher=teacher")
    run(fork, "train.py", *flags, *student, "--alpha=1", "--out_dir=student")
    for objective in ("CLM", "MLM"):  # a divergence, which is 0 where the two agree
        losses = objective_losses(fork / "student", objective)
        assert losses[-1] < 0.5 * losses[0]

    with modules(fork):
        from data import OBJECTIVES, Batches
        from model import ModelConfig, Transformer
        from train import Settings, distil

        ids = np.random.default_rng(1).integers(4, 30, 400).astype(np.uint16)
        rows = Batches(ids, 30, 16, 8, seed=1)
        sizes = {"vocab_size": 30, "n_layer": 1, "n_head": 2, "n_ff": 16}
        model = Transformer(ModelConfig(n_embd=16, **sizes)).eval()
        teacher = Transformer(ModelConfig(n_embd=32, **sizes)).eval()
        for name in ("CLM", "MLM"):
            causal = OBJECTIVES[name].causal
            batch = rows.batch(name, 0, 0, np.arange(8), 0.15).to(torch.device("cpu"))
            loss, _, logits = model(**batch, causal=causal, with_logits=True)
            arguments = (loss, logits, teacher, batch, causal)
            of_text = distil(*arguments, Settings(alpha=0.0)).item()
            of_teacher = distil(*arguments, Settings(alpha=1.0)).item()
            mixed = distil(*arguments, Settings(alpha=0.25)).item()
            assert of_text == loss.item()
            assert of_teacher > 0
            assert mixed == pytest.approx(0.75 * of_text + 0.25 * of_teacher)

            of_itself = distil(loss, logits, model, batch, causal, Settings(alpha=1.0)).item()
            assert of_itself == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_an_epoch_of_the_curriculum_reads_the_sources_in_the_order_given(tmp_path):
    fork = make_fork("curriculum", tmp_path / "fork")
    texts = {"easy": "a cat sees a dog .\n", "hard": "one horse follows three birds !\n"}
    for name, line in texts.items():
        (fork / f"{name}.train").write_text(line * 200)
    train_files = [str(fork / f"{name}.train") for name in texts]
    (fork / "dev.txt").write_text("a dog sees a cat .\n" * 20)
    prepare.prepare(train_files, [str(fork / "dev.txt")], str(fork / "corpus"), vocab_size=300)

    flags = (*SMALL, "--corpus=corpus", "--schedule=1_CLM")
    line = error(fork, "train.py", *flags, "--sources=easy", "--out_dir=none")
    assert "sources: must name each of easy, hard" in line
    run(fork, "train.py", *flags, "--sources=hard,easy", "--out_dir=run")

    with modules(fork):
        from data import Batches, Corpus
        from train import make_curriculum

        corpus = Corpus(str(fork / "corpus"))
        curriculum = make_curriculum(corpus, ("hard", "easy"))
        batches = Batches(corpus.train, corpus.vocab_size, 16, 8, seed=1, curriculum=curriculum)
        for epoch in range(3):
            rows = []
            for step in range(batches.steps_per_epoch):
                tokens = batches.rows(epoch, step, np.arange(8)).tokens
                rows += [corpus.tokenizer.decode(row.tolist()) for row in tokens]
            is_hard = ["horse" in row or "bird" in row for row in rows[: batches.n_rows]]
            n_hard = sum(is_hard)
            assert 0 < n_hard < len(is_hard)
            assert all(is_hard[: n_hard - 1])  # one row may reach from one source to the other
            # every row is read once
            assert sorted(batches.order(epoch)) == list(range(batches.n_rows))
        # in each epoch the rows of a source stand in a new order
        assert list(batches.order(0)) != list(batches.order(1))


@pytest.mark.slow
def test_gpt2_trains_scores_samples_and_refuses_rows_beyond_its_positions(tmp_path, corpus):
    fork = make_fork("gpt2", tmp_path / "fork")
    flags = (*SMALL, f"--corpus={corpus}", "--backbone=gpt2", "--schedule=2_CLM+1_MLM")
    run(fork, "train.py", *flags, "--out_dir=run")
    losses = objective_losses(fork / "run", "CLM")
    assert losses[-1] < 0.7 * losses[0]

    def pairs(name: str, n: int):
        good = " ".join(["The cat sees the dog."] * n)
        pair = {"sentence_good": good, "sentence_bad": good.replace("sees the", "the sees")}
        (fork / name).write_text(json.dumps(pair) + "\n")

    pairs("short.jsonl", 1)
    output = run(fork, "eval.py", "run", "--task=short.jsonl", "--mode", "causal", "masked")
    assert "100.0" in output
    sample = run(fork, "sample.py", "run", "--prompt=The cat", "--n=2", "--tokens=40")
    assert sample.count("The cat") == 2

    pairs("long.jsonl", 20)
    line = error(fork, "eval.py", "run", "--task=long.jsonl", "--mode=causal")
    assert "long.jsonl:1" in line
    assert "the model takes 16" in line
    line = error(fork, "train.py", *flags, "--block_size=32", "--out_dir=none")
    assert "block_size" in line
    assert "gpt2" in line
