"""Exported folders against transformers: logits, losses, generation, tokenizers, model cards.

    python -m pytest tests/test_export_hf.py                  # about 60 s, 15 of them imports
    python -m pytest tests/test_export_hf.py -m "not slow"

Needs transformers (4.41 or newer), tokenizers and safetensors.
"""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import regex
import torch
import torch.nn.functional as F

# hf_runs sets variables that transformers reads when it is imported
from hf_runs import (  # isort: skip
    KINDS,
    TEXT,
    Kind,
    assert_close,
    exported,
    load_hf,
    make_run,
    some_tokens,
    transformers,
)
import export_hf
from safetensors.torch import load_file

import config
import eval as evaluation
import model as model_module
import prepare
from antlm import IGNORE
from antlm.checkpoint import (
    checkpoints,
    load_checkpoint,
    load_model,
    load_run,
    save_checkpoint,
    step_of,
)
from antlm.tokenizer import (
    END,
    MASK,
    PAD,
    PATTERN,
    START,
    Tokenizer,
    save_tokenizer,
    tokenizer_json,
    train_bpe,
)
from babylm import challenge, submit
from babylm.protocols import PROTOCOLS
from config import UserError
from data import OBJECTIVES
from sample import generate
from train import Settings

pytestmark = pytest.mark.slow  # transformers takes seconds to import

ROOT = Path(__file__).parent.parent
REAL_TEXT = ROOT.parent / "shared" / "data" / "babylm_dev"
ODD_TEXTS = [
    "",
    " ",
    "\n",
    "a\n\nb",
    " \n ",
    "x\r\ny\r\n",
    "\ttab\u00a0nbsp\u2009thin\u3000wide\u2028line\u2029par\x85nel",
    "\0a\0",
    "e\u0301a\u0308\u0323",
    "👩‍👩‍👧‍👦 👍🏽🇳🇴",
    "שלום עולם, مرحبا",
    "𝔘𝔫𝔦 \U0010ffff",
    "it's  I'LL   they'd'd",
    "  two  spaces  ",
    "中文字 한국어",
    "1234 12,5 ½ Ⅷ",
    "\ufeffbom",
    "a\u200db\u200ec",
    "Speaker: hello\nSpeaker:  hi",
    "ﬁ ﬂ ǆ",
    "é\n🐟\n",
    "<s",
    "s>",
    "< s >",
]
every_kind = pytest.mark.parametrize("kind", KINDS)
both_modes = pytest.mark.parametrize("causal", [True, False], ids=["causal", "open"])


# ------------------------------------------------------------------------------------------ models


# a run, a class that its folder loads as, and whether attention is causal there
CLASSES = []
for kind, made_of in KINDS.items():
    CLASSES += [
        (kind, "AutoModelForCausalLM", True),
        (kind, "AutoModelForMaskedLM", False),
        (kind, "AutoModel", made_of.only_causal),
    ]


def test_the_small_runs_cover_every_backbone_and_kind_of_training():
    rows = {(made_of.backbone, made_of.only_causal) for made_of in KINDS.values()}
    assert rows == set(itertools.product(export_hf.CONFIGS, (True, False)))


@torch.no_grad()
@pytest.mark.parametrize("kind, auto_class, causal", CLASSES)
def test_every_class_has_our_logits_under_its_mask_from_all_of_the_weights(
    kind, auto_class, causal
):
    run = exported(kind)
    hf = load_hf(auto_class, run.folder)
    _, report = getattr(transformers, auto_class).from_pretrained(
        run.folder, trust_remote_code=True, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem], problem
    assert hf.dtype == torch.float32
    assert hf.config.max_position_embeddings >= 512

    tokens = some_tokens(run.model)
    output = hf(tokens)[0]
    if auto_class == "AutoModel":
        head = run.model.head
        # the norm in front of the output matrix belongs to the base model of a Llama
        output = head.vocab(output if KINDS[kind].backbone == "babyllama" else head(output))
    assert_close(output, run.model(tokens, causal=causal))


@torch.no_grad()
@pytest.mark.parametrize("kind, auto_class, causal", CLASSES)
def test_a_later_token_shows_in_earlier_outputs_of_open_classes_alone(kind, auto_class, causal):
    run = exported(kind)
    hf = load_hf(auto_class, run.folder)
    tokens = some_tokens(run.model)
    changed = tokens.clone()
    changed[:, 20] = (tokens[:, 20] + 1) % run.model.config.vocab_size
    difference = (hf(tokens)[0] - hf(changed)[0]).abs().amax(-1)
    assert (difference[:, 20:] > 1e-3).all()
    if causal:
        assert difference[:, :20].max() < 1e-5
    else:
        assert (difference[:, :20] > 1e-3).all()


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_babyllama_is_a_plain_causal_llama_for_whom_runs_no_code(kind):
    """Nobody is asked whether to trust a folder whose code is not needed."""
    folder = str(exported(kind).folder)
    transformers.AutoConfig.from_pretrained(folder)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(llama) is transformers.LlamaForCausalLM
    assert type(load_hf("AutoModelForCausalLM", folder)) is transformers.LlamaForCausalLM
    assert type(transformers.AutoModel.from_pretrained(folder)) is transformers.LlamaModel
    generator = transformers.pipeline("text-generation", model=folder, max_new_tokens=3)
    assert type(generator.model) is transformers.LlamaForCausalLM
    generator = transformers.pipeline(
        "text-generation", model=llama, tokenizer=hf_tokenizer, max_new_tokens=3
    )
    assert generator("The cats")[0]["generated_text"].startswith("The cats")


@every_kind
def test_a_pipeline_fills_a_mask_with_our_likeliest_word(kind):
    run = exported(kind)
    fill = transformers.pipeline("fill-mask", model=str(run.folder), trust_remote_code=True)
    (best,) = fill("The <mask> sleeps.", top_k=1)
    ids = run.tokenizer.encode_text("The", run.boundary)
    place = len(ids)
    ids += [MASK, *run.tokenizer.encode(" sleeps.")]
    logits = run.model(torch.tensor([ids]), causal=False)
    assert best["token"] == logits[0, place].argmax().item()


