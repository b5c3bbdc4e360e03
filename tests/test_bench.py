"""What tools/bench.py compares is the same computation: python -m pytest tests/test_bench.py"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from antlm.tokenizer import SPECIAL, START, save_tokenizer
from config import UserError
from data import OBJECTIVES, Batches
from model import BACKBONES, ModelConfig, Transformer
from tools import bench
from tools.peers import HuggingFaceLlama, PlainLTGBert, sum_and_count
from train import Settings

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_ff": 48, "n_bucket": 4, "max_position": 16}


@pytest.mark.parametrize(
    "backbone, block, head",
    [
        ("babyllama", 3 * 64 + 64 + 2 * 96 + 96, 11 * 8),  # qkv, out, gate_up, down; vocab
        ("ltg_bert", 2 * 64 + 64 + 64 + 2 * 96 + 96, 64 + 11 * 8),  # qk, v, out, ...; dense, vocab
    ],
)
def test_flops_are_six_a_weight_and_those_of_attention(backbone, block, head):
    model = Transformer(ModelConfig(backbone, 11, n_layer=2, n_head=2, n_embd=8, n_ff=12))
    products = 2 * (5 * 8) * 2  # q.k and probabilities.v, T D, a multiply and an add
    attention = 2 * 3 * products  # layers, forward and twice backward
    assert bench.flops_per_token(model, 5, 1.0) == 6 * (2 * block + head) + attention
    assert bench.flops_per_token(model, 5, 0.25) == 6 * (2 * block + head / 4) + attention


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_plain_ltg_bert_computes_the_same_loss_and_gradients(objective):
    plain = PlainLTGBert(Settings(backbone="ltg_bert", **SMALL), 50).double()
    ids = np.random.default_rng(1).integers(len(SPECIAL), 50, 400).astype(np.uint16)
    batch = Batches(ids, 50, 24, 4, seed=1).batch(objective, 0, 0, np.arange(4), 0.15)
    losses = []
    gradients = []
    for forward in (plain.forward, super(PlainLTGBert, plain).forward):
        plain.zero_grad()
        loss, count = forward(**batch.to(CPU), causal=OBJECTIVES[objective].causal)
        loss.backward()
        losses.append((loss.item(), int(count)))
        gradients.append([p.grad.clone() for p in plain.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_losses_of_a_peer_count_with_their_weights():
    losses = torch.tensor([1.0, 2.0, 4.0])
    scored = torch.tensor([1.0, 0.0, 1.0])
    weights = torch.tensor([[0.5, 9.0, 3.0]])
    assert [x.item() for x in sum_and_count(losses, scored, None)] == [5.0, 2.0]
    assert [x.item() for x in sum_and_count(losses, scored, weights)] == [12.5, 3.5]


@pytest.mark.slow  # transformers takes seconds to import
@pytest.mark.parametrize("tied", [False, True])
def test_hugging_face_llama_has_our_size_and_hides_later_tokens_in_causal_mode_only(tied):
    pytest.importorskip("transformers")
    settings = Settings(block_size=8, tied=tied, **SMALL)
    peer = HuggingFaceLlama(settings, 50).eval()
    llama = Transformer(settings.model_config(50))
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in llama.parameters())

    tokens = torch.arange(4, 12)[None]
    targets = torch.full_like(tokens, -100)
    targets[0, 0] = 5
    changed = tokens.clone()
    changed[0, -1] = 40
    for causal in (True, False):
        losses = [peer(x, targets, causal=causal)[0].item() for x in (tokens, changed)]
        assert (losses[0] == losses[1]) == causal


@pytest.mark.parametrize("peer", [False, True])
def test_a_case_answers_with_seconds_and_then_with_what_it_took(peer):
    pipe, end = multiprocessing.Pipe()
    settings = Settings(backbone="ltg_bert", block_size=16, **SMALL)
    case = bench.Case("config/ltg_bert.py", settings, "MLM", "off", peer, CPU)
    for steps in (2, 1, 0):
        pipe.send(steps)
    bench.run_case(end, case, rows=4, threads=1)
    assert pipe.recv() > 0
    assert pipe.recv() > 0
    memory, flops, parts = pipe.recv()
    assert memory > 0
    assert flops > 0
    shares = dict(parts)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["products"] > 0
    assert not {"mm", "addmm", "bmm", "baddbmm"} & {*shares}  # every one counts as a product
    assert bench.ceiling(case, rows=4) > 0


def test_the_parts_of_a_step_are_what_it_spent_its_time_on(capfd):
    """Products of large matrices, or passes over memory."""
    x = torch.randn(700, 700)
    name, share = bench.step_parts(lambda: x @ x, CPU)[0]
    assert name == "products"
    assert share > 0.5
    name, share = bench.step_parts(lambda: [x.exp() for _ in range(20)], CPU)[0]
    assert name == "exp"
    assert share > 0.5
    query = torch.randn(2, 4, 256, 32)
    shares = dict(bench.step_parts(lambda: fast_attention(query), CPU))
    assert shares["attention"] > 0.5
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "kernel, part",
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*)", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_dropout_sm80(PyTorchMemEffAttention)", "attention"),
        ("triton_red_fused__log_softmax__to_copy_exp_full_like_3", "compiled loops"),
    ],
)
def test_kernels_of_a_gpu_are_told_apart(kernel, part):
    """By their names on an H100 (torch 2.11)."""
    assert bench.part_of(kernel) == part


def fast_attention(x: torch.Tensor):
    return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize("mode", ["causal", "masked"])
def test_the_plain_way_gives_the_same_scores(mode):
    torch.manual_seed(1)
    config = ModelConfig("babyllama", 50, n_layer=2, n_head=2, n_embd=32, n_ff=48)
    model = Transformer(config).double().eval()
    rng = np.random.default_rng(1)
    texts = [np.concatenate(([START], rng.integers(4, 50, n))) for n in (3, 7, 4, 9)]
    texts.append(np.concatenate((texts[1][:5], [4, 5])))  # shares a prefix
    texts.append(np.array([START, 7, START, START, 8]))  # newlines
    expected = bench.our_scores(model, texts, mode)
    scores = bench.plain_scores(model, texts, mode, batch_rows=3)
    assert scores == pytest.approx(expected, abs=1e-4)


# ----------------------------------------------------------------------------- a backbone of a fork


# a backbone with a longest row; bench.py's own processes run this file's top, too
WITH_A_THIRD_BACKBONE = """
import sys
sys.path.insert(0, {root!r})
import model
from tools import bench
llama = model.BACKBONES["babyllama"]
model.BACKBONES["third"] = llama._replace(max_tokens=lambda config: config.max_position)
if __name__ == "__main__":
    bench.main()
