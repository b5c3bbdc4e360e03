"""Compare training recipes over seeds: train and score each arm of an experiment, make one table.

    python tools/experiment.py config/experiments/antlm_micro.py    # run it, or go on with it
    python tools/experiment.py config/experiments/antlm_micro.py --table --baseline=mlm

A spec is a Python file with settings of Spec below; each can be a flag, too, as in train.py. The
arms share text, tokenizer and, seed by seed, the first weights (where sizes agree) and the order of
the data. One run follows the other; what is finished is skipped, what was cut off goes on. Calls
that are started side by side share the runs, for example on two GPUs:

    CUDA_VISIBLE_DEVICES=0 python tools/experiment.py config/experiments/antlm_full.py &
    CUDA_VISIBLE_DEVICES=1 python tools/experiment.py config/experiments/antlm_full.py

OUT then holds results.md, results.json, scores.png and, for each run, a folder and a log. The exit
code is 0, 1 when a run failed, 128 + signal when stopped.
"""

import fcntl
import io
import itertools
import json
import math
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import plot

import config
from antlm.files import write_whole
from antlm.program import clean_exit
from babylm.glue import TASKS
from babylm.protocols import DEFAULT_PROTOCOL, PROTOCOLS
from babylm.results import read_result, write_result
from babylm.tasks import read_tasks
from config import UserError, require
from data import Batches, Corpus
from prepare import TEXT_SUFFIXES, check_texts, read_blocks, text_files
from schedule import parse
from train import FREE, Settings

ROOT = Path(__file__).parent.parent
# settings of train.py that are the same for all arms, or the experiment's own
RESERVED = {"corpus", "out_dir", "resume", "seed", "device"}
# settings that a run may change when it goes on, but not runs that are compared
COMPARED = {"eval_rows", "eval_mask_rate", "precision"}
SLICE_LINES = 100  # lines that a slice of the text keeps together
# two-sided 95% quantiles of Student's t for 1 to 10 degrees of freedom
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NOTES = """\
se: standard error of the mean over seeds. 95% interval: of the difference, paired by seed (Student
t). Scores are in percent, dev losses in nats per token."""


@dataclass
class Spec:
    # what is compared
    arms: dict = field(default_factory=dict)  # name: settings of train.py; may hold its own `modes`
    baseline: str = ""  # the arm that all others are compared with; default: the first
    seeds: int = 3  # runs of each arm
    first_seed: int = 1  # their seeds are this one and those after it; tune on others
    config: str = ""  # override file of train.py that all arms start from
    settings: dict = field(default_factory=dict)  # of train.py for all arms, over those of the file
    unequal_epochs: bool = False  # may arms differ in epochs?
    # the text
    corpus: str = ""  # folder made by prepare.py; default: in OUT. If it is missing, it is made
    text: str = "babylm_10M"  # from this training text, a file or folder
    dev: str = "babylm_dev"  # and this development text
    slice: int = 1  # of every so many blocks of 100 lines of each training file the first; 1: all
    vocab_size: int = 16384  # tokens
    # how it is scored
    tasks: tuple = ("evaluation_data/blimp_filtered",)  # for eval.py --task
    limit: int = 0  # only so many items of each file, from its start; 0: all
    modes: tuple = ("causal", "masked")  # or mntp
    glue: tuple = ()  # tasks of finetune.py, such as rte
    glue_data: str = "evaluation_data/glue_filtered"
    # how it is run
    out: str = ""  # folder of runs and results; default: runs/experiments/NAME
    device: str = "auto"  # auto | cpu | cuda | mps
    table: bool = False  # only show what is there

    def check(self):
        """Raise UserError, which names the setting, for a value or combination that cannot be."""
        require(
            len(self.arms) > 0, "arms: name at least one; experiment.py SPEC.py [--SETTING=...]"
        )
        arms = ", ".join(map(str, self.arms))
        require(self.baseline in ("", *self.arms), f"baseline must be an arm: {arms}")
        for name in ("seeds", "first_seed", "slice"):
            require(getattr(self, name) > 0, f"{name} must be at least 1")
        require(self.limit >= 0, "limit must not be negative")
        names = [Path(task).resolve().stem for task in self.tasks]
        require(len(names) == len(set(names)), "tasks must differ in name, which names the results")
        for task in self.glue:
            require(task in TASKS, f"glue: {task!r} must be one of {', '.join(TASKS)}")

        # recipes are compared at equal cost, unless one says that they need not be
        for arm in self.arms:
            self.check_arm(arm)
        epochs = {arm: self.epochs(arm) for arm in self.arms}
        require(
            self.unequal_epochs or len(set(epochs.values())) == 1,
            f"arms differ in epochs: {epochs}; make them equal, or set unequal_epochs = True",
        )

    def check_arm(self, arm: str):
        require(
            re.fullmatch(r"\w[\w.-]*", str(arm)) and isinstance(self.arms[arm], dict),
            f"arms: {arm!r} must be a name fit for a folder, with a dict of settings of train.py",
        )
        for name in RESERVED & {*self.arms[arm], *self.settings}:
            raise UserError(f"arms: {arm}: {name!r} is the experiment's own, the same for all arms")

        # what eval.py and train.py would refuse, before hours of training
        modes = self.modes_of(arm)
        require(
            modes and set(modes) <= {"causal", "masked", "mntp"},
            f"arms: {arm}: modes {modes} must be some of causal, masked, mntp",
        )
        try:
            config.load(Settings, self.train_args(arm))
        except UserError as e:
            raise UserError(f"arms: {arm}: {e}") from None

    def modes_of(self, arm: str) -> list[str]:
        """Return the modes in which eval.py scores an arm."""
        return list(self.arms[arm].get("modes", self.modes))

    def train_args(self, arm: str) -> list[str]:
        """Return the arguments of train.py that make an arm."""
        args = []
        if self.config:
            args.append(self.config)
        for name, value in (self.settings | self.arms[arm]).items():
            if isinstance(value, bool):
                value = str(value).lower()
            if name != "modes":
                args.append(f"--{name}={value}")
        return args

    def epochs(self, arm: str) -> int:
        settings = config.load(Settings, self.train_args(arm))
        return sum(phase.epochs for phase in parse(settings.schedule))


