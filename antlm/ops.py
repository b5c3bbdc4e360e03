"""What a step spends its time on, as fast as this machine does it.

Each fast form stands below the plain formula that it equals; tests compare the two.
In comments: B rows, T tokens a row, D width, H heads, d = D / H, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from antlm import IGNORE

FULL_PRECISION = (torch.float32, torch.float64)


def runs_eagerly_on_cpu(x: Tensor) -> bool:
    """Whether each operation on x is a pass over memory: a compiler makes one loop of a chain."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def has_few_passes(x: Tensor) -> bool:
    """Whether norm and rotation below, which pass over memory less often, may take x.

    Autocast mixes types within a chain, which they do not.
    """
    return runs_eagerly_on_cpu(x) and x.dtype in FULL_PRECISION


# --------------------------------------------------------------------------------------- RMSNorm


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square, and scale: Zhang and Sennrich 2019."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm over the last dimension; x (..., D), weight (D,)."""
    if has_few_passes(x):
        return RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class RMSNorm(torch.autograd.Function):
    """rms_norm in a third of the passes over x, by the kernel that LayerNorm has on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(length.square_().div_(x.size(-1)).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        # LayerNorm's kernel, told that the mean is 0, gives this gradient but for one term: it also
        # takes off the mean of grad * weight, which is put back below
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scale), scale, weight, None, (True, True, False)
        )
        mean = (grad.flatten(0, -2) @ weight).div_(len(weight)).view_as(scale)
        return grad_x.add_(mean.mul_(scale)), grad_weight, None


# --------------------------------------------------------------------------------- rotary positions


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of each head by their angles (the layout of Hugging Face)."""
    a, b = x.chunk(2, dim=-1)
    cos = cos[:, None]
    sin = sin[:, None]
    # back to the type of x: the angles are float32
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def plain_rotary_heads(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give queries and keys their positions; the arguments are those of rotary_heads."""
    q, k, v = qkv.unbind(2)
    return plain_rotate(q, cos, sin), plain_rotate(k, cos, sin), v


def rotary_heads(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys with rotary positions (Su et al. 2021), and the values as they are.

    qkv (B, T, 3, H, d); cos and sin (T, d / 2); the results are (B, T, H, d)
    """
    if has_few_passes(qkv):
        return RotaryHeads.apply(qkv, cos, sin)
    return plain_rotary_heads(qkv, cos, sin)


class RotaryHeads(torch.autograd.Function):
    """rotary_heads without pieces that are put together again, forward or backward."""

    @staticmethod
    def forward(ctx, qkv, cos, sin):
        ctx.save_for_backward(cos, sin)
        q, k, v = qkv.unbind(2)
        q = turn(q, cos, sin, out=torch.empty_like(q))
        k = turn(k, cos, sin, out=torch.empty_like(k))
        # a view of the values would keep the memory of all three
        return q, k, v.clone()

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v):
        cos, sin = ctx.saved_tensors
        B, T, H, d = grad_q.shape
        grad = grad_q.new_empty(B, T, 3, H, d)
        q, k, v = grad.unbind(2)
        # the gradient is turned back
        turn(grad_q, cos, -sin, out=q)
        turn(grad_k, cos, -sin, out=k)
        v.copy_(grad_v)
        return grad, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Write plain_rotate of x to `out`."""
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)[:, None]
    # the cosines of all heads: long runs through memory are faster than one for each half
    all_cos = torch.cat((cos, cos), dim=-1).repeat(1, x.size(2)).view(x.shape[1:])
    torch.mul(x, all_cos, out=out)
    a, b = x.chunk(2, dim=-1)
    out_a, out_b = out.chunk(2, dim=-1)
    out_a.addcmul_(b, sin, value=-1)
    out_b.addcmul_(a, sin)
    return out


# --------------------------------------------------------------------- LTG-BERT's gate and its norm


def plain_gated_norm(x: Tensor, eps: float) -> Tensor:
    """Apply GEGLU (Shazeer 2020), then LayerNorm without affine parameters."""
    up, gate = x.chunk(2, dim=-1)
    y = up * F.gelu(gate, approximate="tanh")
    return F.layer_norm(y, y.shape[-1:], eps=eps)


def gated_norm(x: Tensor, eps: float) -> Tensor:
    """Return LayerNorm(up * gelu(gate)) of x (..., 2 F), whose halves are up and gate."""
    if runs_eagerly_on_cpu(x):
        return GatedNorm.apply(x, eps)
    return plain_gated_norm(x, eps)


class GatedNorm(torch.autograd.Function):
    """gated_norm, which computes the gate a second time and so keeps x alone: 2 F, not 4 F."""

    @staticmethod
    def forward(ctx, x, eps):
        up, gate = x.chunk(2, dim=-1)
        gated = F.gelu(gate, approximate="tanh").mul_(up)
        y, mean, rstd = torch.native_layer_norm(gated, gated.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, mean, rstd = ctx.saved_tensors
        up, gate = x.chunk(2, dim=-1)
        gelu = F.gelu(gate, approximate="tanh")
        grad_gated, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, up * gelu, gelu.shape[-1:], mean, rstd, None, None, (True, False, False)
        )
        grad_x = torch.empty_like(x)
        grad_up, grad_gate = grad_x.chunk(2, dim=-1)
        torch.mul(grad_gated, gelu, out=grad_up)
        grad_gate.copy_(torch.ops.aten.gelu_backward(grad_gated.mul_(up), gate, approximate="tanh"))
        return grad_x, None


# --------------------------------------------------------------------------------------- dropout


def dropout(x: Tensor, rate: float) -> Tensor:
    """Zero each element with probability `rate` and scale up the rest, as F.dropout does.

    On a CPU random numbers are dear: one of 64 bits serves four elements, so there the rate is
    taken to the nearest 65,536th.
    """
    if rate == 0 or x.device.type != "cpu":
        return F.dropout(x, rate)
    n_dropped = min(round(rate * 65536), 65535)  # of the 65,536 values that 16 bits can have
    largest = 2**63 - 1
    bits = torch.randint(-largest, largest, (math.ceil(x.numel() / 4),)).view(torch.int16)
    bits = bits[: x.numel()].view(x.shape)
    kept = bits >= n_dropped - 32768
    return Kept.apply(x, kept, 65536 / (65536 - n_dropped))


class Kept(torch.autograd.Function):
    """x * kept * factor, which remembers a byte for each element and not a number."""

    @staticmethod
    def forward(ctx, x, kept, factor):
        ctx.save_for_backward(kept)
        ctx.factor = factor
        return torch.where(kept, x, 0).mul_(factor)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return torch.where(kept, grad, 0).mul_(ctx.factor), None, None


# ------------------------------------------------------------------------------------- attention


def plain_attention(q, k, v, *, hidden=None, bias=None, scale=None, rate=0.0) -> Tensor:
    """Softmax attention as the formula reads; the arguments are those of attention."""
    if scale is None:
        scale = q.size(-1) ** -0.5
    score = (q * scale) @ k.mT
    mask = additive_mask(q, hidden, bias)
    if mask is not None:
        score = score + mask
    return dropout(score.softmax(-1), rate) @ v


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    triangle: bool = False,
    hidden: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    rate: float = 0.0,
) -> Tensor:
    """Return softmax attention, by the fastest kernel that this machine has for it.

    q (B, H, Tq, d), k and v (B, H, Tk, d); the result is (B, H, Tq, d)
    hidden: broadcasts to (B, H, Tq, Tk), True where a key is not seen
    triangle: whether `hidden` is exactly the triangle of later keys, which kernels know by heart
    bias: broadcasts to (B, H, Tq, Tk), added to the scaled scores
    rate: dropout of the probabilities
    """
    if products_are_faster(q, k, bias, rate):
        return plain_attention(q, k, v, hidden=hidden, bias=bias, scale=scale, rate=rate)
    if triangle and bias is None:
        return F.scaled_dot_product_attention(q, k, v, None, rate, is_causal=True, scale=scale)
    mask = additive_mask(q, hidden, bias)
    return F.scaled_dot_product_attention(q, k, v, mask, rate, scale=scale)


def products_are_faster(q: Tensor, k: Tensor, bias: Tensor | None, rate: float) -> bool:
    """Whether plain products take less time than the kernel that torch has for this attention."""
    n_key = k.size(-2)
    # On a CPU torch 2.13's kernel is slow with dropout, and in bfloat16 takes four times as long
    # as products for rows of 128 tokens, the same from 1024 on.
    if q.device.type == "cpu":
        return rate > 0 or (q.dtype == torch.bfloat16 and n_key <= 512)
    # On a GPU a bias rules out the fast kernels. Compiled, products with one loop between them save
    # a layer of LTG-BERT 6% (H100, rows of 128 tokens), and keep more in memory.
    if q.device.type == "cuda":
        return bias is not None and n_key <= 256 and torch.compiler.is_compiling()
    return False


def additive_mask(q: Tensor, hidden: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Return what is to be added to scores: the bias, and minus infinity where a key is hidden."""
    if hidden is None:
        return bias
    if bias is None:
        bias = q.new_zeros(())
    return bias.masked_fill(hidden, float("-inf"))


