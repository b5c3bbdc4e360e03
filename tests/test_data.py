"""data.py and prepare.py: the tokenizer (trainer, file, encoding), the token files and their starts, what bad input says, the batches.

    python -m pytest tests/test_data.py        # about 8 s, no GPU, no torch

Two implementations must agree: the trainer with a naive one and with Hugging Face's, token files with a few lines of
plain Python, MLM and MNTP batches with the CLM batch of the same rows. Tests that need real text or an optional package
skip without it and say so.
"""

import hashlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex

import data
import prepare
from antlm.tokenizer import (
    BOUNDARIES,
    MASK,
    PATTERN,
    SPECIAL,
    START,
    Tokenizer,
    save_tokenizer,
    train_bpe,
)
from config import UserError

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data" / "babylm_10M"
TEXT = """= = = The pond = = =

*MOT: look at the ducks , do you see the ducks ?
*CHI: ducks !
A: I've got 12 ducks , they're quacking and quacking , quack quack .

= = = The thaw = = =
In March the ice went from the pond and the ducks came back to the pond .
Zwölf Enten schwimmen über den See , 十二只鸭子 , naïve café .

The ducks swim . The ducks dive . The ducks sleep on the ice when there is ice on the pond .
"""
ODD = ["", " ", "     ", "\n", "\n\n\n", "a\0b\0\0", "\t\tx \t y\t", "line\r\nline\r\n\r\n", "\ufeffbom",
       "e\u0301a\u0308\u0323 x\u0301", "👩‍👩‍👧 👍🏽🇫🇮", "שלום עולם 123 مرحبا\u200f", "a\u2028b\u2029c\x85d",
       "\u00a0 \u3000x\u2009 y", "'s 'S 're'll don't ''", "x\x1c\x1d\x1e\x1fy", "\U0010ffff\ufffd\ufffe",
       "3.14 ²½ ١٢", "  lead and trail  \n  ", "= = = Title = = =", "a" * 300, "ab" * 150,
       "ह\u093fन\u094dद\u0940"]


def pieces(text: str) -> Counter:
    return Counter(regex.findall(PATTERN, text))


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(path, train_bpe(pieces(TEXT), 120))
    return path


@pytest.fixture(scope="module")
def tok(tokenizer_path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture
def make(tmp_path):
    """Write each text (or bytes) to a file, in order, and prepare a corpus from them -> its folder."""
    def make(train, dev="a few words\n", out="corpus", **options) -> Path:
        paths = {}
        for split, texts in (("train", train), ("dev", dev)):
            texts = [texts] if isinstance(texts, (str, bytes)) else texts
            paths[split] = [tmp_path / f"{out}_{i}.{split}" for i in range(len(texts))]
            for path, text in zip(paths[split], texts):
                path.write_bytes(text if isinstance(text, bytes) else text.encode())
        prepare.prepare(*([str(p) for p in ps] for ps in paths.values()), str(tmp_path / out), **options)
        return tmp_path / out
    return make


def one_line(error: str, *parts) -> bool:
    return error.count("\n") == 0 and all(str(part) in error for part in parts)


# ------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("text, parts", [
    ("I've seen they're 12 ducks, don't", "I|'ve| seen| they|'re| 12| ducks|,| don|'t"),
    ("it's we'll I'd I'm 'S 'tis", "it|'s| we|'ll| I|'d| I|'m| '|S| '|tis"),
    ("a \n\n\n  b\t\tc\r\n d  ", "a| |\n|\n|\n| | b|\t|\t|c|\r|\n| d|  "),
    ("*MOT: = = = x3 é世 ...?!", "*|MOT|:| =| =| =| x|3| é世| ...?!")])
def test_pattern_cuts_words_and_newlines(text, parts):
    assert regex.findall(PATTERN, text) == parts.split("|")


def naive_bpe(text: str, n_merges: int) -> list[tuple[bytes, bytes]]:
    """Recount every pair before every merge; ids of bytes: those Latin-1 shows as a mark first, then the others."""
    unseen = {*range(33), *range(127, 161), 173}
    names = [bytes([b]) for b in sorted(range(256), key=lambda b: (b in unseen, b))]
    words = [([names.index(bytes([b])) for b in piece.encode()], n) for piece, n in pieces(text).items()]
    merges = []
    while len(merges) < n_merges:
        counts = Counter()
        for word, n in words:
            for pair in itertools.pairwise(word):
                counts[pair] += n
        if not counts:
            break
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i:i + 2] = [len(names)]
                i += 1
        merges.append((names[a], names[b]))
        names.append(names[a] + names[b])
    return merges


@pytest.mark.parametrize("text", ["aaaa", "aaaaaaa aaaaa aaa", "abab", "abababa babab", "aabaab aab", "x", TEXT])
def test_trainer_equals_a_naive_one(text):
    assert train_bpe(pieces(text), 60) == naive_bpe(text, 60)


def test_trainer_equals_a_naive_one_on_random_text():
    r = random.Random(0)
    for alphabet in ["a", "ab", "ab ", "abé世", "\0\t\r ", "'st \nab1"] * 25:
        text = "".join(r.choice(alphabet) * r.choice([1, 1, 2, 3, 7]) for _ in range(r.randrange(1, 90)))
        n_merges = r.randrange(1, 50)
        assert train_bpe(pieces(text), n_merges) == naive_bpe(text, n_merges), text


