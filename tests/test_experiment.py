"""Tests of tools/experiment.py. Alone: python -m pytest tests/test_experiment.py -m "not slow" """

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import experiment
import numpy as np
import pytest

import config
from config import UserError
from data import Corpus

ROOT = Path(__file__).parent.parent
SETTINGS = """
settings = dict(n_layer=1, n_head=2, n_embd=32, n_ff=48, block_size=16, batch_rows=4, lr=3e-3)
settings |= dict(log_every=1, eval_rows=16)
"""
# stands for train.py: fails for a learning rate of 1e30, else leaves the last checkpoint
FAKE_TRAIN = """
import sys
from pathlib import Path
if "--lr=1e+30" in sys.argv:
    sys.exit("train.py: the gradient is not finite")
folder = Path([arg[10:] for arg in sys.argv if arg.startswith("--out_dir=")][0])
folder.mkdir()
(folder / "step_0000168.pt").touch()
"""


def write_spec(folder: Path, *lines: str) -> list[str]:
    """Write a spec and return the arguments of the tool, which then works in folder/out."""
    folder.mkdir(exist_ok=True)
    (folder / "spec.py").write_text("\n".join(lines) + "\n")
    return [str(folder / "spec.py"), f"--out={folder / 'out'}"]


def write_lines(path: Path, records: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def load(args: list[str]) -> experiment.Spec:
    return config.load(experiment.Spec, args)


def interrupt_at_step(log: Path, step: int):
    """Send this process a Ctrl-C as soon as a log reports the step, from a thread."""

    def watch():
        deadline = time.time() + 120
        while time.time() < deadline:
            if log.exists() and f"\nstep {step}/" in log.read_text():
                break
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


# ----------------------------------------------------------------------- a run from start to table


@pytest.fixture(scope="module")
def study(corpus, tmp_path_factory) -> Path:
    """A run that was stopped by Ctrl-C and then went on to the end; the folder of all."""
    folder = tmp_path_factory.mktemp("study")
    pairs = []
    for noun in ("cat", "dog", "bird"):
        good = f"The {noun} sees the child."
        pairs.append({"sentence_good": good, "sentence_bad": f"The sees {noun} the child."})
    write_lines(folder / "pairs" / "order.jsonl", pairs)
    for split in ("train", "valid"):
        records = []
        for label in (0, 1, 0, 1):
            records.append({"sentence1": "A cat.", "sentence2": "A dog.", "label": label})
        write_lines(folder / "glue" / f"rte.{split}.jsonl", records)
    args = write_spec(
        folder,
        SETTINGS,
        'arms = {"antlm": dict(schedule="1_CLM+1_MLM")}\nseeds = 1\nglue = ("rte",)',
        f"corpus = {corpus!r}\ntasks = ({str(folder / 'pairs')!r},)",
        f"glue_data = {str(folder / 'glue')!r}",
    )

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    log = folder / "out" / "antlm_1.log"
    interrupt_at_step(log, 5)
    with pytest.raises(SystemExit) as stopped:
        experiment.main(args)
    assert stopped.value.code == 128 + signal.SIGINT
    (folder / "first.log").write_text(log.read_text())

    assert experiment.main(args) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(study):
    first = (study / "first.log").read_text()
    last_step = int(first.rpartition("\nstep ")[2].partition("/")[0])
    assert "stopped" in first
    log = (study / "out" / "antlm_1.log").read_text()
    assert f"\nstep {last_step + 1}/" in log[len(first) :]
    assert "\nstep 1/" not in log[len(first) :]


@pytest.mark.slow
def test_numbers_are_those_of_the_result_files(study):
    folder = study / "out" / "antlm_1"
    rows = json.loads((study / "out" / "results.json").read_text())["rows"]
    values = {row["measure"]: row["values"] for row in rows}

    file = next(folder.glob("eval_pairs_*.json"))
    accuracy = json.loads(file.read_text())["tasks"]["pairs"]["accuracy"]
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    dev_at = {entry["epoch"]: entry["dev"] for entry in entries if "dev" in entry}
    dev = dev_at[2]
    glue = json.loads(next(folder.glob("glue_*.json")).read_text())
    scores = [seed["score"] for seed in glue["tasks"]["rte"]["seeds"].values()]
    assert values == {
        "dev loss CLM": {"1": dev["CLM"]},
        "dev loss CLM forgotten": {"1": dev["CLM"] - dev_at[1]["CLM"]},
        "dev loss MLM": {"1": dev["MLM"]},
        "pairs causal": {"1": accuracy["causal"]},
        "pairs masked": {"1": accuracy["masked"]},
        "GLUE rte": {"1": statistics.mean(scores)},
        "GLUE mean": {"1": statistics.mean(scores)},
    }


@pytest.mark.slow
def test_what_is_finished_is_not_run_again(study, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "call", None)
    assert experiment.main([str(study / "spec.py"), f"--out={study / 'out'}"]) == 0
    shown = capsys.readouterr().out
    assert "0 of 1 runs left" in shown
    assert re.search(r"\| pairs masked +\| antlm \| 1 +\|", shown)


@pytest.mark.slow
def test_the_study_has_a_picture(study):
    pytest.importorskip("matplotlib", reason="optional: pip install matplotlib")
    assert (study / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        ('arms["antlm"]["lr"] = 1e-4', "antlm_1: was trained with lr=0.003, not 0.0001"),
        ("settings |= dict(eval_rows=8)", "antlm_1: was trained with eval_rows=16, not 8"),
    ],
)
def test_a_changed_spec_is_not_mixed_with_old_runs(study, tmp_path, change, message):
    write_spec(tmp_path, (study / "spec.py").read_text(), change)
    with pytest.raises(UserError, match=message):
        experiment.main([str(tmp_path / "spec.py"), f"--out={study / 'out'}"])


