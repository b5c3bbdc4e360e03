"""tools/plot.py: what it draws and what it refuses. Alone: python -m pytest tests/test_plot.py"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="optional: pip install matplotlib")

import eval as evaluation
import model as models
from antlm.checkpoint import save_checkpoint
from antlm.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import plot  # noqa: E402

SCHEDULE = "1_CLM+2_MLM+1_1CLM:3MNTP"  # an epoch: 2 steps, 500,000 words
METRICS = """\
{"step": 1, "epoch": 0.5, "phase": "1_CLM", "words": 250000, "loss": {"CLM": 9.0}, "lr": 0.01, "tokens_per_s": 7}
{"step": 2, "epoch": 1.0, "phase": "1_CLM", "words": 500000, "loss": {"CLM": 7.0}, "lr": 0.008, "tokens_per_s": 7}
{"step": 2, "epoch": 1.0, "phase": "1_CLM", "words": 500000, "dev": {"CLM": 6.5, "MLM": 8.5, "MNTP": 8.75}}
{"step": 4, "epoch": 2.0, "phase": "2_MLM", "words": 1000000, "loss": {"MLM": 6.0}, "lr": 0.006, "tokens_per_s": 7}
{"step": 4, "epoch": 2.0, "phase": "2_MLM", "words": 1000000, "dev": {"CLM": 7.5, "MLM": 5.5, "MNTP": 8.0}}
{"step": 7, "epoch": 3.5, "phase": "1_1CLM:3MNTP", "words": 1750000, "loss": {"CLM": 5.0, "MNTP": 4.0}, "lr": 0.002}
"""
DEV = {"CLM": ([0.5, 1.0], [6.5, 7.5]), "MLM": ([0.5, 1.0], [8.5, 5.5]), "MNTP": ([0.5, 1.0], [8.75, 8.0])}
TRAIN = {"CLM": [9.0, 7.0, None, 5.0], "MLM": [None, None, 6.0, None], "MNTP": [None, None, None, 4.0]}
PHASES = [("CLM", 0.0, 0.5), ("MLM", 0.5, 1.5), ("1CLM:3MNTP", 1.5, 2.0)]


def make_run(folder: Path, metrics: str = METRICS, schedule: str = SCHEDULE) -> Path:
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"schedule": schedule, "lr": 0.01}))
    (folder / "metrics.jsonl").write_text(metrics)
    return folder


def entry(causal: float, masked: float, **more) -> dict:
    return {"items": 2, "accuracy": {"causal": causal, "masked": masked}, "ties": {"causal": 0, "masked": 0}} | more


def subset(causal: float, masked: float, group: str, options: int = 2) -> dict:
    return entry(causal, masked, group=group, scores={mode: 2 * [options * [-1.0]] for mode in ("causal", "masked")})


def make_result(file: Path, shift: float = 0.0, task="blimp", groups=True, options=2, **more) -> Path:
    """A result of three subsets; the first two belong to one group."""
    of = {"a_1": "agree", "a_2": "agree", "b": "bind_it"} if groups else dict.fromkeys(("a_1", "a_2", "b"), "")
    percent = {"a_1": (70 + shift, 40.0), "a_2": (80 + shift, 50.0), "b": (60 + shift, 51.0)}
    by_group = {"agree": entry(75 + shift, 45.0), "bind_it": entry(60 + shift, 51.0)}
    by_group = by_group if groups else {"": entry(70 + shift, 47.0)}
    result = entry(70 + shift, 47.0, groups=by_group, subsets={
        name: subset(*percent[name], of[name], options) for name in percent})
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = {"step": 9, "protocol": "2025", "limit": 0, "partial": False, "tasks": {task: result}} | more
    file.write_text(json.dumps(whole))
    return file


def error(capsys, *args) -> str:
    """The line with which the program ends."""
    with pytest.raises(SystemExit) as stopped:
        plot.main([*map(str, args)])
    line = stopped.value.code
    assert isinstance(line, str) and line.startswith("plot.py: ") and "\n" not in line
    assert "wrote" not in capsys.readouterr().out
    return line


def points(line) -> tuple[list, list]:
    return [float(x) for x in line.get_xdata()], [None if math.isnan(y) else float(y) for y in line.get_ydata()]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


# ----------------------------------------------------------------------------------------------------- training


def test_a_run_is_drawn_as_its_metrics_say(tmp_path):
    run = plot.read_training(str(make_run(tmp_path / "mine")))
    assert run.phases == PHASES
    figure = plot.draw_training([run])
    above, below = figure.axes
    of_colour = {plot.COLOUR_OF[name]: name for name in DEV}
    faint = {of_colour[line.get_color()]: points(line) for line in above.lines if line.get_alpha()}
    assert faint == {name: ([0.25, 0.5, 1.0, 1.75], series) for name, series in TRAIN.items()}
    strong = {of_colour[line.get_color()]: points(line) for line in above.lines if line.get_marker() == "o"}
    assert strong == DEV
    assert points(below.lines[-2]) == ([0.25, 0.5, 1.0, 1.75], [0.01, 0.008, 0.006, 0.002])
    for axes in above, below:
        shaded = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
        assert shaded == [(start, end) for _, start, end in PHASES]
        assert axes.get_xlim() == (0, 2.0)  # the whole schedule, though the run is not there yet
    names = {text.get_text(): text.get_position()[0] for text in above.texts}
    assert names == {"CLM": 0.25, "MLM": 1.0, "1CLM:3MNTP": 1.75}
    said = " ".join(texts(figure)).replace("\n", " ").replace("\u00a0", " ")
    assert f"schedule {SCHEDULE}" in said and "mine (last on dev: CLM 7.50, MLM 5.50, MNTP 8.00)" in said
    assert "nats per scored token" in said and "million words seen, with repetition" in said


def test_runs_of_one_schedule_share_a_column(tmp_path):
    folders = [make_run(tmp_path / "seed1"), make_run(tmp_path / "other", schedule="4_CLM"),
               make_run(tmp_path / "seed2"),
               make_run(tmp_path / "longer", METRICS.replace("0000,", "00000,").replace("9.0", "19.0"))]
    figure = plot.draw_training([plot.read_training(str(folder)) for folder in folders])
    above = figure.axes[:3]
    legends = [" ".join(text.get_text() for text in axes.get_legend().get_texts()) for axes in above]
    assert [[name in legend for name in ("seed1", "seed2", "other", "longer")] for legend in legends] == [
        [True, True, False, False], [False, False, True, False], [False, False, False, True]]
    assert len({axes.get_ylim() for axes in above}) == 1
    dashes = {line.get_linestyle() for line in above[0].lines if line.get_marker() == "o"}
    assert len(dashes) == 2


def test_runs_of_equal_names_are_told_apart_by_their_paths(tmp_path):
    folders = [make_run(tmp_path / name / "run") for name in "ab"]
    assert plot.names(folders) == [str(folder) for folder in folders]
    assert plot.names([folders[0], folders[0]]) == ["run", "run"]


@pytest.mark.parametrize("schedule, named", [
    ("6_CLM+60_MLM+6_CLM", 3), ("+".join(["1_CLM+1_MLM"] * 8), 16), ("+".join(["1_CLM+1_MLM"] * 40), 0),
    ("1_1CLM:15MNTP+71_CLM:MLM", 1)])
def test_names_of_phases_never_overlap(tmp_path, schedule, named):
    """At README width with three columns; a name with no room is left out."""
    folders = [make_run(tmp_path / str(i), schedule=s) for i, s in enumerate((schedule, "2_CLM", "2_MLM"))]
    figure = plot.draw_training([plot.read_training(str(folder)) for folder in folders])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == named and all(a.x1 <= b.x0 for a, b in zip(boxes, boxes[1:]))
    legend = figure.axes[0].get_legend().get_window_extent()
    assert all(box.y1 <= legend.y0 for box in boxes)
    assert legend.y1 <= figure.bbox.y1 and legend.x1 <= figure.axes[1].get_window_extent().x0
    assert figure.axes[0].get_position().height > 0.4


def test_a_line_in_flight_is_left_out(tmp_path, capsys):
    folder = make_run(tmp_path / "run", METRICS + '{"step": 8, "epo')
    assert plot.read_training(str(folder)).lr[-1] == (1.75, 0.002)
    assert "metrics.jsonl:7: left out" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- scores


def bars(axes) -> list[list[float]]:
    """Percent correct at each bar's end, by run, top to bottom."""
    return [[round(bar.get_x() + bar.get_width(), 6) for bar in run] for run in axes.containers]


