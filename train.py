"""Train a transformer with causal and masked language modelling in alternating phases.

    python train.py config/quickstart.py                                 # one process, CPU or GPU
    torchrun --standalone --nproc_per_node=8 train.py config/babyllama.py    # one node
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/ltg_bert.py
    python train.py config/babyllama.py --schedule=24_CLM --out_dir=runs/clm     # any setting below can be a flag
    python train.py config/babyllama.py --resume                         # go on from the newest checkpoint
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import config
from data import DROPOUT, Batches, Corpus, DataError, hash64
from model import (BACKBONES, CheckpointError, ModelConfig, Transformer, checkpoints, load_checkpoint, load_model,
                   save_checkpoint)
from schedule import DECAYS, OBJECTIVES, Schedule, parse


@dataclass
class Settings:
    # where from and where to
    corpus: str = "corpora/babylm"  # folder made by data.py
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
    micro_rows: int = 64  # rows per forward pass and process at most: bounds the memory, changes no result
    mask_start: float = 0.15  # share of tokens that MLM and MNTP hide at the first step; GPT-BERT: 0.3
    mask_end: float = 0.15  # and at the last step; linear in between
    mask_span: float = 1.0  # mean tokens hidden at once; 1 single tokens, 3 the spans of ltg-bert
    seed: int = 1
    # optimizer
    optimizer: str = "adamw"  # adamw | lamb | muon (matrices of the blocks; AdamW for the rest)
    lr: float = 7e-4  # peak; adamw 3e-4 to 2e-3, lamb 1e-2, muon as adamw
    lr_min: float = 0.1  # share of the peak at the last step
    lr_decay: str = "cosine"  # cosine | linear | constant
    warmup: float = 0.02  # share of all steps
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.1  # not on embeddings, biases and norms
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    # looking at it
    log_every: int = 20  # steps
    eval_every: int = 0  # steps between evaluations on the dev tokens; 0: at the end of each epoch
    eval_rows: int = 512  # rows of the dev tokens, at most
    save_every: int = 500  # steps between checkpoints; each phase end has one too
    keep: int = 2  # newest checkpoints kept, beside those of phase ends
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
        world = int(os.environ.get("WORLD_SIZE", 1))
        rules = [(name, getattr(self, name) > 0, "must be greater than 0") for name in
                 ("batch_rows", "micro_rows", "lr", "eps", "log_every", "eval_rows", "save_every", "keep")]
        rules += [(name, getattr(self, name) >= 0, "must not be negative") for name in
                  ("seed", "weight_decay", "clip", "eval_every")]
        rules += [(name, value not in ("", float("inf"), float("-inf")) and value == value, "must be given, and finite")
                  for name, value in vars(self).items() if name != "score"]
        rules += [(name, 0 <= getattr(self, name) < 1, "must lie in [0, 1)") for name in ("warmup", "beta1", "beta2")]
        rules += [(name, getattr(self, name) in choices, f"must be one of {', '.join(choices)}") for name, choices in
                  dict(backbone=list(BACKBONES), optimizer=["adamw", "lamb", "muon"], lr_decay=list(DECAYS),
                       device=["auto", "cpu", "cuda", "mps"], precision=["auto", "float32", "bfloat16"],
                       compile=["auto", "on", "off"]).items()]
        rules += [("seed", self.seed < 1 << 63, "must be below 2 ** 63"),
                  ("block_size", self.block_size >= 2, "must be at least 2 tokens"),
                  ("lr_min", 0 <= self.lr_min <= 1, "is a share of lr and must lie in [0, 1]"),
                  ("mask_span", self.mask_span >= 1, "must be at least 1 token"),
                  ("batch_rows", self.batch_rows % world == 0, f"must be a multiple of the {world} processes")]
        if any(name != "CLM" for phase in phases for name, _ in phase.mix):
            rules += [(name, 1 <= getattr(self, name) * self.block_size <= self.block_size - 1,
                       f"must hide at least 1 and leave at least 1 of {self.block_size} tokens")
                      for name in ("mask_start", "mask_end")]
        for name, holds, expected in rules:
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)!r} {expected}")

    def model_config(self, vocab_size: int) -> ModelConfig:
        return ModelConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in (
            "backbone", "n_layer", "n_head", "n_embd", "n_ff", "tied", "dropout", "n_bucket", "max_position")})


# Settings that may differ when a run goes on; all others would make it a different run.
FREE = {"corpus", "out_dir", "resume", "prepare", "score", "micro_rows", "log_every", "eval_every", "eval_rows",
        "save_every", "keep", "device", "precision", "compile"}


class TrainError(Exception):
    """One line for the user: where the run is, what went wrong, what to do."""


class Processes:
    """This process among those that torchrun started; alone without torchrun."""

    def __init__(self, device: str):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise config.ConfigError("device = 'cuda', but torch sees no GPU; choose cpu or auto")
        self.device = torch.device(device, local) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:  # small host-side numbers travel by gloo, so that no step waits for the GPU
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all processes."""
        if self.world == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def say(self, *text):
        if self.rank == 0:
            print(*text, flush=True)


