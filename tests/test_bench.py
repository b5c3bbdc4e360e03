"""What tools/bench.py compares is the same computation. Alone: python -m pytest tests/test_bench.py"""

import multiprocessing

import numpy as np
import pytest
import torch

import eval as evaluation
from antlm.tokenizer import START
from data import Batches
from model import ModelConfig, Transformer
from tools import bench
from train import Settings


@pytest.mark.parametrize("backbone, matrices, head", [
    ("babyllama", 2 * (3 * 64 + 64 + 2 * 96 + 96), 11 * 8),  # qkv, out, gate_up, down; vocab
    ("ltg_bert", 2 * (2 * 64 + 64 + 64 + 2 * 96 + 96), 64 + 11 * 8),  # qk, v, out, up_gate, down; dense, vocab
])
def test_flops_per_token(backbone, matrices, head):
    model = Transformer(ModelConfig(backbone, vocab_size=11, n_layer=2, n_head=2, n_embd=8, n_ff=12))
    attention = 3 * 2 * 2 * (5 * 8) * 2  # forward and twice backward, multiply and add, q.k and p.v, T D, layers
    assert bench.flops_per_token(model, 5, 1.0) == 6 * (matrices + head) + attention
    assert bench.flops_per_token(model, 5, 0.25) == 6 * (matrices + head / 4) + attention


@pytest.mark.parametrize("objective", ["CLM", "MLM"])
def test_the_plain_ltg_bert_computes_the_same_loss_and_gradients(objective):
    s = Settings(backbone="ltg_bert", n_layer=2, n_head=2, n_embd=32, n_ff=48, n_bucket=4, max_position=16, dropout=0.0)
    plain = bench.PlainLTGBert(s, 50).double()
    ids = np.random.default_rng(1).integers(4, 50, 400).astype(np.uint16)
    arrays = Batches(ids, 50, 24, 4, 1, 4).batch(objective, 0, 0, np.arange(4), 0.15)
    tokens, targets, scored = (None if a is None else torch.from_numpy(a) for a in arrays)
    found = []
    for model in (plain, plain.model):
        model.zero_grad()
        loss, count = model(tokens, targets, causal=objective == "CLM", scored=scored)
        loss.backward()
        found.append((loss.item(), int(count), [p.grad.clone() for p in plain.model.parameters()]))
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-6)
    for a, b in zip(found[0][2], found[1][2]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("peer", [False, True])
def test_a_case_times_its_steps(peer):
    ours, theirs = multiprocessing.Pipe()
    for request in ((1, False), (1, True), None):
        ours.send(request)
    args = ["--backbone=ltg_bert", "--n_layer=1", "--n_head=2", "--n_embd=16", "--n_ff=16", "--block_size=16"]
    bench.worker(theirs, args, "MLM", False, peer, 4, 1, "cpu", False)
    (whole, nothing), (split, parts), (memory, flops) = (ours.recv() for _ in range(3))
    assert whole > 0 and not any(nothing.values()) and 0 < sum(parts.values()) <= split and memory > 0 and flops > 0
    assert bench.ceiling(Settings(n_embd=16, n_ff=16, block_size=16), 4, torch.device("cpu"), False) > 0


@pytest.mark.parametrize("mode", ["causal", "masked"])
def test_the_plain_way_gives_the_same_scores(mode):
    torch.manual_seed(1)
    model = Transformer(ModelConfig("babyllama", 50, n_layer=2, n_head=2, n_embd=32, n_ff=48)).double().eval()
    rng = np.random.default_rng(1)
    ids = [np.concatenate(([START], rng.integers(4, 50, n))) for n in (3, 7, 4, 9)]
    ids.append(np.concatenate((ids[1][:5], [4, 5])))  # shares a prefix
    ours = evaluation.score(model, ids, np.ones(len(ids), int), mode, [""] * len(ids))
    assert bench.plain_scores(model, ids, mode, batch=3) == pytest.approx(ours, abs=1e-4)
