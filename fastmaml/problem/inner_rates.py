"""Inner learning rates in the layout of the flat vector [P]: expands rates for the engine, collapses their gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmaml.inner import InnerLr
from fastmaml.problem.parameters import ParameterLayout


def expand_rates(
    inner_lr: InnerLr, layout: ParameterLayout, mask: Tensor | None, like: Tensor, steps: int = 1
) -> Tensor:
    """Inner learning rates as one row [1, P] for all steps, or a row per step [steps, P]. Masked entries get 0.

    inner_lr is one of:
        a number, or a tensor [] or [1]: one rate
        a tensor [P]: a rate per entry
        a tensor [K, 1] or [K, P]: a row per step
        a dict from each parameter's name to a number or a tensor: [], the parameter's shape, or per step [K, *shape] or
        [K, 1, ..., 1]

    Steps beyond the last row reuse the last row. One rate for all parameters is returned as an expanded view, which the
    engine recognises.
    """
    if isinstance(inner_lr, (int, float)) and mask is None:
        return like.new_full((1, 1), _number_rate("inner_lr", inner_lr)).expand(1, layout.size)
    rates = _rows(_checked_rates(inner_lr, layout, mask, like), layout, steps, like)
    return rates if mask is None else rates * mask


def collapse_rates(grad: Tensor, inner_lr: InnerLr, layout: ParameterLayout, mask: Tensor | None, like: Tensor) -> Any:
    """The gradient by inner_lr from the gradient by expanded rates [1 or steps, P]: sums over all uses of each rate."""
    if mask is not None:
        grad = grad * mask
    if isinstance(inner_lr, (int, float)):
        return grad.sum()
    rates = _checked_rates(inner_lr, layout, mask, like)
    if None in rates:
        return _collapsed(grad, rates[None], (layout.size,))
    pieces = dict(zip(layout.names, grad.split(layout.sizes, dim=1)))
    shapes = dict(zip(layout.names, layout.shapes))
    return {
        name: _collapsed(pieces[name].reshape(-1, *shapes[name]), rate, shapes[name])
        for name, rate in rates.items()
        if name is not None
    }


def _collapsed(grad: Tensor, rate: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sums a gradient [steps, *shape] to the shape of its rate, which may have a row per step."""
    if rate.dim() == len(shape) + 1:
        rows = grad.new_zeros((len(rate), *shape))
        return rows.index_add(0, _row_of_step(rate, len(grad)), grad).sum_to_size(rate.shape)
    return grad.sum_to_size(rate.shape)


def _checked_rates(
    inner_lr: InnerLr, layout: ParameterLayout, mask: Tensor | None, like: Tensor
) -> dict[str | None, Tensor]:
    """The rates as tensors without a graph, by parameter name. The name None means one tensor for all parameters."""
    if isinstance(inner_lr, Mapping):
        return _checked_dict(inner_lr, layout, mask, like)
    if not isinstance(inner_lr, Tensor):
        return {None: like.new_tensor(_number_rate("inner_lr", inner_lr))}
    rates = _tensor_rate("inner_lr", inner_lr, like)
    one_row = rates.dim() <= 1 and rates.numel() in (1, layout.size)
    if not one_row and not (rates.dim() == 2 and len(rates) > 0 and rates.shape[1] in (1, layout.size)):
        raise ValueError(
            f"inner_lr {list(inner_lr.shape)} must be one rate [], a rate per parameter entry [{layout.size}], or a row "
            f"per step: [steps, 1] or [steps, {layout.size}]"
        )
    return {None: rates}


def _checked_dict(
    inner_lr: Mapping[str, Any], layout: ParameterLayout, mask: Tensor | None, like: Tensor
) -> dict[str | None, Tensor]:
    unknown = [name for name in inner_lr if name not in layout.names]
    if unknown:
        raise ValueError(
            f"inner_lr names '{unknown[0]}', which is not a parameter of the model ({', '.join(layout.names)})"
        )
    still = dict.fromkeys(layout.names, False)
    if mask is not None:
        still = {name: not bool(piece.any()) for name, piece in layout.split(mask).items()}
    rates: dict[str | None, Tensor] = {}
    for name, shape in zip(layout.names, layout.shapes):
        if name not in inner_lr:
            if not still[name]:
                raise ValueError(f"inner_lr has no rate for parameter '{name}'; give 0.0 to keep the parameter fixed")
            continue
        rate = inner_lr[name]
        if not isinstance(rate, Tensor):
            rates[name] = like.new_tensor(_number_rate(f"inner_lr['{name}']", rate))
            continue
        value = _tensor_rate(f"inner_lr['{name}']", rate, like)
        per_step = value.dim() == len(shape) + 1 and tuple(value.shape[1:]) in (shape, (1,) * len(shape))
        if value.dim() > 0 and tuple(value.shape) != shape and not per_step:
            raise ValueError(
                f"inner_lr['{name}'] {list(value.shape)} must be one rate [], the parameter's shape {list(shape)}, or "
                f"a row per step {['steps', *shape]}"
            )
        rates[name] = value
    return rates


def _rows(rates: dict[str | None, Tensor], layout: ParameterLayout, steps: int, like: Tensor) -> Tensor:
    """[1, P], or [steps, P] if a rate has a row per step."""
    if None in rates:
        rate = rates[None]
        return _step_rows(rate, steps).expand(-1, layout.size) if rate.dim() == 2 else rate.expand(1, layout.size)
    blocks = []
    for name, shape, size in zip(layout.names, layout.shapes, layout.sizes):
        if name not in rates:
            blocks.append(like.new_zeros((1, size)))
            continue
        rate = rates[name]
        if rate.dim() == len(shape) + 1 and rate.dim() > 0:
            blocks.append(_step_rows(rate, steps).expand(-1, *shape).reshape(-1, size))
        else:
            blocks.append(rate.expand(shape).reshape(1, size))
    rows = max(len(block) for block in blocks)
    return torch.cat([block.expand(rows, -1) for block in blocks], dim=1)


def _step_rows(rate: Tensor, steps: int) -> Tensor:
    return rate[_row_of_step(rate, max(steps, 1))]


def _row_of_step(rate: Tensor, steps: int) -> Tensor:
    """The row of a rate that each step uses. Steps beyond the last row use the last row."""
    return torch.arange(steps, device=rate.device).clamp(max=len(rate) - 1)


def _number_rate(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, a tensor or a dict by parameter name, not {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; a learning rate must be finite")
    return float(value)


def _tensor_rate(name: str, value: Tensor, like: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise TypeError(f"{name} is {value.dtype}; a learning rate must be a floating point tensor")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but the parameters are on {like.device}")
    value = value.detach()
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds NaN or infinity; a learning rate must be finite")
    return value.to(like.dtype)
