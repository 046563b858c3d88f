"""iMAML: the meta-gradient of a regularised inner problem by the implicit function theorem (Rajeswaran et al. 2019).

    phi = argmin L_support(phi) + lam/2 |phi - theta|^2                       (equation 3)
    (I + H/lam) x = grad L_query(phi),   x is the meta-gradient               (lemma 1)
    d L_query / d lam = <grad L_support(phi), x> / lam^2                      (ALGORITHMS 2.5)

H is the Hessian of L_support at phi, without the proximal term.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmaml.algorithms.learner import (
    MODEL,
    Adapted,
    Batch,
    Gradients,
    Learner,
    LearnerOutput,
    weighted,
    weights_of_tasks,
)
from fastmaml.algorithms.newton_cg import newton_cg
from fastmaml.autodiff.conjugate_gradients import STOP
from fastmaml.autodiff.replayed_dropout import replayed
from fastmaml.engine.engine import Engine
from fastmaml.inner import SGD, InnerLr, Optimizer
from fastmaml.problem import checks
from fastmaml.problem.inner_rates import expand_rates
from fastmaml.problem.losses import Loss
from fastmaml.problem.results import Solution

logger = logging.getLogger("fastmaml")


class ImplicitSolve(NamedTuple):
    """How well the two problems of one meta-step were solved, task by task."""

    stationarity: Tensor  # [T] |grad L_support(phi) + lam (phi - theta)|: 0 at the inner minimum
    residual: Tensor  # [T] |v - A x| / |v| of the linear system; NaN where it was not looked at
    iterations: Tensor  # [T] conjugate gradient steps taken
    negative_curvature: Tensor  # [T] whether they ended at p.Ap <= 0
    curve: Tensor  # [T, 1 + the most steps taken] the residual before the first step and after each


class IMAML(Learner):
    """Implicit MAML: inner_steps steps towards the inner minimum, then a gradient that depends on that point alone.

        imaml = IMAML(model, inner_lr=0.1, inner_steps=16, lam=2.0, cg_steps=5)

    lam: the strength of the proximal term; learn_lam=True makes it a parameter, kept in lam_range. solver: "gd" takes
    inner_steps of the inner optimizer (`inner_lr` or `inner`); "newton_cg" as many Hessian-free Newton steps of
    cg_steps products each, and has no learning rate. cg_steps, cg_damping: of ((1 + cg_damping) I + H/lam) x = v, where
    a task stops early at |residual|^2 < cg_stop.
    adapted: name patterns of the parameters that the inner problem is over; the others are meta-trained exactly too.
    The other arguments are Learner's.

    The gradient is as exact as the two problems are solved: `learner.last`, an ImplicitSolve, says how well. A task
    whose system is not positive definite (lam too small) keeps the x it had so far; the log says so once.

    reference_quirks=True is the released code: inner steps without the proximal term, then one step of that alone;
    (1 + cg_damping) I + H/(lam + 10); for cg_steps <= 1 the first-order gradient; lam^2 + 0.1 in the gradient of lam;
    eps=1e-3 in the outer Adam; no solver but "gd". Its defaults are cg_damping=1 and lam=0 in tests: eval_lam, which
    `adapt` takes in eval mode.

    Raises ValueError for cg_steps=0, which would be FOMAML's gradient, and for a learnable inner rate, on which the
    minimum does not depend.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: InnerLr | None = None,
        inner_steps: int = 16,
        loss: Loss = "cross_entropy",
        *,
        lam: float = 2.0,
        learn_lam: bool = False,
        lam_range: tuple[float, float] = (1e-2, 5000.0),
        eval_lam: float | None = None,
        cg_steps: int = 5,
        cg_damping: float = 0.0,
        cg_stop: float = STOP,
        solver: str = "gd",
        reference_quirks: bool = False,
        inner: Optimizer | None = None,
        **options: Any,
    ):
        for name in ("first_order", "truncate"):
            if options.pop(name, None):
                raise ValueError(f"{name} means nothing to IMAML, whose gradient does not go back through inner steps")
        if solver not in ("gd", "newton_cg"):
            raise ValueError(f"solver {solver!r} is neither 'gd' nor 'newton_cg'")
        if solver == "newton_cg":
            if inner_lr is not None or inner is not None:
                raise ValueError("solver 'newton_cg' finds its own step lengths; leave out inner_lr and inner")
            inner_lr = 0.0
        super().__init__(model, inner_lr, inner_steps, loss, inner=inner, **options)
        if self.learnable_rates():
            raise ValueError("inner_lr cannot be learned: the minimum that IMAML differentiates does not depend on it")
        self.solver, self.reference_quirks = solver, bool(reference_quirks)
        if self.reference_quirks and (solver != "gd" or self._optimizer != SGD(0.0)):
            raise ValueError("reference_quirks goes with plain gradient descent only, as the released code")
        self.cg_steps = checks.whole_number("cg_steps", cg_steps, 0)
        if self.cg_steps == 0 and not self.reference_quirks:
            raise ValueError("cg_steps is 0: the gradient would be the first-order one; use FOMAML for that")
        self.cg_damping, self.cg_stop = checks.number("cg_damping", cg_damping), checks.number("cg_stop", cg_stop)
        low, high = self.lam_range = lam_range
        start = checks.number("lam", lam)
        if not 0 <= low <= start <= high or (low == 0 and not self.reference_quirks):
            raise ValueError(f"lam={lam} must lie in lam_range={lam_range}, and that above 0")
        like = next(model.parameters())
        self.lam: nn.Parameter | float = start
        if learn_lam:
            self.lam = nn.Parameter(torch.tensor(start, dtype=like.dtype, device=like.device))
        self.eval_lam = eval_lam
        self.last: ImplicitSolve | None = None
        self._warned: set[str] = set()

    def outer_optimizer(self, lr: float) -> torch.optim.Optimizer:
        optimizer = super().outer_optimizer(lr)
        if self.reference_quirks:
            optimizer.param_groups[0]["eps"] = 1e-3
        return optimizer

    def leaves(self) -> dict[str, Tensor]:
        return super().leaves() | ({"lam": self.lam} if isinstance(self.lam, nn.Parameter) else {})

    def adapt(self, support_x: Tensor, support_y: Tensor, inner_steps: int | None = None) -> Adapted:
        """Learner.adapt, with eval_lam in eval mode."""
        lam = self._strength() if self.training or self.eval_lam is None else self.eval_lam
        return self._adapt(support_x, support_y, self.inner_steps if inner_steps is None else inner_steps, lam)

    def _adapt(self, x: Tensor, y: Tensor, steps: int, lam: float) -> Adapted:
        theta = self.start(x, y)
        if self.solver == "newton_cg":
            f = _Proximal(self.engine, theta, x, y, lam, self._mask(theta), self.adapted)
            phi = newton_cg(f, theta.expand(len(y), -1), checks.whole_number("inner_steps", steps, 0), self.cg_steps)
            return Adapted(self.engine, phi, torch.stack(f.losses, 1) if f.losses else phi[:, :0], x)
        options = replace(self.options(), inner_steps=steps)
        proximal = None if self.reference_quirks else lam
        result = self.engine.adapt_with(theta, x, y, self.inner_lr, options=options, proximal=proximal)
        if not self.reference_quirks:
            return Adapted(self.engine, result.params, result.losses, x)
        rate = expand_rates(self.inner_lr, self.engine.layout, self._mask(theta), theta, steps)[-1]
        return Adapted(self.engine, result.params - rate * lam * (result.params - theta), result.losses, x)

    @torch.no_grad()
    def meta_step(self, batch: Batch, task_weights: Tensor | None) -> tuple[LearnerOutput, Gradients]:
        x, y = batch[:2]
        if isinstance(self.lam, nn.Parameter):
            self.lam.clamp_(*self.lam_range)
        lam, quirks = self._strength(), self.reference_quirks
        adapted = self._adapt(x, y, self.inner_steps, lam)
        phi, mask, draws = adapted.params, self._mask(adapted.params), torch.get_rng_state()
        query = self.engine.meta_gradient(phi, batch, inner_lr=0.0, inner_steps=0, per_task=True, inner_lr_grad=False)
        strength = lam + 10.0 if quirks else lam
        with replayed(draws):
            solved = self._solve(phi, x, y, query.grad * mask, strength)
        grad = implicit = solved.solution
        if self.adapted is not None:  # what the inner problem holds fixed acts on the query loss, and through phi
            with replayed(draws):
                through_phi = self.engine.hvp(phi, x, y, implicit) / strength
            grad = implicit + (1.0 - mask) * (query.grad - through_phi)
        g = self.engine.grad(phi, x, y)[1] * mask
        over_tasks = weights_of_tasks(task_weights, phi)
        of_lam = over_tasks @ (g * implicit).sum(1) / (lam**2 + (0.1 if quirks else 0.0))
        self.last = ImplicitSolve((g + lam * (phi - self.start(x, y))).norm(dim=1), *solved[1:])
        loss = weighted(query.loss, task_weights)
        output = LearnerOutput(loss, query.loss, query.query_output, adapted.losses)
        return output, {MODEL: over_tasks @ grad, "lam": of_lam}

    def _solve(self, phi: Tensor, x: Tensor, y: Tensor, v: Tensor, lam: float) -> Solution:
        """The implicit gradient of every task; says once where it is not what was asked for."""
        if self.reference_quirks and self.cg_steps <= 1:
            self._warn(f"cg_steps={self.cg_steps} with reference_quirks: the gradient is the first-order one")
            unknown = torch.full_like(v[:, 0], torch.nan)
            none = torch.zeros_like(unknown, dtype=torch.int64)
            return Solution(v, unknown, none, none > 0, unknown.unsqueeze(1))
        options: dict[str, Any] = {"damping": self.cg_damping, "stop": self.cg_stop, "adapted": self.adapted}
        solved = self.engine.solve(phi, x, y, v, lam, self.cg_steps, **options)
        negative, idle = int(solved.negative_curvature.sum()), int((solved.iterations == 0).sum())
        if negative:
            self._warn(
                f"p.Ap <= 0 in {negative} of {len(v)} tasks, which keep the x they had: I + H/lam is not positive definite "
                f"there, as lam={self._strength():.3g} is too small or the inner loop far from its minimum"
            )
        if idle:
            self._warn(f"conjugate gradients took no step in {idle} of {len(v)} tasks, whose gradient is zero")
        return solved._replace(history=solved.history[:, : 1 + int(solved.iterations.max())])

    def _warn(self, sentence: str) -> None:
        kind = sentence.split(" in ")[0]
        if kind not in self._warned:
            logger.warning("IMAML: %s", sentence)
        self._warned.add(kind)

    def _strength(self) -> float:
        return float(self.lam.detach() if isinstance(self.lam, Tensor) else self.lam)

    def _mask(self, like: Tensor) -> Tensor:
        """1 on the parameters [P] that the inner problem is over."""
        layout = self.engine.layout
        mask = layout.trainable(self.model.parameters(), like)
        mask = torch.ones_like(like.reshape(-1, layout.size)[0]) if mask is None else mask
        return mask if self.adapted is None else mask * layout.matching(self.adapted, like)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lam={self._strength():.3g}, solver={self.solver!r}, cg_steps={self.cg_steps}"


