"""Hugging Face folders as runs: ours and back, foreign Llamas and LTG-BERTs, and what is refused.

    python -m pytest tests/test_import_hf.py                  # about 25 s, 15 of them imports

Needs transformers (4.41 or newer), tokenizers and safetensors.
"""

import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

# hf_runs sets variables that transformers reads when it is imported
from hf_runs import KINDS, TEXT, assert_close, exported, load_hf, transformers  # isort: skip
import export_hf
import import_hf
from conftest import train_here
from safetensors.torch import load_file, save_file
from small_challenge import write_lines
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

import eval as evaluation
import prepare
from antlm.checkpoint import checkpoints, load_checkpoint, load_run
from antlm.tokenizer import END, MASK, PAD, START
from config import UserError
from model import Transformer

pytestmark = pytest.mark.slow  # transformers takes seconds to import

every_kind = pytest.mark.parametrize("kind", KINDS)


def run_import(folder: Path, out: Path):
    import_hf.main([str(folder), str(out)])
    return load_run(str(out))


def assert_equal_weights(first: Transformer, second: Transformer):
    torch.testing.assert_close(dict(first.state_dict()), dict(second.state_dict()), rtol=0, atol=0)


# --------------------------------------------------------------------------------- our own exports


@every_kind
def test_export_and_import_change_nothing(tmp_path, kind):
    original = exported(kind)
    back = run_import(original.folder, tmp_path / "back")
    assert_equal_weights(back.model, original.model)
    tokenizer = (original.run / "tokenizer.json").read_bytes()
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == tokenizer
    content = load_checkpoint(checkpoints(original.run)[0])
    for key in ("step", "words", "settings", "boundary", "tokenizer_sha256", "tokens_sha256"):
        assert back.content[key] == content[key], key
    assert "imported_from" not in back.content

    export_hf.main([str(back.path), str(tmp_path / "second")])
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        first = (original.folder / name).read_bytes()
        assert (tmp_path / "second" / name).read_bytes() == first, name


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModelForMaskedLM"])
@pytest.mark.parametrize("kind", ["untied", "tied", "ltg", "newline"])
def test_an_export_that_transformers_has_saved_again_comes_back(tmp_path, kind, auto_class):
    """That drops antlm.json; the rest still shows what a newline was, and which mask it knows."""
    original = exported(kind)
    again = tmp_path / "again"
    load_hf(auto_class, original.folder).save_pretrained(again)
    load_hf("AutoTokenizer", original.folder).save_pretrained(again)
    back = run_import(again, tmp_path / "run")
    assert back.schedule == ("1_CLM" if KINDS[kind].only_causal else "1_MLM")
    if kind == "newline":
        return  # its start token plays two parts, of which nothing tells but antlm.json
    assert_equal_weights(back.model, original.model)
    ids = original.tokenizer.encode_text(TEXT, original.boundary)
    assert back.tokenizer.encode_text(TEXT, back.boundary) == ids


@pytest.mark.parametrize("kind, schedule", [("untied", "1_CLM"), ("ltg", "1_MLM")])
def test_an_export_of_an_earlier_version_comes_back(tmp_path, kind, schedule):
    """Masks did not take the space in front, and BabyLlama came without code."""
    original = exported(kind)
    old = tmp_path / "old"
    shutil.copytree(original.folder, old)
    (old / "antlm.json").unlink()
    newline = {"type": "Replace", "pattern": {"String": "\n"}, "content": "<s>"}
    edit(old / "tokenizer.json", {"normalizer": newline})
    hf_config = json.loads((old / "config.json").read_text("utf-8"))
    for name in ("finetune_causal", "tokenizer_class", "auto_map"):
        hf_config.pop(name, None)
    (old / "config.json").write_text(json.dumps(hf_config))
    back = run_import(old, tmp_path / "run")
    assert back.boundary == "line"
    assert back.schedule == schedule
    assert_equal_weights(back.model, original.model)
    tokenizer = (original.run / "tokenizer.json").read_bytes()
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == tokenizer


# ---------------------------------------------------------------------------------- foreign models