@pytest.mark.skipif(not REAL.is_dir(), reason="no BabyLM text in ../shared/data/babylm_10M")
def test_trainer_equals_hugging_face_on_real_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import models, pre_tokenizers, trainers
    text = "".join(open(path, encoding="utf-8").read(100_000) for path in sorted(REAL.glob("*.train")))
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=4000, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    save_tokenizer(tmp_path / "ours.json", train_bpe(pieces(text), 4000 - 260))
    ours = json.loads((tmp_path / "ours.json").read_text("utf-8"))["model"]
    theirs = json.loads(theirs.to_str())["model"]
    assert ours["vocab"] == theirs["vocab"]
    assert ours["merges"] == [m if isinstance(m, str) else " ".join(m) for m in theirs["merges"]]


def test_hugging_face_reads_the_file_and_gives_the_same_ids(tokenizer_path, tok):
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tokenizer_path))
    assert theirs.get_vocab_size() == tok.vocab_size == 260 + 120
    # every 7th character there is, and all of the first 12,000, beside letters, digits and spaces
    characters = map(chr, [*range(12_000), *range(12_000, 0xD800, 7), *range(0xE000, 0x110000, 7 * 64)])
    for text in [*ODD, TEXT, *(f"a{c}b {c} 1{c}{c}\n{c}" for c in characters)]:
        ids = tok.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.encode(text).ids == [START, *ids]
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("text", ODD)
def test_round_trip_of_odd_text(tok, text):
    assert tok.decode(tok.encode(text)) == text


def test_round_trip_and_line_by_line_of_any_text(tok):
    hypothesis = pytest.importorskip("hypothesis")
    texts = hypothesis.strategies.text() | hypothesis.strategies.text(" \n\r\tab'1é=\u2028\u3000<s>")

    @hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @hypothesis.given(texts)
    def check(text):
        ids = tok.encode(text)
        assert tok.decode(ids) == text and all(MASK < i < tok.vocab_size for i in ids)
        lines = [tok.encode(line) + tok.encode("\n") for line in text.split("\n")]
        assert [i for line in lines for i in line][:-1] == ids
    check()


@pytest.mark.parametrize("n", [2, 99_999, 100_000, 100_001, 1_200_000])
@pytest.mark.parametrize("after", ["", "x", ".", "\n", "\n x"])
def test_a_million_spaces_in_a_row(tmp_path, n, after):
    """tiktoken's engine gives up on a million: runs are cut at 99,999, shorter ones are one piece as in Hugging Face."""
    save_tokenizer(tmp_path / "t.json", [(b" ", b" "), (b"  ", b"  "), (b" ", b"x")])
    tok = Tokenizer(tmp_path / "t.json")
    run, rest = (n, after) if after[:1] in ("", "\n") else (n - 1, " " + after)
    parts = ["a", *(" " * min(99_999, run - i) for i in range(0, run, 99_999)), rest]
    assert tok.encode("a" + " " * n + after) == [i for part in parts for i in tok.encode(part)]
    assert len(tok.encode(" " * 99_999)) == 99_999 // 4 + 2


def test_half_a_surrogate_pair_is_not_text(tok):
    for text, place in (("\udcff", 0), ("ducks \ud83d and", 6)):
        with pytest.raises(UserError, match=f"character {place} is half"):
            tok.encode(text)


def test_text_that_spells_a_special_token_never_becomes_one(tok, make, tokenizer_path):
    text = "<s>a <mask> b</s> <pad><pad>\n<s>\n</s> <s><mask>\n"
    assert min(tok.encode(text)) > MASK and tok.decode(tok.encode(text)) == text
    corpus = data.Corpus(make(text, tokenizer=str(tokenizer_path)))
    assert [i for i in corpus.train.tolist() if i <= MASK] == [START] * 3  # one for each line


# ----------------------------------------------------------------------------------------------- token files


def plain_corpus(texts: list[str], boundary: str) -> tuple[str, int]:
    """What a decoded token file reads, and how many documents opened, line by line."""
    out, documents = "", 0
    for text in texts:
        opens = True
        for line in text.replace("\r\n", "\n").removesuffix("\n").split("\n"):
            if line:
                opens |= line.startswith("= = =")
                documents += opens
                starts = boundary == "line" or boundary == "document" and opens
                out += "<s>" * starts + line + "\n" * (boundary != "line")
            opens = not line
    return out, documents


def random_lines(r: random.Random, n: int) -> str:
    lines = ["", "duck", "= = = Pond = = =", "= = =", "= = no", "a = = = b", "x" * 40, "é世界 ice", "?", "the ice\r"]
    return "\n".join(r.choices(lines, k=n))


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("block", [7, 13, 64, prepare.BLOCK])
def test_starts_stand_where_plain_python_puts_them(make, monkeypatch, tokenizer_path, tok, boundary, block):
    monkeypatch.setattr(prepare, "BLOCK", block)
    r = random.Random(1)
    texts = [TEXT, "", "no newline at the end", "\n\n\n", "\n\nblank lines first\n", "\n",
             "= = = Title = = =\nline\n= = =\n\n\nline\n\n", "dos\r\nline\r\n= = = dos = = =\r\n",
             *(random_lines(r, n) for n in (1, 5, 200))]
    folder = make(texts, dev=[TEXT[::-1]], boundary=boundary, tokenizer=str(tokenizer_path))
    corpus, meta = data.Corpus(folder), json.loads((folder / "meta.json").read_text("utf-8"))
    expected, documents = plain_corpus(texts, boundary)
    assert tok.decode(corpus.train.tolist()) == expected
    assert tok.decode(corpus.dev.tolist()) == plain_corpus([TEXT[::-1]], boundary)[0]

    stats, raw = meta["train"], (folder / "train.bin").read_bytes()
    ids = np.frombuffer(raw, np.uint16)
    assert np.array_equal(corpus.train, ids) and not corpus.train.flags.writeable
    assert meta["boundary"] == corpus.boundary == boundary and meta["vocab_size"] == corpus.vocab_size == 380
    assert stats["documents"] == documents and stats["tokens"] == len(ids) and stats["max_id"] == ids.max()
    assert stats["words"] == sum(len(text.split()) for text in texts) and stats["bytes"] == len("".join(texts).encode())
    assert stats["sha256"] == hashlib.sha256(raw).hexdigest()
    assert meta["tokenizer_sha256"] == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()


