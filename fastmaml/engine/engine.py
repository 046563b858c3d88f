"""The Engine: gradients, Hessian-vector products, inner loops and exact meta-gradients of one network and loss.

It checks, chooses and shapes; `compiled` and `autodiff` compute. A network that is not fused runs on autodiff with the
same results; `engine.why` says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmaml.autodiff import adjoint_sweep
from fastmaml.autodiff.conjugate_gradients import STOP, conjugate_gradients
from fastmaml.autodiff.update_rules import UpdateRule, rule_for
from fastmaml.compiled.operators import scaled_parts
from fastmaml.engine import inner_loop_options
from fastmaml.engine.backend import Backend, plain
from fastmaml.engine.curvature import Curvature
from fastmaml.engine.prepared_calls import Key, KnownHvp, KnownMetaGradient, key_of_hvp, key_of_meta_gradient
from fastmaml.problem.results import Adaptation, MetaGradient, Solution
from fastmaml.inner import InnerLr, Optimizer, optimizer_of
from fastmaml.network.trace import Program
from fastmaml.problem import checks
from fastmaml.problem.arrays import any_arrays
from fastmaml.problem.examples import Examples, LoopTensors
from fastmaml.problem.inner_rates import collapse_rates, expand_rates

Method = TypeVar("Method", bound=Callable[..., Any])

_FEW_PARAMETERS = 1 << 15  # above, torch's threads make up for what its calls cost
_STEPS_IN_ONE_PLAN = 16  # of conjugate gradients; a plan holds all of them, and more of them may end early


def _without_graph(method: Method) -> Method:
    """Runs a method without autograd around it and outside inference mode, whose tensors torch.func cannot use."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return method(*args, **kwargs)
        with torch.no_grad():
            return method(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


class Engine(Backend):
    """Exact derivatives of one network and loss for a batch of tasks.

    model: any nn.Module. Its fused layers are listed in the README; anything else runs on the autodiff backend.
    loss: "cross_entropy" (scores [N, C], labels [N]), "mse" (mean over the outputs), or a function
        (output, target) -> [examples]. The loss of a task is the mean over its examples, or sum_i w_i l_i with weights.
    backend: "auto", "cpu", "cuda", "reference" (float64 plain loops), "autodiff", "cuda_emulated" (the CUDA kernels run
        on the host, for tests: slow). "auto" goes with the model: cuda where its parameters are on a CUDA device, cpu
        where they are on the CPU. The environment variable FASTMAML_BACKEND stands in for "auto". A backend that is
        named here and cannot run the model raises; "auto" falls back to autodiff and logs one line, or raises with
        FASTMAML_STRICT=1.
    memory: "low" recomputes activations in the adjoint sweep, "stash" keeps those of the inner steps, "auto" chooses.
        autodiff always recomputes.
    batch_norm: "transductive" (batch statistics everywhere), "support" (the query is normalised with the support set's
        statistics, and differentiated through them), "frozen" (running statistics). Running buffers are never changed.
    precision: "float32", or what the CUDA backends' products of large layers may be computed in on tensor cores: "tf32"
        (operands rounded to 10 bits of mantissa), "tf32x3" or "bf16x3" (split in two of 10 or 7 bits, three products). The
        CPU computes in float32 always.

    Every method takes numpy or cupy arrays as well as tensors, without copies, and returns the kind of its first argument.

    Frozen parameters (requires_grad=False) keep their place in theta: they are not adapted and have zero gradients.
    Unused ones have zero gradients; tied ones one entry and the sum of their gradients. Dropout runs (on autodiff)
    while model.training is set; the Hessian of an inner step replays the masks of its gradient. Each call draws new
    masks. Not safe to call from several threads at once on one model.
    """

    # ---------------------------------------------------------------- parameters

    def flatten(self, model: nn.Module | None = None) -> Tensor:
        """The parameters as one vector [P] in the order of model.named_parameters(); a copy without a graph."""
        return self.layout.flatten(self.parameters.named() if model is None else dict(model.named_parameters()))

    @any_arrays
    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """A vector [P] (or [T, P]) as {name: tensor} (or [T, *shape]): views that keep the graph."""
        checks.vector("theta", theta, self.layout.size)
        return self.layout.split(theta)

    def scaled_parts(self, flat: Tensor, scale: Tensor) -> Sequence[Tensor]:
        """A vector [P] times a scalar, as one tensor for each parameter, each with memory of its own."""
        if self.fused and flat.is_cpu and self.layout.size <= _FEW_PARAMETERS:
            return scaled_parts(flat, scale, self.layout)
        return torch._foreach_mul(self.layout.cut(flat), scale)

    # ---------------------------------------------------------------- one evaluation

    @any_arrays
    @_without_graph
    def forward(self, params: Tensor, x: Tensor, support_x: Tensor | None = None) -> Tensor:
        """The network's output [T, N, ...] for params [P] shared or [T, P], x [T, N, ...].

        With batch_norm="support", support_x [T, M, ...] gives the statistics; without it x gives its own.
        """
        params = self._parameters("params", params)
        x = self._one_tensor("x", x, params)
        checks.examples("x", x, params)
        checks.tasks_of("params", params, x)
        statistics = None
        if support_x is not None and self.batch_norm == "support":
            support_x = self._one_tensor("support_x", support_x, params, as_before=True)
            checks.examples("support_x", support_x, params)
            checks.same_tasks("support_x", support_x, "x", x)
            statistics = plain(support_x)
        program = self._program("x", x, params)
        self._output_shape("x", x if statistics is None else statistics, params, program)
        if program is None:
            return self._as_returned(self._autodiff.begin().forward(self._per_task(params, x), plain(x), statistics))
        if statistics is None and self.batch_norm == "support":
            statistics = plain(x)
        return self._compiled(program).forward(params, plain(x), statistics)

    @any_arrays
    @_without_graph
    def grad(self, params: Tensor, x: Tensor, y: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(loss [T], grad [T, P]) at params [P] shared or [T, P], for x [T, N, ...], y and optional weights [T, N]."""
        params = self._parameters("params", params)
        x = self._one_tensor("x", x, params)
        program, at = self._examples("x", x, "y", y, "weights", weights, params)
        if program is None:
            loss, grad = self._autodiff.begin().grad(self._per_task(params, x), at.weighted())
        else:
            loss, grad = self._compiled(program).grad(params, at)
        return loss, _masked(grad, self._mask(grad))

    @any_arrays
    @_without_graph
    def vjp(self, params: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(output y [T, N, ...], gradient [T, P] of <dy, y> by the parameters) for params [P] or [T, P], dy as y."""
        params = self._parameters("params", params)
        x = self._one_tensor("x", x, params)
        checks.examples("x", x, params)
        checks.tasks_of("params", params, x)
        program = self._program("x", x, params)
        expected = (*x.shape[:2], *self._output_shape("x", x, params, program))
        dy = plain(checks.weights("dy", dy, expected, params))
        if program is None:
            y, grad = self._autodiff.begin().vjp(self._per_task(params, x), plain(x), dy)
        else:
            y, grad = self._compiled(program).vjp(params, plain(x), dy)
        return y, _masked(grad, self._mask(params))

    def hvp(self, params: Tensor, x: Tensor, y: Tensor, v: Tensor, weights: Tensor | None = None) -> Tensor:
        """The Hessian of each task's loss times v [T, P]: [T, P]. Rows and columns of frozen parameters are zero."""
        key = key_of_hvp(self._chosen(), params, x, y, v) if weights is None else None
        call = None if key is None else self._known_hvps.find(key)
        if call is not None and self._mask(params) is None and (found := call.run(params, x, y, v)) is not None:
            return found
        return self._checked_hvp(params, x, y, v, weights, key)

    @any_arrays
    @_without_graph
    def _checked_hvp(
        self, params: Tensor, x: Tensor, y: Tensor, v: Tensor, weights: Tensor | None, key: Key | None
    ) -> Tensor:
        params = self._parameters("params", params)
        x = self._one_tensor("x", x, params)
        program, at = self._examples("x", x, "y", y, "weights", weights, params)
        v = self._direction(v, x, params)
        self._autodiff.begin()
        mask = self._mask(params)
        hv = self._hvp(program, params, at, v, mask)
        # With another backend than before the call the key says the wrong one; labels may have been converted.
        if (
            program is not None
            and key is not None
            and mask is None
            and at.y.dtype == y.dtype
            and key[0] == self._chosen()
        ):
            self._known_hvps.add(key, KnownHvp(self._compiled(program)))
        return hv

    @any_arrays
    @_without_graph
    def curvature(
        self, params: Tensor, x: Tensor, y: Tensor, weights: Tensor | None = None, gauss_newton: bool = False
    ) -> Curvature:
        """The Hessian of each task's loss at params, for many products: hvp's results without its gradient pass each time.

        gauss_newton: J^T L J instead, with J the Jacobian of the outputs by the parameters and L the loss's Hessian by the
        outputs. It is positive semidefinite for the built-in losses, for which it is the Fisher matrix, and the Hessian
        where the gradient by the outputs is zero. Arguments as grad's; they must not change while products are asked for.
        """
        params = self._parameters("params", params)
        x = self._one_tensor("x", x, params)
        program, at = self._examples("x", x, "y", y, "weights", weights, params)
        mask = self._mask(params)
        if program is not None:
            compiled = self._compiled(program)
            tape = compiled.linearise(params, at, gauss_newton)

            def product(v: Tensor) -> Tensor:
                return _masked(compiled.curvature(params, at, gauss_newton, tape, _masked(v, mask)), mask)

            return Curvature(product, x.shape[0], params, tape)
        of_tasks, weighted, packing = self._per_task(params, x), at.weighted(), self._autodiff.inputs
        autodiff, seed = (
            self._autodiff,
            int(torch.randint(2**31, (), dtype=torch.int64)),
        )  # all products see one network

        def by_autodiff(v: Tensor) -> Tensor:
            autodiff.begin(seed).inputs = packing
            if gauss_newton:
                return _masked(autodiff.gauss_newton(of_tasks, weighted, _masked(v, mask)), mask)
            return _masked(autodiff.hvp(of_tasks, weighted, _masked(v, mask))[1], mask)

        return Curvature(by_autodiff, x.shape[0], params, ())

    def _hvp(self, program: Program | None, params: Tensor, at: Examples, v: Tensor, mask: Tensor | None) -> Tensor:
        v = _masked(v, mask)
        if program is None:
            hv = self._autodiff.hvp(self._per_task(params, at.x), at.weighted(), v)[1]
        else:
            hv = self._compiled(program).hvp(params, at, v)[1]
        return _masked(hv, mask)

    @any_arrays
    @_without_graph
    def solve(
        self,
        params: Tensor,
        x: Tensor,
        y: Tensor,
        v: Tensor,
        lam: float,
        steps: int,
        damping: float = 0.0,
        weights: Tensor | None = None,
        *,
        adapted: Sequence[str] | None = None,
        stop: float = STOP,
    ) -> Solution:
        """Solves ((1 + damping) I + H / lam) s = v by conjugate gradients from s = 0, each task by itself.

        v [T, P], lam > 0, at most `steps` Hessian products. adapted: name patterns of the parameters that H is of; its
        other rows and columns are zero, as those of frozen parameters are. A task stops at |r|^2 < stop, or where its
        operator is not positive definite. With v the query gradient, s is iMAML's implicit meta-gradient (Rajeswaran et
        al. 2019, section 3).
        """
        start = self._parameters("params", params)
        inputs = self._one_tensor("x", x, start)
        program, at = self._examples("x", inputs, "y", y, "weights", weights, start)
        v = self._direction(v, inputs, start)
        lam, damping, stop = checks.number("lam", lam), checks.number("damping", damping), checks.number("stop", stop)
        if lam <= 0:
            raise ValueError(f"lam is {lam}; it must be positive")
        if stop < 0:
            raise ValueError(f"stop is {stop}; it must be at least 0")
        steps = checks.whole_number("steps", steps, 1)
        mask = inner_loop_options.moved(self.layout, self._mask(start), adapted, None, start)
        if program is not None and steps <= _STEPS_IN_ONE_PLAN:
            return self._compiled(program).solve(start, at, v, lam, steps, damping, stop, mask)
        hessian = self.curvature(params, x, y, weights)

        def operator(p: Tensor) -> Tensor:
            return (1.0 + damping) * p + _masked(hessian.product(_masked(p, mask)), mask) / lam

        return conjugate_gradients(operator, v, steps, stop)

    @any_arrays
    @_without_graph
    def loss(self, output: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss [T] of outputs [T, N, ...] against y, with optional weights [T, N]."""
        outputs = (pytree.tree_map(lambda part: part[t], output) for t in range(len(y)))  # noqa: B023
        losses = torch.stack([self._loss(of_task, target) for of_task, target in zip(outputs, y)])
        return losses.mean(1) if weights is None else (losses * weights).sum(1)

    # ---------------------------------------------------------------- inner loops

    @any_arrays
    def adapt(
        self,
        theta: Tensor,
        x: Tensor,
        y: Tensor,
        inner_lr: InnerLr | None = None,
        inner_steps: int = 1,
        weights: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The adapted parameters [T, P] after inner_steps from theta [P] or [T, P]; options as adapt_with's."""
        return self.adapt_with(theta, x, y, inner_lr, inner_steps, weights, **options).params

    @any_arrays
    @_without_graph
    def adapt_with(
        self,
        theta: Tensor,
        x: Tensor,
        y: Tensor,
        inner_lr: InnerLr | None = None,
        inner_steps: int = 1,
        weights: Tensor | None = None,
        *,
        inner: Optimizer | None = None,
        adapted: Sequence[str] | None = None,
        minibatch: int | None = None,
        step_rows: Mapping[str, Tensor] | None = None,
        proximal: float | Tensor | None = None,
        state: Tensor | None = None,
        steps_taken: int = 0,
        rule: UpdateRule | None = None,
    ) -> Adaptation:
        """As adapt, with the losses before each step and the optimizer's state. Options as in meta_gradient.

        state [T, S P] and steps_taken continue an earlier loop's optimizer.
        """
        theta = self._parameters("theta", theta)
        x = self._one_tensor("support_x", x, theta)
        optimizer = optimizer_of(inner_lr, inner)
        loop = inner_loop_options.inner_loop(
            self.layout, optimizer, inner_steps, step_rows, minibatch=minibatch, proximal=proximal is not None
        )
        program, at = self._examples(
            "support_x",
            x,
            "support_y",
            y,
            "weights",
            weights,
            theta,
            minibatch=inner_loop_options.minibatch_of(loop, x),
        )
        mask = inner_loop_options.moved(self.layout, self._mask(theta), adapted, step_rows, theta)
        rows, lam = inner_loop_options.rows(self.layout, step_rows, theta), inner_loop_options.proximal_weight(proximal)
        rates = expand_rates(optimizer.lr, self.layout, mask, theta, loop.steps)
        if state is not None:
            expected = (x.shape[0], optimizer.vectors * self.layout.size)
            state = plain(checks.weights("state", state, expected, theta))
        if program is not None and rule is None:
            tensors = LoopTensors(rates, rows, lam, mask)
            params, losses, after = self._compiled(program).adapt(theta, at, loop, tensors, state, steps_taken)
            return Adaptation(params, losses, after if after.numel() else None)
        own = rule or rule_for(optimizer, rates, mask, state, steps_taken)
        params, losses = adjoint_sweep.adapt(
            self._derivatives(program), self._per_task(theta, x), at.weighted(minibatch), loop, own, rows, lam
        )
        return Adaptation(params.contiguous(), losses, getattr(own, "state", None))

    def meta_gradient(
        self,
        theta: Tensor | Mapping[str, Tensor],
        batch: Sequence[Tensor],
        inner_lr: InnerLr | None = None,
        inner_steps: int = 1,
        first_order: bool = False,
        support_weights: Tensor | None = None,
        query_weights: Tensor | None = None,
        task_weights: Tensor | None = None,
        inner_lr_grad: bool = True,
        *,
        inner: Optimizer | None = None,
        truncate: int | None = None,
        loss_weights: Tensor | None = None,
        minibatch: int | None = None,
        step_rows: Mapping[str, Tensor] | None = None,
        proximal: float | Tensor | None = None,
        adapted: Sequence[str] | None = None,
        per_task: bool = False,
        rule: UpdateRule | None = None,
    ) -> MetaGradient:
        """The exact gradient of the query loss after the inner loop, for a batch of tasks (Finn et al. 2017, eq. 1).

        theta [P], or the parameters by name. batch: support_x [T, S, ...], support_y, query_x [T, Q, ...], query_y.
        inner_lr: a number, a tensor [] or [P], a row per step [K, 1] or [K, P], or a dict from parameter names to
        numbers, tensors [] or of the parameter's shape, each also with a dimension [K] in front; or `inner`, an
        optimizer of fm.inner with such rates. inner_lr_grad has the same form. Weights: support [T, S] and query
        [T, Q] of the examples in their loss (default 1/S, 1/Q), task_weights [T] of the tasks in grad (default 1/T).

        first_order drops the Hessian terms at every step; truncate=J keeps those of the last J steps and takes the
        earlier part of the loop as constant. loss_weights [K+1]: the loss is sum_k loss_weights[k] L_Q(phi[k])
        (MAML++'s multi-step loss). minibatch=B: support holds K B examples, of which step k sees the k-th B.
        step_rows {name: [K, *shape]}: parameters that are not adapted but have a value for every step; theta's own
        entries do not count. proximal=lam adds lam (phi - theta) to each step's gradient. adapted: name patterns of
        the parameters that the inner loop moves (default: all). per_task: theta may be [T, P], and gradients are those
        of each task. rule: an own update rule (update_rules.UpdateRule) instead of the optimizer's.

        Raises ValueError or TypeError for anything that does not fit.
        """
        parts = self.layout.parts(theta) if isinstance(theta, Mapping) else [theta]
        key = None
        ordinary = (
            support_weights is query_weights is task_weights is loss_weights is None
            and minibatch is None
            and step_rows is None
            and proximal is None
            and adapted is None
            and rule is None
            and not per_task
            and (inner_lr is None) != (inner is None)
        )
        if ordinary:
            order, rates = 0 if first_order else truncate, inner_lr if inner is None else inner
            key = key_of_meta_gradient(self._chosen(), parts, batch, rates, inner_steps, order, inner_lr_grad)
            call = None if key is None else self._known_meta_gradients.find(key)
            if call is not None and self._mask(parts[0]) is None and (found := call.run(parts, batch)) is not None:
                return found
        return self._checked_meta_gradient(
            self.layout.flatten(theta) if isinstance(theta, Mapping) else theta,
            batch,
            inner_lr,
            inner_steps,
            first_order,
            support_weights,
            query_weights,
            task_weights,
            inner_lr_grad,
            inner=inner,
            truncate=truncate,
            loss_weights=loss_weights,
            minibatch=minibatch,
            step_rows=step_rows,
            proximal=proximal,
            adapted=adapted,
            per_task=per_task,
            rule=rule,
            key=key,
        )

    @any_arrays
    @_without_graph
    def _checked_meta_gradient(
        self,
        theta: Tensor,
        batch: Sequence[Tensor],
        inner_lr: InnerLr | None = None,
        inner_steps: int = 1,
        first_order: bool = False,
        support_weights: Tensor | None = None,
        query_weights: Tensor | None = None,
        task_weights: Tensor | None = None,
        inner_lr_grad: bool = True,
        *,
        inner: Optimizer | None = None,
        truncate: int | None = None,
        loss_weights: Tensor | None = None,
        minibatch: int | None = None,
        step_rows: Mapping[str, Tensor] | None = None,
        proximal: float | Tensor | None = None,
        adapted: Sequence[str] | None = None,
        per_task: bool = False,
        rule: UpdateRule | None = None,
        key: Key | None = None,
    ) -> MetaGradient:
        if not isinstance(batch, (tuple, list)) or len(batch) != 4:
            raise TypeError("batch must be (support_x, support_y, query_x, query_y)")
        support_x, support_y, query_x, query_y = batch
        theta = self._parameters("theta", theta)
        support_x = self._one_tensor("support_x", support_x, theta)
        query_x = self._one_tensor("query_x", query_x, theta, as_before=True)
        if theta.dim() != 1 and not per_task:
            raise ValueError(
                f"theta {checks.shape(theta)} must be one start [{self.layout.size}] for all tasks, or per_task=True"
            )
        optimizer = optimizer_of(inner_lr, inner)
        loop = inner_loop_options.inner_loop(
            self.layout,
            optimizer,
            inner_steps,
            step_rows,
            order=0 if first_order else truncate,
            minibatch=minibatch,
            queries=inner_loop_options.queries(loss_weights, inner_steps),
            proximal=proximal is not None,
            per_task=bool(per_task),
            rate_grad=bool(inner_lr_grad),
        )
        program, support = self._examples(
            "support_x",
            support_x,
            "support_y",
            support_y,
            "support_weights",
            support_weights,
            theta,
            minibatch=inner_loop_options.minibatch_of(loop, support_x),
        )
        _, query = self._examples(
            "query_x", query_x, "query_y", query_y, "query_weights", query_weights, theta, support_x
        )
        tasks = support_x.shape[0]
        if task_weights is not None:
            task_weights = checks.weights("task_weights", task_weights, (tasks,), theta)

        def over_tasks(of: Tensor) -> Tensor:
            of_task = task_weights if task_weights is not None else theta.new_full((tasks,), 1.0 / tasks)
            return torch.tensordot(of_task, of, 1)

        trainable = self._mask(theta)
        mask = inner_loop_options.moved(self.layout, trainable, adapted, step_rows, theta)
        rows, lam = inner_loop_options.rows(self.layout, step_rows, theta), inner_loop_options.proximal_weight(proximal)
        rates = expand_rates(optimizer.lr, self.layout, mask, theta, loop.steps)
        if program is not None and rule is None:
            tensors = LoopTensors(rates, rows, lam, mask)
            compiled = self._compiled(program)
            result: Any = compiled.meta_gradient(
                theta, support, query, loop, tensors, loss_weights, None if per_task else task_weights
            )
            # With another backend than before the call the key says the wrong one; labels may have been converted.
            as_given = support.y.dtype == support_y.dtype and query.y.dtype == query_y.dtype
            if (
                key is not None
                and mask is None
                and as_given
                and key[0] == self._chosen()
                and isinstance(optimizer.lr, float)
            ):
                call = KnownMetaGradient(compiled, loop.text(), optimizer.lr, loop.rate_grad)
                self._known_meta_gradients.add(key, call)
            grad, rate_grad, rows_grad = result.grad, result.rate_grad, result.rows_grad
            total = None if result.total_loss.dim() else result.total_loss
        else:
            total = None
            result = adjoint_sweep.meta_gradient(
                self._derivatives(program),
                self._per_task(theta, support_x),
                support.weighted(minibatch),
                query.weighted(),
                loop,
                rule or rule_for(optimizer, rates, mask),
                len(rates),
                loss_weights,
                rows,
                lam,
                support.x if self.batch_norm == "support" else None,
            )
            grad, rate_grad, rows_grad = (
                of if of is None or per_task else over_tasks(of)
                for of in (result.grad, result.rate_grad, result.rows_grad)
            )
        grad = _masked(grad, trainable)
        by_name = None
        if rows is not None and step_rows is not None:
            rows_grad[..., 0, :] += grad[..., rows.places]
            grad = grad.index_fill(-1, rows.places, 0.0)
            by_name = inner_loop_options.by_name(step_rows, rows_grad)
        of_rates = None
        if loop.rate_grad:
            reduced = over_tasks(rate_grad) if per_task else rate_grad
            of_rates = collapse_rates(reduced, optimizer.lr, self.layout, mask, theta)
        output = self._as_returned(result.output) if program is None else result.output
        losses = (result.support_losses, by_name, result.query_losses)
        return MetaGradient(result.loss, grad, output, of_rates, *losses, total)

    @any_arrays
    @_without_graph
    def check_batch(self, batch: Sequence[Tensor]) -> None:
        """Raises ValueError or TypeError, as meta_gradient does, where support and query sets do not fit the model."""
        theta = self.flatten()
        support_x = self._one_tensor("support_x", batch[0], theta)
        self._examples("support_x", support_x, "support_y", batch[1], "support_weights", None, theta)
        query_x = self._one_tensor("query_x", batch[2], theta, as_before=True)
        self._examples("query_x", query_x, "query_y", batch[3], "query_weights", None, theta, support_x)

    # ---------------------------------------------------------------- calls

    def _chosen(self) -> tuple[str, str, str]:
        return (self.backend, self.memory, self.precision)

    def _derivatives(self, program: Program | None) -> adjoint_sweep.Derivatives:
        return self._autodiff.begin() if program is None else self._compiled(program)

    def _per_task(self, params: Tensor, x: Tensor) -> Tensor:
        return params.expand(x.shape[0], -1) if params.dim() == 1 else params

    def _mask(self, like: Tensor) -> Tensor | None:
        return self.layout.trainable(self.parameters.named().values(), like)


def _masked(vector: Tensor, mask: Tensor | None) -> Tensor:
    return vector if mask is None else vector * mask
