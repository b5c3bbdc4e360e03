"""Draw the losses and the learning rate of runs through their phases. Needs matplotlib.

python tools/plot.py runs/quickstart                       # writes runs/quickstart/training.png
python tools/plot.py runs/babyllama runs/clm --out two.svg # runs of one schedule share a panel
"""

import argparse
import itertools
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from antlm.files import write_whole
from antlm.program import clean_exit
from config import UserError
from data import OBJECTIVES
from schedule import parse

# colours that the colour-blind can tell apart (Okabe and Ito 2008)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MIXED = "#666666"  # of a phase with more than one objective
DASHES = ("-", "--", ":", "-.")  # of the runs in one panel
SUFFIXES = (".png", ".svg", ".pdf")
LETTER = 0.075  # inches that a letter of 8 points takes


@dataclass
class Training:
    """What a run folder says of its training. Losses are in nats per scored token."""

    folder: Path
    schedule: str
    lr: list[tuple[float, float]] = field(default_factory=list)  # epoch, learning rate
    train: list[tuple[float, dict]] = field(default_factory=list)  # epoch, {objective: loss}
    dev: list[tuple[float, dict]] = field(default_factory=list)  # epoch, {objective: loss}

    def objectives(self) -> list[str]:
        """Return the objectives that have a loss, in the order in which they come up."""
        names = {}
        for _, losses in self.train + self.dev:
            names |= dict.fromkeys(losses)
        return list(names)


def read_training(path: str) -> Training:
    """Read a run folder's settings.json and metrics.jsonl; raises UserError."""
    run = Path(path)
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(
            f"{run}: not a run folder, it holds no metrics.jsonl; name the out_dir of a run"
        )
    settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    training = Training(run, settings["schedule"])

    for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError:
            # a run that is at work may stand in the middle of its last line
            print(f"{metrics}:{number}: left out, it is not whole", file=sys.stderr)
            continue
        if "loss" in entry:
            training.train.append((entry["epoch"], entry["loss"]))
            training.lr.append((entry["epoch"], entry["lr"]))
        if "dev" in entry:
            training.dev.append((entry["epoch"], entry["dev"]))

    if not training.train:
        raise UserError(f"{metrics}: no losses yet; the first comes after log_every steps")
    return training


class Forgetting(NamedTuple):
    """What a phase did to an objective that it does not train: the dev loss before and after it."""

    phase: str
    end: int  # epoch
    objective: str
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before

    def __str__(self):
        return f"{self.objective} {self.before:.3f} to {self.after:.3f} ({self.change:+.3f})"


def find_forgetting(training: Training) -> list[Forgetting]:
    """Return what each phase but the first did to the objectives that it does not train.

    A phase without an evaluation at both of its ends is left out.
    """
    dev_at = dict(training.dev)
    results = []
    start = 0
    for phase in parse(training.schedule):
        end = start + phase.epochs
        before = dev_at.get(start, {})
        after = dev_at.get(end, {})
        for objective in before:
            if objective in after and objective not in phase.objectives:
                losses = (before[objective], after[objective])
                results.append(Forgetting(str(phase), end, objective, *losses))
        start = end
    return results


def series(entries: list[tuple[float, dict]], objective: str) -> tuple[list, list]:
    """Return epochs and losses of one objective; NaN, a gap in the line, where it has none."""
    epochs = [epoch for epoch, _ in entries]
    losses = [losses.get(objective, math.nan) for _, losses in entries]
    return epochs, losses


def colours_of(runs: list[Training]) -> dict[str, str]:
    """Give a colour to each objective: those of data.py first, then others that the runs have."""
    names = dict.fromkeys(OBJECTIVES)
    for run in runs:
        for phase in parse(run.schedule):
            names |= dict.fromkeys(name for name, _ in phase.mix)
        names |= dict.fromkeys(run.objectives())
    return dict(zip(names, itertools.cycle(COLOURS), strict=False))


def names_of(folders: list[Path]) -> list[str]:
    """Call runs by the names of their folders, or by their paths where two names are the same."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        return [str(folder) for folder in folders]
    return names


# ---------------------------------------------------------------------------------------- drawing


def figure(width: float, height: float):
    """Return an empty matplotlib figure of that size in inches; raises UserError."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "draws with matplotlib, which is not installed: pip install matplotlib"
        ) from None
    matplotlib.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.titlelocation": "left",
            "axes.spines.right": False,
            "axes.spines.top": False,
            "legend.frameon": False,
            "text.parse_math": False,  # so that names may hold a $
        }
    )
    return Figure(figsize=(width, height), layout="constrained")


def draw_phases(panels, schedule: str, colours: dict[str, str], width: float) -> float:
    """Shade the phases in all panels and name them on top of the first.

    width: of a panel, in inches
    Returns the height of the names in inches.
    """
    phases = parse(schedule)
    n_epochs = sum(phase.epochs for phase in phases)
    height = 0.2
    start = 0
    for text, phase in zip(schedule.split("+"), phases, strict=True):
        end = start + phase.epochs
        colour = MIXED
        if len(phase.mix) == 1:
            objective = phase.mix[0][0]
            colour = colours[objective]
        for panel in panels:
            panel.axvspan(start, end, color=colour, alpha=0.13, linewidth=0)
            panel.axvline(end, color="white", linewidth=1)

        # a narrow phase has its name upright, a very narrow one its colour alone
        name = text.partition("_")[2]
        room = phase.epochs / n_epochs * width
        length = LETTER * len(name)
        rotation = 0
        if length > room:
            rotation = 90
            height = max(height, length + 0.1)
        if room > 0.12:
            panels[0].text(
                (start + end) / 2,
                1.01,
                name,
                color=colour,
                fontsize=8,
                rotation=rotation,
                ha="center",
                va="bottom",
                transform=panels[0].get_xaxis_transform(),
            )
        start = end
    panels[0].set_xlim(0, n_epochs)
    return height


