"""The zero-shot tasks of the BabyLM challenge: files of JSON lines, read as choices between texts.

The kind of a file is told by the fields of its first line. Another kind of choice is a function
and a row of KINDS.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from antlm.texts import START_BYTES, find_files, refuse_other_kinds
from config import UserError, require


@dataclass
class Item:
    """One choice between texts.

    options: the whole text and the character where its target starts; the first one is right
    """

    source: str  # file:line
    task: str
    kind: str  # a key of KINDS
    group: str  # which subsets belong together, or ""
    subset: str  # whose accuracy the item counts in
    options: list[tuple[str, int]]


# ------------------------------------------------------------------------------- the kinds of tasks

# Each function makes of a line and the name of its file: group, subset and options of the item.


def blimp(record: dict, file: str):
    """BLiMP and its supplement: the better one of two sentences."""
    options = [(record["sentence_good"], 0), (record["sentence_bad"], 0)]
    return record.get("linguistics_term") or "", file, options


def ewok(record: dict, file: str):
    """EWoK: the better continuation. Context2 is the Context1 of another line and is not used."""
    context = record["Context1"]
    options = []
    for target in (record["Target1"], record["Target2"]):
        options.append((f"{context} {target}", len(context)))
    return "", record["Domain"], options


def entity_tracking(record: dict, file: str):
    """Entity tracking: the right one of several ends; the prefix brings the space before them."""
    prefix = record["input_prefix"]
    options = [(prefix + option, len(prefix)) for option in record["options"]]
    return file, f"{file}_{record['numops']}_ops", options


def comps(record: dict, file: str):
    """COMPS: the concept that fits a property; only the property is scored."""
    options = []
    for prefix in (record["prefix_acceptable"], record["prefix_unacceptable"]):
        options.append((f"{prefix} {record['property_phrase']}", len(prefix) + 1))
    return "", file, options


class Kind(NamedTuple):
    convert: Callable
    fields: tuple[str, ...]  # of every line; a file is of this kind if its first line has the first


KINDS = {
    "blimp": Kind(blimp, ("sentence_good", "sentence_bad")),
    "ewok": Kind(ewok, ("Target1", "Target2", "Context1", "Context2", "Domain")),
    "entity_tracking": Kind(entity_tracking, ("input_prefix", "options", "numops")),
    "comps": Kind(comps, ("prefix_acceptable", "prefix_unacceptable", "property_phrase")),
}
KINDS_OF_2024 = ("blimp", "ewok")


def is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def check_field(record: dict, field: str, source: str):
    """Raise UserError unless the field of a line holds what its kind needs."""
    require(field in record, f"{source}: the field {field!r} is missing")
    value = record[field]
    if field == "options":
        ok = isinstance(value, list) and len(value) > 1 and all(map(is_text, value))
        expected = "two or more texts"
    elif field == "numops":
        ok = type(value) is int
        expected = "a whole number"
    else:
        ok = is_text(value)
        expected = "text"
    require(ok, f"{source}: the field {field!r} must be {expected}, not {str(value)[:60]!r}")


# ------------------------------------------------------------------------------------ reading files


def json_lines(path: Path, limit: int = 0) -> list[tuple[str, dict]]:
    """Read the first `limit` lines of a file that are not blank, 0: all.

    Returns file:line and the JSON object of each. Raises UserError for an empty file, for one that
    is no text and for a line that is no JSON object.
    """
    raw = path.read_bytes()
    refuse_other_kinds(path, raw[:START_BYTES])
    records = []
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{source}: not JSON in UTF-8 ({error})") from None
        require(isinstance(record, dict), f"{source}: a JSON object was expected")
        records.append((source, record))
        if len(records) == limit:
            break
    require(records, f"{path}: is empty; one JSON object a line was expected")
    return records


def find_kind(record: dict) -> str | None:
    for name, kind in KINDS.items():
        if kind.fields[0] in record:
            return name
    return None


def read_file(path: Path, task: str, limit: int, protocol: str) -> list[Item]:
    """Read the first `limit` items of a file, 0: all; none if it is of no known kind.

    Raises UserError that names the line and its fault.
    """
    records = json_lines(path, limit)
    # the first line tells the kind
    kind = find_kind(records[0][1])
    if kind is None:
        return []
    if protocol == "2024" and kind not in KINDS_OF_2024:
        raise UserError(f"{path}: the pipeline of 2024 had no {kind}; use --protocol 2025")

    # check each line before its fields are used
    items = []
    for source, record in records:
        for field in KINDS[kind].fields:
            check_field(record, field, source)
        group, subset, options = KINDS[kind].convert(record, path.stem)
        items.append(Item(source, task, kind, group, subset, options))
    return items


def read_tasks(path: str | Path, limit: int = 0, protocol: str = "2025") -> list[Item]:
    """Read the items of a .jsonl file, or of all such files in a folder.

    Each folder in it that holds .jsonl files is a task of its own. Files of no known kind are
    skipped with a message. Raises UserError where no item is found.
    """
    root = Path(path)
    files = find_files(root, (".jsonl",))

    # their items; a file in the folder itself belongs to a task of the folder's name
    items = []
    skipped = []
    for file in files:
        if root.is_dir() and file.parent != root:
            task = file.parent.relative_to(root).as_posix()
        else:
            task = root.resolve().name.removesuffix(".jsonl")
        items_of_file = read_file(file, task, limit, protocol)
        items += items_of_file
        if not items_of_file:
            skipped.append(str(file))

    if not items:
        fields = ", ".join(kind.fields[0] for kind in KINDS.values())
        raise UserError(
            f"{root}: {len(files)} .jsonl file(s) in it, none has a task's field ({fields})"
        )
    if skipped:
        print(f"skipped, of no known task: {', '.join(skipped)}", file=sys.stderr)
    return items


def fingerprint(items: list[Item]) -> str:
    """Return the SHA-256 of all options, by which a result tells which texts it compared."""
    return hashlib.sha256(repr([item.options for item in items]).encode()).hexdigest()
