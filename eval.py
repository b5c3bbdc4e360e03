"""What a trained checkpoint is worth: minimal pairs and multiple choice scored as in BabyLM, and samples.

    python eval.py runs/babylm --task blimp_filtered                # newest checkpoint of a run, or name a step_*.pt
    python eval.py runs/babylm --task evaluation_data --limit 50    # all tasks in a folder, 50 items of each file
    python eval.py runs/babylm --sample "Once upon a time"

A task is a folder of JSON lines, known by their fields: BLiMP and its supplement, EWoK, entity tracking, COMPS.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import tiktoken
import torch

from antlm.checkpoint import load_run
from antlm.distributed import find_device
from antlm.files import Progress
from antlm.tokenizer import MASK, SPECIAL, START, Tokenizer
from babylm.results import write_result
from babylm.tasks import Item, fingerprint, read_tasks
from config import UserError
from model import Transformer
from sample import print_samples
from schedule import parse

MODES = {"CLM": "causal", "MLM": "masked", "MNTP": "mntp"}  # how to ask a model that was trained with an objective


# ------------------------------------------------------------------------------------------------ reading tasks


# ------------------------------------------------------------------------------------------------------ scoring


def encode(options: list[tuple[str, int]], tokenizer: Tokenizer, boundary: str, protocol: str, mode: str):
    """Ids of every text, and index of its target's first token: the first that ends beyond the target's start.

    protocol "2025": a start token in front. "2024" (the lm_eval fork of that year): a text without a context gets a
    space in front, too; one with a context has no start token in causal mode.
    """
    width = np.array([len(tokenizer.bpe.decode_single_token_bytes(i)) for i in range(tokenizer.vocab_size)])
    width[START] = 1  # inside a text it stands for a newline
    ids, first = [], []
    for text, start in options:
        if protocol == "2024":
            text, start = (text, len(text[:start].rstrip())) if start else (" " + text, 0)
        row, at = np.array(tokenizer.encode_text(text, boundary)), 1
        if start:
            at += int(np.searchsorted(width[row[1:]].cumsum(), len(text[:start].encode()), "right"))
        bare = protocol == "2024" and start > 0 and mode == "causal"
        ids.append(row[1:] if bare else row)
        first.append(max(1, at - bare))
    return ids, np.array(first)


def hide(ids: np.ndarray, first: np.ndarray, mode: str):
    """What masked and mntp mode ask of n texts of one length: rows (N, T) to compute, and what to read from them.

    ids (n, T), first (n,) -> rows and, for each read, sorted by row: row, position, target token, text. A row hides one
    target token; one that several texts share is there once.
    """
    # A start token inside a text is never hidden in training, nor here.
    text, place = np.nonzero((np.arange(ids.shape[1]) >= first[:, None]) & (ids >= len(SPECIAL)))
    token, rows = ids[text, place], ids[text]
    rows[np.arange(len(rows)), place] = MASK
    rows, row = np.unique(rows, axis=0, return_inverse=True)
    row = row.ravel()
    by_row = np.argsort(row, kind="stable")
    return rows, row[by_row], (place - (mode == "mntp"))[by_row], token[by_row], text[by_row]


def share_prefixes(ids: list[np.ndarray], most: int = 8) -> list[tuple[list[int], int]]:
    """Texts in groups of up to `most`, and how many of their first tokens to compute once for the group.

    Groups are neighbours in sorted order, cut where that saves most tokens. What comes after the prefix starts with the
    last token that all share, so that the prefix predicts only tokens that all share.
    """
    rows = [row.tolist() for row in ids]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    common = [next((k for k, (a, b) in enumerate(zip(rows[i], rows[j])) if a != b), min(len(rows[i]), len(rows[j])))
              for i, j in zip(order, order[1:])]
    saved, cut = [0] * (len(rows) + 1), [0] * (len(rows) + 1)
    for end in range(1, len(rows) + 1):
        saved[end], cut[end], shared = saved[end - 1], end - 1, 1 << 60
        for start in range(end - 2, max(-1, end - 1 - most), -1):
            shared = min(shared, common[start])
            gain = saved[start] + (end - start - 1) * (shared - 1)
            if gain > saved[end]:
                saved[end], cut[end] = gain, start
    groups, end = [], len(rows)
    while end:
        members = order[cut[end]:end]
        prefix = min(common[cut[end]:end - 1], default=len(rows[members[0]])) - 1
        groups.append((members, prefix))
        end = cut[end]
    return groups


@torch.inference_mode()
def log_probs(model: Transformer, *arrays: np.ndarray, causal: bool, dtype: torch.dtype, cache: list | None = None):
    """Log-probability in nats of each token at scored[row, slot] of x[row]; the softmax is in float32.

    arrays: x (B, T), scored (B, K), row, slot, token (n,) -> float32 (n,).
    """
    device = next(model.parameters()).device
    x, scored, row, slot, token = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(x, causal=causal, scored=scored, cache=cache)
    logits = logits.float()  # (B, K, V)
    return (logits[row, slot, token] - logits.logsumexp(-1)[row, slot]).cpu().numpy()


def read_masked(model: Transformer, ids: list[np.ndarray], first: np.ndarray, mode: str, batch_tokens: int, dtype):
    """Yield texts and the log-probabilities of one hidden token of each, batch by batch."""
    lengths = np.array([len(row) for row in ids])
    for length in np.unique(lengths)[::-1]:  # longest first: what does not fit into memory fails at once
        group = np.flatnonzero(lengths == length)
        rows, row, position, token, text = hide(np.stack([ids[i] for i in group]), first[group], mode)
        size = max(1, batch_tokens // length)
        for a in range(0, len(rows), size):
            reads = slice(*np.searchsorted(row, (a, a + size)))
            r, scored = row[reads] - a, np.zeros((len(rows[a:a + size]), 1), int)
            scored[r, 0] = position[reads]
            yield group[text[reads]], log_probs(model, rows[a:a + size], scored, r, np.zeros_like(r), token[reads],
                                                causal=False, dtype=dtype)


def read_causal(model: Transformer, ids: list[np.ndarray], first: np.ndarray, mode: str, batch_tokens: int, dtype):
    """Yield texts and the log-probabilities of one target token of each, batch by batch.

    A prefix that texts share is computed once; rows of one length go together, so nothing is padded.
    """
    def read(text: np.ndarray, row: np.ndarray, x: np.ndarray, targets: np.ndarray, start: int, cache: list):
        """Texts (n,) stand in rows (n,) of x (B, L), which follow `start` cached tokens; targets (B, L)."""
        which, column = np.nonzero(start + 1 + np.arange(x.shape[1]) >= first[text][:, None])
        low = column.min(initial=x.shape[1])  # the positions from the batch's first target on
        scored = np.tile(np.arange(low, x.shape[1]), (len(x), 1))
        return text[which], log_probs(model, x, scored, row[which], column - low, targets[row[which], column],
                                      causal=True, dtype=dtype, cache=cache)

    groups, a = sorted(share_prefixes(ids), key=lambda group: (-group[1], len(ids[group[0][-1]]))), 0
    while a < len(groups):  # the longest prefix first: what does not fit into memory fails at once
        prefix = groups[a][1]  # at least 1: each text has a token to score and one before it
        batch = [members for members, p in groups[a:a + max(1, batch_tokens // prefix)] if p == prefix]
        a, cache = a + len(batch), [[] for _ in model.blocks]
        text = np.array([i for members in batch for i in members])
        row = np.repeat(np.arange(len(batch)), [len(members) for members in batch])
        x = np.stack([ids[members[0]][:prefix + 1] for members in batch])
        yield read(text, row, x[:, :-1], x[:, 1:], 0, cache)
        left = np.array([len(ids[i]) for i in text]) - 1 - prefix  # tokens of each text behind the prefix
        for length in np.unique(left[left > 0]):
            these, size = np.flatnonzero(left == length), max(1, batch_tokens // length)
            for part in (these[b:b + size] for b in range(0, len(these), size)):
                x = np.stack([ids[text[i]][prefix:] for i in part])
                own = [[y[torch.from_numpy(row[part]).to(y.device)] for y in layer] for layer in cache]
                yield read(text[part], np.arange(len(part)), x[:, :-1], x[:, 1:], prefix, own)


def score(model: Transformer, ids: list[np.ndarray], first: np.ndarray, mode: str, names: list[str], *,
          mean: bool = False, batch_tokens: int = 2048, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Log-probability in nats of each text's tokens from `first` on, their sum or mean; float64, one a text.

    causal: each token given those before it. masked: each hidden alone, all others visible (Salazar et al. 2020).
    mntp: as masked, read one position earlier. A batch holds at most batch_tokens tokens. bfloat16: autocast. Raises
    UserError that starts with the text's name (names, one a text) where no token is to be scored or a score is not
    finite.
    """
    low = 0 if mode == "causal" else len(SPECIAL)
    count, read = np.array([(row[start:] >= low).sum() for row, start in zip(ids, first)]), 0
    if not count.all():
        raise UserError(f"{names[count.argmin()]}: a target without a token to score in {mode} mode")
    total, progress = np.zeros(len(ids)), Progress(f"scoring, {mode}", count.sum())
    reader = read_causal if mode == "causal" else read_masked
    for text, values in reader(model, ids, first, mode, batch_tokens, dtype):
        if not np.isfinite(values).all():
            name = names[text[~np.isfinite(values)][0]]
            raise UserError(f"{name}: score in {mode} mode is not finite; broken weights, or overflow of {dtype}")
        np.add.at(total, text, values)
        progress(read := read + len(values))
    return total / count if mean else total


