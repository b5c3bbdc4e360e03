"""The schedule language: "4_CLM+16_MLM+4_CLM" tells the objective and the rates of every step.

PHASE+PHASE+..., where a phase is EPOCHS_MIX. A mix is one objective, or several with weights that
share the rows of every optimizer step in that ratio: 24_1CLM:15MNTP (the hybrid of GPT-BERT,
Charpentier and Samuel 2024); CLM:MLM means 1:1. Everything here is a function of the step alone.
"""

import math
import re
from dataclasses import dataclass

from config import UserError

# BabyLM 2025 and 2026 ask for a checkpoint at 1M, 2M ... 10M, 20M ... 100M, 200M ... 1000M words
# seen; up to 100M in the track of 10M words.
WORD_MARKS = [
    *range(1_000_000, 10_000_000, 1_000_000),
    *range(10_000_000, 100_000_000, 10_000_000),
    *range(100_000_000, 1_000_000_001, 100_000_000),
]


def cosine(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * x))


def linear(x: float) -> float:
    return 1 - x


def constant(x: float) -> float:
    return 1.0


# Share of the peak learning rate at progress x in [0, 1] after the warm-up.
DECAYS = {"cosine": cosine, "linear": linear, "constant": constant}


def words_before(history: list[dict]) -> int:
    """Return the words that a model had seen when a run began; 0 where that is not known.

    history: the runs that it was started from, the last of which had seen the words of all
    """
    if not history:
        return 0
    return history[-1]["words"] or 0


def apportion(total: int, weights: list[int]) -> list[int]:
    """Split a whole number in proportion to weights, into whole numbers that add up to it.

    Each gets the whole part of its share; those with the largest remainders get one more.
    """
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


@dataclass(frozen=True)
class Phase:
    """A number of epochs with one mix of objectives.

    mix: names and whole weights, as in (("CLM", 1), ("MNTP", 15))
    """

    epochs: int
    mix: tuple[tuple[str, int], ...]

    def __str__(self):
        if len(self.mix) == 1:
            name, _ = self.mix[0]
            return f"{self.epochs}_{name}"
        return f"{self.epochs}_" + ":".join(f"{weight}{name}" for name, weight in self.mix)

    @property
    def objectives(self) -> list[str]:
        return [name for name, _ in self.mix]

    def split_rows(self, batch_rows: int) -> dict[str, int]:
        """Split the rows of one optimizer step between the objectives, by their weights."""
        counts = apportion(batch_rows, [weight for _, weight in self.mix])
        return dict(zip(self.objectives, counts, strict=True))


def parse(text: str) -> tuple[Phase, ...]:
    """Return the phases of a schedule; raises UserError that names the part and what was expected.

    Knows the grammar only: which objectives there are is said by OBJECTIVES in data.py.
    """
    phases = []
    for part in text.split("+"):
        match = re.fullmatch(r"([1-9][0-9]{,8})_(\S+)", part.strip())
        if not match:
            raise UserError(f"schedule {text!r}: {part!r} is not EPOCHS_MIX, as in 4_CLM")
        mix = []
        for item in match[2].split(":"):
            weighted = re.fullmatch(r"([1-9][0-9]{,8})?([A-Z]+)", item)
            if not weighted:
                raise UserError(
                    f"schedule {text!r}: {item!r} is not an objective with an optional weight of "
                    "at least 1 in front, as in 15MNTP"
                )
            mix.append((weighted[2], int(weighted[1] or 1)))
        if len(mix) != len(dict(mix)):
            raise UserError(f"schedule {text!r}: {part!r} names an objective twice")
        if len(mix) == 1:
            mix = [(mix[0][0], 1)]  # a weight says nothing where there is nothing to share
        phases.append(Phase(int(match[1]), tuple(mix)))
    return tuple(phases)


@dataclass(frozen=True)
class Schedule:
    """What a run does at each optimizer step; a resumed run needs nothing but the step's number."""

    phases: tuple[Phase, ...]
    steps_per_epoch: int
    lr: float  # peak learning rate
    lr_min_ratio: float = 0.1  # share of the peak at the last step
    warmup: float = 0.01  # share of all steps
    decay: str = "cosine"  # a row of DECAYS
    decay_share: float = 1.0  # share of the steps after the warm-up, the last, in which it decays
    mask_start: float = 0.15  # share of tokens that MLM and MNTP hide at the first step
    mask_end: float = 0.15  # and at the last step
    mask_decay: str = "linear"  # in between, a row of DECAYS
    average_share: float = 0.0  # share of the steps, the last, whose weights are averaged
    words_per_epoch: int = 0  # words of the corpus
    words_before: int = 0  # words that the model had seen when the run began

    @property
    def epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def epoch(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step and the step's number within it, both from 0."""
        return divmod(step, self.steps_per_epoch)

    def phase_index(self, step: int) -> int:
        epoch, _ = self.epoch(step)
        for index, phase in enumerate(self.phases):
            if epoch < phase.epochs:
                return index
            epoch -= phase.epochs
        raise IndexError(f"step {step} lies beyond the last step, {self.steps - 1}")

    def phase(self, step: int) -> Phase:
        return self.phases[self.phase_index(step)]

    def ends_phase(self, step: int) -> bool:
        """Whether this step is the last one of its phase."""
        return step + 1 == self.steps or self.phase_index(step) != self.phase_index(step + 1)

    def is_milestone(self, steps: int, marks: bool) -> bool:
        """Whether the checkpoint after so many steps is kept for good.

        A phase ends with it or, where `marks` count, the words seen have just reached one.
        """
        return self.ends_phase(steps - 1) or (marks and self.reaches_mark(steps - 1))

    def learning_rate(self, step: int) -> float:
        """Rise linearly to the peak over the warm-up, then decay to lr_min_ratio of it.

        With a decay_share below 1 the peak is held for a while (warm-up, stable, decay: Hu et al.
        2024, MiniCPM).
        """
        warmup = round(self.warmup * self.steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        x = (step - warmup) / max(1, self.steps - 1 - warmup)
        x = max(0.0, (x - (1 - self.decay_share)) / self.decay_share)
        decay = DECAYS[self.decay]
        return self.lr * (self.lr_min_ratio + (1 - self.lr_min_ratio) * decay(x))

    def mask_rate(self, step: int) -> float:
        """Share of tokens to hide, from mask_start to mask_end (GPT-BERT: 0.30 to 0.15)."""
        x = step / max(1, self.steps - 1)
        return self.mask_end + (self.mask_start - self.mask_end) * DECAYS[self.mask_decay](x)

    def averages(self, steps: int) -> bool:
        """Whether the weights after so many steps belong to the average."""
        return steps > self.steps - round(self.average_share * self.steps)

    def words(self, steps: int) -> int:
        """Words seen, with repetition, after so many steps."""
        return self.words_before + round(steps * self.words_per_epoch / self.steps_per_epoch)

    def reaches_mark(self, step: int) -> bool:
        """Whether the words seen reach one of WORD_MARKS with this step."""
        before = self.words(step)
        after = self.words(step + 1)
        return any(before < mark <= after for mark in WORD_MARKS)
