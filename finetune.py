"""Fine-tune a checkpoint on the GLUE tasks of the BabyLM challenge and score it.

    python finetune.py runs/babyllama --data=evaluation_data/glue_filtered  # the eleven of 2024
    python finetune.py runs/babyllama config/finetune/glue_2026.py          # the seven of 2026
    python finetune.py runs/babyllama config/finetune/glue_lora.py          # low-rank adapters
    python finetune.py runs/babyllama --tasks=rte,wsc --seeds=12,13,14      # mean and deviation

Settings come from override files and flags as in train.py. The defaults are those of the 2024
challenge. Each finished seed is saved at once: the same command goes on where it was stopped.
"""

import copy
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import config
from antlm.checkpoint import WEIGHTS, LoadedRun, file_sha256, load_run
from antlm.distributed import find_device_for_texts, full_memory_in_one_line
from antlm.program import clean_exit
from antlm.tokenizer import PAD
from babylm.classifier import Classifier
from babylm.glue import (
    TASKS,
    Split,
    find_file,
    four_parts,
    mean_of_tasks,
    measure,
    read_split,
    table,
)
from babylm.results import read_result, write_result
from config import UserError, require
from data import OBJECTIVES, find_objectives, hash64
from model import Transformer
from schedule import cosine

# What cannot differ between the tasks of one call.
SHARED = ("tasks", "task_settings", "out", "weights", "device")


