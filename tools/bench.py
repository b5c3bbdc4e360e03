"""Speed and memory of training and scoring, beside the machine's ceiling and beside peers.

    python tools/bench.py                                  # published sizes, CLM and MLM, eager
    python tools/bench.py --peer --compile off on          # beside other implementations
    python tools/bench.py config/babyllama.py --rows 256   # a GPU waits for launches at fewer rows
    python tools/bench.py --rows 8 --set block_size=512
    python tools/bench.py --scoring blimp_filtered         # minimal pairs a second

Our model and its peer each run in a process of their own, so that their peak memory is theirs, and
take turns with each other and the ceiling: a machine whose speed drifts then treats all alike.

Columns: tokens a second and milliseconds of an optimizer step (medians of the rounds), peak memory
(resident on a CPU, allocated on a GPU), the ceiling, and MFU, the share of the ceiling in use.
The ceiling is the rate of plain matrix products of the model's own shapes in the same precision.
Below each case stands what a step's time went into: matrix products, attention, and the largest of
what is neither, by torch's profiler. There is something to gain where products have a small share.
"""

import argparse
import multiprocessing
import os
import re
import resource
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

if __name__ == "__mp_main__":
    # a case: Ctrl-C, which reaches it too, is for the process that started it and will end it
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import eval as evaluation
from antlm import IGNORE
from antlm.compiling import compile_in_place, missing_for_compile
from antlm.distributed import Processes, find_device, has_fast_bfloat16
from antlm.optim import guarded_step, make_optimizers
from antlm.program import clean_exit
from antlm.tokenizer import MASK, SPECIAL, Tokenizer
from babylm.protocols import DEFAULT_PROTOCOL, PROTOCOLS
from babylm.tasks import read_tasks
from config import UserError, load, require
from data import OBJECTIVES, Batch, Batches
from model import Transformer
from tools.peers import PEERS
from train import Settings

VOCAB_SIZE = 16384  # LTG-BERT's; BabyLlama's 16,000 would make less than 1% of a difference
MASK_RATE = 0.15
# the parts of a step that are told by name; torch's operations on a CPU, kernels on a GPU
PARTS = {
    "attention": r"attention|fmha|flash|cudnn",  # first: kernels of attention are made of cutlass
    "products": r"^aten::(mm|bmm|addmm_?|baddbmm)$|linear_pointwise|mkl_linear|gemm|cutlass|nvjet",
    "compiled loops": r"CompiledFxGraph|triton",
}
N_PARTS = 6  # that are named for a case

# ---------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Case:
    """One thing to time: the model of an override file, or its peer."""

    path: str
    settings: Settings
    objective: str
    compile: str  # off or on
    peer: bool
    device: torch.device

    def __str__(self) -> str:
        name = Path(self.path).stem
        if self.peer:
            name = PEERS[self.settings.backbone].name
        return f"{name} {self.objective}, compile {self.compile}"

    def bfloat16(self) -> bool:
        if self.settings.precision == "auto":
            return has_fast_bfloat16(self.device)
        return self.settings.precision == "bfloat16"


def make_model(case: Case) -> nn.Module:
    settings = case.settings
    # what train.py sets up for a process is part of ours; the peer runs as torch does by itself
    if case.peer:
        model = PEERS[settings.backbone](settings, VOCAB_SIZE)
        if case.compile == "on":
            model.compile(dynamic=False)
    else:
        Processes(case.device.type)
        model = Transformer(settings.model_config(VOCAB_SIZE))
        if case.compile == "on":
            compile_in_place(model, case.device, n_shapes=1)
    return model.to(case.device).train()


