"""antlm/workers.py: work in several processes keeps its order, and ends as a program does.

    python -m pytest tests/test_workers.py    # about 5 s, no GPU

Real processes are killed.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from antlm.workers import start_workers
from config import UserError


def slow_square(number: int) -> int:
    time.sleep(0.02 * (number % 3))  # so that later items are done before earlier ones
    return number * number


def refuse_five(number: int) -> int:
    if number == 5:
        raise UserError("five: is too many")
    return number


def process_number(_) -> int:
    return os.getpid()


def kill_itself(number: int):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_results_keep_the_order_of_the_items(n):
    with start_workers(n) as map_items:
        assert list(map_items(slow_square, range(20))) == [number**2 for number in range(20)]
        assert list(map_items(slow_square, [])) == []


@pytest.mark.parametrize("n", [1, 2])
def test_only_a_few_items_are_read_ahead(n):
    read = []

    def items():
        for number in range(100):
            read.append(number)
            yield number

    with start_workers(n) as map_items:
        results = map_items(slow_square, items())
        for done in range(1, 40):
            next(results)
            assert len(read) <= done + 2 * n


@pytest.mark.parametrize("n", [1, 2])
def test_an_error_comes_up_where_its_item_stands(n):
    results = []
    with pytest.raises(UserError, match="five: is too many"), start_workers(n) as map_items:
        for result in map_items(refuse_five, range(9)):
            results.append(result)
    assert results == [0, 1, 2, 3, 4]


def test_several_processes_work():
    with start_workers(2) as map_items:
        numbers = set(map_items(process_number, range(50)))
    assert os.getpid() not in numbers
    for number in numbers:  # and none is left
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_a_killed_process_is_one_line_and_no_endless_wait():
    with pytest.raises(UserError, match="was killed"), start_workers(2) as map_items:
        list(map_items(kill_itself, range(9)))


PROGRAM = """
import os, sys, time
sys.path.insert(0, "tests")
from antlm.program import clean_exit
from antlm.workers import start_workers
from test_workers import process_number
if __name__ == "__main__":
    with clean_exit(), start_workers(2) as map_items:
        print(*set(map_items(process_number, range(50))), flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("to_all", [False, True])
def test_processes_end_with_the_one_that_started_them(number, to_all):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout.readline().split()  # the numbers of the processes that are at work
    # Ctrl-C in a terminal and the end of a job reach all processes, `kill` only the first
    if to_all:
        os.killpg(program.pid, number)
    else:
        program.send_signal(number)
    # its output ends when the last process that could write to it is gone
    _, errors = program.communicate(timeout=60)
    assert errors == ""
    code = -number if number == signal.SIGKILL else 128 + number
    assert program.returncode == code
