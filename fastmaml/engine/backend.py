"""Chooses the backend of a network and its loss, and falls back to autodiff. An Engine does this first."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor, nn

from fastmaml.autodiff.adjoint_sweep import Derivatives
from fastmaml.autodiff.autodiff import Autodiff
from fastmaml.compiled import loading
from fastmaml.compiled.operators import Compiled
from fastmaml.compiled.python_loss import PythonLoss
from fastmaml.network.fused_layers import Unsupported
from fastmaml.network.trace import Network, Program, read_network
from fastmaml.problem import batch_norm as batch_norm_modes
from fastmaml.problem import checks
from fastmaml.problem.losses import Loss, per_example
from fastmaml.problem.parameters import ParameterLayout

logger = logging.getLogger("fastmaml")

BACKENDS = ("auto", "cpu", "reference", "autodiff", "cuda", "cuda_emulated")
MEMORY = ("auto", "low", "stash")
PRECISIONS = ("float32", "tf32", "tf32x3", "bf16x3")


class BackendChoice:
    """The backend chosen for a network and its loss. Engine documents the arguments.

    `settings` holds backend, memory and precision. Every call depends on them besides its own arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        backend: str,
        memory: str,
        batch_norm: str,
        label_smoothing: float,
        precision: str,
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
        self.batch_norm = batch_norm
        self.precision = precision
        self.label_smoothing = float(label_smoothing)
        self.layout = ParameterLayout(model)
        self.loss = per_example(loss, label_smoothing)
        self.autodiff = Autodiff(model, self.layout, self.loss, batch_norm)
        self.python_loss = PythonLoss(self.loss) if callable(loss) else None
        self._memory = memory
        self._network: Network | None = None
        self._why = ""
        self._programs: dict[tuple[int, ...], Program] = {}
        self._choose(backend)

    @property
    def fused(self) -> bool:
        """Whether the compiled kernels run this network."""
        return self._network is not None

    @property
    def memory(self) -> str:
        return self._memory

    @memory.setter
    def memory(self, mode: str) -> None:
        if mode not in MEMORY:
            raise ValueError(f"memory {mode!r} is not one of {', '.join(MEMORY)}")
        self._memory = mode
        self._use(self.backend)

    @property
    def why(self) -> str:
        """Why the network or its loss is not fused, and how tasks run if vmap cannot. "" if everything is fused."""
        if not self.fused:
            return "; ".join(part for part in (self._why, self.autodiff.note) if part)
        if self.python_loss is None:
            return ""
        text = "the loss is a Python function: the network stays fused, but runs layer by layer over all tasks"
        return "; ".join(part for part in (text, self.python_loss.note) if part)

    def _choose(self, backend: str) -> None:
        wanted = backend if backend != "auto" else os.environ.get("FASTMAML_BACKEND") or "auto"
        if wanted not in BACKENDS:
            raise ValueError(f"backend {wanted!r} is not one of {', '.join(BACKENDS)}")
        self._may_fall_back = backend == "auto"
        if wanted == "autodiff":
            self._why = "backend 'autodiff' was asked for"
            self._use("autodiff")
            return
        device = next(self.model.parameters()).device.type
        self._follows = wanted == "auto"
        self._use(_of_device(device) if self._follows else wanted)
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

    def _use(self, backend: str) -> None:
        self.backend = backend
        self.settings = (backend, self._memory, self.precision)

    def _follow(self, device: str) -> None:
        """Moves the backend with the parameters ("auto" only), from the CPU to a CUDA device or back."""
        if device == _device_of(self.backend):
            return
        wanted = _of_device(device) if self._follows else self.backend
        if device != _device_of(wanted):
            return self.fall_back(f"the parameters are on {device} and backend '{wanted}' {_computes_on(wanted)}")
        if wanted == "cuda" and (missing := loading.load_cuda()):
            return self.fall_back(missing)
        self._use(wanted)

    def fall_back(self, reason: str) -> None:
        name = type(self.model).__name__
        if not self._may_fall_back or os.environ.get("FASTMAML_STRICT") == "1":
            raise ValueError(f"backend '{self.backend}' cannot run {name}: {reason}")
        logger.warning("%s runs on autodiff: %s", name, reason)
        self._network, self._why = None, reason
        self._use("autodiff")

    def program(self, name: str, x: Tensor, like: Tensor) -> Program | None:
        """The Program for the examples x [T, N, ...]. None if autodiff runs them."""
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
                    shape, "caller" if self.python_loss else str(self.loss_name), self.label_smoothing, self.batch_norm
                )
            except Unsupported as reason:
                self.fall_back(str(reason))
                return None
            except ValueError as error:
                raise ValueError(f"{name} {checks.shape(x)} does not fit the model: {error}") from None
        return self._programs[shape]

    @property
    def precision_in_use(self) -> str:
        """The chosen precision on CUDA backends. "float32" on the others, which compute in the parameters' type."""
        return self.precision if self.backend in ("cuda", "cuda_emulated") else "float32"

    def compiled(self, program: Program) -> Compiled:
        precision = self.precision_in_use
        backend = self.backend if precision == "float32" else f"{self.backend}:{precision}"
        return Compiled(program, self.model, backend, self.memory, self.python_loss)

    def derivatives(self, program: Program | None) -> Derivatives:
        """First and second derivatives on the chosen backend, for a sweep in Python."""
        return self.autodiff.begin() if program is None else self.compiled(program)


def _of_device(device: str) -> str:
    return "cuda" if device == "cuda" else "cpu"


def _device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def _computes_on(backend: str) -> str:
    return "computes on a CUDA device" if backend == "cuda" else "computes on the CPU"
