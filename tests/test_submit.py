"""Tests of babylm/submit.py, on a small challenge. Alone: python -m pytest tests/test_submit.py"""

import gzip
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from babylm import submit
from babylm.results import read_result, write_result
from babylm.tasks import fingerprint, read_tasks
from config import UserError

ROOT = Path(__file__).parent.parent
MODES = ("causal", "masked")
# folder of eval.py: {file: items}; the challenge has more
SIZES = {
    "blimp_filtered": {"phenomenon_0": 3, "phenomenon_1": 4},
    "supplement_filtered": {"hypernym": 2, "turn_taking": 3},
    "ewok_filtered": {"agent-properties": 4, "spatial-relations": 2},
    "entity_tracking": {"regular": 6, "ambiref": 6},
    "comps": {"comps_base": 3, "comps_wugs_dist-before": 2},
}
GLUE = {"boolq": 5, "cola": 4, "rte": 3}


def record(task: str, file: str, i: int) -> dict:
    """Line i of a task's file, of which the first option is right."""
    if task == "ewok_filtered":
        contexts = {"Context1": "One.", "Context2": "Two."}
        return {"Target1": f"right {i}", "Target2": f"wrong {i}", "Domain": file, **contexts}
    if task == "entity_tracking":
        options = [f"{option} {i}" for option in "abcde"]
        return {"input_prefix": "The box holds ", "options": options, "numops": i % 3}
    if task == "comps":
        prefixes = {"prefix_acceptable": f"A bird {i}", "prefix_unacceptable": f"A stone {i}"}
        return {"property_phrase": "can fly.", **prefixes}
    return {"sentence_good": f"Good {file} {i}.\nTwo lines", "sentence_bad": f"Bad {file} {i}."}


def score(items: list, scores: list[list[float]]) -> dict:
    """A task's result as eval.py writes it, with the same scores in all modes."""
    subsets = {}
    for item, item_scores in zip(items, scores, strict=True):
        subset = subsets.setdefault(item.subset, {"items": 0, "scores": {m: [] for m in MODES}})
        subset["items"] += 1
        for mode in MODES:
            subset["scores"][mode].append(item_scores)
    return {
        "kind": items[0].kind,
        "options_sha256": fingerprint(items),
        "subsets": dict(sorted(subsets.items())),
    }


def write_eval(run: Path, source: Path, result: dict, protocol: str):
    content = {"step": 10, "partial": False, "protocol": protocol, "modes": list(MODES)}
    content |= {"task": str(source), "tasks": {source.name: result}}
    write_result(run / f"eval_{source.name}_10_{protocol}.json", content)