@dataclass
class Run:
    """An arm with a seed."""

    arm: str
    seed: int
    folder: Path
    args: list[str]  # of train.py
    checkpoint: Path  # after the last step
    results: dict[str, Path]  # of eval.py, for each of Spec.tasks
    glue: Path  # result of finetune.py
    log: Path  # what all three say


# ----------------------------------------------------------------------------------- text and runs


def slice_text(text: str, files: list[Path], out: Path, every: int):
    """Write the first of every so many blocks of lines of each file of a text into a folder."""
    shutil.rmtree(out, ignore_errors=True)
    for file in files:
        part = out / file.name
        if Path(text).is_dir():
            part = out / file.relative_to(text)
        if part.suffix not in TEXT_SUFFIXES:
            part = part.with_name(f"{part.name}.txt")  # of a .gz, what it holds
        part.parent.mkdir(parents=True, exist_ok=True)
        # blocks, so that neighbouring lines stay together; spread out, so that all sources are in
        lines = itertools.chain.from_iterable(map(io.StringIO, read_blocks(file)))
        with open(part, "w", encoding="utf-8", newline="\n") as kept:
            for number, line in enumerate(lines):
                if number // SLICE_LINES % every == 0:
                    kept.write(line)


def make_corpus(spec: Spec):
    """Make the corpus by prepare.py, of a slice of the text if the spec asks for one."""
    text = spec.text
    if spec.slice > 1:
        text = f"{spec.out}/slice"
        # prepare.py, which sees the slice alone, could not tell that the dev text is in it
        files = text_files([spec.text])
        check_texts([*files, *text_files([spec.dev])])
        slice_text(spec.text, files, Path(text), spec.slice)
    command = [str(ROOT / "prepare.py"), text, "--dev", spec.dev, "--out", spec.corpus]
    command += ["--vocab_size", str(spec.vocab_size)]
    print(f"python {shlex.join(command)}", flush=True)
    code = run_until_stopped([sys.executable, *command])
    require(code == 0, f"{spec.corpus}: was missing, and the command above that makes it failed")


