"""Score a trained model on the zero-shot tasks of the BabyLM challenge.

    python eval.py runs/babylm --task blimp_filtered               # newest checkpoint of a run
    python eval.py runs/babylm --task full_eval --limit 50         # all tasks in a folder, a look
    python eval.py runs/babylm --task full_eval/aoa --checkpoints  # all checkpoints, oldest first

Most tasks are minimal pairs or multiple choice in folders of JSON lines, known by their fields:
BLiMP and its supplement, EWoK, entity tracking, COMPS, GlobalPIQA, wug tests. The model prefers the
option to whose tokens it gives the highest probability. Two compare its surprisal with people:
reading times and the age of acquisition. Which tasks a year of the challenge has, and how it asks,
stands in babylm/protocols.py. There are three ways to ask a model, by what it was trained to do:

    causal    each token given those before it
    masked    each token hidden alone, given all others (pseudo-log-likelihood, Salazar et al. 2020)
    mntp      as masked, but read one position earlier (masked next-token prediction)
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from antlm.checkpoint import WEIGHTS, WEIGHTS_HELP, LoadedRun, checkpoints, load_run
from antlm.distributed import find_device_for_texts, full_memory_in_one_line
from antlm.files import Progress
from antlm.program import clean_exit
from antlm.tokenizer import END, MASK, SPECIAL, START, Tokenizer
from babylm.human import Human, ages_table, read_human, score_human
from babylm.protocols import DEFAULT_PROTOCOL, PROTOCOLS, Protocol
from babylm.results import report, summarize, write_result
from babylm.tasks import Item, Tasks, fingerprint, read_tasks
from config import UserError, require
from data import OBJECTIVES, find_objectives
from model import Transformer

# ---------------------------------------------------------------------------------- texts to tokens


def encode(
    options: list[tuple[str, int]],
    tokenizer: Tokenizer,
    boundary: str,
    protocol: Protocol,
    mode: str,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Encode options, each a text and the character where its target starts.

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
        # the years place the space before a target differently
        if protocol.space_in_front and start == 0:
            text = " " + text
        elif protocol.space_in_front:
            start = len(text[:start].rstrip())

        # a start token, then the text; a token belongs to the target if it ends within it
        row = np.array(tokenizer.encode_text(text, boundary))
        index = 1
        if start > 0:
            ends = n_bytes[row[1:]].cumsum()
            context = len(text[:start].encode())
            index += int(np.searchsorted(ends, context, side="right"))
        if protocol.bare_context and start > 0 and mode == "causal":
            row = row[1:]
            index = max(1, index - 1)  # nothing predicts the very first token
        # texts of their own length each; same_shape sorts them later
        ids.append(row)
        first.append(index)
    return ids, np.array(first)


def apply_template(
    row: np.ndarray, first: int, run: LoadedRun, mode: str
) -> tuple[np.ndarray, int]:
    """Return a text and its first target as an imported model's own tokenizer would have them."""
    # what that lacks falls out of a text; special tokens are none of a text's
    kept = ~np.isin(row, run.absent) | (row < len(SPECIAL))
    kept[0] = run.template["start"]
    first = int(kept[:first].sum())
    row = row[kept]
    if mode != "masked":
        first = max(1, first)  # nothing predicts the very first token
    if run.template["end"] and mode != "causal":
        row = np.append(row, END)
    return row, first


# ------------------------------------------------------------------------ three ways to ask a model


class Questions(NamedTuple):
    """Rows for the model, the positions where its logits are read, and whose probability counts."""

    tokens: np.ndarray  # (R, L)
    positions: np.ndarray  # (R, K)
    targets: np.ndarray  # (R, K)
    text: np.ndarray  # (R,) which of the N texts a row asks about


def is_asked(ids: np.ndarray, first: int, skip_start: bool) -> np.ndarray:
    """Whether a masked mode asks for a token, (N, T) or (T,) as ids: those from `first` on.

    skip_start: not for those that are the start token in front, as newlines may be
    """
    asked = (np.arange(ids.shape[-1]) >= first) & (ids != MASK) & (ids != END)
    if skip_start:
        asked &= ids != ids[..., :1]
    return asked


