"""Export to Hugging Face and back, against transformers (4.41 or newer). Alone: python -m pytest tests/test_hf.py"""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # where transformers copies the code that it is to trust
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors_torch = pytest.importorskip("safetensors.torch")
yaml = pytest.importorskip("yaml")

import eval as evaluation  # noqa: E402
import prepare
from antlm.checkpoint import checkpoints, load_checkpoint, load_run, save_checkpoint  # noqa: E402
from antlm.tokenizer import END, MASK, PAD, START, Tokenizer, save_tokenizer, train_bpe  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from sample import generate  # noqa: E402
from train import Settings  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import export_hf  # noqa: E402
import import_hf  # noqa: E402

DEV = ROOT.parent / "shared" / "data" / "babylm_dev"
TEXT = """The cats sleep in the garden and the dog sees them.
Zoë said the naïve café owner sleeps in Ærøskøbing.
Who have those men revealed they helped? The girl who sees the cats sleeps.

Schöne Grüße aus Köln, said the owner of the garden."""
ODD = ["", " ", "\n", "a\n\nb", " \n ", "x\r\ny\r\n",
       "\ttab\u00a0nbsp\u2009thin\u3000wide\u2028line\u2029par\x85nel", "\0a\0", "e\u0301a\u0308\u0323",
       "👩‍👩‍👧‍👦 👍🏽🇳🇴", "שלום עולם, مرحبا", "𝔘𝔫𝔦 \U0010ffff", "it's  I'LL   they'd'd", "  two  spaces  ",
       "中文字 한국어", "1234 12,5 ½ Ⅷ",
       "\ufeffbom", "a\u200db\u200ec", "Speaker: hello\nSpeaker:  hi", "ﬁ ﬂ ǆ", "é\n🐟\n", "<s", "s>", "< s >"]
# name: backbone, tied, boundary
KINDS = {"untied": ("babyllama", False, "line"), "tied": ("babyllama", True, "document"),
         "ltg": ("ltg_bert", False, "line"), "newline": ("ltg_bert", False, "none")}
each = pytest.mark.parametrize("kind", KINDS)
llamas = pytest.mark.parametrize("kind", ["untied", "tied"])
both_modes = pytest.mark.parametrize("causal", [True, False], ids=["causal", "open"])


