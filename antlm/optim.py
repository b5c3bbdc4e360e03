"""Optimizers, and a step that a gradient which is not finite cannot spoil."""

import torch


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020) as ltg-bert runs it: corrected moments, the trust ratio only where weights decay."""

    def __init__(self, params, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, (beta1, beta2) = group["params"], group["betas"]
            for p in params:
                if not self.state[p]:
                    self.state[p] = dict(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                self.state[p]["step"] += 1
            grads, t = [p.grad for p in params], self.state[params[0]]["step"]
            m, v = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            scale = torch._foreach_div(v, 1 - beta2 ** t)
            torch._foreach_sqrt_(scale)
            torch._foreach_add_(scale, group["eps"])
            update = torch._foreach_div(torch._foreach_div(m, 1 - beta1 ** t), scale)
            if group["weight_decay"]:
                torch._foreach_add_(update, params, alpha=group["weight_decay"])
                weight_norm, update_norm = torch._foreach_norm(params), torch._foreach_norm(update)
                ratio = [torch.where((w > 0) & (u > 0), w / u, 1.0) for w, u in zip(weight_norm, update_norm)]
                torch._foreach_mul_(update, ratio)
            torch._foreach_add_(params, update, alpha=-group["lr"])


def make_optimizers(model: torch.nn.Module, s, device: torch.device) -> list[torch.optim.Optimizer]:
    """One optimizer, or for muon two; matrices decay, embeddings, biases and norms do not."""
    named = dict(model.named_parameters())
    decay = {name: p for name, p in named.items() if p.dim() == 2 and not name.startswith("embedding.")}
    plain = [p for name, p in named.items() if name not in decay]
    optimizers, adam = [], dict(lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps)
    if s.optimizer == "muon":  # for the hidden matrices only (Jordan et al. 2024), with step sizes like AdamW's
        hidden = [decay.pop(name) for name in [*decay] if name.startswith("blocks.")]
        optimizers = [torch.optim.Muon(hidden, lr=s.lr, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw")]
    groups = [dict(params=[*decay.values()], weight_decay=s.weight_decay), dict(params=plain, weight_decay=0.0)]
    if s.optimizer == "lamb":
        return [Lamb(groups, **adam)]
    return optimizers + [torch.optim.AdamW(groups, **adam, fused=device.type != "mps")]


@torch.no_grad()
def update(optimizers: list[torch.optim.Optimizer], lr: float, norm: torch.Tensor):
    """One step of the optimizers; where the norm of the gradient is not finite, the weights stay as they are.

    The device decides, so that the step does not wait for it. Fused AdamW skips such a step as under torch.amp; the
    others take it with a gradient of zero, so that their moments stay finite, and the weights are put back.
    """
    bad = ~norm.isfinite()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if optimizer.param_groups[0].get("fused"):  # what runs: a checkpoint made on another device may have set it
            optimizer.found_inf, params = bad.float(), []
        before = [p.clone() for p in params]
        for p in params:
            p.grad.masked_fill_(bad, 0)
        optimizer.step()
        for p, old in zip(params, before):
            torch.where(bad, old, p, out=p)
        optimizer.zero_grad(set_to_none=True)
