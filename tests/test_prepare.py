"""prepare.py: where start tokens stand, what meta.json says, what bad text says.

    python -m pytest tests/test_prepare.py                  # about 10 s, no GPU
    python -m pytest tests/test_prepare.py -m "not slow"    # about 3 s

Token files must agree with a few lines of plain Python that place the starts line by line.
"""

import gzip
import hashlib
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import experiment
import numpy as np
import pytest
import regex

import prepare
from antlm.tokenizer import BOUNDARIES, MASK, PATTERN, START, Tokenizer, save_tokenizer, train_bpe
from config import UserError
from data import Corpus

PROGRAM = Path(__file__).resolve().parents[1] / "prepare.py"
TEXT = """= = = The pond = = =

*MOT: look at the ducks , do you see the ducks ?
A: I've got 12 ducks , they're quacking and quacking , quack quack .

= = = The thaw = = =
In March the ice went from the pond and the ducks came back to the pond .
Zwölf Enten schwimmen über den See , 十二只鸭子 , naïve café .
"""
GOOD = "look at the ducks on the ice\n"
GOOD_DEV = "look at the ice on the pond\n"


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT, "utf-8")
    merges = train_bpe(prepare.count_pieces([folder / "text.txt"]), 120)
    save_tokenizer(folder / "tokenizer.json", merges)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


def write_texts(folder: Path, split: str, texts: list) -> list[str]:
    """Write each text (or bytes) to a file 0.train, 1.train, ... and return the paths."""
    paths = []
    for i, text in enumerate(texts):
        path = folder / f"{i}.{split}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        paths.append(str(path))
    return paths


def make_corpus(folder: Path, train: list, dev: list = (GOOD_DEV,), **options) -> Corpus:
    """Prepare a corpus in folder/corpus from these texts."""
    folder.mkdir(exist_ok=True)
    train_paths = write_texts(folder, "train", train)
    dev_paths = write_texts(folder, "dev", dev)
    prepare.prepare(train_paths, dev_paths, str(folder / "corpus"), **options)
    return Corpus(folder / "corpus")


def decode(corpus: Corpus, split: str = "train") -> str:
    ids = getattr(corpus, split).tolist()
    return corpus.tokenizer.bpe.decode_bytes(ids).decode()


# ---------------------------------------------------------------------------------- start tokens


def plain_corpus(texts: list[str], boundary: str) -> tuple[str, int]:
    """Return what a decoded token file reads, and how many documents open, line by line."""
    content = ""
    n_documents = 0
    for text in texts:
        opens_document = True
        for line in re.sub("\r{0,2}\n|\r", "\n", text).removesuffix("\n").split("\n"):
            if line == "":
                opens_document = True
                continue
            if line.startswith("= = ="):
                opens_document = True
            n_documents += opens_document
            if boundary == "line" or (boundary == "document" and opens_document):
                content += "<s>"
            content += line
            if boundary != "line":
                content += "\n"
            opens_document = False
    return content, n_documents


LINES = [
    "",
    "",
    "duck",
    "= = = Pond = = =",
    "= = =",
    "= = no",
    "a = = = b",
    "x" * 40,
    "?",
    " ",
    "\t ",
]
LINES += ["é世界 ice", "the ice\r", "a\rb", "\0", "\x85\u2028\u2029\u3000\xa0", "\x1c\x1d\x0b\x0c"]
LINES += [
    "e\u0301\u0323",
    "👩‍👩‍👧 👍🏽🇫🇮",
    "\u202eשלום עולם\u200f",
    "<s></s><mask><pad>",
    "\U0010ffff\ufffe",
]


