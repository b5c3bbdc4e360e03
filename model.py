"""BabyLlama and LTG-BERT: one transformer whose attention mask is an argument of forward.

    model = Transformer(ModelConfig(backbone="babyllama", vocab_size=16000, n_layer=16, n_head=8))
    loss, count = model(tokens, targets, causal=True)     # summed loss, number of scored tokens
    logits = model(tokens, causal=False)                  # (B, T, V)

In comments and docstrings: B rows, T tokens a row, D n_embd, H heads, d = D / H, F n_ff,
V vocab_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antlm import IGNORE, ops
from antlm.ops import dropout
from config import require


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model; raises UserError where they contradict each other."""

    backbone: str = "babyllama"  # a row of BACKBONES
    vocab_size: int = 16000
    n_layer: int = 16
    n_head: int = 8
    n_embd: int = 512
    n_ff: int = 1024  # feed-forward width
    tied: bool = False  # output weights = input embedding; LTG-BERT always ties
    dropout: float = 0.0
    n_bucket: int = 32  # LTG-BERT: relative positions fall into 2 * n_bucket - 1 buckets
    max_position: int = 512  # LTG-BERT: distances from here on share the last bucket

    def __post_init__(self):
        require(
            self.backbone in BACKBONES,
            f"backbone = {self.backbone!r} must be one of {', '.join(BACKBONES)}",
        )
        # sizes that no model can do without
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "n_ff"):
            value = getattr(self, name)
            require(value >= 1, f"{name} = {value} must be at least 1")
        require(
            self.n_embd % self.n_head == 0,
            f"n_embd = {self.n_embd} must be a multiple of n_head = {self.n_head}",
        )
        require(0 <= self.dropout < 1, f"dropout = {self.dropout} must lie in [0, 1)")
        BACKBONES[self.backbone].check(self)

    @property
    def max_tokens(self) -> int | None:
        """The longest row that the backbone can take; None where it takes any."""
        return BACKBONES[self.backbone].max_tokens(self)


# ------------------------------------------------------------------------- which keys a query sees


class Mask(NamedTuple):
    """Which keys a query may see. Transformer.forward builds it, blocks pass it on unopened.

    hidden: broadcasts to (B, H, Tq, Tk), True where a key is hidden; None: every key is seen
    triangle: whether just the later keys are hidden, a case that kernels have built in
    """

    hidden: Tensor | None
    triangle: bool


def build_mask(
    n_query: int,
    n_key: int,
    *,
    causal: bool,
    lengths: Tensor | None = None,
    device: torch.device | None = None,
) -> Mask:
    """Return the mask of queries at the last n_query of n_key positions.

    This is the one place in the project that decides what is hidden: another kind of mask is
    another branch here.
    causal: a query sees no later key
    lengths: (B,) at least 1; keys from there on are padding
    """
    # numbers of the positions; the queries are the last ones
    key = torch.arange(n_key, device=device)
    query = key[-n_query:, None]
    hidden = None
    triangle = False
    if causal and n_query > 1:  # a single query stands last and has no later key
        hidden = key > query
        # a kernel's own triangle aligns first positions, with a cache the last ones are aligned
        triangle = n_query == n_key
    if lengths is not None:
        padding = key >= lengths[:, None, None, None]
        hidden = padding if hidden is None else hidden | padding
        triangle = False
    return Mask(hidden, triangle)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Tensor | None = None,
    scale: float | None = None,
    rate: float = 0.0,
) -> Tensor:
    """Return softmax attention under a mask, (B, H, Tq, d).

    q (B, H, Tq, d), k and v (B, H, Tk, d); bias (B, H, Tq, Tk) is added to the scaled scores
    rate: dropout of the probabilities
    """
    return ops.attention(
        q, k, v, hidden=mask.hidden, triangle=mask.triangle, bias=bias, scale=scale, rate=rate
    )


