"""The zero-shot tasks of the BabyLM challenge: their files, read as choices between texts.

The kind of a file of JSON lines is told by the fields of its first line. Another kind of choice is
a function and a Kind; protocols.py says which kinds a year of the challenge has. Two more tasks
have files of their own names: reading_data.csv (reading.py) and cdi_childes.json (aoa.py).
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from antlm.texts import START_BYTES, find_files, refuse_other_kinds
from config import UserError, require


class Choice(NamedTuple):
    """One choice between texts, as a function of a kind makes it of a line.

    group: which subsets belong together, or ""
    subset: whose score the choice counts in
    options: each a whole text and the character where its target starts
    right: index of the right option
    id: the line's own name, or ""
    ratio: share of people who prefer the first option, for tasks that compare with people
    """

    group: str
    subset: str
    options: list[tuple[str, int]]
    right: int = 0
    id: str = ""
    ratio: float | None = None


@dataclass
class Item:
    """A choice, and where it comes from."""

    source: str  # file:line
    task: str
    kind: "Kind"
    choice: Choice


# ------------------------------------------------------------------------------- the kinds of tasks

# Each function makes a choice of a line and the name of its file; None leaves the line out.


def blimp(record: dict, file: str) -> Choice:
    """BLiMP and its supplement: the better one of two sentences."""
    options = [(record["sentence_good"], 0), (record["sentence_bad"], 0)]
    return Choice(record.get("linguistics_term") or "", file, options)


def ewok_targets(record: dict, file: str) -> Choice:
    """EWoK until 2025: the better continuation of Context1. Another line has Context2."""
    context = record["Context1"]
    options = []
    for target in (record["Target1"], record["Target2"]):
        options.append((f"{context} {target}", len(context)))
    return Choice("", record["Domain"], options)


def ewok_contexts(record: dict, file: str) -> Choice:
    """EWoK from 2026 on: the context after which Target1 is likelier. Another line has Target2."""
    options = []
    for context in (record["Context1"], record["Context2"]):
        options.append((f"{context} {record['Target1']}", len(context)))
    return Choice("", record["Domain"], options)


def entity_tracking(record: dict, file: str) -> Choice:
    """Entity tracking: the right one of several ends; the prefix brings the space before them."""
    prefix = record["input_prefix"]
    options = [(prefix + option, len(prefix)) for option in record["options"]]
    return Choice(file, f"{file}_{record['numops']}_ops", options)


def entity_tracking_without_nothing(record: dict, file: str) -> Choice | None:
    """Entity tracking from 2026 on: without lines in which an option says "nothing"."""
    if any("nothing" in option for option in record["options"]):
        return None
    return entity_tracking(record, file)


def comps(record: dict, file: str) -> Choice:
    """COMPS: the concept that fits a property; only the property is scored."""
    options = []
    for prefix in (record["prefix_acceptable"], record["prefix_unacceptable"]):
        options.append((f"{prefix} {record['property_phrase']}", len(prefix) + 1))
    return Choice("", file, options)


def solution_fields(record: dict) -> list[str]:
    """Return solution0, solution1 and so on, as many as a line has."""
    fields = []
    while f"solution{len(fields)}" in record:
        fields.append(f"solution{len(fields)}")
    return fields


def global_piqa(record: dict, file: str) -> Choice:
    """GlobalPIQA: the solution that works; four of them in the parallel set, two in the other."""
    prompt = record["prompt"]
    options = []
    for field in solution_fields(record):
        options.append((f"{prompt} {record[field]}", len(prompt)))
    subset = "global_piqa_parallel" if len(options) == 4 else "global_piqa_nonparallel"
    return Choice("", subset, options, right=record["label"], id=record["example_id"])


def wug(record: dict, file: str) -> Choice:
    """Wug tests of 2025: of two forms of an invented word, how much people prefer the first."""
    options = [(sentence, 0) for sentence in record["sentences"].split("\t")]
    return Choice("", file, options, ratio=record["ratio"])


class Kind(NamedTuple):
    """How a task is read and counted.

    name: of the kind
    convert: makes a choice of a line
    fields: of every line; a file is of this kind if its first line has the first of them
    per_token: whether options are compared by the mean over their tokens, in place of the sum
    """

    name: str
    convert: Callable[[dict, str], Choice | None]
    fields: tuple[str, ...]
    per_token: bool = False


BLIMP = Kind("blimp", blimp, ("sentence_good", "sentence_bad"))
EWOK_FIELDS = ("Target1", "Target2", "Context1", "Context2", "Domain")
EWOK_TARGETS = Kind("ewok", ewok_targets, EWOK_FIELDS)
EWOK_CONTEXTS = Kind("ewok", ewok_contexts, EWOK_FIELDS)
ENTITY_FIELDS = ("input_prefix", "options", "numops")
ENTITY_TRACKING = Kind("entity_tracking", entity_tracking, ENTITY_FIELDS)
ENTITY_TRACKING_2026 = Kind("entity_tracking", entity_tracking_without_nothing, ENTITY_FIELDS)
COMPS = Kind("comps", comps, ("prefix_acceptable", "prefix_unacceptable", "property_phrase"))
GLOBAL_PIQA = Kind(
    "global_piqa",
    global_piqa,
    ("solution0", "solution1", "prompt", "label", "example_id"),
    per_token=True,
)
WUG = Kind("wug", wug, ("sentences", "ratio"))
ALL_KINDS = (BLIMP, EWOK_TARGETS, ENTITY_TRACKING, COMPS, GLOBAL_PIQA, WUG)


def is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_share(value) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def check_line(record: dict, kind: Kind, source: str):
    """Raise UserError unless the fields of a line hold what its kind needs."""
    fields = list(kind.fields)
    if kind is GLOBAL_PIQA:
        fields += solution_fields(record)[2:]
    for field in fields:
        check_field(record, field, source)


def check_field(record: dict, field: str, source: str):
    """Raise UserError unless the field of a line holds what that field needs."""
    require(field in record, f"{source}: the field {field!r} is missing")
    value = record[field]
    if field == "options":
        ok = isinstance(value, list) and len(value) > 1 and all(map(is_text, value))
        expected = "two or more texts"
    elif field == "numops":
        ok = type(value) is int
        expected = "a whole number"
    elif field == "label":
        ok = type(value) is int and 0 <= value < len(solution_fields(record))
        expected = "the number of one of the solutions"
    elif field == "ratio":
        ok = is_share(value)
        expected = "a number from 0 to 1"
    elif field == "sentences":
        ok = isinstance(value, str) and value.count("\t") == 1
        ok = ok and all(map(is_text, value.split("\t")))
        expected = "two texts with a tab between them"
    else:
        ok = is_text(value)
        expected = "text"
    require(ok, f"{source}: the field {field!r} must be {expected}, not {str(value)[:60]!r}")


# ------------------------------------------------------------------------------------ reading files


def json_lines(path: Path, limit: int = 0) -> Iterator[tuple[str, dict]]:
    """Yield file:line and the JSON object of the first `limit` lines that are not blank, 0: of all.

    Raises UserError for an empty file, for one that is no text and for a line that is no JSON
    object.
    """
    raw = path.read_bytes()
    refuse_other_kinds(path, raw[:START_BYTES])
    n = 0
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{source}: not JSON in UTF-8 ({error})") from None
        require(isinstance(record, dict), f"{source}: a JSON object was expected")
        yield source, record
        n += 1
        if n == limit:
            return
    require(n > 0, f"{path}: is empty; one JSON object a line was expected")


def find_kind(path: Path, record: dict, kinds: tuple[Kind, ...]) -> Kind | None:
    """Return the kind of a file that begins with this line, or None.

    Raises UserError for one that only other years have.
    """
    for kind in kinds:
        if kind.fields[0] in record:
            return kind
    for kind in ALL_KINDS:
        if kind.fields[0] in record:
            raise UserError(
                f"{path}: holds {kind.name}, which this year of the challenge does not have; "
                "choose another year's protocol, or leave the file out"
            )
    return None


def read_file(path: Path, task: str, kinds: tuple[Kind, ...], limit: int = 0) -> list[Item]:
    """Read the first `limit` items of a file, 0: all; none if it is of no known kind.

    Raises UserError that names the line and its fault.
    """
    kind = None
    items = []
    for source, record in json_lines(path):
        # the first line tells the kind
        if kind is None:
            kind = find_kind(path, record, kinds)
        if kind is None:
            return []
        # check each line before its fields are used
        check_line(record, kind, source)
        choice = kind.convert(record, path.stem)
        if choice is not None:
            items.append(Item(source, task, kind, choice))
        if limit > 0 and len(items) == limit:
            break
    require(items, f"{path}: this year of the challenge leaves out every line of it")
    return items


@dataclass
class Tasks:
    """What is to be scored.

    folder: the first path that was named
    items: choices between texts, of all tasks
    reading: reading_data.csv; words: cdi_childes.json; None where they are not asked for
    """

    folder: Path
    items: list[Item]
    reading: Path | None = None
    words: Path | None = None

    @property
    def children(self) -> Path:
        """The file of children's shares, which lies beside that of the words."""
        return self.words.with_name(CHILDREN)


