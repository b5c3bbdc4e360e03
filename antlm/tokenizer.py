"""Byte-level BPE: training, tokenizer.json and the tokenizer. No torch.

A text is cut into pieces (words, numbers, punctuation, spaces) by a regular expression, a piece is
its UTF-8 bytes, and merges join neighbours into longer tokens. Ids are numbered in this order:
special tokens, the 256 bytes, then one token for each merge.
"""

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

# GPT-2's pattern with one change: a newline is always a piece of its own. A text then gives the
# same tokens line by line and as a whole, and can be encoded in large blocks.
WORDS = (
    r"'(?:[sdmt]|ll|ve|re)"  # the ends of it's, I'd, we'll, ...
    r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"  # letters, digits, others; with a space in front
    r"|\n"
)
SPACES = r"[^\S\n]+(?!\S)|[^\S\n]+"  # without the one that a word takes
PATTERN = f"{WORDS}|{SPACES}"
BOUNDARIES = ("line", "document", "none")  # what a start token stands in front of


def byte_alphabet() -> dict[int, str]:
    """Return GPT-2's printable character for each byte, in the order in which ids are given.

    Bytes that are printable in Latin-1 come first and stand for themselves; the others get the
    characters from 256 on. Order and characters are those of Hugging Face tokenizers.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in printable:
            alphabet[byte] = chr(256 + len(alphabet) - len(printable))
    return alphabet


# ---------------------------------------------------------------------------------- training


class Pairs:
    """The pairs of neighbouring tokens in a text: how often each occurs, and where.

    The pieces lie one behind the other in arrays; a place is an index into them, and `end` is the
    place that stands for no neighbour.
    ids[place]: the token there; -1 once a merge has joined it to the token on its left
    left[place], right[place]: places of the neighbours within the piece
    weight[place]: how often the text has the piece
    counts[pair]: how often the text has the pair
    places[pair]: where the first halves of the pair stand

    A pair is one number, first id * 2**32 + second id, so that NumPy can sort pairs. The order of
    these numbers is the order of (first id, second id).

    All places of a pair come into being together, in the merge that makes the younger of its two
    tokens. So its places are written down once and never added to; those that later merges
    have destroyed are sorted out when the pair's own turn comes. A merge therefore touches the
    places of its pair only, not the whole text.
    """

    def __init__(self, piece_counts: Counter):
        pieces = [piece.encode() for piece in piece_counts]
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        piece_weights = np.array(list(piece_counts.values()), np.int64)
        self.weight = np.repeat(piece_weights, lengths)

        # bytes are numbered in the order of the alphabet
        id_of_byte = np.argsort(list(byte_alphabet()))
        ids = id_of_byte[np.frombuffer(b"".join(pieces), np.uint8)]
        self.end = len(ids)
        self.ids = np.append(ids, -1)  # ids[end] equals no token

        # neighbours, cut at the borders of pieces
        piece_end = np.cumsum(lengths)
        self.left = np.arange(self.end) - 1
        self.left[piece_end - lengths] = self.end
        self.right = np.arange(self.end) + 1
        self.right[piece_end - 1] = self.end

        # all pairs of bytes
        self.counts = {}
        self.places = {}
        self.heap = []  # (-count, pair): the smallest entry is the next merge
        self.is_merging = np.zeros(self.end + 1, bool)  # scratch memory of merge()
        self.add(np.flatnonzero(self.right < self.end))

    def group(self, places: np.ndarray):
        """Yield (pair, count, its places) for the pairs whose first halves stand at the places."""
        if len(places) == 0:
            return
        # sort the places by pair; the stable sort keeps their order within a pair
        pairs = (self.ids[places] << 32) | self.ids[self.right[places]]
        order = np.argsort(pairs, kind="stable")
        pairs = pairs[order]
        places = places[order]

        # cut where one pair ends and the next begins
        starts = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1]))
        stops = np.append(starts[1:], len(places))
        counts = np.add.reduceat(self.weight[places], starts)
        groups = (pairs[starts].tolist(), counts.tolist(), starts.tolist(), stops.tolist())
        for pair, count, start, stop in zip(*groups, strict=True):
            yield pair, count, places[start:stop]

    def add(self, places: np.ndarray):
        """Enter new pairs; the places are all that they have."""
        for pair, count, pair_places in self.group(places):
            self.counts[pair] = count
            self.places[pair] = pair_places
            heapq.heappush(self.heap, (-count, pair))

    def remove(self, places: np.ndarray):
        """Take the pairs at these places out of the counts."""
        for pair, count, _ in self.group(places):
            self.counts[pair] -= count

    def pop_most_frequent(self) -> int | None:
        """Return the pair with the largest count, ties to the smaller ids; None if no pair is left.

        Counts only fall, so an entry of the heap may promise too much, never too little. One that
        does goes back with its present count.
        """
        while self.heap:
            negative_count, pair = heapq.heappop(self.heap)
            count = self.counts[pair]
            if count == -negative_count:
                return pair
            if count > 0:
                heapq.heappush(self.heap, (-count, pair))
        return None

    def merge(self, pair: int, new_id: int):
        """Replace both halves of the pair by the new token, wherever they stand."""
        first_id = pair >> 32
        second_id = pair & 0xFFFFFFFF

        # the places at which the pair still stands
        first = np.sort(self.places.pop(pair))
        is_left = (self.ids[first] == first_id) & (self.ids[self.right[first]] == second_id)
        first = first[is_left]
        if first_id == second_id:
            first = leftmost(first, self.right)
        second = self.right[first]
        before = self.left[first]
        after = self.right[second]

        # Around each place the pairs (before, first) and (second, after) go. Where two merges
        # touch, as ab does in abab, the pair between them is counted with the right-hand one.
        has_before = before < self.end
        self.is_merging[first] = True
        has_after = (after < self.end) & ~self.is_merging[after]
        self.is_merging[first] = False
        self.remove(np.concatenate((before[has_before], second[has_after])))

        # the new token stands at the place of the first half; the second half drops out
        self.ids[first] = new_id
        self.ids[second] = -1
        self.right[first] = after
        self.left[after[after < self.end]] = first[after < self.end]

        # what stands in front may itself be a new token now, so `before` is read again
        before = self.left[first]
        self.add(np.concatenate((before[has_before], first[has_after])))


def leftmost(places: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return those places, from the left, at which a pair of two equal tokens can merge.

    In a run such as aaaaa the pair aa stands at four places that overlap; the first and the third
    merge, and one a remains.
    """
    chosen = []
    taken = -1  # the second half of the last chosen pair
    for place in places.tolist():
        if place != taken:
            chosen.append(place)
            taken = right[place]
    return np.array(chosen, dtype=np.int64)


