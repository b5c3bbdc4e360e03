"""The fast forms of antlm/ops.py against the plain formulas beside them.

python -m pytest tests/test_ops.py   # on the CPU, and on a GPU where there is one
"""

import math

import pytest
import torch
import torch.nn.functional as F

from antlm import IGNORE, ops

GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)
each_device = pytest.mark.parametrize("device", ["cpu", GPU])
each_dtype = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)


def random(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype)


def value_and_gradients(function, inputs: list, **arguments) -> list[torch.Tensor]:
    """Return a function's result and its gradients at the inputs that are there, in float64."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves, **arguments)
    # a weight for each element, so that no two gradients can stand in for each other
    weight = torch.linspace(-1, 2, result.numel(), device=result.device).view_as(result)
    (result * weight).sum().backward()
    tensors = [result.detach()]
    tensors += [leaf.grad for leaf in leaves if leaf is not None]
    return [tensor.double() for tensor in tensors]


def assert_same_function(fast, plain, inputs: list, tolerance: float, **arguments):
    """Compare value and gradients; the plain function counts in float64."""
    exact_inputs = [None if x is None else x.double() for x in inputs]
    actual = value_and_gradients(fast, inputs, **arguments)
    expected = value_and_gradients(plain, exact_inputs, **arguments)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------- norms, rotation and gate


@each_device
@each_dtype
@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 1, 8), (7, 16)])
def test_rms_norm_is_the_formula(device, dtype, tolerance, shape):
    x = random(*shape, device=device, dtype=dtype) * 3
    weight = random(shape[-1], device=device, dtype=dtype)
    assert_same_function(ops.rms_norm, ops.plain_rms_norm, [x, weight], tolerance, eps=0.1)


@each_device
@each_dtype
def test_rotary_heads_are_the_formula(device, dtype, tolerance):
    qkv = random(2, 5, 3, 4, 8, device=device, dtype=dtype)
    angle = random(5, 4, device=device, dtype=torch.float32)
    arguments = {"cos": angle.cos(), "sin": angle.sin()}
    tolerance = max(tolerance, 1e-6)
    assert_same_function(fast_heads, plain_heads, [qkv], tolerance, **arguments)


def fast_heads(qkv, cos, sin):
    return torch.stack(ops.rotary_heads(qkv, cos, sin))


def plain_heads(qkv, cos, sin):
    return torch.stack(ops.plain_rotary_heads(qkv, cos, sin))


@each_device
@each_dtype
def test_the_gate_and_its_norm_are_the_formula(device, dtype, tolerance):
    x = random(2, 5, 12, device=device, dtype=dtype)
    assert_same_function(ops.gated_norm, ops.plain_gated_norm, [x], tolerance, eps=0.1)


def test_a_rotation_turns_pairs_and_keeps_their_length():
    pairs = torch.tensor([1.0, 0.0, 0.0, 2.0])  # (1, 0) and (0, 2)
    angle = torch.tensor([[math.pi / 2, math.pi / 6]])
    q, k, v = ops.rotary_heads(pairs.expand(1, 1, 3, 1, 4), angle.cos(), angle.sin())
    expected = torch.tensor([0.0, -1.0, 1.0, math.sqrt(3)])  # (0, 1) and (-1, sqrt 3)
    torch.testing.assert_close(q.flatten(), expected)
    torch.testing.assert_close(k.flatten(), expected)
    torch.testing.assert_close(v.flatten(), pairs)


def test_without_gradients_they_are_the_same():
    x = random(2, 5, 8)
    qkv = random(2, 5, 3, 2, 8)
    angle = random(5, 4)
    weight = random(8)
    with torch.inference_mode():
        heads = fast_heads(qkv, angle.cos(), angle.sin())
        torch.testing.assert_close(heads, plain_heads(qkv, angle.cos(), angle.sin()))
        normed = ops.rms_norm(x, weight, 1e-6)
        torch.testing.assert_close(normed, ops.plain_rms_norm(x, weight, 1e-6))


# ----------------------------------------------------------------------------------- attention


def attention(q, k, v, bias, *, triangle, hidden):
    return ops.attention(q, k, v, triangle=triangle, hidden=hidden, bias=bias, scale=0.3)


def plain_attention(q, k, v, bias, *, triangle, hidden):
    return ops.plain_attention(q, k, v, hidden=hidden, bias=bias, scale=0.3)


def later_keys(n: int, device: str) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).triu(1)


@each_device
@each_dtype
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("mask", ["all", "triangle", "padding"])
@pytest.mark.parametrize("n_query", [1, 4, 6])
def test_attention_is_the_formula(device, dtype, tolerance, biased, mask, n_query):
    torch.manual_seed(4)
    q = random(2, 3, n_query, 8, device=device, dtype=dtype)
    k = random(2, 3, 6, 8, device=device, dtype=dtype)
    v = random(2, 3, 6, 8, device=device, dtype=dtype)
    bias = random(2, 3, n_query, 6, device=device, dtype=dtype) if biased else None

    hidden = None
    if mask == "triangle":
        hidden = later_keys(6, device)[-n_query:]
    if mask == "padding":
        n_key = torch.tensor([6, 3], device=device)
        hidden = torch.arange(6, device=device) >= n_key[:, None, None, None]
    triangle = mask == "triangle" and n_query == 6
    inputs = [q, k, v, bias]
    assert_same_function(
        attention, plain_attention, inputs, tolerance, triangle=triangle, hidden=hidden
    )


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("triangle", [False, True])
def test_compiled_attention_is_the_formula(device, triangle):
    """On a GPU a compiled one with a bias is made of products."""
    torch.manual_seed(4)
    inputs = [random(2, 3, 6, 8, device=device) for _ in range(3)]
    inputs.append(random(2, 3, 6, 6, device=device))
    hidden = later_keys(6, device) if triangle else None
    compiled = torch.compile(attention, dynamic=False)
    assert_same_function(compiled, plain_attention, inputs, 1e-6, triangle=triangle, hidden=hidden)


@each_device
def test_attention_in_bfloat16_is_the_formula_for_long_rows(device):
    """Beyond 512 keys a CPU changes to another kernel."""
    torch.manual_seed(4)
    inputs = [random(1, 1, 600, 8, device=device, dtype=torch.bfloat16) for _ in range(3)]
    hidden = later_keys(600, device)
    assert_same_function(
        attention, plain_attention, [*inputs, None], 0.05, triangle=True, hidden=hidden
    )


def test_plain_attention_is_softmax_of_scaled_products():
    torch.manual_seed(4)
    q = random(1, 1, 2, 4)
    k = random(1, 1, 3, 4)
    v = random(1, 1, 3, 4)
    bias = random(1, 1, 2, 3)
    hidden = torch.tensor([[False, True, False], [False, False, False]])
    result = ops.plain_attention(q, k, v, hidden=hidden, bias=bias)
    for i in range(2):
        weights = torch.zeros(3, dtype=torch.float64)
        for j in range(3):
            score = q[0, 0, i] @ k[0, 0, j] / math.sqrt(4) + bias[0, 0, i, j]
            weights[j] = 0 if hidden[i, j] else score.exp()
        expected = (weights / weights.sum()) @ v[0, 0]
        torch.testing.assert_close(result[0, 0, i], expected, rtol=1e-12, atol=1e-12)


@each_device
@pytest.mark.parametrize("triangle", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_attention_drops_that_share_of_the_probabilities(device, triangle, biased):
    """With the identity as values, the result is the probabilities themselves."""
    torch.manual_seed(4)
    n = 64
    q = random(8, 8, n, n, device=device, dtype=torch.float32)
    v = torch.eye(n, device=device).expand(8, 8, n, n)
    hidden = later_keys(n, device) if triangle else None
    bias = random(8, 8, n, n, device=device, dtype=torch.float32) if biased else None
    arguments = dict(triangle=triangle, hidden=hidden, bias=bias)
    probabilities = ops.attention(q, q, v, **arguments, scale=0.01)
    dropped = ops.attention(q, q, v, **arguments, scale=0.01, rate=0.25)

    seen = probabilities > 0
    kept = dropped != 0
    assert kept[seen].float().mean().item() == pytest.approx(0.75, abs=0.01)
    ratio = dropped[kept] / probabilities[kept]
    assert ratio.min().item() == pytest.approx(1 / 0.75, rel=1e-3)
    assert ratio.max().item() == pytest.approx(1 / 0.75, rel=1e-3)


@pytest.mark.parametrize("triangle", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_the_kernel_of_a_gpu_is_given_the_rate(triangle, biased, monkeypatch):
    """What the test above asks of a GPU, asked without one: tensors of no device's memory."""
    rates = []

    def record(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        rates.append(dropout_p)
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    q = torch.empty(2, 3, 6, 8, device="meta")
    hidden = torch.empty(6, 6, dtype=torch.bool, device="meta") if triangle else None
    bias = torch.empty(2, 3, 6, 6, device="meta") if biased else None
    ops.attention(q, q, q, triangle=triangle, hidden=hidden, bias=bias, rate=0.2)
    assert rates == [0.2]


# ------------------------------------------------------------------------------------- dropout


@each_device
@pytest.mark.parametrize(
    "rate, dtype",
    [(0.1, torch.float32), (0.1, torch.bfloat16), (0.75, torch.float64), (0.99999, torch.float32)],
)
def test_dropout_drops_that_share_and_keeps_the_mean(device, rate, dtype):
    torch.manual_seed(3)
    x = torch.ones(3, 333, 1001, dtype=dtype, device=device, requires_grad=True)
    y = ops.dropout(x, rate)
    dropped = y == 0
    assert dropped.float().mean().item() == pytest.approx(rate, abs=0.002)

    # what is kept is scaled up; in steps of 1 / 65,536 a rate near 1 is met roughly only
    kept = y[~dropped].unique()
    assert kept.numel() == 1
    if rate < 0.9:
        assert kept.item() == pytest.approx(1 / (1 - rate), rel=0.01)

    # four elements share a random number, but no bits of it
    neighbours = dropped[..., 1:] & dropped[..., :-1]
    assert neighbours.float().mean().item() == pytest.approx(rate**2, abs=0.003)

    y.sum().backward()
    assert torch.equal(x.grad, y)  # the gradient is dropped where the value was


def test_the_dropout_of_a_gpu_is_that_of_torch(monkeypatch):
    """Asked without a GPU: a tensor of no device's memory."""
    rates = []

    def record(x, p=0.5, training=True, inplace=False):
        assert training
        rates.append(p)
        return x

    monkeypatch.setattr(F, "dropout", record)
    ops.dropout(torch.empty(2, 3, device="meta"), 0.2)
    assert rates == [0.2]


def test_dropout_of_rate_zero_is_nothing():
    x = random(3, 5)
    assert torch.equal(ops.dropout(x, 0.0), x)


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3), (0, 4)])
def test_dropout_takes_any_shape(shape):
    assert ops.dropout(torch.ones(shape), 0.5).shape == shape


