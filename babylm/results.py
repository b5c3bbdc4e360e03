"""From the scores of items to results: averages, tables, and files of eval.py and finetune.py."""

import json
from pathlib import Path
from statistics import mean

import numpy as np

from antlm.files import write_whole
from babylm.protocols import PROTOCOLS
from babylm.tasks import Item
from config import UserError

# ------------------------------------------------------------------------------ points and averages


def points(scores: list[float], right: int = 0) -> float:
    """Return what an item earns by the scores of its options; right: index of the right one.

    Options that tie for the best score share the point. To take the first of equals would give
    100 percent to a model that scores all texts alike.
    """
    best = max(scores)
    if scores[right] < best:
        return 0.0
    return 1 / scores.count(best)


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value from 1; equal values share the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]


def spearman(scores: list[list[float]], ratios: list[float]) -> float:
    """Return Spearman's rho between a model's preference for the first option and people's.

    scores: of two options each
    Returns 0 where either side prefers all alike.
    """
    # the softmax over two scores ranks as their difference does
    first, second = np.array(scores).T
    ranks = mean_ranks(first - second)
    human_ranks = mean_ranks(np.array(ratios))
    if np.ptp(ranks) == 0 or np.ptp(human_ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks, human_ranks)[0, 1])


def average(parts: list[dict]) -> dict:
    """Average without weights: a large subset counts as much as a small one. Ties are summed."""
    accuracy = {}
    ties = {}
    for mode in parts[0]["accuracy"]:
        accuracy[mode] = sum(part["accuracy"][mode] for part in parts) / len(parts)
        ties[mode] = sum(part["ties"][mode] for part in parts)
    return {"items": sum(part["items"] for part in parts), "accuracy": accuracy, "ties": ties}


def judge(items: list[Item], scores: list[list[float]]) -> tuple[float, int]:
    """Return the percentage of items that are right, and how many of them tie.

    An item ties if its right option shares the best score with another. Of comparisons with people
    the percentage is 100 times Spearman's rho, and no option is right.
    """
    choices = [item.choice for item in items]
    if choices[0].ratio is not None:
        return 100 * spearman(scores, [choice.ratio for choice in choices]), 0
    earned = [points(s, choice.right) for s, choice in zip(scores, choices, strict=True)]
    accuracy = sum(100 * point for point in earned) / len(earned)
    return accuracy, sum(0 < point < 1 for point in earned)


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
        group_of.setdefault(item.choice.subset, item.choice.group)
        members.setdefault(item.choice.subset, []).append(number)

    # a subset keeps the scores of its options, from which all else can be computed again
    subsets = {}
    for name in sorted(members, key=lambda name: (group_of[name], name)):
        items_of_subset = [items[number] for number in members[name]]
        subset = {"items": len(items_of_subset), "accuracy": {}, "ties": {}}
        subset |= {"group": group_of[name], "scores": {}}
        for mode in scores:
            scores_of_subset = [scores[mode][number] for number in members[name]]
            subset["scores"][mode] = scores_of_subset
            accuracy, ties = judge(items_of_subset, scores_of_subset)
            subset["accuracy"][mode] = accuracy
            subset["ties"][mode] = ties
        subsets[name] = subset

    # average over subsets
    groups = {}
    for subset in subsets.values():
        groups.setdefault(subset["group"], []).append(subset)
    groups = {name: average(parts) for name, parts in groups.items()}
    return average(list(subsets.values())) | {"groups": groups, "subsets": subsets}


# ------------------------------------------------------------------------------------------ tables


