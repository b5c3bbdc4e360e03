"""Print the schedule that mixes causal training and masked diffusion as suits its repetitions.

    python tools/mix.py 24        # 24_3CLM:1MDNTP
    python tools/mix.py 64        # 64_1CLM:3MDNTP

The more often a text is repeated, the smaller the causal share should be, since the causal
objective overfits and masked diffusion hardly does: three parts to one at 32 repetitions, and above
that so many that the causal objective sees each token about 16 times. Source: Samuel and
Charpentier 2025 (arXiv 2512.14549), who trained 50 models of larger sizes on more text; for fewer
repetitions than 32 this takes their share at 32.
"""

import argparse
import sys
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from antlm.program import clean_exit
from config import require
from schedule import Phase


def best_mix(epochs: int) -> Phase:
    """Return a phase of so many epochs whose causal share is the best for as many repetitions."""
    causal = Fraction(3, 4)
    if epochs > 32:
        # in small whole weights, and never without it
        causal = Fraction(max(16 / epochs, 1 / 20)).limit_denominator(20)
    masked = 1 - causal
    weights = (causal.numerator, masked.numerator)
    return Phase(epochs, (("CLM", weights[0]), ("MDNTP", weights[1])))


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("epochs", type=int, help="of the schedule: how often each token is seen")
    args = parser.parse_args(arguments)
    require(args.epochs >= 1, f"{args.epochs} epochs: must be at least 1")
    print(best_mix(args.epochs))


if __name__ == "__main__":
    with clean_exit():
        main()