def odd_texts() -> list[str]:
    rng = random.Random(1)
    texts = [
        TEXT,
        "",
        "no newline at the end",
        "\n\n\n",
        "\n\nblank lines first\n",
        "\n",
        "= = = Title = = =\nline\n= = =\n\n\nline\n\n",
        "dos\r\nline\r\n= = = dos = = =\r\n",
    ]
    for n_lines in (1, 5, 300):
        texts.append("\n".join(rng.choices(LINES, k=n_lines)))
    return texts


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("block_bytes", [7, 64, prepare.BLOCK_BYTES])
def test_starts_stand_where_plain_python_puts_them(
    tmp_path, monkeypatch, tokenizer_path, boundary, block_bytes
):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", block_bytes)
    texts = odd_texts()
    corpus = make_corpus(
        tmp_path, texts, [TEXT[::-1]], boundary=boundary, tokenizer=str(tokenizer_path)
    )
    content, n_documents = plain_corpus(texts, boundary)
    assert decode(corpus) == content
    assert decode(corpus, "dev") == plain_corpus([TEXT[::-1]], boundary)[0]
    assert corpus.meta["train"]["documents"] == n_documents


@pytest.mark.parametrize("text", ["a\n", "ab\n", "abc\n", "?", "x\n\ny\n"])
def test_a_text_shorter_than_a_heading_of_byte_tokens(tmp_path, text):
    corpus = make_corpus(tmp_path, [text], vocab_size=260)
    assert decode(corpus) == plain_corpus([text], "line")[0]


@pytest.mark.parametrize("block_bytes", [3, prepare.BLOCK_BYTES])
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("newline", ["\r\n", "\r\r\n", "\r"], ids=repr)
def test_line_ends_and_marks_of_other_systems_read_as_ours(
    tmp_path, monkeypatch, tokenizer_path, newline, boundary, block_bytes
):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", block_bytes)
    text = "= = = Pond = = =\n\n\nthe ducks\n \nnaïve duck\n\nthe \ufeff end"
    others_text = "\ufeff" + text.replace("\n", newline)
    options = {"tokenizer": str(tokenizer_path), "boundary": boundary}
    unix = make_corpus(tmp_path / "unix", [text], **options)
    other = make_corpus(tmp_path / "other", [others_text], **options)
    assert decode(unix) == plain_corpus([text], boundary)[0]
    assert np.array_equal(other.train, unix.train)
    for corpus in (unix, other):
        assert corpus.meta["train"]["words"] == 14
        assert corpus.meta["train"]["documents"] == 3


def test_no_line_end_is_cut_in_two(tmp_path, monkeypatch):
    rng = random.Random(1)
    for _ in range(300):
        lines = rng.choices(["a", "é duck", "世界"], k=rng.randrange(1, 9))
        text = "".join(line + rng.choice(["\n", "\r", "\r\n", "\r\r\n"]) for line in lines)
        (tmp_path / "x.txt").write_bytes(text.encode())
        monkeypatch.setattr(prepare, "BLOCK_BYTES", rng.randrange(1, 9))
        blocks = list(prepare.read_blocks(tmp_path / "x.txt"))
        assert "".join(blocks) == "\n".join(lines) + "\n"
        assert all(block.endswith("\n") for block in blocks)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_encode_text_is_how_a_text_opens_a_corpus(tmp_path, tokenizer, tokenizer_path, boundary):
    text = "The ducks swim .\nThe ice thaws .\nquack"
    corpus = make_corpus(tmp_path, [text], boundary=boundary, tokenizer=str(tokenizer_path))
    ids = corpus.train.tolist()
    newline = tokenizer.encode("\n")
    if boundary == "none":
        ids = newline + ids  # as after another line
    if boundary != "line":
        assert ids[-1:] == newline
        ids = ids[:-1]
    assert tokenizer.encode_text(text, boundary) == ids


def test_text_that_spells_a_special_token_never_becomes_one(tmp_path, tokenizer_path):
    text = "<s>a <mask> b</s> <pad><pad>\n<s>\n</s> <s><mask>\n"
    corpus = make_corpus(tmp_path, [text], tokenizer=str(tokenizer_path))
    special = [token for token in corpus.train.tolist() if token <= MASK]
    assert special == [START] * 3  # one for each line


# ---------------------------------------------------------------------------- blocks and processes