def summarize(items: list[Item], scores: dict[str, list[list[float]]]) -> dict:
    """Items, percent correct by mode and ties by mode: of a task, of its groups and of its subsets.

    scores[mode][item][option]. Options that tie for the best score share the point, a half each in a pair. All means
    are unweighted: a subset's over its items, a group's and the task's over its subsets (BabyLM evaluation pipeline).
    """
    def mean(parts: list[dict]) -> dict:
        return {"items": sum(p["items"] for p in parts),
                "accuracy": {m: sum(p["accuracy"][m] for p in parts) / len(parts) for m in scores},
                "ties": {m: sum(p["ties"][m] for p in parts) for m in scores}}

    members, subsets, groups = {}, {}, {}
    for i, item in enumerate(items):
        theirs = {m: scores[m][i] for m in scores}
        share = {m: (s[0] == max(s)) / s.count(max(s)) for m, s in theirs.items()}
        members.setdefault(item.subset, (item.group, []))[1].append({  # the group that its first item names
            "items": 1, "accuracy": {m: 100 * share[m] for m in scores},
            "ties": {m: int(0 < share[m] < 1) for m in scores}, "scores": theirs})
    for subset, (group, parts) in sorted(members.items(), key=lambda x: (x[1][0], x[0])):
        subsets[subset] = mean(parts) | {"group": group, "scores": {m: [p["scores"][m] for p in parts] for m in scores}}
        groups.setdefault(group, []).append(subsets[subset])
    return mean([*subsets.values()]) | {"groups": {g: mean(parts) for g, parts in groups.items()}, "subsets": subsets}


