"""From a run folder to a submission, on a small challenge: python -m pytest tests/test_submit.py"""

import dataclasses
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import small_challenge as small
import torch

from antlm.checkpoint import checkpoints, load_run
from antlm.tokenizer import START, Tokenizer
from babylm import challenge, submit
from babylm.collate import official_choice
from config import UserError
from schedule import WORD_MARKS

ROOT = Path(__file__).parent.parent
MARKS = ["chck_1M", "chck_2M", "chck_10M"]
ONE_FILE = "mine/all_full_preds_and_fast_scores_causal.json"


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    small.make_small(monkeypatch)


@pytest.fixture
def here(monkeypatch):
    """Have eval.py and finetune.py called in this process."""
    monkeypatch.setattr(submit, "call", small.call_here)


@pytest.fixture(scope="module")
def material(tmp_path_factory, corpus) -> Path:
    """A run, and evaluation_data of each year."""
    folder = tmp_path_factory.mktemp("material")
    small.write_run(folder / "run", Path(corpus) / "tokenizer.json")
    for year in challenge.YEARS:
        small.write_data(folder / year, year)
    return folder


@pytest.fixture
def run(tmp_path, material) -> Path:
    return shutil.copytree(material / "run", tmp_path / "run")


@pytest.fixture
def data(tmp_path, material) -> Path:
    return shutil.copytree(material / "2026", tmp_path / "data")


def arguments(run: Path, data: Path, out: Path, *more: str, mode: str = "causal") -> list[str]:
    named = [f"--mode={mode}", f"--data={data}", f"--out={out}", "--name=mine", "--device=cpu"]
    return [str(run), *named, *more]


def refusal(*args, **named) -> str:
    """Return the one line in which a call ends."""
    with pytest.raises(UserError) as error:
        submit.main(arguments(*args, **named))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def submission(tmp_path_factory, material) -> Path:
    """What a call for 2026 wrote, and in printed.txt what it said at the end."""
    folder = tmp_path_factory.mktemp("submission")
    run = shutil.copytree(material / "run", folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        small.make_small(patch)
        patch.setattr(submit, "call", small.call_here)
        submit.main(arguments(run, material / "2026", folder / "out"))
    return folder / "out"


def read(path: Path):
    return json.loads(path.read_text())


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def lines_of(folder: Path) -> dict[str, list[dict]]:
    """The lines of each file of a set."""
    lines = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
    return lines


# -------------------------------------------------------------------------------- the files of 2026


@torch.no_grad()
def log_probs(run, text: str, start: int) -> list[float]:
    """Of each token of a text of ASCII that ends beyond `start`, in causal mode."""
    newline = run.tokenizer.encode("\n")
    tokens = [START]
    ends = [0]
    for token in run.tokenizer.encode(text):
        ends.append(ends[-1] + len(run.tokenizer.decode([token])))
        tokens.append(START if [token] == newline else token)
    logits = run.model(torch.tensor([tokens[:-1]]), causal=True)[0].double()
    values = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]].tolist()
    return [value for value, end in zip(values, ends[1:], strict=True) if end > start]


def options_of(folder: str, line: dict) -> list[tuple[str, int, str]]:
    """Each option of a line: its text, where its target starts, and its name in the files."""
    if folder in ("blimp_filtered", "supplement_filtered"):
        return [(line[name], 0, line[name]) for name in ("sentence_good", "sentence_bad")]
    if folder == "ewok_filtered":
        contexts = [line["Context1"], line["Context2"]]
        texts = [f"{context} {line['Target1']}" for context in contexts]
        return [(text, len(c), text) for text, c in zip(texts, contexts, strict=True)]
    if folder == "entity_tracking":
        prefix = line["input_prefix"]
        return [(prefix + option, len(prefix), option) for option in line["options"]]
    if folder == "comps":
        prefixes = [line["prefix_acceptable"], line["prefix_unacceptable"]]
        texts = [f"{prefix} {line['property_phrase']}" for prefix in prefixes]
        return [(text, len(p) + 1, text) for text, p in zip(texts, prefixes, strict=True)]
    solutions = [value for name, value in line.items() if name.startswith("solution")]
    prompt = line["prompt"]
    return [(f"{prompt} {text}", len(prompt), f" {text}") for text in solutions]


def subset_of(folder: str, file: str, line: dict) -> str:
    if folder == "entity_tracking":
        return f"{file}_{line['numops']}_ops"
    if folder == "comps":
        return {"comps_base": "base", "comps_wugs_dist-before": "wugs_dist_before"}[file]
    return line.get("example_id", file)


SETS_OF_CHOICES = {
    "blimp_filtered": "blimp",
    "supplement_filtered": "blimp",
    "ewok_filtered": "ewok",
    "entity_tracking": "entity_tracking",
    "comps": "comps",
    "global_piqa_parallel": "global_piqa_parallel",
    "global_piqa_nonparallel": "global_piqa_nonparallel",
}


