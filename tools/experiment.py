"""Compare training recipes over seeds: train and score every arm of an experiment, and put all into one table.

    python tools/experiment.py config/experiments/antlm_micro.py                         # run it, or go on with it
    python tools/experiment.py config/experiments/antlm_full.py --workers=cuda:0,cuda:1  # one process on each
    python tools/experiment.py config/experiments/antlm_micro.py --minutes=9             # a piece; the next goes on
    python tools/experiment.py config/experiments/antlm_micro.py --table --baseline=mlm  # show what is there

A spec is a Python file with settings of Spec below; each can be a flag, too, and the last one counts, as in train.py.
The arms share text, tokenizer and, seed by seed, the first weights (where sizes agree) and the order of the data. What
is finished is skipped, what was cut off goes on; several calls may work in one --out. Exit code: 0 when all is
finished, 1 when a run failed, 128 + signal when stopped (143 by --minutes).
"""

import fcntl
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np
import plot
import torch

import config
import finetune
from antlm.checkpoint import FREE, checkpoints
from babylm.glue import find
from babylm.results import read_result, write_result
from babylm.tasks import fingerprint, read_tasks
from config import UserError
from data import Batches, Corpus
from eval import MODES, result_name
from prepare import text_files
from schedule import parse
from train import Settings

HERE = os.path.relpath(ROOT)
OWN = {"corpus", "out_dir", "resume", "prepare", "score", "seed", "device"}  # of train.py, not for arms to set
BLOCK = 100  # lines that a slice of the text keeps together
# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
NOTES = """\
se: standard error of the mean over seeds. 95% interval: of the difference, paired by seed (Student t). item se: standard
error of the difference over the items, these models given: what other sentences would change, and not other seeds.
best mode: the better mode of each run, on these very items. Scores in percent, dev losses in nats per token."""


