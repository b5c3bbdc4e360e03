"""Score a whole run and write what the BabyLM challenge takes: from a run folder to a submission.

    python -m babylm.submit runs/strict_small --mode mntp --data evaluation_data --out submission
    python -m babylm.submit runs/babyllama --mode causal --year 2024 --out submission

For 2026, the default, and 2025 the last checkpoint is scored on the sets of full_eval and
fine-tuned, and every checkpoint chck_1M, chck_2M ... is scored on the sets of fast_eval and on the
words whose age of acquisition is asked for. What is scored stays in RUN/submission, so that the
same command goes on where it was stopped. OUT/NAME then holds the tree of predictions that
collate_preds.py reads, and the one file that it would make of them: hand that in. Local checkpoints
are scored as they are; nothing has to be uploaded first.
"""

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

import numpy as np

from antlm.checkpoint import WEIGHTS, WEIGHTS_HELP, checkpoints, file_sha256, load_checkpoint
from antlm.distributed import DEVICES
from antlm.files import write_whole
from antlm.program import clean_exit
from antlm.tokenizer import Tokenizer
from babylm import aoa
from babylm.challenge import (
    BACKENDS,
    YEARS,
    Set,
    leaderboard,
    mark_name,
    marks_due,
    reached_mark,
    words_per_step,
)
from babylm.collate import Scored, collate, result_tree, scores_by_key, submission_2024
from babylm.results import read_result
from babylm.sets import OpenSet, Sets, find_sets
from config import require
from schedule import WORD_MARKS

ROOT = Path(__file__).parent.parent
SECONDS_BETWEEN_LINES = 30  # in which a long call says how far it is

# ---------------------------------------------------------------------------------- the checkpoints


class Checkpoint(NamedTuple):
    path: Path
    sha256: str


def read_checkpoint(path: Path, tokenizer: Tokenizer) -> tuple[Checkpoint, dict]:
    """Return a checkpoint and its content; raises UserError for one of another tokenizer."""
    content = load_checkpoint(path)
    require(
        content.get("tokenizer_sha256") == tokenizer.sha256,
        f"{path}: was trained with another tokenizer than {path.with_name('tokenizer.json')}",
    )
    return Checkpoint(path, file_sha256(path)), content


class RunCheckpoints(NamedTuple):
    """What of a run is to be scored.

    due: words at which the challenge wants a checkpoint; marks: those that there are, by words
    """

    last: Checkpoint
    due: list[int]
    marks: dict[int, Checkpoint]
    tokenizer: Tokenizer


def find_checkpoints(run: Path, year: str) -> RunCheckpoints:
    """Return the checkpoints of a run that are scored: the last, and those that the rules name.

    Raises UserError for a run that has none, and for a checkpoint that does not belong to it.
    """
    paths = checkpoints(run)
    require(paths, f"{run}: holds no checkpoint (step_*.pt of train.py)")
    tokenizer = Tokenizer(run / "tokenizer.json")
    if year == "2024":
        last, _ = read_checkpoint(paths[0], tokenizer)
        return RunCheckpoints(last, [], {}, tokenizer)

    marks = {}
    print(f"{run}: reading {len(paths)} checkpoint(s)", flush=True)
    for path in reversed(paths):
        last, content = read_checkpoint(path, tokenizer)
        words = content.get("words")
        require(words is not None, f"{path}: does not say how many words it has seen (`words`)")
        mark = reached_mark(words, words_per_step(content), WORD_MARKS)
        if mark is not None:
            marks.setdefault(mark, last)
    require(
        marks,
        f"{run}: has no checkpoint at 1M, 2M ... words, of which the challenge wants the scores; "
        "train with --babylm_rules",
    )
    # `last` and `words` are now those of the newest checkpoint
    due = marks_due(words, WORD_MARKS)
    if due[-1] > words:
        print(f"{last.path.name}, the end at {words:,} words, stands for {mark_name(due[-1])}")
        marks[due[-1]] = last
    return RunCheckpoints(last, due, marks, tokenizer)


# ------------------------------------------------------------------------------------ what is to do


@dataclass
class Job:
    """A call of eval.py or finetune.py, and the file in which it leaves its result.

    arguments: those of python; work: as in OpenSet
    """

    label: str
    arguments: list[str]
    result: Path
    work: float


def result_path(args: argparse.Namespace, name: str, *causes: str) -> Path:
    """Return the file of a result; other causes, such as other weights, give another name.

    A result of what a file was before is thus never taken for one of what it is now.
    """
    causes = [*causes, args.dtype, args.weights]
    digest = hashlib.sha256("\n".join(causes).encode()).hexdigest()
    return args.work / f"{name}_{digest[:12]}.json"


