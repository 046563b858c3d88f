# OpCase: one fused layer, as hand-written Program text beside what it means in torch. The cases themselves are in op_list.py.
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from oracle import normalise, written_batch_norm
from torch import Tensor

from cases.networks import JUMPS
from cases.programs import Function, program, split

_C = pytest.importorskip("fastmaml._C", reason="make build")


@dataclass(frozen=True)
class OpCase:
    name: str
    input: tuple[int, ...]
    lines: tuple[str, ...]
    function: Function  # the oracle: elementary torch operations
    plain: Function | None = None  # what a torch user writes, where that is another thing; the yardstick of float32
    params: tuple[tuple[int, ...], ...] = ()
    gains: tuple[int, ...] = ()  # parameters drawn around one
    examples: int = 3
    tasks: int = 2
    grid: float = 0.0  # > 0: x is rounded to multiples of it, which makes zeros and ties
    scale: float = 1.0  # of x
    shift: float = 0.0
    blank: bool = False  # channel 0 of x is constant
    buffers: tuple[int, ...] = ()  # alternating means and variances

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.input))
        return f"{self.name}-T{self.tasks}-N{self.examples}-{sizes}".replace(" ", "-")

    @property
    def text(self) -> str:
        return program(self.input, self.params, self.lines, buffers=self.buffers)

    @property
    def param_count(self) -> int:
        return sum(math.prod(shape) for shape in self.params)


@dataclass(frozen=True)
class OpInputs:
    """All that `passes` takes; float64 numbers that float32 holds, so that both precisions see the same values."""

    params: Tensor  # [T, P]
    params_dot: Tensor  # [T, P]
    x: Tensor  # [T, N, *input]
    x_dot: Tensor
    dy: Tensor  # [T, N, *output]
    dy_dot: Tensor
    buffers: Tensor  # [B]

    def to(self, dtype: torch.dtype) -> OpInputs:
        return OpInputs(**{name: value.to(dtype) for name, value in self.__dict__.items()})


@cache  # every backend is judged on the same draws
def draw_op(case: OpCase, seed: int) -> OpInputs:
    generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, str(case))))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    T, N, P = case.tasks, case.examples, case.param_count
    params = torch.empty(T, P, dtype=torch.float64)
    for t in range(T):
        for i, part in enumerate(split(params[t], case.params)):
            fan_in = max(1, math.prod(part.shape[1:])) if part.dim() > 1 else 1
            value = normal(*part.shape)
            part.copy_(1 + 0.3 * value if i in case.gains else value / math.sqrt(fan_in))
    x = case.scale * normal(T, N, *case.input) + case.shift
    if case.grid:
        x = (x / case.grid).round() * case.grid
    if case.blank:
        x[:, :, 0] = 0.7
    buffers = [normal(size) if i % 2 == 0 else normal(size).square() + 0.1 for i, size in enumerate(case.buffers)]
    buffer = torch.cat(buffers) if buffers else torch.empty(0, dtype=torch.float64)
    params, x, buffer = params.float().double(), x.float().double(), buffer.float().double()
    if case.buffers:
        y = case.function([*split(params[0], case.params), *split(buffer, [(size,) for size in case.buffers])], x[0])
    else:
        y = case.function(split(params[0], case.params), x[0])
    return OpInputs(params, normal(T, P), x, normal(*x.shape), normal(T, *y.shape), normal(T, *y.shape), buffer)


def linear(inputs: int, outputs: int, bias: bool = True, **how) -> OpCase:
    def function(p: list[Tensor], x: Tensor) -> Tensor:
        y = x @ p[0].T
        return y + p[1] if bias else y

    params = ((outputs, inputs), (outputs,)) if bias else ((outputs, inputs),)
    line = f"linear 0 weight=0 bias={1 if bias else -1}"
    return OpCase(
        f"linear {inputs} to {outputs}{'' if bias else ' no bias'}", (inputs,), (line,), function, params=params, **how
    )


def conv2d(image, filters, kernel=(3, 3), stride=(1, 1), padding=(1, 1), bias=True, **how) -> OpCase:
    C = image[0]

    def function(p: list[Tensor], x: Tensor) -> Tensor:
        return F.conv2d(x, p[0], p[1] if bias else None, stride=stride, padding=padding)

    params = ((filters, C, *kernel), (filters,)) if bias else ((filters, C, *kernel),)
    line = (
        f"conv2d 0 weight=0 bias={1 if bias else -1} stride={stride[0]},{stride[1]} padding={padding[0]},{padding[1]}"
    )
    name = f"conv2d F{filters} k{kernel[0]}x{kernel[1]} s{stride[0]}x{stride[1]} p{padding[0]}x{padding[1]}"
    name += "" if bias else " no bias"
    return OpCase(name, tuple(image), (line,), function, params=params, **how)


