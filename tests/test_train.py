"""The training loop as its users run it: real processes, real signals. Alone: python -m pytest tests/test_train.py"""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import once, refusal, until

import config
import data
import prepare
import schedule
import train
from antlm.checkpoint import FREE, checkpoints, digest, load_checkpoint, load_model
from antlm.optim import Lamb, make_optimizers, update
from config import UserError
from model import BACKBONES, ModelConfig, Transformer

ROOT = Path(__file__).parent.parent
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--n_ff=48", "--block_size=16", "--batch_rows=24", "--lr=3e-3",
        "--log_every=1", "--eval_rows=16", "--precision=float32"]  # in bfloat16 the order of additions shows
ANIMALS = "cat dog bird horse mouse".split()
BOTH = "--schedule=1_CLM+1_MLM+1_CLM"


def command(*args: str, processes: int = 1, torchrun: tuple = ("--standalone",)) -> list[str]:
    launcher = ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={processes}"]
    return [sys.executable, *(launcher if processes > 1 or torchrun != ("--standalone",) else []), "train.py", *args]


def start(*args: str, **launch) -> subprocess.Popen:
    return subprocess.Popen(command(*args, **launch), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def workers(torchrun: subprocess.Popen) -> list[int]:
    """Process ids of what a torchrun has started, in the order of their ranks."""
    ids = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    rank = {int(i): dict(x.split("=", 1) for x in Path(f"/proc/{i}/environ").read_text().split("\0") if "=" in x) for i in ids}
    return sorted(rank, key=lambda i: int(rank[i]["RANK"]))


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


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, dict]:
    return {e["step"]: e["loss"] for e in entries(folder) if "loss" in e}


