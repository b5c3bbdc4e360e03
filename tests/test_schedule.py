"""schedule.py: the language, and what a step number says. Alone: python -m pytest tests/test_schedule.py"""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from schedule import OBJECTIVES, Phase, Schedule, parse

ROOT = Path(__file__).parent.parent


def schedule(text: str = "4_CLM+16_MLM+4_CLM", steps_per_epoch: int = 7, **settings) -> Schedule:
    return Schedule(parse(text), steps_per_epoch, **{"lr": 1.0} | settings)


# ----------------------------------------------------------------------------------------------- the language


@pytest.mark.parametrize("text, phases", [
    ("24_CLM", [(24, [("CLM", 1)])]),
    ("4_CLM+16_MLM+4_CLM", [(4, [("CLM", 1)]), (16, [("MLM", 1)]), (4, [("CLM", 1)])]),
    ("12_CLM+12_MLM", [(12, [("CLM", 1)]), (12, [("MLM", 1)])]),
    ("24_1CLM:15MNTP", [(24, [("CLM", 1), ("MNTP", 15)])]),
    ("2_CLM:MLM", [(2, [("CLM", 1), ("MLM", 1)])]),
    ("1_3CLM:2MLM:MNTP+1_MNTP", [(1, [("CLM", 3), ("MLM", 2), ("MNTP", 1)]), (1, [("MNTP", 1)])]),
    (" 4_CLM + 2_MLM ", [(4, [("CLM", 1)]), (2, [("MLM", 1)])]),
])
def test_parse(text, phases):
    parsed = parse(text)
    assert [(phase.epochs, list(phase.mix)) for phase in parsed] == phases
    assert parse("+".join(map(str, parsed))) == parsed  # what is printed can be typed


def test_phases_print_as_they_are_written():
    for text in ("24_CLM", "4_CLM+16_MLM+4_CLM", "24_1CLM:15MNTP"):
        assert "+".join(map(str, parse(text))) == text


@pytest.mark.parametrize("text, part", [
    ("", "''"), ("CLM", "'CLM'"), ("4", "'4'"), ("4_", "'4_'"), ("_CLM", "'_CLM'"), ("4CLM", "'4CLM'"),
    ("4-CLM", "'4-CLM'"), ("0_CLM", "'0_CLM'"), ("-1_CLM", "'-1_CLM'"), ("1.5_CLM", "'1.5_CLM'"), ("٣_CLM", "'٣_CLM'"),
    ("4_CLM+", "''"), ("+4_CLM", "''"), ("4_CLM++4_MLM", "''"), ("4_CLM,4_MLM", "'CLM,4_MLM'"),
    ("4_CLM 4_MLM", "'4_CLM 4_MLM'"), ("4_CLM+4_GPT", "'GPT'"), ("4_clm", "'clm'"), ("4_CLMS", "'CLMS'"),
    ("4_CLM:", "''"), ("4_:MLM", "''"), ("4_0CLM:1MLM", "'0CLM'"), ("4_-1CLM", "'-1CLM'"), ("4_1.5CLM:MLM", "'1.5CLM'"),
    ("4_CLM15", "'CLM15'"), ("4_1CLM:2CLM", "'4_1CLM:2CLM'"), ("4_4_CLM", "'4_CLM'"),
])
def test_parse_names_the_bad_part(text, part):
    with pytest.raises(ValueError) as error:
        parse(text)
    line = str(error.value)
    assert line.startswith(f"schedule {text!r}: {part} ") and "\n" not in line


def test_only_causal_modelling_is_causal():
    assert OBJECTIVES == {"CLM": True, "MLM": False, "MNTP": False}


# ---------------------------------------------------------------------------------------------- hybrid batches


@pytest.mark.parametrize("text", ["1_CLM", "1_CLM:MLM", "1_1CLM:15MNTP", "1_3CLM:2MLM:7MNTP"])
def test_rows_are_shared_by_weight(text):
    phase, = parse(text)
    total = sum(weight for _, weight in phase.mix)
    for batch_rows in range(1, 200):
        rows = phase.rows(batch_rows)
        assert [name for name, _ in rows] == [name for name, _ in phase.mix]
        assert sum(count for _, count in rows) == batch_rows
        for (_, weight), (_, count) in zip(phase.mix, rows):
            assert abs(count - batch_rows * weight / total) < 1  # exact where the batch divides
            assert count >= 1 or batch_rows < total


def test_rows_of_gpt_bert():
    assert Phase(24, (("CLM", 1), ("MNTP", 15))).rows(1024) == [("CLM", 64), ("MNTP", 960)]
    assert Phase(24, (("CLM", 1), ("MNTP", 15))).rows(24) == [("CLM", 2), ("MNTP", 22)]  # 1.5 and 22.5


