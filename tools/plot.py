"""Pictures of runs: losses and learning rate over the words seen, or scores by phenomenon. Needs matplotlib.

    python tools/plot.py runs/babyllama                             # writes runs/babyllama/training.png
    python tools/plot.py runs/babyllama runs/clm --out two.svg      # several runs: those of one schedule share a panel
    python tools/plot.py runs/babyllama runs/clm --scores           # percent correct: runs/babyllama/scores.png
    python tools/plot.py runs/clm/eval_blimp_filtered_11808.json --scores    # a result file of your choice
"""

import argparse
import json
import math
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import UserError
from data import OBJECTIVES
from schedule import parse

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"  # Okabe and Ito 2008
COLOUR_OF, MIXED = dict(zip(OBJECTIVES, COLOURS)), "#666666"
DASHES = "-", "--", ":", "-."  # so many runs of one schedule can be told apart in one panel
SUFFIXES = ".png", ".svg", ".pdf"
DAMAGE = ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError  # a damaged file's errors


def read_training(path: str) -> SimpleNamespace:
    """Series of a run folder, from its settings.json and metrics.jsonl; raises UserError, OSError.

    folder, schedule; phases: (objectives, words at start, words at end); lr: (words, learning rate); train and dev:
    for each objective (words, loss), NaN where it is not trained. Words in millions with repetition, losses in nats.
    """
    run, metrics = Path(path), Path(path, "metrics.jsonl")
    if not metrics.is_file():
        raise UserError(f"{run}: not a run folder, it holds no metrics.jsonl; name the out_dir of a run"
                        + ", or add --scores to draw a result of eval.py" * run.is_file())
    try:
        schedule = json.loads((run / "settings.json").read_bytes())["schedule"]
        phases = parse(schedule)
    except DAMAGE as e:
        raise UserError(f"{run / 'settings.json'}: not the settings of a run ({type(e).__name__}: {e})") from None
    lr, found, epoch = [], {"loss": [], "dev": []}, 0.0
    for number, line in enumerate(metrics.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):  # as train.py --resume does
            print(f"{metrics}:{number}: left out, it is being written or was cut off", file=sys.stderr)
            continue
        try:
            entry = json.loads(line)
            words, epoch = float(entry["words"]) / 1e6, float(entry["epoch"])
            for key in found.keys() & entry.keys():
                found[key].append((words, {name: float(loss) for name, loss in entry[key].items()}))
            if "loss" in entry:
                lr.append((words, float(entry["lr"])))
        except DAMAGE as e:
            raise UserError(f"{metrics}:{number}: not as train.py wrote it ({type(e).__name__}: {e}); "
                            "mend or remove this line") from None
    if not found["dev"] or not words * epoch:
        raise UserError(f"{metrics}: no dev losses yet; they come at the end of each epoch, or every eval_every steps")
    spans, end = [], 0.0
    for phase in phases:
        start, end = end, end + phase.epochs * words / epoch
        weighted = len({weight for _, weight in phase.mix}) > 1
        spans.append((":".join(f"{weight}{name}" if weighted else name for name, weight in phase.mix), start, end))
    train, dev = ({name: [(words, losses.get(name, math.nan)) for words, losses in series]
                   for name in dict.fromkeys(name for _, losses in series for name in losses)}
                  for series in found.values())
    return SimpleNamespace(folder=run, schedule=schedule, phases=spans, lr=lr, train=train, dev=dev)


