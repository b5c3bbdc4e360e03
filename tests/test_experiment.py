"""tools/experiment.py: real processes, kills, numbers anew. Alone: python -m pytest tests/test_experiment.py"""

import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import config  # noqa: E402
import eval as evaluation
import finetune
import train
from antlm.checkpoint import checkpoints, load_checkpoint
from babylm.results import write_result
from config import UserError
from data import Corpus

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import experiment  # noqa: E402

TINY = """
settings = dict(n_layer=2, n_head=2, n_embd=32, n_ff=48, block_size=16, batch_rows=4, lr=3e-3)
settings |= dict(log_every=1, eval_rows=16)
"""
BAD = '"bad": dict(schedule="2_CLM", lr=1e30), '  # its loss is not finite from the second step on
ARMS = 'arms = {"clm": dict(schedule="2_CLM"), BAD"antlm": dict(schedule="1_CLM+1_MLM", lr=2e-3)}\n'
STEPS = 2 * 84  # 334 rows an epoch in steps of 4


def write_spec(folder: Path, corpus: str, arms: str = ARMS.replace("BAD", ""), more: str = "") -> list[str]:
    """Write a spec and a task of two files of pairs -> arguments of the tool, which then works in folder/out."""
    rng = random.Random(2)
    nouns, verbs = "cat dog bird horse child teacher".split(), "sees likes finds follows hears".split()
    (folder / "pairs").mkdir(parents=True)
    for name, bad in (("order", "The {1} {0} the {2}."), ("noun", "The {2} {1} the {0}.")):
        n_pairs = 30 if name == "noun" else 20
        triples = [(rng.choice(nouns[:3]), rng.choice(verbs), rng.choice(nouns[3:])) for _ in range(n_pairs)]
        pairs = [dict(sentence_good="The {} {} the {}.".format(*x), sentence_bad=bad.format(*x)) for x in triples]
        (folder / "pairs" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "spec.py").write_text(TINY + arms + more + f"corpus = {corpus!r}\ntasks = ({str(folder / 'pairs')!r},)\n")
    return [str(folder / "spec.py"), f"--out={folder / 'out'}"]


def start(args: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "tools/experiment.py", *args], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen, code: int) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == code, said
    return said


def wait_for_steps(log: Path, n: int, skip: int = 0):
    """Wait until the log, from character `skip` on, reports n steps."""
    until = time.time() + 120
    while not log.exists() or log.read_text()[skip:].count("\nstep ") < n:
        assert time.time() < until, f"{log}: {n} steps never came"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def study(corpus, tmp_path_factory) -> Path:
    """Three arms, one of which fails, two seeds: stopped by Ctrl-C, killed, then run to the end -> its folder."""
    folder = tmp_path_factory.mktemp("study")
    args, log = write_spec(folder, corpus, ARMS.replace("BAD", BAD), "seeds = 2\n"), folder / "out" / "clm_1.log"
    first = start(args)
    wait_for_steps(log, 5)
    first.send_signal(signal.SIGINT)
    said = finish(first, 128 + signal.SIGINT)
    assert f"go on with the same command: python ./tools/experiment.py {args[0]} {args[1]}" in said
    stopped = int(checkpoints(folder / "out" / "clm_1")[0].stem[5:])
    assert 5 <= stopped < STEPS
    skip, second = len(log.read_text()), start(args)
    wait_for_steps(log, 1, skip)
    second.kill()
    second.communicate()
    assert f"\nstep {stopped + 1}/{STEPS} " in log.read_text()[skip:]
    (folder / "said.txt").write_text(finish(start([*args, "--workers=2"]), 1))
    return folder


def shares(folder: Path, run: str, mode: str) -> dict[str, list[float]]:
    """From the raw scores: 1 for a pair that is right, a half for a tie, by file."""
    path, = folder.glob(f"out/{run}/eval_pairs_*.json")
    subsets = json.loads(path.read_text())["tasks"]["pairs"]["subsets"]
    return {name: [1.0 if good > bad else 0.5 if good == bad else 0.0 for good, bad in subset["scores"][mode]]
            for name, subset in subsets.items()}


