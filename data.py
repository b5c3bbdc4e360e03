"""Text -> tokenizer -> token file, and token file -> batches. No torch.

    python data.py TEXT... --dev TEXT... --out corpora/babylm --vocab_size 16384

TEXT is a file or a folder of .train, .dev or .txt files in UTF-8. The folder --out then holds tokenizer.json,
train.bin, dev.bin (token ids, no header) and meta.json, which says what is in them.
"""

import argparse
import hashlib
import heapq
import json
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import tiktoken

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<mask>": 3}
PAD, START, END, MASK = SPECIAL.values()
# GPT-2's pattern with one change: a newline is always a piece of its own, so that a text gives the same tokens line by
# line and as a whole, and can be encoded in large blocks.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\n|[^\S\n]+(?!\S)|[^\S\n]+"
BOUNDARIES = ("line", "document", "none")  # what a start token stands in front of
TEXT = (".train", ".dev", ".txt")
BLOCK = 1 << 22  # bytes of text held at a time


class DataError(Exception):
    """One line for the user: which file, where, what was expected, what to do."""

    def __str__(self):  # one line, also where a file's name holds a newline
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


# ---------------------------------------------------------------------------------------------- reading text


def text_files(paths: list[str]) -> list[Path]:
    """Files named, and those in folders named that end in .train, .dev or .txt, sorted; raises DataError."""
    files = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in TEXT and f.is_file())
        if not found:
            what = "holds no .train, .dev or .txt file" if path.is_dir() else "does not exist"
            raise DataError(f"{path}: {what}; name text files or folders of them")
        files += found
    return files


def read_blocks(path: Path):
    """Yield the text in blocks of whole lines, each ended by a newline; raises DataError at invalid UTF-8.

    What Windows adds goes: a byte-order mark in front, and the \\r of \\r\\n.
    """
    offset = 0
    with open(path, "rb") as f:
        while block := b"".join(f.readlines(BLOCK)):
            try:
                text = block.decode().removeprefix("" if offset else "\ufeff").replace("\r\n", "\n")
            except UnicodeDecodeError as e:
                raise DataError(f"{path}: byte {offset + e.start} is not valid UTF-8 (0x{block[e.start]:02x}); "
                                "convert the file, e.g. with iconv -t utf-8") from None
            yield text if text.endswith("\n") else text + "\n"
            offset += len(block)


