"""From the scores of items to results, and the result files of eval.py and finetune.py."""

import json
from pathlib import Path

from antlm.files import write_whole
from babylm.tasks import Item
from config import UserError

# ------------------------------------------------------------------------------ points and averages


def points(scores: list[float]) -> float:
    """Return what an item earns by the scores of its options, the first of which is right.

    Options that tie for the best score share the point. To take the first of equals would give
    100 percent to a model that scores all texts alike.
    """
    best = max(scores)
    if scores[0] < best:
        return 0.0
    return 1 / scores.count(best)


def average(parts: list[dict]) -> dict:
    """Average without weights: a large subset counts as much as a small one. Ties are summed."""
    accuracy = {}
    ties = {}
    for mode in parts[0]["accuracy"]:
        accuracy[mode] = sum(part["accuracy"][mode] for part in parts) / len(parts)
        ties[mode] = sum(part["ties"][mode] for part in parts)
    return {"items": sum(part["items"] for part in parts), "accuracy": accuracy, "ties": ties}


def summarize(items: list[Item], scores: dict[str, list[list[float]]]) -> dict:
    """Return number of items, percent correct and ties of a task, of its groups and its subsets.

    scores: by mode, of each item's options
    A subset is the mean of its items, a group and the task are means of their subsets, as in the
    BabyLM evaluation pipeline.
    """
    # sort the items into subsets; the group of a subset is that of its first item
    group_of = {}
    members = {}
    for number, item in enumerate(items):
        group_of.setdefault(item.subset, item.group)
        members.setdefault(item.subset, []).append(number)

    # a subset keeps the scores of its options, from which all else can be computed again
    subsets = {}
    for name in sorted(members, key=lambda name: (group_of[name], name)):
        subset = {"items": len(members[name]), "accuracy": {}, "ties": {}}
        subset |= {"group": group_of[name], "scores": {}}
        for mode in scores:
            subset["scores"][mode] = [scores[mode][number] for number in members[name]]
            earned = [points(options) for options in subset["scores"][mode]]
            subset["accuracy"][mode] = sum(100 * point for point in earned) / len(earned)
            subset["ties"][mode] = sum(0 < point < 1 for point in earned)
        subsets[name] = subset

    # average over subsets
    groups = {}
    for subset in subsets.values():
        groups.setdefault(subset["group"], []).append(subset)
    groups = {name: average(parts) for name, parts in groups.items()}
    return average(list(subsets.values())) | {"groups": groups, "subsets": subsets}


# ------------------------------------------------------------------------------------- result files


def write_result(path: Path, result: dict):
    """Write a result file, one line for each of its keys; raises OSError.

    The file is complete or as it was before, whenever the program is stopped.
    """
    lines = []
    for key, value in result.items():
        lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_whole(path, lambda file: file.write(text.encode()))


def read_result(path: Path) -> dict:
    """Read a result file; raises UserError where it is none."""
    try:
        result = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not a result file ({error}); remove it") from None
    is_result = isinstance(result, dict) and isinstance(result.get("tasks"), dict)
    if not is_result or "step" not in result:
        raise UserError(f"{path}: not a result file of eval.py or finetune.py; remove it")
    return result
