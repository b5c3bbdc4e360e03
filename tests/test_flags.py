"""Every flag of the programs that read theirs with argparse does what its help says.

python -m pytest tests/test_flags.py -k "sample and temperature"
python -m pytest tests/test_flags.py -m "not slow"              # without exports and pictures

As in test_settings.py, a flag without a row fails, and so does a row without a flag. The settings
of experiment.py, a dataclass, are here as well.
"""

import gzip
import json
import multiprocessing
import os
import re
import shutil
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import experiment
import grammar
import numpy as np
import plot
import pytest
import small_challenge
import torch
from trials import (
    BFLOAT16,
    BYTES,
    CUDA,
    FLOAT32,
    SMALL,
    Lab,
    Program,
    Row,
    Trial,
    as_program,
    call_export,
    cases,
    devices,
    dtypes,
    files,
    is_refused,
    most_rows,
    n_layers,
    read_result,
)

import config
import eval as evaluation
import prepare
import sample
import train
from antlm.checkpoint import checkpoints, load_checkpoint
from antlm.tokenizer import MASK, START, Tokenizer
from antlm.workers import start_workers
from babylm import submit
from tools import average, bench, mix
from tools.peers import PEERS

# ------------------------------------------------------------------------------------------ eval.py


def step_scored(run: Trial) -> int:
    return read_result(run)["step"]


def steps_scored(run: Trial) -> list[int]:
    """The steps of all checkpoints scored, in their order."""
    return [int(step) for step in re.findall(r"\.pt: step (\d+) of", run.printed)]


def tasks_scored(run: Trial) -> list[str]:
    return list(read_result(run)["tasks"])


def scores(run: Trial) -> list[float]:
    """The scores of all options, in whatever mode."""
    (task,) = read_result(run)["tasks"].values()
    (scores,) = task["subsets"]["order"]["scores"].values()
    return scores


def questions(run: Trial) -> set[tuple]:
    """Whether a pass is causal, and how many tokens of a row it hides."""
    results = set()
    for forward in run.passes:
        hidden = (forward.tokens == MASK).sum(1)
        results |= {(forward.attention[0].causal, n) for n in hidden.tolist()}
    return results


def begins_with_space(run: Trial) -> bool:
    """Whether there is one between the start token and the text."""
    tokenizer = Tokenizer(run.folder.parent / "corpus" / "tokenizer.json")
    first = torch.cat([forward.tokens[:, 1] for forward in run.passes])
    return {tokenizer.decode([token]) for token in first.tolist()} == {" "}


def items_scored(run: Trial) -> int:
    (task,) = read_result(run)["tasks"].values()
    return task["items"]


EVAL_ROWS = [
    Row("run", {"@run": 6, "@run/step_0000003.pt": 3}, step_scored),
    Row("run", ("@run", "@run/step_0000003.pt", "@other_run"), scores),
    Row(
        "checkpoints",
        {False: [6], True: [1, 2, 3, 4, 5, 6]},
        steps_scored,
        dict(run="@scored_run", out=None),
    ),
    Row(
        "task",
        {
            "@pairs": ["pairs"],
            "@other_pairs": ["other_pairs"],
            ("@pairs", "@other_pairs"): ["pairs", "other_pairs"],
        },
        tasks_scored,
    ),
    Row("task", ("@pairs", "@other_pairs"), scores),
    Row(
        "mode",
        {("causal",): {(True, 0)}, ("masked",): {(False, 1)}, ("mntp",): {(False, 1)}},
        questions,
    ),
    Row("mode", (("causal",), ("masked",), ("mntp",)), scores),
    Row("protocol", {"2026": False, "2025": False, "2024": True}, begins_with_space),
    Row("weights", ("average", "last"), scores, {"run": "@averaged_run"}),
    Row("limit", {0: 5, 2: 2}, items_scored),
    Row("out", {"@out/result.json": ["result.json"], "@out/b.json": ["b.json"]}, files),
    Row("device", {"cpu": {"cpu"}, "cuda": CUDA}, devices),
    Row("dtype", {"float32": (set(), FLOAT32[1]), "bfloat16": (set(), BFLOAT16[1])}, dtypes),
    # rows of seven tokens, the last of which predicts nothing
    Row("batch_tokens", {0: 10, 14: 2, 30: 4}, most_rows),
]