@torch.no_grad()
def test_open_attention_of_a_llama_is_the_same_in_both_of_its_kernels():
    run = exported("untied")
    tokens = some_tokens(run.model)
    expected = run.model(tokens, causal=False)
    for kernel in ("eager", "sdpa"):
        hf = load_hf("AutoModelForMaskedLM", run.folder, attn_implementation=kernel)
        output = hf(tokens, output_hidden_states=True)
        assert_close(output.logits, expected)
        assert len(output.hidden_states) == 4
        assert torch.equal(hf(tokens, return_dict=False)[0], output.logits)
        with pytest.raises(ValueError, match=r"\(3, 1, 40, 40\)"):
            hf(tokens, torch.zeros(3, 1, 40, 40))
    with pytest.raises(ValueError, match="attn_implementation|attention"):
        load_hf("AutoModelForMaskedLM", run.folder, attn_implementation="flex_attention")


@torch.no_grad()
@pytest.mark.parametrize("auto_class", ["AutoModelForMaskedLM", "AutoModelForCausalLM"])
def test_ltg_bert_gives_the_same_logits_and_asks_who_sees_what(auto_class):
    """Is attention causal? forward says it, or else config.json, or else the class."""
    run = exported("ltg")
    tokens = some_tokens(run.model)
    logits = {causal: run.model(tokens, causal=causal) for causal in (True, False)}
    assert (logits[True] - logits[False]).abs().max() > 1

    by_class = auto_class == "AutoModelForCausalLM"
    hf = load_hf(auto_class, run.folder)
    hf.tie_weights()  # the 2024 pipeline does
    assert_close(hf(tokens).logits, logits[by_class])
    configured = load_hf(auto_class, run.folder, causal=not by_class)
    assert_close(configured(tokens).logits, logits[not by_class])
    for causal in (True, False):
        configured.config.causal = not causal
        assert_close(configured(tokens, causal=causal).logits, logits[causal])


@torch.no_grad()
@both_modes
def test_ltg_bert_does_not_see_pads_on_either_side(causal):
    run = exported("ltg")
    hf = load_hf("AutoModelForMaskedLM", run.folder)
    lengths = [40, 7, 1]
    tokens = some_tokens(run.model)
    expected = run.model(tokens, causal=causal, lengths=torch.tensor(lengths))

    mask = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    right = hf(tokens, mask, causal=causal).logits
    square = hf(tokens, mask[:, None].expand(3, 40, 40), causal=causal).logits
    moved = [row.roll(40 - n) for row, n in zip(tokens, lengths, strict=True)]
    left = hf(torch.stack(moved), mask.flip(1), causal=causal).logits
    assert left.isfinite().all()
    for row, n in enumerate(lengths):
        assert_close(right[row, :n], expected[row, :n])
        assert_close(square[row, :n], expected[row, :n])
        assert_close(left[row, 40 - n :], expected[row, :n])


@torch.no_grad()
@every_kind
def test_losses_agree(kind):
    """Hugging Face shifts the labels of a causal model and divides by the count of those left."""
    run = exported(kind)
    tokens = some_tokens(run.model)
    hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    labels = tokens.masked_fill(hidden, IGNORE)
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    loss, count = run.model(tokens, shifted, causal=True)
    hf = load_hf("AutoModelForCausalLM", run.folder)
    assert_close(hf(tokens, labels=labels).loss, loss / count)
    loss, count = run.model(tokens, labels, causal=False)
    hf = load_hf("AutoModelForMaskedLM", run.folder)
    assert_close(hf(tokens, labels=labels).loss, loss / count)


@every_kind
def test_greedy_generation_equals_ours(kind):
    run = exported(kind)
    hf = load_hf("AutoModelForCausalLM", run.folder)
    prompt = torch.tensor([run.tokenizer.encode_text("The cats", run.boundary)])
    start = prompt[0, 0].item()
    assert hf.generation_config.eos_token_id == start  # a text ends where the next would start

    expected = generate(run.model, prompt, 20, block_size=64, temperature=0, stop=start)
    assert len(expected) > 3
    if len(expected) < 20:
        expected.append(start)
    output = hf.generate(prompt, max_new_tokens=20, do_sample=False)
    assert output[0, prompt.size(1) :].tolist() == expected

    # in a batch, padded on the left
    padded = F.pad(prompt, (2, 0), value=PAD).repeat(2, 1)
    mask = F.pad(torch.ones_like(prompt), (2, 0)).repeat(2, 1)
    output = hf.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for row in output:
        assert row[padded.size(1) :].tolist() == expected


