"""How programs end: signals, pipes, encodings, mistakes, and what they leave behind.

python -m pytest tests/test_program.py -m "not slow"    # clean_exit alone; with the rest 2 minutes

All is asked of real processes with real signals.
"""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

from antlm.checkpoint import save_checkpoint
from antlm.compiling import find_compiler, missing_for_compile
from antlm.distributed import full_memory_in_one_line
from antlm.files import new_folder, write_json
from antlm.program import STOP_SIGNALS, clean_exit
from antlm.tokenizer import Tokenizer
from config import UserError
from model import Transformer
from train import Settings

# one thread, and output that is buffered, as it is by default
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
each_signal = pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)


def start(command: list, ignored: tuple = (), **settings) -> subprocess.Popen:
    """Start a process in a group of its own, in which these signals are ignored."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = ENVIRONMENT | settings.pop("environment", {})
    streams |= settings
    # what a process ignores, its children ignore from the start
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        **streams,
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return process


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Wait for a process and return its exit code, what it printed and its errors."""
    try:
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, printed or "", errors or ""


# --------------------------------------------------------------------------------------- clean_exit

BEGINNING = """
import os, signal, sys, time
from config import UserError
from antlm.program import clean_exit
def wait():
    print("ready", flush=True)
    time.sleep(60)
with clean_exit():
"""


def program(*lines: str, **settings) -> subprocess.Popen:
    """Start a program whose main() has these lines."""
    text = BEGINNING + "".join(f"    {line}\n" for line in lines)
    return start(["-c", text], **settings)


@each_signal
def test_a_signal_runs_what_must_be_run_and_leaves_no_traceback(number):
    process = program("try: wait()", "finally: print('cleaned')")
    process.stdout.readline()
    process.send_signal(number)
    assert end(process) == (128 + number, "cleaned\n", "")


@each_signal
def test_the_same_signal_again_does_not_cut_cleaning_short(number):
    """`timeout` sends SIGTERM twice at once, and people press Ctrl-C twice."""
    lines = ["try: wait()", "finally:", f"    os.kill(os.getpid(), {int(number)})"]
    process = program(*lines, "    time.sleep(0.1)", "    print('cleaned')")
    process.stdout.readline()
    process.send_signal(number)
    assert end(process) == (128 + number, "cleaned\n", "")


@each_signal
def test_a_signal_that_was_ignored_from_the_start_stays_ignored(number):
    """As nohup and the background of shell scripts want it."""
    process = program(f"os.kill(os.getpid(), {int(number)})", "print('went on')", ignored=[number])
    assert end(process) == (0, "went on\n", "")


@pytest.mark.parametrize(
    "line, expected",
    [
        ("raise UserError('x.txt: is empty')", "-c: x.txt: is empty\n"),
        ("open('/no/such/é')", "-c: [Errno 2] No such file or directory: '/no/such/\\xe9'\n"),
        ("raise UserError('\\udce9')", "-c: \\udce9\n"),  # of a name that is not UTF-8
    ],
)
def test_a_mistake_is_one_line(line, expected):
    process = program("print('before')", line, environment={"PYTHONIOENCODING": "ascii"})
    assert end(process) == (1, "before\n", expected)


def test_a_fault_of_the_program_keeps_its_traceback():
    code, _, errors = end(program("1 / 0"))
    assert code == 1
    assert "ZeroDivisionError" in errors


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"])
def test_what_the_output_cannot_show_is_escaped(encoding):
    lines = ["print('naïve 世')", "print('naïve 世', file=sys.stderr)"]
    code, printed, errors = end(
        program(*lines, environment={"PYTHONIOENCODING": encoding}, encoding="latin-1")
    )
    expected = "naïve \\u4e16\n" if encoding == "latin-1" else "na\\xefve \\u4e16\n"
    assert (code, printed, errors) == (0, expected, expected)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_ends_it_silently(stream, lines):
    process = program(f"for i in range({lines}): print('some text', file=sys.{stream})")
    getattr(process, stream).close()
    other = process.stderr if stream == "stdout" else process.stdout
    assert other.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


def test_a_mistake_is_said_though_nobody_reads_the_output():
    process = program("print('before')", "raise UserError('x.txt: is empty')")
    process.stdout.close()
    assert process.stderr.read() == "-c: x.txt: is empty\n"
    assert process.wait() == 1


