"""A Hugging Face folder as a run, so that eval.py and finetune.py can score a published model.

    python tools/import_hf.py hf/babyllama runs/theirs && python eval.py runs/theirs --task blimp_filtered

Reads LlamaForCausalLM and LTG-BERT (of tools/export_hf.py, or with the parameter names of the ltg-bert reference) with
a byte-level BPE tokenizer. Its ids are renumbered as prepare.py numbers them: special tokens, bytes, merges, the rest. A
special token or byte that the folder lacks gets the mean of all rows, which takes at most 1 / vocabulary from the
probability of any token (Jensen). As for our own runs, a start token stands in front of every text, whatever the
folder's template adds. Needs safetensors.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from export_hf import new_folder, their_names

from antlm.checkpoint import load_model, save_checkpoint
from antlm.files import write_json
from antlm.tokenizer import PATTERN, SPECIAL, Tokenizer, byte_alphabet, tokenizer_json
from config import UserError
from model import ModelConfig, Transformer
from train import Settings

# GPT-2's, and that of a ByteLevel without a Split; ours differs from it only in that a newline stands alone.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ROLES = {  # our special tokens and what a folder calls its own; one token that plays several parts goes to the first
    "<s>": ["bos_token", "cls_token"], "</s>": ["eos_token", "sep_token"], "<mask>": ["mask_token"],
    "<pad>": ["pad_token"]}


def read_json(path: Path, optional: bool = False) -> dict:
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); name a folder of transformers") from None
    except ValueError as e:
        raise UserError(f"{path}: not a JSON object in UTF-8 ({e})") from None


def model_config(c: dict, path: Path) -> ModelConfig:
    """Sizes of the model of a config.json; raises UserError where it computes something that ours does not."""
    kind, classes = c.get("model_type") or "", c.get("architectures") or []
    ltg = any(name.lower().replace("-", "").replace("_", "").startswith("ltgbert") for name in (kind, *classes))
    if kind != "llama" and not ltg:
        raise UserError(f"{path}: model_type {kind!r}, architectures {classes}: only Llama and LTG-BERT are "
                            "supported (GPT-BERT is another network)")
    try:
        D, H = c["hidden_size"], c["num_attention_heads"]
        sizes = dict(vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"], n_head=H, n_embd=D,
                     n_ff=c["intermediate_size"])
        if ltg:
            config = ModelConfig("ltg_bert", **sizes, dropout=c.get("hidden_dropout_prob", 0.1),
                                 n_bucket=c["position_bucket_size"],
                                 max_position=c.get("max_position") or c["max_position_embeddings"])
            expected = {"layer_norm_eps": 1e-7}
        else:
            config = ModelConfig("babyllama", **sizes, dropout=c.get("attention_dropout", 0.0),
                                 tied=bool(c.get("tie_word_embeddings")))
            expected = dict(num_key_value_heads=H, head_dim=D // H, hidden_act="silu", attention_bias=False,
                            mlp_bias=False, rms_norm_eps=1e-6, rope_theta=10000.0, rope_type="default")
    except (LookupError, TypeError, ValueError, ArithmeticError) as e:
        raise UserError(f"{path}: sizes are missing or impossible ({type(e).__name__}: {e})") from None
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # of transformers 5, of 4
    for name, value in expected.items():
        found = rope.get(name, rope.get("type") if name == "rope_type" else c.get(name))
        if found not in (None, value):
            raise UserError(f"{path}: {name} = {found!r} is not supported, only {value!r}")
    return config


def read_tensors(folder: Path) -> tuple[Path, dict]:
    """The folder's weights file and its tensors; no code in it is run."""
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise UserError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin, in one piece")
    from safetensors.torch import load_file
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True) if path.suffix == ".bin" else load_file(path)
        return path, {name: tensor.float() for name, tensor in tensors.items()}
    except Exception as e:  # both libraries raise whatever a damaged file makes them run into
        raise UserError(f"{path}: damaged, or not plain tensors ({str(e).strip().splitlines()[0][:150]})") from None