@pytest.mark.parametrize("folder", SETS_OF_CHOICES)
def test_a_prediction_is_the_option_to_which_the_model_gives_most(material, submission, folder):
    run = load_run(material / "run")
    expected = {}
    for file, lines in lines_of(material / "2026" / "full_eval" / folder).items():
        for line in lines:
            if "nothing" in line.get("options", []):
                continue
            scores = {}
            for text, start, name in options_of(folder, line):
                values = log_probs(run, text, start)
                scores[name] = sum(values) / (len(values) if "label" in line else 1)
            subset = subset_of(folder, file, line)
            predictions = expected.setdefault(subset, {"predictions": []})["predictions"]
            id = f"{subset}_{len(predictions)}"
            predictions.append({"id": id, "pred": max(scores, key=scores.get)})
    root = submission / "mine/main/zero_shot/causal"
    assert read(root / SETS_OF_CHOICES[folder] / folder / "predictions.json") == expected


def test_the_tree_has_a_file_for_each_set_task_and_checkpoint(submission):
    expected = {ONE_FILE}
    for folder, parent in SETS_OF_CHOICES.items():
        expected.add(f"mine/main/zero_shot/causal/{parent}/{folder}/predictions.json")
    for name in ("reading/predictions.json", "AoA_word/surprisal.json", "AoA_word/aoa_score.json"):
        expected.add(f"mine/main/zero_shot/causal/{name}")
    for task in small.GLUE:
        expected.add(f"mine/main/finetune/{task}/predictions.json")
    for mark in MARKS:
        for folder in (
            "blimp/blimp_fast",
            "blimp/supplement_fast",
            "ewok/ewok_fast",
            "entity_tracking/entity_tracking_fast",
            "global_piqa_parallel/global_piqa_parallel",
            "global_piqa_nonparallel/global_piqa_nonparallel",
            "reading",
        ):
            expected.add(f"mine/{mark}/zero_shot/causal/{folder}/predictions.json")
    assert set(files(submission)) == expected


def test_the_one_file_holds_what_the_tree_holds(submission):
    content = read(submission / ONE_FILE)
    main = submission / "mine/main"
    zero_shot = main / "zero_shot/causal"
    paths = {
        "blimp": "blimp/blimp_filtered",
        "blimp_supplement": "blimp/supplement_filtered",
        "ewok": "ewok/ewok_filtered",
        "entity_tracking_filtered": "entity_tracking/entity_tracking",
        "comps": "comps/comps",
        "global_piqa_parallel": "global_piqa_parallel/global_piqa_parallel",
        "global_piqa_nonparallel": "global_piqa_nonparallel/global_piqa_nonparallel",
    }
    for key, path in paths.items():
        assert content.pop(key) == read(zero_shot / path / "predictions.json")
    # NaN differs from itself
    reading = (zero_shot / "reading/predictions.json").read_text()
    assert json.dumps(content.pop("reading")) == reading
    assert content.pop("aoa_surprisals") == read(zero_shot / "AoA_word/surprisal.json")
    assert content.pop("aoa") == read(zero_shot / "AoA_word/aoa_score.json")
    glue = {}
    for task in small.GLUE:
        glue |= read(main / "finetune" / task / "predictions.json")
    assert content.pop("glue") == glue
    assert list(content) == ["fast_eval_results"]


def test_fast_scores_are_shares_of_right_predictions_at_each_checkpoint(material, submission):
    results = read(submission / ONE_FILE)["fast_eval_results"]
    paths = {
        "blimp": ("blimp/blimp_fast", lambda line: line["sentence_good"]),
        "blimp_supplement": ("blimp/supplement_fast", lambda line: line["sentence_good"]),
        "ewok": ("ewok/ewok_fast", lambda line: line["Target1"]),
        "entity_tracking_filtered": (
            "entity_tracking/entity_tracking_fast",
            lambda line: line["options"][0],
        ),
    }
    for key, (path, right_text) in paths.items():
        right = {}
        for file, lines in lines_of(material / "2026/fast_eval" / Path(path).name).items():
            for line in lines:
                if "nothing" not in line.get("options", []):
                    subset = subset_of(path.split("/")[0], file, line)
                    right.setdefault(subset, []).append(right_text(line))
        expected = []
        for mark in MARKS:
            content = read(submission / f"mine/{mark}/zero_shot/causal/{path}/predictions.json")
            shares = {}
            for subset, texts in right.items():
                chosen = [line["pred"] for line in content[subset]["predictions"]]
                hits = [a.strip() == b for a, b in zip(chosen, texts, strict=True)]
                shares[subset] = sum(hits) / len(hits)
            expected.append(shares)
        assert results.pop(key) == expected
    for name in ("global_piqa_parallel", "global_piqa_nonparallel"):
        lines = lines_of(material / "2026/fast_eval" / name)["eng_latn"]
        for mark, score in zip(MARKS, results.pop(name), strict=True):
            path = f"mine/{mark}/zero_shot/causal/{name}/{name}/predictions.json"
            content = read(submission / path)
            hits = 0
            for line in lines:
                (prediction,) = content[line["example_id"]]["predictions"]
                hits += prediction["pred"].strip() == line[f"solution{line['label']}"]
            assert score == {name: hits / len(lines)}
    assert [set(score) for score in results.pop("reading")] == [{"spr", "rt"}] * 3
    assert not results


def test_no_fast_prediction_of_ewok_is_right_in_2026(submission):
    """As the pipeline compares them: its predictions hold the context, its answers do not."""
    for score in read(submission / ONE_FILE)["fast_eval_results"]["ewok"]:
        assert score == {"agent-properties": 0, "spatial-relations": 0}


