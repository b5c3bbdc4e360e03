"""The two tasks that compare a model with people: reading times, and the age of acquisition.

What is asked and how it is counted stands in reading.py and aoa.py. Here files become questions for
a model, and its answers the part "human" of a result of eval.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from antlm.tokenizer import Tokenizer
from babylm import aoa, reading
from babylm.tasks import Tasks
from config import require


@dataclass
class Human:
    """The files as read; None for a task that is not asked.

    tasks: their paths
    data: reading_data.csv; n_rows: how many of its rows are scored
    pairs: the words in context that are scored
    children: the shares of children who say a word; None where no ages are asked for
    """

    tasks: Tasks
    data: reading.Reading | None = None
    n_rows: int = 0
    pairs: list[aoa.Pair] | None = None
    children: dict[str, np.ndarray] | None = None


def read_human(tasks: Tasks, limit: int, ages: bool) -> Human:
    """Read the files that compare a model with people; raises UserError that names a fault.

    limit: of rows and of words in context, 0: all
    ages: whether it will be asked when the words are learnt
    """
    human = Human(tasks)
    if tasks.reading:
        human.data = reading.read(tasks.reading)
        human.n_rows = limit or len(human.data.items)
    if tasks.words:
        pairs = aoa.read_contexts(tasks.words)
        human.pairs = pairs[: limit or len(pairs)]
    if tasks.words and ages:
        aoa.import_scipy()
        path = tasks.children
        require(path.exists(), f"{path}: does not exist; the age of acquisition needs it")
        human.children = aoa.read_children(path)
    return human


def score_human(human: Human, examiner) -> dict[str, dict]:
    """Return what a model makes of the files, by task. examiner: eval.Examiner"""
    results = {}
    if human.data:
        results["reading"] = score_reading(human, examiner)
    if human.pairs:
        results["aoa"] = score_words(human, examiner)
    return results


# ------------------------------------------------------------------------------------ reading times


def score_reading(human: Human, examiner) -> dict:
    """Return the surprisals of reading_data.csv's words, and how well they explain the times."""
    data = human.data
    asked = list(zip(data.items, data.words, strict=True))[: human.n_rows]
    before = list(zip(data.prev_items, data.prev_words, strict=True))[: human.n_rows]

    # the questions of each word; one that another row has as the word before is asked once
    run = examiner.run
    steps_of = {}
    for item, word in [*asked, *before]:
        if item is not None:
            steps_of[item, word] = reading.chain(item, word, run.tokenizer, run.boundary)

    result = {"kind": "reading", "items": len(asked), "scores": {}, "pred": {}, "prev_pred": {}}
    for mode in examiner.modes:
        surprisals = word_surprisals(steps_of, mode, human.tasks.reading, examiner)
        result["pred"][mode] = [surprisals[pair] for pair in asked]
        # a word without one before it has NaN there, as in the pipeline
        result["prev_pred"][mode] = [surprisals.get(pair, math.nan) for pair in before]
        if len(asked) == len(data.items):  # the regression on a part would be another one
            pred = np.array(result["pred"][mode])
            prev_pred = np.array(result["prev_pred"][mode])
            result["scores"][mode] = reading.scores(data, pred, prev_pred)
    return result


def word_surprisals(
    steps_of: dict[tuple, list[reading.Step]], mode: str, path: Path, examiner
) -> dict[tuple, float]:
    """Return the surprisal in nats of words after texts.

    steps_of: {(text, word): as reading.chain returns them}
    path: of their file, for errors
    """
    # a question that several words share is asked once
    questions = {}
    for (_, word), steps in steps_of.items():
        for step in steps:
            questions.setdefault((*step.ids, step.target), (step, f"{path}: {word!r}"))
    texts = [reading.as_text(step, mode) for step, _ in questions.values()]
    ids = [np.array(row) for row, _ in texts]
    first = np.array([start for _, start in texts])
    names = [name for _, name in questions.values()]
    totals, _ = examiner.score(ids, first, mode, names)
    total_of = dict(zip(questions, totals.tolist(), strict=True))

    # the probability of a word is the product of those of its steps
    surprisals = {}
    for pair, steps in steps_of.items():
        surprisals[pair] = -sum(total_of[*step.ids, step.target] for step in steps)
    return surprisals


# ------------------------------------------------------------------------------- age of acquisition


def score_words(human: Human, examiner) -> dict:
    """Return how much each word of cdi_childes.json surprises the model in each of its contexts."""
    sources = {}
    for pair in human.pairs:
        sources[aoa.option(pair)] = f"{human.tasks.words}: {pair.word!r}"
    result = {"kind": "aoa", "items": len(human.pairs), "surprisals": {}}
    for mode in examiner.modes:
        scores = examiner.score_options(sources, mode)
        result["surprisals"][mode] = [-scores[aoa.option(pair)].total for pair in human.pairs]
    return result


def ages_table(results: list[dict], human: Human, run: Path, mode: str) -> str:
    """Lay out at what number of words a run has learnt which words, and children when.

    results: of all checkpoints
    """
    tokenizer = Tokenizer(run / "tokenizer.json")
    surprisals = {}
    for result in results:
        surprisals[result["words"]] = np.array(result["human"]["aoa"]["surprisals"][mode])
    score = aoa.score_run(human.pairs, surprisals, human.children, tokenizer)
    return f"{mode}, {aoa.table(score)}"
