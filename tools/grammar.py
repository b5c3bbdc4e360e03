"""Write English text from a small grammar, and minimal pairs that test what a model learns from it.

    python tools/grammar.py OUT [--sentences 20000] [--seed 1] [--pairs_seed 3]

OUT/train.txt and OUT/dev.txt have one sentence a line. OUT/pairs has a file for each phenomenon, in
the layout of BLiMP: a right sentence and a wrong one, which differ in one place.

A pair asks for the rule, not for the memory. A quarter of all combinations of a subject and its
verb, and of a noun and "this" or "that", are held out: they never meet in the text, and every pair
turns on one of them.
"""

import argparse
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from antlm.files import new_folder
from antlm.program import clean_exit
from config import require

N_PAIRS = 100  # minimal pairs of each phenomenon

# ------------------------------------------------------------------------------------------- words


@dataclass(frozen=True)
class Noun:
    order: int  # its place in its table
    singular: str
    plural: str  # nothing for a name
    gender: str  # male, female or none


@dataclass(frozen=True)
class Verb:
    order: int
    base: str  # take
    third: str  # takes
    past: str  # took
    participle: str  # taken
    progressive: str  # taking


@dataclass(frozen=True)
class Determiner:
    order: int
    singular: str
    plural: str


def with_s(word: str) -> str:
    return word + ("es" if word.endswith("x") else "s")


def nouns(gender: str, entries: str) -> list[Noun]:
    """Read nouns, written `fox` or, with an irregular plural, `goose/geese`."""
    table = []
    for order, entry in enumerate(entries.split()):
        singular, _, plural = entry.partition("/")
        table.append(Noun(order, singular, plural or with_s(singular), gender))
    return table


def names(gender: str, entries: str) -> list[Noun]:
    return [Noun(order, name, "", gender) for order, name in enumerate(entries.split())]


def verbs(entries: str) -> list[Verb]:
    """Read verbs, written `laugh` or, with an irregular past and participle, `sing/sang/sung`."""
    table = []
    for order, entry in enumerate(entries.split()):
        base, *irregular = entry.split("/")
        stem = base.removesuffix("e")
        past, participle = irregular or [stem + "ed", stem + "ed"]
        table.append(Verb(order, base, with_s(base), past, participle, stem + "ing"))
    return table


MEN = nouns("male", "man/men boy king brother")
WOMEN = nouns("female", "woman/women girl queen sister")
ANIMALS = nouns("none", "dog cat fox bird goose/geese mouse/mice")
NAMES = names("male", "Adam Ben Leo") + names("female", "Anna Clara Emma")
BEINGS = MEN + WOMEN + ANIMALS
ANYONE = BEINGS + NAMES
THINGS = nouns("none", "key lamp cup box book coat kite leaf/leaves")
PLACES = nouns("none", "river lake garden tree bridge gate")

RESTING = verbs("laugh smile wait dance sing/sang/sung rise/rose/risen")  # take no object
HANDLING = verbs("find/found/found buy/bought/bought lift mend")  # take a thing
CHANGING = verbs("break/broke/broken hide/hid/hidden take/took/taken draw/drew/drawn")  # likewise
MEETING = verbs("greet thank admire praise amuse forgive/forgave/forgiven")  # take a being
TELLING = verbs("guess learn explain")  # take a clause
VERBS = RESTING + HANDLING + CHANGING + MEETING
IRREGULAR = [verb for verb in VERBS if verb.past != verb.participle]

DEMONSTRATIVES = [Determiner(0, "this", "these"), Determiner(1, "that", "those")]
ARTICLES = [Determiner(0, "the", "the"), Determiner(1, "a", "some"), Determiner(2, "every", "many")]
ADJECTIVES = ["old", "small", "lovely", "quiet"]
PLACINGS = ["near", "behind"]

SUBJECT_PRONOUNS = {"male": "he", "female": "she", "plural": "they", "none": "it"}
POSSESSIVES = {"male": "his", "female": "her", "plural": "their", "none": "its"}
REFLEXIVES = {"male": "himself", "female": "herself", "plural": "themselves", "none": "itself"}

# ----------------------------------------------------------------------------------------- phrases


def is_held_out(noun: Noun, word: Verb | Determiner) -> bool:
    """Tell whether the text keeps a noun apart from a verb or a demonstrative.

    Every verb lacks as many men as women. If it lacked more women, a model that knows no gender
    would expect "himself" after it and be wrong in more than half of the pairs.
    """
    return (noun.order + word.order) % 4 == 0