def make_run(run: Path, backbone: str, tied: bool, boundary: str, words: int | None = 1_234_567, step: int = 5):
    """A run folder with one checkpoint of random weights, large enough that every position matters to every other."""
    run.mkdir(exist_ok=True)
    (run / "text.txt").write_text(TEXT, encoding="utf-8")
    save_tokenizer(run / "tokenizer.json", train_bpe(prepare.count_pieces([run / "text.txt"]), 80))
    tokenizer = Tokenizer(run / "tokenizer.json")
    sizes = dict(backbone=backbone, n_layer=3, n_head=2, n_embd=32, n_ff=48, tied=tied, dropout=0.1, n_bucket=8,
                 max_position=16)
    torch.manual_seed(7)
    padding = 12 * tied  # rows that no token has
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size + padding, **sizes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    save_checkpoint(run / f"step_{step:07}.pt", model, step=step, optimizer=[], boundary=boundary,
                    settings=asdict(Settings(**sizes, block_size=64)), tokenizer_sha256=tokenizer.sha256,
                    tokens_sha256="0" * 64, **({} if words is None else {"words": words}))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> model, tokenizer, boundary, run folder, exported folder."""
    root, known = tmp_path_factory.mktemp("hf"), {}

    def get(kind: str):
        if kind not in known:
            run, out = root / kind, root / f"{kind}_out"
            model = make_run(run, *KINDS[kind])
            export_hf.main([str(run), str(out)])
            known[kind] = model, Tokenizer(run / "tokenizer.json"), KINDS[kind][2], run, out
        return known[kind]
    return get


def load(auto: str, folder: Path, **settings):
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **settings).eval()


def some_tokens(model: Transformer, rows: int = 3, T: int = 40) -> torch.Tensor:  # longer than max_position
    return torch.randint(model.config.vocab_size, (rows, T), generator=torch.Generator().manual_seed(1))


def assert_same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------------------------- exported models


@torch.no_grad()
@llamas
def test_babyllama_gives_the_same_logits_as_a_plain_llama(made, kind):
    model, _, _, _, out = made(kind)
    assert not list(out.glob("*.py"))  # no code of ours
    llama, tokens = load("AutoModelForCausalLM", out), some_tokens(model)
    assert type(llama) is transformers.LlamaForCausalLM and llama.dtype == torch.float32
    assert_same(llama(tokens).logits, model(tokens, causal=True))
    T = tokens.size(1)
    assert_same(llama(tokens, attention_mask=torch.zeros(3, 1, T, T)).logits, model(tokens, causal=False))
    assert (llama.lm_head.weight.data_ptr() == llama.model.embed_tokens.weight.data_ptr()) == (kind == "tied")
    assert llama.config.max_position_embeddings >= 512


@torch.no_grad()
@pytest.mark.parametrize("auto", ["AutoModelForMaskedLM", "AutoModelForCausalLM"])
def test_ltg_bert_gives_the_same_logits_and_asks_who_sees_what(made, auto):
    """forward, then config.json, then the class decide whether attention is causal."""
    model, _, _, _, out = made("ltg")
    theirs, tokens = load(auto, out), some_tokens(model)
    logits = {causal: model(tokens, causal=causal) for causal in (True, False)}
    assert (logits[True] - logits[False]).abs().max() > 1
    by_class = auto == "AutoModelForCausalLM"
    theirs.tie_weights()  # the 2024 pipeline does
    assert_same(theirs(tokens).logits, logits[by_class])
    assert_same(load(auto, out, causal=not by_class)(tokens).logits, logits[not by_class])
    for causal in (True, False):
        assert_same(load(auto, out, causal=not causal)(tokens, causal=causal).logits, logits[causal])


@torch.no_grad()
@both_modes
def test_ltg_bert_does_not_see_pads_on_either_side(made, causal):
    model, _, _, _, out = made("ltg")
    theirs, lengths, tokens = load("AutoModelForMaskedLM", out), torch.tensor([40, 7, 1]), some_tokens(made("ltg")[0])
    expected = model(tokens, causal=causal, lengths=lengths)
    mask = (torch.arange(40) < lengths[:, None]).long()
    right = theirs(tokens, mask, causal=causal).logits
    square = theirs(tokens, mask[:, None].expand(3, 40, 40), causal=causal).logits
    shifted = torch.stack([row.roll(40 - n) for row, n in zip(tokens, lengths.tolist())])
    left = theirs(shifted, mask.flip(1), causal=causal).logits
    assert left.isfinite().all()
    for i, n in enumerate(lengths.tolist()):
        assert_same(right[i, :n], expected[i, :n])
        assert_same(square[i, :n], expected[i, :n])
        assert_same(left[i, 40 - n:], expected[i, :n])


@torch.no_grad()
@each
def test_losses_agree(made, kind):
    """Hugging Face shifts the labels of a causal model itself and divides by the count of those left."""
    model, _, _, _, out = made(kind)
    tokens = some_tokens(model)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.4, -100)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    loss, count = model(tokens, shifted, causal=True)
    assert_same(load("AutoModelForCausalLM", out)(tokens, labels=labels).loss, loss / count)
    if kind in ("ltg", "newline"):
        loss, count = model(tokens, labels, causal=False)
        assert_same(load("AutoModelForMaskedLM", out)(tokens, labels=labels).loss, loss / count)


@each
def test_greedy_generation_equals_ours(made, kind):
    model, tokenizer, boundary, _, out = made(kind)
    theirs, prompt = load("AutoModelForCausalLM", out), torch.tensor([tokenizer.encode_text("The cats", boundary)])
    ours = generate(model, prompt, 20, block_size=64, temperature=0, stop=prompt[0, 0].item())
    got = theirs.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.size(1):].tolist()
    assert len(ours) > 3
    assert theirs.generation_config.eos_token_id == prompt[0, 0]  # a text ends where the next one would start
    assert got == ours + [prompt[0, 0].item()] * (len(ours) < 20)
    two = torch.cat((F.pad(prompt, (2, 0), value=PAD), F.pad(prompt, (2, 0), value=PAD)))  # padded on the left
    mask = (torch.arange(two.size(1)) >= 2).long().expand_as(two)
    batch = theirs.generate(two, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert batch[0, two.size(1):].tolist() == got and torch.equal(batch[0], batch[1])


@torch.no_grad()
def test_base_model_returns_what_the_pipelines_read(made):
    model, _, _, _, out = made("ltg")
    tokens, base, mlm = some_tokens(model), load("AutoModel", out), load("AutoModelForMaskedLM", out)
    got = base(tokens, output_hidden_states=True)
    assert len(got.hidden_states) == 4 and torch.equal(got.hidden_states[-1], got.last_hidden_state)
    assert got[0] is got.last_hidden_state
    assert_same(mlm.classifier(got.last_hidden_state), model(tokens, causal=False))
    assert base.config.hidden_size == 32 and base.config.max_position_embeddings >= 512
    assert_same(base(tokens, return_dict=False)[0], got.last_hidden_state, 0)
    assert mlm(tokens).hidden_states is None
    with pytest.raises(ValueError, match="output_attentions"):
        base(tokens, output_attentions=True)
    with pytest.raises(ValueError, match=r"\(3, 1, 40, 40\)"):
        base(tokens, torch.zeros(3, 1, 40, 40))


@pytest.mark.parametrize("kind, causal", [("ltg", False), ("ltg", True), ("untied", True)])
def test_sequence_classification_trains(made, kind, causal):
    """Gradient checkpointing changes no gradient; pads change no logit; the loss falls."""
    _, tokenizer, _, _, out = made(kind)
    options = dict(attention_dropout=0.0) if kind == "untied" else dict(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, causal=causal)
    torch.manual_seed(3)
    model = load("AutoModelForSequenceClassification", out, num_labels=3, **options)
    hf = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    texts, labels = ["The cats sleep.", "Who sees the dog in the garden?", "Köln"], torch.tensor([0, 1, 2])
    batch = hf(texts, ["Yes."] * 3, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        alone = torch.cat([model(**hf(text, "Yes.", return_tensors="pt")).logits for text in texts])
        assert_same(model(**batch).logits, alone)
        if causal:  # without a mask the last token that is no pad is found by pad_token_id
            assert_same(model(batch["input_ids"]).logits, alone)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(10):
        optimizer.step()
        optimizer.zero_grad()
        last = model(**batch, labels=labels).loss
        last.backward()
    assert last < loss


@torch.no_grad()
@pytest.mark.parametrize("kind, auto", [("untied", "AutoModelForCausalLM"), ("tied", "AutoModelForCausalLM"),
                                        ("ltg", "AutoModelForMaskedLM"), ("ltg", "AutoModelForCausalLM")])
def test_saved_again_by_transformers_it_is_the_same_and_stays_tied(made, tmp_path, kind, auto):
    model, _, boundary, run, out = made(kind)
    tokens, first = some_tokens(model), load(auto, out)
    hf = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    first.save_pretrained(tmp_path / "again")
    hf.save_pretrained(tmp_path / "again")
    again = load(auto, tmp_path / "again")
    assert torch.equal(again(tokens).logits, first(tokens).logits)
    for m in (first, again):
        same = m.get_output_embeddings().weight.data_ptr() == m.get_input_embeddings().weight.data_ptr()
        assert same == (kind != "untied")
    hf_again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert hf_again(TEXT)["input_ids"] == hf(TEXT)["input_ids"]
    import_hf.main([str(tmp_path / "again"), str(tmp_path / "run")])
    _, content, back, tokenizer = load_run(str(tmp_path / "run"), "cpu")
    assert_equal_weights(back, model)
    ours = Tokenizer(run / "tokenizer.json")
    assert tokenizer.encode_text(TEXT, content["boundary"]) == ours.encode_text(TEXT, boundary)


# ------------------------------------------------------------------------------------------- exported tokenizers


def check_encodings(hf, tokenizer: Tokenizer, boundary: str, texts: list[str]):
    """Ids, character offsets, and where a target starts that begins in the middle of a text, as in EWoK."""
    batch, options, firsts = hf(texts, return_offsets_mapping=True), [], []
    for text, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"]):
        assert ids == tokenizer.encode_text(text, boundary), repr(text)
        ends = [end for _, end in offsets]
        assert tuple(offsets[0]) == (0, 0) and ends == sorted(ends) and ends[-1] == len(text), repr(text)
        raw, at = text.encode(), 0
        for i, (start, end) in zip(ids[1:], offsets[1:]):
            piece = b"\n" if boundary == "line" and i == START else tokenizer.bpe.decode_single_token_bytes(i)
            assert raw[at:at + len(piece)] == piece
            try:
                assert text[start:end] == piece.decode(), repr(text)
            except UnicodeDecodeError:  # a part of a character has the whole one's place
                before, after = raw[:at].decode(errors="ignore"), raw[:at + len(piece)].decode(errors="replace")
                assert (start, end) == (len(before), len(after)), repr(text)
            at += len(piece)
        assert at == len(raw)
        for cut in {len(text) // 3, len(text) // 2} - {0}:
            options.append((text, cut))
            firsts.append(next(i for i, end in enumerate(ends) if end > cut))
    assert evaluation.encode(options, tokenizer, boundary, "2025", "masked")[1].tolist() == firsts


@each
def test_tokenizer_gives_our_ids_with_character_offsets(made, kind):
    _, tokenizer, boundary, _, out = made(kind)
    hf = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert hf.is_fast and len(hf) == tokenizer.vocab_size
    texts = [*ODD, TEXT, *(a + "\n" + b for a in ODD for b in ODD)]
    check_encodings(hf, tokenizer, boundary, texts)
    for text in texts:
        if boundary == "document" or "\n" not in text:
            assert hf.decode(hf(text, add_special_tokens=False)["input_ids"]) == text
    start = tokenizer.encode_text("", boundary)[0]
    assert (hf.bos_token_id, hf.eos_token_id, hf.cls_token_id) == (start,) * 3
    assert (hf.pad_token_id, hf.sep_token_id, hf.mask_token_id) == (PAD, END, MASK)
    a, b = tokenizer.encode_text("The cats", boundary), tokenizer.encode_text("sleep.", boundary)
    assert hf("The cats", "sleep.")["input_ids"] == a + b
    masked = [*tokenizer.encode_text("The ", boundary), MASK, *tokenizer.encode(" sleeps")]
    assert hf("The <mask> sleeps")["input_ids"] == masked
    config = json.loads((out / "tokenizer.json").read_text("utf-8"))
    assert all(isinstance(merge, str) for merge in config["model"]["merges"])  # what transformers 4.44 reads


@pytest.mark.skipif(not DEV.is_dir(), reason="no BabyLM text in ../shared/data/babylm_dev")
@pytest.mark.parametrize("boundary", ["line", "document"])
def test_tokenizer_gives_our_ids_on_real_lines(tmp_path, boundary):
    """10,000 lines of six sources, every seventh joined to the next, with a vocabulary learnt from them."""
    lines = []
    for path in sorted(DEV.glob("*.dev")):
        with open(path, encoding="utf-8", newline="") as f:
            lines += [line.rstrip("\n") for line, _ in zip(f, range(1700))]
    lines = lines[:10_000]
    assert len(lines) == 10_000
    (tmp_path / "text.txt").write_text("\n".join(lines[::4]), encoding="utf-8", newline="")
    save_tokenizer(tmp_path / "tokenizer.json", train_bpe(prepare.count_pieces([tmp_path / "text.txt"]), 4000))
    (tmp_path / "out").mkdir()
    export_hf.export_tokenizer(tmp_path / "tokenizer.json", tmp_path / "out", boundary, START, 512)
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    texts = [f"{a}\n{b}" if n % 7 == 0 else a for n, (a, b) in enumerate(zip(lines, lines[1:] + lines[:1]))]
    check_encodings(hf, Tokenizer(tmp_path / "tokenizer.json"), boundary, texts)


# ------------------------------------------------------------------------------------------------- there and back


def assert_equal_weights(a: Transformer, b: Transformer):
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


@each
def test_export_and_import_change_nothing(made, tmp_path, kind):
    model, tokenizer, boundary, run, out = made(kind)
    import_hf.main([str(out), str(tmp_path / "back")])
    path, content, back, again = load_run(str(tmp_path / "back"), "cpu")
    original = load_checkpoint(checkpoints(run)[0])
    assert_equal_weights(back, model)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    for key in ("step", "words", "settings", "boundary", "tokenizer_sha256", "tokens_sha256"):
        assert content[key] == original[key], key
    export_hf.main([str(path), str(tmp_path / "second")])
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (out / name).read_bytes()


def train_theirs(folder: Path, split: bool = False):
    """A byte-level BPE tokenizer as others train theirs: GPT-2's pattern, no mask, not all bytes, other special ids."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    hf = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    hf.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), level]) if split else level
    hf.decoder, hf.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    hf.train_from_iterator([LINES], trainers.BpeTrainer(vocab_size=700, min_frequency=2, show_progress=False,
                                                        special_tokens=["<unk>", "[BEGIN]", "[FINISH]"]))
    hf.add_special_tokens(["[FILL]"])  # at the end of the vocabulary
    hf.save(str(folder / "tokenizer.json"))
    names = dict(bos_token="[BEGIN]", eos_token={"content": "[FINISH]", "lstrip": False}, pad_token="[FILL]",
                 unk_token="<unk>")
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return hf