@dataclass
class Settings:
    data: str = "evaluation_data/glue_filtered"  # folder of TASK.train.jsonl and TASK.valid.jsonl
    tasks: tuple = tuple(TASKS)  # mnli-mm is scored with the model of mnli and needs it
    task_settings: dict = field(default_factory=dict)  # in a file: {"wsc": dict(epochs=30)}
    seeds: tuple = ("12",)  # of head, order and dropout; several give mean and deviation
    out: str = ""  # result file; empty: glue_STEP.json beside the checkpoint
    weights: str = "average"  # of the run's average_share, where there is one | last
    # what the model sees
    mask: str = "auto"  # full | causal | auto: full if the model was trained with MLM or MNTP
    n_open: tuple = ()  # with mask=causal: layers, from 0, that see all of it (arXiv 2401.14556)
    pool: str = "auto"  # start | mean | last token; auto: start under the full mask, else last
    max_length: int = 128  # tokens of an input; the longer of two texts is cut first
    # what is learnt
    lora_rank: int = 0  # rank of adapters on the blocks' matrices, 4 to 64; 0: train all weights
    lora_alpha: float = 16.0  # adapters count alpha / rank
    lora_dropout: float = 0.1  # of what the adapters read
    dropout: float = 0.1  # in the classifier; the model's own stays as it was trained
    lr: float = 5e-5  # peak, 2e-5 to 5e-4
    lr_decay: str = "linear"  # linear to 0 | cosine to a tenth
    warmup: float = 0.0  # share of all steps
    weight_decay: float = 0.0  # of AdamW, on all that is trained
    clip: float = 1.0  # norm that gradients are cut to, that of Hugging Face's Trainer; 0: none
    batch_rows: int = 64  # inputs in a step
    epochs: int = 10  # at most
    patience: int = 3  # stop after so many epochs without a gain of 0.001; 0: never
    select: str = "f1"  # best epoch by f1 (accuracy beyond two classes) | metric (reported) | loss
    limit: int = 0  # only so many lines of each file, for a quick look; 0: all
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "float32"  # float32 | bfloat16 (autocast)

    def check(self):
        """Raise UserError, which names the setting, for a value or combination that cannot be."""
        self.check_choice("weights", *WEIGHTS)
        self.check_choice("mask", "auto", "full", "causal")
        self.check_choice("pool", "auto", "start", "mean", "last")
        self.check_choice("lr_decay", "linear", "cosine")
        self.check_choice("select", "f1", "metric", "loss")
        self.check_choice("device", "auto", "cpu", "cuda", "mps")
        self.check_choice("dtype", "float32", "bfloat16")
        require(self.max_length >= 8, "max_length must be at least 8 tokens")
        require(self.lora_rank >= 0, "lora_rank must not be negative")
        require(self.lora_alpha > 0, "lora_alpha must be greater than 0")
        require(0 <= self.lora_dropout < 1, "lora_dropout must lie in [0, 1)")
        require(0 <= self.dropout < 1, "dropout must lie in [0, 1)")
        require(self.lr > 0, "lr must be greater than 0")
        require(0 <= self.warmup < 1, "warmup must lie in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay must not be negative")
        require(self.clip >= 0, "clip must not be negative")
        require(self.batch_rows > 0, "batch_rows must be greater than 0")
        require(self.epochs > 0, "epochs must be greater than 0")
        require(self.patience >= 0, "patience must not be negative")
        require(self.limit >= 0, "limit must not be negative")

        # lists
        require(len(self.seeds) > 0, "seeds must name at least one")
        for name in ("seeds", "n_open"):
            numbers = map(str, getattr(self, name))
            require(all(map(str.isdecimal, numbers)), f"{name} must be whole numbers")
        require(
            self.mask == "causal" or not self.n_open,
            "n_open opens layers of a causal mask: set mask=causal",
        )
        require(len(self.tasks) > 0, "tasks must name at least one")
        for task in self.tasks:
            require(task in TASKS, f"tasks: {task!r} is not one of {', '.join(TASKS)}")
        require(
            "mnli" in self.tasks or "mnli-mm" not in self.tasks,
            "tasks: mnli-mm is scored with the model of mnli; name that, too",
        )
        for task in self.task_settings:
            self.check_task(task)

    def check_choice(self, name: str, *choices: str):
        value = getattr(self, name)
        require(value in choices, f"{name} = {value!r} must be one of {', '.join(choices)}")

    def check_task(self, task: str):
        """Check what task_settings changes for a task: names, types, then values."""
        label = f"task_settings: {task}"
        require(task in TASKS, f"{label} is not one of {', '.join(TASKS)}")
        require(task != "mnli-mm", f"{label} is scored with the model of mnli; change that")
        changes = self.task_settings[task]
        require(isinstance(changes, dict), f"{label} must have a dict, as in dict(epochs=30)")
        types = {f.name: f.type for f in fields(Settings) if f.name not in SHARED}
        for name, value in changes.items():
            require(name in types, f"{label}: {name!r} is none of {', '.join(types)}")
            fits = type(value) is types[name] or (types[name] is float and type(value) is int)
            require(fits, f"{label}: {name} = {value!r} must be of type {types[name].__name__}")
        try:
            self.of_task(task).check()
        except UserError as error:
            raise UserError(f"{label}: {error}") from None

    def of_task(self, task: str) -> "Settings":
        """Return the settings of one task; mnli-mm has those of mnli, whose model scores it."""
        changes = self.task_settings.get(task.removesuffix("-mm"), {})
        return replace(self, task_settings={}, **changes)

    def by_task(self) -> dict[str, "Settings"]:
        """Return the settings of each task, in the order of TASKS."""
        return {task: self.of_task(task) for task in TASKS if task in self.tasks}

    def resolve(self, schedule: str) -> "Settings":
        """Return settings with nothing left on auto that follows from the model's own schedule."""
        mask = self.mask
        pool = self.pool
        if mask == "auto":
            # the full mask is strange only to a model that never saw what comes after a token
            learnt = find_objectives(schedule, "checkpoint")
            only_causal = all(OBJECTIVES[name].causal for name in learnt)
            mask = "causal" if only_causal else "full"
        if pool == "auto":
            # under a causal mask the last token alone has seen the whole text
            pool = "last" if mask == "causal" else "start"
        n_open = tuple(sorted(map(int, self.n_open)))
        return replace(self, mask=mask, pool=pool, n_open=n_open)

    def stored(self) -> dict:
        """Return what a result file keeps: all but what calls that share the file may change."""
        values = asdict(self)
        for name in (*SHARED, "seeds"):
            del values[name]
        values["n_open"] = list(self.n_open)  # as JSON gives it back
        return values


# -------------------------------------------------------------------------------------- the batches


