"""Scores against a plain reference, task files, results: python -m pytest tests/test_eval.py"""

import csv
import gzip
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import prepare
from antlm.checkpoint import save_checkpoint
from antlm.tokenizer import BOUNDARIES, MASK, START, Tokenizer, save_tokenizer, train_bpe
from babylm import aoa, results
from babylm.protocols import PROTOCOLS
from babylm.results import read_result, spearman, summarize, write_result
from babylm.tasks import BLIMP, WUG, Choice, Item, fingerprint, read_tasks
from config import UserError
from data import OBJECTIVES
from eval import MODES
from model import BACKBONES, ModelConfig, Transformer

ROOT = Path(__file__).parent.parent
BLIMP_FILES = ROOT.parent / "shared" / "data" / "eval" / "blimp_filtered"
TEXT = """The cats sleep in the garden and the dog sees them.
Zoë said the naïve café owner sleeps in Ærøskøbing.
Who have those men revealed they helped? The girl who sees the cats sleeps.
Schöne Grüße aus Köln, said the owner of the garden."""
PAIRS = [
    ("The cats sleep.", "The cats sleeps."),
    ("The dog sees them.", "The dog see them."),
    ("Who sees the girl?\nThe dog sees the girl.", "Who sees the girl?\nThe garden the sees."),
    ("Zoë sleeps in Köln.", "Zoë sleep in Köln."),
    ("The dog sees them.", "Them sees the dog."),
]
# contexts and targets: multi-byte characters on both sides, targets that start inside a token
CHOICES = [
    ("Zoë said the naïve", (" café owner sleeps.", " Grüße sleeps.")),
    ("The owner 🐟 of the café", (" schläft in Ærøskøbing 🐟.", " sees the dog.")),
    ("The cats sl", ("eep in the garden.", "eeps in the garden.")),
    ("The na", ("ïve café", "ï")),
    ("Sch", ("öne Grüße", "ö")),
    ("Line one.\nThe dog", (" sees them.\nThe cats", " sleep")),
]
SENTENCES = [(sentence, 0) for sentence in itertools.chain(*PAIRS)]
COMPLETIONS = []
for context, ends in CHOICES:
    COMPLETIONS += [(context + end, len(context)) for end in ends]
OPTIONS = SENTENCES + COMPLETIONS

each_backbone = pytest.mark.parametrize("backbone", BACKBONES)
each_mode = pytest.mark.parametrize("mode", MODES)
each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS)
needs_blimp = pytest.mark.skipif(
    not BLIMP_FILES.is_dir(), reason="needs BLiMP as filtered for BabyLM beside the repository"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    pieces = prepare.count_pieces([folder / "text.txt"])
    save_tokenizer(folder / "tokenizer.json", train_bpe(pieces, 80))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.json")


def make_model(backbone: str) -> Transformer:
    torch.manual_seed(5)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, n_ff=48, n_bucket=4, max_position=8)
    model = Transformer(ModelConfig(backbone, 340, **sizes)).eval()
    for p in model.parameters():
        if p.dim() == 2:  # as initialised, all sentences of a length score nearly the same
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture
def make_run(tmp_path, folder, tokenizer):
    """A function that adds a checkpoint to the run folder tmp_path / "run", which it returns."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())

    def make(model=None, step=10, schedule="1_CLM+1_MLM", words=None) -> Path:
        save_checkpoint(
            run / f"step_{step:07}.pt",
            model or make_model("babyllama"),
            step=step,
            words=words,
            settings=dict(schedule=schedule, block_size=16),
            boundary="line",
            tokenizer_sha256=tokenizer.sha256,
        )
        return run

    return make


def write_lines(path: Path, *records: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_pairs(path: Path, pairs=PAIRS, **fields) -> Path:
    records = [{"sentence_good": good, "sentence_bad": bad} | fields for good, bad in pairs]
    return write_lines(path, *records)


def main(*args) -> None:
    evaluation.main([*map(str, args), "--device", "cpu"])


def error(*args) -> str:
    with pytest.raises(UserError) as raised:
        main(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def score(model, options, tokenizer, mode, protocol="2026", **settings) -> np.ndarray:
    """The summed scores of options; where the protocol has it so, the mean over their tokens."""
    year = PROTOCOLS[protocol]
    ids, first = evaluation.encode(options, tokenizer, "line", year, mode)
    settings |= {"names": [""] * len(ids), "skip_start": year.skip_start}
    totals, n_targets = evaluation.score(model, ids, first, mode, **settings)
    if year.masked_mean and mode != "causal":
        return totals / n_targets
    return totals


# -------------------------------------------------------------------------------- scores of options


@torch.no_grad()
def token_scores(
    model, tokenizer, text: str, start: int, mode: str, protocol: str = "2026"
) -> list[float]:
    """The scores of the target's tokens by their definition: one pass of one row for each."""
    if protocol == "2024" and start == 0:
        text = " " + text
    pieces = tokenizer.encode(text)
    if protocol == "2024" and start > 0:
        first = len(tokenizer.encode(text[:start]))
    else:
        first = 0
        while len(tokenizer.bpe.decode_bytes(pieces[: first + 1])) <= len(text[:start].encode()):
            first += 1
    ids = [START if tokenizer.decode([i]) == "\n" else i for i in pieces]  # boundary "line"
    if not (protocol == "2024" and mode == "causal" and start > 0):
        ids = [START, *ids]
        first += 1

    values = []
    for i in range(first, len(ids)):
        if mode == "causal":
            logits = model(torch.tensor([ids[:i]]), causal=True)[0, -1]
        elif ids[i] == START and protocol == "2024":
            continue
        else:
            row = ids[:i] + [MASK] + ids[i + 1 :]
            position = i - 1 if mode == "mntp" else i
            logits = model(torch.tensor([row]), causal=False)[0, position]
        values.append(logits.double().log_softmax(-1)[ids[i]].item())
    return values


def reference(model, tokenizer, text: str, start: int, mode: str, protocol: str = "2026") -> float:
    values = token_scores(model, tokenizer, text, start, mode, protocol)
    if protocol == "2024" and mode != "causal":
        return sum(values) / len(values)
    return sum(values)


def test_every_mode_of_an_objective_can_be_asked():
    assert {objective.mode for objective in OBJECTIVES.values()} <= set(MODES)


@each_backbone
@each_mode
@each_protocol
def test_scores_equal_a_plain_reference(tokenizer, backbone, mode, protocol):
    model = make_model(backbone)
    options = OPTIONS
    if protocol == "2024":
        # that protocol counts the tokens of the context alone, so the target must start a token
        options = [(text, start) for text, start in OPTIONS if start == 0 or text[start] == " "]
    expected = [reference(model, tokenizer, *option, mode, protocol) for option in options]
    scores = score(model, options, tokenizer, mode, protocol, batch_tokens=64)
    assert scores == pytest.approx(expected, abs=1e-4)
    n_distinct = len({round(value, 3) for value in expected})
    assert n_distinct > len(set(options)) / 2, "or agreement would say little"


@pytest.mark.slow
@needs_blimp
@each_backbone
@each_mode
def test_scores_of_real_pairs_equal_a_plain_reference(tokenizer, backbone, mode):
    model = make_model(backbone)
    options = []
    for file in sorted(BLIMP_FILES.glob("*.jsonl"))[::12]:
        options += read(file, limit=1)[0].choice.options
    expected = [reference(model, tokenizer, *option, mode) for option in options]
    assert score(model, options, tokenizer, mode) == pytest.approx(expected, abs=1e-4)