def draw_run(above, below, run: Training, name: str, dashes: str, colours: dict[str, str]):
    """Draw the losses of a run above, faint on the training text, and its learning rate below."""
    last = ""
    for objective in run.objectives():
        colour = colours[objective]
        above.plot(*series(run.train, objective), dashes, color=colour, linewidth=0.8, alpha=0.45)
        epochs, losses = series(run.dev, objective)
        marker = ""
        if len(epochs) <= 40:
            marker = "o"
        above.plot(epochs, losses, dashes, color=colour, linewidth=1.6, marker=marker, markersize=3)
        if losses:
            last += f"  {objective} {losses[-1]:.2f}"
    # by how much a phase raised the loss of what it does not train
    for forgetting in find_forgetting(run):
        above.annotate(
            f"{forgetting.change:+.2f}",
            (forgetting.end, forgetting.after),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=7,
            color=colours[forgetting.objective],
        )
    epochs, rates = zip(*run.lr, strict=True)
    below.plot(epochs, rates, dashes, color="black", linewidth=1.2, label=name + last)


def draw_training(runs: list[Training]):
    """Return a figure with a column for each schedule: losses above, learning rate below."""
    columns = {}
    names = names_of([run.folder for run in runs])
    for run, name in zip(runs, names, strict=True):
        columns.setdefault(run.schedule, []).append((run, name))
    colours = colours_of(runs)
    fig = figure(max(9, 4 * len(columns)), 5)
    panels = fig.subplots(
        2, len(columns), sharex="col", sharey="row", squeeze=False, height_ratios=[4, 1]
    )

    width = fig.get_figwidth() / len(columns) - 0.7
    for column, (schedule, members) in enumerate(columns.items()):
        above, below = panels[:, column]
        height = draw_phases([above, below], schedule, colours, width)
        title = f"schedule {schedule}"
        letters = int(width / LETTER)
        if len(title) > letters:
            title = title[: letters - 3] + "..."
        above.set_title(title, pad=72 * height)
        for (run, name), dashes in zip(members, itertools.cycle(DASHES), strict=False):
            draw_run(above, below, run, name, dashes, colours)
        # which line is which run, where falling losses leave room
        above.legend(handles=below.lines[-len(members) :], loc="upper right", fontsize=8)
        below.set_xlabel("epoch")
    panels[0, 0].set_ylabel("loss (nats per scored token)")
    panels[1, 0].set_ylabel("learning\nrate")
    panels[1, 0].set_ylim(0, None)

    # which colour is which objective
    from matplotlib.lines import Line2D

    shown = set()
    for run in runs:
        shown.update(run.objectives())
    lines = [Line2D([], [], color=colours[name], label=name) for name in colours if name in shown]
    lines.append(Line2D([], [], color="black", linewidth=1.6, label="on dev text"))
    lines.append(Line2D([], [], color="black", linewidth=0.8, alpha=0.45, label="on training text"))
    fig.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    return fig


def draw_scores(scores: dict[str, dict[str, tuple[float, float]]]):
    """Return a figure with a row for each measure and in it a dot for each arm of an experiment.

    scores: scores[arm][measure] is the mean and its standard error, both in percent
    """
    measures = {}
    for arm_scores in scores.values():
        measures |= dict.fromkeys(arm_scores)
    measures = list(measures)
    step = 0.8 / len(scores)  # between the dots of a row
    fig = figure(9, 1.2 + len(measures) * (0.2 + 0.16 * len(scores)))
    panel = fig.subplots()
    for i, (arm, colour) in enumerate(zip(scores, itertools.cycle(COLOURS), strict=False)):
        for measure, (mean, error) in scores[arm].items():
            row = measures.index(measure) - 0.4 + step * (i + 0.5)
            panel.errorbar(mean, row, xerr=error, fmt="o", color=colour, markersize=4, capsize=3)
            panel.text(mean + error, row, f"  {mean:.1f}", color=colour, fontsize=7, va="center")
        panel.plot([], [], "o", color=colour, markersize=4, label=arm)  # for the legend
    panel.set_yticks(range(len(measures)), measures)
    panel.set_ylim(len(measures) - 0.5, -0.5)
    panel.set_xlabel("percent: mean and its standard error over seeds")
    panel.grid(axis="x", alpha=0.3)
    fig.legend(loc="outside upper center", ncols=min(7, len(scores)))
    return fig


def save_figure(figure, path: Path, dpi: int):
    """Write a figure in the format of the file's suffix; raises OSError."""
    write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=dpi))


# ------------------------------------------------------------------------------------- the program


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, help="picture (default: training.png in the first RUN)")
    args = parser.parse_args(argv)
    runs = [read_training(path) for path in args.runs]
    out = args.out or Path(args.runs[0], "training.png")
    if out.suffix not in SUFFIXES:
        raise UserError(f"{out}: cannot be written; --out must end in {', '.join(SUFFIXES)}")
    save_figure(draw_training(runs), out, dpi=200)
    print(f"wrote {out}")
    for run in runs:
        for forgetting in find_forgetting(run):
            print(f"{run.folder}: over {forgetting.phase} the dev loss of {forgetting}")


if __name__ == "__main__":
    with clean_exit():
        main()
