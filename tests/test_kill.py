"""Runs that are killed, damaged, starved of disk, or started twice. Alone: python -m pytest tests/test_kill.py

The long form of the first test: python tests/kill.py --kills 50
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import conftest
import pytest
import torch
from conftest import until

from antlm.checkpoint import checkpoints, digest, load_checkpoint, load_newest
from config import UserError  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import kill  # noqa: E402

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--n_ff=48", "--block_size=16", "--batch_rows=24", "--lr=3e-3",
        "--log_every=1", "--eval_rows=16", "--schedule=1_CLM+1_MLM"]


def start(*args: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "train.py", *TINY, *args], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run(*args: str, code: int = 0) -> str:
    """Run train.py to its end -> what it printed, or its error where code is not 0: one line."""
    process = start(*args)
    said, error = process.communicate(timeout=120)
    assert process.returncode == code, said + error
    assert not code or error.startswith("train.py: ") and error.count("\n") == 1, error
    return error if code else said


once, refusal = (partial(call, *TINY) for call in (conftest.once, conftest.refusal))


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a small file system of so many bytes -> its folder."""
    folder, mounted = tmp_path / "disk", []

    def mount(size: int, *options: str) -> Path:
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is not permitted: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


# ------------------------------------------------------------------------------------------------------- kills


def flip_a_bit(run: Path, part: str):
    path = checkpoints(run)[0]
    content = load_checkpoint(path)
    tensor = content["model"]["head.norm.weight"] if part == "model" else content["optimizer"][0]["state"][0]["exp_avg"]
    tensor.view(torch.int32).view(-1)[0] ^= 1
    torch.save(content | {"sha256": digest(content)}, path)


def change_a_number(run: Path):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(lines[3])
    lines[3] = json.dumps(entry | {"grad_norm": entry["grad_norm"] * (1 + 1e-12)})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_whatever_differs_between_two_runs_is_seen(corpus, tmp_path):
    """What the other tests here rely on."""
    once(f"--corpus={corpus}", f"--out_dir={tmp_path / 'whole'}", "--precision=float32")
    for i, (change, said) in enumerate([
            (lambda run: flip_a_bit(run, "model"), ": model"), (lambda run: flip_a_bit(run, "optimizer"), ": optimizer"),
            (change_a_number, "metrics.jsonl"), (lambda run: checkpoints(run)[1].unlink(), "checkpoints ["),
            (lambda run: (run / "source" / ".x.part").touch(), "left behind")]):
        other = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", other)
        assert kill.differences(tmp_path / "whole", other) == []
        change(other)
        found, = kill.differences(tmp_path / "whole", other)
        assert said in found


def test_killed_runs_end_as_one_that_was_not(tmp_path):
    count = kill.campaign("ltg_bert", kill.make_corpus(tmp_path), tmp_path, 2, random.Random(10))
    assert count["kills"] == 2 and count["runs"] >= 1


