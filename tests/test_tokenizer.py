"""The tokenizer: what its pattern cuts, what training learns, what its file says, what it encodes.

    python -m pytest tests/test_tokenizer.py                  # about 10 s, no GPU
    python -m pytest tests/test_tokenizer.py -m "not slow"    # about 2 s

Two implementations must agree: the trainer with a naive one and with Hugging Face's, ids with
those of Hugging Face's tokenizer. Tests that need real text or that package skip without it.
"""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import regex

from antlm.tokenizer import (
    MASK,
    PATTERN,
    SPECIAL,
    START,
    Tokenizer,
    byte_alphabet,
    save_tokenizer,
    train_bpe,
)
from config import UserError

REAL_TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "babylm_10M"
TEXT = """= = = The pond = = =

*MOT: look at the ducks , do you see the ducks ?
*CHI: ducks !
A: I've got 12 ducks , they're quacking and quacking , quack quack .

= = = The thaw = = =
In March the ice went from the pond and the ducks came back to the pond .
Zwölf Enten schwimmen über den See , 十二只鸭子 , naïve café .
"""
ODD_TEXTS = [
    "",
    " ",
    "     ",
    "\n",
    "\n\n\n",
    "a\0b\0\0",
    "\t\tx \t y\t",
    "line\r\nline\r\n\r\n",
    "\ufeffbyte-order mark",
    "e\u0301a\u0308\u0323 x\u0301",
    "👩‍👩‍👧 👍🏽🇫🇮",
    "שלום עולם 123 مرحبا\u200f",
    "a\u2028b\u2029c\x85d",
    "\u00a0 \u3000x\u2009 y",
    "'s 'S 're'll don't ''",
    "x\x1c\x1d\x1e\x1fy",
    "\U0010ffff\ufffd\ufffe",
    "3.14 ²½ ١٢",
    "  lead and trail  \n  ",
    "= = = Title = = =",
    "a" * 300,
    "ab" * 150,
    "ह\u093fन\u094dद\u0940",
    "<s></s><mask><pad>",
]


def count_pieces(text: str) -> Counter:
    return Counter(regex.findall(PATTERN, text))


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(path, train_bpe(count_pieces(TEXT), 120))
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("I've seen they're 12 ducks, don't", "I|'ve| seen| they|'re| 12| ducks|,| don|'t"),
        ("it's we'll I'd I'm 'S 'tis", "it|'s| we|'ll| I|'d| I|'m| '|S| '|tis"),
        ("a \n\n\n  b\t\tc\r\n d  ", "a| |\n|\n|\n| | b|\t|\t|c|\r|\n| d|  "),
        ("*MOT: = = = x3 é世 ...?!", "*|MOT|:| =| =| =| x|3| é世| ...?!"),
    ],
)
def test_pattern_cuts_words_and_newlines(text, parts):
    assert regex.findall(PATTERN, text) == parts.split("|")


def test_the_byte_alphabet_has_printable_bytes_first_as_hugging_face_has_it():
    unprintable = {*range(33), *range(127, 161), 173}
    alphabet = byte_alphabet()
    assert list(alphabet) == sorted(range(256), key=lambda byte: (byte in unprintable, byte))
    pre_tokenizers = pytest.importorskip("tokenizers").pre_tokenizers
    assert sorted(alphabet.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())


# ------------------------------------------------------------------------------------ training


def naive_bpe(text: str, n_merges: int) -> list[tuple[bytes, bytes]]:
    """Byte-pair encoding as its paper has it: recount every pair before every merge."""
    tokens = [bytes([byte]) for byte in byte_alphabet()]
    words = []
    for piece, count in count_pieces(text).items():
        ids = [tokens.index(bytes([byte])) for byte in piece.encode()]
        words.append((ids, count))

    merges = []
    while len(merges) < n_merges:
        pair_counts = Counter()
        for ids, count in words:
            for pair in itertools.pairwise(ids):
                pair_counts[pair] += count
        if not pair_counts:
            break

        # the most frequent pair, ties to the smaller ids, becomes a token in every word
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
        for ids, _ in words:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i : i + 2] = [len(tokens)]
                i += 1
        first, second = best
        merges.append((tokens[first], tokens[second]))
        tokens.append(tokens[first] + tokens[second])
    return merges


