"""Optimizers, which weights decay, averaged weights, and a step that no gradient can spoil."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Lamb(torch.optim.Optimizer):
    """LAMB with bias-corrected moments and a trust ratio only where weights decay.

    Source: You et al. 2020, as ltg-bert runs it.
    """

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            beta1, beta2 = group["betas"]
            for p in params:
                if not self.state[p]:
                    self.state[p]["step"] = 0
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
                self.state[p]["step"] += 1
            step = self.state[params[0]]["step"]
            grads = [p.grad for p in params]
            means = [self.state[p]["exp_avg"] for p in params]
            squares = [self.state[p]["exp_avg_sq"] for p in params]

            # moments of the gradient; _foreach_ does for all tensors what its name says for one
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)

            # update = corrected mean / (sqrt(corrected square) + eps) + decay * weight
            scale = torch._foreach_div(squares, 1 - beta2**step)
            torch._foreach_sqrt_(scale)
            torch._foreach_add_(scale, group["eps"])
            update = torch._foreach_div(torch._foreach_div(means, 1 - beta1**step), scale)
            if group["weight_decay"]:
                torch._foreach_add_(update, params, alpha=group["weight_decay"])
                torch._foreach_mul_(update, trust_ratios(params, update))
            torch._foreach_add_(params, update, alpha=-group["lr"])


def trust_ratios(params: list[Tensor], update: list[Tensor]) -> list[Tensor]:
    """Return |weight| / |update| of each tensor, and 1 where one of the two is zero."""
    ratios = []
    norms = zip(torch._foreach_norm(params), torch._foreach_norm(update), strict=True)
    for weight_norm, update_norm in norms:
        usable = (weight_norm > 0) & (update_norm > 0)
        ratios.append(torch.where(usable, weight_norm / update_norm, 1.0))
    return ratios


def adamw(matrices: list, other: list, undecayed: list, settings, fused: bool) -> list:
    groups = decay_groups(matrices + other, undecayed, settings)
    return [torch.optim.AdamW(groups, **adam_arguments(settings), fused=fused)]


def lamb(matrices: list, other: list, undecayed: list, settings, fused: bool) -> list:
    return [Lamb(decay_groups(matrices + other, undecayed, settings), **adam_arguments(settings))]


def muon(matrices: list, other: list, undecayed: list, settings, fused: bool) -> list:
    """Muon for the matrices of the blocks, AdamW for the rest (Jordan et al. 2024).

    match_rms_adamw makes its steps as long as AdamW's, so that one learning rate serves both.
    """
    optimizer = torch.optim.Muon(
        matrices, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [optimizer, *adamw([], other, undecayed, settings, fused)]


# Each takes the blocks' matrices, the other matrices that decay, the parameters that do not decay,
# the settings and whether torch has fused kernels; it returns one optimizer or several.
OPTIMIZERS = {"adamw": adamw, "lamb": lamb, "muon": muon}


def decay_groups(decayed: list, undecayed: list, settings) -> list[dict]:
    return [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]


def adam_arguments(settings) -> dict:
    return dict(lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def make_optimizers(model: nn.Module, settings, device: torch.device) -> list:
    """Return the optimizers that a row of OPTIMIZERS makes.

    Matrices decay; embeddings, biases and norms do not: what they hold has no scale to shrink to.
    """
    matrices = []
    other = []
    undecayed = []
    for name, p in model.named_parameters():
        if p.dim() != 2 or name.startswith("embedding."):
            undecayed.append(p)
        elif name.startswith("blocks."):
            matrices.append(p)
        else:
            other.append(p)
    fused = device.type != "mps"
    return OPTIMIZERS[settings.optimizer](matrices, other, undecayed, settings, fused)


@torch.no_grad()
def guarded_step(optimizers: list, lr: float, norm: Tensor):
    """Take one step of each optimizer, and leave all weights as they are if norm is not finite.

    norm: of the gradient, on its device, which decides: the host does not wait for it
    """
    bad = ~norm.isfinite()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        # fused AdamW skips such a step by itself, as under torch.amp; asked of the group, because
        # a checkpoint that was made on another device may have set it
        if optimizer.param_groups[0].get("fused"):
            optimizer.found_inf = bad.float()
            optimizer.step()
        else:
            step_and_restore(optimizer, bad)
        optimizer.zero_grad(set_to_none=True)


def step_and_restore(optimizer: torch.optim.Optimizer, bad: Tensor):
    """Take a step; where it is bad, with a gradient of zero, and put the weights back."""
    params = []
    for group in optimizer.param_groups:
        params += group["params"]
    before = [p.clone() for p in params]
    for p in params:
        p.grad.masked_fill_(bad, 0)  # so that the moments stay finite
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        torch.where(bad, old, p, out=p)


class WeightAverage:
    """The mean of a model's weights after each of several steps.

    It is mostly better than the last weights, which bear the noise of the last batches.
    Source: stochastic weight averaging (Izmailov et al. 2018), here of every step.
    """

    def __init__(self, model: nn.Module):
        self.names = [name for name, _ in model.named_parameters()]
        self.params = list(model.parameters())
        self.n = 0  # steps that are averaged so far
        self.means = []

    @torch.no_grad()
    def update(self):
        """Take in the weights as they are now."""
        self.n += 1
        if self.n == 1:
            self.means = [p.detach().clone() for p in self.params]
        else:
            torch._foreach_lerp_(self.means, self.params, 1 / self.n)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the model the average for its weights, if there is one, and then its own again."""
        if self.n == 0:
            yield
            return
        with torch.no_grad():
            last = [p.detach().clone() for p in self.params]
            torch._foreach_copy_(self.params, self.means)
            yield
            torch._foreach_copy_(self.params, last)

    def state_dict(self) -> dict:
        """Return what a checkpoint keeps; nothing while nothing is averaged."""
        if self.n == 0:
            return {}
        return {"n": self.n, "weights": dict(zip(self.names, self.means, strict=True))}

    def load_state_dict(self, state: dict):
        """Go on from what state_dict returned; raises KeyError where it is of another model."""
        if state:
            self.n = state["n"]
            means = [state["weights"][name] for name in self.names]
            self.means = [mean.to(p.device) for mean, p in zip(means, self.params, strict=True)]