@dataclass
class Spec:
    # what is compared
    arms: dict = field(default_factory=dict)  # name: settings of train.py that make it; may hold its own `modes`
    baseline: str = ""  # the arm that all others are compared with; default: the first
    seeds: int = 3  # runs of each arm
    first_seed: int = 1  # their seeds are this one and those after it; what is tuned should be tuned on others
    config: str = ""  # override file of train.py that all arms start from
    settings: dict = field(default_factory=dict)  # settings of train.py for all arms, over those of the file
    unequal_epochs: bool = False  # may arms differ in epochs?
    # the text
    corpus: str = ""  # folder made by prepare.py; default: OUT/corpus. If it is missing, it is made from
    text: str = "babylm_10M"  # training text, file or folder
    dev: str = "babylm_dev"  # development text, all of it
    slice: int = 1  # of every so many blocks of 100 lines of each training file the first; 1: all
    vocab_size: int = 16384  # tokens
    prepare: tuple = ()  # or by these commands, each a Python file with its arguments
    # how it is scored
    tasks: tuple = ("evaluation_data/blimp_filtered",)  # for eval.py --task
    limit: int = 0  # only so many items of each file, from its start; 0: all
    modes: tuple = ("causal", "masked")  # or mntp
    glue: tuple = ()  # tasks of finetune.py: "rte", or with flags for it alone: "wsc --epochs=30"
    glue_data: str = "evaluation_data/glue_filtered"
    # how it is run
    out: str = ""  # folder of runs and results; default: runs/experiments/NAME
    workers: tuple = ("auto",)  # auto: one, on what train.py finds | cpu | cuda:0,cuda:1 | 2: so many share the CPU
    minutes: float = 0.0  # stop after so many, all saved; 0: no limit
    table: bool = False  # only show what is there

    def train_args(self, arm: str) -> list[str]:
        values = {name: value for name, value in (self.settings | self.arms[arm]).items() if name != "modes"}
        return [*filter(None, [self.config]), *(f"--{name}={str(value).lower() if type(value) is bool else value}"
                                                for name, value in values.items())]

    def epochs(self, arm: str) -> int:
        return sum(phase.epochs for phase in parse(config.load(Settings, self.train_args(arm)).schedule))

    def modes_of(self, arm: str) -> list[str]:
        return list((self.settings | self.arms[arm]).get("modes", self.modes))

    def check(self):
        """Raise ValueError, which names the setting, for a value or combination that cannot be."""
        tasks = [Path(task).resolve().name.removesuffix(".jsonl") for task in self.tasks]
        for name, holds, expected in [
                ("arms", self.arms, "must name at least one arm"),
                ("baseline", self.baseline in ("", *self.arms), f"must be an arm: {', '.join(map(str, self.arms))}"),
                *((name, getattr(self, name) > 0, "must be at least 1") for name in ("seeds", "first_seed", "slice", "vocab_size")),
                *((name, getattr(self, name) >= 0, "must not be negative") for name in ("limit", "minutes")),
                ("tasks", len(tasks) == len(set(tasks)), "must differ in their last names, which tell results apart"),
                ("workers", self.workers and all(re.fullmatch(r"auto|cpu|cuda:\d+|[1-9]\d?", x) for x in self.workers),
                 "must be auto, cpu, devices such as cuda:0,cuda:1 or a number")]:
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)!r} {expected}")
        epochs = {}
        for arm, values in self.arms.items():
            if not re.fullmatch(r"\w[\w.-]*", str(arm)) or not isinstance(values, dict):
                raise ValueError(f"arms: {arm!r} must be a name fit for a folder, with a dict of settings of train.py")
            if own := OWN & {*values, *self.settings}:
                raise ValueError(f"arms: {arm}: {min(own)!r} is the experiment's own, the same for all arms")
            if not (modes := self.modes_of(arm)) or not set(modes) <= set(MODES.values()):
                raise ValueError(f"arms: {arm}: modes {modes} must be some of {', '.join(MODES.values())}")
            try:
                epochs[arm] = self.epochs(arm)
            except UserError as e:
                raise ValueError(f"arms: {arm}: {e}") from None
        if len(set(epochs.values())) > 1 and not self.unequal_epochs:
            raise ValueError("arms differ in epochs: " + ", ".join(f"{arm} {n}" for arm, n in epochs.items())
                             + "; make them equal, or set unequal_epochs = True")


def read_json(path: Path, lines: bool = False):
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if lines else json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path}: damaged ({e}); mend it, or remove it, a run's with its folder") from None