@pytest.mark.parametrize(
    "text",
    ["", "x", "aaaa", "aaaaaaa aaaaa aaa", "abab", "abababa babab", "aabaab aab", "\n \n", TEXT],
)
def test_trainer_equals_the_naive_one(text):
    assert train_bpe(count_pieces(text), 60) == naive_bpe(text, 60)


@pytest.mark.parametrize("alphabet", ["a", "ab", "ab ", "abé世", "\0\t\r ", "'st \nab1"])
def test_trainer_equals_the_naive_one_on_random_text(alphabet):
    rng = random.Random(0)
    for _ in range(15):
        runs = [
            rng.choice(alphabet) * rng.choice([1, 1, 2, 3, 7]) for _ in range(rng.randrange(90))
        ]
        text = "".join(runs)
        n_merges = rng.randrange(1, 50)
        assert train_bpe(count_pieces(text), n_merges) == naive_bpe(text, n_merges), text


def real_text() -> str:
    """The beginnings of the files of BabyLM."""
    if not REAL_TEXT.is_dir():
        pytest.skip("no BabyLM text in ../shared/data/babylm_10M")
    parts = [path.open(encoding="utf-8").read(60_000) for path in sorted(REAL_TEXT.glob("*.train"))]
    return "".join(parts)


def drawn_text() -> str:
    """Words of few letters, so that many pairs are equally frequent."""
    rng = random.Random(3)
    return " ".join("".join(rng.choices("abcdé", k=rng.randrange(1, 9))) for _ in range(2000))


