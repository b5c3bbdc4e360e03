"""A run as a Hugging Face folder, ready to load, to submit and to publish.

    python tools/export_hf.py runs/babyllama hf/babyllama                  # the newest checkpoint, or name a step_*.pt
    python tools/export_hf.py runs/babyllama hf/babyllama --checkpoints    # chck_1M, chck_2M, ... and main

BabyLlama becomes a plain LlamaForCausalLM; LTG-BERT brings one file of code, modeling_ltgbert.py, and loads with
trust_remote_code=True. Needs safetensors; transformers 4.41 to 5.23 were seen to read the folder.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from antlm.checkpoint import checkpoints, load_run
from antlm.files import write_json
from antlm.tokenizer import PAD, Tokenizer, tokenizer_json
from babylm.results import read_result
from config import UserError
from model import ModelConfig, Transformer
from schedule import WORD_MARKS
from train import Settings

NAMES = {  # our module: theirs, one below the other; N is the number of the layer
    "babyllama": {"embedding.tokens": "model.embed_tokens", "head.norm": "model.norm", "head.vocab": "lm_head",
                  "attention_norm": "N.input_layernorm", "ff_norm": "N.post_attention_layernorm",
                  "qkv": "N.self_attn.q_proj N.self_attn.k_proj N.self_attn.v_proj", "out": "N.self_attn.o_proj",
                  "gate_up": "N.mlp.gate_proj N.mlp.up_proj", "down": "N.mlp.down_proj"},
    "ltg_bert": {"embedding.tokens": "embedding.word_embedding", "head.dense": "classifier.nonlinearity.1",
                 "embedding.relative_norm": "embedding.relative_layer_norm", "head.vocab": "classifier.nonlinearity.5",
                 "qk": "N.attention.in_proj_qk", "v": "N.attention.in_proj_v", "out": "N.attention.out_proj",
                 "out_norm": "N.attention.post_layer_norm", "up_gate": "N.mlp.mlp.1", "down": "N.mlp.mlp.4"}}
LAYERS = {"babyllama": "model.layers", "ltg_bert": "transformer.layers"}  # in front of N


def their_names(backbone: str, ours: str) -> list[str]:
    """Names of the parameters that, one below the other, make ours."""
    if ours == "embedding.relative":  # a bare parameter, all others are a module's weight or bias
        return ["embedding.relative_embedding"]
    module, _, kind = ours.rpartition(".")
    _, layer, module = module.split(".") if module.startswith("blocks.") else ("", "", module)
    front = f"{LAYERS[backbone]}.{layer}."
    return [f"{front}{name[2:]}.{kind}" if layer else f"{name}.{kind}" for name in NAMES[backbone][module].split()]


def weights(model: Transformer) -> dict:
    """float32 tensors under their names; a tied output matrix is left out, as both libraries want it."""
    c, tensors = model.config, {}
    for ours, tensor in model.state_dict().items():
        if ours == "head.vocab.weight" and (c.tied or c.backbone == "ltg_bert"):
            continue
        names = their_names(c.backbone, ours)
        tensors |= {name: part.float().clone() for name, part in zip(names, tensor.chunk(len(names)))}
    return tensors


def config_json(c: ModelConfig, block_size: int, start: int) -> dict:
    """config.json; the pipelines of the challenge want at least 512 positions, which neither backbone limits."""
    positions = max(512, block_size, c.max_position if c.backbone == "ltg_bert" else 0)
    shared = dict(vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_ff, num_hidden_layers=c.n_layer,
                  num_attention_heads=c.n_head, max_position_embeddings=positions, pad_token_id=PAD, bos_token_id=start,
                  eos_token_id=start, torch_dtype="float32")
    if c.backbone == "babyllama":  # rope_theta is for transformers 4, rope_parameters for 5
        return dict(architectures=["LlamaForCausalLM"], model_type="llama", **shared, num_key_value_heads=c.n_head,
                    head_dim=c.n_embd // c.n_head, hidden_act="silu", initializer_range=0.02, rms_norm_eps=1e-6,
                    rope_theta=10000.0, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
                    attention_bias=False, attention_dropout=c.dropout, mlp_bias=False, tie_word_embeddings=c.tied)
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForMaskedLM": "ForMaskedLM",
               "AutoModelForCausalLM": "ForCausalLM", "AutoModelForSequenceClassification": "ForSequenceClassification"}
    return dict(architectures=["LtgBertForMaskedLM"], model_type="ltgbert",
                auto_map={auto: f"modeling_ltgbert.LtgBert{name}" for auto, name in classes.items()}, **shared,
                position_bucket_size=c.n_bucket, max_position=c.max_position, hidden_dropout_prob=c.dropout,
                attention_probs_dropout_prob=c.dropout, layer_norm_eps=1e-7, causal=None, tie_word_embeddings=True)


def export_tokenizer(source: Path, out: Path, boundary: str, start: int, positions: int):
    """Write the tokenizer so that it gives the ids of Tokenizer.encode_text(text, boundary), with character offsets.

    Where one token both opens a text and stands for a newline ("line", "none"), a normalizer turns newlines into <s>.
    """
    merges = json.loads(source.read_text(encoding="utf-8"))["model"]["merges"]
    content = tokenizer_json([pair.split(" ") if isinstance(pair, str) else pair for pair in merges])
    vocab, opener = content["model"]["vocab"], next(x for x in content["added_tokens"] if x["content"] == "<s>")
    name = next(token for token, i in vocab.items() if i == start)  # for "none" the newline's, which trades with <s>
    vocab[name], vocab["<s>"] = vocab["<s>"], start
    opener["id"] = content["post_processor"]["special_tokens"]["<s>"]["ids"][0] = start
    if boundary != "document":
        opener["normalized"] = True  # is found in the text that the normalizer has made
        content["normalizer"] = {"type": "Replace", "pattern": {"String": "\n"}, "content": "<s>"}
    write_json(out / "tokenizer.json", content)
    # eos is <s>, too: a text ends where the next one starts, and training never showed </s>.
    special = dict.fromkeys(("bos_token", "eos_token", "cls_token"), "<s>")
    special |= dict(sep_token="</s>", pad_token="<pad>", mask_token="<mask>")
    write_json(out / "special_tokens_map.json", special)
    write_json(out / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=positions, padding_side="right",
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False, **special))


def parsed(path: Path, take, default):
    """What `take` makes of the file's text, `default` where there is no file; raises UserError where take fails."""
    try:
        return take(path.read_text(encoding="utf-8")) if path.is_file() else default
    except (ValueError, LookupError, TypeError) as e:
        raise UserError(f"{path}: damaged ({type(e).__name__}: {e}); mend it or move it away") from None


