"""Fine-tune a checkpoint on the GLUE tasks of the BabyLM challenge and score it.

    python finetune.py runs/babyllama --data=evaluation_data/glue_filtered                # all tasks of the folder
    python finetune.py runs/babyllama --tasks=rte,"wsc --epochs=30" --seeds=12,13,14      # a task may have its own flags
    python finetune.py runs/babyllama config/finetune/glue_lora.py                                 # low-rank adapters

Settings come from override files and flags as in train.py. The defaults are those of the 2024 challenge. Each finished
task is saved: the same command goes on where it was stopped.
"""

import copy
import json
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config
from antlm.checkpoint import file_sha256, load_run
from antlm.distributed import find_device
from antlm.tokenizer import PAD
from babylm.glue import TASKS, find, four_parts, measure, read_split
from babylm.results import read_result, write_result
from config import UserError
from data import OBJECTIVES, hash64
from model import Transformer, bare_norm, build_mask
from schedule import parse


@dataclass
class Settings:
    data: str = "evaluation_data/glue_filtered"  # folder of TASK.train.jsonl and TASK.valid.jsonl
    tasks: tuple = tuple(TASKS)  # each a name, or a name and flags for it alone: "wsc --epochs=30"
    seeds: tuple = ("12",)  # of head, order and dropout; several give mean and standard deviation
    out: str = ""  # result file; default: glue_STEP.json beside the checkpoint
    # what the model sees
    mask: str = "auto"  # full | causal | auto: full if the model was trained with MLM or MNTP
    n_open: tuple = ()  # with mask=causal: numbers of the layers, from 0, that see the whole text (arXiv 2401.14556)
    pool: str = "auto"  # start | mean | last token; auto: start under the full mask, else last
    max_length: int = 128  # tokens of an input, start tokens among them; the longer of two texts is cut first
    # what is learnt
    lora_rank: int = 0  # rank of adapters on the blocks' matrices, 4 to 64; 0: all weights are trained
    lora_alpha: float = 16.0  # adapters count alpha / rank
    lora_dropout: float = 0.1
    dropout: float = 0.1  # in the classifier; the model's own stays as it was trained
    lr: float = 5e-5  # peak, 2e-5 to 5e-4; linear to 0
    warmup: float = 0.0  # share of all steps
    weight_decay: float = 0.0
    batch_rows: int = 64
    epochs: int = 10  # at most
    patience: int = 3  # epochs without a gain of 0.001 before the task stops; 0: never
    select: str = "f1"  # best epoch by f1 (2024; accuracy beyond two classes) | metric (the one reported) | loss
    limit: int = 0  # only so many lines of each file, for a quick look; 0: all
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "float32"  # float32 | bfloat16 (autocast)

    def check(self):
        """Raise ValueError, which names the setting, for a value or combination that cannot be."""
        choices = dict(mask=("auto", "full", "causal"), pool=("auto", "start", "mean", "last"), dtype=("float32", "bfloat16"),
                       select=("f1", "metric", "loss"), device=("auto", "cpu", "cuda", "mps"))
        rules = [(name, getattr(self, name) in names, f"must be one of {', '.join(names)}") for name, names in choices.items()]
        rules += [(name, getattr(self, name) > 0, "must be greater than 0") for name in ("lr", "batch_rows", "epochs", "lora_alpha")]
        rules += [(name, getattr(self, name) >= 0, "must not be negative") for name in
                  ("lora_rank", "weight_decay", "patience", "limit")]
        rules += [(name, 0 <= getattr(self, name) < 1, "must lie in [0, 1)") for name in ("dropout", "lora_dropout", "warmup")]
        rules += [(name, all(re.fullmatch("[0-9]{1,9}", str(x)) for x in getattr(self, name)), "must be whole numbers")
                  for name in ("seeds", "n_open")]
        rules += [("max_length", self.max_length >= 8, "must be at least 8 tokens"),
                  ("seeds", len(self.seeds) == len(set(map(str, self.seeds))) > 0, "must be one or more different numbers"),
                  ("n_open", not self.n_open or self.mask == "causal", "opens layers of a causal mask: set mask=causal"),
                  ("tasks", len(self.tasks) > 0, "must name at least one task")]
        for name, holds, expected in rules:
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)!r} {expected}")

    def by_task(self) -> dict[str, "Settings"]:
        """The settings of each task, in the order of TASKS; raises UserError."""
        found = {}
        for entry in self.tasks:
            name, *flags = str(entry).split() or [""]
            if name not in TASKS or name in found:
                raise UserError(f"tasks: {name!r} is named twice or not one of {', '.join(TASKS)}")
            changes = {}
            for flag in flags:
                changes |= config.from_flag(Settings, flag) if flag.startswith("--") else config.from_file(Settings, flag)
            if own := changes.keys() & {"tasks", "out", "device"} or name == "mnli-mm" and changes.keys():
                raise UserError(f"tasks: {name}: {min(own)} cannot be set for this task alone")
            found[name] = replace(self, **changes)
            try:
                found[name].check()
            except ValueError as e:
                raise UserError(f"tasks: {name}: {e}") from None
        if "mnli-mm" in found and "mnli" not in found:
            raise UserError("tasks: mnli-mm is scored with the model of mnli; name that, too")
        return {name: found[name] for name in TASKS if name in found}

    def resolve(self, schedule: str) -> "Settings":
        """These settings with nothing left on auto that follows from the schedule that the model was trained with."""
        learnt_causal = all(OBJECTIVES[name].causal for phase in parse(schedule) for name, _ in phase.mix)
        is_causal = self.mask == "causal" or self.mask == "auto" and learnt_causal
        return replace(self, mask="causal" if is_causal else "full", n_open=tuple(sorted(map(int, self.n_open))),
                       pool=self.pool if self.pool != "auto" else "last" if is_causal else "start")

    def stored(self) -> dict:
        """As a result file has them, without values that may differ between calls which share it."""
        return json.loads(json.dumps(asdict(self) | dict.fromkeys(("tasks", "seeds", "out", "device"))))


