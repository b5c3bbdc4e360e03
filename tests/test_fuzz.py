"""Bad input by the thousand: whatever is fed in ends in a right result or in one line, and never runs as code.

    python -m pytest tests/test_fuzz.py                # about 30 s, the same examples every time
    FUZZ=100 python -m pytest tests/test_fuzz.py -s    # 100 times as many, and how each kind of input ended

Fuzzed are schedules, flags, override files, text, tokenizers, corpus folders, evaluation files and checkpoints: good
ones with something changed, and noise. Any exception but our own, with one line in it, is a failure.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import time
import zipfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import config
import data
import eval as evaluation
import model as models
import prepare
import schedule
import train
from antlm.checkpoint import digest, load_checkpoint, load_model, load_run
from antlm.tokenizer import BOUNDARIES, MASK, START, Tokenizer, save_tokenizer
from babylm.tasks import read_tasks
from config import UserError

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TIMES = int(os.environ.get("FUZZ", 1))
BACKBONES = ("babyllama", "ltg_bert")
TEXT = """= = = The pond = = =

*MOT: look at the ducks , do you see the ducks ?
A: I've got 12 ducks , they're quacking , quack quack .
Zwölf Enten schwimmen über den See , 十二只鸭子 , naïve café .   The ducks sleep .
"""
ENDED = {}  # kind of input: how many ended how


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    for kind, counts in ENDED.items():
        ends = ", ".join(f"{n:,} {how}" for how, n in counts.most_common())
        print(f"\n{kind}: {counts.total():,} tried, {ends}", end="")


def fuzz(n: int):
    """Settings for n examples, the same in each run."""
    return hypothesis.settings(max_examples=n * TIMES, derandomize=True, deadline=None, database=None,
                               suppress_health_check=list(hypothesis.HealthCheck))


def attempt(kind: str, errors, call):
    """What the call returns, or None where it ended in one line of one of these errors."""
    counts = ENDED.setdefault(kind, Counter())
    try:
        result = call()
    except errors as e:
        line = str(e)
        assert line and len(line.splitlines()) == 1 and len(line) < 99_999, line[:999]
        counts["one line"] += 1
        return None
    counts["right"] += 1
    return result


# -------------------------------------------------------------------------------------------------- what is fed

ENDLESS, NESTED = "a number of 5000 digits", "600 lists"  # stand for what Python will not print
numbers = (st.integers() | st.integers(0, 9) | st.sampled_from([2 ** 31, 2 ** 63, 10 ** 400]) | st.floats()
           | st.sampled_from([-0.0, 1e-300, float("nan"), float("inf")]))
words = st.text() | st.text("aé世 \n\r\0\t'\"\\{}[]:,=+_.-/*19", max_size=12) | st.sampled_from(
    [ENDLESS, NESTED, "../../etc/passwd", "/dev/zero", "\ud800", "<s>", "\u202e", "a" * 999, "none", "O", "CLM"])
scalars = st.none() | st.booleans() | numbers | words
values = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(words, x, max_size=3), max_leaves=6)


@st.composite
def changed(draw, good):
    """A deep copy of plain data in which one to three values became others, went, came twice or came anew."""
    content = pickle.loads(pickle.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        at = content
        while True:  # walk down to some value
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], (dict, list)) and at[key] and draw(st.integers(0, 4)):
                at = at[key]
                continue
            how = draw(st.integers(0, 9))
            if how == 0:
                del at[key]
            elif how == 1 and isinstance(at, list):
                at.append(at[key])
            elif how == 1:
                at[draw(words)] = at[key]
            else:
                at[key] = draw(values)
            break
    return content


@st.composite
def damaged(draw, good: bytes):
    """Bytes with some cut, turned, put in, doubled or in disorder."""
    raw = good
    for _ in range(draw(st.integers(1, 3))):
        a, b = sorted((draw(st.integers(0, len(raw))), draw(st.integers(0, len(raw)))))
        put = draw(st.binary(max_size=4) | st.sampled_from(
            [b"\n", b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"{", b"]", b"1e999", b"[" * 2000]))
        raw = draw(st.sampled_from([raw[:a], raw[b:], raw[:a] + put + raw[a:], raw[:a] + put + raw[a + len(put):],
                                    raw[:a] + raw[b:], raw[:b] + raw[a:], raw[b:] + raw[:a]]))
    return raw


def dumps(content) -> bytes:
    """JSON as strange as the content: with NaN, endless numbers, deep lists and halves of surrogate pairs."""
    raw = json.dumps(content).encode().replace(f'"{ENDLESS}"'.encode(), b"9" * 5000)
    return raw.replace(f'"{NESTED}"'.encode(), b"[" * 600 + b"]" * 600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A good corpus, and its text."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "text.txt").write_text(TEXT, "utf-8")
    prepare.prepare([str(folder / "text.txt")], [str(folder / "text.txt")], str(folder / "corpus"), vocab_size=300)
    return folder


@pytest.fixture(scope="module")
def tok(folder) -> Tokenizer:
    return Tokenizer(folder / "corpus" / "tokenizer.json")


# ---------------------------------------------------------------------------------------- schedules and settings


def test_schedules():
    part = st.sampled_from([*"4_:+0 \n٣", "CLM", "MLM", "MNTP", "15", "-1", "1.5", "clm", "9" * 5000])
    mix = st.lists(st.sampled_from(["CLM", "2MLM", "15MNTP"]), max_size=3).map(":".join)
    phase = st.builds("{}_{}".format, st.integers(-1, 30), mix)

    @fuzz(600)
    @hypothesis.given(words | st.lists(part).map("".join) | st.lists(phase, max_size=4).map("+".join))
    def check(text):
        def refused():
            try:
                return schedule.parse(text)
            except ValueError as e:
                assert str(e).startswith("schedule ")
                raise
        if phases := attempt("schedules", ValueError, refused):
            s = schedule.Schedule(phases, steps_per_epoch=3, lr=1.0)
            assert schedule.parse("+".join(map(str, phases))) == phases
            assert s.phase(0) == 0 and s.phase(s.steps - 1) == len(phases) - 1 and s.ends_phase(s.steps - 1)
            assert sum(n for _, n in phases[0].rows(10 ** 6)) == 10 ** 6
    check()


def is_sound(s: train.Settings):
    json.dumps(asdict(s), allow_nan=False).encode()
    for name, value in asdict(s).items():
        kind = type(getattr(train.Settings, name))
        assert type(value) is kind and (kind is not int or abs(value) < 1 << 63)
        for text in value if kind is tuple else (value,):
            assert not isinstance(text, str) or text.encode() is not None and "\0" not in text
    schedule.parse(s.schedule)
    s.model_config(300)


names = st.sampled_from(sorted(asdict(train.Settings()))) | words


def test_flags(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    given = scalars.map(lambda x: str(x).replace(ENDLESS, "9" * 5000)) | st.sampled_from(
        ["", "true", "auto", "1", "0.5", "64", "4_CLM+2_MLM", "ltg_bert", "1_000", " 5", "cpu"])
    good = ["--lr=1e-3", "--tied", "--schedule=2_CLM", "--n_layer=3", "--out_dir=runs/é", "--prepare=a.py x,b.py"]
    flag = (st.builds("--{}={}".format, names, given) | names.map("--{}".format) | words.map("--{}".format)
            | st.sampled_from(good))

    @fuzz(600)
    @hypothesis.given(st.lists(flag, min_size=1, max_size=3))
    def check(flags):
        if s := attempt("flags", UserError, lambda: config.load(train.Settings, flags)):
            is_sound(s)
    check()


def test_override_files(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    literal = (values | st.tuples(values)).map(lambda x: repr(x).replace(repr(ENDLESS), "10 ** 5000"))
    line = st.builds("{} = {}\n".format, names.filter(str.isidentifier), literal | st.sampled_from([
        "3", "1e-3", "'2_CLM'", "'ltg_bert'", "64", "float('nan')", "{1: 2}.keys()", "int", "b'x'", "1 / 0", "("]))
    shipped = [p.read_bytes() for p in sorted(Path(config.__file__).parent.glob("[bq]*.py"))]
    path = tmp_path / "mine.py"

    @fuzz(400)
    @hypothesis.given(st.lists(line, min_size=1, max_size=4).map(lambda x: "".join(x).encode("utf-8", "surrogatepass"))
                      | st.sampled_from(shipped).flatmap(damaged))
    def check(raw):
        path.write_bytes(raw)
        if s := attempt("override files", UserError, lambda: config.load(train.Settings, [str(path)])):
            is_sound(s)
    check()


# ---------------------------------------------------------------------------------------------- text and tokens


GOOD = [
    b"the ducks", *(bytes([b]) for b in b" \n\r\0"), b"\r\n", b"\n\r\n", b"\xef\xbb\xbf", "Zwölf 世界".encode(),
    "\u202eשלום עולם مرحبا\u200f".encode(), "e\u0301\u0323\u0308".encode(), "👩‍👩‍👧 👍🏽🇫🇮".encode(),
    "\x85\u2028\u2029\u3000\xa0".encode(), "= = = Ende = = =".encode(), b"<s></s><mask><pad>", b"1234567890", b"....",
    b"\t\t \x1c\x1d\x0b\x0c", b"a" * 3000, b" " * 3000, b"'s 're 'LL", "\U0010ffff\ufffe\ufffd".encode()]
BAD = [b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", b"\xe9", "duck".encode("utf-16"), "é".encode("cp1252")]


def test_text(folder, tmp_path, tok):
    """A corpus with boundary "none" reads as its lines do, blank ones aside; "line" has the same words."""
    text = tmp_path / "text.txt"

    good = st.lists(st.sampled_from(GOOD) | words.map(lambda x: x.encode("utf-8", "replace")), max_size=20)
    bad = st.lists(st.sampled_from(GOOD + BAD) | st.binary(max_size=3), max_size=8)

    @fuzz(150)
    @hypothesis.given((good | good | bad).map(b"".join), st.booleans())
    def check(raw, own):
        text.write_bytes(raw)
        for name in ("none", "line"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        options = {} if own else {"tokenizer": str(folder / "corpus" / "tokenizer.json")}
        arguments = [str(text)], [str(folder / "text.txt")]

        def prepare(boundary: str):
            with contextlib.redirect_stdout(io.StringIO()):
                return prepare.prepare(*arguments, str(tmp_path / boundary), boundary=boundary, vocab_size=270, **options)

        if not attempt("text", UserError, lambda: prepare("none")):
            assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
            return
        prepare("line")
        none, line = data.Corpus(tmp_path / "none"), data.Corpus(tmp_path / "line")
        lines = [x for x in raw.decode().removeprefix("\ufeff").replace("\r\n", "\n").split("\n") if x]
        assert none.tokenizer.bpe.decode_bytes(none.train.tolist()).decode() == "".join(x + "\n" for x in lines)
        assert line.tokenizer.bpe.decode_bytes(line.train.tolist()).decode() == "".join("<s>" + x for x in lines)
        assert (none.train > MASK).all() and (line.train == START).sum() == len(lines)
    check()


def test_round_trip_of_any_text(tok):
    few = st.text(min_size=1, max_size=2) | st.sampled_from(" .a1\t世\u3000")
    runs = st.lists(st.builds(lambda x, n: x * n, few, st.integers(1, 3000))).map("".join)

    @fuzz(400)
    @hypothesis.given(st.text() | runs)
    def check(text):
        ids = attempt("any text", (), lambda: tok.encode(text))
        assert tok.bpe.decode_bytes(ids).decode() == tok.decode(ids) == text
        assert all(MASK < i < tok.vocab_size for i in ids)
        for boundary in BOUNDARIES:
            assert tok.encode_text(text, boundary)[1:] == [
                START if boundary == "line" and tok.decode([i]) == "\n" else i for i in ids]
    check()


LONG = {  # a line of n bytes, about
    "words": lambda n: "the ducks swim , " * (n // 17), "one letter": lambda n: "a" * n, "dots": lambda n: "." * n,
    "spaces": lambda n: " " * n + "x", "digits": lambda n: "7" * n, "no spaces": lambda n: "世é" * (n // 5),
    "tabs": lambda n: "\t " * (n // 2), "accents": lambda n: "e" + "\u0301" * (n // 2),
    "returns": lambda n: "x" + "\r" * n + "y"}


@pytest.mark.parametrize("line", LONG)
def test_one_long_line(folder, tmp_path, line):
    """Some MB here, 12 and 100 MB of words in the long form; a tokenizer is trained on it as well."""
    n = 100_000_000 if TIMES > 1 and line == "words" else 1_200_000 * min(TIMES, 10)
    text = LONG[line](n)
    (tmp_path / "text.txt").write_text(f"a duck\n{text}\n", "utf-8", newline="")
    for options in ({"vocab_size": 290}, {"tokenizer": str(folder / "corpus" / "tokenizer.json")}):
        with contextlib.redirect_stdout(io.StringIO()):
            attempt("long lines", (), lambda: prepare.prepare([str(tmp_path / "text.txt")], [str(folder / "text.txt")],
                                                           str(tmp_path / "out"), boundary="none", **options))
        corpus = data.Corpus(tmp_path / "out")
        assert corpus.tokenizer.bpe.decode_bytes(corpus.train.tolist()).decode() == f"a duck\n{text}\n"
        shutil.rmtree(tmp_path / "out")


def test_tokenizer_files(folder, tmp_path):
    raw, path = (folder / "corpus" / "tokenizer.json").read_bytes(), tmp_path / "tokenizer.json"
    content = json.loads(raw)
    sample = {**content, "model": {**content["model"], "vocab": dict(list(content["model"]["vocab"].items())[:40]),
                                   "merges": content["model"]["merges"][:5]}}  # what hypothesis draws keys from

    def whole(x: dict) -> dict:  # give back what is left out above
        with contextlib.suppress(AttributeError, TypeError, LookupError):
            x["model"]["vocab"] |= dict(list(content["model"]["vocab"].items())[40:])
            x["model"]["merges"] += content["model"]["merges"][5:]
        return x

    @fuzz(300)
    @hypothesis.given(changed(sample).map(whole).map(dumps) | damaged(raw) | values.map(dumps))
    def check(raw):
        path.write_bytes(raw)
        if t := attempt("tokenizer files", UserError, lambda: Tokenizer(path)):
            ids = t.encode(TEXT)
            assert t.decode(ids) == TEXT and max(ids) < t.vocab_size
    check()


def digests(folder: Path, meta: dict):
    """Make meta.json as consistent as a liar would."""
    with contextlib.suppress(AttributeError, TypeError, LookupError):
        meta["tokenizer_sha256"] = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
        for split in ("train", "dev"):
            meta[split]["sha256"] = hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()


def test_corpus_folders(folder, tmp_path):
    good, bad = folder / "corpus", tmp_path / "corpus"
    files = {path.name: path.read_bytes() for path in good.iterdir()}
    meta = json.loads(files["meta.json"])
    ids = st.lists(st.integers(0, 299) | st.integers(0, 2 ** 16 - 1), max_size=6).map(lambda x: np.array(x, np.uint16))

    @fuzz(250)
    @hypothesis.given(st.data(), st.sampled_from(["meta", "bytes", "ids"]))
    def check(draw, what):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        lie = pickle.loads(pickle.dumps(meta))
        if what == "bytes":
            name = draw.draw(st.sampled_from(sorted(files)))
            (bad / name).write_bytes(draw.draw(damaged(files[name])))
        elif what == "ids":  # in which all is consistent but, perhaps, the highest id
            some = draw.draw(ids)
            (bad / "train.bin").write_bytes(some.tobytes())
            lie["train"] |= {"tokens": len(some), "words": min(3, len(some)), "max_id": draw.draw(st.sampled_from(
                [int(some.max(initial=0)), 299]))}
        if what == "meta":
            lie = draw.draw(changed(meta))
        if what != "bytes" or draw.draw(st.booleans()):
            digests(bad, lie)
            (bad / "meta.json").write_bytes(dumps(lie))
        if corpus := attempt(f"corpus folders, {what}", UserError, lambda: data.Corpus(bad)):
            assert corpus.vocab_size == 300 and corpus.boundary in BOUNDARIES
            for name in ("train", "dev"):
                array = getattr(corpus, name)
                assert np.array_equal(array, np.fromfile(bad / f"{name}.bin", np.uint16)) and 0 < array.max() + 1 <= 300
                assert 0 < corpus.meta[name]["words"] / len(array) <= 1
            for objective in ("CLM", "MLM", "MNTP"):
                tokens, _, _ = data.Batches(corpus.train, 300, 16, 4, 0, 4).batch(objective, 0, 0, np.arange(4), 0.2)
                assert tokens.min() >= 0 and tokens.max() < 300
    check()


# -------------------------------------------------------------------------------------------- evaluation files


LINES = [
    {"sentence_good": "The ducks swim.", "sentence_bad": "The ducks swims.", "linguistics_term": "agreement"},
    {"Context1": "Zwölf Enten.", "Context2": "Elf.", "Target1": "They swim.", "Target2": "They fly.", "Domain": "a"},
    {"input_prefix": "Box 0 has ", "options": ["a duck", "ice", "naïve 世界"], "numops": 2},
    {"prefix_acceptable": "A duck", "prefix_unacceptable": "A sock", "property_phrase": "can quack."}]
odd = st.sampled_from([
    "a", "?", "\n", " a", "a ", "\u0301", "世", "👩‍👩‍👧", "\u3000x", "a\r\nb", "<s>", "\0", "x" * 300, "\ufeff"])


def test_evaluation_files(tmp_path, tok):
    newline = tok.encode("\n")[0]

    @st.composite
    def file(draw):
        kind = draw(st.sampled_from(LINES))
        other = {k: draw(odd | words) if isinstance(v, str) and draw(st.booleans()) else v for k, v in kind.items()}
        lines = [kind, other]
        raw = b"\n".join(map(dumps, lines))
        return draw(st.just(raw) | changed(lines).map(lambda x: b"\n".join(map(dumps, x))) | damaged(raw))

    def read(task: Path, protocol: str):
        with contextlib.redirect_stderr(io.StringIO()):
            return read_tasks(str(task), protocol=protocol)

    @fuzz(300)
    @hypothesis.given(file(), st.sampled_from(["2025", "2024"]), st.sampled_from(BOUNDARIES))
    def check(raw, protocol, boundary):
        (tmp_path / "task.jsonl").write_bytes(raw)
        for item in attempt("evaluation files", UserError, lambda: read(tmp_path, protocol)) or ():
            json.dumps([item.task, item.group, item.subset, item.options], ensure_ascii=False).encode()
            for mode in ("causal", "masked", "mntp"):
                ids, first = evaluation.encode(item.options, tok, boundary, protocol, mode)
                for (text, start), row, at in zip(item.options, ids, first):
                    assert 0 <= row.min() and row.max() < tok.vocab_size and 1 <= at < len(row)
                    if protocol == "2024":
                        text, start = (text, len(text[:start].rstrip())) if start else (" " + text, 0)
                    bare = protocol == "2024" and start and mode == "causal"  # no start token in front
                    plain = [newline if i == START else i for i in row.tolist()][0 if bare else 1:]
                    context, at = len(text[:start].encode()), at - (not bare)
                    assert tok.bpe.decode_bytes(plain).decode() == text
                    # The target's first token is the first that ends beyond the context; with none before it, the next.
                    assert len(tok.bpe.decode_bytes(plain[:at + 1])) > context
                    assert len(tok.bpe.decode_bytes(plain[:at])) <= context or at == 1 and bare
    check()


# -------------------------------------------------------------------------------------------------- checkpoints


def tiny(backbone: str = "babyllama", vocab_size: int = 300) -> models.Transformer:
    torch.manual_seed(0)
    return models.Transformer(models.ModelConfig(backbone, vocab_size, 2, 2, 8, 12, n_bucket=4, max_position=8)).eval()


def contents(tok, backbone: str = "babyllama") -> dict:
    model = tiny(backbone)
    return dict(step=3, settings={"schedule": "1_CLM+1_MLM", "block_size": 16}, boundary="line", optimizer=[],
                tokenizer_sha256=tok.sha256, config=asdict(model.config), model=dict(model.state_dict()))


@pytest.fixture
def run(tmp_path, folder) -> Path:
    shutil.copy(folder / "corpus" / "tokenizer.json", tmp_path)
    return tmp_path


def write(path: Path, content: dict) -> Path:
    """A checkpoint whose checksum is right."""
    torch.save(content | {"sha256": digest(content)}, path)
    return path


REFUSED = UserError, UserError, UserError


class Runs:
    """Unpickled, it calls."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _zip(path: Path, pickled: bytes):
    with zipfile.ZipFile(path, "w") as z:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            z.writestr(f"archive/{name}", content)


