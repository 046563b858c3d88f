# Cases as data. OP_CASES: one fused layer each, as hand-written Program text beside what it means in torch.
# NETWORK_CASES: whole models. A new layer is a few lines in OP_CASES; every numeric test then runs it on every backend.
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from oracle import normalise, written_batch_norm
from torch import Tensor, nn

_C = pytest.importorskip("fastmaml._C", reason="make build")

Function = Callable[[list[Tensor], Tensor], Tensor]  # ([parameters], x [N, *input]) -> y [N, *output], of one task


def program(
    input: Sequence[int],
    params: Sequence[Sequence[int]],
    lines: Sequence[str],
    *,
    loss: str = "none",
    buffers: Sequence[int] = (),
    output: int | None = None,
) -> str:
    """Program text, as network.py writes and csrc/program parses it; parameters and buffers lie one after the other."""
    text = ["fastmaml 1", "input " + " ".join(map(str, input))]
    at = 0
    for shape in params:
        text.append(f"param {at} " + " ".join(map(str, shape)))
        at += math.prod(shape)
    at = 0
    for size in buffers:
        text.append(f"buffer {at} {size}")
        at += size
    text += list(lines)
    text.append(f"output {len(lines) if output is None else output}")
    text.append(f"loss {loss}")
    return "\n".join(text) + "\n"


