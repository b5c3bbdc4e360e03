"""Kill training at random moments, resume it, and compare the result with that of a run that was never killed.

    python tests/kill.py --kills 50                          # both backbones; some 4 minutes on one CPU core
    python tests/kill.py --kills 20 --backbones ltg_bert --seed 7

train.py runs as a process of its own on a small corpus made here, in causal, masked and mixed phases with
accumulation, dropout and evaluation, saves after every step, and dies by SIGKILL: while it starts, while it trains,
while it writes. Now and then the newest checkpoint is cut short as well. Whatever has happened, the next start must
find the newest whole checkpoint, and the end must be the same, bit for bit: weights, optimizer, loss of every step.
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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

import prepare
from antlm.checkpoint import checkpoints, load_checkpoint
from config import UserError

SETTINGS = ["--schedule=1_CLM+1_MLM+1_1CLM:2MNTP", "--n_layer=2", "--n_head=2", "--n_embd=64", "--n_ff=96", "--n_bucket=8",
            "--block_size=16", "--batch_rows=24", "--micro_rows=7", "--dropout=0.1", "--lr=3e-3", "--log_every=1",
            "--eval_every=3", "--eval_rows=16", "--save_every=1", "--device=cpu"]
OPTIMIZER = {"babyllama": "adamw", "ltg_bert": "lamb"}


def make_corpus(folder: Path) -> Path:
    """A corpus of some eight steps an epoch with the settings above."""
    rng, words = random.Random(1), "the cat dog bird sees hears follows a child teacher".split()
    for name, n in (("text.train", 180), ("text.dev", 80)):
        (folder / name).write_text("".join(" ".join(rng.choices(words, k=6)) + ".\n" for _ in range(n)))
    prepare.prepare([str(folder / "text.train")], [str(folder / "text.dev")], str(folder / "corpus"), vocab_size=280)
    return folder / "corpus"


def start(backbone: str, corpus: Path, run: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "train.py", *SETTINGS, f"--backbone={backbone}", f"--corpus={corpus}",
                             f"--optimizer={OPTIMIZER[backbone]}", f"--out_dir={run}", "--resume"], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen) -> str:
    said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"kill.py: train.py ended with {process.returncode}:\n{said}")
    return said


def touched(run: Path) -> int:
    return (run / "lock").stat().st_mtime_ns if (run / "lock").exists() else 0


def newest_whole(run: Path) -> int:
    """Step of the newest checkpoint that is whole, 0 without one."""
    for path in checkpoints(run):
        try:
            return load_checkpoint(path)["step"]
        except UserError:
            continue
    return 0


def same(a, b) -> bool:
    """Bit for bit: tensors by their type, shape and bytes."""
    if isinstance(a, torch.Tensor):
        kind, other = ((x.dtype, x.shape, x.requires_grad) for x in (a, b))
        return kind == other and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def differences(whole: Path, killed: Path) -> list[str]:
    """What is not the same in two run folders: checkpoints they hold, their content, metrics of every step."""
    names = [[path.name for path in checkpoints(run)] for run in (whole, killed)]
    found = [] if names[0] == names[1] else [f"checkpoints {names[0]} and {names[1]}"]
    for name in set(names[0]) & set(names[1]):
        a, b = load_checkpoint(whole / name), load_checkpoint(killed / name)
        found += [f"{name}: {key}" for key in a.keys() | b.keys() if key != "settings" and not same(a.get(key), b.get(key))]
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, killed)]
    for entry in sum(lines, []):
        entry.pop("tokens_per_s", None)
    if lines[0] != lines[1]:
        found.append("metrics.jsonl")
    return found + [f"{part} left behind" for part in killed.rglob(".*.part")]


def campaign(backbone: str, corpus: Path, folder: Path, kills: int, rng: random.Random) -> Counter:
    """Kill and resume runs until `kills` kills are done and the last run has ended; SystemExit at any difference.

    -> how many kills there were, by when they were aimed at and by what they fell into; runs; checkpoints cut short.
    """
    count, whole = Counter(), folder / f"{backbone}_whole"
    began = time.time()
    finish(start(backbone, corpus, whole))
    seconds = time.time() - began  # of a whole run, from its start
    while not count["runs"] or count["kills"] < kills:
        run, expected = folder / f"{backbone}_{count['runs']}", None
        while True:
            before = touched(run)
            process, said = start(backbone, corpus, run), ""
            when = "never" if count["kills"] >= kills else rng.choices(("any time", "opening", "training"), (1, 1, 4))[0]
            if when == "any time":
                time.sleep(rng.uniform(0, seconds))
            while when == "opening" and touched(run) == before and process.poll() is None:  # then it writes its first files
                time.sleep(0.001)
            if when == "opening":
                time.sleep(rng.uniform(0, 0.1))
            if when == "training":
                for line in process.stdout:
                    said += line
                    if line.startswith("step "):
                        time.sleep(rng.expovariate(30))  # about a step and its write
                        break
            if when != "never" and process.poll() is None:
                process.kill()
            said += process.communicate()[0]
            if expected is not None and "run " + str(run) in said:
                where = f"resumed after step {expected}\n" if expected else "starts at step 0\n"
                if where not in said:
                    raise SystemExit(f"kill.py: {run} was to go on from step {expected}:\n{said}")
            if process.returncode == 0:
                break
            if process.returncode != -9:
                raise SystemExit(f"kill.py: train.py could not go on in {run}:\n{said}")
            parts = list(run.glob(".step_*.part"))
            count.update({"kills": 1, f"kills aimed at {when}": 1, "inside a save": len(parts),
                          "inside another write": len(list(run.rglob(".*.part"))) - len(parts)})
            if len(checkpoints(run)) > 1 and rng.random() < 0.15:
                newest = checkpoints(run)[0]
                newest.write_bytes(newest.read_bytes()[:rng.randrange(newest.stat().st_size)])
                count["checkpoints cut"] += 1
            expected = newest_whole(run)
        if found := differences(whole, run):
            raise SystemExit(f"kill.py: {run} is not as {whole}: {'; '.join(found)}")
        count["runs"] += 1
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all, shared by the backbones")
    parser.add_argument("--backbones", nargs="+", default=list(OPTIMIZER), choices=list(OPTIMIZER))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng, total = random.Random(args.seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder))
        for i, backbone in enumerate(args.backbones):
            n = args.kills * (i + 1) // len(args.backbones) - args.kills * i // len(args.backbones)
            count = campaign(backbone, corpus, Path(folder), n, rng)
            print(f"{backbone}: " + ", ".join(f"{n} {what}" for what, n in sorted(count.items())), flush=True)
            total += count
    print(f"{total['kills']} kills, {total['inside a save']} of them inside a save: every run went on, and ended bit for bit "
          "as one that was never killed")
