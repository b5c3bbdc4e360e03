"""What eval.py's results are named and say, on a run of random weights and pairs made here."""

import json
from pathlib import Path

import pytest
import torch

import eval as evaluation
from antlm.checkpoint import save_checkpoint
from antlm.tokenizer import Tokenizer, save_tokenizer
from babylm.results import read_result
from config import UserError
from model import ModelConfig, Transformer

BLOCK_SIZE = 8


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with a tokenizer of bytes alone: a text of n letters has n + 1 tokens."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_tokenizer(folder / "tokenizer.json", [])
    return folder


def save_model(run: Path, broken_letter: str = ""):
    """Write a checkpoint; texts with the broken letter get scores that are not finite."""
    tokenizer = Tokenizer(run / "tokenizer.json")
    torch.manual_seed(1)
    model = Transformer(ModelConfig("babyllama", tokenizer.vocab_size, 1, 2, 16, 24))
    for token in tokenizer.encode(broken_letter):
        torch.nn.init.constant_(model.embedding.tokens.weight[token], float("nan"))
    save_checkpoint(
        run / "step_0000001.pt",
        model,
        step=1,
        settings=dict(schedule="1_CLM", block_size=BLOCK_SIZE),
        boundary="line",
        tokenizer_sha256=tokenizer.sha256,
    )


def write_pairs(path: Path, *pairs: tuple[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in pairs]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def score(run: Path, task: Path, *flags: str) -> dict:
    """Score a task and return the content of the result file that this has added."""
    before = set(run.glob("eval_*.json"))
    evaluation.main([str(run), "--task", str(task), *flags])
    (added,) = set(run.glob("eval_*.json")) - before
    return read_result(added)


def test_no_setting_that_changes_scores_overwrites_a_result(run, tmp_path):
    save_model(run)
    task = write_pairs(tmp_path / "pairs.jsonl", ("abc", "abd"), ("bcd", "bce"))
    for flags in (
        (),
        ("--dtype=bfloat16",),
        ("--limit=1",),
        ("--mode=causal",),
        ("--mode=masked",),
    ):
        score(run, task, *flags)
    assert len(list(run.glob("eval_*.json"))) == 5


def test_the_text_whose_score_is_not_finite_is_named(run, tmp_path):
    save_model(run, broken_letter="x")
    # all of one length, and with a longer one that is scored before them
    pairs = [("aaaa", "abab"), ("abcdef", "fedcba"), ("cccc", "cdcd"), ("axaa", "bbbb")]
    task = write_pairs(tmp_path / "pairs.jsonl", *pairs)
    with pytest.raises(UserError, match=r"pairs.jsonl:4: score in causal mode is not finite"):
        evaluation.main([str(run), "--task", str(task)])


def test_options_longer_than_a_training_row_are_counted(run, tmp_path):
    save_model(run)
    fits = "a" * (BLOCK_SIZE - 1)  # with its start token
    task = write_pairs(
        tmp_path / "pairs.jsonl", (fits, "b"), (fits + "a", "c"), (fits + "ab", fits)
    )
    (entry,) = score(run, task)["tasks"].values()
    assert entry["longer_than_training_rows"] == 2


def test_tasks_of_one_name_in_two_folders_are_two(run, tmp_path):
    save_model(run)
    write_pairs(tmp_path / "tasks" / "full" / "pairs" / "x.jsonl", ("abc", "abd"))
    write_pairs(tmp_path / "tasks" / "fast" / "pairs" / "x.jsonl", ("abc", "abd"))
    assert set(score(run, tmp_path / "tasks")["tasks"]) == {"full/pairs", "fast/pairs"}


@pytest.mark.parametrize("other", [("abX", "abd"), ("abc", "abX")])
def test_the_fingerprint_is_of_every_option(run, tmp_path, other):
    save_model(run)
    hashes = set()
    for number, pair in enumerate([("abc", "abd"), other]):
        task = write_pairs(tmp_path / f"{number}.jsonl", pair)
        (entry,) = score(run, task)["tasks"].values()
        hashes.add(entry["options_sha256"])
    assert len(hashes) == 2
