"""Which backend runs a network, and whether given tensors fit it: what an Engine knows before it computes."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.autodiff.autodiff import Autodiff
from fastmaml.compiled import loading
from fastmaml.compiled.operators import Compiled
from fastmaml.compiled.python_loss import CallerLoss
from fastmaml.engine.prepared_calls import KnownCalls, KnownHvp, KnownMetaGradient
from fastmaml.network.fused_layers import Unsupported
from fastmaml.network.trace import Network, Program, read_network
from fastmaml.problem import batch_norm as batch_norm_modes
from fastmaml.problem import checks
from fastmaml.problem.examples import Examples
from fastmaml.problem.losses import Loss, per_example
from fastmaml.problem.named_parameters import ModelParameters
from fastmaml.problem.parameters import ParameterLayout
from fastmaml.problem.pytrees import Packing, check_inputs, is_one_tensor

logger = logging.getLogger("fastmaml")

BACKENDS = ("auto", "cpu", "reference", "autodiff", "cuda", "cuda_emulated")
MEMORY = ("auto", "low", "stash")
PRECISIONS = ("float32", "tf32", "tf32x3", "bf16x3")


def plain(x: Tensor) -> Tensor:
    """Contiguous, without a graph, and no inference tensor."""
    x = x.clone() if x.is_inference() else x.detach() if x.requires_grad else x
    return x.contiguous()


class Backend:
    """The network, its loss, and the backend chosen for it. Engine documents the arguments."""

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
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
        if memory not in MEMORY:
            raise ValueError(f"memory {memory!r} is not one of {', '.join(MEMORY)}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
        if precision != "float32" and backend in ("cpu", "reference", "autodiff"):
            raise ValueError(f"precision {precision!r} is for the backends cuda and cuda_emulated, not {backend!r}")
        batch_norm_modes.check_mode(model, batch_norm)
        self.model = model
        self.loss_name = loss
        self.memory = memory
        self.batch_norm = batch_norm
        self.precision = precision
        self.label_smoothing = float(label_smoothing)
        self.parameters = ModelParameters(model)
        self.layout = ParameterLayout(model)
        self._loss = per_example(loss, label_smoothing)
        self._autodiff = Autodiff(model, self.layout, self._loss, batch_norm)
        self._network: Network | None = None
        self._caller = CallerLoss(self._loss) if callable(loss) else None
        self._why = ""
        self._programs: dict[tuple[int, ...], Program] = {}
        self._output_shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._known_meta_gradients: KnownCalls[KnownMetaGradient] = KnownCalls()
        self._known_hvps: KnownCalls[KnownHvp] = KnownCalls()
        self._choose(backend)

    # ---------------------------------------------------------------- which backend

    @property
    def fused(self) -> bool:
        """Whether the compiled kernels run this network."""
        return self._network is not None

    @property
    def why(self) -> str:
        """Why the network, or its loss, is not fused, and how tasks are run where that is not vmap; "" when all is."""
        if not self.fused:
            return "; ".join(part for part in (self._why, self._autodiff.note) if part)
        if self._caller is None:
            return ""
        text = "the loss is a Python function: the network's steps are fused, layer by layer over all tasks, between its calls"
        return "; ".join(part for part in (text, self._caller.note) if part)

    def __repr__(self) -> str:
        state = f"backend={self.backend!r}, batch_norm={self.batch_norm!r}, parameters={self.layout.size}"
        return f"Engine({type(self.model).__name__}, loss={self.loss_name!r}, {state})"

    def _choose(self, backend: str) -> None:
        wanted = backend if backend != "auto" else os.environ.get("FASTMAML_BACKEND") or "auto"
        if wanted not in BACKENDS:
            raise ValueError(f"backend {wanted!r} is not one of {', '.join(BACKENDS)}")
        self._mayfall_back = backend == "auto"
        if wanted == "autodiff":
            self.backend, self._why = "autodiff", "backend 'autodiff' was asked for"
            return
        device = next(self.model.parameters()).device.type
        self._follows = wanted == "auto"
        self.backend = _of_device(device) if self._follows else wanted
        missing = loading.load_cuda() if self.backend == "cuda" else ""
        if missing:
            return self.fall_back(missing)
        if device != _device_of(self.backend):
            return self.fall_back(f"the model is on {device} and backend '{self.backend}' {_computes_on(self.backend)}")
        try:
            network = read_network(self.model, self.layout)
        except Unsupported as reason:
            return self.fall_back(str(reason))
        missing = loading.load_compiled()
        if missing:
            return self.fall_back(missing)
        self._network = network

    def _follow(self, device: str) -> None:
        """With "auto" the backend moves along with the parameters, from the CPU to a CUDA device or back."""
        if device == _device_of(self.backend):
            return
        wanted = _of_device(device) if self._follows else self.backend
        if device != _device_of(wanted):
            return self.fall_back(f"the parameters are on {device} and backend '{wanted}' {_computes_on(wanted)}")
        if wanted == "cuda" and (missing := loading.load_cuda()):
            return self.fall_back(missing)
        self.backend = wanted

    def fall_back(self, reason: str) -> None:
        name = type(self.model).__name__
        if not self._mayfall_back or os.environ.get("FASTMAML_STRICT") == "1":
            raise ValueError(f"backend '{self.backend}' cannot run {name}: {reason}")
        logger.warning("%s runs on autodiff: %s", name, reason)
        self.backend, self._network, self._why = "autodiff", None, reason

    def _program(self, name: str, x: Tensor, like: Tensor) -> Program | None:
        """The Program for the examples x [T, N, ...]; None when autodiff has to run them."""
        if self._network is None:
            return None
        self._follow(like.device.type)
        if self._network is None:
            return None
        if like.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the parameters are {like.dtype}; backend '{self.backend}' takes float32 or float64")
        shape = tuple(x.shape[2:])
        if shape not in self._programs:
            try:
                self._programs[shape] = self._network.program(
                    shape, "caller" if self._caller else str(self.loss_name), self.label_smoothing, self.batch_norm
                )
            except Unsupported as reason:
                self.fall_back(str(reason))
                return None
            except ValueError as error:
                raise ValueError(f"{name} {checks.shape(x)} does not fit the model: {error}") from None
        return self._programs[shape]

    @property
    def precision_in_use(self) -> str:
        """The precision that was allowed, where the backend has it; the others compute in the parameters' type."""
        return self.precision if self.backend in ("cuda", "cuda_emulated") else "float32"

    def _compiled(self, program: Program) -> Compiled:
        precision = self.precision_in_use
        backend = self.backend if precision == "float32" else f"{self.backend}:{precision}"
        return Compiled(program, self.model, backend, self.memory, self._caller)

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
                output = self._autodiff.begin(seed=0).forward(one, plain(x[:1]))
            except Exception as error:
                sentence = str(error).strip().split("\n")[0]
                raise ValueError(f"{name} {checks.shape(x)} does not fit the model: {sentence}") from error
            if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[1] != x.shape[1]:
                raise ValueError(f"the model must return tensors with a row for each of the {x.shape[1]} examples")
            if self._autodiff.outputs is not None and not callable(self.loss_name):
                count = len(self._autodiff.outputs.shapes)
                raise ValueError(
                    f"the model returns {count} tensors; loss={self.loss_name!r} takes one, give a function"
                )
            self._output_shapes[tuple(x.shape[1:])] = tuple(output.shape[2:])
        return self._output_shapes[tuple(x.shape[1:])]

    # ---------------------------------------------------------------- checks

    def _one_tensor(self, name: str, x: Any, params: Any, as_before: bool = False) -> Tensor:
        """The examples as one floating point tensor [T, N, ...]: several inputs, or integers, side by side.

        as_before: they must have the structure of the examples that were packed last.
        """
        if self.fused or is_one_tensor(x) or not isinstance(x, (Tensor, tuple, list, dict)):
            packing = None
        else:
            floating = isinstance(params, Tensor) and params.is_floating_point()
            dtype = params.dtype if floating else torch.get_default_dtype()
            check_inputs(name, x, dtype)
            packing = Packing.of(x, 2)
        if as_before and packing != self._autodiff.inputs:
            raise ValueError(f"{name} and the other examples hold inputs of different types, shapes or number")
        self._autodiff.inputs = packing
        return x if packing is None else packing.pack(x, 2, dtype)

    def _as_returned(self, output: Tensor) -> Any:
        """An output [T, N, ...] in the structure that the model returns."""
        return output if self._autodiff.outputs is None else self._autodiff.outputs.unpack(output, 2)

    def _parameters(self, name: str, params: Any) -> Tensor:
        checks.vector(name, params, self.layout.size)
        return plain(params)

    def _direction(self, v: Any, x: Tensor, params: Tensor) -> Tensor:
        return plain(checks.weights("v", v, (x.shape[0], self.layout.size), params))

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
        minibatch: int | None = None,
    ) -> tuple[Program | None, Examples]:
        """Checks one set of examples against the network; returns the Program and what the ops take."""
        checks.examples(x_name, x, params)
        checks.tasks_of("params", params, x)
        if support_x is not None:
            checks.same_tasks("support_x", support_x, x_name, x)
        program = self._program(x_name, x, params)
        # In mode 'support' the query set is normalised by others: one query example is enough.
        by_others = support_x is not None and self.batch_norm == "support"
        at_once = support_x if by_others and support_x is not None else x if minibatch is None else x[:, :minibatch]
        output = self._output_shape(x_name, at_once, params, program)
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
            w = plain(checks.weights(w_name, w, tuple(x.shape[:2]), params))
        return program, Examples(plain(x), plain(y), w)


def _of_device(device: str) -> str:
    return "cuda" if device == "cuda" else "cpu"


def _device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def _computes_on(backend: str) -> str:
    return "computes on a CUDA device" if backend == "cuda" else "computes on the CPU"
