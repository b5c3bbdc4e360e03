"""Submission files from results of the challenge's full size, made here. Alone: python -m pytest tests/test_submit.py"""

import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import eval as evaluation
from babylm import submit
from babylm.results import read_result, write_result
from babylm.tasks import fingerprint, read_tasks
from config import UserError

ROOT = Path(__file__).parent.parent
MODES = ("causal", "masked")
# The challenge's sets by folder, file and number of lines; BLiMP's 67 files and entity tracking's six subsets by their sums.
SIZES = {
    "blimp_filtered": {f"phenomenon_{i}": 893 + (44 if i == 0 else 0) for i in range(67)},
    "supplement_filtered": dict(hypernym=842, qa_congruence_easy=64, qa_congruence_tricky=165, subject_aux_inversion=3867,
                                turn_taking=280),
    "ewok_filtered": {"agent-properties": 2210, "material-dynamics": 770, "material-properties": 170, "physical-dynamics": 120,
                      "physical-interactions": 556, "physical-relations": 818, "quantitative-properties": 314,
                      "social-interactions": 294, "social-properties": 328, "social-relations": 1548, "spatial-relations": 490},
    "entity_tracking": dict(regular=3152, ambiref=3224, move_contents=3107),
    "comps": {"comps_base": 49340, "comps_wugs": 13896, "comps_wugs_dist-before": 13896, "comps_wugs_dist-in-between": 13896},
}
GLUE = {"boolq": 1635, "cola": 522, "mnli": 4908, "mnli-mm": 4916, "mrpc": 204, "multirc": 2424, "qnli": 2732, "qqp": 20215,
        "rte": 139, "sst2": 436, "wsc": 52}


def record(task: str, file: str, i: int) -> dict:
    if task in ("blimp_filtered", "supplement_filtered"):
        return {"sentence_good": f"Good {file} {i}.\nTwo lines", "sentence_bad": f"Bad {file} {i}.", "linguistics_term": "x"}
    if task == "ewok_filtered":
        return {"Target1": f"right {i}", "Target2": f"wrong {i}", "Context1": "One.", "Context2": "Two.", "Domain": file}
    if task == "entity_tracking":
        return {"input_prefix": "The box holds ", "options": [f"{option} {i}" for option in "abcde"], "numops": i % 6}
    return {"prefix_acceptable": f"A bird {i}", "prefix_unacceptable": f"A stone {i}", "property_phrase": "can fly."}


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """A folder with data/, and run/ whose results hold invented scores: each item's best option is known from its number."""
    folder = tmp_path_factory.mktemp("submission")
    run = folder / "run"
    run.mkdir()
    for task, files in SIZES.items():
        path = folder / "data" / task
        path.mkdir(parents=True)
        for file, n in files.items():
            (path / f"{file}.jsonl").write_text("".join(json.dumps(record(task, file, i)) + "\n" for i in range(n)))
        items = read_tasks(path)
        rng = random.Random(1)
        scores = {mode: [[-rng.random() for _ in item.options] for item in items] for mode in MODES}
        if task == "blimp_filtered":
            scores["causal"][0] = [-3.0, -3.0]
        result = {"kind": items[0].kind, "options_sha256": fingerprint(items)}
        result |= evaluation.summarize(items, scores)
        for protocol, name in (("2025", f"eval_{task}_10.json"), ("2024", f"eval_{task}_10_2024.json")):
            write_result(run / name, {
                "step": 10, "partial": False, "protocol": protocol, "modes": list(MODES), "task": str(path), "tasks": {task: result}})
    rng = random.Random(2)
    tasks = {task: {"seeds": {"12": {"predictions": [rng.randint(0, 1) for _ in range(n)]}}} for task, n in GLUE.items()}
    write_result(run / "glue_10.json", {"step": 10, "tasks": tasks})
    return folder


@pytest.fixture
def call(capsys):
    """submit.py in this process -> exit code, what it printed, its error."""
    def run(*args) -> tuple[int, str, str]:
        try:
            submit.main(list(map(str, args)))
            return 0, capsys.readouterr().out, ""
        except UserError as e:
            return 1, capsys.readouterr().out, str(e)
    return run