def test_scores_are_drawn_as_the_results_say(tmp_path):
    files = [make_result(tmp_path / name / "eval_blimp_9.json", shift) for name, shift in (("one", 0), ("two", 5))]
    figure = plot.draw_scores([plot.read_scores(str(file)) for file in files])
    causal, masked = figure.axes
    assert causal.get_title(loc="left") == "blimp, causal" and masked.get_title(loc="left") == "blimp, masked"
    assert bars(causal) == [[75, 60, 70], [80, 65, 75]] and bars(masked) == [[45, 51, 47]] * 2
    assert [label.get_text() for label in causal.get_yticklabels()] == ["agree", "bind it", "macro average of 3"]
    assert [text.get_text() for text in causal.texts] == ["75.0", "60.0", "70.0", "80.0", "65.0", "75.0"]
    assert {bar.get_x() for run in causal.containers for bar in run} == {50} and "chance, 50" in causal.get_xlabel()
    top, middle, macro = (bar.get_y() for bar in causal.containers[0])
    assert macro - middle > middle - top > 0  # set apart, below the others
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one, step 9", "two, step 9"]


def test_without_groups_the_subsets_are_the_bars_and_chance_follows_the_options(tmp_path):
    file = make_result(tmp_path / "eval_x_9.json", groups=False, options=5)
    figure = plot.draw_scores([plot.read_scores(str(file))])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a 1", "a 2", "b", "macro average of 3"]
    assert bars(figure.axes[0]) == [[70, 80, 60, 70]] and "chance, 20" in figure.axes[0].get_xlabel()