# ------------------------------------------------------------------- LTG-BERT's position scores


@pytest.mark.parametrize(
    "n, m", [(1, 1), (1, 4), (2, 2), (5, 5), (3, 7), (7, 3), (32, 40), (64, 64), (96, 70)]
)
def test_position_scores_are_the_lookup(n, m):
    torch.manual_seed(5)
    inputs = [random(2, 3, n, 4), random(3, n + m, 4)]
    assert_same_function(ops.position_scores, ops.plain_position_scores, inputs, 1e-12)


def test_plain_position_scores_are_the_loop():
    torch.manual_seed(5)
    x = random(1, 1, 3, 4)
    table = random(1, 5, 4)
    result = ops.plain_position_scores(x, table)
    assert result.shape == (1, 1, 3, 2)
    for i in range(3):
        for j in range(2):
            expected = x[0, 0, i] @ table[0, 3 - 1 + j - i]
            torch.testing.assert_close(result[0, 0, i, j], expected)


# ---------------------------------------------------------------------- loss of the vocabulary


def loss_inputs(n_row: int, n_token: int, device: str = "cpu"):
    """Return x, the matrix, its bias, targets of which a third is not scored, and weights."""
    torch.manual_seed(1)
    x = random(n_row, n_token, 8, device=device)
    matrix = random(50, 8, device=device)
    bias = random(50, device=device)
    targets = torch.randint(50, (n_row, n_token), device=device)
    targets[:, ::3] = IGNORE
    weights = torch.rand(n_row, n_token, dtype=torch.float64, device=device)
    return x, matrix, bias, targets, weights