def macro(folder: Path, run: str, mode: str) -> float:
    return 100 * statistics.mean(statistics.mean(x) for x in shares(folder, run, mode).values())


def rows(folder: Path) -> dict[tuple[str, str, str], dict]:
    content = json.loads((folder / "out" / "results.json").read_text())
    return {(row["what"], row["how"], row["arm"]): row for row in content["rows"]}


def test_a_failing_arm_is_reported_and_the_others_go_on(study):
    said = (study / "said.txt").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.split("runs left")[-2].splitlines()]
    for seed in (1, 2):
        assert f"bad_{seed}: FAILED, exit code 1" in said and ["FAILED", "bad", str(seed), *5 * [""]] in table
        assert f"out/bad_{seed}: exit code 1: train.py: " in said and f"bad_{seed}: step 2: gradient norm nan is not finite" in said
    assert "2 of 6 runs left" in said
    assert {row[1] for row in table if row[:1] == ["pairs causal"]} == {"clm", "antlm"}


def test_a_killed_study_ends_with_every_run_whole(study):
    for arm in ("clm", "antlm"):
        for seed in (1, 2):
            folder = study / "out" / f"{arm}_{seed}"
            entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            steps = [entry["step"] for entry in entries if "loss" in entry]
            assert steps == [*range(1, STEPS + 1)] and int(checkpoints(folder)[0].stem[5:]) == STEPS
            assert json.loads((folder / "settings.json").read_text())["seed"] == seed
    states = [json.loads(line) for line in (study / "out" / "processes.jsonl").read_text().splitlines()]
    assert [x["run"] for x in states if x["state"] == "stopped"] == ["clm_1"]
    trained = [x["run"] for x in states if x["state"] == "done" and "train.py" in x["command"]]
    assert {"antlm_1", "clm_2", "antlm_2"} <= {*trained}  # that of clm_1 may have outlived the killed call


def test_numbers_are_those_of_the_result_files(study):
    found, some_spread = rows(study), False
    for mode in ("causal", "masked"):
        a, b = ([macro(study, f"{arm}_{seed}", mode) for seed in (1, 2)] for arm in ("antlm", "clm"))
        row = found["pairs", mode, "antlm"]
        assert row["values"] == pytest.approx(a) and row["mean"] == pytest.approx((a[0] + a[1]) / 2)
        assert row["se"] == pytest.approx(abs(a[0] - a[1]) / 2)  # of two values
        d = a[0] - b[0], a[1] - b[1]
        assert row["difference"] == pytest.approx((d[0] + d[1]) / 2)
        assert row["half"] == pytest.approx(12.706 * abs(d[0] - d[1]) / 2)
        variance = []
        for name in ("noun", "order"):
            runs = [shares(study, run, mode)[name] for run in ("antlm_1", "clm_1", "antlm_2", "clm_2")]
            items = [(p - q + r - s) / 2 for p, q, r, s in zip(*runs)]
            variance.append(statistics.variance(items) / len(items))
        assert row["item_se"] == pytest.approx(100 * math.sqrt(sum(variance)) / 2)
        some_spread |= row["half"] > 0 and row["item_se"] > 0 and row["se"] > 0
    assert some_spread  # or the comparisons above would say little
    for arm in ("clm", "antlm"):
        best = [max(macro(study, f"{arm}_{seed}", mode) for mode in ("causal", "masked")) for seed in (1, 2)]
        assert found["pairs", "best mode", arm]["values"] == pytest.approx(best)
        for objective in ("CLM", "MLM"):
            last = [json.loads((study / "out" / f"{arm}_{seed}" / "metrics.jsonl").read_text().splitlines()[-1])["dev"]
                    for seed in (1, 2)]
            assert found["dev loss", objective, arm]["values"] == [x[objective] for x in last]


