"""Speed and memory of training and scoring, against the device's own ceiling and against peers in the same run.

    python tools/bench.py                                          # the published sizes, both objectives, eager
    python tools/bench.py config/babyllama.py --compile=off,on --rows=256  # a GPU, which fewer leave waiting for launches
    python tools/bench.py --peer                                   # beside Hugging Face Llama and a plain LTG-BERT
    python tools/bench.py config/ltg_bert.py --rows=8 --set block_size=512
    python tools/bench.py --scoring blimp_filtered --limit 10      # minimal pairs a second, beside the plain batched way

Every training case lives in a process of its own, so that its peak memory is its own. On a CPU they take turns, round
after round, and with them the ceiling: a machine whose speed drifts treats all alike; a GPU holds one case at a time.
Columns: tokens/s and ms of an optimizer step (median of the rounds), its parts timed with the device idle in between,
peak memory (resident on a CPU, allocated on a GPU), and MFU: the FLOPs that the model needs a second (6 per weight of a
matrix and token, 12 T D per layer and token for attention, the head at scored positions only) over
the ceiling, the rate of plain matrix products of the model's own shapes in the same precision.
"""

import argparse
import itertools
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import config
import eval as evaluation
from antlm.distributed import Processes, has_fast_bfloat16
from antlm.ops import IGNORE
from antlm.optim import guarded_step, make_optimizers
from antlm.tokenizer import MASK, SPECIAL, Tokenizer
from babylm.tasks import read_tasks
from config import UserError
from data import OBJECTIVES, Batches
from model import Transformer
from train import Settings

VOCABULARY = {"babyllama": 16000, "ltg_bert": 16384}  # as published


class HuggingFaceLlama(nn.Module):
    """Peer of BabyLlama: same sizes, logits at every position, the loss summed as ours is."""

    def __init__(self, s: Settings, vocab_size: int):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM
        self.llama = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab_size, hidden_size=s.n_embd, num_hidden_layers=s.n_layer, num_attention_heads=s.n_head,
            intermediate_size=s.n_ff, max_position_embeddings=s.block_size, tie_word_embeddings=s.tied))

    def forward(self, tokens, targets, *, causal, scored=None):
        mask = None if causal else torch.zeros(1, 1, tokens.size(1), tokens.size(1), device=tokens.device)  # all open
        logits = self.llama(tokens, attention_mask=mask).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return loss, (targets != IGNORE).sum()


class PlainLTGBert(nn.Module):
    """Peer of LTG-BERT: our weights, computed as the paper's formulas read and the reference (ltg-bert) goes about it.

    Position keys and queries are looked up for every (i, j), (T, T, D) tensors; attention by explicit softmax and
    dropout; of the head's positions only those with a target.
    """

    def __init__(self, s: Settings, vocab_size: int):
        super().__init__()
        self.model = Transformer(s.model_config(vocab_size))

    def attention(self, block, x, table, index, causal):
        H, p, norm = block.n_head, block.dropout, lambda y: F.layer_norm(y, y.shape[-1:], eps=1e-7)
        h = norm(x)
        q, k = (y.unflatten(-1, (H, -1)) for y in block.qk(h).chunk(2, -1))  # (B, T, H, d)
        positions = F.embedding(index, block.qk(F.dropout(table, p)))  # (T, T, 2D)
        q_pos, k_pos = (y.unflatten(-1, (H, -1)) for y in positions.chunk(2, -1))  # (T, T, H, d)
        scale = (3 * q.size(-1)) ** -0.5
        score = torch.einsum("bihd,bjhd->bhij", q, k * scale) + torch.einsum("bihd,ijhd->bhij", q, k_pos * scale)
        score = score + torch.einsum("bjhd,ijhd->bhij", k * scale, q_pos)
        if causal:
            score = score.masked_fill(torch.ones_like(score[0, 0], dtype=torch.bool).triu(1), float("-inf"))
        weights = F.dropout(score.softmax(-1), p)
        y = torch.einsum("bhij,bjhd->bihd", weights, block.v(h).unflatten(-1, (H, -1))).flatten(-2)
        x = x + F.dropout(block.out_norm(block.out(y)), p)
        up, gate = block.up_gate(norm(x)).chunk(2, -1)
        return x + F.dropout(block.down(norm(up * F.gelu(gate, approximate="tanh"))), p)

    def forward(self, tokens, targets, *, causal, scored=None):
        e, T = self.model.embedding, tokens.size(1)
        x, (table, _) = e(tokens, 0)
        distance = torch.arange(T, device=tokens.device)[:, None] - torch.arange(T, device=tokens.device)
        index = e.buckets[distance.clamp(-e.max_distance, e.max_distance) + e.max_distance]
        for block in self.model.blocks:
            x = self.attention(block, x, table, index, causal)
        chosen = (targets != IGNORE).flatten().nonzero().squeeze(-1)
        logits = self.model.head.vocab(self.model.head(x.flatten(0, 1)[chosen]))
        return F.cross_entropy(logits.float(), targets.flatten()[chosen], reduction="sum"), len(chosen)