def choose_number(noun: Noun) -> bool:
    """Draw whether a noun is in the plural, which a name never is."""
    return noun.plural != "" and random.random() < 0.5


def inflect(word: Noun | Determiner, plural: bool) -> str:
    return word.plural if plural else word.singular


def noun_phrase(noun: Noun, plural: bool) -> str:
    """Put a determiner and now and then an adjective in front of a noun: "the old king"."""
    if noun in NAMES:
        return noun.singular
    allowed = [word for word in DEMONSTRATIVES if not is_held_out(noun, word)]
    determiner = random.choice(ARTICLES + allowed)
    adjective = random.choice(ADJECTIVES) if random.random() < 0.2 else ""
    return f"{inflect(determiner, plural)} {adjective} {inflect(noun, plural)}"


def any_phrase(table: list[Noun]) -> str:
    noun = random.choice(table)
    return noun_phrase(noun, choose_number(noun))


def adverb() -> str:
    place = f"{random.choice(PLACINGS)} {any_phrase(PLACES)}"
    return random.choice(["", "", "quietly", "again", "today", place])


class Clause:
    """A subject and its verb, held out or not; its methods draw the words that go with them."""

    def __init__(self, subjects: list[Noun], some_verbs: list[Verb], held_out: bool = False):
        self.noun = random.choice(subjects)
        self.verb = random.choice(some_verbs)
        while is_held_out(self.noun, self.verb) != held_out:
            self.noun = random.choice(subjects)
            self.verb = random.choice(some_verbs)
        self.set_number(choose_number(self.noun))

    def set_number(self, plural: bool) -> None:
        self.plural = plural
        self.gender = "plural" if plural else self.noun.gender
        self.subject = noun_phrase(self.noun, plural)

    def agree(self, singular: str, plural: str) -> tuple[str, str]:
        """Return the form that agrees with the subject, then the one that does not."""
        if self.plural:
            return plural, singular
        return singular, plural

    def present(self) -> tuple[str, str]:
        """Draw forms of the verb that show number: the right one, then the wrong one."""
        verb = self.verb
        forms = [
            (verb.third, verb.base),
            (f"does not {verb.base}", f"do not {verb.base}"),
            (f"has {verb.participle}", f"have {verb.participle}"),
            (f"is {verb.progressive}", f"are {verb.progressive}"),
        ]
        singular, plural = random.choice(forms)
        return self.agree(singular, plural)

    def finite(self) -> str:
        """Draw any form of the verb that agrees with the subject."""
        right, _ = self.present()
        return random.choice([right, self.verb.past, f"will {self.verb.base}"])

    def object(self) -> str:
        """Draw what the verb takes: nothing, a being, or a thing, perhaps the subject's own."""
        if self.verb in RESTING:
            return ""
        if self.verb in MEETING:
            return any_phrase(ANYONE)
        if random.random() < 0.5:
            return f"{POSSESSIVES[self.gender]} {random.choice(THINGS).singular}"
        return any_phrase(THINGS)

    def rest(self) -> str:
        """Draw what follows the verb."""
        company = f"with {POSSESSIVES[self.gender]} friends"
        return f"{self.object()} {random.choice([adverb(), adverb(), company])}"


def spell(words: str) -> str:
    """Write words as a sentence."""
    line = " ".join(words.split())
    line = re.sub(r"\ba (?=[aeiou])", "an ", line)
    return f"{line[0].upper()}{line[1:]}."


# ----------------------------------------------------------------------------------- the phenomena
# Each function draws a minimal pair, the right sentence first. The text has the right ones, too, of
# combinations that are not held out.


def pair(before: str, right: str, wrong: str, after: str) -> tuple[str, str]:
    return spell(f"{before} {right} {after}"), spell(f"{before} {wrong} {after}")


def agreement_simple(held_out: bool) -> tuple[str, str]:
    """The king sings. / The king sing."""
    clause = Clause(ANYONE, VERBS, held_out)
    right, wrong = clause.present()
    return pair(clause.subject, right, wrong, clause.rest())


