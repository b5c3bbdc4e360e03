"""Every setting of train.py and finetune.py does what its comment says.

python -m pytest tests/test_settings.py -k "finetune and lora"

A row of the tables below names a setting, values for it, what is then seen, and how to see it: in a
real call on tiny material (trials.py), seldom in what is printed. A setting without a row fails,
and so does a row without a setting: whoever adds a setting adds here what it changes. test_flags.py
does the same for the other programs.

The text has lines of eight tokens and fills 24 rows of 16 tokens, so that an epoch has three full
steps of eight rows, and all that is counted comes out even.
"""

import itertools
import math
import re
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_metrics, train_here
from torch import Tensor, nn
from trials import (
    BFLOAT16,
    CUDA,
    FLOAT32,
    RATE,
    TINY,
    Lab,
    Program,
    Row,
    Trial,
    cases,
    devices,
    dtypes,
    files,
    is_refused,
    most_rows,
    n_layers,
    near,
    read_result,
    row_lengths,
)
from watch import Pass

import finetune
import schedule
import train
from antlm import IGNORE
from antlm.checkpoint import checkpoints, load_checkpoint
from antlm.optim import OPTIMIZERS
from antlm.tokenizer import MASK
from babylm.classifier import Classifier, LowRank
from model import BACKBONES, bare_norm
from schedule import DECAYS

# ----------------------------------------------------------------------------------------- train.py


def zeros(tensors: list[Tensor]) -> float:
    """The share of zeros."""
    return torch.cat([tensor.flatten() for tensor in tensors]).eq(0).float().mean().item()


def movements(weights: list[dict[str, Tensor]]) -> list[float]:
    """How far a weight that moves went in each step: the median."""
    medians = []
    for before, after in itertools.pairwise(weights):
        moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).abs()
        moved = moved[moved > 0]
        medians.append(moved.median().item() if len(moved) else 0.0)
    return medians


def kept(before: Tensor, after: Tensor) -> float:
    """What part of a weight a step has left: the median."""
    return (after / before).median().item()


def call_train(arguments: list[str]):
    # a mark in the second step of 32 words; those of the challenge begin at a million
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "WORD_MARKS", [60])
        train_here(*arguments)


def run_folder(run: Trial) -> Path:
    return run.folder / "run"


def saved_steps(run: Trial) -> list[int]:
    return sorted(int(path.stem[5:]) for path in checkpoints(run_folder(run)))


def weights_by_step(run: Trial) -> list[dict[str, Tensor]]:
    """The weights before the first step, and after each."""
    weights = [forward.weights for forward in run.training]
    return [*weights, load_checkpoint(checkpoints(run_folder(run))[0])["model"]]


def rates(run: Trial) -> list[float]:
    """How far each step goes: without memory, Adam moves each weight by the learning rate."""
    return movements(weights_by_step(run))


def steps_averaged(run: Trial) -> int | None:
    return load_checkpoint(checkpoints(run_folder(run))[0])["average"].get("n")


def first_weights(run: Trial) -> list[float]:
    return run.training[0].weights["blocks.0.out.weight"].flatten().tolist()


def weights_after_a_step(run: Trial) -> list[float]:
    return run.training[1].weights["blocks.0.out.weight"].flatten().tolist()


def kept_of_matrix_embedding_norm(run: Trial) -> tuple:
    before, after = weights_by_step(run)[:2]
    names = ("blocks.0.out.weight", "embedding.tokens.weight", "blocks.0.attention_norm.weight")
    return tuple(kept(before[name], after[name]) for name in names)


def first_moments(run: Trial) -> tuple[float, float]:
    """The norm of the first moments, and the sum of the second ones, after one step."""
    states = []
    for optimizer in load_checkpoint(run_folder(run) / "step_0000001.pt")["optimizer"]:
        states += optimizer["state"].values()
    mean = math.sqrt(sum(state["exp_avg"].square().sum().item() for state in states))
    return mean, sum(state["exp_avg_sq"].sum().item() for state in states)


def gradient_norm(run: Trial) -> float:
    """The norm of the first gradient, before it is clipped."""
    return read_metrics(run_folder(run))[0]["grad_norm"]


def new_share_of_mean(run: Trial) -> float:
    return first_moments(run)[0] / gradient_norm(run)


