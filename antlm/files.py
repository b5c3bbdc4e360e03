"""Files of the project's users: JSON, errors that name them, and progress while they are read."""

import json
import os
import sys
import time
from pathlib import Path


def write_json(path: Path, content: dict):
    text = json.dumps(content, ensure_ascii=False, indent=1)
    Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")  # for a path that is not UTF-8


class Progress:
    """A line on stderr with the time left, every few seconds."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.start, self.shown = what, total, time.time(), time.time()

    def __call__(self, done: int):
        now = time.time()
        if now - self.shown > 3 and done:
            left = (now - self.start) * (self.total / done - 1)
            print(f"{self.what}: {done / self.total:.0%}, about {left:.0f} s left", file=sys.stderr, flush=True)
            self.shown = now


def write_whole(path: Path, write):
    """Have write(file) fill a file that is then either whole or as it was before; raises OSError that names it."""
    part = path.with_name(f".{path.name}.part")  # a kill may leave it; train.py removes it at its next start
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name itself reaches the disk
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save hides a full disk behind a RuntimeError
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        if part.exists():
            part.unlink()
