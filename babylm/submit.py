"""Write the files that the BabyLM challenge takes, from a run's results of eval.py and finetune.py.

    python -m babylm.submit runs/babyllama --year 2024 --mode causal --out submission
    python -m babylm.submit runs/babyllama --year 2025 --mode masked --out submission

For 2024 that is one .json.gz, as collect_results.py of evaluation-pipeline-2024 writes it; for 2025
a tree of folders that collate_preds.py of evaluation-pipeline-2025 reads. The format of 2026 is not
written yet.

Everything is checked before the first byte is written: each part must be scored whole, by the same
checkpoint, on sets as large as the challenge's. The task files that results name are read again, so
run it from the folder in which eval.py ran.
"""

import argparse
import functools
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path

from antlm.files import write_whole
from antlm.program import clean_exit
from babylm.results import read_result
from babylm.tasks import Item, fingerprint, read_tasks
from config import UserError

# Items of each part, as collate_preds.py of 2025 asserts them subset by subset; here their sums.
COUNTS = {
    "blimp": 59875,
    "blimp_supplement": 5218,
    "ewok": 7618,
    "entity_tracking": 9483,
    "comps": 91028,
}
GLUE_COUNTS = {
    "boolq": 1635,
    "cola": 522,
    "mnli": 4908,
    "mnli-mm": 4916,
    "mrpc": 204,
    "multirc": 2424,
    "qnli": 2732,
    "qqp": 20215,
    "rte": 139,
    "sst2": 436,
    "wsc": 52,
}
BACKENDS = {"causal": "causal", "masked": "mlm", "mntp": "mntp"}  # what the pipeline calls a mode
FOLDERS_2025 = {
    "blimp": "blimp/blimp_filtered",
    "blimp_supplement": "blimp/supplement_filtered",
    "ewok": "ewok/ewok_filtered",
    "entity_tracking": "entity_tracking/entity_tracking",
    "comps": "comps/comps",
}


@dataclass
class ScoredPart:
    """A part of the challenge as eval.py has scored it."""

    file: Path  # the result
    source: str  # folder of the items that were scored
    task: str  # what eval.py calls the part
    subsets: dict  # name: items, scores by mode
    options_sha256: str


# --------------------------------------------------------------------------------- find the parts


def part_name(kind: str, subsets: dict) -> str:
    """Return the challenge's name of a task, from its kind and the names of its subsets."""
    if kind == "blimp" and "hypernym" in subsets:
        return "blimp_supplement"
    return kind


def subset_name(part: str, subset: str) -> str:
    """Return the challenge's name of a subset; COMPS alone has other names than its files."""
    if part == "comps":
        return subset.removeprefix("comps_").replace("-", "_")
    return subset


def find_parts(results: dict[Path, dict], mode: str, year: str) -> dict[str, ScoredPart]:
    """Find each part of the year in the newest file that holds it whole.

    results: {file: its content}, oldest first
    Raises UserError if a part was scored on sets of other counts alone.
    """
    parts = {}
    wrong = {}  # part: what is wrong with its count
    for file, result in results.items():
        if result["partial"] or mode not in result["modes"] or result["protocol"] != year:
            continue
        for task, scored in result["tasks"].items():
            subsets = scored["subsets"]
            part = part_name(scored["kind"], subsets)
            if part not in YEARS[year].parts:
                continue
            n_items = sum(subset["items"] for subset in subsets.values())
            if n_items == COUNTS[part]:
                sha256 = scored["options_sha256"]
                parts[part] = ScoredPart(file, result["task"], task, subsets, sha256)
            else:  # such as the challenge's fast_eval, which may stand beside the whole set
                wrong[part] = (
                    f"{file}: {part} has {n_items:,} items where the challenge has "
                    f"{COUNTS[part]:,}; score the challenge's whole set"
                )

    # a wrong count matters only where no file has the right one
    for part, message in wrong.items():
        if part not in parts:
            raise UserError(message)
    return parts


# ------------------------------------------------------------------------------------ predictions


def completion(part: str, year: str, option: tuple[str, int]) -> str:
    """Return the string that stands for a chosen option in the challenge's files.

    option: a text and the character where its scored target starts
    """
    text, start = option
    if part in ("ewok", "entity_tracking"):
        return text[start:]
    if year == "2024":
        return f" {text}"  # that pipeline scores BLiMP's sentences after a space
    return text


def zero_shot(
    name: str, part: ScoredPart, items: list[Item], mode: str, year: str
) -> tuple[dict, int]:
    """Return the predictions of a part by subset, and how many of its items were ties.

    items: all items of part.source
    Raises UserError if they are not those that were scored.
    """
    items = [item for item in items if item.task == part.task]
    if fingerprint(items) != part.options_sha256:
        raise UserError(
            f"{part.file}: {part.source} no longer holds the items of {part.task} that were scored"
        )
    items_of = {}
    for item in items:
        items_of.setdefault(item.subset, []).append(item)

    # scores stand in the order of the items, subset by subset
    predictions = {}
    n_ties = 0
    for subset, result in part.subsets.items():
        chosen = []
        for item, scores in zip(items_of[subset], result["scores"][mode], strict=True):
            best = max(scores)
            if scores.count(best) > 1:
                n_ties += 1
            # the right option stands first and must not win a tie by its place: take the last
            index = max(i for i, score in enumerate(scores) if score == best)
            chosen.append(completion(name, year, item.options[index]))
        label = subset_name(name, subset)
        predictions[label] = numbered(label, chosen)
    return predictions, n_ties


def numbered(name: str, predictions: list) -> dict:
    """Return predictions in the form of both pipelines, with an id for each."""
    lines = [{"id": f"{name}_{i}", "pred": pred} for i, pred in enumerate(predictions)]
    return {"predictions": lines}


