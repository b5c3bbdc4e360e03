"""A trained model under a new head that tells the classes of a task apart."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Transformer, bare_norm, build_mask


class LowRank(nn.Module):
    """A frozen linear map plus a trained one of low rank, which starts at zero (Hu et al. 2022)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.scale = alpha / rank
        self.dropout = dropout
        device = linear.weight.device
        self.down = nn.Linear(linear.in_features, rank, bias=False, device=device)
        self.up = nn.Linear(rank, linear.out_features, bias=False, device=device)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        change = self.up(self.down(F.dropout(x, self.dropout, self.training)))
        return y + change * self.scale


class Classifier(nn.Module):
    """The model's blocks, and a head that reads one vector of each row.

    The head is that of LTG-BERT and of the 2025 pipeline: norm, Linear, GELU, norm, dropout,
    Linear.
    causal: for each layer, whether its mask is causal
    pool: the vector that the head reads: of the start token, of the last one, or their mean
    dropout: in the head only; the model's own stays as it was trained
    """

    def __init__(
        self, model: Transformer, n_classes: int, causal: list[bool], pool: str, dropout: float
    ):
        super().__init__()
        self.embedding = model.embedding
        self.blocks = model.blocks
        self.causal = causal
        self.pool = pool
        self.dropout = dropout
        n_embd = model.config.n_embd
        self.dense = nn.Linear(n_embd, n_embd)
        self.out = nn.Linear(n_embd, n_classes)

    def add_adapters(self, rank: int, alpha: float, dropout: float):
        """Freeze all but the head, and put a low-rank adapter on every matrix of the blocks."""
        self.embedding.requires_grad_(False)
        self.blocks.requires_grad_(False)
        for block in self.blocks:
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, LowRank(child, rank, alpha, dropout))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return logits (B, classes) of tokens (B, T), of which the first lengths (B,) count."""
        B, T = tokens.shape
        device = tokens.device

        # each kind of mask is built once
        masks = {}
        for causal in set(self.causal):
            masks[causal] = build_mask(T, T, causal=causal, lengths=lengths, device=device)
        x, shared = self.embedding(tokens, 0)
        for block, causal in zip(self.blocks, self.causal, strict=True):
            x = block(x, shared, masks[causal])  # (B, T, D)

        # one vector of each row, (B, D)
        row = torch.arange(B, device=device)
        if self.pool == "mean":
            inside = torch.arange(T, device=device) < lengths[:, None]
            x = (x * inside[..., None]).sum(1) / lengths[:, None]
        elif self.pool == "last":
            x = x[row, lengths - 1]
        else:
            x = x[row, 0]

        x = bare_norm(F.gelu(self.dense(bare_norm(x))))
        return self.out(F.dropout(x, self.dropout, self.training))
