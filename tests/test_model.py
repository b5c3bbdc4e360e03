"""model.py: parity with the reference LTG-BERT and with Hugging Face's Llama, masking, loss, sampling, checkpoints.

    python -m pytest tests/test_model.py                          # 10 s on a CPU; transformers is optional
    INDUCTOR=1 python -m pytest tests/test_model.py -k inductor   # 1 to 2 minutes of C++ compilation

ltg_bert_tiny.npz holds a tiny float64 model, its logits, losses and gradients as the reference implementation computes
them; llama_tiny.npz holds tiny Llamas with the logits of transformers 5.23, written by make_llama_tiny() below.
"""

import itertools
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config
import train
from antlm.checkpoint import (
    checkpoints,
    digest,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from antlm.ops import IGNORE, VocabularyLoss, dropout
from config import UserError
from model import ModelConfig, Transformer, attend, position_buckets, position_scores
from sample import generate

HERE = Path(__file__).parent
BACKBONES = ("babyllama", "ltg_bert")
both = pytest.mark.parametrize("backbone", BACKBONES)
both_modes = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def tiny(backbone: str, **changes) -> Transformer:
    """A float64 model in eval mode whose weights are large enough that every position matters to every other."""
    torch.manual_seed(6)  # from which greedy sampling does not fall into a loop at once
    sizes = dict(vocab_size=31, n_layer=2, n_head=2, n_embd=16, n_ff=24, n_bucket=4, max_position=16)
    model = Transformer(ModelConfig(backbone, **sizes | changes)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def random_tokens(*shape, seed: int = 2) -> torch.Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: Transformer, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_same(ours, theirs, tolerance: float = 1e-9):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------- parity with the reference LTG-BERT

LTG_NAMES = {  # ours: the reference's
    "embedding.tokens": "embedding.word_embedding", "embedding.relative_norm": "embedding.relative_layer_norm",
    "embedding.relative": "embedding.relative_embedding",
    "head.dense": "classifier.nonlinearity.1", "head.vocab": "classifier.nonlinearity.5",
    "qk": "attention.in_proj_qk", "v": "attention.in_proj_v", "out": "attention.out_proj",
    "out_norm": "attention.post_layer_norm", "up_gate": "mlp.mlp.1", "down": "mlp.mlp.4",
}


def ltg_name(name: str) -> str:
    if name == "embedding.relative":  # a bare parameter, all others are a module's weight or bias
        return LTG_NAMES[name]
    module, _, kind = name.rpartition(".")
    if module.startswith("blocks."):
        _, layer, module = module.split(".")
        return f"transformer.layers.{layer}.{LTG_NAMES[module]}.{kind}"
    return f"{LTG_NAMES[module]}.{kind}"


@pytest.fixture(scope="module")
def reference():
    with np.load(HERE / "ltg_bert_tiny.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture(scope="module")
def ltg(reference):
    D, n_ff, H, n_layer, V, M, b = reference["config"].tolist()
    model = Transformer(ModelConfig("ltg_bert", vocab_size=V, n_layer=n_layer, n_head=H, n_embd=D, n_ff=n_ff,
                                    n_bucket=b, max_position=M)).double().eval()
    model.load_state_dict({name: reference["param/" + ltg_name(name)] for name in model.state_dict()})
    return model


@pytest.mark.parametrize("mode", ["bidirectional", "causal", "padded"])
def test_ltg_bert_equals_the_reference(ltg, reference, mode):
    tokens, lengths = reference["input_ids"], reference["lengths"] if mode == "padded" else None
    logits = ltg(tokens, causal=mode == "causal", lengths=lengths)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())  # in float64, the model's is float32
    assert_same(logits, reference[f"{mode}/logits"])
    assert_same(loss, reference[f"{mode}/loss_next_token"])
    ltg.zero_grad()
    loss.backward()
    expected = {key.removeprefix(f"{mode}/grad/") for key in reference if key.startswith(f"{mode}/grad/")}
    assert expected == {ltg_name(name) for name, _ in ltg.named_parameters()}
    for name, p in ltg.named_parameters():
        assert_same(p.grad, reference[f"{mode}/grad/{ltg_name(name)}"])


def test_loss_equals_the_reference(ltg, reference):
    tokens = reference["input_ids"]
    loss, count = ltg(tokens, tokens.roll(-1, 1), causal=True)
    assert count.item() == tokens.numel()
    assert loss.item() / count.item() == pytest.approx(reference["causal/loss_next_token"].item(), rel=1e-6)


def test_position_buckets_equal_the_reference(reference):
    theirs = reference["param/transformer.layers.0.attention.position_indices"]  # (M, M), row of query i and key j
    M, b = reference["config"][5:].tolist()
    i, j = torch.meshgrid(torch.arange(M), torch.arange(M), indexing="ij")
    assert torch.equal(position_buckets(b, M)[i - j + M - 1], theirs)


def test_distances_beyond_max_position_share_a_bucket():
    model, tokens = tiny("ltg_bert", n_layer=1, n_bucket=8, max_position=16), random_tokens(1, 40)
    for row, query in ((tokens, -1), (tokens.flip(1), 0)):  # all keys to its left, all to its right
        logits = model(row, causal=False)[0, query]
        for a, b, same in ((36, 19, True), (15, 36, True), (36, 8, False), (1, 2, False)):  # distances from the query
            swapped, keys = row.clone(), [query - a, query - b] if query else [a, b]
            swapped[0, keys] = row[0, keys[::-1]]
            assert not torch.equal(swapped, row)
            assert torch.allclose(model(swapped, causal=False)[0, query], logits) == same


def test_ltg_bert_starts_as_published():
    torch.manual_seed(1)
    model = Transformer(ModelConfig("ltg_bert", vocab_size=300, n_layer=3, n_head=2, n_embd=40, n_ff=64))
    for name, p in model.named_parameters():
        if p.dim() == 1:  # gains of the norms are 1, biases 0
            assert (p == float(name.endswith("norm.weight"))).all(), name
            continue
        std = 0.1  # sqrt(2 / (5 * 40))
        if "up_gate" in name or "down" in name:
            std *= (2 * (1 + int(name.split(".")[1]))) ** -0.5
        assert p.abs().max() <= 2 * std, name
        assert p.std().item() == pytest.approx(0.88 * std, rel=0.06), name  # of a normal cut at 2 std


# -------------------------------------------------------------------------- parity with Hugging Face's Llama

SIZES = dict(vocab_size=11, n_layer=2, n_head=2, n_embd=8, n_ff=12)


def hugging_face(sizes: dict, T: int) -> dict[str, np.ndarray]:
    """Random weights of a LlamaForCausalLM, tokens (2, T) and its logits, with and without its head tied, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(3)
    tokens = torch.randint(sizes["vocab_size"], (2, T))
    weights, arrays = {}, {"tokens": tokens}
    for head in ("untied", "tied"):
        llama = LlamaForCausalLM(LlamaConfig(
            vocab_size=sizes["vocab_size"], hidden_size=sizes["n_embd"], intermediate_size=sizes["n_ff"],
            num_hidden_layers=sizes["n_layer"], num_attention_heads=sizes["n_head"], rms_norm_eps=1e-6,
            tie_word_embeddings=head == "tied", attn_implementation="eager")).eval()
        with torch.no_grad():
            for name, p in llama.named_parameters():
                p.copy_(weights.setdefault(name, 0.4 * torch.randn_like(p)))
            arrays[f"{head}/causal"] = llama(tokens).logits
            everything = torch.zeros(2, 1, T, T)  # added to the scores: every query sees every key
            arrays[f"{head}/bidirectional"] = llama(tokens, attention_mask=everything).logits
    return {name: array.numpy() for name, array in (arrays | weights).items()}


def make_llama_tiny():
    """Write llama_tiny.npz; in tests/: PYTHONPATH=.. python -c "import test_model; test_model.make_llama_tiny()"."""
    np.savez_compressed(HERE / "llama_tiny.npz", **hugging_face(SIZES, T=7))


def check_llama(head: str, sizes: dict, arrays: dict[str, np.ndarray]):
    theirs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    ours = {"embedding.tokens.weight": theirs["model.embed_tokens.weight"],
            "head.norm.weight": theirs["model.norm.weight"],
            "head.vocab.weight": theirs["lm_head.weight" if head == "untied" else "model.embed_tokens.weight"]}
    for i in range(sizes["n_layer"]):
        for name, parts in {"attention_norm": ["input_layernorm"], "ff_norm": ["post_attention_layernorm"],
                            "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                            "out": ["self_attn.o_proj"], "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
                            "down": ["mlp.down_proj"]}.items():
            weights = [theirs[f"model.layers.{i}.{part}.weight"] for part in parts]
            ours[f"blocks.{i}.{name}.weight"] = torch.cat(weights)
    model = Transformer(ModelConfig("babyllama", tied=head == "tied", **sizes)).eval()
    model.load_state_dict(ours)
    assert not np.allclose(arrays[f"{head}/causal"], arrays[f"{head}/bidirectional"], atol=1e-2)
    assert_same(model(theirs["tokens"], causal=True), theirs[f"{head}/causal"], 1e-5)
    assert_same(model(theirs["tokens"], causal=False), theirs[f"{head}/bidirectional"], 1e-5)


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_babyllama_equals_frozen_hugging_face(head):
    with np.load(HERE / "llama_tiny.npz") as file:
        check_llama(head, SIZES, dict(file))


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_babyllama_equals_live_hugging_face(head):
    pytest.importorskip("transformers")
    sizes = dict(vocab_size=97, n_layer=3, n_head=4, n_embd=32, n_ff=48)
    check_llama(head, sizes, hugging_face(sizes, T=40))


# ------------------------------------------------------------------------------------ sizes and operations


def llama_size(V, L, D, n_ff, matrices):
    return matrices * V * D + L * (4 * D * D + 3 * D * n_ff + 2 * D) + D


def ltg_size(V, L, D, n_ff, b=32):
    layer = 4 * (D * D + D) + 2 * D + 3 * D * n_ff
    return V * D + V + (2 * b - 1) * D + 2 * D + L * layer + D * D + D


@pytest.mark.parametrize("name, vocab_size, expected, published", [
    ("babyllama", 16000, llama_size(16000, 16, 512, 1024, matrices=2), "58.3"),
    ("babyllama_97m", 16000, llama_size(16000, 12, 768, 2048, matrices=1), "97.2"),
    ("ltg_bert", 16384, ltg_size(16384, 12, 768, 2048), "98.2"),
    ("ltg_bert_small", 16384, ltg_size(16384, 12, 384, 1024), None),
    ("gpt_bert", 16384, ltg_size(16384, 12, 384, 1024), None),
])
def test_parameters_of_the_published_sizes(name, vocab_size, expected, published):
    settings = config.load(train.Settings, [str(HERE.parent / "config" / f"{name}.py")])
    with torch.device("meta"):
        model = Transformer(settings.model_config(vocab_size))
    n = sum(p.numel() for p in model.parameters())  # a tied matrix counts once
    assert n == expected
    assert published is None or f"{n / 1e6:.1f}" == published


@pytest.mark.parametrize("name, changes", [
    ("backbone", dict(backbone="gpt2")), ("vocab_size", dict(vocab_size=0)), ("n_layer", dict(n_layer=0)),
    ("n_head", dict(n_head=-1)), ("n_head", dict(n_head=7)), ("n_embd", dict(n_embd=0)), ("n_ff", dict(n_ff=0)),
    ("n_embd", dict(n_embd=24, n_head=8)), ("dropout", dict(dropout=1.0)), ("dropout", dict(dropout=-0.1)),
    ("dropout", dict(dropout=math.nan)), ("max_position", dict(max_position=0)),
    ("n_bucket", dict(backbone="ltg_bert", n_bucket=1)),
    ("n_bucket", dict(backbone="ltg_bert", n_bucket=8, max_position=8)),
])
def test_config_rejects(name, changes):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        ModelConfig(**changes)


# -------------------------------------------------------------------------------------------------- masking


@both_modes
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("biased", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("Tq", [1, 4, 6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])  # each has a path of its own
def test_attend_is_plain_softmax_attention(causal, padded, biased, Tq, dtype, tolerance):
    torch.manual_seed(4)
    B, H, Tk, d = 2, 3, 6, 4
    rounded = [torch.randn(B, H, *shape).to(dtype) for shape in ((Tq, d), (Tk, d), (Tk, d), (Tq, Tk))]
    q, k, v, bias = (x.double().requires_grad_() for x in rounded)
    lengths = torch.tensor([6, 3]) if padded else None
    inputs = [q, k, v] + [bias] * biased
    scores = 0.3 * q @ k.mT + (bias if biased else 0)
    hidden = torch.zeros(B, 1, Tq, Tk, dtype=torch.bool)
    for b, i, j in itertools.product(range(B), range(Tq), range(Tk)):
        position = Tk - Tq + i  # of query i
        hidden[b, 0, i, j] = causal and j > position or padded and j >= lengths[b]
    expected = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
    weight = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    q, k, v, bias = leaves = [x.requires_grad_() for x in rounded]
    result = attend(q, k, v, causal=causal, lengths=lengths, bias=bias if biased else None, scale=0.3)
    assert_same(result.double(), expected, tolerance)
    for ours, theirs in zip(torch.autograd.grad((result * weight).sum(), leaves[:len(inputs)]), theirs):
        assert_same(ours.double(), theirs, tolerance)


@pytest.mark.parametrize("n, m", [(1, 1), (1, 4), (2, 2), (5, 5), (3, 7), (7, 3)])
def test_position_scores_are_the_index_loop(n, m):
    x, table = torch.randn(2, 3, n, 4, dtype=torch.float64), torch.randn(3, n + m, 4, dtype=torch.float64)
    expected = torch.empty(2, 3, n, m, dtype=torch.float64)
    for i, j in itertools.product(range(n), range(m)):
        expected[..., i, j] = (x[..., i, :] * table[:, n - 1 + j - i]).sum(-1)
    assert_same(position_scores(x, table), expected, 1e-12)


@both
def test_only_bidirectional_attention_sees_the_future(backbone):
    model, tokens = tiny(backbone), random_tokens(2, 9)
    for t in range(1, 9):
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 1) % 31
        assert_same(model(changed, causal=True)[:, :t], model(tokens, causal=True)[:, :t], 1e-12)
        difference = (model(changed, causal=False) - model(tokens, causal=False))[:, :t].abs().amax(-1)
        assert (difference > 1e-6).all()  # at every earlier position


@both
@both_modes
def test_order_matters(backbone, causal):
    model, tokens = tiny(backbone), random_tokens(1, 9)
    swapped = tokens[:, [1, 0, *range(2, 9)]]
    assert not torch.allclose(model(swapped, causal=causal)[:, -1], model(tokens, causal=causal)[:, -1])


@both
@both_modes
def test_lengths_hide_padding(backbone, causal):
    model, tokens, lengths = tiny(backbone), random_tokens(2, 10), torch.tensor([10, 6])
    logits = model(tokens, causal=causal, lengths=lengths)
    other = tokens.clone()
    other[1, 6:] = (tokens[1, 6:] + 5) % 31
    assert_same(model(other, causal=causal, lengths=lengths)[1, :6], logits[1, :6], 1e-12)
    assert_same(model(tokens[1:, :6], causal=causal)[0], logits[1, :6], 1e-12)  # as if the row stood alone
    assert_same(model(tokens[:1], causal=causal)[0], logits[0], 1e-12)


def test_causal_has_no_default():
    with pytest.raises(TypeError, match="causal"):
        tiny("babyllama")(random_tokens(1, 4))


@both
def test_one_token_rows(backbone):
    model, tokens = tiny(backbone), random_tokens(3, 6)
    first = model(tokens, causal=True)[:, :1]  # the first position sees itself alone
    assert_same(model(tokens[:, :1], causal=True), first, 1e-12)
    assert_same(model(tokens[:, :1], causal=False), first, 1e-12)


# ------------------------------------------------------------------------------------------- loss and learning


@both
def test_head_at_scored_positions_is_the_full_head_gathered(backbone):
    model, tokens = tiny(backbone), random_tokens(3, 8)
    scored = torch.tensor([[0, 7, 3], [1, 2, 6], [5, 4, 0]])
    full = model(tokens, causal=False)
    assert_same(model(tokens, causal=False, scored=scored), full.gather(1, scored[..., None].expand(-1, -1, 31)), 1e-12)
    targets = torch.full_like(tokens, IGNORE).scatter(1, scored, random_tokens(3, 3, seed=5))
    targets[1, 2] = IGNORE  # a scored position need not have a target
    loss, count = model(tokens, targets, causal=False)
    short_loss, short_count = model(tokens, targets, causal=False, scored=scored)
    assert count == short_count == 8
    assert_same(short_loss, loss, 1e-6)  # the loss itself is in float32
    for short, long in zip(gradients(model, short_loss), gradients(model, loss)):
        assert_same(short, long, 1e-6)


@both
def test_loss_is_a_sum_and_a_count(backbone):
    model, tokens, targets = tiny(backbone), random_tokens(4, 8), random_tokens(4, 8, seed=6)
    targets[torch.rand(4, 8, generator=torch.Generator().manual_seed(7)) < 0.4] = IGNORE
    loss, count = model(tokens, targets, causal=True)
    by_hand = [-model(tokens, causal=True)[b, t].log_softmax(-1)[targets[b, t]]
               for b, t in (targets != IGNORE).nonzero().tolist()]
    assert count == len(by_hand)
    assert_same(loss.double(), sum(by_hand), 1e-6)
    (loss_a, count_a), (loss_b, count_b) = (model(tokens[half], targets[half], causal=True)
                                            for half in (slice(1), slice(1, 4)))
    assert count_a + count_b == count and count_a != count_b
    parts = [a + b for a, b in zip(gradients(model, loss_a), gradients(model, loss_b))]
    assert_same(loss_a.detach() + loss_b.detach(), loss.detach(), 1e-6)
    for part, whole in zip(parts, gradients(model, loss)):
        assert_same(part, whole, 1e-5)


@both
def test_a_batch_without_targets_teaches_nothing(backbone):
    model, tokens = tiny(backbone), random_tokens(2, 8)
    loss, count = model(tokens, torch.full_like(tokens, IGNORE), causal=False)
    assert loss == 0 and count == 0
    assert all((g == 0).all() for g in gradients(model, loss))


@both
@both_modes
def test_overfits_one_batch(backbone, causal):
    torch.manual_seed(8)
    model = Transformer(ModelConfig(backbone, vocab_size=31, n_layer=2, n_head=2, n_embd=32, n_ff=48))
    tokens = random_tokens(4, 12)
    tokens[:, 0] = torch.arange(4)  # from it the rest of the row is known
    if causal:
        targets, scored = tokens.roll(-1, 1), None
        targets[:, -1] = IGNORE
    else:
        scored = torch.tensor([[2, 7], [1, 9], [11, 4], [5, 6]])
        targets = torch.full_like(tokens, IGNORE).scatter(1, scored, tokens.gather(1, scored))
        tokens = tokens.scatter(1, scored, 30)  # 30 stands for the mask
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss, count = model(tokens, targets, causal=causal, scored=scored)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / count.item())
    assert losses[0] == pytest.approx(math.log(31), abs=0.5)  # a fresh model knows nothing
    assert losses[-1] < 0.1


def test_dropout_drops_that_share_and_keeps_the_mean():
    torch.manual_seed(3)
    for p, dtype in ((0.1, torch.float32), (0.1, torch.bfloat16), (0.75, torch.float64), (0.99999, torch.float32)):
        x = torch.ones(3, 333, 1001, dtype=dtype, requires_grad=True)
        y = dropout(x, p)
        kept = y[y != 0]
        assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.002)
        assert kept.unique().numel() == 1 and kept.mean().item() == pytest.approx(1 / (1 - p), rel=0.01 if p < 0.9 else 1)
        y.sum().backward()
        assert torch.equal(x.grad, y)
        neighbours = (y[..., 1:] == 0) & (y[..., :-1] == 0)  # four elements share a random number, but no bits of it
        assert neighbours.float().mean().item() == pytest.approx(p * p, abs=0.003)
    assert torch.equal(dropout(x, 0.0), x)


def test_babyllama_starts_as_published():
    torch.manual_seed(1)
    for name, p in Transformer(ModelConfig("babyllama", 300, 3, 2, 40, 64)).named_parameters():
        assert (p == 1).all() if p.dim() == 1 else p.std().item() == pytest.approx(0.02, rel=0.06), name


ROWS, SCORES = (3, 5, 16), (3, 2, 5, 5)


@pytest.mark.parametrize("backbone, shapes", [
    ("babyllama", [SCORES, ROWS, ROWS] * 2),  # probabilities, attention's output, feed-forward's output
    ("ltg_bert", [ROWS, *[(7, 16), SCORES, ROWS, ROWS] * 2, ROWS])])  # embedding; in each layer the table before them; head
def test_where_dropout_acts(monkeypatch, backbone, shapes):
    seen = []
    monkeypatch.setattr("model.dropout", lambda x, p: (seen.append((tuple(x.shape), p)), x)[1])
    tiny(backbone, dropout=0.2).train()(random_tokens(3, 5), causal=True)
    assert seen == [(shape, 0.2) for shape in shapes]


@both
def test_dropout_acts_in_training_only(backbone):
    model, tokens = tiny(backbone, dropout=0.2), random_tokens(2, 8)
    plain = tiny(backbone)  # the same weights without dropout
    assert torch.equal(model(tokens, causal=True), plain(tokens, causal=True))
    assert torch.equal(plain.train()(tokens, causal=True), plain.eval()(tokens, causal=True))
    model.train()
    assert not torch.allclose(model(tokens, causal=True), model(tokens, causal=True))
    torch.manual_seed(9)
    first = model(tokens, causal=True)
    torch.manual_seed(9)
    assert torch.equal(model(tokens, causal=True), first)


# --------------------------------------------------------------------------------------------------- compiled


def check_compiled(backbone: str, backend: str):
    torch._dynamo.reset()
    model, tokens, targets = tiny(backbone, n_layer=1, vocab_size=64).float(), random_tokens(32, 24), random_tokens(32, 24, seed=6)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)  # fullgraph: a graph break raises
    for causal, scored in ((True, None), (False, torch.arange(20).expand(32, 20).contiguous())):  # 640 rows: two chunks
        loss, count = compiled(tokens, targets, causal=causal, scored=scored)
        ours = gradients(model, loss)
        eager_loss, eager_count = model(tokens, targets, causal=causal, scored=scored)
        assert count == eager_count
        assert_same(loss, eager_loss, 1e-4)
        for a, b in zip(ours, gradients(model, eager_loss)):
            assert_same(a, b, 1e-4)
    torch._dynamo.reset()


@both
def test_traced_is_one_graph_and_equals_eager(backbone):
    check_compiled(backbone, "aot_eager")  # what torch.compile traces, forward and backward, without the C++ compiler


@pytest.mark.skipif("INDUCTOR" not in os.environ, reason="1 to 2 minutes of C++ compilation; run with INDUCTOR=1")
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
@both
def test_inductor_equals_eager(backbone):
    check_compiled(backbone, "inductor")


# ----------------------------------------------------------------------------------------------- vocabulary loss


@pytest.mark.parametrize("rows, n", [(1, 3), (11, 100), (50, 100), (3, 1000)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_loss_in_chunks_equals_the_plain_one(rows, n, with_bias):
    """Value and all gradients, on fewer positions than a chunk, on chunks of 512, of eighths and of a row; some not scored."""
    torch.manual_seed(1)
    x, w, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((rows, n, 8), (50, 8), (50,)))
    targets = torch.randint(0, 50, (rows, n))
    targets[:, ::3] = IGNORE
    inputs = [x, w, b if with_bias else None]
    results = []
    for loss in (lambda x, w, b: VocabularyLoss.apply(x, w, b, targets, True),
                 lambda x, w, b: F.cross_entropy(F.linear(x, w, b).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")):
        leaves = [None if y is None else y.clone().requires_grad_() for y in inputs]
        value = loss(*leaves)
        (value * 0.37).backward()
        results.append([value.detach().double(), *(y.grad for y in leaves if y is not None)])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@both
def test_in_bfloat16_the_loss_is_summed_in_float32(backbone):
    model, tokens = tiny(backbone).float(), random_tokens(40, 24)
    exact, _ = model(tokens, tokens, causal=True)
    expected = torch.cat([g.flatten() for g in gradients(model, exact)])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(tokens, tokens, causal=True)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.05) and loss != exact
    assert F.cosine_similarity(torch.cat([g.flatten() for g in gradients(model, loss)]), expected, dim=0) > 0.98
    x = torch.randn(40, 24, 16)  # and the loss itself, of the same logits
    w, t = torch.randn(31, 16), tokens
    with torch.autocast("cpu", torch.bfloat16):
        loss = VocabularyLoss.apply(x, w, None, t, False)
    logits = (x.bfloat16() @ w.bfloat16().T).float()
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), t.flatten(), reduction="sum").item(), rel=1e-6)


def test_the_loss_without_gradients_is_the_same():
    model, tokens = tiny("babyllama").float(), random_tokens(2, 9)
    with_gradients, _ = model(tokens, tokens, causal=False)
    with torch.no_grad():
        assert model(tokens, tokens, causal=False)[0] == with_gradients


# --------------------------------------------------------------------------------------------------- sampling


def greedy(model: Transformer, tokens: torch.Tensor, n_new: int, block_size: int) -> list[int]:
    ids = tokens
    for _ in range(n_new):
        token = model(ids[:, -block_size:], causal=True)[:, -1:].argmax(-1)
        ids = torch.cat((ids, token), dim=1)
    return ids[0, tokens.size(1):].tolist()


@both
def test_cache_in_pieces_equals_the_whole_row(backbone):
    model, tokens = tiny(backbone), random_tokens(2, 9)
    cache = [[], []]
    parts = [model(tokens[:, a:b], causal=True, cache=cache) for a, b in ((0, 3), (3, 4), (4, 8), (8, 9))]
    assert_same(torch.cat(parts, dim=1), model(tokens, causal=True), 1e-12)


@both
@pytest.mark.parametrize("n_prompt, block_size", [(4, 64), (4, 8), (12, 8), (1, 16)])
def test_greedy_generation_equals_recomputation(backbone, n_prompt, block_size):
    model, tokens = tiny(backbone), random_tokens(1, n_prompt)
    new = generate(model, tokens, 20, block_size=block_size, temperature=0)
    assert new == greedy(model, tokens, 20, block_size)
    assert len(set(new)) > 3  # no degenerate loop
    assert generate(model, tokens, 20, block_size=block_size, top_k=1) == new


@both
def test_stop_ends_generation(backbone):
    model, tokens = tiny(backbone), random_tokens(1, 4)
    new = generate(model, tokens, 20, block_size=64, temperature=0)
    stop = next(token for token in new if token != new[0])
    assert generate(model, tokens, 20, block_size=64, temperature=0, stop=stop) == new[:new.index(stop)]


@both
def test_forbidden_tokens_never_appear(backbone):
    model, tokens = tiny(backbone), random_tokens(1, 4)
    draw = dict(block_size=64, temperature=3.0, generator=torch.Generator().manual_seed(10))
    assert {3, 7} <= set(generate(model, tokens, 200, **draw))
    assert not {3, 7} & set(generate(model, tokens, 200, forbidden=(3, 7), **draw))
    assert set(generate(model, tokens, 30, forbidden=tuple(range(30)), **draw)) == {30}


def test_generation_follows_its_generator():
    model, tokens = tiny("babyllama"), random_tokens(1, 4)
    a, b, c = (generate(model, tokens, 30, block_size=64, generator=torch.Generator().manual_seed(seed))
               for seed in (1, 1, 2))
    assert a == b != c


# ------------------------------------------------------------------------------------------------ checkpoints


def identical(a, b) -> bool:
    """Bit for bit: tensors by dtype, shape and bytes, plain data by type and repr."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return repr(a) == repr(b)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint after one optimizer step: its path, the model, the optimizer's state."""
    torch.manual_seed(11)
    model = Transformer(ModelConfig(vocab_size=7, n_layer=1, n_head=1, n_embd=4, n_ff=4, tied=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.arange(6).view(1, 6)
    model(tokens, tokens, causal=True)[0].backward()
    optimizer.step()
    path = tmp_path / "step_0000001.pt"
    save_checkpoint(path, model, step=1, settings={"lr": 1e-3, "schedule": "1_CLM", "resume": False},
                    optimizer=[optimizer.state_dict()])
    return path, model, optimizer.state_dict()


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_checkpoint_comes_back_bit_for_bit(saved):
    path, model, optimizer = saved
    content = load_checkpoint(path)
    assert identical(dict(content["model"]), dict(model.state_dict()))
    assert identical(content["optimizer"], [optimizer])
    assert content["step"] == 1 and content["settings"] == {"lr": 1e-3, "schedule": "1_CLM", "resume": False}
    again = load_model(content)
    assert again.config == model.config and not again.training
    assert again.head.vocab.weight is again.embedding.tokens.weight  # still tied
    tokens = torch.arange(6).view(1, 6)
    assert torch.equal(again(tokens, causal=False), model.eval()(tokens, causal=False))
    assert list(path.parent.iterdir()) == [path]  # nothing temporary stays behind


def test_checkpoint_is_plain_data(saved):
    path, model, _ = saved
    assert torch.load(path, weights_only=True)["config"]["n_embd"] == 4
    model.compile(backend="aot_eager")
    save_checkpoint(path, model, step=2)
    keys = load_checkpoint(path)["model"].keys()
    assert keys == Transformer(model.config).state_dict().keys()
    assert not any("_orig_mod" in key or key.startswith("module.") for key in keys)


def test_failed_save_leaves_the_old_checkpoint(saved):
    path, model, _ = saved
    with pytest.raises(Exception, match="lambda"):
        save_checkpoint(path, model, step=2, settings=lambda: 0)
    assert load_checkpoint(path)["step"] == 1
    assert list(path.parent.iterdir()) == [path]


def test_checkpoints_are_listed_newest_first(tmp_path):
    for step in (9, 1000, 20):
        (tmp_path / f"step_{step:07}.pt").touch()
    (tmp_path / ".step_0002000.pt.part").touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_0001000.pt", "step_0000020.pt", "step_0000009.pt"]


def test_truncated_checkpoint_is_refused(saved):
    path, *_ = saved
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refusal(path)


def test_flipped_bits_are_noticed(saved):
    path, *_ = saved
    whole, content = path.read_bytes(), load_checkpoint(path)
    rng = np.random.default_rng(12)
    weights = whole.index(next(iter(content["model"].values())).numpy().tobytes())
    places = [weights, weights + 7, whole.index(b"1_CLM"), whole.index(b"n_layer"), *rng.integers(len(whole), size=300)]
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            same = identical(load_checkpoint(path), content)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
        else:
            assert same, f"bit flip in byte {place} went unnoticed"
            assert place not in places[:4]
    assert refused > 30


def test_edited_scalar_is_noticed(saved):
    path, *_ = saved
    content = torch.load(path, weights_only=True)
    torch.save(content, path)
    load_checkpoint(path)  # written by other hands, but the same
    torch.save(content | {"step": 2}, path)
    assert "checksum" in refusal(path)
    del content["sha256"]
    torch.save(content, path)
    assert "checksum" in refusal(path)


@pytest.mark.parametrize("a, b", [
    (1, 2), (1, 1.0), (1, True), (1, "1"), (0.0, -0.0), (0.1, math.nextafter(0.1, 1)), (None, "None"),
    ({"a": 1}, {"b": 1}), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ([1, 2], [[1], 2]), ([12], [1, 2]), ("a", "a;"),
    (torch.zeros(4), torch.zeros(2, 2)), (torch.zeros(4), -torch.zeros(4)),
    (torch.zeros(4), torch.zeros(4, dtype=torch.int32)), (torch.zeros(4), torch.tensor([0, 0, 0, 1e-45])),
])
def test_digest_tells_apart(a, b):
    assert digest({"x": a}) == digest({"x": a}) != digest({"x": b})


def test_planted_code_does_not_run(tmp_path):
    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "step_0000001.pt"
    torch.save({"step": 1, "model": Planted()}, path)
    refusal(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # the plant was live


@pytest.mark.parametrize("content", [b"", b"lr = 1e-3\n", b"PK\x03\x04" + bytes(100)])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    refusal(path)


def test_missing_checkpoint_is_named(tmp_path):
    assert "No such file" in refusal(tmp_path / "model.pt")


@pytest.mark.parametrize("damage", [
    lambda c: c["config"].update(n_embd=8),
    lambda c: c["config"].update(n_layer=2),
    lambda c: c["config"].update(n_head=3),
    lambda c: c["config"].update(n_heads=1),
    lambda c: c["config"].update(backbone="ltg_bert"),
    lambda c: c["model"].update(extra=torch.zeros(1)),
    lambda c: c["model"].popitem(),
    lambda c: c["model"].update({"head.norm.weight": 1.0}),
    lambda c: c.pop("model"),
    lambda c: c.update(config=None),
])
def test_weights_that_contradict_the_config_are_refused(saved, damage):
    content = load_checkpoint(saved[0])
    load_model(content)
    damage(content)
    with pytest.raises(UserError) as error:
        load_model(content)
    assert "\n" not in str(error.value)