@pytest.mark.parametrize("text", ["a\n", "ab\n", "abc\n", "?", "x\n\ny\n"])
def test_short_texts_with_a_tokenizer_of_bytes(make, text):
    """A tokenizer that spells "= = =" in five tokens met a text shorter than that."""
    folder = make(text, dev=text, vocab_size=260)
    assert data.Corpus(folder).tokenizer.decode(data.Corpus(folder).train.tolist()) == plain_corpus([text], "line")[0]


@pytest.mark.parametrize("block", [3, prepare.BLOCK])
def test_files_from_windows_read_as_others(make, monkeypatch, tokenizer_path, block):
    r"""A byte-order mark is no text, \r\n is a newline; a \r alone stays what it is."""
    monkeypatch.setattr(prepare, "BLOCK", block)
    text = "= = = Pond = = =\n\n\nthe ducks\n \nnaïve\r duck\nthe \ufeff end"
    ours, theirs = (data.Corpus(make(t, dev=t, out=out, tokenizer=str(tokenizer_path))) for t, out in (
        (text, "ours"), ("\ufeff" + text.replace("\n", "\r\n"), "theirs")))
    read = ours.tokenizer.decode(ours.train.tolist())
    assert read == "<s>= = = Pond = = =<s>the ducks<s> <s>naïve\r duck<s>the \ufeff end"
    for corpus, name in itertools.product((ours, theirs), ("train", "dev")):
        assert np.array_equal(getattr(corpus, name), ours.train)
        assert {k: corpus.meta[name][k] for k in ("words", "documents")} == {"words": 14, "documents": 2}


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_encode_text_is_how_the_text_opens_a_corpus(make, tok, tokenizer_path, boundary):
    text = "The ducks swim .\nThe ice thaws .\nquack"
    ids = data.Corpus(make(text, boundary=boundary, tokenizer=str(tokenizer_path))).train.tolist()
    if boundary == "none":
        ids = tok.encode("\n") + ids  # as after another line
    assert tok.encode_text(text, boundary) == (ids if boundary == "line" else ids[:-1])  # less the last newline