def agreement_across_phrase(held_out: bool) -> tuple[str, str]:
    """The king near the dogs sings. / The king near the dogs sing."""
    clause = Clause(BEINGS, VERBS, held_out)
    right, wrong = clause.present()
    other = noun_phrase(random.choice(BEINGS), not clause.plural)
    before = f"{clause.subject} {random.choice(PLACINGS)} {other}"
    return pair(before, right, wrong, clause.rest())


def agreement_across_clause(held_out: bool) -> tuple[str, str]:
    """The king that the dogs greeted sings. / The king that the dogs greeted sing."""
    clause = Clause(BEINGS, VERBS, held_out)
    right, wrong = clause.present()
    other = Clause(BEINGS, MEETING)
    other.set_number(not clause.plural)
    before = f"{clause.subject} that {other.subject} {other.finite()}"
    return pair(before, right, wrong, clause.rest())


def reflexive_gender(held_out: bool) -> tuple[str, str]:
    """The king greets himself. / The king greets herself."""
    clause = Clause(MEN + WOMEN + NAMES, MEETING, held_out)
    clause.set_number(plural=False)
    right = "himself"
    wrong = "herself"
    if clause.gender == "female":
        right, wrong = wrong, right
    return pair(f"{clause.subject} {clause.finite()}", right, wrong, adverb())


def reflexive_number(held_out: bool) -> tuple[str, str]:
    """The kings greet themselves. / The kings greet himself."""
    clause = Clause(BEINGS, MEETING, held_out)
    right, wrong = clause.agree(REFLEXIVES[clause.noun.gender], "themselves")
    return pair(f"{clause.subject} {clause.finite()}", right, wrong, adverb())


def npi_licensing(held_out: bool) -> tuple[str, str]:
    """No king has ever sung. / The king has ever sung."""
    clause = Clause(BEINGS, VERBS, held_out)
    have, _ = clause.agree("has", "have")
    article = inflect(random.choice(ARTICLES), clause.plural)
    after = f"{inflect(clause.noun, clause.plural)} {have} ever {clause.verb.participle}"
    return pair("", "no", article, f"{after} {clause.rest()}")


def filler_gap(held_out: bool) -> tuple[str, str]:
    """Anna guesses what the king finds. / Anna guesses that the king finds."""
    teller = Clause(ANYONE, TELLING)
    clause = Clause(ANYONE, HANDLING, held_out)
    before = f"{teller.subject} {teller.finite()}"
    after = f"{clause.subject} {clause.finite()}"
    if random.random() < 0.5:
        return pair(before, "what", "that", f"{after} {adverb()}")
    return pair(before, "that", "what", f"{after} {clause.rest()}")


def irregular_forms(held_out: bool) -> tuple[str, str]:
    """The king broke the cup. / The king broken the cup."""
    clause = Clause(ANYONE, IRREGULAR, held_out)
    past = clause.verb.past
    participle = clause.verb.participle
    if random.random() < 0.5:
        return pair(clause.subject, past, participle, clause.rest())
    have, _ = clause.agree("has", "have")
    return pair(f"{clause.subject} {have}", participle, past, clause.rest())


def determiner_noun(held_out: bool) -> tuple[str, str]:
    """Anna mended this cup. / Anna mended these cup."""
    clause = Clause(ANYONE, HANDLING + MEETING)
    table = BEINGS if clause.verb in MEETING else THINGS
    noun = random.choice(table)
    demonstrative = random.choice(DEMONSTRATIVES)
    while is_held_out(noun, demonstrative) != held_out:
        noun = random.choice(table)
        demonstrative = random.choice(DEMONSTRATIVES)
    plural = choose_number(noun)
    right = inflect(demonstrative, plural)
    wrong = inflect(demonstrative, not plural)
    before = f"{clause.subject} {clause.finite()}"
    return pair(before, right, wrong, f"{inflect(noun, plural)} {adverb()}")


def argument_structure(held_out: bool) -> tuple[str, str]:
    """The king laughed today. / The king found today."""
    clause = Clause(ANYONE, RESTING + HANDLING, held_out)
    other_verbs = HANDLING if clause.verb in RESTING else RESTING
    return pair(clause.subject, clause.verb.past, random.choice(other_verbs).past, clause.rest())


PHENOMENA = [
    agreement_simple,
    agreement_across_phrase,
    agreement_across_clause,
    reflexive_gender,
    reflexive_number,
    npi_licensing,
    filler_gap,
    irregular_forms,
    determiner_noun,
    argument_structure,
]

