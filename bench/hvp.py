"""Hessian-vector products of an MLP, every task with its own weights: fastmaml beside torch.func, torch.compile and JAX.

Every product includes its primal pass. Each implementation is held to double backward in float64 before it is timed.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import fastmaml as fm
from bench.baselines import Missing, jax_grad

Product = Callable[[], Tensor]  # [T, P]


@dataclass(frozen=True)
class HvpCase:
    """An MLP of three layers of one width, with mean squared error."""

    width: int
    tasks: int
    examples: int = 32

    def __str__(self) -> str:
        return f"mlp-{self.width} T={self.tasks} N={self.examples}"

    @property
    def gflop(self) -> float:
        """Of the matrix products: 9F less the first layer's input gradients, 5F1 (as an exact inner step)."""
        layer = 2.0 * self.width * self.width
        return self.tasks * self.examples * (9 * 3 * layer - 5 * layer) / 1e9


CASES = tuple(HvpCase(width, tasks) for width in (32, 128, 512) for tasks in (1, 16, 64))


@dataclass(frozen=True)
class HvpProblem:
    """The network, and for each task its weights, examples and direction."""

    model: nn.Module
    params: Tensor  # [T, P]
    x: Tensor  # [T, N, width]
    y: Tensor
    v: Tensor  # [T, P]

    def to(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> HvpProblem:
        """The same numbers elsewhere."""
        tensors = (t.to(device, dtype) for t in (self.params, self.x, self.y, self.v))
        return HvpProblem(fm.models.mlp(_sizes(self.model)).to(device, dtype), *tensors)


def _sizes(model: nn.Module) -> list[int]:
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


def problem(case: HvpCase, seed: int = 0) -> HvpProblem:
    """In float32; the seed decides weights, examples and directions."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = fm.models.mlp([case.width] * 4)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    noise = 0.01 * torch.randn(case.tasks, theta.numel(), generator=random)
    x, y = torch.randn(2, case.tasks, case.examples, case.width, generator=random)
    return HvpProblem(model, theta + noise, x, y, torch.randn(case.tasks, theta.numel(), generator=random))


def exact(p: HvpProblem) -> Tensor:
    """[T, P] in float64 on the CPU, by double backward, a task at a time."""
    p = p.to(dtype=torch.float64)
    found = []
    for params, x, y, v in zip(p.params, p.x, p.y, p.v):
        at = params.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(F.mse_loss(_output(p.model, at, x), y), at, create_graph=True)
        found.append(torch.autograd.grad(g @ v, at)[0])
    return torch.stack(found)


def _output(model: nn.Module, flat: Tensor, x: Tensor) -> Tensor:
    names, shapes = zip(*((name, q.shape) for name, q in model.named_parameters()))
    pieces = flat.split([shape.numel() for shape in shapes])
    return functional_call(model, {n: piece.view(s) for n, piece, s in zip(names, pieces, shapes)}, (x,))


# ---------------------------------------------------------------- implementations


def by_fastmaml(p: HvpProblem, backend: str, precision: str = "float32") -> Product:
    engine = fm.Engine(p.model, "mse", backend, precision=precision)
    return lambda: engine.hvp(p.params, p.x, p.y, p.v)


def by_torch_func(p: HvpProblem, compiled: bool = False) -> Product:
    def product(params: Tensor, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        # not F.mse_loss: torch 2.13 differentiates it forward over reverse by zero tensors that cannot be written
        gradient = grad(lambda at: (_output(p.model, at, x) - y).square().mean())
        return jvp(gradient, (params,), (v,))[1]

    batched = vmap(product)
    if compiled:
        batched = torch.compile(batched)
    return lambda: batched(p.params, p.x, p.y, p.v)


def by_double_backward(p: HvpProblem) -> Product:
    """One double backward for all tasks: the layers are written as batched products."""
    shapes = [(layer.out_features, layer.in_features) for layer in p.model.modules() if isinstance(layer, nn.Linear)]
    sizes = [n for rows, cols in shapes for n in (rows * cols, rows)]

    def losses(flat: Tensor) -> Tensor:
        x, pieces = p.x, flat.split(sizes, dim=1)
        for i, (rows, cols) in enumerate(shapes):
            x = torch.baddbmm(pieces[2 * i + 1][:, None], x, pieces[2 * i].view(-1, rows, cols).transpose(1, 2))
            x = x if i + 1 == len(shapes) else torch.relu(x)
        return (x - p.y).square().flatten(1).mean(1).sum()

    def call() -> Tensor:
        at = p.params.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(losses(at), at, create_graph=True)
        return torch.autograd.grad((g * p.v).sum(), at)[0]

    return call


def by_jax(p: HvpProblem) -> Product:
    jax_grad.version()
    jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
    sizes = _sizes(p.model)
    params, x, y, v = (jnp.asarray(t.cpu().numpy()) for t in (p.params, p.x, p.y, p.v))

    def loss(flat, x, y):  # type: ignore[no-untyped-def]
        at = 0
        for i, (cols, rows) in enumerate(itertools.pairwise(sizes)):
            weight, at = flat[at : at + rows * cols].reshape(rows, cols), at + rows * cols
            x, at = x @ weight.T + flat[at : at + rows], at + rows
            x = x if i + 2 == len(sizes) else jax.nn.relu(x)
        return ((x - y) ** 2).mean()

    def product(flat, x, y, v):  # type: ignore[no-untyped-def]
        return jax.jvp(lambda at: jax.grad(loss)(at, x, y), (flat,), (v,))[1]

    compiled = jax.jit(jax.vmap(product))
    return lambda: torch.from_dlpack(jax.block_until_ready(compiled(params, x, y, v)))


PEERS: dict[str, Callable[[HvpProblem], Product]] = {
    "double_backward": by_double_backward,
    "torch_func": by_torch_func,
    "torch_func+compile": lambda p: by_torch_func(p, compiled=True),
    "jax": by_jax,
}


def prepare(
    p: HvpProblem, expected: Tensor, backend: str, precisions: Sequence[str], limit: float = 1e-2
) -> tuple[dict[str, Product], dict[str, float], dict[str, str]]:
    """(what can be timed, relative errors, why others cannot): all in p's type, on p's device."""
    ours = {
        "fastmaml" if q == "float32" else f"fastmaml {q}": lambda p, q=q: by_fastmaml(p, backend, q) for q in precisions
    }
    calls: dict[str, Product] = {}
    errors: dict[str, float] = {}
    absent: dict[str, str] = {}
    for name, make in {**ours, **PEERS}.items():
        try:
            call = make(p)
            found = call().detach().cpu().double()
        except Missing as reason:
            absent[name] = str(reason)
            continue
        except Exception as failure:  # another library's; ours ends the run
            if name in ours:
                raise
            absent[name] = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else ''}"
            continue
        errors[name] = float((found - expected).norm() / expected.norm())
        if errors[name] <= limit:
            calls[name] = call
        else:
            absent[name] = f"disagrees with the exact result, relative error {errors[name]:.1e}"
    return calls, errors, absent
