"""Age of acquisition: its files, the options, the fits and the correlation."""

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
from antlm.tokenizer import Tokenizer, save_tokenizer
from babylm import aoa
from babylm.challenge import marks_due
from babylm.protocols import PROTOCOLS
from config import UserError
from schedule import WORD_MARKS

DATA = Path(__file__).parent.parent.parent / "shared/data/eval/aoa"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the challenge's files are not here")
needs_scipy = pytest.mark.skipif(
    importlib.util.find_spec("scipy") is None, reason="optional: pip install scipy"
)
MONTHS = [str(month) for month in range(16, 31)]
MARKS = marks_due(100_000_000, WORD_MARKS)  # words seen at the checkpoints


def write_csv(path: Path, *rows: list) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["word", *MONTHS], *rows])
    return path


# --------------------------------------------------------------------------------------- the files


def test_contexts_are_read_in_order_without_words_of_one_letter(tmp_path):
    path = tmp_path / "cdi_childes.json"
    contexts = {
        "dog": [{"context": "I saw the", "count": 3}, {"context": " a "}],
        "I": [{"context": "that"}],
        "zebra": [],
        "cat": [{"context": "the"}],
    }
    path.write_text(json.dumps(contexts))
    expected = [("dog", 0, "I saw the"), ("dog", 1, " a "), ("cat", 0, "the")]
    assert aoa.read_contexts(path) == expected


@pytest.mark.parametrize(
    "content, fault",
    [
        (b"\xff", "not text in UTF-8"),
        (b"{'dog': []}", "not JSON"),
        (b"[]", "an object with a key for each word is expected"),
        (b"{}", "has no word with a context"),
        (b'{"dog": []}', "has no word with a context"),
        (b'{"dog": {"context": "a"}}', "'dog' needs a list of its contexts"),
        (b'{"dog": [{"context": "a"}, {}]}', "'dog': number 1 of its contexts lacks a text"),
        (b'{"dog": [{"context": " "}]}', "'dog': number 0 of its contexts lacks a text"),
        (b'{"dog": ["a"]}', "'dog': number 0 of its contexts lacks a text"),
        (b'{"  ": [{"context": "a"}]}', "a word is empty"),
    ],
)
def test_faulty_contexts_are_refused_in_one_line(content, fault, tmp_path):
    path = tmp_path / "cdi_childes.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        aoa.read_contexts(path)
    assert str(error.value).startswith(f"{path}: {fault}")
    assert "\n" not in str(error.value)


def test_the_first_row_of_a_word_counts_and_an_empty_cell_is_unknown(tmp_path):
    rows = [["dog", "", *[0.5] * 14], ["cat", *[0.25] * 15], ["dog", *[1] * 15]]
    children = aoa.read_children(write_csv(tmp_path / "cdi_human.csv", *rows))
    assert list(children) == ["dog", "cat"]
    np.testing.assert_equal(children["dog"], [math.nan, *[0.5] * 14])
    np.testing.assert_equal(children["cat"], [0.25] * 15)


@pytest.mark.parametrize(
    "row, fault",
    [
        (["", *[0.5] * 15], "word is empty"),
        (["cat", *[0.5] * 14, "nan"], "30 must be a number, not 'nan'"),
        (["cat", "many", *[0.5] * 14], "16 must be a number, not 'many'"),
        (["cat", 0.5, 1.01, *[0.5] * 13], "17 must be a share from 0 to 1, not 1.01"),
        (["cat", 0.5, -0.1, *[0.5] * 13], "17 must be a share from 0 to 1, not -0.1"),
        (["cat", *[0.5] * 14], "needs 16 cells"),
    ],
)
def test_a_faulty_row_of_children_is_named_with_its_line(row, fault, tmp_path):
    path = write_csv(tmp_path / "cdi_human.csv", ["dog", *[0.5] * 15], row)
    with pytest.raises(UserError) as error:
        aoa.read_children(path)
    assert str(error.value) == f"{path}:3: {fault}"


def test_a_missing_month_is_named(tmp_path):
    path = tmp_path / "cdi_human.csv"
    path.write_text("word,16,17\ndog,0.1,0.2\n")
    with pytest.raises(UserError, match="lacks the column 18, 19, 20"):
        aoa.read_children(path)


