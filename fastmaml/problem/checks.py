"""Checks of the Engine's inputs. Each error is one sentence with the shapes or values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def vector(name: str, value: Any, size: int) -> None:
    """Checks that `value` is a floating point vector [P], or one for each task [T, P]."""
    _floating(name, value)
    fits = value.dim() in (1, 2) and value.shape[-1] == size
    if not fits:
        raise ValueError(f"{name} {shape(value)} must be [{size}] or [tasks, {size}], like the model's parameters")


def tasks_of(name: str, params: Tensor, x: Tensor) -> None:
    if params.dim() == 2 and params.shape[0] != x.shape[0]:
        raise ValueError(
            f"{name} {shape(params)} holds {params.shape[0]} tasks but the examples {shape(x)} hold {x.shape[0]}"
        )


def examples(name: str, x: Any, like: Tensor) -> None:
    """Checks that `x` [T, N, ...] has tasks and examples, finite numbers, and the parameters' type and device."""
    _floating(name, x)
    if x.dim() < 2:
        raise ValueError(f"{name} {shape(x)} does not begin with [tasks, examples]")
    if x.shape[0] == 0:
        raise ValueError(f"{name} {shape(x)} holds no tasks")
    if x.shape[1] == 0:
        raise ValueError(f"{name} {shape(x)} holds no examples")
    same_place(name, x, like)
    finite(name, x)


def same_place(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device} but the parameters are on {like.device}; move one of them")
    if x.dtype != like.dtype:
        raise ValueError(f"{name} is {x.dtype} but the parameters are {like.dtype}; convert one of them")


def finite(name: str, x: Tensor) -> None:
    if math.isfinite(x.sum().item()):  # one pass; if a sum of finite numbers overflows, the entries are checked below
        return
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        raise ValueError(f"{name} {shape(x)} holds {int(bad.sum())} NaN or infinite values, the first at {where}")


def labels(name: str, y: Any, x_name: str, x: Tensor, classes: int) -> None:
    """Checks that `y` [T, N] holds integer labels in [0, classes)."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{name} must be a tensor of labels, not {type(y).__name__}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"{name} is {y.dtype}; cross_entropy takes integer labels")
    if y.shape != x.shape[:2]:
        raise ValueError(f"{name} {shape(y)} does not give one label to each example of {x_name} {shape(x)}")
    if y.device != x.device:
        raise ValueError(f"{name} is on {y.device} but {x_name} is on {x.device}; move one of them")
    low, high = (int(v) for v in torch.aminmax(y))
    if low < 0 or high >= classes:
        raise ValueError(
            f"{name} holds labels from {low} to {high}, but the network has {classes} outputs (0 to {classes - 1})"
        )


def targets(name: str, y: Any, x_name: str, x: Tensor, output_shape: tuple[int, ...]) -> None:
    """Checks that `y` [T, N, *output] fits the network's output and holds finite numbers."""
    _floating(name, y)
    if y.shape[:2] != x.shape[:2] or y.shape[2:] != output_shape:
        raise ValueError(f"{name} {shape(y)} does not fit the network's output {[*x.shape[:2], *output_shape]}")
    same_place(name, y, x)
    finite(name, y)


def any_target(name: str, y: Any, x_name: str, x: Tensor) -> None:
    """Checks `y` [T, N, ...] of any type, for a loss written in Python."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(y).__name__}")
    if y.shape[:2] != x.shape[:2]:
        raise ValueError(f"{name} {shape(y)} does not begin with [tasks, examples] of {x_name} {shape(x)}")
    if y.device != x.device:
        raise ValueError(f"{name} is on {y.device} but {x_name} is on {x.device}; move one of them")
    if y.is_floating_point():
        finite(name, y)


def weights(name: str, w: Any, expected: tuple[int, ...], like: Tensor) -> Tensor:
    """Checks that `w` has this shape, finite numbers, and the parameters' type and device. Returns it contiguous."""
    _floating(name, w)
    if w.shape != expected:
        raise ValueError(f"{name} {shape(w)} must be {list(expected)}")
    same_place(name, w, like)
    finite(name, w)
    return w.detach().contiguous()


def same_tasks(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape[0] != other.shape[0]:
        raise ValueError(f"{name} {shape(x)} and {other_name} {shape(other)} hold different numbers of tasks")
    if x.shape[2:] != other.shape[2:]:
        raise ValueError(f"{name} {shape(x)} and {other_name} {shape(other)} hold examples of different shapes")


def whole_number(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
    return value


def number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")
    return float(value)


def _floating(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} {shape(x)} is {x.dtype}; it must be a floating point tensor")