def test_output_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        process = program("print('before')", stdout=full)
    assert end(process) == (1, "", "-c: [Errno 28] No space left on device\n")


def test_output_that_was_closed_by_the_caller_is_dropped():
    command = [sys.executable, "-c", BEGINNING + "    print('nothing')"]
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_handlers_are_put_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(SystemExit, match="3"), clean_exit():
        sys.exit(3)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


# --------------------------------------------------------------------------------------- new_folder


def test_a_new_folder_appears_when_it_is_whole(tmp_path):
    with new_folder(tmp_path / "a" / "b") as unfinished:
        unfinished.mkdir(parents=True)
        (unfinished / "file").write_text("text")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "text"


def test_a_folder_that_came_up_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "a") as unfinished:
        unfinished.mkdir()
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "precious").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["a", "a/precious"]


# ----------------------------------------------------------------------------------- every program


def programs() -> list[str]:
    """Return what python is told to run for each program: a file, or a module of a package."""
    names = []
    for folder in ("*.py", "babylm/*.py", "tools/*.py"):
        for path in sorted(ROOT.glob(folder)):
            if main_block(path):
                names.append(str(path.relative_to(ROOT)))
    return names


def main_block(path: Path) -> ast.If | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            return node
    return None


@pytest.mark.parametrize("path", [*programs(), "tests/kill.py"])
def test_every_program_runs_in_clean_exit(path):
    """So that a new one cannot forget it. errors_in_one_line of train.py is made of it."""
    (statement,) = main_block(ROOT / path).body
    assert isinstance(statement, ast.With), "the block must be `with clean_exit():`"
    (item,) = statement.items
    assert ast.unparse(item) in ("clean_exit()", "errors_in_one_line()")


@dataclass(frozen=True)
class Call:
    """A quick call of a program, whose arguments name paths below a folder {place}."""

    arguments: str
    result: str  # pattern of a file that it writes, or "" if it only prints
    optional: str = ""  # a module that it needs beside requirements.txt


CALLS = {
    "train.py": Call(
        "--corpus={place}/corpus --out_dir={place}/trained --schedule=1_CLM " + " ".join(TINY),
        "trained/step_*.pt",
    ),
    "eval.py": Call("{place}/run --task {place}/Zoë.jsonl", "run/eval_Zoë_10.json"),
    "finetune.py": Call(
        "{place}/run --data={place}/glue --tasks=rte --epochs=1 --out={place}/glue.json",
        "glue.json",
    ),
    "sample.py": Call("{place}/run --prompt Zoë --n 2 --tokens 4", ""),
    "prepare.py": Call(
        "{place}/text --dev {place}/Zoë.dev --out {place}/prepared --vocab_size 300",
        "prepared/meta.json",
    ),
    "babylm/submit.py": Call(
        "{place}/run --year 2024 --mode causal --incomplete --data {place}/evaluation "
        "--out {place}/submission",
        "submission/run_textonly_predictions.json.gz",
    ),
    "tools/average.py": Call("{place}/mean {place}/run {place}/run", "mean/step_0000010.pt"),
    "tools/bench.py": Call(
        "{place}/Zoë.py --scoring {place}/Zoë.jsonl --modes causal --rounds 1 --threads 1", ""
    ),
    "tools/experiment.py": Call("{place}/spec.py --out={place}/out --table", "out/results.md"),
    "tools/export_hf.py": Call(
        "{place}/run {place}/exported", "exported/README.md", optional="safetensors"
    ),
    "tools/grammar.py": Call("{place}/grammar --sentences 50", "grammar/train.txt"),
    "tools/import_hf.py": Call(
        "{place}/hf {place}/imported", "imported/step_0000010.pt", optional="safetensors"
    ),
    "tools/mix.py": Call("24", ""),
    "tools/plot.py": Call("{place}/run", "run/training.png", optional="matplotlib"),
}
each_program = pytest.mark.parametrize("path", CALLS)


def test_there_is_a_call_of_every_program():
    assert sorted(CALLS) == sorted(programs())