def new_share_of_square(run: Trial) -> float:
    return first_moments(run)[1] / gradient_norm(run) ** 2


def clipped_norm(run: Trial) -> float:
    """The norm of the gradient that the optimizer is given."""
    return first_moments(run)[0]


def divisor(run: Trial) -> float:
    """What the gradient is divided by: almost eps, where that is far larger than the gradient."""
    before, after = weights_by_step(run)[:2]
    squares = sum((after[name] - before[name]).square().sum().item() for name in before)
    return gradient_norm(run) / math.sqrt(squares)


def tokens_in_an_epoch(run: Trial) -> int:
    return sum(forward.tokens.numel() for forward in run.training) // 2


def rows_in_a_step(run: Trial) -> int:
    steps = [entry["step"] for entry in read_metrics(run_folder(run))]
    return sum(len(forward.tokens) for forward in run.training) // max(steps)


def advice(run: Trial) -> str:
    return run.error.rpartition("make it with: ")[2]


def steps_trained(run: Trial):
    return "refused" if run.error else len(run.training)


def blocks(run: Trial) -> set[type]:
    """The kinds of blocks that the model is made of."""
    kinds = set()
    for backbone in BACKBONES.values():
        kinds |= {type(call.module) for call in run.training[0].of(backbone.block)}
    return kinds


def heads(run: Trial) -> set[int]:
    return {attention.n_head for attention in run.training[0].attention}


def width(run: Trial) -> int:
    return run.training[0].calls[0].y.size(-1)


def feed_forward_width(run: Trial) -> set[int]:
    block = run.training[0].of(BACKBONES["babyllama"].block)[0].module
    return {call.x.size(-1) for call in run.training[0].calls if call.module is block.down}


def is_one_matrix(run: Trial) -> bool:
    """Whether training has left one matrix that reads tokens and writes them."""
    weights = weights_by_step(run)[-1]
    return torch.equal(weights["embedding.tokens.weight"], weights["head.vocab.weight"])


def attention_dropout(run: Trial) -> tuple:
    """In training and in evaluation."""
    training = {forward.attention[0].rate for forward in run.training}
    return training, {forward.attention[0].rate for forward in run.evaluation}


def embeddings(passes: list[Pass]) -> list[Tensor]:
    """What the first block of LTG-BERT is given."""
    return [forward.of(BACKBONES["ltg_bert"].block)[0].x for forward in passes]


def embedding_dropout(run: Trial) -> tuple:
    """In training and in evaluation."""
    return zeros(embeddings(run.training)), zeros(embeddings(run.evaluation))


def dropped_places(run: Trial) -> list[bool]:
    return embeddings(run.training)[0].eq(0).flatten().tolist()


def ltg_embedding(run: Trial) -> nn.Module:
    return run.training[0].of(BACKBONES["ltg_bert"].embedding)[0].module


def n_positions(run: Trial) -> int:
    return len(ltg_embedding(run).relative)


def distances_in_last_bucket(run: Trial) -> int:
    """How many of the distances from 15 down have the bucket of 15."""
    _, (_, selection) = ltg_embedding(run)(torch.zeros(1, 16, dtype=torch.long), 0)
    return int((selection == selection[0]).all(1).sum())


def first_tokens(run: Trial) -> list[int]:
    return run.training[0].tokens.flatten().tolist()


def causal_steps(run: Trial) -> list[bool]:
    return [forward.attention[0].causal for forward in run.training]


def count_targets(forward: Pass) -> int:
    return int((forward.targets != IGNORE).sum())


def hidden_tokens(run: Trial) -> list[int]:
    """How many tokens each step hides."""
    return [count_targets(forward) for forward in run.training]


def hidden_in_evaluation(run: Trial) -> set[int]:
    return {count_targets(forward) for forward in run.evaluation if not forward.attention[0].causal}


def spans_are_long(run: Trial) -> bool:
    """Whether <mask> comes in runs of more than 1.6 tokens; alone it has runs of about 1.25."""
    lengths = []
    for forward in run.training:
        for row in forward.tokens.tolist():
            groups = itertools.groupby(row, lambda token: token == MASK)
            lengths += [len(list(group)) for is_mask, group in groups if is_mask]
    return statistics.mean(lengths) > 1.6


def rows_evaluated(run: Trial) -> float:
    """For each of two objectives in each of two evaluations."""
    return sum(len(forward.tokens) for forward in run.evaluation) / 4


