"""The GLUE tasks of the BabyLM challenge: their texts, labels and measures."""

import re
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

from antlm.tokenizer import Tokenizer
from babylm.results import read_result
from babylm.tasks import json_lines
from config import require


class Task(NamedTuple):
    """How a task's records become text, and which measure the challenge reports for it."""

    texts: tuple[str, ...]  # one or two, with the names of a record's fields in braces
    metric: str  # accuracy, f1 or mcc


# As in finetune_classification.py and score_predictions.py of the 2024 pipeline.
TASKS = {
    "boolq": Task(("{question}", "{passage}"), "accuracy"),
    "cola": Task(("{sentence}",), "mcc"),
    "mnli": Task(("{premise}", "{hypothesis}"), "accuracy"),
    # other genres than mnli's, answered by the model of mnli; nothing is trained for them
    "mnli-mm": Task(("{premise}", "{hypothesis}"), "accuracy"),
    "mrpc": Task(("{sentence1}", "{sentence2}"), "f1"),
    "multirc": Task(("Question: {question} Answer: {answer}", "{paragraph}"), "accuracy"),
    "qnli": Task(("{question}", "{sentence}"), "accuracy"),
    "qqp": Task(("{question1}", "{question2}"), "f1"),
    "rte": Task(("{sentence1}", "{sentence2}"), "accuracy"),
    "sst2": Task(("{sentence}",), "accuracy"),
    "wsc": Task(
        ('Does "{span2_text}" refer to "{span1_text}" in this passage?', "{text}"), "accuracy"
    ),
}


class Split(NamedTuple):
    """The items of one file."""

    ids: list[list[int]]  # the tokens of each item
    labels: np.ndarray  # (N,) the class number of each item
    classes: list[int]  # the label that each class number stands for


# ------------------------------------------------------------------------------------ reading


def find_file(folder: str, pattern: str) -> Path:
    """Return the one file of the data folder that fits the pattern; raises UserError."""
    require(
        Path(folder).is_dir(),
        f"{folder}: is not a folder; --data names one with TASK.train.jsonl and TASK.valid.jsonl",
    )
    files = sorted(Path(folder).glob(pattern))
    require(
        len(files) == 1,
        f"{folder}: holds {len(files)} files {pattern} where one was expected; "
        "add it, or choose other --tasks",
    )
    return files[0]


