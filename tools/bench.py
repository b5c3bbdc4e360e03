"""Training speed and memory of both backbones and objectives, against the device's own ceiling and against a peer.

    python tools/bench.py                                        # the published sizes, eager, on what is there
    python tools/bench.py config/babyllama.py --compile=off,on --rows=256
    python tools/bench.py config/babyllama.py --peer             # Hugging Face LlamaForCausalLM in the same run

Every case lives in a process of its own (so its peak memory is its own), and all take turns, round after round, so
that a machine whose speed drifts treats them alike. Columns: tokens/s and ms per optimizer step (median of the
rounds), the parts of a step timed one by one with the device idle in between, peak memory (resident on a CPU,
allocated on a GPU), and MFU: model FLOPs (Transformer.flops_per_token) over the ceiling, which is the rate of plain
matrix products of the model's own shapes on the same device, in the same precision, in the same minute.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch import nn

import config
from data import Batches
from model import IGNORE, Transformer
from schedule import OBJECTIVES
from train import Settings, make_optimizers, to_device

VOCABULARY = {"babyllama": 16000, "ltg_bert": 16384}  # as published


class HuggingFaceLlama(nn.Module):
    """The peer: same sizes, logits at every position, the loss summed as ours is."""

    def __init__(self, s: Settings, vocab_size: int):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM
        self.llama = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab_size, hidden_size=s.n_embd, num_hidden_layers=s.n_layer, num_attention_heads=s.n_head,
            intermediate_size=s.n_ff, max_position_embeddings=s.block_size, tie_word_embeddings=s.tied))

    def forward(self, tokens, targets, *, causal, scored):
        if causal:
            logits = self.llama(tokens).logits
        else:  # all-open 4-D mask, what a user of the library would pass
            mask = torch.zeros(1, 1, tokens.size(1), tokens.size(1), device=tokens.device)
            logits = self.llama(tokens, attention_mask=mask).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return loss, (targets != IGNORE).sum()


def worker(pipe, args: list[str], objective: str, compiled: bool, peer: bool, rows: int, threads: int, device: str):
    """One case: set up, then for every number received run that many steps and send back seconds."""
    torch.set_num_threads(threads)
    s = config.load(Settings, args)
    vocab_size = VOCABULARY[s.backbone]
    device, rng = torch.device(device), np.random.default_rng(0)
    bf16 = device.type == "cuda"
    model = (HuggingFaceLlama(s, vocab_size) if peer else Transformer(s.model_config(vocab_size))).to(device).train()
    if compiled:
        model.compile(dynamic=False)
    optimizers = make_optimizers(model, s, device)
    ids = rng.integers(4, vocab_size, 1 << 20).astype(np.uint16)
    batches = Batches(ids, vocab_size, s.block_size, rows, 1, int(np.ceil(0.15 * s.block_size)))
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
        tokens, targets, scored = to_device(batches.batch(objective, number // batches.steps_per_epoch,
                                                          number % batches.steps_per_epoch, np.arange(rows), 0.15), device)
        lap("data")
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss, count = model(tokens, targets, causal=OBJECTIVES[objective], scored=scored)
        lap("forward")
        (loss / count).backward()
        lap("backward")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the other cases need the room
    memory = torch.cuda.max_memory_allocated() if bf16 else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    head = 1.0 if objective == "CLM" else batches.slots / s.block_size
    flops = None if peer else model.flops_per_token(s.block_size, head)
    pipe.send((memory, flops))


def ceiling(s: Settings, vocab_size: int, rows: int, device: torch.device) -> float:
    """FLOP/s of the model's own matrix products (forward shapes, all positions) and nothing else."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    n, shapes = rows * s.block_size, [(s.n_embd, 4 * s.n_embd, s.n_layer), (s.n_embd, 2 * s.n_ff, s.n_layer),
                                      (s.n_ff, s.n_embd, s.n_layer), (s.n_embd, vocab_size, 1)]
    seconds = work = 0
    for width, out, times in shapes:
        x, w = torch.randn(n, width, device=device, dtype=dtype), torch.randn(width, out, device=device, dtype=dtype)
        y = torch.empty(n, out, device=device, dtype=dtype)
        laps = []
        for _ in range(3):
            torch.mm(x, w, out=y)
        for _ in range(10):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            repeat = 20 if device.type == "cuda" else 1
            for _ in range(repeat):
                torch.mm(x, w, out=y)
            if device.type == "cuda":
                torch.cuda.synchronize()
            laps.append((time.perf_counter() - began) / repeat)
        seconds, work = seconds + times * statistics.median(laps), work + times * 2 * n * width * out
    return work / seconds


