"""Token files, and the batches of every objective made from them.

A batch is made in two steps. Batches.rows says WHICH tokens stand in a row: a function of seed,
epoch, step and row alone, so that a resumed run and one of any number of processes see the same.
An objective says WHAT IS ASKED of them: which tokens are hidden, and what is to be predicted where.

In comments and docstrings: R rows, T tokens a row (block_size), K positions a row that go through
the vocabulary head (slots).
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from antlm import IGNORE
from antlm.tokenizer import MASK, SPECIAL, Tokenizer
from config import UserError, require
from schedule import Phase, apportion, parse


class Corpus:
    """The token files that prepare.py made of a text, checked against its meta.json.

    train, dev: token ids as read-only arrays, on disk until they are used
    Raises UserError that names the file which is missing, cut short or of another tokenizer.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.boundary = self.meta["boundary"]
            self.tokenizer = Tokenizer(self.folder / "tokenizer.json")
            self.vocab_size = self.tokenizer.vocab_size
            # another tokenizer would give the same ids another meaning
            self.compare("tokenizer.json", self.tokenizer.sha256, self.meta["tokenizer_sha256"])
            self.train = self.open("train")
            self.dev = self.open("dev")
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.folder}/meta.json: not written by prepare.py ({error})"
            ) from None

    def open(self, split: str) -> np.ndarray:
        """Map a token file into memory, after a check of its bytes."""
        path = self.folder / f"{split}.bin"
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.compare(path.name, sha256, self.meta[split]["sha256"])
        # mapped, not read: all processes of a machine share the pages
        return np.memmap(path, self.tokenizer.dtype, mode="r")

    def compare(self, file: str, value, stated):
        require(
            value == stated,
            f"{self.folder / file}: not the one that meta.json describes; prepare the corpus again",
        )


# ------------------------------------------------------------------------------------- randomness


