"""Runs that start from the weights of another one (init_from)."""

import shutil

import pytest
import torch
from conftest import TINY, read_metrics, refusal, train_here
from kill import differences, make_corpus

import eval
import sample
from antlm.checkpoint import checkpoints, file_sha256, load_checkpoint, load_run, save_checkpoint
from data import find_objectives


@pytest.fixture
def args(corpus) -> list[str]:
    return [*TINY, f"--corpus={corpus}"]


@pytest.fixture
def source(args, tmp_path):
    """A finished run of one causal epoch."""
    train_here(*args, "--schedule=1_CLM", f"--out_dir={tmp_path / 'source'}")
    return tmp_path / "source"


def newest(run) -> dict:
    return load_checkpoint(checkpoints(run)[0])


def test_the_first_step_begins_at_the_weights_of_the_source(args, source, tmp_path):
    run = tmp_path / "run"
    settings = ["--schedule=1_MLM", "--seed=5", "--lr=1e-30", "--weight_decay=0", "--save_every=1"]
    train_here(*args, *settings, "--keep=99", f"--init_from={source}", f"--out_dir={run}")
    first = load_checkpoint(run / "step_0000001.pt")
    for name, weight in newest(source)["model"].items():
        assert torch.equal(first["model"][name], weight), name
    # a run of its own: new optimizer, step 0
    (optimizer,) = first["optimizer"]
    assert {int(state["step"]) for state in optimizer["state"].values()} == {1}
    assert first["step"] == 1
    assert read_metrics(run)[0]["step"] == 1


def test_a_checkpoint_tells_all_that_the_model_was_trained_with(args, source, tmp_path, capsys):
    second = tmp_path / "second"
    third = tmp_path / "third"
    train_here(*args, "--schedule=1_MNTP", f"--init_from={source}", f"--out_dir={second}")
    train_here(*args, "--schedule=2_MLM", f"--init_from={second}", f"--out_dir={third}")
    run = load_run(third)
    words = newest(source)["words"]
    assert [entry["schedule"] for entry in run.history] == ["1_CLM", "1_MNTP"]
    assert [entry["words"] for entry in run.history] == [words, 2 * words]
    assert [entry["sha256"] for entry in run.history] == [
        file_sha256(checkpoints(source)[0]),
        file_sha256(checkpoints(second)[0]),
    ]
    assert run.content["words"] == 4 * words
    assert find_objectives(run.full_schedule) == ["CLM", "MNTP", "MLM"]

    # it still knows how to predict the next token
    capsys.readouterr()
    sample.main([str(third), "--n", "1", "--tokens", "2"])
    assert "never learnt" not in capsys.readouterr().out
    task = tmp_path / "pairs.jsonl"
    task.write_text('{"sentence_good": "The cat sees.", "sentence_bad": "Cat the sees."}\n')
    eval.main([str(third), "--task", str(task), "--out", str(tmp_path / "result.json")])
    head = capsys.readouterr().out
    assert all(mode in head for mode in eval.MODES)


def test_a_run_goes_on_without_its_source(args, source, tmp_path):
    settings = [*args, "--schedule=1_MLM", f"--init_from={source}", "--save_every=3"]
    train_here(*settings, f"--out_dir={tmp_path / 'uninterrupted'}")
    train_here(*settings, f"--out_dir={tmp_path / 'cut'}")
    for path in checkpoints(tmp_path / "cut")[:1]:
        path.unlink()
    shutil.rmtree(source)
    train_here(*settings, f"--out_dir={tmp_path / 'cut'}", "--resume")
    assert differences(tmp_path / "uninterrupted", tmp_path / "cut") == []


def test_a_vocabulary_that_is_larger_than_the_tokenizers_stays_so(args, source, tmp_path):
    """As in an imported model whose rows are filled up to a round number."""
    path = checkpoints(source)[0]
    content = load_checkpoint(path)
    n_rows = content["config"]["vocab_size"] + 7
    for name in ("embedding.tokens.weight", "head.vocab.weight"):
        filler = torch.zeros(7, 32)
        content["model"][name] = torch.cat((content["model"][name], filler))
    content["config"]["vocab_size"] = n_rows
    torch.save(content, path)

    settings = [*args, "--schedule=1_MLM", f"--init_from={source}", "--save_every=3"]
    run = tmp_path / "run"
    train_here(*settings, f"--out_dir={run}")
    assert newest(run)["config"]["vocab_size"] == n_rows
    assert newest(run)["model"]["embedding.tokens.weight"].shape == (n_rows, 32)
    # and where the run goes on
    checkpoints(run)[0].unlink()
    train_here(*settings, f"--out_dir={run}", "--resume")
    assert newest(run)["config"]["vocab_size"] == n_rows


def test_the_epochs_of_the_source_count_under_babylm_rules(args, source, tmp_path):
    settings = ["--babylm_rules=true", f"--init_from={source}", f"--out_dir={tmp_path / 'run'}"]
    line = refusal(*args, *settings, "--schedule=10_MLM")
    assert "1_CLM+10_MLM" in line
    assert "10 epochs" in line
    # those of all runs before, not of the last one alone
    second = tmp_path / "second"
    train_here(*args, "--schedule=1_MNTP", f"--init_from={source}", f"--out_dir={second}")
    rules = ["--babylm_rules=true", f"--init_from={second}", f"--out_dir={tmp_path / 'run'}"]
    assert "1_CLM+1_MNTP+9_MLM" in refusal(*args, *rules, "--schedule=9_MLM")
    # words, too: of a source that does not tell them nobody knows where the marks are
    path = checkpoints(source)[0]
    content = load_checkpoint(path)
    content["words"] = None
    model = load_run(source).model
    del content["config"], content["model"]
    save_checkpoint(path, model, **content)
    assert "how many words" in refusal(*args, *settings, "--schedule=1_MLM")


OTHER_SIZES = ["n_layer=1", "n_head=1", "n_embd=16", "n_ff=24", "tied=true", "backbone=ltg_bert"]


@pytest.mark.parametrize("setting", OTHER_SIZES)
def test_other_sizes_than_those_of_the_source_are_named(args, source, tmp_path, setting):
    line = refusal(*args, f"--{setting}", f"--init_from={source}", f"--out_dir={tmp_path / 'run'}")
    assert line.startswith(f"init_from = {source}: ")
    assert setting.split("=")[0] in line


def test_another_tokenizer_than_that_of_the_source_is_named(args, source, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    make_corpus(other, n_lines=50)
    settings = [f"--init_from={source}", f"--out_dir={tmp_path / 'run'}"]
    line = refusal(*args, f"--corpus={other / 'corpus'}", *settings)
    assert "another tokenizer" in line
    assert "--tokenizer=" in line


def test_a_model_without_an_optimizer_is_not_resumed_but_started_from(args, source, tmp_path):
    # as tools/import_hf.py writes one
    path = checkpoints(source)[0]
    content = load_checkpoint(path) | {"optimizer": []}
    model = load_run(source).model
    del content["config"], content["model"]
    save_checkpoint(path, model, **content)
    line = refusal(*args, "--schedule=1_CLM", f"--out_dir={source}", "--resume")
    assert "--init_from" in line
    train_here(*args, "--schedule=1_CLM", f"--init_from={source}", f"--out_dir={tmp_path / 'run'}")