def steps_with(run: Trial, name: str) -> list[int]:
    return [entry["step"] for entry in read_metrics(run_folder(run)) if name in entry]


def log_steps(run: Trial) -> list[int]:
    return steps_with(run, "loss")


def dev_steps(run: Trial) -> list[int]:
    return steps_with(run, "dev")


def step_that_ends_it(run: Trial) -> int:
    return int(re.search(r"step (\d+): gradient norm", run.error)[1])


def n_compiled(run: Trial) -> int:
    return len(run.compiled)


LTG = {"backbone": "ltg_bert"}
MASKED = {"schedule": "2_MLM"}
PHASES = {"schedule": "1_CLM+1_MLM"}
SPARSE = {"keep": 1}

TRAIN_ROWS = [
    # where from and where to
    Row("corpus", {"@corpus": 384, "@short_corpus": 128}, tokens_in_an_epoch),
    Row("corpus_command", {"magic": "magic", "more": "more"}, advice, {"corpus": "nowhere"}),
    Row("out_dir", {"@out/run": True, "@out/other": False}, lambda run: run_folder(run).exists()),
    Row("resume", {False: "refused", True: 3}, steps_trained, {"out_dir": "@half_run"}),
    # model
    Row("init_from", ("", "@half_run"), first_weights),
    Row("backbone", {name: {row.block} for name, row in BACKBONES.items()}, blocks),
    Row("n_layer", {1: {1}, 3: {3}}, n_layers),
    Row("n_head", {2: {2}, 4: {4}}, heads),
    Row("n_embd", {16: 16, 24: 24}, width),
    Row("n_ff", {24: {24}, 20: {20}}, feed_forward_width),
    Row("tied", {False: False, True: True}, is_one_matrix),
    Row("tied", {False: True, True: True}, is_one_matrix, LTG),
    Row("dropout", {0.0: ({0.0}, {0.0}), 0.5: ({0.5}, {0.0})}, attention_dropout),
    Row("dropout", {0.0: ({0.0}, {0.0}), 0.5: ({0.5}, {0.0})}, attention_dropout, LTG),
    Row("dropout", {0.0: (0, 0), 0.5: (near(0.5, 0.05), 0)}, embedding_dropout, LTG),
    Row("n_bucket", {4: 7, 6: 11}, n_positions, LTG),
    # by the formula of DeBERTa, distances from 5 on share the last of 6 buckets, or from 7 on
    Row("max_position", {8: 11, 16: 9}, distances_in_last_bucket, LTG | {"n_bucket": 6}),
    # objectives and batches
    Row(
        "schedule",
        {
            "2_CLM": [True] * 6,
            "1_CLM+1_MLM": [True] * 3 + [False] * 3,
            "1_CLM:MNTP": [True, False] * 3,
            "1_MDLM:MDNTP": [False] * 6,
        },
        causal_steps,
    ),
    Row("block_size", {16: {16}, 12: {12}}, row_lengths),
    Row("batch_rows", {8: 8, 4: 4}, rows_in_a_step),
    Row("micro_rows", {8: 8, 3: 3}, most_rows),
    Row("micro_rows", {8: 8, 3: 8}, rows_evaluated),
    Row("mask_start", {0.125: [16] * 6, 0.25: [32, 28, 25, 22, 19, 16]}, hidden_tokens, MASKED),
    Row("mask_end", {0.125: [16] * 6, 0.25: [16, 19, 22, 25, 28, 32]}, hidden_tokens, MASKED),
    Row(
        "mask_decay",
        {"linear": [32, 28, 25, 22, 19, 16], "cosine": [32, 30, 26, 21, 17, 16]},
        hidden_tokens,
        MASKED | {"mask_start": 0.25},
    ),
    Row("mask_span", {1.0: False, 4.0: True}, spans_are_long, MASKED | {"mask_end": 0.5}),
    Row("seed", (1, 2), first_weights),
    Row("seed", (1, 2), first_tokens),
    Row("seed", (1, 2), dropped_places, LTG | {"dropout": 0.5}),
    # optimizer
    Row("optimizer", tuple(OPTIMIZERS), weights_after_a_step, {"weight_decay": 0.1}),
    Row("lr", {RATE: near([RATE] * 6), 4 * RATE: near([4 * RATE] * 6)}, rates),
    Row(
        "lr_min_ratio",
        {
            0.0: near([RATE * share for share in (1, 0.8, 0.6, 0.4, 0.2, 0)]),
            0.5: near([RATE * share for share in (1, 0.9, 0.8, 0.7, 0.6, 0.5)]),
        },
        rates,
        {"lr_decay": "linear"},
    ),
    Row(
        "lr_decay",
        {
            name: near([RATE * decay(step / 5) for step in range(6)])
            for name, decay in DECAYS.items()
        },
        rates,
        {"lr_min_ratio": 0.0},
    ),
    Row(
        "lr_decay_share",
        {
            1.0: near([RATE * share for share in (1, 0.8, 0.6, 0.4, 0.2, 0)]),
            0.4: near([RATE * share for share in (1, 1, 1, 1, 0.5, 0)]),
        },
        rates,
        {"lr_decay": "linear", "lr_min_ratio": 0.0},
    ),
    Row(
        "warmup",
        {0.0: near([RATE] * 6), 0.5: near([RATE * share for share in (1 / 3, 2 / 3, 1, 1, 1, 1)])},
        rates,
    ),
    Row("beta1", {0.0: near(1), 0.9: near(0.1)}, new_share_of_mean),
    Row("beta2", {0.0: near(1), 0.98: near(0.02)}, new_share_of_square),
    Row("eps", {1e3: near(1e3, 0.02), 1e4: near(1e4, 0.02)}, divisor, {"lr": 1.0}),
    Row(
        "weight_decay",
        {0.0: near((1, 1, 1), 0.01), 0.5 / 1e-6: near((0.5, 1, 1), 0.01)},
        kept_of_matrix_embedding_norm,
        {"lr": 1e-6},
    ),
    Row("clip", {0.01: near(0.01), 0.1: near(0.1)}, clipped_norm),
    Row("clip", {0.0: near(1), 1000.0: near(1)}, new_share_of_mean),
    Row("average_share", {0.0: None, 0.5: 3, 1.0: 6}, steps_averaged),
    Row("skip_nonfinite", {0: 2, 2: 4}, step_that_ends_it, {"lr": 1e30, "batch_rows": 4}),
    # logs and checkpoints
    Row("log_every", {1: [1, 2, 3, 4, 5, 6], 4: [1, 4, 6]}, log_steps),
    Row("eval_every", {0: [3, 6], 2: [2, 4, 6]}, dev_steps),
    Row("eval_rows", {8: 8, 5: 5}, rows_evaluated),
    Row("eval_mask_rate", {0.25: {32}, 0.5: {64}}, hidden_in_evaluation),
    Row("save_every", {1: [1, 2, 3, 4, 5, 6], 4: [3, 4, 6]}, saved_steps, PHASES),
    Row("keep", {1: [3, 6], 2: [3, 5, 6]}, saved_steps, PHASES),
    Row("babylm_rules", {False: [6], True: [2, 6]}, saved_steps, SPARSE),
    Row("babylm_rules", {False: False, True: True}, is_refused, {"schedule": "11_CLM"}),
    # machine
    Row("device", {"cpu": {"cpu"}, "cuda": CUDA}, devices),
    Row("precision", {"float32": FLOAT32, "bfloat16": BFLOAT16}, dtypes),
    Row("compile", {"off": 0, "on": 1, "auto": 0}, n_compiled),
]