# fewer positions than a chunk, chunks of about 512, chunks of an eighth of the rows and of one row
@each_device
@pytest.mark.parametrize("n_row, n_token", [(1, 3), (11, 100), (50, 100), (3, 1000)])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_vocabulary_loss_is_the_formula(device, n_row, n_token, biased, weighted):
    x, matrix, bias, targets, weights = loss_inputs(n_row, n_token, device)
    inputs = [x, matrix, bias if biased else None]
    arguments = dict(targets=targets, weights=weights if weighted else None)
    assert_same_function(ops.vocabulary_loss, ops.plain_vocabulary_loss, inputs, 1e-12, **arguments)


def test_vocabulary_loss_without_gradients_is_the_same():
    x, matrix, bias, targets, weights = loss_inputs(11, 100)
    expected = ops.vocabulary_loss(x.requires_grad_(), matrix, bias, targets, weights)
    with torch.no_grad():
        loss = ops.vocabulary_loss(x, matrix, bias, targets, weights)
    assert torch.equal(loss, expected.detach())
    assert not loss.requires_grad


def test_vocabulary_loss_can_be_scaled_before_the_backward_pass():
    x, matrix, bias, targets, weights = loss_inputs(2, 5)
    x.requires_grad_()
    loss = ops.vocabulary_loss(x, matrix, bias, targets, weights)
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(0.37 * loss, x)
    torch.testing.assert_close(scaled, 0.37 * expected)


