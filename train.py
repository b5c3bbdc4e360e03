"""Train a transformer with causal and masked language modelling in alternating phases.

python train.py config/quickstart.py                                       # CPU or one GPU
torchrun --standalone --nproc_per_node=8 train.py config/babyllama.py      # one node
python train.py config/babyllama.py --schedule=24_CLM --out_dir=runs/clm   # any setting is a flag
python train.py config/babyllama.py --resume                               # go on where it stopped
"""

import math
import os
import sys
import time
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import config
from antlm import compiling
from antlm.checkpoint import RunFolder, load_source, restore
from antlm.distributed import (
    DEVICES,
    PRECISIONS,
    Processes,
    StopSignals,
    busy_cores,
    errors_in_one_line,
    has_fast_bfloat16,
    leave,
)
from antlm.metrics import TrainingLog
from antlm.optim import OPTIMIZERS, WeightAverage, guarded_step, make_optimizers
from config import require
from data import OBJECTIVES, Batches, Corpus, MicroBatch, dropout_seed, find_objectives
from model import ModelConfig, Transformer
from schedule import DECAYS, Schedule, parse, words_before


@dataclass
class Settings:
    # where from and where to
    corpus: str = "corpora/babylm"  # folder made by prepare.py
    corpus_command: str = "python prepare.py TEXT --dev TEXT --out FOLDER"  # how to make it
    out_dir: str = "runs/babylm"  # folder for checkpoints, metrics and settings
    resume: bool = False  # go on from the newest checkpoint in it
    init_from: str = ""  # run folder or checkpoint whose weights training starts from; "": random
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
    # objectives and batches
    schedule: str = "4_CLM+16_MLM+4_CLM"  # EPOCHS_OBJECTIVE+..., or EPOCHS_1CLM:15MNTP for a mix
    block_size: int = 128  # tokens a row
    batch_rows: int = 256  # rows per optimizer step, over all processes and micro-batches
    micro_rows: int = 64  # rows per forward pass and process at most, for the memory's sake
    mask_start: float = 0.15  # share of tokens that MLM and MNTP hide at first; GPT-BERT: 0.3
    mask_end: float = 0.15  # and at the last step
    mask_decay: str = "linear"  # in between; linear | cosine
    mask_span: float = 1.0  # mean tokens hidden at once; 1 single tokens, 3 the spans of ltg-bert
    seed: int = 1
    # optimizer
    optimizer: str = "adamw"  # adamw | lamb | muon (matrices of the blocks; AdamW for the rest)
    lr: float = 7e-4  # peak; adamw 3e-4 to 2e-3, lamb 1e-2, muon as adamw
    lr_min_ratio: float = 0.1  # share of the peak at the last step
    lr_decay: str = "cosine"  # cosine | linear | constant
    lr_decay_share: float = 1.0  # share of the steps, the last, in which it decays; 0.2 for WSD
    warmup: float = 0.02  # share of all steps
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.1  # not on embeddings, biases and norms
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    average_share: float = 0.0  # share of the steps, the last, whose weights are averaged; 0: none
    skip_nonfinite: int = 0  # steps of a non-finite loss that may be skipped before the run stops
    # logs and checkpoints
    log_every: int = 20  # steps
    eval_every: int = 0  # steps between evaluations on the dev text; 0: an epoch; phase ends always
    eval_rows: int = 512  # rows of the dev tokens, at most
    eval_mask_rate: float = 0.15  # of the masked dev losses: fixed, so that runs can be compared
    save_every: int = 500  # steps between checkpoints; each phase end has one too
    keep: int = 2  # newest checkpoints kept, beside those of phase ends
    babylm_rules: bool = False  # at most 10 epochs, a checkpoint at 1M ... 10M ... 1000M words
    # machine
    device: str = "auto"  # auto | cpu | cuda | mps
    precision: str = "auto"  # auto | float32 | bfloat16 (autocast; weights stay float32)
    compile: str = "auto"  # auto | on | off

    def check(self):
        """Raise UserError, which names the settings, for a value or combination that cannot be."""
        # what no setting may be
        for field in fields(self):
            value = getattr(self, field.name)
            may_be_empty = field.name == "init_from"
            require(value != "" or may_be_empty, f"{field.name} must not be empty")
            if field.type is float:
                require(math.isfinite(value), f"{field.name} = {value} must be finite")
        # values that are one of a few words
        choices = {
            "optimizer": OPTIMIZERS,
            "lr_decay": DECAYS,
            "mask_decay": ("linear", "cosine"),  # a constant rate has the same start and end
            "device": DEVICES,
            "precision": PRECISIONS,
            "compile": ("auto", "on", "off"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            require(value in known, f"{name} = {value!r} must be one of {', '.join(known)}")
        for name in ("batch_rows", "micro_rows", "log_every", "eval_rows", "save_every", "keep"):
            value = getattr(self, name)
            require(value >= 1, f"{name} = {value} must be at least 1")
        require(self.seed < 2**63, f"seed = {self.seed} must be less than 2**63")
        for name in ("seed", "weight_decay", "clip", "skip_nonfinite", "eval_every"):
            value = getattr(self, name)
            require(value >= 0, f"{name} = {value} must not be negative")
        for name in ("warmup", "beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} = {value} must lie in [0, 1)")
        for name in ("average_share", "lr_min_ratio"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} = {value} is a share: it must lie in [0, 1]")
        require(
            0 < self.lr_decay_share <= 1,
            f"lr_decay_share = {self.lr_decay_share} is a share: it must lie in (0, 1]",
        )
        require(self.lr > 0, f"lr = {self.lr} must be greater than 0")
        require(self.eps > 0, f"eps = {self.eps} must be greater than 0")

        # values that depend on each other
        self.check_rows()
        self.check_schedule()

    def check_rows(self):
        """Raise UserError for a bad length of rows or rate of hidden tokens."""
        T = self.block_size
        longest = self.model_config(vocab_size=1).max_tokens
        require(T >= 2, f"block_size = {T} must be at least 2 tokens")
        require(
            longest is None or T <= longest,
            f"block_size = {T} is longer than the {longest} tokens that {self.backbone} can take",
        )
        require(self.mask_span >= 1, f"mask_span = {self.mask_span} must be at least 1 token")
        require(
            0 < self.eval_mask_rate < 1,
            f"eval_mask_rate = {self.eval_mask_rate} must lie between 0 and 1",
        )
        objectives = find_objectives(self.schedule)
        if any(OBJECTIVES[name].max_rate is None for name in objectives):
            for name in ("mask_start", "mask_end"):
                rate = getattr(self, name)
                require(
                    1 <= rate * T <= T - 1,
                    f"{name} = {rate} must hide at least 1 and leave at least 1 of {T} tokens",
                )

    def check_schedule(self):
        """Raise UserError where batch_rows cannot be shared by a mix, or for too many epochs."""
        phases = parse(self.schedule)
        for phase in phases:
            least = sum(weight for _, weight in phase.mix)
            require(
                self.batch_rows >= least,
                f"batch_rows = {self.batch_rows} cannot be shared as {phase}: at least {least}",
            )
        self.check_babylm_rules(history=[])

    def check_babylm_rules(self, history: list[dict]):
        """Raise UserError for more training than the challenge of 2025 and 2026 allows.

        history: the runs whose weights this one starts from, which count as well
        """
        if not self.babylm_rules:
            return
        # it counts epochs, whatever their objective
        schedules = [*(entry["schedule"] for entry in history), self.schedule]
        phases = parse("+".join(schedules))
        require(
            sum(phase.epochs for phase in phases) <= 10,
            f"schedule = {'+'.join(schedules)!r} has more than the 10 epochs that babylm_rules "
            "allow",
        )
        for entry in history:
            require(
                entry["words"] is not None,
                f"init_from: {entry['path']} does not say how many words it has seen, which "
                "babylm_rules count",
            )

    def model_config(self, vocab_size: int) -> ModelConfig:
        # the sizes bear the same names here and there; the vocabulary is the corpus's
        names = {field.name for field in fields(ModelConfig)} - {"vocab_size"}
        return ModelConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in names})

    def make_schedule(
        self, steps_per_epoch: int, words_per_epoch: int, history: list[dict]
    ) -> Schedule:
        return Schedule(
            phases=parse(self.schedule),
            steps_per_epoch=steps_per_epoch,
            lr=self.lr,
            lr_min_ratio=self.lr_min_ratio,
            warmup=self.warmup,
            decay=self.lr_decay,
            decay_share=self.lr_decay_share,
            mask_start=self.mask_start,
            mask_end=self.mask_end,
            mask_decay=self.mask_decay,
            average_share=self.average_share,
            words_per_epoch=words_per_epoch,
            words_before=words_before(history),
        )