def eval_job(
    label: str, checkpoint: Checkpoint, sets: list[OpenSet], args: argparse.Namespace
) -> Job:
    """Return the call of eval.py that scores a checkpoint on sets."""
    name = f"{checkpoint.path.stem}_{label}_{args.mode}_{args.year}"
    result = result_path(args, name, checkpoint.sha256, *(part.sha256 for part in sets))
    arguments = ["eval.py", str(checkpoint.path.resolve()), "--out", str(result.resolve())]
    arguments += ["--mode", args.mode, "--protocol", args.year]
    arguments += ["--device", args.device, "--dtype", args.dtype, "--weights", args.weights]
    arguments += ["--task", *(str(part.tasks.folder.resolve()) for part in sets)]
    return Job(label, arguments, result, sum(part.work for part in sets))


def glue_job(task: str, checkpoint: Checkpoint, sets: Sets, args: argparse.Namespace) -> Job:
    """Return the call of finetune.py that trains on a task."""
    tasks = [task]
    if task == "mnli" and "mnli-mm" in sets.glue:
        tasks.append("mnli-mm")  # scored with the model of mnli
    configs = [ROOT / config for config in YEARS[args.year].glue_config]
    hashes = [sets.glue[name].sha256 for name in tasks]
    hashes += [file_sha256(config) for config in configs]
    name = f"{checkpoint.path.stem}_{task}_{args.year}"
    result = result_path(args, name, checkpoint.sha256, *hashes)
    arguments = ["finetune.py", str(checkpoint.path.resolve()), *map(str, configs)]
    arguments += [f"--data={sets.glue_folder.resolve()}", f"--out={result.resolve()}"]
    arguments += [f"--device={args.device}", f"--dtype={args.dtype}", f"--weights={args.weights}"]
    arguments.append(f"--tasks={','.join(tasks)}")
    return Job(task, arguments, result, sets.glue[task].work)


@dataclass
class Jobs:
    """What is to do; the keys say of what the results are."""

    full: dict[Set, Job]
    glue: dict[str, Job]  # by task, but for mnli-mm
    fast: dict[int, Job]  # by words seen; each on all fast sets and the words

    def all(self) -> list[Job]:
        return [*self.full.values(), *self.glue.values(), *self.fast.values()]


def make_jobs(sets: Sets, run: RunCheckpoints, args: argparse.Namespace) -> Jobs:
    """Return all calls that a submission needs."""
    jobs = Jobs({}, {}, {})
    for part, opened in sets.full.items():
        jobs.full[part] = eval_job(part.folder, run.last, [opened], args)
    for task in sets.glue:
        if task != "mnli-mm":
            jobs.glue[task] = glue_job(task, run.last, sets, args)

    several = list(sets.fast.values())
    if sets.words:
        several.append(sets.words)
    if several:
        for mark, checkpoint in run.marks.items():
            jobs.fast[mark] = eval_job(mark_name(mark), checkpoint, several, args)
    return jobs


# ------------------------------------------------------------------------------------------ scoring


def is_done(job: Job) -> bool:
    """Whether a call has left its result; raises UserError for a file that is none."""
    if not job.result.exists():
        return False
    read_result(job.result)
    return True


def run_jobs(jobs: list[Job]):
    """Make the calls whose result is not there yet; raises UserError where one fails."""
    to_do = [job for job in jobs if not is_done(job)]
    n_done = len(jobs) - len(to_do)
    print(f"{len(jobs)} calls of eval.py and finetune.py, of which {n_done} are done", flush=True)
    work_done = 0.0
    work_left = sum(job.work for job in to_do)
    began = time.time()
    for number, job in enumerate(to_do, start=1):
        print(f"{number} of {len(to_do)}: {job.label}", flush=True)
        log = job.result.with_suffix(".log")
        message = call(job.arguments, log)
        require(not message, f"{job.label}: {message} (all that it said: {log})")
        work_done += job.work
        work_left -= job.work
        if number < len(to_do):
            minutes = (time.time() - began) * work_left / work_done / 60
            print(f"    about {minutes:.0f} min left in all", flush=True)