def translate_weights(path: Path, tensors: dict, c: ModelConfig) -> dict:
    """State dict of our Transformer; raises UserError unless the file holds exactly its parameters."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(c).state_dict().items()}
    ours = {}
    for name, shape in shapes.items():
        theirs = their_names(c.backbone, name)
        if name == "head.vocab.weight" and (c.tied or c.backbone == "ltg_bert"):
            ours[name] = ours["embedding.tokens.weight"]
            if not torch.equal(tensors.pop(theirs[0], ours[name]), ours[name]):
                raise UserError(f"{path}: {theirs[0]} is not the embedding, but such a model ties them")
            continue
        if missing := [x for x in theirs if x not in tensors]:
            raise UserError(f"{path}: holds no {missing[0]}, as a {c.backbone} of this config.json would")
        ours[name] = torch.cat([tensors.pop(x) for x in theirs])
        if ours[name].shape != shape:
            raise UserError(f"{path}: {' + '.join(theirs)} is {tuple(ours[name].shape)}, config.json says "
                                f"{tuple(shape)}")
    if left := [name for name in tensors if not name.endswith(("position_indices", "rotary_emb.inv_freq"))]:  # computed
        raise UserError(f"{path}: holds {left[0]}, which a {c.backbone} of this config.json does not have")
    return ours


def check_tokenizer(content: dict, path: Path) -> str:
    """Boundary that goes with a tokenizer.json; raises UserError for what ours cannot do, says what it does not."""
    def refuse(what: str):
        raise UserError(f"{path}: {what} is not supported, only byte-level BPE with GPT-2's split pattern")

    model, pre, normalizer = (content.get(name) or {} for name in ("model", "pre_tokenizer", "normalizer"))
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        refuse(f"a model of type {model.get('type')}")
    for name in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            refuse(f"{name} = {model[name]!r}")
    *splits, level = pre.get("pretokenizers") or [pre]
    rules = [(x.get("pattern", {}).get("Regex"), x.get("behavior"), bool(x.get("invert"))) for x in splits]
    rules += [(GPT2, "Isolated", False)] * level.get("use_regex", True)
    if level.get("type") != "ByteLevel" or rules not in [[(pattern, "Isolated", False)] for pattern in (GPT2, PATTERN)]:
        found = [x["pattern"].get("Regex") if "pattern" in x else x.get("type") for x in (*splits, level)]
        refuse(f"a pre_tokenizer of {' and '.join(map(str, found))}")
    if level.get("add_prefix_space"):
        print("note: add_prefix_space: this tokenizer puts a space in front of a text, ours does not, so a text's "
              "first word is other tokens; eval.py --protocol 2024 puts one in front of texts without a context")
    newline = normalizer.get("type") == "Replace" and normalizer.get("pattern") == {"String": "\n"}  # our own export
    if normalizer.get("type") in ("NFC", "NFKC"):
        print(f"note: normalizer {normalizer['type']}: ours has none; texts in this form, as all ASCII is, give the "
              "same tokens")
    elif normalizer and not newline:
        refuse(f"a normalizer of type {normalizer.get('type')}")
    return "line" if newline else "document"


def special_ids(folder: Path, ids: dict[str, int], added: dict[str, int], config: dict) -> dict[str, int]:
    """Id in the folder's vocabulary of each of our special tokens that it has; no id plays two parts."""
    named = read_json(folder / "special_tokens_map.json", True) | read_json(folder / "tokenizer_config.json", True)
    found = {}
    for ours, roles in ROLES.items():
        texts = [text.get("content") if isinstance(text, dict) else text for text in map(named.get, roles)]
        by_id = [i for i in (config.get(f"{role}_id") for role in roles) if i in added.values()]  # not a mere default
        options = [*map(ids.get, texts), *by_id, ids.get(ours)]
        found |= {ours: i for i in [i for i in options if i is not None and i not in found.values()][:1]}
    return found