class Progress:
    """A line on stderr with the time left, every few seconds."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.start, self.shown = what, total, time.time(), time.time()

    def __call__(self, done: int):
        now = time.time()
        if now - self.shown > 3 and done:
            left = (now - self.start) * (self.total / done - 1)
            print(f"{self.what}: {done / self.total:.0%}, about {left:.0f} s left", file=sys.stderr, flush=True)
            self.shown = now


# -------------------------------------------------------------------------------------- byte-level BPE training


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte; its order is the order of ids here, as in Hugging Face tokenizers."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def count_pieces(files: list[Path]) -> Counter:
    """How often the pattern finds each piece of text in the files."""
    counts, find = Counter(), regex.compile(PATTERN).findall
    progress, done = Progress("counting words", sum(f.stat().st_size for f in files)), 0
    for path in files:
        for block in read_blocks(path):
            counts.update(find(block))
            progress(done := done + len(block))
    return counts


def train_bpe(counts: Counter, n_merges: int) -> list[tuple[bytes, bytes]]:
    """Byte-pair merges in order: always the most frequent pair, ties to the smaller ids (Sennrich et al. 2016).

    All pieces lie in one array of ids. Every place of a pair exists once its younger half has been made, so each pair
    keeps one array of places for good, and a merge touches only those. Equal to Hugging Face's BpeTrainer, ties
    included. Fewer merges come back where the text has no pair left.
    """
    names = [bytes([b]) for b in byte_alphabet()]
    rank = np.argsort(list(byte_alphabet()))  # of each byte: its id
    pieces = [piece.encode() for piece in counts]
    ids = rank[np.frombuffer(b"".join(pieces), np.uint8)]
    lengths = np.array([len(piece) for piece in pieces])
    weight = np.repeat(np.array(list(counts.values())), lengths)  # of each place: count of its piece
    n = len(ids)
    left, right = np.arange(n) - 1, np.arange(n) + 1  # neighbours within the piece, n (a sentinel) where there is none
    ends = np.cumsum(lengths)
    left[ends - lengths], right[ends - 1] = n, n
    ids = np.append(ids, -1)

    pair_count, places, heap, known = {}, {}, [], set(names)
    merging = np.zeros(n + 1, bool)  # places where the current pair starts

    def add(first: np.ndarray, second: np.ndarray, where: np.ndarray):  # new pairs, by place of their first half
        key = first << 32 | second
        order = np.argsort(key, kind="stable")
        key, where = key[order], where[order]
        starts = np.flatnonzero(np.append(True, key[1:] != key[:-1])) if len(key) else []
        totals = np.add.reduceat(weight[where], starts) if len(key) else []
        for k, total, at in zip(key[starts].tolist(), totals, np.split(where, starts[1:])):
            pair_count[k], places[k] = int(total), at
            heapq.heappush(heap, (-int(total), k))

    first = np.flatnonzero(right < n)
    add(ids[first], ids[right[first]], first)
    merges, progress = [], Progress("merging pairs", n_merges)
    while heap and len(merges) < n_merges:
        count, key = heapq.heappop(heap)
        if -count != pair_count[key]:  # it has shrunk since; look again when its turn comes
            if pair_count[key] > 0:
                heapq.heappush(heap, (-pair_count[key], key))
            continue
        a, b, new = key >> 32, key & 0xFFFFFFFF, len(names)
        if names[a] + names[b] in known:  # another pair made these bytes, and a token has one pair
            pair_count[key] = 0
            continue
        at = np.sort(places.pop(key))
        at = at[(ids[at] == a) & (ids[right[at]] == b)]
        if a == b:  # in a run such as aaa only every other pair can merge, from the left
            i, opens = np.arange(len(at)), np.append(True, right[at[:-1]] != at[1:])  # opens a run
            at = at[(i - np.maximum.accumulate(np.where(opens, i, 0))) % 2 == 0]
        second = right[at]
        before, after = left[at], right[second]
        merging[at] = True
        lone = ~merging[after] & (after < n)  # elsewhere the pair to the right is the next merge's pair to the left
        merging[at] = False
        has_left = before < n
        for x, y, w in ((ids[before], ids[at], has_left), (ids[second], ids[after], lone)):
            gone, index = np.unique(x[w] << 32 | y[w], return_inverse=True)
            for k, loss in zip(gone.tolist(), np.bincount(index, weight[at[w]]).astype(np.int64).tolist()):
                pair_count[k] -= loss
        pair_count[key] = 0
        ids[at], ids[second] = new, -1
        right[at] = after
        left[after[after < n]] = at[after < n]
        before = left[at]
        where = np.concatenate((before[has_left], at[lone]))
        add(ids[where], ids[right[where]], where)
        merges.append((names[a], names[b]))
        names.append(names[a] + names[b])
        known.add(names[new])
        progress(len(merges))
    return merges


# ------------------------------------------------------------------------------------------------ tokenizer


def save_tokenizer(path: Path, merges: list[tuple[bytes, bytes]]):
    """Write the tokenizer.json of these merges."""
    alphabet = byte_alphabet()
    json_write(path, tokenizer_json([tuple("".join(alphabet[b] for b in half) for half in pair) for pair in merges]))


def tokenizer_json(merges: list[tuple[str, str]]) -> dict:
    """Content of Hugging Face's tokenizer.json: `tokenizers` and `transformers` read it as it is."""
    special = [{"id": i, "content": s, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for s, i in SPECIAL.items()]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    a, b = ({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
    tokens = [*SPECIAL, *byte_alphabet().values(), *(first + second for first, second in merges)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": {"type": "TemplateProcessing", "single": [start, a], "pair": [start, a, start, b],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [START], "tokens": ["<s>"]}}},
        "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": [" ".join(pair) for pair in merges]}}


class Tokenizer:
    """A tokenizer.json read into tiktoken. encode never yields a special token, whatever the text says.

    Raises DataError unless the file is what data.py writes for its merges: tiktoken would take any, drop the text that
    another pattern does not match, and end the process for want of a byte.
    """

    def __init__(self, path: Path):
        try:
            raw = Path(path).read_bytes()
            content = json.loads(raw)
            merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"]["merges"]]
            ours, byte = tokenizer_json(merges), {c: b for b, c in byte_alphabet().items()}
            content["model"]["merges"] = ours["model"]["merges"]  # some versions of `tokenizers` write lists of two
            for part in ("normalizer", "pre_tokenizer", "model"):
                if content[part] != ours[part]:
                    raise ValueError(f"{part} is not what data.py writes")
            vocab, self.vocab_size = ours["model"]["vocab"], len(SPECIAL) + 256 + len(merges)
            if len(vocab) < self.vocab_size or not all(half in vocab for pair in merges for half in pair):
                raise ValueError("a merge gives a token that is there already, or has a half that is not")
            ranks = {bytes(byte[c] for c in token): i for token, i in vocab.items() if i > MASK}
        except OSError as e:
            raise DataError(f"{path}: cannot be read ({e.strerror}); data.py writes it") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise DataError(f"{path}: not a tokenizer.json of data.py ({type(e).__name__}: {e})") from None
        self.dtype = np.dtype("uint16" if self.vocab_size <= 1 << 16 else "uint32")
        self.sha256 = hashlib.sha256(raw).hexdigest()
        # Tiktoken's engine gives up on a million spaces in a row; here so long a run is cut.
        pattern = PATTERN.replace(r"[^\S\n]+(?!", r"[^\S\n]{1,99999}(?!")
        self.bpe = tiktoken.Encoding("antlm", pat_str=pattern, mergeable_ranks=ranks, special_tokens=SPECIAL)

    def encode(self, text: str) -> list[int]:
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=()).tolist()
        except UnicodeEncodeError as e:
            raise DataError(f"text {ascii(text[:30])}: character {e.start} is half of a surrogate pair") from None

    def encode_text(self, text: str, boundary: str) -> list[int]:
        """Tokens of a text as it opens a corpus: a start token in front and, if the boundary is "line", per newline."""
        newline = self.encode("\n")[0]
        start = newline if boundary == "none" else START
        return [start] + [start if boundary == "line" and t == newline else t for t in self.encode(text)]

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(ids)


def json_write(path: Path, content: dict):
    text = json.dumps(content, ensure_ascii=False, indent=1)
    Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")  # for a path that is not UTF-8


# ----------------------------------------------------------------------------------------------- token files


def place_starts(ids: np.ndarray, boundary: str, newline: int, heading: list[int], fresh: bool):
    """Put start tokens into the ids of whole lines; blank lines go.

    A document opens at the start of a file, after a blank line and at a line that starts with `heading` ("= = =").
    fresh: does the first line open one? -> ids, number of documents that opened, does the next block open one?
    """
    opens_line = np.append(True, ids[:-1] == newline)
    blank = opens_line & (ids == newline)
    first = opens_line & ~blank
    after_blank = np.append(fresh, blank[:-1])
    is_heading = first.copy()
    for i, token in enumerate(heading):
        is_heading &= np.append(ids[i:], np.full(min(i, len(ids)), -1)) == token
    document = first & (after_blank | is_heading)
    keep = ids != newline if boundary == "line" else ~blank
    at = {"line": first, "document": document, "none": np.zeros_like(first)}[boundary]
    copies = keep.astype(np.int64) + at  # a token that a start precedes stands twice, the first of the two becomes it
    out = np.repeat(ids, copies)
    out[(np.cumsum(copies) - copies)[at]] = START
    return out, int(document.sum()), bool(blank[-1])


def encode_files(files: list[Path], out: Path, tokenizer: Tokenizer, boundary: str) -> dict:
    """Encode text files into one token file -> what meta.json says of it. Memory grows with the longest line only."""
    newline, heading = tokenizer.encode("\n")[0], tokenizer.encode("= = =")
    stats = dict(file=out.name, dtype=tokenizer.dtype.name, tokens=0, words=0, bytes=0, documents=0, max_id=0)
    digest = hashlib.sha256()
    progress, total = Progress("encoding", sum(f.stat().st_size for f in files)), 0
    with open(out, "wb") as f:
        for path in files:
            fresh = True
            for block in read_blocks(path):
                ids = tokenizer.bpe.encode_to_numpy(block, disallowed_special=())
                ids, documents, fresh = place_starts(ids, boundary, newline, heading, fresh)
                raw = ids.astype(tokenizer.dtype).tobytes()
                f.write(raw)
                digest.update(raw)
                stats["tokens"] += len(ids)
                stats["words"] += len(block.split())
                stats["documents"] += documents
                stats["max_id"] = max(stats["max_id"], int(ids.max(initial=0)))
                progress(total := total + len(block))
            stats["bytes"] += path.stat().st_size
    if not stats["words"]:
        raise DataError(f"{files[0]}: the {len(files)} input file(s) hold no words")
    return stats | {"sha256": digest.hexdigest()}


def prepare(train: list[str], dev: list[str], out: str, vocab_size: int = 16384, boundary: str = "line",
            tokenizer: str | None = None) -> dict:
    """Text to a corpus folder -> meta. The folder appears whole or not at all; raises DataError.

    tokenizer: an existing tokenizer.json to encode with instead of training one (arms of an experiment share theirs).
    """
    folder, train_files, dev_files = Path(out), text_files(train), text_files(dev)
    if folder.exists():
        raise DataError(f"{folder}: exists already; remove it or choose another --out")
    if boundary not in BOUNDARIES:
        raise DataError(f"--boundary must be one of {', '.join(BOUNDARIES)}, not {boundary!r}")
    smallest = len(SPECIAL) + 256
    if (n_merges := vocab_size - smallest) < 0:
        raise DataError(f"--vocab_size {vocab_size}: must be at least {smallest}, for bytes and special tokens")
    part = next(parent for parent in folder.parents if parent.exists()) / f".{folder.name}.{os.getpid()}"
    part.mkdir()
    try:
        if tokenizer:
            tok = Tokenizer(tokenizer)  # of the user's file, so that an error names it and not the copy
            shutil.copy(tokenizer, part / "tokenizer.json")
        else:
            counts = count_pieces(train_files)
            if all(piece.isspace() for piece in counts):
                raise DataError(f"{train_files[0]}: the {len(train_files)} input file(s) hold no words")
            merges = train_bpe(counts, n_merges)
            if len(merges) < n_merges:
                print(f"the text has pairs for {len(merges)} merges: {len(merges) + smallest} tokens, not {vocab_size}")
            save_tokenizer(part / "tokenizer.json", merges)
            tok = Tokenizer(part / "tokenizer.json")
        meta = {"format": 1, "boundary": boundary, "vocab_size": tok.vocab_size, "special": SPECIAL,
                "tokenizer_sha256": tok.sha256,
                "train": encode_files(train_files, part / "train.bin", tok, boundary),
                "dev": encode_files(dev_files, part / "dev.bin", tok, boundary),
                "settings": dict(train=train, dev=dev, vocab_size=vocab_size, tokenizer=tokenizer)}
        json_write(part / "meta.json", meta)
        folder.parent.mkdir(parents=True, exist_ok=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return meta


class Corpus:
    """A folder of data.py, opened and checked against its meta.json; train and dev are read-only arrays of ids."""

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
            raise DataError(f"{e.filename or self.folder}: cannot be read ({e.strerror}); data.py writes it") from None
        except (ValueError, LookupError, TypeError, RecursionError) as e:
            raise DataError(f"{self.folder}/meta.json: not written by data.py ({type(e).__name__}: {e})") from None

    def check(self, path: Path, stated: dict, **found):
        for name, value in found.items():
            if stated[name] != value:
                raise DataError(f"{path}: {name} is {value}, but {ascii(stated[name])[:70]} in meta.json; "
                                "prepare the corpus again with data.py")

    def open(self, split: str) -> np.ndarray:
        stats, path, dtype = self.meta[split], self.folder / f"{split}.bin", self.tokenizer.dtype
        with open(path, "rb") as f:
            self.check(path, stats, file=path.name, dtype=dtype.name, tokens=path.stat().st_size / dtype.itemsize,
                       sha256=hashlib.file_digest(f, "sha256").hexdigest())
        ids = np.memmap(path, dtype, mode="r")
        self.check(path, stats, max_id=int(ids.max()))
        if stats["max_id"] >= self.vocab_size:
            raise DataError(f"{path}: token {stats['max_id']} in a vocabulary of {self.vocab_size}; prepare it again")
        if type(stats["words"]) is not int or not 0 < stats["words"] <= len(ids):
            raise ValueError(f"{split}: words {ascii(stats['words'])[:60]}")
        return ids


# --------------------------------------------------------------------------------------------------- batches


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", nargs="+", metavar="TEXT", help="training text: files, folders of .train, .dev, .txt")
    parser.add_argument("--dev", nargs="+", required=True, metavar="TEXT", help="development text, likewise")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--vocab_size", type=int, default=16384, help="tokens, 4 special ones and 256 bytes among them")
    parser.add_argument("--boundary", default="line", choices=BOUNDARIES, help="what a start token stands in front of")
    parser.add_argument("--tokenizer", help="encode with this tokenizer.json instead of training one")
    parser.error = lambda message: sys.exit(f"data.py: {message}")
    args, began = parser.parse_args(), time.time()
    try:
        meta = prepare(**vars(args))
    except (DataError, OSError) as e:
        sys.exit(f"data.py: {e}")
    sys.stdout.reconfigure(errors="backslashreplace")  # for a path that is not UTF-8
    for s in (meta["train"], meta["dev"]):
        print(f"{args.out}/{s['file']}: {s['words']:,} words, {s['tokens']:,} tokens, {s['documents']:,} documents")
    print(f"{args.out}: vocabulary of {meta['vocab_size']:,}, boundary {args.boundary}; {time.time() - began:.0f} s")
