"""The program's own files: complete or untouched. And progress."""

import json
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, write):
    """Write a file so that it is afterwards either complete or as it was before.

    write: a function that fills the open binary file that it is given
    Raises OSError that names the path, for instance when the disk is full.
    """
    path = Path(path)
    # a kill may leave this file behind; train.py removes it at its next start
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error
        if isinstance(error, RuntimeError):
            # torch.save raises a RuntimeError while it handles the OSError of a full disk
            cause = error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path):
    """Bring the names in a folder to the disk, since a rename alone may not survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: Path, content: dict):
    """Write plain data as indented JSON in UTF-8; raises OSError that names the path."""
    text = json.dumps(content, ensure_ascii=False, indent=1)
    # bytes of a file's name that are not UTF-8 become escapes, which JSON reads back
    raw = text.encode(errors="backslashreplace")
    write_whole(path, lambda file: file.write(raw))


def unfinished_folder(folder: Path) -> Path:
    """Return the hidden folder beside a folder in which this process makes it.

    Those that killed processes have left behind are removed.
    """
    pattern = rf"\.{re.escape(folder.name)}\.(\d{{1,9}})\.unfinished"
    for leftover in folder.parent.glob(".*.unfinished"):
        match = re.fullmatch(pattern, leftover.name)
        if match and not is_running(int(match[1])):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")


@contextmanager
def new_folder(path: Path):
    """Yield the path of a hidden folder beside `path`, to be made there and renamed at the end.

    So the folder appears complete or not at all. Raises OSError if it has come up meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_folder(path)
    try:
        yield unfinished
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_running(process: int) -> bool:
    """Return whether another process has this number."""
    if process == os.getpid():
        return False  # in a container a program gets the same number at each start
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it is another user's
    return True


# --------------------------------------------------------------------------------------- progress


class Progress:
    """Say on stderr every few seconds how far some work is and how long the rest will take.

    total: the amount of work, in the unit in which the calls report what is done
    """

    def __init__(self, label: str, total: int):
        self.label = label
        self.total = total
        self.started = time.time()
        self.printed = self.started

    def __call__(self, done: int):
        now = time.time()
        if done == 0 or now - self.printed < 3:
            return
        share = done / self.total
        seconds_left = (now - self.started) * (1 / share - 1)
        print(
            f"{self.label}: {share:.0%}, about {seconds_left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
        self.printed = now