def make_lines(n_lines: int) -> list[str]:
    generator = np.random.default_rng(1)
    words = (
        "the cat's dogs they'll  see 12 1999 Zoë café 🐟 (garden) sleeps, sleeping who? I'M \t a"
    )
    words = words.split(" ")
    return [" ".join(generator.choice(words, generator.integers(0, 12))) for _ in range(n_lines)]


LINES = make_lines(1000)


def train_foreign_tokenizer(folder: Path, split: bool = False) -> HFTokenizer:
    """Train a tokenizer as others do: GPT-2's pattern, no mask, not all bytes, other special ids.

    split: write the pattern down as a Split of its own, not in the ByteLevel
    """
    tokenizer = HFTokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    tokenizer.pre_tokenizer = level
    if split:
        pattern = Regex(import_hf.GPT2_PATTERN)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(pattern, "isolated"), level]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        min_frequency=2,
        show_progress=False,
        special_tokens=["<unk>", "[BEGIN]", "[FINISH]"],
    )
    tokenizer.train_from_iterator(["\n".join(LINES)], trainer)
    tokenizer.add_special_tokens(["[FILL]"])  # at the end of the vocabulary
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "[BEGIN]",
        "eos_token": {"content": "[FINISH]", "lstrip": False},
        "pad_token": "[FILL]",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def save_foreign_llama(folder: Path, vocab_size: int, **settings):
    """Save a small Llama with large random weights, and return it."""
    torch.manual_seed(4)
    llama_config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        **settings,
    )
    llama = transformers.LlamaForCausalLM(llama_config).eval()
    for p in llama.parameters():
        torch.nn.init.normal_(p, std=0.4)
    llama.save_pretrained(folder)
    return llama


@torch.no_grad()
@pytest.mark.parametrize("kind", ["untied", "tied", "split", "bin"])
def test_a_foreign_llama_keeps_its_ids_and_logits(tmp_path, capsys, kind):
    folder = tmp_path / "foreign"
    folder.mkdir()
    hf_tokenizer = train_foreign_tokenizer(folder, split=kind == "split")
    vocab = hf_tokenizer.get_vocab()
    llama = save_foreign_llama(folder, len(vocab) + 5, tie_word_embeddings=kind == "tied")
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        half = {name: p.half() for name, p in llama.state_dict().items()}
        torch.save(half, folder / "pytorch_model.bin")
        llama.load_state_dict(half)
    run = run_import(folder, tmp_path / "run")
    note = capsys.readouterr().out
    assert "the folder has no <mask>, " in note
    assert " of the 256 bytes; added with the mean of all rows" in note
    n_added = 1 + int(note.split("<mask>, ")[1].split()[0])
    assert run.boundary == "document"
    assert run.block_size == 256
    assert run.schedule == "1_CLM"
    assert run.content["imported_from"] == "foreign"

    # our id for each of theirs
    vocabulary = json.loads((tmp_path / "run" / "tokenizer.json").read_text("utf-8"))["model"][
        "vocab"
    ]
    special = {"<s>": "[BEGIN]", "</s>": "[FINISH]", "<pad>": "[FILL]"}
    translate = torch.full((len(vocab),), -1)
    for token, number in vocabulary.items():
        token = special.get(token, token)
        if token in vocab:
            translate[vocab[token]] = number
    # in theirs spaces and several newlines can be one token, in ours a newline stands alone
    solid = [line for line in LINES if line and line == line.strip()]
    for line in [*LINES, "\n".join(solid)]:
        ids = hf_tokenizer.encode(line, add_special_tokens=False).ids
        assert run.tokenizer.encode(line) == translate[ids].tolist(), line

    # logits of the tokens that both have
    known = (translate >= 0).nonzero().flatten()
    assert len(known) == len(vocab) - 1  # all but <unk>, whose row goes to the end
    tokens = known[torch.randint(len(known), (3, 30))]
    expected = llama(tokens).logits
    logits = run.model(translate[tokens], causal=True)
    assert_close(logits[..., translate[known]], expected[..., known])

    # rows that were added take next to nothing from the others, rows without a token are kept
    mean = llama.model.embed_tokens.weight.mean(0)
    assert_close(run.model.embedding.tokens.weight[MASK], mean)
    assert_close(run.model.head.vocab.weight[MASK], llama.lm_head.weight.mean(0))
    n_rows = expected.size(-1)
    assert logits.size(-1) == n_rows + n_added
    taken = logits.logsumexp(-1) - expected.logsumexp(-1)
    assert (taken >= -1e-4).all()
    assert taken.max() <= np.log1p(n_added / n_rows) + 1e-4


