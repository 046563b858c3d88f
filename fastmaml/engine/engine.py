"""The Engine: gradients, Hessian-vector products, inner loops and exact meta-gradients of one network and loss.

An Engine holds a BackendChoice and its Inputs, which check the arguments. `compiled` and `autodiff` compute.
A network that is not fused runs on autodiff with the same results; `engine.why` gives the reason.
The file is long because it is the public face: every method documents its arguments, and hands the work on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmaml.autodiff.conjugate_gradients import STOP, conjugate_gradients
from fastmaml.autodiff.update_rules import UpdateRule
from fastmaml.compiled.operators import scaled_parts
from fastmaml.engine import meta_gradient as sweeps
from fastmaml.engine.backend import BackendChoice
from fastmaml.engine.curvature import Curvature
from fastmaml.engine.inner_loop_options import adapted_mask
from fastmaml.engine.inputs import ONE_SET, QUERY, SUPPORT, Inputs, plain
from fastmaml.engine.meta_gradient import masked, per_task
from fastmaml.engine.options import CallTensors, MetaGradientOptions, as_patterns, options_of
from fastmaml.engine.prepared_calls import Key, PreparedCall, PreparedCalls, PreparedHvp
from fastmaml.inner import InnerLr, Optimizer, optimizer_of
from fastmaml.network.trace import Program
from fastmaml.problem import checks
from fastmaml.problem.arrays import any_arrays
from fastmaml.problem.examples import Examples
from fastmaml.problem.losses import Loss
from fastmaml.problem.named_parameters import NamedParameters
from fastmaml.problem.results import Adaptation, MetaGradient, Solution

Method = TypeVar("Method", bound=Callable[..., Any])

_FEW_PARAMETERS = 1 << 15  # above this, torch's threads outweigh the overhead of its calls
_STEPS_IN_ONE_PLAN = 16  # of conjugate gradients: a plan holds every step, and more steps are likely to end early
_requires_grad = attrgetter("requires_grad")
_is_none = functools.partial(is_, None)


def _without_graph(method: Method) -> Method:
    """Runs a method under no_grad and outside inference mode. torch.func cannot use inference tensors."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return method(*args, **kwargs)
        with torch.no_grad():
            return method(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


class Engine:
    """Exact derivatives of one network and loss for a batch of tasks.

        engine = fm.Engine(model, loss="cross_entropy")
        mg = engine.meta_gradient(engine.flatten(), batch, inner_lr=0.4, inner_steps=5)    # mg.loss [T], mg.grad [P]

    model: any nn.Module. The README lists the fused layers. A model with any other layer runs on autodiff.
    loss: "cross_entropy" (scores [N, C], labels [N]), "mse" (mean over the outputs), or a function
        (output, target) -> [examples]. A task's loss is the mean over its examples. With weights it is sum_i w_i l_i.
    backend: "auto", "cpu", "cuda", "reference", "autodiff" or "cuda_emulated".
        "auto" follows the model's parameters: "cuda" on a CUDA device, "cpu" on the CPU.
        "reference" runs plain loops in float64. "cuda_emulated" runs the CUDA kernels on the host; it is slow, for tests.
        The environment variable FASTMAML_BACKEND replaces "auto".
        If "auto" cannot use the compiled kernels, it logs one line and runs autodiff. With FASTMAML_STRICT=1 it raises.
        Any backend that you name here raises if it cannot run the model.
    memory: "low" recomputes activations in the adjoint sweep. "stash" keeps the activations of the inner steps.
        "auto" chooses. autodiff always recomputes.
    batch_norm: "transductive" uses batch statistics everywhere. "support" normalises the query with the support set's
        statistics, and differentiates through them. "frozen" uses the running statistics.
        The running buffers never change.
    label_smoothing: between 0 and 1, with loss="cross_entropy" only.
    precision: "float32", "tf32", "tf32x3" or "bf16x3": how CUDA backends may multiply large layers on tensor cores.
        "tf32" rounds the operands to 10 bits of mantissa. "tf32x3" and "bf16x3" split each operand into two parts,
        of 10 or 7 bits, and take three products. The CPU always computes in the parameters' type.

    Every method takes tensors, numpy arrays or cupy arrays, without copies. It returns the kind of its first argument.

    Frozen parameters (requires_grad=False) keep their place in theta, do not adapt, and have zero gradients.
    Unused parameters have zero gradients. Tied parameters share one entry, which holds the sum of their gradients.
    Dropout runs on autodiff while model.training is set. Each call draws new masks. The Hessian of an inner step uses
    the masks of this step's gradient.
    Do not call one Engine, or several Engines of one model, from several threads at once.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = "cross_entropy",
        backend: str = "auto",
        memory: str = "auto",
        batch_norm: str = "transductive",
        label_smoothing: float = 0.0,
        precision: str = "float32",
    ):
        self.choice = BackendChoice(model, loss, backend, memory, batch_norm, label_smoothing, precision)
        self.model = model
        self.layout = self.choice.layout
        self.parameters = NamedParameters(model)
        self.inputs = Inputs(self.choice, self.parameters)
        self._prepared: PreparedCalls[PreparedCall] = PreparedCalls()
        self._prepared_hvps: PreparedCalls[PreparedHvp] = PreparedCalls()

    # ---------------------------------------------------------------- which backend

    @property
    def backend(self) -> str:
        """The backend that runs the network."""
        return self.choice.backend

    @property
    def fused(self) -> bool:
        """Whether the compiled kernels run this network."""
        return self.choice.fused

    @property
    def why(self) -> str:
        """Why the network or its loss is not fused, and how tasks run if vmap cannot. "" if everything is fused."""
        return self.choice.why

    @property
    def memory(self) -> str:
        """ "auto", "low" or "stash". You can change it between calls."""
        return self.choice.memory

    @memory.setter
    def memory(self, mode: str) -> None:
        self.choice.memory = mode

    # What the choice was made with. Assigning to one raises: a choice cannot follow it.
    loss_name = property(attrgetter("choice.loss_name"))
    batch_norm = property(attrgetter("choice.batch_norm"))
    precision = property(attrgetter("choice.precision"))
    label_smoothing = property(attrgetter("choice.label_smoothing"))

    @property
    def precision_in_use(self) -> str:
        """The chosen precision on CUDA backends. "float32" on the others, which compute in the parameters' type."""
        return self.choice.precision_in_use

    def program(self, x: Tensor) -> Program | None:
        """The Program that runs examples x [T, N, ...]; None on autodiff. Raises ValueError if x does not fit."""
        return self.choice.program("x", x, self.flatten())

    def __repr__(self) -> str:
        state = f"backend={self.backend!r}, batch_norm={self.batch_norm!r}, parameters={self.layout.size}"
        return f"Engine({type(self.model).__name__}, loss={self.loss_name!r}, {state})"

    # ---------------------------------------------------------------- parameters

    def flatten(self, model: nn.Module | None = None) -> Tensor:
        """The parameters as one vector [P], in the order of model.named_parameters(). The result is a copy without a graph.

        model: a model with the same parameters. Default: the Engine's own.
        """
        return self.layout.flatten(self.parameters.named() if model is None else dict(model.named_parameters()))

    @any_arrays
    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """{name: tensor} from a vector [P]; from [T, P], each tensor is [T, *shape]. The views keep the graph."""
        checks.vector("theta", theta, self.layout.size)
        return self.layout.split(theta)

    def scaled_parts(self, flat: Tensor, scale: Tensor) -> Sequence[Tensor]:
        """A vector [P] times a scalar, as one tensor per parameter. Each tensor has its own memory."""
        if self.fused and flat.is_cpu and self.layout.size <= _FEW_PARAMETERS:
            return scaled_parts(flat, scale, self.layout)
        return torch._foreach_mul(self.layout.cut(flat), scale)

    # ---------------------------------------------------------------- one evaluation

    @any_arrays
    @_without_graph
    def forward(self, params: Tensor, x: Tensor, support_x: Tensor | None = None) -> Tensor:
        """The network's output [T, N, ...] for x [T, N, ...]. params: [P] for all tasks, or [T, P].

        support_x [T, M, ...]: gives the statistics if batch_norm="support". Default: x.
        """
        inputs, statistics = self.inputs, None
        params = inputs.parameters("params", params)
        x = inputs.one_tensor("x", x, params)
        checks.examples("x", x, params)
        checks.tasks_of("params", params, x)
        if support_x is not None and self.batch_norm == "support":
            support_x = inputs.one_tensor("support_x", support_x, params, as_before=True)
            checks.examples("support_x", support_x, params)
            checks.same_tasks("support_x", support_x, "x", x)
            statistics = plain(support_x)
        program = self.choice.program("x", x, params)
        inputs.output_shape("x", x if statistics is None else statistics, params, program)
        if program is None:
            output = self.choice.autodiff.begin().forward(per_task(params, x), plain(x), statistics)
            return inputs.as_returned(output)  # type: ignore[no-any-return]
        if statistics is None and self.batch_norm == "support":
            statistics = plain(x)
        return self.choice.compiled(program).forward(params, plain(x), statistics)

    @any_arrays
    @_without_graph
    def grad(self, params: Tensor, x: Tensor, y: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(loss [T], grad [T, P]) on x [T, N, ...] and y. params: [P] for all tasks, or [T, P].

        weights [T, N]: of the examples in the loss. Default: 1/N each.
        """
        params, program, examples = self._one_set(params, x, y, weights)
        if program is None:
            loss, grad = self.choice.autodiff.begin().grad(per_task(params, examples.x), examples.weighted())
        else:
            loss, grad = self.choice.compiled(program).grad(params, examples)
        return loss, masked(grad, self.inputs.trainable(grad))

    @any_arrays
    @_without_graph
    def vjp(self, params: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(output y [T, N, ...], gradient [T, P] of <dy, y> by the parameters). params: [P] or [T, P]. dy: shaped as y."""
        params = self.inputs.parameters("params", params)
        program, x = self.inputs.inputs_alone(x, params)
        expected = (*x.shape[:2], *self.inputs.output_shape("x", x, params, program))
        dy = plain(checks.weights("dy", dy, expected, params))
        if program is None:
            y, grad = self.choice.autodiff.begin().vjp(per_task(params, x), plain(x), dy)
        else:
            y, grad = self.choice.compiled(program).vjp(params, plain(x), dy)
        return y, masked(grad, self.inputs.trainable(params))

    def hvp(self, params: Tensor, x: Tensor, y: Tensor, v: Tensor, weights: Tensor | None = None) -> Tensor:
        """H[t] v[t] for v [T, P]: [T, P], with H[t] the Hessian of task t's loss. Other arguments as in `grad`.

        Rows and columns of frozen parameters are zero.
        """
        key = None
        if weights is None:
            key, call = self._prepared_hvps.find(self.choice.settings, (params,), (x, y, v))
            if call is not None and self._all_trainable() and (found := call.run(params, x, y, v)) is not None:
                return found
        return self._prepare_hvp(params, x, y, v, weights, key)

    @any_arrays
    @_without_graph
    def _prepare_hvp(
        self, params: Tensor, x: Tensor, y: Tensor, v: Tensor, weights: Tensor | None, key: Key | None
    ) -> Tensor:
        settings = self.choice.settings
        params, program, examples = self._one_set(params, x, y, weights)
        v = self.inputs.direction(v, examples.x, params)
        self.choice.autodiff.begin()
        mask = self.inputs.trainable(params)
        v = masked(v, mask)
        if program is None:
            hv = self.choice.autodiff.hvp(per_task(params, examples.x), examples.weighted(), v)[1]
        else:
            hv = self.choice.compiled(program).hvp(params, examples, v)[1]
        # Not kept if this call fell back to another backend, or converted the labels: the key would be wrong.
        same = settings == self.choice.settings and examples.y.dtype == y.dtype
        if key is not None and program is not None and mask is None and same:
            self._prepared_hvps.keep(key, PreparedHvp(self.choice.compiled(program)))
        return masked(hv, mask)

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
        params, program, examples = self._one_set(params, x, y, weights)
        mask = self.inputs.trainable(params)
        if program is not None:
            compiled = self.choice.compiled(program)
            tape = compiled.linearise(params, examples, gauss_newton)

            def product(v: Tensor) -> Tensor:
                return masked(compiled.curvature(params, examples, gauss_newton, tape, masked(v, mask)), mask)

            return Curvature(product, examples.x.shape[0], params, tape)
        of_tasks, weighted, packing = per_task(params, examples.x), examples.weighted(), self.choice.autodiff.inputs
        autodiff, seed = self.choice.autodiff, int(torch.randint(2**31, (), dtype=torch.int64))  # one network for all

        def by_autodiff(v: Tensor) -> Tensor:
            autodiff.begin(seed).inputs = packing
            if gauss_newton:
                return masked(autodiff.gauss_newton(of_tasks, weighted, masked(v, mask)), mask)
            return masked(autodiff.hvp(of_tasks, weighted, masked(v, mask))[1], mask)

        return Curvature(by_autodiff, examples.x.shape[0], params, ())

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
        adapted: str | Sequence[str] | None = None,
        stop: float = STOP,
    ) -> Solution:
        """Solves ((1 + damping) I + H / lam) s = v by conjugate gradients from s = 0, each task by itself.

        v [T, P], lam > 0, at most `steps` Hessian products. adapted: name patterns of parameters. H has rows and columns
        for these alone, and none for frozen parameters. A task stops at |r|^2 < stop, or where its operator is not
        positive definite. A task with NaN in v gets NaN in s. With v the query gradient, s is iMAML's implicit
        meta-gradient (Rajeswaran et al. 2019, section 3).
        """
        start, program, examples = self._one_set(params, x, y, weights)
        v = self.inputs.direction(v, examples.x, start, finite_only=False)
        lam, damping, stop = checks.number("lam", lam), checks.number("damping", damping), checks.number("stop", stop)
        if lam <= 0:
            raise ValueError(f"lam is {lam}; it must be positive")
        if stop < 0:
            raise ValueError(f"stop is {stop}; it must be at least 0")
        steps = checks.whole_number("steps", steps, 1)
        mask = adapted_mask(self.layout, self.inputs.trainable(start), as_patterns(adapted), None, start)
        if program is not None and steps <= _STEPS_IN_ONE_PLAN:
            return self.choice.compiled(program).solve(start, examples, v, lam, steps, damping, stop, mask)
        hessian = self.curvature(params, x, y, weights)

        def operator(p: Tensor) -> Tensor:
            return (1.0 + damping) * p + masked(hessian.product(masked(p, mask), finite_only=False), mask) / lam

        return conjugate_gradients(operator, v, steps, stop)

    @any_arrays
    @_without_graph
    def loss(self, output: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss [T] of outputs [T, N, ...] and targets y. weights [T, N]: of the examples; default 1/N each."""
        outputs = (pytree.tree_map(lambda part: part[t], output) for t in range(len(y)))  # noqa: B023
        losses = torch.stack([self.choice.loss(of_task, target) for of_task, target in zip(outputs, y)])
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
        """The adapted parameters [T, P] after inner_steps from theta [P] or [T, P]. Keywords as in adapt_with."""
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
        options: MetaGradientOptions | None = None,
        inner: Optimizer | None = None,
        adapted: str | Sequence[str] | None = None,
        minibatch: int | None = None,
        step_rows: Mapping[str, Tensor] | None = None,
        proximal: float | Tensor | None = None,
        state: Tensor | None = None,
        steps_taken: int = 0,
        rule: UpdateRule | None = None,
    ) -> Adaptation:
        """Adapts theta [P] or [T, P] on the support sets x [T, S, ...], y. Arguments as in meta_gradient.

        The result holds params [T, P], the losses [T, K] before each step, and the optimizer's state.
        options: only inner_steps, inner, minibatch and adapted are used.
        state [T, S P], steps_taken: continue the optimizer of an earlier loop, with S state vectors per task.
        """
        if options is None:
            optimizer = optimizer_of(inner_lr, inner)
            inner_lr = optimizer.lr
            options = MetaGradientOptions(
                inner_steps, inner=optimizer.without_rates, minibatch=minibatch, adapted=as_patterns(adapted)
            )
        elif (inner_steps, inner, adapted, minibatch) != (1, None, None, None):
            raise TypeError(_BOTH)
        given = CallTensors(inner_lr, weights, step_rows=step_rows, proximal=proximal, rule=rule)
        return sweeps.adapt(self.inputs, theta, (x, y), options, given, state, steps_taken)

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
        options: MetaGradientOptions | None = None,
        inner: Optimizer | None = None,
        truncate: int | None = None,
        loss_weights: Tensor | None = None,
        minibatch: int | None = None,
        step_rows: Mapping[str, Tensor] | None = None,
        proximal: float | Tensor | None = None,
        adapted: str | Sequence[str] | None = None,
        per_task: bool = False,
        rule: UpdateRule | None = None,
    ) -> MetaGradient:
        """The exact gradient of the query loss after the inner loop, for a batch of tasks (Finn et al. 2017, eq. 1).

            mg = engine.meta_gradient(theta, batch, inner_lr=0.4, inner_steps=5)    # mg.loss [T], mg.grad [P]

        theta: [P], or a dict of the parameters by name.
        batch: (support_x [T, S, ...], support_y, query_x [T, Q, ...], query_y).

        Settings: inner_steps, first_order, truncate, inner, inner_lr_grad, minibatch, adapted and per_task. Give them as
        keywords, or together as options=MetaGradientOptions(...), which documents each one.

        inner_lr: the inner learning rates, in one of these forms. The result's inner_lr_grad has the same form.
            A number; a tensor [] or [P]; or a row per step, [K, 1] or [K, P].
            A dict from parameter names to numbers, tensors [], or tensors of the parameter's shape. Each tensor may
            have one more dimension [K] in front.
        inner: an optimizer of fm.inner with rates in one of these forms, instead of inner_lr.
        support_weights [T, S], query_weights [T, Q]: of the examples in their loss. Default: 1/S and 1/Q.
        task_weights [T]: of the tasks in grad. Default: 1/T.
        loss_weights [K+1]: the loss is sum_k loss_weights[k] L_Q(phi[k]), the multi-step loss of MAML++.
        step_rows {name: [K, *shape]}: parameters with one value per inner step, which do not adapt. Their entries in
            theta are not used.
        proximal: lam; adds lam (phi - theta) to each step's gradient.
        rule: a custom update rule (update_rules.UpdateRule) instead of the optimizer's.

        Raises ValueError or TypeError if an argument does not fit; the sentence holds the shapes.
        """
        by_name = not isinstance(theta, Tensor) and (type(theta) is dict or isinstance(theta, Mapping))
        parts: Sequence[Tensor] = self.layout.parts(theta) if by_name else (theta,)  # type: ignore[arg-type,assignment]
        if options is None:
            kind = None
            if inner is not None:
                inner_lr, kind = optimizer_of(inner_lr, inner).lr, inner.without_rates
            patterns = None if adapted is None else as_patterns(adapted)
            options = options_of(inner_steps, first_order, truncate, kind, inner_lr_grad, minibatch, patterns, per_task)
        elif (inner_steps, first_order, truncate, inner, inner_lr_grad, minibatch, adapted, per_task) != _DEFAULTS:
            raise TypeError(_BOTH)
        key = None
        extra: Sequence[Any] = support_weights, query_weights, task_weights, loss_weights, step_rows, proximal, rule
        if type(inner_lr) is float and options.is_simple and all(map(_is_none, extra)):
            key, call = self._prepared.find((self.choice.settings, options, inner_lr), parts, batch)
            if call is not None and self._all_trainable() and (found := call.run(parts, batch)) is not None:
                return found
        given = CallTensors(inner_lr, *extra)
        vector = self.layout.flatten(theta) if by_name else theta  # type: ignore[arg-type]
        return self._prepare(vector, batch, options, given, key)  # type: ignore[arg-type]

    @any_arrays
    @_without_graph
    def _prepare(
        self, theta: Tensor, batch: Sequence[Tensor], options: MetaGradientOptions, given: CallTensors, key: Key | None
    ) -> MetaGradient:
        found, call = sweeps.meta_gradient(self.inputs, theta, batch, options, given)
        if key is not None and call is not None:
            self._prepared.keep(key, call)
        return found

    @any_arrays
    @_without_graph
    def check_batch(self, batch: Sequence[Tensor]) -> None:
        """Raises the errors of meta_gradient (ValueError, TypeError) if the support or query sets do not fit the model."""
        theta, inputs = self.flatten(), self.inputs
        support_x = inputs.one_tensor("support_x", batch[0], theta)
        inputs.examples(SUPPORT, support_x, batch[1], None, theta)
        query_x = inputs.one_tensor("query_x", batch[2], theta, as_before=True)
        inputs.examples(QUERY, query_x, batch[3], None, theta, support_x)

    # ---------------------------------------------------------------- calls

    def _one_set(
        self, params: Tensor, x: Any, y: Any, weights: Tensor | None
    ) -> tuple[Tensor, Program | None, Examples]:
        """(checked parameters, the Program that runs the examples, checked examples)."""
        params = self.inputs.parameters("params", params)
        x = self.inputs.one_tensor("x", x, params)
        return params, *self.inputs.examples(ONE_SET, x, y, weights, params)

    def _all_trainable(self) -> bool:
        return all(map(_requires_grad, self.parameters.named().values()))


_BOTH = "give settings as keywords or as options=MetaGradientOptions(...), not as both"
_DEFAULTS = (1, False, None, None, True, None, None, False)