def join(first: list[int], second: list[int], length: int) -> list[int]:
    """Join two texts and cut the longer one first, as "longest_first" of Hugging Face does."""
    n_second = min(len(second), max(length // 2, length - len(first)))
    n_first = length - n_second
    return first[:n_first] + second[:n_second]


def check_record(record: dict, place: str, task: str, fields: list[str], classes: list[int]):
    """Raise UserError, naming file and line, for a field or label that the task cannot use."""
    needs = f"{place}: {task} needs a label and the texts {', '.join(fields)}"
    for name in fields:
        require(name in record, f"{needs}; {name!r} is missing")
        require(isinstance(record[name], str), f"{needs}; {name!r} is no text")

    # exactly int: True is a bool, and JSON's 1.0 a float
    label = record.get("label")
    is_label = type(label) is int and label >= 0
    expected = "a whole number from 0 on"
    if classes:
        is_label = is_label and label in classes
        expected = f"one of the train file's {classes}"
    require(is_label, f"{place}: label is {ascii(label)[:40]}, not {expected}")


def read_split(
    path: Path,
    task: str,
    tokenizer: Tokenizer,
    boundary: str,
    max_length: int,
    limit: int = 0,
    classes: list[int] | None = None,
) -> Split:
    """Read the first `limit` items of a task's file (0: all), cut to max_length tokens.

    classes: those of the train file, or None where the file's own labels give them
    Raises UserError for a missing field, a field that is no text, or a label outside the classes.
    """
    templates = TASKS[task].texts
    fields = re.findall(r"{(\w+)}", "".join(templates))
    ids = []
    labels = []
    n_cut = 0
    known = {}  # a paragraph of multirc stands in many lines
    for place, record in json_lines(path, limit):
        check_record(record, place, task, fields, classes or [])
        parts = []
        for template in templates:
            text = template.format(**record)
            if text not in known:
                known[text] = tokenizer.encode_text(text, boundary)
            parts.append(known[text])

        second = parts[1] if len(parts) > 1 else []
        if len(parts[0]) + len(second) > max_length:
            n_cut += 1
        ids.append(join(parts[0], second, max_length))
        labels.append(record["label"])

    # labels may be any whole numbers; class numbers count from 0 in their order
    classes = classes or sorted(set(labels))
    require(
        len(classes) > 1, f"{path}: every label is {classes[0]}; a classifier needs two or more"
    )
    message = f"{task}: {path.name}, {len(ids):,} items"
    if limit:
        message += f" (the first {limit} only)"
    if n_cut:
        message += f", {n_cut:,} cut to {max_length} tokens"
    print(message, flush=True)
    return Split(ids, np.searchsorted(classes, labels), classes)


# ----------------------------------------------------------------------------------- measures


def measure(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> dict[str, float]:
    """Return accuracy, F1 and Matthews correlation in percent.

    labels, predicted: (N,) class numbers
    F1 is that of class 1; beyond two classes, the mean over the classes that occur in labels or
    predictions (scikit-learn's average="macro").
    The correlation of n classes is that of Gorodkin (2004), 0 where it is undefined.
    """
    # confusion[i, j]: how many items of class i were taken for class j
    confusion = np.bincount(labels * n_classes + predicted, minlength=n_classes**2)
    confusion = confusion.reshape(n_classes, n_classes).astype(float)
    right = confusion.diagonal()
    true = confusion.sum(1)
    guessed = confusion.sum(0)
    total = confusion.sum()

    f1 = 2 * right / np.maximum(1, true + guessed)
    if n_classes == 2:
        f1 = f1[1]
    else:
        f1 = f1[true + guessed > 0].mean()

    # the correlation is undefined where all labels, or all predictions, are of one class
    mcc = 0.0
    spread = (total**2 - (true**2).sum()) * (total**2 - (guessed**2).sum())
    if spread:
        mcc = (right.sum() * total - true @ guessed) / np.sqrt(spread)
    return {"accuracy": 100 * right.sum() / total, "f1": 100 * f1, "mcc": 100 * mcc}


# -------------------------------------------------------------------------------------- reports


def mean(seeds: dict[str, dict], key: str) -> float:
    """Return the mean of a number over the seeds of a task."""
    return statistics.mean(result[key] for result in seeds.values())


def mean_of_tasks(tasks: dict[str, dict[str, dict]]) -> float:
    """Return the unweighted mean of the tasks' scores, each the mean over its seeds."""
    return statistics.mean(mean(seeds, "score") for seeds in tasks.values())


def table(tasks: dict[str, dict[str, dict]]) -> str:
    """Return a line for each task and one for their mean, with the deviation over the seeds.

    tasks: results by task and seed
    """
    header = f"{'task':9}{'metric':>10}{'score':>8}{'+-':>7}{'accuracy':>10}{'f1':>7}{'mcc':>7}"
    header += "  epochs"
    rule = "-" * len(header)
    lines = [header, rule]
    for task, seeds in tasks.items():
        deviation = "-"
        if len(seeds) > 1:
            deviation = f"{statistics.stdev(result['score'] for result in seeds.values()):.1f}"
        epochs = " ".join(str(result["epoch"]) for result in seeds.values())
        lines.append(
            f"{task:9}{TASKS[task].metric:>10}{mean(seeds, 'score'):8.1f}{deviation:>7}"
            f"{mean(seeds, 'accuracy'):10.1f}{mean(seeds, 'f1'):7.1f}{mean(seeds, 'mcc'):7.1f}"
            f"  {epochs}"
        )
    title = f"mean of {len(tasks)} tasks"
    return "\n".join([*lines, rule, f"{title:19}{mean_of_tasks(tasks):8.1f}"])


# The zero-shot parts of the macro average, by a result's kind and its number of subsets: a part of
# which only some files were scored must not count.
PARTS = {("blimp", 67): "BLiMP", ("blimp", 5): "supplement", ("ewok", 11): "EWoK"}


def zero_shot_parts(folder: Path, step: int, weights: str) -> dict[str, dict[str, float]]:
    """Return what eval.py has scored these weights of a step's checkpoint in: mode, part, percent.

    weights: one of WEIGHTS in checkpoint.py
    """
    parts = {}
    # the newest result counts where a part was scored twice
    files = sorted(folder.glob(f"eval_*_{step}*.json"), key=lambda file: file.stat().st_mtime)
    for file in files:
        result = read_result(file)
        # the pattern fits step 1000 for step 100
        if result["step"] != step or result.get("weights", "last") != weights or result["partial"]:
            continue
        for task in result["tasks"].values():
            part = PARTS.get((task.get("kind"), len(task["subsets"])))
            if part is None:
                continue
            for mode, accuracy in task["accuracy"].items():
                parts.setdefault(f"{mode} {result['protocol']}", {})[part] = accuracy
    return parts


def four_parts(folder: Path, step: int, weights: str, glue: float | None) -> str:
    """Describe the macro average of the challenge in each mode, or what it lacks.

    folder: that of the run, where the results of eval.py lie; step, weights: of the checkpoint
    glue: the mean of the GLUE tasks in percent, None where not all are scored
    """
    lines = []
    for mode, scores in (zero_shot_parts(folder, step, weights) or {"every mode": {}}).items():
        if glue is not None:
            scores["GLUE"] = glue
        listed = "  ".join(f"{part} {score:.1f}" for part, score in scores.items())
        missing = [part for part in (*PARTS.values(), "GLUE") if part not in scores]
        if missing:
            ending = f"no macro average: {', '.join(missing)} not scored whole"
        else:
            ending = f"macro average {statistics.mean(scores.values()):.1f}"
        lines.append(f"{mode}: {listed}  {ending}")
    return "\n".join(lines)
