"""Train a transformer with causal and masked language modelling in alternating phases.

    python train.py config/quickstart.py                                 # one process, CPU or GPU
    torchrun --standalone --nproc_per_node=8 train.py config/babyllama.py    # one node
    python train.py config/babyllama.py --schedule=24_CLM --out_dir=runs/clm     # any setting below can be a flag
    python train.py config/babyllama.py --resume                         # go on from the newest checkpoint
"""

import ctypes
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import config
from data import DROPOUT, Batches, Corpus, hash64
from antlm.files import DataError
from model import BACKBONES, CheckpointError, ModelConfig, Transformer, checkpoints, load_model, load_newest, save_checkpoint
from antlm.files import write_whole
from schedule import DECAYS, OBJECTIVES, Schedule, parse


@dataclass
class Settings:
    # where from and where to
    corpus: str = "corpora/babylm"  # folder made by prepare.py
    out_dir: str = "runs/babylm"  # folder for checkpoints, metrics and settings
    resume: bool = False  # go on from the newest checkpoint in it
    prepare: tuple = ()  # commands that make the corpus if it is missing, each a Python file with its arguments
    score: str = ""  # minimal pairs that eval.py scores when training ends
    # model
    backbone: str = "babyllama"  # babyllama | ltg_bert
    n_layer: int = 16
    n_head: int = 8
    n_embd: int = 512
    n_ff: int = 1024  # feed-forward width
    tied: bool = False  # output weights = input embedding; LTG-BERT always ties
    dropout: float = 0.0  # 0.1 for LTG-BERT
    n_bucket: int = 32  # LTG-BERT: relative positions fall into 2 * n_bucket - 1 buckets
    max_position: int = 512  # LTG-BERT: distances from here on share a bucket
    # what is learnt
    schedule: str = "4_CLM+16_MLM+4_CLM"  # PHASE+PHASE+...: EPOCHS_OBJECTIVE or EPOCHS_1CLM:15MNTP
    block_size: int = 128  # tokens a row
    batch_rows: int = 256  # rows per optimizer step, over all processes and micro-batches
    micro_rows: int = 64  # rows per forward pass and process at most: bounds the memory, changes only what dropout draws
    mask_start: float = 0.15  # share of tokens that MLM and MNTP hide at the first step; GPT-BERT: 0.3
    mask_end: float = 0.15  # and at the last step; linear in between
    mask_span: float = 1.0  # mean tokens hidden at once; 1 single tokens, 3 the spans of ltg-bert
    seed: int = 1
    # optimizer
    optimizer: str = "adamw"  # adamw | lamb | muon (matrices of the blocks; AdamW for the rest)
    lr: float = 7e-4  # peak; adamw 3e-4 to 2e-3, lamb 1e-2, muon as adamw
    lr_min_ratio: float = 0.1  # share of the peak at the last step
    lr_decay: str = "cosine"  # cosine | linear | constant
    warmup: float = 0.02  # share of all steps
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.1  # not on embeddings, biases and norms
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    skip_nonfinite: int = 0  # steps with a non-finite loss or gradient that may be skipped before the run stops
    # looking at it
    log_every: int = 20  # steps
    eval_every: int = 0  # steps between evaluations on the dev tokens; 0: at the end of each epoch
    eval_rows: int = 512  # rows of the dev tokens, at most
    save_every: int = 500  # steps between checkpoints; each phase end has one too
    keep: int = 2  # newest checkpoints kept, beside those of phase ends
    babylm_rules: bool = False  # BabyLM 2025/26: at most 10 epochs, a checkpoint kept at 1M, 2M ... 10M, 20M ... 100M words
    # machine
    device: str = "auto"  # auto | cpu | cuda | mps
    precision: str = "auto"  # auto | float32 | bfloat16 (autocast; weights stay float32)
    compile: str = "auto"  # auto | on | off

    def check(self):
        """Raise ValueError, which names the settings, for a value or combination that cannot be."""
        self.model_config(vocab_size=1)
        for phase in (phases := parse(self.schedule)):
            if self.batch_rows < (weights := sum(weight for _, weight in phase.mix)):
                raise ValueError(f"batch_rows {self.batch_rows} cannot be shared as {phase}: at least {weights} rows")
        world, T = int(os.environ.get("WORLD_SIZE", 1)), self.block_size
        hides = any(name != "CLM" for phase in phases for name, _ in phase.mix)
        choices = dict(backbone=[*BACKBONES], optimizer=["adamw", "lamb", "muon"], device=["auto", "cpu", "cuda", "mps"],
                       lr_decay=[*DECAYS], precision=["auto", "float32", "bfloat16"], compile=["auto", "on", "off"])
        rules = [
            ("batch_rows micro_rows lr eps log_every eval_rows save_every keep", lambda x: x > 0, "must be greater than 0"),
            ("seed weight_decay clip skip_nonfinite eval_every", lambda x: x >= 0, "must not be negative"),
            (" ".join(name for name in vars(self) if name != "score"),
             lambda x: x not in ("", float("inf"), float("-inf")) and x == x, "must be given, and finite"),
            ("warmup beta1 beta2", lambda x: 0 <= x < 1, "must lie in [0, 1)"),
            *((name, lambda x, of=of: x in of, f"must be one of {', '.join(of)}") for name, of in choices.items()),
            ("block_size", lambda x: x >= 2, "must be at least 2 tokens"),
            ("lr_min_ratio", lambda x: 0 <= x <= 1, "is a share of the peak and must lie in [0, 1]"),
            ("mask_span", lambda x: x >= 1, "must be at least 1 token"),
            ("batch_rows", lambda x: x % world == 0, f"must be a multiple of the {world} processes"),
            ("schedule" * self.babylm_rules, lambda x: sum(phase.epochs for phase in phases) <= 10,
             "has more than the 10 epochs that babylm_rules allow"),
            ("mask_start mask_end" * hides, lambda x: 1 <= x * T <= T - 1,
             f"must hide at least 1 and leave at least 1 of {T} tokens")]
        for name, holds, expected in ((name, *rule) for names, *rule in rules for name in names.split()):
            if not holds(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)!r} {expected}")

    def model_config(self, vocab_size: int) -> ModelConfig:
        return ModelConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in (
            "backbone", "n_layer", "n_head", "n_embd", "n_ff", "tied", "dropout", "n_bucket", "max_position")})