def split_heads(x: Tensor, n_head: int) -> Tensor:
    # (..., T, D) -> (..., H, T, d)
    return x.unflatten(-1, (n_head, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    # (..., H, T, d) -> (..., T, D)
    return x.transpose(-3, -2).flatten(-2)


def update_cache(cache: list | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Append keys and values (B, H, T, d) to the layer's cache, and return all of them."""
    if cache is None:
        return k, v
    # an empty list is a cache that nothing has filled yet
    if cache:
        k = torch.cat((cache[0], k), dim=-2)
        v = torch.cat((cache[1], v), dim=-2)
    cache[:] = [k, v]
    return k, v


# --------------------------------------------------------------------------------------- BabyLlama


class LlamaEmbedding(nn.Module):
    """Token embedding. The rotary angles are shared by all layers (Su et al. 2021)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # the head may share this table, so it has the name `tokens` in every backbone
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.head_size = config.n_embd // config.n_head

    def forward(self, tokens: Tensor, start: int):
        """Return x (B, T, D), and cosine and sine (T, d / 2) of the positions from `start` on."""
        device = tokens.device
        # pair i of a head turns by position * 10000^(-2i / d); in float32 also under autocast,
        # since bfloat16 cannot tell positions beyond 256 apart
        position = torch.arange(start, start + tokens.size(1), device=device).float()
        exponent = torch.arange(0, self.head_size, 2, device=device) / self.head_size
        # a power and a division, as in Hugging Face: 10000^-x rounds otherwise, and at position 250
        # the last bit of a frequency is an angle of 1.5e-5
        angle = torch.outer(position, 1 / 10000.0**exponent)
        return self.tokens(tokens), (angle.cos(), angle.sin())


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm by way of ops.rms_norm."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LlamaBlock(nn.Module):
    """Pre-norm attention with rotary positions, then SwiGLU (Touvron et al. 2023)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.n_embd, eps=1e-6)
        # one product for queries, keys and values is faster than three
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.ff_norm = RMSNorm(config.n_embd, eps=1e-6)
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_ff, bias=False)
        self.down = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x: Tensor, shared, mask: Mask, cache: list | None = None) -> Tensor:
        cos, sin = shared
        rate = self.dropout if self.training else 0.0

        # attention: mix what the positions say
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.n_head, -1))
        q, k, v = (y.transpose(1, 2) for y in ops.rotary_heads(qkv, cos, sin))  # (B, H, T, d)
        k, v = update_cache(cache, k, v)
        y = merge_heads(attend(q, k, v, mask, rate=rate))
        x = x + dropout(self.out(y), rate)

        # feed-forward
        gate, up = self.gate_up(self.ff_norm(x)).chunk(2, dim=-1)  # (B, T, F) each
        return x + dropout(self.down(F.silu(gate) * up), rate)


class LlamaHead(nn.Module):
    def __init__(self, config: ModelConfig, embedding: nn.Embedding):
        super().__init__()
        self.norm = RMSNorm(config.n_embd, eps=1e-6)
        self.vocab = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # tied: one matrix reads the tokens and writes them
        if config.tied:
            self.vocab.weight = embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def check_llama(config: ModelConfig):
    require(
        config.n_embd // config.n_head % 2 == 0,
        f"n_head = {config.n_head}: rotary embedding needs an even n_embd / n_head",
    )


def init_llama(model: "Transformer"):
    """Draw matrices with a deviation of 0.02, as Hugging Face's LlamaConfig does; norms stay 1."""
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)


# ----------------------------------------------------------------------------------------- LTG-BERT


def bare_norm(x: Tensor) -> Tensor:
    """LayerNorm without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-7)


def position_buckets(n_bucket: int, max_position: int) -> Tensor:
    """Return the table row of every distance from -(max_position - 1) to max_position - 1.

    Near distances have a row each, far ones share rows on a logarithmic scale.
    Source: DeBERTa (He et al. 2021), appendix A.3, with the rounding of ltg-bert.
    """
    mid = n_bucket // 2
    rows = []
    for distance in range(1 - max_position, max_position):
        bucket = abs(distance)
        # exact up to mid, then logarithmic up to max_position
        if bucket > mid:
            log = math.log(bucket / mid) / math.log((max_position - 1) / mid)
            # the 1e-9 keeps the ceiling of a whole number whole under rounding
            bucket = mid + math.ceil(log * (mid - 1) - 1e-9)
        if distance < 0:
            bucket = -bucket
        rows.append(n_bucket - 1 + bucket)
    return torch.tensor(rows)


class LTGEmbedding(nn.Module):
    """Token embedding. The table of relative positions is shared by all layers."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.relative = nn.Parameter(torch.empty(2 * config.n_bucket - 1, config.n_embd))
        self.relative_norm = nn.LayerNorm(config.n_embd, eps=1e-7)
        self.dropout = config.dropout
        self.max_distance = config.max_position - 1
        buckets = position_buckets(config.n_bucket, config.max_position)
        # not in checkpoints: it follows from the sizes
        self.register_buffer("buckets", buckets, persistent=False)

    def forward(self, tokens: Tensor, start: int):
        """Return x (B, T, D), the table (2 n_bucket - 1, D) and what picks a row for each distance.

        The distances i - j are those from start + T - 1 down to -T: one more than any query needs,
        for ops.position_scores. Each has a row of zeros and a one, (start + 2 T, 2 n_bucket - 1).
        """
        T = tokens.size(1)
        rate = self.dropout if self.training else 0.0
        # all distances beyond max_position share the last bucket
        distance = torch.arange(start + T - 1, -T - 1, -1, device=tokens.device)
        distance = distance.clamp(-self.max_distance, self.max_distance)
        rows = self.buckets[distance + self.max_distance]
        # a product with it is exact, and its gradient a product, too: on a GPU, which would add up
        # the rows of a lookup one after the other, that is faster
        selection = F.one_hot(rows, len(self.relative)).to(self.relative.dtype)
        x = dropout(bare_norm(self.tokens(tokens)), rate)
        return x, (self.relative_norm(self.relative), selection)


