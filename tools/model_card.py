"""The model card (README.md) of an exported folder, with the front matter that the hub reads."""

import shlex
from dataclasses import asdict

from antlm.checkpoint import LoadedRun
from babylm.results import read_result
from train import Settings

CARD = """\
---
license: unknown  # yours to fill in: what you and the owners of the training text allow
library_name: transformers
pipeline_tag: {pipeline_tag}
tags:
- antlm
- babylm
---

# {name}

{title} of {n_parameters:,} parameters, {origin}.

| | |
|---|---|
| schedule | {schedule} |
| optimizer steps | {step:,} |
| weights | {weights} |
| words seen, with repetition | {words} |
| training text | `{settings[corpus]}` |
| sizes | {sizes} |
| tokens a training row | {settings[block_size]} |

## Load it

{loading}
For masked next-token prediction (`mntp`) nothing more is needed: read `AutoModelForMaskedLM` one
position before the hidden token, as the pipeline of the challenge does.

The tokenizer puts `<s>` in front of a text. {newline}
The literal texts `<pad>`, `<s>`, `</s>` and `<mask>` are special tokens.
A hidden word is written as in `The boy <mask> home.` The space in front of it is hidden with it, as
in training, so `The boy<mask> home.` means the same; a word of two tokens is `<mask><mask>`.

## Scores

{scores}

## Training

{training}
"""
LOADING = {  # for each backbone: how to load it, and which class has which mask
    "babyllama": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
```

As `AutoModelForMaskedLM`, with `trust_remote_code=True`, every token sees the whole text. For
fine-tuning there are `AutoModel` and `AutoModelForSequenceClassification`:
{finetuning}
Without `trust_remote_code` they are plain causal Llamas.""",
    "ltg_bert": """\
```python
from transformers import AutoModelForMaskedLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained("{name}", trust_remote_code=True)
```

The same weights load as `AutoModelForCausalLM`, whose attention is causal. For fine-tuning there
are `AutoModel` and `AutoModelForSequenceClassification`:
{finetuning}
`causal=True` or `False` in a call overrides the class.""",
}
FINETUNING = {  # by the mask of finetune.py: what follows for the classes that are fine-tuned
    "causal": "their attention is causal, as all of the training was.",
    "open": "every token sees the whole text there, as in masked training.",
}
TITLES = {"babyllama": "BabyLlama", "ltg_bert": "LTG-BERT"}
NEWLINES = {  # for each boundary: what a newline becomes
    "line": "A newline becomes `<s>`, which opened every line in training.",
    "document": "A newline is a token of its own.",
    "none": "`<s>` is the newline: training knew no other start of a text.",
}


def model_card(run: LoadedRun, name: str, causal: bool) -> str:
    """Return the text of the card of a run that is exported under this name.

    causal: whether its classes for fine-tuning are
    """
    c = run.model.config
    words = run.content.get("words")
    origin = (
        "trained with AntLM\n(arXiv 2412.03275), which alternates causal and masked language "
        "modelling as the schedule says"
    )
    training = f"```\n{train_command(run.settings)}\n```"
    if "imported_from" in run.content:
        origin = "imported into AntLM"
        training = f"None of ours; the model comes from `{run.content['imported_from']}`."
    return CARD.format(
        pipeline_tag="fill-mask" if c.backbone == "ltg_bert" else "text-generation",
        name=name,
        title=TITLES.get(c.backbone, c.backbone),
        n_parameters=sum(p.numel() for p in run.model.parameters()),
        origin=origin,
        settings=run.settings,
        schedule=describe_schedule(run),
        step=run.step,
        weights=describe_weights(run),
        words="unknown" if words is None else f"{words:,}",
        sizes=f"{c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads, feed-forward {c.n_ff}, "
        f"vocabulary {c.vocab_size}",
        loading=LOADING[c.backbone].format(
            name=name, finetuning=FINETUNING["causal" if causal else "open"]
        ),
        newline=NEWLINES[run.boundary],
        scores=score_table(run),
        training=training,
    )


def describe_schedule(run: LoadedRun) -> str:
    """Return the schedule, after those of the runs whose weights this one was started from."""
    parts = []
    for entry in run.history:
        words = "unknown" if entry["words"] is None else f"{entry['words']:,}"
        parts.append(f"`{entry['schedule']}` ({words} words, sha256 {entry['sha256'][:16]}), then ")
    return "".join(parts) + f"`{run.schedule}`"


def describe_weights(run: LoadedRun) -> str:
    """Return which weights these are: an average of steps or of checkpoints, or the last ones."""
    if run.weights == "average":
        return f"average of the last {run.content['average']['n']:,} steps"
    sources = run.content.get("averaged", [])
    if not sources:
        return "those of the last step"
    parts = []
    for source in sources:
        parts.append(f"{source['share']:.3g} of `{source['schedule']}`, {source['sha256'][:16]}")
    return f"average of checkpoints: {'; '.join(parts)}"


def score_table(run: LoadedRun) -> str:
    """Return a table of what eval.py has scored these weights in; the newest file counts."""
    scores = {}
    files = run.path.parent.glob("eval_*.json")
    for path in sorted(files, key=lambda path: path.stat().st_mtime):
        result = read_result(path)
        if result["step"] != run.step or result.get("weights", "last") != run.weights:
            continue
        for task, entry in result["tasks"].items():
            if result["partial"]:
                task += f", PARTIAL: the first {result['limit']} items of each file"
            for mode, percent in entry["accuracy"].items():
                scores[task, mode, result["protocol"]] = percent
    if not scores:
        return f"None: the run holds no result of eval.py for step {run.step}."
    lines = ["| task | mode | protocol | percent correct |", "|---|---|---|---|"]
    for (task, mode, protocol), percent in scores.items():
        lines.append(f"| {task} | {mode} | {protocol} | {percent:.1f} |")
    return "\n".join(lines)


def train_command(settings: dict) -> str:
    """Return the command that trains with these settings: a flag for each that is no default."""
    flags = []
    for name, default in asdict(Settings()).items():
        value = settings.get(name, default)
        if value == default or name == "resume":
            continue
        if isinstance(value, bool):
            value = str(value).lower()
        flags.append(f"--{name}={value}")
    return shlex.join(["python", "train.py", *flags])