def test_what_a_kill_may_leave_is_mended(corpus, tmp_path, capsys):
    """The worst moment of every write, made by hand; then once more before the first checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    args = [f"--corpus={corpus}", "--save_every=5"]
    once(*args, f"--out_dir={whole}")
    shutil.copytree(whole, cut)
    newest = checkpoints(cut)[0]
    for part in (cut / f".{newest.name}.part", cut / ".metrics.jsonl.part", cut / "source" / "config" / ".quickstart.py.part"):
        part.write_bytes(b"half")
    newest.unlink()
    (cut / "settings.json").write_bytes(b"")
    (cut / "tokenizer.json").write_bytes((cut / "tokenizer.json").read_bytes()[:100])
    (cut / "source" / "model.py").write_text("import has")
    with open(cut / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "loss": {"CL')
    once(*args, f"--out_dir={cut}", "--resume")
    assert kill.differences(whole, cut) == []
    for name in ("settings.json", "tokenizer.json", "source/model.py"):
        expected = (whole / name).read_text().replace(str(whole), str(cut)).replace('"resume": false', '"resume": true')
        assert (cut / name).read_text() == expected
    for path in checkpoints(cut):
        path.rename(path.with_name(f".{path.name}.part"))
    for flags in ([], ["--resume"]):
        once(*args, f"--out_dir={cut}", *flags)
        assert "holds no checkpoint: starts at step 0" in capsys.readouterr().out
        assert kill.differences(whole, cut) == []
        for path in checkpoints(cut):
            path.unlink()


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(corpus, tmp_path):
    args = [f"--corpus={corpus}", f"--out_dir={tmp_path}", "--keep=1"]
    once(*args)
    newest, before = checkpoints(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-100])
    process = start(*args, "--resume", "--save_every=1")
    until(process, f"step {int(before.stem[5:]) + 3}/")
    process.kill()
    process.communicate()
    whole = [path for path in checkpoints(tmp_path)[1:] if load_checkpoint(path)]
    assert newest in checkpoints(tmp_path) and len(whole) >= 2 and before in whole
    once(*args, "--resume")
    assert load_checkpoint(newest)["step"] == int(newest.stem[5:])


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_flipped_bit_is_never_taken_for_good(corpus, tmp_path, optimizer):
    """In the zip's headers, in every tensor, in the pickle, at the end; what loads all the same is the same."""
    once(f"--corpus={corpus}", f"--out_dir={tmp_path}", f"--optimizer={optimizer}", "--save_every=5", "--n_embd=8")
    newest, before = checkpoints(tmp_path)[:2]
    whole, content, rng = newest.read_bytes(), load_checkpoint(newest), random.Random(3)
    tensors = [*content["model"].values(), *(t for state in content["optimizer"][0]["state"].values() for t in state.values()
                                             if isinstance(t, torch.Tensor) and t.numel() > 1)]
    inside = [whole.index(t.numpy().tobytes()) + rng.randrange(t.numel() * 4) for t in tensors]
    pickle = range(whole.index(b"data.pkl"), whole.index(b"data.pkl") + len(whole) // 20)
    detected = 0
    for place in [*inside, *rng.sample(pickle, 60), *range(8), *rng.sample(range(len(whole) - 1000, len(whole)), 60),
                  *rng.sample(range(len(whole)), 60)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        newest.write_bytes(damaged)
        try:
            assert kill.same(load_checkpoint(newest), content), f"bit flip in byte {place} went unnoticed"
            assert place not in inside
        except UserError as error:
            assert str(error).startswith(str(newest)) and "\n" not in str(error)
            detected += 1
    assert detected > len(inside) + 60
    damaged = bytearray(whole)
    damaged[inside[0]] ^= 1
    newest.write_bytes(damaged)
    skipped = []
    assert load_newest(tmp_path, skipped.append)[0] == before
    assert len(skipped) == 1 and skipped[0].startswith(f"skipped {newest}")


STRANGE = {  # checkpoints with a right checksum that train.py has not written
    "no step": lambda c: c.pop("step"), "step as text": lambda c: c.update(step="4"),
    "no settings": lambda c: c.pop("settings"), "settings as a list": lambda c: c.update(settings=[1]),
    "no tokenizer": lambda c: c.pop("tokenizer_sha256"), "no optimizer": lambda c: c.pop("optimizer"),
    "optimizer as a number": lambda c: c.update(optimizer=3), "an empty optimizer": lambda c: c.update(optimizer=[{}]),
    "other groups": lambda c: c["optimizer"][0].update(param_groups=[]), "no weights": lambda c: c.pop("model"),
    "wide config": lambda c: c["config"].update(n_embd=1 << 40)}


@pytest.fixture(scope="module")
def short_run(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("short")
    once(f"--corpus={corpus}", f"--out_dir={folder / 'run'}")
    return folder / "run"


@pytest.mark.parametrize("strange", STRANGE)
def test_a_strange_checkpoint_ends_in_one_line(corpus, short_run, tmp_path, strange):
    path = tmp_path / "run" / checkpoints(short_run)[0].name
    path.parent.mkdir()
    content = load_checkpoint(checkpoints(short_run)[0])
    STRANGE[strange](content)
    torch.save(content | {"sha256": digest(content)}, path)
    with pytest.raises((UserError), match=str(tmp_path)) as e:
        once(f"--corpus={corpus}", f"--out_dir={path.parent}", "--resume")
    assert "\n" not in str(e.value)


def test_an_older_checkpoint_goes_on(corpus, tmp_path):
    """Without the keys and settings that came later."""
    args = [f"--corpus={corpus}", f"--out_dir={tmp_path}"]
    once(*args)
    newest, before = checkpoints(tmp_path)
    expected = load_checkpoint(newest)
    content = load_checkpoint(before)
    for name in ("words", "skipped"):
        del content[name]
    for name in ("skip_nonfinite", "babylm_rules", "beta1"):
        del content["settings"][name]
    torch.save(content | {"sha256": digest(content)}, before)
    newest.unlink()
    once(*args, "--resume")
    assert kill.same(load_checkpoint(newest)["model"], expected["model"])
    torch.save(content | {"sha256": digest(content)}, before)
    newest.unlink()
    assert "beta1=0.9, not 0.8" in refusal(*args, "--resume", "--beta1=0.8")


# --------------------------------------------------------------------------------------------------------- disk


def test_a_full_disk_ends_the_run_and_spoils_nothing(corpus, tmp_path, disk):
    folder = disk(8 << 20)
    args = [f"--corpus={corpus}", f"--out_dir={folder / 'run'}", "--save_every=4", "--keep=1"]
    process = start(*args)
    until(process, "step 6/")
    with open(folder / "filler", "wb", buffering=0) as f:
        try:
            while f.write(bytes(1 << 16)) == 1 << 16:
                pass
        except OSError:
            pass  # it is full, as it should be
    said, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error.count("\n") == 1 and "No space left on device" in error, error
    assert error.startswith(f"train.py: {folder / 'run'}/") and "--resume" in error
    left = checkpoints(folder / "run")
    assert left and load_checkpoint(left[0])["step"] >= 4 and not list((folder / "run").glob(".*.part"))
    assert "No space left" in run(*args, "--resume", code=1)  # nor does a start into it
    assert checkpoints(folder / "run") == left
    (folder / "filler").unlink()
    assert f"resumed after step {int(left[0].stem[5:])}\n" in run(*args, "--resume")
    once(f"--corpus={corpus}", f"--out_dir={tmp_path / 'whole'}", "--keep=1")
    assert kill.differences(tmp_path / "whole", folder / "run") == []


def test_metrics_that_cannot_be_written_end_the_run(corpus, disk, capsys):
    """The disk is full to the last byte of metrics.jsonl's block, and no checkpoint is due."""
    folder = disk(8 << 20)
    args = [f"--corpus={corpus}", f"--out_dir={folder / 'run'}", "--schedule=5_CLM", "--save_every=1000"]
    process = start(*args)
    until(process, "step 1/")
    subprocess.run(["dd", "if=/dev/zero", f"of={folder / 'filler'}", "bs=4k"], stderr=subprocess.DEVNULL)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and error.count("\n") == 1 and "No space left on device" in error, error
    (folder / "filler").unlink()
    entries = (folder / "run" / "metrics.jsonl").read_text()
    once(*args, "--resume")
    assert "starts at step 0" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(entries.splitlines()) < len(steps) and sorted(set(steps)) == list(range(1, max(steps) + 1))


def test_a_folder_that_cannot_be_written_is_named(corpus, disk):
    folder = disk(8 << 20)
    once(f"--corpus={corpus}", f"--out_dir={folder / 'run'}")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    error = run(f"--corpus={corpus}", f"--out_dir={folder / 'run'}", "--resume", code=1)
    assert "Read-only file system" in error and str(folder) in error
    with pytest.raises(OSError, match="Read-only"):
        once(f"--corpus={corpus}", f"--out_dir={folder / 'new'}")
    assert all(load_checkpoint(path) for path in checkpoints(folder / "run"))


def test_a_folder_that_vanishes_ends_the_run(corpus, tmp_path):
    process = start(f"--corpus={corpus}", f"--out_dir={tmp_path / 'run'}", "--schedule=9_CLM")
    until(process, "step 3/")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and error.count("\n") == 1 and str(tmp_path / "run") in error and "No such file" in error


# ---------------------------------------------------------------------------------------------- signals, two runs


def test_a_second_run_in_the_same_folder_is_refused(corpus, tmp_path):
    args = [f"--corpus={corpus}", f"--out_dir={tmp_path}", "--schedule=40_CLM", "--save_every=3"]
    first = start(*args)
    until(first, "step 4/")
    for flags in ([], ["--resume"]):
        assert f"{tmp_path}: another train.py is at work in it" in refusal(*args, *flags)
    assert first.poll() is None  # undisturbed
    first.kill()
    first.communicate()
    assert "was trained with lr=0.003, not 0.001" in refusal(*args, "--resume", "--lr=1e-3")  # past the lock: it died, too


def test_the_second_interrupt_ends_the_run_at_once(corpus, tmp_path):
    args = [f"--corpus={corpus}", f"--out_dir={tmp_path}", "--save_every=1", "--schedule=9_CLM", "--eval_every=99",
            "--n_layer=6", "--n_embd=128", "--micro_rows=1", "--batch_rows=480"]
    process = start(*args)  # a step takes seconds: one micro-batch a row

    def wait(what):
        end = time.time() + 60
        while not what():
            assert time.time() < end
            time.sleep(0.005)

    def catches() -> int:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.M)[1]
        return int(caught, 16) >> (signal.SIGINT - 1) & 1

    until(process, "step 1/")
    wait(lambda: checkpoints(tmp_path))
    process.send_signal(signal.SIGINT)
    wait(lambda: not catches())
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and said == error == "", said + error  # no step finished, nothing saved
    path, = checkpoints(tmp_path)
    assert load_checkpoint(path)["step"] == 1