def table(task: str, result: dict, modes: list[str]) -> str:
    lines = []
    for group, entry in result["groups"].items():
        lines += [(group, entry)] if group else []
        lines += [("  " * bool(group) + s, x) for s, x in result["subsets"].items() if x["group"] == group]
    lines.append((f"macro average of {len(result['subsets'])}", result))
    wide = max(len(label) for label, _ in [(task, 0), *lines])
    head = f"{task:{wide}}  items" + "".join(f"{mode:>8} ties" for mode in modes)
    lines = [f"{label:{wide}}{x['items']:7}" + "".join(f"{x['accuracy'][m]:8.1f}{x['ties'][m]:5}" for m in modes)
             for label, x in lines]
    return "\n".join([head, "-" * len(head), *lines[:-1], "-" * len(head), lines[-1]])


# -------------------------------------------------------------------------------------------------- the program


def result_name(args, step: int) -> str:
    """eval_TASK_STEP, and what is not as usual, so that a quick look does not overwrite a full result."""
    parts = ["eval", Path(args.task).resolve().name.removesuffix(".jsonl"), str(step), *(args.mode or [])]
    parts += [x for x in (args.protocol, args.dtype) if x not in ("2025", "float32")]
    return "_".join(parts + [f"limit{args.limit}"] * (args.limit > 0)) + ".json"


def score_tasks(items: list[Item], model: Transformer, content: dict, tokenizer: Tokenizer, modes: list[str], args):
    """Score each distinct option once -> results by task: see summarize, and how many texts outgrow a training row."""
    where = {option: item.source for item in reversed(items) for option in item.options}  # first place of each
    scores, results = {}, {}
    for mode in modes:
        ids, first = encode(list(where), tokenizer, content["boundary"], args.protocol, mode)
        values = score(model, ids, first, mode, list(where.values()), mean=args.protocol == "2024" and mode != "causal",
                       batch_tokens=args.batch_tokens, dtype=getattr(torch, args.dtype))
        scores[mode] = dict(zip(where, values.tolist()))
    long = {option for option, row in zip(where, ids) if len(row) > content["settings"]["block_size"]}
    for task in dict.fromkeys(item.task for item in items):
        its = [item for item in items if item.task == task]
        by_mode = {mode: [[scores[mode][option] for option in item.options] for item in its] for mode in modes}
        results[task] = {"kind": its[0].kind, "options_sha256": fingerprint(its),
                         "longer_than_training_rows": sum(option in long for item in its for option in item.options),
                         **summarize(its, by_mode)}
    return results