@pytest.mark.slow
def test_scores_of_other_items_are_not_mixed(study):
    spec = load([str(study / "spec.py"), f"--out={study / 'out'}"])
    run = experiment.plan(spec, Corpus(spec.corpus))[0]
    items = {}
    experiment.measure(spec, run, items)
    assert list(items) == ["pairs"]
    with pytest.raises(UserError, match="antlm_1/eval_pairs.*: scored on other items of pairs"):
        experiment.measure(spec, run, {"pairs": "the fingerprint of other items"})


# --------------------------------------------------------------------------------- what is run next


@pytest.fixture
def small(corpus, tmp_path):
    """A spec of two arms and its first run, of which nothing exists yet."""
    args = write_spec(
        tmp_path,
        SETTINGS,
        'arms = {"clm": dict(schedule="2_CLM"), "mlm": dict(schedule="2_MLM", modes=("mntp",))}',
        f"seeds = 2\ntasks = ('data/blimp', 'data/ewok')\nglue = ('rte',)\ncorpus = {corpus!r}",
    )
    spec = load(args)
    (tmp_path / "out").mkdir()
    return spec, experiment.plan(spec, Corpus(corpus))


def test_a_run_is_trained_then_scored_then_fine_tuned(small, monkeypatch):
    spec, runs = small
    run = runs[1]
    calls = []
    monkeypatch.setattr(experiment, "call", lambda program, args, log: calls.append(program))
    experiment.train_and_score(spec, run, None)
    assert calls == ["train.py", "eval.py", "eval.py", "finetune.py"]
    steps = int(run.checkpoint.stem.removeprefix("step_"))
    assert run.results["data/ewok"].name == f"eval_ewok_{steps}_mntp.json"

    # what is there is not made again
    run.folder.mkdir(parents=True)
    run.checkpoint.touch()
    run.results["data/ewok"].touch()
    result = {"settings": {"limit": 0}, "seeds": {"12": {"score": 60.0}}}
    run.glue.write_text(json.dumps({"step": 1, "tasks": {"rte": result}}))
    calls.clear()
    experiment.train_and_score(spec, run, None)
    run.results["data/blimp"].touch()
    assert calls[0] == "eval.py"
    assert experiment.is_finished(spec, run)

    # a quick look at GLUE does not count
    result["settings"]["limit"] = 8
    run.glue.write_text(json.dumps({"step": 1, "tasks": {"rte": result}}))
    assert not experiment.is_finished(spec, run)


def test_runs_come_seed_by_seed_and_share_it(small):
    spec, runs = small
    assert [(run.seed, run.arm) for run in runs] == [(1, "clm"), (1, "mlm"), (2, "clm"), (2, "mlm")]
    assert all(f"--seed={run.seed}" in run.args for run in runs)


def test_a_run_that_another_call_works_on_is_passed_over(small, monkeypatch, capsys):
    spec, runs = small
    calls = []
    monkeypatch.setattr(experiment, "train_and_score", lambda spec, run, log: calls.append(run))
    with experiment.open_log(runs[0].log):
        assert experiment.run_missing(spec, runs[:2]) == []
    assert calls == [runs[1]]
    assert "clm_1: another call is at work in it" in capsys.readouterr().out