def test_the_table_shows_them_and_another_call_runs_nothing(study, capsys):
    """Without the failing arm, which would be tried again."""
    (study / "two.py").write_text((study / "spec.py").read_text().replace(BAD, ""))
    args = [str(study / "two.py"), f"--out={study / 'out'}"]
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*")
              if path.is_file() and "results" not in path.name and path.suffix != ".png"}
    assert experiment.main(args) == 0
    said = capsys.readouterr().out
    assert "train.py" not in said and "eval.py" not in said and "0 of 4 runs left" in said
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert {path for path in study.rglob("*.pt")} <= before.keys()
    row = rows(study)["pairs", "masked", "antlm"]
    low, high = row["difference"] - row["half"], row["difference"] + row["half"]
    cells = ["pairs masked", "antlm", "1 2", f"{row['mean']:.2f}", f"{row['se']:.2f}", f"{row['difference']:+.2f}",
             f"{low:+.2f} to {high:+.2f}", f"{row['item_se']:.2f}"]
    for text in (said, (study / "out" / "results.md").read_text()):
        assert cells in [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    markdown = (study / "out" / "results.md").read_text()
    for expected in (torch.__version__, "seeds = 2", "train.py --n_layer=2", "eval.py", "minus clm"):
        assert expected in markdown


def test_another_baseline_turns_the_difference_around(study, capsys):
    assert experiment.main([str(study / "spec.py"), f"--out={study / 'out'}", "--table"]) == 0
    ours = rows(study)["pairs", "causal", "antlm"]["difference"]
    assert experiment.main([str(study / "spec.py"), f"--out={study / 'out'}", "--table", "--baseline=antlm"]) == 0
    assert rows(study)["pairs", "causal", "clm"]["difference"] == pytest.approx(-ours)
    assert "minus antlm" in capsys.readouterr().out


def test_pictures(study):
    pytest.importorskip("matplotlib", reason="optional: pip install matplotlib")
    for name in ("training.png", "scores.png"):
        assert (study / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("change, expected", [
    ("lr = 1", "'lr' is not a setting"),  # of the experiment
    ('arms["clm"]["lr"] = 1e-4', "clm_1: was trained with lr=0.003, not 0.0001"),
    ("slice = 3", "began with slice = 1, not 3"),
    ("settings |= dict(eval_rows=8)", "with eval_rows=16, not 8")])
def test_a_changed_spec_is_not_mixed_with_old_runs(study, tmp_path, change, expected):
    (tmp_path / "spec.py").write_text((study / "spec.py").read_text() + change + "\n")
    with pytest.raises(UserError) as error:
        experiment.main([str(tmp_path / "spec.py"), f"--out={study / 'out'}"])
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_mode_of_its_own_and_glue(study, tmp_path):
    """What the tool would run next: a score in the new mode, then fine-tuning, then nothing."""
    for split in ("train", "valid"):
        lines = (json.dumps(dict(sentence1="The cat sees.", sentence2="The dog hears.", label=i % 2)) for i in range(8))
        (tmp_path / f"rte.{split}.jsonl").write_text("\n".join(lines))
    text = (study / "spec.py").read_text() + 'arms["antlm"]["modes"] = ("mntp",)\nglue = ("rte --epochs=1",)\n'
    (tmp_path / "spec.py").write_text(text)
    args = [str(tmp_path / "spec.py"), f"--out={study / 'out'}", f"--glue_data={tmp_path}"]
    spec = config.load(experiment.Spec, args)
    run, = [run for run in experiment.plan(spec, Corpus(spec.corpus)) if (run.arm, run.seed) == ("antlm", 2)]
    for name, main in (("eval.py", evaluation.main), ("finetune.py", finetune.main)):
        command = experiment.next_command(spec, run)
        assert Path(command[0]).name == name
        main(command[1:])
    assert experiment.next_command(spec, run) is None
    found = experiment.measure(spec, run, {"items": {}})
    assert {how for what, how in found if what == "pairs"} == {"mntp", "best mode"}
    score = json.loads(run.glue.read_text())["tasks"]["rte"]["seeds"]["12"]["score"]
    assert found["GLUE", "rte"][0] == found["GLUE", "mean of 1"][0] == score


def test_scores_of_other_items_or_of_other_settings_do_not_count(study, tmp_path):
    """Results outlive what they were made from: changed pairs, a quick look at GLUE, weights that are gone."""
    def load(more: str) -> list:
        (tmp_path / "spec.py").write_text((study / "spec.py").read_text().replace(BAD, "") + more)
        return [str(tmp_path / "spec.py"), f"--out={study / 'out'}", "--table"]

    (tmp_path / "pairs").mkdir()
    for file in (study / "pairs").glob("*.jsonl"):
        (tmp_path / "pairs" / file.name).write_text(file.read_text().replace("cat", "cow"))
    with pytest.raises(experiment.UserError, match="clm_1/eval_pairs_.*json: scored on other items of pairs than there are now"):
        experiment.main(load(f"tasks = ({str(tmp_path / 'pairs')!r},)\n"))

    spec = config.load(experiment.Spec, load(f"glue = ('rte --epochs=2', 'wsc')\nglue_data = {str(tmp_path)!r}\n"))
    run = experiment.plan(spec, Corpus(spec.corpus))[1]
    run.glue = tmp_path / "glue.json"
    settings = vars(config.load(finetune.Settings, [f"--data={tmp_path}"])) | {"mask": "full", "pool": "start"}
    settings |= dict.fromkeys(("tasks", "seeds", "out", "device"))  # as finetune.py writes those of a model that learnt MLM
    seeds = {"12": {"score": 60.0}}
    whole = {"rte": dict(settings=settings | {"epochs": 2}, seeds=seeds), "wsc": dict(settings=settings, seeds=seeds)}
    for tasks, expected in ((whole, {"rte": 60.0, "wsc": 60.0}), (whole | {"wsc": dict(settings=settings, seeds={})}, {"rte": 60.0}),
                            (whole | {"rte": dict(settings=settings, seeds=seeds)}, {"wsc": 60.0}),
                            (whole | {"wsc": dict(settings=settings | {"limit": 4}, seeds=seeds)}, {"rte": 60.0})):
        write_result(run.glue, {"step": run.steps, "tasks": tasks})
        assert experiment.glue_scores(spec, run) == expected

    shutil.copytree(study / "out", tmp_path / "out")
    for file in tmp_path.glob("out/*/step_*.pt"):
        file.unlink()
    with pytest.raises(UserError, match="clm_1: was trained with lr=0.003, not 0.001"):
        experiment.main([*load("settings['lr'] = 1e-3\n"), f"--out={tmp_path / 'out'}"])


def test_hours_left_are_those_of_the_finished_runs(study, tmp_path, capsys):
    shutil.copytree(study / "out", tmp_path / "out")
    text = (study / "spec.py").read_text().replace(BAD, "").replace("seeds = 2", "seeds = 3")
    (tmp_path / "spec.py").write_text(text)
    record, kept, hours = tmp_path / "out" / "processes.jsonl", [], 0
    for line in map(json.loads, record.read_text().replace(str(study / "out"), str(tmp_path / "out")).splitlines()):
        if line["state"] == "done":  # an hour a training, half of one a score, and a day a score of another limit
            trained = "train.py" in line["command"]
            hours += 1 if trained else 0.5
            kept.append(line | {"seconds": 3600 if trained else 1800})
            if not trained:
                kept.append(line | {"seconds": 86400, "command": line["command"].replace("--limit 0", "--limit 9")})
    record.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert experiment.main([str(tmp_path / "spec.py"), f"--out={tmp_path / 'out'}", "--table"]) == 0
    hours *= 2 / 4  # four runs are finished, two are left
    assert f"2 of 6 runs left, about {hours:.1f} hours" in capsys.readouterr().out


@pytest.mark.parametrize("text, expected", [
    ("", "arms = {} must name at least one arm"),
    ('arms = {"a": dict(schedule="1_CLM")}\nbaselin = "a"', "did you mean 'baseline'?"),
    ('arms = {"a": dict(schedule="1_CLM")}\nbaseline = "b"', "must be an arm: a"),
    ('arms = {"a": dict(scheduel="1_CLM")}', "arms: a: --scheduel=1_CLM: 'scheduel' is not a setting; did you mean"),
    ('arms = {"a": dict(schedule="1_CLM", lr="high")}', "arms: a: --lr=high: 'high' is not of type float"),
    ('arms = {"a": dict(schedule="1_CML")}', "arms: a: --schedule: schedule '1_CML'"),
    ('arms = {"a": dict(seed=3)}', "'seed' is the experiment's own"),
    ('arms = {"a": "24_CLM"}', "with a dict of settings of train.py"),
    ('arms = {"../a": {}}', "must be a name fit for a folder"),
    ('arms = {"a": dict(modes=("clm",))}', "must be some of causal, masked, mntp"),
    ('arms = {"a": dict(schedule="1_CLM"), "b": dict(schedule="1_CLM+1_MLM")}', "arms differ in epochs: a 1, b 2"),
    ('arms = {"a": {}}\nseeds = 0', "seeds = 0 must be at least 1"),
    ('arms = {"a": {}}\nworkers = ("gpu",)', "workers = ('gpu',) must be"),
    ('arms = {"a": {}}\ntasks = ("x/pairs", "y/pairs")', "must differ in their last names"),
    ('arms = {"a": {}}\nsettings = dict(n_head=3)', "n_head must divide n_embd"),
    ("arms = [1]", "must be of type dict"),
    ("arms =", "not valid Python")])
def test_bad_specs_end_in_one_line_before_anything_starts(tmp_path, text, expected):
    (tmp_path / "spec.py").write_text(text)
    with pytest.raises(UserError) as error:
        experiment.main([str(tmp_path / "spec.py"), f"--out={tmp_path / 'out'}"])
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_would_fail_after_training_fails_before_it(corpus, tmp_path):
    args = write_spec(tmp_path, corpus)
    said = finish(start([*args, "--tasks=no/such/folder"]), 1)
    assert said.startswith("experiment.py: no/such/folder: does not exist") and said.count("\n") == 1
    with pytest.raises(experiment.UserError, match="is not a folder"):
        experiment.main([*args, "--glue=rte", "--glue_data=nowhere"])
    with pytest.raises(UserError, match="'rtee' is named twice or not one of"):
        experiment.main([*args, "--glue=rtee"])
    with pytest.raises(UserError, match="nothing to show"):
        experiment.main([args[0], f"--out={tmp_path / 'none'}", "--table"])
    with pytest.raises(UserError, match=r"--workers=cuda:99: torch sees \d+ GPU"):
        experiment.main([*args, "--workers=cuda:99"])


def test_unequal_epochs_are_allowed_on_request_and_said(corpus, tmp_path, capsys):
    args = write_spec(tmp_path, corpus, 'arms = {"a": dict(schedule="1_CLM"), "b": dict(schedule="1_CLM+1_MLM")}\n',
                      "unequal_epochs = True\n")
    (tmp_path / "out").mkdir()
    assert experiment.main([*args, "--table"]) == 0
    assert "NOT AT EQUAL EPOCHS: a 1, b 2" in capsys.readouterr().out


def test_arms_of_one_seed_share_weights_and_data(corpus, tmp_path):
    """A step of 1e-30 leaves every weight as it was: the last checkpoint holds the first weights."""
    arms = 'arms = {"clm": dict(schedule="2_CLM"), "antlm": dict(schedule="1_CLM+1_MLM")}\n'
    args = write_spec(tmp_path, corpus, arms, "seeds = 2\n")
    spec = config.load(experiment.Spec, args)
    runs = experiment.plan(spec, Corpus(corpus))
    assert [(run.seed, run.arm) for run in runs] == [(1, "clm"), (1, "antlm"), (2, "clm"), (2, "antlm")]
    weights, losses = [], []
    for run in runs[:3]:
        train.train(config.load(train.Settings, [*run.args, "--lr=1e-30"]))
        weights.append(load_checkpoint(run.last)["model"])
        entries = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([entry["loss"]["CLM"] for entry in entries if "loss" in entry and entry["epoch"] <= 1])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert len(losses[0]) == 84 and losses[0] == losses[1] != losses[2]


def test_intervals_of_one_two_and_three_seeds(corpus, tmp_path):
    spec = experiment.Spec(arms={"a": {}, "b": {}}, baseline="b")
    a, b = [61.0, 64.0, 70.0], [60.0, 65.0, 63.0]  # differences 1, -1, 7: mean 7/3, deviation sqrt(52/3)
    for n, difference, half in ((1, 1.0, None), (2, 0.0, 12.706 * math.sqrt(2) / math.sqrt(2)),
                                (3, 7 / 3, 4.303 * math.sqrt(52 / 3) / math.sqrt(3))):
        found = {arm: {seed: {("t", "causal"): (x, None)} for seed, x in enumerate(values[:n], 1)}
                 for arm, values in (("a", a), ("b", b))}
        row = experiment.compare(spec, found)[0]
        assert row["difference"] == pytest.approx(difference) and row["pairs"] == n
        assert row["half"] == (None if half is None else pytest.approx(half))
    found["b"].pop(2)  # a seed that the baseline lacks does not pair
    assert experiment.compare(spec, found)[0]["difference"] == pytest.approx(4)


def test_quantiles_of_student_t():
    """The area under the density between -t and t is 0.95."""
    for df, t in enumerate(experiment.T_95, 1):
        x = np.linspace(-t, t, 20001)
        density = (1 + x * x / df) ** (-(df + 1) / 2) / math.sqrt(df * math.pi)
        density *= math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2))
        area = ((density[1:] + density[:-1]) / 2 * np.diff(x)).sum()
        assert area == pytest.approx(0.95, abs=5e-5), df