def ask_causal(ids: np.ndarray, first: int, skip_start: bool = False) -> Questions:
    """Ask for each token from `first` on given those before it. ids: (N, T)"""
    N, T = ids.shape
    # position t predicts token t + 1, and the last token predicts nothing that is asked
    positions = np.tile(np.arange(first - 1, T - 1), (N, 1))
    return Questions(ids[:, :-1], positions, ids[:, first:], np.arange(N))


def ask_masked(ids: np.ndarray, first: int, skip_start: bool = False) -> Questions:
    """Ask for each token from `first` on in a row of its own, in which it is hidden. ids: (N, T)"""
    # one row for each token that is asked for: hiding several at once would ask another question
    text, place = np.nonzero(is_asked(ids, first, skip_start))
    tokens = ids[text]
    tokens[np.arange(len(tokens)), place] = MASK
    return Questions(tokens, place[:, None], ids[text, place][:, None], text)


def ask_mntp(ids: np.ndarray, first: int, skip_start: bool = False) -> Questions:
    """Ask as ask_masked does, and read the answer one position earlier."""
    # training put the hidden token's target there
    questions = ask_masked(ids, first, skip_start)
    return questions._replace(positions=questions.positions - 1)


# Objective.mode in data.py names one of these.
MODES = {"causal": ask_causal, "masked": ask_masked, "mntp": ask_mntp}


# ------------------------------------------------------------------------------------------ scoring


@torch.inference_mode()
def log_probs(
    model: Transformer,
    questions: Questions,
    *,
    causal: bool,
    dtype: torch.dtype,
    absent: Sequence[int] = (),
) -> np.ndarray:
    """Return the log-probability in nats of each target, (R, K); the softmax is in float32.

    absent: tokens that have no probability
    """
    device = next(model.parameters()).device
    tokens = torch.from_numpy(questions.tokens).to(device)
    positions = torch.from_numpy(questions.positions).to(device)
    targets = torch.from_numpy(questions.targets).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(tokens, causal=causal, scored=positions)
    # in bfloat16 close options would tie, and a tie says nothing
    logits = logits.float()  # (R, K, V)
    if absent:
        logits[..., list(absent)] = -torch.inf
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


