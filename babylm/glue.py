"""The GLUE tasks of the challenge: texts, labels, measures."""

import re
import statistics
from pathlib import Path

import numpy as np

from antlm.tokenizer import Tokenizer
from babylm.results import read_result
from babylm.tasks import json_lines
from config import UserError

TASKS = {  # name: texts of an input, what is reported (EVAL 2024: finetune_classification.py, score_predictions.py)
    "boolq": (("{question}", "{passage}"), "accuracy"),
    "cola": (("{sentence}",), "mcc"),
    "mnli": (("{premise}", "{hypothesis}"), "accuracy"),
    "mnli-mm": (("{premise}", "{hypothesis}"), "accuracy"),  # the mnli model on other genres, not trained again
    "mrpc": (("{sentence1}", "{sentence2}"), "f1"),
    "multirc": (("Question: {question} Answer: {answer}", "{paragraph}"), "accuracy"),
    "qnli": (("{question}", "{sentence}"), "accuracy"),
    "qqp": (("{question1}", "{question2}"), "f1"),
    "rte": (("{sentence1}", "{sentence2}"), "accuracy"),
    "sst2": (("{sentence}",), "accuracy"),
    "wsc": (('Does "{span2_text}" refer to "{span1_text}" in this passage?', "{text}"), "accuracy"),
}


def join(a: list[int], b: list[int], length: int) -> list[int]:
    """The two one after the other, the longer one cut first ("longest_first" of Hugging Face tokenizers)."""
    kept = min(len(b), max(length // 2, length - len(a)))
    return a[:length - kept] + b[:kept]


def read_split(path: Path, task: str, s, tokenizer: Tokenizer, boundary: str, classes: list[int] = []):
    """Token ids of a file's inputs, class numbers of its labels, and the classes: those given, or all labels found.

    Raises UserError for a field that is missing or no text, and for a label outside the classes.
    """
    templates, known, ids, labels, cut = TASKS[task][0], {}, [], [], 0
    fields = re.findall(r"{(\w+)}", "".join(templates))
    for where, record in json_lines(path, s.limit):
        for name in fields:
            if not isinstance(record.get(name), str):
                raise UserError(f"{where}: {task} needs a label and the texts {', '.join(fields)}; {name!r} is "
                                + ("missing" if name not in record else "no text"))
        label = record.get("label")
        if type(label) is not int or label < 0 or classes and label not in classes:
            raise UserError(f"{where}: label is {ascii(label)[:40]}, not "
                            + (f"one of the train file's {classes}" if classes else "a whole number from 0 on"))
        pair = []
        for text in (template.format(**record) for template in templates):
            if text not in known:  # a paragraph of multirc stands in many lines
                known[text] = tokenizer.encode_text(text, boundary)
            pair.append(known[text])
        cut += sum(map(len, pair)) > s.max_length
        ids.append(join(pair[0], pair[1] if len(pair) > 1 else [], s.max_length))
        labels.append(label)
    classes = classes or sorted(set(labels))
    if len(classes) < 2:
        raise UserError(f"{path}: every label is {classes[0]}; a classifier needs two or more")
    print(f"{task}: {path.name}, {len(ids):,} items" + f" (the first {s.limit} only)" * (s.limit > 0)
          + f", {cut:,} cut to {s.max_length} tokens" * (cut > 0), flush=True)
    return ids, np.searchsorted(classes, labels), classes


def measure(labels: np.ndarray, predicted: np.ndarray, n: int) -> dict[str, float]:
    """Percent accuracy, F1 of class 1 (macro-averaged beyond two classes) and Matthews correlation, of n classes."""
    confusion = np.bincount(labels * n + predicted, minlength=n * n).reshape(n, n).astype(float)
    hits, true, guessed, total = confusion.diagonal(), confusion.sum(1), confusion.sum(0), confusion.sum()
    f1 = 2 * hits / np.maximum(1, true + guessed)
    spread = (total ** 2 - (true ** 2).sum()) * (total ** 2 - (guessed ** 2).sum())
    mcc = (hits.sum() * total - true @ guessed) / np.sqrt(spread) if spread else 0.0  # Gorodkin 2004
    return {"accuracy": 100 * hits.sum() / total, "f1": 100 * (f1[1] if n == 2 else f1.mean()), "mcc": 100 * mcc}
PARTS = {("blimp", 67): "BLiMP", ("blimp", 5): "supplement", ("ewok", 11): "EWoK"}  # by kind and number of subsets


def four_parts(folder: Path, step: int, glue: float | None) -> str:
    """The macro average of the challenge in each mode that eval.py has scored this checkpoint in, or what it lacks."""
    parts = {}  # mode: part: percent
    for file in sorted(folder.glob(f"eval_*_{step}*.json"), key=lambda file: file.stat().st_mtime):
        result = read_result(file)  # "100" is in the name of step 1000, too
        for task in result["tasks"].values() if result["step"] == step and not result["partial"] else []:
            if part := PARTS.get((task.get("kind"), len(task["subsets"]))):
                for mode, accuracy in task["accuracy"].items():
                    parts.setdefault(f"{mode} {result['protocol']}", {})[part] = accuracy
    lines = []
    for mode, scores in (parts or {"every mode": {}}).items():
        scores = scores | ({"GLUE": glue} if glue is not None else {})
        missing = [part for part in (*PARTS.values(), "GLUE") if part not in scores]
        lines.append(f"{mode}: " + "  ".join(f"{part} {score:.1f}" for part, score in scores.items())
                     + (f"  no macro average: {', '.join(missing)} not scored whole" if missing else
                        f"  macro average {statistics.mean(scores.values()):.1f}"))
    return "\n".join(lines)


def find(s, name: str) -> Path:
    """The one file of that name, which may hold a star, in the data folder; raises UserError."""
    if not Path(s.data).is_dir():
        raise UserError(f"{s.data}: is not a folder; --data names one that holds TASK.train.jsonl and TASK.valid.jsonl")
    files = sorted(Path(s.data).glob(name))
    if len(files) != 1:
        raise UserError(f"{s.data}: holds {len(files)} files {name} where one was expected; add it, or choose other --tasks")
    return files[0]
