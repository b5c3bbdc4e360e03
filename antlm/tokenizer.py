"""Byte-level BPE: training, tokenizer.json and the tokenizer. No torch."""

import hashlib
import heapq
import json
from collections import Counter
from pathlib import Path

import numpy as np
import tiktoken

from antlm.files import Progress, write_json
from config import UserError

SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<mask>": 3}
PAD, START, END, MASK = SPECIAL.values()


# GPT-2's pattern with one change: a newline is always a piece of its own, so that a text gives the same tokens line by
# line and as a whole, and can be encoded in large blocks.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\n|[^\S\n]+(?!\S)|[^\S\n]+"
BOUNDARIES = ("line", "document", "none")  # what a start token stands in front of


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte; its order is the order of ids here, as in Hugging Face tokenizers."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


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


def save_tokenizer(path: Path, merges: list[tuple[bytes, bytes]]):
    """Write the tokenizer.json of these merges."""
    alphabet = byte_alphabet()
    write_json(path, tokenizer_json([tuple("".join(alphabet[b] for b in half) for half in pair) for pair in merges]))


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

    Raises UserError unless the file is what prepare.py writes for its merges: tiktoken would take any, drop the text that
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
                    raise ValueError(f"{part} is not what prepare.py writes")
            vocab, self.vocab_size = ours["model"]["vocab"], len(SPECIAL) + 256 + len(merges)
            if len(vocab) < self.vocab_size or not all(half in vocab for pair in merges for half in pair):
                raise ValueError("a merge gives a token that is there already, or has a half that is not")
            ranks = {bytes(byte[c] for c in token): i for token, i in vocab.items() if i > MASK}
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror}); prepare.py writes it") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{path}: not a tokenizer.json of prepare.py ({type(e).__name__}: {e})") from None
        self.dtype = np.dtype("uint16" if self.vocab_size <= 1 << 16 else "uint32")
        self.sha256 = hashlib.sha256(raw).hexdigest()
        # Tiktoken's engine gives up on a million spaces in a row; here so long a run is cut.
        pattern = PATTERN.replace(r"[^\S\n]+(?!", r"[^\S\n]{1,99999}(?!")
        self.bpe = tiktoken.Encoding("antlm", pat_str=pattern, mergeable_ranks=ranks, special_tokens=SPECIAL)

    def encode(self, text: str) -> list[int]:
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=()).tolist()
        except UnicodeEncodeError as e:
            raise UserError(f"text {ascii(text[:30])}: character {e.start} is half of a surrogate pair") from None

    def encode_text(self, text: str, boundary: str) -> list[int]:
        """Tokens of a text as it opens a corpus: a start token in front and, if the boundary is "line", per newline."""
        newline = self.encode("\n")[0]
        start = newline if boundary == "none" else START
        return [start] + [start if boundary == "line" and t == newline else t for t in self.encode(text)]

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(ids)