@needs_data
def test_the_official_files_are_read():
    pairs = aoa.read_contexts(DATA / "cdi_childes.json")
    assert len(pairs) == 8005
    # 19 of its 504 words have no context
    assert len({pair.word for pair in pairs}) == 485
    assert pairs[0].word == "airplane"
    children = aoa.read_children(DATA / "cdi_human.csv")
    assert {pair.word for pair in pairs} <= set(children)


# ---------------------------------------------------------------------------------------- questions


def test_an_option_is_the_context_and_the_word_after_one_space():
    assert aoa.option(aoa.Pair(" dog ", 0, "\tI saw the  ")) == ("I saw the dog", 10)


@pytest.mark.parametrize(
    "merges, target",
    [
        # a token that holds the word's first letter is its token, with the space in front
        ([(b" ", b"d")], [b" d", b"o"]),
        # a space that is a token alone belongs to the context
        ([(b"d", b"o")], [b"do"]),
    ],
)
def test_the_targets_are_the_tokens_that_end_beyond_the_space(merges, target, tmp_path):
    save_tokenizer(tmp_path / "tokenizer.json", merges)
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    option = aoa.option(aoa.Pair("do", 0, "I"))
    ids, first = evaluation.encode([option], tokenizer, "line", PROTOCOLS["2026"], "causal")
    tokens = [tokenizer.bpe.decode_single_token_bytes(i) for i in ids[0][first[0] :].tolist()]
    assert tokens == target
    # the file's own count of a word's tokens has the space in any case, as in the pipeline
    assert aoa.count_tokens("do", tokenizer) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["untied", "newline"])
def test_the_targets_are_those_of_the_offsets_of_transformers(kind):
    hf_runs = pytest.importorskip("hf_runs")
    run = hf_runs.exported(kind)
    hf_tokenizer = hf_runs.load_hf("AutoTokenizer", run.folder)
    pairs = [
        aoa.Pair("garden", 0, "The cats sleep in the"),
        aoa.Pair("owner", 0, " The naïve café "),
        aoa.Pair("Ærøskøbing", 0, "Zoë’s “naïve” 日本"),
        aoa.Pair("ice cream", 0, "a line\nand another"),
    ]
    for pair in pairs:
        text, start = aoa.option(pair)
        encoded = hf_tokenizer(text, return_offsets_mapping=True)
        targets = []
        for token, (_, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            if end > start:
                targets.append(token)
        ids, first = evaluation.encode(
            [(text, start)], run.tokenizer, run.boundary, PROTOCOLS["2026"], "masked"
        )
        assert ids[0].tolist() == encoded.input_ids
        assert ids[0][first[0] :].tolist() == targets

        n_tokens = len(hf_tokenizer(f"The {pair.word}", add_special_tokens=False).input_ids)
        n_tokens -= len(hf_tokenizer("The", add_special_tokens=False).input_ids)
        assert aoa.count_tokens(pair.word, run.tokenizer) == n_tokens
    assert run.tokenizer.vocab_size == hf_tokenizer.vocab_size


# --------------------------------------------------------------------------------------------- ages


def curve(x: np.ndarray, a: float, b: float, c: float, d: float) -> np.ndarray:
    return np.array([a / (1 + math.exp(-b * (value - c))) + d for value in x])


MILLIONS = np.array([math.log10(words) for words in MARKS])


@needs_scipy
@pytest.mark.parametrize(
    "parameters, age",
    [
        # half of all children: the middle of the curve
        ((1, 0.5, 22, 0), 22),
        ((0.8, 0.6, 20, 0.1), 20),
        # 0.9 / (1 + z) = 1/2 where z = 0.8
        ((0.9, 0.5, 20, 0), 20 - math.log(0.8) / 0.5),
    ],
)
def test_children_know_a_word_when_half_of_them_say_it(parameters, age):
    shares = curve(aoa.MONTHS, *parameters)
    assert aoa.age_of_children(shares) == pytest.approx(age, abs=1e-3)
    # nor does a missing month matter on an exact curve
    shares[3] = math.nan
    assert aoa.age_of_children(shares) == pytest.approx(age, abs=1e-3)


@needs_scipy
@pytest.mark.parametrize(
    "shares",
    [
        curve(aoa.MONTHS, 0.45, 0.5, 22, 0),  # never half of them
        curve(aoa.MONTHS, 0.4, 0.5, 22, 0.55),  # always more
        curve(aoa.MONTHS, 1, 0.5, 33, 0),  # later
        np.array([0.4, 0.6, *[math.nan] * 13]),  # two months are no curve
        np.full(15, math.nan),
    ],
    ids=["never", "always", "later", "two months", "no month"],
)
def test_children_have_no_age_outside_the_months(shares):
    assert aoa.age_of_children(shares) is None


@needs_scipy
@pytest.mark.parametrize(
    "n_tokens, height",
    [
        # halfway between chance and the last checkpoint, where the curve is at 1 / (1 + e^-6)
        (2, 0.5 / (1 + math.exp(-6))),
        # chance of one token is ln(1024) lower, and half of that is a share of the fall by 9
        (1, 0.5 / (1 + math.exp(-6)) + math.log(1024) / 2 / 9),
    ],
)
def test_a_model_knows_a_word_halfway_from_chance_to_its_least_surprisal(n_tokens, height):
    surprisals = 2 * math.log(1024) - curve(MILLIONS, 9, 6, 7, 0)
    age = aoa.age_of_model(MARKS, surprisals, n_tokens, 1024)
    assert age == pytest.approx(7 - math.log(1 / height - 1) / 6, abs=1e-4)


@needs_scipy
@pytest.mark.parametrize(
    "words_seen, surprisals",
    [
        (MARKS, 13.9 + curve(MILLIONS, 3, 6, 7, 0)),  # rises
        (MARKS, np.full(19, 20.0)),  # stays
        (MARKS, 3 - curve(MILLIONS, 2, 6, 7, 0)),  # begins below
        (MARKS[:2], np.array([9.0, 2.0])),  # two checkpoints are no curve
    ],
    ids=["rises", "stays", "begins below", "two checkpoints"],
)
def test_a_model_has_no_age_for_a_word_that_it_does_not_learn(words_seen, surprisals):
    assert aoa.age_of_model(words_seen, surprisals, 1, 1024) is None


def test_without_scipy_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError) as error:
        aoa.age_of_children(curve(aoa.MONTHS, 1, 0.5, 22, 0))
    assert str(error.value) == "age of acquisition needs scipy: pip install scipy"