PEERS = {"babyllama": ("Hugging Face Llama", HuggingFaceLlama), "ltg_bert": ("plain LTG-BERT", PlainLTGBert)}


def worker(pipe, args: list[str], objective: str, compiled: bool, peer: bool, rows: int, threads: int, device: str,
           bf16: bool):
    """One case: set up, then for every number received run that many steps and send back seconds."""
    torch.set_num_threads(threads)
    s = config.load(Settings, args)
    vocab_size = VOCABULARY[s.backbone]
    # What train.py sets up for a process is part of ours; the peer runs as torch does by itself.
    device, rng = torch.device(device) if peer else Processes(device).device, np.random.default_rng(0)
    model = PEERS[s.backbone][1](s, vocab_size) if peer else Transformer(s.model_config(vocab_size))
    model = model.to(device).train()
    if compiled:
        model.compile(dynamic=False)
    optimizers = make_optimizers(model.model if isinstance(model, PlainLTGBert) else model, s, device)
    ids = rng.integers(4, vocab_size, 1 << 20).astype(np.uint16)
    batches = Batches(ids, vocab_size, s.block_size, rows, 1)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    parts = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)

    def step(number: int, split: bool):
        def lap(part: str):
            nonlocal mark
            if split:
                sync()
                parts[part] += time.perf_counter() - mark
                mark = time.perf_counter()

        mark = time.perf_counter()
        batch = batches.batch(objective, *divmod(number, batches.steps_per_epoch), np.arange(rows), 0.15).to(device)
        lap("data")
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, count = model(**batch, causal=OBJECTIVES[objective].causal)
        lap("forward")
        (loss / count).backward()
        lap("backward")
        guarded_step(optimizers, s.lr, nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        lap("optimizer")

    number = 0
    while (request := pipe.recv()) is not None:
        steps, split = request
        parts = dict.fromkeys(parts, 0.0)
        sync()
        began = time.perf_counter()
        for _ in range(steps):
            step(number, split)
            number += 1
        sync()
        pipe.send((time.perf_counter() - began, parts))
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    head = 1.0 if objective == "CLM" else batches.slots(objective) / s.block_size
    inner = Transformer(s.model_config(vocab_size)) if peer else model
    pipe.send((memory, flops_per_token(inner, s.block_size, head)))


def flops_per_token(model: Transformer, T: int, scored: float) -> float:
    """Floating-point operations of a forward and backward pass per token, a multiply-add counted as two.

    6 per weight of a matrix and token (2 forward, 4 backward), 12 T D per layer for q.k and probabilities.v (PaLM,
    Chowdhery et al. 2022, appendix B). scored: the share of positions that pass through the head. What LTG-BERT's
    position terms need beyond that is not counted.
    """
    c = model.config
    head, blocks = (sum(m.weight.numel() for m in part.modules() if isinstance(m, nn.Linear)) for part in (model.head, model.blocks))
    return 6 * (blocks + scored * head) + 12 * c.n_layer * T * c.n_embd


def ceiling(s: Settings, rows: int, device: torch.device, bf16: bool) -> float:
    """FLOP/s of the blocks' matrix products and their two gradients at the model's own shapes, and nothing else."""
    dtype, n, seconds, work = torch.bfloat16 if bf16 else torch.float32, rows * s.block_size, 0.0, 0
    for width, out in ((s.n_embd, 3 * s.n_embd), (s.n_embd, s.n_embd), (s.n_embd, 2 * s.n_ff), (s.n_ff, s.n_embd)):
        x, w, y = (torch.randn(a, b, device=device, dtype=dtype) for a, b in ((n, width), (width, out), (n, out)))
        products = [(x, w), (y, w.T), (x.T, y)]
        results = [a @ b for a, b in products]  # kept: to page in new memory is not the products' work
        repeat = 20 if device.type == "cuda" else 3
        for lap in range(2):  # the first warms up
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(repeat):
                for (a, b), result in zip(products, results):
                    torch.mm(a, b, out=result)
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = (time.perf_counter() - began) / repeat
        seconds, work = seconds + took, work + 6 * n * width * out
    return work / seconds


def label(file: str, objective: str, compiled: str, peer: str) -> str:
    return f"{peer or Path(file).stem} {objective} {'compiled' if compiled == 'on' else 'eager'}"


def bench_training(a, device: str):
    overrides, context = [f"--{item}" for item in a.set], multiprocessing.get_context("spawn")
    settings, fast = {file: config.load(Settings, [file, *overrides]) for file in a.configs}, has_fast_bfloat16(torch.device(device))
    bf16 = {file: fast if s.precision == "auto" else s.precision == "bfloat16" for file, s in settings.items()}
    cases = [(file, objective, compiled, peer) for file in a.configs for objective in a.objectives.split(",")
             for compiled in a.compile.split(",") for peer in (("", PEERS[settings[file].backbone][0]) if a.peer else ("",))]
    pipes, seconds, parts, ceilings = {}, {case: [] for case in cases}, {case: [] for case in cases}, {file: [] for file in a.configs}
    torch.set_num_threads(a.threads)

    def start(case):
        pipes[case], theirs = context.Pipe()
        file, objective, compiled, peer = case
        context.Process(target=worker, daemon=True, args=(theirs, [file, *overrides], objective, compiled == "on", bool(peer),
                                                          a.rows, a.threads, device, bf16[file])).start()
        theirs.close()  # so that a process that dies is noticed
        pipes[case].send((2, False))  # warm-up, with compilation
        pipes[case].recv()

    def measure(case):
        pipes[case].send((a.steps, False))
        seconds[case].append(pipes[case].recv()[0] / a.steps)
        pipes[case].send((1, True))
        parts[case].append(pipes[case].recv()[1])

    def report(case):
        file, speed, s = case[0], a.rows * settings[case[0]].block_size / statistics.median(seconds[case]), settings[case[0]]
        ms = {name: 1000 * statistics.median(laps[name] for laps in parts[case]) for name in parts[case][0]}
        pipes[case].send(None)
        memory, flops = pipes[case].recv()
        print(f"{label(*case):36} {speed:10,.0f} {1000 * statistics.median(seconds[case]):9.1f} {ms['data']:7.2f} "
              f"{ms['forward']:8.1f} {ms['backward']:8.1f} {ms['optimizer']:7.1f} {memory / 1e9:6.2f} "
              f"{flops * speed / statistics.median(ceilings[file]):5.0%}", flush=True)
        return speed, memory

    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {a.threads} threads"
    print(f"{name}, torch {torch.__version__}, {'bfloat16' if bf16[a.configs[0]] else 'float32'}, "
          f"{a.rows} rows a step, median of {a.rounds} rounds of {a.steps} steps")
    print(f"{'case':36} {'tokens/s':>10} {'ms/step':>9} {'data':>7} {'forward':>8} {'backward':>8} {'optim':>7} {'GB':>6} {'MFU':>5}",
          flush=True)
    results = {}
    # On a CPU what is compared takes turns; more at once might not fit into memory.
    for _, together in itertools.groupby(cases, lambda case: case[:2] if device == "cpu" else case):
        together = list(together)
        for case in together:
            start(case)
        for _ in range(a.rounds):
            file = together[0][0]
            ceilings[file].append(ceiling(settings[file], a.rows, torch.device(device), bf16[file]))
            for case in together:
                measure(case)
        results |= {case: report(case) for case in together}
    for file in a.configs:
        print(f"ceiling of {Path(file).stem}'s shapes: {statistics.median(ceilings[file]) / 1e9:,.0f} GFLOP/s")
    for (file, objective, compiled, peer), (speed, memory) in results.items():
        if peer:
            theirs, (ours, our_memory) = f"{peer} {objective}", results[file, objective, compiled, ""]
            print(f"{label(file, objective, compiled, '')}: {ours / speed:.2f} times {theirs} in {our_memory / memory:.0%} "
                  "of its memory")


# ------------------------------------------------------------------------------------------------------ scoring


@torch.inference_mode()
def plain_scores(model: Transformer, ids: list[np.ndarray], mode: str, batch: int = 64) -> np.ndarray:
    """Sums of log-probabilities the plain batched way (the 2025 pipeline): in given order, padded, logits everywhere."""
    rows, device = [], next(model.parameters()).device
    for text, row in enumerate(ids):  # what to compute, position of the target's logits, target, text
        if mode == "causal":
            rows.append((row[:-1], np.arange(len(row) - 1), row[1:], text))
        for place in range(1, len(row)) if mode == "masked" else ():
            if row[place] >= len(SPECIAL):
                hidden = row.copy()
                hidden[place] = MASK
                rows.append((hidden, np.array([place]), row[[place]], text))
    total = np.zeros(len(ids))
    for a in range(0, len(rows), batch):
        part = rows[a:a + batch]
        lengths = torch.tensor([len(row[0]) for row in part])
        x = torch.zeros(len(part), int(lengths.max()), dtype=torch.int64)
        for i, row in enumerate(part):
            x[i, :len(row[0])] = torch.from_numpy(row[0])
        scores = model(x.to(device), causal=mode == "causal", lengths=lengths.to(device)).float().log_softmax(-1).cpu()
        for i, (_, places, targets, text) in enumerate(part):
            total[text] += scores[i, places, targets].sum().item()
    return total


def bench_scoring(a, device: str):
    torch.set_num_threads(a.threads)
    items = read_tasks(a.scoring, a.limit)
    texts = list(dict.fromkeys(option for item in items for option in item.options))
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {a.threads} threads"
    print(f"{name}, torch {torch.__version__}, float32, {len(items):,} pairs of {a.scoring}, median of {a.rounds} rounds")
    for file in a.configs:
        s = config.load(Settings, [file, *(f"--{item}" for item in a.set)])
        tokenizer = Tokenizer(a.tokenizer or Path(s.corpus) / "tokenizer.json")
        torch.manual_seed(1)
        model = Transformer(s.model_config(tokenizer.vocab_size)).to(device).eval()
        ids, first = evaluation.encode(texts, tokenizer, "line", "2025", "causal")
        for mode in a.modes.split(","):
            seconds, scores = {"ours": [], "plain": []}, {}
            for _ in range(a.rounds):
                for way in seconds:
                    began = time.perf_counter()
                    scores[way] = (plain_scores(model, ids, mode) if way == "plain" else evaluation.score(
                        model, ids, first, mode, [""] * len(ids), batch_tokens=2048 if device == "cpu" else 16384))
                    seconds[way].append(time.perf_counter() - began)
            ours, plain = (len(items) / statistics.median(seconds[way]) for way in ("ours", "plain"))
            print(f"{Path(file).stem} {mode}: {ours:,.1f} pairs/s, {ours / plain:.2f} times the plain way ({plain:,.1f}); "
                  f"largest difference of a score {np.abs(scores['ours'] - scores['plain']).max():.1e}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("configs", nargs="*", default=["config/babyllama.py", "config/ltg_bert.py"])
    add("--objectives", default="CLM,MLM")
    add("--compile", default="off", help="off, on or off,on")
    add("--rows", type=int, default=32, help="rows of one optimizer step, one micro-batch")
    add("--steps", type=int, default=2, help="steps a round")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--peer", action="store_true", help="time each backbone's peer as well (Llama: pip install transformers)")
    add("--set", nargs="*", default=[], help="settings for every config, e.g. --set optimizer=adamw")
    add("--scoring", metavar="TASK", help="time eval.py on this folder of minimal pairs instead of training")
    add("--modes", default="causal,masked", help="of --scoring")
    add("--limit", type=int, default=10, help="pairs of each file to score")
    add("--tokenizer", help="tokenizer.json for --scoring; default: that of the config's corpus")
    a = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        (bench_scoring if a.scoring else bench_training)(a, device)
    except (EOFError, BrokenPipeError):
        sys.exit("bench.py: a case has died, see above; if the system has killed it, memory ran out: try fewer --rows")
    except (UserError, OSError) as e:
        sys.exit(f"bench.py: {e}")


if __name__ == "__main__":
    main()
