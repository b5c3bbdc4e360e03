"""Work spread over processes, its results in the order of the items. No torch."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial

from config import UserError


@contextmanager
def start_workers(n: int):
    """Yield a function to use as map, whose calls are made in n processes.

    Results keep the order of the items, of which only a few are read ahead; so a text of any
    length fits. With one process it is map itself.
    """
    if n == 1:
        yield map
        return
    pool = ProcessPoolExecutor(n, initializer=prepare_worker)
    try:
        yield partial(map_in_order, pool, 2 * n)
    finally:
        pool.shutdown(cancel_futures=True)


def map_in_order(pool: ProcessPoolExecutor, ahead: int, work, items):
    """Yield work(item) for each item, with so many items ahead at work or waiting.

    pool.map would read all of them first.
    Raises UserError if a process was killed.
    """
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "one of this program's processes was killed; if memory ran out, try --processes 1"
        ) from None


def prepare_worker():
    """Make this process end with the one that started it, and not before."""
    # Ctrl-C in a terminal reaches all processes; the first ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    # a parent that was killed tells nobody: without this the process would wait for work for ever
    multiprocessing.parent_process().join()
    os._exit(1)