@each_device
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_vocabulary_loss_in_bfloat16_is_summed_in_float32(device, biased):
    x, matrix, bias, targets, _ = loss_inputs(40, 24, device)
    inputs = [x.float(), matrix.float(), bias.float() if biased else None]
    with torch.autocast(device, torch.bfloat16):
        loss = ops.vocabulary_loss(*inputs, targets)
        expected = ops.plain_vocabulary_loss(*inputs, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@each_device
def test_the_gradients_of_the_head_in_bfloat16_are_summed_in_float32(device):
    """Beside a sum of 256 a bfloat16 is blind to each of seven further chunks of 0.5."""
    x = torch.ones(8, 512, 1, device=device)  # a chunk a row
    matrix = torch.zeros(2, 1, device=device, requires_grad=True)
    bias = torch.zeros(2, device=device, requires_grad=True)
    targets = torch.zeros(8, 512, dtype=torch.long, device=device)
    weights = torch.full((8, 512), 1 / 512, device=device)
    weights[0] = 1
    with torch.autocast(device, torch.bfloat16):
        ops.vocabulary_loss(x, matrix, bias, targets, weights).backward()
    # of two tokens that are equally likely, each target pushes by one half
    assert matrix.grad.flatten().tolist() == [-259.5, 259.5]
    assert bias.grad.tolist() == [-259.5, 259.5]


def test_vocabulary_loss_without_a_target_is_zero():
    x, matrix, bias, targets, _ = loss_inputs(2, 5)
    assert ops.vocabulary_loss(x, matrix, bias, torch.full_like(targets, IGNORE)) == 0
