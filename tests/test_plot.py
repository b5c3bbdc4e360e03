"""Tests of tools/plot.py. Alone: python -m pytest tests/test_plot.py"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="optional: pip install matplotlib")

import plot

from config import UserError
from data import OBJECTIVES

ROOT = Path(__file__).parent.parent
SCHEDULE = "1_CLM+2_MLM+1_1CLM:3MNTP"
METRICS = [
    {"epoch": 0.5, "loss": {"CLM": 9.0}, "lr": 0.01},
    {"epoch": 1.0, "loss": {"CLM": 7.0}, "lr": 0.008},
    {"epoch": 1.0, "dev": {"CLM": 6.5, "MLM": 8.5, "MNTP": 8.75}},
    {"epoch": 2.0, "loss": {"MLM": 6.0}, "lr": 0.006},
    {"epoch": 2.0, "dev": {"CLM": 7.5, "MLM": 5.5, "MNTP": 8.0}},
    {"epoch": 3.5, "loss": {"CLM": 5.0, "MNTP": 4.0}, "lr": 0.002},
]
DEV = {
    "CLM": ([1.0, 2.0], [6.5, 7.5]),
    "MLM": ([1.0, 2.0], [8.5, 5.5]),
    "MNTP": ([1.0, 2.0], [8.75, 8.0]),
}
TRAIN = {
    "CLM": [9.0, 7.0, None, 5.0],
    "MLM": [None, None, 6.0, None],
    "MNTP": [None, None, None, 4.0],
}
EPOCHS = [0.5, 1.0, 2.0, 3.5]


def make_run(folder: Path, metrics: list[dict] = METRICS, schedule: str = SCHEDULE) -> Path:
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"schedule": schedule}))
    lines = "".join(json.dumps(entry) + "\n" for entry in metrics)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def draw(*folders: Path):
    return plot.draw_training([plot.read_training(str(folder)) for folder in folders])


def points(line) -> tuple[list, list]:
    """Return the line's x and y, None where there is a gap."""
    y = [None if math.isnan(value) else float(value) for value in line.get_ydata()]
    return [float(x) for x in line.get_xdata()], y