@each_mode
def test_scores_do_not_depend_on_the_batch(tokenizer, mode):
    model = make_model("ltg_bert")
    shapes = []
    model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    expected = score(model, OPTIONS, tokenizer, mode, batch_tokens=1)
    assert all(n_rows == 1 for n_rows, _ in shapes)
    for batch_tokens in (23, 100, 100_000):
        shapes.clear()
        scores = score(model, OPTIONS, tokenizer, mode, batch_tokens=batch_tokens)
        assert scores == pytest.approx(expected, abs=1e-5)
        assert all(n_rows == 1 or n_rows * T <= batch_tokens for n_rows, T in shapes)


def test_bfloat16_is_close_and_its_softmax_in_float32(tokenizer):
    model = make_model("babyllama")
    exact = score(model, SENTENCES, tokenizer, "causal")
    rough = score(model, SENTENCES, tokenizer, "causal", dtype=torch.bfloat16)
    assert rough == pytest.approx(exact, rel=0.05)
    assert (rough != exact).any()
    # single log-probabilities keep more digits than bfloat16 has
    ids = np.array([tokenizer.encode_text("The cats sleep in the garden", "line")])
    questions = evaluation.ask_causal(ids, 1)
    values = evaluation.log_probs(model, questions, causal=True, dtype=torch.bfloat16)
    assert (torch.from_numpy(values).bfloat16().float().numpy() != values).any()


@each_mode
def test_a_text_longer_than_the_model_takes_is_named(tokenizer, mode):
    model = make_model("babyllama")
    model.max_tokens = 8
    ids, first = evaluation.encode(SENTENCES, tokenizer, "line", PROTOCOLS["2026"], mode)
    names = [f"here:{number}" for number in range(len(ids))]
    too_long = next(name for name, row in zip(names, ids, strict=True) if len(row) > 8)
    with pytest.raises(UserError, match=rf"^{too_long}: \d+ tokens, .* 8$"):
        evaluation.score(model, ids, first, mode, names)


@each_mode
@each_protocol
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_the_masked_modes_of_2024_alone_leave_out_the_start_token(
    tokenizer, boundary, protocol, mode
):
    """Where each newline is a start token, a text of newlines alone has nothing to score."""
    model = make_model("babyllama")
    year = PROTOCOLS[protocol]
    ids, first = evaluation.encode([("The dog\n\n", 7)], tokenizer, boundary, year, mode)
    assert len(ids[0]) - first[0] == 2
    arguments = {"names": ["here:7"], "skip_start": year.skip_start}
    if protocol == "2024" and mode != "causal" and boundary != "document":
        with pytest.raises(UserError, match=f"here:7.*{mode}"):
            evaluation.score(model, ids, first, mode, **arguments)
        return
    totals, n_targets = evaluation.score(model, ids, first, mode, **arguments)
    assert totals[0] < 0
    assert n_targets.tolist() == [2]


# ------------------------------------------------------------------------------ where targets start


def test_targets_start_where_hugging_face_offsets_say(folder, tokenizer):
    """The pipelines from 2025 on score the tokens that end, in characters, beyond the context."""
    tokenizers = pytest.importorskip("tokenizers")
    hf = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    options = []
    for text, _ in OPTIONS:
        options += [(text, start) for start in range(1, len(text))]
    ids, first = evaluation.encode(options, tokenizer, "none", PROTOCOLS["2026"], "causal")
    for (text, start), row, index in zip(options, ids, first, strict=True):
        encoded = hf.encode(text)
        assert encoded.ids[1:] == row[1:].tolist()
        ends = [end for _, end in encoded.offsets]
        assert index == next(i for i, end in enumerate(ends) if end > start), (text, start)


ODD = [
    "a",
    "?",
    "\n",
    " a",
    "a ",
    "\u0301",
    "世",
    "👩‍👩‍👧",
    "\u3000x",
    "a\r\nb",
    "<s>",
    "\0",
    "\ufeff",
]


@pytest.mark.parametrize("boundary", BOUNDARIES)
@each_protocol
def test_the_tokens_of_odd_texts_are_the_text_and_the_target_its_end(tokenizer, boundary, protocol):
    newline = tokenizer.encode("\n")[0]
    options = [(odd, 0) for odd in ODD]
    options += [(f"The cats {odd}", len("The cats ")) for odd in ODD]
    ids, first = evaluation.encode(options, tokenizer, boundary, PROTOCOLS[protocol], "masked")
    for (text, start), row, index in zip(options, ids, first, strict=True):
        if protocol == "2024" and start == 0:
            text = " " + text
        elif protocol == "2024":
            start = len("The cats")
        pieces = [newline if i == START else i for i in row[1:].tolist()]
        assert tokenizer.bpe.decode_bytes(pieces).decode() == text
        # the target's first token is the first that ends beyond the context
        context = len(text[:start].encode())
        assert len(tokenizer.bpe.decode_bytes(pieces[: index - 1])) <= context
        assert len(tokenizer.bpe.decode_bytes(pieces[:index])) > context


def test_sentences_of_one_token_are_scored(tokenizer):
    options = [("a", 0), ("?", 0), ("b", 0)]
    assert [len(tokenizer.encode(text)) for text, _ in options] == [1, 1, 1]
    for mode in MODES:
        scores = score(make_model("ltg_bert"), options, tokenizer, mode)
        assert np.isfinite(scores).all()
        assert len(set(scores)) == 3


# --------------------------------------------------------------------------------------- task files


def read(path: Path, protocol: str = "2026", limit: int = 0) -> list[Item]:
    return read_tasks([str(path)], PROTOCOLS[protocol].kinds, limit).items


EWOK = dict(Context1="Él vio.", Context2="No.", Target1="Sí.", Target2="Ya.", Domain="social")
ENTITY = dict(input_prefix="Box 0 has ", options=["a", "b", "c"], numops=2)
COMPS = dict(prefix_acceptable="a sock", prefix_unacceptable="a tie", property_phrase="is warm.")
PIQA = dict(prompt="To sit,", solution0="run.", solution1="use a chair.", label=1, example_id="x7")
WUGS = dict(sentences="wug. wugness\twug. wuggity", ratio=0.25)

