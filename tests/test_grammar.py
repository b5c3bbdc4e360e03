"""tools/grammar.py: its text and its minimal pairs. Alone: python -m pytest tests/test_grammar.py"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import grammar  # noqa: E402

SIZE = 10000


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("grammar") / "text"
    grammar.write(out, SIZE, seed=1)
    return out


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def words(sentence: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", sentence.lower())


def pairs(made: Path, uid: str) -> list[dict]:
    return [json.loads(line) for line in lines(made / "pairs" / f"{uid}.jsonl")]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/grammar.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_seed_decides_every_byte(tmp_path):
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        done = run(tmp_path / "new" / name, "--sentences", 300, "--seed", seed)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    a, b, c = (everything(tmp_path / "new" / name) for name in "abc")
    assert a == b and a.keys() == c.keys() and not any(a[name] == c[name] for name in a)


def test_sentences_are_distinct_and_written_as_sentences(made):
    train, dev = lines(made / "train.txt"), lines(made / "dev.txt")
    assert len(train) == SIZE and len(dev) == SIZE * 3 // 100
    assert len({*train, *dev}) == len(train) + len(dev)
    for sentence in train + dev:
        assert re.fullmatch(r"[A-Z][a-z]*(,? [A-Za-z]+)*[.?]", sentence), sentence
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence.lower()), sentence


@pytest.mark.parametrize("uid", grammar.PHENOMENA)
class TestPairs:
    def test_fields(self, made, uid):
        found = pairs(made, uid)
        assert len({pair["sentence_good"] for pair in found}) == len(found) >= 100
        for number, pair in enumerate(found):
            assert pair.keys() == {"sentence_good", "sentence_bad", "field", "linguistics_term", "UID", "pair_id"}
            assert pair["UID"] == uid and pair["pair_id"] == str(number)
            assert all(isinstance(value, str) and value for value in pair.values())

    def test_differ_in_one_or_two_words_in_one_place(self, made, uid):
        for pair in pairs(made, uid):
            good, bad = words(pair["sentence_good"]), words(pair["sentence_bad"])
            changed = [i for i, both in enumerate(zip(good, bad)) if both[0] != both[1]]
            assert len(good) == len(bad) and 1 <= len(changed) <= 2 and changed[-1] - changed[0] < 2, pair

    def test_are_not_in_the_text(self, made, uid):
        text = {*lines(made / "train.txt"), *lines(made / "dev.txt")}
        assert not any(pair[side] in text for pair in pairs(made, uid) for side in ("sentence_good", "sentence_bad"))

    def test_have_no_new_words(self, made, uid):
        known = set(re.findall(r"\w+", (made / "train.txt").read_text()))
        for pair in pairs(made, uid):
            assert known.issuperset(re.findall(r"\w+", pair["sentence_good"] + " " + pair["sentence_bad"])), pair


def combinations(sentence: str, subjects: bool = True, demonstratives: bool = True) -> list[tuple]:
    """The subject that opens the sentence, where its verb comes next; and each noun after a demonstrative."""
    nouns = {form: noun for noun in grammar.BEINGS + grammar.THINGS + grammar.PLACES for form in noun[:2]}
    openers = nouns | {name[0]: name for name in grammar.NAMES}
    verbs = {form: verb for verb in grammar.VERBS for form in verb[:5]}
    these = {form: pair for pair in grammar.DEMONSTRATIVES for form in pair}
    tokens = re.findall(r"\w+", sentence)
    tokens[0] = tokens[0] if tokens[0] in openers else tokens[0].lower()
    start = tokens if tokens[0] in openers else tokens[1:]
    found = [(openers[a], verbs[b]) for a, b in zip(start[:1], start[1:]) if a in openers and b in verbs]
    return subjects * found + demonstratives * [(nouns[b], these[a]) for a, b in zip(tokens, tokens[1:])
                                                if a in these and b in nouns]


def test_the_text_has_no_held_out_combination(made):
    found = [pair for name in ("train.txt", "dev.txt") for line in lines(made / name) for pair in combinations(line)]
    assert len(found) > SIZE / 10 and not any(grammar.held_out(*pair) for pair in found)


@pytest.mark.parametrize("uid, subjects", [("agreement_simple", True), ("irregular_forms", True),
                                           ("determiner_noun", False)])
def test_pairs_turn_on_a_held_out_combination(made, uid, subjects):
    found = [combinations(pair["sentence_good"], subjects, not subjects) for pair in pairs(made, uid)]
    held_out = [any(grammar.held_out(*pair) for pair in pairs) for pairs in found if pairs]
    assert len(held_out) > 20 and all(held_out)


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    done = run(tmp_path, "--sentences", 10)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "exists" in done.stderr and str(tmp_path) in done.stderr
    assert everything(tmp_path) == {"mine.txt": b"kept"}


def test_a_run_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        grammar.write(tmp_path / "text", 10, seed=1)
    assert not list(tmp_path.iterdir())
