"""Train a transformer with causal and masked language modelling in alternating phases.

    python train.py config/quickstart.py                                 # one process, CPU or GPU
    torchrun --standalone --nproc_per_node=8 train.py config/babyllama.py    # one node
    python train.py config/babyllama.py --schedule=24_CLM --out_dir=runs/clm     # any setting below can be a flag
    python train.py config/babyllama.py --resume                         # go on from the newest checkpoint
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import config
from antlm.checkpoint import checkpoints, load_model, open_run, save_checkpoint
from antlm.distributed import Processes
from antlm.optim import make_optimizers, update
from config import UserError
from data import DROPOUT, Batches, Corpus, hash64
from model import BACKBONES, ModelConfig, Transformer
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
            raise UserError(f"{s.corpus}: was missing, and the command that makes it failed: python {command}")
    p.sum(0)  # the others wait
    corpus = Corpus(s.corpus)
    if len(corpus.train) <= s.block_size:
        raise UserError(f"{s.corpus}: {len(corpus.train)} training tokens do not fill a row of block_size {s.block_size}")

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
            raise UserError(f"{run}: not all processes find the same checkpoint in it; it must be one folder for all")
    except (LookupError, TypeError, ValueError, AttributeError) as e:  # of a checkpoint that somebody else has made
        if not checkpoints(run):
            raise  # a mistake in the code
        raise UserError(f"{run}: its newest checkpoint is not one of this train.py ({type(e).__name__}: {e})") from None
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
        """Wait for the device and take up the steps since the last look; raises UserError."""
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
                raise UserError(f"{run}: {text}; nothing was saved since the last checkpoint; lower lr or clip, or allow "
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
                raise UserError(f"{run}: dev loss not finite at step {done}; nothing was saved since the last checkpoint")
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
                raise UserError(f"{run}: trained and saved, but the evaluation above failed; repeat it by hand")
    code = 128 + (stop[0] if stop else signal.SIGTERM) if halt else 0
    if halt or p.world > 1:  # to take torch.distributed down aborts one process in fifty (2.13, gloo)
        (os._exit if p.world > 1 else sys.exit)(code)


if __name__ == "__main__":
    try:
        train(s := config.load(Settings, sys.argv[1:]))
        sys.exit()
    except UserError as e:
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
