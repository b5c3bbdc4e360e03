"""Task files of the BabyLM challenge -> items: one choice between texts each."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from config import UserError


@dataclass
class Item:
    """One choice. An option is a whole text and the character where its target starts; the first is right."""

    where: str  # file:line
    task: str
    kind: str  # blimp, ewok, entity_tracking or comps
    group: str  # what the subset belongs to, or nothing
    subset: str  # the accuracy that the item counts in
    options: list[tuple[str, int]]


def blimp(r: dict, file: str):
    term = r.get("linguistics_term")
    return term if is_text(term) else "", file, [(r["sentence_good"], 0), (r["sentence_bad"], 0)]


def ewok(r: dict, file: str):  # Context2 is not used: it is Context1 of another line
    context = r["Context1"]
    return "", r["Domain"], [(f"{context} {r[target]}", len(context)) for target in ("Target1", "Target2")]


def entity_tracking(r: dict, file: str):
    prefix = r["input_prefix"]
    return file, f"{file}_{r['numops']}_ops", [(prefix + option, len(prefix)) for option in r["options"]]


def comps(r: dict, file: str):
    prefixes = r["prefix_acceptable"], r["prefix_unacceptable"]
    return "", file, [(f"{prefix} {r['property_phrase']}", len(prefix) + 1) for prefix in prefixes]


KINDS = {  # what a line must have; the first field tells the kind of a file by its first line
    blimp: ("sentence_good", "sentence_bad"),
    ewok: ("Target1", "Target2", "Context1", "Context2", "Domain"),
    entity_tracking: ("input_prefix", "options", "numops"),
    comps: ("prefix_acceptable", "prefix_unacceptable", "property_phrase"),
}


def is_text(x) -> bool:
    return isinstance(x, str) and bool(x.strip()) and not any("\ud800" <= c <= "\udfff" for c in x)  # lone surrogates


EXPECTED = {"options": ("two or more texts", lambda x: isinstance(x, list) and len(x) > 1 and all(map(is_text, x))),
            "numops": ("a whole number", lambda x: type(x) is int)}


def json_lines(path: Path, limit: int = 0) -> list[tuple[str, dict]]:
    """file:line and object of the first `limit` lines that are not blank (0: all); raises UserError."""
    lines = [(f"{path}:{n}", line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: is empty; one JSON object a line was expected")
    records = []
    for where, line in lines[:limit or None]:
        try:
            records.append((where, json.loads(line)))
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: not JSON in UTF-8 ({e})") from None
        if not isinstance(records[-1][1], dict):
            raise UserError(f"{where}: a JSON object was expected, not {type(records[-1][1]).__name__}")
    return records


def read_file(path: Path, task: str, limit: int, protocol: str) -> list[Item]:
    """The first `limit` items of a file (0: all), none if its first line is of no known kind; raises UserError."""
    items, kind = [], None
    for where, record in json_lines(path, limit):
        kind = kind or next((kind for kind in KINDS if KINDS[kind][0] in record), None)
        if kind is None:
            return []
        if protocol == "2024" and kind not in (blimp, ewok):
            raise UserError(f"{path}: the 2024 pipeline had no {kind.__name__}; use --protocol 2025")
        for name in KINDS[kind]:
            expected, good = EXPECTED.get(name, ("text", is_text))
            if not good(record.get(name)):
                x = record.get(name)  # which may be nested too deeply to print
                found = "missing" if name not in record else "nested" if isinstance(x, (list, dict)) else ascii(x)[:60]
                raise UserError(f"{where}: field {name!r} must be {expected}, it is {found}")
        items.append(Item(where, task, kind.__name__, *kind(record, path.stem)))
    return items


def read_tasks(path: str, limit: int = 0, protocol: str = "2025") -> list[Item]:
    """Items of a file or folder; each folder in it that holds .jsonl files is a task. Raises UserError."""
    root, items, unknown = Path(path), [], []
    if not root.exists():
        raise UserError(f"{root}: does not exist; name a .jsonl file or a folder of them")
    for file in sorted(root.rglob("*.jsonl")) if root.is_dir() else [root]:
        if not is_text(str(file)) or "\n" in str(file):
            raise UserError(f"{ascii(str(file))}: the results could not name it; rename it to UTF-8 text of one line")
        inside = root.is_dir() and file.parent != root
        task = file.parent.relative_to(root).as_posix() if inside else root.resolve().name.removesuffix(".jsonl")
        found = read_file(file, task, limit, protocol)
        items += found
        unknown += [] if found else [str(file)]
    if not items:
        known = ", ".join(fields[0] for fields in KINDS.values())
        raise UserError(f"{root}: {len(unknown)} .jsonl file(s) in it, none has a task's field ({known})")
    if unknown:
        print(f"skipped, of no known task: {', '.join(unknown)}", file=sys.stderr)
    return items


def fingerprint(items: list[Item]) -> str:
    """SHA-256 of the texts that were compared, so that a submission is built from the same."""
    return hashlib.sha256(repr([item.options for item in items]).encode()).hexdigest()