def _jit(path: Path, planted):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    with zipfile.ZipFile(path, "a") as z:
        z.writestr(f"{path.stem}/data.pkl", pickle.dumps(planted))


WAYS = {  # to write a planted object into a file
    "checkpoint": lambda path, x: torch.save({"step": 1, "model": {"x": x}}, path),
    "only": lambda path, x: torch.save(x, path),
    "key": lambda path, x: torch.save({x: 1}, path),
    "old format": lambda path, x: torch.save({"model": x}, path, _use_new_zipfile_serialization=False),
    "pickle": lambda path, x: path.write_bytes(pickle.dumps(x)),
    "pickle of protocol 0": lambda path, x: path.write_bytes(pickle.dumps(x, 0)),
    "zip": lambda path, x: _zip(path, pickle.dumps(x, 2)),
    "zip of protocol 5": lambda path, x: _zip(path, pickle.dumps({"model": x}, 5)),
    "TorchScript": _jit,
    "numpy": lambda path, x: torch.save({"model": np.array([x], object)}, path),
    "numpy file": lambda path, x: np.save(open(path, "wb"), np.array([x], object), allow_pickle=True),
}


@pytest.mark.filterwarnings("ignore:Detected pickle|Duplicate name|.*torch.jit")
@pytest.mark.parametrize("way", WAYS)
def test_planted_code_is_refused_and_does_not_run(run, way):
    ran, path = run / "ran", run / "step_0000003.pt"
    code = f"open({str(ran)!r}, 'w')"
    for planted in (Runs(os.system, f"touch {ran}"), Runs(eval, code), Runs(exec, code), Runs(os.mkdir, str(ran)),
                    Runs(Path.touch, ran), Runs(torch.load, str(ran)), Runs(__import__, "antigravity"),
                    Runs(torch.hub.load_state_dict_from_url, "file:///dev/null")):
        WAYS[way](path, planted)
        for load in (lambda: load_checkpoint(path), lambda: load_run(str(run), "cpu"),
                     lambda: load_run(str(path), "cpu")):
            assert attempt("planted code", REFUSED, load) is None
        assert not ran.exists()
    pickle.loads(pickle.dumps(Runs(os.mkdir, str(ran))))
    assert ran.exists()  # the plants are live