# ----------------------------------------------------------------------------------------------- optimizers


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020) as ltg-bert runs it: corrected moments, the trust ratio only where weights decay."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads, (beta1, beta2) = [p.grad for p in params], group["betas"]
            for p in params:
                if not self.state[p]:
                    self.state[p] = dict(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                self.state[p]["step"] += 1
            if not params:
                continue
            t = self.state[params[0]]["step"]
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
    decay = [p for name, p in named.items() if p.dim() == 2 and not name.startswith("embedding.")]
    plain = [p for name, p in named.items() if p.dim() != 2 or name.startswith("embedding.")]
    betas, optimizers = (s.beta1, s.beta2), []
    if s.optimizer == "muon":  # for the hidden matrices only (Jordan et al. 2024), with step sizes like AdamW's
        hidden = [p for name, p in named.items() if p.dim() == 2 and name.startswith("blocks.")]
        optimizers = [torch.optim.Muon(hidden, lr=s.lr, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw")]
        decay = [p for p in decay if not any(p is q for q in hidden)]
    groups = [dict(params=decay, weight_decay=s.weight_decay), dict(params=plain, weight_decay=0.0)]
    if s.optimizer == "lamb":
        return [Lamb(groups, lr=s.lr, betas=betas, eps=s.eps)]
    return optimizers + [torch.optim.AdamW(groups, lr=s.lr, betas=betas, eps=s.eps, fused=device.type != "mps")]


# ------------------------------------------------------------------------------------------- the run folder


def open_run(s: Settings, corpus: Corpus, p: Processes) -> dict | None:
    """Make the run folder, or find in it what to go on from -> content of the newest whole checkpoint, or None."""
    run, found, content = Path(s.out_dir), checkpoints(s.out_dir), None
    if found and not s.resume:
        raise TrainError(f"{run}: holds a run already ({found[0].name}); go on with --resume or choose another --out_dir")
    for path in found:
        try:
            content = load_checkpoint(path)
            break
        except CheckpointError as e:
            p.say(f"skipped {e}")
    if content:
        theirs, ours = content["settings"], asdict(s)
        for name in sorted(ours.keys() - FREE):
            if theirs.get(name) != ours[name]:
                raise TrainError(f"{path}: was trained with {name}={theirs.get(name)!r}, not {ours[name]!r}; "
                                 "a changed setting needs a new --out_dir")
        if content["tokenizer_sha256"] != corpus.tokenizer.sha256 or content["tokens_sha256"] != corpus.meta["train"]["sha256"]:
            raise TrainError(f"{path}: was trained on another corpus or tokenizer than {corpus.folder}")
    elif found:
        raise TrainError(f"{run}: none of its {len(found)} checkpoints is whole; choose another --out_dir")
    if p.rank == 0:
        (run / "source" / "config").mkdir(parents=True, exist_ok=True)
        here = Path(__file__).parent
        for file in (*here.glob("*.py"), *here.glob("config/*.py")):  # a result carries the code that made it
            shutil.copy(file, run / "source" / file.relative_to(here))
        shutil.copy(corpus.folder / "tokenizer.json", run)
        (run / "settings.json").write_text(json.dumps(asdict(s), indent=1))
        step, metrics = content["step"] if content else 0, run / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        metrics.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
    return content


def save(s: Settings, schedule: Schedule, corpus: Corpus, model: Transformer, optimizers, step: int):
    """Write a checkpoint of `step` finished steps; drop all but the newest s.keep and those that end a phase."""
    save_checkpoint(Path(s.out_dir) / f"step_{step:07}.pt", model, step=step, settings=asdict(s),
                    optimizer=[o.state_dict() for o in optimizers], boundary=corpus.boundary,
                    tokenizer_sha256=corpus.tokenizer.sha256, tokens_sha256=corpus.meta["train"]["sha256"])
    for old in checkpoints(s.out_dir)[s.keep:]:
        if not schedule.ends_phase(int(old.stem.removeprefix("step_")) - 1):
            old.unlink()


# ------------------------------------------------------------------------------------------------- training


def to_device(arrays, device: torch.device):
    tensors = [None if a is None else torch.from_numpy(a) for a in arrays]
    if device.type == "cuda":  # from pinned memory the copy runs behind the GPU's back
        return [t if t is None else t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t if t is None else t.to(device) for t in tensors]


@torch.no_grad()
def evaluate(model: Transformer, dev: Batches, s: Settings, objectives: list[str], p: Processes, autocast) -> dict:
    """Mean dev loss in nats per scored token for each objective, on the same rows every time, by all processes.

    The uncompiled model: nothing is compiled for a shape that only evaluation has.
    """
    model.eval()
    losses = {}
    rows = np.arange(p.rank, min(s.eval_rows, dev.n_rows), p.world)
    for objective in objectives:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for i in range(0, len(rows), s.micro_rows):
            arrays = dev.batch(objective, 0, 0, rows[i:i + s.micro_rows], mask_rate=0.15)
            tokens, targets, scored = to_device(arrays, p.device)
            with autocast():
                loss, n = model.forward(tokens, targets, causal=OBJECTIVES[objective], scored=scored)
            total, count = total + loss.cpu(), count + n.item()
        total, count = p.sum(total.item(), count)
        losses[objective] = total / max(1, count)
    model.train()
    return losses


def train(s: Settings):
    p = Processes(s.device)
    if s.prepare and not Path(s.corpus).exists() and p.rank == 0:
        for command in s.prepare:
            p.say(f"python {command}")
            if subprocess.run([sys.executable, *shlex.split(command)]).returncode:
                raise DataError(f"{s.corpus}: was missing, and the command that makes it failed: python {command}")
    if p.world > 1:
        dist.barrier()
    corpus = Corpus(s.corpus)
    if len(corpus.train) <= s.block_size:
        raise DataError(f"{s.corpus}: {len(corpus.train)} training tokens do not fill a row of block_size {s.block_size}")

    # What happens at each step is a function of its number, from here on.
    slots = int(np.ceil(max(s.mask_start, s.mask_end) * s.block_size))
    batches = Batches(corpus.train, corpus.vocab_size, s.block_size, s.batch_rows, s.seed, slots, s.mask_span)
    dev = Batches(corpus.dev, corpus.vocab_size, s.block_size, s.eval_rows, 0, int(np.ceil(0.15 * s.block_size)))
    schedule = Schedule(parse(s.schedule), batches.steps_per_epoch, s.lr, s.lr_min, s.warmup, s.lr_decay,
                        s.mask_start, s.mask_end)
    learnt = {name for phase in schedule.phases for name, _ in phase.mix}
    judged = [name for name in OBJECTIVES if name in learnt | {"CLM", "MLM"}]

    torch.manual_seed(s.seed)
    content = open_run(s, corpus, p)
    model = load_model(content) if content else Transformer(s.model_config(corpus.vocab_size))
    model = model.to(p.device).train()
    optimizers = make_optimizers(model, s, p.device)
    first = 0
    if content:
        first = content["step"]
        for optimizer, state in zip(optimizers, content["optimizer"]):
            optimizer.load_state_dict(state)
        del content

    bf16 = s.precision == "bfloat16" or s.precision == "auto" and p.device.type == "cuda" and torch.cuda.is_bf16_supported()
    compiled = s.compile == "on" or s.compile == "auto" and p.device.type == "cuda"
    if compiled:
        model.compile(dynamic=False)  # in place: keys stay clean, and model.forward stays uncompiled for evaluation
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False) if p.world > 1 else model

    def autocast():
        return torch.autocast(p.device.type, torch.bfloat16, enabled=bf16)

    name = torch.cuda.get_device_name(p.device) if p.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    p.say(f"{s.backbone}: {sum(q.numel() for q in model.parameters()) / 1e6:.2f} million parameters, "
          f"{corpus.meta['train']['words']:,} words, {len(corpus.train):,} tokens\n"
          f"{s.schedule}: {schedule.epochs} epochs of {schedule.steps_per_epoch} steps of {s.batch_rows} x {s.block_size} tokens\n"
          f"device {p.device} ({name}), {p.world} process(es); "
          f"precision {'bfloat16 autocast' if bf16 else 'float32'} ({s.precision}); "
          f"compile {'on' if compiled else 'off'} ({s.compile}: on for a GPU, off elsewhere)\nrun {s.out_dir}"
          + (f", resumed after step {first}" if first else ""))

    stop = []  # signals received; the step in progress is finished and saved first

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    metrics = open(Path(s.out_dir) / "metrics.jsonl", "a") if p.rank == 0 else None

    def record(**entry):
        if metrics:
            metrics.write(json.dumps(entry) + "\n")
            metrics.flush()

    words_per_step = corpus.meta["train"]["words"] / schedule.steps_per_epoch
    sums = {objective: [0.0, 0] for objective in OBJECTIVES}  # summed loss (on the device) and count since the last line
    began, logged, tokens_seen, halt = time.time(), time.time(), 0, 0

    for step in range(first, schedule.steps):
        epoch, step_in_epoch = schedule.epoch(step)
        phase = schedule.phases[schedule.phase(step)]
        lr = schedule.learning_rate(step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

        # Each objective's rows are cut into equal micro-batches, the same number for every process.
        shares = phase.rows(s.batch_rows)
        micro, counts, row = [], dict.fromkeys(dict(shares), 0), 0
        for objective, n_rows in shares:
            parts = -(-n_rows // (s.micro_rows * p.world))
            size = -(-n_rows // (parts * p.world))
            for i in range(p.rank, parts * p.world, p.world):
                rows = row + i * size + np.arange(size)
                rows[rows >= row + n_rows] = -1  # comes back unscored
                arrays = batches.batch(objective, epoch, step_in_epoch, rows, schedule.mask_rate(step))
                counts[objective] += int((arrays[1] != -100).sum())
                micro.append((objective, i, arrays))
            row += n_rows
        halt, *totals = p.sum(len(stop), *counts.values())
        if halt:  # checked before the step, so that all processes stop at the same one
            break
        # A mix weighs each objective's mean by its share of rows (GPT-BERT); alone, it is the mean over scored tokens.
        weight = {objective: n_rows / s.batch_rows / max(1, total)
                  for (objective, n_rows), total in zip(shares, totals)}

        for i, (objective, number, arrays) in enumerate(micro):
            tokens, targets, scored = to_device(arrays, p.device)
            # Dropout, too, is a function of position.
            torch.manual_seed(int(hash64(s.seed, DROPOUT, step, list(OBJECTIVES).index(objective), number)[0] >> np.uint64(1)))
            with ddp.no_sync() if p.world > 1 and i + 1 < len(micro) else nullcontext():
                with autocast():
                    loss, _ = ddp(tokens, targets, causal=OBJECTIVES[objective], scored=scored)
                (loss * (weight[objective] * p.world)).backward()  # DDP divides by the number of processes
            sums[objective][0] += loss.detach()
        for objective, count in counts.items():
            sums[objective][1] += count
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip or float("inf"))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens_seen += s.batch_rows * s.block_size

        done, ends_epoch = step + 1, step_in_epoch + 1 == schedule.steps_per_epoch
        where = dict(step=done, epoch=round(done / schedule.steps_per_epoch, 4), phase=str(phase), words=round(done * words_per_step))
        if done % s.log_every == 0 or done == schedule.steps or done == first + 1:
            flat = p.sum(*(float(x) for objective in counts for x in sums[objective]))
            losses = {objective: total / max(1, count) for objective, total, count in zip(counts, flat[::2], flat[1::2])}
            now = time.time()
            speed, left = tokens_seen / (now - logged), (now - began) / (done - first) * (schedule.steps - done)
            if not np.isfinite([*losses.values(), norm.item()]).all():
                raise TrainError(f"{s.out_dir}: loss {losses} or gradient norm {norm.item()} is not finite in the steps up to "
                                 f"{done}; nothing was saved since the last checkpoint; lower lr or clip")
            p.say(f"step {done}/{schedule.steps}  epoch {done / schedule.steps_per_epoch:.2f}/{schedule.epochs}  {phase}  "
                  + "  ".join(f"{k} {v:.3f}" for k, v in losses.items())
                  + f"  lr {lr:.2e}  {speed:,.0f} tokens/s  {int(left // 60)}:{int(left % 60):02} left")
            record(**where, loss=losses, lr=lr, grad_norm=norm.item(), mask_rate=schedule.mask_rate(step), tokens_per_s=round(speed))
            sums = {objective: [0.0, 0] for objective in OBJECTIVES}
            tokens_seen, logged = 0, now
        if (done % s.eval_every == 0 if s.eval_every else ends_epoch) or done == schedule.steps:
            losses = evaluate(model, dev, s, judged, p, autocast)
            p.say(f"step {done}/{schedule.steps}  dev loss  " + "  ".join(f"{k} {v:.3f}" for k, v in losses.items()))
            record(**where, dev=losses)
        if (done % s.save_every == 0 or schedule.ends_phase(step)) and p.rank == 0:
            save(s, schedule, corpus, model, optimizers, done)

    if halt:
        if p.rank == 0 and step > first:
            save(s, schedule, corpus, model, optimizers, step)
        again = " ".join(arg for arg in sys.argv if arg != "--resume")
        p.say(f"stopped after step {step}; go on with the same command and --resume: {again} --resume")
    if metrics:
        metrics.close()
    if p.world > 1:
        dist.destroy_process_group()
    if halt:
        sys.exit(128 + (stop[0] if stop else signal.SIGTERM))
    if p.rank == 0:
        minutes = (time.time() - began) / 60
        print(f"trained {s.out_dir} in {minutes:.1f} minutes", flush=True)
        if s.score:
            for arguments in (["--task", s.score], ["--sample", "", "--n", "5"]):
                print("python eval.py", shlex.join([s.out_dir, *arguments]), flush=True)
                if subprocess.run([sys.executable, "eval.py", s.out_dir, *arguments]).returncode:
                    raise TrainError(f"{s.out_dir}: trained and saved, but the evaluation above failed; repeat it by hand")


if __name__ == "__main__":
    try:
        train(config.load(Settings, sys.argv[1:]))
    except (config.ConfigError, DataError, CheckpointError, TrainError, OSError) as e:
        sys.exit(f"train.py: {e}")