def train_bpe(piece_counts: Counter, n_merges: int) -> list[tuple[bytes, bytes]]:
    """Learn byte-pair merges from the pieces of a text (Sennrich et al. 2016, algorithm 1).

    piece_counts: how often the text has each piece
    Returns the merges in order, fewer than n_merges if no pair is left.

    The result is that of the naive algorithm, which would need days for 10M words:

        while len(merges) < n_merges:
            counts = count of each pair of neighbours in all pieces
            a, b = the pair with the largest count, ties to the smaller ids
            replace a, b by a new token in all pieces, from left to right

    tests/test_tokenizer.py spells it out and compares with it and with Hugging Face's BpeTrainer.
    """
    pairs = Pairs(piece_counts)
    tokens = [bytes([byte]) for byte in byte_alphabet()]
    merges = []
    progress = Progress("merging pairs", n_merges)
    while len(merges) < n_merges:
        pair = pairs.pop_most_frequent()
        if pair is None:
            break
        pairs.merge(pair, new_id=len(tokens))

        # the same merge in bytes
        first = tokens[pair >> 32]
        second = tokens[pair & 0xFFFFFFFF]
        merges.append((first, second))
        tokens.append(first + second)
        progress(len(merges))
    return merges


# ----------------------------------------------------------------------------- tokenizer.json


SPLIT = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,  # the offsets of a word include the space in front
    "use_regex": False,  # SPLIT has cut the text already
}
NO_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

# <s> A, or for a pair of texts <s> A <s> B
START_TOKEN = {"SpecialToken": {"id": "<s>", "type_id": 0}}
TEXT_A = {"Sequence": {"id": "A", "type_id": 0}}
TEXT_B = {"Sequence": {"id": "B", "type_id": 0}}
START_IN_FRONT = {
    "type": "TemplateProcessing",
    "single": [START_TOKEN, TEXT_A],
    "pair": [START_TOKEN, TEXT_A, START_TOKEN, TEXT_B],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [START], "tokens": ["<s>"]}},
}