def split(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """A flat vector [P] as the tensors of `shapes`."""
    parts, at = [], 0
    for shape in shapes:
        size = math.prod(shape)
        parts.append(flat[at : at + size].reshape(tuple(shape)))
        at += size
    return parts


# ------------------------------------------------------------------------------------------------------------------ ops


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
KINKED = (*RECTIFIERS, "elu")  # whose first or second derivative jumps at 0


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


OP_CASES: list[OpCase] = [
    linear(
        1, 40, tasks=9, examples=10
    ),  # the sinusoid's first layer: widths that fill no vector, tasks that fill no group of 8
    linear(40, 1, tasks=9, examples=10),
    linear(7, 5, examples=1),
    linear(5, 3, bias=False),
    linear(33, 65, examples=17, tasks=3),  # one past the tiles of 16, 32 and 64
    linear(300, 19, examples=5),
    linear(16, 16, examples=4, tasks=17),
    linear(64, 32, examples=25, tasks=1),
    conv2d((3, 7, 6), 5),
    conv2d((1, 5, 5), 4, padding=(0, 0), examples=1),
    conv2d((1, 4, 4), 1, examples=1, tasks=1),
    conv2d((4, 9, 8), 8, stride=(2, 2)),
    conv2d((6, 4, 5), 3, kernel=(1, 1), padding=(0, 0), bias=False),
    conv2d((5, 7, 7), 4, kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    conv2d((2, 8, 7), 3, kernel=(5, 3), stride=(2, 1), padding=(1, 2)),
    conv2d((3, 6, 6), 5, kernel=(2, 2), stride=(2, 2), padding=(0, 0), bias=False),
    conv2d((4, 3, 5), 6, kernel=(3, 5), padding=(0, 0)),  # the kernel covers the image: one output pixel
    conv2d((2, 4, 4), 3, padding=(2, 2)),  # more padding than half the kernel
    conv2d((3, 8, 8), 4, stride=(3, 3), padding=(0, 0)),  # the last rows and columns touch no output
    conv2d((2, 1, 9), 3, kernel=(1, 4), padding=(0, 1)),
    conv2d((16, 8, 8), 16, examples=2),
    conv2d((16, 13, 14), 32, examples=3),  # Winograd's tiles: several blocks, a last row of half tiles
    conv2d((32, 8, 9), 16, padding=(0, 2), examples=2),
    conv2d((16, 6, 11), 16, padding=(2, 0), examples=1, bias=False),
    conv2d((17, 5, 6), 33, examples=2),
    conv2d((32, 7, 7), 64, examples=2, tasks=1),
    conv2d((3, 20, 40), 4, examples=1, tasks=9),
    conv2d((64, 3, 3), 64, examples=5, tasks=1),
    # past the blocks of the cpu kernels: 384 rows, 256 deep, 128 pixels, 256 KB of images
    linear(300, 5, examples=400, tasks=1),
    linear(5, 300, examples=150, tasks=1),
    linear(301, 70, examples=150, tasks=1),  # weight gradients by way of copies, in two blocks of examples
    conv2d((64, 26, 26), 8, examples=2, tasks=1),
    conv2d((100, 9, 8), 5, stride=(2, 2), tasks=1),
    batch_norm((4, 5, 6)),
    batch_norm((17, 3, 3), examples=1),
    batch_norm((1, 6, 6), eps=1e-3),
    batch_norm((5, 3, 4), affine=False),
    batch_norm((13,), examples=6),
    batch_norm((8,), examples=7, affine=False, tasks=9),
    batch_norm((3, 6, 5), shift=100.0),  # |mean| >> std: E[x^2] - mean^2 has nothing left in float32
    batch_norm((32, 2, 2), examples=5),
    batch_norm((3, 4, 4), blank=True),  # a constant channel: 1/std = eps^-1/2
    batch_norm_frozen((4, 5, 3)),
    batch_norm_frozen((6,), eps=1e-3, affine=False),
    batch_norm_frozen((19,), examples=1),
    layer_norm((7,)),
    layer_norm((33,), examples=1, eps=1e-3),
    layer_norm((16,), weight=False, bias=False, tasks=9),
    layer_norm((12,), bias=False),
    layer_norm((3, 4, 5)),  # an image: the affine is [C, H, W]
    layer_norm((40,), examples=9, shift=30.0),
    group_norm((6, 4, 3), 2),
    group_norm((6, 3, 3), 1, eps=1e-3),
    group_norm((5, 4, 4), 5, affine=False),
    group_norm((32, 3, 3), 8, examples=1),
    group_norm((12,), 3),
    *(pointwise(kind, (13,), tasks=3) for kind in POINTWISE),
    *(pointwise(kind, (3, 4, 5)) for kind in POINTWISE),
    *(pointwise(kind, (16,), examples=1, tasks=9) for kind in ("relu", "gelu", "silu")),
    *(pointwise(kind, (37,), scale=20.0) for kind in SMOOTH),  # saturated, no NaN
    pointwise("relu", (4, 5, 5), grid=1.0),
    *(pointwise(kind, (21,), grid=1.0) for kind in POINTWISE if kind != "relu"),
    pool2d("max", (3, 7, 5), (2, 2), (2, 2)),
    pool2d("max", (1, 4, 4), (2, 2), (2, 2), examples=1, tasks=1),
    pool2d("max", (17, 6, 6), (3, 3), (2, 2), (1, 1)),
    pool2d("max", (4, 5, 6), (3, 3), (1, 1)),  # windows overlap: gradients of several windows meet in one pixel
    pool2d("max", (8, 6, 6), (2, 2), (2, 2), grid=1.0),  # ties: the first in scan order
    pool2d("max", (3, 6, 7), (3, 2), (2, 1), (1, 0), grid=1.0),
    pool2d("avg", (3, 7, 5), (2, 2), (2, 2)),
    pool2d("avg", (5, 6, 6), (3, 3), (2, 2), (1, 1)),
    pool2d("avg", (5, 6, 6), (3, 3), (2, 2), (1, 1), count_include_pad=False),
    pool2d("avg", (2, 5, 6), (3, 2), (1, 1), (1, 1), examples=1),
    OpCase("global_avg_pool2d", (5, 3, 4), ("global_avg_pool2d 0",), lambda p, x: x.mean((2, 3), keepdim=True)),
    OpCase(
        "global_avg_pool2d", (17, 1, 1), ("global_avg_pool2d 0",), lambda p, x: x.mean((2, 3), keepdim=True), examples=1
    ),
    norm_pool_act((4, 6, 6), (2, 2), tasks=1),
    norm_pool_act((1, 5, 7), (2, 2), act="leaky_relu"),  # rest pixels: a last row and column outside of all windows
    norm_pool_act((2, 9, 8), (3, 3), examples=1),
    norm_pool_act((3, 7, 5), (3, 3), (2, 2), (1, 1), act="leaky_relu"),  # overlapping windows
    norm_pool_act((5, 6, 7), (3, 2), (1, 2), (1, 0)),
    norm_pool_act((33, 5, 4), (2, 2), (1, 1), affine=False),
    norm_pool_act((3, 7, 8), (2, 2), (3, 3), tasks=3),  # pixels between the windows
    norm_pool_act((8, 4, 6), (2, 2), grid=1.0),
    norm_pool_act((5, 6, 5), (2, 2), act="leaky_relu", frozen=True),
    norm_pool_act((3, 5, 5), (3, 3), (2, 2), (1, 1), frozen=True, affine=False),
    norm_pool_act((5, 3, 4)),
    norm_pool_act((3, 3, 3), act="leaky_relu", frozen=True, tasks=1),
    norm_pool_act((13,), examples=6),
    linear_rectified_linear((3, 5, 2)),
    linear_rectified_linear((1, 33, 1), "leaky_relu", examples=5, tasks=1),
    linear_rectified_linear((33, 65, 3), examples=5),
    linear_rectified_linear((5, 1, 2), "leaky_relu", examples=1),
    conv_rectified_conv((2, 5, 3), 3),
    conv_rectified_conv((1, 5, 5), 33, "relu", stride=(2, 1), tasks=1),
    conv_rectified_conv((3, 1, 2), 1, examples=1),
    rectified(
        "conv2d relu flatten linear",
        (2, 5, 3),
        ((3, 2, 3, 3), (3,), (5, 45), (5,)),
        ("conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1", "relu 1", "flatten 2", "linear 3 weight=2 bias=3"),
        lambda p, x: F.relu(F.conv2d(x, p[0], p[1], padding=1)).flatten(1) @ p[2].T + p[3],
    ),
    rectified(
        "group_norm relu conv2d",
        (6, 3, 5),
        ((6,), (6,), (3, 6, 1, 2)),
        (
            "group_norm 0 weight=0 bias=1 eps=1e-3 groups=3",
            "relu 1",
            "conv2d 2 weight=2 bias=-1 stride=1,1 padding=0,0",
        ),
        lambda p, x: F.conv2d(F.relu(F.group_norm(x, 3, p[0], p[1], 1e-3)), p[2]),
        gains=(0,),
    ),
    rectified(  # the norm itself masks: the sum reads y twice
        "group_norm leaky_relu added to itself",
        (5, 3, 2),
        ((5,), (5,)),
        ("group_norm 0 weight=0 bias=1 eps=1e-3 groups=1", "leaky_relu 1 slope=0.1", "add 2,2"),
        lambda p, x: 2 * F.leaky_relu(F.group_norm(x, 1, p[0], p[1], 1e-3), 0.1),
        gains=(0,),
        tasks=1,
    ),
    rectified(
        "layer_norm relu linear",
        (33,),
        ((33,), (33,), (3, 33), (3,)),
        ("layer_norm 0 weight=0 bias=1 eps=1e-3 dims=1", "relu 1", "linear 2 weight=2 bias=3"),
        lambda p, x: F.relu(F.layer_norm(x, (33,), p[0], p[1], 1e-3)) @ p[2].T + p[3],
        gains=(0,),
        examples=5,
    ),
    OpCase("flatten", (3, 4, 5), ("flatten 0",), lambda p, x: x.flatten(1)),
    OpCase("flatten", (9, 2, 2), ("flatten 0",), lambda p, x: x.flatten(1), examples=1, tasks=9),
    OpCase("add to itself", (3, 4, 5), ("add 0,0",), lambda p, x: x + x),
    OpCase("add a branch", (11,), ("tanh 0", "add 0,1"), lambda p, x: x + torch.tanh(x)),
    OpCase(
        "add three branches of one value",
        (4, 3, 3),
        ("tanh 0", "sigmoid 1", "silu 1", "add 2,3", "add 4,1"),
        lambda p, x: torch.sigmoid(torch.tanh(x)) + F.silu(torch.tanh(x)) + torch.tanh(x),
    ),
    OpCase(
        "linear twice with one weight",
        (6,),
        ("linear 0 weight=0 bias=1", "tanh 1", "linear 2 weight=0 bias=1"),
        lambda p, x: torch.tanh(x @ p[0].T + p[1]) @ p[0].T + p[1],
        params=((6, 6), (6,)),
    ),
    OpCase(
        "conv2d flatten linear",  # layouts meet: the engine keeps images channels-last, flatten is in torch's order
        (3, 4, 5),
        ("conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1", "tanh 1", "flatten 2", "linear 3 weight=2 bias=3"),
        lambda p, x: torch.tanh(F.conv2d(x, p[0], p[1], padding=1)).flatten(1) @ p[2].T + p[3],
        params=((4, 3, 3, 3), (4,), (5, 80), (5,)),
    ),
    OpCase(
        "conv2d batch_norm max_pool2d relu",  # the order after fusion of Conv4's block
        (3, 6, 6),
        (
            "conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1",
            "batch_norm 1 weight=2 bias=3 eps=1e-05 mode=batch",
            "relu 2",
            "max_pool2d 3 kernel=2,2 stride=2,2 padding=0,0",
        ),
        lambda p, x: F.max_pool2d(F.relu(written_batch_norm(F.conv2d(x, p[0], p[1], padding=1), p[2], p[3], 1e-5)), 2),
        params=((8, 3, 3, 3), (8,), (8,), (8,)),
        gains=(2,),
        examples=5,
    ),
]


# ---------------------------------------------------------------------------------------------------------- inner loops


@dataclass(frozen=True)
class LoopCase:
    """An inner loop, as csrc/meta/inner_loop.cpp reads it, on one of two small networks."""

    loop: str
    network: str = "mlp"  # or "conv"
    tasks: int = 2
    rates_per_step: bool = False
    support_weights: bool = False
    query_weights: bool = False
    loss_weights: bool = False
    mask: bool = False
    adapted: tuple[int, ...] | None = None  # the parameters whose rate is not zero; None: all

    def __str__(self) -> str:
        flags = ("rates_per_step", "support_weights", "query_weights", "loss_weights", "mask")
        words = [self.network, *self.loop.split(), *(flag for flag in flags if getattr(self, flag))]
        return "-".join(words) + (f"-T{self.tasks}" if self.tasks != 2 else "")

    @property
    def params(self) -> tuple[tuple[int, ...], ...]:
        if self.network == "mlp":
            return (11, 3), (11,), (2, 11), (2,)
        return (5, 2, 3, 3), (5,), (5,), (5,), (3, 20), (3,)

    @property
    def param_count(self) -> int:
        return sum(math.prod(shape) for shape in self.params)

    def program(self, loss: str = "") -> str:
        if self.network == "mlp":
            lines = ("linear 0 weight=0 bias=1", "tanh 1", "linear 2 weight=2 bias=3")
            return program((3,), self.params, lines, loss=loss or "mse")
        lines = (
            "conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1", "batch_norm 1 weight=2 bias=3 eps=1e-3 mode=batch",
            "silu 2", "avg_pool2d 3 kernel=2,2 stride=2,2 padding=0,0 count_include_pad=1", "flatten 4",
            "linear 5 weight=4 bias=5",
        )  # fmt: skip
        return program((2, 4, 4), self.params, lines, loss=loss or "cross_entropy smoothing=0.1")

    @property
    def text(self) -> str:
        return self.program()

    def function(self, p: list[Tensor], x: Tensor) -> Tensor:
        if self.network == "mlp":
            return torch.tanh(x @ p[0].T + p[1]) @ p[2].T + p[3]
        y = F.silu(written_batch_norm(F.conv2d(x, p[0], p[1], padding=1), p[2], p[3], 1e-3))
        return F.avg_pool2d(y, 2).flatten(1) @ p[4].T + p[5]

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """[examples]"""
        if self.network == "mlp":
            return (z - y).square().mean(1)
        wanted = 0.9 * F.one_hot(y, 3).to(z.dtype) + 0.1 / 3
        return -(wanted * (z - torch.logsumexp(z, -1, keepdim=True))).sum(-1)


@dataclass(frozen=True)
class LoopInputs:
    """What the inner loop takes; float64 numbers that float32 holds."""

    theta: Tensor  # [P]
    support_x: Tensor  # [T, N, *input]
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    rates: Tensor  # [1, P] or [K, P]
    support_weights: Tensor | None  # [T, N]
    query_weights: Tensor | None
    loss_weights: Tensor | None  # [K + 1]
    step_rows: Tensor | None  # [K, R]
    lam: Tensor | None  # [1]
    mask: Tensor | None  # [P]

    def to(self, dtype: torch.dtype) -> LoopInputs:
        return LoopInputs(
            **{
                name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in self.__dict__.items()
            }
        )


@cache
def draw_loop(case: LoopCase, seed: int) -> LoopInputs:
    generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, str(case))))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    words = dict(word.split("=") for word in case.loop.split())
    K, T, P = int(words["steps"]), case.tasks, case.param_count
    image = (3,) if case.network == "mlp" else (2, 4, 4)
    support, query = K * int(words.get("minibatch", 0)) or 5, 4

    def y(examples: int) -> Tensor:
        if case.network == "mlp":
            return normal(T, examples, 2)
        return torch.randint(3, (T, examples), generator=generator)

    def positive(*shape: int) -> Tensor:
        return 0.1 + torch.rand(*shape, generator=generator)

    parts = split(torch.arange(P), case.params)
    theta = torch.cat([normal(p.numel()) / math.sqrt(max(1, p[0].numel() if p.dim() > 1 else 1)) for p in parts])
    rates = positive(K if case.rates_per_step else 1, P) * (0.02 if "adam" in case.loop else 0.2)
    listed = [int(row) for row in words.get("rows", "").split(",") if row]
    for i, part in enumerate(parts):
        if i in listed or (case.adapted is not None and i not in case.adapted):
            rates[:, part.reshape(-1)] = 0
    step_rows = None
    if listed:
        rows = torch.cat([parts[i].reshape(-1) for i in listed])
        step_rows = theta[rows] + 0.3 * normal(K, len(rows))
        theta[rows] = step_rows[0]
    mask = (rates[0] != 0).float() if case.mask else None
    inputs = LoopInputs(
        theta,
        normal(T, support, *image),
        y(support),
        normal(T, query, *image),
        y(query),
        rates,
        positive(T, support) / support if case.support_weights else None,
        positive(T, query) / query if case.query_weights else None,
        normal(K + 1) if case.loss_weights else None,
        step_rows,
        positive(1) if "proximal" in words else None,
        mask,
    )
    return inputs.to(torch.float64)