# protocols, a file, a line of it, and the choice that they make of it
KIND_CASES = [
    (
        ("2026", "2025", "2024"),
        "blimp/a.jsonl",
        dict(sentence_good="G.", sentence_bad="B.", linguistics_term="term"),
        Choice("term", "a", [("G.", 0), ("B.", 0)]),
    ),
    (
        ("2026", "2025", "2024"),
        "supplement/b.jsonl",
        dict(sentence_good="A: x\nB: y", sentence_bad="A: x\nB: z"),
        Choice("", "b", [("A: x\nB: y", 0), ("A: x\nB: z", 0)]),
    ),
    (("2026",), "ewok/c.jsonl", EWOK, Choice("", "social", [("Él vio. Sí.", 7), ("No. Sí.", 3)])),
    (
        ("2025", "2024"),
        "ewok/c.jsonl",
        EWOK,
        Choice("", "social", [("Él vio. Sí.", 7), ("Él vio. Ya.", 7)]),
    ),
    (
        ("2026", "2025"),
        "entity/regular.jsonl",
        ENTITY,
        Choice(
            "regular",
            "regular_2_ops",
            [("Box 0 has a", 10), ("Box 0 has b", 10), ("Box 0 has c", 10)],
        ),
    ),
    (
        ("2025",),
        "entity/regular.jsonl",
        ENTITY | {"options": ["a.", "nothing."]},
        Choice("regular", "regular_2_ops", [("Box 0 has a.", 10), ("Box 0 has nothing.", 10)]),
    ),
    (
        ("2026", "2025"),
        "comps/comps_base.jsonl",
        COMPS,
        Choice("", "comps_base", [("a sock is warm.", 7), ("a tie is warm.", 6)]),
    ),
    (
        ("2026",),
        "global_piqa_nonparallel/eng_latn.jsonl",
        PIQA,
        Choice(
            "",
            "global_piqa_nonparallel",
            [("To sit, run.", 7), ("To sit, use a chair.", 7)],
            right=1,
            id="x7",
        ),
    ),
    (
        ("2026",),
        "global_piqa_parallel/eng_latn.jsonl",
        PIQA | dict(solution2="é.", solution3="fly.", label=2),
        Choice(
            "",
            "global_piqa_parallel",
            [
                ("To sit, run.", 7),
                ("To sit, use a chair.", 7),
                ("To sit, é.", 7),
                ("To sit, fly.", 7),
            ],
            right=2,
            id="x7",
        ),
    ),
    (
        ("2025",),
        "wug_adj/wug.jsonl",
        WUGS,
        Choice("", "wug", [("wug. wugness", 0), ("wug. wuggity", 0)], ratio=0.25),
    ),
]


@each_protocol
def test_each_kind_of_task_is_read(tmp_path, protocol):
    kinds = set()
    for protocols, name, record, choice in KIND_CASES:
        if protocol in protocols:
            path = write_lines(tmp_path / name, record)
            (item,) = read(path.parent, protocol)
            assert item.choice == choice
            assert item.task == path.parent.name
            kinds.add(item.kind)
    assert kinds == set(PROTOCOLS[protocol].kinds)


@pytest.mark.parametrize(
    "protocol, record",
    [
        ("2026", WUGS),
        ("2025", PIQA),
        ("2024", ENTITY),
        ("2024", COMPS),
        ("2024", PIQA),
        ("2024", WUGS),
    ],
)
def test_a_set_that_a_year_does_not_have_is_refused(tmp_path, protocol, record):
    path = write_lines(tmp_path / "t.jsonl", record)
    with pytest.raises(UserError, match="t.jsonl: .* this year of the challenge does not have"):
        read(path, protocol)


def test_lines_in_which_an_option_says_nothing_are_left_out_in_2026(tmp_path):
    records = []
    for options in (["a", "b"], ["the nothing", "b"], ["a", "nothing."], ["c", "Nothing"]):
        records.append(ENTITY | {"options": options})
    path = write_lines(tmp_path / "regular.jsonl", *records)
    assert [item.source for item in read(path)] == [f"{path}:1", f"{path}:4"]
    assert len(read(path, "2025")) == 4
    # a limit is one of items, not of lines
    assert [item.source for item in read(path, limit=2)] == [f"{path}:1", f"{path}:4"]
    write_lines(path, records[1])
    with pytest.raises(UserError, match="regular.jsonl: .*leaves out every line"):
        read(path)


def test_lines_may_be_blank_and_end_in_crlf_and_a_limit_counts_the_others(tmp_path):
    line = b'{"sentence_good": "G.", "sentence_bad": "B."}'
    (tmp_path / "x.jsonl").write_bytes(b"\n" + line + b"\r\n\r\n" + line + b"\n" + line)
    items = read(tmp_path, limit=2)
    assert [item.source for item in items] == [f"{tmp_path}/x.jsonl:2", f"{tmp_path}/x.jsonl:4"]


@pytest.mark.parametrize("newline", [b"\r", b"\r\n", b"\r\r\n"], ids=repr)
def test_lines_end_as_on_any_system(tmp_path, newline):
    path = write_pairs(tmp_path / "x.jsonl")
    items = read(path)
    path.write_bytes(path.read_bytes().replace(b"\n", newline))
    assert fingerprint(read(path)) == fingerprint(items)


def test_hidden_copies_are_left_out_and_linked_folders_read_once(tmp_path, capsys):
    root = tmp_path / "tasks"
    elsewhere = tmp_path / "elsewhere" / "supplement"
    path = write_pairs(root / "blimp" / "a.jsonl")
    write_pairs(elsewhere / "b.jsonl")
    copy = root / "blimp" / ".ipynb_checkpoints" / "a-checkpoint.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    (root / "blimp" / "._a.jsonl").write_bytes(b"\0\5\x16\7\0\2\0\0")
    (root / "supplement").symlink_to(elsewhere)
    (root / "again").symlink_to("blimp")
    (root / "a.jsonl.gz").touch()
    items = read(root)
    assert sorted({(item.task, item.choice.subset) for item in items}) == [
        ("blimp", "a"),
        ("supplement", "b"),
    ]
    assert len(items) == 2 * len(PAIRS)
    assert capsys.readouterr().err == (
        f"{root}: left out 2 hidden (first blimp/._a.jsonl), "
        "1 of other endings (first a.jsonl.gz)\n"
    )


def test_several_paths_are_read_as_one_and_none_twice(tmp_path):
    kinds = PROTOCOLS["2026"].kinds
    first = write_pairs(tmp_path / "one" / "blimp" / "a.jsonl")
    second = write_pairs(tmp_path / "two" / "supplement" / "b.jsonl")
    other = write_pairs(tmp_path / "two" / "blimp" / "a.jsonl")
    tasks = read_tasks([str(first.parent), str(second.parent)], kinds)
    assert {item.task for item in tasks.items} == {"blimp", "supplement"}
    assert tasks.folder == first.parent

    # two tasks of one name would be averaged as one
    for twice in (other.parent, first.parent):
        with pytest.raises(UserError, match=f"{twice}: .*has the task blimp"):
            read_tasks([str(first.parent), str(twice)], kinds)
    # a folder above both tells them apart by their paths
    names = {item.task for item in read(tmp_path)}
    assert names == {"one/blimp", "two/blimp", "two/supplement"}


def test_kinds_in_one_folder_are_not_averaged_with_each_other(tmp_path):
    write_pairs(tmp_path / "mixed" / "a.jsonl", PAIRS[:2])
    write_lines(tmp_path / "mixed" / "b.jsonl", COMPS)
    write_pairs(tmp_path / "pure" / "a.jsonl", PAIRS[:1])
    tasks = [item.task for item in read(tmp_path)]
    assert tasks == ["mixed/blimp", "mixed/blimp", "mixed/comps", "pure"]


def test_the_same_reading_times_in_two_folders_are_scored_once(tmp_path):
    for folder in ("fast_eval", "full_eval"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "reading_data.csv").write_text("item,word\n")
    tasks = read_tasks([str(tmp_path)], ())
    assert tasks.reading == tmp_path / "fast_eval" / "reading_data.csv"
    (tmp_path / "full_eval" / "reading_data.csv").write_text("item,words\n")
    with pytest.raises(UserError, match="fast_eval/reading_data.csv and .* differ"):
        read_tasks([str(tmp_path)], ())


@needs_blimp
@pytest.mark.slow
def test_the_real_blimp_is_read():
    items = read(BLIMP_FILES)
    assert len(items) == 59_875
    choices = [item.choice for item in items]
    assert len({choice.subset for choice in choices}) == 67
    assert len({choice.group for choice in choices}) == 13
    assert sum(choice.options[0] == choice.options[1] for choice in choices) == 7
    result = summarize(items, {mode: [[0.0, -1.0]] * len(items) for mode in MODES})
    assert result["accuracy"]["causal"] == 100
    table = results.table("blimp_filtered", result, list(MODES))
    assert max(map(len, table.splitlines())) <= 100