HUGE = {  # what a checkpoint claims that it cannot hold
    "layers": lambda c: c["config"].update(n_layer=10 ** 9),
    "layers beyond counting": lambda c: c["config"].update(n_layer=10 ** 300),
    "width": lambda c: c["config"].update(n_embd=10 ** 7),
    "width beyond counting": lambda c: c["config"].update(n_embd=10 ** 30),
    "vocabulary": lambda c: c["config"].update(vocab_size=10 ** 12),
    "feed-forward": lambda c: c["config"].update(n_ff=2 ** 62),
    "heads": lambda c: c["config"].update(n_head=10 ** 9),
    "positions": lambda c: c["config"].update(max_position=10 ** 10),
    "buckets": lambda c: c["config"].update(n_bucket=10 ** 9, max_position=10 ** 9 + 1),
}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("claim", HUGE)
def test_claims_are_compared_with_the_weights_before_anything_is_built(run, tok, claim, backbone):
    content = contents(tok, backbone)
    HUGE[claim](content)
    path, began = write(run / "step_0000003.pt", content), time.time()
    assert attempt("claims", REFUSED, lambda: load_run(str(path), "cpu")) is None
    assert time.time() - began < 5
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_model(load_checkpoint(path), name=path)


def deflated(path: Path):
    torch.save({"model": {"x": torch.zeros(10 ** 7)}}, path)
    with zipfile.ZipFile(path) as z:
        records = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, raw in records.items():
            z.writestr(name, raw)


