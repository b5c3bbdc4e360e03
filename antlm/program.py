"""How a program ends: cleaned up, its output readable, in one line if it fails. No torch."""

import os
import signal
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from config import UserError

# what Ctrl-C, a scheduler or `timeout`, and a terminal that is closed send
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def clean_exit(signals: Iterable[int] = STOP_SIGNALS):
    """Run a program's main(), and end the program as its users expect whatever comes up in it.

    UserError and OSError become one line on stderr and exit code 1.
    A signal runs every `finally` on the way out, without a traceback; the code is 128 + signal.
    A reader of the output that goes away early, such as head, ends it silently, as SIGPIPE would.
    Text that the output's encoding lacks is escaped.
    """
    escape_output()
    handlers = {}
    for number in signals:
        # ignored from the start: nohup, or the background of a shell script
        if signal.getsignal(number) != signal.SIG_IGN:
            handlers[number] = signal.signal(number, stop)
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    finally:
        drop_what_cannot_be_printed()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stop(number: int, frame):
    """Handle a signal: leave by way of every `finally`."""
    # `timeout` sends two at once, and people press Ctrl-C twice: that must not cut cleaning short
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def escape_output():
    r"""Print what the output's encoding lacks as an escape, such as \xe9, in place of an error."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")


def drop_what_cannot_be_printed():
    """Flush the output; what nobody takes is dropped, or Python would complain when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