@torch.no_grad()
def test_ltg_bert_with_the_names_of_the_reference(tmp_path):
    """Weights and logits of the reference code, whose special tokens come last here."""
    with np.load(Path(__file__).parent / "ltg_bert_tiny.npz") as file:
        reference = {key: torch.from_numpy(file[key]) for key in file.files}
    D, n_ff, H, n_layer, V, max_position, n_bucket = reference["config"].tolist()
    hf_config = {
        "hidden_size": D,
        "intermediate_size": n_ff,
        "num_attention_heads": H,
        "num_hidden_layers": n_layer,
        "vocab_size": V,
        "max_position_embeddings": max_position,
        "position_bucket_size": n_bucket,
        "layer_norm_eps": 1e-7,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "architectures": ["LtgBertForMaskedLM"],
    }
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(ord("A") + number) for number in range(V - 4)]
    names = letters[::-1] + special[::-1]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = {
        "added_tokens": [{"id": vocab[name], "content": name} for name in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    roles = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
    }
    weights = {}
    for key, tensor in reference.items():
        if key.startswith("param/"):
            weights[key.removeprefix("param/")] = tensor.contiguous()
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    torch.save(weights, folder / "pytorch_model.bin")

    run = run_import(folder, tmp_path / "run")
    to_ours = [run.tokenizer.encode(name)[0] for name in letters[::-1]]
    to_ours = torch.tensor([*to_ours, MASK, END, START, PAD])
    tokens = to_ours[reference["input_ids"]]
    for mode in ("causal", "bidirectional", "padded"):
        lengths = reference["lengths"] if mode == "padded" else None
        logits = run.model(tokens, causal=mode == "causal", lengths=lengths)[..., to_ours]
        assert_close(logits, reference[f"{mode}/logits"].float(), 2e-5)
    assert run.schedule == "1_MLM"


# [tokens in front, tokens behind] of a text, by the template of a tokenizer
TEMPLATES = {"nothing": None, "a start": "[BEGIN] $A", "start and end": "[BEGIN] $A [FINISH]"}


def put_template(folder: Path, template: str | None):
    tokenizer = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    if template is not None:
        special = [(name, tokenizer.token_to_id(name)) for name in ("[BEGIN]", "[FINISH]")]
        processor = processors.TemplateProcessing(single=template, special_tokens=special)
        tokenizer.post_processor = processor
    tokenizer.save(str(folder / "tokenizer.json"))


def save_foreign_ltg_bert(folder: Path, vocab_size: int):
    """Save a small LTG-BERT with large random weights and its code, and no word of ours."""
    shutil.copy(exported("ltg").folder / "modeling_ltgbert.py", folder)
    content = json.loads((exported("ltg").folder / "config.json").read_text())
    content["vocab_size"] = vocab_size
    (folder / "config.json").write_text(json.dumps(content))
    torch.manual_seed(5)
    hf_config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForMaskedLM.from_config(hf_config, trust_remote_code=True)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)


@torch.no_grad()
def official_score(model, hf_tokenizer, text: str, start: int, mode: str) -> float:
    """Score a text's target as the pipelines of 2025 and 2026 do, by the folder's own tokenizer.

    start: character at which the target begins
    """
    encoded = hf_tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    ids = encoded["input_ids"]
    targets = [i for i, (_, end) in enumerate(encoded["offset_mapping"][0].tolist()) if end > start]
    total = 0.0
    for i in targets:
        if i == 0 and mode != "masked":
            continue  # nothing predicts the first token
        asked = ids
        if mode != "causal":
            asked = ids.clone()
            asked[0, i] = hf_tokenizer.mask_token_id
        log_probs = model(asked).logits[0].log_softmax(-1)
        place = i if mode == "masked" else i - 1
        total += log_probs[place, ids[0, i]].item()
    return total