def test_folder_of_texts_and_same_bytes_every_time(tmp_path):
    text = tmp_path / "text"
    (text / "sub").mkdir(parents=True)
    for name, line in [("b.txt", "second"), ("sub/c.dev", "third"), ("a.train", "first"), ("notes.md", "not text")]:
        (text / name).write_text(line + "\n")
    for out in ("one", "two"):
        prepare.prepare([str(text)], [str(text / "b.txt")], str(tmp_path / out), vocab_size=265, boundary="none")
    corpus = data.Corpus(tmp_path / "one")
    assert corpus.tokenizer.decode(corpus.train.tolist()) == "first\nsecond\nthird\n"
    assert corpus.tokenizer.decode(corpus.dev.tolist()) == "second\n"
    for name in ("tokenizer.json", "train.bin", "dev.bin"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_given_tokenizer_is_used_as_it_is(make, tok, tokenizer_path):
    folder = make("zebras dazzle\n", tokenizer=str(tokenizer_path))  # a text that would train another one
    assert (folder / "tokenizer.json").read_bytes() == tokenizer_path.read_bytes()
    assert data.Corpus(folder).train.tolist() == [START, *tok.encode("zebras dazzle")]


@pytest.mark.parametrize("vocab_size, dtype", [(65536, np.uint16), (65537, np.uint32)])
def test_ids_as_wide_as_the_vocabulary_needs(make, tmp_path, vocab_size, dtype):
    pairs = [(bytes([a]), bytes([b])) for a in range(256) for b in range(256) if bytes([a, b]) != b"zq"]
    save_tokenizer(tmp_path / "large.json", [*pairs[:vocab_size - 261], (b"z", b"q")])
    folder = make("zq zq\n", tokenizer=str(tmp_path / "large.json"))
    corpus = data.Corpus(folder)
    assert corpus.train.dtype == dtype and np.array_equal(np.fromfile(folder / "train.bin", dtype), corpus.train)
    assert corpus.vocab_size == vocab_size and corpus.train[1] == corpus.train.max() == vocab_size - 1
    assert corpus.tokenizer.decode(corpus.train.tolist()) == "<s>zq zq"


# ------------------------------------------------------------------------------------------------- bad input


GOOD = "look at the ducks on the ice\n"
BAD = {  # train, dev, options, what the one line must say
    "empty": ("", GOOD, {}, ["corpus_0.train", "no words"]),
    "blank lines": ("\n \n\t\r\n", GOOD, {}, ["corpus_0.train", "no words"]),
    "empty dev": (GOOD, "\n" * 9, {}, ["corpus_0.dev", "no words"]),
    "not UTF-8": (b"duck\n\xff\n", GOOD, {}, ["corpus_0.train", "byte 5 "]),
    "not UTF-8, later block": (b"duck\n" * 20 + b"du\xe4ck\n", GOOD, {}, ["corpus_0.train", "byte 102 "]),
    "not UTF-8, long line": (b"duck " * 20 + b"\xc0", GOOD, {}, ["corpus_0.train", "byte 100 "]),
    "not UTF-8, surrogate": (b"du\xed\xa0\x80ck\n", GOOD, {}, ["corpus_0.train", "byte 2 "]),
    "not UTF-8, second file": ([GOOD, b"\n\n\x80"], GOOD, {}, ["corpus_1.train", "byte 2 "]),
    "character cut at the end": ("ducks 世".encode()[:-1], GOOD, {}, ["corpus_0.train", "byte 6 "]),
    "not UTF-8 in dev": (GOOD, b"quack\n\xff", {}, ["corpus_0.dev", "byte 6 "]),
    "small vocabulary": (GOOD, GOOD, {"vocab_size": 259}, ["--vocab_size", "259", "260"]),
    "boundary": (GOOD, GOOD, {"boundary": "sentence"}, ["--boundary", "sentence", "document"]),
}


@pytest.mark.parametrize("train, dev, options, said", BAD.values(), ids=BAD)
def test_bad_text_is_one_line_and_leaves_nothing(make, tmp_path, monkeypatch, train, dev, options, said):
    monkeypatch.setattr(prepare, "BLOCK", 16)
    with pytest.raises(UserError) as e:
        make(train, dev, **options)
    assert one_line(str(e.value), *said)
    assert all(path.name.startswith("corpus_") for path in tmp_path.iterdir())  # the texts, and no folder


def test_bad_byte_beyond_a_real_block(tmp_path):
    lines = prepare.BLOCK // 5 + 3
    (tmp_path / "long.txt").write_bytes(b"duck\n" * lines + b"d\xff")
    with pytest.raises(UserError, match=rf"long.txt: byte {5 * lines + 1} "):
        list(prepare.read_blocks(tmp_path / "long.txt"))


def test_missing_text_and_folder_without_text(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "text.md").write_text(GOOD)
    for name in ("nowhere.train", "folder"):
        with pytest.raises(UserError) as e:
            prepare.prepare([str(tmp_path / name)], [str(tmp_path / "folder" / "text.md")], str(tmp_path / "out"))
        assert one_line(str(e.value), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_existing_folder_is_left_alone(make, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "mine").write_text("precious")
    with pytest.raises(UserError) as e:
        make(GOOD)
    assert one_line(str(e.value), tmp_path / "corpus", "--out")
    assert [(path.name, path.read_text()) for path in (tmp_path / "corpus").iterdir()] == [("mine", "precious")]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"pre_tokenizer": null}'])
def test_bad_tokenizer_is_named_as_the_user_named_it(make, tmp_path, content):
    if content is not None:
        (tmp_path / "corpus_tokenizer.json").write_text(content)
    with pytest.raises(UserError) as e:
        make(GOOD, tokenizer=str(tmp_path / "corpus_tokenizer.json"))
    assert one_line(str(e.value), tmp_path / "corpus_tokenizer.json")
    assert all(path.name.startswith("corpus_") for path in tmp_path.iterdir())


def vocab(content: dict) -> dict:
    return content["model"]["vocab"]


TAMPERED = {  # what is done to the content of a good tokenizer.json
    "a byte is missing": lambda c: vocab(c).pop("a"),
    "a byte is missing, another token has its id": lambda c: vocab(c).update(zzz=vocab(c).pop("a")),
    "an id twice": lambda c: vocab(c).update(a=vocab(c)["b"]),
    "an id beyond the end": lambda c: vocab(c).update(a=10 ** 9),
    "a negative id": lambda c: vocab(c).update(a=-1),
    "an id without end": lambda c: vocab(c).update(a=10 ** 4000),
    "an id of another type": lambda c: vocab(c).update(a="101"),
    "a token of no bytes": lambda c: vocab(c).update({"\u4e16": 380}),
    "a merge is missing": lambda c: c["model"]["merges"].pop(),
    "a merge twice": lambda c: c["model"]["merges"].append(c["model"]["merges"][0]),
    "merges in another order": lambda c: c["model"]["merges"].reverse(),
    "a merge of one": lambda c: c["model"]["merges"].append("a"),
    "a merge of numbers": lambda c: c["model"]["merges"].append([1, 2]),
    "no merges": lambda c: c["model"].pop("merges"),
    "a merge into a special token": lambda c: (c["model"]["merges"].append("<s >"), vocab(c).update({"<s>": 380})),
    "a pattern that does not compile": lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("}),
    "a pattern that drops text": lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "a"}),
    "a pattern that never ends": lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(a*)*b"}),
    "a normalizer": lambda c: c.update(normalizer={"type": "Lowercase"}),
    "no model": lambda c: c.update(model=[]),
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED)
def test_tampered_tokenizer_is_refused(tokenizer_path, tmp_path, tamper):
    """tiktoken panics, past `except Exception`, at a vocabulary without some byte, and drops what a pattern leaves."""
    (tmp_path / "mine.json").write_bytes(tokenizer_path.read_bytes())
    edit(tmp_path / "mine.json", lambda content: None)
    assert Tokenizer(tmp_path / "mine.json").vocab_size == 380
    edit(tmp_path / "mine.json", tamper)
    with pytest.raises(UserError) as e:
        Tokenizer(tmp_path / "mine.json")
    assert one_line(str(e.value), tmp_path / "mine.json") and len(str(e.value)) < 300 + len(str(tmp_path))