def table(task: str, result: dict, modes: list[str]) -> str:
    """Lay out a task's result: percent correct and ties of each group, subset and mode."""
    # what stands in which line; a group that is its only subset has one line
    rows = []
    for group, group_score in result["groups"].items():
        subsets = [name for name, score in result["subsets"].items() if score["group"] == group]
        indent = ""
        if group and subsets != [group]:
            rows.append((group, group_score))
            indent = "  "
        for subset in subsets:
            rows.append((indent + subset, result["subsets"][subset]))
    # the number to quote: subsets count alike, however many items they have
    rows.append((f"macro average of {len(result['subsets'])}", result))

    # columns as wide as their widest entry
    width = max(len(label) for label, _ in [(task, None), *rows])
    head = f"{task:{width}}  items"
    for mode in modes:
        head += f"{mode:>8} ties"
    lines = []
    for label, score in rows:
        line = f"{label:{width}}{score['items']:7}"
        for mode in modes:
            line += f"{score['accuracy'][mode]:8.1f}{score['ties'][mode]:5}"
        lines.append(line)
    rule = "-" * len(head)
    return "\n".join([head, rule, *lines[:-1], rule, lines[-1]])


def human_lines(human: dict) -> list[str]:
    """Describe the tasks that compare a model with people, a line for each mode."""
    lines = []
    if "reading" in human:
        for mode, surprisals in human["reading"]["pred"].items():
            line = f"reading, {mode}: {len(surprisals)} words, {mean(surprisals):.2f} nats each"
            if mode in human["reading"]["scores"]:
                score = human["reading"]["scores"][mode]
                line += (
                    f"; of the variance left open, self-paced reading {100 * score['spr']:.2f}%, "
                    f"eye tracking {100 * score['rt']:.2f}%"
                )
            lines.append(line)
    if "aoa" in human:
        for mode, surprisals in human["aoa"]["surprisals"].items():
            line = f"age of acquisition, {mode}: {len(surprisals)} words in context"
            lines.append(f"{line}, {mean(surprisals):.2f} nats each")
    return [*lines, "noise at 10M words: to be quoted apart from the tasks above, and with seeds"]


# What the official code makes of an item whose right option ties for the best, by Protocol.ties.
OFFICIAL_TIES = {
    "first": "the official code takes the first option, which is the right one",
    "at random": "the official code draws one of the best, so that its figure depends on chance",
}


def note(result: dict) -> str:
    """Say what makes the percentages of a result incomparable with those of others."""
    year = result["protocol"]
    lines = [f"protocol {year}"]
    if result["tasks"]:
        lines = [f"percent correct, ties share the point, protocol {year}"]
    if any(entry["kind"] == "wug" for entry in result["tasks"].values()):
        lines.append("wug: 100 times the rank correlation with people")
    # how the official code would count
    n_ties = {}
    for mode in result["modes"]:
        n_ties[mode] = sum(entry["ties"][mode] for entry in result["tasks"].values())
    if any(n_ties.values()):
        counts = ", ".join(f"{n} {mode}" for mode, n in n_ties.items())
        lines.append(f"items that tie: {counts}; {OFFICIAL_TIES[PROTOCOLS[year].ties]}")
    if result["partial"]:
        lines.append(f"PARTIAL: only the first {result['limit']} items of each file")
    return "\n".join(lines)


def report(result: dict, block_size: int) -> str:
    """Lay out a result of eval.py: a table of each task, and what is to be known of them."""
    parts = []
    for task, entry in result["tasks"].items():
        parts.append(table(task, entry, result["modes"]))
        n_long = entry["longer_than_training_rows"]
        if n_long:
            parts[-1] += (
                f"\n{n_long} options are longer than the {block_size} tokens of a training row"
            )
    if result["human"]:
        parts.append("\n".join(human_lines(result["human"])))
    return "\n\n".join([*parts, note(result)])


# ------------------------------------------------------------------------------------- result files


def write_result(path: Path, result: dict):
    """Write a result file, one line for each of its keys; raises OSError.

    The file is complete or as it was before, whenever the program is stopped.
    """
    lines = []
    for key, value in result.items():
        lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    raw = text.encode(errors="backslashreplace")  # paths may hold bytes that are not UTF-8
    write_whole(path, lambda file: file.write(raw))


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