@pytest.mark.parametrize("block_bytes", [1, 40, 10000])
def test_pieces_are_those_that_the_pattern_finds_in_the_text(tmp_path, monkeypatch, block_bytes):
    """However the text is cut: among spaces of every kind, and what only `re` calls one."""
    monkeypatch.setattr(prepare, "BLOCK_BYTES", block_bytes)
    rng = random.Random(1)
    parts = " \t\n\v\f\x1c\x1d\x1e\x1f\x85\xa0\u2009\u2028\u3000'"
    parts = [*parts, " ", " ", " ", "'s", "duck", "12", "!", "é", "世界", "\u200b", "\ufeff"]
    text = "duck" + "".join(rng.choices(parts, k=20000)) + "\n"
    (tmp_path / "text.txt").write_bytes(text.encode())
    expected = Counter(regex.findall(PATTERN, text))
    assert prepare.count_pieces([tmp_path / "text.txt"]) == expected


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, monkeypatch, boundary):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 100)
    texts = [*odd_texts(), "", TEXT * 20, "\n\n", TEXT.replace("\n", "\r\n")]
    train = write_texts(tmp_path, "train", texts)
    dev = write_texts(tmp_path, "dev", [TEXT])
    for processes in (1, 2, 3):
        out = str(tmp_path / f"corpus_{processes}")
        options = {"vocab_size": 300, "boundary": boundary, "processes": processes}
        prepare.prepare(train, dev, out, **options)
    for name in ("tokenizer.json", "train.bin", "dev.bin", "meta.json"):
        one, two, three = (tmp_path / f"corpus_{n}" / name for n in (1, 2, 3))
        assert one.read_bytes() == two.read_bytes() == three.read_bytes()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_is_one_line_in_any_number_of_processes(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 100)
    texts = [TEXT * 9, TEXT.encode() * 9 + b"caf\xe9\n"]
    with pytest.raises(UserError, match=r"1\.train: byte \d+ is not valid UTF-8 \(0xe9\)"):
        make_corpus(tmp_path, texts, vocab_size=300, processes=processes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.dev", "0.train", "1.train"]


def test_there_is_at_least_one_process(tmp_path):
    with pytest.raises(UserError, match="--processes 0: must be at least 1"):
        make_corpus(tmp_path, [TEXT], processes=0)


# ------------------------------------------------------------------------------------- meta.json


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_meta_tells_what_the_files_hold(tmp_path, tokenizer_path, boundary):
    texts = odd_texts()
    corpus = make_corpus(tmp_path, texts, boundary=boundary, tokenizer=str(tokenizer_path))
    meta = corpus.meta
    assert meta["boundary"] == boundary
    assert meta["vocab_size"] == 380
    assert meta["tokenizer_sha256"] == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()

    raw = (tmp_path / "corpus" / "train.bin").read_bytes()
    ids = np.frombuffer(raw, np.uint16)
    stats = meta["train"]
    assert stats["tokens"] == len(ids)
    assert stats["max_id"] == ids.max()
    assert stats["words"] == sum(len(text.split()) for text in texts)
    assert stats["bytes"] == sum(len(text.encode()) for text in texts)
    assert stats["sha256"] == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_meta_tells_where_each_file_begins(tmp_path, tokenizer_path, boundary):
    """So that a curriculum can tell sources apart; an empty file begins where the next one does."""
    texts = ["the ducks\n\nthe ice", "", TEXT, "quack\n"]
    corpus = make_corpus(tmp_path, texts, boundary=boundary, tokenizer=str(tokenizer_path))
    files = corpus.meta["train"]["files"]
    assert [file["name"] for file in files] == [str(tmp_path / f"{i}.train") for i in range(4)]
    assert len(corpus.meta["dev"]["files"]) == 1
    starts = [file["start"] for file in files]
    stops = [*starts[1:], corpus.meta["train"]["tokens"]]
    for text, start, stop in zip(texts, starts, stops, strict=True):
        ids = corpus.train[start:stop].tolist()
        assert corpus.tokenizer.decode(ids) == plain_corpus([text], boundary)[0]


def test_a_folder_of_texts_gives_the_same_bytes_every_time(tmp_path):
    text = tmp_path / "text"
    (text / "sub").mkdir(parents=True)
    (text / "b.txt").write_text("second\n")
    (text / "sub" / "c.dev").write_text("third\n")
    (text / "a.train").write_text("first\n")
    (text / "notes.md").write_text("not text\n")
    (tmp_path / "dev").write_text("a file that is named may end in anything\n")
    for out in ("one", "two"):
        arguments = [str(text)], [str(tmp_path / "dev")], str(tmp_path / out)
        prepare.prepare(*arguments, vocab_size=265, boundary="none")
    corpus = Corpus(tmp_path / "one")
    assert decode(corpus) == "first\nsecond\nthird\n"
    assert decode(corpus, "dev") == "a file that is named may end in anything\n"
    for name in ("tokenizer.json", "train.bin", "dev.bin", "meta.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_given_tokenizer_is_used_as_it_is(tmp_path, tokenizer, tokenizer_path):
    text = "zebras dazzle\n"  # would train another one
    corpus = make_corpus(tmp_path, [text], tokenizer=str(tokenizer_path))
    assert (tmp_path / "corpus" / "tokenizer.json").read_bytes() == tokenizer_path.read_bytes()
    assert corpus.train.tolist() == [START, *tokenizer.encode("zebras dazzle")]


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size, dtype", [(65_536, np.uint16), (65_537, np.uint32)])
def test_token_files_are_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, dtype):
    merges = []
    for first in range(256):
        for second in range(256):
            merges.append((bytes([first]), bytes([second])))
    merges.remove((b"z", b"q"))
    merges = [*merges[: vocab_size - 261], (b"z", b"q")]
    save_tokenizer(tmp_path / "large.json", merges)
    corpus = make_corpus(tmp_path, ["zq zq\n"], tokenizer=str(tmp_path / "large.json"))
    assert corpus.vocab_size == vocab_size
    assert corpus.train[1] == corpus.train.max() == vocab_size - 1
    assert np.array_equal(np.fromfile(tmp_path / "corpus" / "train.bin", dtype), corpus.train)
    assert decode(corpus) == "<s>zq zq"


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["the ducks swim , " * 30_000, "a" * 500_000, " " * 500_000 + "x", "世é" * 100_000]
)
def test_one_very_long_line(tmp_path, line):
    corpus = make_corpus(tmp_path, [f"a duck\n{line}\n"], vocab_size=290, boundary="none")
    assert decode(corpus) == f"a duck\n{line}\n"