def glue(file: Path, tasks: dict, year: str) -> dict:
    """Return the predictions of each GLUE task of the year that was fine-tuned, by its first seed.

    Raises UserError if a task's predictions are not as many as the challenge has items.
    """
    predictions = {}
    for task in YEARS[year].glue:
        seeds = tasks.get(task, {"seeds": {}})["seeds"]
        if not seeds:
            continue
        # a submission has room for one seed
        labels = next(iter(seeds.values()))["predictions"]
        if len(labels) != GLUE_COUNTS[task]:
            raise UserError(
                f"{file}: {task} has {len(labels):,} predictions where the challenge has "
                f"{GLUE_COUNTS[task]:,}; fine-tune on the challenge's whole set, without a limit"
            )
        predictions[task] = numbered(task, labels)
    return predictions


# ------------------------------------------------------------------------ the format of each year


def files_2024(out: Path, name: str, mode: str, parts: dict, tasks: dict) -> dict[Path, dict]:
    """Return {file: content} of a submission: one file for all."""
    return {out / f"{name}_textonly_predictions.json.gz": {"glue": tasks, **parts}}


def files_2025(out: Path, name: str, mode: str, parts: dict, tasks: dict) -> dict[Path, dict]:
    """Return {file: content} of a submission: a file for each part and each GLUE task."""
    root = out / name / "main"
    files = {}
    for part, predictions in parts.items():
        folder = root / "zero_shot" / BACKENDS[mode] / FOLDERS_2025[part]
        files[folder / "predictions.json"] = predictions
    for task, predictions in tasks.items():
        files[root / "finetune" / task / "predictions.json"] = {task: predictions}
    return files


@dataclass
class Year:
    """What the challenge of a year takes."""

    parts: tuple[str, ...]  # scored by eval.py
    glue: tuple[str, ...]  # tasks of finetune.py
    files: Callable  # makes {path: content} of what is predicted
    note: str = ""  # for the user


YEARS = {
    "2024": Year(
        parts=("blimp", "blimp_supplement", "ewok"), glue=tuple(GLUE_COUNTS), files=files_2024
    ),
    "2025": Year(
        parts=tuple(FOLDERS_2025),
        glue=("boolq", "mnli", "mrpc", "multirc", "qqp", "rte", "wsc"),
        files=files_2025,
        note="wug_adj, wug_past, reading and aoa are scored by the official pipeline alone: "
        "export the model for it",
    ),
}


# ------------------------------------------------------------------------------------ the program


def read_results(run: Path) -> tuple[int, dict[Path, dict]]:
    """Return the last step that was scored, and {file: content} of its results, oldest first."""
    files = [*run.glob("eval_*.json"), *run.glob("glue_*.json")]
    if not files:
        raise UserError(f"{run}: holds no result (eval_*.json, glue_*.json); run eval.py first")
    # by age, so that newer files replace older ones
    files.sort(key=lambda file: file.stat().st_mtime)
    results = {file: read_result(file) for file in files}
    newest = max(result["step"] for result in results.values())
    return newest, {file: result for file, result in results.items() if result["step"] == newest}


def write_files(files: dict[Path, dict]):
    """Write each file as JSON, compressed if it is a .gz; raises UserError if one exists."""
    # nothing is written unless all can be
    for path in files:
        if path.exists():
            raise UserError(f"{path}: exists already; remove it or choose another --out")
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, ensure_ascii=False).encode()
        if path.suffix == ".gz":
            text = gzip.compress(text)
        write_whole(path, methodcaller("write", text))


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, help="run folder with the results of eval.py and finetune.py")
    add("--year", required=True, choices=YEARS, help="format, and protocol of the scores")
    add("--mode", required=True, choices=BACKENDS, help="which zero-shot scores to hand in")
    add("--name", help="name of the model (default: the run folder's)")
    add("--out", type=Path, required=True, help="folder to write into")
    add("--incomplete", action="store_true", help="write what there is, though parts are missing")
    args = parser.parse_args(argv)
    year = YEARS[args.year]
    name = args.name or args.run.resolve().name
    if "." in name:
        raise UserError(f"--name {name}: the pipelines cut it at its last dot; choose one without")

    # what there is, of one checkpoint
    step, results = read_results(args.run)
    glue_file = args.run / f"glue_{step}.json"
    tasks = glue(glue_file, results.get(glue_file, {"tasks": {}})["tasks"], args.year)
    zero_shot_results = {file: result for file, result in results.items() if "modes" in result}
    scored = find_parts(zero_shot_results, args.mode, args.year)

    # what is missing
    missing = [part for part in year.parts if part not in scored]
    missing += [f"glue {task}" for task in year.glue if task not in tasks]
    if missing and not args.incomplete:
        raise UserError(
            f"{args.run}: missing in {args.mode} mode, protocol {args.year}, at step {step}: "
            f"{', '.join(missing)}; score them (eval.py --protocol {args.year}), or --incomplete"
        )

    # predictions in the year's order of parts
    read_once = functools.cache(read_tasks)  # one folder may hold several parts
    parts = {}
    n_ties = 0
    for part in year.parts:
        if part in scored:
            items = read_once(scored[part].source)
            parts[part], ties = zero_shot(part, scored[part], items, args.mode, args.year)
            n_ties += ties

    files = year.files(args.out, name, args.mode, parts, tasks)
    write_files(files)
    print(*files, sep="\n")
    n_subtasks = sum(len(predictions) for predictions in parts.values())
    print(f"{n_subtasks} subtasks and {len(tasks)} GLUE tasks of step {step}, {n_ties} ties")
    if missing:
        print(f"MISSING: {', '.join(missing)}")
    if year.note:
        print(year.note)


if __name__ == "__main__":
    with clean_exit():
        main()