def test_modes_of_one_checkpoint_in_two_files_are_one_run(tmp_path):
    files = []
    for mode in "causal", "masked":
        whole = json.loads(make_result(tmp_path / "run" / f"eval_blimp_9_{mode}.json").read_text())
        task = whole["tasks"]["blimp"]
        for part in (task, *task["groups"].values(), *task["subsets"].values()):
            for key in {"accuracy", "ties", "scores"} & part.keys():
                part[key] = {mode: part[key][mode]}
        files.append(tmp_path / "run" / f"eval_blimp_9_{mode}.json")
        files[-1].write_text(json.dumps(whole))
    both = make_result(tmp_path / "other" / "eval_blimp_9.json")
    figure = plot.draw_scores([plot.read_scores(str(file)) for file in (*files, both)])
    assert len(figure.legends[0].get_texts()) == 2
    assert [bars(axes) for axes in figure.axes] == [[[75, 60, 70]] * 2, [[45, 51, 47]] * 2]
    alone = plot.draw_scores([plot.read_scores(str(file)) for file in (files[0], both)])
    assert "not scored" in " ".join(texts(alone)) and bars(alone.axes[1]) == [[45, 51, 47]]


def test_a_folder_gives_its_newest_full_result(tmp_path, capsys):
    for age, (name, more) in enumerate([("limit9", dict(partial=True, limit=9)), ("new", {}), ("old", {})]):
        file = make_result(tmp_path / f"eval_blimp_{name}.json", age, **more)
        os.utime(file, (1e9 - age, 1e9 - age))
    make_result(tmp_path / "glue_9.json")
    assert plot.read_scores(str(tmp_path)).percent["blimp", "causal"][""] == 71
    assert "eval_blimp_new.json" in capsys.readouterr().out
    named = plot.read_scores(str(tmp_path / "eval_blimp_limit9.json"))
    assert named.percent["blimp", "causal"][""] == 70 and "first 9 of each file" in named.note


