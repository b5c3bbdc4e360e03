"""The reading task: its file, the questions of the chain rule, and the regression."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
from antlm.tokenizer import MASK, START, Tokenizer, save_tokenizer
from babylm import reading
from config import UserError

DATA = Path(__file__).parent.parent.parent / "shared/data/eval"
NAMES = reading.TEXTS + reading.COUNTS + reading.MEASURED
ROW = {
    "item": "The cat",
    "word": "sat",
    "prev_item": "The",
    "prev_word": "cat",
    **dict.fromkeys(reading.COUNTS, "3"),
    **dict.fromkeys(reading.MEASURED, "1.5"),
}


def write_rows(path: Path, *rows: dict) -> Path:
    lines = [",".join(NAMES)]
    lines += [",".join(row[name] for name in NAMES) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------- the file


def test_a_file_is_read_column_by_column(tmp_path):
    first = ROW | {"item": "", "prev_item": "", "prev_word": "", "prev_length": "-1"}
    second = ROW | {"Subtlex_log10": "", "word": "naïve"}
    table = reading.read(write_rows(tmp_path / "reading.csv", first, second))
    assert table.items == ["None", "The cat"]
    assert table.words == ["sat", "naïve"]
    assert table.prev_items == [None, "The"]
    assert table.prev_words == ["", "cat"]
    assert table.numbers["prev_length"].tolist() == [-1, 3]
    assert table.numbers["self_paced_reading_time"].tolist() == [1.5, 1.5]
    np.testing.assert_equal(table.numbers["Subtlex_log10"], [1.5, math.nan])


def test_the_text_none_before_a_word_counts_as_missing(tmp_path):
    # pandas reads it so, and all published predictions of "None of the city people" have NaN there
    table = reading.read(write_rows(tmp_path / "reading.csv", ROW | {"prev_item": "None"}))
    assert table.prev_items == [None]


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"word": " "}, "word is empty"),
        ({"prev_word": ""}, "prev_word is empty"),
        ({"length": ""}, "length must be a number, not ''"),
        ({"prev_length": "nan"}, "prev_length must be a number, not 'nan'"),
        ({"RTgopast": "fast"}, "RTgopast must be a number, not 'fast'"),
        ({"Subtlex_log10": "inf"}, "Subtlex_log10 must be a number, not 'inf'"),
        ({"item": "The, cat"}, f"needs {len(NAMES)} cells"),
        ({"self_paced_reading_time": "1.5,2"}, f"needs {len(NAMES)} cells"),
    ],
)
def test_a_faulty_row_is_named_with_its_line(change, fault, tmp_path):
    path = write_rows(tmp_path / "reading.csv", ROW, ROW | change)
    with pytest.raises(UserError) as error:
        reading.read(path)
    assert str(error.value) == f"{path}:3: {fault}"


@pytest.mark.parametrize(
    "content, fault",
    [
        (b"", "lacks the column item, word, prev_item"),
        (b"item,word\nThe,cat\n", "lacks the column prev_item, prev_word, length"),
        (",".join(NAMES).encode(), "no row under the names of its columns"),
        (",".join(NAMES).encode() + b"\n\xff", "not text in UTF-8"),
        (",".join(NAMES).encode("utf-16"), "is text in UTF-16, not text in UTF-8"),
        (",".join(NAMES).encode() + b'\n"The cat, sat', "not CSV after line 1"),
    ],
)
def test_a_file_that_is_no_table_of_reading_times_is_refused(content, fault, tmp_path):
    path = tmp_path / "reading.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        reading.read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------- questions


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A tokenizer of bytes and of one longer token, ab."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(path, [(b"a", b"b")])
    return Tokenizer(path)


# after four special tokens the printable bytes from ! on: a is 4 + ord("a") - ord("!")
A = 68
B = 69
C = 70
X = 91
AB = 260  # behind the 256 bytes


@pytest.mark.parametrize(
    "item, word, steps",
    [
        ("x", "c", [([START, X], C)]),
        # what has been asked for stands behind the text without a space
        ("x", "abc", [([START, X], AB), ([START, X, AB], C)]),
        # and both are encoded anew
        ("a", "bc", [([START, A], B), ([START, AB], C)]),
    ],
)
def test_the_chain_asks_for_one_token_after_the_other(item, word, steps, tokenizer):
    assert reading.chain(item, word, tokenizer, "line") == steps


def test_half_a_character_is_asked_for_as_the_replacement_character(tokenizer):
    # the two bytes of é, then those of U+FFFD
    first = tokenizer.bpe.encode_single_token(b"\xc3")
    replacement = [tokenizer.bpe.encode_single_token(bytes([byte])) for byte in b"\xef\xbf\xbd"]
    assert reading.chain("x", "é", tokenizer, "line") == [
        ([START, X], first),
        ([START, X, *replacement], replacement[0]),
    ]


def test_without_start_tokens_the_chain_begins_with_a_newline(tokenizer):
    (newline,) = tokenizer.encode("\n")
    assert reading.chain("x", "c", tokenizer, "none") == [([newline, X], C)]


def test_masked_modes_hide_three_tokens_and_read_the_first():
    ids, first = reading.as_text(reading.Step([START, X], C), "masked")
    questions = evaluation.ask_masked(np.array([ids]), first)
    assert questions.tokens.tolist() == [[START, X, MASK, MASK, MASK]]
    assert questions.positions.tolist() == [[2]]
    assert questions.targets.tolist() == [[C]]
    assert evaluation.ask_mntp(np.array([ids]), first).positions.tolist() == [[1]]


def test_causal_mode_reads_the_last_token():
    ids, first = reading.as_text(reading.Step([START, X], C), "causal")
    questions = evaluation.ask_causal(np.array([ids]), first)
    assert questions.tokens.tolist() == [[START, X]]
    assert questions.positions.tolist() == [[1]]
    assert questions.targets.tolist() == [[C]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["untied", "tied", "newline"])
def test_the_chain_is_that_of_transformers_on_the_exported_tokenizer(kind):
    hf_runs = pytest.importorskip("hf_runs")
    run = hf_runs.exported(kind)
    hf_tokenizer = hf_runs.load_hf("AutoTokenizer", run.folder)
    texts = [
        ("Arthur placed", "the"),
        ("Zoë said the", "naïve"),
        ("The café owner in Köln", "Ærøskøbing."),
        ("one line\nand another", "it's"),
        ("ends in a space ", "日本x"),
        ("two  spaces", "42nd"),
    ]
    for item, word in texts:
        text = item
        expected = []
        for token in hf_tokenizer(word, add_special_tokens=False).input_ids:
            spelling = hf_tokenizer.decode(token)
            target = hf_tokenizer(spelling, add_special_tokens=False).input_ids[0]
            if not expected:
                target = token
            expected.append((hf_tokenizer(text).input_ids, target))
            text += spelling
        assert reading.chain(item, word, run.tokenizer, run.boundary) == expected


# ------------------------------------------------------------------------------------------- scores


def test_r_squared_of_a_line_through_four_points():
    # by hand: covariance 6, variances 5 and 9, and 6 * 6 / (5 * 9) = 0.8
    times = np.array([1.0, 2.0, 2.0, 5.0])
    x = np.array([0.0, 1.0, 2.0, 3.0])
    assert reading.r_squared(times, [x]) == pytest.approx(0.8, abs=1e-12)


def test_r_squared_is_that_of_the_normal_equations():
    generator = np.random.default_rng(0)
    terms = list(generator.normal(size=(5, 40)))
    times = 300 + 20 * terms[0] + generator.normal(size=40)
    design = np.column_stack([np.ones(40), *terms])
    coefficients = np.linalg.inv(design.T @ design) @ design.T @ times
    expected = np.var(design @ coefficients) / np.var(times)
    assert reading.r_squared(times, terms) == pytest.approx(expected, abs=1e-12)


def test_r_squared_of_too_few_rows_is_nan():
    assert math.isnan(reading.r_squared(np.array([1.0, 2.0]), [np.array([0.0, 1.0])]))


def test_rows_with_a_missing_value_are_left_out():
    times = np.array([1.0, 2.0, 2.0, 5.0, 90.0, math.nan])
    x = np.array([0.0, 1.0, 2.0, 3.0, math.nan, 80.0])
    assert reading.r_squared(times, [x]) == pytest.approx(0.8, abs=1e-12)


def test_each_of_the_two_fits_leaves_out_rows_of_its_own():
    # by hand: over all rows the base explains 4 * 4 / (8 * 48) = 1/24; over the first four, which
    # alone have a pred, both explain 2/3; (2/3 - 1/24) / (1 - 1/24) = 15/23
    z = np.array([1.0, 1.0, -1.0, -1.0])
    pred = np.array([1.0, -1.0, 1.0, -1.0])
    times = np.append(z + pred + z * pred, 3 * pred)
    score = reading.gain(times, [np.append(z, z)], np.append(pred, np.full(4, math.nan)))
    assert score == pytest.approx(15 / 23, abs=1e-12)


def orthogonal(n: int) -> np.ndarray:
    """Return n columns of signs, (n, 2**n); they and all their products are orthogonal."""
    rows = np.arange(2**n)
    return np.stack([1.0 - 2 * ((rows >> bit) & 1) for bit in range(n)])


def made_reading() -> tuple[reading.Reading, np.ndarray, np.ndarray]:
    """Return reading times whose variance comes in known parts, pred and prev_pred."""
    frequency, length, context, prev_length, prev_pred, pred, noise = orthogonal(7)
    numbers = {
        "Subtlex_log10": frequency,
        "length": length,
        "context_length": context,
        "prev_length": prev_length,
        # what the base leaves open: half of it is pred's, half, nothing, all
        "RTfirstfix": pred + noise,
        "RTfirstpass": frequency * length + length * context + pred + noise,
        "RTgopast": context + noise,
        "RTrightbound": pred,
        # one part in six is the base's, and of the other five one is pred's
        "self_paced_reading_time": 200 + prev_length * prev_pred + pred + 2 * noise,
    }
    n = len(pred)
    return reading.Reading(["a"] * n, ["b"] * n, ["c"] * n, ["d"] * n, numbers), pred, prev_pred


def test_scores_are_shares_of_the_variance_that_the_base_leaves_open():
    scores = reading.scores(*made_reading())
    assert scores["rt"] == pytest.approx((1 / 2 + 1 / 2 + 0 + 1) / 4, abs=1e-12)
    assert scores["spr"] == pytest.approx(1 / 5, abs=1e-12)


def test_rows_without_a_word_before_count_for_eye_tracking_alone():
    table, pred, prev_pred = made_reading()
    # one row more, with wild times and without a word before
    for name, column in table.numbers.items():
        table.numbers[name] = np.append(column, 500 if name in reading.MEASURED else 1)
    scores = reading.scores(table, np.append(pred, 1), np.append(prev_pred, math.nan))
    assert scores["spr"] == pytest.approx(1 / 5, abs=1e-12)
    assert abs(scores["rt"] - 1 / 2) > 0.05


def test_predictions_have_the_form_of_the_pipeline():
    content = reading.predictions(np.array([1.5, 2.5]), np.array([math.nan, 0.5]))
    text = json.dumps(content)
    assert text == (
        '{"reading": {"predictions": [{"id": 0, "pred": 1.5, "prev_pred": NaN}, '
        '{"id": 1, "pred": 2.5, "prev_pred": 0.5}]}}'
    )


# ------------------------------------------------------------------------ the challenge's own data


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the challenge's files are not here")


@needs_data
def test_the_official_file_is_read():
    table = reading.read(DATA / "reading/reading_data.csv")
    assert len(table.words) == 1726
    assert table.items[320] == "None"
    # 205 words stand first in their sentence, and one follows the word None
    assert table.prev_items.count(None) == 206
    assert int(np.isnan(table.numbers["Subtlex_log10"]).sum()) == 30


@needs_data
@pytest.mark.parametrize(
    "model", ["mamba-64", "mamba-256", "mamba-8192", "opt-64", "opt-128", "opt-4096"]
)
def test_published_scores_are_reproduced_to_the_last_digit(model):
    folder = DATA / "published_reading" / model
    lines = (folder / "prediction.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    pred = np.array([row["Logprob"] for row in rows])
    prev_pred = np.array([row["Prev_Logprob"] for row in rows])
    table = reading.read(DATA / "reading/reading_data.csv")
    scores = reading.scores(table, pred, prev_pred)
    report = (
        f"EYE TRACKING SCORE: {100 * scores['rt']:.2f}\n"
        f"SELF-PACED READING SCORE: {100 * scores['spr']:.2f}\n"
    )
    assert report == (folder / "report.txt").read_text()
    # a row is missing here exactly where it is missing there
    missing = [item is None for item in table.prev_items]
    assert missing == np.isnan(prev_pred).tolist()