def test_surprisals_are_those_of_every_checkpoint(material, submission):
    content = read(submission / "mine/main/zero_shot/causal/AoA_word/surprisal.json")
    assert content["metadata"] == {
        "model_name": "mine",
        "use_bos_only": False,
        "total_steps": 3,
        "completed_steps": 3,
    }
    seen = Counter((line["step"], line["word_count"]) for line in content["results"])
    words = (1_000_000, 2_000_000, 10_000_000)
    assert seen == dict.fromkeys(zip(MARKS, words, strict=True), small.N_PAIRS)
    paths = dict(zip(MARKS, checkpoints(material / "run")[::-1][:2], strict=False))
    paths["chck_10M"] = checkpoints(material / "run")[0]
    for line in random.Random(1).sample(content["results"], 6):
        text = f"{line['context']} {line['target_word']}"
        values = log_probs(load_run(paths[line["step"]]), text, len(line["context"]) + 1)
        assert line["surprisal"] == pytest.approx(-sum(values), abs=1e-4)


def test_the_reading_times_have_a_prediction_for_each_row(submission):
    content = read(submission / "mine/main/zero_shot/causal/reading/predictions.json")
    rows = content["reading"]["predictions"]
    assert [row["id"] for row in rows] == list(range(small.N_READING))
    assert all(row["pred"] > 0 for row in rows)
    assert any(row["prev_pred"] != row["prev_pred"] for row in rows)  # NaN without a word before


def test_fine_tuned_labels_stand_in_the_order_of_the_lines(submission):
    for task in small.GLUE:
        content = read(submission / f"mine/main/finetune/{task}/predictions.json")
        predictions = content[task]["predictions"]
        assert [line["id"] for line in predictions] == [f"{task}_{i}" for i in range(small.N_VALID)]
        assert {type(line["pred"]) for line in predictions} == {int}


@pytest.mark.parametrize("mode, backend", [("masked", "mlm"), ("mntp", "mntp")])
def test_a_mode_has_the_name_of_its_backend(run, data, tmp_path, here, mode, backend):
    shutil.rmtree(data / "full_eval")
    for name in ("blimp_fast", "entity_tracking_fast", "reading"):
        shutil.rmtree(data / "fast_eval" / name)
    small.write_words(data / "full_eval" / "aoa")
    out = tmp_path / "out"
    submit.main(arguments(run, data, out, "--incomplete", mode=mode))
    names = set(files(out))
    assert f"mine/all_full_preds_and_fast_scores_{backend}.json" in names
    assert f"mine/main/zero_shot/{backend}/AoA_word/surprisal.json" in names
    assert f"mine/chck_2M/zero_shot/{backend}/ewok/ewok_fast/predictions.json" in names
    # two modes of a model may lie in one folder
    submit.main(arguments(run, data, out, "--incomplete"))
    assert names < set(files(out))


# ------------------------------------------------------------------------------------ going on


def refuse_to_call(arguments: list[str], log: Path) -> str:
    pytest.fail(f"was called: {arguments}")


class Recorder:
    """Stands in for submit.call; notes what is called, and stops before the call of a number."""

    def __init__(self, stop_at: int = -1):
        self.labels = []
        self.stop_at = stop_at

    def __call__(self, arguments: list[str], log: Path) -> str:
        if len(self.labels) == self.stop_at:
            raise KeyboardInterrupt
        self.labels.append(log.name)
        return small.call_here(arguments, log)


@pytest.fixture
def few(data) -> Path:
    """Data of a few sets, for calls that are repeated: four full ones, three fast ones, words."""
    for name in ("blimp_filtered", "entity_tracking", "comps", "reading", "glue_filtered"):
        shutil.rmtree(data / "full_eval" / name)
    for name in ("blimp_fast", "ewok_fast", "entity_tracking_fast", "reading"):
        shutil.rmtree(data / "fast_eval" / name)
    return data


def test_a_call_that_was_stopped_goes_on_where_it_was(run, few, tmp_path, monkeypatch, capsys):
    """Seven calls, for four full sets and three checkpoints, in one go and in four parts."""
    in_one_go = Recorder()
    monkeypatch.setattr(submit, "call", in_one_go)
    submit.main(arguments(run, few, tmp_path / "one", "--incomplete"))
    assert len(set(in_one_go.labels)) == len(in_one_go.labels) == 7
    shutil.rmtree(run / "submission")

    labels = []
    for stop_at in (0, 1, 4):
        recorder = Recorder(stop_at)
        monkeypatch.setattr(submit, "call", recorder)
        with pytest.raises(KeyboardInterrupt):
            submit.main(arguments(run, few, tmp_path / "parts", "--incomplete"))
        labels += recorder.labels
        assert not list((tmp_path / "parts").iterdir())
    recorder = Recorder()
    monkeypatch.setattr(submit, "call", recorder)
    capsys.readouterr()
    submit.main(arguments(run, few, tmp_path / "parts", "--incomplete"))
    assert labels + recorder.labels == in_one_go.labels
    assert files(tmp_path / "parts") == files(tmp_path / "one")
    printed = capsys.readouterr().out
    assert "7 calls of eval.py and finetune.py, of which 5 are done" in printed
    assert "1 of 2: chck_2M" in printed
    assert "min left in all" in printed

    # all is there
    monkeypatch.setattr(submit, "call", refuse_to_call)
    submit.main(arguments(run, few, tmp_path / "again", "--incomplete"))
    assert files(tmp_path / "again") == files(tmp_path / "one")