# ------------------------------------------------------- scores of LTG-BERT's relative positions


def plain_position_scores(x: Tensor, table: Tensor) -> Tensor:
    """Look up a table row for every (i, j), which takes a tensor of n * m * d for each head."""
    n = x.size(-2)
    m = table.size(-2) - n
    i = torch.arange(n, device=x.device)[:, None]
    j = torch.arange(m, device=x.device)
    return torch.einsum("bhid,hijd->bhij", x, table[:, n - 1 + j - i])


def position_scores(x: Tensor, table: Tensor) -> Tensor:
    """Return x_i . table[n - 1 + j - i] for every query i and key j, without a lookup.

    x (B, H, n, d), table (H, n + m, d); the result is (B, H, n, m)
    """
    B, _, n, _ = x.shape
    m = table.size(-2) - n
    # Queries are taken s at a time, because s of them together need only m + s rows of the table.
    s = 32 if n % 32 == 0 else n
    x = x.unflatten(2, (-1, s)).permute(1, 2, 0, 3, 4)  # (H, n / s, B, s, d)
    rows = [table[:, start : start + m + s] for start in range(n - s, -1, -s)]
    rows = torch.stack(rows, dim=1)  # (H, n / s, m + s, d)

    # y[i, c] = x_i . rows[c]: one product for all rows of the batch, or the rows would be copied
    # for each of them
    y = x.flatten(2, 3) @ rows.mT
    y = y.unflatten(2, (B, s))  # (H, n / s, B, s, m + s)

    # Wanted is column c = s - 1 + j - i of row i: each row begins one column before the row above.
    # In memory the rows lie end to end, so with a width of one less every row moves by one column:
    #
    #     s = m = 3, columns 0 to 5                the same numbers from the third on, five a line
    #     row 0    .  .  2  3  4  .                     2  3  4  .  .
    #     row 1    .  1  2  3  .  .                     1  2  3  .  .
    #     row 2    0  1  2  .  .  .                     0  1  2  .  .
    #
    y = y.flatten(-2)[..., s - 1 : -1]
    y = y.unflatten(-1, (s, m + s - 1))[..., :m]
    return y.permute(2, 0, 1, 3, 4).flatten(2, 3)


