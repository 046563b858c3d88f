"""MAML++: multi-step loss, learned rates per step and tensor, batch norm per step (Antoniou et al. 2019)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastmaml.algorithms import per_step_batch_norm
from fastmaml.algorithms.learner import Adapted, Batch, Gradients, Learner, LearnerOutput
from fastmaml.engine.engine import Engine
from fastmaml.engine.options import MetaGradientOptions
from fastmaml.inner import Optimizer, optimizer_of
from fastmaml.problem.checks import number, whole_number
from fastmaml.problem.losses import Loss
from fastmaml.problem.parameters import ParameterLayout
from fastmaml.problem.results import Adaptation, MetaGradient

BN_STATS = ("batch", "running_per_step")
MOMENTUM = 0.1  # of the running statistics


class MAMLPlusPlus(Learner):
    """phi[k+1] = phi[k] - alpha[k, tensor] * grad L_support(phi[k]); the loss is sum_k w_k L_query(phi[k]).

    msl_epochs: E of the multi-step loss (section 4, "MSL"). In epoch e < E the weights move from equal to the last step:

        w_i = max(1/K - e/(K E), 0.03/K),    w_K = min(1/K + e(K-1)/(K E), 1 - (K-1) 0.03/K)

    From epoch E on, w_K = 1 and the others are 0.

    learn_rates ("LSLR"): every adapted tensor has a learned rate for each step, "inner_lr.NAME" [K, 1, .., 1].
    The rates start at inner_lr (default 0.1), and their sign is free. False: inner_lr is one fixed rate.

    per_step_norm ("BNWB"): every batch norm's gamma and beta have a row for each step, "step_rows.NAME" [K, C].
    Row k serves the support pass of step k and the query pass after this step. The rows start at the model's own gamma
    and beta. They are meta-trained, not adapted.
    adapt_norm: adapt gamma and beta as any other parameter instead, with one value for all steps.

    da_epochs ("DA", derivative-order annealing): first order while epoch <= da_epochs. -1, as in all released configs:
    never.

    bn_stats ("BNRS"): "batch" normalises with the current batch in training and at test, as the released code computes.
    "running_per_step" keeps a running mean and variance for each step: "running_mean" and "running_var" [K, R].
    Training updates them (momentum 0.1, unbiased variances), and adapt() uses them in eval mode.
    Each training step then runs a second inner loop, one task at a time.

    steps_per_epoch: outer steps in an epoch; at_step counts them.
    inner: an optimizer of fm.inner, instead of inner_lr. The other arguments are Learner's.
    Inner steps beyond inner_steps reuse the last rate, row and statistics.
    The trainer does cosine annealing, clipping and the ensemble of checkpoints.
    Raises ValueError for values out of range, and for "running_per_step" without batch norm or with another batch_norm
    mode than "transductive".
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float | None = None,
        inner_steps: int = 5,
        loss: Loss = "cross_entropy",
        *,
        msl_epochs: int = 10,
        da_epochs: int = -1,
        steps_per_epoch: int = 500,
        learn_rates: bool = True,
        per_step_norm: bool = True,
        adapt_norm: bool = False,
        bn_stats: str = "batch",
        inner: Optimizer | None = None,
        adapted: str | Sequence[str] = "*",
        **options: Any,
    ):
        steps = whole_number("inner_steps", inner_steps, 1)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        of_norms = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
        norms = [name for name, p in named.items() if id(p) in of_norms and not adapt_norm]
        chosen = ParameterLayout(model).fitting([adapted] if isinstance(adapted, str) else adapted)
        moved = [name for name in chosen if name in named and name not in norms]
        optimizer = optimizer_of(0.1 if inner_lr is None and inner is None else inner_lr, inner)
        rates: Any = optimizer.lr
        if learn_rates:
            number("inner_lr", rates)
            rates = {n: _per_step(named[n].detach().new_full([1] * named[n].dim(), rates), steps) for n in moved}
        super().__init__(model, None, steps, loss, inner=replace(optimizer, lr=rates), adapted=moved, **options)

        rows = norms if per_step_norm else []
        self.step_rows = nn.ParameterDict({n.replace(".", "/"): _per_step(named[n].detach(), steps) for n in rows})
        self.msl_epochs = whole_number("msl_epochs", msl_epochs, 0)
        self.da_epochs = whole_number("da_epochs", da_epochs, -1)
        self.steps_per_epoch = whole_number("steps_per_epoch", steps_per_epoch, 1)
        self.epoch = 0
        if bn_stats not in BN_STATS:
            raise ValueError(f"bn_stats {bn_stats!r} is not one of {', '.join(BN_STATS)}")
        self.keeps_statistics = bn_stats == "running_per_step"
        if self.keeps_statistics:
            if self.engine.batch_norm != "transductive":
                raise ValueError(f"bn_stats='running_per_step' does not go with batch_norm={self.engine.batch_norm!r}")
            zeros = self.engine.flatten().new_zeros(steps, per_step_batch_norm.channels(model))
            self.register_buffer("running_mean", zeros)
            self.register_buffer("running_var", torch.ones_like(zeros))

    def at_step(self, step: int) -> None:
        self.epoch = step // self.steps_per_epoch

    def loss_weights(self) -> Tensor | None:
        """w_0 .. w_K [K+1] in the current epoch. None: only the loss after the last step counts."""
        K, E, e = self.inner_steps, self.msl_epochs, self.epoch
        if e >= E:
            return None
        last = min(1 / K + e * (K - 1) / (K * E), 1 - (K - 1) * 0.03 / K)
        return self.engine.flatten().new_tensor([0.0, *[max(1 / K - e / (K * E), 0.03 / K)] * (K - 1), last])

    def leaves(self) -> dict[str, Tensor]:
        return super().leaves() | {f"row.{name}": row for name, row in self._rows().items()}

    def options(self) -> MetaGradientOptions:
        return replace(super().options(), first_order=self.first_order or self.epoch <= self.da_epochs)

    def call_tensors(self) -> dict[str, Any]:
        return {"loss_weights": self.loss_weights(), "step_rows": self._rows()}

    def meta_step(self, batch: Batch, task_weights: Tensor | None) -> tuple[LearnerOutput, Gradients]:
        found = super().meta_step(batch, task_weights)
        if self.keeps_statistics and self.training:
            self._follow_statistics(batch)
        return found

    def as_output(self, result: MetaGradient, task_weights: Tensor | None) -> tuple[LearnerOutput, Gradients]:
        output, grads = super().as_output(result, task_weights)
        return output, grads | {f"row.{name}": grad for name, grad in (result.step_rows_grad or {}).items()}

    def _rows(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): row for name, row in self.step_rows.items()}

    # ---------------------------------------------------------------- bn_stats="running_per_step"

    def adapt(self, support_x: Tensor, support_y: Tensor, inner_steps: int | None = None) -> Adapted:
        if self.training or not self.keeps_statistics:
            return super().adapt(support_x, support_y, inner_steps)
        own = self.engine
        model = copy.deepcopy(self.model)
        how = (own.backend, own.memory, "frozen", own.label_smoothing, own.precision_in_use)
        engine = Engine(model, own.loss_name, *how)
        per_step_batch_norm.put(model, self.running_mean[0], self.running_var[0])
        now = self._one_step(engine, 0, own.flatten(), support_x, support_y, None, steps=0)
        losses = [now.losses]
        for k in range(self.inner_steps if inner_steps is None else inner_steps):
            row = min(k, self.inner_steps - 1)
            per_step_batch_norm.put(model, self.running_mean[row], self.running_var[row])
            now = self._one_step(engine, k, now.params, support_x, support_y, now.state)
            losses.append(now.losses)
        return Adapted(engine, now.params, torch.cat(losses, dim=1), support_x)

    def _follow_statistics(self, batch: Batch) -> None:
        """Updates the running statistics of every step. Each task's support pass comes before its query pass."""
        support_x, support_y, query_x, _ = batch
        params, state = self.engine.flatten(), None
        for k in range(self.inner_steps):
            before = self._one_step(self.engine, k, params, support_x, support_y, None, steps=0).params
            params, _, state = self._one_step(self.engine, k, params, support_x, support_y, state)
            judged = k == self.inner_steps - 1 or self.epoch < self.msl_epochs
            for task in range(len(params)):
                for point, x in [(before, support_x), (params, query_x)] if judged else [(before, support_x)]:
                    mean, var = per_step_batch_norm.of_batch(self.model, self.engine.unflatten(point[task]), x[task])
                    self.running_mean[k].lerp_(mean, MOMENTUM)
                    self.running_var[k].lerp_(var, MOMENTUM)

    def _one_step(
        self, engine: Engine, k: int, params: Tensor, x: Tensor, y: Tensor, state: Tensor | None, steps: int = 1
    ) -> Adaptation:
        """Runs inner step k alone. steps=0: only writes the rows of step k into the parameters."""
        row = slice(min(k, self.inner_steps - 1), min(k, self.inner_steps - 1) + 1)
        rates = self.inner_lr
        of_step = {n: r[row] for n, r in rates.items()} if isinstance(rates, dict) else rates
        rows = {name: values[row] for name, values in self._rows().items()}
        options = replace(self.options(), inner_steps=steps)
        return engine.adapt_with(params, x, y, of_step, options=options, step_rows=rows, state=state, steps_taken=k)


def _per_step(value: Tensor, steps: int) -> nn.Parameter:
    """A row for each step [steps, *shape]."""
    return nn.Parameter(value.expand(steps, *value.shape).clone())