LOOP_CASES: list[LoopCase] = [
    LoopCase("steps=3"),
    LoopCase("steps=3 order=2", rates_per_step=True),
    LoopCase("steps=3 order=0", "conv"),
    LoopCase("steps=3 weight_decay=0.3", rates_per_step=True),
    LoopCase("steps=3 weight_decay=0.3 order=0"),
    LoopCase("steps=2 clip_value=0.05 weight_decay=0.1", "conv"),
    LoopCase("steps=3 clip_value=0.1 order=0"),
    LoopCase("steps=3 clip_norm=0.2", adapted=(2, 3), mask=True),
    LoopCase("steps=3 clip_norm=0.3 weight_decay=0.1 order=2", "conv", rates_per_step=True),
    LoopCase("steps=3 clip_norm=1e6"),
    LoopCase("steps=3 proximal=1", rates_per_step=True),
    LoopCase("steps=3 proximal=1 order=1 weight_decay=0.2", "conv"),
    LoopCase("steps=3 proximal=1 order=0"),
    LoopCase("steps=3 minibatch=2", "conv", support_weights=True),
    LoopCase("steps=2 minibatch=1"),
    LoopCase("steps=3 queries=1,2,3", loss_weights=True, query_weights=True),
    LoopCase("steps=3 queries=0,2 order=1", "conv", loss_weights=True),
    LoopCase("steps=2", loss_weights=True),
    LoopCase("steps=0 queries=0", loss_weights=True),
    LoopCase("steps=3 rows=2,3", "conv"),
    LoopCase("steps=3 rows=2,3 queries=1,2,3", "conv", loss_weights=True, rates_per_step=True),
    LoopCase("steps=4 rows=3,0 queries=1,3 order=2 weight_decay=0.1", "conv", loss_weights=True),
    LoopCase("steps=3 rows=2,3 order=0 queries=2", "conv", loss_weights=True),
    LoopCase("steps=4 momentum=0.9", rates_per_step=True),
    LoopCase("steps=3 momentum=0.7 dampening=0.4 weight_decay=0.1", "conv"),
    LoopCase("steps=3 momentum=0.8 nesterov=1 weight_decay=0.2 order=2", rates_per_step=True),
    LoopCase("steps=3 momentum=0.8 nesterov=1 dampening=0.3 clip_norm=0.4", "conv"),
    LoopCase("steps=3 momentum=0.9 weight_decay=0.3 order=0"),
    LoopCase("steps=3 momentum=0.9 order=0 clip_value=0.1 nesterov=1"),
    LoopCase("steps=3 momentum=0.9 proximal=1 queries=1,2", loss_weights=True),
    LoopCase("steps=3 rule=adam eps=0.001"),
    LoopCase("steps=3 rule=adam eps=0.001 beta1=0 rows=2,3 minibatch=3", "conv", rates_per_step=True),
    LoopCase("steps=4 rule=adam eps=0.01 beta1=0.7 beta2=0.9 weight_decay=0.2 order=2", tasks=3),
    LoopCase("steps=3 rule=adam eps=0.001 weight_decay=0.5 decoupled=1 clip_norm=0.3", rates_per_step=True),
    LoopCase("steps=3 rule=adam eps=0.001 weight_decay=0.5 decoupled=1 order=0", "conv"),
    LoopCase("steps=3 rule=adam eps=0.001 proximal=1 order=0 queries=1", loss_weights=True),
    LoopCase("steps=2 rule=adam eps=0.01 clip_value=0.05 weight_decay=0.2"),
]


