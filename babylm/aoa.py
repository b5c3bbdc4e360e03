"""Age of acquisition in the BabyLM challenge: does a model learn words in the order of children?

cdi_childes.json holds contexts of some 500 early words, and cdi_human.csv the share of children who
say each word, month by month. Every checkpoint of a run is asked how much the words surprise it. A
sigmoid through a word's curve says when the word was learnt; the score is the correlation of the
models' and the children's ages. After Chang and Bergen (2022, Word acquisition in neural language
models), with the fits of AoAEvaluator in the challenge's pipeline of 2026. Needs scipy.
"""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from antlm.files import Progress
from antlm.tokenizer import Tokenizer
from babylm.reading import csv_rows, read_number, read_text
from babylm.tasks import is_text
from config import UserError, require

MONTHS = np.arange(16, 31)


def import_scipy():
    """Return scipy's modules of optimization and of statistics; raises UserError without scipy."""
    try:
        from scipy import optimize, stats
    except ImportError:
        raise UserError("age of acquisition needs scipy: pip install scipy") from None
    return optimize, stats


# ------------------------------------------------------------------------------------ reading files


class Pair(NamedTuple):
    """A word and one of the contexts that it follows."""

    word: str
    context_id: int  # among the contexts of the word
    context: str


def read_contexts(path: str | Path) -> list[Pair]:
    """Read cdi_childes.json; words of one letter are left out, as in the pipeline.

    A word may have an empty list of contexts. Raises UserError that names the fault.
    """
    try:
        contexts_of = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    ok = isinstance(contexts_of, dict)
    require(ok, f"{path}: an object with a key for each word is expected")

    pairs = []
    for word, records in contexts_of.items():
        require(isinstance(records, list), f"{path}: {word!r} needs a list of its contexts")
        require(word.strip(), f"{path}: a word is empty")
        for number, record in enumerate(records):
            ok = isinstance(record, dict) and is_text(record.get("context"))
            require(ok, f"{path}: {word!r}: number {number} of its contexts lacks a text `context`")
            if len(word) > 1:
                pairs.append(Pair(word, number, record["context"]))
    require(pairs, f"{path}: has no word with a context")
    return pairs


def read_children(path: str | Path) -> dict[str, np.ndarray]:
    """Read cdi_human.csv: {word: shares of children who say it, at each of MONTHS}.

    An empty cell is a month without data, NaN. Of several rows of a word the first counts, as in
    the pipeline. Raises UserError that names the line and its fault.
    """
    columns = [str(month) for month in MONTHS]
    children = {}
    for source, row in csv_rows(path, ("word", *columns)):
        require(row["word"].strip(), f"{source}: word is empty")
        shares = []
        for name in columns:
            share = math.nan
            if row[name]:
                share = read_number(row[name], name, source)
                ok = 0 <= share <= 1
                require(ok, f"{source}: {name} must be a share from 0 to 1, not {share}")
            shares.append(share)
        children.setdefault(row["word"], np.array(shares))
    return children


# ---------------------------------------------------------------------------------------- questions


def option(pair: Pair) -> tuple[str, int]:
    """Return a text and the character where its target starts, as Item.options has them."""
    word = pair.word.strip()
    text = f"{pair.context.strip()} {word}"
    return text, len(text) - len(word)


def count_tokens(word: str, tokenizer: Tokenizer) -> int:
    """Return the number of a word's tokens within a text, at least 1."""
    return max(1, len(tokenizer.encode(f"The {word}")) - len(tokenizer.encode("The")))


# --------------------------------------------------------------------------------------------- ages


def sigmoid(x: np.ndarray, a: float, b: float, c: float, d: float) -> np.ndarray:
    return a / (1 + np.exp(-b * (x - c))) + d


def crossing(
    x: np.ndarray, y: np.ndarray, height: float, start: tuple, bounds: tuple, max_calls: int
) -> float | None:
    """Return where a sigmoid through points reaches a height; None where it does not among them.

    x: ascending
    start, bounds, max_calls: of the fit, by scipy's curve_fit
    """
    optimize, _ = import_scipy()
    if len(x) < 3:
        return None
    try:
        # a steep sigmoid overflows in the exponential, and three points leave the covariance of
        # four parameters open; neither matters
        with np.errstate(over="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", optimize.OptimizeWarning)
            fit, _ = optimize.curve_fit(sigmoid, x, y, p0=start, bounds=bounds, maxfev=max_calls)
    except RuntimeError:  # no fit within max_calls
        return None
    a, b, c, d = fit.tolist()
    if min(a, b) <= 1e-6 or not d < height < a + d:
        return None
    place = c - math.log((a + d - height) / (height - d)) / b
    if not x[0] <= place <= x[-1]:
        return None
    return place


def age_of_children(shares: np.ndarray) -> float | None:
    """Return the month in which half the children say a word; None outside MONTHS.

    shares: (15,), NaN where unknown
    """
    known = ~np.isnan(shares)
    months = MONTHS[known]
    if not known.any():
        return None
    start = (1, 0.1, months.mean(), 0)
    bounds = ((0, 0, months[0], -0.5), (2, 1, months[-1], 0.5))
    return crossing(months, shares[known], 0.5, start, bounds, max_calls=1000)


