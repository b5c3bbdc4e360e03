"""The files that the BabyLM challenge takes, from the results of eval.py and finetune.py in a run folder.

    python -m babylm.submit runs/babyllama --year 2024 --mode causal --out submission    # one .json.gz
    python -m babylm.submit runs/babyllama --year 2025 --mode masked --out submission    # a tree for collate_preds.py

Everything is checked before the first byte is written: that each part is scored whole, by the same checkpoint, on the
sets with the challenge's counts. Formats: collect_results.py of evaluation-pipeline-2024; sentence_zero_shot and
finetune of evaluation-pipeline-2025 (2026 is the same). The files that the results name are read again, so run it from
the folder where they were made.
"""

import argparse
import functools
import gzip
import json
import sys
from pathlib import Path

from babylm.results import read_result
from babylm.tasks import Item, fingerprint, read_tasks
from config import UserError

# Items by subset, as collate_preds.py of 2025 asserts them; of BLiMP's 67 files and entity tracking's splits the sums.
SUPPLEMENT = dict(hypernym=842, qa_congruence_easy=64, qa_congruence_tricky=165, subject_aux_inversion=3867, turn_taking=280)
EWOK = {"agent-properties": 2210, "material-dynamics": 770, "material-properties": 170, "physical-dynamics": 120,
        "physical-interactions": 556, "physical-relations": 818, "quantitative-properties": 314,
        "social-interactions": 294, "social-properties": 328, "social-relations": 1548, "spatial-relations": 490}
ENTITY = dict(regular=3152, ambiref=3224, move_contents=3107)
COMPS = dict(base=49340, wugs=13896, wugs_dist_before=13896, wugs_dist_in_between=13896)
GLUE = {"boolq": 1635, "cola": 522, "mnli": 4908, "mnli-mm": 4916, "mrpc": 204, "multirc": 2424, "qnli": 2732,
        "qqp": 20215, "rte": 139, "sst2": 436, "wsc": 52}
GLUE_2025 = ("boolq", "mnli", "mrpc", "multirc", "qqp", "rte", "wsc")
BACKEND = {"causal": "causal", "masked": "mlm", "mntp": "mntp"}
FOLDER_2025 = {"blimp": "blimp/blimp_filtered", "blimp_supplement": "blimp/supplement_filtered", "ewok": "ewok/ewok_filtered",
               "entity_tracking": "entity_tracking/entity_tracking", "comps": "comps/comps"}
ELSEWHERE = "wug_adj, wug_past, reading and aoa are scored by the official pipeline alone (export the model for it)"


def part_name(kind: str, subsets) -> str:
    """What the challenge calls a task of eval.py, by its kind and the names of its subsets."""
    return "blimp_supplement" if kind == "blimp" and set(subsets) <= set(SUPPLEMENT) else kind


def uid(part: str, subset: str) -> str:
    return subset.removeprefix("comps_").replace("-", "_") if part == "comps" else subset


def completion(part: str, year: str, option: tuple[str, int]) -> str:
    """The string that stands for a chosen option: what was scored, with the space in front that the pipelines put there."""
    text, start = option
    if part in ("ewok", "entity_tracking"):
        return text[start:]
    return f" {text}" if year == "2024" else text


def check_counts(part: str, found: dict[str, int], where: str):
    """Raise UserError unless the subsets hold as many items as the challenge's."""
    if part == "blimp":
        found, expected = {"files": len(found), "items": sum(found.values())}, {"files": 67, "items": 59875}
    elif part == "entity_tracking":
        found = {file: sum(n for name, n in found.items() if name.rsplit("_", 2)[0] == file) for file in ENTITY}
        expected = ENTITY
    else:
        expected = {"blimp_supplement": SUPPLEMENT, "ewok": EWOK, "comps": COMPS}[part]
    if found != expected:
        name = next(name for name in {**expected, **found} if found.get(name) != expected.get(name))
        raise UserError(f"{where}: {part} has {found.get(name, 0):,} {name} where the challenge has "
                        f"{expected.get(name, 0):,}; score the challenge's whole set")


def find_parts(results: dict[Path, dict], mode: str, year: str, wanted) -> dict[str, tuple[Path, str]]:
    """The newest file that holds each wanted part whole, in that mode and that year's protocol, and the part's name in it.

    Raises UserError where a part was scored on sets of other counts alone.
    """
    parts, other = {}, {}
    for file, result in results.items():
        usable = not result["partial"] and mode in result["modes"] and result["protocol"] == year
        for task, scored in result["tasks"].items() if usable else []:
            part = part_name(scored["kind"], scored["subsets"])
            if part in wanted:
                try:
                    check_counts(part, {uid(part, name): subset["items"] for name, subset in scored["subsets"].items()}, str(file))
                    parts[part] = file, task
                except UserError as e:  # such as the challenge's fast_eval, which may stand beside the whole set
                    other[part] = e
    for part in (part for part in other if part not in parts):
        raise other[part]
    return {part: parts[part] for part in wanted if part in parts}


