"""Export a run as a Hugging Face folder, ready to load, to submit and to publish.

    python tools/export_hf.py runs/babyllama hf/babyllama                  # the newest checkpoint
    python tools/export_hf.py runs/babyllama/step_0000500.pt hf/early      # this one
    python tools/export_hf.py runs/babyllama hf/babyllama --checkpoints    # chck_1M, ... and main

The folder loads as AutoModelForCausalLM (causal attention), AutoModelForMaskedLM (every token sees
the whole text; masked next-token prediction reads it one position earlier) and, for fine-tuning, as
AutoModel and AutoModelForSequenceClassification, whose mask is that of finetune.py: causal for a
run that has seen no masked text in training, else open. It brings one file of code, which runs with
trust_remote_code=True. BabyLlama is a plain LlamaForCausalLM, too, which needs no code; without
trust_remote_code the classes for fine-tuning are plain Llamas, so causal.

The folders that --checkpoints writes become branches of one repository of the hub, as the challenge
of 2025 and 2026 reads them (revision="chck_1M"), by the commands that are printed at the end.
Needs safetensors; transformers 4.41 or newer reads the folders.
"""

import argparse
import copy
import json
import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hf_names import NAMES, NEWLINE_TO_START, NO_SPACE_BEFORE_MASK, hf_names, is_tied, split_merges
from model_card import LOADING, model_card
from safetensors.torch import save_file

from antlm.checkpoint import WEIGHTS, WEIGHTS_HELP, LoadedRun, checkpoints, load_run
from antlm.files import new_folder, write_json
from antlm.program import clean_exit
from antlm.tokenizer import PAD, byte_alphabet, tokenizer_json
from babylm.challenge import mark_name, marks_due, reached_mark, words_per_step
from config import UserError, require
from finetune import Settings as FinetuneSettings
from model import ModelConfig, Transformer
from schedule import WORD_MARKS

# ------------------------------------------------------------------------------ config.json


def shared_config(c: ModelConfig, positions: int, start: int) -> dict:
    """The part of config.json that both backbones have.

    start: id of the start token, which ends a text, too: a text ends where the next one starts,
    and training never showed </s>
    """
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "intermediate_size": c.n_ff,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "max_position_embeddings": positions,
        "pad_token_id": PAD,
        "bos_token_id": start,
        "eos_token_id": start,
        "torch_dtype": "float32",
    }


# the classes that a folder brings, by the ones that a user of transformers asks for
BABYLLAMA_CLASSES = {
    "AutoModel": "BabyLlamaModel",
    "AutoModelForMaskedLM": "BabyLlamaForMaskedLM",
    "AutoModelForSequenceClassification": "BabyLlamaForSequenceClassification",
}
LTG_BERT_CLASSES = {
    "AutoConfig": "LtgBertConfig",
    "AutoModel": "LtgBertModel",
    "AutoModelForMaskedLM": "LtgBertForMaskedLM",
    "AutoModelForCausalLM": "LtgBertForCausalLM",
    "AutoModelForSequenceClassification": "LtgBertForSequenceClassification",
}


def llama_config(c: ModelConfig, block_size: int, start: int, causal: bool) -> dict:
    """config.json of BabyLlama."""
    classes = BABYLLAMA_CLASSES
    if causal:
        # what is fine-tuned is a plain Llama
        classes = {"AutoModelForMaskedLM": classes["AutoModelForMaskedLM"]}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "auto_map": {auto: f"modeling_babyllama.{name}" for auto, name in classes.items()},
        # the pipelines of the challenge want at least 512 positions; rotary ones have no limit
        **shared_config(c, max(512, block_size), start),
        "num_key_value_heads": c.n_head,
        "head_dim": c.n_embd // c.n_head,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,  # read by transformers 4, and the next line by 5
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "attention_dropout": c.dropout,
        "mlp_bias": False,
        "tie_word_embeddings": c.tied,
    }