def plan(spec: Spec, corpus: Corpus) -> list[Run]:
    """Return all runs, those of the first seed first; raises UserError as check_folder does."""
    runs = []
    for seed in range(spec.first_seed, spec.first_seed + spec.seeds):
        for arm in spec.arms:
            folder = Path(spec.out, f"{arm}_{seed}")
            args = spec.train_args(arm)
            args += [f"--corpus={spec.corpus}", f"--out_dir={folder}", f"--seed={seed}"]
            settings = config.load(Settings, args)
            check_folder(folder, settings, corpus)

            # the last step is in the names of the files
            batches = Batches(
                corpus.train, corpus.vocab_size, settings.block_size, settings.batch_rows, seed
            )
            steps = spec.epochs(arm) * batches.steps_per_epoch
            results = {}
            for task in spec.tasks:
                name = f"{Path(task).resolve().stem}_{steps}_{'_'.join(spec.modes_of(arm))}"
                if spec.limit:
                    name += f"_limit{spec.limit}"
                results[task] = folder / f"eval_{name}.json"
            checkpoint = folder / f"step_{steps:07}.pt"
            glue = folder / f"glue_{steps}.json"
            log = Path(spec.out, f"{arm}_{seed}.log")
            runs.append(Run(arm, seed, folder, args, checkpoint, results, glue, log))
    return runs


def check_folder(folder: Path, settings: Settings, corpus: Corpus):
    """Raise UserError if a folder holds a run of other settings or with another tokenizer."""
    # a run that failed before its first checkpoint may be mended
    if not any(re.match("(step|eval|glue)_", file.name) for file in folder.glob("*")):
        return
    old_settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    for name, value in asdict(settings).items():
        is_free = name in FREE - COMPARED
        require(
            is_free or old_settings.get(name, value) == value,
            f"{folder}: was trained with {name}={old_settings.get(name)!r}, not {value!r}; "
            "remove it, or choose another --out",
        )
    tokenizer = (corpus.folder / "tokenizer.json").read_bytes()
    require(
        (folder / "tokenizer.json").read_bytes() == tokenizer,
        f"{folder}: was trained on another corpus than {corpus.folder}; "
        "remove it, or choose another --out",
    )


# ----------------------------------------------------------------------------------------- running


def open_log(path: Path):
    """Open a run's log and lock it; returns None if another call is at work on the run.

    Programs that write to the log hold the lock, too: one that a killed call has left behind is not
    disturbed.
    """
    log = open(path, "a", encoding="utf-8", errors="backslashreplace")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        return None
    return log


def stop(number, frame):
    """Handle SIGINT and SIGTERM; a second one ends this process at once, its child still saves."""
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)


def run_until_stopped(command: list[str], log=None) -> int:
    """Run a command and return its exit code; a signal to this process ends that one first."""
    # in a session of its own: Ctrl-C reaches this process alone, which then sends one SIGTERM
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return process.wait()
    except SystemExit:
        process.terminate()  # train.py then saves
        process.wait()
        raise


def call(program: str, args: list[str], log):
    """Run a program of this project that writes to the log; raises CalledProcessError."""
    command = [sys.executable, str(ROOT / program), *args]
    print(f"python {shlex.join(command[1:])} >> {log.name}", flush=True)
    print(f"$ {shlex.join(command)}", file=log, flush=True)
    try:
        code = run_until_stopped(command, log)
    except SystemExit:
        print("stopped, what was trained is saved; the same command goes on", flush=True)
        raise
    if code:
        raise subprocess.CalledProcessError(code, command)


def glue_scores(run: Run) -> dict[str, float]:
    """Return each fine-tuned GLUE task's score, the mean over finetune.py's seeds."""
    scores = {}
    if run.glue.exists():
        for task, result in read_result(run.glue)["tasks"].items():
            seeds = result["seeds"].values()
            if seeds and not result["settings"]["limit"]:  # a quick look does not count
                scores[task] = statistics.mean(seed["score"] for seed in seeds)
    return scores


def is_finished(spec: Spec, run: Run) -> bool:
    is_scored = all(file.exists() for file in run.results.values())
    is_tuned = set(spec.glue) <= set(glue_scores(run))
    return run.checkpoint.exists() and is_scored and is_tuned


