"""Reading times of the BabyLM challenge: does a word surprise the model where people read slowly?

Each line of reading_data.csv holds a word of a sentence, the text before it, and how long people
read it: eye tracking and self-paced reading. The score is the share of the variance in their times
that the word's surprisal explains, of what its frequency and the lengths leave open. Questions and
regression are those of evaluation_pipeline/reading in the pipelines of 2025 and 2026.
"""

import csv
import io
import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from antlm.texts import START_BYTES, refuse_other_kinds
from antlm.tokenizer import MASK, Tokenizer
from config import UserError, require

# The columns of reading_data.csv that are needed.
TEXTS = ("item", "word", "prev_item", "prev_word")
COUNTS = ("length", "context_length", "prev_length")
EYE_TRACKING = ("RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound")
SELF_PACED = "self_paced_reading_time"
MEASURED = ("Subtlex_log10", *EYE_TRACKING, SELF_PACED)  # may be missing

N_MASKS = 3  # appended to a text in masked modes, so that more may follow than one token


# ------------------------------------------------------------------------------------------- tables


def read_text(path: str | Path) -> str:
    """Read a file of text in UTF-8; raises UserError for any other."""
    raw = Path(path).read_bytes()
    refuse_other_kinds(path, raw[:START_BYTES])
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 ({error})") from None


def csv_rows(path: str | Path, columns: tuple[str, ...]) -> list[tuple[str, dict[str, str]]]:
    """Read a CSV file with these columns, and perhaps others.

    Returns file:line and the cells of each row. Raises UserError that names the fault.
    """
    # strict: an open quotation mark would otherwise swallow the rest of the file
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    rows = []
    try:
        missing = [name for name in columns if name not in (reader.fieldnames or [])]
        require(not missing, f"{path}: the first line lacks the column {', '.join(missing)}")
        for row in reader:
            source = f"{path}:{reader.line_num}"
            # DictReader marks with None a cell without a column, or a column without a cell
            complete = None not in row and None not in row.values()
            require(complete, f"{source}: needs {len(reader.fieldnames)} cells")
            rows.append((source, row))
    except csv.Error as error:
        raise UserError(f"{path}: not CSV after line {reader.line_num} ({error})") from None
    require(rows, f"{path}: has no row under the names of its columns")
    return rows


def read_number(text: str, column: str, source: str) -> float:
    """Return the finite number in a cell; raises UserError where there is none."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    require(math.isfinite(number), f"{source}: {column} must be a number, not {text[:60]!r}")
    return number


@dataclass
class Reading:
    """The rows of reading_data.csv, column by column.

    prev_items: None where a word has no word before it that can be asked for
    numbers: {column: array of float}, with NaN where a value is missing
    """

    items: list[str]
    words: list[str]
    prev_items: list[str | None]
    prev_words: list[str]
    numbers: dict[str, np.ndarray]


def read(path: str | Path) -> Reading:
    """Read reading_data.csv; raises UserError that names the line and its fault."""
    reading = Reading([], [], [], [], {})
    numbers = {name: [] for name in COUNTS + MEASURED}
    for source, row in csv_rows(path, TEXTS + COUNTS + MEASURED):
        # pandas, which the pipeline reads with, takes the text None for a missing cell, too; one
        # sentence begins with this word
        has_prev = row["prev_item"] not in ("", "None")
        require(row["word"].strip(), f"{source}: word is empty")
        require(row["prev_word"].strip() or not has_prev, f"{source}: prev_word is empty")
        reading.items.append(row["item"] or "None")
        reading.words.append(row["word"])
        reading.prev_items.append(row["prev_item"] if has_prev else None)
        reading.prev_words.append(row["prev_word"])

        for name, column in numbers.items():
            if name in MEASURED and not row[name]:
                column.append(math.nan)
            else:
                column.append(read_number(row[name], name, source))
    reading.numbers = {name: np.array(column) for name, column in numbers.items()}
    return reading


# ---------------------------------------------------------------------------------------- questions


class Step(NamedTuple):
    """One question of the chain rule: how probable is the target token after these?"""

    ids: list[int]
    target: int


def chain(item: str, word: str, tokenizer: Tokenizer, boundary: str) -> list[Step]:
    """Return the questions whose probabilities multiply to that of a word after a text.

    There is one for each token of the word. As in the pipeline, the word is joined to the text
    without a space, and what has been asked for so far is encoded anew as a text.
    """
    text = item
    steps = []
    for target in tokenizer.encode_text(word, boundary)[1:]:
        # bytes that are no whole character become U+FFFD
        spelling = tokenizer.decode([target])
        if steps:
            target = tokenizer.encode_text(spelling, boundary)[1]
        steps.append(Step(tokenizer.encode_text(text, boundary), target))
        text += spelling
    return steps


def as_text(step: Step, mode: str) -> tuple[list[int], int]:
    """Return a question as eval.score takes it: ids of a text, and where its one target stands.

    In a masked mode that hides the target, the first of N_MASKS.
    """
    ids = [*step.ids, step.target]
    if mode != "causal":
        ids += [MASK] * (N_MASKS - 1)
    return ids, len(step.ids)


# ------------------------------------------------------------------------------------------- scores


def r_squared(times: np.ndarray, terms: list[np.ndarray]) -> float:
    """Return the share of variance that a regression on these terms and a constant explains.

    Rows with NaN are left out; NaN where no more rows remain than there are coefficients.
    """
    design = np.column_stack([np.ones(len(times)), *terms])
    complete = ~np.isnan(design).any(axis=1) & ~np.isnan(times)
    design = design[complete]
    times = times[complete]
    if len(design) <= design.shape[1]:
        return math.nan
    coefficients = np.linalg.lstsq(design, times, rcond=None)[0]
    residuals = times - design @ coefficients
    deviations = times - times.mean()
    return float(1 - residuals @ residuals / (deviations @ deviations))


def gain(times: np.ndarray, base: list[np.ndarray], pred: np.ndarray) -> float:
    """Return the share of variance that `pred` explains, of what the base leaves unexplained.

    The base is these terms and the products of any two of them.
    """
    terms = base + [first * second for first, second in combinations(base, 2)]
    # each fit leaves out rows of its own, as in the pipeline
    r2_base = r_squared(times, terms)
    r2_full = r_squared(times, [*terms, pred])
    return (r2_full - r2_base) / (1 - r2_base)


def scores(reading: Reading, pred: np.ndarray, prev_pred: np.ndarray) -> dict[str, float]:
    """Return the scores of self-paced reading, "spr", and of eye tracking, "rt", as fractions.

    pred, prev_pred: surprisal in nats of each row's word and of the word before, (N,)
    NaN where the rows are too few, as in a quick look at 10 of them.
    """
    numbers = reading.numbers
    base = [numbers[name] for name in ("Subtlex_log10", "length", "context_length")]
    eye_tracking = [gain(numbers[name], base, pred) for name in EYE_TRACKING]
    # a slow reader of one word is still busy with it at the next, so the word before counts as well
    base += [numbers["prev_length"], prev_pred]
    spr = gain(numbers[SELF_PACED], base, pred)
    return {"spr": spr, "rt": sum(eye_tracking) / len(eye_tracking)}


def predictions(pred: np.ndarray, prev_pred: np.ndarray) -> dict:
    """Return the content of the challenge's predictions.json; json.dumps writes NaN as NaN."""
    rows = []
    for number, (surprisal, prev_surprisal) in enumerate(zip(pred, prev_pred, strict=True)):
        rows.append({"id": number, "pred": float(surprisal), "prev_pred": float(prev_surprisal)})
    return {"reading": {"predictions": rows}}
