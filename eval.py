"""Score a trained model on the zero-shot tasks of BabyLM: minimal pairs and multiple choice.

    python eval.py runs/babylm --task blimp_filtered                # newest checkpoint of a run
    python eval.py runs/babylm --task evaluation_data --limit 50    # all tasks in a folder, a look

A task is a folder of JSON lines, known by their fields: BLiMP and its supplement, EWoK, entity
tracking, COMPS. The model prefers the option to whose tokens it gives the highest probability.
There are three ways to ask it, by what it was trained to do:

    causal    each token given those before it
    masked    each token hidden alone, given all others (pseudo-log-likelihood, Salazar et al. 2020)
    mntp      as masked, but read one position earlier (masked next-token prediction)
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from antlm.checkpoint import LoadedRun, load_run
from antlm.distributed import find_device
from antlm.files import Progress
from antlm.program import clean_exit
from antlm.tokenizer import MASK, START, Tokenizer
from babylm.results import summarize, write_result
from babylm.tasks import Item, fingerprint, read_tasks
from config import UserError, require
from data import OBJECTIVES, find_objectives
from model import Transformer

# ---------------------------------------------------------------------------------- texts to tokens


def encode(
    options: list[tuple[str, int]], tokenizer: Tokenizer, boundary: str, protocol: str, mode: str
) -> tuple[list[np.ndarray], np.ndarray]:
    """Encode options, each a text and the character where its target starts.

    protocol: "2025" puts a start token in front. "2024", after the lm_eval fork of that year, puts
    a space in front of a text without context, too, and in causal mode no start token in front
    of a context.
    Returns the ids of each text and the index of its target's first token, which is the first one
    that ends beyond the target's start.
    """
    # how many bytes of the text each token stands for
    n_bytes = [len(tokenizer.bpe.decode_single_token_bytes(i)) for i in range(tokenizer.vocab_size)]
    n_bytes[START] = 1  # inside a text it stands for a newline
    n_bytes = np.array(n_bytes)

    ids = []
    first = []
    for text, start in options:
        # the two years place the space before a target differently
        if protocol == "2024" and start == 0:
            text = " " + text
        elif protocol == "2024":
            start = len(text[:start].rstrip())

        # a start token, then the text; a token belongs to the target if it ends within it
        row = np.array(tokenizer.encode_text(text, boundary))
        index = 1
        if start > 0:
            ends = n_bytes[row[1:]].cumsum()
            context = len(text[:start].encode())
            index += int(np.searchsorted(ends, context, side="right"))
        if protocol == "2024" and start > 0 and mode == "causal":
            row = row[1:]
            index = max(1, index - 1)  # nothing predicts the very first token
        # texts of their own length each; same_shape sorts them later
        ids.append(row)
        first.append(index)
    return ids, np.array(first)


# ------------------------------------------------------------------------ three ways to ask a model


class Questions(NamedTuple):
    """Rows for the model, the positions where its logits are read, and whose probability counts."""

    tokens: np.ndarray  # (R, L)
    positions: np.ndarray  # (R, K)
    targets: np.ndarray  # (R, K)
    text: np.ndarray  # (R,) which of the N texts a row asks about


def ask_causal(ids: np.ndarray, first: int) -> Questions:
    """Ask for each token from `first` on given those before it. ids: (N, T)"""
    N, T = ids.shape
    # position t predicts token t + 1, and the last token predicts nothing that is asked
    positions = np.tile(np.arange(first - 1, T - 1), (N, 1))
    return Questions(ids[:, :-1], positions, ids[:, first:], np.arange(N))


def ask_masked(ids: np.ndarray, first: int) -> Questions:
    """Ask for each token from `first` on in a row of its own, in which it is hidden. ids: (N, T)"""
    # one row for each token that is asked for: hiding several at once would ask another question
    text, place = np.nonzero((np.arange(ids.shape[1]) >= first) & (ids != MASK))
    tokens = ids[text]
    tokens[np.arange(len(tokens)), place] = MASK
    return Questions(tokens, place[:, None], ids[text, place][:, None], text)


def ask_mntp(ids: np.ndarray, first: int) -> Questions:
    """Ask as ask_masked does, and read the answer one position earlier."""
    # training put the hidden token's target there
    questions = ask_masked(ids, first)
    return questions._replace(positions=questions.positions - 1)


# Objective.mode in data.py names one of these.
MODES = {"causal": ask_causal, "masked": ask_masked, "mntp": ask_mntp}


# ------------------------------------------------------------------------------------------ scoring


@torch.inference_mode()
def log_probs(
    model: Transformer, questions: Questions, *, causal: bool, dtype: torch.dtype
) -> np.ndarray:
    """Return the log-probability in nats of each target, (R, K); the softmax is in float32."""
    device = next(model.parameters()).device
    tokens = torch.from_numpy(questions.tokens).to(device)
    positions = torch.from_numpy(questions.positions).to(device)
    targets = torch.from_numpy(questions.targets).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(tokens, causal=causal, scored=positions)
    # in bfloat16 close options would tie, and a tie says nothing
    logits = logits.float()  # (R, K, V)
    target_logits = logits.gather(-1, targets[..., None])[..., 0]
    return (target_logits - logits.logsumexp(-1)).cpu().numpy()


def same_shape(ids: list[np.ndarray], first: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Group texts of one length and one first target; yield their numbers and that first target.

    Rows of one shape need no padding, and no position passes through the vocabulary head unread.
    The longest come first, so that what does not fit into memory fails at once.
    """
    lengths = np.array([len(row) for row in ids])
    for length in np.unique(lengths)[::-1]:
        for start in np.unique(first[lengths == length]):
            yield np.flatnonzero((lengths == length) & (first == start)), int(start)


