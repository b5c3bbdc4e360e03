"""Settings from override files and flags, left to right, both strict.

    load(Settings, ["config/babyllama.py", "--schedule=24_CLM", "--resume"])

A file is plain Python, run in a namespace of its own; each public name in it must be a setting of the dataclass.
"""

import difflib
import re
import runpy
import types
from dataclasses import fields


class ConfigError(Exception):
    """One line for the user: which file or flag, which setting and value, what was expected."""


def load(cls: type, args: list[str]):
    """Settings of dataclass cls after all files and flags; raises ConfigError.

    cls.check(), if there is one, raises ValueError for a combination that cannot be, naming the settings in it: the
    error then says which file or flag set one of them last.
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
        if hasattr(settings, "check"):
            settings.check()
    except ValueError as e:
        words = set(re.findall(r"\w+", str(e)))
        named = [where for name, where in origin.items() if name in words]
        raise ConfigError(f"{named[-1] if named else 'settings'}: {e}") from None
    return settings


def setting(cls: type, name: str, where: str):
    known = {f.name: f.type for f in fields(cls)}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(f"{where}: {name!r} is not a setting" + (f"; did you mean {close[0]!r}?" if close else
                                                                   "; train.py lists them at its top"))
    return known[name]


def from_file(cls: type, path: str) -> dict:
    try:
        namespace = runpy.run_path(path)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror}); name an override file such as config/quickstart.py, "
                          "or a flag such as --lr=1e-3") from None
    except SyntaxError as e:
        raise ConfigError(f"{path}:{e.lineno or 1}: not valid Python ({e.msg})") from None
    except (Exception, SystemExit) as e:  # whatever the user's own file raises
        raise ConfigError(f"{path}: failed with {type(e).__name__}: {' '.join(str(e).split())}") from None
    found = {k: v for k, v in namespace.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}
    for name, value in found.items():
        kind = setting(cls, name, path)
        if kind is float and type(value) is int:
            found[name] = float(value)
        elif type(value) is not kind:
            shown = " ".join(repr(value).split())  # an array's spans lines
            raise ConfigError(f"{path}: {name}={shown} must be of type {kind.__name__}, not {type(value).__name__}")
    return found


def from_flag(cls: type, arg: str) -> dict:
    name, given, text = arg[2:].partition("=")
    kind = setting(cls, name, arg)
    if kind is bool:
        if text not in ("", "true", "false") or bool(given) != bool(text):
            raise ConfigError(f"{arg}: write --{name}, --{name}=true or --{name}=false")
        return {name: text != "false"}
    if not given:
        raise ConfigError(f"{arg}: write --{name}=VALUE, with VALUE of type {kind.__name__}")
    try:
        return {name: tuple(filter(None, text.split(","))) if kind is tuple else kind(text)}
    except ValueError:
        raise ConfigError(f"{arg}: {text!r} is not of type {kind.__name__}") from None
