"""A challenge of a few items and runs for it, which test_submit.py and trials.py share.

python tests/small_challenge.py RUN --mode causal --data DATA --out OUT

does what `python -m babylm.submit` does, with the tables of this challenge. Sets and their folders
are those of the real one; what differs is how many items they have, and which tasks are fine-tuned.
"""

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
import finetune  # noqa: E402
from antlm.checkpoint import save_checkpoint  # noqa: E402
from antlm.tokenizer import Tokenizer  # noqa: E402
from babylm import challenge, reading, submit  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402

MILLION = 1_000_000
WORD_MARKS = [1 * MILLION, 2 * MILLION, 10 * MILLION]
GLUE = ("rte", "wsc")
GLUE_2024 = ("cola", "mnli", "mnli-mm", "rte")
N_VALID = 6  # items of each of them
WORDS = "cat dog bird horse child teacher garden apple".split()
# {folder: {file: items}}, full and fast; of EWoK the file is the domain
SIZES = {
    "blimp_filtered": {"anaphor_agreement": 3, "wh_island": 4},
    "supplement_filtered": {"hypernym": 2, "turn_taking": 3},
    "ewok_filtered": {"agent-properties": 4, "spatial-relations": 2},
    "entity_tracking": {"regular": 8, "ambiref": 6, "move_contents": 4},
    "comps": {"comps_base": 3, "comps_wugs_dist-before": 2},
    "global_piqa_parallel": {"eng_latn": 3},
    "global_piqa_nonparallel": {"eng_latn": 4},
    "wug_adj_nominalization": {"wug_adj_nominalization": 5},
    "wug_past_tense": {"wug_past_tense": 4},
}
FAST_SIZES = {
    "blimp_fast": {"anaphor_agreement": 2, "wh_island": 2},
    "supplement_fast": {"hypernym": 1, "turn_taking": 2},
    "ewok_fast": {"agent-properties": 2, "spatial-relations": 1},
    "entity_tracking_fast": {"regular": 7},
}
for name in list(SIZES)[5:]:
    FAST_SIZES[name] = SIZES[name]
N_READING = 40  # rows; the regression needs more than it has terms
N_CONTEXTS = 2  # of each word
N_PAIRS = len(WORDS) * N_CONTEXTS


# ------------------------------------------------------------------------------------- the tables


def n_items(folder: str, files: dict[str, int], year: str) -> int:
    """Return how many items the challenge of a year has in a folder."""
    if folder == "reading":
        return N_READING
    n = sum(files.values())
    if folder.startswith("entity_tracking") and year == "2026":
        for size in files.values():
            n -= sum(says_nothing(i) for i in range(size))
    return n


def small_year(name: str) -> challenge.Year:
    """Return a year of the challenge with the sizes of this one."""
    year = challenge.YEARS[name]
    sets = []
    for part in year.sets:
        items = n_items(part.folder, SIZES.get(part.folder, {}), name)
        fast_items = n_items(part.fast, FAST_SIZES.get(part.fast, {}), name)
        sets.append(dataclasses.replace(part, items=items, fast_items=fast_items))
    glue = GLUE_2024 if name == "2024" else GLUE
    return dataclasses.replace(year, sets=tuple(sets), glue=glue, word_pairs=N_PAIRS)


def make_small(patch: pytest.MonkeyPatch):
    """Give babylm.submit the tables of this challenge, until the patch is undone."""
    for name in challenge.YEARS:
        patch.setitem(challenge.YEARS, name, small_year(name))
    patch.setattr(submit, "WORD_MARKS", WORD_MARKS)
    for task in {*GLUE, *GLUE_2024}:
        patch.setitem(challenge.GLUE_ITEMS, task, N_VALID)


def call_here(arguments: list[str], log: Path) -> str:
    """Stand in for submit.call: call the program without the seconds that a process needs."""
    log.write_text(" ".join(arguments))
    if arguments[0] == "eval.py":
        evaluation.main(arguments[1:])
    else:
        finetune.main(arguments[1:])
    return ""


# ------------------------------------------------------------------------------------- the data


def says_nothing(i: int) -> bool:
    """Whether an option of line i of entity tracking is "nothing", so that 2026 leaves it out."""
    return i % 4 == 3


