"""The training loop as its users run it: real processes, real signals. Alone: python -m pytest tests/test_train.py"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config
import train
from model import ModelConfig, Transformer, checkpoints, load_checkpoint

ROOT = Path(__file__).parent.parent
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--n_ff=48", "--block_size=16", "--batch_rows=24", "--lr=3e-3",
        "--log_every=1", "--eval_rows=16"]
BOTH = "--schedule=1_CLM+1_MLM+1_CLM"


def command(*args: str, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, "train.py", *args]


def run(*args: str, processes: int = 1, code: int = 0) -> str:
    """Run train.py to its end -> what it printed, or its error lines where code is not 0."""
    done = subprocess.run(command(*args, processes=processes), cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def interrupt(after_step: int, number: int, *args: str) -> str:
    """Start train.py, send the signal once it has reported a step -> what it printed."""
    process = subprocess.Popen(command(*args), cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"step {after_step}/"):
            process.send_signal(number)
            break
    lines += process.stdout
    assert process.wait() == 128 + number
    return "".join(lines)


def assert_same_checkpoint(a: Path, b: Path):
    """Weights, optimizer and step, bit for bit."""
    a, b = load_checkpoint(a), load_checkpoint(b)
    assert a["step"] == b["step"]
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"], b["optimizer"], rtol=0, atol=0)


def losses(folder: Path) -> dict[int, dict]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {e["step"]: e["loss"] for e in entries if "loss" in e}


@pytest.mark.parametrize("backbone, extra", [("babyllama", []), ("ltg_bert", ["--dropout=0.1", "--optimizer=lamb", "--n_bucket=8"])])
def test_signal_and_resume_across_a_phase_switch_are_bit_exact(corpus, tmp_path, backbone, extra):
    """SIGTERM in the first phase, SIGINT in the second, dropout and accumulation on; the quick start's own schedule shape."""
    args = ["config/quickstart.py", *TINY, BOTH, f"--corpus={corpus}", "--score=", f"--backbone={backbone}", "--micro_rows=7", *extra]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(*args, f"--out_dir={whole}")
    steps = max(losses(whole))
    said = interrupt(5, signal.SIGTERM, *args, f"--out_dir={cut}")
    assert "--resume" in said
    first = max(losses(cut))
    assert 5 <= first < steps / 3
    interrupt(steps // 2, signal.SIGINT, *args, f"--out_dir={cut}", "--resume")
    run(*args, f"--out_dir={cut}", "--resume")
    assert_same_checkpoint(checkpoints(whole)[0], checkpoints(cut)[0])
    assert losses(cut) == losses(whole)  # every step reported once, with the same loss


def test_two_processes_do_what_one_does(corpus, tmp_path):
    """Pure and mixed phases with accumulation, and a checkpoint of two processes goes on in one."""
    args = [*TINY, "--schedule=1_CLM+1_1CLM:5MNTP+1_MLM", f"--corpus={corpus}", "--micro_rows=5", "--clip=0.5"]
    one, two = tmp_path / "one", tmp_path / "two"
    run(*args, f"--out_dir={one}")
    run(*args, f"--out_dir={two}", processes=2)
    a, b = losses(one), losses(two)
    assert a.keys() == b.keys()
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=1e-4), step
    middle = checkpoints(two)[1]
    for path in checkpoints(two)[:1]:
        path.unlink()
    said = run(*args, f"--out_dir={two}", "--resume")
    assert f"resumed after step {int(middle.stem[5:])}" in said
    assert losses(two)[max(a)] == pytest.approx(a[max(a)], abs=1e-4)


def test_accumulation_changes_no_result(corpus, tmp_path):
    settings = [*TINY, "--schedule=1_MLM", f"--corpus={corpus}"]
    for rows in (24, 5):
        train.train(config.load(train.Settings, [*settings, f"--micro_rows={rows}", f"--out_dir={tmp_path / str(rows)}"]))
    a, b = losses(tmp_path / "24"), losses(tmp_path / "5")
    assert all(a[step] == pytest.approx(b[step], abs=1e-4) for step in a)


