# Every algorithm on the CUDA kernels, layered and resident: all learned parameters get the gradients of `reference`.
from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fastmaml as fm

_C = pytest.importorskip("fastmaml._C", reason="make build")

# CAVIA is missing: its networks concatenate, which no compiled backend does. A softer start than the default's keeps iMAML's
# operator positive definite, and Meta-SGD's random rates are the same on both backends.
LEARNERS: dict[str, Callable[..., fm.algorithms.Learner]] = {
    "MAML": lambda model, K, **how: fm.MAML(model, 0.1, K, **how),
    "MAML, momentum": lambda model, K, **how: fm.MAML(
        model, inner_steps=K, inner=fm.inner.SGD(lr=0.1, momentum=0.9, nesterov=True, clip_norm=0.5), **how
    ),
    "MAML, Adam": lambda model, K, **how: fm.MAML(model, inner_steps=K, inner=fm.inner.Adam(0.01, eps=1e-3), **how),
    "FOMAML": lambda model, K, **how: fm.FOMAML(model, 0.1, K, **how),
    "FOML": lambda model, K, **how: fm.FOML(model, fm.inner.SGD(0.1), K, 3, **how),
    "Reptile": lambda model, K, **how: fm.Reptile(model, fm.inner.SGD(0.1), K, 4, **how),
    "MAML++": lambda model, K, **how: fm.MAMLPlusPlus(model, 0.1, K, **how),
    "iMAML": lambda model, K, **how: fm.IMAML(model, 0.1, K, lam=4.0, **how),
    "Meta-SGD": lambda model, K, **how: fm.MetaSGD(model, 0.1, K, **how),
    "ANIL": lambda model, K, **how: fm.ANIL(model, 0.1, K, **how),
    "BOIL": lambda model, K, **how: fm.BOIL(model, 0.1, K, **how),
    "ProtoMAML": lambda model, K, **how: fm.ProtoMAML(model, 0.1, K, **how),
    "Meta-Curvature": lambda model, K, **how: fm.MetaCurvature(model, 0.1, K, **how),
}
SUPPORT, QUERY, WAYS = 6, 5, 3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, WAYS))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(5 * 3 * 2, WAYS),
    )


def draw(shape: tuple[int, ...], tasks: int = 2) -> fm.TaskBatch:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(tasks, SUPPORT + QUERY, *shape, generator=generator)
    y = torch.arange(SUPPORT + QUERY).remainder(WAYS).expand(tasks, -1)
    return fm.TaskBatch(x[:, :SUPPORT], y[:, :SUPPORT], x[:, SUPPORT:], y[:, SUPPORT:])


def learned(name: str, network: Callable[[], nn.Module], batch: fm.TaskBatch, K: int, dtype: torch.dtype, backend: str):
    """The gradients of everything that the learner learns, by name, and its losses."""
    torch.manual_seed(0)
    learner = LEARNERS[name](network().to(dtype), K, backend=backend)
    learner.to(dtype)
    assert learner.engine.backend == backend
    torch.manual_seed(1)  # of the mini-batches
    out = learner(*batch.to(dtype=dtype))
    out.loss.backward()
    grads = {n: p.grad for n, p in learner.named_parameters() if p.grad is not None}
    assert grads
    return grads, out


@pytest.fixture(params=["layered", "resident"])
def walk(request) -> Iterator[str]:
    _C.set_cuda_walk(request.param)
    yield request.param
    _C.set_cuda_walk("auto")


def compare(found: Tensor, expected: Tensor, rtol: float, label: str) -> None:
    distance, size = (found.double() - expected.double()).norm(), expected.double().norm()
    assert distance <= rtol * size + 1e-12, f"{label}: off by {distance:.1e} of {size:.1e} (limit {rtol:.0e} of it)"


# float32 is held loosely here: tests/numerics/test_float32.py has the rule, at identical parameters in each step.
TYPES = [(torch.float64, 1e-8), (torch.float32, 2e-3)]


@pytest.mark.parametrize("dtype, rtol", TYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("name", LEARNERS)
def test_an_algorithm_learns_the_same(name, K, dtype, rtol, walk):
    batch = draw((5,))
    grads, out = learned(name, mlp, batch, K, dtype, "cuda_emulated")
    expected, right = learned(name, mlp, batch, K, dtype, "reference")
    compare(out.task_losses, right.task_losses, rtol, "task_losses")
    assert set(grads) == set(expected)
    for parameter, grad in grads.items():
        compare(grad, expected[parameter], rtol, parameter)


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("name", LEARNERS)
def test_an_algorithm_learns_the_same_with_convolutions(name, K):
    batch = draw((1, 7, 5))
    grads, _ = learned(name, convnet, batch, K, torch.float64, "cuda_emulated")
    expected, _ = learned(name, convnet, batch, K, torch.float64, "reference")
    for parameter, grad in grads.items():
        compare(grad, expected[parameter], 1e-7, parameter)
