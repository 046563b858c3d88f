"""The exact answer of a problem, how far a result is from it, and who is far enough to get no row."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastmaml.benchmark.problem import Problem
from fastmaml.checking.expected import Intent
from fastmaml.checking.oracle import Norms, Oracle
from fastmaml.inner import SGD
from fastmaml.problem.losses import Loss

Answer = tuple[Tensor, Sequence[Tensor]]  # mean query loss, the meta-gradient of each parameter
Call = Callable[[], Answer]
Apply = Callable[[Tensor, Tensor], Tensor]  # (flat parameters [P], x [N, ...]) -> output [N, ...]

# In float64 a right method agrees to rounding, which batch norm and the inner steps amplify. In float32 ReLU masks and
# pooling choices that fall the other way move a meta-gradient by up to about 1e-2, whatever computes it; where they move
# plain torch further, it is the yardstick.
FLOAT64_LIMIT = 1e-8
FLOAT32_LIMIT = 1e-2
FLOAT32_OF_PLAIN = 10.0


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """`.grad` of every parameter, zeros where a parameter is not used."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def in_a_line(failure: Exception) -> str:
    """What another library raised, for the row that it does not get."""
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else ''}"


def flat(model: nn.Module) -> Tensor:
    """The parameters as one vector [P] without a graph."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def exact(problem: Problem) -> tuple[float, Tensor]:
    """(mean query loss, meta-gradient [P]) in float64 by unrolled double backward, a task at a time (checking/oracle.py)."""
    case, double = problem.case, problem.double()
    intent = Intent(case.loss, SGD(case.inner_lr), case.inner_steps)
    answer = Oracle(double.model, intent, double.batch).answer()
    grads = answer.total()
    parts = [grads.get(name, torch.zeros_like(p)).reshape(-1) for name, p in double.model.named_parameters()]
    return answer.loss, torch.cat([part.detach() for part in parts])


def error(result: Answer, answer: tuple[float, Tensor]) -> float:
    """The larger relative error of loss and meta-gradient (2-norm); infinite where the result is not finite."""
    loss, grad = result[0].item(), torch.cat([g.detach().reshape(-1) for g in result[1]]).cpu().double()
    return max(abs(loss - answer[0]) / abs(answer[0]), distance(grad, answer[1])) if math.isfinite(loss) else math.inf


def distance(result: Tensor, wanted: Tensor) -> float:
    """|result - wanted| / |wanted|; infinite where the result is not finite."""
    apart = float((result.detach().cpu().double() - wanted).norm() / wanted.norm())
    return apart if math.isfinite(apart) else math.inf


def disagreement(error64: float, error32: float, yardstick: float, limit64: float = FLOAT64_LIMIT) -> str:
    """Why a result is not accepted; "" if it is. `yardstick`: plain torch's own error in float32."""
    if not error64 <= limit64:
        return f"disagrees with the exact result in float64, relative error {error64:.1e}"
    limit = max(FLOAT32_LIMIT, FLOAT32_OF_PLAIN * yardstick)
    if not error32 <= limit:
        return f"disagrees with the exact result in float32, relative error {error32:.1e} (limit {limit:.1e})"
    return ""


# ---------------------------------------------------------------- what the peers share


def mean_loss(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """(output, target) -> the mean over the examples, a scalar.

    mse is written out: torch 2.13 differentiates F.mse_loss forward over reverse by zero tensors that cannot be written.
    """
    if callable(loss):
        return lambda output, target: loss(output, target).mean()
    if loss == "mse":
        return lambda output, target: (output - target).square().mean()
    return nn.functional.cross_entropy


def network(model: nn.Module, written_norms: bool = True) -> Apply:
    """The model as a function of a flat parameter vector, with batch norm written out of elementary operations.

    torch 2.13's own batch norm, which is faster, is differentiated wrongly, without a message, by vmap of reverse over
    reverse (relative error 1.7e-2 on a small Conv4); a plain loop of reverse over reverse may keep it.
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
