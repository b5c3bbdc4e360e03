"""A small corpus for every test that trains: text with enough structure to learn, made here."""

import random

import pytest

import data


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(1)
    nouns, verbs = "cat dog bird horse child teacher".split(), "sees likes finds follows hears".split()
    for name, n in (("text.train", 600), ("text.dev", 80)):
        lines = (f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}." for _ in range(n))
        (folder / name).write_text("\n".join(lines) + "\n")
    data.prepare([str(folder / "text.train")], [str(folder / "text.dev")], str(folder / "corpus"), vocab_size=300)
    return str(folder / "corpus")
