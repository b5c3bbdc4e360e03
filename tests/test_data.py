"""data.py: what a damaged corpus folder says, and the batches.

    python -m pytest tests/test_data.py        # about 5 s, no GPU, no torch

MLM and MNTP batches must agree with the CLM batch of the same rows.
"""

import hashlib
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

import data
import prepare
from antlm.tokenizer import MASK, START, save_tokenizer
from config import UserError


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