def write_glue(run: Path, predictions: dict[str, list[int]]):
    tasks = {task: {"seeds": {"12": {"predictions": x}}} for task, x in predictions.items()}
    write_result(run / "glue_10.json", {"step": 10, "tasks": tasks})


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run folder with results of every part; in each item the second option is chosen."""
    totals = {}
    folder = tmp_path / "run"
    folder.mkdir()
    for task, files in SIZES.items():
        source = tmp_path / "data" / task
        source.mkdir(parents=True)
        for file, n_items in files.items():
            lines = [json.dumps(record(task, file, i)) for i in range(n_items)]
            (source / f"{file}.jsonl").write_text("\n".join(lines))
        items = read_tasks(str(source))
        scores = []
        for item in items:
            scores.append([-2.0] * len(item.options))
            scores[-1][1] = -1.0
        result = score(items, scores)
        for protocol in ("2024", "2025"):
            write_eval(folder, source, result, protocol)
        totals[submit.part_name(result["kind"], result["subsets"])] = len(items)
    rng = random.Random(2)
    write_glue(folder, {task: [rng.randint(0, 1) for _ in range(n)] for task, n in GLUE.items()})

    monkeypatch.setattr(submit, "COUNTS", totals)
    monkeypatch.setattr(submit, "GLUE_COUNTS", GLUE)
    monkeypatch.setattr(submit.YEARS["2024"], "glue", ("boolq", "cola", "rte"))
    monkeypatch.setattr(submit.YEARS["2025"], "glue", ("boolq", "rte"))
    return folder


def call(*args):
    submit.main([str(arg) for arg in args])


def refusal(*args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def predictions_of(content: dict) -> list:
    return [line["pred"] for line in content["predictions"]]


def test_2024_holds_every_subtask_with_the_chosen_continuations(run, tmp_path):
    out = tmp_path / "s"
    call(run, "--year=2024", "--mode=causal", "--out", out, "--name=mine")
    content = json.loads(gzip.decompress((out / "mine_textonly_predictions.json.gz").read_bytes()))
    assert list(content) == ["glue", "blimp", "blimp_supplement", "ewok"]
    sizes = {}
    for part, subtasks in content.items():
        sizes[part] = {name: len(sub["predictions"]) for name, sub in subtasks.items()}
        for name, subtask in subtasks.items():
            ids = [line["id"] for line in subtask["predictions"]]
            assert ids == [f"{name}_{i}" for i in range(len(ids))]
    assert sizes == {
        "glue": GLUE,
        "blimp": SIZES["blimp_filtered"],
        "blimp_supplement": SIZES["supplement_filtered"],
        "ewok": SIZES["ewok_filtered"],
    }
    # score_predictions.py compares strings
    bad = [" Bad phenomenon_0 0.", " Bad phenomenon_0 1.", " Bad phenomenon_0 2."]
    assert predictions_of(content["blimp"]["phenomenon_0"]) == bad
    assert predictions_of(content["ewok"]["spatial-relations"]) == [" wrong 0", " wrong 1"]
    assert all(type(label) is int for label in predictions_of(content["glue"]["rte"]))


def test_2025_writes_the_tree_of_the_pipeline(run, tmp_path, capsys):
    call(run, "--year=2025", "--mode=masked", "--out", tmp_path / "s", "--name=mine")
    assert "wug_adj" in capsys.readouterr().out
    root = tmp_path / "s" / "mine" / "main"
    contents = {}
    for path in root.rglob("predictions.json"):
        contents[str(path.relative_to(root).parent)] = json.loads(path.read_text())
    assert set(contents) == {
        "zero_shot/mlm/blimp/blimp_filtered",
        "zero_shot/mlm/blimp/supplement_filtered",
        "zero_shot/mlm/ewok/ewok_filtered",
        "zero_shot/mlm/entity_tracking/entity_tracking",
        "zero_shot/mlm/comps/comps",
        "finetune/boolq",
        "finetune/rte",
    }
    comps = contents["zero_shot/mlm/comps/comps"]
    assert set(comps) == {"base", "wugs_dist_before"}
    assert predictions_of(comps["base"])[2] == "A stone 2 can fly."
    assert comps["base"]["predictions"][2]["id"] == "base_2"

    entity = contents["zero_shot/mlm/entity_tracking/entity_tracking"]
    assert len(entity) == 6
    assert predictions_of(entity["regular_2_ops"]) == ["b 2", "b 5"]
    blimp = contents["zero_shot/mlm/blimp/blimp_filtered"]
    assert predictions_of(blimp["phenomenon_1"])[0] == "Bad phenomenon_1 0."
    assert contents["finetune/rte"]["rte"]["predictions"][2]["id"] == "rte_2"


def test_a_tie_earns_nothing_by_its_place(run, tmp_path, capsys):
    source = tmp_path / "data" / "ewok_filtered"
    items = read_tasks(str(source))
    scores = [[-1.0, -2.0] for _ in items]
    scores[0] = [-3.0, -3.0]
    write_eval(run, source, score(items, scores), "2024")
    call(run, "--year=2024", "--mode=causal", "--out", tmp_path)
    content = json.loads(
        gzip.decompress((tmp_path / "run_textonly_predictions.json.gz").read_bytes())
    )
    chosen = predictions_of(content["ewok"]["agent-properties"])
    assert chosen == [" wrong 0", " right 1", " right 2", " right 3"]
    assert "1 ties" in capsys.readouterr().out


def test_what_is_missing_is_named_and_nothing_is_written(run, tmp_path, capsys):
    (run / "eval_ewok_filtered_10_2024.json").unlink()
    (run / "glue_10.json").unlink()
    args = [run, "--year=2024", "--mode=causal", "--out", tmp_path / "s"]
    message = refusal(*args)
    assert "missing in causal mode, protocol 2024, at step 10: ewok, glue boolq" in message
    assert not (tmp_path / "s").exists()

    call(*args, "--incomplete")
    assert "MISSING: ewok" in capsys.readouterr().out
    assert "exists already" in refusal(*args, "--incomplete")
    assert "missing in mntp mode" in refusal(run, "--year=2025", "--mode=mntp", "--out", tmp_path)


def test_items_that_have_changed_since_are_refused(run, tmp_path):
    file = tmp_path / "data" / "ewok_filtered" / "spatial-relations.jsonl"
    file.write_text(file.read_text().replace("right", "wrong"))
    message = refusal(run, "--year=2024", "--mode=causal", "--out", tmp_path / "s")
    assert "no longer holds the items of ewok_filtered that were scored" in message


def test_a_smaller_set_does_not_stand_for_the_whole(run, tmp_path):
    """The challenge's fast_eval, for one, which is newer here and passed over."""
    full = read_result(run / "eval_ewok_filtered_10_2025.json")
    few = read_tasks(full["task"])[:4]
    result = score(few, [[-1.0, -2.0]] * 4)
    write_result(run / "eval_fast_10.json", full | {"tasks": {"ewok_fast": result}})
    call(run, "--year=2025", "--mode=causal", "--out", tmp_path / "s")

    (run / "eval_ewok_filtered_10_2025.json").unlink()
    message = refusal(run, "--year=2025", "--mode=causal", "--out", tmp_path / "t")
    assert "eval_fast_10.json: ewok has 4 items where the challenge has 6" in message


