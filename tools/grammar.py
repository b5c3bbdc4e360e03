"""Write English text from a small grammar, and minimal pairs that test what a model learns from it.

    python tools/grammar.py OUT [--sentences 40000] [--seed 1]

makes OUT/train.txt and OUT/dev.txt, one sentence a line, and OUT/pairs/<phenomenon>.jsonl, laid out as BLiMP is.
Held out: a fifth of all combinations of a subject with its verb, and of a noun with "this" or "that", chosen by a hash
of the two words, never meet in the text.  Every pair turns on one of them: it asks for the rule, not for the memory.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from collections import namedtuple
from pathlib import Path
from zlib import crc32

PAIRS = 120  # of each phenomenon

Noun = namedtuple("Noun", "singular plural kind")
Verb = namedtuple("Verb", "base third past participle progressive takes")
Demonstrative = namedtuple("Demonstrative", "one many")


def with_s(word: str) -> str:
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def nouns(kind: str, entries: str) -> list[Noun]:
    """Nouns written `fox` or, when irregular, `goose/geese`; a name is its own plural."""
    words = [entry.partition("/") for entry in entries.split()]
    return [Noun(one, many or (one if one.istitle() else with_s(one)), kind) for one, _, many in words]


def verbs(takes: str, entries: str) -> list[Verb]:
    """Verbs written `laugh` or, when irregular, `sleep/slept` or `sing/sang/sung`; their objects fill a slot."""
    table = []
    for base, *irregular in (entry.split("/") for entry in entries.split()):
        stem = base.removesuffix("e")
        past, *_, participle = 2 * (irregular or [stem + "ed"])
        table.append(Verb(base, with_s(base), past, participle, stem + "ing", takes))
    return table


MEN, WOMEN = nouns("male", "man/men boy king brother"), nouns("female", "woman/women girl queen sister")
HE, SHE = nouns("male", "Adam Ben Leo Tom"), nouns("female", "Anna Clara Emma Lucy")
PEOPLE, NAMES = MEN + WOMEN, HE + SHE
SINGLE = [noun._replace(plural=noun.singular) for noun in PEOPLE]
BEINGS = PEOPLE + nouns("being", "sailor teacher farmer painter child/children fox dog cat goose/geese mouse/mice")
ANYONE = BEINGS + NAMES
THINGS = nouns("thing", "key lamp cup vase box book clock coat kite toy leaf/leaves shelf/shelves")
PLACES = nouns("place", "river lake garden tree bridge tower house gate")

RESTING = verbs("nothing", "sleep/slept laugh smile wait dance wander yawn sing/sang/sung rise/rose/risen")
HANDLING = verbs("thing", "find/found buy/bought borrow lift mend polish")
CHANGING = verbs("thing", "break/broke/broken hide/hid/hidden choose/chose/chosen take/took/taken draw/drew/drawn")
MEETING = verbs("being", "greet thank admire praise surprise amuse forgive/forgave/forgiven")
GIVING = verbs("gift", "give/gave/given send/sent offer")
TELLING = verbs("clause", "explain guess learn reveal remember")
MAKING, VERBS = HANDLING + CHANGING, RESTING + HANDLING + CHANGING + MEETING + GIVING
IRREGULAR = [verb for verb in VERBS if verb.past != verb.participle]

DEMONSTRATIVES = [Demonstrative("this", "these"), Demonstrative("that", "those")]
PRONOUNS = {"male": "himself his he", "female": "herself her she", "plural": "themselves their they"}
QUALITIES = dict.fromkeys(["male", "female", "being"], "old young happy quiet tall gentle brave".split())
QUALITIES |= {"thing": "old red blue golden small wooden".split(), "place": "old small lovely quiet".split()}

# What a slot in a template may become: words, other templates, nouns to make phrases of, and pairs of what goes with a
# singular and what goes with a plural.
AGREEING = [("{third}", "{base}"), ("{third}", "{base}"), ("does not {base}", "do not {base}"),
            ("has {participle}", "have {participle}"), ("has also {participle}", "have also {participle}"),
            ("is {progressive}", "are {progressive}"), ("was {progressive}", "were {progressive}")]
SLOTS = {
    "agreeing": AGREEING,
    "finite": AGREEING + 3 * ["{past}"] + ["will {base}", "can {base}", "did not {base}", "had {participle}"],
    "asking": [("does {subject} {base}", "do {subject} {base}"), "did {subject} {base}", "will {subject} {base}",
               ("has {subject} {participle}", "have {subject} {participle}")],
    "have": [("has", "have")], "be": [("is", "are"), ("was", "were"), ("has been", "have been")],
    "look": [("is", "are"), ("was", "were"), ("looks", "look")],
    "there": [("there is a", "there are some"), ("there was one", "there were two"), ("there is no", "there are no")],
    "this": [("{one}", "{many}")], "article": 4 * [("the", "the")] + [("a", "some"), ("one", "two"), ("every", "many")],
    "nothing": [""], "thing": THINGS + [f"{{possessive}} {noun.singular}" for noun in THINGS],
    "being": ANYONE + 6 * ["a {man} named {he}", "a {woman} named {she}"],
    "gift": ["{being} {thing}", "{thing} to {being}"],
    "rest": ["{object}", "{object} {adverb}"], "any": [f"any {noun.plural}" for noun in THINGS],
    "adverb": ["", "quietly", "happily", "again", "today", "at night", "{where}"], "join": ["and", "but", "while"],
    "where": ["{near} {place}"], "near": ["near", "behind", "beside"], "place": PLACES,
    "modifier": ["", "{where}", "that {friend[subject]} {friend[finite]}"],
    "man": [noun.singular for noun in MEN], "woman": [noun.singular for noun in WOMEN], "he": HE, "she": SHE,
    "origin": ["", "{where}", "that {owner[subject]} {owner[finite]}"],
}
# Slots that are scenes of their own: {friend[subject]} is the subject of {friend}.  Last is the slot in which the scene
# has to differ from the one around it.
SCENES = {
    "other": (ANYONE, VERBS, "noun"), "friend": (BEINGS, MEETING, "noun"), "owner": (ANYONE, HANDLING, "noun"),
    "sleeper": (ANYONE, RESTING, "noun"), "teller": (ANYONE, TELLING, "noun"),
    "foil": (BEINGS, MEETING, "number"), "rival": (SINGLE, MEETING, "oneself"),
}

# Whom and which verb to draw a scene from, and templates for it.  Of `[good|bad]` the text has only the good words; a
# minimal pair has both.
AGREES, TOLD = "[{agreeing}|{wrong_agreeing}] {rest}", "{teller[subject]} {teller[finite]}"
FOIL, RIVAL = "{finite} [{oneself}|{foil[oneself]}] {adverb}", "{finite} [{oneself}|{rival[oneself]}] {adverb}"
RULES = {
    "text": [
        (ANYONE, VERBS, "{subject} {finite} {rest}", "{asking} {rest}?",
         "{subject} {past} {rest}, {join} {other[subject]} {other[past]} {other[rest]}"),
        (BEINGS, VERBS, "{subject} {modifier} {finite} {rest}", "{subject} that {finite} {rest} {look} {quality}",
         "{there} {noun} {where}", "{there} {noun} that {finite} {rest}"),
        (THINGS, MAKING, "{subject} {origin} {look} {quality}", "{subject} {origin} {be} {participle} by {being}"),
        (SINGLE + PEOPLE + NAMES, VERBS, "{subject} said that {pronoun} {finite} {rest}",
         "{subject} and {possessive} friends {past} {rest}", "{subject} and {possessive} friends {base} {rest}"),
        (SINGLE + NAMES, MEETING, "{subject} {finite} {oneself} {adverb}"),
        (HE, VERBS, "{subject} is a {quality} {man}"), (SHE, VERBS, "{subject} is a {quality} {woman}"),
        (ANYONE, MAKING, "what {asking}?"), (ANYONE, MEETING, "who {asking}?"), (ANYONE, RESTING, "where {asking}?")],
    "agreement_simple": [
        (ANYONE, VERBS, "{subject} " + AGREES)],
    "agreement_prepositional": [
        (BEINGS, VERBS, "{subject} {near} {foil[subject]} " + AGREES),
        (THINGS, MAKING, "{subject} {near} {foil[subject]} [{be}|{wrong_be}] {participle} by {being}")],
    "agreement_relative": [
        (BEINGS, VERBS, "{subject} that {foil[subject]} {foil[finite]} " + AGREES)],
    "reflexive_gender": [
        (SINGLE + NAMES, MEETING, *2 * ["{subject} " + RIVAL]),
        (SINGLE, MEETING, "{subject} {near} {rival[subject]} " + RIVAL,
         "{subject} that {rival[subject]} {rival[finite]} " + RIVAL)],
    "reflexive_number": [
        (PEOPLE, MEETING, "{subject} " + FOIL, "{subject} {near} {foil[subject]} " + FOIL)],
    "npi_licensing": [
        (BEINGS, VERBS, "[no|{article}] {noun} {have} ever {participle} {rest}",
         "[no|{article}] {noun} {where} {have} ever {participle} {rest}",
         "{subject} {have} [not|also] ever {participle} {rest}"),
        (BEINGS, MAKING, "[no|{article}] {noun} {have} {participle} {any}",
         "{subject} {have} [not|also] {participle} {any}")],
    "filler_gap": [
        (ANYONE, HANDLING, TOLD + " [what|that] {subject} {finite} {adverb}",
         TOLD + " [that|what] {subject} {finite} {rest}"),
        (ANYONE, MEETING, TOLD + " [who|that] {subject} {finite} {adverb}",
         TOLD + " [that|who] {subject} {finite} {rest}")],
    "irregular_forms": [
        (ANYONE, IRREGULAR, "{subject} [{past}|{participle}] {rest}", "{subject} {have} [{participle}|{past}] {rest}"),
        (THINGS, CHANGING, "{subject} {be} [{participle}|{past}] by {being}")],
    "determiner_noun": [
        (THINGS, DEMONSTRATIVES, "{owner[subject]} {owner[finite]} [{this}|{wrong_this}] {noun} {adverb}"),
        (PLACES, DEMONSTRATIVES, "{sleeper[subject]} {sleeper[finite]} {near} [{this}|{wrong_this}] {noun}")],
    "argument_structure": [
        (ANYONE, RESTING, "{subject} [{past}|{owner[past]}] {adverb}"),
        (ANYONE, HANDLING, "{subject} [{past}|{sleeper[past]}] {rest}")],
}
PHENOMENA = list(RULES)[1:]
FIELDS = {"reflexive": "syntax_semantics", "npi": "semantics", "filler": "syntax", "argument": "syntax"}


def held_out(noun: Noun, word: Verb | Demonstrative) -> bool:
    """Whether the text keeps the two apart."""
    return crc32(f"{noun[0]} {word[0]}".encode()) % 5 == 0


class Scene(dict):
    """A noun, its verb (or demonstrative) and, by slot, phrases to go with them; the two are held out only if new."""

    def __init__(self, rng: random.Random, some: list[Noun], words: list, new: bool = False):
        self.rng = rng
        noun = word = None
        while not noun or held_out(noun, word) != new:
            noun, word = rng.choice(some), rng.choice(words)
        number = noun.singular != noun.plural and rng.random() < 0.5
        pronouns = PRONOUNS.get("plural" if number else noun.kind, PRONOUNS[rng.choice(["male", "female"])])
        super().__init__(zip(["oneself", "possessive", "pronoun"], pronouns.split()), number=number, noun=noun[number],
                         subject=self.phrase(noun, number), quality=rng.choice(QUALITIES[noun.kind]), **word._asdict())

    def phrase(self, noun: Noun, number: bool) -> str:
        if noun in NAMES:
            return noun.singular
        allowed = SLOTS["article"] + [words for words in DEMONSTRATIVES if not held_out(noun, words)]
        quality = self.rng.choice(["", "", "", self.rng.choice(QUALITIES[noun.kind])])
        return f"{self.rng.choice(allowed)[number]} {quality} {noun[number]}"

    def __missing__(self, slot: str) -> "str | Scene":
        """Fill a slot, anew each time unless by a scene."""
        if slot in SCENES:
            some, words, differing = SCENES[slot]
            scene = self
            while scene[differing] == self[differing]:
                scene = Scene(self.rng, some, words)
            return self.setdefault(slot, scene)
        filling = self.rng.choice(SLOTS[self["takes"] if slot == "object" else slot])
        if isinstance(filling, Noun):
            return self.phrase(filling, self.rng.random() < 0.5)
        if isinstance(filling, tuple):
            self["wrong_" + slot] = filling[not self["number"]].format_map(self)
            filling = filling[self["number"]]
        return filling.format_map(self)


def draw(rng: random.Random, kind: str, new: bool) -> tuple[str, str]:
    """A good sentence and its bad twin, which is the same where nothing is marked."""
    some, words, template = rng.choice([(*rule[:2], template) for rule in RULES[kind] for template in rule[2:]])
    marked = template.format_map(Scene(rng, some, words, new))
    return tuple(spell(re.sub(r"\[(.*?)\|(.*?)\]", side, marked)) for side in (r"\1", r"\2"))


def spell(words: str) -> str:
    """The words as a sentence."""
    line = re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r" (?=[,?])", "", " ".join(words.split())))
    return line[0].upper() + line[1:] + ("" if line.endswith("?") else ".")


def distinct(size: int, seed: str, kinds: list[str], new: bool = False) -> list[tuple[str, str]]:
    """Draws of these kinds, no good sentence twice."""
    rng, drawn = random.Random(seed), {}
    while len(drawn) < size:
        good, bad = draw(rng, rng.choice(kinds), new)
        if not re.search(r"\b(\w+) \1\b", good):  # "that that fox", "greets greets"
            drawn[good] = bad
    return list(drawn.items())


def write(out: Path, size: int, seed: int) -> None:
    """Write text and pairs into a folder, which appears only when it is complete."""
    if out.exists():
        raise FileExistsError(f"{out} exists already")
    dev = max(1, size * 3 // 100)
    lines = [good for good, _ in distinct(size + dev, f"{seed}", 5 * ["text"] + PHENOMENA)]
    files = {"train.txt": lines[dev:], "dev.txt": lines[:dev]}
    for uid in PHENOMENA:
        layout = {"field": FIELDS.get(uid.partition("_")[0], "morphology"), "linguistics_term": uid, "UID": uid}
        files[f"pairs/{uid}.jsonl"] = [
            json.dumps({"sentence_good": good, "sentence_bad": bad, **layout, "pair_id": str(number)})
            for number, (good, bad) in enumerate(distinct(PAIRS, f"{seed} {uid}", [uid], new=True))]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder, "made")
        (made / "pairs").mkdir(parents=True)
        for name, content in files.items():
            (made / name).write_text("".join(f"{line}\n" for line in content))
        made.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--sentences", type=int, default=40000, help="how many to train on")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    try:
        write(options.out, options.sentences, options.seed)
    except OSError as e:
        print(f"grammar.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