def test_tokenizer_saved_by_hugging_face_is_read(tokenizer_path, tok, tmp_path):
    pytest.importorskip("tokenizers").Tokenizer.from_file(str(tokenizer_path)).save(str(tmp_path / "theirs.json"))
    theirs = Tokenizer(tmp_path / "theirs.json")
    assert theirs.vocab_size == tok.vocab_size and theirs.encode(TEXT) == tok.encode(TEXT)


def edit(path: Path, change):
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def flip_byte(folder: Path):
    raw = bytearray((folder / "train.bin").read_bytes())
    raw[2] ^= 1
    (folder / "train.bin").write_bytes(raw)


def change_tokenizer(folder: Path):
    save_tokenizer(folder / "tokenizer.json", [(b"q", b"u")])


def foreign_token(folder: Path, max_id: int = 600):  # consistent in every other way
    (folder / "dev.bin").write_bytes(raw := np.array([1, 9, 600], np.uint16).tobytes())
    edit(folder / "meta.json", lambda m: m["dev"].update(
        tokens=3, words=2, max_id=max_id, sha256=hashlib.sha256(raw).hexdigest()))


def state(split: str | None = None, **values):
    """Damage that has meta.json, or a split in it, state these values."""
    return lambda folder: edit(folder / "meta.json", lambda meta: (meta[split] if split else meta).update(values))