def write_other_weights(run: Path, data: Path):
    tokenizer = Tokenizer(run / "tokenizer.json")
    path = checkpoints(run)[0]
    small.write_checkpoint(path, tokenizer, 10_000_000, seed=77)


def write_other_label(run: Path, data: Path):
    for folder in ("full_eval", "fast_eval"):
        path = data / folder / "global_piqa_nonparallel/eng_latn.jsonl"
        path.write_text(path.read_text().replace('"label": 1', '"label": 0'))


def write_other_context(run: Path, data: Path):
    path = data / "full_eval/aoa/cdi_childes.json"
    path.write_text(path.read_text().replace("number 0", "number 9"))


def test_fine_tuning_by_other_settings_is_done_again(run, data, tmp_path, monkeypatch):
    for name in submit.find_sets(data, "2026", "causal").full:
        shutil.rmtree(data / "full_eval" / name.folder)
    shutil.rmtree(data / "fast_eval")
    settings = tmp_path / "glue.py"
    settings.write_text((ROOT / "config/finetune/glue_2026.py").read_text() + "epochs = 1\n")
    year = dataclasses.replace(challenge.YEARS["2026"], glue_config=(str(settings),))
    monkeypatch.setitem(challenge.YEARS, "2026", year)
    call = arguments(run, data, tmp_path / "out", "--incomplete")
    numbers = []
    for lr in (3e-5, 3e-5, 1e-3):
        with open(settings, "a") as file:
            file.write("" if lr == 3e-5 else f"lr = {lr}\n")
        recorder = Recorder()
        monkeypatch.setattr(submit, "call", recorder)
        submit.main(call)
        numbers.append(len([label for label in recorder.labels if "chck" not in label]))
    assert numbers == [len(small.GLUE), 0, len(small.GLUE)]


@pytest.mark.parametrize(
    "change, more, done_again",
    [
        # that checkpoint's sets, once as the last one and once at its mark
        (write_other_weights, [], 4 + 1),
        # its full set, and the fast sets of each checkpoint
        (write_other_label, [], 1 + 3),
        (write_other_context, [], 3),
        (lambda *_: None, ["--dtype=bfloat16"], 7),
    ],
)
def test_a_result_of_something_else_is_not_taken(
    run, few, tmp_path, monkeypatch, change, more, done_again
):
    monkeypatch.setattr(submit, "call", Recorder())
    submit.main(arguments(run, few, tmp_path / "out", "--incomplete"))
    change(run, few)
    recorder = Recorder()
    monkeypatch.setattr(submit, "call", recorder)
    submit.main(arguments(run, few, tmp_path / "other", "--incomplete", *more))
    assert len(recorder.labels) == done_again


def start(*args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests/small_challenge.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_kill_in_the_middle_loses_one_call_at_most(
    run, data, tmp_path, submission, monkeypatch, capsys
):
    """Of a real process that calls real ones; the end is the same, byte for byte."""
    args = arguments(run, data, tmp_path / "out")
    process = start(*args)
    results = []
    deadline = time.time() + 300
    while len(results) < 2 and time.time() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
        results = list((run / "submission").glob("*.json"))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in (run / "submission").glob("*.json")}
    assert 2 <= len(before) < 13
    assert not (tmp_path / "out/mine").exists()

    # the rest without the seconds that each process needs to start
    monkeypatch.setattr(submit, "call", small.call_here)
    submit.main(args)
    # the call that was under way may have come to its end
    printed = capsys.readouterr().out
    n_done = int(re.search(r"13 calls of eval.py and finetune.py, of which (\d+)", printed)[1])
    assert len(before) <= n_done <= len(before) + 1
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files(tmp_path / "out") == files(submission)


# ------------------------------------------------------------------------------- missing and wrong


MISSING = [
    ("full_eval/comps", "comps", None),
    ("full_eval/reading", "reading", None),
    ("full_eval/aoa", "aoa_surprisals", None),
    ("full_eval/aoa", "aoa", None),
    ("fast_eval/supplement_fast", "fast blimp_supplement", [None] * 3),
    ("full_eval/glue_filtered/rte.valid.jsonl", "glue rte", None),
    ("full_eval/glue_filtered/rte.train.jsonl", "glue rte", None),
]