# ------------------------------------------------------------------------------------------------- reading tasks


# ----------------------------------------------------------------------------------------------------- the model


class LowRank(nn.Module):
    """A frozen linear map plus a trained one of low rank, which starts at zero (LoRA, Hu et al. 2022)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.linear, self.scale, self.dropout = linear.requires_grad_(False), alpha / rank, dropout
        self.down = nn.Linear(linear.in_features, rank, bias=False, device=linear.weight.device)
        self.up = nn.Linear(rank, linear.out_features, bias=False, device=linear.weight.device)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(F.dropout(x, self.dropout, self.training))) * self.scale


class Classifier(nn.Module):
    """The trained blocks and a new head on one vector of each row: norm, Linear, GELU, norm, dropout, Linear.

    The head is that of LTG-BERT and of the 2025 pipeline. causal: one bool per layer.
    """

    def __init__(self, model: Transformer, n_classes: int, causal: list[bool], pool: str, s: Settings):
        super().__init__()
        self.embedding, self.blocks, self.causal, self.pool, self.dropout = model.embedding, model.blocks, causal, pool, s.dropout
        D = model.config.n_embd
        self.dense, self.out = nn.Linear(D, D), nn.Linear(D, n_classes)
        if s.lora_rank:
            self.embedding.requires_grad_(False)
            self.blocks.requires_grad_(False)
            for block in self.blocks:
                for name, child in list(block.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(block, name, LowRank(child, s.lora_rank, s.lora_alpha, s.lora_dropout))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, T), of which the first lengths (B,) count -> logits (B, classes)."""
        x, shared = self.embedding(tokens, 0)
        for block, causal in zip(self.blocks, self.causal):
            mask = build_mask(tokens.size(1), tokens.size(1), causal=causal, lengths=lengths, device=x.device)
            x = block(x, shared, mask)
        if self.pool == "mean":
            inside = torch.arange(x.size(1), device=x.device) < lengths[:, None]
            x = (x * inside[..., None]).sum(1) / lengths[:, None]
        else:
            x = x[torch.arange(len(x), device=x.device), lengths - 1 if self.pool == "last" else 0]
        x = bare_norm(F.gelu(self.dense(bare_norm(x))))
        return self.out(F.dropout(x, self.dropout, self.training))


def rows_to_device(ids: list[list[int]], rows: np.ndarray, device: torch.device):
    """Rows padded to the longest of them: tokens (B, T), lengths (B,)."""
    lengths = np.array([len(ids[i]) for i in rows])
    tokens = np.full((len(rows), lengths.max()), PAD)
    for row, i in zip(tokens, rows):
        row[:len(ids[i])] = ids[i]
    return torch.from_numpy(tokens).to(device), torch.from_numpy(lengths).to(device)