# Settings that may differ when a run goes on; all others would make it a different run.
FREE = {
    "corpus", "corpus_command", "out_dir", "resume", "micro_rows", "skip_nonfinite", "log_every",
    "eval_every", "eval_rows", "eval_mask_rate", "save_every", "keep", "babylm_rules", "device",
    "precision", "compile",
}  # fmt: skip


def open_corpus(s: Settings) -> Corpus:
    """Open the corpus; raises UserError, with the command that makes it, where it is missing."""
    exists = os.path.exists(s.corpus)
    require(exists, f"{s.corpus}: does not exist; make it with: {s.corpus_command}")
    corpus = Corpus(s.corpus)
    require(
        len(corpus.train) > s.block_size,
        f"{s.corpus}: {len(corpus.train)} training tokens do not fill a row of block_size "
        f"{s.block_size}",
    )
    return corpus


def loss_factors(
    n_rows: dict[str, int], micro_batches: list[MicroBatch], processes: Processes
) -> dict[str, float]:
    """Return what the summed loss of each objective in a step is multiplied by.

    n_rows: of each objective in the step; micro_batches: of this process
    The mean of an objective counts by its share of the rows (GPT-BERT), however few tokens of them
    it scores. One that scores none, as it may in the short last step of an epoch, leaves its share
    to the others, so that the shares always add up to 1.
    """
    # how many targets are scored in all processes
    counts = dict.fromkeys(n_rows, 0)
    for micro_batch in micro_batches:
        counts[micro_batch.objective] += micro_batch.n_scored
    n_scored = dict(zip(counts, processes.sum(list(counts.values())), strict=True))

    factors = dict.fromkeys(n_rows, 0.0)
    scoring = [objective for objective in n_rows if n_scored[objective] > 0]
    total_rows = sum(n_rows[objective] for objective in scoring)
    for objective in scoring:
        factors[objective] = n_rows[objective] / total_rows / n_scored[objective]
    return factors


