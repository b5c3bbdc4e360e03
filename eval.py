"""What a trained checkpoint is worth: minimal pairs and multiple choice, as BabyLM scores them, and samples.

    python eval.py runs/babylm --task blimp_filtered                # the newest checkpoint of a run, or step_*.pt itself
    python eval.py runs/babylm --task evaluation_data --limit 50    # all tasks in a folder, 50 items of each file
    python eval.py runs/babylm --sample "Once upon a time"

A task is a folder of JSON lines, known by their fields: BLiMP and its supplement, EWoK, entity tracking, COMPS.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch

from data import END, MASK, PAD, SPECIAL, START, DataError, Progress, Tokenizer
from model import CheckpointError, Transformer, checkpoints, generate, load_checkpoint, load_model
from schedule import parse

MODES = {"CLM": "causal", "MLM": "masked", "MNTP": "mntp"}  # how a model trained with an objective is asked


class EvalError(Exception):
    """One line for the user: which file, where, what was expected, what to do."""


# ------------------------------------------------------------------------------------------------ reading tasks


@dataclass
class Item:
    """One choice. An option is its whole text and the character where the target starts; option 0 is right."""

    where: str  # file:line
    subset: str  # the accuracy that it counts in
    group: str  # what its subset belongs to, or nothing
    options: list[tuple[str, int]]


@dataclass
class Task:
    name: str
    kind: str
    items: list[Item]


class Record:
    """A line of a task file; get raises EvalError for a field that is missing or of the wrong type."""

    def __init__(self, line: bytes, where: str):
        self.where = where
        try:
            self.fields = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise EvalError(f"{where}: not JSON in UTF-8 ({e})") from None
        if not isinstance(self.fields, dict):
            raise EvalError(f"{where}: a JSON object was expected, not {type(self.fields).__name__}")

    def get(self, name: str, kind: type = str):
        if name not in self.fields:
            raise EvalError(f"{self.where}: field {name!r} is missing")
        value = self.fields[name]
        if type(value) is not kind:
            raise EvalError(f"{self.where}: field {name!r} must be {kind.__name__}, not {type(value).__name__}")
        return self.text(value, name) if kind is str else value

    def text(self, value, name: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise EvalError(f"{self.where}: field {name!r} must hold text, not {value!r}")
        try:
            value.encode()
        except UnicodeEncodeError as e:
            raise EvalError(f"{self.where}: field {name!r} holds a lone surrogate at character {e.start}") from None
        return value


def blimp(r: Record, file: str) -> Item:
    group = r.get("linguistics_term") if "linguistics_term" in r.fields else ""
    return Item(r.where, file, group, [(r.get("sentence_good"), 0), (r.get("sentence_bad"), 0)])


def ewok(r: Record, file: str) -> Item:  # Context2 is for the line with the contexts swapped; a line compares targets
    context = r.get("Context1")
    r.get("Context2")
    return Item(r.where, r.get("Domain"), "", [(f"{context} {r.get(t)}", len(context)) for t in ("Target1", "Target2")])


def entity_tracking(r: Record, file: str) -> Item:
    prefix, options = r.get("input_prefix"), r.get("options", list)
    if len(options) < 2:
        raise EvalError(f"{r.where}: field 'options' must hold at least 2 texts, not {len(options)}")
    options = [(prefix + r.text(option, "options"), len(prefix)) for option in options]
    return Item(r.where, f"{file}_{r.get('numops', int)}_ops", file, options)


def comps(r: Record, file: str) -> Item:
    prefixes = [r.get("prefix_acceptable"), r.get("prefix_unacceptable")]
    return Item(r.where, file, "", [(f"{p} {r.get('property_phrase')}", len(p) + 1) for p in prefixes])


KINDS = {"sentence_good": blimp, "Target1": ewok, "input_prefix": entity_tracking, "prefix_acceptable": comps}


def read_file(path: Path, limit: int) -> tuple[str, list[Item]]:
    """Kind and first `limit` (0: all) items of a file, kind "" where its first line is of no known one."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise EvalError(f"{path}: cannot be read ({e.strerror})") from None
    lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise EvalError(f"{path}: holds no items; one JSON object a line was expected")
    fields = Record(lines[0][1], f"{path}:{lines[0][0]}").fields
    read = next((KINDS[name] for name in KINDS if name in fields), None)
    if read is None:
        return "", []
    return read.__name__, [read(Record(line, f"{path}:{n}"), path.stem) for n, line in lines[:limit or None]]