def run_case(pipe, case: Case, rows: int, threads: int):
    """Train on random tokens in a process of its own.

    Answers each number received with the seconds that so many steps took, and 0, which ends it,
    with the peak memory in bytes, the FLOPs per token and the parts of a step.
    """
    # the model and what trains it
    torch.set_num_threads(threads)
    settings = case.settings
    model = make_model(case)
    optimizers = make_optimizers(model, settings, case.device)
    rng = np.random.default_rng(0)
    ids = rng.integers(len(SPECIAL), VOCAB_SIZE, 1 << 20).astype(np.uint16)
    batches = Batches(ids, VOCAB_SIZE, settings.block_size, rows, seed=1)

    def train(n: int):
        epoch, step = divmod(n, batches.steps_per_epoch)
        batch = batches.batch(case.objective, epoch, step, np.arange(rows), MASK_RATE)
        train_step(case, model, optimizers, batch)
        return batch

    # time as many steps as are asked for
    done = 0
    while steps := pipe.recv():
        synchronize(case.device)
        began = time.perf_counter()
        for n in range(done, done + steps):
            batch = train(n)
        synchronize(case.device)
        pipe.send(time.perf_counter() - began)
        done += steps

    # the end: what it took
    if case.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with torch.device("meta"):  # a peer's modules have other names: its FLOPs are counted on ours
        counted = Transformer(settings.model_config(VOCAB_SIZE))
    scored = 1.0
    if batch.scored is not None:
        scored = batch.scored.shape[1] / settings.block_size
    flops = flops_per_token(counted, settings.block_size, scored)
    # last, so that the profiler's memory is not counted
    pipe.send((memory, flops, step_parts(partial(train, done), case.device)))


def train_step(case: Case, model: nn.Module, optimizers: list, batch: Batch):
    causal = OBJECTIVES[case.objective].causal
    with torch.autocast(case.device.type, torch.bfloat16, enabled=case.bfloat16()):
        loss, count = model(**batch.to(case.device), causal=causal)
    (loss / count).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    guarded_step(optimizers, case.settings.lr, norm)


def step_parts(step: Callable, device: torch.device) -> list[tuple[str, float]]:
    """Profile one step; returns the parts of its time and their shares, the largest first.

    On a GPU the parts are of the time in which it computes.
    """
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA if device.type == "cuda" else activity.CPU]
    with quiet_stderr(), torch.profiler.profile(activities=activities) as profile:
        step()
        synchronize(device)
    times = Counter()
    for event in profile.key_averages():
        if device.type == "cuda":
            microseconds = event.self_device_time_total
        else:
            microseconds = event.self_cpu_time_total
        times[part_of(event.key)] += microseconds
    total = times.total()
    return [(name, part / total) for name, part in times.most_common()]


@contextmanager
def quiet_stderr():
    """Drop what is written to stderr, where torch's profiler says that it starts and stops."""
    sys.stderr.flush()
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def part_of(name: str) -> str:
    """Return the part of a step that an operation or a GPU's kernel of this name belongs to."""
    for part, pattern in PARTS.items():
        if re.search(pattern, name):
            return part
    return name.removeprefix("aten::")


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def flops_per_token(model: Transformer, T: int, scored: float) -> float:
    """Return the FLOPs of a forward and backward pass per token, a multiply-add counted as two.

    scored: the share of positions that pass through the head
    6 per weight of a matrix (2 forward, 4 backward) and 12 T D per layer for the two products of
    attention (PaLM, Chowdhery et al. 2022, appendix B). LTG-BERT's position terms are not counted.
    """
    config = model.config
    attention = 12 * config.n_layer * T * config.n_embd
    return 6 * (matrix_weights(model.blocks) + scored * matrix_weights(model.head)) + attention


def matrix_weights(part: nn.Module) -> int:
    return sum(m.weight.numel() for m in part.modules() if isinstance(m, nn.Linear))


def ceiling(case: Case, rows: int) -> float:
    """Return the FLOP/s of the matrix products of a block and their gradients, and nothing else."""
    width = case.settings.n_embd
    n_ff = case.settings.n_ff
    n = rows * case.settings.block_size
    kind = {"device": case.device, "dtype": torch.bfloat16 if case.bfloat16() else torch.float32}
    repeats = 20 if case.device.type == "cuda" else 3

    shapes = [(width, 3 * width), (width, width), (width, 2 * n_ff), (n_ff, width)]
    seconds = 0.0
    flops = 0
    for n_in, n_out in shapes:
        x = torch.randn(n, n_in, **kind)
        w = torch.randn(n_in, n_out, **kind)
        y = torch.randn(n, n_out, **kind)
        products = [(x, w), (y, w.T), (x.T, y)]
        # this warms up and pages in the results, which is not the products' work
        results = [a @ b for a, b in products]
        synchronize(case.device)
        began = time.perf_counter()
        for _ in range(repeats):
            for (a, b), result in zip(products, results, strict=True):
                torch.mm(a, b, out=result)
        synchronize(case.device)
        seconds += (time.perf_counter() - began) / repeats
        flops += 6 * n * n_in * n_out
    return flops / seconds