def test_it_learns_and_the_folder_says_how(corpus, tmp_path):
    folder = tmp_path / "run"
    said = run(*TINY, "--schedule=3_CLM+3_MLM", f"--corpus={corpus}", f"--out_dir={folder}", "--lr=1e-2", "--log_every=10")
    assert re.search(r"step 10/\d+  epoch 0\.\d+/6  3_CLM  CLM \d\.\d+  lr \S+  [\d,]+ tokens/s  \d+:\d\d left", said)
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    dev = [e["dev"] for e in entries if "dev" in e]
    assert len(dev) == 6 and all(d.keys() == {"CLM", "MLM"} for d in dev)
    assert dev[2]["CLM"] < dev[0]["CLM"] and dev[5]["MLM"] < dev[2]["MLM"]
    assert entries[-1]["words"] == 6 * json.loads((Path(corpus) / "meta.json").read_text())["train"]["words"]
    assert (folder / "source" / "train.py").read_text() == (ROOT / "train.py").read_text()
    assert json.loads((folder / "settings.json").read_text())["lr"] == 1e-2
    assert (folder / "tokenizer.json").exists()
    assert len(checkpoints(folder)) == 2  # one a phase end


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_optimizers_learn(corpus, tmp_path, optimizer):
    train.train(config.load(train.Settings, [*TINY, "--schedule=4_CLM", f"--corpus={corpus}", f"--out_dir={tmp_path}", f"--optimizer={optimizer}", "--lr=1e-2"]))
    seen = [loss["CLM"] for loss in losses(tmp_path).values()]
    assert sum(seen[-5:]) < 0.9 * sum(seen[:5])


def test_lamb_is_the_published_update():
    torch.manual_seed(0)
    w, b = torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(4))
    expected = {p: p.detach().double().clone() for p in (w, b)}
    m, v = {w: 0, b: 0}, {w: 0, b: 0}
    lamb = train.Lamb([dict(params=[w], weight_decay=0.1), dict(params=[b], weight_decay=0.0)], lr=0.02, betas=(0.9, 0.98), eps=1e-6)
    for t in range(1, 6):
        for p, decay in ((w, 0.1), (b, 0.0)):
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            m[p], v[p] = 0.9 * m[p] + 0.1 * g, 0.98 * v[p] + 0.02 * g * g
            update = m[p] / (1 - 0.9 ** t) / ((v[p] / (1 - 0.98 ** t)).sqrt() + 1e-6) + decay * expected[p]
            ratio = expected[p].norm() / update.norm() if decay else 1.0
            expected[p] = expected[p] - 0.02 * ratio * update
        lamb.step()
    for p in (w, b):
        torch.testing.assert_close(p.detach().double(), expected[p], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_embeddings_biases_and_norms_do_not_decay(optimizer):
    model = Transformer(ModelConfig("ltg_bert", 300, 2, 2, 32, 48, n_bucket=8))
    s = train.Settings(optimizer=optimizer)
    decay = {id(p): g["weight_decay"] for o in train.make_optimizers(model, s, torch.device("cpu")) for g in o.param_groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert decay.keys() == {id(p) for p in named.values()}  # each parameter is trained, by one optimizer
    for name, p in named.items():
        plain = p.dim() == 1 or name in ("embedding.tokens.weight", "embedding.relative")
        assert decay[id(p)] == (0.0 if plain else s.weight_decay), name


def test_bad_starts_end_in_one_line(corpus, tmp_path):
    args = [*TINY, "--schedule=1_CLM", f"--corpus={corpus}", f"--out_dir={tmp_path / 'run'}"]
    run(*args)
    newest = checkpoints(tmp_path / "run")[0]
    for extra, expected in (
            ([], ["--resume", str(tmp_path / "run")]),
            (["--resume", "--lr=1e-3"], ["lr=", newest.name]),
            (["--resume", "--schedule=2_CLM"], ["schedule", newest.name]),
            (["--corpus=nowhere"], ["nowhere", "data.py"]),
            (["--block_size=100000"], ["100000", "block_size"])):
        error = run(*args, *extra, code=1)
        assert error.count("\n") == 1 and error.startswith("train.py: ") and all(word in error for word in expected), error


def test_a_damaged_checkpoint_is_named_and_skipped(corpus, tmp_path):
    args = [*TINY, "--schedule=1_CLM+1_MLM", f"--corpus={corpus}", f"--out_dir={tmp_path}"]
    whole = run(*args)
    newest, before = checkpoints(tmp_path)
    reference = load_checkpoint(newest)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    said = run(*args, "--resume")
    assert f"skipped {newest}" in said and f"resumed after step {int(before.stem[5:])}" in said and "skipped" not in whole
    torch.testing.assert_close(load_checkpoint(newest)["model"], reference["model"], rtol=0, atol=0)
    for path in checkpoints(tmp_path):
        path.write_bytes(path.read_bytes()[:1000])
    error = run(*args, "--resume", code=1)
    assert error.count("\n") == 1 and "whole" in error


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(corpus, tmp_path):
    error = run(*TINY, "--schedule=1_CLM", f"--corpus={corpus}", f"--out_dir={tmp_path}", "--lr=1e30", "--clip=0", "--save_every=1", code=1)
    assert "not finite" in error and error.count("\n") == 1
    assert all(torch.isfinite(w).all() for path in checkpoints(tmp_path) for w in load_checkpoint(path)["model"].values())
