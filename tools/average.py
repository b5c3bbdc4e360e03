"""Average the weights of checkpoints, of one run or of several, into a run like any other.

    python tools/average.py runs/mean runs/clm/step_0000900.pt runs/clm/step_0001000.pt
    python tools/average.py runs/both runs/clm runs/mlm --shares 0.7 0.3

Of a run folder the newest checkpoint is taken. Sizes and tokenizer must be the same; the average
makes sense for models that have a part of their training in common, as those of one run or of one
source (init_from) have. Source: model soups (Wortsman et al. 2022). The new run has no optimizer:
to train it on, start a run from it (init_from).
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from antlm.checkpoint import WEIGHTS, WEIGHTS_HELP, LoadedRun, load_run, save_checkpoint
from antlm.files import new_folder, write_json
from antlm.program import clean_exit
from config import require


def check_same(runs: list[LoadedRun]):
    """Raise UserError, which names the difference, unless all have the same sizes and tokenizer."""
    first = runs[0]
    for run in runs[1:]:
        require(
            run.tokenizer.sha256 == first.tokenizer.sha256,
            f"{run.path}: was trained with another tokenizer than {first.path}",
        )
        sizes = asdict(run.model.config)
        for name, value in asdict(first.model.config).items():
            require(
                name == "dropout" or sizes[name] == value,
                f"{run.path}: has {name}={sizes[name]!r}, and {first.path} {value!r}",
            )
        require(
            run.boundary == first.boundary,
            f"{run.path}: its texts begin with boundary {run.boundary!r}, and those of "
            f"{first.path} with {first.boundary!r}",
        )


@torch.no_grad()
def average_weights(runs: list[LoadedRun], shares: list[float]):
    """Give the first model the weighted mean of all weights. shares: add up to 1"""
    params = [dict(run.model.named_parameters()) for run in runs]
    for name, p in params[0].items():
        # summed in double precision, so that the order of the runs does not matter
        total = torch.zeros_like(p, dtype=torch.float64)
        for run_params, share in zip(params, shares, strict=True):
            total += share * run_params[name].double()
        p.copy_(total)


def average(runs: list[LoadedRun], shares: list[float], out: Path) -> Path:
    """Write the average as a run folder and return its checkpoint; raises UserError."""
    check_same(runs)
    first = runs[0]
    average_weights(runs, shares)

    # what the model has been trained with is the history of all; the last of them is this run's
    history = []
    sources = []
    for run, share in zip(runs, shares, strict=True):
        source = run.history_entry() | {"share": share}
        sources.append(source)
        history += run.history
        if run is not first:
            history.append(source)
    words = [source["words"] for source in sources]
    content = {
        "step": first.step,
        "words": None if None in words else max(words),
        "settings": first.settings | {"out_dir": str(out)},
        "history": history,
        "averaged": sources,
        "optimizer": [],
        "boundary": first.boundary,
        "tokens_sha256": first.content["tokens_sha256"],
        "tokenizer_sha256": first.tokenizer.sha256,
    }
    name = f"step_{first.step:07}.pt"
    tokenizer = first.path.with_name("tokenizer.json").read_bytes()
    with new_folder(out) as unfinished:
        unfinished.mkdir(parents=True)
        (unfinished / "tokenizer.json").write_bytes(tokenizer)
        write_json(unfinished / "settings.json", content["settings"])
        save_checkpoint(unfinished / name, first.model, **content)
    return out / name


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, help="run folder to make")
    add("runs", nargs="+", metavar="RUN", help="run folder, or a checkpoint")
    add("--shares", nargs="+", type=float, help="of each, in any unit; default: all alike")
    add("--weights", default=WEIGHTS[0], choices=WEIGHTS, help=WEIGHTS_HELP)
    args = parser.parse_args(arguments)
    require(not args.out.exists(), f"{args.out}: exists already; remove it or choose another name")
    shares = args.shares or [1.0] * len(args.runs)
    require(
        len(shares) == len(args.runs),
        f"--shares: has {len(shares)} numbers for {len(args.runs)} runs",
    )
    require(min(shares) >= 0 and sum(shares) > 0, "--shares: must not be negative, nor all 0")
    shares = [share / sum(shares) for share in shares]
    runs = [load_run(path, "cpu", args.weights) for path in args.runs]
    print(f"{average(runs, shares, args.out)}: written")


if __name__ == "__main__":
    with clean_exit():
        main()