def age_of_model(
    words_seen: list[int], surprisals: np.ndarray, n_tokens: int, vocab_size: int
) -> float | None:
    """Return when a word's surprisal is halfway from chance to its least; None outside words_seen.

    words_seen: of each checkpoint, ascending
    surprisals: the word's mean in nats at each checkpoint, (C,)
    n_tokens: of the word; chance gives each of them 1 / vocab_size
    The age is log10(words seen + 1).
    """
    x = np.log10(np.array(words_seen) + 1)
    y = -np.asarray(surprisals)
    chance = -n_tokens * math.log(vocab_size)
    spread = np.ptp(y)
    start = (spread, 1, x.mean(), y.min())
    low = (0, 0, x.min() - 1, y.min() - 2 * spread - 1)
    high = (10 * spread + 1, 100, x.max() + 1, y.max() + 1)
    return crossing(x, y, (chance + y.max()) / 2, start, (low, high), max_calls=20_000)


# ------------------------------------------------------------------------------------------- scores


@dataclass
class Curve:
    """What is known of one word; an age is None where a curve gives none."""

    surprisals: list[float]  # mean over contexts in nats, at each checkpoint
    model_age: float | None  # log10(words seen + 1)
    child_age: float | None  # months


@dataclass
class Score:
    """The score of all words, and the curves from which it comes."""

    r: float  # the challenge's: 0 with fewer than 3 words, or with p > 0.1
    raw_r: float | None  # Pearson's, None with fewer than 3 words
    p_value: float | None
    n_words: int  # that have both ages
    words_seen: list[int]  # of the checkpoints
    curves: dict[str, Curve]


def score(
    pairs: list[Pair],
    surprisals: dict[int, np.ndarray],
    children: dict[str, np.ndarray],
    n_tokens: dict[str, int],
    vocab_size: int,
) -> Score:
    """Correlate the ages at which a model and children learn words.

    surprisals: {words seen at a checkpoint: surprisal of each pair's word in nats}
    children: as read_children returns them
    n_tokens: {word: count_tokens of it}
    vocab_size: of the tokenizer
    """
    numbers_of = {}  # word: which pairs are of it
    for number, pair in enumerate(pairs):
        numbers_of.setdefault(pair.word, []).append(number)

    words_seen = sorted(surprisals)
    curves = {}
    progress = Progress("fitting the ages of words", len(numbers_of))
    for n_done, (word, numbers) in enumerate(numbers_of.items(), start=1):
        means = [float(np.asarray(surprisals[seen])[numbers].mean()) for seen in words_seen]
        child_age = None
        if word in children:
            child_age = age_of_children(children[word])
        model_age = age_of_model(words_seen, means, n_tokens[word], vocab_size)
        curves[word] = Curve(means, model_age, child_age)
        progress(n_done)

    # the words that both have learnt
    learnt = [c for c in curves.values() if c.model_age is not None and c.child_age is not None]
    if len(learnt) < 3:
        return Score(0.0, None, None, len(learnt), words_seen, curves)
    _, stats = import_scipy()
    raw_r, p_value = stats.pearsonr([c.model_age for c in learnt], [c.child_age for c in learnt])
    r = 0.0
    if p_value <= 0.1:
        r = float(raw_r)
    return Score(r, float(raw_r), float(p_value), len(learnt), words_seen, curves)


# ----------------------------------------------------------------------- the challenge's two files


def score_run(
    pairs: list[Pair],
    surprisals: dict[int, np.ndarray],
    children: dict[str, np.ndarray],
    tokenizer: Tokenizer,
) -> Score:
    """Correlate the ages as score() does, for a run with this tokenizer."""
    words = dict.fromkeys(pair.word for pair in pairs)
    n_tokens = {word: count_tokens(word, tokenizer) for word in words}
    return score(pairs, surprisals, children, n_tokens, tokenizer.vocab_size)


def surprisal_file(model_name: str, pairs: list[Pair], surprisals: dict[int, np.ndarray]) -> dict:
    """Return the content of surprisal.json.

    surprisals: {words seen, a multiple of a million: surprisal of each pair's word in nats}
    """
    results = []
    for words_seen, values in sorted(surprisals.items()):
        checkpoint = {"step": f"chck_{words_seen // 1_000_000}M", "word_count": words_seen}
        for pair, value in zip(pairs, values, strict=True):
            question = {
                "target_word": pair.word,
                "context_id": pair.context_id,
                "context": pair.context,
            }
            results.append(checkpoint | question | {"surprisal": float(value)})
    metadata = {
        "model_name": model_name,
        "use_bos_only": False,
        "total_steps": len(surprisals),
        "completed_steps": len(surprisals),
    }
    return {"metadata": metadata, "results": results}


def score_file(result: Score) -> dict:
    """Return the content of aoa_score.json."""
    return {"aoa": result.r}


def table(result: Score, n_words: int = 20) -> str:
    """Lay out the score and the curves of some words: those that the model learnt first."""
    head = f"age of acquisition: r = {result.r:.3f} over {result.n_words} words"
    if result.p_value is not None:
        head += f" (Pearson's {result.raw_r:.3f}, p = {result.p_value:.3f})"
    seen = [f"{words / 1e6:.0f}M" for words in result.words_seen]
    lines = [
        head,
        "mean surprisal in nats at so many words seen, and the ages of model and children",
    ]
    lines.append(f"{'':16}" + "".join(f"{words:>7}" for words in seen) + "    model  months")

    learnt = [word for word, curve in result.curves.items() if curve.model_age is not None]
    learnt.sort(key=lambda word: result.curves[word].model_age)
    for word in learnt[:n_words]:
        curve = result.curves[word]
        cells = "".join(f"{surprisal:7.2f}" for surprisal in curve.surprisals)
        child_age = "-" if curve.child_age is None else f"{curve.child_age:.1f}"
        lines.append(f"{word:16}{cells}{10**curve.model_age / 1e6:8.2f}M{child_age:>8}")
    return "\n".join(lines)
