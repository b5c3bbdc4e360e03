"""Import a Hugging Face folder as a run, so that eval.py and finetune.py can judge its model.

    python tools/import_hf.py hf/babyllama runs/baseline
    python eval.py runs/baseline --task evaluation_data/blimp_filtered

Reads LlamaForCausalLM and LTG-BERT (of tools/export_hf.py, or of the reference code ltg-bert) with
a byte-level BPE tokenizer. No code in the folder is run. Needs safetensors.

What changes: ids are numbered as prepare.py numbers them (special tokens, bytes, merges, the rest).
A special token or byte that the folder lacks gets the mean of all rows; eval.py gives it no
probability and leaves it out of texts. eval.py also puts the tokens around a text that the folder's
tokenizer puts there, if any; the other programs put a start token in front of it. A newline is
always a token of its own. Not done to a text, though the folder may ask for it: NFC or NFKC
normalization (ASCII is the same in both), a space in front (eval.py --protocol 2024 puts one),
looking for added tokens in it, and merges that make a token which another merge makes.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from hf_names import NEWLINE_TO_START, NO_SPACE_BEFORE_MASK, hf_names, is_tied, split_merges
from safetensors.torch import load_file
from torch import Tensor

from antlm.checkpoint import save_checkpoint
from antlm.files import new_folder, write_json
from antlm.program import clean_exit
from antlm.tokenizer import PATTERN, SPECIAL, Tokenizer, byte_alphabet, tokenizer_json
from config import require
from model import ModelConfig, Transformer
from train import Settings

# GPT-2's, which a ByteLevel without a Split applies; in ours a newline stands alone
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# our special tokens: what a folder may call its own; a token with several parts plays the first
ROLES = {
    "<s>": ["bos_token", "cls_token"],
    "</s>": ["eos_token", "sep_token"],
    "<mask>": ["mask_token"],
    "<pad>": ["pad_token"],
}


def read_json(path: Path, optional: bool = False) -> dict:
    """Return the content of a JSON file; {} where it is optional and not there."""
    if optional and not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------- weights


def read_config(path: Path) -> tuple[ModelConfig, dict]:
    """Return our config for a config.json, and its content.

    Raises UserError for a model that computes something that ours does not.
    """
    # which of the two is it? ltg-bert's own files have the class alone
    hf = read_json(path)
    model_type = hf.get("model_type")
    classes = hf.get("architectures") or []
    names = [model_type or "", *classes]
    is_ltg_bert = any(
        name.lower().startswith(("ltgbert", "ltg_bert", "ltg-bert")) for name in names
    )
    require(
        model_type == "llama" or is_ltg_bert,
        f"{path}: model_type {model_type!r}, architectures {classes}: only Llama and LTG-BERT are "
        "supported (GPT-BERT is another network)",
    )
    sizes = {
        "vocab_size": hf["vocab_size"],
        "n_layer": hf["num_hidden_layers"],
        "n_head": hf["num_attention_heads"],
        "n_embd": hf["hidden_size"],
        "n_ff": hf["intermediate_size"],
    }
    if is_ltg_bert:
        check_config(hf, {"layer_norm_eps": 1e-7}, path)
        config = ModelConfig(
            "ltg_bert",
            **sizes,
            dropout=hf.get("hidden_dropout_prob", 0.1),
            n_bucket=hf["position_bucket_size"],
            max_position=hf.get("max_position") or hf["max_position_embeddings"],
        )
        return config, hf

    # a Llama may have much that ours has not: grouped queries, biases, other angles
    expected = {
        "num_key_value_heads": hf["num_attention_heads"],
        "head_dim": hf["hidden_size"] // hf["num_attention_heads"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_type": "default",
    }
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # of transformers 5, of 4
    check_config(hf | {"rope_type": rope.get("type")} | rope, expected, path)
    config = ModelConfig(
        "babyllama",
        **sizes,
        dropout=hf.get("attention_dropout", 0.0),
        tied=bool(hf.get("tie_word_embeddings")),
    )
    return config, hf


def is_causal(config: ModelConfig, hf: dict) -> bool:
    """Return whether a model knows the causal mask alone, as far as its config.json shows that."""
    if config.backbone == "ltg_bert":
        return bool(hf.get("finetune_causal"))
    # a Llama is causal, unless it brings code for fine-tuning it otherwise
    return "AutoModel" not in (hf.get("auto_map") or {})


def check_config(hf: dict, expected: dict, path: Path):
    """Raise UserError where config.json gives one of these settings another value."""
    for name, value in expected.items():
        given = hf.get(name)
        require(
            given in (None, value), f"{path}: {name} = {given!r} is not supported, only {value!r}"
        )


def read_weights(folder: Path) -> tuple[Path, dict]:
    """Return the file of weights and its tensors in float32; raises UserError."""
    path = folder / "model.safetensors"
    if path.is_file():
        tensors = load_file(path)
    else:
        path = folder / "pytorch_model.bin"
        require(path.is_file(), f"{folder}: holds neither model.safetensors nor {path.name}")
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    return path, {name: tensor.float() for name, tensor in tensors.items()}


def translate_weights(tensors: dict, config: ModelConfig, path: Path) -> dict:
    """Return the state dict of our Transformer; raises UserError unless it takes all tensors."""
    with torch.device("meta"):
        parameters = list(Transformer(config).state_dict())
    weights = {}
    used = set()
    # stack the parts of each parameter
    for name in parameters:
        names = hf_names(config.backbone, name)
        used.update(names)
        if is_tied(config.backbone, name, config.tied):
            weights[name] = weights["embedding.tokens.weight"]
            require(
                torch.equal(tensors.get(names[0], weights[name]), weights[name]),
                f"{path}: {names[0]} is not the embedding, but such a model ties them",
            )
            continue
        for hf_name in names:
            require(
                hf_name in tensors,
                f"{path}: holds no {hf_name}, as a {config.backbone} of this config.json would",
            )
        weights[name] = torch.cat([tensors[hf_name] for hf_name in names])
    # what is left over would be something that ours does not compute
    for hf_name in tensors:
        computed = hf_name.endswith(("position_indices", "rotary_emb.inv_freq"))
        require(
            hf_name in used or computed,
            f"{path}: holds {hf_name}, which a {config.backbone} of this config.json has not",
        )
    return weights


# -------------------------------------------------------------------------------- tokenizer


def find_boundary(content: dict, path: Path) -> str:
    """Return the boundary that goes with a tokenizer.json.

    Raises UserError for a tokenizer that cuts text in another way than ours.
    """
    # the pattern that cuts a text: in a Split in front of the ByteLevel, or within that
    splitter = content.get("pre_tokenizer") or {}
    *splits, level = splitter.get("pretokenizers") or [splitter]
    patterns = [split.get("pattern", {}).get("Regex") for split in splits]
    if level.get("use_regex", True):
        patterns.append(GPT2_PATTERN)
    model_type = content["model"].get("type", "BPE")
    require(
        model_type == "BPE"
        and level.get("type") == "ByteLevel"
        and patterns in ([GPT2_PATTERN], [PATTERN]),
        f"{path}: a {model_type} with a pre_tokenizer {splitter.get('type')} {patterns} is not "
        "supported, only byte-level BPE with GPT-2's split pattern",
    )
    # normalizers: what export_hf.py writes, and of others those that leave ASCII as it is
    normalizer = content.get("normalizer") or {"normalizers": []}
    steps = normalizer.get("normalizers", [normalizer])
    for step in steps:
        known = step in (NEWLINE_TO_START, NO_SPACE_BEFORE_MASK) or step["type"] in ("NFC", "NFKC")
        require(known, f"{path}: a normalizer {step['type']} is not supported")
    return "line" if NEWLINE_TO_START in steps else "document"


def find_template(content: dict, path: Path) -> dict[str, str | None]:
    """Return the tokens that a tokenizer.json puts in front of a text and behind it, or None.

    By the names of ours whose part they play. Raises UserError for more than one on a side.
    """
    processor = content.get("post_processor") or {}
    template = {"<s>": None, "</s>": None}
    for step in processor.get("processors", [processor]):
        before = []
        after = []
        if step.get("type") in ("BertProcessing", "RobertaProcessing"):
            before = [step["cls"][0]]
            after = [step["sep"][0]]
        elif step.get("type") == "TemplateProcessing":
            names = [piece.get("SpecialToken", {}).get("id") for piece in step["single"]]
            place = names.index(None)  # of the text
            before = names[:place]
            after = names[place + 1 :]
        ok = len(before) <= 1 and len(after) <= 1
        require(ok, f"{path}: puts {before} and {after} around a text; one token each is supported")
        if before:
            template["<s>"] = before[0]
        if after:
            template["</s>"] = after[0]
    return template


def find_special(folder: Path, ids: dict[str, int], template: dict) -> dict[str, int]:
    """Return the folder's id for each of our special tokens that it has; no id plays two parts.

    ids: of all the folder's tokens; template: as find_template returns it
    """
    named = read_json(folder / "special_tokens_map.json", optional=True)
    named |= read_json(folder / "tokenizer_config.json", optional=True)
    special = {}
    for token, roles in ROLES.items():
        for candidate in (template.get(token), *[named.get(role) for role in roles], token):
            if isinstance(candidate, dict):
                candidate = candidate["content"]
            if candidate in ids and ids[candidate] not in special.values():
                special[token] = ids[candidate]
                break
    return special


def translate_tokenizer(folder: Path, vocab_size: int, boundary: str | None):
    """Return our tokenizer.json for the folder's, its ids in our order, boundary and template.

    boundary: what export_hf.py noted, or None
    The ids of the folder stand in the order of ours, None where it lacks a token of ours; at the
    end stand the ids that are no token of ours. Raises UserError.
    """
    path = folder / "tokenizer.json"
    content = read_json(path)
    likely_boundary = find_boundary(content, path)
    template = find_template(content, path)

    # of two merges that make the same token the first counts
    first = {}
    for left, right in split_merges(content["model"]["merges"]):
        first.setdefault(left + right, (left, right))
    merges = list(first.values())
    vocab = content["model"]["vocab"]
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    special = find_special(folder, vocab | added, template)

    # export_hf.py has called the newline <s> where it opened texts
    newline = byte_alphabet()[ord("\n")]
    if boundary == "none":
        special["<s>"], vocab[newline] = vocab[newline], special["<s>"]

    # the folder's id for each of our tokens
    renumbered = tokenizer_json(merges)
    tokens = list(renumbered["model"]["vocab"])
    old_ids = [special.get(token) if token in SPECIAL else vocab.get(token) for token in tokens]
    n_fixed = len(SPECIAL) + 256
    known = {number for number in old_ids if number is not None}
    require(
        None not in old_ids[n_fixed:] and max(known) < vocab_size,
        f"{path}: vocabulary and merges do not fit together, or not to the {vocab_size} rows of "
        "config.json",
    )

    # say what had to be added, and keep the rows that no token of ours has
    absent = [token for token in SPECIAL if token not in special]
    n_bytes = old_ids[len(SPECIAL) : n_fixed].count(None)
    if n_bytes:
        absent.append(f"{n_bytes} of the 256 bytes")
    if absent:
        print(f"note: the folder has no {', '.join(absent)}; added with the mean of all rows")
    rest = sorted(set(range(vocab_size)) - known)
    return renumbered, old_ids + rest, boundary or likely_boundary, template


def reorder_rows(rows: Tensor, old_ids: list) -> Tensor:
    """Return the rows with these ids, one a token; where an id is None, the mean of all rows."""
    mean = rows.mean(0, keepdim=True)
    index = [len(rows) if number is None else number for number in old_ids]
    return torch.cat((rows, mean))[torch.tensor(index)]


# ----------------------------------------------------------------------------------- a run


def import_folder(folder: Path, out: Path) -> Path:
    """Write a run folder and return its checkpoint; raises UserError."""
    # read and check everything before the first file is written
    config, hf = read_config(folder / "config.json")
    path, tensors = read_weights(folder)
    weights = translate_weights(tensors, config, path)
    exported = read_json(folder / "antlm.json", optional=True)  # what export_hf.py noted
    tokenizer, old_ids, boundary, template = translate_tokenizer(
        folder, config.vocab_size, exported.get("boundary")
    )

    # number the vocabulary as ours
    sizes = asdict(config) | {"vocab_size": len(old_ids)}
    for name in ("embedding.tokens.weight", "head.vocab.weight", "head.vocab.bias"):
        if name in weights:
            weights[name] = reorder_rows(weights[name], old_ids)
    model = Transformer(ModelConfig(**sizes))
    model.load_state_dict(weights)

    # settings of the run that was exported, or as near as a foreign model comes to one
    settings = asdict(Settings()) | sizes
    del settings["vocab_size"]
    settings |= {
        "corpus": "",
        "out_dir": str(out),
        "schedule": "1_CLM" if is_causal(config, hf) else "1_MLM",
        "block_size": hf.get("max_position_embeddings", 512),
    }
    settings |= exported.get("settings", {})
    content = {
        "step": exported.get("step", 1),
        "words": exported.get("words"),
        "settings": settings,
        "history": exported.get("history", []),
        "optimizer": [],
        "boundary": boundary,
        # by these eval.py asks the model as its own tokenizer would
        "template": {"start": template["<s>"] is not None, "end": template["</s>"] is not None},
        "absent": [number for number, old_id in enumerate(old_ids) if old_id is None],
        "tokens_sha256": exported.get("tokens_sha256"),
    }
    if not exported:
        content["imported_from"] = folder.resolve().name

    name = f"step_{content['step']:07}.pt"
    with new_folder(out) as unfinished:
        unfinished.mkdir(parents=True)
        write_json(unfinished / "settings.json", settings)
        write_json(unfinished / "tokenizer.json", tokenizer)
        content["tokenizer_sha256"] = Tokenizer(unfinished / "tokenizer.json").sha256
        save_checkpoint(unfinished / name, model, **content)
    return out / name


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with config.json, tokenizer.json and weights")
    parser.add_argument("run", type=Path, help="run folder to make")
    args = parser.parse_args(arguments)
    require(not args.run.exists(), f"{args.run}: exists already; remove it or choose another name")
    checkpoint = import_folder(args.folder, args.run)
    print(f"{checkpoint}: written")


if __name__ == "__main__":
    with clean_exit():
        main()