def assert_close(one: Path, other: Path):
    """The same steps, each with the same numbers but for the order of additions."""
    a, b = ({(e["step"], "dev" in e): e for e in entries(folder)} for folder in (one, other))
    assert a.keys() == b.keys()
    for key in a:
        for name, how in dict(loss={"abs": 1e-4}, dev={"abs": 1e-3}, grad_norm={"rel": 1e-2}, lr={}, mask_rate={}, words={}).items():
            assert (name in a[key]) == (name in b[key]) and a[key].get(name, 0) == pytest.approx(b[key].get(name, 0), **how), (key, name)


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
    interrupt(steps // 3 + 1, signal.SIGINT, *args, f"--out_dir={cut}", "--resume")
    assert steps / 3 < max(losses(cut)) < 2 * steps / 3
    run(*args, f"--out_dir={cut}", "--resume")
    assert_same_checkpoint(checkpoints(whole)[0], checkpoints(cut)[0])
    assert losses(cut) == losses(whole)  # every step reported once, with the same loss


def test_two_processes_do_what_one_does(corpus, tmp_path):
    """Pure and mixed phases with accumulation, and a checkpoint of two processes goes on in one."""
    args = [*TINY, "--schedule=1_CLM+1_1CLM:5MNTP+1_MLM", f"--corpus={corpus}", "--micro_rows=5"]
    one, two = tmp_path / "one", tmp_path / "two"
    run(*args, f"--out_dir={one}")
    run(*args, f"--out_dir={two}", processes=2)
    assert_close(one, two)
    middle = checkpoints(two)[1]
    for path in checkpoints(two)[:1]:
        path.unlink()
    said = run(*args, f"--out_dir={two}", "--resume")
    assert f"resumed after step {int(middle.stem[5:])}" in said
    assert_close(one, two)


def test_one_process_goes_on_as_two_nodes(corpus, tmp_path):
    """Two torchrun on this machine meet at an address and a port, as two machines would; hybrid and pure phases."""
    args = [*TINY, "--schedule=1_CLM:MLM+1_CLM+1_MNTP", f"--corpus={corpus}", "--backbone=ltg_bert", "--n_bucket=8", "--micro_rows=5"]
    whole, folder = tmp_path / "whole", tmp_path / "cut"
    for out_dir in (whole, folder):
        once(*args, f"--out_dir={out_dir}")
    for path in checkpoints(folder)[:2]:
        path.unlink()
    for port in random.sample(range(20000, 30000), 50):  # below those that the kernel hands out
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                break
    meet = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=7", "--local_addr=127.0.0.1")
    nodes = [start(*args, f"--out_dir={folder}", "--resume", torchrun=meet) for _ in range(2)]
    said = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    printed = said[0][0] + said[1][0]
    assert "2 process(es)" in printed and f"resumed after step {int(checkpoints(whole)[2].stem[5:])}\n" in printed
    assert_close(whole, folder)


def test_killed_processes_are_started_again_by_torchrun(corpus, tmp_path):
    """One of two dies: torchrun starts both again, and they resume without being told to. The other dies: all end."""
    args = [*TINY, "--schedule=9_CLM+1_MLM", f"--corpus={corpus}", "--save_every=3", "--micro_rows=5"]
    process = start(*args, f"--out_dir={tmp_path / 'killed'}", processes=2, torchrun=("--standalone", "--max-restarts=1"))
    until(process, "step 4/")
    os.kill(workers(process)[1], signal.SIGKILL)
    until(process, f"{tmp_path / 'killed'}: started again by torchrun")
    until(process, f"run {tmp_path / 'killed'}, resumed after step ")
    until(process, "step ")
    os.kill(workers(process)[0], signal.SIGKILL)
    began = time.time()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and time.time() - began < 20
    assert "process 0: lost contact" in error and "SIGKILL" in error
    once(*args, f"--out_dir={tmp_path / 'killed'}", "--resume")
    once(*args, f"--out_dir={tmp_path / 'whole'}")
    assert_close(tmp_path / "whole", tmp_path / "killed")


def test_an_error_of_one_process_ends_all_and_is_said_once(corpus, tmp_path):
    args = [*TINY, "--schedule=9_CLM", f"--corpus={corpus}", f"--out_dir={tmp_path / 'run'}"]
    process = start(*args, processes=2)
    until(process, "step 2/")
    (tmp_path / "run").rename(tmp_path / "elsewhere")  # process 0 writes there, process 1 does not
    began = time.time()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and time.time() - began < 20
    said = re.findall("^train.py: .*", error, re.M)
    assert len(said) == 1 and "No such file" in said[0], error
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    (tmp_path / "run" / "step_0000001.pt").touch()
    error = run(*args, processes=2, code=1)
    assert len(re.findall("^train.py: .*holds a run already", error, re.M)) == 1, error


def test_accumulation_changes_no_result(corpus, tmp_path):
    settings = [*TINY, "--schedule=1_MLM", f"--corpus={corpus}"]
    for rows in (24, 5):
        once(*settings, f"--micro_rows={rows}", f"--out_dir={tmp_path / str(rows)}")
    assert_close(tmp_path / "24", tmp_path / "5")


def test_every_step_is_what_its_number_says(corpus, tmp_path):
    """Losses of a mixed step, learning rate, mask rate, clipping, moments and dev losses against plain formulas."""
    once(*TINY, "--schedule=1_1CLM:3MLM", "--micro_rows=5", "--seed=4", "--lr=1e-2", "--lr_min_ratio=0.25", "--warmup=0.3",
         "--lr_decay=linear", "--mask_start=0.4", "--mask_end=0.2", "--clip=0.5", "--save_every=1", "--keep=99",
         f"--corpus={corpus}", f"--out_dir={tmp_path}")
    c = data.Corpus(corpus)
    torch.manual_seed(4)
    model = Transformer(ModelConfig("babyllama", c.vocab_size, 2, 2, 32, 48))

    def mean(model: Transformer, batches: data.Batches, objective: str, rows: np.ndarray, rate: float):
        tokens, targets = map(torch.from_numpy, batches.batch(objective, 0, 0, rows, rate)[:2])
        return F.cross_entropy(model(tokens, causal=objective == "CLM").flatten(0, 1), targets.flatten())

    batches = data.Batches(c.train, c.vocab_size, 16, 24, 4, math.ceil(0.4 * 16))
    means = {o: mean(model, batches, o, rows, 0.4) for o, rows in (("CLM", np.arange(6)), ("MLM", np.arange(6, 24)))}
    (0.25 * means["CLM"] + 0.75 * means["MLM"]).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    steps = [e for e in entries(tmp_path) if "loss" in e]
    assert norm > 0.5 and steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert steps[0]["loss"] == pytest.approx({o: x.item() for o, x in means.items()}, rel=1e-4)
    n, warmup = len(steps), round(0.3 * len(steps))
    for i, e in enumerate(steps):
        lr = 1e-2 * ((i + 1) / warmup if i < warmup else 0.25 + 0.75 * (1 - (i - warmup) / (n - 1 - warmup)))
        content = load_checkpoint(tmp_path / f"step_{i + 1:07}.pt")
        assert e["lr"] == pytest.approx(lr) == content["optimizer"][0]["param_groups"][0]["lr"]
        assert e["mask_rate"] == pytest.approx(0.4 - 0.2 * i / (n - 1))
        if i == 0:  # (1 - beta1) times the clipped gradient
            first = sum(s["exp_avg"].square().sum().item() for s in content["optimizer"][0]["state"].values()) ** 0.5
            assert first == pytest.approx(0.1 * 0.5, rel=1e-3)
    model, dev = load_model(content), data.Batches(c.dev, c.vocab_size, 16, 16, 0, math.ceil(0.15 * 16))
    with torch.no_grad():
        for objective, loss in entries(tmp_path)[-1]["dev"].items():
            assert loss == pytest.approx(mean(model, dev, objective, np.arange(min(16, dev.n_rows)), 0.15).item(), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_a_step_is_as_long_as_the_learning_rate_says(optimizer):
    moved = []
    for lr in (1e-3, 2e-3):
        torch.manual_seed(0)
        model = Transformer(ModelConfig("babyllama", 60, 1, 2, 16, 24))
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        update(make_optimizers(model, train.Settings(optimizer=optimizer), torch.device("cpu")), lr, torch.tensor(1.0))
        moved.append([p.detach() - old for p, old in zip(model.parameters(), before)])
    for once_, twice in zip(*moved):
        assert once_.any()
        torch.testing.assert_close(2 * once_, twice, rtol=1e-3, atol=1e-6)


def test_an_unfused_state_goes_on_in_a_fused_optimizer():
    """As from a Mac's GPU to a CPU."""
    model = Transformer(ModelConfig("babyllama", 60, 1, 2, 16, 24))
    for device in ("mps", "cpu"):
        optimizer, = optimizers = make_optimizers(model, train.Settings(), torch.device(device))
        if device == "cpu":
            optimizer.load_state_dict(state)
        before = model.head.vocab.weight.detach().clone()
        for wrong in (float("nan"), 1.0):
            for p in model.parameters():
                p.grad = torch.full_like(p, wrong)
            update(optimizers, 1e-3, torch.tensor(wrong))
            assert torch.equal(model.head.vocab.weight, before) == (wrong != 1.0)
        state = optimizer.state_dict()


def test_dropout_differs_from_step_to_step_and_between_micro_batches(corpus, tmp_path, monkeypatch):
    seeds, real = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), real(seed))[1])
    once(*TINY, "--dropout=0.1", "--schedule=1_CLM:MLM", "--micro_rows=5", f"--corpus={corpus}", f"--out_dir={tmp_path}")
    assert len(set(seeds)) == len(seeds) > 50


