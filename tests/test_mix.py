"""Tests of tools/mix.py. Alone: python -m pytest tests/test_mix.py"""

import mix
import pytest

from config import UserError
from schedule import parse


@pytest.mark.parametrize("epochs", [1, 10, 24, 32])
def test_up_to_32_repetitions_three_parts_of_four_are_causal(epochs, capsys):
    mix.main([str(epochs)])
    assert capsys.readouterr().out == f"{epochs}_3CLM:1MDNTP\n"


@pytest.mark.parametrize("epochs", [33, 48, 64, 100, 256])
def test_above_the_causal_objective_sees_each_token_about_16_times(epochs):
    (phase,) = parse(str(mix.best_mix(epochs)))
    weights = dict(phase.mix)
    causal = weights["CLM"] / (weights["CLM"] + weights["MDNTP"])
    assert epochs * causal == pytest.approx(16, rel=0.05)


def test_the_causal_objective_is_never_left_out():
    assert dict(mix.best_mix(100_000).mix)["CLM"] > 0


def test_no_epochs_are_refused():
    with pytest.raises(UserError, match="0 epochs: must be at least 1"):
        mix.main(["0"])