def ltg_bert_config(c: ModelConfig, block_size: int, start: int, causal: bool) -> dict:
    """config.json of LTG-BERT."""
    return {
        "architectures": ["LtgBertForMaskedLM"],
        "model_type": "ltgbert",
        "auto_map": {auto: f"modeling_ltgbert.{name}" for auto, name in LTG_BERT_CLASSES.items()},
        # nor have these a limit: far distances share a bucket
        **shared_config(c, max(512, block_size, c.max_position), start),
        "position_bucket_size": c.n_bucket,
        "max_position": c.max_position,
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.dropout,
        "layer_norm_eps": 1e-7,
        "causal": None,
        "finetune_causal": causal,
        "tokenizer_class": "PreTrainedTokenizerFast",  # pipelines of transformers 4.41 ask here
        "tie_word_embeddings": True,
    }


# what makes config.json; another backbone needs a row here, in NAMES of hf_names.py and in LOADING
# of model_card.py; the files of code that `auto_map` names travel with it
CONFIGS = {"babyllama": llama_config, "ltg_bert": ltg_bert_config}


# --------------------------------------------------------------------- weights and tokenizer


def hf_weights(model: Transformer) -> dict:
    """Return the weights as float32 tensors under their Hugging Face names."""
    c = model.config
    tensors = {}
    # a matrix that stacks several of theirs is cut into equal parts
    for name, tensor in model.state_dict().items():
        if is_tied(c.backbone, name, c.tied):
            continue  # transformers takes the embedding
        names = hf_names(c.backbone, name)
        for hf_name, part in zip(names, tensor.chunk(len(names)), strict=True):
            tensors[hf_name] = part.float().clone()
    return tensors


def hf_tokenizer(source: Path, boundary: str) -> dict:
    """Return a tokenizer.json that gives the ids of Tokenizer.encode_text(text, boundary).

    A <mask> in the text takes the place of a word, with or without the space in front of it.
    source: the run's tokenizer.json, which is for plain encode(text)
    """
    merges = json.loads(source.read_text(encoding="utf-8"))["model"]["merges"]
    # a copy, since parts of it are constants of antlm/tokenizer.py
    content = copy.deepcopy(tokenizer_json(split_merges(merges)))
    _, start_token, _, mask_token = content["added_tokens"]
    vocab = content["model"]["vocab"]

    # transformers expects <s> in front of a text: with "none" the newline was there in training,
    # so the two trade their ids
    if boundary == "none":
        newline = byte_alphabet()[ord("\n")]
        vocab["<s>"], vocab[newline] = vocab[newline], vocab["<s>"]
    start_token["id"] = vocab["<s>"]
    content["post_processor"]["special_tokens"]["<s>"]["ids"] = [vocab["<s>"]]

    # rewritten before the text is cut; special tokens marked `normalized` are looked for afterwards
    rewrites = []
    if boundary != "document":
        rewrites.append(NEWLINE_TO_START)  # one token opens a text and stands for a newline
        start_token["normalized"] = True
    rewrites.append(NO_SPACE_BEFORE_MASK)
    mask_token["normalized"] = True
    content["normalizer"] = {"type": "Sequence", "normalizers": rewrites}
    return content