@torch.no_grad()
def test_base_model_returns_what_the_pipelines_read():
    run = exported("ltg")
    tokens = some_tokens(run.model)
    base = load_hf("AutoModel", run.folder)
    masked = load_hf("AutoModelForMaskedLM", run.folder)
    output = base(tokens, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert output[0] is output.last_hidden_state
    assert_close(masked.classifier(output.last_hidden_state), run.model(tokens, causal=False))
    assert masked(tokens).hidden_states is None
    assert torch.equal(base(tokens, return_dict=False)[0], output.last_hidden_state)
    assert base.config.hidden_size == 32
    assert base.config.max_position_embeddings >= 512
    with pytest.raises(ValueError, match="output_attentions"):
        base(tokens, output_attentions=True)
    with pytest.raises(ValueError, match=r"\(3, 1, 40, 40\)"):
        base(tokens, torch.zeros(3, 1, 40, 40))


def test_every_dropout_of_an_exported_ltg_bert_acts_in_training_only(monkeypatch):
    """Where and how much: the same places as in model.py, at the rates of config.json."""
    run = exported("ltg")
    hf = load_hf(
        "AutoModelForMaskedLM",
        run.folder,
        hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.2,
    )
    calls = []

    def dropout(x, p, training, inplace=False):
        calls.append((tuple(x.shape), p if training else 0.0))
        return x

    attention = F.scaled_dot_product_attention

    def attend(q, k, v, mask, rate, scale):
        calls.append(("attention", rate))
        return attention(q, k, v, mask, 0.0, scale=scale)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    tokens = some_tokens(run.model)
    x = (3, 40, 32)
    layer = [((15, 32), 0.2), ("attention", 0.2), (x, 0.2), (x, 0.3)]
    hf.train()(tokens)
    assert calls == [(x, 0.3), *layer, *layer, *layer, (x, 0.3)]

    calls.clear()
    hf.eval()(tokens)
    assert len(calls) == 14
    assert {rate for _, rate in calls} == {0.0}


def test_the_dropout_rate_of_training_is_exported():
    """A Llama of transformers knows dropout in attention only."""
    ltg = load_hf("AutoModel", exported("ltg").folder)
    rates = {module.p for module in ltg.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.1}
    assert load_hf("AutoModelForCausalLM", exported("tied").folder).config.attention_dropout == 0.1


@torch.no_grad()
@pytest.mark.parametrize("hidden_rate, attention_rate", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5)])
def test_an_exported_ltg_bert_drops_in_training_what_config_json_says(hidden_rate, attention_rate):
    run = exported("ltg")
    rates = {"hidden_dropout_prob": hidden_rate, "attention_probs_dropout_prob": attention_rate}
    hf = load_hf("AutoModelForMaskedLM", run.folder, **rates)
    tokens = some_tokens(run.model)
    expected = run.model(tokens, causal=False)
    assert_close(hf(tokens).logits, expected)
    torch.manual_seed(1)
    passes = [hf.train()(tokens).logits for _ in range(2)]
    if hidden_rate + attention_rate == 0:
        assert_close(passes[0], expected)
    else:
        assert (passes[0] - passes[1]).abs().max() > 1
    assert_close(hf.eval()(tokens).logits, expected)


# a run of each backbone, the classes that its export loads as, and what `causal` may be there
EXPORTED_CLASSES = []
for auto_class in ("AutoModelForCausalLM", *export_hf.BABYLLAMA_CLASSES):
    EXPORTED_CLASSES.append(("untied", auto_class, None))
for auto_class in export_hf.LTG_BERT_CLASSES:
    if auto_class != "AutoConfig":
        EXPORTED_CLASSES += [("ltg", auto_class, causal) for causal in (None, True, False)]
MASK_FORMS = {  # of a tokenizer's mask (B, T)
    "numbers": lambda mask: mask,
    "booleans": lambda mask: mask.bool(),
    "floats": lambda mask: mask.float(),
    "square": lambda mask: mask[:, None].expand(-1, mask.size(1), -1),
    "one row for all queries": lambda mask: mask[:, None],
}
TEXTS = ["The cats sleep.", "Who sees the dog in the garden?\nYes.", "Köln", ""]


def mask_forms(hf) -> list[str]:
    """A mask of three dimensions is taken by our own code alone."""
    if not type(hf).__module__.startswith("transformers."):
        return list(MASK_FORMS)
    return ["numbers", "booleans", "floats"]


def test_every_backbone_has_exported_classes():
    backbones = {KINDS[kind].backbone for kind, _, _ in EXPORTED_CLASSES}
    assert backbones == set(export_hf.CONFIGS)