def translate_tokenizer(folder: Path, out: Path, config: dict, boundary: str | None) -> tuple[list, str]:
    """Write tokenizer.json -> the folder's id for each of ours (None: it has none), and the boundary.

    boundary: of our own export. That of "none" gave the newline's token the name <s>, here it is taken back.
    """
    path = folder / "tokenizer.json"
    content = read_json(path)
    guess = check_tokenizer(content, path)
    try:
        vocab, newline = dict(content["model"]["vocab"]), byte_alphabet()[ord("\n")]
        pairs = [m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"]]
        first = {}
        for a, b in pairs:  # where two make the same token, the first counts
            first.setdefault(a + b, (a, b))
        merges = [*first.values()]
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        specials = special_ids(folder, vocab | added, added, config)
        if boundary == "none":
            specials["<s>"], vocab[newline] = vocab[newline], specials["<s>"]
        names = list(tokenizer_json(merges)["model"]["vocab"])
        theirs = [specials.get(name) if name in SPECIAL else vocab.get(name) for name in names]
        known = [i for i in theirs if i is not None]
        rest = {*range(config["vocab_size"])} - {*known}
        if None in theirs[len(SPECIAL) + 256:] or len(known) + len(rest) != config["vocab_size"]:
            raise ValueError("a token is missing, plays two parts, or has an id beyond vocab_size of config.json")
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path}: vocabulary and merges do not fit together ({type(e).__name__}: {e})") from None
    write_json(out, tokenizer_json(merges))
    absent = [name for name in SPECIAL if name not in specials]
    if n := theirs[len(SPECIAL):].count(None):
        absent.append(f"{n} of the 256 bytes")
    if absent:
        print(f"note: the folder has no {', '.join(absent)}; added with the mean of all rows")
    if n := len(pairs) - len(merges):
        print(f"note: {n} merges make a token that another one makes; words with them may be other tokens")
    if n := sum(not token.get("special", True) for token in content.get("added_tokens") or []):
        print(f"note: {n} added tokens that are not special are not looked for in texts")
    if n := sum(newline in name and len(name) > 1 for name in names):
        print(f"note: {n} tokens hold a newline and more; here a newline stands alone")
    return theirs + sorted(rest), boundary or guess


def renumber(weights: dict, theirs: list) -> dict:
    """Rows of the embedding, the output matrix and its bias in our order; where the folder has none, the mean."""
    rows = torch.tensor([-1 if i is None else i for i in theirs])
    for name in {"embedding.tokens.weight", "head.vocab.weight", "head.vocab.bias"} & weights.keys():
        w = weights[name]
        weights[name] = torch.cat((w, w.mean(0, keepdim=True)))[rows]  # -1 is the mean
    return weights


def import_folder(folder: Path, out: Path, name: str) -> str:
    """Write a run folder with a checkpoint, tokenizer.json and settings.json -> the checkpoint's file name."""
    config = read_json(folder / "config.json")
    own = read_json(folder / "antlm.json", optional=True)  # what export_hf.py knew beyond the weights
    if own and not (isinstance(own.get("settings"), dict) and isinstance(own.get("step"), int)):
        raise UserError(f"{folder}/antlm.json: not written by export_hf.py; without it the folder is read as any "
                            "other")
    c = model_config(config, folder / "config.json")
    weights = translate_weights(*read_tensors(folder), c)
    out.mkdir()
    theirs, boundary = translate_tokenizer(folder, out / "tokenizer.json", config, own.get("boundary"))
    sizes = asdict(c) | {"vocab_size": len(theirs)}
    model = load_model({"config": sizes, "model": renumber(weights, theirs)})
    settings = {k: v for k, v in sizes.items() if k != "vocab_size"} | dict(
        corpus="", out_dir=name, schedule="1_MLM" if c.backbone == "ltg_bert" else "1_CLM",
        block_size=config.get("max_position_embeddings", 512))
    settings |= {k: tuple(v) if isinstance(v, list) else v for k, v in own.get("settings", {}).items()}
    settings = asdict(Settings()) | settings
    step = own.get("step", 1)
    path = out / f"step_{step:07}.pt"
    save_checkpoint(path, model, step=step, words=own.get("words"), settings=settings, optimizer=[], boundary=boundary,
                    tokenizer_sha256=Tokenizer(out / "tokenizer.json").sha256, tokens_sha256=own.get("tokens_sha256"),
                    **({} if own else {"imported_from": folder.resolve().name}))
    (out / "settings.json").write_text(json.dumps(settings, indent=1))
    return path.name


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"import_hf.py: {message}")
    parser.add_argument("folder", help="folder with config.json, tokenizer.json and weights")
    parser.add_argument("run", help="run folder to make")
    args = parser.parse_args(argv)
    try:
        with new_folder(args.run) as part:
            name = import_folder(Path(args.folder), part, args.run)
    except ImportError as e:
        sys.exit(f"import_hf.py: needs {e.name}; pip install safetensors")
    except (UserError, OSError) as e:
        sys.exit(f"import_hf.py: {e}")
    print(f"{args.run}/{name}: written")


if __name__ == "__main__":
    main()