# ------------------------------------------------------------------------------------------- scores


def made_case(model_ages: dict[str, float], child_ages: dict[str, float]):
    """Return pairs, surprisals and children of words that are learnt about these ages.

    Each word has two contexts, the second of which is easier by 2 nats.
    """
    pairs = []
    children = {}
    columns = []
    for word, age in model_ages.items():
        surprisal = 1 + math.log(1024) - curve(MILLIONS, 5, 6, age, 0)
        for number in range(2):
            pairs.append(aoa.Pair(word, number, "the"))
            columns.append(surprisal - 2 * number)
    for word, age in child_ages.items():
        children[word] = curve(aoa.MONTHS, 1, 0.5, age, 0)
    surprisals = dict(zip(MARKS, np.stack(columns, axis=1), strict=True))
    return pairs, surprisals, children, dict.fromkeys(model_ages, 1), 1024


@needs_scipy
def test_words_learnt_in_the_order_of_children_correlate_fully():
    child_ages = {"ball": 18, "dog": 20, "moon": 23, "zebra": 26}
    model_ages = {word: 6 + age / 20 for word, age in child_ages.items()}
    # words that only one side knows count nowhere
    model_ages["owie"] = 7.0
    child_ages["hello"] = 17
    case = made_case(model_ages, child_ages)
    result = aoa.score(*case)
    assert result.r == result.raw_r == pytest.approx(1, abs=0.01)
    assert result.p_value < 0.01
    assert result.n_words == 4
    assert result.words_seen == MARKS
    assert list(result.curves) == ["ball", "dog", "moon", "zebra", "owie"]
    assert result.curves["owie"].child_age is None
    assert result.curves["moon"].child_age == pytest.approx(23, abs=1e-3)
    # the mean over the two contexts falls from chance
    expected = math.log(1024) - curve(MILLIONS, 5, 6, 6 + 23 / 20, 0)
    assert result.curves["moon"].surprisals == pytest.approx(expected.tolist(), abs=1e-9)

    # in whatever order the checkpoints come
    pairs, surprisals, children, n_tokens, vocab_size = case
    surprisals = dict(reversed(surprisals.items()))
    assert aoa.score(pairs, surprisals, children, n_tokens, vocab_size) == result