def open_checkpoint(run: RunFolder, s: Settings, corpus: Corpus) -> dict:
    """Return what training begins with: the run's newest checkpoint, else another run's weights.

    Empty for a run that starts from scratch.
    """
    content = run.newest(s, FREE, corpus)
    if content is None and s.init_from:
        content = load_source(s.init_from, s.model_config(corpus.vocab_size), corpus)
    if content is None:
        content = {}
    s.check_babylm_rules(content.get("history", []))
    return content


def open_batches(s: Settings, corpus: Corpus) -> tuple[Batches, Batches]:
    """Return the batches of training, and those of the dev text, which no seed changes."""
    train_batches = Batches(
        corpus.train,
        corpus.vocab_size,
        s.block_size,
        s.batch_rows,
        s.seed,
        max_mask_rate=max(s.mask_start, s.mask_end),
        mask_span=s.mask_span,
    )
    dev_batches = Batches(
        corpus.dev,
        corpus.vocab_size,
        s.block_size,
        s.eval_rows,
        seed=0,
        max_mask_rate=s.eval_mask_rate,
    )
    return train_batches, dev_batches


@torch.no_grad()
def evaluate(
    model: Transformer, dev: Batches, s: Settings, processes: Processes, autocast, signals
) -> dict[str, float] | None:
    """Return the dev loss of each objective in nats per scored token; None if told to stop.

    On the same rows each time. An objective that scores no token, as a masked one may in a very
    short dev text, has no loss.
    """
    # those of the run, and CLM and MLM always: a phase of one shows what it costs the other
    names = {"CLM", "MLM", *find_objectives(s.schedule)}
    objectives = [name for name in OBJECTIVES if name in names]
    model.eval()
    losses = {}
    rows = np.arange(min(s.eval_rows, dev.n_rows))
    rows_at_once = s.micro_rows * processes.world
    for objective in objectives:
        total = 0.0
        count = 0
        for start in range(0, len(rows), rows_at_once):
            if signals.any(processes):
                return None
            # this process's share, which may be none of the last rows
            place = rows[start : start + rows_at_once][processes.rank :: processes.world]
            if len(place) == 0:
                continue
            batch = dev.batch(objective, 0, 0, place, s.eval_mask_rate).to(processes.device)
            with autocast:
                loss, n_scored = model(**batch, causal=OBJECTIVES[objective].causal)
            total += loss.item()
            count += n_scored.item()
        # divided once, over all processes: a mean of means would weigh short shares too much
        total, count = processes.sum([total, count])
        if count:
            losses[objective] = total / count
    model.train()
    return losses