def legend_of(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_run_is_drawn_as_its_metrics_say(tmp_path):
    run = make_run(tmp_path / "mine")
    figure = draw(run)
    above, below = figure.axes
    colours = plot.colours_of([plot.read_training(str(run))])
    objective_of = {colour: name for name, colour in colours.items()}

    # the lines of the curves; those of the phases are white
    train = {}
    dev = {}
    for line in above.lines:
        name = objective_of.get(line.get_color())
        if name and line.get_alpha():
            train[name] = points(line)
        elif name:
            dev[name] = points(line)
    assert dev == DEV
    assert train == {name: (EPOCHS, losses) for name, losses in TRAIN.items()}
    assert points(below.lines[-1]) == (EPOCHS, [0.01, 0.008, 0.006, 0.002])
    assert above.get_title(loc="left") == f"schedule {SCHEDULE}"
    assert legend_of(above) == ["mine  CLM 7.50  MLM 5.50  MNTP 8.00"]


def test_phases_are_shaded_and_named(tmp_path):
    figure = draw(make_run(tmp_path / "run"))
    for axes in figure.axes:
        shaded = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
        assert shaded == [(0, 1), (1, 3), (3, 4)]
        assert axes.get_xlim() == (0, 4)  # the whole schedule, though the run is not there yet
    names = {text.get_text(): text.get_position()[0] for text in figure.axes[0].texts}
    assert names == {"CLM": 0.5, "MLM": 2.0, "1CLM:3MNTP": 3.5}


def test_an_objective_of_a_fork_gets_the_next_colour(tmp_path):
    run = make_run(tmp_path / "run", [{"epoch": 1, "loss": {"PLM": 3.0}, "lr": 1}], "1_PLM")
    colours = plot.colours_of([plot.read_training(str(run))])
    assert list(colours) == [*OBJECTIVES, "PLM"]
    assert len(set(colours.values())) == len(colours)
    assert draw(run).axes[0].patches[0].get_facecolor() == pytest.approx(
        plot_colour(colours["PLM"], 0.13)
    )


def plot_colour(colour: str, alpha: float) -> tuple:
    from matplotlib.colors import to_rgba

    return to_rgba(colour, alpha)


def test_what_a_phase_does_to_an_objective_of_others_is_a_number(tmp_path, capsys):
    metrics = [*METRICS, {"epoch": 3.0, "dev": {"CLM": 7.25, "MLM": 5.0, "MNTP": 7.5}}]
    metrics += [{"epoch": 4.0, "dev": {"CLM": 5.0, "MLM": 6.5, "MNTP": 4.0}}]
    run = make_run(tmp_path / "run", metrics=metrics)
    plot.main([str(run)])
    # the first phase has nothing before it
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == [
        f"{run}: over 2_MLM the dev loss of CLM 6.500 to 7.250 (+0.750)",
        f"{run}: over 2_MLM the dev loss of MNTP 8.750 to 7.500 (-1.250)",
        f"{run}: over 1_1CLM:3MNTP the dev loss of MLM 5.000 to 6.500 (+1.500)",
    ]
    above, _ = plot.draw_training([plot.read_training(str(run))]).axes
    changes = [text.get_text() for text in above.texts if text.get_text()[0] in "+-"]
    assert changes == ["+0.75", "-1.25", "+1.50"]


def test_runs_of_one_schedule_share_a_column(tmp_path):
    figure = draw(
        make_run(tmp_path / "seed1"),
        make_run(tmp_path / "other", schedule="4_CLM"),
        make_run(tmp_path / "seed2"),
    )
    legends = [" ".join(legend_of(axes)) for axes in figure.axes[:2]]
    assert [[name in text for name in ("seed1", "seed2", "other")] for text in legends] == [
        [True, True, False],
        [False, False, True],
    ]
    rates = [line for line in figure.axes[2].lines if line.get_color() == "black"]
    assert len({line.get_linestyle() for line in rates}) == 2


def test_runs_of_equal_names_are_told_apart_by_their_paths():
    folders = [Path("a/run"), Path("b/run")]
    assert plot.names_of(folders) == ["a/run", "b/run"]
    assert plot.names_of([Path("a/run")]) == ["run"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule, n_names",
    [
        ("6_CLM+60_MLM+6_CLM", 3),
        ("+".join(["1_CLM+1_MLM"] * 40), 0),
        ("1_1CLM:15MNTP+71_CLM:MLM", 1),
    ],
)
def test_names_of_phases_never_overlap(tmp_path, schedule, n_names):
    """With three columns; a name that has no room is left out."""
    figure = draw(
        make_run(tmp_path / "0", schedule=schedule),
        make_run(tmp_path / "1", schedule="2_CLM"),
        make_run(tmp_path / "2", schedule="2_MLM"),
    )
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].texts if text.get_text()[0] not in "+-"]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == n_names
    assert all(left.x1 <= right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    title = figure.axes[0]._left_title.get_window_extent()
    assert all(box.y1 <= title.y0 for box in boxes)


def test_a_line_in_flight_is_left_out(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 8, "epo')
    assert plot.read_training(str(folder)).lr[-1] == (3.5, 0.002)
    assert "metrics.jsonl:7: left out" in capsys.readouterr().err


def test_scores_have_a_row_for_each_measure_and_a_dot_for_each_arm():
    scores = {
        "clm": {"blimp causal": (61.0, 0.5), "blimp masked": (52.0, 0.0)},
        "mlm": {"blimp masked": (58.0, 1.0)},
    }
    figure = plot.draw_scores(scores)
    panel = figure.axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "blimp causal",
        "blimp masked",
    ]
    dots = [container.lines[0].get_xydata()[0] for container in panel.containers]
    assert [float(x) for x, _ in dots] == [61, 52, 58]
    assert [round(float(y)) for _, y in dots] == [0, 1, 1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["clm", "mlm"]


@pytest.mark.parametrize("suffix, start", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_files_are_written_and_their_place_printed(tmp_path, capsys, suffix, start):
    run = make_run(tmp_path / "run")
    out = tmp_path / f"out{suffix}"
    out.write_text("an older picture")
    plot.main([str(run), "--out", str(out)])
    assert out.read_bytes().startswith(start)
    assert capsys.readouterr().out == f"wrote {out}\n"


@pytest.mark.slow
def test_from_the_command_line_into_the_first_run_folder(tmp_path):
    runs = [make_run(tmp_path / name) for name in "ab"]
    command = [sys.executable, "tools/plot.py", *runs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == f"wrote {runs[0] / 'training.png'}\n"
    assert (runs[0] / "training.png").exists()


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot.main([str(make_run(tmp_path / "run"))])


def test_what_cannot_be_drawn_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    young = make_run(tmp_path / "young", [])
    for args, message in [
        ([str(tmp_path / "typo")], "typo: not a run folder"),
        ([str(young)], "young/metrics.jsonl: no losses yet"),
        ([str(run), "--out", "picture"], "picture: cannot be written"),
    ]:
        with pytest.raises(UserError, match=message):
            plot.main(args)
    with pytest.raises(OSError, match="missing"):
        plot.main([str(run), "--out", str(tmp_path / "missing" / "x.png")])