def test_2024_holds_every_subtask_with_the_chosen_continuations(scored, tmp_path, call):
    code, out, err = call(scored / "run", "--year=2024", "--mode=causal", "--out", tmp_path / "s", "--name=mine")
    assert code == 0 and "1 ties" in out, err
    found = json.loads(gzip.decompress((tmp_path / "s" / "mine_textonly_predictions.json.gz").read_bytes()))
    assert list(found) == ["glue", "blimp", "blimp_supplement", "ewok"]
    for part, sizes in (("glue", GLUE), ("blimp", SIZES["blimp_filtered"]), ("blimp_supplement", SIZES["supplement_filtered"]),
                        ("ewok", SIZES["ewok_filtered"])):
        assert {name: len(sub["predictions"]) for name, sub in found[part].items()} == sizes
        for name, sub in found[part].items():
            assert [p["id"] for p in sub["predictions"]] == [f"{name}_{i}" for i in range(sizes[name])]
            assert all(type(p["pred"]) is (int if part == "glue" else str) for p in sub["predictions"])
    assert found["blimp"]["phenomenon_0"]["predictions"][0]["pred"] == " Bad phenomenon_0 0."  # a tie earns nothing by its place

    # score_predictions.py compares strings with the right one, stripped and lower-cased: that must give our accuracy.
    result = read_result(scored / "run" / "eval_ewok_filtered_10.json")["tasks"]["ewok_filtered"]
    for domain, sub in found["ewok"].items():
        right = sum(p["pred"].strip().lower() == f"right {i}" for i, p in enumerate(sub["predictions"]))
        assert 100 * right / len(sub["predictions"]) == pytest.approx(result["subsets"][domain]["accuracy"]["causal"])


def test_2025_writes_the_tree_of_the_pipeline(scored, tmp_path, call):
    code, out, err = call(scored / "run", "--year=2025", "--mode=masked", "--out", tmp_path / "s", "--name=mine")
    assert code == 0 and "wug_adj" in out, err
    root = tmp_path / "s" / "mine" / "main"
    found = {str(p.relative_to(root).parent): json.loads(p.read_text()) for p in root.rglob("predictions.json")}
    assert set(found) == {f"zero_shot/mlm/{x}" for x in ("blimp/blimp_filtered", "blimp/supplement_filtered", "ewok/ewok_filtered",
                                                         "entity_tracking/entity_tracking", "comps/comps")} | {
        f"finetune/{x}" for x in ("boolq", "mnli", "mrpc", "multirc", "qqp", "rte", "wsc")}
    comps = found["zero_shot/mlm/comps/comps"]
    assert {uid: len(x["predictions"]) for uid, x in comps.items()} == dict(
        base=49340, wugs=13896, wugs_dist_before=13896, wugs_dist_in_between=13896)
    assert comps["base"]["predictions"][5]["id"] == "base_5"
    assert comps["base"]["predictions"][5]["pred"] in ("A bird 5 can fly.", "A stone 5 can fly.")
    entity = found["zero_shot/mlm/entity_tracking/entity_tracking"]
    assert len(entity) == 18 and sum(len(x["predictions"]) for x in entity.values()) == 9483
    assert entity["regular_2_ops"]["predictions"][1]["pred"] in {f"{x} 8" for x in "abcde"}  # the second item with two
    chosen = Counter(p["pred"][0] for x in entity.values() for p in x["predictions"])
    assert set(chosen) == set("abcde")
    assert found["zero_shot/mlm/ewok/ewok_filtered"]["agent-properties"]["predictions"][0]["pred"] in (" right 0", " wrong 0")
    assert found["zero_shot/mlm/blimp/blimp_filtered"]["phenomenon_3"]["predictions"][0]["pred"][0] in "GB"
    assert found["finetune/rte"]["rte"]["predictions"][2]["id"] == "rte_2"


def copy_results(scored: Path, to: Path, *without: str) -> Path:
    to.mkdir()
    for file in (scored / "run").glob("*.json"):
        if not any(name in file.name for name in without):
            (to / file.name).write_bytes(file.read_bytes())
    return to


