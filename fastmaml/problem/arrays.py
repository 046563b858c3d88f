"""numpy and cupy arrays instead of tensors, without copies.

A method wrapped in `any_arrays` takes arrays wherever it takes tensors. It returns the array type of its first argument.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])


def any_arrays(method: Method) -> Method:
    """Lets a method of tensors also take numpy and cupy arrays, even inside tuples, lists and dicts."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _hold_array(args) and not (kwargs and _hold_array(kwargs.values())):
            return method(self, *args, **kwargs)
        first = args[0] if args else next(iter(kwargs.values()))
        back = _to_numpy if isinstance(first, np.ndarray) else _to_cupy if _is_cupy(first) else _same
        result = method(self, *_over(_to_tensor, args), **_over(_to_tensor, kwargs))
        return _over(back, result)

    return wrapped  # type: ignore[return-value]


def _is_cupy(x: Any) -> bool:
    cupy = sys.modules.get("cupy")  # anyone with a cupy array has imported cupy
    return cupy is not None and isinstance(x, cupy.ndarray)


def _hold_array(parts: Iterable[Any]) -> bool:
    """Whether one of the parts is or holds an array. Skips the most frequent types first."""
    for part in parts:
        if isinstance(part, (Tensor, float, int, str, type(None))):
            continue
        if isinstance(part, (tuple, list)):
            if _hold_array(part):
                return True
        elif isinstance(part, dict):
            if _hold_array(part.values()):
                return True
        elif isinstance(part, np.ndarray) or _is_cupy(part):
            return True
    return False


def _over(function: Callable[[Any], Any], x: Any) -> Any:
    """The same structure with `function` applied to its leaves."""
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_over(function, part) for part in x))
    if isinstance(x, (tuple, list)):
        return type(x)(_over(function, part) for part in x)
    if isinstance(x, Mapping):
        return {name: _over(function, part) for name, part in x.items()}
    return function(x)


def _to_tensor(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "fiub" or x.dtype.byteorder == (">" if sys.byteorder == "little" else "<"):
            raise TypeError(
                f"arrays of {x.dtype} are not supported; give floats, integers or bools in native byte order"
            )
        # torch supports neither negative strides nor read-only memory
        shared = x if x.flags.writeable and all(s >= 0 for s in x.strides) else x.copy()
        return torch.from_numpy(shared)
    return torch.from_dlpack(x) if _is_cupy(x) else x


def _to_numpy(x: Any) -> Any:
    return x.numpy() if isinstance(x, Tensor) else x


def _to_cupy(x: Any) -> Any:
    return sys.modules["cupy"].from_dlpack(x) if isinstance(x, Tensor) else x


def _same(x: Any) -> Any:
    return x