TRAIN = Program(call_train, TINY, TRAIN_ROWS, settings=train.Settings)

# -------------------------------------------------------------------------------------- finetune.py


def n_epochs(run: Trial) -> int:
    return len(re.findall(r"rte seed \d+  epoch", run.printed))


def items_of_an_epoch(run: Trial) -> tuple[int, int]:
    """In training and in evaluation."""
    n_trained = sum(len(forward.tokens) for forward in run.training)
    n_evaluated = sum(len(forward.tokens) for forward in run.evaluation)
    return n_trained // n_epochs(run), n_evaluated // n_epochs(run)


def tasks_done(run: Trial) -> list[str]:
    return list(read_result(run)["tasks"])


def seeds_done(run: Trial) -> list[str]:
    return list(read_result(run)["tasks"]["rte"]["seeds"])


def first_embedding(run: Trial) -> list[float]:
    return run.training[0].weights["embedding.tokens.weight"].flatten().tolist()


def first_head(run: Trial) -> list[float]:
    return run.training[0].weights["out.weight"].flatten().tolist()


def dropped_in_head(run: Trial) -> list[bool]:
    return head_inputs(run.training)[0].eq(0).flatten().tolist()


def causal_layers(run: Trial) -> list[bool]:
    return [attention.causal for attention in run.training[0].attention]