def test_a_slice_of_the_text_becomes_the_corpus(tmp_path):
    text = tmp_path / "text"
    (text / "deep").mkdir(parents=True)
    lines = [f"line {i} of words\n" for i in range(450)]
    for name in ("a.train", "deep/a.train"):
        (text / name).write_text("".join(lines))
    (text / "a.dev").write_text("".join(lines[:50]))
    (tmp_path / "spec.py").write_text('arms = {"a": {}}\nslice = 2\nvocab_size = 270\ntasks = ()\n')
    spec = config.load(experiment.Spec, [str(tmp_path / "spec.py"), f"--out={tmp_path / 'out'}", f"--text={text}",
                                         f"--corpus={tmp_path / 'corpus'}", f"--dev={text / 'a.dev'}"])
    (tmp_path / "out" / "slice").mkdir(parents=True)
    (tmp_path / "out" / "slice" / "old.train").write_text("of another text, by a call that failed\n")
    corpus, what = experiment.open_corpus(spec)
    for name in ("a.train", "deep/a.train"):
        assert (tmp_path / "out" / "slice" / name).read_text() == "".join(lines[:100] + lines[200:300] + lines[400:])
    assert what["words"] == 4 * (250 + 250 + 50) and corpus.vocab_size == 270  # a.dev lies in the folder, too
    spec.corpus, spec.prepare = f"{tmp_path}/mine", (f"prepare.py {text}/deep --dev {text}/a.dev --out {tmp_path}/mine",)
    assert experiment.open_corpus(spec)[1]["words"] == 4 * 450
    spec.corpus, spec.prepare = f"{tmp_path}/none", ("prepare.py nowhere --dev nowhere --out nowhere",)
    with pytest.raises(experiment.UserError, match="none: was missing, and the command that makes it failed: python d"):
        experiment.open_corpus(spec)


def test_a_log_has_one_process_at_a_time(tmp_path):
    """What a killed call leaves behind is waited for, even if nothing but the log knows of it."""
    log = tmp_path / "run.log"
    first = experiment.launch(["-c", "import time; print('one', flush=True); time.sleep(20)"], log, {})
    assert experiment.launch(["-c", "print('two')"], log, {}) is None
    first.terminate()
    first.wait()
    experiment.launch(["-c", "print('two')"], log, {}).wait()
    assert log.read_text().split()[-1] == "two"


def test_the_specs_that_come_with_it_are_sound():
    for path in sorted((ROOT / "config" / "experiments").glob("*.py")):
        spec = config.load(experiment.Spec, [str(path)])
        assert len({spec.epochs(arm) for arm in spec.arms}) == 1 and len(path.read_text().splitlines()) <= 40


def test_a_worker_sees_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    found = experiment.find_workers(experiment.Spec(arms={"a": {}}, workers=("cuda:1", "cuda:3")))
    assert found == [("cuda", {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": gpu}) for gpu in "57"]
