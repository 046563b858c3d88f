"""Meta-Curvature: learned matrices, one per mode, transform the inner gradient (Park & Oliva 2019).

    MC(G) = G x_out M_out x_in M_in x_kernel M_kernel                (equations 7 and 8; a linear weight: M_out G M_in^T)
    phi[k+1] = phi[k] - inner_lr * MC(g[k])
    v[k] = v[k+1] - H_k MC^T(inner_lr * v[k+1])                                                   (ALGORITHMS 1.2, 2.9)

The gradients of the matrices come from the same adjoint and g[k], mode by mode.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.algorithms.learner import Adapted, Batch, Gradients, Learner, LearnerOutput, weights_of_tasks
from fastmaml.autodiff.update_rules import UpdateRule, rule_for
from fastmaml.inner import InnerLr
from fastmaml.problem.inner_rates import expand_rates
from fastmaml.problem.losses import Loss
from fastmaml.problem.parameters import ParameterLayout

AXES = {"out": 1, "in": 2, "kernel": 3}


class MetaCurvature(Learner):
    """MAML with learned curvature matrices that transform the inner gradients. The matrices start as the identity.

        learner = MetaCurvature(model, inner_lr=0.05, inner_steps=5)
        optimizer = torch.optim.Adam(learner.parameters(), 1e-3)   # the model and "curvature.NAME.MODE"

    A weight [out, in, ...] has one matrix over its outputs and one over its inputs. A convolution weight has a third
    matrix, over the kernel positions. Biases and norm parameters are scaled entry by entry.
    Parameters that are frozen or not adapted have no matrix.
    An `inner` optimizer sees the transformed gradients. The arguments are Learner's.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: InnerLr | None = None,
        inner_steps: int = 1,
        loss: Loss = "cross_entropy",
        **options: Any,
    ):
        super().__init__(model, inner_lr, inner_steps, loss, **options)
        adapted = self.engine.layout.fitting(self.adapted or ["*"])
        self.curvature = nn.ParameterDict()
        for name, parameter in model.named_parameters():
            if name in adapted and parameter.requires_grad:
                for mode, matrix in identities(parameter).items():
                    self.curvature[f"{name}.{mode}".replace(".", "/")] = nn.Parameter(matrix)

    def leaves(self) -> dict[str, Tensor]:
        return super().leaves() | {f"curvature.{name}": matrix for name, matrix in self._matrices().items()}

    @torch.no_grad()
    def meta_step(self, batch: Batch, task_weights: Tensor | None) -> tuple[LearnerOutput, Gradients]:
        theta = self.start(*batch[:2])
        rule = self._rule(theta, self.inner_steps, len(batch[1]), task_weights)
        result = self.engine.meta_gradient(
            theta,
            batch,
            self.inner_lr,
            task_weights=task_weights,
            options=self.options(),
            rule=rule,
        )
        output, grads = self.as_output(result, task_weights)
        return output, grads | {f"curvature.{name}": grad for name, grad in rule.grads.items()}

    @torch.no_grad()
    def adapt(self, support_x: Tensor, support_y: Tensor, inner_steps: int | None = None) -> Adapted:
        steps = self.inner_steps if inner_steps is None else inner_steps
        theta = self.start(support_x, support_y)
        rule = self._rule(theta, steps, len(support_y))
        options = replace(self.options(), inner_steps=steps)
        result = self.engine.adapt_with(theta, support_x, support_y, self.inner_lr, options=options, rule=rule)
        return Adapted(self.engine, result.params, result.losses, support_x)

    def _matrices(self) -> dict[str, Tensor]:
        """{"NAME.MODE": matrix}"""
        return {name.replace("/", "."): matrix for name, matrix in self.curvature.items()}

    def _rule(self, theta: Tensor, steps: int, tasks: int, task_weights: Tensor | None = None) -> CurvatureRule:
        layout = self.engine.layout
        mask = layout.trainable(self.model.parameters(), theta)
        if self.adapted is not None:
            chosen = layout.matching(self.adapted, theta)
            mask = chosen if mask is None else mask * chosen
        rates = expand_rates(self.inner.lr, layout, mask, theta, steps)
        weights = weights_of_tasks(task_weights, theta.new_empty(tasks))
        return CurvatureRule(rule_for(self.inner, rates, mask), layout, self._matrices(), weights)