# ------------------------------------------------------------------------------ the text, the files


def plain_sentence() -> str:
    """Draw a sentence of no phenomenon, of which most have a pronoun.

    They make gender learnable: "she" is frequent, so "she greets herself" is learnt first, and "she
    is a queen" tells which nouns are like "she".
    """
    clause = Clause(ANYONE, VERBS)
    kind = random.choice(["pronoun", "pronoun", "pronoun", "and", "is", "is", "there"])
    if kind == "there":
        there, _ = clause.agree("there is", "there are")
        return spell(f"{there} {clause.subject} {adverb()}")
    if kind == "is":
        clause = Clause(MEN + WOMEN + NAMES, VERBS)
        clause.set_number(plural=False)
    pronoun = SUBJECT_PRONOUNS[clause.gender]
    if kind == "pronoun":
        action = clause.rest()
        if clause.verb in MEETING:
            action = f"{REFLEXIVES[clause.gender]} {adverb()}"
        return spell(f"{pronoun} {clause.finite()} {action}")
    if kind == "and":
        first = f"{clause.subject} {clause.verb.past} {clause.rest()}"
        clause.verb = random.choice(VERBS)
        return spell(f"{first} and {pronoun} {clause.verb.past} {clause.rest()}")
    description = "named" if clause.noun in NAMES else f"a {random.choice(ADJECTIVES)}"
    action = f"{clause.verb.past} {clause.rest()}"
    return spell(f"{pronoun} is {description} {clause.noun.singular} and {action}")


def text_sentence() -> str:
    """Draw a sentence of the text: half of them show a phenomenon, the hardest more often."""
    if random.random() < 0.5:
        return plain_sentence()
    hardest = 4 * [filler_gap] + 2 * [reflexive_gender] + [agreement_across_clause]
    phenomenon = random.choice(PHENOMENA + hardest)
    right, _ = phenomenon(held_out=False)
    return right


def repeats_a_word(sentence: str) -> bool:
    return re.search(r"\b(\w+) \1\b", sentence) is not None  # "Anna guesses that that fox sings."


def draw_text(size: int, seed: int) -> list[str]:
    """Draw so many different sentences."""
    random.seed(seed)
    sentences = {}  # a dict keeps the order in which they were drawn
    while len(sentences) < size:
        sentence = text_sentence()
        if not repeats_a_word(sentence):
            sentences[sentence] = True
    return list(sentences)


def draw_pairs(phenomenon, seed: int) -> list[tuple[str, str]]:
    """Draw N_PAIRS pairs of a phenomenon, no right sentence twice."""
    random.seed(f"{seed} {phenomenon.__name__}")
    pairs = {}
    while len(pairs) < N_PAIRS:
        right, wrong = phenomenon(held_out=True)
        if not repeats_a_word(right):
            pairs[right] = wrong
    return list(pairs.items())


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write(out: Path, size: int, seed: int, pairs_seed: int) -> None:
    """Write text and pairs into a folder, which appears only when it is complete."""
    with new_folder(out) as unfinished:
        (unfinished / "pairs").mkdir(parents=True)

        dev_size = max(1, size * 3 // 100)
        sentences = draw_text(size + dev_size, seed)
        write_lines(unfinished / "dev.txt", sentences[:dev_size])
        write_lines(unfinished / "train.txt", sentences[dev_size:])

        for phenomenon in PHENOMENA:
            uid = phenomenon.__name__
            lines = []
            for number, (right, wrong) in enumerate(draw_pairs(phenomenon, pairs_seed)):
                record = {"sentence_good": right, "sentence_bad": wrong}
                lines.append(json.dumps(record | {"UID": uid, "pair_id": str(number)}))
            write_lines(unfinished / "pairs" / f"{uid}.jsonl", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--sentences", type=int, default=20000, help="how many to train on")
    parser.add_argument("--seed", type=int, default=1, help="of the text")
    # config/quickstart.py was tuned on the pairs of seed 1, so these are others
    parser.add_argument("--pairs_seed", type=int, default=3, help="of the minimal pairs")
    args = parser.parse_args()
    exists = args.out.exists()
    require(not exists, f"{args.out} exists already; remove it or choose another folder")
    write(args.out, args.sentences, args.seed, args.pairs_seed)


if __name__ == "__main__":
    with clean_exit():
        main()