def laughs(path: Path):  # two to the power of forty numbers, in forty lists
    x = [0]
    for _ in range(40):
        x = [x, x]
    torch.save({"model": x}, path)


def in_itself(path: Path):
    endless = {}
    endless["model"] = endless
    torch.save(endless, path)


BOMBS = {  # small files that hold much, or seem to
    "deflated": deflated, "in itself": in_itself, "laughs": laughs,
    "expanded": lambda path: torch.save({"x": torch.zeros(1).expand(10 ** 8, 10 ** 8)}, path),
    "sparse": lambda path: torch.save({"x": torch.sparse_coo_tensor([[0], [0]], [1.0], [10 ** 9] * 2)}, path),
    "without memory": lambda path: torch.save({"x": torch.empty(10 ** 8, 10 ** 8, device="meta")}, path),
    "deep": lambda path: _zip(path, b"\x80\x02}X\x01\0\0\0a" + b"]" * 10 ** 5 + b"a" * (10 ** 5 - 1) + b"s."),
    "bytes": lambda path: _zip(path, b"\x80\x03B\xff\xff\xff\x7fx."),
    "text": lambda path: _zip(path, b"\x80\x02X\xff\xff\xff\xffx."),
    "number": lambda path: _zip(path, b"\x80\x02\x8b\xff\xff\xff\x7fx."),
    "frame": lambda path: _zip(path, b"\x80\x04\x95" + b"\x7f" * 8),
}