def read_tasks(path: str, limit: int = 0) -> list[Task]:
    """Tasks in a file or folder, one for each folder in it that holds task files; raises EvalError."""
    root, tasks, unknown = Path(path), {}, []
    if not root.exists():
        raise EvalError(f"{root}: does not exist; name a folder of .jsonl files, or one of them")
    files = sorted(f for f in root.rglob("*.jsonl") if not f.name.startswith(".")) if root.is_dir() else [root]
    for file in files:
        kind, items = read_file(file, limit)
        if not kind:
            unknown.append(str(file))
            continue
        place = file.parent.relative_to(root).as_posix() if root.is_dir() else "."
        name = place if place != "." else root.resolve().stem
        tasks.setdefault((name, kind), Task(name, kind, [])).items.extend(items)
    if not tasks:
        fields = ", ".join(KINDS)
        raise EvalError(f"{root}: {len(unknown) or 'no'} .jsonl file(s), none with a field of a known task ({fields})")
    if unknown:
        print(f"skipped {len(unknown)} file(s) of no known task: {', '.join(unknown)}", file=sys.stderr)
    names = [name for name, _ in tasks]
    for task in tasks.values():  # two kinds of file in one folder are two tasks
        task.name += f" {task.kind}" if names.count(task.name) > 1 else ""
    return list(tasks.values())


# ------------------------------------------------------------------------------------------------------ scoring


def encode(options: list[tuple[str, int]], tokenizer: Tokenizer, boundary: str, protocol: str, mode: str):
    """Ids of every text and the index of its target's first token, the first that ends beyond the target's start.

    protocol "2025": a start token in front of the text. "2024" (the lm_eval fork of that year): a text that is all
    target gets a space in front; in causal mode a text with a context has no start token.
    """
    width = np.array([1 if i < len(SPECIAL) else len(tokenizer.bpe.decode_single_token_bytes(i))  # bytes; a start
                      for i in range(tokenizer.vocab_size)])                       # token in a text is its newline
    ids, first = [], []
    for text, start in options:
        if protocol == "2024":
            text, start = (text, len(text[:start].rstrip())) if start else (" " + text, 0)
        row = np.array(tokenizer.encode_text(text, boundary))
        at = 1 + int(np.searchsorted(width[row[1:]].cumsum(), len(text[:start].encode()), "right")) if start else 1
        bare = protocol == "2024" and start > 0 and mode == "causal"
        ids.append(row[1:] if bare else row)
        first.append(max(1, at - 1) if bare else at)
    return ids, first


def expand(ids: np.ndarray, first: np.ndarray, mode: str):
    """What a mode asks of n texts of one length: rows (N, T) to compute, and what to read from them.

    ids (n, L), first (n,) -> rows, and for each read, sorted by row: row, position, target token, text. Masked rows
    hide one target token each; a row that several texts share is there once.
    """
    is_target = np.arange(ids.shape[1]) >= first[:, None]
    if mode != "causal":  # the start token of a line within a text is never hidden in training, nor here
        is_target &= ids >= len(SPECIAL)
    text, place = np.nonzero(is_target)
    target = ids[text, place]
    if mode == "causal":
        return ids[:, :-1], text, place - 1, target, text
    rows = ids[text]
    rows[np.arange(len(rows)), place] = MASK
    rows, row = np.unique(rows, axis=0, return_inverse=True)
    by_row = np.argsort(row.reshape(-1), kind="stable")
    return rows, row.reshape(-1)[by_row], (place - (mode == "mntp"))[by_row], target[by_row], text[by_row]