def remove(path: Path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@pytest.mark.parametrize("path, key, value", MISSING)
def test_what_is_missing_is_named_at_the_start_and_null_only_when_asked(
    run, few, tmp_path, material, monkeypatch, path, key, value
):
    # few sets are there, and that which is to be missing is not among them
    shutil.copytree(material / "2026/full_eval/glue_filtered", few / "full_eval/glue_filtered")
    if (few / path).exists():
        remove(few / path)
    monkeypatch.setattr(submit, "call", refuse_to_call)
    message = refusal(run, few, tmp_path / "out")
    assert message.startswith("missing: ")
    name = str(few / path).removesuffix(".valid.jsonl").removesuffix(".train.jsonl")
    assert name in message.removeprefix("missing: ").split(";")[0].split(", ")
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr(submit, "call", small.call_here)
    submit.main(arguments(run, few, tmp_path / "out", "--incomplete"))
    content = read(tmp_path / "out" / ONE_FILE)
    if key.startswith("fast "):
        assert content["fast_eval_results"][key.removeprefix("fast ")] == value
    elif key.startswith("glue "):
        assert list(content["glue"]) == ["wsc"]
    else:
        assert content[key] == value
    assert content["ewok"] is not None


def test_a_missing_checkpoint_is_null_in_its_place(run, few, tmp_path, here):
    checkpoints(run)[2].unlink()
    message = refusal(run, few, tmp_path / "out")
    assert message.startswith("missing: ") and "chck_2M" in message
    submit.main(arguments(run, few, tmp_path / "out", "--incomplete"))
    content = read(tmp_path / "out" / ONE_FILE)
    scores = content["fast_eval_results"]["blimp_supplement"]
    assert [score is None for score in scores] == [False, True, False]
    # the pipeline takes the surprisals of all checkpoints or none, but the score that they give
    assert content["aoa_surprisals"] is None
    assert content["aoa"] is not None
    surprisals = read(tmp_path / "out/mine/main/zero_shot/causal/AoA_word/surprisal.json")
    assert {line["step"] for line in surprisals["results"]} == {"chck_1M", "chck_10M"}


@pytest.mark.parametrize(
    "words, n_marks, missing",
    [
        (2_600_000, 2, ""),  # a shorter run has none beyond its end
        (9_960_000, 3, ""),  # its last checkpoint stands for 10M
        (9_400_000, 2, ""),
        (10_200_000, 3, "chck_10M"),  # an earlier step had reached it
    ],
)
def test_marks_are_asked_for_up_to_the_end_of_training(
    run, few, tmp_path, here, words, n_marks, missing
):
    tokenizer = Tokenizer(run / "tokenizer.json")
    small.write_checkpoint(checkpoints(run)[0], tokenizer, words, seed=5)
    message = refusal(run, few, tmp_path / "out")  # sets are missing in any case
    assert [name for name in MARKS if f" {name}" in message] == missing.split()
    submit.main(arguments(run, few, tmp_path / "out", "--incomplete"))
    content = read(tmp_path / "out" / ONE_FILE)
    scores = content["fast_eval_results"]["blimp_supplement"]
    assert len(scores) == n_marks
    assert (None in scores) == bool(missing)
    assert (content["aoa_surprisals"] is None) == bool(missing)


def cut_line(path: Path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))


def drop_a_context(path: Path):
    contexts = read(path)
    contexts["cat"].pop()
    path.write_text(json.dumps(contexts))


def swap_tokenizer(run: Path):
    content = read(run / "tokenizer.json")
    content["note"] = "trained anew"
    (run / "tokenizer.json").write_text(json.dumps(content))


def rewrite_checkpoints(run: Path, **content):
    tokenizer = Tokenizer(run / "tokenizer.json")
    for path in checkpoints(run):
        small.write_checkpoint(path, tokenizer, **({"words": 1, "seed": 1} | content))


def cut_short(path: Path):
    path.write_bytes(path.read_bytes()[:3000])


WRONG = {
    "no run": (lambda run, data: shutil.rmtree(run), "holds no checkpoint (step_*.pt"),
    "no marks": (
        lambda run, data: rewrite_checkpoints(run, words=1_500_000),
        "has no checkpoint at 1M, 2M ... words, of which the challenge wants the scores; train "
        "with --babylm_rules",
    ),
    "no words": (
        lambda run, data: rewrite_checkpoints(run, words=None),
        "step_0000020.pt: does not say how many words it has seen",
    ),
    "another tokenizer": (
        lambda run, data: swap_tokenizer(run),
        "step_0000020.pt: was trained with another tokenizer than",
    ),
    "a damaged checkpoint": (
        lambda run, data: cut_short(run / "step_0000040.pt"),
        "step_0000040.pt: damaged",
    ),
    "no data": (lambda run, data: shutil.rmtree(data), "is not a folder; it is the pipeline's"),
    "fewer items": (
        lambda run, data: cut_line(data / "full_eval/ewok_filtered/agent-properties.jsonl"),
        "full_eval/ewok_filtered: 5 items where the challenge of 2026 has 6",
    ),
    "fewer fast items": (
        lambda run, data: cut_line(data / "fast_eval/entity_tracking_fast/regular.jsonl"),
        "fast_eval/entity_tracking_fast: 5 items where the challenge of 2026 has 6",
    ),
    "fewer rows": (
        lambda run, data: cut_line(data / "full_eval/reading/reading_data.csv"),
        "full_eval/reading: 39 items where the challenge of 2026 has 40",
    ),
    "fewer contexts": (
        lambda run, data: drop_a_context(data / "full_eval/aoa/cdi_childes.json"),
        "full_eval/aoa: 15 items where the challenge of 2026 has 16",
    ),
    "no children": (
        lambda run, data: (data / "full_eval/aoa/cdi_human.csv").unlink(),
        "cdi_human.csv",
    ),
    "fewer labels": (
        lambda run, data: cut_line(data / "full_eval/glue_filtered/wsc.valid.jsonl"),
        "wsc.valid.jsonl: 5 items where the challenge of 2026 has 6",
    ),
    "a set of another year": (
        lambda run, data: small.write_lines(
            data / "full_eval/comps/wug.jsonl", [{"sentences": "a\tb", "ratio": 0.5}]
        ),
        "comps/wug.jsonl: ",
    ),
    "two sets in one folder": (
        lambda run, data: shutil.copytree(
            data / "full_eval/comps", data / "full_eval/blimp_filtered/comps"
        ),
        "blimp_filtered: a set is one folder of files, this holds 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_ends_in_one_line_before_anything_is_scored(
    run, data, tmp_path, monkeypatch, case
):
    spoil, expected = WRONG[case]
    spoil(run, data)
    monkeypatch.setattr(submit, "call", refuse_to_call)
    with pytest.raises((UserError, OSError)) as error:
        submit.main(arguments(run, data, tmp_path / "out", "--incomplete"))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["v1.2", "a/b"])