def read_scores(path: str) -> SimpleNamespace:
    """Scores of a result file, or of the newest full one in a run folder; raises UserError, OSError.

    file; note: its step, and what is not as usual; percent[task, mode]: percent correct of each group, or subset where
    a task has no groups, and last of the task itself, ""; chance[task]: percent; items[task]: items of each subset.
    """
    run, files = Path(path), [Path(path)]
    if run.is_dir():
        files = sorted(run.glob("eval_*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files:
        try:
            whole = json.loads(file.read_bytes())
            note = f"step {whole['step']}" + f", protocol {whole['protocol']}" * (whole["protocol"] != "2025")
            note += f", first {whole['limit']} of each file" * whole["partial"]
            scores = SimpleNamespace(file=file, note=note, percent={}, chance={}, items={})
            for task, result in whole["tasks"].items():
                rows = (result["subsets"] if "" in result["groups"] else result["groups"]) | {"": result}
                for mode in result["accuracy"]:
                    scores.percent[task, mode] = {name: float(row["accuracy"][mode]) for name, row in rows.items()}
                options = [len(item) for subset in result["subsets"].values() for item in subset["scores"][mode]]
                scores.chance[task] = 100 * sum(1 / n for n in options) / len(options)
                scores.items[task] = {name: subset["items"] for name, subset in result["subsets"].items()}
            if not scores.percent:
                raise ValueError("no scores in it")
        except DAMAGE as e:
            raise UserError(f"{file}: not a result that eval.py wrote ({type(e).__name__}: {e})") from None
        if not run.is_dir():
            return scores
        if not whole["partial"]:
            print(f"{run}: scores from {file.name}")
            return scores
    raise UserError(f"{run}: only results of --limit in it; name the file, as {files[0]}, to draw one" if files else
                    f"{run}: holds no eval_*.json; python eval.py {run} --task PATH writes one")


# ------------------------------------------------------------------------------------------------------ drawing


def figure(width: float, height: float):
    """An empty figure, sizes in inches: 9 of them on a README's 900 pixels show 9 points as large as its text."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("draws with matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.rcParams.update({
        "font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left", "axes.spines.right": False,
        "axes.spines.top": False, "legend.frameon": False, "text.parse_math": False})
    return Figure(figsize=(width, height), layout="constrained")


def names(folders: list[Path]) -> list[str]:
    """What to call runs: the names of their folders, or the paths as given where two folders have one name."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(set(folders)) else [str(folder) for folder in folders]


def draw_phases(phases: list[tuple[str, float, float]], above, below, width: float) -> float:
    """Shade phases in two axes of that width, name them on top of the first -> height of the names; inches."""
    height = 0.2
    for name, start, end in phases:
        colour = COLOUR_OF.get(name, MIXED)
        for axes in above, below:
            axes.axvspan(start, end, color=colour, alpha=0.13, linewidth=0)
            axes.axvline(end, color="white", linewidth=1)
        room, length = (end - start) / phases[-1][2] * width, 0.075 * len(name)
        if room > 0.12:  # a phase too narrow for a line of text has its colour alone
            above.text((start + end) / 2, 1.01, name, color=colour, fontsize=8, ha="center", va="bottom",
                       rotation=90 * (length > room), transform=above.get_xaxis_transform())
            height = max(height, (length + 0.1) * (length > room))
    return height


def draw_training(runs: list[SimpleNamespace]):
    """Figure with a column for each schedule: losses above, learning rate below, phases shaded."""
    columns = []
    for run, name in zip(runs, names([run.folder for run in runs])):
        alike = [column for column in columns if column[0][0].schedule == run.schedule and len(column) < len(DASHES)
                 and math.isclose(column[0][0].phases[-1][2], run.phases[-1][2], rel_tol=0.01)]  # as long an epoch
        alike[0].append((run, name)) if alike else columns.append([(run, name)])
    fig = figure(max(9, 3 * len(columns)), 4.6 + 0.3 * max(map(len, columns)))
    from matplotlib.transforms import ScaledTranslation
    axes = fig.subplots(2, len(columns), sharex="col", squeeze=False, height_ratios=[4, 1])
    width, lines = (fig.get_figwidth() - 0.4) / len(columns) - 0.5, {}
    letters = int(width / 0.072)  # of 8 points
    for column, (above, below) in zip(columns, axes.T):
        (first, _), handles = column[0], []
        height = draw_phases(first.phases, above, below, width)
        for (run, name), dashes in zip(column, DASHES):
            for objective, series in run.train.items():
                above.plot(*zip(*series), dashes, color=COLOUR_OF.get(objective, MIXED), linewidth=0.8, alpha=0.45)
            for objective, series in run.dev.items():
                line, = above.plot(*zip(*series), dashes, color=COLOUR_OF.get(objective, MIXED), linewidth=1.6,
                                   clip_on=False, marker="o" if len(series) <= 40 else "", markersize=3)
                lines.setdefault(f"{objective} on dev text", line)
            last = ", ".join(f"{objective}\u00a0{series[-1][1]:.2f}" for objective, series in run.dev.items())
            handles += below.plot(*zip(*run.lr), dashes, color="black", linewidth=1.2,
                                  label=textwrap.fill(f"{name} (last on dev: {last})", letters - 5))
        title = textwrap.fill("schedule " + first.schedule.replace("+", "+ "), letters, max_lines=3, placeholder="…")
        above.legend(handles=handles, title=title.replace("+ ", "+"), fontsize=8, title_fontsize=8, alignment="left",
                     loc="lower left", borderpad=0, borderaxespad=0, bbox_to_anchor=(0, 1),
                     bbox_transform=above.transAxes + ScaledTranslation(0, height, fig.dpi_scale_trans))
        above.sharey(axes[0, 0])
        above.set(xlim=(0, first.phases[-1][2]))
        below.set(ylim=(0, None), xlabel="million words seen, with repetition")
        below.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("loss (nats per scored token)")
    axes[1, 0].set_ylabel("learning\nrate")
    lines["faint: on training text"], = below.plot([], [], color="black", linewidth=0.8, alpha=0.45)
    fig.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
    return fig


def draw_scores(results: list[SimpleNamespace]):
    """Figure with a panel for each task and mode, a row for each phenomenon, a bar for each run from chance on."""
    runs = []
    for new in results:
        if new.items != results[0].items:
            raise UserError(f"{new.file}: another test than {results[0].file} (tasks {', '.join(new.items)} and "
                            f"{', '.join(results[0].items)}, or other items); name eval_*.json files of one test")
        same = [run for run in runs if (run.file.parent, run.note) == (new.file.parent, new.note)
                and not run.percent.keys() & new.percent.keys()]  # other modes of the same checkpoint
        same[0].percent.update(new.percent) if same else runs.append(new)
    if len(runs) > len(COLOURS):
        raise UserError(f"{len(runs)} runs: more than {len(COLOURS)} cannot be told apart in one picture")
    modes = sorted({mode for run in runs for _, mode in run.percent})
    rows = {task: list(percent) for (task, _), percent in runs[0].percent.items()}
    heights = [(len(labels) + 1) * (0.1 + 0.14 * len(runs)) for labels in rows.values()]
    fig = figure(9, 0.5 + sum(heights) + 0.6 * len(rows))
    from matplotlib.patches import Patch
    axes = fig.subplots(len(rows), len(modes), squeeze=False, sharey="row", height_ratios=heights)
    lowest = min(min(percent.values()) for run in runs for percent in run.percent.values())
    for (task, labels), panels in zip(rows.items(), axes):
        chance, places = runs[0].chance[task], [*range(len(labels) - 1), len(labels) - 0.4]
        for mode, panel in zip(modes, panels):
            for i, (run, colour) in enumerate(zip(runs, COLOURS)):
                at = [place + 0.8 * ((i + 0.5) / len(runs) - 0.5) for place in places]
                if (task, mode) not in run.percent:
                    panel.text(chance, at[-1], " not scored", color=colour, fontsize=7, va="center")
                    continue
                values = run.percent[task, mode].values()
                bars = panel.barh(at, [value - chance for value in values], 0.8 / len(runs), left=chance, color=colour)
                panel.bar_label(bars, [f"{value:.1f}" for value in values], padding=2, fontsize=7)
            panel.axvline(chance, color="black", linewidth=1)
            panel.axhline(places[-1] - 0.7, color="black", linewidth=0.5)
            panel.grid(axis="x", alpha=0.3)
            room = 4 * len(modes)  # percent, for the numbers beside the bars
            panel.set(title=f"{task}, {mode}", xlabel=f"percent correct (line: chance, {chance:.0f})", axisbelow=True,
                      xticks=range(0, 101, 10 if len(modes) < 3 else 20), xlim=(min(lowest, chance) - room, 100 + room))
        labels = [label.replace("_", " ") for label in labels[:-1]] + [f"macro average of {len(runs[0].items[task])}"]
        panels[0].set_yticks(places, labels)
        panels[0].get_yticklabels()[-1].set_fontweight("bold")
        panels[0].set_ylim(places[-1] + 0.6, -0.6)
    fig.legend([Patch(color=colour) for _, colour in zip(runs, COLOURS)],
               [f"{name}, {run.note}" for run, name in zip(runs, names([run.file.parent for run in runs]))],
               loc="outside upper center", ncols=min(3, len(runs)))
    return fig


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"plot.py: {message}")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder; with --scores also a result file of eval.py")
    add("--scores", action="store_true", help="draw scores (of a folder, its newest full result), not the training")
    add("--out", help=f"file to write ({', '.join(SUFFIXES)}); default: training.png or scores.png with the first RUN")
    args = parser.parse_args(argv)
    try:
        draw, read = (draw_scores, read_scores) if args.scores else (draw_training, read_training)
        runs, first = [read(path) for path in args.runs], Path(args.runs[0])
        folder = first if first.is_dir() else first.parent
        out = Path(args.out or folder / ("scores.png" if args.scores else "training.png"))
        if out.suffix not in SUFFIXES or not out.parent.is_dir() or out.is_dir():
            raise UserError(f"{out}: cannot be written; --out is a {', '.join(SUFFIXES)} file in a folder that exists")
        draw(runs).savefig(out, dpi=200)
        print(f"wrote {out}")
    except (UserError, OSError) as e:
        sys.exit(f"plot.py: {e}")


if __name__ == "__main__":
    main()