def words_seen(content: dict, run: Path) -> int | None:
    """Words of training text up to the checkpoint, repetitions counted, as it or the run's metrics.jsonl says."""
    def take(text: str) -> int | None:
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return next((line["words"] for line in lines if line["step"] == content["step"]), None)

    words = content.get("words")
    return words if words is not None else parsed(run / "metrics.jsonl", take, None)


def training_text(content: dict) -> str:
    """The corpus by name, and its size where the folder is at hand and still the one that was trained on."""
    corpus = content["settings"].get("corpus", "")
    meta = parsed(Path(corpus) / "meta.json", lambda text: json.loads(text)["train"], {})
    known = meta and meta.get("sha256") == content.get("tokens_sha256")
    return f"`{corpus}`" + (f", {meta['words']:,} words" if known else "")


def score_rows(run: Path, step: int) -> list[str]:
    """A row for each task and mode that eval.py has scored this step in; of several files the newest counts."""
    rows = {}
    for file in sorted(run.glob("eval_*.json"), key=lambda file: file.stat().st_mtime):
        result = read_result(file)
        for task, entry in result["tasks"].items() if result["step"] == step and "modes" in result else []:
            what = task + f", PARTIAL: the first {result['limit']} items of each file" * result["partial"]
            rows |= {(what, mode, result["protocol"]): f"{percent:.1f}" for mode, percent in entry["accuracy"].items()}
    return [f"| {' | '.join((*key, percent))} |" for key, percent in rows.items()]


def command(settings: dict) -> str:
    """The train.py command that has these settings, each that is not the default as a flag."""
    defaults = asdict(Settings())
    flags = {k: v for k, v in settings.items() if k != "resume" and v != defaults.get(k, v)}
    flags |= {k: ",".join(v) if isinstance(v, tuple) else str(v).lower() for k, v in flags.items()
              if isinstance(v, (tuple, bool))}
    return shlex.join(["python", "train.py", *(f"--{k}={v}" for k, v in flags.items())])


def card(name: str, content: dict, model: Transformer, run: Path) -> str:
    """README.md of the folder, with the front matter that the hub reads."""
    c, settings, llama = model.config, content["settings"], model.config.backbone == "babyllama"
    words, rows = words_seen(content, run), score_rows(run, content["step"])
    auto, code = ("AutoModelForCausalLM", "") if llama else ("AutoModelForMaskedLM", ", trust_remote_code=True")
    scores = "\n".join(["| task | mode | protocol | percent correct |", "|---|---|---|---|", *rows] if rows else [
        f"None: the run holds no result of eval.py for step {content['step']}."])
    modes = "For open attention pass an `attention_mask` of zeros of shape (rows, 1, tokens, tokens)." if llama else (
        "The same weights load as `AutoModelForCausalLM` (causal attention), `AutoModel` and "
        "`AutoModelForSequenceClassification`;\n`causal=True` or `causal=False` in a call overrides the class.")
    newline = {"line": "A newline becomes `<s>`, which opened every line in training.",
               "none": "`<s>` is the newline: training knew no other start of a text.",
               "document": "A newline is a token of its own."}[content["boundary"]]
    size = sum(p.numel() for p in model.parameters())
    origin = ("trained with AntLM\n(arXiv 2412.03275), which alternates causal and masked language modelling as the "
              "schedule says")
    how = f"```\n{command(settings)}\n```"
    if "imported_from" in content:
        origin, how = "imported into AntLM", f"None of ours; the model comes from `{content['imported_from']}`."
    return f"""---
license: unknown  # yours to fill in: what you and the owners of the training text allow
library_name: transformers
pipeline_tag: {'text-generation' if llama else 'fill-mask'}
tags:
- antlm
- babylm
---

# {name}

{'BabyLlama' if llama else 'LTG-BERT'} of {size:,} parameters, {origin}.

| | |
|---|---|
| schedule | `{settings['schedule']}` |
| optimizer steps | {content['step']:,} |
| words seen, with repetition | {'unknown' if words is None else f'{words:,}'} |
| training text | {training_text(content)} |
| sizes | {c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads, feed-forward {c.n_ff}, vocabulary {c.vocab_size} |
| tokens a training row | {settings['block_size']} |

## Load it

```python
from transformers import {auto}, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{name}"{code})
model = {auto}.from_pretrained("{name}"{code})
```

{modes}
The tokenizer puts `<s>` in front of a text. {newline}
The literal texts `<pad>`, `<s>`, `</s>` and `<mask>` are special tokens.

## Scores

{scores}

## Training

{how}
"""