def leave_out_start(questions: Questions) -> Questions:
    """Return the rows of a masked mode that ask for another token than the one in front."""
    is_asked = questions.targets[:, 0] != questions.tokens[:, 0]
    return Questions(*(part[is_asked] for part in questions))


def count_targets(ids: list[np.ndarray], first: np.ndarray, skip_start: bool) -> np.ndarray:
    """Return how many tokens of each text are scored: from `first` on, or fewer by start tokens."""
    n_targets = np.array([len(row) for row in ids]) - first
    if skip_start:
        n_targets -= [(row[start:] == row[0]).sum() for row, start in zip(ids, first, strict=True)]
    return n_targets


def score(
    model: Transformer,
    ids: list[np.ndarray],
    first: np.ndarray,
    mode: str,
    names: list[str],
    *,
    mean: bool = False,
    skip_start: bool = False,
    batch_tokens: int = 2048,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Return the log-probability in nats of each text's tokens from `first` on, as float64.

    mode: a key of MODES
    names: of the texts, for errors
    mean: over the tokens of a text, in place of their sum
    skip_start: in the masked modes leave out start tokens within a text, which are its newlines
    batch_tokens: of one forward pass, at most
    dtype: float32, or bfloat16 for autocast
    Raises UserError that starts with a text's name if it has no token to score or more tokens than
    the model can take, or if its score is not finite.
    """
    # refuse what cannot be scored
    skip_start = skip_start and mode != "causal"
    n_targets = count_targets(ids, first, skip_start)
    for name, row, n in zip(names, ids, n_targets, strict=True):
        require(n > 0, f"{name}: a target without a token to score in {mode} mode")
        if model.max_tokens is not None and len(row) > model.max_tokens:
            raise UserError(f"{name}: {len(row)} tokens, but the model takes {model.max_tokens}")

    # ask for one shape of text after another
    total = np.zeros(len(ids))
    done = 0
    progress = Progress(f"scoring, {mode}", int(n_targets.sum()))
    for texts, start in same_shape(ids, first):
        questions = MODES[mode](np.stack([ids[i] for i in texts]), start)
        if skip_start:
            questions = leave_out_start(questions)
        # as many rows at once as batch_tokens allows
        batch_rows = max(1, batch_tokens // questions.tokens.shape[1])
        for a in range(0, len(questions.tokens), batch_rows):
            batch = Questions(*(part[a : a + batch_rows] for part in questions))
            values = log_probs(model, batch, causal=mode == "causal", dtype=dtype)
            asked = texts[batch.text]

            # a comparison with NaN would choose an option all the same
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                name = names[asked[~finite][0]]
                hint = f"broken weights, or overflow of {dtype}"
                raise UserError(f"{name}: score in {mode} mode is not finite; {hint}")

            # in masked mode a text has a row for each token
            np.add.at(total, asked, values.sum(axis=1, dtype=np.float64))
            done += values.size
            progress(done)
    if mean:
        return total / n_targets
    return total


# -------------------------------------------------------------------------------------- the program


def table(task: str, result: dict, modes: list[str]) -> str:
    """Lay out a task's result: percent correct and ties of each group, subset and mode."""
    # what stands in which line; a group that is its only subset has one line
    rows = []
    for group, group_score in result["groups"].items():
        subsets = [name for name, score in result["subsets"].items() if score["group"] == group]
        indent = ""
        if group and subsets != [group]:
            rows.append((group, group_score))
            indent = "  "
        for subset in subsets:
            rows.append((indent + subset, result["subsets"][subset]))
    # the number to quote: subsets count alike, however many items they have
    rows.append((f"macro average of {len(result['subsets'])}", result))

    # columns as wide as their widest entry
    width = max(len(label) for label, _ in [(task, None), *rows])
    head = f"{task:{width}}  items"
    for mode in modes:
        head += f"{mode:>8} ties"
    lines = []
    for label, score in rows:
        line = f"{label:{width}}{score['items']:7}"
        for mode in modes:
            line += f"{score['accuracy'][mode]:8.1f}{score['ties'][mode]:5}"
        lines.append(line)
    rule = "-" * len(head)
    return "\n".join([head, rule, *lines[:-1], rule, lines[-1]])


def result_name(args: argparse.Namespace, step: int) -> str:
    """Name a result after task and step, and after each setting that is not the usual one.

    A quick look then never overwrites a full result.
    """
    parts = ["eval", Path(args.task).resolve().name.removesuffix(".jsonl"), str(step)]
    # only what was asked for by name, so that a plain call has a plain name
    parts += args.mode or []
    if args.protocol != "2025":
        parts.append(args.protocol)
    if args.dtype != "float32":
        parts.append(args.dtype)
    if args.limit > 0:
        parts.append(f"limit{args.limit}")
    return "_".join(parts) + ".json"


def score_tasks(
    items: list[Item], run: LoadedRun, modes: list[str], batch_tokens: int, args: argparse.Namespace
) -> dict[str, dict]:
    """Score each distinct option once, and summarize by task."""
    # where each option stands first, for errors
    source_of = {}
    for item in items:
        for option in item.options:
            source_of.setdefault(option, item.source)
    options = list(source_of)

    # a text that several items share is scored once
    scores_of = {}  # mode: option: score
    for mode in modes:
        ids, first = encode(options, run.tokenizer, run.boundary, args.protocol, mode)
        scores = score(
            run.model,
            ids,
            first,
            mode,
            names=list(source_of.values()),
            mean=args.protocol == "2024" and mode != "causal",
            skip_start=args.protocol == "2024",
            batch_tokens=batch_tokens,
            dtype=getattr(torch, args.dtype),
        )
        scores_of[mode] = dict(zip(options, scores.tolist(), strict=True))
        n_tokens = dict(zip(options, map(len, ids), strict=True))

    # hand the scores back to the items
    results = {}
    for task in dict.fromkeys(item.task for item in items):
        task_items = [item for item in items if item.task == task]
        n_long = 0
        scores = {mode: [] for mode in modes}
        for item in task_items:
            n_long += sum(n_tokens[option] > run.block_size for option in item.options)
            for mode in modes:
                scores[mode].append([scores_of[mode][option] for option in item.options])
        results[task] = {
            "kind": task_items[0].kind,
            "options_sha256": fingerprint(task_items),
            "longer_than_training_rows": n_long,
            **summarize(task_items, scores),
        }
    return results


def evaluate(args: argparse.Namespace):
    """Score what the command line asks for, write the result file and print the tables."""
    require(args.limit >= 0, f"--limit {args.limit}: must be at least 0")
    require(args.batch_tokens >= 0, f"--batch_tokens {args.batch_tokens}: must be at least 0")

    # read the tasks before the model, which takes longer
    items = read_tasks(args.task, args.limit, args.protocol)
    device = find_device(args.device)
    run = load_run(args.run, device)
    backbone = run.model.config.backbone
    print(f"{run.path}: step {run.step} of {run.schedule}, {backbone}; {args.dtype} on {device}")

    # ask in the ways that the model has learnt
    objectives = find_objectives(run.full_schedule, run.path)
    learnt = {OBJECTIVES[name].mode for name in objectives}
    modes = args.mode or [mode for mode in MODES if mode in learnt]
    modes = list(dict.fromkeys(modes))

    # find out now what cannot work later
    out = Path(args.out or run.path.parent / result_name(args, run.step))
    ok = out.parent.is_dir() and not out.is_dir()
    require(ok, f"{out}: cannot be written; --out is a file in a folder that exists")
    # a GPU needs larger batches to be busy
    batch_tokens = args.batch_tokens
    if batch_tokens == 0:
        batch_tokens = 2048 if device.type == "cpu" else 16384

    # score, and keep all on disk before anything is printed
    began = time.time()
    results = score_tasks(items, run, modes, batch_tokens, args)
    result = {
        "checkpoint": str(run.path),
        "step": run.step,
        "schedule": run.schedule,
        "config": run.content["config"],
        "tokenizer_sha256": run.tokenizer.sha256,
        "task": args.task,
        "protocol": args.protocol,
        "modes": modes,
        "limit": args.limit,
        "partial": args.limit > 0,
        "device": device.type,
        "dtype": args.dtype,
        "batch_tokens": batch_tokens,
        "seconds": round(time.time() - began, 1),
        "torch": torch.__version__,
        "macro": {task: entry["accuracy"] for task, entry in results.items()},
        "tasks": results,
    }
    write_result(out, result)
    print_tables(result, run.block_size)
    print(f"every option's score: {out}")


def print_tables(result: dict, block_size: int):
    for task, entry in result["tasks"].items():
        print(f"\n{table(task, entry, result['modes'])}")
        if entry["longer_than_training_rows"]:
            n_long = entry["longer_than_training_rows"]
            print(f"{n_long} options are longer than the {block_size} tokens of a training row")
    # say what makes a number incomparable
    note = f"percent correct, ties share the point, protocol {result['protocol']}"
    if result["partial"]:
        note += f"; PARTIAL: only the first {result['limit']} items of each file"
    print(f"\n{note}")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", help="run folder, or a checkpoint with tokenizer.json beside it")
    add("--task", required=True, help="file of JSON lines, folder of them, or of such folders")
    add("--mode", nargs="+", choices=MODES, help="default: those that the model was trained for")
    add("--protocol", default="2025", choices=("2025", "2024"), help="default: %(default)s")
    add("--limit", type=int, default=0, help="items of each file, 0: all; default: %(default)s")
    add("--out", help="result file; default: eval_TASK_STEP.json beside the checkpoint")
    add(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda", "mps"),
        help="default: %(default)s",
    )
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="default: %(default)s")
    add("--batch_tokens", type=int, default=0, help="0: 2048 on a CPU, else 16384; default: 0")
    try:
        evaluate(parser.parse_args(argv))
    except RuntimeError as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        raise UserError("the memory is full; choose a smaller --batch_tokens") from None


if __name__ == "__main__":
    with clean_exit():
        main()