def write_tokenizer(source: Path, out: Path, boundary: str, positions: int):
    """Write the tokenizer's three files into the folder `out`."""
    special = {
        "bos_token": "<s>",
        "eos_token": "<s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(out / "tokenizer.json", hf_tokenizer(source, boundary))
    write_json(out / "special_tokens_map.json", special)
    write_json(out / "tokenizer_config.json", settings | special)


# ------------------------------------------------------------------------------------ folders


def export(run: LoadedRun, out: Path, name: str):
    """Write one checkpoint into the new folder `out`; `name` is what its model card calls it."""
    backbone = run.model.config.backbone
    require(
        backbone in CONFIGS and backbone in NAMES and backbone in LOADING,
        f"{run.path}: backbone {backbone!r} cannot be exported yet; it needs a row in CONFIGS of "
        "tools/export_hf.py, NAMES of tools/hf_names.py and LOADING of tools/model_card.py",
    )
    weights = hf_weights(run.model)
    causal = FinetuneSettings().resolve(run.full_schedule).mask == "causal"
    out.mkdir(parents=True)

    # what transformers reads
    start = run.tokenizer.encode_text("", run.boundary)[0]
    config = CONFIGS[backbone](run.model.config, run.block_size, start, causal)
    token_ids = {key: config[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", token_ids)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer = run.path.parent / "tokenizer.json"
    write_tokenizer(tokenizer, out, run.boundary, config["max_position_embeddings"])
    for module in {name.split(".")[0] for name in config.get("auto_map", {}).values()}:
        shutil.copyfile(Path(__file__).with_name(f"{module}.py"), out / f"{module}.py")

    # what people read, and from what import_hf.py makes the same run again
    left_out = ("model", "optimizer", "average", "config")
    facts = {key: value for key, value in run.content.items() if key not in left_out}
    write_json(out / "antlm.json", facts)
    (out / "README.md").write_text(model_card(run, name, causal), encoding="utf-8")


def export_checkpoints(folder: Path, out: Path, name: str, weights: str) -> list[str]:
    """Write chck_1M, chck_2M, ... and main, which is the last checkpoint, into the folder `out`.

    The first checkpoint that stands for a mark is taken.
    Returns lines that say which checkpoint became which folder, and name the marks without one.
    """
    # from the oldest to the newest; damaged ones are named and passed over
    lines = []
    run = None
    exported = set()
    for path in reversed(checkpoints(folder)):
        try:
            run = load_run(path, "cpu", weights)
        except UserError as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        words = run.content.get("words")
        require(words is not None, f"{path}: does not say how many words it has seen (`words`)")
        mark = reached_mark(words, words_per_step(run.content), WORD_MARKS)
        if mark is not None and mark not in exported:
            label = mark_name(mark)
            export(run, out / label, f"{name}/{label}")
            lines.append(f"{label}: {path.name}, {words:,} words")
            exported.add(mark)

    require(
        run is not None,
        f"{folder}: --checkpoints wants a run folder, this holds no whole step_*.pt",
    )

    # the newest one, which the loop loaded last
    words = run.content["words"]
    due = marks_due(words, WORD_MARKS)
    labels = ["main"]
    # it stands for a mark, too, that the end of training just misses
    if due and due[-1] > words:
        labels.insert(0, mark_name(due[-1]))
        exported.add(due[-1])
    for label in labels:
        export(run, out / label, f"{name}/{label}")
        lines.append(f"{label}: {run.path.name}, {words:,} words")
    missing = [mark_name(mark) for mark in due if mark not in exported]
    if missing:
        lines.append(f"no checkpoint of its own: {', '.join(missing)}; train with --babylm_rules")
    return lines


def push_commands(out: Path) -> list[str]:
    """Return lines that say how the folders in `out` become branches of a repository of the hub."""
    # the order in which they were trained, main at the end
    names = [path.name for path in out.iterdir() if path.name != "main"]
    names.sort(key=lambda name: (len(name), name))
    lines = [
        "",
        "To publish each folder as a branch of one repository (pip install -U huggingface_hub):",
        "    hf auth login",
    ]
    for name in [*names, "main"]:
        # makes repository and branch where there is none
        command = ["hf", "upload", "USER/NAME", str(out / name), ".", "--revision", name]
        lines.append(f"    {shlex.join(command)}")
    return [*lines, 'Then from_pretrained("USER/NAME", revision="chck_1M") loads one of them.', ""]


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder, or a checkpoint with tokenizer.json beside it")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="a folder for each number of words that the rules name, and main (default: the "
        "newest checkpoint alone)",
    )
    parser.add_argument("--weights", default=WEIGHTS[0], choices=WEIGHTS, help=WEIGHTS_HELP)
    args = parser.parse_args(arguments)
    require(not args.out.exists(), f"{args.out}: exists already; remove it or choose another name")
    lines = []
    with new_folder(args.out) as unfinished:
        if args.checkpoints:
            lines = export_checkpoints(Path(args.run), unfinished, args.out.name, args.weights)
        else:
            export(load_run(args.run, "cpu", args.weights), unfinished, args.out.name)
    if args.checkpoints:
        lines += push_commands(args.out)
    print(*lines, f"{args.out}: written; fill in the licence in its README.md", sep="\n")


if __name__ == "__main__":
    with clean_exit():
        main()