def test_a_missing_corpus_is_made_and_the_end_is_scored(corpus, tmp_path, monkeypatch):
    """Which commands are called, in what order, and what a failing one says; test_grammar runs the real ones."""
    asked, codes, folder = [], {"make.py": 1}, tmp_path / "run"

    def call(command, *args, **kwargs):
        asked.append([str(x) for x in command[1:]])
        if command[1] == "make.py" and not codes.get("make.py"):
            shutil.copytree(corpus, tmp_path / "new")
        return subprocess.CompletedProcess(command, codes.get(command[1], 0))

    monkeypatch.setattr(subprocess, "run", call)
    args = [*TINY, "--schedule=1_CLM", f"--corpus={tmp_path / 'new'}", f"--out_dir={folder}", "--prepare=make.py 'a b',more.py", "--score=pairs"]
    with pytest.raises(UserError, match="was missing, and the command"):
        once(*args)
    codes.clear()
    asked.clear()
    once(*args)
    assert asked == [["make.py", "a b"], ["more.py"], ["eval.py", str(folder), "--task", "pairs"],
                     ["eval.py", str(folder), "--sample", "", "--n", "5"]]
    asked.clear()
    codes["eval.py"] = 1
    assert "trained and saved, but" in refusal(*args, "--resume") and asked[0][0] == "eval.py"  # not prepared again
    codes.clear()
    asked.clear()
    monkeypatch.chdir(tmp_path)  # a run may start in any folder
    once(*args, "--resume")
    assert Path(asked[0][0]).resolve() == ROOT.resolve() / "eval.py"