# ------------------------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class NetworkCase:
    name: str
    build: Callable[[], nn.Module]
    input: tuple[int, ...]
    outputs: int
    loss: str = "cross_entropy"
    tasks: int = 2
    support: int = 6
    query: int = 7
    inner_lr: float = 0.1
    smooth: bool = False  # no kinks: finite differences and float32 trajectories mean something
    label_smoothing: float = 0.0
    tags: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return self.name


class Residual(nn.Module):
    """Two residual blocks, the second with a strided 1x1 shortcut, as a user writes them."""

    def __init__(self, smooth: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 9, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(6, 9, 1, stride=2, bias=False)
        self.act = nn.SiLU() if smooth else nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.stem(x)))
        x = x + self.act(self.norm2(self.conv1(x)))
        x = self.act(self.conv2(x) + self.shortcut(x))
        return self.head(torch.flatten(self.pool(x), 1))


class InputResidual(nn.Module):
    """Sums in which one branch is the input itself: no tangent and no gradient on that side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.scale = nn.Conv2d(3, 3, 1, stride=2)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(27, 4)

    def forward(self, x: Tensor) -> Tensor:
        inside = x + torch.tanh(self.conv(x))
        y = self.pool(x) + self.scale(inside) + self.pool(inside)
        return self.head(y.flatten(1))


class Tied(nn.Module):
    """One weight matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(x)))


