"""Kill training at random moments, resume it, and compare the end with a run that was not killed.

python -m tests.kill --kills 50                        # both backbones; minutes on one CPU core
python -m tests.kill --kills 20 --backbones ltg_bert --seed 7

train.py runs as a process of its own on a small corpus made here, in causal, masked and mixed
phases with accumulation, dropout and evaluation. It saves after every step, and dies by SIGKILL:
while it starts, while it trains, while it writes. Now and then the newest checkpoint is cut short
as well. The next start must find the newest whole checkpoint, and the end must be the same bit for
bit: weights, optimizer and the loss of every step.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import prepare
from antlm.checkpoint import checkpoints, load_checkpoint, load_newest
from antlm.program import clean_exit

ROOT = Path(__file__).parent.parent
SETTINGS = [
    "--schedule=1_CLM+1_MLM+1_1CLM:1MNTP:1MDLM",
    "--average_share=0.6",
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=64",
    "--n_ff=96",
    "--n_bucket=8",
    "--block_size=16",
    "--batch_rows=24",
    "--micro_rows=7",
    "--dropout=0.1",
    "--lr=3e-3",
    "--log_every=2",
    "--eval_every=3",
    "--eval_rows=16",
    "--save_every=1",
    "--device=cpu",
]
OPTIMIZER = {"babyllama": "adamw", "ltg_bert": "lamb"}
SIGKILLED = -9  # the return code of a process that SIGKILL has ended


def make_corpus(folder: Path, n_lines: int) -> Path:
    """Prepare a corpus of short sentences, some eight tokens a line."""
    rng = random.Random(1)
    nouns = "cat dog bird horse child teacher".split()
    verbs = "sees likes finds follows hears".split()
    for name, n in (("text.train", n_lines), ("text.dev", 80)):
        lines = []
        for _ in range(n):
            lines.append(f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}.\n")
        (folder / name).write_text("".join(lines))
    train = [str(folder / "text.train")]
    dev = [str(folder / "text.dev")]
    prepare.prepare(train, dev, str(folder / "corpus"), vocab_size=300)
    return folder / "corpus"


# ------------------------------------------------------------------------------- comparing two runs


def same(a, b) -> bool:
    """Whether two checkpoints' contents are equal bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def read_steps(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without the speed, which no two runs share."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for entry in entries:
        entry.pop("tokens_per_s", None)
    return entries


def differences(uninterrupted: Path, killed: Path) -> list[str]:
    """Name what is not the same in two run folders: checkpoints, their content, metrics."""
    results = []
    expected_names = [path.name for path in checkpoints(uninterrupted)]
    names = [path.name for path in checkpoints(killed)]
    if names != expected_names:
        results.append(f"checkpoints {expected_names} and {names}")
    for name in sorted(set(names) & set(expected_names)):
        a = load_checkpoint(uninterrupted / name)
        b = load_checkpoint(killed / name)
        for key in sorted(a.keys() | b.keys()):
            if key != "settings" and not same(a.get(key), b.get(key)):
                results.append(f"{name}: {key}")
    if read_steps(uninterrupted) != read_steps(killed):
        results.append("metrics.jsonl")
    for part in killed.rglob(".*.part"):
        results.append(f"{part} left behind")
    return results


# ------------------------------------------------------------------------------------- the campaign