def test_a_failed_run_is_named_and_the_others_go_on(corpus, tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    monkeypatch.setattr(experiment, "report", lambda spec, runs, failed: None)
    args = write_spec(
        tmp_path,
        SETTINGS,
        'arms = {"bad": dict(schedule="2_CLM", lr=1e30), "clm": dict(schedule="2_CLM")}',
        f"seeds = 1\ntasks = ()\ncorpus = {corpus!r}",
    )
    assert experiment.main(args) == 1
    shown = capsys.readouterr().out
    assert "bad_1: FAILED, exit code 1" in shown
    assert "train.py: the gradient is not finite" in shown
    assert (tmp_path / "out" / "clm_1" / "step_0000168.pt").exists()


def test_a_program_that_a_killed_call_left_behind_holds_the_log(tmp_path):
    log = experiment.open_log(tmp_path / "run.log")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=log)
    log.close()
    assert experiment.open_log(tmp_path / "run.log") is None
    process.communicate(b"\n")
    assert experiment.open_log(tmp_path / "run.log") is not None


def test_a_run_of_another_corpus_is_refused(small):
    spec, runs = small
    runs[0].folder.mkdir()
    (runs[0].folder / "settings.json").write_text("{}")
    (runs[0].folder / "tokenizer.json").write_text("{}")
    experiment.plan(spec, Corpus(spec.corpus))  # it has no checkpoint yet
    (runs[0].folder / "step_0000002.pt").touch()
    with pytest.raises(UserError, match="clm_1: was trained on another corpus"):
        experiment.plan(spec, Corpus(spec.corpus))


# ----------------------------------------------------------------------------------------- the text


def test_a_slice_of_the_text_becomes_the_corpus(tmp_path):
    text = tmp_path / "text"
    (text / "deep").mkdir(parents=True)
    lines = [f"line {i} of words\n" for i in range(450)]
    for name in ("a.train", "deep/a.train"):
        (text / name).write_text("".join(lines))
    (tmp_path / "b.dev").write_text("".join(lines[:50]))
    (tmp_path / "out" / "slice").mkdir(parents=True)
    (tmp_path / "out" / "slice" / "old.train").write_text("of a call that failed\n")
    spec = experiment.Spec(
        arms={"a": {}},
        slice=2,
        vocab_size=270,
        text=str(text),
        dev=str(tmp_path / "b.dev"),
        out=str(tmp_path / "out"),
        corpus=str(tmp_path / "corpus"),
    )
    experiment.make_corpus(spec)
    for name in ("a.train", "deep/a.train"):
        kept = (tmp_path / "out" / "slice" / name).read_text()
        assert kept == "".join(lines[:100] + lines[200:300] + lines[400:])
    meta = Corpus(spec.corpus).meta
    assert meta["train"]["words"] == 2 * 4 * 250
    assert meta["dev"]["words"] == 4 * 50

    spec.text = "nowhere"
    spec.slice = 1
    spec.corpus = str(tmp_path / "none")
    with pytest.raises(UserError, match="none: was missing, and the command above that makes it"):
        experiment.make_corpus(spec)


# ---------------------------------------------------------------------------------------- the table


def test_intervals_of_one_two_and_three_seeds():
    values = {1: 61.0, 2: 64.0, 3: 70.0}
    base = {1: 60.0, 2: 65.0, 3: 63.0}  # differences 1, -1 and 7
    assert experiment.difference({1: 61.0}, base) == {"difference": 1.0, "interval": None}

    two = experiment.difference({1: 61.0, 2: 64.0}, base)
    assert two["difference"] == 0
    assert two["interval"] == pytest.approx([-12.706, 12.706])

    three = experiment.difference(values, base)
    half = 4.303 * math.sqrt(52 / 3) / math.sqrt(3)
    assert three["interval"] == pytest.approx([7 / 3 - half, 7 / 3 + half])

    # a seed that the baseline lacks does not pair
    assert experiment.difference(values, {1: 60.0, 3: 63.0})["difference"] == pytest.approx(4)
    assert experiment.difference(values, {}) == {}


def test_quantiles_of_student_t():
    """The area under the density between -t and t is 0.95."""
    for degrees, t in enumerate(experiment.T_95, 1):
        x = np.linspace(-t, t, 20001)
        density = (1 + x * x / degrees) ** (-(degrees + 1) / 2) / math.sqrt(degrees * math.pi)
        density *= math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
        area = np.sum((density[1:] + density[:-1]) / 2 * np.diff(x))
        assert area == pytest.approx(0.95, abs=5e-5), degrees