def hash64(*keys) -> np.ndarray:
    """Mix whole numbers, or arrays of them, into 64 random bits each.

    The only source of randomness in training data: a function of position, not of history, so no
    generator has a state to save.
    keys: broadcast against each other
    Source: splitmix64 (Steele et al. 2014).
    """
    h = np.zeros(1, np.uint64)
    for key in keys:
        # one round of splitmix64 for each key
        h = (h ^ np.asarray(key, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def uniform(h: np.ndarray) -> np.ndarray:
    """Turn hashes into floating-point numbers in [0, 1)."""
    # a double holds 53 bits
    return (h >> np.uint64(11)) * 2.0**-53


# What a hash is for. The numbers are part of every result: a new purpose gets a new number.
ORDER = 0  # of the rows of an epoch
OFFSET = 1  # where an epoch's first row begins
SPAN = 2  # where spans of hidden tokens begin
CHOICE = 3  # which spans are hidden
KIND = 4  # mask, random token or left as it is
TOKEN = 5  # the random token
DROPOUT = 6  # the generator of a forward pass
RATE = 7  # how much of a row masked diffusion hides


def dropout_seed(seed: int, step: int, objective: "Objective", index: int) -> int:
    """Return the seed of a forward pass's dropout: a function of position, too."""
    # 63 bits, because torch takes signed seeds
    return int(hash64(seed, DROPOUT, step, objective.seed, index)[0] >> np.uint64(1))


# -------------------------------------------------------------------------- what is asked of a row


@dataclass
class Rows:
    """Rows of one optimizer step of an epoch, before anything is asked of them.

    tokens, following: (R, T) the token at each position and the one after it
    inside: (R, T) False past the end of the epoch, where nothing is scored
    number: (R, 1) the row's number in the text, which seeds what is hidden in it
    place: (R,) the row's place in the step, which deals out how many tokens it hides
    """

    tokens: np.ndarray
    following: np.ndarray
    inside: np.ndarray
    number: np.ndarray
    place: np.ndarray
    seed: int
    epoch: int
    step: int

    def random(self, purpose: int, key: np.ndarray) -> np.ndarray:
        """Return random bits of (seed, epoch, row, purpose, key)."""
        return hash64(self.seed, self.epoch, self.number, purpose, key)


@dataclass
class Hiding:
    """What an objective is told about hiding tokens.

    rate: share of tokens that are hidden
    span: mean length in tokens of what is hidden at once
    slots: K, at most so many tokens of a row are hidden
    """

    rate: float
    span: float
    slots: int
    vocab_size: int


@dataclass
class Batch:
    """Rows as the model takes them; every field is an argument of Transformer.forward.

    tokens, targets: (R, T) int64, aligned; a target of IGNORE is not scored
    scored: (R, K) positions that go through the vocabulary head; None: all
    weights: (R, T) float32 factor of each target's loss; None: all count alike
    """

    tokens: np.ndarray
    targets: np.ndarray
    scored: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def n_scored(self) -> float:
        """Number of targets that are scored, each counted with its weight.

        What the summed loss is divided by.
        """
        scored = self.targets != IGNORE
        if self.weights is None:
            return float(scored.sum())
        return float(self.weights[scored].sum(dtype=np.float64))

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """Return the fields that are not None as tensors on a device, by name."""
        tensors = {}
        on_gpu = device.type == "cuda"
        for field in fields(self):
            array = getattr(self, field.name)
            if array is None:
                continue
            # a slice, as `scored` may be, would be copied once more on its way to a GPU, unpinned
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            if on_gpu:
                # from pinned memory the copy runs while the GPU still computes
                tensor = tensor.pin_memory()
            tensors[field.name] = tensor.to(device, non_blocking=on_gpu)
        return tensors


def clm(rows: Rows, hiding: Hiding) -> Batch:
    """Causal language modelling: predict the next token. Nothing is hidden, all is scored."""
    # past the end of the epoch there is nothing to predict
    return Batch(rows.tokens, np.where(rows.inside, rows.following, IGNORE))


def mlm(rows: Rows, hiding: Hiding) -> Batch:
    """Masked language modelling: predict each hidden token where it stood (BERT, section 3.1)."""
    # a target stands where its token stood
    tokens, position, original, hidden = hide_tokens(rows, hiding)
    return Batch(tokens, place_targets(rows, position, original, hidden), scored=position)


def mntp(rows: Rows, hiding: Hiding) -> Batch:
    """Masked next-token prediction: predict each hidden token one position before it stood.

    Source: BehnamGhader et al. 2024 (LLM2Vec), section 2.1.
    """
    # a row's first token has no position before it, so it is never hidden
    tokens, position, original, hidden = hide_tokens(rows, hiding, first=1)
    before = (position - 1) % rows.tokens.shape[1]  # the modulo moves only slots that hide nothing
    return Batch(tokens, place_targets(rows, before, original, hidden), scored=before)


def mdlm(rows: Rows, hiding: Hiding) -> Batch:
    """Masked diffusion: predict hidden tokens where they stood, of rows hidden more or less.

    The loss of a row x of L tokens is 1/l * sum(-log p(x_i | rest) over the l hidden i), where
    every l from 1 to L is equally likely: on average a bound of -log p(x), per token.
    Source: Sahoo et al. 2024 (MDLM), and Nie et al. 2025 (LLaDA) for the form in which the number
    of hidden tokens is drawn.
    """
    return diffuse(rows)


def mdntp(rows: Rows, hiding: Hiding) -> Batch:
    """Masked diffusion read one position earlier, as MNTP is, so that it goes well with CLM."""
    batch = diffuse(rows, first=1)
    # a row's first token is never hidden, so that nothing comes round to the last position
    targets = np.roll(batch.targets, -1, axis=1)
    return Batch(batch.tokens, targets, weights=np.roll(batch.weights, -1, axis=1))


class Objective(NamedTuple):
    """What training asks of the rows.

    build: makes the batch
    causal: whether a position sees only those before it
    mode: how eval.py asks a model that was trained with it: causal, masked or mntp
    max_rate: largest share of a row that it hides; None: the run's mask_start and mask_end
    seed: a number of its own, from which its dropout follows
    """

    build: Callable[[Rows, Hiding], Batch]
    causal: bool
    mode: str
    max_rate: float | None
    seed: int


# An objective is one function above and one row here; nothing else has to change for a new one.
# Never change a seed: old checkpoints go on with it.
OBJECTIVES = {
    "CLM": Objective(clm, causal=True, mode="causal", max_rate=0.0, seed=0),
    "MLM": Objective(mlm, causal=False, mode="masked", max_rate=None, seed=1),
    "MNTP": Objective(mntp, causal=False, mode="mntp", max_rate=None, seed=2),
    "MDLM": Objective(mdlm, causal=False, mode="masked", max_rate=1.0, seed=4),
    "MDNTP": Objective(mdntp, causal=False, mode="mntp", max_rate=1.0, seed=5),
}


def find_objectives(schedule: str, path: Path | None = None) -> list[str]:
    """Return the names of the objectives in a schedule, in the order in which they occur.

    path: the checkpoint that the schedule comes from
    Raises UserError where OBJECTIVES lacks one.
    """
    # in the order of the schedule, each once
    names = []
    for phase in parse(schedule):
        names += phase.objectives
    for name in names:
        known = ", ".join(OBJECTIVES)
        source = f"{path}: " if path else ""
        require(
            name in OBJECTIVES, f"{source}schedule {schedule!r}: {name!r} is not one of {known}"
        )
    return list(dict.fromkeys(names))


def find_hideable(rows: Rows, first: int) -> np.ndarray:
    """Return (R, T) whether a token may be hidden: no special one, nor one before `first`."""
    position = np.arange(rows.tokens.shape[1])
    return rows.inside & (rows.tokens >= len(SPECIAL)) & (position >= first)


def shuffle(rows: Rows, key: np.ndarray, hideable: np.ndarray) -> np.ndarray:
    """Return (R, T) the positions of each row in the order in which they are hidden.

    key: positions of one key follow one another; those that must not be hidden come last
    """
    # 63 random bits, so that 1 << 63 comes after every one of them
    rank = rows.random(CHOICE, key) >> np.uint64(1)
    rank = np.where(hideable, rank, np.uint64(1 << 63))
    return np.argsort(rank, axis=1, kind="stable")


def hide_tokens(rows: Rows, hiding: Hiding, first: int = 0):
    """Hide a share of the tokens of each row, never special ones nor those before `first`.

    Returns tokens (R, T) as the model sees them and, for each of the K slots (R, K): the position,
    the token that stood there and whether the slot is in use.
    """
    T = rows.tokens.shape[1]
    position = np.arange(T)

    # cut the row into spans: each position opens a new one with probability 1 / span, which makes
    # their lengths geometric, as in ltg-bert; with span 1 every token is one
    opens = uniform(rows.random(SPAN, position)) < 1 / hiding.span
    span_start = np.maximum.accumulate(np.where(opens, position, 0), axis=1)  # (R, T)

    # shuffle the spans and take tokens in that order
    hideable = find_hideable(rows, first)
    chosen = shuffle(rows, span_start, hideable)[:, : hiding.slots]  # (R, K)

    # row r hides so many that rows 0 to r together hide floor((r + 1) * rate * T): every step then
    # hides the same number of tokens, and the shapes behind the vocabulary head are static
    n_hidden = np.floor((rows.place + 1) * (hiding.rate * T))
    n_hidden -= np.floor(rows.place * (hiding.rate * T))
    assert n_hidden.max(initial=0) <= hiding.slots, "an objective hides more than its max_rate"
    hidden = np.arange(hiding.slots) < n_hidden[:, None]
    hidden &= np.take_along_axis(hideable, chosen, axis=1)

    # 80% become <mask>; 10% become a random token and 10% stay as they are, because <mask> never
    # occurs when the model is used: it has to keep an opinion about every token that it sees
    original = np.take_along_axis(rows.tokens, chosen, axis=1)
    # one die for a whole span; a random token is never a special one
    kind = uniform(rows.random(KIND, np.take_along_axis(span_start, chosen, axis=1)))
    n_ordinary = np.uint64(hiding.vocab_size - len(SPECIAL))
    random = len(SPECIAL) + (rows.random(TOKEN, chosen) % n_ordinary).astype(np.int64)
    shown = np.where(kind < 0.8, MASK, np.where(kind < 0.9, random, original))

    tokens = rows.tokens.copy()
    np.put_along_axis(tokens, chosen, np.where(hidden, shown, original), axis=1)
    return tokens, chosen, original, hidden


def place_targets(rows: Rows, position: np.ndarray, original: np.ndarray, hidden: np.ndarray):
    """Return targets (R, T): the original token at the position of every slot that is in use."""
    targets = np.full_like(rows.tokens, IGNORE)
    # only slots in use: the others would overwrite targets with tokens that were not hidden
    row, slot = np.nonzero(hidden)
    targets[row, position[row, slot]] = original[row, slot]
    return targets


GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def diffuse(rows: Rows, first: int = 0) -> Batch:
    """Hide tokens as masked diffusion does, never special ones nor those before `first`.

    A target stands where its token stood. Its weight is L / l where l of the L tokens of its row
    are hidden, so that every token counts 1 on average.
    """
    hideable = find_hideable(rows, first)  # (R, T)

    # How much of a row is hidden: multiples of the golden ratio, from a random start, lie evenly
    # in [0, 1) for any run of rows. Drawn one by one, few rows would be all nearly open by chance.
    start = uniform(hash64(rows.seed, rows.epoch, RATE, rows.step))
    rate = (start + rows.place * GOLDEN_RATIO) % 1  # (R,)
    n_hideable = hideable.sum(axis=1)
    n_hidden = np.minimum(1 + np.floor(rate * n_hideable), n_hideable)

    # shuffle the tokens and hide the first ones, always behind <mask>
    turn = np.argsort(shuffle(rows, np.arange(rows.tokens.shape[1]), hideable), axis=1)
    hidden = turn < n_hidden[:, None]
    weight = (n_hideable / np.maximum(n_hidden, 1))[:, None]
    return Batch(
        tokens=np.where(hidden, MASK, rows.tokens),
        targets=np.where(hidden, rows.tokens, IGNORE),
        weights=np.where(hidden, weight, 0).astype(np.float32),
    )


# ------------------------------------------------------------------------------------ which tokens


@dataclass
class MicroBatch:
    """The rows of one forward pass of one process.

    index: its number among the parts of its objective in the step, over all processes
    n_scored: number of targets that are scored, each counted with its weight
    """

    objective: str
    index: int
    batch: Batch
    n_scored: float


class Batches:
    """Batches of any objective from an array of token ids.

    An epoch reads the ids as a ring and cuts them into rows of block_size from a new offset, in a
    new order: it sees every token once.
    max_mask_rate: the largest mask_rate that batch() will be asked for
    mask_span: mean length of what is hidden at once, 1 for single tokens, 3 as in ltg-bert
    """

    def __init__(
        self,
        ids: np.ndarray,
        vocab_size: int,
        block_size: int,
        batch_rows: int,
        seed: int,
        max_mask_rate: float = 0.15,
        mask_span: float = 1.0,
    ):
        self.ids = ids
        self.vocab_size = vocab_size
        # a text shorter than a row would be read round and round: what is hidden in one copy of it
        # could be read off the next
        self.block_size = min(block_size, len(ids))
        self.batch_rows = batch_rows
        self.seed = seed
        self.max_mask_rate = max_mask_rate
        self.mask_span = mask_span
        # the last row of an epoch may be short, and its last step may lack rows
        self.n_rows = math.ceil(len(ids) / self.block_size)
        self.steps_per_epoch = math.ceil(self.n_rows / batch_rows)
        self.order_epoch = None  # of which epoch self.order_rows is the order
        self.order_rows = None

    def order(self, epoch: int) -> np.ndarray:
        """Return the rows' numbers in the order of an epoch, (n_rows,)."""
        # sorting takes as long as many steps, so it is done once an epoch
        if self.order_epoch != epoch:
            rank = hash64(self.seed, ORDER, epoch, np.arange(self.n_rows))
            self.order_rows = np.argsort(rank, kind="stable")
            self.order_epoch = epoch
        return self.order_rows

    def offset(self, epoch: int) -> int:
        """Return the index in ids at which an epoch begins."""
        return int(hash64(self.seed, OFFSET, epoch)[0] % np.uint64(len(self.ids)))

    def slots(self, objective: str) -> int:
        """K of an objective: how many positions of a row may be hidden, at most."""
        # of the largest rate of the run, so that shapes stay the same from step to step
        rate = OBJECTIVES[objective].max_rate
        if rate is None:
            rate = self.max_mask_rate
        return math.ceil(rate * self.block_size)

    def split_rows(self, phase: Phase, step: int) -> dict[str, int]:
        """Return how many rows each objective has in a step of an epoch.

        The rows that the last step lacks are missed by all of them, in proportion.
        """
        counts = phase.split_rows(self.batch_rows)
        n_rows = min(self.batch_rows, self.n_rows - step * self.batch_rows)
        return dict(zip(counts, apportion(n_rows, list(counts.values())), strict=True))

    def rows(self, epoch: int, step: int, place: np.ndarray) -> Rows:
        """Return the tokens of rows of an optimizer step.

        place: (R,) numbers below batch_rows; -1 gives a row in which nothing is scored
        """
        # rows that do not exist read some row, of which nothing is scored
        number_in_epoch = step * self.batch_rows + place
        exists = (number_in_epoch < self.n_rows) & (place >= 0)
        number_in_epoch = np.minimum(number_in_epoch, self.n_rows - 1)
        number = self.order(epoch)[number_in_epoch][:, None]

        # positions count from this epoch's offset, and run on at the beginning of the text
        position = number * self.block_size + np.arange(self.block_size)
        inside = (position < len(self.ids)) & exists[:, None]
        place_in_text = position + self.offset(epoch)
        tokens = self.ids[place_in_text % len(self.ids)].astype(np.int64)
        following = self.ids[(place_in_text + 1) % len(self.ids)].astype(np.int64)
        return Rows(tokens, following, inside, number, place, self.seed, epoch, step)

    def batch(
        self, objective: str, epoch: int, step: int, place: np.ndarray, mask_rate: float
    ) -> Batch:
        """Return rows of an optimizer step with what an objective asks of them.

        Nothing is scored in rows past the end of the epoch and in those whose place is -1. With N
        rows in the step, floor(N * mask_rate * T) tokens are hidden whatever the text, unless a
        row has too few that are not special.
        """
        # which rows, then what is asked of them
        hiding = Hiding(mask_rate, self.mask_span, self.slots(objective), self.vocab_size)
        return OBJECTIVES[objective].build(self.rows(epoch, step, place), hiding)

    def part_sizes(self, phase: Phase, micro_rows: int, world: int) -> dict[str, tuple[int, int]]:
        """Return into how many parts each objective's rows are cut, and the rows of each part.

        The same at every step of the phase, so that a compiled model sees few shapes.
        """
        sizes = {}
        for objective, n_rows in phase.split_rows(self.batch_rows).items():
            n_parts = math.ceil(n_rows / (micro_rows * world)) * world
            sizes[objective] = (n_parts, math.ceil(n_rows / n_parts))
        return sizes

    def micro_batches(
        self,
        phase: Phase,
        epoch: int,
        step: int,
        mask_rate: float,
        micro_rows: int,
        rank: int = 0,
        world: int = 1,
    ) -> list[MicroBatch]:
        """Cut an optimizer step into forward passes and return those of process `rank` of `world`.

        Each objective's rows are cut into equal parts of at most micro_rows, as many for every
        process, because DDP waits until all have made equally many backward passes; rows of
        place -1 fill up the parts, and the last step of an epoch.
        """
        # the parts of all processes: objective, index, places of their rows
        parts = []
        start = 0
        # the objectives' rows follow one another in the step
        n_rows = self.split_rows(phase, step)
        for objective, (n_parts, size) in self.part_sizes(phase, micro_rows, world).items():
            places = np.full(n_parts * size, -1)
            places[: n_rows[objective]] = np.arange(start, start + n_rows[objective])
            for index, part in enumerate(places.reshape(n_parts, size)):
                parts.append((objective, index, part))
            start += n_rows[objective]

        # those of this process
        micro_batches = []
        for objective, index, part in parts[rank::world]:
            batch = self.batch(objective, epoch, step, part, mask_rate)
            micro_batches.append(MicroBatch(objective, index, batch, batch.n_scored))
        return micro_batches