def pools(run: Trial) -> list[str]:
    """By which pools of the last block's result the head could have been given what it was."""
    last = run.training[0]
    classifier = last.of(Classifier)[0].module
    (dense,) = [call for call in last.calls if call.module is classifier.dense]
    x = last.of(BACKBONES["babyllama"].block)[-1].y
    vectors = {"start": x[:, 0], "mean": x.mean(1), "last": x[:, -1]}
    close = partial(torch.allclose, dense.x, rtol=1e-4, atol=1e-5)
    return [name for name, vector in vectors.items() if close(bare_norm(vector))]


def adapter_ranks(run: Trial) -> set[int]:
    return {len(call.module.down.weight) for call in run.training[0].of(LowRank)}


def embedding_moves(run: Trial) -> bool:
    """Whether what adapters leave alone is trained."""
    before, after = (forward.weights["embedding.tokens.weight"] for forward in run.training[:2])
    return not torch.equal(before, after)


def adapter_scale(run: Trial) -> float:
    """How often an adapter's product is added to the result of the matrix beside it."""
    adapter, x, y = run.evaluation[-1].of(LowRank)[0]
    with torch.inference_mode():
        change = adapter.up(adapter.down(x))
        return ((y - adapter.linear(x)) / change).median().item()


def adapter_inputs(passes: list[Pass]) -> list[Tensor]:
    inputs = []
    for forward in passes:
        downs = [call.module.down for call in forward.of(LowRank)]
        inputs += [call.x for call in forward.calls if call.module in downs]
    return inputs


def adapter_dropout(run: Trial) -> tuple:
    """In training and in evaluation."""
    return zeros(adapter_inputs(run.training)), zeros(adapter_inputs(run.evaluation))


def head_inputs(passes: list[Pass]) -> list[Tensor]:
    """What the last matrix of a classifier is given."""
    inputs = []
    for forward in passes:
        out = forward.of(Classifier)[0].module.out
        inputs += [call.x for call in forward.calls if call.module is out]
    return inputs


def head_dropout(run: Trial) -> tuple:
    """In training and in evaluation."""
    return zeros(head_inputs(run.training)), zeros(head_inputs(run.evaluation))


def first_rate(run: Trial) -> float:
    """How far the first step goes: whatever its memory, Adam moves by the learning rate."""
    return movements([forward.weights for forward in run.training[:2]])[0]


def rate_half_way(run: Trial) -> float:
    """Of the third of four steps, by the part of the head that weight decay takes; peak: 1."""
    before, after = (forward.weights["dense.weight"] for forward in run.training[2:4])
    return (1 - kept(before, after)) / 0.5


def kept_of_matrix_and_head(run: Trial) -> tuple:
    before, after = (forward.weights for forward in run.training[:2])
    return tuple(kept(before[name], after[name]) for name in ("blocks.0.out.weight", "dense.bias"))


def most_trained_rows(run: Trial) -> int:
    return max(len(forward.tokens) for forward in run.training)


def call_scripted(arguments: list[str]):
    """Fine-tune for three epochs, of which F1, the loss and the correlation prefer one each."""
    losses = iter((0.9, 0.3, 0.6))

    def predict(classifier, split, settings):
        loss = next(losses)
        guess = np.zeros(len(split.labels), int)
        if loss == 0.9:
            guess[:] = 1  # all that is true is found
        if loss == 0.6:
            guess[split.labels.argmax()] = 1  # all that is found is true
        return guess, loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "predict", predict)
        finetune.main(arguments)


def chosen_epoch(run: Trial) -> int:
    return read_result(run)["tasks"]["cola"]["seeds"]["12"]["epoch"]


ADAPTERS = {"lora_rank": 2}
# a step at the peak takes half of each weight, beside which what Adam moves is nothing
DECAY = {"lr": 1e-6, "weight_decay": 0.5 / 1e-6, "epochs": 1}
COLA = {"tasks": "cola", "epochs": 3}

