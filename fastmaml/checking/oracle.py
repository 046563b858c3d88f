"""The oracle: the meta-gradient by unrolled autograd in plain torch, one task at a time. It uses no engine code.

A Slip is a deliberate mistake. With a slip the oracle computes the same as a program with that mistake.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map

from fastmaml.checking.expected import Expected, Rates
from fastmaml.inner import SGD

Named = dict[str, Tensor]
NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Slip:
    """A deliberate mistake; the default is none."""

    whole: bool = False  # second order through all steps, even if less is expected
    only_hessian: bool = False  # the exact gradient without its first-order part
    cut_gradient: frozenset[int] = NONE  # steps whose gradient carries no graph
    cut_params: frozenset[int] = NONE  # steps that start from detached parameters: p.detach() - lr * g
    steps: int | None = None
    at_start: bool = False  # every inner gradient is taken at theta
    still: frozenset[str] = frozenset()  # parameters that the inner loop does not adapt
    rate_factor: float = 1.0
    hessian_term: str = "H(a*v)"  # or "a*(H v)", "H v", "-H(a*v)"
    inner_set: str = "support"  # which examples the inner loop and the last loss see
    query_set: str = "query"
    inner_norm: str | None = None  # batch | running | carried
    query_norm: str | None = None  # batch | support | running | updated by this task's passes | carried on by all

    @property
    def backward_only(self) -> bool:
        """Whether the loss is still right."""
        return replace(
            self, whole=False, only_hessian=False, cut_gradient=NONE, cut_params=NONE, hessian_term=""
        ) == Slip(hessian_term="")


class Answer(NamedTuple):
    """loss: of all tasks together. grads: by name, weighted, a row per task [T, *shape]; None if unused."""

    loss: float
    grads: dict[str, Tensor | None]

    def total(self) -> Named:
        """The gradient of all tasks together, without the unused."""
        return {name: grad.sum(0) for name, grad in self.grads.items() if grad is not None}

    def without(self, other: Answer) -> Answer:
        """The difference of two gradients."""
        return Answer(
            self.loss,
            {
                n: mine if (yours := other.grads[n]) is None or mine is None else mine - yours
                for n, mine in self.grads.items()
            },
        )


class Oracle:
    """The answers for one model, one expected meta-gradient and one batch, in one floating point type."""

    def __init__(self, model: nn.Module, expected: Expected, batch: Iterable[Any], dtype: torch.dtype = torch.float64):
        self.expected = expected
        self.moved = expected.moved(model)
        self.model = copy.deepcopy(model).to(dtype)
        switch_dropout_off(self.model)
        self.norms = Norms(self.model)
        self.theta = {n: p.detach().clone().requires_grad_() for n, p in self.model.named_parameters()}
        self.trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        self.rates = Rates(expected.inner.lr, self.model, dtype)
        self.rows = {
            n: row.detach().to(dtype, copy=True).requires_grad_() for n, row in (expected.step_rows or {}).items()
        }
        typed = tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tuple(batch))
        support_x, support_y, query_x, query_y = typed
        self.sets: dict[str, tuple[Any, Tensor]] = {"support": (support_x, support_y), "query": (query_x, query_y)}
        self.tasks = len(support_y)

    def answer(self, slip: Slip = Slip()) -> Answer:
        """Loss and gradient of the trained parameters and of the rates."""
        if slip.only_hessian:
            every = frozenset(range(self.expected.inner_steps))
            return self.answer().without(self.answer(Slip(cut_gradient=every)))
        leaves = {name: self.theta[name] for name in self.trained} | self.extra_leaves
        weight = 1.0 / self.tasks if self.expected.reduction == "mean" else 1.0
        self.norms.restart()
        loss, rows = 0.0, list[tuple[Tensor | None, ...]]()
        for task in range(self.tasks):
            if "carried" not in (slip.inner_norm, slip.query_norm):
                self.norms.restart()
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
                value = weight * self._meta_loss(task, slip)
                loss += float(value.detach())
                if value.requires_grad:
                    rows.append(torch.autograd.grad(value, list(leaves.values()), allow_unused=True))
                else:
                    rows.append((None,) * len(leaves))
        grads: dict[str, Tensor | None] = {}
        for (name, leaf), column in zip(leaves.items(), zip(*rows)):
            used = any(grad is not None for grad in column)
            full = [torch.zeros_like(leaf) if grad is None else grad for grad in column]
            grads[name] = torch.stack(full).detach() if used else None
        return Answer(loss, grads)

    @property
    def extra_leaves(self) -> Named:
        """The learned leaves that are no model parameters: rates, and rows per step."""
        return self.rates.leaves | {f"step_rows.{name}": row for name, row in self.rows.items()}

    def loss(self, slip: Slip = Slip()) -> float:
        """The meta-loss alone, at the current theta and rates."""
        weight = 1.0 / self.tasks if self.expected.reduction == "mean" else 1.0
        without_graph = replace(slip, cut_gradient=frozenset(range(self.expected.inner_steps)))
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            return sum(weight * float(self._meta_loss(task, without_graph).detach()) for task in range(self.tasks))

    # ---------------------------------------------------------------- one task

    def _meta_loss(self, task: int, slip: Slip) -> Tensor:
        expected = self.expected
        steps = expected.inner_steps if slip.steps is None else slip.steps
        weights = self._loss_weights(steps)
        order = None if slip.whole else 0 if expected.first_order else expected.truncate
        cut_all = order == 0
        truncated = 0 if cut_all or order is None else max(steps - order, 0)
        phi, state, total = dict(self.theta), dict[str, Any](), None
        for k in range(steps + 1):
            if k in weights:
                value = weights[k] * self._query_loss(phi | self._row(max(k - 1, 0)), task, slip)
                total = value if total is None else total + value
            if k == steps:
                break
            cut = cut_all or k in slip.cut_gradient
            new = self._step(phi | self._row(k), task, k, cut, slip, state)
            if k < truncated:  # the adjoint passes through unchanged
                new = {n: phi[n] + (p - phi[n]).detach() for n, p in new.items()}
                state = {n: {key: s.detach() for key, s in of.items()} for n, of in state.items()}
            phi = phi | new
        assert total is not None
        return total

    def _row(self, k: int) -> Named:
        """The parameters that have a value of their own at step k."""
        return {name: row[min(k, len(row) - 1)] for name, row in self.rows.items()}

    def _loss_weights(self, steps: int) -> dict[int, float]:
        if self.expected.loss_weights is None or steps != self.expected.inner_steps:
            return {steps: 1.0}
        given = {k: float(w) for k, w in enumerate(self.expected.loss_weights)}
        return {k: w for k, w in given.items() if w or k == steps}

    def _step(self, phi: Named, task: int, k: int, cut: bool, slip: Slip, state: dict[str, Any]) -> Named:
        """The moved parameters after step k."""
        names = [n for n in self.moved if n not in slip.still]
        rates = {n: slip.rate_factor * self.rates.of(n, k) for n in names}
        at = dict(self.theta if slip.at_start else phi)
        if slip.hessian_term == "a*(H v)":
            at |= {n: _ScaleAdjoint.apply(at[n], rates[n].detach()) for n in names}
        x, y = self.sets[slip.inner_set]
        rows = slice(None)
        if self.expected.minibatch is not None:
            rows = slice(k * self.expected.minibatch, (k + 1) * self.expected.minibatch)
        mode = slip.inner_norm or ("running" if self.expected.batch_norm == "frozen" else "batch")
        self.norms.mode = "updated" if mode == "carried" else mode
        loss = self._loss(at, _part(x, task, rows), y[task][rows])
        grads = torch.autograd.grad(
            loss,
            [at[n] for n in names],
            create_graph=not cut,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        g = {n: grad.detach() if cut else grad for n, grad in zip(names, grads)}
        start = {n: phi[n].detach() if k in slip.cut_params else phi[n] for n in names}
        if slip.hessian_term != "H(a*v)":
            return {n: start[n] - _with_adjoint(slip.hessian_term, rates[n], g[n]) for n in names}
        return self._update(start, g, rates, k, state)

    def _update(self, phi: Named, g: Named, rates: Named, k: int, state: dict[str, Any]) -> Named:
        """torch.optim's update rules, written out (ALGORITHMS 1.1 to 1.4)."""
        o = self.expected.inner
        if o.clip_value is not None:
            g = {n: gn.clamp(-o.clip_value, o.clip_value) for n, gn in g.items()}
        if o.clip_norm is not None:
            norm = torch.stack([gn.square().sum() for gn in g.values()]).sum().sqrt()
            if float(norm.detach()) > o.clip_norm:
                g = {n: gn * (o.clip_norm / norm) for n, gn in g.items()}
        decoupled = getattr(o, "decoupled", False)
        new = {}
        for n, gn in g.items():
            if o.weight_decay and not decoupled:
                gn = gn + o.weight_decay * phi[n]
            if self.expected.proximal:
                gn = gn + self.expected.proximal * (phi[n] - self.theta[n])
            if isinstance(o, SGD):
                d = gn
                if o.momentum:
                    b = o.momentum * state[n]["b"] + (1 - o.dampening) * gn if n in state else gn
                    state[n] = {"b": b}
                    d = gn + o.momentum * b if o.nesterov else b
                new[n] = phi[n] - rates[n] * d
                continue
            old = state.get(n, {"m": torch.zeros_like(gn), "s": torch.zeros_like(gn)})
            b1, b2 = o.betas
            m, s = b1 * old["m"] + (1 - b1) * gn, b2 * old["s"] + (1 - b2) * gn * gn
            state[n] = {"m": m, "s": s}
            s = s / (1 - b2 ** (k + 1))
            root = torch.where(s > 0, torch.where(s > 0, s, 1.0).sqrt(), 0.0)  # sqrt has no derivative at 0
            decayed = phi[n] * (1 - rates[n] * o.weight_decay) if decoupled else phi[n]
            new[n] = decayed - rates[n] * (m / (1 - b1 ** (k + 1))) / (root + o.eps)
        return new

    def _query_loss(self, phi: Named, task: int, slip: Slip) -> Tensor:
        mode = slip.query_norm or {"frozen": "running", "support": "support"}.get(self.expected.batch_norm, "batch")
        x, y = self.sets[slip.query_set]
        if mode == "support":
            self.norms.mode = "record"
            self._output(phi, _part(self.sets["support"][0], task))
        self.norms.mode = {"support": "recorded", "carried": "updated"}.get(mode, mode)
        return self._loss(phi, _part(x, task), y[task])

    def _output(self, phi: Named, x: Any) -> Any:
        """x: one input, a tuple of them, or a dict by argument name."""
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        named = x if isinstance(x, dict) else {}
        listed = () if named else tuple(x) if isinstance(x, (tuple, list)) else (x,)
        return functional_call(self.model, {**phi, **buffers}, listed, named)

    def _loss(self, phi: Named, x: Any, y: Tensor) -> Tensor:
        output, loss = self._output(phi, x), self.expected.loss
        if loss == "cross_entropy":
            return F.cross_entropy(output, y.long(), label_smoothing=self.expected.label_smoothing)
        if loss == "mse":
            return (output - y).square().mean()
        assert callable(loss)
        return loss(output, y).mean()


