"""The exact answer of a problem, the error of a result, and the limits beyond which a result is rejected."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastmaml.benchmark.problem import Problem
from fastmaml.checking.expected import Expected
from fastmaml.checking.oracle import Norms, Oracle
from fastmaml.inner import SGD
from fastmaml.problem.losses import Loss

Answer = tuple[Tensor, Sequence[Tensor]]  # mean query loss, the meta-gradient of each parameter
Call = Callable[[], Answer]
Apply = Callable[[Tensor, Tensor], Tensor]  # (flat parameters [P], x [N, ...]) -> output [N, ...]

# In float64 a right method agrees to rounding, which batch norm and the inner steps amplify. In float32 a flipped ReLU
# mask or pooling choice can change any method's meta-gradient by about 1e-2. If plain torch's error is larger, plain
# torch sets the limit.
FLOAT64_LIMIT = 1e-8
FLOAT32_LIMIT = 1e-2
FLOAT32_OF_PLAIN = 10.0


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """`.grad` of every parameter; zeros if the parameter is unused."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def in_a_line(failure: Exception) -> str:
    """The error of another library in one line, to explain its missing row."""
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else ''}"


def flat(model: nn.Module) -> Tensor:
    """The parameters as one vector [P] without a graph."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def exact(problem: Problem) -> tuple[float, Tensor]:
    """(mean query loss, meta-gradient [P]) in float64 by unrolled double backward, one task at a time (checking/oracle.py)."""
    case, double = problem.case, problem.double()
    expected = Expected(case.loss, SGD(case.inner_lr), case.inner_steps)
    answer = Oracle(double.model, expected, double.batch).answer()
    grads = answer.total()
    parts = [grads.get(name, torch.zeros_like(p)).reshape(-1) for name, p in double.model.named_parameters()]
    return answer.loss, torch.cat([part.detach() for part in parts])


def error(result: Answer, answer: tuple[float, Tensor]) -> float:
    """The larger relative error of loss and meta-gradient (2-norm). Infinite if the result is not finite."""
    loss, grad = result[0].item(), torch.cat([g.detach().reshape(-1) for g in result[1]]).cpu().double()
    return max(abs(loss - answer[0]) / abs(answer[0]), distance(grad, answer[1])) if math.isfinite(loss) else math.inf


def distance(result: Tensor, wanted: Tensor) -> float:
    """|result - wanted| / |wanted|. Infinite if the result is not finite."""
    apart = float((result.detach().cpu().double() - wanted).norm() / wanted.norm())
    return apart if math.isfinite(apart) else math.inf


def disagreement(error64: float, error32: float, yardstick: float, limit64: float = FLOAT64_LIMIT) -> str:
    """Why a result is rejected; "" if it is accepted. yardstick: plain torch's own float32 error."""
    if not error64 <= limit64:
        return f"disagrees with the exact result in float64, relative error {error64:.1e}"
    limit = max(FLOAT32_LIMIT, FLOAT32_OF_PLAIN * yardstick)
    if not error32 <= limit:
        return f"disagrees with the exact result in float32, relative error {error32:.1e} (limit {limit:.1e})"
    return ""


# ---------------------------------------------------------------- what the peers share


def mean_loss(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """(output, target) -> the mean over the examples, a scalar.

    mse is written out, because forward over reverse through F.mse_loss fails on torch 2.13 (read-only zero tensors).
    """
    if callable(loss):
        return lambda output, target: loss(output, target).mean()
    if loss == "mse":
        return lambda output, target: (output - target).square().mean()
    return nn.functional.cross_entropy


def network(model: nn.Module, written_norms: bool = True) -> Apply:
    """The model as a function of a flat parameter vector, with batch norm built from elementary operations.

    torch 2.13's own batch norm is faster. But vmap of reverse over reverse differentiates it wrongly, without a message:
    the relative error is 1.7e-2 on a small Conv4. A plain loop of reverse over reverse may use it: written_norms=False.
    """
    model = copy.deepcopy(model)
    if written_norms:
        Norms(model)
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()))
    sizes = [shape.numel() for shape in shapes]

    def apply(phi: Tensor, x: Tensor) -> Tensor:
        pieces = {name: piece.view(shape) for name, piece, shape in zip(names, phi.split(sizes), shapes)}
        return functional_call(model, pieces, (x,))

    return apply