def ask(pipe, steps: int):
    """Return what a case answers to a number of steps; raises UserError if it has died."""
    try:
        pipe.send(steps)
        return pipe.recv()
    except (EOFError, ConnectionError):
        raise UserError("a case has died, see above; if memory ran out, try fewer --rows") from None


def compare(cases: list[Case], args):
    """Let our model and its peer take turns, and print a line for each."""
    # a process each
    context = multiprocessing.get_context("spawn")
    pipes = []
    for case in cases:
        pipe, end = context.Pipe()
        arguments = (end, case, args.rows, args.threads)
        context.Process(target=run_case, args=arguments, daemon=True).start()
        end.close()  # so that a process that dies is noticed
        ask(pipe, 2)  # warm up and compile
        pipes.append(pipe)

    # take turns
    ceilings = []
    seconds = [[] for _ in cases]
    for _ in range(args.rounds):
        ceilings.append(ceiling(cases[0], args.rows))
        for pipe, times in zip(pipes, seconds, strict=True):
            times.append(ask(pipe, args.steps) / args.steps)

    # medians of the rounds
    speeds = []
    peak = statistics.median(ceilings)
    for case, pipe, times in zip(cases, pipes, seconds, strict=True):
        memory, flops, parts = ask(pipe, 0)
        step = statistics.median(times)
        speed = args.rows * case.settings.block_size / step
        line = f"{case!s:36} {speed:10,.0f} {1000 * step:9.1f} {memory / 1e9:6.2f}"
        print(f"{line} {peak / 1e9:9,.0f} {flops * speed / peak:5.0%}")
        shares = ", ".join(f"{name} {share:.0%}" for name, share in parts[:N_PARTS])
        print(f"    {shares}", flush=True)
        speeds.append(speed)
    if len(cases) == 2:
        peer = PEERS[cases[1].settings.backbone]
        print(f"    {speeds[0] / speeds[1]:.2f} times the speed of {peer.name}")


def bench_training(args, device: torch.device):
    print(f"{'case':36} {'tokens/s':>10} {'ms/step':>9} {'GB':>6} {'GFLOP/s':>9} {'MFU':>5}")
    for path in args.configs:
        settings = load_settings(path, args.set)
        with_peer = args.peer and settings.backbone in PEERS
        for objective in args.objectives:
            for compile in args.compile:
                cases = [Case(path, settings, objective, compile, False, device)]
                if with_peer:
                    cases.append(Case(path, settings, objective, compile, True, device))
                compare(cases, args)
        if args.peer and not with_peer:
            print(f"    no peer of {settings.backbone} is known; PEERS in tools/peers.py has them")


# ----------------------------------------------------------------------------------------- scoring


def plain_rows(ids: np.ndarray, mode: str) -> list[tuple[Tensor, Tensor]]:
    """Return tokens (T,) and aligned targets (T,) of each row that scores a text's tokens."""
    text = torch.from_numpy(ids).long()
    if mode == "causal":
        return [(text[:-1], text[1:])]
    rows = []
    for position in range(1, len(text)):  # each token hidden in a row of its own
        tokens = text.clone()
        tokens[position] = MASK
        targets = torch.full_like(text, IGNORE)
        targets[position] = text[position]
        rows.append((tokens, targets))
    return rows


@torch.inference_mode()
def plain_scores(model: Transformer, texts: list[np.ndarray], mode: str, batch_rows: int = 64):
    """Score texts the plain batched way: in the order given, padded, logits at every position.

    texts: ids of each, the first of which is only context
    Returns summed log-probabilities (texts,), as the BabyLM pipeline of 2025 computes them.
    """
    device = next(model.parameters()).device
    rows = []
    for number, ids in enumerate(texts):
        rows += [(number, *row) for row in plain_rows(ids, mode)]

    scores = np.zeros(len(texts))
    for start in range(0, len(rows), batch_rows):
        # pad the rows of a batch to one length
        numbers, tokens, targets = zip(*rows[start : start + batch_rows], strict=True)
        lengths = torch.tensor([len(row) for row in tokens])
        tokens = pad_sequence(tokens, batch_first=True).to(device)
        targets = pad_sequence(targets, batch_first=True, padding_value=IGNORE).to(device)

        logits = model(tokens, causal=mode == "causal", lengths=lengths.to(device))
        losses = F.cross_entropy(logits.float().mT, targets, ignore_index=IGNORE, reduction="none")
        np.subtract.at(scores, list(numbers), losses.sum(-1).cpu().numpy())
    return scores


