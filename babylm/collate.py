"""From results to the files of a submission, as the pipelines of 2024, 2025 and 2026 write them.

Where options tie, a prediction follows the official code of the year (Protocol.ties); the scores of
eval.py let them share the point.
"""

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from babylm import aoa, reading
from babylm.challenge import BACKENDS, YEARS, Set, mark_name
from babylm.protocols import PROTOCOLS
from babylm.tasks import Item, Tasks, fingerprint
from config import require


@dataclass
class Scored:
    """All that a submission is made of.

    name: of the model; mode: key of BACKENDS; year: key of YEARS
    marks: the words at whose checkpoints the challenge wants scores; [] in 2024
    full: {set: its items, and the result of the last checkpoint}
    fast: {words seen: {set: its items, and the result of that checkpoint}}
    pairs: the words in context; surprisals: {words seen: surprisal of each pair in nats}
    age: the score that comes from them, None without one
    glue: {task: result of its first seed}, since the files have room for one
    """

    name: str
    mode: str
    year: str
    marks: list[int]
    full: dict[Set, tuple[Tasks, dict]]
    fast: dict[int, dict[Set, tuple[Tasks, dict]]]
    pairs: list[aoa.Pair]
    surprisals: dict[int, np.ndarray]
    age: aoa.Score | None
    glue: dict[str, dict]


# -------------------------------------------------------------------------------------- predictions


def official_choice(scores: list[float], ties: str, id: str) -> int:
    """Return the option that the official code takes.

    ties: of the Protocol; id: of the prediction, from which a random choice follows
    """
    best = max(scores)
    tied = [option for option, score in enumerate(scores) if score == best]
    if ties == "first":
        return tied[0]
    # drawn as there, but the same by every call
    return random.Random(id).choice(tied)


def predicted_text(item: Item, option: int, year: str) -> str:
    """Return the string that stands for an option in the challenge's files."""
    text, start = item.choice.options[option]
    if start == 0 and year == "2024":
        return f" {text}"  # that pipeline scores a sentence after a space
    # where contexts are compared, the targets are the same
    if item.kind.name == "comps" or (item.kind.name == "ewok" and year == "2026"):
        return text
    return text[start:]


def subset_name(item: Item) -> str:
    """Return the challenge's name of an item's subset."""
    if item.choice.id:
        return item.choice.id  # GlobalPIQA has a subset for each line
    if item.kind.name == "comps":
        return item.choice.subset.removeprefix("comps_").replace("-", "_")
    return item.choice.subset


def scores_of_items(items: list[Item], result: dict, mode: str) -> list[list[float]]:
    """Return the scores of each item's options; raises UserError for a result of other items."""
    entry = result["tasks"][items[0].task]
    require(
        entry["options_sha256"] == fingerprint(items),
        f"{items[0].source}: the set has changed while it was scored; start again",
    )
    # scores stand in the order of the items, subset by subset
    left = {name: iter(subset["scores"][mode]) for name, subset in entry["subsets"].items()}
    return [next(left[item.choice.subset]) for item in items]


def predict(items: list[Item], result: dict, mode: str, year: str) -> list[dict]:
    """Return what predictions.json holds of each item."""
    predictions = []
    n_of_subset = Counter()
    for item, scores in zip(items, scores_of_items(items, result, mode), strict=True):
        subset = subset_name(item)
        id = f"{subset}_{n_of_subset[subset]}"
        n_of_subset[subset] += 1
        option = official_choice(scores, PROTOCOLS[year].ties, id)
        prediction = {"id": id, "pred": predicted_text(item, option, year)}
        if item.choice.ratio is not None:
            first, second = scores
            prediction["prob"] = float(1 / (1 + np.exp(second - first)))
        predictions.append(prediction)
    return predictions


def set_file(tasks: Tasks, result: dict, mode: str, year: str) -> dict:
    """Return the content of predictions.json of a set."""
    if tasks.reading:
        entry = result["human"]["reading"]
        return reading.predictions(entry["pred"][mode], entry["prev_pred"][mode])
    content = {}
    predictions = predict(tasks.items, result, mode, year)
    for item, prediction in zip(tasks.items, predictions, strict=True):
        subset = content.setdefault(subset_name(item), {"predictions": []})
        subset["predictions"].append(prediction)
    return content


def glue_file(task: str, result: dict) -> dict:
    """Return the content of predictions.json of a task of fine-tuning."""
    labels = result["predictions"]
    return {task: {"predictions": [{"id": f"{task}_{i}", "pred": x} for i, x in enumerate(labels)]}}


# ---------------------------------------------------------------------------------- the fast scores