def conv_block(channels: int, filters: int, *, bias: bool = True) -> list[nn.Module]:
    return [nn.Conv2d(channels, filters, 3, padding=1, bias=bias), nn.BatchNorm2d(filters), nn.ReLU(), nn.MaxPool2d(2)]


def conv4(channels: int, filters: int, size: int, ways: int) -> nn.Module:
    blocks = [layer for i in range(4) for layer in conv_block(channels if i == 0 else filters, filters)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(filters * (size // 16) ** 2, ways))


def frozen_body() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].weight.requires_grad_(False)
    return model


MLP = NetworkCase(
    "mlp", lambda: nn.Sequential(nn.Linear(6, 17), nn.ReLU(), nn.Linear(17, 9), nn.ReLU(), nn.Linear(9, 4)), (6,), 4
)
SINE = NetworkCase(
    "sine mlp",
    lambda: nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)),
    (1,), 1, "mse", tasks=9, support=10, query=10, inner_lr=0.01,
)  # fmt: skip
TANH = NetworkCase(
    "tanh mlp",
    lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2)),
    (3,), 2, "mse", tasks=3, smooth=True,
)  # fmt: skip
CONV4 = NetworkCase("conv4", lambda: conv4(1, 5, 16, 3), (1, 16, 16), 3, support=3, query=6)
CONV4_WIDE = NetworkCase(
    "conv4 32 filters", lambda: conv4(3, 32, 20, 5), (3, 20, 20), 5, tasks=1, support=5, query=5, inner_lr=0.05
)
LAYER_NORM = NetworkCase(
    "layer norm gelu",
    lambda: nn.Sequential(
        nn.Linear(7, 12), nn.LayerNorm(12), nn.GELU(),
        nn.Linear(12, 9), nn.LayerNorm(9, eps=1e-3), nn.GELU("tanh"),
        nn.Linear(9, 4),
    ),
    (7,), 4, smooth=True, label_smoothing=0.1,
)  # fmt: skip
RESIDUAL = NetworkCase("residual", Residual, (3, 6, 6), 4)
MAIN_CASES = [MLP, CONV4, LAYER_NORM, RESIDUAL]

