"""BabyLlama and LTG-BERT: one transformer whose attention mask is an argument of forward.

    model = Transformer(ModelConfig(backbone="babyllama", vocab_size=16000, n_layer=16, n_head=8, n_embd=512, n_ff=1024))
    loss, count = model(tokens, targets, causal=True)     # summed loss and number of scored tokens
    logits = model(tokens, causal=False)                  # (B, T, V)

In comments and docstrings: B rows, T tokens a row, D n_embd, H heads, d = D / H, F n_ff, V vocab_size.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antlm.ops import IGNORE, VocabularyLoss, dropout


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model; raises ValueError where they contradict each other."""

    backbone: str = "babyllama"
    vocab_size: int = 16000
    n_layer: int = 16
    n_head: int = 8
    n_embd: int = 512
    n_ff: int = 1024
    tied: bool = False  # output weights = input embedding; LTG-BERT always ties
    dropout: float = 0.0
    n_bucket: int = 32  # LTG-BERT: relative positions fall into 2 * n_bucket - 1 buckets
    max_position: int = 512  # LTG-BERT: distances from here on share the last bucket

    def __post_init__(self):
        for field in fields(self):
            name, kind, x = field.name, field.type, getattr(self, field.name)
            if type(x) is not kind and (kind, type(x)) != (float, int) or kind is int and x < 1:
                raise ValueError(f"{name} must be of type {kind.__name__}{' and at least 1' * (kind is int)}, not {x!r}")
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, not {self.backbone!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head must divide n_embd: {self.n_embd} / {self.n_head} is not whole")
        if self.backbone == "babyllama" and self.n_embd // self.n_head % 2:
            raise ValueError(f"n_head: rotary embedding needs an even head size, n_embd / n_head is {self.n_embd // self.n_head}")
        if not 1 < self.n_bucket < self.max_position <= 1 << 20:
            raise ValueError(f"1 < n_bucket < max_position <= {1 << 20} must hold, not {self.n_bucket} and {self.max_position}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, lengths: Tensor | None = None,
           bias: Tensor | None = None, scale: float | None = None, p: float = 0.0) -> Tensor:
    """Softmax attention, the only place in the project where anything is masked.

    q (B, H, Tq, d), k and v (B, H, Tk, d) -> (B, H, Tq, d). The queries are the last Tq of the Tk positions.
    lengths (B,), at least 1: keys from there on are hidden. bias (B, H, Tq, Tk) is added to the scaled scores.
    """
    Tq, Tk = q.size(-2), k.size(-2)
    causal = causal and Tq > 1  # one query is the last position and sees every key
    # On a CPU SDPA's dropout is slow, and in bfloat16 takes 4 (T 128) to 1.2 times (1024) as long as products (2.13).
    plain, mask = q.device.type == "cpu" and (p > 0 or q.dtype == torch.bfloat16 and Tk <= 512), bias
    if lengths is not None or causal and (plain or bias is not None or Tq != Tk):
        # SDPA's own is_causal aligns the first positions, a cache needs the last ones aligned.
        key = torch.arange(Tk, device=q.device)
        hidden = (key > key[-Tq:, None]) & causal  # (Tq, Tk): the keys behind each query
        if lengths is not None:
            hidden = hidden | (key >= lengths[:, None, None, None])
        mask = (q.new_zeros(()) if bias is None else bias).masked_fill(hidden, float("-inf"))
    if plain:
        score = (q * (q.size(-1) ** -0.5 if scale is None else scale)) @ k.mT
        return dropout((score if mask is None else score + mask).softmax(-1), p) @ v
    return F.scaled_dot_product_attention(q, k, v, mask, p, causal and mask is None, scale=scale)


def split_heads(x: Tensor, n_head: int) -> Tensor:
    return x.unflatten(-1, (n_head, -1)).transpose(-3, -2)  # (..., T, D) -> (..., H, T, d)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)  # (..., H, T, d) -> (..., T, D)


def update_cache(cache: list | None, k: Tensor, v: Tensor):
    """Keys and values (B, H, T, d) of this call behind those that the layer's cache holds; the cache then has all."""
    if cache:
        k, v = (torch.cat(pair, dim=-2) for pair in zip(cache, (k, v)))
    if cache is not None:
        cache[:] = k, v
    return k, v


# ---------------------------------------------------------------------------------------------- BabyLlama


class LlamaEmbedding(nn.Module):
    """Token embedding; what all layers share are the rotary angles (Su et al. 2021, half-split as in Hugging Face)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.d = c.n_embd // c.n_head

    def forward(self, tokens: Tensor, start: int):
        positions = torch.arange(start, start + tokens.size(1), device=tokens.device).float()
        angles = torch.outer(positions, 10000.0 ** (-torch.arange(0, self.d, 2, device=tokens.device) / self.d))  # (T, d / 2)
        return self.tokens(tokens), (angles.cos(), angles.sin())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class LlamaBlock(nn.Module):
    """Pre-norm attention with rotary positions, then SwiGLU (Touvron et al. 2023)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.n_head, self.dropout = c.n_head, c.dropout
        self.attention_norm = nn.RMSNorm(c.n_embd, eps=1e-6)
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.out = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.ff_norm = nn.RMSNorm(c.n_embd, eps=1e-6)
        self.gate_up = nn.Linear(c.n_embd, 2 * c.n_ff, bias=False)
        self.down = nn.Linear(c.n_ff, c.n_embd, bias=False)

    def forward(self, x: Tensor, shared, *, causal: bool, lengths: Tensor | None, cache: list | None) -> Tensor:
        (cos, sin), p = shared, self.dropout * self.training
        q, k, v = (split_heads(y, self.n_head) for y in self.qkv(self.attention_norm(x)).chunk(3, dim=-1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = update_cache(cache, k, v)
        y = self.out(merge_heads(attend(q, k, v, causal=causal, lengths=lengths, p=p)))
        x = x + dropout(y, p)
        gate, up = self.gate_up(self.ff_norm(x)).chunk(2, dim=-1)
        return x + dropout(self.down(F.silu(gate) * up), p)


class LlamaHead(nn.Module):
    def __init__(self, c: ModelConfig, embedding: nn.Embedding):
        super().__init__()
        self.norm = nn.RMSNorm(c.n_embd, eps=1e-6)
        self.vocab = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tied:
            self.vocab.weight = embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def init_llama(model: "Transformer"):
    for p in model.parameters():  # std 0.02: initializer_range of Hugging Face's LlamaConfig; norms stay 1
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)


# ----------------------------------------------------------------------------------------------- LTG-BERT


def bare_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-7)  # LayerNorm without affine parameters


def position_buckets(n_bucket: int, max_position: int) -> Tensor:
    """Table row of every distance i - j from -(max_position - 1) to max_position - 1 (DeBERTa, He et al. 2021, A.3)."""
    mid, r = n_bucket // 2, torch.arange(1 - max_position, max_position)
    log = (r.abs().clamp(min=1).double() / mid).log() / math.log((max_position - 1) / mid)
    far = mid + (log * (mid - 1) - 1e-9).ceil().long()  # the 1e-9 keeps ceil of a whole number whole under rounding
    return n_bucket - 1 + r.sign() * torch.where(r.abs() > mid, far, r.abs())


def position_scores(x: Tensor, table: Tensor) -> Tensor:
    """x_i . table[n - 1 + j - i] for every (i, j), no gather: (B, H, n, d), (H, n + m, d) -> (B, H, n, m)."""
    # One product for all rows of the batch, or the table would be copied for each: (H, B, n, n + m).
    y = (x.transpose(0, 1).flatten(1, 2) @ table.mT).unflatten(1, (x.size(0), -1))
    n, width = y.shape[-2:]  # a strided view moves column n - 1 + j - i of row i to column j
    return y.flatten(-2)[..., n - 1:-1].unflatten(-1, (n, width - 1))[..., :width - n].transpose(0, 1)


class LTGEmbedding(nn.Module):
    """Token embedding; what all layers share are the relative position table and its row for each distance."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.relative = nn.Parameter(torch.empty(2 * c.n_bucket - 1, c.n_embd))
        self.relative_norm = nn.LayerNorm(c.n_embd, eps=1e-7)
        self.dropout, self.max_distance = c.dropout, c.max_position - 1
        self.register_buffer("buckets", position_buckets(c.n_bucket, c.max_position), persistent=False)

    def forward(self, tokens: Tensor, start: int):
        T = tokens.size(1)
        distances = torch.arange(start + T - 1, -T - 1, -1, device=tokens.device).clamp(-self.max_distance, self.max_distance)
        rows = self.buckets[distances + self.max_distance]  # (start + 2T,): every query from every key; -T for even sizes
        x = dropout(bare_norm(self.tokens(tokens)), self.dropout * self.training)
        return x, (self.relative_norm(self.relative), rows)


class LTGBlock(nn.Module):
    """Attention with disentangled relative positions, then GEGLU with a norm inside (Samuel et al. 2023, section 3)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.n_head, self.dropout = c.n_head, c.dropout
        self.qk = nn.Linear(c.n_embd, 2 * c.n_embd)
        self.v = nn.Linear(c.n_embd, c.n_embd)
        self.out = nn.Linear(c.n_embd, c.n_embd)
        self.out_norm = nn.LayerNorm(c.n_embd, eps=1e-7)
        self.up_gate = nn.Linear(c.n_embd, 2 * c.n_ff, bias=False)
        self.down = nn.Linear(c.n_ff, c.n_embd, bias=False)

    def forward(self, x: Tensor, shared, *, causal: bool, lengths: Tensor | None, cache: list | None) -> Tensor:
        (table, rows), p = shared, self.dropout * self.training
        h = bare_norm(x)
        q, k = (split_heads(y, self.n_head) for y in self.qk(h).chunk(2, dim=-1))  # (B, H, T, d)
        k, v = update_cache(cache, k, split_heads(self.v(h), self.n_head))
        positions = self.qk(dropout(table, p))  # (2b - 1, 2D)
        q_pos, k_pos = (split_heads(y, self.n_head) for y in positions.chunk(2, dim=-1))  # (H, 2b - 1, d)
        scale = (3 * q.size(-1)) ** -0.5
        # q_i . k_pos[i - j] + k_j . q_pos[i - j]
        bias = (position_scores(q, k_pos[:, rows]) + position_scores(k, q_pos[:, rows.flip(0).roll(-1)]).mT) * scale
        y = attend(q, k, v, causal=causal, lengths=lengths, bias=bias, scale=scale, p=p)
        x = x + dropout(self.out_norm(self.out(merge_heads(y))), p)
        up, gate = self.up_gate(bare_norm(x)).chunk(2, dim=-1)
        return x + dropout(self.down(bare_norm(up * F.gelu(gate, approximate="tanh"))), p)


class LTGHead(nn.Module):
    def __init__(self, c: ModelConfig, embedding: nn.Embedding):
        super().__init__()
        self.dropout = c.dropout
        self.dense = nn.Linear(c.n_embd, c.n_embd)
        self.vocab = nn.Linear(c.n_embd, c.vocab_size)
        self.vocab.weight = embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = bare_norm(F.gelu(self.dense(bare_norm(x))))
        return dropout(x, self.dropout * self.training)


def init_ltg(model: "Transformer"):
    std = math.sqrt(2 / (5 * model.config.n_embd))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    for layer, block in enumerate(model.blocks):
        for linear in (block.up_gate, block.down):
            linear.weight.data *= math.sqrt(1 / (2 * (1 + layer)))


# -------------------------------------------------------------------------------------------- the skeleton


BACKBONES = {  # name: what embeds tokens, what each layer does, what gives logits, how weights start
    "babyllama": (LlamaEmbedding, LlamaBlock, LlamaHead, init_llama),
    "ltg_bert": (LTGEmbedding, LTGBlock, LTGHead, init_ltg),
}


class Transformer(nn.Module):
    """Embedding, n_layer blocks and one head for every objective; the backbone is a row of BACKBONES."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        embedding, block, head, init = BACKBONES[config.backbone]
        self.embedding = embedding(config)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layer))
        self.head = head(config, self.embedding.tokens)
        init(self)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, causal: bool, scored: Tensor | None = None,
                lengths: Tensor | None = None, cache: list | None = None):
        """Logits, or with targets the summed cross-entropy in nats and the number of scored tokens.

        tokens and targets (B, T); a target of IGNORE is not scored, nothing is shifted here. scored (B, K): only
        these positions pass through the vocabulary head, logits are then (B, K, V). lengths (B,): keys from there
        on are padding. cache: n_layer lists, filled in place: tokens then follow those of earlier calls (causal only).
        """
        start = cache[0][0].size(-2) if cache and cache[0] else 0
        x, shared = self.embedding(tokens, start)
        for i, block in enumerate(self.blocks):
            x = block(x, shared, causal=causal, lengths=lengths, cache=None if cache is None else cache[i])
        if scored is not None:
            x = x.gather(1, scored[..., None].expand(-1, -1, x.size(-1)))
            targets = None if targets is None else targets.gather(1, scored)
        x, vocab = self.head(x), self.head.vocab
        if targets is None:
            return vocab(x)
        loss = VocabularyLoss.apply(x, vocab.weight, vocab.bias, targets, torch.is_grad_enabled())
        return loss, (targets != IGNORE).sum()


# -------------------------------------------------------------------------------------------- checkpoints