EVAL = Program(
    partial(as_program, evaluation.main),
    dict(run="@run", task="@pairs", mode=("causal",), out="@out/result.json", device="cpu"),
    EVAL_ROWS,
    positional=("run",),
)

# ---------------------------------------------------------------------------------------- sample.py


def samples(run: Trial) -> list[str]:
    return re.findall(r"--- \d+\n(.*)", run.printed)


def n_samples(run: Trial) -> int:
    return len(samples(run))


def sample_lengths(run: Trial) -> set[int]:
    return set(map(len, samples(run)))


def letters(run: Trial) -> set[str]:
    return set("".join(samples(run)))


def share_of_b(run: Trial) -> float:
    text = "".join(samples(run))
    return text.count("b") / len(text)


def prompts(run: Trial) -> tuple:
    """What the first sample begins with, and the tokens of the first pass."""
    tokenizer = Tokenizer(run.folder.parent / "corpus" / "tokenizer.json")
    tokens = run.passes[0].tokens[0].tolist()
    return samples(run)[0][:2], tokenizer.decode(tokens[1:])


MANY = {"n": 25, "tokens": 14}

SAMPLE_ROWS = [
    Row("run", ("@dice", "@run"), letters),
    Row("prompt", {"ab": ("ab", "ab"), "ca": ("ca", "ca")}, prompts),
    Row("n", {2: 2, 3: 3}, n_samples),
    Row("tokens", {4: {4}, 6: {6}}, sample_lengths),
    # a, b and c with probabilities like 1, 3 and 0.5: to the power of one over the temperature
    Row(
        "temperature",
        {
            0: 1,
            0.5: pytest.approx(9 / (1 + 9 + 0.25), abs=0.08),
            2: pytest.approx(3**0.5 / (1 + 3**0.5 + 0.5**0.5), abs=0.08),
        },
        share_of_b,
        MANY,
    ),
    Row("top_k", {0: {"a", "b", "c"}, 1: {"b"}, 2: {"a", "b"}}, letters, {"n": 5}),
    Row("seed", (1, 2), samples),
    Row("weights", ("average", "last"), samples, {"run": "@averaged_run"}),
    Row("device", {"cpu": {"cpu"}, "cuda": CUDA}, devices),
]

SAMPLE = Program(
    partial(as_program, sample.main),
    dict(run="@dice", n=3, tokens=14, temperature=1.0, top_k=0, device="cpu"),
    SAMPLE_ROWS,
    positional=("run",),
)

# --------------------------------------------------------------------------------------- prepare.py


def meta(run: Trial) -> dict:
    return json.loads((run.folder / "corpus" / "meta.json").read_text())


def train_words(run: Trial) -> int:
    return meta(run)["train"]["words"]


def dev_words(run: Trial) -> int:
    return meta(run)["dev"]["words"]


def vocabulary(run: Trial) -> int:
    return Tokenizer(run.folder / "corpus" / "tokenizer.json").vocab_size


def n_starts(run: Trial) -> int:
    tokens = np.fromfile(run.folder / "corpus" / "train.bin", meta(run)["train"]["dtype"])
    return int((tokens == START).sum())


def folders(run: Trial) -> list[str]:
    return sorted(path.name for path in run.folder.iterdir())


def n_processes(run: Trial) -> int:
    return int(re.search(r"started (\d+) processes", run.printed)[1])


def call_prepare(command: list[str]):
    """Run prepare.py, which takes each line for a block, and print how many processes it starts."""

    def start_and_say(n: int):
        print(f"started {n} processes")
        return start_workers(n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "BLOCK_BYTES", 1)
        patch.setattr(prepare, "start_workers", start_and_say)
        as_program(prepare.main, command)