def fast_score(part: Set, tasks: Tasks, result: dict, mode: str, year: str) -> dict[str, float]:
    """Return what collate_preds.py makes of a fast set: the score of each subset, at best 1.

    It compares predictions with the right option's target. The predictions of EWoK in 2026 hold the
    context as well, so that none is right: every model has 0 there.
    """
    if tasks.reading:
        return result["human"]["reading"]["scores"][mode]
    items = tasks.items
    if items[0].choice.ratio is not None:  # correlated with people
        subsets = result["tasks"][items[0].task]["subsets"]
        return {name: subset["accuracy"][mode] / 100 for name, subset in subsets.items()}

    n_right = Counter()
    n_items = Counter()
    for item, prediction in zip(items, predict(items, result, mode, year), strict=True):
        subset = part.key if item.choice.id else subset_name(item)
        text, start = item.choice.options[item.choice.right]
        n_right[subset] += prediction["pred"].strip() == text[start:].strip()
        n_items[subset] += 1
    return {subset: n_right[subset] / n for subset, n in n_items.items()}


def fast_results(scored: Scored) -> dict[str, list]:
    """Return the scores of each fast set, for each checkpoint; None where missing."""
    results = {}
    for part in YEARS[scored.year].sets:
        if not part.fast:
            continue
        results[part.key] = []
        for mark in scored.marks:
            score = None
            if part in scored.fast.get(mark, {}):
                score = fast_score(part, *scored.fast[mark][part], scored.mode, scored.year)
            results[part.key].append(score)
    return results


# ---------------------------------------------------------------------------------------- the files


def zero_shot_path(scored: Scored, revision: str, *parts: str) -> str:
    """Return where the tree of results has a file of a checkpoint's scores."""
    return str(PurePosixPath(revision, "zero_shot", BACKENDS[scored.mode], *parts))


def set_path(scored: Scored, part: Set) -> str:
    return zero_shot_path(scored, "main", part.tree, part.folder, "predictions.json")


def words_path(scored: Scored, file: str) -> str:
    """Return where a file of the age of acquisition lies, which is of all checkpoints."""
    return zero_shot_path(scored, "main", "AoA_word", file)


def glue_path(task: str) -> str:
    return f"main/finetune/{task}/predictions.json"


def result_tree(scored: Scored) -> dict[str, dict]:
    """Return {path below the model's folder: content} of the files that collate_preds.py reads."""
    tree = {}
    # the last checkpoint
    for part, (tasks, result) in scored.full.items():
        tree[set_path(scored, part)] = set_file(tasks, result, scored.mode, scored.year)
    for task, result in scored.glue.items():
        tree[glue_path(task)] = glue_file(task, result)

    # all checkpoints
    for mark, parts in scored.fast.items():
        for part, (tasks, result) in parts.items():
            path = (part.tree, part.fast, "predictions.json")
            content = set_file(tasks, result, scored.mode, scored.year)
            tree[zero_shot_path(scored, mark_name(mark), *path)] = content
    if scored.surprisals:
        content = aoa.surprisal_file(scored.name, scored.pairs, scored.surprisals)
        tree[words_path(scored, "surprisal.json")] = content
    if scored.age is not None:
        tree[words_path(scored, "aoa_score.json")] = aoa.score_file(scored.age)
    return tree


def collate(scored: Scored, tree: dict[str, dict]) -> dict:
    """Return the one file that collate_preds.py makes of the tree; None stands for what is missing.

    tree: as result_tree returns it
    """
    year = YEARS[scored.year]
    content = {part.key: tree.get(set_path(scored, part)) for part in year.sets}
    # the surprisals are taken only if they are those of all checkpoints
    content[year.words] = None
    if set(scored.surprisals) == set(scored.marks):
        content[year.words] = tree[words_path(scored, "surprisal.json")]
    if year.scores_age:
        content["aoa"] = tree.get(words_path(scored, "aoa_score.json"))
    content["glue"] = {}
    for task in year.glue:
        content["glue"] |= tree.get(glue_path(task), {})
    content["fast_eval_results"] = fast_results(scored)
    return content


def submission_2024(scored: Scored) -> dict:
    """Return the content of the one file of 2024, as its collect_results.py writes it."""
    content = {"glue": {}}
    for task, result in scored.glue.items():
        content["glue"] |= glue_file(task, result)
    for part, (tasks, result) in scored.full.items():
        content[part.key] = set_file(tasks, result, scored.mode, scored.year)
    return content


# --------------------------------------------------------------------------------------- the scores


def scores_by_key(scored: Scored) -> dict[str, float]:
    """Return the score of each set, of fine-tuning and of the ages, times 100; ties share a point.

    Tasks of fine-tuning that are missing count 0.
    """
    scores = {}
    for part, (tasks, result) in scored.full.items():
        if tasks.reading:
            both = result["human"]["reading"]["scores"][scored.mode]
            scores[part.key] = 100 * (both["spr"] + both["rt"]) / 2
        else:
            task = tasks.items[0].task
            scores[part.key] = result["tasks"][task]["accuracy"][scored.mode]
    if scored.glue:
        total = sum(result["score"] for result in scored.glue.values())
        scores["glue"] = total / len(YEARS[scored.year].glue)
    if scored.age is not None:
        scores["aoa"] = 100 * scored.age.r
    return scores