def count_shapes(s: Settings, batches: Batches, world: int) -> int:
    """Return how many kinds of forward pass the schedule has: a compiled model builds each once."""
    shapes = set()
    for phase in parse(s.schedule):
        for objective, (_, n_rows) in batches.part_sizes(phase, s.micro_rows, world).items():
            shapes.add((objective, n_rows))
    return len(shapes)


def choose_compilation(
    s: Settings, model, steps: int, n_shapes: int, processes: Processes, bfloat16: bool
) -> compiling.Choice:
    """Decide whether the model is compiled for the steps that are left; raises UserError."""
    tokens = steps * s.batch_rows * s.block_size
    n_params = sum(p.numel() for p in model.parameters())
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    return compiling.choose(s.compile, processes, 6 * tokens * n_params, n_shapes, dtype)


def describe(s: Settings, model, corpus: Corpus, schedule: Schedule) -> str:
    """Say what is trained, on what and for how long."""
    # tied weights are one parameter and count once
    n_params = sum(p.numel() for p in model.parameters())
    words = corpus.meta["train"]["words"]
    return (
        f"{s.backbone}: {n_params / 1e6:.2f} million parameters, {words:,} words, "
        f"{len(corpus.train):,} tokens\n"
        f"{s.schedule}: {schedule.epochs} epochs of {schedule.steps_per_epoch} steps of "
        f"{s.batch_rows} x {s.block_size} tokens"
    )


def describe_machine(
    s: Settings, processes: Processes, bfloat16: bool, choice: compiling.Choice
) -> str:
    """Say where it is trained and how, and why `auto` has picked that."""
    line = f"device {processes.describe_device()}, {processes.world} process(es); precision "
    line += "bfloat16 autocast" if bfloat16 else "float32"
    if s.precision == "auto":
        line += " (auto: bfloat16 where the device has fast instructions for it)"
    line += "; compile on" if choice.compiled else "; compile off"
    if choice.reason:
        line += f" ({choice.reason})"

    # threads that wait for those of another program do less than half of the work
    if processes.device.type == "cpu" and processes.world == 1:
        busy = busy_cores()
        threads = torch.get_num_threads()
        if threads > 1 and busy + threads > os.cpu_count() + 0.5:
            line += (
                f"\nother programs keep {busy:.1f} of {os.cpu_count()} cores busy, and this run "
                f"has {threads} threads: several runs are faster with OMP_NUM_THREADS=1 each"
            )
    return line