OTHER = dict(  # settings that another run has; all others are free
    backbone="ltg_bert", n_layer=1, n_head=1, n_embd=16, n_ff=24, tied="true", dropout=0.1, n_bucket=8, max_position=256,
    schedule="1_MLM", block_size=8, batch_rows=12, mask_start=0.2, mask_end=0.2, mask_span=2, seed=2, optimizer="lamb", lr=1e-3,
    lr_min_ratio=0.2, lr_decay="linear", warmup=0.1, beta1=0.8, beta2=0.9, eps=1e-7, weight_decay=0, clip=0)


def test_a_run_goes_on_with_its_own_settings_and_text_alone(corpus, tmp_path):
    args = [*TINY, "--schedule=1_CLM", f"--corpus={corpus}", f"--out_dir={tmp_path / 'run'}"]
    once(*args)
    assert OTHER.keys() | FREE == {field.name for field in dataclasses.fields(train.Settings)}
    for name, value in OTHER.items():
        assert f"with {name}=" in refusal(*args, "--resume", f"--{name}={value}")
    text = Path(corpus).parent
    prepare.prepare([str(text / "text.dev")], [str(text / "text.train")], str(tmp_path / "other"), tokenizer=f"{corpus}/tokenizer.json")
    assert "another corpus" in refusal(*args, "--resume", f"--corpus={tmp_path / 'other'}")


def test_a_mistake_in_the_code_is_not_blamed_on_a_checkpoint(corpus, tmp_path, monkeypatch):
    def mistaken(self, config, embedding):
        raise AttributeError("no such thing")

    monkeypatch.setattr(BACKBONES["babyllama"][2], "__init__", mistaken)
    with pytest.raises(AttributeError, match="no such thing"):
        once(*TINY, f"--corpus={corpus}", f"--out_dir={tmp_path}")


def test_it_learns_and_the_folder_says_how(corpus, tmp_path):
    folder = tmp_path / "run"
    said = run(*TINY, "--schedule=3_CLM+3_MLM", f"--corpus={corpus}", f"--out_dir={folder}", "--lr=1e-2", "--log_every=10")
    assert re.search(r"step 10/\d+  epoch 0\.\d+/6  3_CLM  CLM \d\.\d+  lr \S+  [\d,]+ tokens/s  \d+:\d\d left", said)
    dev = [e["dev"] for e in entries(folder) if "dev" in e]
    assert len(dev) == 6 and all(d.keys() == {"CLM", "MLM"} for d in dev)
    assert dev[2]["CLM"] < dev[0]["CLM"] and dev[5]["MLM"] < dev[2]["MLM"]
    assert entries(folder)[-1]["words"] == 6 * json.loads((Path(corpus) / "meta.json").read_text())["train"]["words"]
    assert (folder / "source" / "train.py").read_text() == (ROOT / "train.py").read_text()
    assert json.loads((folder / "settings.json").read_text())["lr"] == 1e-2
    assert (folder / "tokenizer.json").exists()
    assert len(checkpoints(folder)) == 2  # one a phase end


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_optimizers_learn(corpus, tmp_path, optimizer):
    once(*TINY, "--schedule=4_CLM", f"--corpus={corpus}", f"--out_dir={tmp_path}", f"--optimizer={optimizer}", "--lr=1e-2")
    seen = [loss["CLM"] for loss in losses(tmp_path).values()]
    assert sum(seen[-5:]) < 0.9 * sum(seen[:5])