class _Proximal:
    """L_support(phi) + lam/2 |phi - theta|^2 as a function of the adapted entries (newton_cg.Objective)."""

    def __init__(
        self,
        engine: Engine,
        theta: Tensor,
        x: Tensor,
        y: Tensor,
        lam: float,
        mask: Tensor,
        adapted: Sequence[str] | None,
    ):
        self.engine, self.theta, self.x, self.y, self.lam = engine, theta, x, y, lam
        self.mask, self.adapted = mask, adapted
        self.draws = torch.get_rng_state()
        self.losses: list[Tensor] = []  # [T] of the support set alone, before each step

    def value(self, phi: Tensor) -> Tensor:
        with replayed(self.draws):
            return self._with_term(self.engine.loss(self.engine.forward(phi, self.x), self.y), phi)

    def grad(self, phi: Tensor) -> tuple[Tensor, Tensor]:
        with replayed(self.draws):
            loss, g = self.engine.grad(phi, self.x, self.y)
        self.losses.append(loss)
        return self._with_term(loss, phi), g * self.mask + self.lam * (phi - self.theta)

    def solve(self, phi: Tensor, v: Tensor, steps: int) -> Solution:
        # (lam I + H) d = v is the engine's system with damping = lam - 1, which lam = 0 in tests allows too.
        system: dict[str, Any] = {"lam": 1.0, "damping": self.lam - 1.0, "stop": 0.0, "adapted": self.adapted}
        with replayed(self.draws):
            return self.engine.solve(phi, self.x, self.y, v, steps=steps, **system)

    def _with_term(self, loss: Tensor, phi: Tensor) -> Tensor:
        return loss + 0.5 * self.lam * (phi - self.theta).square().sum(1)