class CurvatureRule:
    """An update_rules.UpdateRule that replaces g by MC(g), and sums the gradients of the matrices."""

    needs_gradient = True

    def __init__(self, rule: UpdateRule, layout: ParameterLayout, matrices: dict[str, Tensor], task_weights: Tensor):
        self.rule, self.layout, self.task_weights = rule, layout, task_weights
        self.matrices = {name: matrix.detach() for name, matrix in matrices.items()}
        self.grads = {name: torch.zeros_like(matrix) for name, matrix in matrices.items()}

    def update(self, k: int, phi: Tensor, g: Tensor) -> Tensor:
        return self.rule.update(k, phi, self.transformed(g))

    def adjoint(self, k: int, v: Tensor, phi: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
        assert g is not None
        v, y = self.rule.adjoint(k, v, phi, self.transformed(g) if self.rule.needs_gradient else None)
        return v, self.pulled_back(y, g)

    def rate_grad(self, k: int, v: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        return self.rule.rate_grad(k, v, phi, self.transformed(g))

    def transformed(self, g: Tensor) -> Tensor:
        """MC(g) [T, P]."""
        pieces = [transformed(self._modes(name), piece) for name, piece in self.layout.split(g).items()]
        return torch.cat([piece.reshape(len(g), -1) for piece in pieces], dim=1)

    def pulled_back(self, y: Tensor, g: Tensor) -> Tensor:
        """MC^T(y) [T, P] for the adjoint y of MC(g). Adds this step's terms to the gradients of the matrices."""
        given, pieces = self.layout.split(g), []
        for name, piece in self.layout.split(y).items():
            piece, grads = pulled_back(self._modes(name), piece, given[name], self.task_weights)
            pieces.append(piece.reshape(len(g), -1))
            for mode, grad in grads.items():
                self.grads[f"{name}.{mode}"] += grad
        return torch.cat(pieces, dim=1)

    def _modes(self, name: str) -> dict[str, Tensor]:
        named = {mode: self.matrices.get(f"{name}.{mode}") for mode in (*AXES, "scale")}
        return {mode: matrix for mode, matrix in named.items() if matrix is not None}


# ---------------------------------------------------------------- one parameter: G [T, *shape]


def identities(parameter: Tensor) -> dict[str, Tensor]:
    """The identity matrices of one parameter: they leave its gradient unchanged."""
    if parameter.dim() < 2:
        return {"scale": torch.ones_like(parameter)}
    sizes = (*parameter.shape[:2], *([parameter[0, 0].numel()] if parameter.dim() > 2 else []))
    return {mode: torch.eye(size).to(parameter) for mode, size in zip(AXES, sizes)}


def transformed(modes: dict[str, Tensor], G: Tensor) -> Tensor:
    """G times its matrices. A convolution's result has the shape [T, out, in, kernel]."""
    if "scale" in modes:
        return G * modes["scale"]
    G = G.flatten(3) if G.dim() > 3 else G
    for mode, matrix in modes.items():
        G = along(AXES[mode], matrix, G)
    return G


def pulled_back(
    modes: dict[str, Tensor], Y: Tensor, G: Tensor, task_weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the adjoint of G, the gradients of the matrices) for Y, the adjoint of MC(G).

    The gradients of the matrices are summed over tasks with task_weights [T].
    """
    if "scale" in modes:
        return Y * modes["scale"], {"scale": torch.tensordot(task_weights, Y * G, 1)}
    Y, G = (X.flatten(3) if X.dim() > 3 else X for X in (Y, G))
    stages = [G]
    for mode, matrix in modes.items():
        stages.append(along(AXES[mode], matrix, stages[-1]))
    grads = {}
    for (mode, matrix), before in zip(reversed(modes.items()), reversed(stages[:-1])):
        axis = AXES[mode]
        weighted = torch.einsum("t...,t->t...", Y, task_weights)
        grads[mode] = weighted.movedim(axis, 0).flatten(1) @ before.movedim(axis, 0).flatten(1).T
        Y = along(axis, matrix.T, Y)
    return Y, grads


def along(axis: int, matrix: Tensor, G: Tensor) -> Tensor:
    """The mode product G x_axis matrix: multiplies every vector of G along the axis by the matrix."""
    return (G.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