DATA = ROOT.parent / "shared" / "data" / "eval"


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder, protocol, items, chance",
    [
        ("entity_tracking", "2026", 517 + 409 + 405 + 425 + 388 + 94, 20),
        ("entity_tracking", "2025", 3152, 20),
        ("global_piqa_nonparallel", "2026", 100, 50),
        ("wug_adj_nominalization", "2025", 200, 0),
    ],
)
def test_the_real_sets_of_other_years_are_read(folder, protocol, items, chance):
    if not (DATA / folder).is_dir():
        pytest.skip("needs the challenge's files beside the repository")
    tasks = read(DATA / folder, protocol)
    assert len(tasks) == items
    # a model that scores all alike
    scores = [[0.0] * len(item.choice.options) for item in tasks]
    assert summarize(tasks, {"causal": scores})["accuracy"]["causal"] == pytest.approx(chance)


BAD_FILES = {
    b"": "t.jsonl: is empty",
    b"\n \n": "t.jsonl: is empty",
    b"{broken": "t.jsonl:1: not JSON",
    b'{"sentence_good": "x", "sentence_bad": "\xff"}': "t.jsonl:1: not JSON in UTF-8",
    b"[1, 2]": "t.jsonl:1: a JSON object",
    gzip.compress(b"{}"): "t.jsonl: is compressed by gzip, not text",
    '{"sentence_good": "x"}\n'.encode("utf-16"): "t.jsonl: is text in UTF-16, not text",
    b'{"sentence_good": "x"}': "t.jsonl:1: the field 'sentence_bad' is missing",
    b'{"sentence_good": "x", "sentence_bad": "y"}\n{"sentence_good": 3, "sentence_bad": "y"}': (
        "t.jsonl:2: the field 'sentence_good' must be text, not '3'"
    ),
    b'{"sentence_good": "x", "sentence_bad": " "}': "'sentence_bad' must be text",
    b'{"Target1": "x", "Target2": "y", "Context1": "z", "Domain": "d"}': "'Context2' is missing",
    b'{"input_prefix": "x", "options": ["a"], "numops": 1}': "must be two or more texts",
    b'{"input_prefix": "x", "options": ["a", 1], "numops": 1}': "must be two or more texts",
    b'{"input_prefix": "x", "options": ["a", "b"], "numops": "1"}': "must be a whole number",
    b'{"question": "x"}': "sentence_good, Target1, input_prefix, prefix_acceptable",
}
BAD_RECORDS = [
    ("2026", PIQA | {"label": 2}, "'label' must be the number of one of the solutions, not '2'"),
    ("2026", PIQA | {"label": -1}, "'label' must be the number of one of the solutions"),
    ("2026", PIQA | {"label": True}, "'label' must be the number of one of the solutions"),
    ("2026", PIQA | {"solution2": None}, "'solution2' must be text, not 'None'"),
    ("2026", PIQA | {"example_id": 7}, "'example_id' must be text, not '7'"),
    ("2026", {"solution0": "a", "solution1": "b"}, "'prompt' is missing"),
    ("2025", WUGS | {"ratio": 1.5}, "'ratio' must be a number from 0 to 1, not '1.5'"),
    ("2025", WUGS | {"ratio": float("nan")}, "'ratio' must be a number from 0 to 1, not 'nan'"),
    ("2025", WUGS | {"ratio": None}, "'ratio' must be a number from 0 to 1"),
    ("2025", {"sentences": "a\tb"}, "'ratio' is missing"),
    ("2025", WUGS | {"sentences": "a b"}, "'sentences' must be two texts with a tab between"),
    ("2025", WUGS | {"sentences": "a\t "}, "'sentences' must be two texts with a tab between"),
    ("2025", WUGS | {"sentences": "a\tb\tc"}, "'sentences' must be two texts with a tab between"),
]


@pytest.mark.parametrize("content", BAD_FILES, ids=lambda content: repr(content[:40]))
def test_a_bad_task_file_ends_in_one_line(tmp_path, content):
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(UserError) as raised:
        read(tmp_path / "t.jsonl")
    assert BAD_FILES[content] in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("protocol, record, message", BAD_RECORDS)
def test_a_bad_line_is_named_with_its_field(tmp_path, protocol, record, message):
    path = write_lines(tmp_path / "t.jsonl", record)
    with pytest.raises(UserError) as raised:
        read(path, protocol)
    assert str(raised.value).startswith(f"{path}:1: the field {message}")
    assert "\n" not in str(raised.value)


def test_the_fingerprint_is_that_of_the_texts(tmp_path):
    one = read(write_pairs(tmp_path / "one.jsonl"))
    same = read(write_pairs(tmp_path / "two.jsonl", linguistics_term="verbs"))
    other = read(write_pairs(tmp_path / "three.jsonl", PAIRS[1:]))
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(other)


# ------------------------------------------------------------------------------ points and averages


def item(group: str, subset: str, n_options: int = 2, right: int = 0) -> Item:
    return Item("here:1", "task", BLIMP, Choice(group, subset, [("x", 0)] * n_options, right))


def test_ties_share_the_point_and_means_are_unweighted():
    items = [item("g", "large")] * 3 + [item("g", "small"), item("h", "five", 5)]
    scores = [[-1, -2], [-3, -2], [-2, -2], [-5, -9], [-1, -1, -4, -1, -2]]
    result = summarize(items, {"causal": scores})
    accuracy = {name: subset["accuracy"]["causal"] for name, subset in result["subsets"].items()}
    ties = {name: subset["ties"]["causal"] for name, subset in result["subsets"].items()}
    assert accuracy == pytest.approx({"large": 50, "small": 100, "five": 100 / 3})
    assert ties == {"large": 1, "small": 0, "five": 1}
    assert result["groups"]["g"]["accuracy"]["causal"] == pytest.approx(75)
    assert result["accuracy"]["causal"] == pytest.approx((50 + 100 + 100 / 3) / 3)
    assert result["items"] == 5
    assert result["ties"]["causal"] == 2


def test_a_tie_between_wrong_options_earns_nothing():
    result = summarize([item("", "a", 3)], {"masked": [[-3, -1, -1]]})
    assert result["accuracy"]["masked"] == 0
    assert result["ties"]["masked"] == 0


def test_the_right_option_need_not_be_the_first():
    items = [item("", "a", 4, right=2)] * 4
    scores = [[-2, -2, -1, -2], [-1, -2, -3, -4], [-5, -1, -1, -5], [-1, -1, -2, -2]]
    result = summarize(items, {"causal": scores})
    assert result["accuracy"]["causal"] == pytest.approx(100 * 1.5 / 4)
    assert result["ties"]["causal"] == 1


def wug_items(ratios: list[float]) -> list[Item]:
    items = []
    for ratio in ratios:
        items.append(Item("here:1", "wug", WUG, Choice("", "wug", [("x", 0)] * 2, ratio=ratio)))
    return items


@pytest.mark.parametrize("seed", range(5))
def test_wug_is_the_rank_correlation_that_scipy_computes(seed):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    # few values, so that many tie
    scores = rng.integers(-20, -10, (30, 2)).astype(float)
    ratios = rng.integers(0, 5, 30) / 4
    preference = np.exp(scores[:, 0]) / np.exp(scores).sum(axis=1)
    expected = stats.spearmanr(np.round(preference, 9), ratios).statistic
    result = summarize(wug_items(ratios.tolist()), {"causal": scores.tolist()})
    assert result["accuracy"]["causal"] == pytest.approx(100 * expected, abs=1e-9)
    assert result["ties"]["causal"] == 0