def zero_shot(file: Path, result: dict, items: list[Item], part: str, task: str, mode: str, year: str) -> tuple[dict, int]:
    """Predictions by uid from a result of eval.py on `items`, and how many ties there were; raises UserError.

    In a tie the last of the best options is taken: the right one stands first and must not win by its place.
    """
    items = [item for item in items if item.task == task]
    if fingerprint(items) != result["tasks"][task]["options_sha256"]:
        raise UserError(f"{file}: {result['task']} no longer holds the items of {task} that were scored")
    members, found, ties = {}, {}, 0
    for item in items:
        members.setdefault(item.subset, []).append(item)
    for name, subset in result["tasks"][task]["subsets"].items():
        own, predictions = uid(part, name), []
        for i, (item, scores) in enumerate(zip(members[name], subset["scores"][mode], strict=True)):
            best = max(scores)
            ties += scores.count(best) > 1
            chosen = item.options[len(scores) - 1 - scores[::-1].index(best)]
            predictions.append({"id": f"{own}_{i}", "pred": completion(part, year, chosen)})
        found[own] = {"predictions": predictions}
    return found, ties


def glue(file: Path, result: dict, year: str) -> tuple[dict, list[str]]:
    """Predictions by task of each task's first seed, and the tasks that are missing; raises UserError."""
    parts, missing = {}, []
    for task in GLUE if year == "2024" else GLUE_2025:
        if task not in result or not result[task]["seeds"]:
            missing.append(f"glue {task}")
            continue
        predictions = next(iter(result[task]["seeds"].values()))["predictions"]
        if len(predictions) != GLUE[task] or not all(type(x) is int for x in predictions):
            raise UserError(f"{file}: {task} has {len(predictions):,} predictions where the challenge has {GLUE[task]:,}; "
                            "fine-tune on the challenge's whole set, without a limit")
        parts[task] = {"predictions": [{"id": f"{task}_{i}", "pred": x} for i, x in enumerate(predictions)]}
    return parts, missing


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"submit.py: {message}")
    parser.add_argument("run", type=Path, help="run folder with the results of eval.py and finetune.py")
    parser.add_argument("--year", required=True, choices=("2024", "2025"),
                        help="format, and protocol of the scores; 2026 takes those of 2025")
    parser.add_argument("--mode", required=True, choices=BACKEND, help="which zero-shot scores to hand in")
    parser.add_argument("--name", help="of the model; default: the run folder's")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--incomplete", action="store_true", help="write what there is, though parts are missing")
    a = parser.parse_args(argv)
    name = a.name or a.run.resolve().name
    if "." in name:
        raise UserError(f"--name {name}: the pipelines cut a name at its last dot; choose one without")
    files = sorted([*a.run.glob("eval_*.json"), *a.run.glob("glue_*.json")], key=lambda file: file.stat().st_mtime)
    results = {file: read_result(file) for file in files}
    if not results:
        raise UserError(f"{a.run}: holds no result of eval.py or finetune.py (eval_*.json, glue_*.json)")
    step = max(result["step"] for result in results.values())
    results = {file: result for file, result in results.items() if result["step"] == step}
    glue_file = a.run / f"glue_{step}.json"
    tasks, missing = glue(glue_file, results.pop(glue_file, {"tasks": {}})["tasks"], a.year)
    wanted = ("blimp", "blimp_supplement", "ewok") if a.year == "2024" else tuple(FOLDER_2025)
    found = find_parts({file: result for file, result in results.items() if "modes" in result}, a.mode, a.year, wanted)
    missing = [part for part in wanted if part not in found] + missing
    if missing and not a.incomplete:
        raise UserError(f"{a.run}: missing in {a.mode} mode, protocol {a.year}, at step {step}: {', '.join(missing)}; "
                        f"score them (eval.py --protocol {a.year}), or --incomplete")
    parts, ties, read = {}, 0, functools.cache(read_tasks)  # one result may hold several parts
    for part, (file, task) in found.items():
        parts[part], n = zero_shot(file, results[file], read(results[file]["task"]), part, task, a.mode, a.year)
        ties += n

    if a.year == "2024":
        written = {a.out / f"{name}_textonly_predictions.json.gz": {"glue": tasks, **parts}}
    else:
        root = a.out / name / "main"
        written = {root / "zero_shot" / BACKEND[a.mode] / FOLDER_2025[part] / "predictions.json": parts[part] for part in parts}
        written |= {root / "finetune" / task / "predictions.json": {task: tasks[task]} for task in tasks}
    for path in written:
        if path.exists():
            raise UserError(f"{path}: exists already; remove it or choose another --out")
    for path, content in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, ensure_ascii=False).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
        print(path)
    print(f"{sum(map(len, parts.values()))} subtasks and {len(tasks)} GLUE tasks of step {step}, {ties} ties"
          + (f"; MISSING: {', '.join(missing)}" if missing else "") + (f"; {ELSEWHERE}" if a.year == "2025" else ""))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as e:
        sys.exit(f"submit.py: {e}")