@needs_scipy
def test_a_correlation_that_may_be_chance_scores_0():
    child_ages = {"ball": 18, "dog": 20, "moon": 23, "zebra": 26}
    model_ages = {"ball": 6.9, "dog": 7.3, "moon": 7.0, "zebra": 7.2}
    result = aoa.score(*made_case(model_ages, child_ages))
    assert result.r == 0
    # by hand from these ages: 0.7 / sqrt(36.75 * 0.1)
    assert result.raw_r == pytest.approx(0.365, abs=0.02)
    assert result.p_value > 0.1


@needs_scipy
def test_two_words_score_0():
    result = aoa.score(*made_case({"ball": 6.9, "dog": 7.3}, {"ball": 18, "dog": 20}))
    assert (result.r, result.raw_r, result.p_value, result.n_words) == (0, None, None, 2)


def bumpy_case():
    """Return the arguments of score for ten words with curves that no sigmoid meets exactly."""
    words = [f"word{number}" for number in range(10)]
    children = {}
    pairs = []
    columns = []
    for number, word in enumerate(words):
        bumps = 0.02 * np.sin(5 * aoa.MONTHS + number)
        shares = curve(aoa.MONTHS, 0.9, 0.4, 18 + number, 0.03) + bumps
        children[word] = np.round(np.clip(shares, 0, 1), 2)
        for context in range(3):
            pairs.append(aoa.Pair(word, context, "the"))
            bumps = 0.4 * np.sin(11 * MILLIONS + 3 * number + context)
            middle = 6.6 + 0.1 * number + 0.03 * (number * 7 % 10)
            fall = curve(MILLIONS, 5 + number % 3, 4, middle, 0)
            columns.append(np.round(7 * (1 + number % 2) - fall + bumps, 3))
    surprisals = dict(zip(MARKS, np.stack(columns, axis=1), strict=True))
    n_tokens = {word: 1 + number % 2 for number, word in enumerate(words)}
    return pairs, surprisals, children, n_tokens, 1024


@needs_scipy
def test_scores_are_those_of_the_official_evaluator():
    result = aoa.score(*bumpy_case())
    # printed by AoAEvaluator.compute_curve_fitness of babylm-eval 3d57ddc8 (scipy 1.17.1) for
    # surprisal_file and a cdi_human.csv of bumpy_case
    model_ages = [6.635985, 6.912020, 6.946412, 6.927942, 7.245566]
    model_ages += [7.226352, 7.272721, 7.496795, 7.515805, 7.501417]
    child_ages = [18.163851, 19.174769, 20.230786, 21.245675, 22.217171]
    child_ages += [23.210328, 24.206069, 25.248844, 26.260821, 27.253022]
    curves = result.curves.values()
    assert [c.model_age for c in curves] == pytest.approx(model_ages, abs=1e-4)
    assert [c.child_age for c in curves] == pytest.approx(child_ages, abs=1e-4)
    assert result.r == pytest.approx(0.961773, abs=1e-4)
    assert result.p_value == pytest.approx(8.9205e-06, rel=1e-2)
    assert aoa.score_file(result) == {"aoa": result.r}


def test_the_surprisal_file_has_an_entry_for_each_checkpoint_and_pair():
    pairs = [aoa.Pair("dog", 0, "the "), aoa.Pair("dog", 1, "a")]
    surprisals = {2_000_000: np.array([3.5, 4.0]), 1_000_000: np.array([5.0, 6.0])}
    content = json.loads(json.dumps(aoa.surprisal_file("babyllama", pairs, surprisals)))
    assert content["metadata"] == {
        "model_name": "babyllama",
        "use_bos_only": False,
        "total_steps": 2,
        "completed_steps": 2,
    }
    assert content["results"][1] == {
        "step": "chck_1M",
        "word_count": 1_000_000,
        "target_word": "dog",
        "context_id": 1,
        "context": "a",
        "surprisal": 6.0,
    }
    values = [(entry["step"], entry["context"], entry["surprisal"]) for entry in content["results"]]
    assert values == [
        ("chck_1M", "the ", 5.0),
        ("chck_1M", "a", 6.0),
        ("chck_2M", "the ", 3.5),
        ("chck_2M", "a", 4.0),
    ]