def test_fewer_tokens_than_asked_for_are_announced(tmp_path, capsys):
    corpus = make_corpus(tmp_path, ["ab\n"], vocab_size=300)
    assert corpus.vocab_size == 261
    assert "1 merges: 261 tokens, not 300" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- bad input


BAD_TEXTS = {  # training texts, development text, what the line must say
    "empty": ([""], GOOD_DEV, ["0.train", "no words"]),
    "blank lines": (["\n \n\t\r\n"], GOOD_DEV, ["0.train", "no words"]),
    "empty dev": ([GOOD], "\n" * 9, ["0.dev", "no words"]),
    "not UTF-8": ([b"duck\n\xff\n"], GOOD_DEV, ["0.train", "byte 5 "]),
    "in a later block": ([b"duck\n" * 20 + b"du\xe4ck\n"], GOOD_DEV, ["0.train", "byte 102 "]),
    "in a long line": ([b"duck " * 20 + b"\xc0"], GOOD_DEV, ["0.train", "byte 100 "]),
    "in the second file": ([GOOD, b"\n\n\x80"], GOOD_DEV, ["1.train", "byte 2 "]),
    "cut at the end": (["ducks 世".encode()[:-1]], GOOD_DEV, ["0.train", "byte 6 "]),
    "not UTF-8 in dev": ([GOOD], b"quack\n\xff", ["0.dev", "byte 6 "]),
}


def folders_in(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir())


@pytest.mark.parametrize("train, dev, expected", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_bad_text_is_one_line_and_leaves_no_folder(tmp_path, monkeypatch, train, dev, expected):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 16)
    with pytest.raises(UserError) as error:
        make_corpus(tmp_path, train, [dev])
    assert "\n" not in str(error.value)
    for part in expected:
        assert part in str(error.value)
    assert folders_in(tmp_path) == []