def slice_text(text: str, out: Path, every: int):
    """Write the first of every `every` blocks of BLOCK lines of each text file to a file of its name in `out`, anew."""
    shutil.rmtree(out, ignore_errors=True)
    for file in text_files([text]):
        part = out / (file.relative_to(text) if Path(text).is_dir() else file.name)
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "rb") as lines, open(part, "wb") as kept:
            kept.writelines(line for i, line in enumerate(lines) if i // BLOCK % every == 0)


def open_corpus(spec: Spec) -> tuple[Corpus, dict]:
    """The corpus of all arms, made if it is missing, and what it and the tasks hold; raises UserError, UserError."""
    items = [x for task in spec.tasks if not spec.table or Path(task).exists() for x in read_tasks(task, spec.limit)]
    Path(spec.out).mkdir(parents=True, exist_ok=True)
    with open(Path(spec.out, "lock"), "ab") as lock:  # inherited: it lasts as long as the commands
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not Path(spec.corpus).exists() and not spec.table:
            if spec.slice > 1 and not spec.prepare:
                slice_text(spec.text, Path(spec.out, "slice"), spec.slice)
            text = f"{spec.out}/slice" if spec.slice > 1 else spec.text
            own = [f"{HERE}/prepare.py", text, "--dev", spec.dev, "--out", spec.corpus, "--vocab_size", str(spec.vocab_size)]
            for command in spec.prepare or [shlex.join(own)]:
                print(f"python {command}", flush=True)
                if subprocess.run([sys.executable, *shlex.split(command)], pass_fds=[lock.fileno()]).returncode:
                    raise UserError(f"{spec.corpus}: was missing, and the command that makes it failed: python {command}")
    corpus, results = Corpus(spec.corpus), Path(spec.out, "results.json")
    now = {name: corpus.meta["train"][name] for name in ("words", "tokens", "sha256")}
    now |= dict(slice=spec.slice, dev_sha256=corpus.meta["dev"]["sha256"])
    then = read_json(results)["corpus"] if results.exists() else {}
    for name in now:
        if now[name] != then.get(name, now[name]):
            raise UserError(f"{spec.out}: began with {name} = {then[name]}, not {now[name]}; "
                                     "remove it, or choose another --out")
    names = dict.fromkeys(x.task for x in items)
    return corpus, now | {"items": {name: fingerprint([x for x in items if x.task == name]) for name in names}}


def plan(spec: Spec, corpus: Corpus) -> list[SimpleNamespace]:
    """All runs, those of the first seed first; raises UserError where one has begun with other settings.

    arm, seed, folder, log; args of train.py; schedule; steps, and last: the checkpoint after them; modes and results: what
    eval.py is asked for, and a file for each task; glue: the file of finetune.py.
    """
    runs = []
    for seed, arm in ((seed, arm) for seed in range(spec.first_seed, spec.first_seed + spec.seeds) for arm in spec.arms):
        folder, modes = Path(spec.out, f"{arm}_{seed}"), spec.modes_of(arm)
        own = [f"--corpus={spec.corpus}", f"--out_dir={folder}", f"--seed={seed}", "--score="]
        s = config.load(Settings, args := spec.train_args(arm) + own)
        steps = spec.epochs(arm) * Batches(corpus.train, corpus.vocab_size, s.block_size, s.batch_rows, seed, 1).steps_per_epoch
        asked = dict(mode=modes, protocol="2025", dtype="float32", limit=spec.limit)
        runs.append(SimpleNamespace(
            arm=arm, seed=seed, folder=folder, log=folder.with_name(f"{folder.name}.log"), args=args, modes=modes,
            schedule=s.schedule, steps=steps, last=folder / f"step_{steps:07}.pt", glue=folder / f"glue_{steps}.json",
            results=[folder / result_name(SimpleNamespace(task=task, **asked), steps) for task in spec.tasks]))
        ours, begun = asdict(s), [*checkpoints(folder), *folder.glob("eval_*.json"), *folder.glob("glue_*.json")]
        theirs = asdict(Settings()) | read_json(folder / "settings.json") if begun else ours
        for name in sorted(ours.keys() - FREE | {"eval_rows", "precision"}):  # these change what is compared
            if theirs[name] != ours[name]:
                raise UserError(f"{folder}: was trained with {name}={theirs[name]!r}, not {ours[name]!r}; "
                                         "remove it, or choose another --out")
    return runs


def glue_flags(spec: Spec) -> list[str]:
    return [f"--data={spec.glue_data}", f"--tasks={','.join(spec.glue)}"]


def glue_scores(spec: Spec, run: SimpleNamespace) -> dict[str, float]:
    """Mean score, over finetune.py's seeds, of each GLUE task that is done as the spec asks."""
    stored, scores = read_result(run.glue)["tasks"] if run.glue.exists() else {}, {}
    asked = config.load(finetune.Settings, glue_flags(spec)).by_task() if stored and spec.glue else {}
    for name, found in ((name, stored[name]) for name in asked if name in stored):
        own = asked[name.removesuffix("-mm")].resolve(run.schedule)  # mnli-mm is of the model of mnli
        if own.stored().items() <= found["settings"].items() and found["seeds"].keys() >= {*map(str, own.seeds)}:
            scores[name] = statistics.mean(found["seeds"][str(seed)]["score"] for seed in own.seeds)
    return scores


def commands(spec: Spec, run: SimpleNamespace):
    """Yield the processes that a run takes, but for --device, and whether each has done its work."""
    yield run.last.exists(), [f"{HERE}/train.py", *run.args, "--resume"]
    for task, result in zip(spec.tasks, run.results):
        flags = ["--task", task, "--mode", *run.modes, "--limit", str(spec.limit)]
        yield result.exists(), [f"{HERE}/eval.py", str(run.last), *flags]
    if spec.glue:
        yield len(glue_scores(spec, run)) == len(spec.glue), [f"{HERE}/finetune.py", str(run.last), *glue_flags(spec)]


def next_command(spec: Spec, run: SimpleNamespace) -> list[str] | None:
    """The process that a run needs next; None when it is trained and scored."""
    return next((command for done, command in commands(spec, run) if not done), None)


# ------------------------------------------------------------------------------------------------------ running


def find_workers(spec: Spec) -> list[tuple[str, dict]]:
    """--device and environment of each worker; raises UserError."""
    names = [x for name in spec.workers for x in (int(name) * ["cpu"] if name.isdigit() else [name])]
    threads, n_gpu, workers = max(1, torch.get_num_threads() // len(names)), torch.cuda.device_count(), []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(n_gpu)))).split(",")
    for name in names:
        device, _, number = name.partition(":")
        if number and int(number) >= n_gpu:
            raise UserError(f"--workers={name}: torch sees {n_gpu} GPU(s), counted from 0")
        gpu = {"CUDA_VISIBLE_DEVICES": visible[int(number)]} if number else {}
        workers.append((device, {"OMP_NUM_THREADS": str(threads)} | gpu))
    print(f"workers: {', '.join(names)}, with {threads} CPU thread(s) each", flush=True)
    return workers


def launch(command: list[str], log: Path, env: dict) -> subprocess.Popen | None:
    """Start a process that writes to the log; None where another one, of this call or any other, still does."""
    with open(log, "ab", buffering=0) as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)  # inherited: it lasts as long as the child
        except BlockingIOError:
            return None
        output.write(f"$ python {shlex.join(command)}\n".encode())
        # In a session of its own: Ctrl-C reaches this process alone, which then sends one SIGTERM.
        return subprocess.Popen([sys.executable, *command], env=os.environ | env, stdin=subprocess.DEVNULL,
                                stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def tail(log: Path, n: int) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-n:]


def work(spec: Spec, runs: list[SimpleNamespace], corpus: dict) -> int:
    """Run what is missing, one process a worker, and report after each run -> exit code."""
    stop, failed, busy, others, workers = [], [], {}, set(), find_workers(spec)
    pending = [run for run in runs if next_command(spec, run)]
    began = said = time.time()

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends this process at once; its children still save

    def settle(run: SimpleNamespace, process: subprocess.Popen, command: list[str], start: float):
        """Write down how a process ended; if its run needs another one, that comes next."""
        code, left = process.wait(), next_command(spec, run)
        state = "done" if code == 0 and left != command else "stopped" if stop else "failed"
        entry = dict(run=run.folder.name, state=state, began=time.strftime("%F %T", time.localtime(start)),
                     seconds=round(time.time() - start, 1), command=f"python {shlex.join(process.args[1:])}",
                     said=f"exit code {code}: {tail(run.log, 1)[0]}")
        with open(Path(spec.out, "processes.jsonl"), "a") as f:
            f.write(json.dumps(entry) + "\n")
        if state == "failed":
            failed.append(run)
            print(f"{run.folder}: FAILED, exit code {code}; the end of {run.log}:", *tail(run.log, 12), sep="\n    ")
        elif left:
            pending.insert(0, run)
        if (state == "failed" or not left) and (pending or busy) and not stop:
            print(f"\n{report(spec, runs, corpus)}\n", flush=True)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while (pending or busy) and not stop:
            for i, (device, env) in enumerate(workers):
                if i in busy and busy[i][1].poll() is not None:
                    settle(*busy.pop(i))
                for run in [*pending] if i not in busy else ():
                    if not (command := next_command(spec, run)):  # another call has finished it
                        pending.remove(run)
                    elif process := launch([*command, f"--device={device}"], run.log, env):
                        print(f"python {shlex.join(process.args[1:])} >> {run.log}", flush=True)
                        pending.remove(run)
                        busy[i] = run, process, command, time.time()
                        break
                    elif run.log not in others:
                        others.add(run.log)
                        print(f"{run.folder}: another call, or what it left behind, is at work in it", flush=True)
            if time.time() - said > 60:
                said = time.time()
                print(*(f"{run.folder.name}: {tail(run.log, 1)[0]}" for run, *_ in busy.values()), sep="\n", flush=True)
            if spec.minutes and time.time() - began > 60 * spec.minutes:
                stop.append(signal.SIGTERM)
            time.sleep(0.1)
    finally:
        stop += [signal.SIGTERM] * bool(busy)
        for _, process, *_ in busy.values():
            process.terminate()  # train.py then saves
        for job in busy.values():
            settle(*job)
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + stop[0] if stop else int(bool(failed))


# -------------------------------------------------------------------------------------------------- the results


def measure(spec: Spec, run: SimpleNamespace, corpus: dict) -> dict[tuple[str, str], tuple]:
    """What a run is worth: (what, how): number, and of a task the share of each item by file, else None; raises UserError."""
    entries, found = read_json(run.folder / "metrics.jsonl", lines=True), {}
    dev = [entry for entry in entries if "dev" in entry][-1]
    for objective, loss in dev["dev"].items():
        found["dev loss", objective] = loss, None
    for file in run.results:
        for task, result in read_result(file)["tasks"].items():
            if corpus["items"].get(task, result["options_sha256"]) != result["options_sha256"]:
                raise UserError(f"{file}: scored on other items of {task} than there are now; remove this file in all runs' "
                                "folders, and they are scored anew")
            by_mode = {mode: (accuracy, [[(x[0] == max(x)) / x.count(max(x)) for x in subset["scores"][mode]]
                                         for subset in result["subsets"].values()])
                       for mode, accuracy in result["accuracy"].items()}
            found |= {(task, mode): score for mode, score in by_mode.items()}
            found[task, "best mode"] = max(by_mode.values(), key=lambda score: score[0])
    if scores := glue_scores(spec, run):
        found |= {("GLUE", name): (score, None) for name, score in scores.items()}
        found["GLUE", f"mean of {len(scores)}"] = statistics.mean(scores.values()), None
    found["words seen", "(million)"] = dev["words"] / 1e6, None
    found["tokens/s", "in training"] = statistics.median(x["tokens_per_s"] for x in entries if "loss" in x), None
    return found


def standard_error(values: list[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def item_error(pairs: list[tuple]) -> float | None:
    """Standard error, over a task's items, of the difference of two macro averages in percent.

    pairs: for each seed the shares [file][item] of an arm and of the baseline. Their difference is averaged over seeds
    item by item, so the models are taken as they are. Files weigh the same. None where a file has a single item.
    """
    files = [np.mean([np.subtract(a[k], b[k]) for a, b in pairs], axis=0) for k in range(len(pairs[0][0]))]
    if min(map(len, files)) < 2:
        return None
    return 100 * math.sqrt(sum(x.var(ddof=1) / len(x) for x in files)) / len(files)


def compare(spec: Spec, found: dict[str, dict[int, dict]]) -> list[dict]:
    """found[arm][seed] as measure() has it -> rows: each measure of each arm, and its difference from the baseline.

    half: half the 95% interval of the difference over seeds (paired Student t; beyond 31 seeds a little too wide).
    """
    keys, rows = dict.fromkeys(key for seeds in found.values() for run in seeds.values() for key in run), []
    whats = list(dict.fromkeys(what for what, _ in keys))
    for key in sorted(keys, key=lambda key: (whats.index(key[0]), key[1] == "best mode")):
        its = {arm: {seed: run[key] for seed, run in seeds.items() if key in run} for arm, seeds in found.items()}
        base = its.get(spec.baseline, {})
        for arm, seeds in its.items():
            values = [value for value, _ in seeds.values()]
            if values:
                rows.append(dict(what=key[0], how=key[1], arm=arm, seeds=[*seeds], values=values,
                                 mean=statistics.mean(values), se=standard_error(values), pairs=0))
            if arm != spec.baseline and (both := [seed for seed in seeds if seed in base]):
                differences, n = [seeds[seed][0] - base[seed][0] for seed in both], len(both)
                shares = [(seeds[seed][1], base[seed][1]) for seed in both]
                rows[-1] |= dict(pairs=n, difference=statistics.mean(differences),
                                 half=standard_error(differences) * T_95[min(n - 1, len(T_95)) - 1] if n > 1 else None,
                                 item_se=item_error(shares) if shares[0][0] else None)
    return rows


def table(rows: list[dict], failed: list[SimpleNamespace], baseline: str) -> str:
    """The rows as Markdown that is readable as it stands."""
    lines = [["measure", "arm", "seeds", "mean", "se", f"minus {baseline}", "95% interval", "item se"]]
    for row in rows:
        n = {"dev loss": 3, "tokens/s": 0}.get(row["what"], 2)
        line = [f"{row['what']} {row['how']}", row["arm"], " ".join(map(str, row["seeds"])), f"{row['mean']:,.{n}f}",
                "" if row["se"] is None else f"{row['se']:,.{n}f}"]
        if row["pairs"]:
            low, high = (row["difference"] + sign * (row["half"] or 0) for sign in (-1, 1))
            line += [f"{row['difference']:+,.{n}f}", f"n={row['pairs']}" if row["half"] is None else
                     f"{low:+,.{n}f} to {high:+,.{n}f}", "" if row["item_se"] is None else f"{row['item_se']:.2f}"]
        lines.append(line)
    lines = [line + [""] * (8 - len(line)) for line in lines + [["FAILED", run.arm, str(run.seed)] for run in failed]]
    wide = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * wide[i] if i < 3 else "-" * (wide[i] - 1) + ":" for i in range(8)])
    return "\n".join("| " + " | ".join(f"{cell:{'<' if i < 3 else '>'}{wide[i]}}" for i, cell in enumerate(line)) + " |"
                     for line in lines)


def report(spec: Spec, runs: list[SimpleNamespace], corpus: dict) -> str:
    """Write results.md and results.json -> the table and what is left to do."""
    out, record = Path(spec.out), Path(spec.out, "processes.jsonl")
    found, left = {arm: {} for arm in spec.arms}, [run for run in runs if next_command(spec, run)]
    finished = [run for run in runs if run not in left]
    for run in finished:
        found[run.arm][run.seed] = measure(spec, run, corpus)
    rows, processes = compare(spec, found), read_json(record, lines=True) if record.exists() else []
    last = {process["run"]: process for process in processes}
    failed = [run for run in left if last.get(run.folder.name, {}).get("state") == "failed"]
    lines = [table(rows, failed, spec.baseline)] + [f"{run.folder}: {last[run.folder.name]['said']}" for run in failed]
    if len({spec.epochs(arm) for arm in spec.arms}) > 1:
        lines.append("NOT AT EQUAL EPOCHS: " + ", ".join(f"{arm} {spec.epochs(arm)}" for arm in spec.arms))
    lines.append(f"{len(left)} of {len(runs)} runs left")
    theirs = {f"python {shlex.join(command)}" for run in finished if left for _, command in commands(spec, run)}
    if seconds := sum(p["seconds"] for p in processes if p["command"].rpartition(" --device=")[0] in theirs):
        seconds *= sum(1 - max((int(file.stem[5:]) for file in checkpoints(run.folder)), default=0) / run.steps for run in left)
        lines[-1] += f", about {seconds / len(finished) / 3600:.1f} hours of one worker at the speed of the finished ones"
    facts = dict(written=time.strftime("%F %T"), hours=round(sum(p["seconds"] for p in processes) / 3600, 3),
                 machine=f"{platform.platform()}, {os.cpu_count()} cores", python=platform.python_version(),
                 gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())], torch=torch.__version__,
                 corpus=corpus)
    done = "\n".join(f"{p['began']} {p['seconds']:9,.1f} s  {p['state']:7}  {p['command']}" for p in processes)
    text = "\n".join(f"{name} = {value!r}" for name, value in (facts | asdict(spec)).items())
    text = "\n\n".join([f"# {out.name}", *lines, NOTES, f"```\n{text}\n```", f"```\n{done}\n```\n"])
    with open(out / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_result(out / "results.json", facts | dict(
            spec=asdict(spec), rows=rows, failed=[run.folder.name for run in failed], processes=processes))
        (out / "results.md").write_text(text)
    return "\n".join(lines)


def draw(spec: Spec, runs: list[SimpleNamespace]):
    """Write training.png, the finished runs of the first seed, and scores.png, means with their standard errors."""
    rows = [row for row in read_json(Path(spec.out, "results.json"))["rows"]
            if row["what"] not in ("dev loss", "words seen", "tokens/s") and row["how"] != "best mode"]
    finished = [str(run.folder) for run in runs if run.seed == spec.first_seed and not next_command(spec, run)]
    if finished:
        plot.draw_training([plot.read_training(folder) for folder in finished]).savefig(f"{spec.out}/training.png", dpi=150)
    if not rows:
        return
    fig, arms, bars = plot.figure(9, 4), list(spec.arms), {}
    for row in rows:
        bars.setdefault(f"{row['what']} {row['how']}", []).append(row)
    axes = fig.subplots()
    for i, (label, its) in enumerate(bars.items()):
        at = [arms.index(row["arm"]) + 0.6 * ((i + 0.5) / len(bars) - 0.5) for row in its]
        axes.errorbar(at, [row["mean"] for row in its], [row["se"] or 0 for row in its], fmt="o", capsize=3,
                      color=plot.COLOURS[i % len(plot.COLOURS)], label=label)
    axes.set(ylabel="percent: mean and its standard error over seeds", xticks=range(len(arms)), xticklabels=arms)
    axes.grid(axis="y", alpha=0.3)
    fig.legend(loc="outside upper center", ncols=4)
    fig.savefig(f"{spec.out}/scores.png", dpi=150)


def main(argv: list[str]) -> int:
    """Do what the command line asks for -> exit code; raises UserError, UserError, UserError and OSError."""
    if not argv or argv[0].startswith("-"):
        raise UserError("name a spec first: experiment.py SPEC.py [--SETTING=VALUE...]")
    spec = config.load(Spec, argv)
    spec.out = spec.out or f"runs/experiments/{Path(argv[0]).stem}"
    spec.corpus, spec.baseline = spec.corpus or f"{spec.out}/corpus", spec.baseline or next(iter(spec.arms))
    if spec.table and not Path(spec.out).exists():
        raise UserError(f"{spec.out}: does not exist, there is nothing to show; run it without --table first")
    if spec.glue and not spec.table:
        for name, own in config.load(finetune.Settings, glue_flags(spec)).by_task().items():
            for split in ("valid", *["train*"] * (name != "mnli-mm")):
                find(own, f"{name}.{split}.jsonl")
    corpus, what = open_corpus(spec)
    runs = plan(spec, corpus)
    report(spec, runs, what)
    code = 0 if spec.table else work(spec, runs, what)
    print(f"\n{report(spec, runs, what)}\n", flush=True)
    if code > 1:
        again = shlex.join([f"{HERE}/tools/experiment.py", *argv])
        print(f"stopped, and what was trained is saved; go on with the same command: python {again}")
        return code
    try:
        draw(spec, runs)
    except UserError as e:
        print(f"no pictures: {e}")
    print(f"{NOTES}\nwritten: {spec.out}/results.md and results.json")
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as e:
        sys.exit(f"experiment.py: {e}")
