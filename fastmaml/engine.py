"""The Engine: gradients, Hessian-vector products, inner loops and exact meta-gradients of one network and loss.

The only file that reaches the compiled module fastmaml._C (through torch.ops.fastmaml). A network that is not fused
runs on autodiff.py with the same results; `engine.why` says why.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastmaml import batch_norm as batch_norm_modes
from fastmaml import checks
from fastmaml.autodiff import Autodiff, Examples
from fastmaml.conjugate_gradients import conjugate_gradients
from fastmaml.fused_layers import Unsupported
from fastmaml.losses import Loss, per_example
from fastmaml.network import Network, Program, read_network
from fastmaml.parameters import InnerLr, ParameterLayout, collapse_rates, expand_rates

logger = logging.getLogger("fastmaml")

BACKENDS = ("auto", "cpu", "reference", "autodiff", "cuda", "cuda_emulated")
MEMORY = ("auto", "low", "stash")
Method = TypeVar("Method", bound=Callable[..., Any])


class MetaGradient(NamedTuple):
    """What Engine.meta_gradient returns. No field carries a graph."""

    loss: Tensor  # [T] query losses after the inner steps
    grad: Tensor  # [P] gradient of the weighted sum of the losses, by default their mean
    query_output: Tensor  # [T, N, ...]
    inner_lr_grad: Any  # as inner_lr (a 0-d tensor for a number); None if not asked for
    support_losses: Tensor  # [T, K] before each inner step


class Solution(NamedTuple):
    """What Engine.solve returns."""

    solution: Tensor  # [T, P]
    residual: Tensor  # [T] |v - A s| / |v|


@functools.lru_cache(maxsize=1)
def _load_compiled() -> str:
    """Loads fastmaml._C, building it when it is missing; returns "" or the sentence that says why it cannot."""
    from fastmaml import build

    try:
        build.load()
    except build.BuildError as error:
        return f"the compiled module is not available: {error}"
    return ""


def _without_graph(method: Method) -> Method:
    """Runs a method without autograd around it and outside inference mode, whose tensors torch.func cannot use."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _plain(x: Tensor) -> Tensor:
    return (x.clone() if x.is_inference() else x.detach()).contiguous()