class LTGBlock(nn.Module):
    """Attention with disentangled relative positions, then GEGLU with a norm inside.

    Source: Samuel et al. 2023, section 3.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        # tokens and positions share this projection, where DeBERTa has two
        self.qk = nn.Linear(config.n_embd, 2 * config.n_embd)
        self.v = nn.Linear(config.n_embd, config.n_embd)
        self.out = nn.Linear(config.n_embd, config.n_embd)
        self.out_norm = nn.LayerNorm(config.n_embd, eps=1e-7)
        self.up_gate = nn.Linear(config.n_embd, 2 * config.n_ff, bias=False)
        self.down = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x: Tensor, shared, mask: Mask, cache: list | None = None) -> Tensor:
        table, selection = shared
        rate = self.dropout if self.training else 0.0

        # queries, keys and values of the tokens, (B, H, T, d)
        h = bare_norm(x)
        q, k = self.qk(h).chunk(2, dim=-1)
        q = split_heads(q, self.n_head)
        k = split_heads(k, self.n_head)
        v = split_heads(self.v(h), self.n_head)
        k, v = update_cache(cache, k, v)

        # queries and keys of the positions, from the same projection, (H, 2 n_bucket - 1, d)
        q_position, k_position = self.qk(dropout(table, rate)).chunk(2, dim=-1)
        q_position = split_heads(q_position, self.n_head)
        k_position = split_heads(k_position, self.n_head)

        # score(i, j) = (q_i . k_j + q_i . k_position[i - j] + k_j . q_position[i - j]) * scale
        # three terms, each of variance d: hence 3 d in the scale
        scale = (3 * q.size(-1)) ** -0.5
        mirrored = selection.flip(0).roll(-1, 0)  # the distances as the keys see them: j - i
        content_to_position = ops.position_scores(q, selection @ k_position)
        position_to_content = ops.position_scores(k, mirrored @ q_position).mT
        bias = (content_to_position + position_to_content) * scale
        y = merge_heads(attend(q, k, v, mask, bias, scale, rate))
        # the norm behind the attention lies inside the residual branch
        x = x + dropout(self.out_norm(self.out(y)), rate)

        # feed-forward
        y = ops.gated_norm(self.up_gate(bare_norm(x)), eps=1e-7)  # (B, T, F)
        return x + dropout(self.down(y), rate)


class LTGHead(nn.Module):
    def __init__(self, config: ModelConfig, embedding: nn.Embedding):
        super().__init__()
        self.dropout = config.dropout
        self.dense = nn.Linear(config.n_embd, config.n_embd)
        self.vocab = nn.Linear(config.n_embd, config.vocab_size)
        self.vocab.weight = embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        rate = self.dropout if self.training else 0.0
        # one hidden layer in front of the vocabulary, as BERT has it
        x = bare_norm(F.gelu(self.dense(bare_norm(x))))
        return dropout(x, rate)


def check_ltg(config: ModelConfig):
    require(
        1 < config.n_bucket < config.max_position,
        f"1 < n_bucket < max_position must hold, not {config.n_bucket} and {config.max_position}",
    )


def init_ltg(model: "Transformer"):
    """Draw matrices from a normal distribution cut at two deviations, as ltg-bert does."""
    std = math.sqrt(2 / (5 * model.config.n_embd))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        # what is left are weights of norms, which stay 1
    # the feed-forward layers start smaller the deeper they lie
    for layer, block in enumerate(model.blocks):
        for linear in (block.up_gate, block.down):
            linear.weight.data *= math.sqrt(1 / (2 * (1 + layer)))


# ------------------------------------------------------------------------------------ the skeleton


def any_length(config: ModelConfig) -> None:
    """A backbone whose positions are relative takes rows of any length."""
    return None


def any_size(config: ModelConfig):
    """A backbone that asks no more of its sizes than ModelConfig does."""


class Backbone(NamedTuple):
    """What differs between the models.

    embedding: forward(tokens, start) returns x (B, T, D) and what all layers share
    block: forward(x, shared, mask, cache) returns x
    head: forward(x) returns what its Linear `vocab` turns into logits
    init: sets the first weights
    check: raises UserError where sizes do not fit the backbone
    max_tokens: of a ModelConfig, the longest row that it can take; None: any
    """

    embedding: type[nn.Module]
    block: type[nn.Module]
    head: type[nn.Module]
    init: Callable[["Transformer"], None]
    check: Callable[[ModelConfig], None] = any_size
    max_tokens: Callable[[ModelConfig], int | None] = any_length


BACKBONES = {
    "babyllama": Backbone(LlamaEmbedding, LlamaBlock, LlamaHead, init_llama, check_llama),
    "ltg_bert": Backbone(LTGEmbedding, LTGBlock, LTGHead, init_ltg, check_ltg),
}


class VocabularyLoss(nn.Module):
    """ops.vocabulary_loss as a part of the model, which can be compiled by itself."""

    def forward(self, x, weight, bias, targets, weights) -> Tensor:
        return ops.vocabulary_loss(x, weight, bias, targets, weights)


class Transformer(nn.Module):
    """Embedding, n_layer blocks and one head for every objective."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        backbone = BACKBONES[config.backbone]
        self.embedding = backbone.embedding(config)
        self.blocks = nn.ModuleList(backbone.block(config) for _ in range(config.n_layer))
        self.head = backbone.head(config, self.embedding.tokens)
        self.loss = VocabularyLoss()
        self.max_tokens = config.max_tokens
        # last, since with tied weights embedding and head are one parameter
        backbone.init(self)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        causal: bool,
        scored: Tensor | None = None,
        weights: Tensor | None = None,
        lengths: Tensor | None = None,
        cache: list | None = None,
        with_logits: bool = False,
    ):
        """Return logits, or with targets the summed loss in nats and the number of scored tokens.

        tokens, targets: (B, T); a target of IGNORE is not scored, and nothing is shifted here
        scored: (B, K) only these positions pass through the vocabulary head; logits are (B, K, V)
        weights: (B, T) factor of each target's loss, with which it is counted, too
        lengths: (B,) keys from there on are padding
        cache: n_layer lists, filled in place; tokens follow those of earlier calls (causal only)
        with_logits: return the logits behind loss and count, too
        """
        # embed the tokens; those of a cache stand before them
        start = cache[0][0].size(-2) if cache and cache[0] else 0
        length = start + tokens.size(1)
        require(
            self.max_tokens is None or length <= self.max_tokens,
            f"a row of {length} tokens is longer than the {self.max_tokens} that "
            f"{self.config.backbone} can take",
        )
        x, shared = self.embedding(tokens, start)

        # every layer sees through the same mask
        mask = build_mask(
            tokens.size(1), length, causal=causal, lengths=lengths, device=tokens.device
        )
        for i, block in enumerate(self.blocks):
            x = block(x, shared, mask, None if cache is None else cache[i])

        # only what is scored goes through the head: the largest product of the model
        if scored is not None:
            x = x.gather(1, scored[..., None].expand(-1, -1, x.size(-1)))
            targets = None if targets is None else targets.gather(1, scored)
            weights = None if weights is None else weights.gather(1, scored)
        x = self.head(x)
        vocab = self.head.vocab
        if targets is None:
            return vocab(x)
        # a sum and a count: only the caller knows how many tokens the whole step scores
        loss = self.loss(x, vocab.weight, vocab.bias, targets, weights)
        scored_targets = targets != IGNORE
        count = scored_targets.sum() if weights is None else (weights * scored_targets).sum()
        if with_logits:
            return loss, count, vocab(x)
        return loss, count