PREPARE_ROWS = [
    Row(
        "train",
        {("@texts/train.txt",): 96, ("@texts/train.txt", "@texts/short.txt"): 96 + 32},
        train_words,
    ),
    Row("dev", {("@texts/dev.txt",): 40, ("@texts/dev.txt", "@texts/short.txt"): 72}, dev_words),
    Row("out", {"@out/corpus": ["corpus"], "@out/other": ["other"]}, folders),
    Row("vocab_size", {BYTES: BYTES, BYTES + 2: BYTES + 2}, vocabulary),
    Row("boundary", {"line": 48, "document": 1, "none": 0}, n_starts),
    Row("tokenizer", {None: BYTES, "@merged_corpus/tokenizer.json": BYTES + 2}, vocabulary),
    Row("processes", {1: 1, 3: 3}, n_processes),
]

PREPARE = Program(
    call_prepare,
    dict(
        train=("@texts/train.txt",),
        dev=("@texts/dev.txt",),
        out="@out/corpus",
        vocab_size=BYTES,
        processes=1,
    ),
    PREPARE_ROWS,
    positional=("train",),
)

# ------------------------------------------------------------------------------ tools/experiment.py


def prepare_here(command: list[str]) -> SimpleNamespace:
    """Make a corpus as the command would, without the seconds that a process takes."""
    as_program(prepare.main, command[2:])
    return SimpleNamespace(returncode=0)