class Engine:
    """Exact derivatives of one network and loss for a batch of tasks.

    model: any nn.Module. Its fused layers are listed in the README; anything else runs on the autodiff backend.
    loss: "cross_entropy" (scores [N, C], labels [N]), "mse" (mean over the outputs), or a function
        (output, target) -> [examples]. The loss of a task is the mean over its examples, or sum_i w_i l_i with weights.
    backend: "auto", "cpu", "reference" (float64 plain loops), "autodiff". The environment variable FASTMAML_BACKEND
        stands in for "auto". A backend that is named here and cannot run the model raises; "auto" falls back to
        autodiff and logs one line, or raises with FASTMAML_STRICT=1.
    memory: "low" recomputes activations in the adjoint sweep, "stash" keeps those of the inner steps, "auto" chooses.
        autodiff always recomputes.
    batch_norm: "transductive" (batch statistics everywhere), "support" (the query is normalised with the support set's
        statistics, and differentiated through them), "frozen" (running statistics). Running buffers are never changed.

    Frozen parameters (requires_grad=False) keep their place in theta: they are not adapted and have zero gradients.
    Unused ones have zero gradients; tied ones one entry and the sum of their gradients. Dropout runs (on autodiff)
    while model.training is set; the Hessian of an inner step replays the masks of its gradient. Each call draws new
    masks. Not safe to call from several threads at once on one model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss = "cross_entropy",
        backend: str = "auto",
        memory: str = "auto",
        batch_norm: str = "transductive",
        label_smoothing: float = 0.0,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
        if memory not in MEMORY:
            raise ValueError(f"memory {memory!r} is not one of {', '.join(MEMORY)}")
        batch_norm_modes.check_mode(model, batch_norm)
        self.model = model
        self.loss_name = loss
        self.memory = memory
        self.batch_norm = batch_norm
        self.label_smoothing = float(label_smoothing)
        self.layout = ParameterLayout(model)
        self._loss = per_example(loss, label_smoothing)
        self._autodiff = Autodiff(model, self.layout, self._loss, batch_norm)
        self._network: Network | None = None
        self._why = ""
        self._programs: dict[tuple[int, ...], Program] = {}
        self._output_shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._choose(backend)

    # ---------------------------------------------------------------- which backend

    @property
    def fused(self) -> bool:
        """Whether the compiled kernels run this network."""
        return self._network is not None

    @property
    def why(self) -> str:
        """Why the network is not fused, and how autodiff runs it where that is not vmap; "" when fused."""
        return "; ".join(part for part in (self._why, self._autodiff.note) if part)

    def __repr__(self) -> str:
        state = f"backend={self.backend!r}, batch_norm={self.batch_norm!r}, parameters={self.layout.size}"
        return f"Engine({type(self.model).__name__}, loss={self.loss_name!r}, {state})"

    def _choose(self, backend: str) -> None:
        wanted = backend if backend != "auto" else os.environ.get("FASTMAML_BACKEND") or "auto"
        if wanted not in BACKENDS:
            raise ValueError(f"backend {wanted!r} is not one of {', '.join(BACKENDS)}")
        if wanted in ("cuda", "cuda_emulated"):
            raise ValueError(f"backend '{wanted}' is not part of this version yet; use 'auto', 'cpu' or 'autodiff'")
        self._may_fall_back = backend == "auto"
        if wanted == "autodiff":
            self.backend, self._why = "autodiff", "backend 'autodiff' was asked for"
            return
        self.backend = "cpu" if wanted == "auto" else wanted
        if callable(self.loss_name):
            return self._fall_back("the loss is a Python function")
        device = next(self.model.parameters()).device
        if device.type != "cpu":
            return self._fall_back(f"the model is on {device} and backend '{self.backend}' computes on the CPU")
        try:
            network = read_network(self.model, self.layout)
        except Unsupported as reason:
            return self._fall_back(str(reason))
        missing = _load_compiled()
        if missing:
            return self._fall_back(missing)
        self._network = network

    def _fall_back(self, reason: str) -> None:
        name = type(self.model).__name__
        if not self._may_fall_back or os.environ.get("FASTMAML_STRICT") == "1":
            raise ValueError(f"backend '{self.backend}' cannot run {name}: {reason}")
        logger.warning("%s runs on autodiff: %s", name, reason)
        self.backend, self._network, self._why = "autodiff", None, reason

    def _program(self, name: str, x: Tensor, like: Tensor) -> Program | None:
        """The Program for the examples x [T, N, ...]; None when autodiff has to run them."""
        if self._network is None:
            return None
        if like.device.type != "cpu":
            self._fall_back(f"the parameters are on {like.device} and backend '{self.backend}' computes on the CPU")
            return None
        if like.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the parameters are {like.dtype}; backend '{self.backend}' takes float32 or float64")
        shape = tuple(x.shape[2:])
        if shape not in self._programs:
            try:
                self._programs[shape] = self._network.program(
                    shape, str(self.loss_name), self.label_smoothing, self.batch_norm
                )
            except Unsupported as reason:
                self._fall_back(str(reason))
                return None
            except ValueError as error:
                raise ValueError(f"{name} {checks.shape(x)} does not fit the model: {error}") from None
        return self._programs[shape]

    def _output_shape(self, name: str, x: Tensor, params: Tensor, program: Program | None) -> tuple[int, ...]:
        """The network's output per example; raises ValueError when the examples do not fit the model."""
        if program is not None:
            for layer, positions in program.norms:
                if positions * x.shape[1] == 1:
                    raise ValueError(
                        f"batch norm '{layer}' needs more than one value per channel; {name} {checks.shape(x)} gives one"
                    )
            return program.output_shape
        if tuple(x.shape[1:]) not in self._output_shapes:
            one = (params if params.dim() == 1 else params[0]).unsqueeze(0)
            try:
                output = self._autodiff.begin(seed=0).forward(one, _plain(x[:1]))
            except Exception as error:
                sentence = str(error).strip().split("\n")[0]
                raise ValueError(f"{name} {checks.shape(x)} does not fit the model: {sentence}") from error
            if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[1] != x.shape[1]:
                raise ValueError(f"the model must return one tensor with a row for each of the {x.shape[1]} examples")
            self._output_shapes[tuple(x.shape[1:])] = tuple(output.shape[2:])
        return self._output_shapes[tuple(x.shape[1:])]

    # ---------------------------------------------------------------- parameters

    def flatten(self, model: nn.Module | None = None) -> Tensor:
        """The parameters as one vector [P] in the order of model.named_parameters(); a copy without a graph."""
        return self.layout.flatten(self.model if model is None else model)

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """A vector [P] (or [T, P]) as {name: tensor} (or [T, *shape]): views that keep the graph."""
        checks.vector("theta", theta, self.layout.size)
        return self.layout.split(theta)

    # ---------------------------------------------------------------- one evaluation

    @_without_graph
    def forward(self, params: Tensor, x: Tensor, support_x: Tensor | None = None) -> Tensor:
        """The network's output [T, N, ...] for params [P] shared or [T, P], x [T, N, ...].

        With batch_norm="support", support_x [T, M, ...] gives the statistics; without it x gives its own.
        """
        params = self._parameters("params", params)
        checks.examples("x", x, params)
        checks.tasks_of("params", params, x)
        statistics = None
        if support_x is not None and self.batch_norm == "support":
            checks.examples("support_x", support_x, params)
            checks.same_tasks("support_x", support_x, "x", x)
            statistics = _plain(support_x)
        program = self._program("x", x, params)
        self._output_shape("x", x if statistics is None else statistics, params, program)
        if program is None:
            return self._autodiff.begin().forward(self._per_task(params, x), _plain(x), statistics)
        if statistics is None and self.batch_norm == "support":
            statistics = _plain(x)
        return self._run("forward", program, params, _plain(x), statistics)[0]

    @_without_graph
    def grad(self, params: Tensor, x: Tensor, y: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(loss [T], grad [T, P]) at params [P] shared or [T, P], for x [T, N, ...], y and optional weights [T, N]."""
        params = self._parameters("params", params)
        program, at = self._examples("x", x, "y", y, "weights", weights, params)
        if program is None:
            loss, grad, _ = self._autodiff.begin().grad(self._per_task(params, x), self._weighted(at))
        else:
            loss, grad = self._run("grad", program, params, *at)
        return loss, _masked(grad, self._mask(grad))

    @_without_graph
    def hvp(self, params: Tensor, x: Tensor, y: Tensor, v: Tensor, weights: Tensor | None = None) -> Tensor:
        """The Hessian of each task's loss times v [T, P]: [T, P]. Rows and columns of frozen parameters are zero."""
        params = self._parameters("params", params)
        program, at = self._examples("x", x, "y", y, "weights", weights, params)
        v = self._direction(v, x, params)
        self._autodiff.begin()
        return self._hvp(program, params, at, v, self._mask(params))

    def _hvp(self, program: Program | None, params: Tensor, at: _Given, v: Tensor, mask: Tensor | None) -> Tensor:
        v = _masked(v, mask)
        if program is None:
            hv = self._autodiff.hvp(self._per_task(params, at.x), self._weighted(at), v)[1]
        else:
            hv = self._run("hvp", program, params, *at, v)[0]
        return _masked(hv, mask)

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
    ) -> Solution:
        """Solves ((1 + damping) I + H / lam) s = v by conjugate gradients from s = 0, each task by itself.

        v [T, P], lam > 0, at most `steps` Hessian products. A task stops at |r|^2 < 1e-10 or where its operator is not
        positive definite. The implicit meta-gradient of iMAML (Rajeswaran et al. 2019, section 3) is this with v the
        query gradient.
        """
        params = self._parameters("params", params)
        program, at = self._examples("x", x, "y", y, "weights", weights, params)
        v = self._direction(v, x, params)
        lam, damping = checks.number("lam", lam), checks.number("damping", damping)
        if lam <= 0:
            raise ValueError(f"lam is {lam}; it must be positive")
        steps = checks.whole_number("steps", steps, 1)
        mask = self._mask(params)
        if program is not None and mask is None:
            return Solution(*self._run("solve", program, params, *at, v, lam, steps, damping))
        self._autodiff.begin()

        def operator(p: Tensor) -> Tensor:
            return (1.0 + damping) * p + self._hvp(program, params, at, p, mask) / lam

        return Solution(*conjugate_gradients(operator, v, steps))

    @_without_graph
    def loss(self, output: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss [T] of outputs [T, N, ...] against y, with optional weights [T, N]."""
        losses = torch.stack([self._loss(o, t) for o, t in zip(output, y)])
        return losses.mean(1) if weights is None else (losses * weights).sum(1)

    # ---------------------------------------------------------------- inner loops

    @_without_graph
    def adapt(
        self,
        theta: Tensor,
        x: Tensor,
        y: Tensor,
        inner_lr: InnerLr,
        inner_steps: int,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The adapted parameters [T, P] after inner_steps of gradient descent from theta [P] (or [T, P])."""
        return self.adapt_and_losses(theta, x, y, inner_lr, inner_steps, weights)[0]

    @_without_graph
    def adapt_and_losses(
        self,
        theta: Tensor,
        x: Tensor,
        y: Tensor,
        inner_lr: InnerLr,
        inner_steps: int,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As adapt, with the losses before each step: (params [T, P], losses [T, K])."""
        theta = self._parameters("theta", theta)
        inner_steps = checks.whole_number("inner_steps", inner_steps, 0)
        program, at = self._examples("support_x", x, "support_y", y, "weights", weights, theta)
        rates = expand_rates(inner_lr, self.layout, self._mask(theta), theta)
        if program is None:
            given = self._weighted(at)
            params, losses = self._autodiff.begin().adapt(self._per_task(theta, x), given, rates, inner_steps)
            return params.contiguous(), losses
        params, losses = self._run("adapt", program, theta, *at, rates, inner_steps)
        return params, losses

    @_without_graph
    def meta_gradient(
        self,
        theta: Tensor,
        batch: Sequence[Tensor],
        inner_lr: InnerLr,
        inner_steps: int,
        first_order: bool = False,
        support_weights: Tensor | None = None,
        query_weights: Tensor | None = None,
        task_weights: Tensor | None = None,
        inner_lr_grad: bool = True,
    ) -> MetaGradient:
        """The exact gradient of the query loss after the inner loop, for a batch of tasks (Finn et al. 2017, eq. 1).

        theta [P]. batch: support_x [T, S, ...], support_y, query_x [T, Q, ...], query_y. inner_lr: a number, a tensor
        [] or [P], or a dict from parameter names to numbers, tensors [] or tensors of the parameter's shape;
        inner_lr_grad has the same form. first_order drops the Hessian terms. Weights: support [T, S] and query [T, Q]
        of the examples in their loss (default 1/S, 1/Q), task_weights [T] of the tasks in grad (default 1/T). Raises
        ValueError or TypeError for anything that does not fit.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 4:
            raise TypeError("batch must be (support_x, support_y, query_x, query_y)")
        support_x, support_y, query_x, query_y = batch
        theta = self._parameters("theta", theta)
        if theta.dim() != 1:
            raise ValueError(f"theta {checks.shape(theta)} must be one start [{self.layout.size}] for all tasks")
        inner_steps = checks.whole_number("inner_steps", inner_steps, 0)
        program, support = self._examples(
            "support_x", support_x, "support_y", support_y, "support_weights", support_weights, theta
        )
        _, query = self._examples(
            "query_x", query_x, "query_y", query_y, "query_weights", query_weights, theta, support_x
        )
        tasks = support_x.shape[0]
        if task_weights is not None:
            task_weights = checks.weights("task_weights", task_weights, (tasks,), theta)
        mask = self._mask(theta)
        rates = expand_rates(inner_lr, self.layout, mask, theta)
        if program is None:
            sweep = self._autodiff.begin().meta_gradient(
                self._per_task(theta, support_x),
                self._weighted(support),
                self._weighted(query),
                rates,
                inner_steps,
                first_order,
                inner_lr_grad,
            )
            of_task = task_weights if task_weights is not None else theta.new_full((tasks,), 1.0 / tasks)
            loss, output, support_losses = sweep.loss, sweep.output, sweep.support_losses
            grad = of_task @ sweep.grad
            rate_grad = None if sweep.rate_grad is None else of_task @ sweep.rate_grad
        else:
            loss, grad, output, support_losses, rate_rows = self._run(
                "meta_gradient",
                program,
                theta,
                *support,
                *query,
                task_weights,
                rates,
                inner_steps,
                bool(first_order),
                self.memory,
                bool(inner_lr_grad),
            )
            rate_grad = rate_rows.sum(0) if inner_lr_grad else None
        if rate_grad is not None:
            rate_grad = collapse_rates(_masked(rate_grad, mask), inner_lr, self.layout)
        return MetaGradient(loss, _masked(grad, mask), output, rate_grad, support_losses)

    # ---------------------------------------------------------------- checks and calls

    def _parameters(self, name: str, params: Any) -> Tensor:
        checks.vector(name, params, self.layout.size)
        return _plain(params)

    def _direction(self, v: Any, x: Tensor, params: Tensor) -> Tensor:
        return _plain(checks.weights("v", v, (x.shape[0], self.layout.size), params))

    def _examples(
        self,
        x_name: str,
        x: Tensor,
        y_name: str,
        y: Any,
        w_name: str,
        w: Tensor | None,
        params: Tensor,
        support_x: Tensor | None = None,
    ) -> tuple[Program | None, _Given]:
        """Checks one set of examples against the network; returns the Program and what the ops take."""
        checks.examples(x_name, x, params)
        checks.tasks_of("params", params, x)
        if support_x is not None:
            checks.same_tasks("support_x", support_x, x_name, x)
        program = self._program(x_name, x, params)
        # In mode 'support' the query set is normalised by others: one query example is enough.
        by_others = support_x is not None and self.batch_norm == "support"
        output = self._output_shape(x_name, support_x if by_others and support_x is not None else x, params, program)
        if self.loss_name == "cross_entropy":
            if len(output) != 1:
                raise ValueError(f"cross_entropy takes one row of scores per example, the model gives {list(output)}")
            checks.labels(y_name, y, x_name, x, output[0])
            y = y.long()
        elif self.loss_name == "mse":
            checks.targets(y_name, y, x_name, x, output)
        else:
            checks.any_target(y_name, y, x_name, x)
        if w is not None:
            w = _plain(checks.weights(w_name, w, tuple(x.shape[:2]), params))
        return program, _Given(_plain(x), _plain(y), w)

    def _weighted(self, given: _Given) -> Examples:
        w = given.w
        if w is None:
            w = given.x.new_full(given.x.shape[:2], 1.0 / given.x.shape[1])
        return Examples(given.x, given.y, w)

    def _per_task(self, params: Tensor, x: Tensor) -> Tensor:
        return params.expand(x.shape[0], -1) if params.dim() == 1 else params

    def _mask(self, like: Tensor) -> Tensor | None:
        return self.layout.trainable(self.model, like)

    def _run(self, op: str, program: Program, params: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Calls a compiled op; the reference backend computes in float64 and answers in the caller's type."""
        dtype = params.dtype
        given = [params, *arguments, program.gather_buffers(self.model, params)]
        if self.backend == "reference":
            given = [g.double() if isinstance(g, Tensor) and g.is_floating_point() else g for g in given]
        result = getattr(torch.ops.fastmaml, op)(program.text, self.backend, *given)
        results = (result,) if isinstance(result, Tensor) else tuple(result)
        return tuple(r.to(dtype) for r in results)


def _masked(vector: Tensor, mask: Tensor | None) -> Tensor:
    return vector if mask is None else vector * mask


class _Given(NamedTuple):
    x: Tensor
    y: Tensor
    w: Tensor | None