def export(run: Path, content: dict, model: Transformer, tokenizer: Tokenizer, out: Path, name: str):
    """Write one checkpoint into the new folder `out`; `name` is what its card calls it."""
    from safetensors.torch import save_file
    out.mkdir(parents=True)
    settings, start = content["settings"], tokenizer.encode_text("", content["boundary"])[0]
    config = config_json(model.config, settings["block_size"], start)
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {k: config[k] for k in ("pad_token_id", "bos_token_id", "eos_token_id")})
    save_file(weights(model), out / "model.safetensors", metadata={"format": "pt"})
    export_tokenizer(run / "tokenizer.json", out, content["boundary"], start, config["max_position_embeddings"])
    if model.config.backbone == "ltg_bert":
        shutil.copyfile(Path(__file__).with_name("modeling_ltgbert.py"), out / "modeling_ltgbert.py")
    plain = {k: v for k, v in content.items() if k not in ("model", "optimizer", "config")}
    write_json(out / "antlm.json", plain | {"words": words_seen(content, run)})  # import_hf.py reads it
    (out / "README.md").write_text(card(name, content, model, run), encoding="utf-8")


def export_checkpoints(run: Path, out: Path, name: str) -> list[str]:
    """Write chck_1M, chck_2M, ... and main -> marks that have no checkpoint of their own.

    A mark's checkpoint is the first with at least so many words, and fewer than the next mark's or than the save
    interval behind it: none stands for two marks.
    """
    made, last = set(), None
    for file in reversed(checkpoints(run)):
        try:
            _, content, *loaded = last = load_run(str(file), "cpu")
        except UserError as e:
            print(f"skipped {e}", file=sys.stderr)
            continue
        if (words := content.get("words")) is None:
            raise UserError(f"{file}: does not say how many words it has seen (`words`); train with --babylm_rules")
        interval = content["settings"]["save_every"] * words / content["step"]
        mark = max((mark for mark in WORD_MARKS if mark <= words), default=None)
        if mark and mark not in made and words - mark <= interval:
            folder = f"chck_{mark // 1_000_000}M"
            export(run, content, *loaded, out / folder, f"{name}/{folder}")
            print(f"{folder}: {file.name}, {words:,} words")
            made.add(mark)
    if last is None:
        raise UserError(f"{run}: --checkpoints wants a run folder, this holds no whole step_*.pt")
    export(run, *last[1:], out / "main", f"{name}/main")
    print(f"main: {last[0].name}, {words:,} words")
    return [f"chck_{mark // 1_000_000}M" for mark in WORD_MARKS if mark <= words and mark not in made]


@contextmanager
def new_folder(name: str):
    """A path to fill beside the folder `name`, whose name it gets at the end; raises UserError."""
    out = Path(name)
    if out.exists():
        raise UserError(f"{out}: exists already; remove it or choose another name")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: {out.absolute().parent} is no folder; make it first")
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        yield part
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"export_hf.py: {message}")
    parser.add_argument("run", help="run folder, or a checkpoint with tokenizer.json beside it")
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--checkpoints", action="store_true", help="a folder for each mark of the rules, and main")
    args = parser.parse_args(argv)
    name, missing = Path(args.out).name, []
    try:
        with new_folder(args.out) as part:
            if args.checkpoints:
                missing = export_checkpoints(Path(args.run), part, name)
            else:
                file, *loaded = load_run(args.run, "cpu")
                export(file.parent, *loaded, part, name)
    except ImportError as e:
        sys.exit(f"export_hf.py: needs {e.name}; pip install safetensors")
    except (UserError, OSError) as e:
        sys.exit(f"export_hf.py: {e}")
    if missing:
        print(f"no checkpoint of its own: {', '.join(missing)}")
    print(f"{args.out}: written; fill in the licence in its README.md")


if __name__ == "__main__":
    main()