# Settings that may differ when a run goes on; all others would make it a different run.
FREE = {"corpus", "out_dir", "resume", "prepare", "score", "micro_rows", "skip_nonfinite", "log_every", "eval_every",
        "eval_rows", "save_every", "keep", "babylm_rules", "device", "precision", "compile"}


class TrainError(Exception):
    """One line for the user: where the run is, what went wrong, what to do."""


class Processes:
    """This process among those that torchrun started; alone without torchrun."""

    def __init__(self, device: str):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        device = next(d for d in found if found[d]) if device == "auto" else device
        if not found[device]:
            raise config.ConfigError(f"device = {device!r}, but torch finds none; choose cpu or auto")
        self.device = torch.device(device, int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None)
        if device == "cuda":
            torch.cuda.set_device(self.device)
        # A CPU with instructions for it multiplies matrices in bfloat16 up to four times as fast; one without is slower.
        cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
        self.fast_bf16 = any(map(cpu.get, ("avx512_bf16", "amx_bf16"))) or device == "cuda" and torch.cuda.is_bf16_supported(False)
        if device == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            # Memory that glibc gives back, the next step has to page in again: up to a sixth of its time.
            libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
        if self.world > 1:  # small host-side numbers travel by gloo, so that no step waits for the GPU
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=self.fresh_store(),
                                    rank=self.rank, world_size=self.world)

    def fresh_store(self) -> dist.Store:
        """torchrun's store under a name new at each start: after a failure it still holds the addresses of the dead."""
        # Each process asks in a name of its own; the first answers with its own until all have come.
        store, name = next(dist.rendezvous("env://"))[0], uuid4().hex
        if self.rank:
            store.set(f"ask/{self.rank}", name)
            name = store.get(name).decode()
            store.set(f"{name}/{self.rank}", "")
        for rank in range(1, self.world) if self.rank == 0 else ():
            while not store.check([f"{name}/{rank}"]):  # the first to be answered may be dead
                store.set(store.get(f"ask/{rank}").decode(), name)
                time.sleep(0.01)
        return dist.PrefixStore(name, store)

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all processes."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def say(self, *text):
        if self.rank == 0:
            print(*text, flush=True)


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020) as ltg-bert runs it: corrected moments, the trust ratio only where weights decay."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, (beta1, beta2) = group["params"], group["betas"]
            for p in params:
                if not self.state[p]:
                    self.state[p] = dict(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                self.state[p]["step"] += 1
            grads, t = [p.grad for p in params], self.state[params[0]]["step"]
            m, v = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            scale = torch._foreach_div(v, 1 - beta2 ** t)
            torch._foreach_sqrt_(scale)
            torch._foreach_add_(scale, group["eps"])
            update = torch._foreach_div(torch._foreach_div(m, 1 - beta1 ** t), scale)
            if group["weight_decay"]:
                torch._foreach_add_(update, params, alpha=group["weight_decay"])
                weight_norm, update_norm = torch._foreach_norm(params), torch._foreach_norm(update)
                ratio = [torch.where((w > 0) & (u > 0), w / u, 1.0) for w, u in zip(weight_norm, update_norm)]
                torch._foreach_mul_(update, ratio)
            torch._foreach_add_(params, update, alpha=-group["lr"])


def make_optimizers(model: Transformer, s: Settings, device: torch.device) -> list[torch.optim.Optimizer]:
    """One optimizer, or for muon two; matrices decay, embeddings, biases and norms do not."""
    named = dict(model.named_parameters())
    decay = {name: p for name, p in named.items() if p.dim() == 2 and not name.startswith("embedding.")}
    plain = [p for name, p in named.items() if name not in decay]
    optimizers, adam = [], dict(lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps)
    if s.optimizer == "muon":  # for the hidden matrices only (Jordan et al. 2024), with step sizes like AdamW's
        hidden = [decay.pop(name) for name in [*decay] if name.startswith("blocks.")]
        optimizers = [torch.optim.Muon(hidden, lr=s.lr, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw")]
    groups = [dict(params=[*decay.values()], weight_decay=s.weight_decay), dict(params=plain, weight_decay=0.0)]
    if s.optimizer == "lamb":
        return [Lamb(groups, **adam)]
    return optimizers + [torch.optim.AdamW(groups, **adam, fused=device.type != "mps")]


@torch.no_grad()
def update(optimizers: list[torch.optim.Optimizer], lr: float, norm: torch.Tensor):
    """One step of the optimizers; where the norm of the gradient is not finite, the weights stay as they are.

    The device decides, so that the step does not wait for it. Fused AdamW skips such a step as under torch.amp; the
    others take it with a gradient of zero, so that their moments stay finite, and the weights are put back.
    """
    bad = ~norm.isfinite()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if optimizer.param_groups[0].get("fused"):  # what runs: a checkpoint made on another device may have set it
            optimizer.found_inf, params = bad.float(), []
        before = [p.clone() for p in params]
        for p in params:
            p.grad.masked_fill_(bad, 0)
        optimizer.step()
        for p, old in zip(params, before):
            torch.where(bad, old, p, out=p)
        optimizer.zero_grad(set_to_none=True)


def open_run(run: Path, s: Settings, corpus: Corpus, p: Processes):
    """Lock the run folder, write down what this run is -> lock's file; path and content of the newest whole checkpoint."""
    (run / "source" / "config").mkdir(parents=True, exist_ok=True)
    (run / "source" / "antlm").mkdir(exist_ok=True)
    lock, found = open(run / "lock", "ab+", buffering=0), checkpoints(run)
    if p.rank == 0:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when this process dies
        except BlockingIOError:
            raise TrainError(f"{run}: another train.py is at work in it; wait for its end or choose another --out_dir") from None
        except OSError as e:
            p.say(f"{run}: its file system has no locks ({e.strerror}); do not start a second run in it")
        launch = f"{os.uname().nodename} {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID')}".encode()
        if "TORCHELASTIC_RUN_ID" in os.environ and (run / "lock").read_bytes() == launch:  # by the same torchrun
            s.resume = True
            p.say(f"{run}: started again by torchrun, so --resume")
        if found and not s.resume:
            raise TrainError(f"{run}: holds a run already ({found[0].name}); go on with --resume or choose another --out_dir")
        lock.truncate(0)
        lock.write(launch)
        for part in (*run.glob(".*.part"), *run.glob("source/**/.*.part")):  # what a kill cut short
            part.unlink()
    path, content = load_newest(run, p.say)
    if content:
        theirs, ours = asdict(Settings()) | content["settings"], asdict(s)  # an older run lacks newer settings
        for name in sorted(ours.keys() - FREE):
            if theirs[name] != ours[name]:
                raise TrainError(f"{path}: was trained with {name}={theirs[name]!r}, not {ours[name]!r}; "
                                 "a changed setting needs a new --out_dir")
        if (content["tokenizer_sha256"], content["tokens_sha256"]) != (corpus.tokenizer.sha256, corpus.meta["train"]["sha256"]):
            raise TrainError(f"{path}: was trained on another corpus or tokenizer than {corpus.folder}")
    elif path:
        raise TrainError(f"{run}: none of its {len(found)} checkpoints is whole; choose another --out_dir")
    if p.rank == 0:
        here, step, metrics = Path(__file__).parent, content["step"] if content else 0, run / "metrics.jsonl"
        lines = re.finditer(rb'^{"step": (\d+),.*}\n', metrics.read_bytes() if metrics.exists() else b"", re.M)
        write_whole(metrics, lambda f: f.writelines(line[0] for line in lines if int(line[1]) <= step))
        write_whole(run / "settings.json", lambda f: f.write(json.dumps(asdict(s), indent=1).encode()))
        write_whole(run / "tokenizer.json", lambda f: f.write((corpus.folder / "tokenizer.json").read_bytes()))
        for file in (*here.glob("*.py"), *here.glob("config/*.py"), *here.glob("antlm/*.py")):  # a result carries the code that made it
            write_whole(run / "source" / file.relative_to(here), lambda f: f.write(file.read_bytes()))
    return lock, path, content


def to_device(arrays, device: torch.device):
    pin = device.type == "cuda"  # from pinned memory the copy runs behind the GPU's back
    tensors = [None if a is None else torch.from_numpy(a) for a in arrays]
    return [t if t is None else (t.pin_memory() if pin else t).to(device, non_blocking=pin) for t in tensors]


@torch.no_grad()
def evaluate(model: Transformer, dev: Batches, s: Settings, objectives: list[str], p: Processes, autocast) -> dict:
    """Mean dev loss in nats per scored token for each objective, on the same rows each time, by the uncompiled model."""
    model.eval()
    losses, rows = {}, np.arange(p.rank, min(s.eval_rows, dev.n_rows), p.world)
    for objective in objectives:
        sums = np.zeros(2)  # loss and scored tokens
        for i in range(0, len(rows), s.micro_rows):
            tokens, targets, scored = to_device(dev.batch(objective, 0, 0, rows[i:i + s.micro_rows], 0.15), p.device)
            with autocast:
                sums += [x.item() for x in model.forward(tokens, targets, causal=OBJECTIVES[objective], scored=scored)]
        total, count = p.sum(*sums)
        losses[objective] = total / max(1, count)
    model.train()
    return losses


def train(s: Settings):
    p, run = Processes(s.device), Path(s.out_dir)
    for command in s.prepare if p.rank == 0 and not Path(s.corpus).exists() else ():
        p.say(f"python {command}")
        if subprocess.run([sys.executable, *shlex.split(command)]).returncode:
            raise DataError(f"{s.corpus}: was missing, and the command that makes it failed: python {command}")
    p.sum(0)  # the others wait
    corpus = Corpus(s.corpus)
    if len(corpus.train) <= s.block_size:
        raise DataError(f"{s.corpus}: {len(corpus.train)} training tokens do not fill a row of block_size {s.block_size}")

    # What happens at each step is a function of its number, from here on.
    slots = int(np.ceil(max(s.mask_start, s.mask_end) * s.block_size))
    batches = Batches(corpus.train, corpus.vocab_size, s.block_size, s.batch_rows, s.seed, slots, s.mask_span)
    dev = Batches(corpus.dev, corpus.vocab_size, s.block_size, s.eval_rows, 0, int(np.ceil(0.15 * s.block_size)))
    schedule = Schedule(parse(s.schedule), batches.steps_per_epoch, s.lr, s.lr_min_ratio, s.warmup, s.lr_decay,
                        s.mask_start, s.mask_end, corpus.meta["train"]["words"])
    judged = [name for name in OBJECTIVES if name in ("CLM", "MLM") or any(name in dict(x.mix) for x in schedule.phases)]

    torch.manual_seed(s.seed)
    try:
        lock, path, content = open_run(run, s, corpus, p)  # the lock lasts until train returns
        model = load_model(content, name=path) if content else Transformer(s.model_config(corpus.vocab_size))
        optimizers = make_optimizers(model.to(p.device).train(), s, p.device)
        first, skipped = (content["step"], content.get("skipped", 0)) if content else (0, 0)
        for optimizer, state in zip(optimizers, content["optimizer"] if content else ()):
            optimizer.load_state_dict(state)
        if p.sum(first)[0] != first * p.world:
            raise TrainError(f"{run}: not all processes find the same checkpoint in it; it must be one folder for all")
    except (LookupError, TypeError, ValueError, AttributeError) as e:  # of a checkpoint that somebody else has made
        if not checkpoints(run):
            raise  # a mistake in the code
        raise TrainError(f"{run}: its newest checkpoint is not one of this train.py ({type(e).__name__}: {e})") from None
    del content

    bf16 = p.fast_bf16 if s.precision == "auto" else s.precision == "bfloat16"
    compiled = s.compile == "on" or s.compile == "auto" and p.device.type == "cuda"
    if compiled:
        model.compile(dynamic=False)  # in place: keys stay clean, and model.forward stays uncompiled for evaluation
    autocast = torch.autocast(p.device.type, torch.bfloat16, enabled=bf16)
    ddp = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True) if p.world > 1 else model

    name = torch.cuda.get_device_name(p.device) if p.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    p.say(f"{s.backbone}: {sum(q.numel() for q in model.parameters()) / 1e6:.2f} million parameters, "
          f"{corpus.meta['train']['words']:,} words, {len(corpus.train):,} tokens\n"
          f"{s.schedule}: {schedule.epochs} epochs of {schedule.steps_per_epoch} steps of {s.batch_rows} x {s.block_size} tokens\n"
          f"device {p.device} ({name}), {p.world} process(es); precision {'bfloat16 autocast' if bf16 else 'float32'} "
          f"({s.precision}); compile {'on' if compiled else 'off'} ({s.compile}: on for a GPU, off elsewhere)\n"
          f"run {run}, " + (f"resumed after step {first}" if first else "which holds no checkpoint: starts at step 0"))

    stop = []  # signals received; the step in progress is finished and saved first
    def on_signal(number, frame):
        stop.append(number)
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun repeats what the terminal has sent, and kills after 30 s
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    sums = {objective: np.zeros(2) for objective in OBJECTIVES}  # loss and scored tokens since the last line
    pending = []  # steps that the host has not looked at: number, micro-batches, scored tokens, gradient norm and losses
    began, logged, tokens_seen, halt = time.time(), time.time(), 0, 0

    def look():
        """Wait for the device and take up the steps since the last look; raises TrainError."""
        nonlocal skipped
        for number, parts, counts, found in pending:
            norm, *losses = found.tolist()
            if np.isfinite(norm):
                for (objective, *_), loss, count in zip(parts[p.rank::p.world], losses, counts):
                    sums[objective] += loss, count
                continue
            skipped, bad = skipped + 1, np.zeros(len(parts))
            bad[p.rank::p.world] = ~np.isfinite(losses)
            bad = [f"{objective} rows {rows[0]} to {max(rows)}" for (objective, _, rows), n in zip(parts, p.sum(*bad)) if n]
            text = f"step {number}: gradient norm {norm} is not finite" + f", nor the loss of {', '.join(bad)}" * bool(bad)
            if skipped > s.skip_nonfinite:
                raise TrainError(f"{run}: {text}; nothing was saved since the last checkpoint; lower lr or clip, or allow "
                                 "--skip_nonfinite=N such steps")
            p.say(f"{text}; skipped")
        pending.clear()

    def save(done: int):
        """Write a checkpoint of `done` steps; drop all but the newest s.keep and those to be kept for good."""
        look()
        if p.rank == 0:
            save_checkpoint(run / f"step_{done:07}.pt", model, step=done, words=schedule.words(done), skipped=skipped,
                            settings=asdict(s), optimizer=[o.state_dict() for o in optimizers], boundary=corpus.boundary,
                            tokenizer_sha256=corpus.tokenizer.sha256, tokens_sha256=corpus.meta["train"]["sha256"])
            files = {int(path.stem.removeprefix("step_")): path for path in checkpoints(run)}
            for n in [n for n in files if n <= done][s.keep:]:  # later ones are damaged: resume went back before them
                if not (schedule.ends_phase(n - 1) or s.babylm_rules and schedule.reaches_mark(n - 1)):
                    files[n].unlink()

    def record(**entry):
        if p.rank == 0:
            with open(run / "metrics.jsonl", "a") as f:  # anew for each line, so that a folder that is gone is noticed
                f.write(json.dumps(entry) + "\n")

    for step in range(first, schedule.steps):
        epoch, step_in_epoch = schedule.epoch(step)
        phase = schedule.phases[schedule.phase(step)]
        shares, parts = phase.rows(s.batch_rows), phase.micro_batches(s.batch_rows, s.micro_rows, p.world)
        mine, rate = parts[p.rank::p.world], schedule.mask_rate(step)
        micro = [batches.batch(objective, epoch, step_in_epoch, np.array(rows), rate) for objective, _, rows in mine]
        counts = [int((targets != -100).sum()) for _, targets, _ in micro]
        ours = [sum(n for (name, *_), n in zip(mine, counts) if name == objective) for objective, _ in shares]
        halt, *totals = p.sum(len(stop), *ours)
        if halt:  # checked before the step, so that all processes stop at the same one
            break
        # A mix weighs each objective's mean by its share of rows (GPT-BERT); alone, it is the mean over scored tokens.
        weight, losses = {name: n / s.batch_rows / max(1, count) for (name, n), count in zip(shares, totals)}, []
        for (objective, number, _), arrays in zip(mine, micro):
            tokens, targets, scored = to_device(arrays, p.device)
            # Dropout, too, is a function of position.
            torch.manual_seed(int(hash64(s.seed, DROPOUT, step, list(OBJECTIVES).index(objective), number)[0] >> np.uint64(1)))
            with ddp.no_sync() if p.world > 1 and len(losses) + 1 < len(micro) else nullcontext():
                with autocast:
                    loss, _ = ddp(tokens, targets, causal=OBJECTIVES[objective], scored=scored)
                # DDP divides by the number of processes. 0 * loss makes all gradients NaN where the loss is not finite,
                # and with them the norm, which is the same in all processes: so they agree on what to skip.
                (loss * (weight[objective] * p.world + 0 * loss.detach())).backward()
            losses.append(loss.detach())
        norm, lr = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip or float("inf")), schedule.learning_rate(step)
        update(optimizers, lr, norm)
        pending.append((step + 1, parts, counts, torch.stack((norm, *losses))))
        tokens_seen += s.batch_rows * s.block_size

        done = step + 1
        where = dict(step=done, epoch=round(done / schedule.steps_per_epoch, 4), phase=str(phase), words=schedule.words(done))
        if done % s.log_every == 0 or done == schedule.steps or done == first + 1:
            look()
            flat = p.sum(*(x for pair in sums.values() for x in pair))
            losses = {objective: total / n for objective, total, n in zip(sums, flat[::2], flat[1::2]) if n}
            now = time.time()
            speed, left = tokens_seen / (now - logged), (now - began) / (done - first) * (schedule.steps - done)
            p.say(f"step {done}/{schedule.steps}  epoch {done / schedule.steps_per_epoch:.2f}/{schedule.epochs}  {phase}  "
                  + "".join(f"{k} {v:.3f}  " for k, v in losses.items()) + f"skipped {skipped}  " * (skipped > 0)
                  + f"lr {lr:.2e}  {speed:,.0f} tokens/s  {int(left // 60)}:{int(left % 60):02} left")
            record(**where, loss=losses, lr=lr, grad_norm=norm.item() if norm.isfinite() else None, skipped=skipped,
                   mask_rate=rate, tokens_per_s=round(speed))
            sums = {objective: np.zeros(2) for objective in OBJECTIVES}
            tokens_seen, logged = 0, now
        if done % (s.eval_every or schedule.steps_per_epoch) == 0 or done == schedule.steps:
            losses = evaluate(model, dev, s, judged, p, autocast)
            p.say(f"step {done}/{schedule.steps}  dev loss  " + "  ".join(f"{k} {v:.3f}" for k, v in losses.items()))
            if not np.isfinite([*losses.values()]).all():
                raise TrainError(f"{run}: dev loss not finite at step {done}; nothing was saved since the last checkpoint")
            record(**where, dev=losses)
        if done % s.save_every == 0 or schedule.ends_phase(step) or s.babylm_rules and schedule.reaches_mark(step):
            save(done)

    if halt:
        if step > first:
            save(step)
        p.say(f"stopped after step {step}; go on with the same command and --resume:",
              shlex.join([*(arg for arg in sys.argv if arg != "--resume"), "--resume"]))
    p.sum(0)  # none leaves while another is at work
    if not halt:
        p.say(f"trained {run} in {(time.time() - began) / 60:.1f} minutes")
        torch.cuda.empty_cache()  # eval.py may need it
        for arguments in (["--task", s.score], ["--sample", "", "--n", "5"]) if s.score and p.rank == 0 else ():
            p.say("python", shlex.join(command := [os.path.relpath(Path(__file__).with_name("eval.py")), s.out_dir, *arguments]))
            if subprocess.run([sys.executable, *command]).returncode:
                raise TrainError(f"{run}: trained and saved, but the evaluation above failed; repeat it by hand")
    code = 128 + (stop[0] if stop else signal.SIGTERM) if halt else 0
    if halt or p.world > 1:  # to take torch.distributed down aborts one process in fifty (2.13, gloo)
        (os._exit if p.world > 1 else sys.exit)(code)


if __name__ == "__main__":
    try:
        train(s := config.load(Settings, sys.argv[1:]))
        sys.exit()
    except (config.ConfigError, DataError, CheckpointError, TrainError) as e:
        line = e
    except KeyboardInterrupt:  # while it starts; from the first step on signals are handled
        sys.exit(130)
    except OSError as e:
        line = f"{e.filename or s.out_dir}: {e.strerror}; finished checkpoints are whole: mend this, then go on with --resume"
    except torch.OutOfMemoryError:
        line = f"process {os.environ.get('RANK', 0)}: the GPU's memory is full; lower --micro_rows, the batch stays the same"
    except RuntimeError as e:
        if "gloo" not in str(e):
            raise
        line = f"process {os.environ['RANK']}: lost contact with another one; go on from the newest checkpoint with --resume"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # once the first process has said it, torchrun ends the others
    time.sleep(3 * (os.environ.get("LOCAL_RANK", "0") != "0"))
    sys.exit(f"train.py: {line}")