def test_a_result_of_eval_itself(tmp_path, corpus):
    """From a checkpoint to the picture, by both programs."""
    run, pairs = tmp_path / "run", tmp_path / "pairs"
    for folder in run, pairs:
        folder.mkdir()
    (run / "tokenizer.json").write_bytes(Path(corpus, "tokenizer.json").read_bytes())
    tokenizer = Tokenizer(run / "tokenizer.json")
    model = models.Transformer(models.ModelConfig("babyllama", 300, n_layer=1, n_head=2, n_embd=16, n_ff=16))
    save_checkpoint(run / "step_0000009.pt", model, step=9, settings=dict(schedule="1_CLM+1_MLM", block_size=16),
                           boundary="line", tokenizer_sha256=tokenizer.sha256)
    for uid, term in ("u1", "number"), ("u2", "number"), ("u3", "order"):
        lines = [{"sentence_good": f"The {noun} sees the dog.", "sentence_bad": f"The sees {noun} the dog.",
                  "linguistics_term": term} for noun in ("cat", "bird", "horse")]
        (pairs / f"{uid}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation.main([str(run), "--task", str(pairs), "--device", "cpu"])
    plot.main([str(run), "--scores"])
    assert (run / "scores.png").stat().st_size > 10000
    result = json.loads((run / "eval_pairs_9.json").read_text())["tasks"]["pairs"]
    assert plot.read_scores(str(run)).percent == {("pairs", mode): {
        "number": result["groups"]["number"]["accuracy"][mode], "order": result["groups"]["order"]["accuracy"][mode],
        "": result["accuracy"][mode]} for mode in ("causal", "masked")}


# -------------------------------------------------------------------------------------------------- the program


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_files_are_written_and_their_place_printed(tmp_path, capsys, suffix, magic):
    run, out = make_run(tmp_path / "run"), tmp_path / f"out{suffix}"
    out.write_text("an older picture")
    plot.main([str(run), "--out", str(out)])
    assert out.read_bytes().startswith(magic) and capsys.readouterr().out == f"wrote {out}\n"


def test_from_the_command_line_into_the_first_run_folder(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    for run in runs:
        make_result(run / "eval_blimp_9.json")
    for flags, name in ([], "training.png"), (["--scores"], "scores.png"):
        for first in (runs[0], runs[0] / "eval_blimp_9.json")[:1 + len(flags)]:
            (runs[0] / name).unlink(missing_ok=True)
            done = subprocess.run([sys.executable, "tools/plot.py", first, runs[1], *flags], cwd=ROOT,
                                  capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
            assert done.stdout.splitlines()[-1] == f"wrote {runs[0] / name}"
            assert (runs[0] / name).read_bytes().startswith(b"\x89PNG") and not (runs[1] / name).exists()


def test_without_matplotlib_one_line_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; sys.path.insert(0, 'tools'); import plot; plot.main()"
    done = subprocess.run([sys.executable, "-c", code, make_run(tmp_path / "run")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "pip install matplotlib" in done.stderr


@pytest.mark.parametrize("number, line", [
    (2, '{"step": 2, "epo'), (3, "[]"), (6, "\xff"), (4, ""), (3, '{"step": 2, "epoch": 1, "words": 3, "dev": 6}'),
    (1, '{"step": 1, "epoch": 0.5, "words": 9, "loss": {"CLM": 9.0}}'), (5, '{"words": 9, "dev": {"CLM": 9}}')])
def test_a_damaged_line_is_named(tmp_path, capsys, number, line):
    lines = METRICS.splitlines()
    lines[number - 1] = line
    run = make_run(tmp_path / "run", "\n".join(lines) + "\n")
    assert f"{run}/metrics.jsonl:{number}: not as train.py wrote it" in error(capsys, run)


def test_what_is_no_run_is_named(tmp_path, capsys):
    empty, result = tmp_path / "empty", make_result(tmp_path / "eval_blimp_9.json")
    empty.mkdir()
    assert f"{empty}: not a run folder" in error(capsys, empty)
    assert f"{tmp_path / 'typo'}: not a run folder" in error(capsys, tmp_path / "typo")
    assert "--scores" in error(capsys, result)
    young = make_run(tmp_path / "young", METRICS.splitlines()[0] + "\n")
    assert "no dev losses yet" in error(capsys, young)
    assert "no dev losses yet" in error(capsys, make_run(tmp_path / "unborn", ""))
    for name, text in ("other", '{"lr": 1}'), ("damaged", "{"), ("schedule", '{"schedule": "4_XLM"}'):
        run = make_run(tmp_path / name)
        (run / "settings.json").write_text(text)
        assert f"{run}/settings.json: " in error(capsys, run)


def test_what_is_no_result_is_named(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert "holds no eval_*.json" in error(capsys, run, "--scores")
    partial = make_result(run / "eval_blimp_9_limit2.json", partial=True, limit=2)
    assert str(partial) in error(capsys, run, "--scores")
    fine_tuning = '{"step": 9, "protocol": "2025", "partial": false, "tasks": {"boolq": {"accuracy": 60}}}'
    for content in '{"tasks": {}}', "{", "[]", fine_tuning, fine_tuning.replace('"boolq": {"accuracy": 60}', ""):
        (file := tmp_path / "x.json").write_text(content)
        assert f"{file}: not a result that eval.py wrote" in error(capsys, file, "--scores")
    assert str(tmp_path / "typo.json") in error(capsys, tmp_path / "typo.json", "--scores")


def test_different_tests_are_not_drawn_side_by_side(tmp_path, capsys):
    blimp = make_result(tmp_path / "a" / "eval_blimp_9.json")
    ewok = make_result(tmp_path / "b" / "eval_ewok_9.json", task="ewok")
    line = error(capsys, blimp, ewok, "--scores")
    assert str(blimp) in line and str(ewok) in line and "ewok" in line
    part = tmp_path / "c" / "eval_blimp_9_limit1.json"
    part.parent.mkdir()
    part.write_text(blimp.read_text().replace('"items": 2', '"items": 1'))
    assert "other items" in error(capsys, blimp, part, "--scores")
    many = [make_result(tmp_path / str(i) / "eval_blimp_9.json") for i in range(8)]
    assert "8 runs" in error(capsys, *many, "--scores")


def test_where_a_picture_cannot_go_is_named(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (tmp_path / "folder.png").mkdir()
    for out in "picture", "metrics.jsonl", "folder.png", "missing/x.png", "run/settings.json/x.png":
        assert f"{tmp_path / out}: cannot be written" in error(capsys, run, "--out", tmp_path / out)
    assert "--uot" in error(capsys, run, "--uot", "x.png")
    if Path("/dev/full").exists():
        (tmp_path / "full.png").symlink_to("/dev/full")
        assert "No space left" in error(capsys, run, "--out", tmp_path / "full.png")