def train(s: Settings):  # noqa: C901, PLR0915 - long, and meant to be read from top to bottom
    # ------------------------------------------------ this process, the text, the folder of the run
    processes = Processes(s.device)
    device = processes.device
    corpus = open_corpus(s)
    run = RunFolder(s.out_dir, processes, s.resume)  # locked until this process ends

    # ------------------------------------------- weights to begin with: of a checkpoint, or random
    content = open_checkpoint(run, s, corpus)
    history = content.get("history", [])  # runs that this one was started from
    torch.manual_seed(s.seed)
    vocab_size = corpus.vocab_size
    if content:
        vocab_size = content["config"]["vocab_size"]  # an imported model's may be padded
    model = Transformer(s.model_config(vocab_size)).to(device).train()
    optimizers = make_optimizers(model, s, device)
    average = WeightAverage(model)
    start, logged = restore(content, run.path, model, optimizers, average)
    content = None  # its memory is free again

    # ------------------------------------- what happens at a step is a function of its number alone
    batches, dev = open_batches(s, corpus)
    schedule = s.make_schedule(batches.steps_per_epoch, corpus.meta["train"]["words"], history)
    run.begin(s, corpus, schedule, start, history)

    # ---------------------------------------------------------- precision, compilation, parallelism
    bfloat16 = s.precision == "bfloat16" or (s.precision == "auto" and has_fast_bfloat16(device))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    n_shapes = count_shapes(s, batches, processes.world)
    choice = choose_compilation(s, model, schedule.steps - start, n_shapes, processes, bfloat16)
    if choice.compiled:
        compiling.compile_in_place(model, device, n_shapes)
    ddp = model
    if processes.world > 1:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        ddp.broadcast_buffers = False  # none ever changes
    processes.print(describe(s, model, corpus, schedule))
    processes.print(describe_machine(s, processes, bfloat16, choice))
    processes.print(f"run {run.path}, starts at step {start} of {schedule.steps}")

    # ------------------------------------------------------------------------------------- the loop
    log = TrainingLog(run, schedule, s, list(OBJECTIVES), logged)
    eval_every = s.eval_every or schedule.steps_per_epoch
    signals = StopSignals()
    stopped = False
    step = start  # steps done
    while True:
        # evaluate on the dev tokens, unless that was done before a run was stopped and resumed; the
        # end of a phase shows what it has cost the objectives that it does not train
        is_due = step % eval_every == 0 or schedule.ends_phase(step - 1)
        if is_due and step > run.evaluated_step:
            # uncompiled: its shapes are of no other pass
            with average.in_use(), torch.compiler.set_stance("force_eager"):
                dev_losses = evaluate(model, dev, s, processes, autocast, signals)
            if dev_losses is None:
                stopped = True
                break
            log.write_dev(step, dev_losses)

        # save
        if step > start and (
            step % s.save_every == 0 or schedule.is_milestone(step, s.babylm_rules)
        ):
            log.read()  # ends the run, before anything is saved, if a loss was not finite
            run.save(step, model, optimizers, log=log.state(), average=average.state_dict())
        if step == schedule.steps:
            break

        # this process's rows of the next step, cut into forward passes
        epoch, step_in_epoch = schedule.epoch(step)
        phase = schedule.phase(step)
        lr = schedule.learning_rate(step)
        mask_rate = schedule.mask_rate(step)
        micro_batches = batches.micro_batches(
            phase, epoch, step_in_epoch, mask_rate, s.micro_rows, processes.rank, processes.world
        )
        factors = loss_factors(batches.split_rows(phase, step_in_epoch), micro_batches, processes)

        # forward and backward, summing up gradients
        losses = []
        for i, micro_batch in enumerate(micro_batches):
            # between passes, since a step may take longer than a cluster waits; what is done of it
            # is dropped
            if signals.any(processes):
                stopped = True
                break
            objective = OBJECTIVES[micro_batch.objective]
            batch = micro_batch.batch.to(device)
            # dropout is a function of position, too: a resumed run draws the same
            torch.manual_seed(dropout_seed(s.seed, step, objective, micro_batch.index))
            if processes.world > 1:  # gradients are exchanged in the last backward pass only
                ddp.require_backward_grad_sync = i == len(micro_batches) - 1
            with autocast:
                loss, _ = ddp(**batch, causal=objective.causal)
            # DDP divides by the number of processes. 0 * loss makes all gradients NaN where the
            # loss is not finite, and with them the norm, so that all processes notice.
            factor = factors[micro_batch.objective] * processes.world + 0 * loss.detach()
            (loss * factor).backward()
            losses.append(loss.detach())
        if stopped:
            break

        # clip the gradient, and update the weights unless it is not finite
        norm = clip_grad_norm_(model.parameters(), s.clip or math.inf)
        guarded_step(optimizers, lr, norm)
        step += 1
        if schedule.averages(step):
            average.update()

        # log
        log.add(step, micro_batches, losses, norm)
        if step % s.log_every == 0 or step in (1, schedule.steps):
            log.write(step, lr, mask_rate)

    # -------------------------------------------------------------------------------------- the end
    if stopped and step > start:
        log.read()
        run.save(step, model, optimizers, log=log.state(), average=average.state_dict())
    processes.wait()  # none leaves while another is at work
    if stopped:
        processes.print(f"stopped after step {step}; go on with the same command and --resume")
        leave(processes, signals.exit_code())
    if start == schedule.steps:
        processes.print(f"{run.path} had been trained to its end; nothing was left to do")
    else:
        minutes = (time.time() - log.started) / 60
        processes.print(f"trained {run.path} in {minutes:.1f} minutes")
    leave(processes, 0)


if __name__ == "__main__":
    with errors_in_one_line():
        train(config.load(Settings, sys.argv[1:]))