def label(file: str, objective: str, compiled: str, peer: bool) -> str:
    name = "Hugging Face Llama" if peer else Path(file).stem
    return f"{name} {objective} {'compiled' if compiled == 'on' else 'eager'}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=["config/babyllama.py", "config/ltg_bert.py"])
    parser.add_argument("--objectives", default="CLM,MLM")
    parser.add_argument("--compile", default="off", help="off, on or off,on")
    parser.add_argument("--rows", type=int, default=32, help="rows of one optimizer step, one micro-batch")
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer", action="store_true", help="time Hugging Face Llama beside every BabyLlama case")
    parser.add_argument("--set", nargs="*", default=[], help="flags for every config, e.g. --set optimizer=adamw")
    a = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    overrides = [f"--{item}" for item in a.set]

    context, cases = multiprocessing.get_context("spawn"), []
    for file in a.configs:
        for peer in (False, True) if a.peer and "llama" in file else (False,):
            for objective in a.objectives.split(","):
                for compiled in a.compile.split(","):
                    pipe, theirs = context.Pipe()
                    process = context.Process(target=worker, daemon=True, args=(
                        theirs, [file, *overrides], objective, compiled == "on", peer, a.rows, a.threads, device))
                    process.start()
                    pipe.send((2, False))  # warm-up, with compilation
                    pipe.recv()
                    cases.append(((file, objective, compiled, peer), pipe, []))
    for _ in range(a.rounds):
        for _, pipe, seconds in cases:
            pipe.send((a.steps, False))
            seconds.append(pipe.recv()[0] / a.steps)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {a.threads} threads"
    print(f"{name}, torch {torch.__version__}, {'bfloat16 autocast' if device == 'cuda' else 'float32'}, "
          f"{a.rows} rows a step, median of {a.rounds} rounds of {a.steps} steps")
    print(f"{'case':40} {'tokens/s':>9} {'ms/step':>8} {'data':>6} {'fwd':>7} {'bwd':>7} {'optim':>6} {'GB':>5} {'MFU':>5}")
    speeds = {}
    torch.set_num_threads(a.threads)
    for (file, objective, compiled, peer), pipe, seconds in cases:
        s = config.load(Settings, [file, *overrides])
        pipe.send((a.steps, True))
        parts = {k: v / a.steps * 1000 for k, v in pipe.recv()[1].items()}
        pipe.send(None)
        memory, flops = pipe.recv()
        median = statistics.median(seconds)
        speed = speeds[file, objective, compiled, peer] = a.rows * s.block_size / median
        mfu = f"{flops * speed / ceiling(s, VOCABULARY[s.backbone], a.rows, torch.device(device)):.0%}" if flops else ""
        print(f"{label(file, objective, compiled, peer):40} {speed:9,.0f} {median * 1000:8.1f} {parts['data']:6.2f} {parts['forward']:7.1f} "
              f"{parts['backward']:7.1f} {parts['optimizer']:6.1f} {memory / 1e9:5.2f} {mfu:>5}", flush=True)
    for (file, objective, compiled, peer), speed in speeds.items():
        if (file, objective, compiled, True) in speeds and not peer:
            print(f"{label(file, objective, compiled, peer)}: "
                  f"{speed / speeds[file, objective, compiled, True]:.2f} times Hugging Face Llama")


if __name__ == "__main__":
    main()