# --------------------------------------------------------------------------- loss of the vocabulary


def plain_vocabulary_loss(x, weight, bias, targets, weights=None) -> Tensor:
    """Sum the cross-entropy as the formula reads; the arguments are those of vocabulary_loss."""
    logits = F.linear(x, weight, bias).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")
    if weights is not None:
        losses = losses * weights.flatten()
    return losses.sum()


def vocabulary_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return the summed cross-entropy in nats without holding all logits in memory.

    x (B, K, D), weight (V, D), bias (V,) or None
    targets (B, K), where IGNORE is not scored; weights (B, K) multiply each target's loss
    """
    needs_grad = torch.is_grad_enabled()
    return ChunkedLoss.apply(x, weight, bias, targets, weights, needs_grad)


def softmax_gradient(log_probs: Tensor, target: Tensor) -> Tensor:
    """Return softmax - one_hot(target) in place of log_probs (N, V); target (N, 1)."""
    grad = log_probs.exp_()
    if torch.compiler.is_compiling():
        # in one loop with the softmax, where scatter_add_ would need all of it in memory
        is_target = torch.arange(grad.size(1), device=grad.device) == target
        return torch.where(is_target, grad - 1, grad)
    return grad.scatter_add_(1, target, torch.full_like(grad[:, :1], -1))


class ChunkedLoss(torch.autograd.Function):
    """vocabulary_loss, chunk by chunk.

    Each chunk of logits leaves its gradient behind in the forward pass, since the gradient is only
    scaled later. torch's linear_cross_entropy does the same, but breaks a compiled graph (2.13).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, weights, needs_grad):
        # about 512 positions a chunk, at most eight chunks; of rows as they are, because Inductor
        # (2.13, CPU) leaves the end of a chunk unwritten that the row length does not divide
        device = x.device.type
        chunk_rows = max(math.ceil(512 / x.size(1)), math.ceil(len(x) / 8))
        dtype = x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        loss_dtype = torch.promote_types(dtype, torch.float32)
        factor = targets != IGNORE
        if weights is not None:
            factor = factor * weights

        loss = x.new_zeros((), dtype=loss_dtype)
        grad_x = []
        grad_weight = torch.zeros_like(weight)
        grad_bias = None
        if bias is not None:
            grad_bias = torch.zeros_like(bias)
            bias = bias.to(dtype)

        with torch.autocast(device, enabled=False):
            hidden_states = x.to(dtype)
            matrix = weight.to(dtype)
            chunks = zip(
                hidden_states.split(chunk_rows),
                targets.split(chunk_rows),
                factor.split(chunk_rows),
                strict=True,
            )
            for h, target, scale in chunks:
                h = h.flatten(0, 1)
                scale = scale.reshape(-1, 1)
                target = target.clamp(min=0).view(-1, 1)  # an IGNORE needs some column, too

                log_probs = F.linear(h, matrix, bias).log_softmax(-1, dtype=loss_dtype)
                loss = loss - (log_probs.gather(1, target) * scale).sum()
                if not needs_grad:
                    continue

                # d loss / d logits = (softmax(logits) - one_hot(target)) * scale, where the scale
                # is left to the factors behind it, which are narrower
                grad = softmax_gradient(log_probs, target)
                if grad_bias is not None:
                    grad_bias += scale[:, 0].to(loss_dtype) @ grad
                grad = grad.to(dtype)
                grad_x.append((grad @ matrix).mul_(scale))
                scaled_h = (h * scale).to(dtype)
                if grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad.T, scaled_h)
                else:
                    grad_weight += grad.T @ scaled_h

        if needs_grad:
            grad_x = torch.cat(grad_x).to(x.dtype).view_as(x)
            ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grads = [None if grad is None else grad * grad_loss for grad in ctx.saved_tensors]
        return *grads, None, None, None