NETWORK_CASES: list[NetworkCase] = [
    *MAIN_CASES,
    SINE,
    TANH,
    CONV4_WIDE,
    NetworkCase("residual silu", lambda: Residual(smooth=True), (3, 6, 6), 4, smooth=True),
    NetworkCase(
        "strided conv net",  # MAML's Omniglot network: strides instead of pooling, then the spatial mean
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6, eps=1e-3), nn.ReLU(),
            nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6, eps=1e-3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
        ),
        (1, 9, 9), 5,
    ),
    NetworkCase(
        "group norm net",
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.SiLU(), nn.AvgPool2d(2),
            nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3),
        ),
        (2, 8, 8), 3, smooth=True,
    ),
    NetworkCase(
        "leaky avg pool net",
        lambda: nn.Sequential(
            nn.Conv2d(2, 5, (3, 2), padding=(1, 0)), nn.LeakyReLU(0.2),
            nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
            nn.Conv2d(5, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, affine=False), nn.LeakyReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Identity(), nn.Flatten(), nn.Linear(16, 3, bias=False),
        ),
        (2, 7, 8), 3,
    ),
    NetworkCase(
        "image layer norm net",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.LayerNorm([3, 4, 5]), nn.GELU(), nn.Flatten(), nn.Linear(60, 3)
        ),
        (2, 4, 5), 3, smooth=True,
    ),
    NetworkCase(
        "batch norm mlp",
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(18, 16), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 4),
        ),
        (2, 3, 3), 4, tasks=5,
    ),
    NetworkCase(
        "norms first",  # nothing upstream has parameters: the first layers see no tangent and owe no gradient
        lambda: nn.Sequential(
            nn.MaxPool2d(2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(),
            nn.Linear(12, 7), nn.BatchNorm1d(7), nn.Linear(7, 3),
        ),
        (2, 4, 6), 3,
    ),
    NetworkCase(
        "elu",
        lambda: nn.Sequential(nn.Linear(5, 9), nn.ELU(), nn.Linear(9, 8), nn.ELU(0.4), nn.Linear(8, 3)), (5,), 3,
    ),
    NetworkCase(
        "layer norm first",
        lambda: nn.Sequential(nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)),
        (6,), 2, smooth=True,
    ),
    NetworkCase(
        "group norm first",
        lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
        (4, 4, 4), 3, smooth=True,
    ),
    NetworkCase("input residual", InputResidual, (3, 6, 6), 4, smooth=True),
    NetworkCase("tied weights", Tied, (6,), 3, smooth=True),
    NetworkCase("frozen weight", frozen_body, (5,), 3, smooth=True),
    NetworkCase("linear", lambda: nn.Linear(4, 3), (4,), 3, "mse", smooth=True),
]  # fmt: skip
SMOOTH_CASES = [case for case in NETWORK_CASES if case.smooth]