@pytest.mark.filterwarnings("ignore:Detected pickle|Sparse")
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused(run, bomb, monkeypatch):
    BOMBS[bomb](run / "step_0000003.pt")
    if bomb == "deflated":
        monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("was unpacked"))
    assert (run / "step_0000003.pt").stat().st_size < 500_000
    assert attempt("bombs", REFUSED, lambda: load_run(str(run), "cpu")) is None


WRONG = {
    "True": True, "text": "2", "NaN": float("nan"), "fraction": 2.5, "nothing": None, "list": [2], "negative": -1,
    "zero": 0, "tensor": torch.tensor(2)}


@pytest.mark.parametrize("wrong", WRONG)
def test_settings_of_a_wrong_type_are_refused(run, tok, wrong):
    for name in asdict(models.ModelConfig()):
        if (name, wrong) in {("tied", "True"), ("dropout", "zero")}:
            continue
        content = contents(tok)
        content["config"][name] = WRONG[wrong]
        assert attempt("wrong settings", REFUSED, lambda: load_run(
            str(write(run / "step_0000003.pt", content)), "cpu")) is None, name


@pytest.mark.parametrize("change", [
    lambda w: w.int(), lambda w: w.bool(), lambda w: w.to(torch.complex64), lambda w: w.to_sparse(),
    lambda w: w.tolist(), lambda w: w[:1], lambda w: w[None], lambda w: None, lambda w: w.to("meta")])