def batches(ids: list[list[int]], batch_rows: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the items' numbers in batches, each item once, in an order that (seed, epoch) gives.

    Within 16 batches, rows of like length go together: less is padded.
    """
    lengths = np.array([len(row) for row in ids])
    order = np.argsort(hash64(seed, epoch, np.arange(len(ids))), kind="stable")
    window_rows = 16 * batch_rows
    sorted_batches = []
    for window in np.split(order, range(window_rows, len(order), window_rows)):
        window = window[np.argsort(lengths[window], kind="stable")]
        sorted_batches += np.split(window, range(batch_rows, len(window), batch_rows))

    # or the short ones of each window would come first
    order = np.argsort(hash64(seed, epoch, np.arange(len(sorted_batches)), 1), kind="stable")
    return [sorted_batches[i] for i in order]


def pad_rows(ids: list[list[int]], rows: np.ndarray, device: torch.device):
    """Return these rows padded to the longest of them: tokens (B, T) and lengths (B,)."""
    lengths = np.array([len(ids[row]) for row in rows])
    tokens = np.full((len(rows), lengths.max()), PAD)
    for i, row in enumerate(rows):
        tokens[i, : lengths[i]] = ids[row]
    return torch.from_numpy(tokens).to(device), torch.from_numpy(lengths).to(device)


def classify(classifier: Classifier, split: Split, rows: np.ndarray, settings: Settings):
    """Return logits (B, classes) in float32 and class numbers (B,) of these rows."""
    device = classifier.out.weight.device
    tokens, lengths = pad_rows(split.ids, rows, device)
    in_bfloat16 = settings.dtype == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16):
        logits = classifier(tokens, lengths)
    return logits.float(), torch.from_numpy(split.labels[rows]).to(device)


# -------------------------------------------------------------------------------------- fine-tuning


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Rise linearly to lr in the first steps, then fall as lr_decay says."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return settings.lr * ((step + 1) / warmup)
    left = (steps - step) / (steps - warmup)  # 1 at first, 0 after the last step
    if settings.lr_decay == "cosine":
        return settings.lr * (0.1 + 0.9 * cosine(1 - left))
    return settings.lr * left


def train_epoch(
    classifier: Classifier,
    optimizer: torch.optim.Optimizer,
    train: Split,
    settings: Settings,
    seed: int,
    epoch: int,
) -> float:
    """Train on each item once and return the mean loss in nats. The first epoch is 1."""
    classifier.train()
    group = optimizer.param_groups[0]
    total = torch.zeros((), device=classifier.out.weight.device)
    epoch_batches = batches(train.ids, settings.batch_rows, seed, epoch)
    first_step = (epoch - 1) * len(epoch_batches)
    steps = settings.epochs * len(epoch_batches)
    for step, rows in enumerate(epoch_batches, first_step):
        # forward and backward
        logits, labels = classify(classifier, train, rows, settings)
        loss = F.cross_entropy(logits, labels)
        loss.backward()

        # clip and step
        if settings.clip > 0:
            nn.utils.clip_grad_norm_(group["params"], settings.clip)
        group["lr"] = learning_rate(step, steps, settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach() * len(rows)
    return total.item() / len(train.ids)


@torch.inference_mode()
def predict(classifier: Classifier, split: Split, settings: Settings) -> tuple[np.ndarray, float]:
    """Return predicted class numbers (N,) and the mean cross-entropy in nats.

    Raises UserError where a logit is not finite.
    """
    classifier.eval()
    predicted = np.zeros(len(split.ids), int)
    total = 0.0
    by_length = np.argsort([len(row) for row in split.ids], kind="stable")
    for rows in np.split(by_length, range(128, len(by_length), 128)):
        logits, labels = classify(classifier, split, rows, settings)
        require(
            bool(logits.isfinite().all()),
            "the fine-tuned model's logits are not finite; choose a smaller lr",
        )
        predicted[rows] = logits.argmax(-1).cpu().numpy()
        total += F.cross_entropy(logits, labels, reduction="sum").item()
    return predicted, total / len(split.ids)


def evaluate(classifier: Classifier, task: str, split: Split, settings: Settings) -> dict:
    """Return what a result file holds of a seed, but for the epoch; score is the task's metric."""
    predicted, loss = predict(classifier, split, settings)
    scores = measure(split.labels, predicted, len(split.classes))
    predictions = [split.classes[i] for i in predicted]
    score = scores[TASKS[task].metric]
    return {"score": score, **scores, "loss": loss, "predictions": predictions}


def selection_value(result: dict, n_classes: int, select: str) -> float:
    """Return what the best epoch is chosen by: the larger the better."""
    if select == "loss":
        return -result["loss"]
    if select == "metric":
        return result["score"] / 100
    # the challenge's F1 is that of class 1, which says nothing of three classes
    return result["f1" if n_classes == 2 else "accuracy"] / 100


def make_classifier(model: Transformer, n_classes: int, settings: Settings) -> Classifier:
    """Return a classifier that is built of the model's own weights. settings: resolved"""
    causal = []  # layer by layer
    for layer in range(model.config.n_layer):
        causal.append(settings.mask == "causal" and layer not in settings.n_open)
    classifier = Classifier(model, n_classes, causal, settings.pool, settings.dropout)
    if settings.lora_rank:
        classifier.add_adapters(settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
    return classifier


def finetune(
    model: Transformer, train: Split, valid: dict[str, Split], settings: Settings, seed: int
) -> dict[str, dict]:
    """Train a classifier and return its results on each valid split after the best epoch.

    model: its weights are changed
    valid: splits by name of their task; the first one chooses the epoch
    settings: resolved
    Raises UserError where a logit is not finite.
    """
    task = next(iter(valid))
    device = next(model.parameters()).device

    # the classifier, and what of it is trained
    torch.manual_seed(seed)  # draws the head now, and dropout later
    classifier = make_classifier(model, len(train.classes), settings).to(device)
    optimizer = torch.optim.AdamW(
        [p for p in classifier.parameters() if p.requires_grad],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        fused=device.type != "mps",
    )

    # train until the last epoch, or until patience ends
    best = {}
    best_value = -math.inf
    waited = 0
    began = time.time()
    for epoch in range(1, settings.epochs + 1):
        train_loss = train_epoch(classifier, optimizer, train, settings, seed, epoch)
        results = {}
        for name, split in valid.items():
            results[name] = {**evaluate(classifier, name, split, settings), "epoch": epoch}

        # Any gain makes this epoch the best, but only one of more than 0.001 lets patience start
        # anew, as in Hugging Face's EarlyStoppingCallback.
        value = selection_value(results[task], len(train.classes), settings.select)
        waited += 1
        if value > best_value + 1e-3:
            waited = 0
        if value > best_value:
            best_value = value
            best = results

        seconds_left = (time.time() - began) / epoch * (settings.epochs - epoch)
        result = results[task]
        print(
            f"{task} seed {seed}  epoch {epoch}/{settings.epochs}  loss {train_loss:.3f}  "
            f"valid loss {result['loss']:.3f}  accuracy {result['accuracy']:.1f}  "
            f"f1 {result['f1']:.1f}  mcc {result['mcc']:.1f}  at most {seconds_left:.0f} s left",
            flush=True,
        )
        if settings.patience and waited >= settings.patience:
            break
    return best


# -------------------------------------------------------------------------------------- the program


def open_results(out: Path, run: LoadedRun, device: torch.device) -> dict:
    """Return the content of the result file, with what earlier calls have written to it.

    Raises UserError where that is of another checkpoint.
    """
    results = {
        "checkpoint": str(run.path),
        "step": run.step,
        "schedule": run.schedule,
        "config": run.content["config"],
        "checkpoint_sha256": file_sha256(run.path),
        "weights": run.weights,
        "device": str(device),
        "torch": torch.__version__,
        "tasks": {},
    }
    if out.exists():
        earlier = read_result(out)
        require(
            earlier.get("checkpoint_sha256") == results["checkpoint_sha256"],
            f"{out}: holds the results of another checkpoint; remove it or name another --out",
        )
        weights = earlier.get("weights", "last")
        require(
            weights == run.weights,
            f"{out}: holds results of weights={weights}, not {run.weights}; remove it or name "
            "another --out",
        )
        results["tasks"] = earlier["tasks"]
    return results


def open_task(name: str, settings: Settings, results: dict, out: Path) -> dict:
    """Return a task's seeds among the results; raises UserError for those of other settings."""
    asked = settings.stored()
    entry = results["tasks"].setdefault(name, {"settings": asked, "seeds": {}})
    # an older file lacks newer settings
    saved_settings = Settings().stored() | entry["settings"]
    for setting, value in asked.items():
        saved = saved_settings[setting]
        require(
            saved == value,
            f"{out}: holds {name} with {setting}={saved!r}, not {value!r}; "
            "remove it or name another --out",
        )
    return entry["seeds"]


def run_task(task: str, settings: Settings, run: LoadedRun, results: dict, out: Path):
    """Fine-tune with each seed that the results lack, and save them after each.

    settings: those of this task, resolved
    """
    names = [task]
    if task == "mnli" and "mnli-mm" in settings.tasks:
        names.append("mnli-mm")

    # which seeds are not done?
    saved = {name: open_task(name, settings, results, out) for name in names}
    seeds = []
    for seed in map(str, settings.seeds):
        if any(seed not in saved[name] for name in names):
            seeds.append(seed)
    if not seeds:
        print(f"{task}: done before, as {out} says", flush=True)
        return

    # does the model allow what is asked of it?
    n_layer = run.model.config.n_layer
    for layer in settings.n_open:
        require(layer < n_layer, f"n_open: layer {layer}, but the model's {n_layer} count from 0")
    longest = run.model.max_tokens
    require(
        longest is None or settings.max_length <= longest,
        f"max_length = {settings.max_length}, but the model takes at most {longest} tokens",
    )

    # read the texts; the train file says which labels there are
    reading = (run.tokenizer, run.boundary, settings.max_length, settings.limit)
    train = read_split(find_file(settings.data, f"{task}.train*.jsonl"), task, *reading)
    valid = {}
    for name in names:
        path = find_file(settings.data, f"{name}.valid.jsonl")
        valid[name] = read_split(path, name, *reading, classes=train.classes)

    for seed in seeds:
        best = finetune(copy.deepcopy(run.model), train, valid, settings, int(seed))
        for name in names:
            saved[name][seed] = best[name]
        write_result(out, results)


def main(args: list[str]):
    """Run what the command line asks for; raises UserError and OSError."""
    with full_memory_in_one_line("choose a smaller --batch_rows"):
        run_tasks(args)


def run_tasks(args: list[str]):
    """Fine-tune on the tasks that the command line asks for, then print the tables."""
    names_run = len(args) > 0 and not args[0].startswith("-")
    settings = config.load(Settings, args[1:] if names_run else args)  # --help ends here
    require(names_run, "name a run first: finetune.py RUN [FILE...] [--SETTING=VALUE...]")
    by_task = settings.by_task()

    # the model, and what earlier calls have found out about it
    device = find_device_for_texts(settings.device)
    run = load_run(args[0], device, settings.weights)
    out = Path(settings.out) if settings.out else run.path.parent / f"glue_{run.step}.json"
    results = open_results(out, run, device)
    print(f"{run.describe()}; {settings.dtype} on {device}; results in {out}", flush=True)

    # each task is saved before the next begins
    for task, task_settings in by_task.items():
        if task != "mnli-mm":  # done with mnli
            run_task(task, task_settings.resolve(run.full_schedule), run, results, out)

    # the tables: of the tasks, and with the zero-shot scores of the same checkpoint
    tasks = {task: results["tasks"][task]["seeds"] for task in by_task}
    limited = any(task_settings.limit for task_settings in by_task.values())
    note = f"percent; best epoch by {settings.select} on the valid split, "
    note += "which is also the one reported, as in the challenge"
    if limited:
        note += "; PARTIAL: a limit was set"
    print(f"\n{table(tasks)}\n{note}")
    # the macro average of 2024 is made of all eleven tasks; submit.py has that of later years
    if len(tasks) == len(TASKS):
        glue = None if limited else mean_of_tasks(tasks)
        print(four_parts(run.path.parent, run.step, run.weights, glue))


if __name__ == "__main__":
    with clean_exit():
        main(sys.argv[1:])