def score(
    model: Transformer,
    ids: list[np.ndarray],
    first: np.ndarray,
    mode: str,
    names: list[str],
    *,
    skip_start: bool = False,
    absent: Sequence[int] = (),
    batch_tokens: int = 2048,
    dtype: torch.dtype = torch.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-probability in nats of each text's tokens from `first` on, and their number.

    mode: a key of MODES
    names: of the texts, for errors
    skip_start: in the masked modes leave out start tokens within a text, which are its newlines
    absent: tokens that have no probability
    batch_tokens: of one forward pass, at most
    dtype: float32, or bfloat16 for autocast
    Raises UserError that starts with a text's name if it has no token to score or more tokens than
    the model can take, or if its score is not finite.
    """
    # refuse what cannot be scored
    n_targets = np.zeros(len(ids), int)
    for i, (name, row, start) in enumerate(zip(names, ids, first, strict=True)):
        n_targets[i] = len(row) - start
        if mode != "causal":
            n_targets[i] = is_asked(row, start, skip_start).sum()
        require(n_targets[i] > 0, f"{name}: a target without a token to score in {mode} mode")
        if model.max_tokens is not None and len(row) > model.max_tokens:
            raise UserError(f"{name}: {len(row)} tokens, but the model takes {model.max_tokens}")

    # ask for one shape of text after another
    total = np.zeros(len(ids))
    done = 0
    progress = Progress(f"scoring, {mode}", int(n_targets.sum()))
    for texts, start in same_shape(ids, first):
        # as many rows at once as batch_tokens allows
        questions = MODES[mode](np.stack([ids[i] for i in texts]), start, skip_start)
        batch_rows = max(1, batch_tokens // questions.tokens.shape[1])
        for a in range(0, len(questions.tokens), batch_rows):
            batch = Questions(*(part[a : a + batch_rows] for part in questions))
            values = log_probs(model, batch, causal=mode == "causal", dtype=dtype, absent=absent)
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
    return total, n_targets


# -------------------------------------------------------------------------- a model under questions


class Score(NamedTuple):
    """Of one option: the summed log-probability of its target, and numbers of tokens."""

    total: float
    n_targets: int
    n_tokens: int  # of the whole text


@dataclass
class Examiner:
    """A model, and how it is asked.

    protocol: whose questions; modes: keys of MODES
    batch_tokens: of one forward pass, at most; dtype: of the forward passes
    """

    run: LoadedRun
    protocol: Protocol
    modes: list[str]
    batch_tokens: int
    dtype: torch.dtype

    def score(
        self, ids: list[np.ndarray], first: np.ndarray, mode: str, names: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score texts as score() does, with this model and these settings."""
        if self.protocol.own_template and self.run.template:
            texts = zip(ids, first, strict=True)
            texts = [apply_template(row, start, self.run, mode) for row, start in texts]
            ids = [row for row, _ in texts]
            first = np.array([start for _, start in texts])
        return score(
            self.run.model,
            ids,
            first,
            mode,
            names,
            skip_start=self.protocol.skip_start,
            absent=self.run.absent,
            batch_tokens=self.batch_tokens,
            dtype=self.dtype,
        )

    def score_options(self, sources: dict[tuple, str], mode: str) -> dict[tuple, Score]:
        """Score texts, each once. sources: {option, as in Choice: file:line, for errors}"""
        options = list(sources)
        run = self.run
        ids, first = encode(options, run.tokenizer, run.boundary, self.protocol, mode)
        totals, n_targets = self.score(ids, first, mode, list(sources.values()))
        scores = {}
        for option, total, n, row in zip(options, totals.tolist(), n_targets, ids, strict=True):
            scores[option] = Score(total, int(n), len(row))
        return scores


def item_scores(item: Item, scores: dict[tuple, Score], mode: str, protocol: Protocol) -> list:
    """Return the numbers by which the options of an item are compared."""
    options = [scores[option] for option in item.choice.options]
    if item.kind.per_token or (protocol.masked_mean and mode != "causal"):
        return [option.total / option.n_targets for option in options]
    return [option.total for option in options]


def score_choices(items: list[Item], examiner: Examiner) -> dict[str, dict]:
    """Score the options of all items, and summarize by task."""
    # a text that several items share is scored once; errors name the first of them
    sources = {}
    items_of = {}
    for item in items:
        items_of.setdefault(item.task, []).append(item)
        for option in item.choice.options:
            sources.setdefault(option, item.source)
    scores_of = {mode: examiner.score_options(sources, mode) for mode in examiner.modes}

    # hand the scores back to the items
    results = {}
    for task, task_items in items_of.items():
        scores = {}
        for mode, option_scores in scores_of.items():
            scores[mode] = []
            for item in task_items:
                scores[mode].append(item_scores(item, option_scores, mode, examiner.protocol))
        option_scores = scores_of[examiner.modes[0]]
        results[task] = {
            "kind": task_items[0].kind.name,
            "options_sha256": fingerprint(task_items),
            "longer_than_training_rows": count_long(task_items, option_scores, examiner.run),
            **summarize(task_items, scores),
        }
    return results


def count_long(items: list[Item], scores: dict[tuple, Score], run: LoadedRun) -> int:
    """Return how many options are longer than a training row."""
    n_long = 0
    for item in items:
        n_long += sum(scores[option].n_tokens > run.block_size for option in item.choice.options)
    return n_long


# -------------------------------------------------------------------------------------- the program


def result_name(args: argparse.Namespace, step: int) -> str:
    """Name a result after tasks and step, and after each setting that is not the usual one.

    A quick look then never overwrites a full result.
    """
    parts = ["eval"]
    parts += [Path(task).resolve().name.removesuffix(".jsonl") for task in args.task]
    parts.append(str(step))
    # only what was asked for by name, so that a plain call has a plain name
    parts += args.mode or []
    if args.protocol != DEFAULT_PROTOCOL:
        parts.append(args.protocol)
    if args.weights != WEIGHTS[0]:
        parts.append(args.weights)
    if args.dtype != "float32":
        parts.append(args.dtype)
    if args.limit > 0:
        parts.append(f"limit{args.limit}")
    return "_".join(parts) + ".json"


def make_examiner(run: LoadedRun, args: argparse.Namespace, device: torch.device) -> Examiner:
    """Ask in the modes of the command line, or else in those that the model has learnt."""
    objectives = find_objectives(run.full_schedule, run.path)
    learnt = {OBJECTIVES[name].mode for name in objectives}
    modes = args.mode or [mode for mode in MODES if mode in learnt]
    # a GPU needs larger batches to be busy
    batch_tokens = args.batch_tokens
    if batch_tokens == 0:
        batch_tokens = 2048 if device.type == "cpu" else 16384
    return Examiner(
        run,
        PROTOCOLS[args.protocol],
        list(dict.fromkeys(modes)),
        batch_tokens,
        getattr(torch, args.dtype),
    )


def score_checkpoint(
    path: str | Path, tasks: Tasks, human: Human, device: torch.device, args: argparse.Namespace
) -> dict:
    """Score one checkpoint on all tasks, write its result file and print its tables."""
    run = load_run(path, device, args.weights)
    print(f"{run.describe()}; {args.dtype} on {device}")

    # find out now what cannot work later
    out = Path(args.out or run.path.parent / result_name(args, run.step))
    ok = out.parent.is_dir() and not out.is_dir()
    require(ok, f"{out}: cannot be written; --out is a file in a folder that exists")
    words = run.content.get("words")
    if human.children is not None:
        require(words is not None, f"{run.path}: does not say how many words it has seen")

    # score
    began = time.time()
    examiner = make_examiner(run, args, device)
    results = score_choices(tasks.items, examiner)
    human_results = score_human(human, examiner)

    # keep all on disk before anything is printed
    result = {
        "checkpoint": str(run.path),
        "step": run.step,
        "weights": run.weights,
        "words": words,
        "schedule": run.schedule,
        "config": run.content["config"],
        "tokenizer_sha256": run.tokenizer.sha256,
        "task": args.task,
        "protocol": args.protocol,
        "modes": examiner.modes,
        "limit": args.limit,
        "partial": args.limit > 0,
        "device": device.type,
        "dtype": args.dtype,
        "batch_tokens": examiner.batch_tokens,
        "seconds": round(time.time() - began, 1),
        "torch": torch.__version__,
        "macro": {task: entry["accuracy"] for task, entry in results.items()},
        "tasks": results,
        "human": human_results,
    }
    write_result(out, result)
    print(f"\n{report(result, run.block_size)}")
    print(f"every option's score: {out}")
    return result


def evaluate(args: argparse.Namespace):
    """Score what the command line asks for."""
    require(args.limit >= 0, f"--limit {args.limit}: must be at least 0")
    require(args.batch_tokens >= 0, f"--batch_tokens {args.batch_tokens}: must be at least 0")
    require(not (args.checkpoints and args.out), "--out names one file: leave --checkpoints out")
    paths = [args.run]
    if args.checkpoints:
        paths = checkpoints(Path(args.run))[::-1]  # the oldest first
        require(paths, f"{args.run}: holds no checkpoint (step_*.pt of train.py)")

    # read the tasks before the model, which takes longer
    protocol = PROTOCOLS[args.protocol]
    tasks = read_tasks(args.task, protocol.kinds, args.limit)
    for path in (tasks.reading, tasks.words):
        ok = protocol.human or path is None
        require(ok, f"{path}: the challenge of {args.protocol} does not have it; leave it out")
    human = read_human(tasks, args.limit, ages=args.checkpoints)

    device = find_device_for_texts(args.device)
    results = [score_checkpoint(path, tasks, human, device, args) for path in paths]
    if human.children is not None:
        for mode in MODES:
            # a schedule may have got longer, and early checkpoints have not learnt the later modes
            if all(mode in result["modes"] for result in results):
                print(f"\n{ages_table(results, human, Path(args.run), mode)}")
        if args.limit > 0:
            print(f"PARTIAL: only the first {args.limit} words in context")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", help="run folder, or a checkpoint with tokenizer.json beside it")
    add(
        "--task",
        required=True,
        nargs="+",
        help="files of the challenge, folders of them, or folders of such folders",
    )
    add(
        "--checkpoints",
        action="store_true",
        help="score every checkpoint of the run, oldest first; age of acquisition needs it",
    )
    add("--mode", nargs="+", choices=MODES, help="default: those that the model was trained for")
    add("--protocol", default=DEFAULT_PROTOCOL, choices=PROTOCOLS, help="default: %(default)s")
    add("--weights", default=WEIGHTS[0], choices=WEIGHTS, help=WEIGHTS_HELP)
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
    args = parser.parse_args(argv)
    with full_memory_in_one_line("choose a smaller --batch_tokens"):
        evaluate(args)


if __name__ == "__main__":
    with clean_exit():
        main()