def our_scores(model: Transformer, texts: list[np.ndarray], mode: str):
    first = np.ones(len(texts), dtype=int)
    names = [f"text {number}" for number in range(len(texts))]
    batch_tokens = 2048 if next(model.parameters()).device.type == "cpu" else 16384
    scores, _ = evaluation.score(model, texts, first, mode, names, batch_tokens=batch_tokens)
    return scores


def bench_scoring(args, device: torch.device):
    """Print how many minimal pairs a second eval.py scores, and how many the plain way does."""
    items = read_tasks([args.scoring], PROTOCOLS[DEFAULT_PROTOCOL].kinds, args.limit).items
    strings = set()
    for item in items:
        strings.update(text for text, _ in item.choice.options)
    strings = sorted(strings)
    for path in args.configs:
        settings = load_settings(path, args.set)
        tokenizer = Tokenizer(Path(settings.corpus) / "tokenizer.json")
        # encode the pairs for a model that has learnt nothing: its scores take as long as any
        texts = [np.array(tokenizer.encode_text(text, "line")) for text in strings]
        torch.manual_seed(1)
        model = Transformer(settings.model_config(tokenizer.vocab_size)).to(device).eval()
        for mode in args.modes:
            # let both ways take turns
            seconds = {our_scores: [], plain_scores: []}
            scores = {}
            for _ in range(args.rounds):
                for way in seconds:
                    began = time.perf_counter()
                    scores[way] = way(model, texts, mode)
                    seconds[way].append(time.perf_counter() - began)
            speed = len(items) / statistics.median(seconds[our_scores])
            plain_speed = len(items) / statistics.median(seconds[plain_scores])
            difference = np.abs(scores[our_scores] - scores[plain_scores]).max()
            print(f"{Path(path).stem} {mode}, {len(items):,} pairs, float32: {speed:,.1f} pairs/s,")
            print(
                f"    {speed / plain_speed:.2f} times the plain way ({plain_speed:,.1f} pairs/s);"
            )
            print(f"    the scores differ by {difference:.1e} at most", flush=True)


# ------------------------------------------------------------------------------------ command line


def load_settings(path: str, overrides: list[str]) -> Settings:
    return load(Settings, [path, *(f"--{override}" for override in overrides)])


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints the program's docstring as it stands and every default."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    published = ["config/babyllama.py", "config/ltg_bert.py"]
    add("configs", nargs="*", default=published, help="override files")
    add(
        "--objectives", nargs="+", default=["CLM", "MLM"], choices=list(OBJECTIVES), help="to train"
    )
    add("--compile", nargs="+", default=["off"], choices=["off", "on"], help="torch.compile")
    add("--peer", action="store_true", help="time each backbone's peer as well")
    add("--rows", type=int, default=32, help="rows of an optimizer step, one micro-batch")
    add("--steps", type=int, default=2, help="steps a round")
    add("--rounds", type=int, default=5, help="medians are of so many")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    add("--set", nargs="*", default=[], help="settings for all, e.g. --set optimizer=adamw")
    add("--scoring", metavar="TASK", help="time eval.py on this folder of pairs, not training")
    add(
        "--modes",
        nargs="+",
        default=["causal", "masked"],
        choices=["causal", "masked"],
        help="of --scoring",
    )
    add("--limit", type=int, default=10, help="pairs of each file to score")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = find_device("auto")
    if "on" in args.compile:
        missing = missing_for_compile(device)
        require(missing is None, f"--compile on needs {missing}; install it, or choose off")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {args.threads} threads, torch {torch.__version__}, {args.rounds} rounds")
    if args.scoring:
        bench_scoring(args, device)
    else:
        bench_training(args, device)


if __name__ == "__main__":
    with clean_exit():
        main()
