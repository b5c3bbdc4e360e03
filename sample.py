"""Let a trained model continue a text.

    python sample.py runs/babylm --prompt "Once upon a time"       # newest checkpoint of a run
    python sample.py runs/babylm/step_0002000.pt --n 1 --temperature 0

Each sample ends where the next text would start.
"""

import argparse

import torch
from torch import Tensor

from antlm.checkpoint import WEIGHTS, WEIGHTS_HELP, LoadedRun, load_run
from antlm.distributed import find_device_for_texts
from antlm.program import clean_exit
from antlm.tokenizer import SPECIAL
from config import require
from data import OBJECTIVES, find_objectives
from model import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    tokens: Tensor,
    n_new: int,
    *,
    block_size: int,
    temperature: float = 1.0,
    top_k: int = 0,
    stop: int | None = None,
    forbidden: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
) -> list[int]:
    """Continue a row of tokens (1, T) by up to n_new sampled ones; ends before the token `stop`.

    block_size: the most tokens that the model sees at once
    temperature: 0 takes the likeliest token
    top_k: choose among so many likeliest tokens; 0: among all
    """
    window = min(block_size, model.max_tokens or block_size)
    cache = [[] for _ in model.blocks]
    new = []
    for _ in range(n_new):
        # keys and values are kept; a row that has outgrown the window is computed anew from its end
        if tokens.size(1) > window:
            logits = model(tokens[:, -window:], causal=True)
        elif not new:
            logits = model(tokens, causal=True, cache=cache)
        else:
            logits = model(tokens[:, -1:], causal=True, cache=cache)
        logits = logits[0, -1].float()  # (V,), those of the next token
        finite = bool(logits.isfinite().all())
        require(finite, "the model's logits are not finite; its weights are broken")

        # take away what may not come
        logits[list(forbidden)] = float("-inf")
        if top_k > 0:
            least = logits.topk(min(top_k, logits.numel())).values[-1]
            logits[logits < least] = float("-inf")

        # choose
        if temperature == 0:
            token = logits.argmax().view(1)
        else:
            probabilities = (logits / temperature).softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator)
        if token.item() == stop:
            break
        new.append(token.item())
        tokens = torch.cat((tokens, token.view(1, 1)), dim=1)
    return new


def print_samples(run: LoadedRun, args: argparse.Namespace, device: torch.device):
    """Continue the prompt args.n times, each time up to where a new text would start."""
    prompt = run.tokenizer.encode_text(args.prompt, run.boundary)
    tokens = torch.tensor([prompt], device=device)

    # a text ends where the next one would start; other special tokens never come, nor do those
    # that only the model has, whose vocabulary may be larger than the tokenizer's
    start = prompt[0]
    unused = range(run.tokenizer.vocab_size, run.model.config.vocab_size)
    forbidden = {*SPECIAL.values(), *unused} - {start}

    generator = torch.Generator(device).manual_seed(args.seed)
    for number in range(1, args.n + 1):
        new = generate(
            run.model,
            tokens,
            args.tokens,
            block_size=run.block_size,
            temperature=args.temperature,
            top_k=args.top_k,
            stop=start,
            forbidden=tuple(forbidden),
            generator=generator,
        )
        print(f"--- {number}\n{args.prompt}{run.tokenizer.decode(new)}")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", help="run folder, or a checkpoint with tokenizer.json beside it")
    add("--prompt", default="", metavar="TEXT", help="text to continue; default: none")
    add("--n", type=int, default=5, help="how many samples; default: %(default)s")
    add("--tokens", type=int, default=40, help="most tokens of each; default: %(default)s")
    add("--temperature", type=float, default=0.8, help="0: greedy; default: %(default)s")
    add("--top_k", type=int, default=50, help="of so many tokens, 0: all; default: %(default)s")
    add("--seed", type=int, default=1, help="default: %(default)s")
    add("--weights", default=WEIGHTS[0], choices=WEIGHTS, help=WEIGHTS_HELP)
    add(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda", "mps"),
        help="default: %(default)s",
    )
    args = parser.parse_args(argv)
    require(args.n >= 1, f"--n {args.n}: must be at least 1")
    require(args.tokens >= 1, f"--tokens {args.tokens}: must be at least 1")
    require(0 <= args.temperature <= 100, f"--temperature {args.temperature}: must be 0 to 100")
    require(args.top_k >= 0, f"--top_k {args.top_k}: must be at least 0")

    device = find_device_for_texts(args.device)
    run = load_run(args.run, device, args.weights)
    print(run.describe(), flush=True)
    print_samples(run, args, device)
    objectives = find_objectives(run.full_schedule, run.path)
    is_causal = any(OBJECTIVES[name].causal for name in objectives)
    # of an imported model nobody knows what it was trained with
    if not is_causal and "imported_from" not in run.content:
        print("note: this model never learnt to predict the next token, its samples mean little")


if __name__ == "__main__":
    with clean_exit():
        main()
