# Cross-entropy and squared error: value, gradient and HVP behind one linear layer, against the oracle.
from __future__ import annotations

from functools import cache

import oracle
import pytest
import torch
from cases import program
from compare import Draw, expect_close, float32_rule

RTOL = 1e-10  # float64; a softmax and sums of at most 40 terms
NOTHING = torch.empty(0, dtype=torch.float64)

# kind, smoothing, examples, outputs, weights, scale of the logits
LOSS_CASES = [
    ("cross_entropy", 0.0, 6, 5, None, 1.0),
    ("cross_entropy", 0.0, 1, 2, None, 1.0),
    ("cross_entropy", 0.0, 25, 17, None, 1.0),
    ("cross_entropy", 0.1, 9, 5, None, 1.0),
    ("cross_entropy", 0.3, 4, 33, "random", 1.0),
    ("cross_entropy", 0.0, 10, 5, "random", 1.0),
    ("cross_entropy", 0.0, 10, 5, "with zeros", 1.0),
    ("cross_entropy", 0.0, 7, 5, None, 100.0),  # exp overflows unless the largest logit is subtracted
    ("mse", 0.0, 6, 5, None, 1.0),
    ("mse", 0.0, 1, 1, None, 1.0),
    ("mse", 0.0, 10, 1, "random", 1.0),
    ("mse", 0.0, 5, 33, "with zeros", 1.0),
    ("mse", 0.0, 4, 3, None, 100.0),
]
INPUTS = 7


def text(case) -> str:
    kind, smoothing, _, outputs, _, _ = case
    settings = f"{kind} smoothing={smoothing:g}" if kind == "cross_entropy" else kind
    return program((INPUTS,), [(outputs, INPUTS), (outputs,)], ["linear 0 weight=0 bias=1"], loss=settings)


def draw(case, seed: int, tasks: int = 3):
    kind, _, examples, outputs, weighting, scale = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).double()

    params = scale * normal(tasks, outputs * (INPUTS + 1)) / INPUTS**0.5
    x, v = normal(tasks, examples, INPUTS), normal(tasks, params.shape[1])
    y = (
        torch.randint(outputs, (tasks, examples), generator=generator)
        if kind == "cross_entropy"
        else normal(tasks, examples, outputs)
    )
    weights = None
    if weighting:
        weights = torch.rand(tasks, examples, generator=generator).double()
        if weighting == "with zeros":
            weights[:, ::2] = 0
    return params.float().double(), x, y, v, weights


def apply(phi, x):
    outputs = phi.numel() // (INPUTS + 1)
    return x @ phi[: outputs * INPUTS].view(outputs, INPUTS).T + phi[outputs * INPUTS :]


@cache
def by_torch(case, seed: int, dtype=torch.float64):
    params, x, y, v, weights = (
        t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in draw(case, seed)
    )
    loss = oracle.loss_function(case[0], case[1])
    value, grad = oracle.loss_and_grad(apply, params, x, y, loss, weights)
    return {"loss": value, "grad": grad, "hvp": oracle.hvp(apply, params, x, y, v, loss, weights)}


def run(case, backend: str, seed: int, dtype=torch.float64):
    params, x, y, v, weights = (
        t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in draw(case, seed)
    )
    value, grad = torch.ops.fastmaml.grad(text(case), backend, params, x, y, weights, NOTHING.to(dtype))
    return {
        "loss": value,
        "grad": grad,
        "hvp": torch.ops.fastmaml.hvp(text(case), backend, params, x, y, weights, v, NOTHING.to(dtype)),
    }


every_loss = pytest.mark.parametrize(
    "case",
    LOSS_CASES,
    ids=lambda c: f"{c[0]}-smoothing{c[1]}-N{c[2]}-{c[3]}-weights {c[4]}-x{c[5]:g}".replace(" ", "-"),
)


@every_loss
def test_loss_gradient_and_hvp_are_double_backward(case, compiled):
    got = run(case, compiled.name, 0)
    for name, expected in by_torch(case, 0).items():
        expect_close(got[name], expected, RTOL, label=name)


@every_loss
def test_loss_float32_keeps_the_rule(case, cpu):
    float32_rule(
        case,
        lambda seed: Draw(
            run(case, "cpu", seed, torch.float32), by_torch(case, seed, torch.float32), by_torch(case, seed)
        ),
    )


def test_examples_of_zero_weight_do_not_count(compiled):
    case = LOSS_CASES[6]
    params, x, y, _, weights = draw(case, 0)
    args = (text(case), compiled.name, params)
    _, whole = torch.ops.fastmaml.grad(*args, x, y, weights, NOTHING)
    half = [t[:, 1::2].contiguous() for t in (x, y, weights)]
    expect_close(whole, torch.ops.fastmaml.grad(*args, *half, NOTHING)[1], 1e-14)  # the same sums in another order


def test_huge_logits_stay_finite(compiled):
    case = LOSS_CASES[7]
    params, x, y, v, _ = draw(case, 0)
    loss, grad = torch.ops.fastmaml.grad(text(case), compiled.name, 1e4 * params, x, y, None, NOTHING)
    hv = torch.ops.fastmaml.hvp(text(case), compiled.name, 1e4 * params, x, y, None, v, NOTHING)
    assert all(bool(torch.isfinite(t).all()) for t in (loss, grad, hv))
