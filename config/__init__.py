"""Settings from override files and flags, left to right, both strict.

    load(Settings, ["config/babyllama.py", "--schedule=24_CLM", "--lr", "1e-3", "--resume"])

An override file is plain Python, run in a namespace of its own; each public name in it must be a
setting of the dataclass. This file also holds the one class of errors that are meant for people.
"""

import difflib
import inspect
import re
import runpy
import sys
from dataclasses import fields
from types import ModuleType


class UserError(Exception):
    """A mistake of the user's, said in one line: where it is, what was expected, what to do."""


def require(ok: bool, message: str):
    """Raise UserError with this message unless ok."""
    if not ok:
        raise UserError(message)


def load(cls: type, args: list[str]):
    """Return the settings of dataclass `cls` after all override files and flags.

    Calls cls.check(), which raises UserError for values that cannot be; the file or flag that set
    one of the settings named in its message last is put in front of it.
    Prints the settings and ends the program where --help is among the arguments.
    """
    if "--help" in args or "-h" in args:
        print(help_text(cls))
        sys.exit()

    # the last one that sets a name counts
    values = {}
    origin = {}  # name of a setting: the file or flag that set it, in the order they were given
    for source, changes in read_arguments(cls, args):
        for name, value in changes.items():
            values[name] = value
            origin.pop(name, None)
            origin[name] = source

    # check them together; name the file or flag that is to blame
    settings = cls(**values)
    try:
        settings.check()
    except UserError as error:
        words = re.findall(r"\w+", str(error))
        sources = [source for name, source in origin.items() if name in words]
        source = sources[-1] if sources else "settings"
        raise UserError(f"{source}: {error}") from None
    return settings


def read_arguments(cls: type, args: list[str]):
    """Yield what each argument sets: the file or flag, and its settings as a dict."""
    remaining = list(args)
    while remaining:
        arg = remaining.pop(0)
        if not arg.startswith("--"):
            yield arg, read_file(cls, arg)
            continue
        name, equals, text = arg[2:].partition("=")
        kind = setting_type(cls, name, arg)
        if not equals:
            if kind is bool and remaining[:1] not in (["true"], ["false"]):
                text = "true"  # --resume alone
            else:
                follows = len(remaining) > 0 and not remaining[0].startswith("--")
                require(follows, f"{arg}: a value of type {kind.__name__} must follow")
                text = remaining.pop(0)
        yield f"--{name}", {name: read_value(kind, text, f"--{name}")}


def read_file(cls: type, path: str) -> dict:
    """Run an override file and return its public names; raises UserError that names the file."""
    try:
        namespace = runpy.run_path(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name an override file such as "
            "config/quickstart.py, or a flag such as --lr=1e-3"
        ) from None
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: not valid Python ({error.msg})") from None
    except Exception as error:  # whatever the user's own file raises
        raise UserError(f"{path}: failed with {type(error).__name__}: {error}") from None

    values = {}
    for name, value in namespace.items():
        if name.startswith("_") or isinstance(value, ModuleType):
            continue
        kind = setting_type(cls, name, path)
        if kind is float and type(value) is int:
            value = float(value)
        require(
            type(value) is kind,
            f"{path}: {name} = {value!r} must be of type {kind.__name__}, "
            f"not {type(value).__name__}",
        )
        values[name] = value
    return values


def read_value(kind: type, text: str, flag: str):
    """Return the value that a flag's text stands for; raises UserError that names the flag."""
    if kind is bool:
        require(text in ("true", "false"), f"{flag}={text}: must be true or false")
        return text == "true"
    if kind is tuple:
        return tuple(part for part in text.split(",") if part)
    require(kind is not dict, f"{flag}: can only be set in an override file")
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{flag}={text}: must be of type {kind.__name__}") from None


def setting_type(cls: type, name: str, source: str) -> type:
    """Return the type of a setting; raises UserError with the nearest name if there is none."""
    known = {field.name: field.type for field in fields(cls)}
    if name not in known:
        hint = "--help lists them"
        for close in difflib.get_close_matches(name, known, n=1):
            hint = f"did you mean {close!r}?"
        raise UserError(f"{source}: {name!r} is not a setting; {hint}")
    return known[name]


def help_text(cls: type) -> str:
    """The docstring of the program, then every setting with its default and its comment."""
    defaults = cls()
    lines = [inspect.getmodule(cls).__doc__ or "", "settings, each as --name=value or in a file:"]
    for line in inspect.getsource(cls).splitlines():
        setting = re.match(r"    (\w+): \w+ = .+?(?:  # (.*))?$", line)
        heading = re.match(r"    # (.*)", line)
        if heading:
            lines.append(f"\n{heading[1]}")
        if setting:
            name, comment = setting.groups(default="")
            default = flag_text(getattr(defaults, name))
            lines.append(f"  --{name}={default}".ljust(36) + f" {comment}".rstrip())
    return "\n".join(lines)


def flag_text(value) -> str:
    """A value as one would type it after a flag."""
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