def test_a_bad_byte_beyond_a_full_block_has_its_offset(tmp_path):
    n_lines = prepare.BLOCK_BYTES // 5 + 3
    (tmp_path / "long.txt").write_bytes(b"duck\n" * n_lines + b"d\xff")
    with pytest.raises(UserError, match=rf"long.txt: byte {5 * n_lines + 1} "):
        list(prepare.read_blocks(tmp_path / "long.txt"))


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """A folder of two texts, one for development, and other names for the first of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.train").write_text(GOOD)
    (tmp_path / "text" / "b.train").write_text(TEXT, "utf-8")
    (tmp_path / "d.dev").write_text(GOOD_DEV)
    (tmp_path / "copy.txt").write_text(GOOD)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(GOOD.encode()))
    (tmp_path / "link.txt").symlink_to("text/a.train")
    (tmp_path / "linked").symlink_to("text")
    os.link(tmp_path / "d.dev", tmp_path / "e.dev")
    return tmp_path


REPEATED = {  # TEXT..., --dev TEXT..., the name that is one too many and the first one
    "named twice": ("text/a.train text/a.train", "d.dev", "text/a.train", "text/a.train"),
    "with a dot": ("text/a.train ./d.dev", "d.dev", "d.dev", "d.dev"),
    "by a detour": ("text/a.train text/../d.dev", "d.dev", "d.dev", "text/../d.dev"),
    "folder and file": ("text text/b.train", "d.dev", "text/b.train", "text/b.train"),
    "folder twice": ("text text", "d.dev", "text/a.train", "text/a.train"),
    "linked folder": ("text linked", "d.dev", "linked/a.train", "text/a.train"),
    "link": ("text/a.train link.txt", "d.dev", "link.txt", "text/a.train"),
    "dev in train": ("text", "text/b.train", "text/b.train", "text/b.train"),
    "link to train": ("text", "link.txt", "link.txt", "text/a.train"),
    "train is dev": ("text", "text", "text/a.train", "text/a.train"),
    "dev twice": ("text", "d.dev e.dev", "e.dev", "d.dev"),
}


@pytest.mark.parametrize("train, dev, name, first", REPEATED.values(), ids=REPEATED)
def test_a_text_that_comes_twice_is_named(texts, train, dev, name, first):
    with pytest.raises(UserError) as error:
        prepare.prepare(train.split(), dev.split(), "corpus", vocab_size=300)
    assert str(error.value).startswith(f"{name}: was named before, as {first}; ")
    assert "\n" not in str(error.value)
    assert folders_in(texts) == [texts / "linked", texts / "text"]


COPIES = {  # TEXT..., --dev TEXT..., what is said
    "none": ("text", "d.dev", ""),
    "copy": (
        "text copy.txt",
        "d.dev",
        "1 file(s) hold the text of another: first copy.txt that of text/a.train\n",
    ),
    "compressed, and in dev": (
        "text packed.gz",
        "d.dev copy.txt",
        "2 file(s) hold the text of another: first packed.gz that of text/a.train\n",
    ),
}


@pytest.mark.parametrize("train, dev, line", COPIES.values(), ids=COPIES)
def test_copies_of_a_text_are_said(texts, capsys, train, dev, line):
    prepare.prepare(train.split(), dev.split(), "corpus", vocab_size=300)
    assert capsys.readouterr().err == line


def test_empty_files_are_no_copies(tmp_path, tokenizer_path, capsys):
    corpus = make_corpus(tmp_path, ["", GOOD, ""], ["", GOOD_DEV], tokenizer=str(tokenizer_path))
    assert decode(corpus) == "<s>" + GOOD.strip()
    assert capsys.readouterr().err == ""


def test_progress_counts_what_the_total_counts(tmp_path, tokenizer):
    """Bytes, also of letters that have several."""
    text = tmp_path / "text.txt"
    text.write_text("Мороз и солнце , день чудесный .\n" * 50, encoding="utf-8")
    sizes = [prepare.count_block(block)[-1] for block in prepare.read_files([text])]
    assert sum(sizes) == prepare.text_bytes([text])
    sizes = [prepare.encode_block(tokenizer, block)[-1] for block in prepare.read_files([text])]
    assert sum(sizes) == prepare.text_bytes([text])


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match="--vocab_size 259: must be at least 260"):
        make_corpus(tmp_path, [GOOD], vocab_size=259)
    assert folders_in(tmp_path) == []


@pytest.mark.parametrize("name", ["nowhere.train", "folder"])
def test_missing_text_and_a_folder_without_text_are_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "text.md").write_text(GOOD)
    with pytest.raises(UserError) as error:
        prepare.text_files([str(tmp_path / name)])
    assert str(error.value).startswith(f"{tmp_path / name}: ")


# ------------------------------------------------------------------------ compressed text and pipes


def test_gz_files_read_as_what_they_hold(tmp_path, monkeypatch, tokenizer_path):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 64)
    plain = tmp_path / "plain"
    packed = tmp_path / "packed"
    for folder in (plain, packed):
        folder.mkdir()
    (plain / "a.train").write_text(TEXT * 30, "utf-8")
    (plain / "b.txt").write_text(GOOD)
    # gzip files may be written one behind the other
    members = [gzip.compress(TEXT.encode()) for _ in range(30)]
    (packed / "a.train.gz").write_bytes(b"".join(members))
    (packed / "b.txt.gz").write_bytes(gzip.compress(GOOD.encode()))
    (tmp_path / "dev.txt").write_text(GOOD_DEV)
    (tmp_path / "dev.gz").write_bytes(gzip.compress(GOOD_DEV.encode()))

    options = {"tokenizer": str(tokenizer_path)}
    folders = str(tmp_path / "one"), str(tmp_path / "two")
    one = prepare.prepare([str(plain)], [str(tmp_path / "dev.txt")], folders[0], **options)
    two = prepare.prepare([str(packed)], [str(tmp_path / "dev.gz")], folders[1], **options)
    for split in ("train", "dev"):
        for key in ("sha256", "tokens", "words", "bytes", "documents"):
            assert one[split][key] == two[split][key]
    assert two["train"]["bytes"] == len((TEXT * 30 + GOOD).encode())


def flip_a_bit(raw: bytes) -> bytes:
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]


DAMAGES = {
    "cut": lambda raw: raw[:-20],
    "cut in its checksum": lambda raw: raw[:-3],
    "cut in its header": lambda raw: raw[:5],
    "a bit flipped": flip_a_bit,
    "wrong checksum": lambda raw: raw[:-8] + b"abcd" + raw[-4:],
    "more behind it": lambda raw: raw + b"more",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("n_words", [10, 100_000])
def test_a_damaged_gz_is_one_line(tmp_path, damage, n_words):
    words = " ".join(random.Random(1).choices(["duck", "pond", "ice", "quack"], k=n_words))
    raw = damage(gzip.compress(words.encode()))
    with pytest.raises(UserError) as error:
        make_corpus(tmp_path, [raw], vocab_size=300)
    assert str(error.value).startswith(f"{tmp_path}/0.train: is damaged or cut short (")
    assert "\n" not in str(error.value)
    assert folders_in(tmp_path) == []


def test_a_pipe_is_refused_as_a_pipe(tmp_path):
    """As in prepare.py <(zcat x.gz), which bash replaces by /dev/fd/63."""
    read_end, write_end = os.pipe()
    os.mkfifo(tmp_path / "named.train")
    for path in (f"/dev/fd/{read_end}", f"{tmp_path}/named.train"):
        with pytest.raises(UserError, match=f"^{path}: is a pipe or a link to nothing; "):
            prepare.text_files([path])
    os.close(read_end)
    os.close(write_end)


# ------------------------------------------------------------- slices of text, for an experiment


def slicing_spec(folder: Path, **settings) -> experiment.Spec:
    """Return a spec that makes a corpus of every second block of lines."""
    folders = {"out": str(folder / "out"), "corpus": str(folder / "corpus")}
    return experiment.Spec(arms={"a": {}}, slice=2, vocab_size=270, **folders, **settings)


def test_slices_are_cut_at_any_line_end_and_out_of_gz_files(tmp_path):
    lines = [f"line {i} of words" for i in range(450)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "mac.train").write_bytes("\r".join(lines).encode())
    unix = "\n".join(["another text", *lines[1:]])
    (tmp_path / "text" / "unix.train.gz").write_bytes(gzip.compress(unix.encode()))
    (tmp_path / "d.dev").write_text(GOOD_DEV)
    spec = slicing_spec(tmp_path, text=str(tmp_path / "text"), dev=str(tmp_path / "d.dev"))
    experiment.make_corpus(spec)
    corpus = Corpus(spec.corpus)
    kept = "<s>".join(["", *lines[:100], *lines[200:300], *lines[400:]])
    assert decode(corpus) == kept + kept.replace(lines[0], "another text", 1)


def test_a_file_of_any_name_can_be_sliced(tmp_path):
    (tmp_path / "text.raw").write_text("the ducks swim\n" * 450)
    (tmp_path / "d.dev").write_text(GOOD_DEV)
    spec = slicing_spec(tmp_path, text=str(tmp_path / "text.raw"), dev=str(tmp_path / "d.dev"))
    experiment.make_corpus(spec)
    assert Corpus(spec.corpus).meta["train"]["words"] == 3 * 250


def test_dev_text_inside_sliced_text_is_refused(texts):
    """prepare.py could not tell, since it is given the slice."""
    spec = slicing_spec(texts, text="text", dev="text/b.train")
    with pytest.raises(UserError, match="^text/b.train: was named before, as text/b.train; "):
        experiment.make_corpus(spec)


# ---------------------------------------------------------------------------------- other mistakes


def test_what_killed_calls_left_behind_is_removed(tmp_path, tokenizer_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f".corpus.{dead.pid}", f".corpus.{os.getpid()}"):
        (tmp_path / f"{name}.unfinished").mkdir()
        (tmp_path / f"{name}.unfinished" / "train.bin").touch()
    alive = f".corpus.{os.getppid()}.unfinished"
    others = [f".corpus.{dead.pid}", f".more.corpus.{dead.pid}.unfinished", ".corpus.x.unfinished"]
    for name in (alive, *others):
        (tmp_path / name).mkdir()
    make_corpus(tmp_path, [GOOD], tokenizer=str(tokenizer_path))
    assert {path.name for path in folders_in(tmp_path)} == {"corpus", alive, *others}


def test_a_file_whose_name_is_not_utf_8_is_read(tmp_path, tokenizer_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.train"
    with open(path, "w") as file:
        file.write(GOOD)
    (tmp_path / "d.dev").write_text(GOOD_DEV)
    arguments = [os.fsdecode(path)], [str(tmp_path / "d.dev")], str(tmp_path / "corpus")
    prepare.prepare(*arguments, tokenizer=str(tokenizer_path))
    (file,) = Corpus(tmp_path / "corpus").meta["train"]["files"]
    assert os.fsencode(file["name"]) == path


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "mine").write_text("precious")
    with pytest.raises(UserError, match="exists already.*--out"):
        make_corpus(tmp_path, [GOOD])
    assert [path.name for path in (tmp_path / "corpus").iterdir()] == ["mine"]


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_bad_tokenizer_is_named_as_the_user_named_it(tmp_path, content):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        make_corpus(tmp_path, [GOOD], tokenizer=str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert folders_in(tmp_path) == []


def run_program(folder: Path, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_command_line(tmp_path):
    (tmp_path / "good.txt").write_text(TEXT, "utf-8")
    (tmp_path / "bad.txt").write_bytes(b"quack\n" + b"\xe9t\xe9\n")
    (tmp_path / "dev.txt").write_text(GOOD_DEV)
    arguments = ["--dev", "dev.txt", "--out", "deep/corpus", "--vocab_size", 300]

    failed = run_program(tmp_path, "bad.txt", *arguments)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("prepare.py: bad.txt: byte 6 ")
    assert failed.stderr.count("\n") == 1

    done = run_program(tmp_path, "good.txt", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"{len(TEXT.split())} words" in done.stdout
    assert Corpus(tmp_path / "deep" / "corpus").vocab_size == 300
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["corpus"]

    usage = run_program(tmp_path, "--help")
    assert "(default: 16384)" in usage.stdout
    assert "(default: line)" in usage.stdout
