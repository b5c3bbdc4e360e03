"""schedule.py: the language, and what a step number says.

Alone: python -m pytest tests/test_schedule.py
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from config import UserError
from schedule import DECAYS, Phase, Schedule, parse

ROOT = Path(__file__).parent.parent


def make_schedule(text: str = "4_CLM+16_MLM+4_CLM", steps_per_epoch: int = 7, **rates) -> Schedule:
    return Schedule(parse(text), steps_per_epoch, **{"lr": 1.0} | rates)


# ------------------------------------------------------------------------------------ the language


@pytest.mark.parametrize(
    "text, phases",
    [
        ("24_CLM", [(24, [("CLM", 1)])]),
        ("4_CLM+16_MLM+4_CLM", [(4, [("CLM", 1)]), (16, [("MLM", 1)]), (4, [("CLM", 1)])]),
        ("24_1CLM:15MNTP", [(24, [("CLM", 1), ("MNTP", 15)])]),
        ("2_CLM:MLM", [(2, [("CLM", 1), ("MLM", 1)])]),
        (
            "1_3CLM:2MLM:MNTP+1_MNTP",
            [(1, [("CLM", 3), ("MLM", 2), ("MNTP", 1)]), (1, [("MNTP", 1)])],
        ),
        ("3_4CLM", [(3, [("CLM", 1)])]),  # alone it has all rows, whatever its weight
        (" 4_CLM + 2_MLM ", [(4, [("CLM", 1)]), (2, [("MLM", 1)])]),
    ],
)
def test_parse(text, phases):
    parsed = parse(text)
    assert [(phase.epochs, list(phase.mix)) for phase in parsed] == phases
    assert parse("+".join(map(str, parsed))) == parsed  # what is printed can be typed


@pytest.mark.parametrize("text", ["24_CLM", "4_CLM+16_MLM+4_CLM", "24_1CLM:15MNTP"])
def test_phases_print_as_they_are_written(text):
    assert "+".join(map(str, parse(text))) == text


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "''"),
        ("CLM", "'CLM'"),
        ("4", "'4'"),
        ("4_", "'4_'"),
        ("_CLM", "'_CLM'"),
        ("4-CLM", "'4-CLM'"),
        ("0_CLM", "'0_CLM'"),
        ("-1_CLM", "'-1_CLM'"),
        ("1.5_CLM", "'1.5_CLM'"),
        ("4_CLM+", "''"),
        ("4_CLM++4_MLM", "''"),
        ("4_CLM,4_MLM", "'CLM,4_MLM'"),
        ("4_CLM 4_MLM", "'4_CLM 4_MLM'"),
        ("4_clm", "'clm'"),
        ("4_CLM:", "''"),
        ("4_0CLM:1MLM", "'0CLM'"),
        ("4_1.5CLM:MLM", "'1.5CLM'"),
        ("4_CLM15", "'CLM15'"),
        ("4_1CLM:2CLM", "'4_1CLM:2CLM'"),
    ],
)
def test_parse_names_the_bad_part(text, part):
    with pytest.raises(UserError) as error:
        parse(text)
    line = str(error.value)
    assert line.startswith(f"schedule {text!r}: {part} ")
    assert "\n" not in line


@pytest.mark.parametrize("text", ["1_CLM", "1_CLM:MLM", "1_1CLM:15MNTP", "1_3CLM:2MLM:7MNTP"])
def test_rows_are_shared_by_weight(text):
    (phase,) = parse(text)
    total = sum(weight for _, weight in phase.mix)
    for batch_rows in range(1, 200):
        rows = phase.split_rows(batch_rows)
        assert list(rows) == phase.objectives
        assert sum(rows.values()) == batch_rows
        for name, weight in phase.mix:
            assert abs(rows[name] - batch_rows * weight / total) < 1
            assert rows[name] >= 1 or batch_rows < total


def test_rows_of_gpt_bert():
    phase = Phase(24, (("CLM", 1), ("MNTP", 15)))
    assert phase.split_rows(1024) == {"CLM": 64, "MNTP": 960}
    assert phase.split_rows(24) == {"CLM": 2, "MNTP": 22}  # shares of 1.5 and 22.5


# -------------------------------------------------------------------------- what a step number says


def test_epoch_phase_and_end_of_phase():
    schedule = make_schedule("2_CLM+3_MLM+1_CLM:MLM", steps_per_epoch=5)
    assert schedule.epochs == 6
    assert schedule.steps == 30
    assert [schedule.phase_index(step) for step in range(30)] == [0] * 10 + [1] * 15 + [2] * 5
    assert [str(schedule.phase(step)) for step in (0, 10, 25)] == ["2_CLM", "3_MLM", "1_1CLM:1MLM"]
    assert [schedule.epoch(step) for step in (0, 4, 5, 29)] == [(0, 0), (0, 4), (1, 0), (5, 4)]
    assert [step for step in range(30) if schedule.ends_phase(step)] == [9, 24, 29]
    with pytest.raises(IndexError, match="step 30 .* 29"):
        schedule.phase(30)


def test_phases_with_the_same_objective_stay_apart():
    schedule = make_schedule("1_CLM+1_CLM", steps_per_epoch=3)
    assert [step for step in range(6) if schedule.ends_phase(step)] == [2, 5]


# of the way down from the peak 2.0 to 0.2: after a quarter and after half of the decay
EXPECTED = {"cosine": (0.2 + 1.8 * (2 + math.sqrt(2)) / 4, 1.1), "linear": (1.55, 1.1)}


@pytest.mark.parametrize("decay", DECAYS)
def test_learning_rate_rises_to_the_peak_and_falls_to_the_end(decay):
    # 111 steps, 10 of them warm-up, 101 of decay
    schedule = make_schedule("37_CLM", 3, lr=2.0, lr_min_ratio=0.1, warmup=0.09, decay=decay)
    rates = [schedule.learning_rate(step) for step in range(schedule.steps)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == 2.0
    assert all(rate <= before for before, rate in zip(rates[10:], rates[11:], strict=False))
    if decay == "constant":
        assert rates[-1] == 2.0
    if decay in EXPECTED:
        assert (rates[10 + 25], rates[10 + 50]) == pytest.approx(EXPECTED[decay])
        assert rates[-1] == pytest.approx(0.2)


def test_with_a_share_the_peak_is_held_until_the_last_steps():
    # 111 steps: 10 of warm-up, 80 at the peak, 20 of decay
    schedule = make_schedule(
        "37_CLM", 3, lr=2.0, lr_min_ratio=0.1, warmup=0.09, decay="linear", decay_share=0.2
    )
    rates = [schedule.learning_rate(step) for step in range(schedule.steps)]
    assert rates[9:91] == pytest.approx([2.0] * 82)
    assert rates[100] == pytest.approx(1.1)
    assert rates[110] == pytest.approx(0.2)
    assert rates[91] < 2.0


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert make_schedule(warmup=0.0, lr=3e-4).learning_rate(0) == 3e-4


def test_a_single_step_has_rates():
    schedule = make_schedule("1_MLM", 1, lr=0.5, mask_start=0.3)
    assert schedule.learning_rate(0) == 0.5
    assert schedule.mask_rate(0) == 0.3
    assert schedule.ends_phase(0)


@pytest.mark.parametrize("start, end", [(0.3, 0.1), (0.1, 0.3)])
def test_mask_rate_falls_or_rises_linearly(start, end):
    schedule = make_schedule("3_MNTP", 7, mask_start=start, mask_end=end)  # 21 steps
    rates = [schedule.mask_rate(step) for step in (0, 5, 10, 20)]
    assert rates == pytest.approx([start, start + (end - start) / 4, 0.2, end])


def test_mask_rate_falls_along_a_cosine():
    schedule = make_schedule("3_MNTP", 7, mask_start=0.3, mask_end=0.1, mask_decay="cosine")
    rates = [schedule.mask_rate(step) for step in (0, 5, 10, 20)]
    quarter = 0.1 + 0.2 * (2 + math.sqrt(2)) / 4
    assert rates == pytest.approx([0.3, quarter, 0.2, 0.1])


@pytest.mark.parametrize("share, first", [(0.0, 22), (0.2, 18), (0.5, 12), (1.0, 1)])
def test_the_last_share_of_the_steps_is_averaged(share, first):
    schedule = make_schedule("3_CLM", 7, average_share=share)  # 21 steps
    averaged = [steps for steps in range(1, 22) if schedule.averages(steps)]
    assert averaged == list(range(first, 22))


def test_schedule_needs_no_torch():
    code = "import sys, schedule; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


# ------------------------------------------------------------------------------------------- words


def test_words_are_counted_with_repetition():
    schedule = make_schedule("3_CLM+2_MLM", 7, words_per_epoch=100)
    assert [schedule.words(steps) for steps in (0, 1, 7, 14, 35)] == [0, 14, 100, 200, 500]


@pytest.mark.parametrize(
    "words, steps_per_epoch", [(10_000_000, 389), (9_999_000, 400), (1_000_000, 3), (2_500_000, 1)]
)
def test_each_mark_of_words_is_reached_once(words, steps_per_epoch):
    """1M, 2M ... 10M, 20M ... 100M, as far as ten epochs go; one step may pass several."""
    schedule = make_schedule("10_CLM", steps_per_epoch, words_per_epoch=words)
    millions = [*range(1, 10), *range(10, 101, 10)]
    first_steps = set()
    for mark in (million * 10**6 for million in millions):
        if mark <= 10 * words:
            first_steps.add(
                next(step for step in range(schedule.steps) if schedule.words(step + 1) >= mark)
            )
    reached = [step for step in range(schedule.steps) if schedule.reaches_mark(step)]
    assert reached == sorted(first_steps)


def test_without_words_no_mark_is_reached():
    assert not any(make_schedule().reaches_mark(step) for step in range(100))


def test_milestones_are_ends_of_phases_and_on_request_marks():
    schedule = make_schedule("1_CLM+1_MLM", 4, words_per_epoch=2_000_000)
    assert [n for n in range(1, 9) if schedule.is_milestone(n, marks=False)] == [4, 8]
    assert [n for n in range(1, 9) if schedule.is_milestone(n, marks=True)] == [2, 4, 6, 8]