SENTENCES = ["the cat's dogs they'll see", "the garden sleeps, who?", "sleeping 12 dogs"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("backbone", ["babyllama", "ltg_bert"])
def test_a_foreign_folder_is_scored_as_its_own_tokenizer_and_model_do(tmp_path, backbone, template):
    """Also though it lacks bytes, and has special tokens of other names."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    hf_tokenizer = train_foreign_tokenizer(folder)
    put_template(folder, TEMPLATES[template])
    # of the two forms that files have, transformers reads here the plain one
    edit(folder / "tokenizer_config.json", {"eos_token": "[FINISH]", "mask_token": "<unk>"})
    modes = {"causal": "AutoModelForCausalLM"}
    if backbone == "babyllama":
        save_foreign_llama(folder, hf_tokenizer.get_vocab_size())
    else:
        save_foreign_ltg_bert(folder, hf_tokenizer.get_vocab_size())
        modes |= dict.fromkeys(("masked", "mntp"), "AutoModelForMaskedLM")
    run_import(folder, tmp_path / "run")

    # whole texts, and targets after a context that two of them share
    pairs = [{"sentence_good": text, "sentence_bad": f"{text} dogs"} for text in SENTENCES]
    write_lines(tmp_path / "tasks" / "pairs" / "a.jsonl", pairs)
    piqa = []
    for number, text in enumerate(SENTENCES):
        solutions = {"solution0": "the dogs", "solution1": "I'M who"}
        piqa.append({"prompt": text, **solutions, "label": 0, "example_id": f"{number}"})
    write_lines(tmp_path / "tasks" / "piqa" / "eng_latn.jsonl", piqa)
    out = tmp_path / "out.json"
    task = ["--task", str(tmp_path / "tasks"), "--device", "cpu", "--out", str(out)]
    evaluation.main([str(tmp_path / "run"), *task, "--mode", *modes])

    tasks = json.loads(out.read_text())["tasks"]
    tokenizer = load_hf("AutoTokenizer", folder)
    for mode, auto_class in modes.items():
        model = load_hf(auto_class, folder)
        scores = tasks["pairs"]["subsets"]["a"]["scores"][mode]
        for pair, scores_of_pair in zip(pairs, scores, strict=True):
            for text, score in zip(pair.values(), scores_of_pair, strict=True):
                expected = official_score(model, tokenizer, text, 0, mode)
                assert score == pytest.approx(expected, abs=1e-4), (mode, text)
        scores = tasks["piqa"]["subsets"]["global_piqa_nonparallel"]["scores"][mode]
        for record, (score, _) in zip(piqa, scores, strict=True):
            text = f"{record['prompt']} the dogs"
            start = len(record["prompt"])
            expected = official_score(model, tokenizer, text, start, mode)
            n_targets = len(tokenizer(" the dogs", add_special_tokens=False)["input_ids"])
            assert score == pytest.approx(expected / n_targets, abs=1e-4), (mode, text)


@pytest.mark.parametrize("side", ["[BEGIN] [BEGIN] $A", "$A [FINISH] [FINISH]"])
def test_two_tokens_on_one_side_of_a_text_are_refused(tmp_path, side):
    train_foreign_tokenizer(tmp_path)
    put_template(tmp_path, side)
    save_foreign_llama(tmp_path, 700)
    assert "around a text; one token each is supported" in refusal(tmp_path, tmp_path / "run")


def test_a_foreign_run_can_be_scored(tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    vocab_size = len(train_foreign_tokenizer(folder).get_vocab())
    save_foreign_llama(folder, vocab_size)
    run_import(folder, tmp_path / "run")
    task = tmp_path / "pairs"
    task.mkdir()
    pair = {
        "sentence_good": "The cat sleeps.",
        "sentence_bad": "The cat sleep.",
        "linguistics_term": "agreement",
    }
    (task / "one.jsonl").write_text(json.dumps(pair) + "\n")
    evaluation.main([str(tmp_path / "run"), "--task", str(task), "--mode", "causal", "masked"])
    assert list((tmp_path / "run").glob("eval_pairs_1*.json"))


def test_a_foreign_run_exports_with_a_card_that_names_its_source(tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    save_foreign_llama(folder, len(train_foreign_tokenizer(folder).get_vocab()))
    run_import(folder, tmp_path / "run")
    export_hf.main([str(tmp_path / "run"), str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "imported into AntLM" in card
    assert "comes from `foreign`" in card
    assert "| words seen, with repetition | unknown |" in card


def settings_of(model: Transformer) -> list[str]:
    """Return the flags of train.py that give a model the sizes of this one."""
    sizes = asdict(model.config)
    del sizes["vocab_size"]
    sizes["tied"] = str(sizes["tied"]).lower()
    return [f"--{name}={value}" for name, value in sizes.items()]


@every_kind
def test_a_run_starts_from_an_imported_model_and_the_way_back_keeps_its_history(tmp_path, kind):
    imported = run_import(exported(kind).folder, tmp_path / "imported")
    (tmp_path / "text.train").write_text(TEXT * 9, encoding="utf-8")
    (tmp_path / "text.dev").write_text(TEXT, encoding="utf-8")
    prepare.prepare(
        [str(tmp_path / "text.train")],
        [str(tmp_path / "text.dev")],
        str(tmp_path / "corpus"),
        boundary=imported.boundary,
        tokenizer=str(tmp_path / "imported" / "tokenizer.json"),
    )
    args = [*settings_of(imported.model), "--block_size=16", "--batch_rows=8", "--schedule=1_MLM"]
    args += [f"--corpus={tmp_path / 'corpus'}", f"--out_dir={tmp_path / 'run'}"]
    train_here(*args, f"--init_from={tmp_path / 'imported'}")

    run = load_run(str(tmp_path / "run"))
    words = imported.content["words"]
    assert run.content["words"] > words
    assert [entry["schedule"] for entry in run.history] == [imported.schedule]
    assert [entry["words"] for entry in run.history] == [words]
    export_hf.main([str(tmp_path / "run"), str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`{imported.schedule}` ({words:,} words" in card
    assert run_import(tmp_path / "out", tmp_path / "back").history == run.history


# ----------------------------------------------------------------------------- changed and refused


def edit(path: Path, changes: dict):
    """Change fields of a JSON file; "model.type" is the field `type` of the field `model`."""
    content = json.loads(path.read_text("utf-8"))
    for key, value in changes.items():
        *outer, last = key.split(".")
        place = content
        for name in outer:
            place = place[name]
        place[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def refusal(folder: Path, run: Path) -> str:
    """The one line in which an import ends, with nothing left behind."""
    with pytest.raises(UserError) as error:
        import_hf.main([str(folder), str(run)])
    message = str(error.value)
    assert "\n" not in message
    assert not run.exists()
    return message


def test_what_a_foreign_tokenizer_does_beside_is_left_out(tmp_path):
    """BabyLlama's own tokenizer has a normalizer, a space in front, and merges that come twice."""
    folder = tmp_path / "foreign"
    original = exported("tied")
    shutil.copytree(original.folder, folder)
    path = folder / "tokenizer.json"
    vocab = json.loads(path.read_text("utf-8"))["model"]["vocab"]
    vocab = {token: number for token, number in vocab.items() if number < 260}
    vocab |= {"th": 260, "Ġth": 339, "Ġt": 300, "ĊĊ": 301}
    changes = {
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        "added_tokens": [{"id": 7, "content": "$$", "special": False}],
        "model.vocab": vocab,
        "model.merges": ["Ġ t", "Ġt h", "t h", "Ġ th", "Ċ Ċ"],
    }
    edit(path, changes)
    run = run_import(folder, tmp_path / "run")
    assert len(run.tokenizer.encode("\n\n")) == 2
    merges = json.loads((tmp_path / "run" / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    assert merges == ["Ġ t", "Ġt h", "t h", "Ċ Ċ"]
    rows = run.model.embedding.tokens.weight
    original_rows = original.model.embedding.tokens.weight
    for text, number in ((" t", 300), (" th", 339), ("th", 260)):
        (token,) = run.tokenizer.encode(text)
        assert torch.equal(rows[token], original_rows[number])
    assert rows[:, 0].sort().values.equal(original_rows[:, 0].sort().values)


CONFIG_CHANGES = [
    ({"num_key_value_heads": 1}, "num_key_value_heads = 1 is not supported, only 2"),
    ({"head_dim": 8}, "head_dim = 8"),
    ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05"),
    ({"attention_bias": True}, "attention_bias = True"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"rope_theta": 5e5, "rope_parameters": None}, "rope_theta = 500000.0"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
    (
        {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type = 'dynamic'",
    ),
    ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    ({"model_type": None, "architectures": ["GPTBertForMaskedLM"]}, "only Llama and LTG-BERT"),
    ({"num_hidden_layers": 2}, "holds model.layers.2.input_layernorm.weight, which"),
    ({"num_hidden_layers": 4}, "holds no model.layers.3.input_layernorm.weight"),
    ({"vocab_size": 300}, "not to the 300 rows of config.json"),
]


@pytest.mark.parametrize("changes, expected", CONFIG_CHANGES)
def test_import_refuses_models_that_compute_something_else(tmp_path, changes, expected):
    folder = tmp_path / "foreign"
    shutil.copytree(exported("untied").folder, folder)
    edit(folder / "config.json", changes)
    assert expected in refusal(folder, tmp_path / "run")


DIGITS = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}|\D+"}, "behavior": "Isolated"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
TOKENIZER_CHANGES = [
    ({"model.type": "WordPiece"}, "a WordPiece with"),
    ({"model.type": "Unigram"}, "a Unigram with"),
    ({"model.merges": [["a", "zz"]]}, "vocabulary and merges do not fit together"),
    ({"normalizer": {"type": "Lowercase"}}, "a normalizer Lowercase"),
    (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}},
        "a normalizer Strip",
    ),
    (
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}},
        "a normalizer Replace",
    ),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "a pre_tokenizer Metaspace"),
    ({"pre_tokenizer": None}, "a pre_tokenizer None"),
    ({"pre_tokenizer.pretokenizers": [DIGITS, BYTE_LEVEL]}, "byte-level BPE with GPT-2's split"),
    (
        {"pre_tokenizer.pretokenizers": [{"type": "Digits"}, BYTE_LEVEL | {"use_regex": True}]},
        "byte-level BPE with GPT-2's split",
    ),
]