def call(arguments: list[str], log: Path) -> str:
    """Run a program, keep what it says in a log, and now and then show how far it is.

    Returns "", or in a line why it failed.
    """
    last = "failed"
    shown = time.time()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},  # or an error would come before earlier lines
    )
    try:
        with open(log, "a", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                last = line.strip() or last
                if " s left" in line and time.time() - shown > SECONDS_BETWEEN_LINES:
                    print(f"    {last}", flush=True)
                    shown = time.time()
        code = process.wait()
    finally:
        process.kill()  # where this program is stopped
    if code < 0:
        return f"was ended by signal {-code}"
    return last if code else ""


def collect(sets: Sets, jobs: Jobs, run: RunCheckpoints, args: argparse.Namespace) -> Scored:
    """Read the results of all calls."""
    scored = Scored(
        name=args.name,
        mode=args.mode,
        year=args.year,
        marks=run.due,
        full={},
        fast={},
        pairs=sets.pairs,
        surprisals={},
        age=None,
        glue={},
    )
    for part, job in jobs.full.items():
        scored.full[part] = (sets.full[part].tasks, read_result(job.result))
    for mark, job in jobs.fast.items():
        result = read_result(job.result)
        scored.fast[mark] = {part: (opened.tasks, result) for part, opened in sets.fast.items()}
        if sets.words:
            scored.surprisals[mark] = np.array(result["human"]["aoa"]["surprisals"][args.mode])
    for task in sets.glue:
        result = read_result(jobs.glue[task.removesuffix("-mm")].result)
        scored.glue[task] = next(iter(result["tasks"][task]["seeds"].values()))

    if scored.surprisals and YEARS[args.year].scores_age:
        children = sets.read_children()
        scored.age = aoa.score_run(sets.pairs, scored.surprisals, children, run.tokenizer)
    return scored


# -------------------------------------------------------------------------------------- the program


def write_submission(scored: Scored, out: Path):
    """Write the files of the year, each complete or as it was before."""
    if scored.year == "2024":
        content = json.dumps(submission_2024(scored), ensure_ascii=False).encode()
        files = {f"{scored.name}_textonly_predictions.json.gz": gzip.compress(content, mtime=0)}
    else:
        # the one file comes last, so that it is there only with all others
        tree = result_tree(scored)
        contents = {f"{scored.name}/{path}": content for path, content in tree.items()}
        path = f"{scored.name}/all_full_preds_and_fast_scores_{BACKENDS[scored.mode]}.json"
        contents[path] = collate(scored, tree)
        files = {path: json.dumps(content).encode() for path, content in contents.items()}
    for path, raw in files.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(out / path, methodcaller("write", raw))
    print(f"{len(files)} file(s) written; hand in {out / path}")


def print_scores(scored: Scored):
    """Print the ages and, at the end, the leaderboard; of other years than 2026 all scores."""
    scores = scores_by_key(scored)
    if scored.age is not None:
        print(f"\n{aoa.table(scored.age)}")
    print()
    if scored.year == "2026":
        print(leaderboard(scored.name, scores))
        print("reading and aoa are noise at 10M words: quote them apart, and with seeds")
    else:
        for key, value in scores.items():
            print(f"{key:18}{value:7.1f}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m babylm.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, help="run folder with its checkpoints")
    add("--mode", required=True, choices=BACKENDS, help="how the model is asked: as it was trained")
    add(
        "--data",
        type=Path,
        default=Path("evaluation_data"),
        help="folder of the year's pipeline, with full_eval and fast_eval; default: %(default)s",
    )
    add("--out", type=Path, required=True, help="folder to write the submission into")
    add("--year", default="2026", choices=YEARS, help="default: %(default)s")
    add("--name", help="of the model; default: the run folder's")
    add("--incomplete", action="store_true", help="write null for what is missing")
    add("--device", default="auto", choices=DEVICES, help="default: %(default)s")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: %(default)s")
    add("--weights", default=WEIGHTS[0], choices=WEIGHTS, help=WEIGHTS_HELP)
    args = parser.parse_args(argv)
    args.name = args.name or args.run.resolve().name
    args.work = args.run / "submission"
    return args


def main(argv: list[str] | None = None):
    """Do what the command line asks for; raises UserError and OSError."""
    args = parse(argv)
    # the pipelines cut a name at its last dot
    ok = not {".", "/"} & set(args.name)
    require(ok, f"--name {args.name}: holds a dot or a slash; choose one without")

    # what is wrong or missing is said before hours are spent
    run = find_checkpoints(args.run, args.year)
    sets = find_sets(args.data, args.year, args.mode)
    missing = list(sets.missing)
    missing += [mark_name(mark) for mark in run.due if mark not in run.marks]
    require(
        args.incomplete or not missing,
        f"missing: {', '.join(missing)}; add them, or write null for them with --incomplete",
    )
    if missing:
        print(f"MISSING, null in the files: {', '.join(missing)}")
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(exist_ok=True)

    jobs = make_jobs(sets, run, args)
    run_jobs(jobs.all())
    scored = collect(sets, jobs, run, args)
    write_submission(scored, args.out)
    print_scores(scored)


if __name__ == "__main__":
    with clean_exit():
        main()