def record(folder: str, file: str, i: int) -> dict:
    """Return line i of a file."""
    word, other = random.Random(f"{file} {i}").sample(WORDS, 2)
    if folder.startswith(("blimp", "supplement")):
        good = f"The {word} sees.\nYes, number {i}."
        return {"sentence_good": good, "sentence_bad": f"The {other} sees.\nNo, number {i}."}
    if folder.startswith("ewok"):
        contexts = {"Context1": f"The {word} sleeps.", "Context2": f"The {other} runs."}
        # the shorter of two targets mostly gets more
        other_target = "It moves." if i % 2 else "It moves all about the garden."
        targets = {"Target1": f"It rests {i}.", "Target2": other_target}
        return targets | contexts | {"Domain": file}
    if folder.startswith("entity"):
        options = [f"the {other} and {n}" for n in range(5)]
        if says_nothing(i):
            options[4] = "nothing"
        prefix = f"Box {i} holds the {word}. Now it holds "
        return {"input_prefix": prefix, "options": options, "numops": i % 3}
    if folder == "comps":
        prefixes = {"prefix_acceptable": f"A {word}", "prefix_unacceptable": f"A {other}"}
        return {"property_phrase": f"can fly {i}.", **prefixes}
    if folder.startswith("wug"):
        return {"sentences": f"The {word}ity.\tThe {word}ness {i}.", "ratio": (i + 1) / 10}
    n = 4 if folder == "global_piqa_parallel" else 2
    content = {f"solution{k}": f"use the {WORDS[k]} {k}" for k in range(n)}
    return content | {"prompt": f"To find a {word}:", "label": i % n, "example_id": f"{folder}-{i}"}


def write_lines(path: Path, records: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_reading(path: Path, n_rows: int = N_READING):
    rng = random.Random(3)
    names = reading.TEXTS + reading.COUNTS + reading.MEASURED
    lines = [",".join(names)]
    before = ""
    for i in range(n_rows):
        word = rng.choice(WORDS)
        text = "The" if i % 5 else ""
        cells = [text, word, "The" if before and i % 5 else "", before]
        cells += [f"{rng.uniform(1, 9):.3f}" for _ in names[4:]]
        lines.append(",".join(cells))
        before = word
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n")


def write_words(folder: Path):
    folder.mkdir(parents=True)
    contexts = {}
    for word in WORDS:
        contexts[word] = [{"context": f"Look at number {n} of the"} for n in range(N_CONTEXTS)]
    contexts["a"] = [{"context": "A word of one letter is"}]
    (folder / "cdi_childes.json").write_text(json.dumps(contexts))
    lines = ["word," + ",".join(map(str, range(16, 31)))]
    for number, word in enumerate(WORDS):
        shares = [f"{1 / (1 + 2.0 ** (19 + number - month)):.3f}" for month in range(16, 31)]
        lines.append(f"{word}," + ",".join(shares))
    (folder / "cdi_human.csv").write_text("\n".join(lines) + "\n")


def write_glue(folder: Path):
    for split, n in (("train", 8), ("valid", N_VALID)):
        for task in sorted({*GLUE, *GLUE_2024}):
            rows = []
            for i in range(n):
                a, b = random.Random(f"{task} {split} {i}").sample(WORDS, 2)
                row = {"sentence": a, "sentence1": a, "sentence2": b, "premise": a, "hypothesis": b}
                row |= {"span1_text": a, "span2_text": b, "text": f"The {a} sees the {b}."}
                rows.append(row | {"label": i % 2})
            if (task, split) != ("mnli-mm", "train"):
                write_lines(folder / f"{task}.{split}.jsonl", rows)


def write_data(folder: Path, year: str = "2026") -> Path:
    """Write the evaluation_data of a year."""
    full = folder if year == "2024" else folder / "full_eval"
    for part in challenge.YEARS[year].sets:
        for file, n in SIZES.get(part.folder, {}).items():
            lines = [record(part.folder, file, i) for i in range(n)]
            write_lines(full / part.folder / f"{file}.jsonl", lines)
        for file, n in FAST_SIZES.get(part.fast, {}).items():
            lines = [record(part.fast, file, i) for i in range(n)]
            write_lines(folder / "fast_eval" / part.fast / f"{file}.jsonl", lines)
    write_glue(full / "glue_filtered")
    if year != "2024":
        write_reading(full / "reading" / "reading_data.csv")
        write_reading(folder / "fast_eval" / "reading" / "reading_data.csv")
        write_words(full / "aoa")
    return folder


# ------------------------------------------------------------------------------------- the run


def write_checkpoint(
    path: Path, tokenizer: Tokenizer, words: int, seed: int, std: float = 0.4, **content
):
    """Write a checkpoint of random weights, so large that no two texts have the same score.

    std: of the weights; with 0 all tokens are alike
    """
    torch.manual_seed(seed)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, n_ff=24, n_bucket=4, max_position=8)
    model = Transformer(ModelConfig("babyllama", tokenizer.vocab_size, **sizes))
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=std)
    settings = dict(schedule="1_CLM+1_MLM", block_size=16, save_every=5)
    step = int(path.stem.removeprefix("step_"))
    facts = dict(step=step, words=words, boundary="line", settings=settings)
    facts["tokenizer_sha256"] = tokenizer.sha256
    save_checkpoint(path, model, **facts | content)


def write_run(folder: Path, tokenizer_json: Path, seed: int = 1) -> Path:
    """Write a run with a checkpoint at each mark of the small track, and one in between."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    tokenizer = Tokenizer(folder / "tokenizer.json")
    # 50,000 words a step
    for step in (20, 40, 100, 200):
        path = folder / f"step_{step:07}.pt"
        write_checkpoint(path, tokenizer, 50_000 * step, seed=1000 * seed + step)
    return folder


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        submit.main()