def batch_norm(shape, affine=True, eps=1e-5, **how) -> OpCase:
    C = shape[0]

    def function(p: list[Tensor], x: Tensor) -> Tensor:
        return written_batch_norm(x, p[0] if affine else None, p[1] if affine else None, eps)

    def plain(p: list[Tensor], x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, p[0] if affine else None, p[1] if affine else None, training=True, eps=eps)

    params = ((C,), (C,)) if affine else ()
    line = f"batch_norm 0 weight={0 if affine else -1} bias={1 if affine else -1} eps={eps:g} mode=batch"
    name = f"batch_norm eps {eps:g}{'' if affine else ' not affine'}"
    return OpCase(name, tuple(shape), (line,), function, plain, params=params, gains=(0,), **how)


def batch_norm_frozen(shape, affine=True, eps=1e-5, **how) -> OpCase:
    C = shape[0]

    def function(p: list[Tensor], x: Tensor) -> Tensor:
        *affines, mean, var = p
        form = (1, C) + (1,) * (x.dim() - 2)
        y = (x - mean.view(form)) / (var.view(form) + eps).sqrt()
        return y * affines[0].view(form) + affines[1].view(form) if affine else y

    params = ((C,), (C,)) if affine else ()
    line = f"batch_norm 0 weight={0 if affine else -1} bias={1 if affine else -1} eps={eps:g} mode=frozen mean=0 var=1"
    name = f"batch_norm frozen eps {eps:g}{'' if affine else ' not affine'}"
    return OpCase(name, tuple(shape), (line,), function, params=params, gains=(0,), buffers=(C, C), **how)


def layer_norm(shape, weight=True, bias=True, eps=1e-5, **how) -> OpCase:
    def parts(p: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        return (p[0] if weight else None), (p[int(weight)] if bias else None)

    def function(p: list[Tensor], x: Tensor) -> Tensor:
        gamma, beta = parts(p)
        y = normalise(x, tuple(range(1, x.dim())), eps)
        y = y if gamma is None else y * gamma
        return y if beta is None else y + beta

    def plain(p: list[Tensor], x: Tensor) -> Tensor:
        return F.layer_norm(x, shape, *parts(p), eps=eps)

    params = (tuple(shape),) * (int(weight) + int(bias))
    line = f"layer_norm 0 weight={0 if weight else -1} bias={int(weight) if bias else -1} eps={eps:g} dims={len(shape)}"
    name = f"layer_norm eps {eps:g}{'' if weight else ' no weight'}{'' if bias else ' no bias'}"
    return OpCase(name, tuple(shape), (line,), function, plain, params=params, gains=(0,) if weight else (), **how)


def group_norm(shape, groups, affine=True, eps=1e-5, **how) -> OpCase:
    C = shape[0]

    def function(p: list[Tensor], x: Tensor) -> Tensor:
        y = normalise(x.reshape(x.shape[0], groups, -1), (2,), eps).reshape(x.shape)
        form = (1, C) + (1,) * (x.dim() - 2)
        return y * p[0].view(form) + p[1].view(form) if affine else y

    def plain(p: list[Tensor], x: Tensor) -> Tensor:
        return F.group_norm(x, groups, *(p if affine else (None, None)), eps=eps)

    params = ((C,), (C,)) if affine else ()
    line = f"group_norm 0 weight={0 if affine else -1} bias={1 if affine else -1} eps={eps:g} groups={groups}"
    name = f"group_norm {groups} groups eps {eps:g}{'' if affine else ' not affine'}"
    return OpCase(name, tuple(shape), (line,), function, plain, params=params, gains=(0,), **how)


# The engine's pointwise functions: the word in a program's text, and the key of the number behind it or "".
RECTIFIERS: dict[str, str] = _C.vocabulary()["rectifiers"]
SMOOTH: dict[str, str] = _C.vocabulary()["smooth"]
POINTWISE = {**RECTIFIERS, **SMOOTH}
NUMBER = 0.1  # of those that take one
KINKED = (*RECTIFIERS, *JUMPS)  # whose first or second derivative jumps at 0


def torch_pointwise(kind: str, x: Tensor, number: float = NUMBER) -> Tensor:
    """torch's function of that name. Only one whose name torch does not know needs a line here."""
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    function = getattr(torch, kind, None) or getattr(F, kind)
    return function(x, number) if POINTWISE[kind] else function(x)


def pointwise_line(kind: str, value: int) -> str:
    """The line of a program's text."""
    return f"{kind} {value}" + (f" {POINTWISE[kind]}={NUMBER:g}" if POINTWISE[kind] else "")


def pointwise(kind: str, shape, **how) -> OpCase:
    name = kind + (f" scale {how['scale']:g}" if "scale" in how else "") + (" with zeros" if "grid" in how else "")
    return OpCase(name, tuple(shape), (pointwise_line(kind, 0),), lambda p, x: torch_pointwise(kind, x), **how)


def pool2d(kind: str, image, kernel, stride, padding=(0, 0), count_include_pad=True, **how) -> OpCase:
    def function(p: list[Tensor], x: Tensor) -> Tensor:
        if kind == "max":
            return F.max_pool2d(x, kernel, stride, padding)
        return F.avg_pool2d(x, kernel, stride, padding, count_include_pad=count_include_pad)

    line = f"{kind}_pool2d 0 kernel={kernel[0]},{kernel[1]} stride={stride[0]},{stride[1]}"
    line += f" padding={padding[0]},{padding[1]}"
    line += f" count_include_pad={int(count_include_pad)}" if kind == "avg" else ""
    name = f"{kind}_pool2d k{kernel[0]}x{kernel[1]} s{stride[0]}x{stride[1]} p{padding[0]}x{padding[1]}"
    name += " without pad" if not count_include_pad else ""
    name += " with ties" if "grid" in how else ""
    return OpCase(name, tuple(image), (line,), function, **how)


def norm_pool_act(
    shape, kernel=None, stride=None, padding=(0, 0), act="relu", affine=True, frozen=False, eps=1e-3, **how
) -> OpCase:
    """batch norm, max-pool (where a kernel is given), ReLU or leaky ReLU: one layer where the backend fuses them."""
    C = shape[0]
    stride = stride or kernel

    def act_and_pool(y: Tensor) -> Tensor:
        y = torch_pointwise(act, y)
        return F.max_pool2d(y, kernel, stride, padding) if kernel else y

    def function(p: list[Tensor], x: Tensor) -> Tensor:
        gamma, beta = p[:2] if affine else (None, None)
        if not frozen:
            return act_and_pool(written_batch_norm(x, gamma, beta, eps))
        form = (1, C) + (1,) * (x.dim() - 2)
        y = (x - p[-2].view(form)) / (p[-1].view(form) + eps).sqrt()
        return act_and_pool(y * gamma.view(form) + beta.view(form) if affine else y)

    def plain(p: list[Tensor], x: Tensor) -> Tensor:
        gamma, beta = p if affine else (None, None)
        return act_and_pool(F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps))

    mode = "frozen mean=0 var=1" if frozen else "batch"
    affines = "weight=0 bias=1" if affine else "weight=-1 bias=-1"
    lines = [f"batch_norm 0 {affines} eps={eps:g} mode={mode}", pointwise_line(act, 1)]
    name = f"batch_norm {act}"
    if kernel:
        window = [f"{key}={h},{w}" for key, (h, w) in (("kernel", kernel), ("stride", stride), ("padding", padding))]
        lines.append("max_pool2d 2 " + " ".join(window))
        name += " max_pool2d k{}x{} s{}x{} p{}x{}".format(*kernel, *stride, *padding)
    name += "".join(f" {word}" for word, there in (("frozen", frozen), ("not affine", not affine)) if there)
    name += " with ties" if "grid" in how else ""
    # gamma is drawn around 0, so half of the channels turn: their largest y has the smallest x.
    return OpCase(
        name, tuple(shape), tuple(lines), function, None if frozen else plain,
        params=((C,), (C,)) if affine else (), buffers=(C, C) if frozen else (), **how,
    )  # fmt: skip