def command(path: str, place: Path) -> list[str]:
    """Return the arguments of python for the call of a program."""
    if CALLS[path].optional:
        pytest.importorskip(CALLS[path].optional)
    words = [path]
    if path.startswith("babylm/"):  # modules of a package
        words = ["-m", path.removesuffix(".py").replace("/", ".")]
    return words + [word.format(place=place) for word in CALLS[path].arguments.split(" ")]


def make_run(folder: Path, corpus: Path, vocab_size: int = 600, **sizes):
    """A run folder with an untrained model, of which half the vocabulary is no token."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    settings = Settings(block_size=16, schedule="1_CLM+1_MLM", out_dir=str(folder), **sizes)
    save_checkpoint(
        folder / "step_0000010.pt",
        Transformer(settings.model_config(vocab_size)),
        step=10,
        words=1000,
        boundary="line",
        optimizer=[],
        settings=asdict(settings),
        tokenizer_sha256=Tokenizer(folder / "tokenizer.json").sha256,
        tokens_sha256="0" * 64,
    )
    write_json(folder / "settings.json", asdict(settings))
    entry = {"step": 1, "epoch": 1, "loss": {"CLM": 3.0}, "lr": 0.1}
    (folder / "metrics.jsonl").write_text(json.dumps(entry) + "\n")


def rte_lines(n: int) -> list[dict]:
    return [{"sentence1": "Zoë.", "sentence2": "A dog.", "label": i % 2} for i in range(n)]


def write_lines(path: Path, records: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def place(tmp_path, corpus) -> Path:
    """A folder, with an accent in its name, that has all that the calls need."""
    place = tmp_path / "Zoë"
    small = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_ff": 48}
    make_run(place / "run", Path(corpus), **small)
    (place / "corpus").symlink_to(corpus)
    (place / "text").mkdir()
    (place / "text" / "Zoë.txt").write_text("Zoë sees the naïve dog.\n" * 30, encoding="utf-8")
    (place / "Zoë.dev").write_text("The naïve dog sees Zoë.\n" * 30, encoding="utf-8")
    pair = {"sentence_good": "Zoë sleeps.", "sentence_bad": "Zoë sleep."}
    write_lines(place / "Zoë.jsonl", [pair] * 3)
    for split in ("train", "valid"):
        write_lines(place / "glue" / f"rte.{split}.jsonl", rte_lines(8))

    # what can be handed in: the challenge has 139 items of RTE
    write_lines(place / "evaluation" / "glue_filtered" / "rte.train.jsonl", rte_lines(8))
    write_lines(place / "evaluation" / "glue_filtered" / "rte.valid.jsonl", rte_lines(139))

    # settings of a small model, and an experiment that has made nothing yet
    lines = [f"{name} = {value}" for name, value in small.items()]
    lines += ["block_size = 16", f'corpus = "{place}/corpus"\n']
    (place / "Zoë.py").write_text("\n".join(lines), encoding="utf-8")
    spec = ['arms = {"Zoë": dict(schedule="1_CLM")}', f"settings = {small}"]
    spec += [f'corpus = "{place}/corpus"', 'tasks = ("Zoë",)']
    (place / "spec.py").write_text("\n".join(spec) + "\n", encoding="utf-8")
    (place / "out").mkdir()
    return place


@pytest.fixture
def hf(place):
    """An exported folder in the place."""
    export(place / "run", place / "hf")


def export(run: Path, out: Path):
    pytest.importorskip("safetensors")
    import export_hf

    export_hf.main([str(run), str(out)])


@pytest.mark.slow
@each_program
def test_names_that_the_output_cannot_show_cost_no_result(path, place, request):
    if path == "tools/import_hf.py":
        request.getfixturevalue("hf")
    environment = {"PYTHONIOENCODING": "ascii"}
    code, printed, errors = end(start(command(path, place), environment=environment))
    assert code == 0, errors
    assert "Traceback" not in errors
    assert printed.isascii()
    # grammar.py prints nothing, mix.py names nothing
    assert "Zo\\xeb" in printed or path in ("tools/grammar.py", "tools/mix.py")
    assert list(place.glob(CALLS[path].result or "*"))


# these print as they go, and save as they go
PRINT_AS_THEY_GO = ("train.py", "eval.py", "finetune.py", "prepare.py", "babylm/submit.py")
PRINT_LAST = [path for path in CALLS if CALLS[path].result and path not in PRINT_AS_THEY_GO]


@pytest.mark.slow
@pytest.mark.parametrize("path", PRINT_LAST)
def test_results_are_on_disk_before_anything_is_printed(path, place, request):
    """To a pipe that nobody reads, so that the first byte printed is the end."""
    if path == "tools/import_hf.py":
        request.getfixturevalue("hf")
    process = start(command(path, place), environment={"PYTHONUNBUFFERED": "1"})
    process.stdout.close()
    errors = process.stderr.read()
    # experiment.py has an exit code of its own, and grammar.py prints nothing
    assert process.wait() in (0, 128 + signal.SIGPIPE), errors
    assert errors == ""
    assert list(place.glob(CALLS[path].result))


# ---------------------------------------------------------------------------- a signal at any time

# Calls that make a temporary file or folder, and the pattern that finds it while they are at work.
WORK = {
    "prepare.py": ("{place}/long.txt --dev {place}/text --out {place}/new", ".new.*"),
    "tools/experiment.py": ("{place}/long.py --out={place}/out", "out/.corpus_1.*"),
    "tools/export_hf.py": ("{place}/large {place}/new", ".new.*"),
    "tools/grammar.py": ("{place}/new --sentences 200000", ".new.*"),
    "tools/import_hf.py": ("{place}/hf {place}/new", ".new.*"),
    "tools/plot.py": ("{place}/run", "run/.training.png.part"),
}


@pytest.fixture
def long_work(place, corpus):
    """A text, a model and an experiment in the place, with which the calls of WORK need a while."""
    (place / "long.txt").write_text("Zoë sees the naïve dog.\n" * 500_000, encoding="utf-8")
    make_run(place / "large", Path(corpus), vocab_size=12_000, n_layer=1)
    spec = (place / "spec.py").read_text(encoding="utf-8").partition("corpus =")[0]
    spec += f'text = "{place}/long.txt"\ndev = "{place}/text"\ntasks = ("{place}/Zoë.jsonl",)\n'
    (place / "long.py").write_text(spec, encoding="utf-8")


def wait_until(condition, process: subprocess.Popen):
    """Wait until a condition holds while a process runs; fail if the process ends before."""
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("path", WORK)
def test_a_signal_at_work_leaves_nothing_behind(path, place, long_work):
    if path == "tools/import_hf.py":
        export(place / "large", place / "hf")
    if path == "tools/plot.py":
        pytest.importorskip("matplotlib")
    arguments, temporary = WORK[path]
    process = start([path, *arguments.format(place=place).split(" ")])
    wait_until(lambda: list(place.glob(temporary)), process)
    process.send_signal(signal.SIGTERM)
    began = time.time()
    code, _, errors = end(process)
    assert code == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert time.time() - began < 15  # a second or two, where the machine is not busy
    assert list(place.rglob(".*")) == []
    assert not (place / "new").exists()


@pytest.mark.slow
def test_ctrl_c_while_scoring_leaves_nothing_behind(place, long_work):
    pairs = [{"sentence_good": f"A dog {i}.", "sentence_bad": f"A cat {i}."} for i in range(9000)]
    write_lines(place / "many.jsonl", pairs)
    before = sorted(place.rglob("*"))
    process = start(["-u", "eval.py", place / "large", "--task", place / "many.jsonl"])
    assert "step 10 of" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert end(process) == (128 + signal.SIGINT, "", "")
    assert sorted(place.rglob("*")) == before


@pytest.mark.slow
def test_a_signal_while_fine_tuning_keeps_what_is_finished(place):
    out = place / "glue.json"
    flags = [f"--data={place}/glue", "--tasks=rte", "--seeds=12,13", f"--out={out}"]
    process = start(["finetune.py", place / "run", *flags, "--epochs=300", "--patience=3"])
    wait_until(out.exists, process)
    before = sorted(place.rglob("*"))
    process.send_signal(signal.SIGTERM)
    code, _, errors = end(process)
    assert (code, errors) == (128 + signal.SIGTERM, "")
    seeds = json.loads(out.read_text(encoding="utf-8"))["tasks"]["rte"]["seeds"]
    assert len(seeds["12"]["predictions"]) == 8
    assert sorted(place.rglob("*")) == before


@pytest.mark.slow
def test_bench_takes_its_cases_with_it(place):
    """A case is a process of its own, and Ctrl-C in a terminal reaches all of them."""
    flags = ["--objectives", "CLM", "--rounds", "100000", "--threads", "1"]
    process = start(["tools/bench.py", place / "Zoë.py", *flags])
    wait_until(lambda: cases_of(process), process)
    cases = cases_of(process)
    os.killpg(process.pid, signal.SIGINT)
    code, _, errors = end(process)
    assert (code, errors) == (128 + signal.SIGINT, "")
    assert not any(case.exists() for case in cases)


def cases_of(process: subprocess.Popen) -> list[Path]:
    """Return /proc/PID of the children that ignore SIGINT, but not SIGTERM, as others do."""
    folder = Path("/proc", str(process.pid), "task", str(process.pid))
    cases = []
    for pid in (folder / "children").read_text().split():
        status = Path("/proc", pid, "status").read_text()
        ignored = int(re.search(r"^SigIgn:\s*(\w+)", status, re.M)[1], base=16)
        if ignored & 1 << (signal.SIGINT - 1) and not ignored & 1 << (signal.SIGTERM - 1):
            cases.append(Path("/proc", pid))
    return cases


# ------------------------------------------------------------------------------------- full memory

FULL_MEMORY = """
import runpy, sys
import torch
from antlm import ops
ops.attention = lambda *args, **settings: torch.empty(1 << 45)
sys.argv = {words}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, advice",
    [
        ("train.py", "lower --micro_rows, the batch stays the same"),
        ("eval.py", "choose a smaller --batch_tokens"),
        ("finetune.py", "choose a smaller --batch_rows"),
    ],
)
def test_a_full_memory_is_one_line(path, advice, place):
    process = start(["-c", FULL_MEMORY.format(words=command(path, place))])
    code, _, errors = end(process)
    assert code == 1
    assert errors == f"{path}: the device's memory is full; {advice}\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
    ids=type,
)
def test_a_full_gpu_is_one_line_by_whichever_of_its_errors(error):
    message = "^the device's memory is full; less$"
    with pytest.raises(UserError, match=message), full_memory_in_one_line("less"):
        raise error