def batches(ids: list[list[int]], size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Each item once, in an order that (seed, epoch) gives; within 16 batches, rows of like length go together."""
    order = np.argsort(hash64(seed, epoch, np.arange(len(ids))), kind="stable")
    lengths, found = np.array([len(row) for row in ids]), []
    for window in np.split(order, range(16 * size, len(order), 16 * size)):
        window = window[np.argsort(lengths[window], kind="stable")]
        found += np.split(window, range(size, len(window), size))
    return [found[i] for i in np.argsort(hash64(seed, epoch, np.arange(len(found)), 1), kind="stable")]


# --------------------------------------------------------------------------------------------------- fine-tuning


@torch.inference_mode()
def predict(model: Classifier, ids: list[list[int]], labels: np.ndarray, s: Settings, device: torch.device):
    """Class numbers (N,) and mean cross-entropy; raises UserError where a logit is not finite."""
    model.eval()
    predicted, loss = np.zeros(len(ids), int), 0.0
    by_length = np.argsort([len(row) for row in ids], kind="stable")
    for rows in np.split(by_length, range(128, len(ids), 128)):
        with torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bfloat16"):
            logits = model(*rows_to_device(ids, rows, device)).float()
        if not logits.isfinite().all():
            raise UserError("the fine-tuned model's logits are not finite; choose a smaller lr")
        predicted[rows] = logits.argmax(-1).cpu().numpy()
        loss += F.cross_entropy(logits, torch.from_numpy(labels[rows]).to(device), reduction="sum").item()
    return predicted, loss / len(ids)


def finetune(model: Transformer, train: tuple, valid: dict[str, tuple], causal: list[bool], pool: str, s: Settings,
             seed: int) -> dict[str, dict]:
    """Train a classifier on `train` -> scores and predicted labels on each split of `valid`, after the best epoch.

    train and each valid split as read_split gives them; the first of valid chooses the epoch. Changes the model.
    Raises UserError where a logit is not finite.
    """
    device, task = next(model.parameters()).device, next(iter(valid))
    ids, labels, classes = train
    torch.manual_seed(seed)
    net = Classifier(model, len(classes), causal, pool, s).to(device)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=s.lr, weight_decay=s.weight_decay, fused=device.type != "mps")
    steps = s.epochs * -(-len(ids) // s.batch_rows)
    warmup = round(s.warmup * steps)
    metric = {"f1": "f1" if len(classes) == 2 else "accuracy", "metric": TASKS[task][1], "loss": "loss"}[s.select]
    step, best, waited, results, began = 0, -float("inf"), 0, {}, time.time()
    for epoch in range(1, s.epochs + 1):
        net.train()
        total = torch.zeros((), device=device)
        for rows in batches(ids, s.batch_rows, seed, epoch):
            optimizer.param_groups[0]["lr"] = s.lr * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))
            with torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bfloat16"):
                logits = net(*rows_to_device(ids, rows, device))
            loss = F.cross_entropy(logits.float(), torch.from_numpy(labels[rows]).to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach() * len(rows)
            step += 1
        found = {}
        for name, (its_ids, its_labels, _) in valid.items():
            predicted, valid_loss = predict(net, its_ids, its_labels, s, device)
            scores = measure(its_labels, predicted, len(classes)) | {"loss": valid_loss}
            found[name] = {"score": scores[TASKS[name][1]], **scores, "epoch": epoch,
                           "predictions": [classes[i] for i in predicted]}
        now = found[task]
        score = -now["loss"] if metric == "loss" else now[metric] / 100
        waited = 0 if score > best + 1e-3 else waited + 1  # as Hugging Face's EarlyStoppingCallback counts
        if score > best:
            best, results = score, found
        left = (time.time() - began) / epoch * (s.epochs - epoch)
        print(f"{task} seed {seed}  epoch {epoch}/{s.epochs}  loss {total.item() / len(ids):.3f}  valid loss {now['loss']:.3f}  "
              f"accuracy {now['accuracy']:.1f}  f1 {now['f1']:.1f}  mcc {now['mcc']:.1f}  at most {left:.0f} s left", flush=True)
        if s.patience and waited >= s.patience:
            break
    return results


# -------------------------------------------------------------------------------------------------- the program


def table(results: dict[str, dict[str, dict]]) -> str:
    """results[task][seed] -> one line a task and their unweighted mean, with the deviation over several seeds."""
    lines, means = [f"{'task':9}{'metric':>10}{'score':>8}{'+-':>7}{'accuracy':>10}{'f1':>7}{'mcc':>7}  epochs"], []
    for task, seeds in results.items():
        column = {name: [r[name] for r in seeds.values()] for name in ("score", "accuracy", "f1", "mcc", "epoch")}
        mean = {name: statistics.mean(values) for name, values in column.items()}
        spread = f"{statistics.stdev(column['score']):.1f}" if len(seeds) > 1 else "-"
        means.append(mean["score"])
        lines.append(f"{task:9}{TASKS[task][1]:>10}{mean['score']:8.1f}{spread:>7}{mean['accuracy']:10.1f}{mean['f1']:7.1f}"
                     f"{mean['mcc']:7.1f}  {' '.join(map(str, column['epoch']))}")
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, lines[1], f"{f'mean of {len(means)} tasks':19}{statistics.mean(means):8.1f}"])


def main(argv: list[str]):
    """Do what the command line asks for; raises UserError, UserError, UserError, UserError and OSError."""
    if not argv or argv[0].startswith("-"):
        raise UserError("name a run first: finetune.py RUN [FILE...] [--SETTING=VALUE...]; the settings stand at its top")
    s = config.load(Settings, argv[1:])
    by_task, device = s.by_task(), str(find_device(s.device))
    run = load_run(argv[0], device)
    path, content, model, tokenizer = run.path, run.content, run.model, run.tokenizer
    schedule, n_layer = content["settings"]["schedule"], model.config.n_layer
    out = Path(s.out or path.parent / f"glue_{content['step']}.json")
    whole = {"checkpoint": str(path), "step": content["step"], "schedule": schedule, "config": content["config"],
             "checkpoint_sha256": file_sha256(path), "device": device, "torch": torch.__version__, "tasks": {}}
    if out.exists():
        found = read_result(out)
        if found.get("checkpoint_sha256") != whole["checkpoint_sha256"]:
            raise UserError(f"{out}: holds the results of other weights; remove it or name another --out")
        whole["tasks"] = found["tasks"]
    print(f"{path}: step {content['step']} of {schedule}, {model.config.backbone}; {s.dtype} on {device}; "
          f"results in {out}", flush=True)

    for task, own in by_task.items():
        if task == "mnli-mm":
            continue
        if own.n_open and max(map(int, own.n_open)) >= n_layer:
            raise UserError(f"n_open: layer {max(map(int, own.n_open))}, but the model's {n_layer} count from 0")
        own = own.resolve(schedule)
        used, is_causal = own.stored(), own.mask == "causal"
        names = [task, "mnli-mm"] if task == "mnli" and "mnli-mm" in by_task else [task]
        stored = [whole["tasks"].setdefault(name, {"settings": used, "seeds": {}}) for name in names]
        for name, entry in zip(names, stored):
            if differ := [k for k in used if entry["settings"].get(k) != used[k]]:
                raise UserError(f"{out}: holds {name} with {differ[0]}={entry['settings'].get(differ[0])!r}, not "
                                f"{used[differ[0]]!r}; remove it or name another --out")
        seeds = [seed for seed in map(str, own.seeds) if not all(seed in entry["seeds"] for entry in stored)]
        if not seeds:
            print(f"{task}: done before, as {out} says", flush=True)
            continue
        train = read_split(find(own, f"{task}.train*.jsonl"), task, own, tokenizer, content["boundary"])
        valid = {name: read_split(find(own, f"{name}.valid.jsonl"), name, own, tokenizer, content["boundary"], train[2])
                 for name in names}
        causal = [is_causal and layer not in own.n_open for layer in range(n_layer)]
        for seed in seeds:
            results = finetune(copy.deepcopy(model), train, valid, causal, own.pool, own, int(seed))
            for name, entry in zip(names, stored):
                entry["seeds"][seed] = results[name]
            write_result(out, whole)

    its = {name: whole["tasks"][name]["seeds"] for name in by_task}
    partial = any(whole["tasks"][name]["settings"]["limit"] for name in by_task)
    print(f"\n{table(its)}\npercent; best epoch by {s.select} on the valid split, which is also the one reported, as in "
          "the challenge" + "; PARTIAL: a limit was set" * partial)
    glue = None if partial or len(its) < len(TASKS) else statistics.mean(
        statistics.mean(r["score"] for r in seeds.values()) for seeds in its.values())
    print(four_parts(path.parent, content["step"], glue))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except torch.OutOfMemoryError:
        sys.exit("finetune.py: the device's memory is full; choose a smaller --batch_rows")
    except (UserError, OSError) as e:
        sys.exit(f"finetune.py: {e}")