def test_a_name_that_the_pipelines_would_cut_is_refused(run, data, tmp_path, name):
    message = refusal(run, data, tmp_path / "out", f"--name={name}")
    assert message == f"--name {name}: holds a dot or a slash; choose one without"


def test_a_half_written_result_is_named(run, few, tmp_path, here):
    submit.main(arguments(run, few, tmp_path / "out", "--incomplete"))
    (result,) = (run / "submission").glob("*_ewok_filtered_*.json")
    cut_short(result)
    text = result.read_text()
    result.write_text(text[: len(text) // 2])
    message = refusal(run, few, tmp_path / "out", "--incomplete")
    assert message.startswith(f"{result}: not a result file")


ENDS = {
    "sys.exit('eval.py: is wrong')": "eval.py: is wrong",
    "raise ValueError('odd')": "ValueError: odd",
    "os.kill(os.getpid(), 9)": "was ended by signal 9",
    "pass": "",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_call_shows_how_far_it_is_and_says_why_it_failed(tmp_path, monkeypatch, capsys, end):
    program = tmp_path / "eval.py"
    lines = ["import os, sys", "print('step 10')", "print('40%, about 9 s left', file=sys.stderr)"]
    program.write_text("\n".join([*lines, end]))
    monkeypatch.setattr(submit, "ROOT", tmp_path)
    monkeypatch.setattr(submit, "SECONDS_BETWEEN_LINES", -1)
    log = tmp_path / "eval.log"
    assert submit.call(["eval.py"], log) == ENDS[end]
    assert log.read_text().startswith("step 10\n40%, about 9 s left\n")
    assert capsys.readouterr().out == "    40%, about 9 s left\n"


def test_a_call_that_failed_is_named_with_its_log(run, few, tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "call", lambda arguments, log: "eval.py: is wrong")
    message = refusal(run, few, tmp_path / "out", "--incomplete")
    expected = f"supplement_filtered: eval.py: is wrong (all that it said: {run}/submission/"
    assert message.startswith(expected)
    assert message.endswith(".log)")


@pytest.mark.slow
def test_a_mistake_ends_the_program_in_one_line(tmp_path):
    command = [sys.executable, "-m", "babylm.submit", str(tmp_path), "--mode=causal", "--out=s"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"submit.py: {tmp_path}: holds no checkpoint (step_*.pt of train.py)\n"


# --------------------------------------------------------------------------------- 2025 and 2024


@pytest.fixture(scope="module")
def submission_2025(tmp_path_factory, material) -> Path:
    folder = tmp_path_factory.mktemp("submission")
    run = shutil.copytree(material / "run", folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        small.make_small(patch)
        patch.setattr(submit, "call", small.call_here)
        submit.main(arguments(run, material / "2025", folder / "out", "--year=2025"))
    return folder / "out"


def test_2025_has_its_own_sets_and_keys(submission_2025):
    content = read(submission_2025 / ONE_FILE)
    assert list(content) == [
        *("blimp", "blimp_supplement", "ewok", "entity_tracking", "wug_adj", "wug_past", "comps"),
        *("reading", "aoa", "glue", "fast_eval_results"),
    ]
    assert list(content["fast_eval_results"]) == [
        *("blimp", "blimp_supplement", "ewok", "entity_tracking", "wug_adj", "wug_past", "reading")
    ]
    assert len(content["aoa"]["results"]) == 3 * small.N_PAIRS
    root = submission_2025 / "mine/main/zero_shot/causal"
    for name in ("wug_adj/wug_adj_nominalization", "wug_past/wug_past_tense"):
        assert read(root / name / "predictions.json") == content[name.split("/")[0]]
    # lines with "nothing" are left out in 2026 only
    sizes = [len(subset["predictions"]) for subset in content["entity_tracking"].values()]
    assert sum(sizes) == 8 + 6 + 4


def test_ewok_of_2025_compares_targets(submission_2025, material):
    content = read(submission_2025 / ONE_FILE)
    chosen = [line["pred"] for line in content["ewok"]["agent-properties"]["predictions"]]
    lines = lines_of(material / "2025/full_eval/ewok_filtered")["agent-properties"]
    for text, line in zip(chosen, lines, strict=True):
        assert text in (f" {line['Target1']}", f" {line['Target2']}")
    for score in content["fast_eval_results"]["ewok"]:
        assert set(score.values()) != {0}


def test_a_wug_has_the_probability_of_its_first_form_and_a_correlation(submission_2025, material):
    stats = pytest.importorskip("scipy.stats", reason="optional: pip install scipy")
    run = load_run(material / "run")
    lines = lines_of(material / "2025/full_eval/wug_past_tense")["wug_past_tense"]
    content = read(submission_2025 / ONE_FILE)
    shares = []
    for line, prediction in zip(
        lines, content["wug_past"]["wug_past_tense"]["predictions"], strict=True
    ):
        forms = line["sentences"].split("\t")
        scores = torch.tensor([sum(log_probs(run, form, 0)) for form in forms])
        shares.append(scores.softmax(0)[0].item())
        assert prediction["pred"] == forms[scores.argmax()]
        assert prediction["prob"] == pytest.approx(shares[-1], abs=1e-4)
    rho = stats.spearmanr(shares, [line["ratio"] for line in lines])[0]
    score = content["fast_eval_results"]["wug_past"][-1]
    assert score == {"wug_past_tense": pytest.approx(rho)}


def test_2024_holds_every_subtask_with_the_chosen_continuations(run, material, tmp_path, here):
    submit.main(arguments(run, material / "2024", tmp_path / "out", "--year=2024"))
    path = tmp_path / "out" / "mine_textonly_predictions.json.gz"
    assert list((tmp_path / "out").iterdir()) == [path]
    content = json.loads(gzip.decompress(path.read_bytes()))
    assert list(content) == ["glue", "blimp", "blimp_supplement", "ewok"]
    sizes = {}
    for part, subtasks in content.items():
        sizes[part] = {name: len(sub["predictions"]) for name, sub in subtasks.items()}
        for name, subtask in subtasks.items():
            ids = [line["id"] for line in subtask["predictions"]]
            assert ids == [f"{name}_{i}" for i in range(len(ids))]
    assert sizes == {
        "glue": dict.fromkeys(("cola", "mnli", "mnli-mm", "rte"), small.N_VALID),
        "blimp": small.SIZES["blimp_filtered"],
        "blimp_supplement": small.SIZES["supplement_filtered"],
        "ewok": small.SIZES["ewok_filtered"],
    }
    # score_predictions.py compares strings, which have a space in front
    for part, folder in (("blimp", "blimp_filtered"), ("ewok", "ewok_filtered")):
        for name, lines in lines_of(material / "2024" / folder).items():
            for line, prediction in zip(lines, content[part][name]["predictions"], strict=True):
                options = [line.get("sentence_good"), line.get("sentence_bad")]
                if part == "ewok":
                    options = [line["Target1"], line["Target2"]]
                assert prediction["pred"] in [f" {option}" for option in options]
    assert {type(line["pred"]) for line in content["glue"]["rte"]["predictions"]} == {int}


def test_2024_needs_no_marks(run, material, tmp_path, here):
    for path in checkpoints(run)[1:]:
        path.unlink()
    data = shutil.copytree(material / "2024", tmp_path / "data")
    shutil.rmtree(data / "glue_filtered")
    message = refusal(run, data, tmp_path / "out", "--year=2024")
    assert message.startswith(f"missing: {data / 'glue_filtered/cola'}, ")
    submit.main(arguments(run, data, tmp_path / "out", "--year=2024", "--incomplete"))


# ------------------------------------------------------------------------------------------ ties


@pytest.mark.parametrize("n", [2, 3])
def test_of_options_that_tie_2026_draws_one_and_the_years_before_take_the_first(n):
    scores = [-2.0, *[-1.0] * n, -3.0]
    assert official_choice(scores, "first", "x_0") == 1
    drawn = Counter(official_choice(scores, "at random", f"x_{i}") for i in range(900))
    assert set(drawn) == set(range(1, n + 1))
    assert min(drawn.values()) > 0.8 * 900 / n
    assert official_choice(scores, "at random", "x_0") == official_choice(
        scores, "at random", "x_0"
    )
    assert official_choice([-1.0, -2.0], "at random", "x_0") == 0


@pytest.mark.parametrize("year, n_right", [("2026", range(20, 61)), ("2025", [80])])
def test_a_tie_is_broken_in_the_files_and_shared_in_the_scores(
    run, tmp_path, here, monkeypatch, year, n_right
):
    """A model that knows nothing, and 80 pairs of texts of one length."""
    tokenizer = Tokenizer(run / "tokenizer.json")
    small.write_checkpoint(checkpoints(run)[0], tokenizer, 10_000_000, seed=1, std=0.0)
    pairs = [{"sentence_good": f"{i}: 1.", "sentence_bad": f"{i}: 2."} for i in range(80)]
    data = tmp_path / "data"
    for folder in ("full_eval/supplement_filtered", "fast_eval/supplement_fast"):
        small.write_lines(data / folder / "hypernym.jsonl", pairs)
    sets = []
    for part in challenge.YEARS[year].sets:
        sets.append(dataclasses.replace(part, items=80, fast_items=80))
    changed = dataclasses.replace(challenge.YEARS[year], sets=tuple(sets))
    monkeypatch.setitem(challenge.YEARS, year, changed)

    submit.main(arguments(run, data, tmp_path / "out", f"--year={year}", "--incomplete"))
    content = read(tmp_path / "out" / ONE_FILE)
    chosen = [line["pred"] for line in content["blimp_supplement"]["hypernym"]["predictions"]]
    right = sum(text.endswith("1.") for text in chosen)
    assert right in n_right
    fast_scores = content["fast_eval_results"]["blimp_supplement"]
    assert fast_scores[-1] == {"hypernym": right / 80}
    (result,) = (run / "submission").glob("*_supplement_filtered_*.json")
    assert read(result)["tasks"]["supplement_filtered"]["accuracy"] == {"causal": 50.0}


# ------------------------------------------------------------------------------------- the tables


def test_the_table_has_nine_columns_the_nlp_part_and_the_overall_score():
    assert len(challenge.COLUMNS) == 9
    keys = sum(challenge.COLUMNS.values(), ())
    scores = {key: 10.0 * (i + 1) for i, key in enumerate(keys)}  # 10 ... 60, 70 and 80, 90, 100
    head, mine, baseline = (
        line.split() for line in challenge.leaderboard("mine", scores).splitlines()
    )
    assert head == [*challenge.COLUMNS, "NLP", "overall"]
    columns = [10, 20, 30, 40, 50, 60, 75, 90, 100]
    means = [sum(columns[:7]) / 7, sum(columns) / 9]
    assert mine == ["mine", *(f"{value:.1f}" for value in columns + means)]
    # its overall score, as published, is 37.4
    assert baseline == [
        *("GPT-2,", "strict-small", "65.2", "57.3", "50.6", "19.1", "51.8", "63.8", "35.1", "5.6"),
        *("-12.2", "49.0", "37.4"),
    ]


def test_what_is_missing_counts_nothing_in_the_table():
    scores = {"blimp": 90.0, "global_piqa_parallel": 30.0}
    mine = challenge.leaderboard("mine", scores).splitlines()[1].split()[1:]
    assert [float(value) for value in mine] == [90, 0, 0, 0, 0, 0, 15, 0, 0, 15, 11.7]


def test_the_table_at_the_end_holds_the_scores(run, few, tmp_path, here, capsys):
    submit.main(arguments(run, few, tmp_path / "out", "--incomplete"))
    printed = capsys.readouterr().out
    (mine,) = [line.split() for line in printed.splitlines() if line.startswith("mine ")]
    results = {}
    for path in (run / "submission").glob("step_0000200_[bseg]*.json"):
        for task, entry in read(path)["tasks"].items():
            results[task] = entry["accuracy"]["causal"]
    piqa = (results["global_piqa_parallel"] + results["global_piqa_nonparallel"]) / 2
    expected = [0, results["supplement_filtered"], results["ewok_filtered"], 0, 0, 0, piqa, 0]
    assert mine[1:9] == [f"{value:.1f}" for value in expected]


def test_the_challenge_is_counted_right(monkeypatch):
    """Sums of collate_preds.py's own numbers, subset by subset."""
    monkeypatch.undo()  # the real tables
    sizes = {}
    fast_sizes = {}
    for year, entry in challenge.YEARS.items():
        sizes[year] = {part.key: part.items for part in entry.sets}
        fast_sizes[year] = {part.key: part.fast_items for part in entry.sets}
    ewok = sum([2210, 770, 170, 120, 556, 818, 314, 294, 328, 1548, 490])
    supplement = 842 + 64 + 165 + 3867 + 280
    for year in challenge.YEARS:
        assert sizes[year]["blimp"] == 59875
        assert (sizes[year]["blimp_supplement"], sizes[year]["ewok"]) == (supplement, ewok)
    for year in ("2025", "2026"):
        assert sizes[year]["comps"] == 49340 + 3 * 13896
        assert sizes[year]["reading"] == fast_sizes[year]["reading"] == 1726
        assert fast_sizes[year]["blimp"] == 67 * 200
        assert fast_sizes[year]["blimp_supplement"] == 5 * 50
        assert fast_sizes[year]["ewok"] == 11 * 100
        assert challenge.YEARS[year].word_pairs == 8005
    assert sizes["2025"]["entity_tracking"] == 3152 + 3224 + 3107
    assert fast_sizes["2025"]["entity_tracking"] == 606 + 607 + 606 + 606 + 568 + 159
    regular = 517 + 409 + 405 + 425 + 388 + 94
    assert fast_sizes["2026"]["entity_tracking_filtered"] == regular
    ambiref = 508 + 428 + 413 + 409 + 434 + 123
    moved = 516 + 437 + 399 + 406 + 353 + 116
    assert sizes["2026"]["entity_tracking_filtered"] == regular + ambiref + moved
    assert len(challenge.marks_due(100_000_000, WORD_MARKS)) == 19  # strict-small
    assert len(challenge.marks_due(1_000_000_000, WORD_MARKS)) == 28  # strict


@pytest.mark.parametrize(
    "words, mark",
    [
        (999_999, None),
        (1_000_000, 1_000_000),
        (1_049_999, 1_000_000),
        (1_050_001, None),  # an earlier step had reached it
        (9_000_001, 9_000_000),
        (100_000_030, 100_000_000),
        (200_000_000, 200_000_000),
        (1_100_000_000, None),
    ],
)
def test_a_checkpoint_stands_for_the_mark_that_its_last_step_reached(words, mark):
    assert challenge.reached_mark(words, 50_000, WORD_MARKS) == mark


def test_words_of_an_earlier_run_do_not_make_a_step_longer():
    content = {"words": 5_000_000, "step": 20, "history": [{"words": None}, {"words": 4_000_000}]}
    assert submit.words_per_step(content) == 50_000
    assert submit.words_per_step(content | {"history": []}) == 250_000
