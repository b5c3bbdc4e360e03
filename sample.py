"""Text from a checkpoint."""

import torch
from torch import Tensor

from antlm.tokenizer import SPECIAL, Tokenizer
from config import UserError
from model import Transformer


@torch.inference_mode()
def generate(model: Transformer, tokens: Tensor, n_new: int, *, block_size: int, temperature: float = 1.0,
             top_k: int = 0, stop: int | None = None, forbidden: tuple[int, ...] = (),
             generator: torch.Generator | None = None) -> list[int]:
    """Continue tokens (1, T) by up to n_new sampled ones, in causal mode; stops before the token `stop`.

    temperature 0 takes the likeliest token. Keys and values are kept; a row that has outgrown block_size is computed
    anew from its last block_size tokens.
    """
    new, ids, cache = [], tokens, [[] for _ in model.blocks]
    for _ in range(n_new):
        fits = ids.size(1) <= block_size
        x = ids[:, -1:] if fits and cache[0] else ids[:, -block_size:]
        logits = model(x, causal=True, cache=cache if fits else None)[0, -1].float()
        logits[list(forbidden)] = float("-inf")
        if top_k:
            logits[logits < logits.topk(min(top_k, logits.numel())).values[-1]] = float("-inf")
        token = logits.argmax().view(1) if temperature == 0 else torch.multinomial(
            (logits / temperature).softmax(-1), 1, generator=generator)
        if token.item() == stop:
            break
        new.append(token.item())
        ids = torch.cat((ids, token.view(1, 1)), dim=1)
    return new


def print_samples(model: Transformer, content: dict, tokenizer: Tokenizer, args):
    """Continue args.sample args.n times in causal mode, each time up to where a new text would start."""
    prompt = tokenizer.encode_text(args.sample, content["boundary"])
    device = next(model.parameters()).device
    tokens = torch.tensor([prompt], device=device)
    with torch.inference_mode():
        if not model(tokens, causal=True).isfinite().all():
            raise UserError(f"{args.run}: the model's logits are not finite; broken weights")
    generator = torch.Generator(device).manual_seed(args.seed % (1 << 63))
    never = {*SPECIAL.values(), *range(tokenizer.vocab_size, model.config.vocab_size)} - {prompt[0]}
    for i in range(args.n):
        new = generate(model, tokens, args.tokens, block_size=content["settings"]["block_size"], stop=prompt[0],
                       temperature=args.temperature, top_k=args.top_k, forbidden=tuple(never), generator=generator)
        print(f"--- {i + 1}\n{args.sample}{tokenizer.decode(new)}")