def test_lamb_is_the_published_update():
    torch.manual_seed(0)
    w, b = torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(4))
    expected = {p: p.detach().double().clone() for p in (w, b)}
    m, v = {w: 0, b: 0}, {w: 0, b: 0}
    lamb = Lamb([dict(params=[w], weight_decay=0.1), dict(params=[b], weight_decay=0.0)], lr=0.02, betas=(0.9, 0.98), eps=1e-6)
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
    decay = {id(p): g["weight_decay"] for o in make_optimizers(model, s, torch.device("cpu")) for g in o.param_groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert decay.keys() == {id(p) for p in named.values()}  # each parameter is trained, by one optimizer
    for name, p in named.items():
        plain = p.dim() == 1 or name in ("embedding.tokens.weight", "embedding.relative")
        assert decay[id(p)] == (0.0 if plain else s.weight_decay), name


def test_bad_starts_end_in_one_line(corpus, tmp_path):
    args = [*TINY, "--schedule=1_CLM", f"--corpus={corpus}", f"--out_dir={tmp_path / 'run'}"]
    once(*args)
    newest = checkpoints(tmp_path / "run")[0]
    for extra, expected in (
            ([], ["--resume", str(tmp_path / "run")]),
            (["--resume", "--lr=1e-3"], ["lr=", newest.name]),
            (["--resume", "--schedule=2_CLM"], ["schedule", newest.name])):
        error = refusal(*args, *extra)
        assert "\n" not in error and all(word in error for word in expected), error
    for extra, expected in ((["--corpus=nowhere"], ["nowhere", "prepare.py"]), (["--block_size=100000"], ["100000", "block_size"])):
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


# ------------------------------------------------------------------------------------------- numbers that go wrong


@pytest.mark.parametrize("optimizer, device", [("adamw", "cpu"), ("adamw", "mps"), ("lamb", "cpu"), ("muon", "cpu"), ("muon", "mps")])
def test_a_gradient_that_is_not_finite_changes_no_weight(optimizer, device):
    """A bad first step, too; fused AdamW and the steps after it do not even notice that it was there."""
    def updates(bad: tuple) -> list:
        torch.manual_seed(0)
        model = Transformer(ModelConfig("ltg_bert", 300, 1, 2, 32, 48, n_bucket=8))
        optimizers = make_optimizers(model, train.Settings(optimizer=optimizer), torch.device(device))  # mps: not fused
        seen = [[p.detach().clone() for p in model.parameters()]]
        for good in range(3):
            for wrong in bad:
                for p in model.parameters():
                    p.grad = torch.full_like(p, wrong)
                update(optimizers, 0.1, torch.tensor(wrong))
                torch.testing.assert_close([p.detach() for p in model.parameters()], seen[-1], rtol=0, atol=0)
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * good + i))
            update(optimizers, 0.1, torch.tensor(1.0))
            seen.append([p.detach().clone() for p in model.parameters()])
            assert all(p.isfinite().all() for p in seen[-1]) and not any(torch.equal(a, b) for a, b in zip(seen[-2], seen[-1]))
        return seen

    with_bad, without = updates((float("nan"), float("inf"))), updates(())
    if (optimizer, device) == ("adamw", "cpu"):
        torch.testing.assert_close(with_bad, without, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: where the device decides, nothing may wait for it")
@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_an_update_does_not_wait_for_the_gpu(optimizer):
    model = Transformer(ModelConfig("ltg_bert", 300, 1, 2, 32, 48, n_bucket=8)).cuda()
    optimizers = make_optimizers(model, train.Settings(optimizer=optimizer), torch.device("cuda"))
    start = [p.detach().clone() for p in model.parameters()]
    for value in (float("nan"), 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        norm = torch.tensor(value, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            update(optimizers, 0.1, norm)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), start)]
        assert all(changed) if value == 1.0 else not any(changed)


def test_steps_that_are_not_finite_are_skipped_counted_and_remembered(corpus, tmp_path):
    """Step 1 throws the weights far off, every step after it overflows: all are skipped, so step 1's weights stay."""
    args = [*TINY, "--schedule=1_CLM+1_MLM", f"--corpus={corpus}", f"--out_dir={tmp_path}", "--lr=1e30", "--clip=0",
            "--save_every=1", "--keep=9", "--micro_rows=10", "--warmup=0"]
    error = refusal(*args)
    assert "step 2: gradient norm" in error and "not finite" in error and "--skip_nonfinite" in error
    assert [load_checkpoint(path)["step"] for path in checkpoints(tmp_path)] == [1]
    one = load_checkpoint(checkpoints(tmp_path)[0])

    for allowed, log_every in ((2, 1), (5, 50)):  # the host looks late, the weights are safe all the same
        error = refusal(*args, "--resume", f"--skip_nonfinite={allowed}", f"--log_every={log_every}")
        assert f"step {allowed + 2}: gradient norm" in error and "\n" not in error
        newest = load_checkpoint(checkpoints(tmp_path)[0])
        assert (newest["step"], newest["skipped"]) == (allowed + 1, allowed)
        torch.testing.assert_close(newest["model"], one["model"], rtol=0, atol=0)
        torch.testing.assert_close(newest["optimizer"][0]["state"], one["optimizer"][0]["state"], rtol=0, atol=0)
    entries = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(e["step"], e["skipped"]) for e in entries[:3]] == [(1, 0), (2, 1), (3, 2)]
    assert entries[1]["grad_norm"] is None and entries[1]["loss"] == {}


