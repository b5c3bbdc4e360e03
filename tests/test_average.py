"""Tests of tools/average.py. Alone: python -m pytest tests/test_average.py"""

import re
from pathlib import Path

import average
import pytest
import torch
from conftest import TINY, train_here

import eval as evaluation
import prepare
from antlm.checkpoint import checkpoints, file_sha256, load_checkpoint, load_run
from config import UserError


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    """A causal run, its masked continuation, and one with an average of its own."""
    folder = tmp_path_factory.mktemp("runs")
    args = [*TINY, f"--corpus={corpus}"]
    train_here(*args, "--schedule=1_CLM", f"--out_dir={folder / 'clm'}")
    source = f"--init_from={folder / 'clm'}"
    train_here(*args, "--schedule=1_MLM", source, f"--out_dir={folder / 'mlm'}")
    train_here(*args, "--schedule=2_CLM", "--average_share=0.5", f"--out_dir={folder / 'long'}")
    return folder


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoints(run)[0])["model"]


def test_weights_are_averaged_by_their_shares(runs, tmp_path):
    out = tmp_path / "both"
    average.main([str(out), str(runs / "clm"), str(runs / "mlm"), "--shares", "1", "3"])
    a = weights_of(runs / "clm")
    b = weights_of(runs / "mlm")
    for name, mean in weights_of(out).items():
        torch.testing.assert_close(mean, 0.25 * a[name] + 0.75 * b[name])
        assert mean.dtype == torch.float32


def test_the_average_of_a_run_with_itself_is_that_run(runs, tmp_path):
    average.main([str(tmp_path / "same"), str(runs / "clm"), str(runs / "clm")])
    for name, weight in weights_of(tmp_path / "same").items():
        assert torch.equal(weight, weights_of(runs / "clm")[name])


@pytest.mark.parametrize("weights", ["average", "last"])
def test_of_a_run_that_has_an_average_that_is_taken_or_the_last_weights(runs, tmp_path, weights):
    args = [str(runs / "long"), "--weights", weights]
    average.main([str(tmp_path / "out"), *args])
    expected = load_run(runs / "long", weights=weights).model.state_dict()
    for name, weight in weights_of(tmp_path / "out").items():
        assert torch.equal(weight, expected[name])


def test_the_run_says_what_it_was_made_of_and_is_scored_like_any(runs, tmp_path):
    out = tmp_path / "both"
    average.main([str(out), str(runs / "clm"), str(runs / "mlm")])
    run = load_run(out)
    sources = run.content["averaged"]
    assert [source["share"] for source in sources] == [0.5, 0.5]
    for source, name in zip(sources, ("clm", "mlm"), strict=True):
        assert source["sha256"] == file_sha256(checkpoints(runs / name)[0])
    # it has learnt what both have, and seen as many words as the one that saw more
    assert run.full_schedule == "1_CLM+1_MLM+1_CLM"
    assert run.content["words"] == load_run(runs / "mlm").content["words"]

    task = tmp_path / "pairs.jsonl"
    task.write_text('{"sentence_good": "The cat sees.", "sentence_bad": "The cat see."}\n')
    evaluation.main([str(out), "--task", str(task), "--device", "cpu"])
    assert len(list(out.glob("eval_*.json"))) == 1


def test_a_run_can_start_from_an_average(runs, corpus, tmp_path):
    average.main([str(tmp_path / "both"), str(runs / "clm"), str(runs / "mlm")])
    args = [*TINY, f"--corpus={corpus}", "--schedule=1_CLM", f"--out_dir={tmp_path / 'on'}"]
    train_here(*args, f"--init_from={tmp_path / 'both'}")
    assert load_run(tmp_path / "on").full_schedule == "1_CLM+1_MLM+1_CLM+1_CLM"


@pytest.mark.parametrize(
    "arguments, fault",
    [
        (["{clm}", "{wide}"], "wide/step_.*: has n_embd=48, and .*clm/step_.* 32"),
        (["{clm}", "{other}"], "other/step_.*: was trained with another tokenizer than .*clm"),
        (["{clm}", "{none}"], "none: holds no whole checkpoint|none: cannot be read"),
        (["{clm}", "{clm}", "--shares", "1"], "--shares: has 1 numbers for 2 runs"),
        (["{clm}", "{clm}", "--shares", "1", "-1"], "--shares: must not be negative, nor all 0"),
    ],
)
def test_a_mistake_is_named_and_leaves_nothing(runs, corpus, tmp_path, arguments, fault):
    args = [*TINY, "--schedule=1_CLM"]
    wide = ["--n_embd=48", f"--corpus={corpus}", f"--out_dir={tmp_path / 'wide'}"]
    if "{wide}" in arguments:
        train_here(*args, *wide)
    if "{other}" in arguments:
        files = [tmp_path / "text.train", tmp_path / "text.dev"]
        for file in files:
            file.write_text("quick quills quit quaint quarrels\n" * 50)
        train, dev = ([str(file)] for file in files)
        prepare.prepare(train, dev, str(tmp_path / "corpus"), vocab_size=264)
        train_here(*args, f"--corpus={tmp_path / 'corpus'}", f"--out_dir={tmp_path / 'other'}")
    places = {name: tmp_path / name for name in ("wide", "other", "none")} | {"clm": runs / "clm"}
    arguments = [argument.format(**places) for argument in arguments]
    with pytest.raises(UserError) as error:
        average.main([str(tmp_path / "out"), *arguments])
    assert re.search(fault, str(error.value))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        average.main([str(tmp_path), str(runs / "clm")])