def test_wug_by_hand():
    # the model prefers the first forms by 3, 1 and 2, people by ranks 3, 1.5 and 1.5
    scores = [[-1.0, -4.0], [-2.0, -3.0], [-900.0, -902.0]]
    # ranks 3, 1, 2 and 3, 1.5, 1.5: covariance 1.5 of variances 2 and 1.5
    assert spearman(scores, [0.9, 0.5, 0.5]) == pytest.approx(1.5 / math.sqrt(2 * 1.5))
    # neither side may prefer all alike
    assert spearman(scores, [0.5, 0.5, 0.5]) == 0
    assert spearman([[-1.0, -2.0]] * 3, [0.1, 0.2, 0.3]) == 0


def test_a_subset_whose_lines_name_several_groups_keeps_all_its_items():
    items = [item("g2", "x"), item("g1", "x"), item("g2", "x")]
    result = summarize(items, {"causal": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]})
    assert result["items"] == 3
    assert result["subsets"]["x"]["group"] == "g2"
    assert result["accuracy"]["causal"] == pytest.approx(200 / 3)


def test_a_group_that_is_its_only_subset_has_one_line():
    items = [item("verbs", "verbs"), item("nouns", "singular"), item("nouns", "plural")]
    result = summarize(items, {"causal": [[1.0, 0.0]] * 3})
    lines = results.table("task", result, ["causal"]).splitlines()
    labels = [line[:20].rstrip() for line in lines if not line.startswith("-")]
    assert labels == ["task", "nouns", "  plural", "  singular", "verbs", "macro average of 3"]


# ------------------------------------------------------------------ every kind, from file to result


def write_year(root: Path, protocol: str) -> None:
    """Write the files of KIND_CASES that a year has, each with a second line."""
    for protocols, name, record, _ in KIND_CASES:
        if protocol in protocols:
            second = dict(record)
            for field in ("sentence_bad", "Context2", "property_phrase", "prompt", "sentences"):
                if field in second:
                    second[field] += " é."
            if "options" in second:
                second["options"] = ["dogs", "the dog", "Köln"]
            if "label" in second:
                second["label"] = 0
            if "ratio" in second:
                second["ratio"] = 0.75
            write_lines(root / name, record, second)


def choice_score(model, tokenizer, item: Item, option: tuple, mode: str, protocol: str) -> float:
    values = token_scores(model, tokenizer, *option, mode, protocol)
    if "solution0" in item.kind.fields or (protocol == "2024" and mode != "causal"):
        return sum(values) / len(values)
    return sum(values)


@each_protocol
def test_the_scores_of_every_kind_equal_a_plain_reference(tmp_path, make_run, tokenizer, protocol):
    model = make_model("babyllama")
    root = tmp_path / "full_eval"
    write_year(root, protocol)
    flags = ["--protocol", protocol, "--mode", *MODES, "--out", tmp_path / "out.json"]
    main(make_run(model), "--task", root, *flags)
    result = read_result(tmp_path / "out.json")

    items = read(root, protocol)
    assert set(result["tasks"]) == {item.task for item in items}
    for mode in MODES:
        expected = {}
        for item in items:
            scores = []
            for option in item.choice.options:
                scores.append(choice_score(model, tokenizer, item, option, mode, protocol))
            expected.setdefault((item.task, item.choice.subset), []).append(scores)
        for (task, subset), scores in expected.items():
            entry = result["tasks"][task]["subsets"][subset]
            assert len(entry["scores"][mode]) == len(scores)
            for got, want in zip(entry["scores"][mode], scores, strict=True):
                assert got == pytest.approx(want, abs=1e-4), (task, mode)


def test_an_option_counts_by_the_mean_over_its_tokens_in_global_piqa(tmp_path, make_run):
    """The sum would prefer the short one."""
    record = PIQA | {"solution0": "a", "solution1": "a the the the the the", "label": 1}
    path = write_lines(tmp_path / "piqa" / "eng_latn.jsonl", record)
    main(make_run(), "--task", path.parent, "--mode", *MODES, "--out", tmp_path / "out.json")
    result = read_result(tmp_path / "out.json")["tasks"]["piqa"]
    for mode in MODES:
        (scores,) = result["subsets"]["global_piqa_nonparallel"]["scores"][mode]
        right = scores[1] > scores[0]
        assert result["accuracy"][mode] == 100 * right


# ------------------------------------------------------------------- tasks that compare with people


READING_COLUMNS = ("item", "word", "prev_item", "prev_word", "length", "context_length")
READING_COLUMNS += ("prev_length", "Subtlex_log10", "RTfirstfix", "RTfirstpass", "RTgopast")
READING_COLUMNS += ("RTrightbound", "self_paced_reading_time")
SENTENCE = "The cats sleep in the garden and the dog sees them ."
OTHER = "Zoë said the naïve café owner sleeps in Ærøskøbing ."


def write_reading(folder: Path) -> tuple[Path, list[dict]]:
    """Write reading times of 22 words, the first of each sentence without one before it."""
    rng = np.random.default_rng(4)
    rows = []
    for sentence in (SENTENCE, OTHER):
        words = sentence.split()
        for i, word in enumerate(words):
            row = {"item": " ".join(words[:i]), "word": word, "length": len(word)}
            row |= {"context_length": i, "prev_item": "", "prev_word": "", "prev_length": -1}
            if i > 0:
                row["prev_word"] = words[i - 1]
                row["prev_length"] = len(words[i - 1])
            if i > 1:
                row["prev_item"] = " ".join(words[: i - 1])
            for name in READING_COLUMNS[7:]:
                row[name] = round(float(rng.normal(200, 40)), 2)
            rows.append(row)
    rows[3]["RTgopast"] = ""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "reading_data.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, READING_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path, rows


@torch.no_grad()
def word_surprisal(model, tokenizer, text: str, word: str, mode: str) -> float:
    """The chain rule over the word's tokens, as evaluation_pipeline/reading asks."""
    surprisal = 0.0
    for number, token in enumerate(tokenizer.encode(word)):
        spelling = tokenizer.decode([token])
        if number > 0:
            token = tokenizer.encode(spelling)[0]
        ids = [START, *tokenizer.encode(text)]
        if mode == "causal":
            logits = model(torch.tensor([ids]), causal=True)[0, -1]
        else:
            position = len(ids) if mode == "masked" else len(ids) - 1
            logits = model(torch.tensor([[*ids, MASK, MASK, MASK]]), causal=False)[0, position]
        surprisal -= logits.double().log_softmax(-1)[token].item()
        text += spelling
    return surprisal


def explained(rows: list[dict], time: str, names: list[str], extra: list[str]) -> float:
    """R squared of a regression on these columns, all products of two, and further columns."""
    rows = [row for row in rows if all(row[name] not in ("", None) for name in [time, *names])]
    design = []
    for row in rows:
        terms = [1.0, *(row[name] for name in names)]
        terms += [row[a] * row[b] for a, b in itertools.combinations(names, 2)]
        design.append([*terms, *(row[name] for name in extra)])
    times = np.array([row[time] for row in rows], dtype=float)
    fit = np.linalg.lstsq(np.array(design, dtype=float), times, rcond=None)[0]
    errors = times - np.array(design, dtype=float) @ fit
    return 1 - errors.var() / times.var()