def make_lines(n: int) -> str:
    rng = np.random.default_rng(1)
    words = "the cat's dogs they'll  see 12 1999 Zoë café 🐟 (garden) sleeps, sleeping who? I'M \t revealed".split(" ")
    return "\n".join(" ".join(rng.choice(words, rng.integers(0, 12))) for _ in range(n))


LINES = make_lines(1000)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["untied", "tied", "split", "bin"])
def test_a_foreign_llama_keeps_its_ids_and_logits(tmp_path, capsys, kind):
    folder = tmp_path / "theirs"
    folder.mkdir()
    hf = train_theirs(folder, split=kind == "split")
    vocab = hf.get_vocab()
    torch.manual_seed(4)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(vocab) + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        rms_norm_eps=1e-6, tie_word_embeddings=kind == "tied", max_position_embeddings=256)).eval()
    for p in llama.parameters():
        torch.nn.init.normal_(p, std=0.4)
    llama.save_pretrained(folder)
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        half = {name: p.half() for name, p in llama.state_dict().items()}
        torch.save(half, folder / "pytorch_model.bin")
        llama.load_state_dict(half)
    import_hf.main([str(folder), str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "the folder has no <mask>, " in said and " of the 256 bytes; added with the mean" in said
    added = 1 + int(said.split("<mask>, ")[1].split()[0])
    _, content, model, tokenizer = load_run(str(tmp_path / "run"), "cpu")
    assert content["boundary"] == "document" and content["settings"]["block_size"] == 256

    ours = json.loads((tmp_path / "run" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    theirs = {"<s>": "[BEGIN]", "</s>": "[FINISH]", "<pad>": "[FILL]"}
    to_ours = {vocab[theirs.get(name, name)]: i for name, i in ours.items() if theirs.get(name, name) in vocab}
    lines = LINES.split("\n")
    assert len(lines) == 1000
    for line in [*lines, LINES[:500]]:
        assert tokenizer.encode(line) == [to_ours[i] for i in hf.encode(line, add_special_tokens=False).ids], line
    known = sorted(to_ours)
    assert len(known) == len(vocab) - 1  # all but <unk>, whose row goes to the end
    tokens = torch.tensor(known)[torch.randint(len(known), (3, 30))]
    translate = torch.tensor([to_ours.get(i, -1) for i in range(max(known) + 1)])
    expected, got = llama(tokens).logits, model(translate[tokens], causal=True)
    assert_same(got[..., translate[known]], expected[..., known])
    for ours, theirs in ((model.embedding.tokens, llama.model.embed_tokens), (model.head.vocab, llama.lm_head)):
        assert_same(ours.weight[MASK], theirs.weight.mean(0))
    # Rows that were added take next to nothing from the others, rows that no token has are still there.
    normal = expected.logsumexp(-1)
    assert got.size(-1) == expected.size(-1) + added
    assert ((got.logsumexp(-1) - normal) >= -1e-4).all()
    assert (got.logsumexp(-1) - normal).max() <= np.log1p(added / expected.size(-1)) + 1e-4


@torch.no_grad()
def test_ltg_bert_with_the_names_of_the_reference(tmp_path):
    with np.load(Path(__file__).parent / "ltg_bert_tiny.npz") as file:
        reference = {key: torch.from_numpy(file[key]) for key in file.files}
    D, n_ff, H, n_layer, V, M, b = reference["config"].tolist()
    config = dict(hidden_size=D, intermediate_size=n_ff, num_attention_heads=H, num_hidden_layers=n_layer, vocab_size=V,
                  max_position_embeddings=M, position_bucket_size=b, layer_norm_eps=1e-7, hidden_dropout_prob=0.1,
                  attention_probs_dropout_prob=0.1, architectures=["LtgBertForMaskedLM"])
    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *(chr(i) for i in range(ord("A"), ord("A") + V - 4))]
    ids = {name: i for i, name in enumerate(names[::-1])}  # special tokens last
    folder = tmp_path / "theirs"
    folder.mkdir()
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"id": ids[name], "content": name} for name in names[:4]], "normalizer": None,
        "pre_tokenizer": level, "model": {"type": "BPE", "vocab": ids, "merges": []}}))
    special = dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    params = {key.removeprefix("param/"): x.contiguous() for key, x in reference.items() if key.startswith("param/")}
    torch.save(params, folder / "pytorch_model.bin")
    import_hf.main([str(folder), str(tmp_path / "run")])
    _, content, model, tokenizer = load_run(str(tmp_path / "run"), "cpu")
    to_ours = torch.tensor([*(tokenizer.encode(name)[0] for name in names[:3:-1]), MASK, END, START, PAD])
    for mode, lengths in (("causal", None), ("bidirectional", None), ("padded", reference["lengths"])):
        got = model(to_ours[reference["input_ids"]], causal=mode == "causal", lengths=lengths)[..., to_ours]
        assert_same(got, reference[f"{mode}/logits"].float(), 2e-5)
    assert content["settings"]["schedule"] == "1_MLM"