def test_another_baseline_turns_the_difference_around():
    results = {"clm": {1: {"blimp": 60.0}}, "mlm": {1: {"blimp": 61.0}}}
    clm, mlm = experiment.compare(results, "clm")
    assert "difference" not in clm
    assert mlm["difference"] == 1
    clm, mlm = experiment.compare(results, "mlm")
    assert clm["difference"] == -1


def test_the_table_has_mean_error_difference_and_interval():
    results = {
        "clm": {1: {"blimp causal": 60.0, "dev loss CLM": 4.0}, 2: {"blimp causal": 64.0}},
        "mlm": {1: {"blimp causal": 61.0}, 2: {"blimp causal": 67.0}},
    }
    compared = experiment.compare(results, "clm")
    table = experiment.table(compared, "clm")
    cells = []
    for line in table.splitlines():
        cells.append([cell.strip() for cell in line.split("|")[1:-1]])
    assert ["blimp causal", "clm", "1 2", "62.00", "2.00", "", ""] in cells
    interval = "-10.71 to +14.71"
    assert ["blimp causal", "mlm", "1 2", "64.00", "3.00", "+2.00", interval] in cells
    assert ["dev loss CLM", "clm", "1", "4.000", "", "", ""] in cells
    assert len({len(line) for line in table.splitlines()}) == 1


# ----------------------------------------------------------------------------------------- the spec


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "experiments").glob("*.py")))
def test_the_specs_that_come_with_it_are_sound(path):
    spec = load([str(path)])
    assert len({spec.epochs(arm) for arm in spec.arms}) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "arms: name at least one"),
        ('arms = {"a": dict(schedule="1_CLM")}\nbaselin = "a"', "did you mean 'baseline'?"),
        ('arms = {"a": dict(schedule="1_CLM")}\nbaseline = "b"', "baseline must be an arm: a"),
        ('arms = {"a": dict(scheduel="1_CLM")}', "arms: a: .*'scheduel' is not a setting"),
        ('arms = {"a": dict(lr="high")}', "arms: a: --lr=high: .*of type float"),
        ('arms = {"a": dict(seed=3)}', "'seed' is the experiment's own"),
        ('arms = {"a": "24_CLM"}', "with a dict of settings of train.py"),
        ('arms = {"../a": {}}', "must be a name fit for a folder"),
        ('arms = {"a": dict(modes=("clm",))}', "must be some of causal, masked, mntp"),
        (
            'arms = {"a": dict(schedule="1_CLM"), "b": dict(schedule="2_CLM")}',
            "arms differ in epochs: {'a': 1, 'b': 2}",
        ),
        ('arms = {"a": {}}\nseeds = 0', "seeds must be at least 1"),
        ('arms = {"a": {}}\nglue = ("rtee",)', "glue: 'rtee' must be one of"),
        ('arms = {"a": {}}\nsettings = dict(n_head=3)', "arms: a: .*n_head"),
    ],
)
def test_bad_specs_end_in_one_line_before_anything_starts(tmp_path, text, message):
    args = write_spec(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        experiment.main(args)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_study_has_the_name_of_its_file(tmp_path, monkeypatch):
    """Of whatever ending, and not of a flag's value in front of it."""
    monkeypatch.chdir(tmp_path)
    spec = ROOT / "config/experiments/antlm_micro.py"
    (tmp_path / "study.spec").write_text(spec.read_text())
    with pytest.raises(UserError, match="^runs/experiments/study: does not exist"):
        experiment.main(["--limit", "2", "study.spec", "--table"])


def test_unequal_epochs_are_allowed_on_request(tmp_path):
    arms = 'arms = {"a": dict(schedule="1_CLM"), "b": dict(schedule="2_CLM")}'
    spec = load(write_spec(tmp_path, arms, "unequal_epochs = True"))
    assert [spec.epochs(arm) for arm in spec.arms] == [1, 2]


def test_what_would_fail_after_training_fails_before_it(corpus, tmp_path):
    args = write_spec(tmp_path, f'arms = {{"a": {{}}}}\ncorpus = {corpus!r}\ntasks = ()')
    with pytest.raises(UserError, match="no/such/folder: does not exist"):
        experiment.main([*args, "--tasks=no/such/folder"])
    with pytest.raises(UserError, match="nowhere: is not a folder"):
        experiment.main([*args, "--glue=rte", "--glue_data=nowhere"])
    with pytest.raises(UserError, match="nothing to show"):
        experiment.main([*args, "--table"])
    assert not (tmp_path / "out").exists()