def call_experiment(arguments: list[str]):
    """Run an experiment whose runs are not started, but printed."""

    def call(program: str, args: list[str], log):
        print(f"called {json.dumps([program, *args])}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "call", call)
        patch.setattr(experiment.subprocess, "run", prepare_here)
        experiment.main(arguments)


def commands(run: Trial, program: str) -> list[list[str]]:
    """The arguments of each call of a program."""
    calls = [json.loads(text) for text in re.findall("^called (.*)", run.printed, re.M)]
    return [call[1:] for call in calls if call[0] == program]


def trained_settings(run: Trial) -> list[train.Settings]:
    return [config.load(train.Settings, args) for args in commands(run, "train.py")]


def trained_runs(run: Trial) -> list[str]:
    return [Path(settings.out_dir).name for settings in trained_settings(run)]


def trained_seeds(run: Trial) -> list[int]:
    return [settings.seed for settings in trained_settings(run)]


def trained_rates(run: Trial) -> set[float]:
    return {settings.lr for settings in trained_settings(run)}


def trained_objectives(run: Trial) -> list[str]:
    return [settings.schedule for settings in trained_settings(run)]


def trained_corpora(run: Trial) -> set[str]:
    return {Path(settings.corpus).name for settings in trained_settings(run)}


def flag_values(run: Trial, program: str, flag: str) -> set[str]:
    """What follows a flag in all calls of a program."""
    values = set()
    for args in commands(run, program):
        values.add(args[args.index(flag) + 1])
    return values


def scored_tasks(run: Trial) -> set[str]:
    return {Path(task).name for task in flag_values(run, "eval.py", "--task")}


def scored_limits(run: Trial) -> set[str]:
    return flag_values(run, "eval.py", "--limit")


def scored_modes(run: Trial) -> set[str]:
    return flag_values(run, "eval.py", "--mode")


def tuned(run: Trial, name: str) -> set[str]:
    """The values of a flag of finetune.py."""
    values = set()
    for args in commands(run, "finetune.py"):
        values |= {arg.partition("=")[2] for arg in args if arg.startswith(f"--{name}=")}
    return values


def tuned_tasks(run: Trial) -> set[str]:
    return tuned(run, "tasks")


def tuned_data(run: Trial) -> set[str]:
    return {Path(path).name for path in tuned(run, "data")}


def devices_of_all(run: Trial) -> set[str]:
    calls = commands(run, "train.py") + commands(run, "eval.py") + commands(run, "finetune.py")
    flags = [[arg for arg in args if arg.startswith("--device=")] for args in calls]
    assert len(flags) == 6
    return {flag for (flag,) in flags}


def compared_with(run: Trial) -> str:
    return re.search(r"\| minus (\w+)", run.printed)[1]


def made_words(run: Trial) -> tuple[int, int]:
    """Words for training and for development of the corpus that the experiment has made."""
    (folder,) = {settings.corpus for settings in trained_settings(run)}
    content = json.loads((Path(folder) / "meta.json").read_text())
    return content["train"]["words"], content["dev"]["words"]


def made_vocabulary(run: Trial) -> set[int]:
    folders = {settings.corpus for settings in trained_settings(run)}
    return {Tokenizer(Path(folder) / "tokenizer.json").vocab_size for folder in folders}


MAKE = {"corpus": ""}

EXPERIMENT_ROWS = [
    # what is compared
    Row("arms", {"{'x': {}}": ["x_1"], "{'x': {}, 'y': {}}": ["x_1", "y_1"]}, trained_runs),
    Row(
        "arms",
        {
            "{'x': dict(schedule='2_MLM')}": ["2_MLM"],
            "{'x': dict(schedule='1_CLM'), 'y': dict(schedule='1_MLM')}": ["1_CLM", "1_MLM"],
        },
        trained_objectives,
    ),
    Row("baseline", {"": "clm", "mlm": "mlm"}, compared_with),
    Row("seeds", {1: [1, 1], 2: [1, 1, 2, 2]}, trained_seeds),
    Row("first_seed", {1: [1, 1], 5: [5, 5]}, trained_seeds),
    Row("config", {"": {7e-4}, "@override": {0.125}}, trained_rates),
    Row("settings", {f"{SMALL}": {7e-4}, f"{SMALL | {'lr': 0.25}}": {0.25}}, trained_rates),
    Row(
        "unequal_epochs",
        {False: True, True: False},
        is_refused,
        {"arms": "{'x': dict(schedule='1_CLM'), 'y': dict(schedule='2_CLM')}"},
    ),
    # the text
    Row("corpus", {"@corpus": {"corpus"}, "@out/mine": {"mine"}}, trained_corpora),
    Row("text", {"@texts/train.txt": (96, 40), "@texts/long.txt": (600, 40)}, made_words, MAKE),
    Row("dev", {"@texts/dev.txt": (96, 40), "@texts/short.txt": (96, 32)}, made_words, MAKE),
    Row(
        "slice", {1: (600, 40), 3: (200, 40)}, made_words, {"corpus": "", "text": "@texts/long.txt"}
    ),
    Row("vocab_size", {BYTES: {BYTES}, BYTES + 2: {BYTES + 2}}, made_vocabulary, MAKE),
    # how it is scored
    Row(
        "tasks",
        {"@pairs": {"pairs"}, "@pairs,@other_pairs": {"pairs", "other_pairs"}},
        scored_tasks,
    ),
    Row("limit", {0: {"0"}, 3: {"3"}}, scored_limits),
    Row("modes", {"causal": {"causal"}, "masked": {"masked"}}, scored_modes),
    Row("glue", {"rte": {"rte"}, "rte,cola": {"rte,cola"}}, tuned_tasks),
    Row(
        "glue_data", {"@glue": {"glue"}, "@short_glue": {"short_glue"}}, tuned_data, {"glue": "rte"}
    ),
    # how it is run
    Row("out", {"@out/study": ["study"], "@out/other": ["other"]}, folders),
    Row("device", {"cpu": {"--device=cpu"}, "cuda": {"--device=cuda"}}, devices_of_all),
    Row("table", {False: [1, 1], True: []}, trained_seeds, {"out": "@out"}),
]

EXPERIMENT = Program(
    call_experiment,
    dict(
        arms="dict(clm=dict(schedule='1_CLM'), mlm=dict(schedule='1_MLM'))",
        settings=f"{SMALL}",
        seeds=1,
        corpus="@corpus",
        text="@texts/train.txt",
        dev="@texts/dev.txt",
        vocab_size=BYTES,
        tasks="@pairs",
        out="@out/study",
        device="cpu",
        glue_data="@glue",
    ),
    EXPERIMENT_ROWS,
    settings=experiment.Spec,
)

# ----------------------------------------------------------------------------------- tools/bench.py


class Threads:
    """Stands for a context of multiprocessing: processes that need no seconds to start."""

    Pipe = staticmethod(multiprocessing.Pipe)

    @staticmethod
    def Process(target: Callable, args: tuple, daemon: bool) -> threading.Thread:
        # the caller closes its copy of the pipe's end, so the thread needs another
        end = Connection(os.dup(args[0].fileno()))
        return threading.Thread(target=target, args=(end, *args[1:]), daemon=daemon)


def call_bench(arguments: list[str]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.multiprocessing, "get_context", lambda method: Threads)
        as_program(bench.main, arguments)


def models_timed(run: Trial) -> list[str]:
    """The names of the models that a line is printed for."""
    return re.findall(r"^(\S.*?),? (?:CLM|causal|masked),", run.printed, re.M)


def causal_training(run: Trial) -> set[bool]:
    return {forward.attention[0].causal for forward in run.training}


def causal_scoring(run: Trial) -> set[bool]:
    return {forward.attention[0].causal for forward in run.evaluation}


def n_compiled(run: Trial) -> int:
    return len(run.compiled)


def sees_peer(run: Trial) -> bool:
    return any(forward.of(PEERS["ltg_bert"]) for forward in run.training)


def n_steps(run: Trial) -> int:
    return len(run.training)


def rows_trained(run: Trial) -> set[int]:
    return {len(forward.tokens) for forward in run.training}


def n_threads(run: Trial) -> set[int]:
    return {forward.n_thread for forward in run.passes}


def kinds_of_pass(run: Trial) -> set[bool]:
    """Whether passes train."""
    return {forward.trains for forward in run.passes}


def pairs_scored(run: Trial) -> int:
    return int(re.search(r"(\d+) pairs, float32", run.printed)[1])


SCORING = {"scoring": "@pairs", "set": ("corpus=@corpus",)}

BENCH_ROWS = [
    Row(
        "configs",
        {("@tiny",): ["tiny"], ("@tiny", "@tiny_ltg"): ["tiny", "tiny_ltg"]},
        models_timed,
    ),
    Row("objectives", {("CLM",): {True}, ("MLM",): {False}}, causal_training),
    Row("compile", {("off",): 0, ("on",): 1, ("off", "on"): 1}, n_compiled),
    Row("peer", {False: False, True: True}, sees_peer, {"configs": ("@tiny_ltg",)}),
    Row("rows", {4: {4}, 6: {6}}, rows_trained),
    # two to warm up, and the last for the profiler
    Row("steps", {1: 2 + 1 + 1, 3: 2 + 3 + 1}, n_steps),
    Row("rounds", {1: 2 + 1 + 1, 2: 2 + 2 + 1}, n_steps),
    Row("threads", {1: {1}, 2: {2}}, n_threads),
    Row("set", {("n_layer=1",): {1}, ("n_layer=2", "lr=0.1"): {2}}, n_layers),
    Row("scoring", {None: {True}, "@pairs": {False}}, kinds_of_pass, {"set": ("corpus=@corpus",)}),
    Row("modes", {("causal",): {True}, ("masked",): {False}}, causal_scoring, SCORING),
    Row("limit", {2: 2, 4: 4}, pairs_scored, SCORING),
]

BENCH = Program(
    call_bench,
    dict(
        configs=("@tiny",),
        objectives=("CLM",),
        rows=4,
        steps=1,
        rounds=1,
        threads=1,
        modes=("causal",),
    ),
    BENCH_ROWS,
    positional=("configs",),
)

# --------------------------------------------------------------------------------- tools/grammar.py


def sentences(run: Trial) -> list[str]:
    return (run.folder / "text" / "train.txt").read_text().splitlines()


def n_sentences(run: Trial) -> int:
    return len(sentences(run))


def grammar_pairs(run: Trial) -> list[str]:
    return [path.read_text() for path in sorted((run.folder / "text" / "pairs").iterdir())]


GRAMMAR_ROWS = [
    Row("out", {"@out/text": ["text"], "@out/other": ["other"]}, folders),
    Row("sentences", {100: 100, 150: 150}, n_sentences),
    Row("seed", (1, 2), sentences),
    Row("pairs_seed", (3, 4), grammar_pairs),
]

GRAMMAR = Program(
    partial(as_program, grammar.main),
    dict(out="@out/text", sentences=100),
    GRAMMAR_ROWS,
    positional=("out",),
)

# ------------------------------------------------------------------------------------ tools/plot.py


def call_plot(arguments: list[str]):
    pytest.importorskip("matplotlib", reason="optional: pip install matplotlib")
    as_program(plot.main, arguments)


def picture(run: Trial) -> bytes:
    (path,) = run.folder.iterdir()
    return path.read_bytes()


PLOT_ROWS = [
    Row("runs", (("@run",), ("@half_run",), ("@run", "@half_run")), picture),
    Row("out", {"@out/a.png": ["a.png"], "@out/b.svg": ["b.svg"]}, files),
]

PLOT = Program(call_plot, dict(runs=("@run",), out="@out/a.png"), PLOT_ROWS, positional=("runs",))

# ------------------------------------------------------------ tools/average.py and tools/mix.py


def averaged_weights(run: Trial) -> list[float]:
    (path,) = run.folder.rglob("step_*.pt")
    return load_checkpoint(path)["model"]["blocks.0.out.weight"].flatten().tolist()


AVERAGE_ROWS = [
    Row("out", {"@out/mean": ["mean"], "@out/other": ["other"]}, folders),
    Row("runs", (("@run",), ("@run", "@other_run"), ("@other_run",)), averaged_weights),
    Row("shares", (None, ("1", "3"), ("0", "1")), averaged_weights),
    Row("weights", ("average", "last"), averaged_weights, {"runs": ("@averaged_run",)}),
]

AVERAGE = Program(
    partial(as_program, average.main),
    dict(out="@out/mean", runs=("@run", "@other_run")),
    AVERAGE_ROWS,
    positional=("out", "runs"),
)

MIX_ROWS = [
    Row(
        "epochs",
        {24: "24_3CLM:1MDNTP\n", 32: "32_3CLM:1MDNTP\n", 64: "64_1CLM:3MDNTP\n"},
        lambda run: run.printed,
    )
]

MIX = Program(partial(as_program, mix.main), dict(epochs=24), MIX_ROWS, positional=("epochs",))

# -------------------------------------------------------- tools/export_hf.py and tools/import_hf.py


def call_import(arguments: list[str]):
    pytest.importorskip("safetensors", reason="optional: pip install safetensors")
    import import_hf

    as_program(import_hf.main, arguments)


def exported_weights(run: Trial) -> bytes:
    return (run.folder / "model" / "model.safetensors").read_bytes()


def exported_folders(run: Trial) -> set[str]:
    """The folders of models."""
    return {str(path.parent.relative_to(run.folder)) for path in run.folder.rglob("config.json")}


def imported_weights(run: Trial) -> list[float]:
    (path,) = checkpoints(run.folder / "imported")
    return load_checkpoint(path)["model"]["blocks.0.out.weight"].flatten().tolist()


EXPORT_ROWS = [
    Row("run", ("@run", "@run/step_0000003.pt", "@other_run"), exported_weights),
    Row("out", {"@out/model": {"model"}, "@out/other": {"other"}}, exported_folders),
    Row("checkpoints", {False: {"model"}, True: {"model/main"}}, exported_folders),
    Row("weights", ("average", "last"), exported_weights, {"run": "@averaged_run"}),
]

EXPORT = Program(
    call_export, dict(run="@run", out="@out/model"), EXPORT_ROWS, positional=("run", "out")
)

IMPORT_ROWS = [
    Row("folder", ("@exported", "@other_exported"), imported_weights),
    Row("run", {"@out/imported": ["imported"], "@out/other": ["other"]}, folders),
]

IMPORT = Program(
    call_import,
    dict(folder="@exported", run="@out/imported"),
    IMPORT_ROWS,
    positional=("folder", "run"),
)

# --------------------------------------------------------------------------------- babylm/submit.py


def call_submit(arguments: list[str]):
    """Call submit.py with a small challenge, in this process and without earlier results."""
    for run in arguments[:1]:
        shutil.rmtree(Path(run) / "submission", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        small_challenge.make_small(patch)
        patch.setattr(submit, "call", small_challenge.call_here)
        as_program(submit.main, arguments)


def submitted(run: Trial) -> dict:
    """The one file that is handed in."""
    paths = [*run.folder.rglob("all_full_preds*.json"), *run.folder.rglob("*.json.gz")]
    (path,) = paths
    raw = path.read_bytes()
    return json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)


def surprisals(run: Trial) -> list[float]:
    return [line["surprisal"] for line in submitted(run)["aoa_surprisals"]["results"]]


def backends(run: Trial) -> set[str]:
    """The names of the folders of a mode."""
    return {path.name for path in run.folder.glob("sent/mine/*/zero_shot/*")}


def verbs(run: Trial) -> set[str]:
    """The third word of each sentence that was chosen."""
    chosen = []
    for subset in submitted(run)["blimp_supplement"].values():
        chosen += [line["pred"].split()[2] for line in subset["predictions"]]
    return set(chosen)


def keys_of_ages(run: Trial) -> list[str]:
    return [key for key in submitted(run) if key.startswith("aoa")]


def models_sent(run: Trial) -> list[str]:
    return [path.name for path in (run.folder / "sent").iterdir()]


SUBMIT_ROWS = [
    Row("run", ("@marks", "@other_marks"), surprisals),
    Row("mode", {"causal": {"causal"}, "masked": {"mlm"}, "mntp": {"mntp"}}, backends),
    Row("mode", ("causal", "masked", "mntp"), surprisals),
    Row("data", {"@challenge": {"sees."}, "@other_challenge": {"hears."}}, verbs),
    Row("out", {"@out/sent": ["sent"], "@out/other": ["other"]}, folders),
    Row("year", {"2026": ["aoa_surprisals", "aoa"], "2025": ["aoa"], "2024": []}, keys_of_ages),
    Row("name", {"mine": ["mine"], None: ["marks"]}, models_sent),
    Row("incomplete", {False: True, True: False}, is_refused),
    Row("weights", ("average", "last"), surprisals, {"run": "@averaged_marks"}),
    Row("device", {"cpu": {"cpu"}, "cuda": CUDA}, devices),
    Row("dtype", {"float32": (set(), FLOAT32[1]), "bfloat16": (set(), BFLOAT16[1])}, dtypes),
]

SUBMIT = Program(
    call_submit,
    dict(
        run="@marks",
        mode="causal",
        data="@challenge",
        out="@out/sent",
        name="mine",
        incomplete=True,
        device="cpu",
    ),
    SUBMIT_ROWS,
    positional=("run",),
)

# --------------------------------------------------------------------------------------- the tests

PROGRAMS = {
    "eval": EVAL,
    "sample": SAMPLE,
    "prepare": PREPARE,
    "experiment": EXPERIMENT,
    "bench": BENCH,
    "grammar": GRAMMAR,
    "plot": PLOT,
    "average": AVERAGE,
    "mix": MIX,
    "export_hf": EXPORT,
    "import_hf": IMPORT,
    "submit": SUBMIT,
}
SLOW = ("plot", "export_hf", "import_hf", "submit")


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_setting_has_a_row(name):
    program = PROGRAMS[name]
    assert {row.setting for row in program.rows} == program.known()


@pytest.mark.parametrize("program, row", cases(PROGRAMS, SLOW))
def test_a_setting_does_what_its_comment_says(lab, program, row):
    assert not lab.differences(program, row)
