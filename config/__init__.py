"""Settings from override files and flags, left to right, both strict.

    load(Settings, ["config/babyllama.py", "--schedule=24_CLM", "--resume"])

A file is plain Python, run in a namespace of its own; each public name in it must be a setting of the dataclass.
"""

import difflib
import inspect
import re
import runpy
import types
from dataclasses import fields
from pathlib import Path

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, bytes that are no UTF-8


class UserError(Exception):
    """One line for the user: which file or flag, which setting and value, what was expected."""

    def __str__(self):  # one line, also where a flag or a file's name holds a newline
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


def load(cls: type, args: list[str]):
    """Settings of dataclass cls after all files and flags; raises UserError.

    cls.check() raises ValueError for a combination that cannot be, naming the settings in it: the error then says which
    file or flag set one of them last.
    """
    values, origin = {}, {}
    for arg in args:
        found = from_flag(cls, arg) if arg.startswith("--") else from_file(cls, arg)
        for name in found:
            values[name] = found[name]
            origin.pop(name, None)  # to the end of the order
            origin[name] = arg.partition("=")[0] if arg.startswith("--") else arg
    settings = cls(**values)
    try:
        settings.check()
    except ValueError as e:
        words = set(re.findall(r"\w+", str(e)))
        named = [where for name, where in origin.items() if name in words]
        raise UserError(f"{named[-1] if named else 'settings'}: {e}") from None
    return settings


def setting(cls: type, name: str, where: str):
    known = {f.name: f.type for f in fields(cls)}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"{Path(inspect.getfile(cls)).name} lists them at its top"
        raise UserError(f"{where}: {name!r} is not a setting; {hint}")
    return known[name]


def from_file(cls: type, path: str) -> dict:
    try:
        found = {k: v for k, v in runpy.run_path(path).items()
                 if not k.startswith("_") and not isinstance(v, types.ModuleType)}
        shown = {k: " ".join(repr(v).split())[:200] for k, v in found.items()}  # an array's spans lines
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); name an override file such as config/quickstart.py, "
                          "or a flag such as --lr=1e-3") from None
    except SyntaxError as e:
        raise UserError(f"{path}:{e.lineno or 1}: not valid Python ({e.msg})") from None
    except (Exception, SystemExit) as e:  # whatever the user's own file raises
        raise UserError(f"{path}: failed with {type(e).__name__}: {' '.join(str(e).split())[:200]}") from None
    for name, value in found.items():
        kind = setting(cls, name, path)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{path}: {name}={shown[name]} must be of type {kind.__name__}, "
                              f"not {type(value).__name__}")
        found[name] = checked(kind, value, f"{path}: {name}")
    return found


def checked(kind: type, value, where: str):
    """The value, a whole number for a float made one; raises UserError at what no later step could hold."""
    if type(value) is int and abs(value) >= 1 << 63:
        raise UserError(f"{where}: must fit 64 bits")
    for text in {str: (value,), tuple: value}.get(kind, ()):
        if not isinstance(text, str) or UNPRINTABLE.search(text):
            raise UserError(f"{where}: must be quoted text without control characters, not {ascii(text)[:200]}")
    return kind(value)


def from_flag(cls: type, arg: str) -> dict:
    name, given, text = arg[2:].partition("=")
    kind = setting(cls, name, arg)
    if kind is bool:
        if text not in ("", "true", "false") or bool(given) != bool(text):
            raise UserError(f"{arg}: write --{name}, --{name}=true or --{name}=false")
        return {name: text != "false"}
    if not given:
        raise UserError(f"{arg}: write --{name}=VALUE, with VALUE of type {kind.__name__}")
    try:
        value = tuple(filter(None, text.split(","))) if kind is tuple else kind(text)
        return {name: checked(kind, value, arg[:200])}
    except ValueError:
        raise UserError(f"{arg}: {text!r} is not of type {kind.__name__}") from None