@pytest.mark.parametrize("changes, expected", TOKENIZER_CHANGES)
def test_import_refuses_tokenizers_that_cut_otherwise(tmp_path, changes, expected):
    folder = tmp_path / "foreign"
    shutil.copytree(exported("untied").folder, folder)
    edit(folder / "tokenizer.json", changes)
    assert expected in refusal(folder, tmp_path / "run")


def test_import_names_what_is_missing(tmp_path):
    folder = tmp_path / "foreign"
    run = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="foreign/config.json"):
        import_hf.main([str(folder), str(run)])
    shutil.copytree(exported("ltg").folder, folder)
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor pytorch_model.bin" in refusal(folder, run)
    run.mkdir()
    with pytest.raises(UserError, match="run: exists already"):
        import_hf.main([str(folder), str(run)])


def test_import_refuses_an_output_matrix_that_is_not_the_embedding(tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(exported("ltg").folder, folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["embedding.word_embedding.weight"]
    tensors["classifier.nonlinearity.5.weight"] = embedding + 1
    save_file(tensors, folder / "model.safetensors")
    message = refusal(folder, tmp_path / "run")
    assert "classifier.nonlinearity.5.weight is not the embedding" in message


class Malicious:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_import_runs_no_code_of_a_weights_file(tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(exported("ltg").folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"embedding": Malicious(tmp_path / "code_ran")}, folder / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        import_hf.main([str(folder), str(tmp_path / "run")])
    assert not (tmp_path / "code_ran").exists()