def evaluate(args):
    """Do what the command line asks for; raises UserError, UserError, UserError and OSError."""
    for name, low in dict(limit=0, batch_tokens=0, n=1, tokens=1, top_k=0).items():
        if getattr(args, name) < low:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {low}")
    if args.temperature and not 0.01 <= args.temperature <= 100:
        raise UserError(f"--temperature {args.temperature}: must be 0 or lie between 0.01 and 100")
    if not args.task and args.sample is None:
        raise UserError("nothing to do; give --task PATH or --sample TEXT")
    items = read_tasks(args.task, args.limit, args.protocol) if args.task else []
    device = str(find_device(args.device))
    run = load_run(args.run, device)
    path, content, model, tokenizer = run.path, run.content, run.model, run.tokenizer
    schedule, block_size = content["settings"]["schedule"], content["settings"]["block_size"]
    trained = {MODES[name] for phase in parse(schedule) for name, _ in phase.mix}
    print(f"{path}: step {content['step']} of {schedule}, {model.config.backbone}; {args.dtype} on {device}"
          + " (auto: the best that torch finds)" * (args.device == "auto"), flush=True)
    if args.sample is not None:
        print_samples(model, content, tokenizer, args)
        if "causal" not in trained:
            print("note: this model never learnt to predict the next token, its samples mean little")
    if not items:
        return
    modes = list(dict.fromkeys(args.mode or [mode for mode in MODES.values() if mode in trained]))
    out = Path(args.out or path.parent / result_name(args, content["step"]))
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"{out}: cannot be written; --out is a file in a folder that exists")
    began, args.batch_tokens = time.time(), args.batch_tokens or (2048 if device == "cpu" else 16384)
    results = score_tasks(items, model, content, tokenizer, modes, args)
    for task, result in results.items():
        print(f"\n{table(task, result, modes)}")
        if longer := result["longer_than_training_rows"]:
            print(f"{longer} options are longer than the {block_size} tokens of a training row; scored whole")
    print(f"\npercent correct, ties share the point, protocol {args.protocol}"
          + f"; PARTIAL: only the first {args.limit} items of each file" * (args.limit > 0))
    whole = {"checkpoint": str(path), "step": content["step"], "schedule": schedule, "config": content["config"],
             "tokenizer_sha256": tokenizer.sha256, "task": args.task, "protocol": args.protocol, "modes": modes,
             "limit": args.limit, "partial": args.limit > 0, "device": device, "dtype": args.dtype,
             "batch_tokens": args.batch_tokens, "seconds": round(time.time() - began, 1),
             "python": sys.version.split()[0], **{m.__name__: m.__version__ for m in (torch, np, tiktoken)},
             "macro": {task: result["accuracy"] for task, result in results.items()}, "tasks": results}
    write_result(out, whole)
    print(f"every option's score: {out}")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"eval.py: {message}")
    add = parser.add_argument
    add("run", help="run folder, or a checkpoint with tokenizer.json beside it")
    add("--task", help="file of JSON lines, folder of them, or folder of such folders")
    add("--mode", nargs="+", choices=MODES.values(), help="default: one for each objective the model was trained with")
    add("--protocol", default="2025", choices=("2025", "2024"), help="year of the BabyLM evaluation pipeline")
    add("--limit", type=int, default=0, help="only so many items of each file, from its start; 0: all")
    add("--out", help="result file; default: eval_TASK_STEP.json beside the checkpoint")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: autocast")
    add("--batch_tokens", type=int, default=0, help="tokens a batch; 0: 2048 on a CPU, 16384 elsewhere")
    add("--sample", metavar="TEXT", help="continue this text, which may be empty, in causal mode")
    add("--n", type=int, default=5, help="samples")
    add("--tokens", type=int, default=40, help="tokens of a sample, at most")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    add("--top_k", type=int, default=50, help="choose among so many likeliest tokens; 0: all")
    add("--seed", type=int, default=1)
    try:
        evaluate(parser.parse_args(argv))
    except RuntimeError as e:
        if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
            raise
        sys.exit("eval.py: the memory is full; choose a smaller --batch_tokens, or a task of shorter texts")
    except (UserError, OSError) as e:
        sys.exit(f"eval.py: {e}")


if __name__ == "__main__":
    main()
