"""Token file -> batches for every objective. No torch."""

import hashlib
import json
from pathlib import Path

import numpy as np

from antlm.tokenizer import BOUNDARIES, MASK, SPECIAL, Tokenizer
from config import UserError


class Corpus:
    """A folder of prepare.py, opened and checked against its meta.json; train and dev are read-only arrays of ids."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            self.boundary, self.tokenizer = self.meta["boundary"], Tokenizer(self.folder / "tokenizer.json")
            self.vocab_size = self.tokenizer.vocab_size
            self.check(self.folder / "tokenizer.json", self.meta, format=1, special=SPECIAL, vocab_size=self.vocab_size,
                       tokenizer_sha256=self.tokenizer.sha256)
            if self.boundary not in BOUNDARIES:
                raise ValueError(f"boundary {ascii(self.boundary)[:60]}")
            self.train, self.dev = self.open("train"), self.open("dev")
        except OSError as e:
            raise UserError(f"{e.filename or self.folder}: cannot be read ({e.strerror}); prepare.py writes it") from None
        except (ValueError, LookupError, TypeError, RecursionError) as e:
            raise UserError(f"{self.folder}/meta.json: not written by prepare.py ({type(e).__name__}: {e})") from None

    def check(self, path: Path, stated: dict, **found):
        for name, value in found.items():
            if stated[name] != value:
                raise UserError(f"{path}: {name} is {value}, but {ascii(stated[name])[:70]} in meta.json; "
                                "prepare the corpus again with prepare.py")

    def open(self, split: str) -> np.ndarray:
        stats, path, dtype = self.meta[split], self.folder / f"{split}.bin", self.tokenizer.dtype
        with open(path, "rb") as f:
            self.check(path, stats, file=path.name, dtype=dtype.name, tokens=path.stat().st_size / dtype.itemsize,
                       sha256=hashlib.file_digest(f, "sha256").hexdigest())
        ids = np.memmap(path, dtype, mode="r")
        self.check(path, stats, max_id=int(ids.max()))
        if stats["max_id"] >= self.vocab_size:
            raise UserError(f"{path}: token {stats['max_id']} in a vocabulary of {self.vocab_size}; prepare it again")
        if type(stats["words"]) is not int or not 0 < stats["words"] <= len(ids):
            raise ValueError(f"{split}: words {ascii(stats['words'])[:60]}")
        return ids


def hash64(*keys) -> np.ndarray:
    """Mix whole numbers or arrays of them (broadcast) into 64 random bits each (splitmix64, Steele et al. 2014).

    The only source of randomness in training data: a function of position, so a resumed run and one of any number of
    processes see the same batches, and no generator has a state to save.
    """
    h = np.zeros(1, np.uint64)
    for key in keys:
        h = (h ^ np.asarray(key, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def uniform(h: np.ndarray) -> np.ndarray:
    return (h >> np.uint64(11)) * 2.0 ** -53


ORDER, OFFSET, SPAN, CHOICE, KIND, TOKEN, DROPOUT = range(7)  # what a hash is for


class Batches:
    """Token-level CLM, MLM and MNTP batches from an array of ids, in an order that is a function of (seed, epoch).

    An epoch cuts the ids, read as a ring, into rows of block_size from a new offset, in a new order; each token is
    scored (CLM) or may be hidden (MLM, MNTP) once. slots: positions per row that go through the vocabulary head of a
    masked objective, at least the largest mask rate times block_size. span: mean length of what is hidden at once,
    1 for single tokens, 3 for the geometric spans of ltg-bert (Samuel et al. 2023).
    """

    def __init__(self, ids: np.ndarray, vocab_size: int, block_size: int, batch_rows: int, seed: int,
                 slots: int, span: float = 1.0):
        self.ids, self.vocab_size, self.T, self.batch_rows, self.seed = ids, vocab_size, block_size, batch_rows, seed
        self.slots, self.span = slots, span
        self.n_rows = -(-len(ids) // block_size)
        self.steps_per_epoch = -(-self.n_rows // batch_rows)
        self.ordered = -1, None

    def order(self, epoch: int) -> np.ndarray:
        if self.ordered[0] != epoch:
            self.ordered = epoch, np.argsort(hash64(self.seed, ORDER, epoch, np.arange(self.n_rows)), kind="stable")
        return self.ordered[1]

    def batch(self, objective: str, epoch: int, step: int, rows: np.ndarray, mask_rate: float):
        """Rows of one optimizer step -> tokens, targets (R, T) and, for a masked objective, scored (R, slots).

        rows: numbers below batch_rows, from which rank and micro-batch take their share; -1 and those past the end of
        the epoch come back unscored. targets are aligned with tokens, -100 where nothing is scored; all int64. scored
        names the positions whose target may be scored. With N rows in the step, floor(N * mask_rate * T) tokens are
        hidden whatever the text, unless a row has too few that are not special.
        """
        T, t = self.T, np.arange(self.T)
        place = step * self.batch_rows + rows
        chunk = self.order(epoch)[np.minimum(place, self.n_rows - 1)][:, None]  # (R, 1)
        at = chunk * T + t  # (R, T), counted from this epoch's offset
        inside = (at < len(self.ids)) & ((place < self.n_rows) & (rows >= 0))[:, None]
        offset = int(hash64(self.seed, OFFSET, epoch)[0] % np.uint64(len(self.ids)))
        tokens = self.ids[(at + offset) % len(self.ids)].astype(np.int64)
        if objective == "CLM":
            return tokens, np.where(inside, self.ids[(at + offset + 1) % len(self.ids)].astype(np.int64), -100), None

        key = (self.seed, epoch, chunk)
        shift = objective == "MNTP"  # the row's first token has no position before it
        eligible = inside & (tokens >= len(SPECIAL)) & (t >= shift)
        opens = uniform(hash64(*key, SPAN, t)) < 1 / self.span
        span = np.maximum.accumulate(np.where(opens, t, 0), axis=1)  # (R, T): where its span began
        # Whole spans in random order, tokens that may not be hidden last; the span at the edge is cut to the count.
        rank = np.where(eligible, hash64(*key, CHOICE, span) >> np.uint64(1), np.uint64(1 << 63))
        picked = np.argsort(rank, axis=1, kind="stable")[:, :self.slots]  # (R, slots)
        want = np.floor((rows + 1) * (mask_rate * T)) - np.floor(rows * (mask_rate * T))
        hide = (np.arange(self.slots) < want[:, None]) & np.take_along_axis(eligible, picked, 1)

        original = np.take_along_axis(tokens, picked, 1)
        kind = uniform(hash64(*key, KIND, np.take_along_axis(span, picked, 1)))  # one kind for a span
        random = len(SPECIAL) + hash64(*key, TOKEN, picked) % np.uint64(self.vocab_size - len(SPECIAL))
        shown = np.where(kind < 0.8, MASK, np.where(kind < 0.9, random.astype(np.int64), original))  # BERT: 80/10/10
        np.put_along_axis(tokens, picked, np.where(hide, shown, original), 1)
        scored = (picked - shift) % T  # the modulo only moves fillers, no row's first token is hidden
        targets = np.full_like(tokens, -100)
        r, s = np.nonzero(hide)
        targets[r, scored[r, s]] = original[r, s]
        return tokens, targets, scored