# ------------------------------------------------------------------------------------- no compiler


@pytest.mark.parametrize(
    "device, variables, names, expected",
    [
        ("cpu", {}, ["g++", "c++", "clang++"], "g++"),
        ("cpu", {}, ["gcc", "c++", "clang++"], None),  # torch looks for no other name
        ("cpu", {"CXX": "clang++"}, ["g++", "clang++"], "clang++"),
        ("cpu", {"CXX": "missing"}, ["g++", "clang++"], None),
        ("cuda", {}, ["gcc", "clang", "g++"], "gcc"),
        ("cuda", {}, ["clang"], "clang"),
        ("cuda", {}, ["cc", "g++"], None),
        ("cuda", {"CC": "clang"}, ["gcc", "clang"], "clang"),
        ("cuda", {"CC": "missing"}, ["gcc", "clang"], None),
    ],
)
def test_the_compiler_is_the_one_that_torch_calls(
    tmp_path, monkeypatch, device, variables, names, expected
):
    for name in names:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    path = find_compiler(torch.device(device))
    assert path == (str(tmp_path / expected) if expected else None)


def test_the_headers_of_python_are_needed_too(tmp_path, monkeypatch):
    headers = sysconfig.get_path("include")
    (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda *args: str(tmp_path))
    assert "python3-dev" in missing_for_compile(torch.device("cpu"))
    monkeypatch.setenv("CPATH", f"/nowhere:{headers}")
    assert missing_for_compile(torch.device("cpu")) is None


@pytest.mark.slow
def test_without_a_compiler_bench_says_so_in_one_line(tmp_path):
    process = start(["tools/bench.py", "--compile", "off", "on"], environment={"PATH": tmp_path})
    code, printed, errors = end(process)
    assert (code, printed) == (1, "")
    assert errors.startswith("bench.py: --compile on needs a C++ compiler (g++")
    assert errors.count("\n") == 1