def build(case: NetworkCase, seed: int = 0) -> nn.Module:
    """The model in float64 with weights that float32 holds; affines and running statistics off their defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case.build()
        for module in model.modules():
            if (
                isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm))
                and module.weight is not None
            ):
                nn.init.normal_(module.weight, 1.0, 0.2)
                nn.init.normal_(module.bias, 0.0, 0.2)
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.normal_(module.running_mean, 0.0, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.double()


def flatten(model: nn.Module) -> Tensor:
    """[P] in the order of named_parameters(), written without the engine."""
    return torch.cat([p.detach().reshape(-1) for _, p in model.named_parameters()])


@dataclass(frozen=True)
class Data:
    support_x: Tensor  # [T, N, *input]
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def to(self, dtype: torch.dtype) -> Data:
        return Data(*(v.to(dtype) if v.is_floating_point() else v for v in self.tuple))

    @property
    def tuple(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.support_x, self.support_y, self.query_x, self.query_y


def draw_data(case: NetworkCase, seed: int = 0, tasks: int | None = None) -> Data:
    """Float64 numbers that float32 holds exactly."""
    generator = torch.Generator().manual_seed(7919 * seed + 13)
    T = case.tasks if tasks is None else tasks

    def x(examples: int) -> Tensor:
        return torch.randn(T, examples, *case.input, generator=generator).double()

    def y(examples: int) -> Tensor:
        if case.loss == "cross_entropy":
            return torch.randint(case.outputs, (T, examples), generator=generator)
        return torch.randn(T, examples, case.outputs, generator=generator).double()

    return Data(x(case.support), y(case.support), x(case.query), y(case.query))
