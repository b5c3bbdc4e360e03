"""The model: parity with the reference LTG-BERT and Hugging Face's Llama, masks, loss, dropout.

python -m pytest tests/test_model.py                          # transformers is optional
INDUCTOR=1 python -m pytest tests/test_model.py -k inductor   # 1 to 2 minutes of C++ compilation

ltg_bert_tiny.npz holds a tiny float64 model, and the logits, losses and gradients that the
reference implementation computes from it. llama_tiny.npz holds tiny Llamas with the logits of
transformers 5.23, written by make_llama_tiny().
"""

import copy
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import config
import train
from antlm import IGNORE, ops
from antlm.compiling import compile_in_place
from config import UserError
from model import BACKBONES, ModelConfig, Transformer, build_mask, position_buckets

HERE = Path(__file__).parent
VOCAB = 31
SIZES = dict(vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=16, n_ff=24, n_bucket=4, max_position=16)

each_backbone = pytest.mark.parametrize("backbone", BACKBONES)
both_modes = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def tiny(backbone: str, **changes) -> Transformer:
    """A float64 model in evaluation mode.

    Its weights are so large that every position matters to every other.
    """
    torch.manual_seed(6)
    model = Transformer(ModelConfig(backbone, **SIZES | changes)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def random_tokens(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: Transformer, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_close(actual, expected, tolerance: float = 1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------- parity with the reference LTG-BERT

REFERENCE_NAMES = {  # of this project's modules in the reference
    "embedding.tokens": "embedding.word_embedding",
    "embedding.relative_norm": "embedding.relative_layer_norm",
    "embedding.relative": "embedding.relative_embedding",
    "head.dense": "classifier.nonlinearity.1",
    "head.vocab": "classifier.nonlinearity.5",
    "qk": "attention.in_proj_qk",
    "v": "attention.in_proj_v",
    "out": "attention.out_proj",
    "out_norm": "attention.post_layer_norm",
    "up_gate": "mlp.mlp.1",
    "down": "mlp.mlp.4",
}


def reference_name(name: str) -> str:
    """The reference's name of one of this project's parameters."""
    if name == "embedding.relative":  # a bare parameter; all others are weight or bias of a module
        return REFERENCE_NAMES[name]
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        return f"{REFERENCE_NAMES[module]}.{kind}"
    _, layer, part = module.split(".")
    return f"transformer.layers.{layer}.{REFERENCE_NAMES[part]}.{kind}"


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    with np.load(HERE / "ltg_bert_tiny.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture(scope="module")
def ltg(reference) -> Transformer:
    """A model with the reference's weights."""
    n_embd, n_ff, n_head, n_layer, vocab_size, max_position, n_bucket = reference["config"].tolist()
    model = Transformer(
        ModelConfig(
            "ltg_bert",
            vocab_size=vocab_size,
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            n_ff=n_ff,
            n_bucket=n_bucket,
            max_position=max_position,
        )
    ).double()
    names = model.state_dict().keys()
    model.load_state_dict({name: reference[f"param/{reference_name(name)}"] for name in names})
    return model.eval()


@pytest.mark.parametrize("mode", ["bidirectional", "causal", "padded"])
def test_ltg_bert_has_the_logits_and_gradients_of_the_reference(ltg, reference, mode):
    tokens = reference["input_ids"]
    lengths = reference["lengths"] if mode == "padded" else None
    logits = ltg(tokens, causal=mode == "causal", lengths=lengths)
    assert_close(logits, reference[f"{mode}/logits"], 1e-14)

    loss = F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert_close(loss, reference[f"{mode}/loss_next_token"])

    ltg.zero_grad()
    loss.backward()
    for name, p in ltg.named_parameters():
        assert_close(p.grad, reference[f"{mode}/grad/{reference_name(name)}"])


def test_ltg_bert_has_every_parameter_of_the_reference(ltg, reference):
    prefix = "causal/grad/"
    expected = {key.removeprefix(prefix) for key in reference if key.startswith(prefix)}
    assert {reference_name(name) for name, _ in ltg.named_parameters()} == expected


def test_ltg_bert_has_the_loss_of_the_reference(ltg, reference):
    tokens = reference["input_ids"]
    loss, count = ltg(tokens, tokens.roll(-1, 1), causal=True)
    assert count == tokens.numel()
    assert_close(loss / count, reference["causal/loss_next_token"])


def test_position_buckets_are_those_of_the_reference(reference):
    max_position, n_bucket = reference["config"][5:].tolist()
    i = torch.arange(max_position)[:, None]  # queries
    j = torch.arange(max_position)  # keys
    buckets = position_buckets(n_bucket, max_position)[i - j + max_position - 1]
    expected = reference["param/transformer.layers.0.attention.position_indices"]
    assert torch.equal(buckets, expected)


@pytest.mark.parametrize("query", ["first", "last"])
def test_ltg_bert_tells_distances_apart_up_to_max_position(query):
    """Two keys swap places: the query notices where their distances lie in different buckets."""
    model = tiny("ltg_bert", n_layer=1, n_bucket=8, max_position=16)
    tokens = random_tokens(1, 40)
    at = 0 if query == "first" else 39
    for near, far, same_bucket in [(19, 36, True), (15, 36, True), (8, 36, False), (1, 2, False)]:
        swapped = tokens.clone()
        swapped[0, abs(at - near)] = tokens[0, abs(at - far)]
        swapped[0, abs(at - far)] = tokens[0, abs(at - near)]
        assert not torch.equal(swapped, tokens)
        logits = model(tokens, causal=False)[0, at]
        swapped_logits = model(swapped, causal=False)[0, at]
        assert torch.allclose(swapped_logits, logits) == same_bucket, (near, far)


# ------------------------------------------------------------ parity with Hugging Face's Llama

LLAMA_SIZES = dict(vocab_size=11, n_layer=2, n_head=2, n_embd=8, n_ff=12)
LLAMA_PARTS = {  # a block's weights: those of Hugging Face, one below another
    "attention_norm": ["input_layernorm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "out": ["self_attn.o_proj"],
    "ff_norm": ["post_attention_layernorm"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}

tied_or_not = pytest.mark.parametrize("head", ["untied", "tied"])


def hugging_face(sizes: dict, n_token: int) -> dict[str, np.ndarray]:
    """Return random weights, tokens (2, n_token) and the logits of LlamaForCausalLM, float32.

    The logits are there with its head tied and untied, and with its causal mask and without.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    tokens = torch.randint(sizes["vocab_size"], (2, n_token))
    nothing_hidden = torch.zeros(2, 1, n_token, n_token)  # is added to the scores
    weights = {}
    arrays = {"tokens": tokens}
    for head in ("untied", "tied"):
        llama_config = LlamaConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["n_embd"],
            intermediate_size=sizes["n_ff"],
            num_hidden_layers=sizes["n_layer"],
            num_attention_heads=sizes["n_head"],
            rms_norm_eps=1e-6,
            tie_word_embeddings=head == "tied",
            attn_implementation="eager",
        )
        llama = LlamaForCausalLM(llama_config).eval()
        with torch.no_grad():
            for name, p in llama.named_parameters():
                p.copy_(weights.setdefault(name, 0.4 * torch.randn_like(p)))
            arrays[f"{head}/causal"] = llama(tokens).logits
            arrays[f"{head}/bidirectional"] = llama(tokens, attention_mask=nothing_hidden).logits
    return {name: array.numpy() for name, array in (arrays | weights).items()}


def make_llama_tiny():
    """Write llama_tiny.npz.

    In tests/: PYTHONPATH=.. python -c "import test_model; test_model.make_llama_tiny()"
    """
    np.savez_compressed(HERE / "llama_tiny.npz", **hugging_face(LLAMA_SIZES, n_token=7))


def from_hugging_face(sizes: dict, arrays: dict[str, torch.Tensor], head: str) -> Transformer:
    """Return a BabyLlama with Hugging Face's weights."""
    output = "lm_head.weight" if head == "untied" else "model.embed_tokens.weight"
    weights = {
        "embedding.tokens.weight": arrays["model.embed_tokens.weight"],
        "head.norm.weight": arrays["model.norm.weight"],
        "head.vocab.weight": arrays[output],
    }
    for i in range(sizes["n_layer"]):
        for name, parts in LLAMA_PARTS.items():
            stacked = [arrays[f"model.layers.{i}.{part}.weight"] for part in parts]
            weights[f"blocks.{i}.{name}.weight"] = torch.cat(stacked)
    model = Transformer(ModelConfig("babyllama", tied=head == "tied", **sizes))
    model.load_state_dict(weights)
    return model.eval()


def check_llama(sizes: dict, arrays: dict[str, np.ndarray], head: str):
    expected = {name: torch.from_numpy(array) for name, array in arrays.items()}
    model = from_hugging_face(sizes, expected, head)
    causal = expected[f"{head}/causal"]
    bidirectional = expected[f"{head}/bidirectional"]
    assert not torch.allclose(causal, bidirectional, atol=1e-2)
    assert_close(model(expected["tokens"], causal=True), causal, 1e-5)
    assert_close(model(expected["tokens"], causal=False), bidirectional, 1e-5)


@tied_or_not
def test_babyllama_has_the_frozen_logits_of_hugging_face(head):
    with np.load(HERE / "llama_tiny.npz") as file:
        check_llama(LLAMA_SIZES, dict(file), head)


@pytest.mark.slow  # the import of transformers takes seconds
@tied_or_not
def test_babyllama_has_the_logits_of_hugging_face(head):
    pytest.importorskip("transformers")
    sizes = dict(vocab_size=97, n_layer=3, n_head=4, n_embd=32, n_ff=48)
    check_llama(sizes, hugging_face(sizes, n_token=40), head)


# ------------------------------------------------------------------- sizes and first weights


def llama_size(vocab_size, n_layer, n_embd, n_ff, n_vocab_matrix):
    layer = 4 * n_embd**2 + 3 * n_embd * n_ff + 2 * n_embd
    return n_vocab_matrix * vocab_size * n_embd + n_layer * layer + n_embd


def ltg_size(vocab_size, n_layer, n_embd, n_ff, n_bucket=32):
    embedding = vocab_size * n_embd + (2 * n_bucket - 1) * n_embd + 2 * n_embd
    layer = 4 * (n_embd**2 + n_embd) + 2 * n_embd + 3 * n_embd * n_ff
    head = n_embd**2 + n_embd + vocab_size
    return embedding + n_layer * layer + head


@pytest.mark.parametrize(
    "name, vocab_size, expected, millions",
    [
        ("babyllama", 16000, llama_size(16000, 16, 512, 1024, n_vocab_matrix=2), "58.3"),
        ("babyllama_97m", 16000, llama_size(16000, 12, 768, 2048, n_vocab_matrix=1), "97.2"),
        ("ltg_bert", 16384, ltg_size(16384, 12, 768, 2048), "98.2"),
        ("ltg_bert_small", 16384, ltg_size(16384, 12, 384, 1024), "27.7"),
        ("gpt_bert", 16384, ltg_size(16384, 12, 384, 1024), "27.7"),
    ],
)
def test_parameters_of_the_published_sizes(name, vocab_size, expected, millions):
    """The number that the sizes give, and the millions that the pages say."""
    settings = config.load(train.Settings, [str(HERE.parent / "config" / f"{name}.py")])
    with torch.device("meta"):
        model = Transformer(settings.model_config(vocab_size))
    n_params = sum(p.numel() for p in model.parameters())  # a tied matrix counts once
    assert n_params == expected
    assert f"{n_params / 1e6:.1f}" == millions


@pytest.mark.parametrize(
    "name, changes",
    [
        ("backbone", dict(backbone="gpt2")),
        ("vocab_size", dict(vocab_size=0)),
        ("n_layer", dict(n_layer=0)),
        ("n_head", dict(n_head=-1)),
        ("n_head", dict(n_head=7)),
        ("n_head", dict(n_embd=24, n_head=8)),  # three numbers a head cannot be rotated
        ("n_embd", dict(n_embd=0)),
        ("n_ff", dict(n_ff=0)),
        ("dropout", dict(dropout=1.0)),
        ("dropout", dict(dropout=-0.1)),
        ("dropout", dict(dropout=math.nan)),
        ("n_bucket", dict(backbone="ltg_bert", n_bucket=1)),
        ("n_bucket", dict(backbone="ltg_bert", n_bucket=8, max_position=8)),
        ("max_position", dict(backbone="ltg_bert", max_position=0)),
    ],
)
def test_config_refuses_sizes_that_cannot_be(name, changes):
    with pytest.raises(UserError, match=rf"\b{name}\b"):
        ModelConfig(**changes)


def test_babyllama_starts_as_published():
    torch.manual_seed(1)
    sizes = dict(vocab_size=300, n_layer=3, n_head=2, n_embd=40, n_ff=64)
    for name, p in Transformer(ModelConfig("babyllama", **sizes)).named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.06), name


def test_ltg_bert_starts_as_published():
    torch.manual_seed(1)
    sizes = dict(vocab_size=300, n_layer=3, n_head=2, n_embd=40, n_ff=64)
    for name, p in Transformer(ModelConfig("ltg_bert", **sizes)).named_parameters():
        if p.dim() == 1:
            expected = 1 if name.endswith("norm.weight") else 0
            assert (p == expected).all(), name
            continue
        std = math.sqrt(2 / (5 * 40))
        if "up_gate" in name or "down" in name:
            layer = int(name.split(".")[1])
            std /= math.sqrt(2 * (1 + layer))
        assert p.abs().max() <= 2 * std, name
        # a normal distribution that is cut at two deviations has 0.88 of the deviation
        assert p.std().item() == pytest.approx(0.88 * std, rel=0.06), name


# --------------------------------------------------------------------- which keys a query sees


@both_modes
@pytest.mark.parametrize("lengths", [None, [6, 3]], ids=["full", "padded"])
@pytest.mark.parametrize("n_query", [1, 4, 6])
def test_the_mask_hides_later_keys_and_padding(causal, lengths, n_query):
    tensor = None if lengths is None else torch.tensor(lengths)
    mask = build_mask(n_query, 6, causal=causal, lengths=tensor)
    expected = torch.zeros(2, 1, n_query, 6, dtype=torch.bool)
    for row in range(2):
        for i in range(n_query):
            position = 6 - n_query + i
            if causal:
                expected[row, 0, i, position + 1 :] = True
            if lengths is not None:
                expected[row, 0, i, lengths[row] :] = True
    hidden = torch.zeros(()) if mask.hidden is None else mask.hidden
    assert torch.equal(hidden.bool().expand_as(expected), expected)
    assert mask.triangle == (causal and lengths is None and n_query == 6)


@each_backbone
def test_only_bidirectional_attention_sees_the_future(backbone):
    model = tiny(backbone)
    tokens = random_tokens(2, 9)
    causal = model(tokens, causal=True)
    bidirectional = model(tokens, causal=False)
    for t in range(1, 9):
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 1) % VOCAB
        assert_close(model(changed, causal=True)[:, :t], causal[:, :t], 1e-12)
        difference = (model(changed, causal=False) - bidirectional)[:, :t].abs().amax(-1)
        assert (difference > 1e-6).all()  # at every earlier position


@each_backbone
@both_modes
def test_order_matters(backbone, causal):
    model = tiny(backbone)
    tokens = random_tokens(1, 9)
    swapped = tokens[:, [1, 0, *range(2, 9)]]
    last = model(tokens, causal=causal)[:, -1]
    assert not torch.allclose(model(swapped, causal=causal)[:, -1], last)


@each_backbone
@both_modes
def test_lengths_hide_padding(backbone, causal):
    model = tiny(backbone)
    tokens = random_tokens(2, 10)
    lengths = torch.tensor([10, 6])
    logits = model(tokens, causal=causal, lengths=lengths)

    # other padding changes nothing
    other = tokens.clone()
    other[1, 6:] = (tokens[1, 6:] + 5) % VOCAB
    assert_close(model(other, causal=causal, lengths=lengths)[1, :6], logits[1, :6], 1e-12)

    # each row is as if it stood alone
    assert_close(model(tokens[:1], causal=causal)[0], logits[0], 1e-12)
    assert_close(model(tokens[1:, :6], causal=causal)[0], logits[1, :6], 1e-12)


def test_causal_has_no_default():
    with pytest.raises(TypeError, match="causal"):
        tiny("babyllama")(random_tokens(1, 4))


@each_backbone
@both_modes
def test_a_row_of_one_token_sees_itself(backbone, causal):
    model = tiny(backbone)
    tokens = random_tokens(3, 6)
    first = model(tokens, causal=True)[:, :1]
    assert_close(model(tokens[:, :1], causal=causal), first, 1e-12)


@each_backbone
def test_a_row_in_pieces_through_the_cache_is_the_row(backbone):
    model = tiny(backbone)
    tokens = random_tokens(2, 9)
    cache = [[], []]
    pieces = [model(piece, causal=True, cache=cache) for piece in tokens.split([3, 1, 4, 1], dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(tokens, causal=True), 1e-12)


@each_backbone
def test_a_backbone_says_how_long_a_row_may_be(backbone, monkeypatch):
    short = BACKBONES[backbone]._replace(max_tokens=lambda config: config.max_position)
    monkeypatch.setitem(BACKBONES, "short", short)
    model = tiny("short", max_position=8)
    assert model.max_tokens == model.config.max_tokens == 8
    cache = [[], []]
    model(random_tokens(1, 8), causal=True, cache=cache)
    message = r"^a row of 9 tokens is longer than the 8 that short can take$"
    with pytest.raises(UserError, match=message):
        model(random_tokens(1, 9), causal=True)
    with pytest.raises(UserError, match=message):
        model(random_tokens(1, 1), causal=True, cache=cache)


# ----------------------------------------------------------------------------- loss and learning


@each_backbone
def test_logits_of_scored_positions_are_those_of_the_row(backbone):
    model = tiny(backbone)
    tokens = random_tokens(3, 8)
    scored = torch.tensor([[0, 7, 3], [1, 2, 6], [5, 4, 0]])
    expected = model(tokens, causal=False)[torch.arange(3)[:, None], scored]
    assert_close(model(tokens, causal=False, scored=scored), expected, 1e-12)


@each_backbone
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_loss_of_scored_positions_is_that_of_the_row(backbone, weighted):
    model = tiny(backbone)
    tokens = random_tokens(3, 8)
    scored = torch.tensor([[0, 7, 3], [1, 2, 6], [5, 4, 0]])
    targets = torch.full_like(tokens, IGNORE).scatter(1, scored, random_tokens(3, 3, seed=5))
    targets[1, 2] = IGNORE  # a scored position need not have a target
    weights = torch.rand(3, 8) if weighted else None

    loss, count = model(tokens, targets, causal=False, weights=weights)
    short_loss, short_count = model(tokens, targets, causal=False, weights=weights, scored=scored)
    expected_count = 8.0 if weights is None else weights[targets != IGNORE].sum().item()
    assert count.item() == pytest.approx(expected_count)
    assert short_count.item() == pytest.approx(expected_count)
    assert_close(short_loss, loss)
    assert_close(gradients(model, short_loss), gradients(model, loss))


@each_backbone
def test_loss_is_a_sum_and_a_count(backbone):
    model = tiny(backbone)
    tokens = random_tokens(4, 8)
    targets = random_tokens(4, 8, seed=6)
    targets[random_tokens(4, 8, seed=7) < 12] = IGNORE
    loss, count = model(tokens, targets, causal=True)

    # by hand, token by token
    log_probabilities = model(tokens, causal=True).log_softmax(-1)
    by_hand = []
    for row, t in (targets != IGNORE).nonzero().tolist():
        by_hand.append(-log_probabilities[row, t, targets[row, t]])
    assert count == len(by_hand)
    assert_close(loss, sum(by_hand))

    # two parts of the batch add up to the batch
    first_loss, first_count = model(tokens[:1], targets[:1], causal=True)
    rest_loss, rest_count = model(tokens[1:], targets[1:], causal=True)
    assert first_count + rest_count == count
    assert first_count != rest_count
    assert_close(first_loss + rest_loss, loss)
    assert_close(gradients(model, first_loss + rest_loss), gradients(model, loss))


@each_backbone
def test_weights_multiply_the_loss_of_each_target_and_its_count(backbone):
    model = tiny(backbone)
    tokens = random_tokens(2, 8)
    targets = random_tokens(2, 8, seed=6)
    targets[0, 3] = IGNORE
    weights = torch.rand(2, 8, dtype=torch.float64)
    loss, count = model(tokens, targets, causal=True, weights=weights)
    assert_close(count, weights[targets != IGNORE].sum())

    logits = model(tokens, causal=True).flatten(0, 1)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")
    assert_close(loss, (losses * weights.flatten()).sum())


@each_backbone
@pytest.mark.parametrize("scored", [None, torch.tensor([[1, 4], [0, 7]])], ids=["row", "scored"])
def test_with_logits_adds_the_logits_behind_the_loss(backbone, scored):
    model = tiny(backbone)
    tokens = random_tokens(2, 8)
    loss, count, logits = model(tokens, tokens, causal=False, scored=scored, with_logits=True)
    assert_close(logits, model(tokens, causal=False, scored=scored))
    expected_loss, expected_count = model(tokens, tokens, causal=False, scored=scored)
    assert count == expected_count
    assert torch.equal(loss, expected_loss)
    logits.sum().backward()  # a further loss may be built on them
    assert model.head.vocab.weight.grad.any()


@each_backbone
def test_a_batch_without_targets_teaches_nothing(backbone):
    model = tiny(backbone)
    tokens = random_tokens(2, 8)
    loss, count = model(tokens, torch.full_like(tokens, IGNORE), causal=False)
    assert loss == 0
    assert count == 0
    for grad in gradients(model, loss):
        assert not grad.any()


def masked_batch(tokens: torch.Tensor, mask: int):
    """Return tokens with two of each row hidden, targets and the hidden positions."""
    scored = torch.tensor([[2, 7], [1, 9], [11, 4], [5, 6]])
    targets = torch.full_like(tokens, IGNORE).scatter(1, scored, tokens.gather(1, scored))
    return tokens.scatter(1, scored, mask), targets, scored


@each_backbone
@both_modes
def test_overfits_one_batch(backbone, causal):
    torch.manual_seed(8)
    model = Transformer(ModelConfig(backbone, VOCAB, n_layer=2, n_head=2, n_embd=32, n_ff=48))
    tokens = random_tokens(4, 12)
    tokens[:, 0] = torch.arange(4)  # from it the rest of the row is known
    if causal:
        scored = None
        targets = tokens.roll(-1, 1)
        targets[:, -1] = IGNORE
    else:
        tokens, targets, scored = masked_batch(tokens, mask=30)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss, count = model(tokens, targets, causal=causal, scored=scored)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss / count).item())
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.5)  # a fresh model knows nothing
    assert losses[-1] < 0.1


@each_backbone
def test_in_bfloat16_the_loss_is_nearly_the_same_and_float32(backbone):
    model = tiny(backbone).float()
    tokens = random_tokens(40, 24)
    exact, _ = model(tokens, tokens, causal=True)
    expected = torch.cat([grad.flatten() for grad in gradients(model, exact)])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(tokens, tokens, causal=True)
    assert loss.dtype == torch.float32
    assert loss != exact
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    actual = torch.cat([grad.flatten() for grad in gradients(model, loss)])
    assert F.cosine_similarity(actual, expected, dim=0) > 0.98


# ----------------------------------------------------------------------------------- dropout


@pytest.fixture
def dropouts(monkeypatch) -> list[tuple]:
    """What is dropped in the forward passes of a test: ("attention" or a shape, the rate)."""
    seen = []

    def record_dropout(x, rate):
        seen.append((tuple(x.shape), rate))
        return x

    def record_attention(q, k, v, *, triangle, rate, **arguments):
        seen.append(("attention", rate))
        return ops.plain_attention(q, k, v, **arguments)

    monkeypatch.setattr("model.dropout", record_dropout)
    monkeypatch.setattr(ops, "attention", record_attention)
    return seen


ROWS = (3, 5, 16)
TABLE = (7, 16)  # of LTG-BERT's relative positions
PLACES = {  # in the order of the forward pass
    "babyllama": ["attention", ROWS, ROWS] * 2,
    "ltg_bert": [ROWS] + [TABLE, "attention", ROWS, ROWS] * 2 + [ROWS],
}


@each_backbone
def test_the_rate_reaches_every_place_that_drops(backbone, dropouts):
    """Probabilities of attention, outputs of attention and feed-forward; more in LTG-BERT."""
    tiny(backbone, dropout=0.2).train()(random_tokens(3, 5), causal=True)
    assert dropouts == [(place, 0.2) for place in PLACES[backbone]]


@each_backbone
def test_in_evaluation_every_rate_is_zero(backbone, dropouts):
    tiny(backbone, dropout=0.2)(random_tokens(3, 5), causal=True)
    assert dropouts == [(place, 0.0) for place in PLACES[backbone]]


@each_backbone
def test_dropout_acts_in_training_only(backbone):
    model = tiny(backbone, dropout=0.2)
    without = tiny(backbone)  # the same weights
    tokens = random_tokens(2, 8)
    assert torch.equal(model(tokens, causal=True), without(tokens, causal=True))
    assert torch.equal(without.train()(tokens, causal=True), model(tokens, causal=True))

    model.train()
    torch.manual_seed(9)
    first = model(tokens, causal=True)
    assert not torch.allclose(model(tokens, causal=True), first)
    torch.manual_seed(9)
    assert torch.equal(model(tokens, causal=True), first)


# ---------------------------------------------------------------------------------- compiled


def check_compiled(model: Transformer, compiled: Transformer):
    """Compare the two, whose weights are the same, with the same dropout in both."""
    tokens = random_tokens(32, 24)
    targets = random_tokens(32, 24, seed=6)
    positions = torch.arange(20).expand(32, 20).contiguous()  # 640 of them: two chunks of the loss
    for causal, scored in [(True, None), (False, positions)]:
        torch.manual_seed(7)
        loss, count = compiled(tokens, targets, causal=causal, scored=scored)
        torch.manual_seed(7)
        eager_loss, eager_count = model(tokens, targets, causal=causal, scored=scored)
        assert count == eager_count
        assert_close(loss, eager_loss, 1e-4)
        assert_close(gradients(compiled, loss), gradients(model, eager_loss), 1e-4)


@pytest.mark.slow
@each_backbone
def test_traced_is_one_graph_and_equals_eager(backbone):
    """By what torch.compile traces, without the C++ compiler."""
    torch._dynamo.reset()
    model = tiny(backbone, n_layer=1, vocab_size=64).float()
    compiled = copy.deepcopy(model)
    # fullgraph: a break of the graph raises
    compiled.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    check_compiled(model, compiled)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif("INDUCTOR" not in os.environ, reason="minutes of C++; run with INDUCTOR=1")
@pytest.mark.skipif(not any(map(shutil.which, ["g++", "clang++", "c++"])), reason="no C++ compiler")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@each_backbone
def test_inductor_equals_eager(backbone, device):
    """In the parts that are compiled on a CPU, and in those on a GPU."""
    torch._dynamo.reset()
    model = tiny(backbone, n_layer=2, vocab_size=64, dropout=0.1).float().train()
    compiled = copy.deepcopy(model)
    compile_in_place(compiled, torch.device(device), n_shapes=2)
    with torch._inductor.config.patch(fallback_random=True):  # the same dropout in both
        check_compiled(model, compiled)
    torch._dynamo.reset()


@pytest.mark.slow
@each_backbone
def test_layers_are_built_whole_for_several_processes(backbone, graphs):
    """By torch itself DDP has each cut in two, at its last product."""
    model = tiny(backbone, n_layer=1, n_embd=256, n_ff=1024).float().train()
    compile_in_place(model, torch.device("cpu"), n_shapes=1)
    tokens = random_tokens(2, 8)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        DistributedDataParallel(model)(tokens, tokens, causal=True)
    finally:
        dist.destroy_process_group()
    assert len(graphs) == 1
