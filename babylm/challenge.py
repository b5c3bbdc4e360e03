"""The challenge of each year in tables: its sets, their sizes, its files, its leaderboard."""

from dataclasses import dataclass

from schedule import words_before

BACKENDS = {"causal": "causal", "masked": "mlm", "mntp": "mntp"}  # what the pipelines call a mode


@dataclass(frozen=True)
class Set:
    """A set that is scored without training.

    key: in the collated file
    folder: in evaluation_data/full_eval, for 2024 in evaluation_data
    items: how many the challenge has, summed over subsets
    tree: folder of the predictions in the tree of results, above one of the set's own name
    fast: folder in evaluation_data/fast_eval, "" without one; fast_items: of that
    """

    key: str
    folder: str
    items: int
    tree: str = ""
    fast: str = ""
    fast_items: int = 0


@dataclass(frozen=True)
class Year:
    """What the challenge of a year takes.

    sets: scored by eval.py; glue: tasks of finetune.py; glue_config: files of their settings
    words: key of the surprisals of words (age of acquisition), "" without them
    word_pairs: how many words in context there are
    scores_age: whether the score that comes from them is handed in, too
    """

    sets: tuple[Set, ...]
    glue: tuple[str, ...]
    glue_config: tuple[str, ...]
    words: str = ""
    word_pairs: int = 0
    scores_age: bool = False


# Sizes as collate_preds.py of each year asserts them subset by subset; here their sums.
BLIMP = Set("blimp", "blimp_filtered", 59875, "blimp", "blimp_fast", 13400)
SUPPLEMENT = Set("blimp_supplement", "supplement_filtered", 5218, "blimp", "supplement_fast", 250)
EWOK = Set("ewok", "ewok_filtered", 7618, "ewok", "ewok_fast", 1100)
COMPS = Set("comps", "comps", 91028, "comps")
READING = Set("reading", "reading", 1726, fast="reading", fast_items=1726)
PARALLEL = "global_piqa_parallel"
NONPARALLEL = "global_piqa_nonparallel"
ENTITY = "entity_tracking"
WUG_ADJ = "wug_adj_nominalization"
WUG_PAST = "wug_past_tense"
SEVEN = ("boolq", "mnli", "mrpc", "multirc", "qqp", "rte", "wsc")
GLUE_ITEMS = {
    "boolq": 1635,
    "cola": 522,
    "mnli": 4908,
    "mnli-mm": 4916,
    "mrpc": 204,
    "multirc": 2424,
    "qnli": 2732,
    "qqp": 20215,
    "rte": 139,
    "sst2": 436,
    "wsc": 52,
}

YEARS = {
    "2026": Year(
        sets=(
            BLIMP,
            SUPPLEMENT,
            EWOK,
            Set("entity_tracking_filtered", ENTITY, 6780, ENTITY, "entity_tracking_fast", 2238),
            COMPS,
            Set(PARALLEL, PARALLEL, 103, PARALLEL, PARALLEL, 103),
            Set(NONPARALLEL, NONPARALLEL, 100, NONPARALLEL, NONPARALLEL, 100),
            READING,
        ),
        glue=SEVEN,
        glue_config=("config/finetune/glue_2026.py",),
        words="aoa_surprisals",
        word_pairs=8005,
        scores_age=True,
    ),
    "2025": Year(
        sets=(
            BLIMP,
            SUPPLEMENT,
            EWOK,
            Set(ENTITY, ENTITY, 9483, ENTITY, "entity_tracking_fast", 3152),
            Set("wug_adj", WUG_ADJ, 200, "wug_adj", WUG_ADJ, 200),
            Set("wug_past", WUG_PAST, 50, "wug_past", WUG_PAST, 50),
            COMPS,
            READING,
        ),
        glue=SEVEN,
        glue_config=("config/finetune/glue_2025.py",),
        words="aoa",
        word_pairs=8005,
    ),
    "2024": Year(
        sets=(
            Set("blimp", "blimp_filtered", 59875),
            Set("blimp_supplement", "supplement_filtered", 5218),
            Set("ewok", "ewok_filtered", 7618),
        ),
        glue=tuple(GLUE_ITEMS),
        glue_config=(),
    ),
}


def mark_name(words: int) -> str:
    """Return what the challenge calls the checkpoint at so many words."""
    return f"chck_{words // 1_000_000}M"


def words_per_step(content: dict) -> float:
    """Return how many words a checkpoint's run has seen in a step."""
    seen = content["words"] - words_before(content.get("history", []))
    return seen / content["step"]


def marks_due(words: int, marks: list[int]) -> list[int]:
    """Return the marks of which a run that ended after so many words has to show a checkpoint.

    Beside those that it has reached, the next one, if it misses it by less than 5%: ten epochs of
    a text of 9.96 million words end at 99.6 million. The last checkpoint then stands for that one.
    marks: all that there are, WORD_MARKS of schedule.py
    """
    return [mark for mark in marks if 0.95 * mark < words]


def reached_mark(words: int, words_per_step: float, marks: list[int]) -> int | None:
    """Return the mark that a checkpoint stands for: that which its last step has reached.

    words: that it has seen
    """
    reached = [mark for mark in marks if mark <= words]
    if not reached or words - reached[-1] > words_per_step:
        return None
    return reached[-1]


# ---------------------------------------------------------------------------------- the leaderboard

# Columns of 2026, each times 100: the keys whose scores are averaged.
COLUMNS = {
    "blimp": ("blimp",),
    "blimp_supplement": ("blimp_supplement",),
    "ewok": ("ewok",),
    "entity_tracking": ("entity_tracking_filtered",),
    "comps": ("comps",),
    "glue": ("glue",),
    "global_piqa": (PARALLEL, NONPARALLEL),
    "reading": ("reading",),
    "aoa": ("aoa",),
}
N_NLP_COLUMNS = 7  # the first ones; reading and aoa compare with people, and are noise at this size
BASELINES = {"GPT-2, strict-small": (65.2, 57.3, 50.6, 19.1, 51.8, 63.8, 35.1, 5.6, -12.2)}


def with_means(columns: list[float]) -> list[float]:
    """Return the columns, the mean of the NLP part and the overall mean."""
    nlp = sum(columns[:N_NLP_COLUMNS]) / N_NLP_COLUMNS
    return [*columns, nlp, sum(columns) / len(columns)]


def leaderboard(name: str, scores: dict[str, float]) -> str:
    """Return the table of the leaderboard of 2026, with the published baselines below.

    scores: by key, times 100; a key that is missing counts 0, as on the leaderboard
    """
    columns = []
    for keys in COLUMNS.values():
        columns.append(sum(scores.get(key, 0.0) for key in keys) / len(keys))
    rows = {name: with_means(columns)}
    for baseline, published in BASELINES.items():
        rows[baseline] = with_means(list(published))

    heads = [*COLUMNS, "NLP", "overall"]
    width = max(map(len, rows))
    lines = [f"{'':{width}}  " + "  ".join(f"{head:>5}" for head in heads)]
    for label, values in rows.items():
        cells = []
        for head, value in zip(heads, values, strict=True):
            cells.append(f"{value:{max(5, len(head))}.1f}")
        lines.append(f"{label:{width}}  " + "  ".join(cells))
    return "\n".join(lines)