@torch.no_grad()
@pytest.mark.parametrize("kind, auto_class, causal", EXPORTED_CLASSES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_output_of_any_class(kind, auto_class, causal, side):
    """Hidden states and logits where a text stands, and the logits of a classifier."""
    folder = exported(kind).folder
    options = {} if causal is None else {"causal": causal}
    hf = load_hf(auto_class, folder)
    assert hf.config.pad_token_id == PAD
    tokenizer = load_hf("AutoTokenizer", folder, padding_side=side)
    alone = [hf(**tokenizer(text, return_tensors="pt"), **options)[0][0] for text in TEXTS]
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    assert mask[:, 0 if side == "left" else -1].tolist() == [0, 1, 0, 0]

    for form in mask_forms(hf):
        output = hf(batch["input_ids"], MASK_FORMS[form](mask), **options)[0]
        for row, expected, seen in zip(output, alone, mask.bool(), strict=True):
            if auto_class != "AutoModelForSequenceClassification":
                row = row[seen]
            assert_close(row, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "holes, first, last",
    [("111111", 0, 5), ("001011", 2, 5), ("101100", 0, 3), ("010010", 1, 4), ("000100", 3, 3)],
)
def test_a_classifier_reads_the_first_or_the_last_position_of_a_text(holes, first, last):
    """The mask says where a text stands, whatever the tokens are, and without it the pads do."""
    classifier = load_hf("AutoModelForSequenceClassification", exported("ltg").folder)
    mask = torch.tensor([[int(character) for character in holes]])
    tokens = torch.arange(10, 16)[None]
    for causal, position in ((False, first), (True, last)):
        for form in MASK_FORMS.values():
            for ids in (tokens, tokens * mask, tokens * (1 - mask)):
                states = classifier.encode(ids, form(mask), causal)[-1]
                logits = classifier(ids, form(mask), causal=causal).logits
                assert_close(logits, classifier.head(states[:, position]))

        padded = tokens * mask + PAD * (1 - mask)
        states = classifier.encode(padded, None, causal)[-1]
        logits = classifier(padded, causal=causal).logits
        assert_close(logits, classifier.head(states[:, position]))


@torch.no_grad()
@both_modes
def test_a_classifier_without_a_pad_token_reads_the_end_of_the_row(causal):
    folder = exported("ltg").folder
    classifier = load_hf("AutoModelForSequenceClassification", folder, pad_token_id=None)
    tokens = torch.tensor([[PAD, 10, 11, PAD], [10, PAD, PAD, 11]])
    states = classifier.encode(tokens, None, causal)[-1]
    expected = classifier.head(states[:, -1 if causal else 0])
    assert_close(classifier(tokens, causal=causal).logits, expected)


@torch.no_grad()
def test_a_classifier_of_a_llama_knows_pads_on_the_right_by_their_id():
    """Without a mask, too, if it is causal; those on the left are seen."""
    folder = exported("tied").folder
    classifier = load_hf("AutoModelForSequenceClassification", folder)
    tokenizer = load_hf("AutoTokenizer", folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert_close(classifier(batch["input_ids"]).logits, classifier(**batch).logits)


@pytest.mark.parametrize("kind, causal", [("ltg", False), ("ltg", True), ("untied", True)])
def test_a_classifier_trains(kind, causal):
    folder = exported(kind).folder
    options = {"attention_dropout": 0.0}
    if kind == "ltg":
        options = {
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "causal": causal,
        }
    torch.manual_seed(3)
    classifier = load_hf("AutoModelForSequenceClassification", folder, num_labels=3, **options)
    tokenizer = load_hf("AutoTokenizer", folder)
    texts = ["The cats sleep.", "Who sees the dog in the garden?", "Köln"]
    batch = tokenizer(texts, ["Yes."] * 3, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    optimizer = torch.optim.AdamW(classifier.parameters(), 1e-3)
    losses = []
    classifier.train()
    for _ in range(10):
        loss = classifier(**batch, labels=torch.tensor([0, 1, 2])).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gradients = [p.grad is not None for p in classifier.parameters()]
    assert all(gradients)
    assert losses[-1] < losses[0]


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, auto_class",
    [
        ("untied", "AutoModelForCausalLM"),
        ("tied", "AutoModelForCausalLM"),
        ("untied", "AutoModelForMaskedLM"),
        ("tied", "AutoModelForMaskedLM"),
        ("ltg", "AutoModelForMaskedLM"),
        ("ltg", "AutoModelForCausalLM"),
    ],
)
def test_saved_again_by_transformers_it_is_the_same_and_stays_tied(tmp_path, kind, auto_class):
    run = exported(kind)
    tokens = some_tokens(run.model)
    first = load_hf(auto_class, run.folder)
    tokenizer = load_hf("AutoTokenizer", run.folder)
    first.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    second = load_hf(auto_class, tmp_path)
    assert torch.equal(second(tokens).logits, first(tokens).logits)
    for hf in (first, second):
        output = hf.get_output_embeddings().weight
        embedding = hf.get_input_embeddings().weight
        assert (output.data_ptr() == embedding.data_ptr()) == (kind != "untied")
    again = load_hf("AutoTokenizer", tmp_path)
    for text in (TEXT, "The <mask> sleeps.\n<mask>"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


@torch.no_grad()
@every_kind
def test_a_base_model_that_is_saved_again_keeps_its_mask(tmp_path, kind):
    """And the heads of those that were trained keep their weights."""
    run = exported(kind)
    tokens = some_tokens(run.model)
    for auto_class in ("AutoModel", "AutoModelForSequenceClassification"):
        first = load_hf(auto_class, run.folder)
        first.save_pretrained(tmp_path / auto_class)
        second = load_hf(auto_class, tmp_path / auto_class)
        assert torch.equal(second(tokens)[0], first(tokens)[0])


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_a_classifier_of_a_llama_has_the_mask_of_its_training(causal):
    """Its head reads the last token, so what shows is the mask of the layers below the last."""
    run = exported("tied" if causal else "untied")
    classifier = load_hf("AutoModelForSequenceClassification", run.folder)
    base = load_hf("AutoModel", run.folder)
    tokens = some_tokens(run.model).clamp(min=4)
    expected = classifier.score(base(tokens).last_hidden_state[:, -1])
    assert_close(classifier(tokens).logits, expected)


# -------------------------------------------------------------------------------------- tokenizers


def check_offsets(text: str, ids: list[int], offsets: list, tokenizer: Tokenizer, boundary: str):
    """Each token's offsets must be the characters that its bytes stand in."""
    ends = [end for _, end in offsets]
    assert tuple(offsets[0]) == (0, 0)
    assert ends == sorted(ends)
    assert ends[-1] == len(text)
    raw = text.encode()
    begin = 0
    for token, (start, end) in zip(ids[1:], offsets[1:], strict=True):
        piece = tokenizer.bpe.decode_single_token_bytes(token)
        if boundary == "line" and token == START:
            piece = b"\n"
        stop = begin + len(piece)
        assert raw[begin:stop] == piece
        # a part of a character has the place of the character
        assert start == len(raw[:begin].decode(errors="ignore"))
        assert end == len(raw[:stop].decode(errors="replace"))
        begin = stop
    assert begin == len(raw)


def check_encodings(hf_tokenizer, tokenizer: Tokenizer, boundary: str, texts: list[str]):
    """Compare ids and offsets, and where a target starts in the middle of a text, as in EWoK."""
    batch = hf_tokenizer(texts, return_offsets_mapping=True)
    options = []
    expected = []
    for text, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
        assert ids == tokenizer.encode_text(text, boundary), repr(text)
        check_offsets(text, ids, offsets, tokenizer, boundary)
        for start in {len(text) // 3, len(text) // 2} - {0}:
            beyond = [index for index, (_, end) in enumerate(offsets) if end > start]
            options.append((text, start))
            expected.append(beyond[0])
    first = evaluation.encode(options, tokenizer, boundary, PROTOCOLS["2025"], "masked")[1]
    assert first.tolist() == expected


@every_kind
def test_tokenizer_gives_our_ids_with_character_offsets(kind):
    run = exported(kind)
    hf_tokenizer = load_hf("AutoTokenizer", run.folder)
    assert hf_tokenizer.is_fast
    assert len(hf_tokenizer) == run.tokenizer.vocab_size
    pairs = [f"{first}\n{second}" for first, second in itertools.product(ODD_TEXTS, repeat=2)]
    texts = [*ODD_TEXTS, TEXT, *pairs]
    check_encodings(hf_tokenizer, run.tokenizer, run.boundary, texts)
    for text in texts:
        if run.boundary == "document" or "\n" not in text:
            ids = hf_tokenizer(text, add_special_tokens=False)["input_ids"]
            assert hf_tokenizer.decode(ids) == text


@every_kind
def test_tokenizer_knows_our_special_tokens(kind):
    run = exported(kind)
    hf_tokenizer = load_hf("AutoTokenizer", run.folder)
    start = run.tokenizer.encode_text("", run.boundary)[0]
    assert hf_tokenizer.bos_token_id == start
    assert hf_tokenizer.eos_token_id == start
    assert hf_tokenizer.cls_token_id == start
    assert hf_tokenizer.pad_token_id == PAD
    assert hf_tokenizer.sep_token_id == END
    assert hf_tokenizer.mask_token_id == MASK

    first = run.tokenizer.encode_text("The cats", run.boundary)
    second = run.tokenizer.encode_text("sleep.", run.boundary)
    assert hf_tokenizer("The cats", "sleep.")["input_ids"] == first + second


def check_masks(hf_tokenizer, tokenizer: Tokenizer, boundary: str, text: str):
    """Hide each piece of a text in turn: the ids are those of the text, with one MASK for it.

    A piece may begin with a space, which may be typed or not.
    """
    pieces = regex.findall(PATTERN, text)
    for number, piece in enumerate(pieces):
        if piece.isspace():
            continue
        before = "".join(pieces[:number])
        after = "".join(pieces[number + 1 :])
        expected = tokenizer.encode_text(before, boundary) + [MASK]
        expected += tokenizer.encode_text(after, boundary)[1:]
        typed = [f"{before}<mask>{after}"]
        if piece.startswith(" "):
            typed.append(f"{before} <mask>{after}")
            # a space of its own in front can only be told apart where the piece's one is typed
            if before.endswith(" "):
                del typed[0]
        for masked in typed:
            assert hf_tokenizer(masked)["input_ids"] == expected, repr(masked)


@every_kind
def test_a_mask_hides_a_word_with_the_space_in_front_and_nothing_else(kind):
    run = exported(kind)
    hf_tokenizer = load_hf("AutoTokenizer", run.folder)
    start, newline = run.tokenizer.encode_text("\n", run.boundary)
    the, space = run.tokenizer.encode("The ")
    for text, ids in {
        "The <mask>": [the, MASK],
        "The<mask>": [the, MASK],
        "The  <mask>": [the, space, MASK],  # training shows the first of two spaces by itself
        "The\n<mask>": [the, newline, MASK],
        "The\n <mask>": [the, newline, MASK],
        "The <mask> <mask>\n<mask>": [the, MASK, MASK, newline, MASK],
        " <mask>": [MASK],
    }.items():
        assert hf_tokenizer(text)["input_ids"] == [start, *ids], repr(text)
    for text in (TEXT, *ODD_TEXTS, "a  b\t c\n\n d 's\u00a0e"):
        check_masks(hf_tokenizer, run.tokenizer, run.boundary, text)


@every_kind
def test_a_mask_has_the_place_of_its_characters(kind):
    hf_tokenizer = load_hf("AutoTokenizer", exported(kind).folder)
    text = "Köln <mask> <mask>,\n<mask>"
    encoded = hf_tokenizer(text, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    assert [text[a:b] for token, (a, b) in pairs if token == MASK] == ["<mask>"] * 3


def test_an_export_does_not_change_the_tokenizers_written_later(tmp_path):
    """The start token of "none" has another id, and may have it in this export only."""
    export_hf.main([str(exported("newline").run), str(tmp_path / "out")])
    template = tokenizer_json([])["post_processor"]
    assert template["special_tokens"]["<s>"]["ids"] == [START]


@pytest.mark.slow
@pytest.mark.skipif(not REAL_TEXT.is_dir(), reason="no BabyLM text in ../shared/data/babylm_dev")
@pytest.mark.parametrize("boundary", ["line", "document"])
def test_tokenizer_gives_our_ids_on_real_lines(tmp_path, boundary):
    """4,000 lines of six sources, every seventh joined to the next, and their vocabulary."""
    lines = []
    for path in sorted(REAL_TEXT.glob("*.dev")):
        with open(path, encoding="utf-8", newline="") as file:
            lines += file.read().split("\n")[:700]
    lines = lines[:4000]
    assert len(lines) == 4000
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines[::2]), encoding="utf-8", newline="")
    save_tokenizer(tmp_path / "tokenizer.json", train_bpe(prepare.count_pieces([text]), 1500))
    (tmp_path / "out").mkdir()
    export_hf.write_tokenizer(tmp_path / "tokenizer.json", tmp_path / "out", boundary, 512)

    hf_tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    texts = list(lines)
    for number in range(0, len(lines) - 1, 7):
        texts[number] += "\n" + lines[number + 1]
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    check_encodings(hf_tokenizer, tokenizer, boundary, texts)
    for text in texts[::70]:
        check_masks(hf_tokenizer, tokenizer, boundary, text)


# ------------------------------------------------------------------------- scores of the pipelines


DIALOGUES = [
    ("Who sees the girl?\nThe dog sees the girl.", 0),
    ("Who sees the girl?\nThe dog sees the girl.", len("Who sees the girl?")),
    ("Who sees the girl?\n\nThe dog\n", len("Who sees the girl?\n")),
    ("\nThe cats sleep.", 0),
    ("The cats \n sleep\r\nin Köln.\n", len("The cats")),
    ("Zoë sees them.\nA 🐟.", len("Zoë se")),
    ("The cats sleep.", 0),
    ("The cats sleep.", len("The cats")),
]


@functools.cache
def pipeline_model(kind: str, auto_class: str):
    return load_hf(auto_class, exported(kind).folder)


def pipeline_logits(kind: str, mode: str, ids: list[int]) -> torch.Tensor:
    """The logits (T, V) of a model as a pipeline loads it."""
    auto_class = "AutoModelForCausalLM" if mode == "causal" else "AutoModelForMaskedLM"
    return pipeline_model(kind, auto_class)(torch.tensor([ids])).logits[0].double()


def hidden_log_prob(kind: str, mode: str, ids: list[int], i: int) -> float:
    """The log-probability of token i where it is hidden, read there or, in mntp, before it."""
    hidden = [*ids[:i], MASK, *ids[i + 1 :]]
    position = i - 1 if mode == "mntp" else i
    return pipeline_logits(kind, mode, hidden)[position].log_softmax(-1)[ids[i]].item()


def score_of_2025(kind: str, mode: str, hf_tokenizer, sentence: str, completion: str) -> float:
    """evaluation-pipeline-2025, sentence_zero_shot: tokens whose offsets end in the completion."""
    encoded = hf_tokenizer(sentence, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    ends = [end for _, end in encoded["offset_mapping"]]
    start = len(sentence) - len(completion)
    scored = [i for i in range(len(ids)) if ends[i] > start]
    if mode == "causal":
        log_probs = pipeline_logits(kind, mode, ids[:-1]).log_softmax(-1)
        return sum(log_probs[i - 1, ids[i]].item() for i in scored if i >= 1)
    return sum(hidden_log_prob(kind, mode, ids, i) for i in scored)


@torch.no_grad()
@every_kind
@pytest.mark.parametrize("mode", evaluation.MODES)
def test_scores_are_those_of_the_pipeline_of_2025(kind, mode):
    """Newlines too, which are start tokens in three of the kinds and ordinary ones in the other."""
    run = exported(kind)
    hf_tokenizer = load_hf("AutoTokenizer", run.folder)
    expected = [
        score_of_2025(kind, mode, hf_tokenizer, text, text[start:]) for text, start in DIALOGUES
    ]
    year = PROTOCOLS["2025"]
    ids, first = evaluation.encode(DIALOGUES, run.tokenizer, run.boundary, year, mode)
    scores, _ = evaluation.score(run.model, ids, first, mode, [""] * len(ids))
    assert scores == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
@every_kind
@pytest.mark.parametrize("mode", ["masked", "mntp"])
def test_masked_scores_of_2024_leave_out_the_cls_token(kind, mode):
    """minicons, as that year's pipeline calls it: the mean over tokens but pad, cls and sep."""
    run = exported(kind)
    hf_tokenizer = load_hf("AutoTokenizer", run.folder)
    left_out = {hf_tokenizer.pad_token_id, hf_tokenizer.cls_token_id, hf_tokenizer.sep_token_id}
    options = [(text, 0) for text, start in DIALOGUES if start == 0]
    expected = []
    for text, _ in options:
        ids = hf_tokenizer(" " + text)["input_ids"]
        scored = [i for i in range(len(ids)) if ids[i] not in left_out]
        values = [hidden_log_prob(kind, mode, ids, i) for i in scored]
        expected.append(sum(values) / len(values))
    year = PROTOCOLS["2024"]
    ids, first = evaluation.encode(options, run.tokenizer, run.boundary, year, mode)
    names = [""] * len(ids)
    totals, n_scored = evaluation.score(
        run.model, ids, first, mode, names, skip_start=year.skip_start
    )
    assert year.masked_mean
    assert totals / n_scored == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------------------------- checkpoints


def change_setting(path: Path, name: str, value):
    content = load_checkpoint(path)
    model = load_model(content)
    del content["model"]
    content["settings"][name] = value
    save_checkpoint(path, model, **content)


def test_one_folder_for_each_mark_of_the_rules(tmp_path, capsys):
    """No checkpoint stands for two marks; a mark without one is named; main is the last one."""
    run = tmp_path / "run"
    words = [400_000, 1_000_000, 1_300_000, 2_000_001, 5_100_000, 10_000_000]
    words += [10_500_000, 20_000_000, 24_000_000]
    for step, n in enumerate(words, 1):
        make_run(run, KINDS["untied"], words=n, step=step)
    (run / "step_0000010.pt").write_bytes(b"cut short")
    export_hf.main([str(run), str(tmp_path / "out"), "--checkpoints"])
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    assert "step_0000010.pt: damaged" in err

    folders = {}
    for folder in (tmp_path / "out").iterdir():
        folders[folder.name] = json.loads((folder / "antlm.json").read_text())["words"]
    assert folders == {
        "chck_1M": 1_000_000,
        "chck_2M": 2_000_001,
        "chck_5M": 5_100_000,
        "chck_10M": 10_000_000,
        "chck_20M": 20_000_000,
        "main": 24_000_000,
    }
    missing = "chck_3M, chck_4M, chck_6M, chck_7M, chck_8M, chck_9M;"
    assert f"no checkpoint of its own: {missing}" in out
    assert "24,000,000" in (tmp_path / "out" / "main" / "README.md").read_text()
    load_hf("AutoModelForCausalLM", tmp_path / "out" / "chck_2M")


def test_a_mark_far_behind_is_not_passed_off(tmp_path, capsys):
    """A step of this run sees some 10,000 words; whoever is 20,000 beyond a mark comes too late."""
    run = tmp_path / "run"
    make_run(run, KINDS["untied"], words=10_000_017, step=1000)
    make_run(run, KINDS["untied"], words=20_020_000, step=2000)
    make_run(run, KINDS["untied"], words=28_000_000, step=2800)
    export_hf.main([str(run), str(tmp_path / "out"), "--checkpoints"])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["chck_10M", "main"]
    assert "chck_9M, chck_20M;" in capsys.readouterr().out


def test_the_end_stands_for_a_mark_that_it_just_misses(tmp_path, capsys):
    run = tmp_path / "run"
    make_run(run, KINDS["untied"], words=9_000_000, step=900)
    make_run(run, KINDS["untied"], words=9_960_000, step=996)
    export_hf.main([str(run), str(tmp_path / "out"), "--checkpoints"])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["chck_10M", "chck_9M", "main"]
    assert "chck_10M: step_0000996.pt, 9,960,000 words" in capsys.readouterr().out
    _, due, marks, _ = submit.find_checkpoints(run, "2026")
    assert due[-1] == 10_000_000
    assert marks[10_000_000].path.name == "step_0000996.pt"


def test_an_export_and_a_submission_take_the_same_checkpoints(tmp_path):
    """Also of a run that went on from another one, whose words count but whose steps do not."""
    run = tmp_path / "run"
    words = {1: 4_000_000, 2: 4_200_000, 5: 5_300_000, 10: 6_000_000, 11: 6_100_000}
    for step, n in words.items():
        make_run(run, KINDS["untied"], words=n, step=step)
        path = run / f"step_{step:07}.pt"
        content = load_checkpoint(path)
        model = load_model(content)
        del content["model"]
        content["history"] = [{"words": 3_900_000, "schedule": "1_CLM", "sha256": "0" * 64}]
        save_checkpoint(path, model, **content)
    export_hf.main([str(run), str(tmp_path / "out"), "--checkpoints"])
    steps = {}
    for folder in (tmp_path / "out").iterdir():
        steps[folder.name] = json.loads((folder / "antlm.json").read_text())["step"]
    last, _, marks, _ = submit.find_checkpoints(run, "2026")
    submitted = {challenge.mark_name(mark): step_of(part.path) for mark, part in marks.items()}
    # at step 5 a step is 280,000 words, so an earlier one has reached 5M
    assert steps == {"chck_4M": 1, "chck_6M": 10, "main": 11}
    assert steps == submitted | {"main": step_of(last.path)}


def test_the_commands_that_push_each_folder_as_a_branch_are_printed(tmp_path, capsys):
    run = tmp_path / "run"
    for step, n in enumerate([1_000_000, 2_000_000, 10_000_000], 1):
        make_run(run, KINDS["untied"], words=n, step=step)
    out = tmp_path / "two words"
    export_hf.main([str(run), str(out), "--checkpoints"])
    lines = capsys.readouterr().out.splitlines()
    assert 'revision="chck_1M"' in "\n".join(lines)
    commands = [line.split() for line in lines if line.startswith("    hf ")]
    assert commands[0] == ["hf", "auth", "login"]
    branches = ["chck_1M", "chck_2M", "chck_10M", "main"]
    for command, branch in zip(commands[1:], branches, strict=True):
        folder = f"'{out / branch}'".split()
        assert command == ["hf", "upload", "USER/NAME", *folder, ".", "--revision", branch]
        assert (out / branch / "config.json").exists()


@pytest.mark.parametrize("head_size", [24, 64])
def test_rotary_angles_are_those_of_hugging_face_to_the_last_bit(head_size):
    hf_config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=2 * head_size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    frequencies = transformers.LlamaModel(hf_config).rotary_emb.inv_freq
    sizes = dict(n_layer=1, n_head=2, n_embd=2 * head_size, n_ff=8)
    model_config = model_module.ModelConfig("babyllama", 300, **sizes)
    embedding = model_module.Transformer(model_config).embedding
    _, (cos, sin) = embedding(torch.zeros(1, 400, dtype=torch.long), 0)
    angles = torch.arange(400.0)[:, None] * frequencies
    assert torch.equal(cos, angles.cos())
    assert torch.equal(sin, angles.sin())


# ------------------------------------------------------------------------------------------- cards


def write_score(run: Path, task: str, accuracy: dict, step: int = 5, limit: int = 0):
    result = {
        "step": step,
        "partial": limit > 0,
        "limit": limit,
        "protocol": "2025",
        "modes": list(accuracy),
        "tasks": {task: {"accuracy": accuracy}},
    }
    (run / f"eval_{task}_{step}.json").write_text(json.dumps(result))


def test_card_has_the_scores_of_its_own_step(tmp_path):
    run = tmp_path / "run"
    make_run(run, KINDS["untied"])
    write_score(run, "blimp", {"causal": 71.26})
    write_score(run, "quick", {"masked": 60.0}, limit=9)
    write_score(run, "blimp", {"causal": 11.1}, step=4)
    export_hf.main([str(run), str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| blimp | causal | 2025 | 71.3 |" in card
    assert "| quick, PARTIAL: the first 9 items of each file | masked | 2025 | 60.0 |" in card
    assert "11.1" not in card


def test_the_card_has_the_newest_of_two_scores(tmp_path):
    run = tmp_path / "run"
    make_run(run, KINDS["untied"])
    write_score(run, "blimp", {"causal": 71.26})
    older = run / "eval_zz_5.json"  # the last by name
    older.write_text((run / "eval_blimp_5.json").read_text().replace("71.26", "50.5"))
    os.utime(older, (1e9, 1e9))
    export_hf.main([str(run), str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "71.3" in card
    assert "50.5" not in card


@pytest.mark.parametrize("weights", ["average", "last"])
def test_averaged_weights_are_exported_and_named_with_their_own_scores(tmp_path, weights):
    run = tmp_path / "run"
    make_run(run, KINDS["untied"])
    (path,) = checkpoints(run)
    content = load_checkpoint(path)
    half = {name: weight / 2 for name, weight in content["model"].items()}
    content["average"] = {"n": 7, "weights": half}
    torch.save(content, path)
    write_score(run, "of_the_last", {"causal": 71.26})
    result = json.loads((run / "eval_of_the_last_5.json").read_text())
    result |= {"weights": "average", "tasks": {"of_the_average": {"accuracy": {"causal": 72.5}}}}
    (run / "eval_of_the_average_5.json").write_text(json.dumps(result))

    export_hf.main([str(run), str(tmp_path / "out"), "--weights", weights])
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("average of the last 7 steps" in card) == (weights == "average")
    assert ("of_the_average" in card) == (weights == "average")
    assert ("of_the_last" in card) == (weights == "last")
    expected = {"average": half, "last": content["model"]}[weights]
    exported_tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported_tensors["lm_head.weight"], expected["head.vocab.weight"])


@pytest.mark.parametrize("kind, pipeline", [("untied", "text-generation"), ("ltg", "fill-mask")])
def test_card_says_what_the_model_is(kind, pipeline):
    yaml = pytest.importorskip("yaml")
    run = exported(kind)
    _, front, body = (run.folder / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "unknown"
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == pipeline
    n_parameters = sum(p.numel() for p in run.model.parameters())
    assert f"{n_parameters:,} parameters" in body
    for fact in ("`4_CLM+16_MLM+4_CLM`", "1,234,567", "corpora/babylm", "None: the run holds no"):
        assert fact in body


@pytest.mark.parametrize("kind", ["untied", "ltg"])
def test_the_command_on_the_card_has_the_settings_of_the_run(kind):
    run = exported(kind)
    card = (run.folder / "README.md").read_text()
    (command,) = [line for line in card.splitlines() if line.startswith("python train.py")]
    settings = asdict(config.load(Settings, command.split()[2:]))
    assert settings == load_checkpoint(checkpoints(run.run)[0])["settings"]


@every_kind
def test_the_card_says_which_mask_is_fine_tuned(kind):
    card = (exported(kind).folder / "README.md").read_text()
    attention = "every token sees the whole text there, as in masked training."
    if KINDS[kind].only_causal:
        attention = "their attention is causal, as all of the training was."
    sentence = f"`AutoModel` and `AutoModelForSequenceClassification`: {attention}"
    assert sentence in " ".join(card.split())
    assert ("they are plain causal Llamas" in card) == (KINDS[kind].backbone == "babyllama")


@every_kind
def test_the_card_writes_a_hidden_word_in_two_ways_that_are_one(kind):
    folder = exported(kind).folder
    hf_tokenizer = load_hf("AutoTokenizer", folder)
    examples = re.findall(r"`([^`]* ?<mask> [^`]*)`", (folder / "README.md").read_text())
    assert len(examples) == 2
    typed, joined = [hf_tokenizer(text)["input_ids"] for text in examples]
    assert typed == joined
    text = examples[0].replace("<mask>", "walks")
    hidden = exported(kind).tokenizer.encode(" walks")
    ids = hf_tokenizer(text)["input_ids"]
    place = typed.index(MASK)
    assert ids == typed[:place] + hidden + typed[place + 1 :]


@pytest.mark.parametrize("kind", ["untied", "ltg"])
def test_the_code_on_the_card_loads_the_model(kind):
    folder = exported(kind).folder
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace(f'"{folder.name}"', repr(str(folder))), names)
    assert names["model"].config.vocab_size == len(names["tokenizer"])


# ----------------------------------------------------------------------------------------- refusals


def refusal(*arguments) -> str:
    """The one line in which an export ends."""
    with pytest.raises(UserError) as error:
        export_hf.main([str(argument) for argument in arguments])
    message = str(error.value)
    assert "\n" not in message
    return message


def test_export_needs_a_whole_run(tmp_path):
    run = tmp_path / "run"
    out = tmp_path / "out"
    run.mkdir()
    assert "run: holds no whole checkpoint" in refusal(run, out)
    assert "holds no whole step_*.pt" in refusal(run, out, "--checkpoints")
    make_run(run, KINDS["untied"], words=None)
    assert f"{run}: exists already" in refusal(run, run)
    assert "does not say how many words" in refusal(run, out, "--checkpoints")
    (run / "eval_x_5.json").write_text("{}")
    assert "eval_x_5.json: not a result file" in refusal(run, tmp_path / "other")
    (run / "tokenizer.json").unlink()
    assert "tokenizer.json: cannot be read" in refusal(run, out)
    assert not out.exists()


@pytest.fixture
def third_run(tmp_path, monkeypatch) -> Path:
    """A run of a backbone that only model.py knows, and that has a longest row."""
    llama = model_module.BACKBONES["babyllama"]
    longest = llama._replace(max_tokens=lambda config: 64)
    monkeypatch.setitem(model_module.BACKBONES, "third", longest)
    make_run(tmp_path / "run", Kind("third", tied=False, boundary="line"))
    return tmp_path / "run"


def test_a_backbone_of_a_fork_is_told_which_tables_it_needs(third_run, tmp_path, monkeypatch):
    tables = {
        "CONFIGS of tools/export_hf.py": export_hf.CONFIGS,
        "NAMES of tools/hf_names.py": export_hf.NAMES,
        "LOADING of tools/model_card.py": export_hf.LOADING,
    }
    out = tmp_path / "out"
    for table in tables.values():
        # until the last table has a row
        for flags in ([], ["--checkpoints"]):
            message = refusal(third_run, out, *flags)
            assert "backbone 'third' cannot be exported yet" in message
            for name in tables:
                assert name in message
            assert not out.exists()
        monkeypatch.setitem(table, "third", table["babyllama"])
    export_hf.main([str(third_run), str(out)])
    assert "third of" in (out / "README.md").read_text()
    tokens = torch.arange(4, 44)[None]
    expected = load_run(str(third_run)).model(tokens, causal=True)
    assert_close(load_hf("AutoModelForCausalLM", out)(tokens).logits, expected)


def test_a_parameter_of_a_fork_is_told_where_to_name_it(tmp_path, monkeypatch):
    make_run(tmp_path / "run", KINDS["untied"])
    monkeypatch.delitem(export_hf.NAMES["babyllama"], "blocks.N.qkv.weight")
    message = refusal(tmp_path / "run", tmp_path / "out")
    assert "blocks.0.qkv.weight of babyllama has no Hugging Face name" in message


@pytest.mark.parametrize("causal", [True, False])
def test_an_objective_of_a_fork_needs_its_row_in_data_alone(tmp_path, monkeypatch, causal):
    """It says whether classes for fine-tuning are causal."""
    make_run(tmp_path / "run", KINDS["untied"])
    change_setting(tmp_path / "run" / "step_0000005.pt", "schedule", "3_WWM")
    assert "'WWM' is not one of CLM" in refusal(tmp_path / "run", tmp_path / "out")
    monkeypatch.setitem(OBJECTIVES, "WWM", OBJECTIVES["CLM" if causal else "MLM"])
    export_hf.main([str(tmp_path / "run"), str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| schedule | `3_WWM` |" in card
    assert ("their attention is causal" in card) == causal
    assert ("every token sees the whole text there" in card) == (not causal)
    classes = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert ("AutoModel" in classes) == (not causal)


@pytest.mark.slow
def test_both_tools_from_the_command_line(tmp_path):
    run = exported("untied")
    commands = [
        ["tools/import_hf.py", run.folder, tmp_path / "back"],
        ["tools/export_hf.py", run.run, run.folder],
    ]
    processes = []
    for command in commands:
        command = [sys.executable, *(str(part) for part in command)]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    out, err = processes[0].communicate(timeout=120)
    assert "step_0000005.pt: written" in out, err
    assert processes[0].returncode == 0
    out, err = processes[1].communicate(timeout=120)
    assert processes[1].returncode == 1
    assert len(err.splitlines()) == 1
    assert "exists already" in err