"""
THIRD = ["--set", "backbone=third", "block_size=16", *(f"{key}={n}" for key, n in SMALL.items())]


def time_once(program: str | Path, config: str, *flags: str) -> list[str]:
    """Time one step of CLM beside the peer, and return the lines below the table's head."""
    once = ["--rows=2", "--rounds=1", "--steps=1", "--objectives", "CLM", "--peer"]
    done = subprocess.run(
        [sys.executable, program, config, *once, *flags],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()[2:]


@pytest.mark.slow
def test_the_ratio_is_our_speed_by_that_of_the_peer():
    sizes = [f"{name}={n}" for name, n in SMALL.items()]
    lines = time_once("tools/bench.py", "config/ltg_bert.py", "--set", "block_size=16", *sizes)
    case, parts, peer_case, peer_parts, note = lines
    speeds = []
    for line in (case, peer_case):
        speeds.append(float(re.search(r"off +([\d,]+)", line)[1].replace(",", "")))
    ratio = float(note.split()[0])
    for line in (parts, peer_parts):
        assert re.search(r"\bproducts \d+%", line)
    assert ratio == pytest.approx(speeds[0] / speeds[1], abs=0.01)


@pytest.mark.slow
def test_a_backbone_without_a_peer_is_timed_alone(tmp_path):
    program = tmp_path / "third.py"
    program.write_text(WITH_A_THIRD_BACKBONE.format(root=str(ROOT)))
    line, parts, note = time_once(program, "config/babyllama.py", *THIRD)
    assert re.match(r"babyllama CLM, compile off +[\d,]+ ", line)
    assert re.search(r"\bproducts \d+%", parts)
    assert "no peer of third is known" in note
    assert "tools/peers.py" in note


@pytest.fixture
def third_backbone(monkeypatch):
    llama = BACKBONES["babyllama"]
    longest = llama._replace(max_tokens=lambda config: config.max_position)
    monkeypatch.setitem(BACKBONES, "third", longest)


def run_bench(monkeypatch, *flags: str):
    monkeypatch.setattr("sys.argv", ["bench.py", "config/babyllama.py", *flags])
    bench.main()


@pytest.mark.parametrize("flags", [[], ["--peer"]])
def test_a_row_that_a_backbone_cannot_take_ends_in_one_line(third_backbone, monkeypatch, flags):
    with pytest.raises(UserError, match=r"17 .* 16 tokens that third can take$"):
        run_bench(monkeypatch, *flags, *THIRD, "block_size=17")


def test_scoring_is_timed_for_a_backbone_with_a_longest_row(
    third_backbone, tmp_path, monkeypatch, capsys
):
    save_tokenizer(tmp_path / "tokenizer.json", [])
    path = tmp_path / "pairs.jsonl"
    flags = ["--scoring", str(path), "--rounds=1", *THIRD, f"corpus={tmp_path}"]

    def write_pair(sentence: str):
        pair = {"sentence_good": sentence, "sentence_bad": sentence[::-1]}
        path.write_text(json.dumps(pair))

    write_pair("15 bytes: abcde")
    run_bench(monkeypatch, *flags)
    assert capsys.readouterr().out.count("times the plain way") == 2  # causal and masked
    write_pair("16 bytes: abcdef")
    with pytest.raises(UserError, match="text 0: 17 tokens, but the model takes 16"):
        run_bench(monkeypatch, *flags)