@pytest.mark.parametrize("text", ["1_CLM", "1_CLM:MLM", "1_1CLM:15MNTP"])
@pytest.mark.parametrize("batch_rows, micro_rows, world", [(16, 100, 1), (24, 5, 1), (24, 5, 2), (30, 7, 3), (16, 1, 4), (64, 64, 8)])
def test_micro_batches_hold_every_row_once(text, batch_rows, micro_rows, world):
    phase, = parse(text)
    parts = phase.micro_batches(batch_rows, micro_rows, world)
    assert sorted(row for _, _, rows in parts for row in rows if row >= 0) == list(range(batch_rows))
    start = 0
    for objective, count in phase.rows(batch_rows):
        own = [(number, rows) for name, number, rows in parts if name == objective]
        assert [number for number, _ in own] == list(range(len(own)))
        assert {row for _, rows in own for row in rows} - {-1} == set(range(start, start + count))
        assert len(own) % world == 0  # as many for every process
        assert len({len(rows) for _, rows in own}) == 1 and len(own[0][1]) <= micro_rows
        assert (len(own) - world) * micro_rows < count  # and no more than needed
        start += count
    assert {len(parts[rank::world]) for rank in range(world)} == {len(parts) // world}


# ---------------------------------------------------------------------------------------- what a step number says


def test_epoch_phase_and_end_of_phase():
    s = schedule("2_CLM+3_MLM+1_CLM:MLM", steps_per_epoch=5)
    assert (s.epochs, s.steps) == (6, 30)
    assert [s.phase(step) for step in range(30)] == [0] * 10 + [1] * 15 + [2] * 5
    assert [s.epoch(step) for step in range(30)] == [(epoch, step) for epoch in range(6) for step in range(5)]
    assert [step for step in range(30) if s.ends_phase(step)] == [9, 24, 29]
    with pytest.raises(IndexError, match="step 30 .* 29"):
        s.phase(30)


def test_phases_with_the_same_objective_stay_apart():
    s = schedule("1_CLM+1_CLM", steps_per_epoch=3)
    assert [step for step in range(6) if s.ends_phase(step)] == [2, 5]


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_learning_rate_rises_to_the_peak_and_falls_to_the_end(decay):
    s = schedule("37_CLM", 3, lr=2.0, lr_min_ratio=0.1, warmup=0.09, decay=decay)  # 111 steps, 10 of them warm-up
    rates = [s.learning_rate(step) for step in range(s.steps)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    middle, quarter = 10 + 50, 10 + 25  # of the 101 steps after the warm-up
    if decay == "constant":
        assert rates[9:] == [2.0] * 102
        return
    assert rates[10] == rates[9] == 2.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert rates[-1] == pytest.approx(0.2)
    assert rates[middle] == pytest.approx(1.1)
    assert rates[quarter] == pytest.approx(1.55 if decay == "linear" else 0.2 + 1.8 * (2 + math.sqrt(2)) / 4)


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert schedule(warmup=0.0, lr=3e-4).learning_rate(0) == 3e-4


def test_a_single_step_has_rates():
    s = schedule("1_MLM", 1, lr=0.5, mask_start=0.3)
    assert s.learning_rate(0) == 0.5 and s.mask_rate(0) == 0.3 and s.ends_phase(0)


def test_mask_rate_falls_linearly():
    s = schedule("3_MNTP", 7, mask_start=0.3, mask_end=0.1)  # 21 steps
    assert [s.mask_rate(step) for step in (0, 5, 10, 20)] == pytest.approx([0.3, 0.25, 0.2, 0.1])
    assert {schedule().mask_rate(step) for step in range(168)} == {0.15}


def test_schedule_needs_no_torch():
    code = "import sys, schedule; print(schedule.parse('1_CLM')[0], {'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1_CLM set()\n"


# ----------------------------------------------------------------------------------------------------------- words


def test_words_are_counted_with_repetition():
    s = schedule("3_CLM+2_MLM", 7, words_per_epoch=100)
    assert [s.words(steps) for steps in (0, 1, 7, 14, 35)] == [0, 14, 100, 200, 500]


@pytest.mark.parametrize("words, steps_per_epoch", [(10_000_000, 389), (9_999_000, 400), (1_000_000, 3), (2_500_000, 1)])
def test_each_mark_is_reached_once(words, steps_per_epoch):
    """1M, 2M ... 10M, 20M ... 100M, as far as ten epochs go; a step that passes several reaches them all."""
    s = schedule("10_CLM", steps_per_epoch, words_per_epoch=words)
    reached = [step for step in range(s.steps) if s.reaches_mark(step)]
    marks = [mark for mark in [*range(10 ** 6, 10 ** 7, 10 ** 6), *range(10 ** 7, 10 ** 8 + 1, 10 ** 7)] if mark <= 10 * words]
    first = [next(step for step in range(s.steps) if s.words(step + 1) >= mark) for mark in marks]
    assert reached == sorted(set(first))
    assert (words * 10 in marks) == (s.steps - 1 in reached)


def test_no_words_no_marks():
    assert not any(schedule().reaches_mark(step) for step in range(100))
