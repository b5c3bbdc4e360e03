"""See from outside what a program does: the modules that it calls, attention, losses, weights.

with Watcher() as watcher:
    finetune.main(arguments)
watcher.passes[0].tokens
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from antlm import ops
from babylm.classifier import Classifier
from model import Transformer


class Call(NamedTuple):
    """A call of a module: its first argument and its result, or None where they are no tensors."""

    module: nn.Module
    x: Tensor | None
    y: Tensor | None


class Attention(NamedTuple):
    n_head: int
    rate: float  # of dropout
    causal: bool  # whether the first query is kept from the second key


@dataclass
class Pass:
    """One forward pass of a model. It begins where tokens are embedded."""

    trains: bool  # whether gradients are wanted, whatever mode the modules are in
    n_thread: int
    calls: list[Call] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    targets: Tensor | None = None  # those that pass through the vocabulary head
    weights: dict[str, Tensor] = field(default_factory=dict)  # of a model that is trained

    @property
    def tokens(self) -> Tensor:
        return self.calls[0].x

    def of(self, kind: type[nn.Module]) -> list[Call]:
        """Return the calls of modules of this kind, in their order."""
        return [call for call in self.calls if isinstance(call.module, kind)]


def only_tensor(value) -> Tensor | None:
    """Return a tensor, or the first of several, cut off from the graph that made it."""
    if isinstance(value, tuple):
        value = value[0] if value else None
    return value.detach() if isinstance(value, Tensor) else None


class Watcher:
    """Records the forward passes of a block of code, and the modules that it compiles.

    Compilation itself is left out: it takes minutes, and changes no number.
    """

    def __init__(self):
        self.passes = []
        self.compiled = []

    def __enter__(self):
        self.attention = ops.attention
        self.vocabulary_loss = ops.vocabulary_loss
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(ops, "attention", self.attend)
        self.patch.setattr(ops, "vocabulary_loss", self.lose)
        self.patch.setattr(nn.Module, "compile", self.compile)
        self.hook = register_module_forward_hook(self.see)
        return self

    def __exit__(self, *error):
        self.hook.remove()
        self.patch.undo()

    def see(self, module: nn.Module, inputs: tuple, output):
        if isinstance(module, nn.Embedding):
            self.passes.append(Pass(torch.is_grad_enabled(), torch.get_num_threads()))
        if not self.passes:
            return
        now = self.passes[-1]
        now.calls.append(Call(module, only_tensor(inputs), only_tensor(output)))
        if isinstance(module, Transformer | Classifier) and now.trains:
            now.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    def attend(self, q, k, v, *, triangle=False, hidden=None, rate=0.0, **arguments):
        causal = triangle
        if hidden is not None and k.size(-2) > 1:
            causal = bool(hidden[..., 0, 1].all())
        self.passes[-1].attention.append(Attention(q.size(1), rate, causal))
        return self.attention(q, k, v, triangle=triangle, hidden=hidden, rate=rate, **arguments)

    def lose(self, x, weight, bias, targets, weights=None):
        self.passes[-1].targets = targets
        return self.vocabulary_loss(x, weight, bias, targets, weights)

    def compile(self, **arguments):
        self.compiled.append(arguments)