def test_the_rows_of_a_loss_that_is_not_finite_are_named(tmp_path):
    """An infinite loss whose gradient would be finite: the letter z, in one line of the text, cannot be predicted."""
    lines = [f"The {a} sees the {b} that the {c} hears." for a in ANIMALS for b in ANIMALS for c in ANIMALS]
    (tmp_path / "text.train").write_text("\n".join([*lines, "The zebra sees the cat.", *lines]))
    (tmp_path / "text.dev").write_text("\n".join(lines))
    prepare.prepare([str(tmp_path / "text.train")], [str(tmp_path / "text.dev")], str(tmp_path / "corpus"), 280)
    corpus = data.Corpus(str(tmp_path / "corpus"))
    z, = corpus.tokenizer.encode("z")
    args = [*TINY, "--schedule=2_CLM", f"--corpus={corpus.folder}", f"--out_dir={tmp_path / 'run'}", "--backbone=ltg_bert",
            "--n_bucket=8", "--micro_rows=1", "--eval_rows=8"]
    once(*args, "--save_every=1", "--keep=999")
    for path in checkpoints(tmp_path / "run")[:-1]:
        path.unlink()
    path, = checkpoints(tmp_path / "run")
    content = load_checkpoint(path)
    content["model"]["head.vocab.bias"][z] = -float("inf")
    torch.save(content | {"sha256": digest(content)}, path)

    batches = data.Batches(corpus.train, corpus.vocab_size, 16, 24, 1, 3)
    expected = []
    for step in range(1, 2 * batches.steps_per_epoch):
        targets = batches.batch("CLM", *divmod(step, batches.steps_per_epoch), np.arange(24), 0)[1]
        if rows := sorted({int(row) for row, _ in np.argwhere(targets == z)}):
            expected.append((step + 1, rows))
    assert expected
    assert f"step {expected[0][0]}: " in refusal(*args, "--resume")
    said = run(*args, "--resume", "--skip_nonfinite=9", processes=2)
    found = [(int(step), [int(row) for row in re.findall(r"CLM rows (\d+) to \1", rows)])
             for step, rows in re.findall(r"^step (\d+): gradient norm \w+ is not finite, nor the loss of (.*); skipped$", said, re.M)]
    assert found == expected
    assert f"skipped {len(expected)}  lr" in said
    end = load_checkpoint(checkpoints(tmp_path / "run")[0])
    assert end["skipped"] == len(expected)
    assert all(w.isfinite().all() for name, w in end["model"].items() if name != "head.vocab.bias")


# --------------------------------------------------------------------------------------------------- BabyLM rules


def test_babylm_rules(corpus, tmp_path, monkeypatch):
    """A checkpoint of the first step that reaches each mark stays; words are seen words, with repetition."""
    monkeypatch.setattr(schedule, "WORD_MARKS", [1000, 2500, 6000])
    once(*TINY, f"--corpus={corpus}", f"--out_dir={tmp_path}", "--schedule=2_MLM", "--save_every=1", "--keep=1", "--babylm_rules")
    seen = {e["step"]: e["words"] for e in entries(tmp_path)}
    kept = {c["step"]: c["words"] for c in map(load_checkpoint, checkpoints(tmp_path))}
    words = json.loads((Path(corpus) / "meta.json").read_text())["train"]["words"]
    assert max(seen.values()) == 2 * words > 2500
    first = [min(step for step in seen if seen[step] >= mark) for mark in (1000, 2500)]
    assert kept == {step: seen[step] for step in (*first, max(seen))}
    with pytest.raises(UserError, match="schedule = '4_CLM.16_MLM.4_CLM' has more than the 10 epochs"):
        config.load(train.Settings, ["config/babyllama.py", "--babylm_rules"])
    assert config.load(train.Settings, ["--schedule=2_CLM+6_MLM+2_CLM", "--babylm_rules"]).babylm_rules


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux what the processor can do")
def test_bfloat16_is_chosen_where_the_processor_has_instructions_for_it(corpus, tmp_path, capsys):
    flags = set(re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    once(f"--corpus={corpus}", f"--out_dir={tmp_path}", *TINY, "--precision=auto", "--device=cpu", "--schedule=1_CLM")
    chosen = re.search(r"precision (\S+)", capsys.readouterr().out)[1]
    assert chosen == ("bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32")
