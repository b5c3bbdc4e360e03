"""What the model computes, as fast as this machine does it."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target with this value is not scored


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout(x, p), p to the nearest 65,536th; on a CPU, where random numbers are dear, one serves four elements."""
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    drop, most = min(round(p * 65536), 65535), 2 ** 63 - 1
    bits = torch.randint(-most, most, (-(-x.numel() // 4),)).view(torch.int16)[:x.numel()].view(x.shape)
    return x * (bits >= drop - 32768).to(x.dtype).mul_(65536 / (65536 - drop))


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