def test_weights_of_another_kind_are_refused(tok, change):
    content = contents(tok)
    content["model"]["embedding.tokens.weight"] = change(content["model"]["embedding.tokens.weight"])
    with pytest.raises(UserError, match="^mine.pt: ") as e:
        load_model(content, name="mine.pt")
    assert len(str(e.value).splitlines()) == 1


def test_checkpoints(run, tok):
    """Settings and weights with something changed and a right checksum; and bytes with something changed."""
    good = {backbone: contents(tok, backbone) for backbone in BACKBONES}
    buffer = io.BytesIO()
    torch.save(good["babyllama"] | {"sha256": digest(good["babyllama"])}, buffer)
    path = run / "step_0000003.pt"

    @fuzz(250)
    @hypothesis.given(st.data(), st.sampled_from(BACKBONES), st.integers(0, 3))
    def check(draw, backbone, what):
        if what == 0:
            path.write_bytes(draw.draw(damaged(buffer.getvalue())))
        else:
            plain = draw.draw(changed({k: v for k, v in good[backbone].items() if k != "model"}))
            write(path, plain if what == 1 and draw.draw(st.booleans()) else plain | {"model": good[backbone]["model"]})
        if found := attempt("checkpoints, bytes" if what == 0 else "checkpoints, settings", REFUSED,
                            lambda: load_run(str(path), "cpu")):
            _, content, model, _ = found
            assert {k: type(v) for k, v in asdict(model.config).items()} == {
                k: type(v) for k, v in good[backbone]["config"].items()}
            logits = model(torch.tensor([[1, 5, 299]]), causal=True)
            assert logits.shape == (1, 3, 300)
            json.dumps(content["config"], ensure_ascii=False)
            schedule.parse(content["settings"]["schedule"])
    check()