DAMAGE = {  # what is done to a good folder, what the one line must say
    "cut short": (lambda f: os.truncate(f / "train.bin", (f / "train.bin").stat().st_size - 3), ["train.bin", "tokens"]),
    "cut to nothing": (lambda f: os.truncate(f / "dev.bin", 0), ["dev.bin", "tokens is 0"]),
    "too long": (lambda f: os.truncate(f / "dev.bin", 1000), ["dev.bin", "tokens is 500"]),
    "altered": (flip_byte, ["train.bin", "sha256"]),
    "token beyond the vocabulary": (foreign_token, ["dev.bin", "600"]),
    "token beyond the vocabulary, meta lies": (lambda f: foreign_token(f, 9), ["dev.bin", "max_id is 600, but 9"]),
    "file elsewhere": (state("train", file="../../etc/passwd"), ["train.bin", "'../../etc/passwd'"]),
    "file at the root": (state("dev", file="/dev/zero"), ["dev.bin", "'/dev/zero'"]),
    "objects": (state("dev", dtype="O"), ["dev.bin", "dtype is uint16, but 'O'"]),
    "wide tokens": (state("dev", dtype="uint32"), ["dev.bin", "dtype"]),
    "negative tokens": (state("train", tokens=-9), ["train.bin", "-9"]),
    "words of text": (state("train", words="many"), ["meta.json", "words 'many'"]),
    "words without end": (state("train", words=10 ** 4000), ["meta.json", "words 1000"]),
    "another format": (state(format=2), ["format is 1, but 2"]),
    "vocabulary that the tokenizer has not": (state(vocab_size=10 ** 9), ["vocab_size is 262, but 1000000000"]),
    "unknown boundary": (state(boundary="page"), ["meta.json", "boundary 'page'"]),
    "nested deeply": (lambda f: (f / "meta.json").write_text("[" * 10 ** 5), ["meta.json", "RecursionError"]),
    "no token file": (lambda f: (f / "dev.bin").unlink(), ["dev.bin"]),
    "another tokenizer": (change_tokenizer, ["tokenizer.json", "prepare"]),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"model": '), ["tokenizer.json"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "broken meta": (lambda f: (f / "meta.json").write_text('{"format": 1'), ["meta.json"]),
    "meta of bytes": (lambda f: (f / "meta.json").write_bytes(b"\xff\xfe"), ["meta.json"]),
    "meta is a list": (lambda f: (f / "meta.json").write_text("[]"), ["meta.json"]),
    "meta without a split": (lambda f: edit(f / "meta.json", lambda m: m.pop("dev")), ["meta.json", "dev"]),
    "meta of a wrong type": (lambda f: edit(f / "meta.json", lambda m: m["train"].update(tokens=None)), ["meta.json"]),
    "no meta": (lambda f: (f / "meta.json").unlink(), ["meta.json"]),
}


@pytest.mark.parametrize("damage, said", DAMAGE.values(), ids=DAMAGE)
def test_damaged_corpus_says_what_and_where(make, damage, said):
    folder = make("the duck and the drake\n" * 3, vocab_size=262)
    data.Corpus(folder)  # good before
    damage(folder)
    with pytest.raises(UserError) as e:
        data.Corpus(folder)
    assert one_line(str(e.value), folder, *said)


def test_missing_corpus_folder(tmp_path):
    with pytest.raises(UserError) as e:
        data.Corpus(tmp_path / "nowhere")
    assert one_line(str(e.value), tmp_path / "nowhere", "prepare.py")


def command(*args, cwd) -> subprocess.CompletedProcess:
    args = [sys.executable, ROOT / "prepare.py", *map(str, args)]
    return subprocess.run(args, cwd=cwd, capture_output=True, text=True, timeout=60)


FILES = {"tokenizer.json", "train.bin", "dev.bin", "meta.json"}


def test_command_line(tmp_path):
    (tmp_path / "good.txt").write_text(TEXT, "utf-8")
    (tmp_path / "bad.txt").write_bytes(b"quack\n" + b"\xe9t\xe9\n")
    done = command("good.txt", "--dev", "good.txt", "--out", "deep/corpus", "--vocab_size", 300, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr and f"{len(TEXT.split())} words" in done.stdout
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["corpus"]
    assert {path.name for path in (tmp_path / "deep" / "corpus").iterdir()} == FILES
    assert data.Corpus(tmp_path / "deep" / "corpus").vocab_size == 300
    for args, said in [(["bad.txt", "--dev", "good.txt", "--out", "new/and/nested"], ["bad.txt", "byte 6 "]),
                       (["good.txt", "--dev", "good.txt", "--out", "new", "--vocab_size", "many"], ["--vocab_size"]),
                       (["good.txt", "--dev", "none.txt", "--out", "new"], ["none.txt"]),
                       (["good.txt", "--dev", "good.txt", "--out", "deep/corpus"], ["deep/corpus"]),
                       (["good.txt", "--dev", "good.txt", "--out", "new", "--tokenizer", "none.json"], ["none.json"])]:
        done = command(*args, cwd=tmp_path)
        assert done.returncode != 0 and not done.stdout
        assert one_line(done.stderr.removesuffix("\n"), "prepare.py: ", *said), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "deep", "good.txt"]


# --------------------------------------------------------------------------------------------------- batches


OBJECTIVES = ["CLM", "MLM", "MNTP"]


def build(ids, vocab_size=None, block_size=16, batch_rows=8, seed=0, rate=0.15, span=1.0) -> data.Batches:
    slots = math.ceil(rate * block_size)
    return data.Batches(ids, vocab_size or int(ids.max()) + 1, block_size, batch_rows, seed, slots, span)


def counting(n: int) -> np.ndarray:
    """Ids that are all different, so that an id names its place in the ring: place = id - 4."""
    return np.arange(4, 4 + n, dtype=np.uint16)


def sample(n: int, vocab_size: int, special: float = 0.0) -> np.ndarray:
    r = np.random.default_rng(n)
    return np.where(r.random(n) < special, r.integers(0, 4, n), r.integers(4, vocab_size, n)).astype(np.uint16)


def epoch_of(batches: data.Batches, objective: str, epoch: int = 0, rate: float = 0.15):
    """All rows of an epoch at once: tokens, targets, scored."""
    rows = np.arange(batches.batch_rows)
    steps = [batches.batch(objective, epoch, step, rows, rate) for step in range(batches.steps_per_epoch)]
    return [None if parts[0] is None else np.concatenate(parts) for parts in zip(*steps)]


def hidden_of(batches: data.Batches, objective: str = "MLM", epoch: int = 0, rate: float = 0.15):
    """Rows that lie within the corpus: original tokens, shown tokens, which were hidden, all (rows, T)."""
    original, following, _ = epoch_of(batches, "CLM", epoch)
    shown, targets, _ = epoch_of(batches, objective, epoch, rate)
    hidden = targets != -100
    if objective == "MNTP":
        assert not hidden[:, -1].any()
        hidden = np.roll(hidden, 1, axis=1)
    whole = (following != -100).all(1)
    return original[whole], shown[whole], hidden[whole]


@pytest.mark.parametrize("n, block_size, batch_rows", [
    (960, 16, 8), (960, 16, 7), (963, 16, 8), (961, 16, 60), (1, 16, 2), (5, 16, 2), (40, 1, 3)])
def test_an_epoch_scores_every_token_once(n, block_size, batch_rows):
    batches = build(counting(n), block_size=block_size, batch_rows=batch_rows)
    for epoch in range(4):
        tokens, targets, scored = epoch_of(batches, "CLM", epoch)
        assert tokens.shape == targets.shape and scored is None and tokens.dtype == targets.dtype == np.int64
        assert sorted(targets[targets != -100]) == counting(n).tolist()
        assert sorted(tokens[targets != -100]) == counting(n).tolist()
        live = targets != -100
        assert np.array_equal(targets[live] - 4, (tokens[live] - 4 + 1) % n)  # the token that follows in the ring


def test_order_and_offset_are_new_in_each_epoch_and_seed_and_the_same_in_each_call():
    orders, offsets = [], []
    used = [build(counting(960), seed=seed) for seed in range(3)]
    for epoch, seed in itertools.product(range(3), range(3)):
        first = epoch_of(used[seed], "CLM", epoch)[0][:, 0] - 4
        again = epoch_of(build(counting(960), seed=seed), "CLM", epoch)[0][:, 0] - 4
        assert np.array_equal(first, again) and len(set(first % 16)) == 1
        orders.append(tuple((first - first[0]) % 960))
        offsets.append(int(first[0] % 16))
    assert len(set(orders)) == 9 and len(set(offsets)) > 4
    assert not any(order == tuple(sorted(order)) for order in orders)


@pytest.mark.parametrize("objective", ["MLM", "MNTP"])
def test_what_is_hidden_is_new_in_each_epoch_and_seed(objective):
    runs = []
    for seed, epoch in itertools.product(range(2), range(3)):
        targets = epoch_of(build(counting(64 * 64), block_size=64, seed=seed), objective, epoch)[1]
        runs.append(({row.tobytes() for row in targets != -100}, set(targets[targets != -100].tolist())))
    for (places, ids), (other_places, other_ids) in itertools.combinations(runs, 2):
        assert not places & other_places  # no row has the pattern of another
        assert len(ids & other_ids) < 0.25 * len(ids)  # by chance 15%


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_are_the_same_however_they_are_shared_out(objective):
    ids, n = sample(1000, 90, special=0.1), 12
    parts = {"2 processes": [np.arange(n)[i::2] for i in range(2)], "4 processes": np.split(np.arange(n), 4),
             "padded micro-batches": [np.array([r if r < n else -1 for r in range(i, i + 5)]) for i in range(0, n, 5)],
             "any order": [np.array([7, 3, 11, 0]), np.array([10]), np.array([5, 1, 2, 9, 4, 8, 6])]}
    whole = build(ids, batch_rows=n, span=2.0)
    for step in range(whole.steps_per_epoch):
        expected = whole.batch(objective, 3, step, np.arange(n), 0.15)
        for name, split in parts.items():
            for rows in split:
                got = build(ids, batch_rows=n, span=2.0).batch(objective, 3, step, rows, 0.15)
                for mine, theirs in zip(got, expected):
                    assert mine is theirs is None or np.array_equal(mine[rows >= 0], theirs[rows[rows >= 0]]), name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_rows_and_rows_past_the_end_are_not_scored(objective):
    batches = build(counting(16 * 11), batch_rows=8)
    assert (batches.n_rows, batches.steps_per_epoch) == (11, 2)
    for step, rows, live in [
            (0, [0, -1, 1, -1], [1, 0, 1, 0]), (1, [2, 3, 7, -1], [1, 0, 0, 0]), (2, [0, 1, 2, 3], [0, 0, 0, 0])]:
        tokens, targets, _ = batches.batch(objective, 0, step, np.array(rows), 0.15)
        assert (targets != -100).any(1).tolist() == [bool(x) for x in live]
        assert not (tokens == MASK)[np.array(live) == 0].any()


@pytest.mark.parametrize("objective", ["MLM", "MNTP"])
@pytest.mark.parametrize("span", [1.0, 3.0])
def test_targets_are_the_originals_and_nothing_else_changes(objective, span):
    batches = build(sample(5000, 12, special=0.25), vocab_size=12, block_size=32, span=span)
    original, following, _ = epoch_of(batches, "CLM", 1)
    shown, targets, _ = epoch_of(batches, objective, 1)
    aligned = original if objective == "MLM" else np.roll(original, -1, axis=1)  # MNTP: t holds the original of t + 1
    live = targets != -100
    assert live.any() and np.array_equal(targets[live], aligned[live])
    assert (targets[live] > MASK).all()  # no special token is scored
    hidden = live if objective == "MLM" else np.roll(live, 1, axis=1)
    assert not hidden[following == -100].any()
    assert np.array_equal(shown[~hidden], original[~hidden])
    assert np.array_equal(shown[original <= MASK], original[original <= MASK])  # nor hidden
    assert (shown[hidden] >= MASK).all() and (shown < 12).all()  # no random token is special
    if objective == "MNTP":
        assert not live[:, -1].any() and np.array_equal(shown[:, 0], original[:, 0])


@pytest.mark.parametrize("objective", ["MLM", "MNTP"])
@pytest.mark.parametrize("n", [64 * 20, 64 * 20 + 3, 64 * 20 + 8, 40, 3])
def test_scored_names_each_target_once(objective, n):
    """Of the positions that go through the head, each is named once: in MNTP a row with few tokens named 0 twice."""
    batches = build(sample(n, 90, special=0.1), block_size=64, batch_rows=4)
    for epoch in range(5):
        _, targets, scored = epoch_of(batches, objective, epoch)
        assert scored.shape == (len(targets), 10) and scored.min() >= 0 and scored.max() < 64
        assert all(len(set(row)) == len(row) for row in scored.tolist())
        assert (np.take_along_axis(targets, scored, 1) != -100).sum() == (targets != -100).sum()


@pytest.mark.parametrize("objective", ["MLM", "MNTP"])
@pytest.mark.parametrize("span", [1.0, 3.0])
@pytest.mark.parametrize("rate, expected", [(0.15, 52), (0.3, 105), (0.1234, 43), (0.01, 3), (0.0, 0)])  # of 7 * 50
def test_a_step_scores_exactly_the_rate(objective, span, rate, expected):
    batches = build(sample(50 * 7 * 12, 90, special=0.2), block_size=50, batch_rows=7, rate=rate, span=span)
    for epoch, step in itertools.product(range(3), range(12)):
        assert (batches.batch(objective, epoch, step, np.arange(7), rate)[1] != -100).sum() == expected


@pytest.mark.parametrize("objective", ["MLM", "MNTP"])
def test_a_step_scores_exactly_a_rate_that_decays(objective):
    batches = build(sample(50 * 7 * 40, 90, special=0.2), block_size=50, batch_rows=7, rate=0.3)
    for step, rate in enumerate(np.linspace(0.2987, 0.1503, 40)):
        assert (batches.batch(objective, 0, step, np.arange(7), rate)[1] != -100).sum() == math.floor(7 * 50 * rate)


@pytest.mark.parametrize("span", [1.0, 3.0])
def test_hidden_tokens_are_masked_random_or_kept_80_10_10(span):
    original, shown, hidden = hidden_of(build(sample(200_000, 1000), vocab_size=1000, block_size=128, span=span))
    was, now = original[hidden], shown[hidden]
    masked, kept = (now == MASK).mean(), (now == was).mean()
    assert len(was) > 29_000 and abs(masked - 0.8) < 0.015 and abs(kept - 0.1) < 0.015
    random_ones = now[(now != MASK) & (now != was)]
    assert abs(random_ones.mean() - (4 + 999) / 2) < 30 and len(set(random_ones.tolist())) > 800  # from all over


@pytest.mark.parametrize("span", [1.0, 3.0, 6.0])
def test_spans_have_their_mean_length_and_one_kind(span):
    """n hidden tokens, the last span cut, are 1 + (n - 1) / span spans; the rate is the chance that two meet."""
    rate, n = 0.1, 51.2
    _, shown, hidden = hidden_of(build(sample(512 * 1000, 1000), block_size=512, span=span, rate=rate), rate=rate)
    runs = (hidden[:, 1:] & ~hidden[:, :-1]).sum() + hidden[:, 0].sum()
    assert hidden.sum() / runs * (1 - rate) == pytest.approx(n / (1 + (n - 1) / span), rel=0.03)
    both = hidden[:, 1:] & hidden[:, :-1]
    agree = (shown[:, 1:] == MASK)[both] == (shown[:, :-1] == MASK)[both]
    within = (1 - 1 / span) / (1 - 1 / span + rate / span)  # of neighbours that are both hidden, those of one span
    assert agree.mean() == pytest.approx(within + (1 - within) * (0.8 * 0.8 + 0.2 * 0.2), abs=0.02)


@pytest.mark.parametrize("objective", ["MLM", "MNTP"])
@pytest.mark.parametrize("span, tolerance", [(1.0, 0.017), (3.0, 0.025)])  # 0.017: 5 standard deviations of 12,000 rows
def test_every_position_is_hidden_about_as_often(objective, span, tolerance):
    """Of a span that is cut the first tokens stay, so with spans the row's first position is hidden a little more."""
    _, _, hidden = hidden_of(build(sample(128 * 12_000, 90), block_size=128, batch_rows=1000, span=span), objective)
    share, first = hidden.mean(0), 1 if objective == "MNTP" else 0
    assert not share[:first].any()
    assert np.abs(share[first:] - 0.15 * 128 / (128 - first)).max() < tolerance


@pytest.mark.parametrize("objective", ["MLM", "MNTP"])
def test_a_row_with_few_ordinary_tokens_hides_those(objective):
    ids = np.full(20, START, np.uint16)
    ids[[0, 7, 8]] = 50, 51, 52
    batches = build(ids, vocab_size=60, block_size=20, batch_rows=1, rate=0.3)  # would hide 6
    for epoch in range(40):
        original = epoch_of(batches, "CLM", epoch)[0]
        targets = epoch_of(batches, objective, epoch, rate=0.3)[1]
        ordinary = original[:, 1 if objective == "MNTP" else 0:]
        assert sorted(targets[targets != -100]) == sorted(ordinary[ordinary > MASK])
    tokens, targets, _ = epoch_of(build(np.full(20, START), vocab_size=60, block_size=20), objective)
    assert (tokens == START).all() and (targets == -100).all()


@pytest.mark.parametrize("objective", ["MLM", "MNTP"])
def test_corpus_shorter_than_a_row(objective):
    batches = build(counting(5), block_size=32, batch_rows=2)
    tokens, targets, _ = batches.batch(objective, 0, 0, np.arange(2), 0.15)
    assert tokens.shape == targets.shape == (2, 32)
    hidden = targets[targets != -100].tolist()
    assert 0 < len(hidden) <= 4 and len(set(hidden)) == len(hidden)  # 4 = floor(0.15 * 32), of 5 tokens, each once


# ------------------------------------------------------------------------------------------------------ hash


def test_hash_is_splitmix64():
    """The first outputs of Vigna's splitmix64.c for two seeds."""
    assert int(data.hash64(0)[0]) == 0xE220A8397B1DCDAF and int(data.hash64(1234567)[0]) == 6457827717110365317


def test_hash_bits_are_balanced_and_keys_differ():
    h = data.hash64(3, np.arange(250)[:, None], np.arange(250))
    assert h.shape == (250, 250) and h.dtype == np.uint64
    assert len(np.unique(h)) == h.size  # each pair of keys, in each order
    assert not np.intersect1d(h, data.hash64(4, np.arange(250)[:, None], np.arange(250))).size
    bits = (h.reshape(-1, 1) >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.01  # 5 standard deviations of 62,500
    assert np.abs(np.corrcoef(bits[:20_000].T) - np.eye(64)).max() < 0.04
    for bit in range(64):  # one bit of a key turns half of the result
        turned = data.hash64(12345 ^ 1 << bit, np.arange(500)) ^ data.hash64(12345, np.arange(500))
        assert abs(np.bitwise_count(turned).mean() - 32) < 1


def test_uniform_fills_the_unit_interval():
    u = data.uniform(data.hash64(7, np.arange(100_000)))
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(np.histogram(u, 10, (0, 1))[0] / 10_000 - 1).max() < 0.05
    assert data.uniform(np.uint64([2 ** 64 - 1, 0])).tolist() == [1 - 2 ** -53, 0]