def test_partial_results_and_another_protocol_do_not_count(run, tmp_path):
    file = run / "eval_ewok_filtered_10_2025.json"
    write_result(file, read_result(file) | {"partial": True})
    message = refusal(run, "--year=2025", "--mode=causal", "--out", tmp_path / "s")
    assert "at step 10: ewok; score them" in message


def test_glue_predictions_must_be_those_of_the_whole_set(run, tmp_path):
    write_glue(run, {"boolq": [1]})
    message = refusal(run, "--year=2025", "--mode=causal", "--out", tmp_path / "s")
    assert "boolq has 1 predictions where the challenge has 5" in message


def test_only_results_of_the_newest_checkpoint_count(run, tmp_path):
    old = run / "eval_ewok_filtered_10_2024.json"
    write_result(run / "eval_ewok_filtered_20_2024.json", read_result(old) | {"step": 20})
    message = refusal(run, "--year=2024", "--mode=causal", "--out", tmp_path / "s")
    assert "at step 20: blimp, blimp_supplement, glue boolq" in message


def test_a_name_with_a_dot_is_refused(run, tmp_path):
    message = refusal(run, "--year=2024", "--mode=causal", "--name=a.b", "--out", tmp_path)
    assert message.startswith("--name a.b")


def test_a_mistake_ends_in_one_line(tmp_path):
    shutil.rmtree(tmp_path)
    command = [sys.executable, "-m", "babylm.submit", tmp_path, "--year=2024", "--mode=causal"]
    done = subprocess.run([*command, "--out=s"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"submit.py: {tmp_path}: holds no result")
    assert len(done.stderr.splitlines()) == 1


def test_the_challenge_is_counted_right():
    """Sums of collect_preds.py's own numbers, subset by subset."""
    assert submit.COUNTS["blimp_supplement"] == 842 + 64 + 165 + 3867 + 280
    assert submit.COUNTS["ewok"] == sum([2210, 770, 170, 120, 556, 818, 314, 294, 328, 1548, 490])
    assert submit.COUNTS["entity_tracking"] == 3152 + 3224 + 3107
    assert submit.COUNTS["comps"] == 49340 + 3 * 13896