@torch.inference_mode()
def score(model: Transformer, ids: list[np.ndarray], first: list[int], mode: str, names: list[str], *,
          mean: bool = False, batch_tokens: int = 2048, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Log-probability in nats of each text's tokens from `first` on, summed or averaged; float64, one a text.

    causal: each token given those before it. masked: each token hidden alone, all others visible (Salazar et al.
    2020). mntp: as masked, read one position earlier. A batch holds rows of one length, at most batch_tokens tokens,
    so nothing is padded. dtype bfloat16 runs the model in autocast; log-softmax is float32 in any case. Raises
    EvalError with the text's name (names, one a text) where there is nothing to score or a score is not finite.
    """
    device, first = next(model.parameters()).device, np.array(first)
    lengths, total, count = np.array([len(row) for row in ids]), np.zeros(len(ids)), np.zeros(len(ids), int)
    work = lengths if mode == "causal" else lengths * (lengths - first)  # tokens to compute, repeated rows included
    progress, finished = Progress(f"scoring ({mode})", int(work.sum())), 0
    for length in np.unique(lengths)[::-1]:  # longest first: what does not fit fails at once
        group = np.flatnonzero(lengths == length)
        group = group[np.argsort(first[group], kind="stable")]
        rows, row, position, target, text = expand(np.stack([ids[i] for i in group]), first[group], mode)
        count[group] = np.bincount(text, minlength=len(group))
        if not count[group].all():
            raise EvalError(f"{names[group[count[group].argmin()]]}: no token to score in {mode} mode")
        size = max(1, batch_tokens // rows.shape[1])
        for a in range(0, len(rows), size):
            tokens = rows[a:a + size]
            reads = slice(*np.searchsorted(row, (a, a + size)))
            r, at = row[reads] - a, position[reads]
            if mode == "causal":  # all positions from the batch's first target on; few texts of a batch differ there
                scored = np.broadcast_to(np.arange(at.min(), rows.shape[1]), (len(tokens), rows.shape[1] - at.min()))
                slot = at - at.min()
            else:  # one position a row
                scored, slot = np.zeros((len(tokens), 1), int), np.zeros_like(at)
                scored[r, 0] = at
            tokens, scored, r, slot, t = (torch.from_numpy(np.ascontiguousarray(x)).to(device)
                                          for x in (tokens, scored, r, slot, target[reads]))
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = model(tokens, causal=mode == "causal", scored=scored)
            logits = logits.float()  # (B, K, V)
            values = (logits[r, slot, t] - logits.logsumexp(-1)[r, slot]).cpu().numpy()  # of log-softmax
            if not np.isfinite(values).all():
                bad = names[group[text[reads][~np.isfinite(values)][0]]]
                raise EvalError(f"{bad}: its score in {mode} mode is not finite; the weights are broken, or overflow in --dtype")
            np.add.at(total, group[text[reads]], values)
            progress(finished + int(work[group].sum() * min(1, (a + size) / len(rows))))
        finished += int(work[group].sum())
    return total / count if mean else total


def credit(scores: list[float]) -> tuple[float, bool]:
    """Credit of an item whose right option is the first, and was it tied? A tie shares the point: a half for a pair."""
    best = max(scores)
    tied = scores.count(best)
    return (1 / tied, tied > 1) if scores[0] == best else (0.0, False)


def summarize(task: Task, scores: dict[str, list[list[float]]]) -> dict:
    """Percent correct and ties by mode: of each subset, of each group (mean of its subsets) and of the task.

    The task's score is the unweighted mean of its subsets; for entity tracking of its groups (BabyLM 2025).
    """
    subsets, groups = {}, defaultdict(list)
    for i, item in enumerate(task.items):
        s = subsets.setdefault(item.subset, {"group": item.group, "items": 0, "accuracy": dict.fromkeys(scores, 0.0),
                                             "ties": dict.fromkeys(scores, 0)})
        s["items"] += 1
        for mode in scores:
            points, tied = credit(scores[mode][i])
            s["accuracy"][mode] += 100 * points
            s["ties"][mode] += tied
    for s in subsets.values():
        s["accuracy"] = {mode: points / s["items"] for mode, points in s["accuracy"].items()}
        groups[s["group"]].append(s)

    def mean(parts) -> dict:
        return {"items": sum(p["items"] for p in parts), "ties": {m: sum(p["ties"][m] for p in parts) for m in scores},
                "accuracy": {m: math.fsum(p["accuracy"][m] for p in parts) / len(parts) for m in scores}}

    groups = {name: mean(parts) for name, parts in sorted(groups.items())}
    parts = groups if task.kind == "entity_tracking" else subsets
    return {"kind": task.kind, "mean_of": len(parts), **mean(list(parts.values())),
            "groups": groups if set(groups) != {""} else {}, "subsets": dict(sorted(subsets.items()))}


def table(name: str, summary: dict, modes: list[str]) -> str:
    """A task as text: a line a subset, under their group where there are groups, and the mean."""
    rows = []
    for group in summary["groups"] or [""]:
        if group:
            rows.append((group, summary["groups"][group]))
        rows += [("  " * bool(group) + s, x) for s, x in summary["subsets"].items() if x["group"] == group]
    rows.append((f"mean of {summary['mean_of']}", summary))
    wide = max(len(x) for x in (name, *(row[0] for row in rows)))
    head = f"{name:{wide}}  items" + "".join(f"{mode:>8} ties" for mode in modes)
    lines = [f"{label:{wide}} {x['items']:6}" + "".join(f"{x['accuracy'][m]:8.1f}{x['ties'][m]:5}" for m in modes)
             for label, x in rows]
    return "\n".join([head, "-" * len(head), *lines[:-1], "-" * len(head), lines[-1]])


# ------------------------------------------------------------------------------------------------- the program


def load_run(path: str, device: str):
    """Newest whole checkpoint of a run folder, or the one named -> path, content, model, tokenizer; raises EvalError."""
    run = Path(path)
    if not run.exists():
        raise EvalError(f"{run}: does not exist; name a run folder of train.py or a checkpoint in one")
    files = checkpoints(run) if run.is_dir() else [run]
    for file in files:
        try:
            content = load_checkpoint(file)
            break
        except CheckpointError as e:
            if not run.is_dir():
                raise
            print(f"skipped {e}", file=sys.stderr)
    else:
        raise EvalError(f"{run}: {'none of its checkpoints is whole' if files else 'holds no checkpoint (step_*.pt)'}; "
                        "train.py writes them")
    tokenizer = Tokenizer(file.parent / "tokenizer.json")
    try:
        if tokenizer.sha256 != content["tokenizer_sha256"] or tokenizer.vocab_size > content["config"]["vocab_size"]:
            raise EvalError(f"{file.parent}/tokenizer.json: not the tokenizer that {file.name} was trained with (sha256)")
        content["step"], content["boundary"], content["settings"]["block_size"], parse(content["settings"]["schedule"])
        return file, content, load_model(content, device), tokenizer
    except (LookupError, TypeError, ValueError, AttributeError, CheckpointError) as e:
        raise EvalError(f"{file}: not a checkpoint of this train.py ({type(e).__name__}: {e})") from None


def pick_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise EvalError(f"--device {name}: not there; choose cpu or auto") from None
    return name


def sample(model: Transformer, content: dict, tokenizer: Tokenizer, args):
    """Print args.n continuations of a prompt; each ends where a new text would begin."""
    prompt = tokenizer.encode_text(args.sample, content["boundary"])
    stop = prompt[0]
    tokens = torch.tensor([prompt], device=args.device)
    with torch.inference_mode():
        if not model(tokens, causal=True).isfinite().all():
            raise EvalError(f"{args.run}: the model's logits are not finite")
    generator = torch.Generator(args.device).manual_seed(args.seed)
    never = {PAD, END, MASK, START, *range(tokenizer.vocab_size, model.config.vocab_size)} - {stop}  # in no CLM target
    for i in range(args.n):
        new = generate(model, tokens, args.tokens, block_size=content["settings"]["block_size"], stop=stop,
                       temperature=args.temperature, top_k=args.top_k, forbidden=tuple(never), generator=generator)
        print(f"--- {i + 1}\n{args.sample}{tokenizer.decode(new)}")


def score_tasks(model: Transformer, content: dict, tokenizer: Tokenizer, tasks: list[Task], modes: list[str], args):
    """Score every option of every task in each mode -> results by task, scores by mode of each item of each task."""
    if args.protocol == "2024":
        for task in tasks:
            if task.kind not in ("blimp", "ewok"):
                raise EvalError(f"{task.items[0].where}: the 2024 pipeline had no {task.kind}; use --protocol 2025")
    names = {}  # each distinct option and the first place it is found at
    for task in tasks:
        for item in task.items:
            for option in item.options:
                names.setdefault(option, item.where)
    number = {option: i for i, option in enumerate(names)}
    scores, seconds = [{} for _ in tasks], {}
    for mode in modes:
        began = time.time()
        ids, first = encode(list(names), tokenizer, content["boundary"], args.protocol, mode)
        values = score(model, ids, first, mode, list(names.values()), mean=args.protocol == "2024" and mode != "causal",
                       batch_tokens=args.batch_tokens, dtype=getattr(torch, args.dtype)).tolist()
        for task, by_mode in zip(tasks, scores):
            by_mode[mode] = [[values[number[option]] for option in item.options] for item in task.items]
        seconds[mode] = round(time.time() - began, 2)
    results = {}
    for task, by_mode in zip(tasks, scores):
        longer = sum(len(ids[number[option]]) > content["settings"]["block_size"] for i in task.items for option in i.options)
        results[task.name] = summarize(task, by_mode) | {"texts_longer_than_training_rows": longer}
    return results, {task.name: by_mode for task, by_mode in zip(tasks, scores)}, seconds


def run(args):
    if not args.task and args.sample is None:
        raise EvalError("nothing to do; give --task FOLDER or --sample TEXT")
    tasks = read_tasks(args.task, args.limit) if args.task else []
    why = " (auto)" if args.device == "auto" else ""
    args.device = pick_device(args.device)
    args.batch_tokens = args.batch_tokens or (2048 if args.device == "cpu" else 32768)
    path, content, model, tokenizer = load_run(args.run, args.device)
    schedule, block_size = content["settings"]["schedule"], content["settings"]["block_size"]
    trained = {MODES[name] for phase in parse(schedule) for name, _ in phase.mix}
    print(f"{path}: step {content['step']} of {schedule}, {model.config.backbone}, {args.device}{why}, {args.dtype}")
    if args.sample is not None:
        if "causal" not in trained:
            print("note: never trained to predict the next token, so its samples mean little")
        sample(model, content, tokenizer, args)
    if not tasks:
        return
    modes = args.mode or [mode for mode in MODES.values() if mode in trained]
    usual = args.protocol == "2025" and not args.limit and not args.mode and args.dtype == "float32"
    mark = "" if usual else "_" + "_".join([args.protocol, *modes, args.dtype] + [f"limit{args.limit}"] * (args.limit > 0))
    out = Path(args.out or path.parent / f"eval_{Path(args.task).resolve().stem}_{content['step']}{mark}.json")
    if not out.parent.is_dir() or out.is_dir():
        raise EvalError(f"{out}: cannot be written; --out names a file in a folder that exists")
    results, scores, seconds = score_tasks(model, content, tokenizer, tasks, modes, args)
    for name, summary in results.items():
        print(f"\n{table(name, summary, modes)}")
        if longer := summary["texts_longer_than_training_rows"]:
            print(f"{longer} texts are longer than the {block_size} tokens of a training row; scored whole")
    print(f"\nprotocol {args.protocol}; percent correct, a tie counts one half, mean over files"
          + (f"; PARTIAL: the first {args.limit} items of each file" if args.limit else ""))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "tiktoken": tiktoken.__version__}
    result = {"checkpoint": str(path), "step": content["step"], "schedule": schedule, "config": content["config"],
              "tokenizer_sha256": tokenizer.sha256, "task": args.task, "protocol": args.protocol, "modes": modes,
              "limit": args.limit, "partial": args.limit > 0, "device": args.device, "dtype": args.dtype,
              "batch_tokens": args.batch_tokens, "versions": versions, "seconds": seconds,
              "macro": {name: summary["accuracy"] for name, summary in results.items()}, "tasks": results,
              "items": {t.name: [[i.where, i.subset] for i in t.items] for t in tasks}, "scores": scores}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in result.items())
    out.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    print(f"every option's score: {out}")


def at_least(low: float, kind: type = int):
    def convert(text: str):
        if not kind(text) >= low or not math.isfinite(kind(text)):
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {low}")
        return kind(text)
    convert.__name__ = kind.__name__
    return convert


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"eval.py: {message}")
    parser.add_argument("run", help="run folder, or a checkpoint with tokenizer.json beside it")
    parser.add_argument("--task", help="file of JSON lines, folder of them, or folder of such folders")
    parser.add_argument("--mode", nargs="+", choices=MODES.values(), help="default: one for each objective trained with")
    parser.add_argument("--protocol", default="2025", choices=("2025", "2024"), help="of the BabyLM evaluation pipeline")
    parser.add_argument("--limit", type=at_least(0), default=0, help="items of each file, from its start; 0: all")
    parser.add_argument("--out", help="result file; default: eval_TASK_STEP.json beside the checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: autocast")
    parser.add_argument("--batch_tokens", type=at_least(0), default=0, help="tokens a batch; 0: 2048 on CPU, else 32768")
    parser.add_argument("--sample", metavar="TEXT", help="continue this text, which may be empty, in causal mode")
    parser.add_argument("--n", type=at_least(1), default=5, help="samples")
    parser.add_argument("--tokens", type=at_least(1), default=40, help="tokens of a sample, at most")
    parser.add_argument("--temperature", type=at_least(0, float), default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=at_least(0), default=50, help="choose among so many likeliest tokens; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    try:
        run(parser.parse_args(argv))
    except torch.OutOfMemoryError:
        sys.exit("eval.py: the device's memory is full; choose a smaller --batch_tokens")
    except (EvalError, DataError, CheckpointError, OSError) as e:
        sys.exit(f"eval.py: {e}")


if __name__ == "__main__":
    main()