def test_the_pipelines_first_tokens_of_a_foreign_run_are_scored(tmp_path):
    """eval.py reads an imported run as its own."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    size = len(train_theirs(folder).get_vocab())
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    )).save_pretrained(folder)
    import_hf.main([str(folder), str(tmp_path / "run")])
    (tmp_path / "pairs").mkdir()
    pair = dict(sentence_good="The cat sleeps.", sentence_bad="The cat sleep.", linguistics_term="agreement")
    (tmp_path / "pairs" / "one.jsonl").write_text(json.dumps(pair) + "\n")
    evaluation.main([str(tmp_path / "run"), "--task", str(tmp_path / "pairs"), "--mode", "causal", "masked"])
    assert list((tmp_path / "run").glob("eval_pairs_1*.json"))


# --------------------------------------------------------------------------------------------------- refusals


def edit(path: Path, **changes):
    content = json.loads(path.read_text("utf-8"))
    for key, value in changes.items():
        *outer, last = key.split("__")
        at = content
        for name in outer:
            at = at[name]
        at[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("name, changes, expected", [
    ("config.json", dict(num_key_value_heads=1), "num_key_value_heads = 1 is not supported, only 2"),
    ("config.json", dict(head_dim=8), "head_dim = 8"),
    ("config.json", dict(rms_norm_eps=1e-5), "rms_norm_eps = 1e-05"),
    ("config.json", dict(attention_bias=True), "attention_bias = True"),
    ("config.json", dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
    ("config.json", dict(rope_theta=5e5, rope_parameters=None), "rope_theta = 500000.0"),
    ("config.json", dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "type = 'lin"),
    ("config.json", dict(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type = 'dyn"),
    ("config.json", dict(model_type="gpt2"), "model_type 'gpt2'"),
    ("config.json", dict(model_type="", architectures=["GPTBertForMaskedLM"]), "only Llama and LTG-BERT"),
    ("config.json", dict(vocab_size="many"), "sizes are missing or impossible"),
    ("config.json", dict(num_hidden_layers=2), "holds model.layers.2.input_layernorm.weight, which"),
    ("config.json", dict(num_hidden_layers=4), "holds no model.layers.3.input_layernorm.weight"),
    ("config.json", dict(intermediate_size=40), "config.json says (80, 32)"),
    ("tokenizer.json", dict(model__type="WordPiece"), "a model of type WordPiece"),
    ("tokenizer.json", dict(model__type="Unigram"), "a model of type Unigram"),
    ("tokenizer.json", dict(model__byte_fallback=True), "byte_fallback = True"),
    ("tokenizer.json", dict(model__merges=[["a", "zz"]]), "vocabulary and merges do not fit together"),
    ("tokenizer.json", dict(normalizer={"type": "Lowercase"}), "a normalizer of type Lowercase"),
    ("tokenizer.json", dict(pre_tokenizer={"type": "Metaspace"}), "a pre_tokenizer of Metaspace"),
    ("tokenizer.json", dict(pre_tokenizer=None), "a pre_tokenizer of None"),
    ("tokenizer.json", dict(pre_tokenizer__pretokenizers=[
        {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|\D+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]), r"pre_tokenizer of \p{N}{1,3}|\D+"),
    ("tokenizer.json", dict(pre_tokenizer__pretokenizers=[
        {"type": "Digits"}, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]), "of Digits"),
    ("antlm.json", dict(settings=None), "antlm.json: not written by export_hf.py"),
])
def test_import_refuses_what_it_cannot_express(made, tmp_path, name, changes, expected):
    shutil.copytree(made("untied")[4], tmp_path / "theirs")
    edit(tmp_path / "theirs" / name, **changes)
    argv = [str(tmp_path / "theirs"), str(tmp_path / "run")]
    assert_one_line(import_hf.main, argv, f"import_hf.py: {tmp_path}/theirs/", expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]  # nothing half-made is left


def assert_one_line(main, argv: list[str], *expected: str):
    with pytest.raises(SystemExit) as error:
        main(argv)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in expected), message


def test_import_names_differences_that_it_lets_pass(made, tmp_path, capsys):
    """BabyLlama's own tokenizer has both."""
    shutil.copytree(made("tied")[4], tmp_path / "theirs")
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    path = tmp_path / "theirs" / "tokenizer.json"
    vocab = json.loads(path.read_text("utf-8"))["model"]["vocab"]
    vocab = {token: i for token, i in vocab.items() if i < 260} | {"th": 260, "Ġth": 339, "Ġt": 300, "ĊĊ": 301}
    edit(path, normalizer={"type": "NFKC"}, pre_tokenizer=level, model__vocab=vocab,
         added_tokens=[{"id": 7, "content": "$$", "special": False}],
         model__merges=["Ġ t", "Ġt h", "t h", "Ġ th", "Ċ Ċ"])
    import_hf.main([str(tmp_path / "theirs"), str(tmp_path / "run")])
    said = capsys.readouterr().out
    for note in ("add_prefix_space", "normalizer NFKC", "1 added tokens", "1 merges make a token that another one",
                 "1 tokens hold a newline and more"):
        assert f"note: {note}" in said
    model = made("tied")[0]
    _, _, back, tokenizer = load_run(str(tmp_path / "run"), "cpu")
    assert len(tokenizer.encode("\n\n")) == 2
    merges = json.loads((tmp_path / "run" / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    assert merges == ["Ġ t", "Ġt h", "t h", "Ċ Ċ"]
    for text, theirs in ((" t", 300), (" th", 339), ("th", 260)):
        (ours,) = tokenizer.encode(text)
        assert torch.equal(back.embedding.tokens.weight[ours], model.embedding.tokens.weight[theirs])
    assert sorted(back.embedding.tokens.weight[:, 0].tolist()) == sorted(model.embedding.tokens.weight[:, 0].tolist())


def test_import_takes_no_common_token_for_a_special_one(tmp_path, capsys):
    """config.json may name ids that are mere defaults of its class."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    size = len(train_theirs(folder).get_vocab())
    (folder / "tokenizer_config.json").unlink()
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=2, eos_token_id=50)).save_pretrained(folder)
    import_hf.main([str(folder), str(tmp_path / "run")])
    assert "the folder has no <pad>, </s>, <mask>, " in capsys.readouterr().out


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_import_of_a_broken_folder_ends_in_one_line(made, tmp_path, monkeypatch):
    out, here = made("ltg")[4], tmp_path / "theirs"

    def refused(*expected):
        assert_one_line(import_hf.main, [str(here), str(tmp_path / "run")], "import_hf.py: ", *expected)

    refused("theirs/config.json: cannot be read")
    shutil.copytree(out, here)
    whole = (here / "model.safetensors").read_bytes()
    (here / "model.safetensors").write_bytes(whole[:1000])
    refused("theirs/model.safetensors: damaged")
    (here / "model.safetensors").unlink()
    refused("neither model.safetensors nor pytorch_model.bin")
    torch.save({"embedding": Malicious(tmp_path / "code was run")}, here / "pytorch_model.bin")
    refused("theirs/pytorch_model.bin: damaged, or not plain tensors")
    assert not (tmp_path / "code was run").exists()
    (here / "pytorch_model.bin").unlink()
    (here / "model.safetensors").write_bytes(whole)
    (here / "config.json").write_text("{")
    refused("theirs/config.json: not a JSON object")
    shutil.copy(out / "config.json", here)
    tensors = safetensors_torch.load_file(here / "model.safetensors")
    tensors["classifier.nonlinearity.5.weight"] = tensors["embedding.word_embedding.weight"] + 1
    safetensors_torch.save_file(tensors, here / "model.safetensors")
    refused("classifier.nonlinearity.5.weight is not the embedding")
    (tmp_path / "run").mkdir()
    refused("run: exists already")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "run").rmdir()
    refused("needs safetensors.torch; pip install safetensors")


def test_export_of_bad_input_ends_in_one_line(made, tmp_path, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"

    def refused(*expected, to=out, flags=()):
        assert_one_line(export_hf.main, [str(run), str(to), *flags], "export_hf.py: ", *expected)

    run.mkdir()
    refused("run: holds no whole checkpoint")
    refused("holds no whole step_*.pt", flags=["--checkpoints"])
    make_run(run, *KINDS["untied"])
    refused(f"{run}: exists already", to=run)
    refused(f"{tmp_path}/no is no folder", to=tmp_path / "no" / "out")
    refused("tokenizer.json is no folder", to=run / "tokenizer.json" / "out")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused("needs safetensors.torch; pip install safetensors")
    monkeypatch.undo()
    tokenizer = (run / "tokenizer.json").read_bytes()
    (run / "tokenizer.json").write_bytes(tokenizer + b" ")
    refused("tokenizer.json: not the one")
    (run / "tokenizer.json").unlink()
    refused("tokenizer.json: cannot be read")
    (run / "tokenizer.json").write_bytes(tokenizer)
    (run / "eval_x_5.json").write_text("{}")
    refused("eval_x_5.json: not a result file")
    (run / "eval_x_5.json").unlink()
    (run / "step_0000005.pt").write_bytes(b"?")
    refused("holds no whole checkpoint")  # and on stderr: skipped step_0000005.pt
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_both_tools_from_the_command_line(made, tmp_path):
    _, _, _, run, out = made("untied")

    def start(*args):
        return subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    good, bad = start("tools/import_hf.py", out, tmp_path / "back"), start("tools/export_hf.py", run, out)
    said, errors = good.communicate(timeout=120)
    assert good.returncode == 0 and "step_0000005.pt: written" in said, errors
    said, errors = bad.communicate(timeout=120)
    assert bad.returncode == 1 and len(errors.splitlines()) == 1 and "exists already" in errors


# ----------------------------------------------------------------------------------------- checkpoints and card


def test_one_folder_for_each_mark_of_the_rules(tmp_path, capsys):
    """No checkpoint stands for two marks; a mark without one is named; main is the last one."""
    run = tmp_path / "run"
    words = 400_000, 1_000_000, 1_300_000, 2_000_001, 5_100_000, 10_000_000, 10_500_000, 20_000_000, 24_000_000
    for step, n in enumerate(words, 1):
        make_run(run, *KINDS["untied"], words=n, step=step)
    (run / "step_0000010.pt").write_bytes(b"cut short")
    export_hf.main([str(run), str(tmp_path / "out"), "--checkpoints"])
    said, errors = capsys.readouterr()
    assert len(errors.splitlines()) == 1 and "step_0000010.pt: damaged" in errors
    made = (tmp_path / "out").iterdir()
    folders = {path.name: json.loads((path / "antlm.json").read_text())["words"] for path in made}
    assert folders == {"chck_1M": 1_000_000, "chck_2M": 2_000_001, "chck_5M": 5_100_000, "chck_10M": 10_000_000,
                       "chck_20M": 20_000_000, "main": 24_000_000}
    assert "no checkpoint of its own: chck_3M, chck_4M, chck_6M, chck_7M, chck_8M, chck_9M\n" in said
    assert "24,000,000" in (tmp_path / "out" / "main" / "README.md").read_text()
    assert load("AutoModelForCausalLM", tmp_path / "out" / "chck_2M").config.vocab_size == 340


def test_a_mark_far_behind_is_not_passed_off(tmp_path, capsys):
    """Saved every 500 of 1000 steps, the next one after 10M words would come at most 9M later."""
    run = tmp_path / "run"
    make_run(run, *KINDS["untied"], words=18_000_000, step=1000)
    make_run(run, *KINDS["untied"], words=39_900_000, step=1500)  # more than the 500 steps behind 30M
    path = run / "step_0001500.pt"
    content = load_checkpoint(path)
    model = load_run(str(path), "cpu")[2]
    content["settings"]["save_every"] = 300
    save_checkpoint(path, model, **{k: v for k, v in content.items() if k not in ("model", "config")})
    export_hf.main([str(run), str(tmp_path / "out"), "--checkpoints"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["chck_10M", "main"]
    assert "chck_20M, chck_30M\n" in capsys.readouterr().out


def test_checkpoints_without_words_are_refused(tmp_path):
    make_run(tmp_path / "run", *KINDS["untied"], words=None)
    argv = [str(tmp_path / "run"), str(tmp_path / "out"), "--checkpoints"]
    assert_one_line(export_hf.main, argv, "step_0000005.pt", "babylm_rules")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["untied", "ltg"])
def test_card_says_where_the_model_comes_from(tmp_path, kind):
    run = tmp_path / "run"
    model = make_run(run, *KINDS[kind], words=None)
    (run / "metrics.jsonl").write_text("{}\n")
    assert_one_line(export_hf.main, [str(run), str(tmp_path / "out")], "metrics.jsonl: damaged")
    (run / "metrics.jsonl").write_text('{"step": 4, "words": 7}\n{"step": 5, "words": 98765}\n{"step": 5, "wor')
    def result(name, task, accuracy, step=5, limit=0):
        (run / f"eval_{name}.json").write_text(json.dumps(dict(
            step=step, partial=limit > 0, limit=limit, protocol="2025", modes=[*accuracy],
            tasks={task: {"accuracy": accuracy}})))

    result("blimp_5", "blimp", {"causal": 71.26})
    result("quick_5", "quick", {"masked": 60.0}, limit=9)
    result("blimp_4", "old", {"causal": 11.1}, step=4)
    export_hf.main([str(run), str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "unknown" and front["library_name"] == "transformers"
    assert front["pipeline_tag"] == ("text-generation" if kind == "untied" else "fill-mask")
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in body
    assert "`4_CLM+16_MLM+4_CLM`" in body and "98,765" in body and "corpora/babylm" in body
    assert "| blimp | causal | 2025 | 71.3 |" in body
    assert "| quick, PARTIAL: the first 9 items of each file | masked | 2025 | 60.0 |" in body
    assert "11.1" not in body  # scores of another step
    line = next(line for line in body.splitlines() if line.startswith("python train.py"))
    import config
    flags = line.split()[2:]
    assert asdict(config.load(Settings, flags)) == load_checkpoint(checkpoints(run)[0])["settings"]
    code = body.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3
    names = {}
    exec(code.replace('"out"', repr(str(tmp_path / "out"))), names)
    assert names["model"].config.vocab_size == len(names["tokenizer"]) == 340