def train_and_score(spec: Spec, run: Run, log):
    """Do what a run lacks; raises CalledProcessError when a program fails."""
    device = f"--device={spec.device}"
    if not run.checkpoint.exists():
        call("train.py", [*run.args, "--resume", device], log)
    for task, out in run.results.items():
        if not out.exists():
            args = [str(run.checkpoint), "--task", task, "--mode", *spec.modes_of(run.arm)]
            args += ["--limit", str(spec.limit), "--out", str(out), device]
            call("eval.py", args, log)
    if not is_finished(spec, run):
        tasks = ",".join(spec.glue)
        args = [str(run.checkpoint), f"--data={spec.glue_data}", f"--tasks={tasks}", device]
        call("finetune.py", args, log)


def run_missing(spec: Spec, runs: list[Run]) -> list[Run]:
    """Do what is missing, one run after the other; returns the runs that failed."""
    failed = []
    for run in runs:
        if is_finished(spec, run):
            continue
        # calls that are started side by side meet here
        log = open_log(run.log)
        if log is None:
            print(f"{run.folder}: another call is at work in it", flush=True)
            continue
        with log:
            try:
                train_and_score(spec, run, log)
            except subprocess.CalledProcessError as e:
                failed.append(run)
                print(f"{run.folder}: FAILED, exit code {e.returncode}; the end of {run.log}:")
                lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
                print(*lines[-12:], sep="\n    ", flush=True)
    return failed


# ------------------------------------------------------------------------------------- the results


def measure(spec: Spec, run: Run, items: dict[str, str]) -> dict[str, float]:
    """Return the numbers of a finished run by name.

    items: {task: fingerprint of the items that other runs were scored on}, which is filled
    Raises UserError if this run was scored on others.
    """
    numbers = {}
    training = plot.read_training(run.folder)
    for objective, loss in training.dev[-1][1].items():
        numbers[f"dev loss {objective}"] = loss
    # what alternation costs: the rises of an objective's loss in phases that do not train it
    for forgetting in plot.find_forgetting(training):
        name = f"dev loss {forgetting.objective} forgotten"
        numbers[name] = numbers.get(name, 0.0) + forgetting.change
    # arms are comparable only on the same items
    for file in run.results.values():
        for task, result in read_result(file)["tasks"].items():
            require(
                items.setdefault(task, result["options_sha256"]) == result["options_sha256"],
                f"{file}: scored on other items of {task} than the runs before it; remove the "
                "file in all runs' folders, and they are scored anew",
            )
            for mode, accuracy in result["accuracy"].items():
                numbers[f"{task} {mode}"] = accuracy
    # tasks that the spec does not name do not count
    scores = glue_scores(run)
    for task in spec.glue:
        numbers[f"GLUE {task}"] = scores[task]
    if spec.glue:
        numbers["GLUE mean"] = statistics.mean(scores[task] for task in spec.glue)
    return numbers


