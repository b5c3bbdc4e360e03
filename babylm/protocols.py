"""What the evaluation pipeline of each year asks of a model, and how it counts the answers."""

from dataclasses import dataclass

from babylm.tasks import (
    BLIMP,
    COMPS,
    ENTITY_TRACKING,
    ENTITY_TRACKING_2026,
    EWOK_CONTEXTS,
    EWOK_TARGETS,
    GLOBAL_PIQA,
    WUG,
    Kind,
)


@dataclass(frozen=True)
class Protocol:
    """The tasks of a year, and what is particular about its way to ask.

    kinds: of choices between texts
    human: whether reading times and the age of acquisition are part of it
    own_template: around a text stand the special tokens that an imported model's own tokenizer puts
        there; False: a start token in front of it
    space_in_front: of a text without context; the target after a context then takes its space along
    bare_context: in causal mode, no start token stands in front of a context
    masked_mean: in the masked modes a text counts by the mean over its tokens, not by their sum
    skip_start: in the masked modes start tokens within a text, which are its newlines, are left out
    ties: what the official code makes of options that tie: it takes the "first" of them, which is
        the right one, or one "at random"; eval.py itself lets them share the point
    """

    kinds: tuple[Kind, ...]
    human: bool = True
    own_template: bool = True
    space_in_front: bool = False
    bare_context: bool = False
    masked_mean: bool = False
    skip_start: bool = False
    ties: str = "at random"


PROTOCOLS = {
    # babylm-eval at 3d57ddc8, folder strict
    "2026": Protocol(kinds=(BLIMP, EWOK_CONTEXTS, ENTITY_TRACKING_2026, COMPS, GLOBAL_PIQA)),
    # evaluation-pipeline-2025 at bf55c113
    "2025": Protocol(kinds=(BLIMP, EWOK_TARGETS, ENTITY_TRACKING, COMPS, WUG), ties="first"),
    # evaluation-pipeline-2024 at d680c287, a fork of lm_eval 0.4.2
    "2024": Protocol(
        kinds=(BLIMP, EWOK_TARGETS),
        human=False,
        own_template=False,
        space_in_front=True,
        bare_context=True,
        masked_mean=True,
        skip_start=True,
        ties="first",
    ),
}
DEFAULT_PROTOCOL = "2026"
