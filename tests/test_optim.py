"""Optimizers: LAMB as published, which weights decay, and steps that are not finite.

python -m pytest tests/test_optim.py
"""

import math

import pytest
import torch

import train
from antlm.optim import OPTIMIZERS, Lamb, WeightAverage, guarded_step, make_optimizers, trust_ratios
from model import ModelConfig, Transformer

CPU = torch.device("cpu")
MPS = torch.device("mps")  # there AdamW is not fused; the name alone decides, nothing runs on it
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def small_model(backbone: str = "ltg_bert") -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(backbone, 60, n_layer=1, n_head=2, n_embd=16, n_ff=24))


def optimizers_of(model: Transformer, optimizer: str, device: torch.device = CPU) -> list:
    return make_optimizers(model, train.Settings(optimizer=optimizer), device)


def weights(model: Transformer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def fill_gradients(model: Transformer, value: float):
    for p in model.parameters():
        p.grad = torch.full_like(p, value)


def draw_gradients(model: Transformer, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def take_step(optimizers: list, lr: float = 0.1, norm: float = 1.0):
    guarded_step(optimizers, lr, torch.tensor(norm))


# ---------------------------------------------------------------------------------------- LAMB


class PlainLamb:
    """LAMB for one parameter in float64, line by line as You et al. (2020) give it."""

    def __init__(self, p: torch.Tensor, weight_decay: float):
        self.weight = p.detach().double().clone()
        self.weight_decay = weight_decay
        self.mean = torch.zeros_like(self.weight)
        self.square = torch.zeros_like(self.weight)
        self.n_step = 0

    def step(self, grad: torch.Tensor, lr: float):
        self.n_step += 1
        self.mean = 0.9 * self.mean + 0.1 * grad
        self.square = 0.98 * self.square + 0.02 * grad**2
        mean = self.mean / (1 - 0.9**self.n_step)
        square = self.square / (1 - 0.98**self.n_step)
        update = mean / (square.sqrt() + 1e-6) + self.weight_decay * self.weight
        ratio = 1.0
        if self.weight_decay > 0:
            ratio = self.weight.norm() / update.norm()
        self.weight = self.weight - lr * ratio * update


def test_lamb_is_the_published_update():
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(5, 3))
    bias = torch.nn.Parameter(torch.randn(4))
    lamb = Lamb(
        [dict(params=[matrix], weight_decay=0.1), dict(params=[bias], weight_decay=0.0)],
        lr=0.02,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    expected = {matrix: PlainLamb(matrix, 0.1), bias: PlainLamb(bias, 0.0)}
    for _ in range(5):
        for p, plain in expected.items():
            p.grad = torch.randn_like(p)
            plain.step(p.grad.double(), lr=0.02)
        lamb.step()
    for p, plain in expected.items():
        torch.testing.assert_close(p.detach().double(), plain.weight, rtol=1e-5, atol=1e-6)


def test_the_trust_ratio_of_a_zero_weight_or_update_is_one():
    weights = [torch.tensor([3.0, 4.0]), torch.zeros(2), torch.ones(2)]
    updates = [torch.tensor([0.0, 2.0]), torch.ones(2), torch.zeros(2)]
    assert [ratio.item() for ratio in trust_ratios(weights, updates)] == [2.5, 1.0, 1.0]


# ---------------------------------------------------------------------------------------- Muon


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Five steps of Newton and Schulz with the coefficients of Jordan et al. (2024)."""
    x = x / x.norm()
    for _ in range(5):
        square = x.mT @ x
        x = 3.4445 * x + x @ (-4.7750 * square + 2.0315 * square @ square)
    return x


def names_of(model: Transformer, group: dict) -> set[str]:
    """Return the names of the parameters of an optimizer's group."""
    ids = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_muon_takes_the_matrices_of_the_blocks_by_the_published_update():
    """Momentum 0.95 with Nesterov's correction, steps of 0.2 times the root of the longer side."""
    model = small_model("babyllama")
    muon, adamw = optimizers_of(model, "muon")
    [group] = muon.param_groups
    parts = ("qkv", "out", "gate_up", "down")
    assert names_of(model, group) == {f"blocks.0.{part}.weight" for part in parts}

    p = model.blocks[0].gate_up.weight  # (48, 16)
    weight = p.detach().clone()
    mean = torch.zeros_like(weight)
    for seed in range(5):
        draw_gradients(model, seed)
        mean = 0.95 * mean + 0.05 * p.grad
        update = 0.2 * math.sqrt(48) * orthogonalize(0.05 * p.grad + 0.95 * mean)
        weight = weight * (1 - 0.1 * 0.1) - 0.1 * update  # weight_decay is 0.1
        take_step([muon, adamw])
    # torch orthogonalizes in bfloat16
    assert (p - weight).norm() < 0.02 * weight.norm()


# -------------------------------------------------------------------------------------- groups


@each_optimizer
def test_embeddings_biases_and_norms_do_not_decay(optimizer):
    model = small_model()
    settings = train.Settings(optimizer=optimizer, weight_decay=0.3)
    decay = {}
    for part in make_optimizers(model, settings, CPU):
        for group in part.param_groups:
            for p in group["params"]:
                assert p not in decay  # one optimizer trains it
                decay[p] = group["weight_decay"]
    assert decay.keys() == set(model.parameters())
    for name, p in model.named_parameters():
        plain = p.dim() == 1 or name in ("embedding.tokens.weight", "embedding.relative")
        assert decay[p] == (0.0 if plain else settings.weight_decay), name


@each_optimizer
@pytest.mark.parametrize(
    "name, value", [("weight_decay", 0.3), ("beta1", 0.5), ("beta2", 0.6), ("eps", 0.1)]
)
def test_every_setting_of_an_optimizer_changes_its_steps(optimizer, name, value):
    moved = []
    for changes in ({}, {name: value}):
        model = small_model()
        settings = train.Settings(optimizer=optimizer, **changes)
        optimizers = make_optimizers(model, settings, CPU)
        for seed in range(2):  # the first step is the same whatever the betas
            draw_gradients(model, seed)
            take_step(optimizers)
        moved.append(weights(model))
    assert any(not torch.equal(a, b) for a, b in zip(*moved, strict=True))


@each_optimizer
def test_a_step_is_as_long_as_the_learning_rate_says(optimizer):
    moved = []
    for lr in (1e-3, 2e-3):
        model = small_model()
        before = weights(model)
        draw_gradients(model, seed=1)
        take_step(optimizers_of(model, optimizer), lr)
        moved.append([new - old for new, old in zip(weights(model), before, strict=True)])
    for short, long in zip(*moved, strict=True):
        assert short.any()
        torch.testing.assert_close(2 * short, long, rtol=1e-3, atol=1e-6)


@each_optimizer
def test_optimizers_learn(optimizer):
    model = small_model("babyllama")
    optimizers = optimizers_of(model, optimizer)
    tokens = torch.arange(24).view(2, 12)
    losses = []
    for _ in range(20):
        loss, count = model(tokens, tokens, causal=True)
        (loss / count).backward()
        take_step(optimizers, lr=3e-2)
        losses.append((loss / count).item())
    assert losses[-1] < 0.9 * losses[0]


# -------------------------------------------------------------------- steps that are not finite


@each_optimizer
@pytest.mark.parametrize("device", [CPU, MPS], ids=["fused", "unfused"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_no_weight(optimizer, device, bad):
    """Not in the first step, before there are moments, nor in a later one."""
    model = small_model()
    optimizers = optimizers_of(model, optimizer, device)
    for seed in range(3):
        before = weights(model)
        fill_gradients(model, bad)
        take_step(optimizers, norm=bad)
        assert all(map(torch.equal, weights(model), before))

        draw_gradients(model, seed)
        take_step(optimizers)
        for new, old in zip(weights(model), before, strict=True):
            assert new.isfinite().all()
            assert not torch.equal(new, old)


def test_fused_adamw_goes_on_as_if_a_bad_step_had_not_been():
    results = []
    for bad_steps in (0, 2):
        model = small_model()
        optimizers = optimizers_of(model, "adamw")
        for seed in range(3):
            for _ in range(bad_steps):
                fill_gradients(model, math.nan)
                take_step(optimizers, norm=math.nan)
            draw_gradients(model, seed)
            take_step(optimizers)
        results.append(weights(model))
    assert all(map(torch.equal, *results))


def test_a_step_leaves_no_gradient_behind():
    model = small_model()
    optimizers = optimizers_of(model, "muon")
    for norm in (1.0, math.nan):
        draw_gradients(model, seed=1)
        take_step(optimizers, norm=norm)
        assert all(p.grad is None for p in model.parameters())


def test_an_unfused_state_goes_on_in_a_fused_optimizer():
    """As from a Mac's GPU to a CPU: the state brings along that it was not fused."""
    model = small_model()
    draw_gradients(model, seed=1)
    unfused = optimizers_of(model, "adamw", MPS)
    take_step(unfused)

    fused = optimizers_of(model, "adamw", CPU)
    fused[0].load_state_dict(unfused[0].state_dict())
    before = weights(model)
    fill_gradients(model, math.nan)
    take_step(fused, norm=math.nan)
    assert all(map(torch.equal, weights(model), before))
    draw_gradients(model, seed=2)
    take_step(fused)
    assert not any(map(torch.equal, weights(model), before))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_optimizer
def test_the_host_does_not_wait_for_a_gpu(optimizer):
    model = small_model().cuda()
    optimizers = optimizers_of(model, optimizer, torch.device("cuda"))
    before = weights(model)
    for value in (math.nan, 1.0):
        fill_gradients(model, value)
        norm = torch.tensor(value, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            guarded_step(optimizers, 0.1, norm)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        changed = [not torch.equal(a, b) for a, b in zip(weights(model), before, strict=True)]
        assert all(changed) if value == 1.0 else not any(changed)


# -------------------------------------------------------------------------------------- the average


def test_the_average_of_weights_is_their_mean_and_is_lent_to_the_model():
    model = small_model()
    average = WeightAverage(model)
    seen = []
    for value in (1.0, 2.0, 6.0):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(value)
        with average.in_use():  # what was averaged before, or the weights as they are
            seen.append(weights(model)[0].unique().tolist())
        average.update()
        assert all((p == value).all() for p in model.parameters())
    with average.in_use():
        assert all(torch.allclose(p, torch.tensor(3.0)) for p in model.parameters())
    assert seen == [[1.0], [1.0], [1.5]]


def test_a_restored_average_goes_on_bit_for_bit():
    model = small_model()
    steady = WeightAverage(model)
    resumed = WeightAverage(model)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        steady.update()
        resumed.update()
        state = resumed.state_dict()
        resumed = WeightAverage(model)
        resumed.load_state_dict(state)
    assert resumed.n == steady.n == 6
    for a, b in zip(steady.means, resumed.means, strict=True):
        assert torch.equal(a, b)


def test_tied_weights_are_averaged_once():
    model = small_model()
    assert "head.vocab.weight" in model.state_dict()
    average = WeightAverage(model)
    average.update()
    assert "head.vocab.weight" not in average.state_dict()["weights"]