READING = "reading_data.csv"
WORDS = "cdi_childes.json"
CHILDREN = "cdi_human.csv"  # read beside WORDS


def task_name(file: Path, root: Path) -> str:
    """Name a task after the folder of its files, or after a file that was named itself."""
    if root.is_dir() and file.parent != root:
        return file.parent.relative_to(root).as_posix()
    return root.resolve().name.removesuffix(".jsonl")


def read_tasks(paths: list[str], kinds: tuple[Kind, ...], limit: int = 0) -> Tasks:
    """Read tasks from files that are named and from all such files in the folders named.

    kinds: those that the protocol has
    limit: items of each file, 0: all
    Each folder that holds .jsonl files is a task of its own, and each kind in it. Files of no known
    kind are skipped with a message. Raises UserError where there is nothing to score, for a file of
    a kind that only other years have, and for two tasks of one name.
    """
    tasks = Tasks(Path(paths[0]), [])
    skipped = []
    for root in map(Path, paths):
        items = []
        for file in find_files(root, (".jsonl", READING, WORDS, CHILDREN)):
            if file.name == READING:
                tasks.reading = one_of(tasks.reading, file)
            elif file.name == WORDS:
                tasks.words = one_of(tasks.words, file)
            elif file.name != CHILDREN:
                items_of_file = read_file(file, task_name(file, root), kinds, limit)
                items += items_of_file
                if not items_of_file:
                    skipped.append(file)

        names = {item.task for item in tasks.items} & {item.task for item in items}
        require(not names, f"{root}: a path named before it has the task {', '.join(names)}, too")
        tasks.items += items
    split_mixtures(tasks.items)

    if not tasks.items and not tasks.reading and not tasks.words:
        fields = ", ".join(kind.fields[0] for kind in kinds)
        raise UserError(
            f"{', '.join(map(str, paths))}: holds no task: no {READING}, no {WORDS} and no .jsonl "
            f"file with a task's field ({fields})"
        )
    if skipped:
        print(
            f"skipped {len(skipped)} .jsonl file(s) of no known task, first {skipped[0]}",
            file=sys.stderr,
        )
    return tasks


def one_of(path: Path | None, other: Path) -> Path:
    """Return one of two files that hold the same, as those of full_eval and fast_eval do.

    Raises UserError if they differ.
    """
    if path is None:
        return other
    is_copy = path.read_bytes() == other.read_bytes()
    require(is_copy, f"{path} and {other} differ; score them one after the other")
    return path


def split_mixtures(items: list[Item]):
    """Make a task of each kind where a folder holds several: their average would mean nothing."""
    kinds_of = {}
    for item in items:
        kinds_of.setdefault(item.task, set()).add(item.kind.name)
    for item in items:
        if len(kinds_of[item.task]) > 1:
            item.task += f"/{item.kind.name}"


def fingerprint(items: list[Item]) -> str:
    """Return the SHA-256 of all options, by which a result tells which texts it compared."""
    return hashlib.sha256(repr([item.choice.options for item in items]).encode()).hexdigest()
