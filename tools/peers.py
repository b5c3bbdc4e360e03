"""What bench.py compares with: the same models as others compute them.

A peer is made from Settings and the size of the vocabulary, and returns what ours returns: the
summed loss and the number of scored tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antlm import IGNORE
from model import Transformer, bare_norm
from train import Settings


def sum_and_count(losses: Tensor, scored: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the summed losses and their number, each with its weight, as Transformer.forward does.

    losses (N,); scored (N,) 1 where a loss counts, else 0; weights: N in any shape, None: all alike
    """
    if weights is not None:
        scored = scored * weights.flatten()
    return (losses * scored).sum(), scored.sum()


class HuggingFaceLlama(nn.Module):
    """Peer of BabyLlama: same sizes, logits at every position, the loss summed as ours is."""

    name = "Hugging Face Llama"

    def __init__(self, settings: Settings, vocab_size: int):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM  # slow, and only needed here

        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=settings.n_embd,
                num_hidden_layers=settings.n_layer,
                num_attention_heads=settings.n_head,
                intermediate_size=settings.n_ff,
                max_position_embeddings=settings.block_size,
                tie_word_embeddings=settings.tied,
            )
        )

    def forward(self, tokens: Tensor, targets: Tensor, *, causal: bool, scored=None, weights=None):
        mask = None
        if not causal:
            T = tokens.size(1)
            mask = torch.zeros(
                1, 1, T, T, device=tokens.device
            )  # added to the scores: hides nothing
        logits = self.llama(tokens, attention_mask=mask).logits.flatten(0, 1).float()
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=IGNORE)
        return sum_and_count(losses, (targets != IGNORE).flatten().float(), weights)


class PlainLTGBert(Transformer):
    """Peer of LTG-BERT: our weights, computed as the paper's formulas read (Samuel et al. 2023).

    As in the reference code (ltg-bert), position keys and queries are looked up for every pair of
    positions, which makes (T, T, D) tensors, attention is an explicit softmax, and of all positions
    only those with a target pass through the head.
    """

    name = "plain LTG-BERT"

    def __init__(self, settings: Settings, vocab_size: int):
        super().__init__(settings.model_config(vocab_size))

    def forward(self, tokens: Tensor, targets: Tensor, *, causal: bool, scored=None, weights=None):
        x, (table, _) = self.embedding(tokens, 0)
        position = torch.arange(tokens.size(1), device=tokens.device)
        furthest = self.embedding.max_distance
        distance = (position[:, None] - position).clamp(-furthest, furthest)
        index = self.embedding.buckets[distance + furthest]  # (T, T) rows of the table
        for block in self.blocks:
            x = x + self.attention(block, bare_norm(x), table, index, causal)
            up, gate = block.up_gate(bare_norm(x)).chunk(2, dim=-1)
            y = block.down(bare_norm(up * F.gelu(gate, approximate="tanh")))
            x = x + F.dropout(y, block.dropout)

        chosen = (targets != IGNORE).flatten().nonzero().squeeze(-1)
        logits = self.head.vocab(self.head(x.flatten(0, 1)[chosen])).float()
        losses = F.cross_entropy(logits, targets.flatten()[chosen], reduction="none")
        weights = None if weights is None else weights.flatten()[chosen]
        return sum_and_count(losses, torch.ones_like(losses), weights)

    def attention(self, block, x: Tensor, table: Tensor, index: Tensor, causal: bool) -> Tensor:
        # queries and keys of the tokens (B, T, H, d) and of their distances (T, T, H, d)
        heads = (block.n_head, -1)
        q, k = block.qk(x).unflatten(-1, (2, *heads)).unbind(-3)
        v = block.v(x).unflatten(-1, heads)
        positions = F.embedding(index, block.qk(F.dropout(table, block.dropout)))
        q_pos, k_pos = positions.unflatten(-1, (2, *heads)).unbind(-3)

        # content to content, content to position, position to content
        scale = (3 * q.size(-1)) ** -0.5
        scores = torch.einsum("bihd,bjhd->bhij", q, k * scale)
        scores = scores + torch.einsum("bihd,ijhd->bhij", q, k_pos * scale)
        scores = scores + torch.einsum("bjhd,ijhd->bhij", k * scale, q_pos)
        if causal:
            later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        probabilities = F.dropout(scores.softmax(-1), block.dropout)
        y = torch.einsum("bhij,bjhd->bihd", probabilities, v).flatten(-2)
        return F.dropout(block.out_norm(block.out(y)), block.dropout)


PEERS = {"babyllama": HuggingFaceLlama, "ltg_bert": PlainLTGBert}