def standard_error(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def difference(values: dict[int, float], base: dict[int, float]) -> dict:
    """Compare an arm with the baseline, {seed: value} each, over the seeds that both have.

    Returns the mean difference and its 95% interval (paired Student t; None for a single seed,
    beyond 11 seeds a little too wide).
    """
    differences = [values[seed] - base[seed] for seed in values if seed in base]
    if not differences:
        return {}
    # arms of one seed share weights and data, so their differences vary less than they do
    mean = statistics.mean(differences)
    error = standard_error(differences)
    interval = None
    if error is not None:
        degrees = min(len(differences) - 1, len(T_95))
        half = error * T_95[degrees - 1]
        interval = [mean - half, mean + half]
    return {"difference": mean, "interval": interval}


def compare(results: dict[str, dict[int, dict]], baseline: str) -> list[dict]:
    """Return a row for each measure of each arm; results[arm][seed][measure] is a number."""
    names = {}
    for seeds in results.values():
        for numbers in seeds.values():
            names |= dict.fromkeys(numbers)
    rows = []
    for name in sorted(names, key=str.lower):
        values_of = {}
        for arm, seeds in results.items():
            values = {seed: numbers[name] for seed, numbers in seeds.items() if name in numbers}
            values_of[arm] = values
        for arm, values in values_of.items():
            if not values:
                continue
            row = {"measure": name, "arm": arm, "values": values}
            row["mean"] = statistics.mean(values.values())
            row["se"] = standard_error(list(values.values()))
            if arm != baseline:
                row |= difference(values, values_of[baseline])
            rows.append(row)
    return rows


def table(rows: list[dict], baseline: str) -> str:
    """Return the rows as a Markdown table that is readable as it stands."""
    lines = [["measure", "arm", "seeds", "mean", "se", f"minus {baseline}", "95% interval"]]
    lines.append(["---", "---", "---", "---:", "---:", "---:", "---:"])
    for row in rows:
        form = ".3f" if row["measure"].startswith("dev loss") else ".2f"
        line = [row["measure"], row["arm"], " ".join(map(str, row["values"]))]
        line += [format(row["mean"], form), "", "", ""]
        if row["se"] is not None:
            line[4] = format(row["se"], form)
        if "difference" in row:
            line[5] = format(row["difference"], "+" + form)
        if row.get("interval"):
            low, high = row["interval"]
            line[6] = f"{low:+{form}} to {high:+{form}}"
        lines.append(line)

    # columns of equal width
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        padded.append(f"| {' | '.join(cells)} |")
    return "\n".join(padded)


def report(spec: Spec, runs: list[Run], failed: list[Run]):
    """Write results.md, results.json and scores.png, and print the table."""
    results = {arm: {} for arm in spec.arms}
    items = {}
    finished = [run for run in runs if is_finished(spec, run)]
    for run in finished:
        results[run.arm][run.seed] = measure(spec, run, items)
    rows = compare(results, spec.baseline)

    # the table, what was compared, and what is left to do
    lines = [table(rows, spec.baseline), ""]
    lines += [f"{arm}: {spec.epochs(arm)} epochs, {spec.arms[arm]}" for arm in spec.arms]
    lines += ["", f"{len(runs) - len(finished)} of {len(runs)} runs left"]
    lines += [f"FAILED: {run.folder}, see {run.log}" for run in failed]
    text = "\n".join([*lines, "", NOTES, ""])

    # the spec with what flags have changed, so that the results tell how to get them again
    values = "\n".join(f"{name} = {value!r}" for name, value in asdict(spec).items())
    page = f"{text}\n```\n{values}\n```\n".encode(errors="backslashreplace")
    write_whole(Path(spec.out, "results.md"), lambda file: file.write(page))
    write_result(Path(spec.out, "results.json"), {"spec": asdict(spec), "rows": rows})
    draw(spec, rows)
    print(f"\n{text}written: {spec.out}/results.md and results.json")


def draw(spec: Spec, rows: list[dict]):
    """Write scores.png: each arm's scores, means with their standard errors."""
    scores = {arm: {} for arm in spec.arms}
    for row in rows:
        if not row["measure"].startswith("dev loss"):
            scores[row["arm"]][row["measure"]] = (row["mean"], row["se"] or 0.0)
    if not any(scores.values()):
        return
    try:
        plot.save_figure(plot.draw_scores(scores), Path(spec.out, "scores.png"), dpi=150)
    except UserError as e:
        print(f"no picture: {e}")


def main(argv: list[str]) -> int:
    """Do what the command line asks for; returns the exit code, raises UserError."""
    spec = config.load(Spec, argv)
    if not spec.out:
        # as config.load tells files from flags and their values
        sources = [source for source, _ in config.read_arguments(Spec, argv)]
        file = next(source for source in sources if not source.startswith("--"))
        spec.out = f"runs/experiments/{Path(file).stem}"
    spec.baseline = spec.baseline or next(iter(spec.arms))
    if not spec.corpus:
        spec.corpus = f"{spec.out}/corpus_{spec.slice}"  # a changed slice makes another corpus
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    if spec.table:
        require(Path(spec.out).exists(), f"{spec.out}: does not exist, there is nothing to show")
    else:
        # what cannot be read is said before the training, not after it
        for task in spec.tasks:
            read_tasks([task], PROTOCOLS[DEFAULT_PROTOCOL].kinds, spec.limit)
        is_there = not spec.glue or Path(spec.glue_data).is_dir()
        require(is_there, f"{spec.glue_data}: is not a folder; --glue_data names that of GLUE")
        Path(spec.out).mkdir(parents=True, exist_ok=True)
        with open(Path(spec.out, "lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # calls that start together make one corpus
            if not Path(spec.corpus).exists():
                make_corpus(spec)

    runs = plan(spec, Corpus(spec.corpus))
    failed = []
    if not spec.table:
        failed = run_missing(spec, runs)
    report(spec, runs, failed)
    return int(bool(failed))


if __name__ == "__main__":
    with clean_exit():
        sys.exit(main(sys.argv[1:]))