@pytest.mark.slow
@pytest.mark.parametrize("make_text, vocab_size", [(real_text, 3000), (drawn_text, 900)])
def test_trainer_equals_hugging_face(tmp_path, make_text, vocab_size):
    """To the last tie."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers, trainers

    text = make_text()
    reference = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    reference.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reference.train_from_iterator([text], trainer)
    reference.save(str(tmp_path / "reference.json"))
    save_tokenizer(tmp_path / "tokenizer.json", train_bpe(count_pieces(text), vocab_size - 260))

    expected = json.loads((tmp_path / "reference.json").read_text("utf-8"))["model"]
    model = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]
    assert model["vocab"] == expected["vocab"]
    assert [merge.split(" ") for merge in model["merges"]] == expected["merges"]


# ------------------------------------------------------------------------------------ encoding


def assert_same_as_hugging_face(reference, tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert reference.encode(text, add_special_tokens=False).ids == ids
    assert reference.encode(text).ids == [START, *ids]
    assert reference.decode(ids, skip_special_tokens=False) == text


def test_hugging_face_reads_the_file_and_gives_the_same_ids(tokenizer_path, tokenizer):
    reference = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tokenizer_path))
    assert reference.get_vocab_size() == tokenizer.vocab_size == 260 + 120
    for text in [TEXT, *ODD_TEXTS]:
        if "<s>" not in text:  # Hugging Face reads special tokens in text, we never do
            assert_same_as_hugging_face(reference, tokenizer, text)


@pytest.mark.slow
def test_characters_of_all_kinds_encode_as_with_hugging_face(tokenizer_path, tokenizer):
    """All of the first 12,000 characters and a sample of the others, by letters, digits, spaces."""
    reference = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tokenizer_path))
    numbers = [*range(12_000), *range(12_000, 0xD800, 7), *range(0xE000, 0x110000, 7 * 64)]
    for character in map(chr, numbers):
        text = f"a{character}b {character} 1{character}{character}\n{character}"
        assert_same_as_hugging_face(reference, tokenizer, text)


@pytest.mark.parametrize("text", [TEXT, *ODD_TEXTS])
def test_odd_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(MASK < token < tokenizer.vocab_size for token in ids)


def test_random_text_comes_back_and_encodes_line_by_line_as_a_whole(tokenizer):
    rng = random.Random(0)
    common = [*" \n\r\tab'1é=\u2028\u3000\u0301世👍", "<s>", " the", "\r\n"]
    for _ in range(500):
        rare = [chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))]
        text = "".join(rng.choices(common + rare, k=rng.randrange(40)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        by_line = []
        for line in text.split("\n"):
            by_line += tokenizer.encode(line + "\n")
        assert by_line[:-1] == ids


def test_text_that_spells_a_special_token_never_becomes_one(tokenizer):
    text = "<s>a <mask> b</s> <pad><pad>\n<s>"
    assert min(tokenizer.encode(text)) > MASK
    assert tokenizer.decode([START, *tokenizer.encode(text)]) == "<s>" + text


@pytest.mark.parametrize(
    "boundary, expected",
    [
        ("line", "<s>ducks swim<s>ice"),
        ("document", "<s>ducks swim\nice"),
        ("none", "\nducks swim\nice"),
    ],
)
def test_encode_text_puts_starts_where_the_boundary_has_them(tokenizer, boundary, expected):
    ids = tokenizer.encode_text("ducks swim\nice", boundary)
    assert tokenizer.decode(ids) == expected
    assert ids.count(START) == expected.count("<s>")


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 99_999, 100_001, 1_200_000])
@pytest.mark.parametrize("after", ["", "x", "\n"])
def test_a_million_spaces_in_a_row_are_cut(tmp_path, n, after):
    """tiktoken gives up on a million; runs below 100,000 are one piece, as in Hugging Face."""
    save_tokenizer(tmp_path / "t.json", [(b" ", b" "), (b"  ", b"  "), (b" ", b"x")])
    tokenizer = Tokenizer(tmp_path / "t.json")
    run = n
    rest = after
    if after == "x":  # the word takes the last space
        run = n - 1
        rest = " x"
    expected = tokenizer.encode("a")
    for start in range(0, run, 99_999):
        expected += tokenizer.encode(" " * min(99_999, run - start))
    expected += tokenizer.encode(rest)
    assert tokenizer.encode("a" + " " * n + after) == expected


# ------------------------------------------------------------------------------------- the file


def test_a_file_saved_by_hugging_face_is_read(tokenizer_path, tokenizer, tmp_path):
    reference = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tokenizer_path))
    reference.save(str(tmp_path / "saved.json"))
    saved = Tokenizer(tmp_path / "saved.json")
    assert saved.vocab_size == tokenizer.vocab_size
    assert saved.encode(TEXT) == tokenizer.encode(TEXT)


def set_pattern(content: dict):
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "a"}


def set_normalizer(content: dict):
    content["normalizer"] = {"type": "Lowercase"}


def lose_a_byte(content: dict):
    del content["model"]["vocab"]["a"]


def lose_a_merge(content: dict):
    content["model"]["merges"].pop()


def lose_the_model(content: dict):
    del content["model"]


@pytest.mark.parametrize(
    "change", [set_pattern, set_normalizer, lose_a_byte, lose_a_merge, lose_the_model]
)
def test_a_tokenizer_that_is_not_ours_is_refused_in_one_line(tokenizer_path, tmp_path, change):
    content = json.loads(tokenizer_path.read_text("utf-8"))
    change(content)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError) as error:
        Tokenizer(path)
    assert str(error.value).startswith(f"{path}: not a tokenizer.json of prepare.py")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b'{"model": null}', b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, raw):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)
    with pytest.raises(UserError, match="not a tokenizer.json of prepare.py"):
        Tokenizer(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read .*prepare\.py"):
        Tokenizer(tmp_path / "none.json")