def save_tokenizer(path: Path, merges: list[tuple[bytes, bytes]]):
    """Write the tokenizer.json of these merges."""
    # Latin-1 reads a byte as the character of that number, which the alphabet then replaces
    alphabet = byte_alphabet()
    printable = []
    for first, second in merges:
        first_text = first.decode("latin-1").translate(alphabet)
        second_text = second.decode("latin-1").translate(alphabet)
        printable.append((first_text, second_text))
    write_json(path, tokenizer_json(printable))


def tokenizer_json(merges: list[tuple[str, str]]) -> dict:
    """Return the content of a tokenizer.json, which `tokenizers` and `transformers` read as it is.

    merges: pairs of tokens, written in the byte alphabet
    """
    tokens = [*SPECIAL, *byte_alphabet().values()]
    tokens += [first + second for first, second in merges]
    special = [
        {"id": number, "content": token, **NO_FLAGS, "special": True}
        for token, number in SPECIAL.items()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]},
        "post_processor": START_IN_FRONT,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [f"{first} {second}" for first, second in merges],
        },
    }


# -------------------------------------------------------------------------------- tokenizer


def read_merges(raw: bytes) -> list[tuple[str, str]]:
    """Return the merges in a tokenizer.json.

    Raises ValueError unless the file cuts text as we do and has the vocabulary of its merges:
    tiktoken would read any, and silently drop the text that another pattern does not match.
    """
    content = json.loads(raw)
    merges = content["model"]["merges"]
    if merges and isinstance(merges[0], str):
        merges = [tuple(pair.split(" ")) for pair in merges]
    expected = tokenizer_json(merges)
    # newer versions of `tokenizers` save a merge as a list of two
    content["model"]["merges"] = expected["model"]["merges"]
    for part in ("normalizer", "pre_tokenizer", "model"):
        if content[part] != expected[part]:
            raise ValueError(f"its {part} is another one")
    return merges


class Tokenizer:
    """Encode text with a tokenizer.json, by tiktoken.

    encode never yields a special token, whatever the text says.
    vocab_size: number of ids; dtype: the smallest that holds them; sha256: of the file
    bpe: the tiktoken.Encoding
    Raises UserError unless the file is one that prepare.py writes.
    """

    def __init__(self, path: Path):
        try:
            raw = Path(path).read_bytes()
            merges = read_merges(raw)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); prepare.py writes it"
            ) from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: not a tokenizer.json of prepare.py ({type(error).__name__}: {error}); "
                "make one with prepare.py, or convert one with tools/import_hf.py"
            ) from None
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self.vocab_size = len(SPECIAL) + 256 + len(merges)
        self.dtype = np.dtype("uint16")
        if self.vocab_size > 1 << 16:
            self.dtype = np.dtype("uint32")

        # tiktoken merges by rank, and its ranks are our ids
        byte_of = {character: byte for byte, character in byte_alphabet().items()}
        tokens = [*byte_of, *(first + second for first, second in merges)]
        ranks = {}
        for number, token in enumerate(tokens, start=len(SPECIAL)):
            ranks[bytes(byte_of[character] for character in token)] = number
        # its engine gives up on a million spaces in a row, so we cut such a run; and it takes a
        # quarter less time if all that has no look-ahead is one group
        pattern = f"(?:{WORDS})|{SPACES}".replace(r"[^\S\n]+(?!", r"[^\S\n]{1,99999}(?!")
        self.bpe = tiktoken.Encoding(
            "antlm", pat_str=pattern, mergeable_ranks=ranks, special_tokens=SPECIAL
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without a start token."""
        return self.bpe.encode_to_numpy(text, disallowed_special=()).tolist()

    def encode_text(self, text: str, boundary: str) -> list[int]:
        """Return the ids of a text as a corpus with this boundary would begin with it.

        A start token stands in front and, if the boundary is "line", in place of each newline.
        With "none", which has no start tokens, a newline stands in front, as after another line.
        """
        newline = self.encode("\n")[0]
        ids = self.encode(text)
        if boundary == "none":
            return [newline, *ids]
        if boundary == "line":
            ids = [START if token == newline else token for token in ids]
        return [START, *ids]

    def decode(self, ids: list[int]) -> str:
        """Return the text of these ids; special tokens appear by name."""
        return self.bpe.decode(ids)