def test_what_is_missing_is_named_and_nothing_is_written(scored, tmp_path, call):
    run = copy_results(scored, tmp_path / "run", "ewok", "glue")
    code, _, err = call(run, "--year=2024", "--mode=causal", "--out", tmp_path / "s")
    assert code == 1 and len(err.splitlines()) == 1
    assert "ewok, glue boolq, glue cola" in err and not (tmp_path / "s").exists()
    code, out, _ = call(run, "--year=2024", "--mode=causal", "--out", tmp_path / "s", "--incomplete")
    assert code == 0 and "MISSING: ewok" in out
    code, _, err = call(run, "--year=2024", "--mode=causal", "--out", tmp_path / "s", "--incomplete")
    assert code == 1 and "exists already" in err
    code, _, err = call(scored / "run", "--year=2025", "--mode=mntp", "--out", tmp_path / "t")
    assert code == 1 and "missing in mntp mode, protocol 2025, at step 10: blimp" in err


def test_wrong_counts_and_changed_data_are_refused(scored, tmp_path, call):
    run = copy_results(scored, tmp_path / "run", "supplement")
    result = read_result(scored / "run" / "eval_supplement_filtered_10_2024.json")
    source, short = Path(result["task"]), tmp_path / "supplement_filtered"
    short.mkdir()
    for file in source.glob("*.jsonl"):
        lines = file.read_text().splitlines(keepends=True)
        (short / file.name).write_text("".join(lines[file.stem == "hypernym":]))
    write_result(run / "eval_supplement_filtered_10_2024.json", result | {"task": str(short)})
    code, _, err = call(run, "--year=2024", "--mode=causal", "--out", tmp_path / "s")
    assert code == 1 and "no longer holds the items" in err and len(err.splitlines()) == 1
    items = read_tasks(short)
    scores = {mode: [[0.0, -1.0] for _ in items] for mode in MODES}
    task = {"kind": "blimp", "options_sha256": fingerprint(items)} | evaluation.summarize(items, scores)
    write_result(run / "eval_supplement_filtered_10_2024.json",
                            result | {"task": str(short), "tasks": {"supplement_filtered": task}})
    code, _, err = call(run, "--year=2024", "--mode=causal", "--out", tmp_path / "s")
    assert code == 1 and "blimp_supplement has 841 hypernym where the challenge has 842" in err
    write_result(run / "glue_10.json", {"step": 10, "tasks": {"boolq": {"seeds": {"12": {"predictions": [1]}}}}})
    run = copy_results(scored, tmp_path / "run2")
    write_result(run / "glue_10.json", {"step": 10, "tasks": {"boolq": {"seeds": {"12": {"predictions": [1]}}}}})
    code, _, err = call(run, "--year=2025", "--mode=causal", "--out", tmp_path / "s")
    assert code == 1 and "boolq has 1 predictions where the challenge has 1,635" in err


def test_a_smaller_set_or_another_protocol_does_not_stand_for_the_whole(scored, tmp_path, call):
    run = copy_results(scored, tmp_path / "run", "_2024")
    whole = read_result(run / "eval_ewok_filtered_10.json")
    few = [item for item in read_tasks(whole["task"]) if item.subset == "agent-properties"][:100]
    fast = {"kind": "ewok", "options_sha256": "", **evaluation.summarize(few, {mode: [[0.0, -1.0]] * 100 for mode in MODES})}
    write_result(run / "eval_fast_eval_10.json", whole | {"tasks": {"ewok_fast": fast}})  # newer, and passed over
    code, _, err = call(run, "--year=2025", "--mode=causal", "--out", tmp_path / "s")
    assert code == 0, err
    (run / "eval_ewok_filtered_10.json").unlink()
    code, _, err = call(run, "--year=2025", "--mode=causal", "--out", tmp_path / "t")
    assert code == 1 and "ewok has 100 agent-properties where the challenge has 2,210" in err
    code, _, err = call(run, "--year=2024", "--mode=causal", "--out", tmp_path / "u")
    assert code == 1 and "protocol 2024, at step 10: blimp, blimp_supplement, ewok; score them" in err


def test_an_empty_run_and_a_bad_name_are_refused(tmp_path, call):
    assert call(tmp_path, "--year=2024", "--mode=causal", "--name=a.b", "--out", tmp_path / "s")[2].startswith("--name a.b")
    done = subprocess.run([sys.executable, "-m", "babylm.submit", tmp_path, "--year=2024", "--mode=causal", "--out", tmp_path / "s"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "holds no result" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_names_of_parts():
    assert submit.part_name("blimp", SIZES["supplement_filtered"]) == "blimp_supplement"
    assert submit.part_name("blimp", SIZES["blimp_filtered"]) == "blimp"
