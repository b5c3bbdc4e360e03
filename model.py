"""BabyLlama and LTG-BERT: one transformer whose attention mask is an argument of forward.

    model = Transformer(ModelConfig(backbone="babyllama", vocab_size=16000, n_layer=16, n_head=8, n_embd=512, n_ff=1024))
    loss, count = model(tokens, targets, causal=True)     # summed loss and number of scored tokens
    logits = model(tokens, causal=False)                  # (B, T, V)

In comments and docstrings: B rows, T tokens a row, D n_embd, H heads, d = D / H, F n_ff, V vocab_size.
"""

import hashlib
import math
import os
import pickle
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from antlm.files import write_whole

IGNORE = -100  # a target with this value is not scored


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


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout(x, p), p to the nearest 65,536th; on a CPU, where random numbers are dear, one serves four elements."""
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    drop, most = min(round(p * 65536), 65535), 2 ** 63 - 1
    bits = torch.randint(-most, most, (-(-x.numel() // 4),)).view(torch.int16)[:x.numel()].view(x.shape)
    return x * (bits >= drop - 32768).to(x.dtype).mul_(65536 / (65536 - drop))


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


class VocabularyLoss(torch.autograd.Function):
    """Summed cross-entropy in nats of vocabulary logits that never stand in memory at once.

    Every chunk leaves its gradients behind in the forward pass, for each is linear in that of the loss. torch's
    linear_cross_entropy does the same, but breaks a compiled graph (2.13).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, learns: bool) -> Tensor:
        """x (B, K, D), weight (V, D), bias (V,) or None, targets (B, K) or IGNORE; may backward follow? -> a scalar."""
        # Whole rows: Inductor (2.13, CPU) leaves the end of a chunk unwritten that K does not divide.
        device, rows = x.device.type, max(-(-512 // x.size(1)), -(-len(x) // 8))
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            h, w, wide = x.to(dtype), weight.to(dtype), torch.promote_types(dtype, torch.float32)
            loss, dx, dw = x.new_zeros((), dtype=wide), [], torch.zeros_like(weight)
            db = None if bias is None else torch.zeros_like(bias)
            for h_c, t in zip(h.split(rows), targets.split(rows)):
                h_c, scored, t = h_c.flatten(0, 1), (t != IGNORE).view(-1, 1), t.clamp(min=0).view(-1, 1)
                logits = F.linear(h_c, w, None if bias is None else bias.to(dtype)).to(wide)
                total = logits.logsumexp(-1, keepdim=True)
                loss = loss + ((total - logits.gather(1, t)) * scored).sum()
                if learns:  # softmax - one-hot
                    gradient = logits.sub_(total).exp_().scatter_add_(1, t, torch.full_like(total, -1)).mul_(scored)
                    db = None if bias is None else db + gradient.sum(0)
                    gradient = gradient.to(dtype)
                    dx.append(gradient @ w)
                    dw += gradient.T @ h_c
        if learns:
            ctx.save_for_backward(torch.cat(dx).to(x.dtype).view_as(x), dw, db)
        return loss

    @staticmethod
    def backward(ctx, scale: Tensor):
        return *(None if gradient is None else gradient * scale for gradient in ctx.saved_tensors), None, None


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


# -------------------------------------------------------------------------------------------- checkpoints


class CheckpointError(Exception):
    """One line for the user: which file, what is wrong with it, what to do."""


def digest(content, most: float = math.inf) -> str:
    """SHA-256 over plain data and the bytes of every tensor in it, so that one flipped bit shows.

    Raises ValueError beyond `most` values and bytes: lists in lists and views can claim any number of them.
    """
    h, left = hashlib.sha256(), most

    def walk(x):
        nonlocal left
        left -= 1 + (x.numel() * x.element_size() if isinstance(x, Tensor) else 0)
        if left < 0:
            raise ValueError("claims more than the file holds")
        h.update(type(x).__name__.replace("OrderedDict", "dict").encode())
        if isinstance(x, Tensor):
            h.update(f"{x.dtype}{tuple(x.shape)}{'grad' * x.requires_grad}".encode())
            h.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(x, dict):
            for key, value in x.items():
                h.update(repr(key).encode())
                walk(value)
        elif isinstance(x, (list, tuple)):
            for value in x:
                walk(value)
        else:
            h.update(repr(x).encode())
        h.update(b";")

    walk(content)
    return h.hexdigest()


def save_checkpoint(path: Path, model: Transformer, **content):
    """Write the model and plain content to one file that is either whole or not there; raises OSError."""
    content |= {"config": asdict(model.config), "model": dict(model.state_dict())}
    content["sha256"] = digest(content)
    write_whole(path, lambda f: torch.save(content, f))


def load_checkpoint(path: Path, device: str = "cpu") -> dict:
    """Content of a checkpoint as plain data, its checksum verified; raises CheckpointError. No code in it is run."""
    try:
        size = os.path.getsize(path)
        with zipfile.ZipFile(path) as z:  # torch.load would unpack a record of a thousand times its size
            if sum(record.file_size for record in z.infolist()) > size:
                raise ValueError("claims more than the file holds")
        content = torch.load(path, map_location=device, weights_only=True)
        whole = isinstance(content, dict) and content.pop("sha256", None) == digest(content, most=2 * size)  # tied: twice
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: damaged, or holds code or objects where plain data was expected; not loaded") from None
    except Exception as e:  # torch.load raises whatever a damaged file makes it run into
        first = str(e).strip().splitlines()[0][:150] if str(e).strip() else type(e).__name__
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of train.py ({first})") from None
    if not whole:
        raise CheckpointError(f"{path}: damaged, its checksum does not match; use the checkpoint before it")
    return content


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run folder, newest first."""
    return sorted((f for f in Path(run).glob("step_*.pt") if f.stem[5:].isdecimal()), key=lambda f: -int(f.stem[5:]))


def load_newest(run: Path, say=print) -> tuple[Path | None, dict | None]:
    """Path and content of the newest whole checkpoint; no content without a whole one, no path without any."""
    path = None
    for path in checkpoints(run):
        try:
            return path, load_checkpoint(path)
        except CheckpointError as e:
            say(f"skipped {e}")
    return path, None


def load_model(content: dict, device: str = "cpu", name: str | Path = "checkpoint") -> Transformer:
    """The model of a loaded checkpoint, in eval mode; raises CheckpointError, which starts with name.

    What the settings claim is compared with the weights at hand before any of it is built.
    """
    try:
        config, weights = content["config"], content["model"]
        c, n = ModelConfig(**config), sum(w.numel() for w in weights.values())
        if c.n_embd * max(c.vocab_size, c.n_embd, c.n_ff) > n:
            raise ValueError(f"claims larger matrices than its {n:,} weights")
        one = Transformer(ModelConfig(**config | {"n_layer": 1}))
        expected, block = dict(one.state_dict()), dict(one.blocks[0].state_dict())
        if len(weights) != len(expected) + (c.n_layer - 1) * len(block):
            raise ValueError(f"{len(weights)} weights are not those of {c.n_layer} layers")
        expected |= {f"blocks.{i}.{key}": p for i in range(1, c.n_layer) for key, p in block.items()}
        for key, p in expected.items():
            if weights[key].shape != p.shape or not weights[key].is_floating_point():
                raise ValueError(f"{key} must hold floating-point numbers of shape {tuple(p.shape)}")
        model = Transformer(c)
        model.load_state_dict(weights)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:150]
        raise CheckpointError(f"{name}: not a checkpoint of this model.py ({type(e).__name__}: {reason})") from None
    return model.to(device).eval()