def start(backbone: str, corpus: Path, run: Path) -> subprocess.Popen:
    arguments = [
        f"--backbone={backbone}",
        f"--optimizer={OPTIMIZER[backbone]}",
        f"--corpus={corpus}",
        f"--out_dir={run}",
        "--resume",
    ]
    return subprocess.Popen(
        [sys.executable, "train.py", *SETTINGS, *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def lock_time(run: Path) -> int:
    """Return when the lock of a run was last written, 0 before the first time."""
    lock = run / "lock"
    return lock.stat().st_mtime_ns if lock.exists() else 0


def wait_for_moment(moment: str, process: subprocess.Popen, run: Path, seconds: float, rng) -> str:
    """Wait until the process is to be killed, and return what it has printed so far.

    moment: "any time" of the `seconds` that a run takes; "opening": while it writes its first
    files; "training": about a step and its write after a step
    """
    printed = ""
    if moment == "any time":
        time.sleep(rng.uniform(0, seconds))
    if moment == "opening":
        locked = lock_time(run)
        while lock_time(run) == locked and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
    if moment == "training":
        for line in process.stdout:
            printed += line
            if line.startswith("step "):
                time.sleep(rng.expovariate(30))
                break
    return printed


def cut_newest_checkpoint(run: Path, rng: random.Random):
    newest = checkpoints(run)[0]
    newest.write_bytes(newest.read_bytes()[: rng.randrange(newest.stat().st_size)])


def newest_whole_step(run: Path) -> int:
    """Return the step of the newest whole checkpoint, 0 without one."""
    _, content = load_newest(run, warn=lambda text: None)
    return content["step"] if content else 0


def campaign(backbone: str, corpus: Path, folder: Path, kills: int, rng: random.Random) -> Counter:
    """Kill and resume runs until `kills` kills are done and the last run has ended.

    Returns how many kills there were, by the moment that was aimed at and by what they fell into,
    how many runs, and how many checkpoints were cut short.
    Raises SystemExit at any difference.
    """
    # one run that is left alone: what to expect, and how long it takes
    uninterrupted = folder / f"{backbone}_uninterrupted"
    began = time.time()
    process = start(backbone, corpus, uninterrupted)
    printed = process.communicate()[0]
    seconds = time.time() - began
    if process.returncode != 0:
        sys.exit(f"kill.py: train.py ended with {process.returncode}:\n{printed}")

    count = Counter()
    while count["runs"] == 0 or count["kills"] < kills:
        run = folder / f"{backbone}_{count['runs']}"
        kill_until_it_ends(run, backbone, corpus, kills, seconds, rng, count)
        results = differences(uninterrupted, run)
        if results:
            sys.exit(f"kill.py: {run} is not as {uninterrupted}: {'; '.join(results)}")
        count["runs"] += 1
    return count


def kill_until_it_ends(
    run: Path,
    backbone: str,
    corpus: Path,
    kills: int,
    seconds: float,
    rng: random.Random,
    count: Counter,
):
    """Start one run and kill it, again and again, until it ends by itself."""
    expected_step = 0
    while True:
        process = start(backbone, corpus, run)
        moment = "never"
        printed = ""
        if count["kills"] < kills:
            moment = rng.choices(("any time", "opening", "training"), weights=(1, 1, 4))[0]
            printed = wait_for_moment(moment, process, run, seconds, rng)
            process.kill()
        printed += process.communicate()[0]

        # it went on from the newest whole checkpoint, if it came so far
        if f"run {run}, starts" in printed and f"starts at step {expected_step} of" not in printed:
            sys.exit(f"kill.py: {run} was to go on from step {expected_step}:\n{printed}")
        if process.returncode == 0:
            return
        if process.returncode != SIGKILLED:
            sys.exit(f"kill.py: train.py could not go on in {run}:\n{printed}")

        # what did the kill fall into?
        saves = len(list(run.glob(".step_*.part")))
        count["kills"] += 1
        count[f"kills aimed at {moment}"] += 1
        count["inside a save"] += saves
        count["inside another write"] += len(list(run.rglob(".*.part"))) - saves
        if len(checkpoints(run)) > 1 and rng.random() < 0.15:
            cut_newest_checkpoint(run, rng)
            count["checkpoints cut"] += 1
        expected_step = newest_whole_step(run)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="for each backbone (default: 50)")
    parser.add_argument(
        "--backbones",
        nargs="+",
        default=list(OPTIMIZER),
        choices=list(OPTIMIZER),
        help="default: all",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    total = Counter()
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder), n_lines=360)
        for backbone in args.backbones:
            count = campaign(backbone, corpus, Path(folder), args.kills, rng)
            parts = [f"{n} {name}" for name, n in sorted(count.items())]
            print(f"{backbone}: {', '.join(parts)}", flush=True)
            total += count
    print(
        f"{total['kills']} kills, {total['inside a save']} of them inside a save: every run went "
        "on, and ended bit for bit as one that was never killed"
    )


if __name__ == "__main__":
    with clean_exit():
        main()