def _part(x: Any, task: int, rows: slice = slice(None)) -> Any:
    """The examples of one task, in the form that x has."""
    return tree_map(lambda part: part[task][rows], x)


class _ScaleAdjoint(torch.autograd.Function):
    """x, whose adjoint is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.saved_tensors[0] * grad, None


def _with_adjoint(term: str, rate: Tensor, g: Tensor) -> Tensor:
    """The value of rate * g, with the adjoint of -rate * g for "-H(a*v)", and of g for "H v" and "a*(H v)"."""
    value = (rate * g).detach()
    through = -rate * g if term == "-H(a*v)" else g
    return value + through - through.detach()


class Norms:
    """Replaces a model's batch norms by elementary operations.

    mode:
        "batch"               batch statistics; also keeps updated running statistics here
        "running"             the model's running statistics
        "updated"             the running statistics kept here
        "record", "recorded"  records a pass' batch statistics, then uses them, with their graph
    """

    def __init__(self, model: nn.Module):
        self.mode = "batch"
        self.modules = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
        for name, module in self.modules.items():
            module.__dict__["forward"] = functools.partial(self._forward, name, module)
        self.restart()

    def restart(self) -> None:
        """Forgets the statistics of earlier passes."""
        self.recorded: dict[str, tuple[Tensor, Tensor]] = {}
        self.kept: dict[str, tuple[Tensor, Tensor, int]] = {}

    def _forward(self, name: str, module: _BatchNorm, x: Tensor) -> Tensor:
        form = [1, -1] + [1] * (x.dim() - 2)
        over = [d for d in range(x.dim()) if d != 1]
        if self.mode in ("batch", "record"):
            if x.numel() == x.shape[1]:
                raise ValueError(f"batch norm '{name}' needs more than one value per channel, got {list(x.shape)}")
            mean = x.mean(over)
            var = (x - mean.reshape(form)).square().mean(over)
            if self.mode == "record":
                self.recorded[name] = mean, var
            else:
                self._keep(name, module, mean.detach(), var.detach(), x.numel() // x.shape[1])
        elif self.mode == "recorded":
            mean, var = self.recorded[name]
        elif self.mode == "updated":
            mean, var, _ = self._kept(name, module)
        else:
            mean, var = module.running_mean, module.running_var  # type: ignore[assignment]
        y = (x - mean.reshape(form)) / (var.reshape(form) + module.eps).sqrt()
        if module.weight is not None:
            y = y * module.weight.reshape(form) + module.bias.reshape(form)
        return y

    def _kept(self, name: str, module: _BatchNorm) -> tuple[Tensor, Tensor, int]:
        if name in self.kept:
            return self.kept[name]
        assert module.running_mean is not None and module.running_var is not None
        seen = 0 if module.num_batches_tracked is None else int(module.num_batches_tracked)
        return module.running_mean, module.running_var, seen

    def _keep(self, name: str, module: _BatchNorm, mean: Tensor, var: Tensor, count: int) -> None:
        if module.running_mean is None:
            return
        old_mean, old_var, seen = self._kept(name, module)
        share = 1.0 / (seen + 1) if module.momentum is None else module.momentum
        unbiased = var * count / max(count - 1, 1)
        self.kept[name] = (1 - share) * old_mean + share * mean, (1 - share) * old_var + share * unbiased, seen + 1


def dropouts(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The modules with a dropout probability above 0: (name, module, attribute of the probability)."""
    found = []
    for name, module in model.named_modules():
        key = "p" if isinstance(module, _DropoutNd) else "dropout"  # of attention and recurrent layers
        if isinstance(getattr(module, key, None), float) and getattr(module, key) > 0:
            found.append((name, module, key))
    return found


def switch_dropout_off(model: nn.Module) -> list[str]:
    """Turns every dropout of a model into the identity. Returns the names of the active ones."""
    found = dropouts(model)
    for _, module, key in found:
        setattr(module, key, 0.0)
    return [name for name, module, _ in found if module.training]
