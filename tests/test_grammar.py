"""tools/grammar.py: its text and pairs. Alone: python -m pytest tests/test_grammar.py"""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import grammar  # noqa: E402

SIZE = 8000
UIDS = [phenomenon.__name__ for phenomenon in grammar.PHENOMENA]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("grammar") / "text"
    grammar.write(out, SIZE, seed=1, pairs_seed=1)
    return out


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def read_text(folder: Path) -> list[str]:
    return read_lines(folder / "train.txt") + read_lines(folder / "dev.txt")


def read_pairs(folder: Path, uid: str) -> list[dict]:
    return [json.loads(line) for line in read_lines(folder / "pairs" / f"{uid}.jsonl")]


def words(sentence: str) -> list[str]:
    """Words as they are inside a sentence: names keep their capital, the first word loses its."""
    tokens = sentence.removesuffix(".").split()
    if tokens[0] not in NOUN_OF:
        tokens[0] = tokens[0].lower()
    return tokens


def files(folder: Path) -> dict[str, bytes]:
    contents = {}
    for path in folder.rglob("*"):
        if path.is_file():
            contents[str(path.relative_to(folder))] = path.read_bytes()
    return contents


def run(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/grammar.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


NOUN_OF = {}
for noun in grammar.ANYONE + grammar.THINGS + grammar.PLACES:
    NOUN_OF[noun.singular] = noun
    NOUN_OF[noun.plural or noun.singular] = noun

VERB_OF = {}
for verb in grammar.VERBS:
    for form in (verb.base, verb.third, verb.past, verb.participle, verb.progressive):
        VERB_OF[form] = verb

DEMONSTRATIVE_OF = {}
for demonstrative in grammar.DEMONSTRATIVES:
    DEMONSTRATIVE_OF[demonstrative.singular] = demonstrative
    DEMONSTRATIVE_OF[demonstrative.plural] = demonstrative


def subject_with_verb(sentence: str) -> list[tuple]:
    """The noun that opens the sentence and the verb, if they stand side by side."""
    start = words(sentence)
    if start[0] not in NOUN_OF:
        start = start[1:]
    if start[0] in NOUN_OF and start[1] in VERB_OF:
        return [(NOUN_OF[start[0]], VERB_OF[start[1]])]
    return []


def nouns_with_demonstratives(sentence: str) -> list[tuple]:
    pairs = []
    tokens = words(sentence)
    for first, second in zip(tokens, tokens[1:], strict=False):
        if first in DEMONSTRATIVE_OF and second in NOUN_OF:
            pairs.append((NOUN_OF[second], DEMONSTRATIVE_OF[first]))
    return pairs


def test_the_seed_decides_the_text_and_the_pairs_seed_the_pairs(tmp_path):
    arguments = {
        "first": [],
        "again": [],
        "other_text": ["--seed", 2],
        "other_pairs": ["--pairs_seed", 4],
    }
    made = {}
    for name, extra in arguments.items():
        done = run(tmp_path / "new" / name, "--sentences", 300, *extra)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        made[name] = files(tmp_path / "new" / name)
    assert made["first"] == made["again"]
    for name, content in made["first"].items():
        is_text = name.endswith(".txt")
        assert (content == made["other_text"][name]) == (not is_text)
        assert (content == made["other_pairs"][name]) == is_text


def test_sentences_are_distinct_and_written_as_sentences(folder):
    assert len(read_lines(folder / "train.txt")) == SIZE
    assert len(read_lines(folder / "dev.txt")) == SIZE * 3 // 100
    text = read_text(folder)
    assert len(set(text)) == len(text)
    for sentence in text:
        assert re.fullmatch(r"[A-Z][a-z]*( [A-Za-z]+)*\.", sentence), sentence
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", sentence.lower()), sentence


def test_a_verb_is_held_out_from_as_many_men_as_women():
    for verb in grammar.VERBS:
        held_out = {"male": 0, "female": 0, "none": 0}
        for noun in grammar.ANYONE:
            held_out[noun.gender] += grammar.is_held_out(noun, verb)
        assert 0 < held_out["male"] == held_out["female"] < len(grammar.MEN + grammar.NAMES) / 2


@pytest.mark.parametrize("uid", UIDS)
class TestPairs:
    def test_are_laid_out_as_blimp_is(self, folder, uid):
        pairs = read_pairs(folder, uid)
        assert len({pair["sentence_good"] for pair in pairs}) == len(pairs) == grammar.N_PAIRS
        for number, pair in enumerate(pairs):
            assert pair.keys() == {"sentence_good", "sentence_bad", "UID", "pair_id"}
            assert pair["UID"] == uid
            assert pair["pair_id"] == str(number)

    def test_differ_in_one_or_two_words_in_one_place(self, folder, uid):
        for pair in read_pairs(folder, uid):
            good = words(pair["sentence_good"])
            bad = words(pair["sentence_bad"])
            assert len(good) == len(bad)
            changed = [i for i in range(len(good)) if good[i] != bad[i]]
            assert 1 <= len(changed) <= 2, pair
            assert changed[-1] - changed[0] < 2, pair

    def test_are_not_in_the_text(self, folder, uid):
        text = set(read_text(folder))
        for pair in read_pairs(folder, uid):
            assert pair["sentence_good"] not in text
            assert pair["sentence_bad"] not in text

    def test_have_no_new_words(self, folder, uid):
        known = set()
        for sentence in read_lines(folder / "train.txt"):
            known.update(words(sentence))
        for pair in read_pairs(folder, uid):
            both = words(pair["sentence_good"]) + words(pair["sentence_bad"])
            assert known.issuperset(both), pair


def test_the_text_has_no_held_out_combination(folder):
    combinations = []
    for sentence in read_text(folder):
        combinations += subject_with_verb(sentence) + nouns_with_demonstratives(sentence)
    assert len(combinations) > SIZE / 4
    for noun, word in combinations:
        assert not grammar.is_held_out(noun, word), (noun, word)


@pytest.mark.parametrize("uid", ["agreement_simple", "irregular_forms", "reflexive_gender"])
def test_pairs_turn_on_a_subject_and_verb_that_are_held_out(folder, uid):
    combinations = []
    for pair in read_pairs(folder, uid):
        combinations += subject_with_verb(pair["sentence_good"])
    assert len(combinations) > 20
    assert all(grammar.is_held_out(*combination) for combination in combinations)


def test_pairs_turn_on_a_noun_and_demonstrative_that_are_held_out(folder):
    for pair in read_pairs(folder, "determiner_noun"):
        held_out = []
        for combination in nouns_with_demonstratives(pair["sentence_good"]):
            held_out.append(grammar.is_held_out(*combination))
        assert any(held_out), pair


def test_a_reflexive_pair_differs_in_gender_or_number_alone():
    random.seed(1)
    for _ in range(50):
        right, wrong = grammar.reflexive_gender(held_out=True)
        assert {"himself", "herself"} == set(words(right)) ^ set(words(wrong))
        right, wrong = grammar.reflexive_number(held_out=True)
        assert "themselves" in set(words(right)) ^ set(words(wrong))


def test_half_of_the_gender_pairs_are_female(folder):
    right = [pair["sentence_good"] for pair in read_pairs(folder, "reflexive_gender")]
    female = sum("herself" in sentence for sentence in right)
    assert 0.35 < female / len(right) < 0.65


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    done = run(tmp_path, "--sentences", 10)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert f"{tmp_path} exists already" in done.stderr
    assert files(tmp_path) == {"mine.txt": b"kept"}


def test_a_call_that_fails_leaves_no_folder_and_does_not_stop_the_next(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="disk full"):
            grammar.write(tmp_path / "text", 10, seed=1, pairs_seed=1)
    assert not (tmp_path / "text").exists()
    grammar.write(tmp_path / "text", 10, seed=1, pairs_seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