def rectified(name: str, shape, params, lines: Sequence[str], function: Function, **how) -> OpCase:
    """A rectifier between two layers, which is a part of both where the backend has it (csrc/plan/fuse.cpp)."""
    return OpCase(name, tuple(shape), tuple(lines), function, params=tuple(map(tuple, params)), **how)


def linear_rectified_linear(sizes: Sequence[int], act: str = "relu", **how) -> OpCase:
    a, b, c = sizes
    return rectified(
        f"linear {act} linear {a} {b} {c}",
        (a,),
        ((b, a), (b,), (c, b), (c,)),
        ("linear 0 weight=0 bias=1", pointwise_line(act, 1), "linear 2 weight=2 bias=3"),
        lambda p, x: torch_pointwise(act, x @ p[0].T + p[1]) @ p[2].T + p[3],
        **how,
    )


def conv_rectified_conv(image, filters: int, act: str = "leaky_relu", stride=(1, 1), **how) -> OpCase:
    window = "stride={},{} padding=1,1".format(*stride)
    return rectified(
        f"conv2d {act} conv2d F{filters} s{stride[0]}x{stride[1]}",
        image,
        ((filters, image[0], 3, 3), (filters,), (5, filters, 3, 3)),
        (f"conv2d 0 weight=0 bias=1 {window}", pointwise_line(act, 1), f"conv2d 2 weight=2 bias=-1 {window}"),
        lambda p, x: F.conv2d(torch_pointwise(act, F.conv2d(x, p[0], p[1], stride, 1)), p[2], None, stride, 1),
        **how,
    )
