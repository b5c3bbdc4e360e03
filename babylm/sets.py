"""The sets of a year of the challenge, as a folder holds them: checked, counted, told apart."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from antlm.checkpoint import file_sha256
from babylm import aoa, reading
from babylm.challenge import GLUE_ITEMS, YEARS, Set
from babylm.glue import find_file
from babylm.protocols import PROTOCOLS
from babylm.tasks import Tasks, json_lines, read_tasks
from config import require

CHARS_PER_TOKEN = 4  # about as many as English has


@dataclass
class OpenSet:
    """A set that is there.

    sha256: of all that its scores depend on
    work: how long it takes to score, in a unit of all calls
    """

    tasks: Tasks
    sha256: str
    work: float


def options_of_items(tasks: Tasks) -> list[list[tuple[str, int]]]:
    """Return the texts that each item of a set asks about, as Choice.options has them."""
    if tasks.reading:
        data = reading.read(tasks.reading)
        pairs = zip(data.items, data.words, strict=True)
        return [[(item + word, len(item))] for item, word in pairs]
    if tasks.words:
        return [[aoa.option(pair)] for pair in aoa.read_contexts(tasks.words)]
    return [item.choice.options for item in tasks.items]


def work_of(options: set[tuple[str, int]], mode: str) -> float:
    """Return how many characters the model reads; the masked modes read a text for each token."""
    total = 0.0
    for text, start in options:
        n_passes = 1.0
        if mode != "causal":
            n_passes = (len(text) - start) / CHARS_PER_TOKEN
        total += len(text) * n_passes
    return total


def open_set(folder: Path, n_expected: int, year: str, mode: str) -> OpenSet:
    """Read a set; raises UserError where it is damaged, of another year or of another size."""
    tasks = read_tasks([str(folder)], PROTOCOLS[year].kinds)
    names = {item.task for item in tasks.items}
    require(len(names) <= 1, f"{folder}: a set is one folder of files, this holds {len(names)}")
    options = options_of_items(tasks)
    require(
        len(options) == n_expected,
        f"{folder}: {len(options):,} items where the challenge of {year} has {n_expected:,}",
    )

    content = repr([item.choice for item in tasks.items])
    for file in (tasks.reading, tasks.words):
        if file:
            content += file_sha256(file)
    distinct = set()
    for options_of_item in options:
        distinct |= set(options_of_item)
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return OpenSet(tasks, sha256, work_of(distinct, mode))


def open_sets(
    folders: dict[Set, tuple[Path, int]], year: str, mode: str, missing: list[str]
) -> dict[Set, OpenSet]:
    """Read the sets whose folder is there, and add the others to those that are missing.

    folders: {set: its folder, and how many items the challenge has in it}
    """
    opened = {}
    for part, (folder, n_expected) in folders.items():
        if folder.exists():
            opened[part] = open_set(folder, n_expected, year, mode)
        else:
            missing.append(str(folder))
    return opened


@dataclass
class GlueTask:
    """A task of fine-tuning whose files are there; sha256 and work as in OpenSet."""

    sha256: str
    work: float


def open_glue(folder: Path, year: str, missing: list[str]) -> dict[str, GlueTask]:
    """Check the files of the year's tasks, and add tasks without them to those that are missing.

    Raises UserError where a file is damaged or of another size.
    """
    opened = {}
    for task in YEARS[year].glue:
        valid = folder / f"{task}.valid.jsonl"
        pattern = f"{task.removesuffix('-mm')}.train*.jsonl"  # mnli-mm is left to mnli's model
        if not valid.exists() or not list(folder.glob(pattern)):
            missing.append(str(folder / task))
            continue
        train = find_file(str(folder), pattern)
        n = sum(1 for _ in json_lines(valid))
        require(
            n == GLUE_ITEMS[task],
            f"{valid}: {n:,} items where the challenge of {year} has {GLUE_ITEMS[task]:,}",
        )
        # ten epochs, in which backward takes twice as long as forward
        work = 10 * valid.stat().st_size + 30 * train.stat().st_size
        opened[task] = GlueTask(file_sha256(valid) + file_sha256(train), work)
    return opened


@dataclass
class Sets:
    """The sets of a year that the data folder holds.

    words: that of the age of acquisition; pairs: what it holds
    glue_folder: of the files of glue
    missing: names of what the folder does not hold
    """

    full: dict[Set, OpenSet]
    fast: dict[Set, OpenSet]
    words: OpenSet | None
    pairs: list[aoa.Pair]
    glue: dict[str, GlueTask]
    glue_folder: Path
    missing: list[str]

    def read_children(self) -> dict[str, np.ndarray]:
        """Return the share of children who say each word, from the file beside that of words."""
        return aoa.read_children(self.words.tasks.children)


def find_sets(data: Path, year_name: str, mode: str) -> Sets:
    """Read all sets of a year; raises UserError where one is not as the challenge has it."""
    require(data.is_dir(), f"--data {data}: is not a folder; it is the pipeline's evaluation_data")
    year = YEARS[year_name]
    full_folder = data if year_name == "2024" else data / "full_eval"
    full = {part: (full_folder / part.folder, part.items) for part in year.sets}
    fast = {}
    for part in year.sets:
        if part.fast:
            fast[part] = (data / "fast_eval" / part.fast, part.fast_items)

    missing = []
    sets = Sets(
        full=open_sets(full, year_name, mode, missing),
        fast=open_sets(fast, year_name, mode, missing),
        words=None,
        pairs=[],
        glue=open_glue(full_folder / "glue_filtered", year_name, missing),
        glue_folder=full_folder / "glue_filtered",
        missing=missing,
    )

    # what the ages need is looked for before hours are spent on them
    folder = full_folder / "aoa"
    if year.words and folder.exists():
        sets.words = open_set(folder, year.word_pairs, year_name, mode)
        sets.pairs = aoa.read_contexts(sets.words.tasks.words)
        if year.scores_age:
            sets.read_children()
            aoa.import_scipy()
    elif year.words:
        missing.append(str(folder))
    return sets
