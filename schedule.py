"""The schedule language: "4_CLM+16_MLM+4_CLM" -> objective, learning rate and mask rate at a step. No torch.

PHASE+PHASE+..., a phase is EPOCHS_MIX. A mix is one objective, or several with weights that share every optimizer step
in that ratio of rows: 24_1CLM:15MNTP (the hybrid of GPT-BERT, Charpentier and Samuel 2024); CLM:MLM means 1:1.
"""

import math
import re
from dataclasses import dataclass

OBJECTIVES = {  # name: is its attention causal?
    "CLM": True,  # predict the next token
    "MLM": False,  # predict hidden tokens where they stand
    "MNTP": False,  # predict hidden tokens one position before they stand
}
DECAYS = {  # share of the peak learning rate at progress x in [0, 1] after the warm-up
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
    "constant": lambda x: 1.0,
}

WORD_MARKS = [n * 1_000_000 for n in (*range(1, 10), *range(10, 101, 10))]  # BabyLM 2025 asks for a checkpoint at each


@dataclass(frozen=True)
class Phase:
    """A run of epochs with one mix of objectives; weights are whole numbers, e.g. (("CLM", 1), ("MNTP", 15))."""

    epochs: int
    mix: tuple[tuple[str, int], ...]

    def __str__(self):
        if len(self.mix) == 1:
            return f"{self.epochs}_{self.mix[0][0]}"
        return f"{self.epochs}_" + ":".join(f"{weight}{name}" for name, weight in self.mix)

    def rows(self, batch_rows: int) -> list[tuple[str, int]]:
        """Split the rows of one optimizer step between the objectives, by largest remainder; sums to batch_rows."""
        total = sum(weight for _, weight in self.mix)
        shares = [batch_rows * weight / total for _, weight in self.mix]
        counts = [math.floor(share) for share in shares]
        for i in sorted(range(len(counts)), key=lambda i: counts[i] - shares[i])[:batch_rows - sum(counts)]:
            counts[i] += 1
        return [(name, count) for (name, _), count in zip(self.mix, counts)]

    def micro_batches(self, batch_rows: int, micro_rows: int, world: int) -> list[tuple[str, int, list[int]]]:
        """Cut each objective's rows of one optimizer step into equal parts of at most micro_rows, as many for every process.

        -> objective, number of the part, its rows, where -1 fills the last parts up. Process r of world takes every
        world-th part, from r on.
        """
        cut, start = [], 0
        for objective, n_rows in self.rows(batch_rows):
            parts = -(-n_rows // (micro_rows * world)) * world
            size = -(-n_rows // parts)
            rows = [*range(start, start + n_rows), *[-1] * (parts * size - n_rows)]
            cut += [(objective, i, rows[i * size:(i + 1) * size]) for i in range(parts)]
            start += n_rows
        return cut


def parse(text: str) -> tuple[Phase, ...]:
    """Phases of a schedule; raises ValueError that names the part and what was expected."""
    phases = []
    for part in text.split("+"):
        match = re.fullmatch(r"([0-9]{1,9})_(\S+)", part.strip())
        if not match or int(match[1]) < 1:
            raise ValueError(f"schedule {text!r}: {part!r} is not EPOCHS_MIX with 1 to 999999999 epochs, as in 4_CLM")
        mix = []
        for item in match[2].split(":"):
            weighted = re.fullmatch(r"([0-9]{,9})([A-Z]+)", item)
            if not weighted or weighted[2] not in OBJECTIVES or weighted[1] and int(weighted[1]) < 1:
                raise ValueError(f"schedule {text!r}: {item!r} is not one of {', '.join(OBJECTIVES)}, "
                                 "with an optional weight of at least 1 in front, as in 15MNTP")
            mix.append((weighted[2], int(weighted[1] or 1)))
        if len(mix) != len(dict(mix)):
            raise ValueError(f"schedule {text!r}: {part!r} names an objective twice")
        mix = mix if len(mix) > 1 else [(mix[0][0], 1)]
        phases.append(Phase(int(match[1]), tuple(mix)))
    return tuple(phases)


@dataclass(frozen=True)
class Schedule:
    """What a run does at each optimizer step; everything follows from the step number, so resume replays nothing."""

    phases: tuple[Phase, ...]
    steps_per_epoch: int
    lr: float  # peak learning rate
    lr_min_ratio: float = 0.1  # share of the peak at the last step
    warmup: float = 0.01  # share of all steps
    decay: str = "cosine"
    mask_start: float = 0.15  # share of the tokens that MLM and MNTP hide at the first step
    mask_end: float = 0.15  # and at the last; linear in between
    words_per_epoch: int = 0  # words of the corpus

    @property
    def epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def epoch(self, step: int) -> tuple[int, int]:
        """Epoch of a step and the step's number within it, both from 0."""
        return divmod(step, self.steps_per_epoch)

    def phase(self, step: int) -> int:
        """Index of the phase that a step belongs to."""
        epoch = self.epoch(step)[0]
        for index, phase in enumerate(self.phases):
            if epoch < phase.epochs:
                return index
            epoch -= phase.epochs
        raise IndexError(f"step {step} lies beyond the last step, {self.steps - 1}")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up that reaches the peak at its last step, then the decay down to its share lr_min_ratio."""
        warmup = round(self.warmup * self.steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        x = (step - warmup) / max(1, self.steps - 1 - warmup)
        return self.lr * (self.lr_min_ratio + (1 - self.lr_min_ratio) * DECAYS[self.decay](x))

    def mask_rate(self, step: int) -> float:
        """Share of tokens to hide: linear from mask_start to mask_end (GPT-BERT: 0.30 to 0.15)."""
        return self.mask_start + (self.mask_end - self.mask_start) * step / max(1, self.steps - 1)

    def ends_phase(self, step: int) -> bool:
        """Is this step the last one of its phase?"""
        return step + 1 == self.steps or self.phase(step) != self.phase(step + 1)

    def words(self, steps: int) -> int:
        """Words seen, with repetition, in the first so many steps."""
        return round(steps * self.words_per_epoch / self.steps_per_epoch)

    def reaches_mark(self, step: int) -> bool:
        """Do the words seen reach 1M, 2M ... 10M, 20M ... or 100M with this step?"""
        return any(self.words(step) < mark <= self.words(step + 1) for mark in WORD_MARKS)