# ------------------------------------------------------------------------------------------- long and odd sizes


@pytest.mark.parametrize("mode", ["causal", "masked", "mntp"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_options_beyond_a_training_row_are_scored_whole(tmp_path, tok, backbone, mode):
    """Beyond max_position, too: the score is that of one forward pass over all tokens, and depends on the first."""
    model = tiny(backbone)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.5)
    text = "The ducks swim on the pond and sleep on the ice . " * 8
    options = [(text + "quack", len(text)), ("A" + text[1:] + "quack", len(text))]
    ids, first = evaluation.encode(options, tok, "line", "2025", mode)
    assert len(ids[0]) > 100 > 16 > model.config.max_position
    found = evaluation.score(model, ids, first, mode, ["x", "y"])
    expected = []
    for row, at in zip(ids, first):
        total = 0.0
        for i in range(at, len(row)):
            x = torch.tensor(row[None].copy())
            if mode != "causal":
                x[0, i] = MASK
            logits = model(x, causal=mode == "causal")[0, i if mode == "masked" else i - 1]
            total += logits.double().log_softmax(-1)[row[i]].item()
        expected.append(total)
    assert found == pytest.approx(expected, abs=1e-3) and found[0] != pytest.approx(found[1], abs=1e-6)


def evaluate(run: Path, task: Path, *args) -> dict:
    evaluation.main([str(run), "--task", str(task), "--device", "cpu", "--out", str(run / "out.json"), *args])
    return json.loads((run / "out.json").read_text("utf-8"))["tasks"]["task"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_lengths_are_counted_and_one_token_sentences_scored(run, tok, capsys, backbone):
    write(run / "step_0000003.pt", contents(tok, backbone))
    long = "duck " * 40
    pairs = [("a", "b"), ("?", "\n!"), ("世", "\u0301"), (long + "a", long + "b"), (long + "a", "a")]
    (run / "task.jsonl").write_bytes(b"\n".join(dumps({"sentence_good": a, "sentence_bad": b}) for a, b in pairs))
    assert len(tok.encode("a")) == 1
    result = evaluate(run, run / "task.jsonl", "--mode", "causal", "masked", "mntp")
    assert result["longer_than_training_rows"] == 3 and result["items"] == 5
    assert "3 options are longer than the 16 tokens of a training row; scored whole" in capsys.readouterr().out
    for mode in ("causal", "masked", "mntp"):
        assert all(np.isfinite(x).all() for x in result["subsets"]["task"]["scores"][mode])


def test_a_vocabulary_of_70000(tmp_path):
    """Ids beyond 65,535 travel from text through token file and batches."""
    pairs = [(bytes([a]), bytes([b])) for a in range(97, 123) for b in range(97, 123)]
    triples = [(a + b, bytes([c])) for a, b in pairs for c in range(97, 123)]
    quads = [(a + b, bytes([c])) for a, b in triples for c in range(97, 123)]
    merges = [*pairs, *triples, *quads][:70_000 - 260]
    assert len(merges) == 69_740
    save_tokenizer(tmp_path / "large.json", merges)
    tok = Tokenizer(tmp_path / "large.json")
    assert tok.vocab_size == 70_000
    last = [(a + b).decode() for a, b in merges[-3000:]]
    (tmp_path / "text.txt").write_text("\n".join(last))
    prepare.prepare([str(tmp_path / "text.txt")], [str(tmp_path / "text.txt")], str(tmp_path / "corpus"), vocab_size=260,
                 tokenizer=str(tmp_path / "large.json"))
    corpus = data.Corpus(tmp_path / "corpus")
    assert corpus.meta["train"]["dtype"] == "uint32" == corpus.train.dtype.name and corpus.vocab_size == 70_000
    assert corpus.train.max() == 69_999 and (corpus.train > 65_535).sum() == 3000
    assert corpus.tokenizer.decode(corpus.train.tolist()) == "".join("<s>" + word for word in last)
    batches = data.Batches(corpus.train, 70_000, 50, 8, 0, 10)
    seen, replaced = [], set()
    for step in range(batches.steps_per_epoch):
        tokens, targets, _ = batches.batch("CLM", 0, step, np.arange(8), 0)
        seen += tokens[targets != -100].tolist()
        masked, hidden, _ = batches.batch("MLM", 0, step, np.arange(8), 0.2)
        assert set(hidden[hidden != -100].tolist()) <= set(corpus.train.tolist())
        replaced |= set(masked.ravel().tolist()) - set(corpus.train.tolist())
    assert sorted(seen) == sorted(corpus.train.tolist())
    assert len(replaced) > 20 and max(replaced) < 70_000  # the mask, and random ids from all over the vocabulary


@pytest.mark.parametrize("objective", ["CLM", "MLM", "MNTP"])
def test_a_vocabulary_of_bytes_alone(tmp_path, objective):
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) + "é世\n".encode() * 9)
    prepare.prepare([str(tmp_path / "text.txt")], [str(tmp_path / "text.txt")], str(tmp_path / "corpus"), vocab_size=260)
    corpus = data.Corpus(tmp_path / "corpus")
    assert corpus.vocab_size == 260 and corpus.meta["train"]["dtype"] == "uint16"
    tokens, targets, _ = data.Batches(corpus.train, 260, 16, 8, 0, 4).batch(objective, 0, 0, np.arange(8), 0.2)
    assert 0 <= tokens.min() and tokens.max() < 260 and targets.max() > MASK


@pytest.mark.parametrize("text, said", [
    ("a duck\n", "do not fill a row"), ("\r\n \n", "no words"), ("\ufeff\n", "no words"), ("", "no words")])
def test_a_corpus_shorter_than_a_row(folder, tmp_path, text, said):
    (tmp_path / "text.txt").write_text(text, "utf-8", newline="")
    flags = [f"--corpus={tmp_path / 'corpus'}", f"--out_dir={tmp_path / 'run'}", "--device=cpu"]
    with pytest.raises(UserError, match=said) as e:
        prepare.prepare([str(tmp_path / "text.txt")], [str(folder / "text.txt")], str(tmp_path / "corpus"),
                     tokenizer=str(folder / "corpus" / "tokenizer.json"))
        train.train(config.load(train.Settings, flags))
    assert len(str(e.value).splitlines()) == 1
