"""Scores against a plain reference, task files, results: python -m pytest tests/test_eval.py"""

import gzip
import itertools
import json
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
from babylm.results import read_result, summarize, write_result
from babylm.tasks import KINDS, Item, fingerprint, read_tasks
from config import UserError
from data import OBJECTIVES
from eval import MODES
from model import BACKBONES, ModelConfig, Transformer

ROOT = Path(__file__).parent.parent
BLIMP = ROOT.parent / "shared" / "data" / "eval" / "blimp_filtered"
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
needs_blimp = pytest.mark.skipif(
    not BLIMP.is_dir(), reason="needs BLiMP as filtered for BabyLM beside the repository"
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

    def make(model=None, step=10, schedule="1_CLM+1_MLM") -> Path:
        save_checkpoint(
            run / f"step_{step:07}.pt",
            model or make_model("babyllama"),
            step=step,
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


def score(model, options, tokenizer, mode, protocol="2025", **settings) -> np.ndarray:
    ids, first = evaluation.encode(options, tokenizer, "line", protocol, mode)
    mean = protocol == "2024" and mode != "causal"
    settings |= {"mean": mean, "skip_start": protocol == "2024"}
    return evaluation.score(model, ids, first, mode, [""] * len(ids), **settings)


# -------------------------------------------------------------------------------- scores of options


@torch.no_grad()
def reference(model, tokenizer, text: str, start: int, mode: str, protocol: str = "2025") -> float:
    """The score by its definition: one forward pass of one row for each token."""
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
    if protocol == "2024" and mode != "causal":
        return sum(values) / len(values)
    return sum(values)


def test_every_mode_of_an_objective_can_be_asked():
    assert {objective.mode for objective in OBJECTIVES.values()} <= set(MODES)


@each_backbone
@each_mode
@pytest.mark.parametrize("protocol", ["2025", "2024"])
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
    for file in sorted(BLIMP.glob("*.jsonl"))[::12]:
        options += read_tasks(file, limit=1)[0].options
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
    ids, first = evaluation.encode(SENTENCES, tokenizer, "line", "2025", mode)
    names = [f"here:{number}" for number in range(len(ids))]
    too_long = next(name for name, row in zip(names, ids, strict=True) if len(row) > 8)
    with pytest.raises(UserError, match=rf"^{too_long}: \d+ tokens, .* 8$"):
        evaluation.score(model, ids, first, mode, names)


@each_mode
@pytest.mark.parametrize("protocol", ["2025", "2024"])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_the_masked_modes_of_2024_alone_leave_out_the_start_token(
    tokenizer, boundary, protocol, mode
):
    """Where each newline is a start token, a text of newlines alone has nothing to score."""
    model = make_model("babyllama")
    ids, first = evaluation.encode([("The dog\n\n", 7)], tokenizer, boundary, protocol, mode)
    assert len(ids[0]) - first[0] == 2
    arguments = {"names": ["here:7"], "skip_start": protocol == "2024"}
    if protocol == "2024" and mode != "causal" and boundary != "document":
        with pytest.raises(UserError, match=f"here:7.*{mode}"):
            evaluation.score(model, ids, first, mode, **arguments)
        return
    scores = evaluation.score(model, ids, first, mode, **arguments)
    means = evaluation.score(model, ids, first, mode, **arguments, mean=True)
    assert scores[0] < 0
    assert means == pytest.approx(scores / 2)


# ------------------------------------------------------------------------------ where targets start


def test_targets_start_where_hugging_face_offsets_say(folder, tokenizer):
    """The 2025 pipeline scores the tokens whose end, in characters, lies beyond the context."""
    tokenizers = pytest.importorskip("tokenizers")
    hf = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    options = []
    for text, _ in OPTIONS:
        options += [(text, start) for start in range(1, len(text))]
    ids, first = evaluation.encode(options, tokenizer, "none", "2025", "causal")
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
@pytest.mark.parametrize("protocol", ["2025", "2024"])
def test_the_tokens_of_odd_texts_are_the_text_and_the_target_its_end(tokenizer, boundary, protocol):
    newline = tokenizer.encode("\n")[0]
    options = [(odd, 0) for odd in ODD]
    options += [(f"The cats {odd}", len("The cats ")) for odd in ODD]
    ids, first = evaluation.encode(options, tokenizer, boundary, protocol, "masked")
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


def test_each_kind_of_task_is_read(tmp_path):
    root = tmp_path / "tasks"
    write_lines(
        root / "blimp" / "a.jsonl",
        dict(sentence_good="G.", sentence_bad="B.", linguistics_term="term"),
    )
    write_lines(
        root / "supplement" / "b.jsonl", dict(sentence_good="A: x\nB: y", sentence_bad="A: x\nB: z")
    )
    write_lines(
        root / "ewok" / "c.jsonl",
        dict(Context1="Él vio.", Context2="No.", Target1="Sí.", Target2="Ya.", Domain="social"),
    )
    write_lines(
        root / "entity" / "regular.jsonl",
        dict(input_prefix="Box 0 has ", options=["a", "b", "c"], numops=2),
    )
    write_lines(
        root / "comps" / "base.jsonl",
        dict(prefix_acceptable="a sock", prefix_unacceptable="a tie", property_phrase="is warm."),
    )
    items = read_tasks(root)
    assert {item.kind for item in items} == set(KINDS)
    assert [(item.task, item.group, item.subset, item.options) for item in items] == [
        ("blimp", "term", "a", [("G.", 0), ("B.", 0)]),
        ("comps", "", "base", [("a sock is warm.", 7), ("a tie is warm.", 6)]),
        ("entity", "regular", "regular_2_ops", [(f"Box 0 has {x}", 10) for x in "abc"]),
        ("ewok", "", "social", [("Él vio. Sí.", 7), ("Él vio. Ya.", 7)]),
        ("supplement", "", "b", [("A: x\nB: y", 0), ("A: x\nB: z", 0)]),
    ]


def test_lines_may_be_blank_and_end_in_crlf_and_a_limit_counts_the_others(tmp_path):
    line = b'{"sentence_good": "G.", "sentence_bad": "B."}'
    (tmp_path / "x.jsonl").write_bytes(b"\n" + line + b"\r\n\r\n" + line + b"\n" + line)
    items = read_tasks(tmp_path, limit=2)
    assert [item.source for item in items] == [f"{tmp_path}/x.jsonl:2", f"{tmp_path}/x.jsonl:4"]


@pytest.mark.parametrize("newline", [b"\r", b"\r\n", b"\r\r\n"], ids=repr)
def test_lines_end_as_on_any_system(tmp_path, newline):
    path = write_pairs(tmp_path / "x.jsonl")
    items = read_tasks(path)
    path.write_bytes(path.read_bytes().replace(b"\n", newline))
    assert fingerprint(read_tasks(path)) == fingerprint(items)


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
    items = read_tasks(root)
    assert sorted({(item.task, item.subset) for item in items}) == [
        ("blimp", "a"),
        ("supplement", "b"),
    ]
    assert len(items) == 2 * len(PAIRS)
    assert capsys.readouterr().err == (
        f"{root}: left out 2 hidden (first blimp/._a.jsonl), "
        "1 of other endings (first a.jsonl.gz)\n"
    )


@needs_blimp
@pytest.mark.slow
def test_the_real_blimp_is_read():
    items = read_tasks(BLIMP)
    assert len(items) == 59_875
    assert len({item.subset for item in items}) == 67
    assert len({item.group for item in items}) == 13
    assert sum(item.options[0] == item.options[1] for item in items) == 7
    result = summarize(items, {mode: [[0.0, -1.0]] * len(items) for mode in MODES})
    assert result["accuracy"]["causal"] == 100
    table = evaluation.table("blimp_filtered", result, list(MODES))
    assert max(map(len, table.splitlines())) <= 100


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


@pytest.mark.parametrize("content", BAD_FILES, ids=lambda content: repr(content[:40]))
def test_a_bad_task_file_ends_in_one_line(tmp_path, content):
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_tasks(tmp_path / "t.jsonl")
    assert BAD_FILES[content] in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_task_that_2024_did_not_have_is_refused(tmp_path):
    record = dict(prefix_acceptable="a", prefix_unacceptable="b", property_phrase="c")
    path = write_lines(tmp_path / "c.jsonl", record)
    with pytest.raises(UserError, match="2024 had no comps"):
        read_tasks(path, protocol="2024")


def test_the_fingerprint_is_that_of_the_texts(tmp_path):
    one = read_tasks(write_pairs(tmp_path / "one.jsonl"))
    same = read_tasks(write_pairs(tmp_path / "two.jsonl", linguistics_term="verbs"))
    other = read_tasks(write_pairs(tmp_path / "three.jsonl", PAIRS[1:]))
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(other)


# ------------------------------------------------------------------------------ points and averages


def item(group: str, subset: str, n_options: int = 2) -> Item:
    return Item("here:1", "task", "blimp", group, subset, [("x", 0)] * n_options)


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


def test_a_subset_whose_lines_name_several_groups_keeps_all_its_items():
    items = [item("g2", "x"), item("g1", "x"), item("g2", "x")]
    result = summarize(items, {"causal": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]})
    assert result["items"] == 3
    assert result["subsets"]["x"]["group"] == "g2"
    assert result["accuracy"]["causal"] == pytest.approx(200 / 3)


def test_a_group_that_is_its_only_subset_has_one_line():
    items = [item("verbs", "verbs"), item("nouns", "singular"), item("nouns", "plural")]
    result = summarize(items, {"causal": [[1.0, 0.0]] * 3})
    lines = evaluation.table("task", result, ["causal"]).splitlines()
    labels = [line[:20].rstrip() for line in lines if not line.startswith("-")]
    assert labels == ["task", "nouns", "  plural", "  singular", "verbs", "macro average of 3"]


# -------------------------------------------------------------------------------------- the program


def test_result_file_and_table(tmp_path, make_run, capsys):
    root = tmp_path / "all"
    write_pairs(root / "blimp" / "verbs.jsonl", PAIRS[:2], linguistics_term="agreement")
    write_pairs(root / "blimp" / "order.jsonl", PAIRS[4:], linguistics_term="syntax")
    ewok = []
    for context, (good, bad) in CHOICES:
        record = dict(Context1=context, Context2="No.", Domain="social")
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
    assert result["protocol"] == "2025"
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

    monkeypatch.setattr(evaluation, "table", closed_terminal)
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


def test_identical_sentences_tie_in_every_mode(tmp_path, make_run):
    task = write_pairs(tmp_path / "x.jsonl", [("The cats sleep.", "The cats sleep.")] * 3)
    main(make_run(), "--task", task, "--mode", *MODES, "--out", tmp_path / "out.json")
    result = read_result(tmp_path / "out.json")["tasks"]["x"]
    assert result["accuracy"] == {mode: 50 for mode in MODES}
    assert result["ties"] == {mode: 3 for mode in MODES}


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
    assert "holds no .jsonl file" in error(run, "--task", tmp_path / "nothing")
    assert "--limit -1" in error(run, "--task", task, "--limit", "-1")
    assert "--out" in error(run, "--task", task, "--out", tmp_path / "no" / "x.json")
    assert "no whole checkpoint" in error(tmp_path / "nothing", "--task", task)


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