def gain(rows: list[dict], time: str, names: list[str]) -> float:
    base = explained(rows, time, names, [])
    return (explained(rows, time, names, ["pred"]) - base) / (1 - base)


def test_reading_equals_a_plain_computation(tmp_path, make_run, tokenizer, capsys):
    model = make_model("ltg_bert")
    path, rows = write_reading(tmp_path / "reading")
    main(make_run(model), "--task", path.parent, "--mode", *MODES)
    printed = capsys.readouterr().out
    result = read_result(tmp_path / "run" / f"eval_reading_10_{'_'.join(MODES)}.json")
    assert result["tasks"] == {}
    entry = result["human"]["reading"]
    assert entry["items"] == len(rows) == 22
    for mode in MODES:
        for row in rows:
            # an item that is empty is the text None, and a word without one before it has none
            text = row["item"] or "None"
            row["pred"] = word_surprisal(model, tokenizer, text, row["word"], mode)
            row["prev_pred"] = None
            if row["prev_item"]:
                before = (row["prev_item"], row["prev_word"])
                row["prev_pred"] = word_surprisal(model, tokenizer, *before, mode)
        assert entry["pred"][mode] == pytest.approx([row["pred"] for row in rows], abs=1e-4)
        expected = [math.nan if row["prev_pred"] is None else row["prev_pred"] for row in rows]
        assert entry["prev_pred"][mode] == pytest.approx(expected, abs=1e-4, nan_ok=True)

        names = ["Subtlex_log10", "length", "context_length"]
        eyes = [gain(rows, name, names) for name in READING_COLUMNS[8:12]]
        assert entry["scores"][mode]["rt"] == pytest.approx(sum(eyes) / 4, abs=1e-3)
        spr = gain(rows, "self_paced_reading_time", [*names, "prev_length", "prev_pred"])
        assert entry["scores"][mode]["spr"] == pytest.approx(spr, abs=1e-3)
        line = f"reading, {mode}: 22 words, .*self-paced reading ([-.0-9]+)%, eye tracking"
        assert float(re.search(line, printed)[1]) == pytest.approx(100 * spr, abs=0.1)


CONTEXTS = {
    "dog": [{"context": "The cats sleep and the"}, {"context": " Zoë sees the "}],
    "x": [{"context": "a word of one letter is left out"}],
    "garden": [{"context": "the dog sleeps in the"}],
    "owner": [{"context": "the naïve café"}, {"context": "The"}],
    "cats": [],
}