FINETUNE_ROWS = [
    Row("run", ("@run", "@other_run"), first_embedding),
    Row("data", {"@glue": (32, 16), "@short_glue": (24, 8)}, items_of_an_epoch),
    Row("tasks", {"rte": ["rte"], "rte,cola": ["cola", "rte"]}, tasks_done),
    Row("task_settings", {"{}": 2, "{'rte': dict(epochs=3)}": 3}, n_epochs),
    Row("seeds", {"12": ["12"], "12,13": ["12", "13"]}, seeds_done),
    Row("seeds", ("12", "13"), first_head),
    Row("seeds", ("12", "13"), first_tokens),
    Row("seeds", ("12", "13"), dropped_in_head, {"dropout": 0.5}),
    Row("out", {"@out/result.json": ["result.json"], "@out/b.json": ["b.json"]}, files),
    Row("weights", ("average", "last"), first_embedding, {"run": "@averaged_run"}),
    # what the model sees
    Row("mask", {"full": [False, False], "causal": [True, True]}, causal_layers),
    Row("n_open", {"": [True, True], "1": [True, False]}, causal_layers, {"mask": "causal"}),
    Row("pool", {"start": ["start"], "mean": ["mean"], "last": ["last"]}, pools),
    Row("max_length", {16: {16}, 12: {12}}, row_lengths),
    # what is learnt
    Row("lora_rank", {0: set(), 2: {2}, 3: {3}}, adapter_ranks),
    Row("lora_rank", {0: True, 2: False}, embedding_moves),
    Row("lora_alpha", {8.0: near(4, 0.01), 2.0: near(1, 0.01)}, adapter_scale, ADAPTERS),
    Row("lora_dropout", {0.0: (0, 0), 0.5: (near(0.5, 0.1), 0)}, adapter_dropout, ADAPTERS),
    Row("dropout", {0.0: (0, 0), 0.5: (near(0.5, 0.1), 0)}, head_dropout),
    Row("lr", {RATE: near(RATE, 0.01), 4 * RATE: near(4 * RATE, 0.01)}, first_rate),
    Row("lr_decay", {"linear": near(0.5), "cosine": near(0.1 + 0.9 / 2)}, rate_half_way, DECAY),
    Row("warmup", {0.0: near(RATE, 0.01), 0.5: near(RATE / 4, 0.01)}, first_rate),
    # Adam hardly moves where all gradients are far below its eps
    Row("clip", {0.0: near(RATE, 0.01), 1e-20: near(0)}, first_rate),
    Row(
        "weight_decay",
        {0.0: near((1, 1), 0.01), 0.5 / 1e-6: near((0.5, 0.5), 0.01)},
        kept_of_matrix_and_head,
        {"lr": 1e-6, "epochs": 1},
    ),
    Row("batch_rows", {8: 8, 16: 16}, most_trained_rows),
    Row("epochs", {2: 2, 3: 3}, n_epochs),
    Row("patience", {0: 4, 1: 2, 2: 3}, n_epochs, {"lr": 1e-30, "epochs": 4}),
    Row("select", {"f1": 1, "loss": 2, "metric": 3}, chosen_epoch, COLA, call_scripted),
    Row("limit", {0: (32, 16), 5: (5, 5)}, items_of_an_epoch),
    Row("device", {"cpu": {"cpu"}, "cuda": CUDA}, devices),
    Row("dtype", {"float32": FLOAT32, "bfloat16": BFLOAT16}, dtypes),
]

FINETUNE = Program(
    finetune.main,
    dict(
        run="@run",
        data="@glue",
        tasks="rte",
        out="@out/result.json",
        max_length=16,
        lora_dropout=0.0,
        dropout=0.0,
        lr=RATE,
        batch_rows=8,
        epochs=2,
        patience=0,
        device="cpu",
    ),
    FINETUNE_ROWS,
    positional=("run",),
    settings=finetune.Settings,
)

# --------------------------------------------------------------------------------------- the tests

PROGRAMS = {"train": TRAIN, "finetune": FINETUNE}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_setting_has_a_row(name):
    program = PROGRAMS[name]
    assert {row.setting for row in program.rows} == program.known()


@pytest.mark.parametrize("program, row", cases(PROGRAMS))
def test_a_setting_does_what_its_comment_says(lab, program, row):
    assert not lab.differences(program, row)