def write_words(folder: Path, with_children: bool = True) -> Path:
    """Write words in context, and how many children of each age say them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cdi_childes.json"
    path.write_text(json.dumps(CONTEXTS), encoding="utf-8")
    lines = ["word," + ",".join(map(str, range(16, 31)))]
    for number, word in enumerate(CONTEXTS):
        shares = [1 / (1 + math.exp(18 + 2 * number - month)) for month in range(16, 31)]
        lines.append(word + "," + ",".join(f"{share:.4f}" for share in shares))
    if with_children:
        (folder / "cdi_human.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


PAIRS_OF_WORDS = [
    ("The cats sleep and the dog", 23),
    ("Zoë sees the dog", 13),
    ("the dog sleeps in the garden", 22),
    ("the naïve café owner", 15),
    ("The owner", 4),
]


def test_words_in_context_equal_a_plain_computation(tmp_path, make_run, tokenizer, capsys):
    model = make_model("babyllama")
    path = write_words(tmp_path / "aoa", with_children=False)
    main(make_run(model), "--task", path, "--mode", *MODES, "--out", tmp_path / "out.json")
    entry = read_result(tmp_path / "out.json")["human"]["aoa"]
    assert entry["items"] == len(PAIRS_OF_WORDS)
    for mode in MODES:
        expected = [-reference(model, tokenizer, *option, mode) for option in PAIRS_OF_WORDS]
        assert entry["surprisals"][mode] == pytest.approx(expected, abs=1e-4)
    mean = sum(entry["surprisals"]["causal"]) / len(PAIRS_OF_WORDS)
    printed = capsys.readouterr().out
    assert f"age of acquisition, causal: 5 words in context, {mean:.2f} nats each" in printed
    assert "noise at 10M words" in printed


MARKS = {5: 1_000_000, 20: 3_000_000, 30: 9_000_000, 100: 27_000_000}  # step: words
# how much more likely than other tokens those of a word are, at each checkpoint
LOGITS = {"dog": (0.3, 1.5, 3, 3.4), "garden": (0.1, 0.4, 2, 3.8), "owner": (0.1, 0.3, 0.9, 2.4)}


def make_checkpoints(make_run, tokenizer) -> Path:
    """A run folder of four checkpoints, which learn one word after the other."""
    for number, (step, n_words) in enumerate(MARKS.items()):
        model = make_model("ltg_bert")
        with torch.no_grad():
            model.embedding.tokens.weight.zero_()  # which is the output matrix, too
            model.head.vocab.bias.zero_()
            for word, logits in LOGITS.items():
                model.head.vocab.bias[tokenizer.encode(f" {word}")] = logits[number]
        run = make_run(model, step=step, words=n_words)
    return run


@pytest.mark.slow  # the fits of scipy take seconds
def test_all_checkpoints_are_scored_from_the_oldest_on_and_ages_come_last(
    tmp_path, make_run, tokenizer, capsys
):
    pytest.importorskip("scipy", reason="optional: pip install scipy")
    run = make_checkpoints(make_run, tokenizer)
    pairs = write_pairs(tmp_path / "tasks" / "blimp" / "a.jsonl")
    words = write_words(tmp_path / "tasks" / "aoa")
    main(run, "--task", pairs.parents[1], "--checkpoints", "--mode", "causal", "masked")
    printed = capsys.readouterr().out
    steps = [int(step) for step in re.findall(r"^\S+step_\d+\.pt: step (\d+)", printed, re.M)]
    assert steps == list(MARKS)

    surprisals = {}
    for step, seen in MARKS.items():
        result = read_result(run / f"eval_tasks_{step}_causal_masked.json")
        assert result["step"] == step
        assert result["words"] == seen
        assert result["tasks"]["blimp"]["items"] == len(PAIRS)
        surprisals[seen] = result["human"]["aoa"]["surprisals"]
    # the tables of ages are those of these surprisals
    after = printed.rpartition("every option's score:")[2]
    pairs = aoa.read_contexts(words)
    children = aoa.read_children(words.parent / "cdi_human.csv")
    n_tokens = {pair.word: aoa.count_tokens(pair.word, tokenizer) for pair in pairs}
    for mode in ("causal", "masked"):
        values = {seen: np.array(by_mode[mode]) for seen, by_mode in surprisals.items()}
        score = aoa.score(pairs, values, children, n_tokens, tokenizer.vocab_size)
        assert f"\n\n{mode}, {aoa.table(score)}\n" in after
        assert score.n_words == 3
        assert score.raw_r > 0.9, "the words are learnt in the order of children"
    assert "PARTIAL" not in printed

    # a quick look
    main(run, "--task", words.parent, "--checkpoints", "--mode", "causal", "--limit", 2)
    printed = capsys.readouterr().out
    assert printed.endswith("PARTIAL: only the first 2 words in context\n")
    result = read_result(run / "eval_aoa_100_causal_limit2.json")
    assert len(result["human"]["aoa"]["surprisals"]["causal"]) == 2


def test_a_part_of_the_reading_times_has_no_score(tmp_path, make_run, capsys):
    path, _ = write_reading(tmp_path / "reading")
    main(make_run(), "--task", path, "--mode", "causal", "--limit", 3)
    result = read_result(tmp_path / "run" / "eval_reading_data.csv_10_causal_limit3.json")
    assert result["partial"] is True
    assert len(result["human"]["reading"]["pred"]["causal"]) == 3
    assert result["human"]["reading"]["scores"] == {}
    printed = capsys.readouterr().out
    assert re.search(r"reading, causal: 3 words, [\d.]+ nats each\n", printed)
    assert "PARTIAL: only the first 3 items of each file" in printed


# -------------------------------------------------------------------------------------- the program


def test_result_file_and_table(tmp_path, make_run, capsys):
    root = tmp_path / "all"
    write_pairs(root / "blimp" / "verbs.jsonl", PAIRS[:2], linguistics_term="agreement")
    write_pairs(root / "blimp" / "order.jsonl", PAIRS[4:], linguistics_term="syntax")
    contexts = [context for context, _ in CHOICES]
    ewok = []
    for (context, (good, bad)), other in zip(CHOICES, contexts[::-1], strict=True):
        record = dict(Context1=context, Context2=other, Domain="social")
        ewok.append(record | dict(Target1=good.strip(), Target2=bad.strip()))
    write_lines(root / "ewok" / "social.jsonl", *ewok)
    write_lines(root / "glue" / "rte.jsonl", {"sentence1": "x", "label": 0})

    main(make_run(step=1234), "--task", root)
    printed = capsys.readouterr()
    assert "rte.jsonl" in printed.err
    assert "PARTIAL" not in printed.out

    result = read_result(tmp_path / "run" / "eval_all_1234.json")
    assert result["step"] == 1234
    assert result["schedule"] == "1_CLM+1_MLM"
    assert result["modes"] == ["causal", "masked"]
    assert result["protocol"] == "2026"
    assert result["task"] == [str(root)]
    assert result["human"] == {}
    assert result["limit"] == 0
    assert result["partial"] is False
    assert result["checkpoint"].endswith("step_0001234.pt")
    assert result["torch"] == torch.__version__

    n_items = {task: entry["items"] for task, entry in result["tasks"].items()}
    assert n_items == {"blimp": 3, "ewok": len(CHOICES)}
    for task, entry in result["tasks"].items():
        assert entry["kind"] == task
        for mode in result["modes"]:
            means = []
            for subset in entry["subsets"].values():
                scores = subset["scores"][mode]
                assert len(scores) == subset["items"]
                means.append(100 * sum(good > bad for good, bad in scores) / len(scores))
                assert subset["accuracy"][mode] == pytest.approx(means[-1])
            assert result["macro"][task][mode] == pytest.approx(sum(means) / len(means))

    pattern = r"^agreement +2 +([\d.]+) +0 +([\d.]+) +0\n  verbs +2 +([\d.]+)"
    row = re.search(pattern, printed.out, re.M)
    verbs = result["tasks"]["blimp"]["subsets"]["verbs"]["accuracy"]["causal"]
    assert float(row[1]) == float(row[3]) == round(verbs, 1)


def test_the_result_is_on_disk_before_anything_is_printed(tmp_path, make_run, monkeypatch):
    def closed_terminal(*args):
        raise BrokenPipeError

    monkeypatch.setattr(evaluation, "report", closed_terminal)
    with pytest.raises(BrokenPipeError):
        main(make_run(), "--task", write_pairs(tmp_path / "x.jsonl"))
    assert read_result(tmp_path / "run" / "eval_x_10.json")["tasks"]["x"]["items"] == len(PAIRS)


def test_a_partial_result_says_so_and_keeps_the_full_one(tmp_path, make_run, capsys):
    run = make_run()
    task = write_pairs(tmp_path / "x.jsonl")
    main(run, "--task", task)
    full = (run / "eval_x_10.json").read_bytes()
    main(run, "--task", task, "--limit", 2)
    assert "PARTIAL: only the first 2 items" in capsys.readouterr().out
    assert (run / "eval_x_10.json").read_bytes() == full

    part = read_result(run / "eval_x_10_limit2.json")
    assert part["partial"] is True
    assert part["limit"] == 2
    assert part["tasks"]["x"]["items"] == 2
    scores = part["tasks"]["x"]["subsets"]["x"]["scores"]["causal"]
    all_scores = json.loads(full)["tasks"]["x"]["subsets"]["x"]["scores"]["causal"]
    assert np.array(scores) == pytest.approx(np.array(all_scores[:2]))


def test_the_tasks_stand_in_the_name_of_a_result(tmp_path, make_run):
    first = write_pairs(tmp_path / "one" / "a.jsonl")
    second = write_pairs(tmp_path / "two" / "b.jsonl", PAIRS[:2])
    main(make_run(), "--task", first.parent, second)
    result = read_result(tmp_path / "run" / "eval_one_b_10.json")
    items = {task: entry["items"] for task, entry in result["tasks"].items()}
    assert items == {"one": len(PAIRS), "b": 2}


def test_modes_and_protocol_stand_in_the_name_of_a_result(tmp_path, make_run, tokenizer):
    model = make_model("babyllama")
    run = make_run(model)
    flags = ["--protocol", "2024", "--mode", "causal", "masked"]
    main(run, "--task", write_pairs(tmp_path / "x.jsonl"), *flags)
    result = read_result(run / "eval_x_10_causal_masked_2024.json")
    for mode in ("causal", "masked"):
        expected = []
        for good, bad in PAIRS:
            expected.append([reference(model, tokenizer, x, 0, mode, "2024") for x in (good, bad)])
        scores = result["tasks"]["x"]["subsets"]["x"]["scores"][mode]
        assert np.array(scores) == pytest.approx(np.array(expected), abs=1e-4)


@pytest.mark.parametrize(
    "schedule, modes",
    [
        ("2_CLM", ["causal"]),
        ("6_MLM", ["masked"]),
        ("1_1CLM:15MNTP", ["causal", "mntp"]),
        ("1_MLM+1_CLM", ["causal", "masked"]),
        ("1_MDLM", ["masked"]),
        ("1_MDNTP", ["mntp"]),
    ],
)
def test_the_schedule_gives_the_modes(tmp_path, make_run, schedule, modes):
    task = write_pairs(tmp_path / "x.jsonl")
    main(make_run(schedule=schedule), "--task", task, "--out", tmp_path / "out.json")
    assert read_result(tmp_path / "out.json")["modes"] == modes


@each_backbone
def test_texts_longer_than_a_training_row_are_scored_whole(
    tmp_path, make_run, tokenizer, capsys, backbone
):
    model = make_model(backbone)
    long = "The owner of the garden sees the cats sleep " * 4 + "in Köln."
    assert len(tokenizer.encode(long)) > 2 * 16, "twice block_size"
    pairs = [(long, "The dog sees them."), ("The dog.", "The cat.")]
    task = write_pairs(tmp_path / "x.jsonl", pairs)
    main(make_run(model), "--task", task, "--out", tmp_path / "out.json")
    assert "1 options are longer than the 16 tokens" in capsys.readouterr().out
    result = read_result(tmp_path / "out.json")["tasks"]["x"]
    assert result["longer_than_training_rows"] == 1
    for mode in ("causal", "masked"):
        expected = reference(model, tokenizer, long, 0, mode)
        scores = result["subsets"]["x"]["scores"][mode]
        assert scores[0][0] == pytest.approx(expected, abs=1e-4)


OFFICIAL = {
    "2026": "the official code draws one of the best",
    "2025": "the official code takes the first option, which is the right one",
    "2024": "the official code takes the first option, which is the right one",
}


@each_protocol
def test_identical_sentences_tie_in_every_mode_and_the_official_treatment_is_said(
    tmp_path, make_run, capsys, protocol
):
    task = write_pairs(tmp_path / "x.jsonl", [("The cats sleep.", "The cats sleep.")] * 3)
    flags = ["--mode", *MODES, "--protocol", protocol, "--out", tmp_path / "out.json"]
    main(make_run(), "--task", task, *flags)
    result = read_result(tmp_path / "out.json")["tasks"]["x"]
    assert result["accuracy"] == {mode: 50 for mode in MODES}
    assert result["ties"] == {mode: 3 for mode in MODES}
    printed = capsys.readouterr().out
    assert f"items that tie: 3 causal, 3 masked, 3 mntp; {OFFICIAL[protocol]}" in printed
    # nor is anything said where nothing ties
    write_pairs(task, [("The cats sleep.", "The dog sees them.")])
    main(make_run(), "--task", task, *flags)
    assert "official" not in capsys.readouterr().out


def test_wug_has_no_ties_and_its_number_is_explained(tmp_path, make_run, capsys):
    same = WUGS | {"sentences": "The dog.\tThe dog."}
    task = write_lines(tmp_path / "wug_past.jsonl", same, WUGS, WUGS | {"ratio": 0.5})
    main(make_run(), "--task", task, "--protocol", "2025", "--out", tmp_path / "out.json")
    result = read_result(tmp_path / "out.json")["tasks"]["wug_past"]
    assert result["ties"] == {"causal": 0, "masked": 0}
    printed = capsys.readouterr().out
    assert "wug: 100 times the rank correlation with people" in printed
    assert "items that tie" not in printed


@each_mode
def test_broken_weights_are_an_error_not_a_score(tmp_path, make_run, mode):
    model = make_model("babyllama")
    model.blocks[1].down.weight.data[0, 0] = float("nan")
    line = error(make_run(model), "--task", write_pairs(tmp_path / "x.jsonl"), "--mode", mode)
    assert re.search(r"x\.jsonl:\d+: .*not finite", line)
    assert not list((tmp_path / "run").glob("*.json.part"))
    assert not list((tmp_path / "run").glob("eval_*"))


def test_the_newest_whole_checkpoint_is_taken(tmp_path, make_run, capsys):
    make_run(step=5)
    run = make_run(step=20)
    damaged = run / "step_0000020.pt"
    damaged.write_bytes(damaged.read_bytes()[:-500])
    task = write_pairs(tmp_path / "x.jsonl")
    main(run, "--task", task)
    printed = capsys.readouterr()
    assert "step_0000005.pt: step 5" in printed.out
    assert str(damaged) in printed.err
    assert str(damaged) in error(damaged, "--task", task)


def test_wrong_use_ends_in_one_line(tmp_path, make_run):
    run = make_run()
    task = write_pairs(tmp_path / "x.jsonl")
    (tmp_path / "nothing").mkdir()
    assert "does not exist" in error(run, "--task", tmp_path / "no.jsonl")
    assert "holds no .jsonl, reading_data.csv" in error(run, "--task", tmp_path / "nothing")
    assert "--limit -1" in error(run, "--task", task, "--limit", "-1")
    assert "--out" in error(run, "--task", task, "--out", tmp_path / "no" / "x.json")
    assert "no whole checkpoint" in error(tmp_path / "nothing", "--task", task)
    every = ["--task", task, "--checkpoints"]
    assert "holds no checkpoint" in error(tmp_path / "nothing", *every)
    assert "holds no checkpoint" in error(run / "step_0000010.pt", *every)
    assert "--out names one file" in error(run, *every, "--out", tmp_path / "x.json")


def test_a_fault_of_the_tasks_that_compare_with_people_ends_in_one_line(tmp_path, make_run):
    run = make_run()
    folder = tmp_path / "full_eval"
    path, _ = write_reading(folder / "reading")
    words = write_words(folder / "aoa", with_children=False)
    assert "the challenge of 2024 does not have it" in error(
        run, "--task", folder, "--protocol", "2024"
    )
    # the checkpoint does not know how far it has read
    every = ["--task", words.parent, "--checkpoints"]
    assert "cdi_human.csv: does not exist" in error(run, *every)
    write_words(folder / "aoa")
    assert "does not say how many words it has seen" in error(run, *every)
    children = words.parent / "cdi_human.csv"
    children.write_text(children.read_text().replace("word,16", "word,15"))
    assert "cdi_human.csv: the first line lacks the column 16" in error(run, *every)

    words.write_text(json.dumps(CONTEXTS | {"dog": None}))
    assert "cdi_childes.json: 'dog' needs a list of its contexts" in error(run, "--task", folder)
    words.write_text(json.dumps({"cats": []}))
    assert "cdi_childes.json: has no word with a context" in error(run, "--task", folder)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("self_paced_reading_time", "time"), encoding="utf-8")
    assert "lacks the column self_paced_reading_time" in error(run, "--task", folder)
    lines = text.splitlines()
    lines[1] = lines[1].replace(",3,0,", ",nan,0,")
    path.write_text("\n".join(lines), encoding="utf-8")
    assert f"{path}:2: length must be a number, not 'nan'" in error(run, "--task", folder)
    assert not list(run.glob("eval_*"))


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path, make_run):
    run = make_run()
    save_tokenizer(run / "tokenizer.json", [])
    line = error(run, "--task", write_pairs(tmp_path / "x.jsonl"))
    assert "tokenizer.json: not the one that step_0000010.pt was trained with" in line


def test_a_result_that_was_half_written_is_named(tmp_path, make_run):
    run = make_run()
    main(run, "--task", write_pairs(tmp_path / "x.jsonl"))
    path = run / "eval_x_10.json"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match="eval_x_10.json: not a result file .*; remove it$"):
        read_result(path)


def test_a_task_must_be_named(make_run):
    with pytest.raises(SystemExit) as stopped:
        main(make_run())
    assert stopped.value.code == 2


def test_a_result_is_read_as_it_was_written(tmp_path):
    result = {"step": 3, "tasks": {"a": {"x": [1.5, None], "ö": "\u2028"}}}
    write_result(tmp_path / "r.json", result)
    assert read_result(tmp_path / "r.json") == result
    assert len((tmp_path / "r.json").read_text(encoding="utf-8").split("\n")) == 5


@pytest.mark.parametrize("content", ["", "{", "[]", '{"tasks": []}', '{"tasks": {}}'])
def test_a_file_that_is_no_result_is_named(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(UserError, match="r.json: not a result file"):
        read_result(path)


@pytest.mark.slow
def test_as_a_program(tmp_path, make_run):
    task = write_pairs(tmp_path / "x.jsonl")
    command = [sys.executable, "eval.py", str(make_run()), "--task", str(task), "--device", "cpu"]
    settings = dict(cwd=ROOT, text=True, capture_output=True, timeout=120)
    settings["env"] = os.environ | {"OMP_NUM_THREADS": "1"}

    done = subprocess.run(command, **settings)
    assert done.returncode == 0
    assert "macro average of 1" in done.stdout
    assert done.stderr == ""

    task.write_text("{")
    done = subprocess.run(command, **settings)
    assert done.returncode == 1
    assert re.fullmatch(r"eval\.py: .*x\.jsonl:1: .*\n", done.stderr)
