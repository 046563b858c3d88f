"""The parameters of a module as one flat vector [P], and inner learning rates in the layout of that vector.

The order is that of `model.named_parameters()`. A tied parameter has one entry, a frozen one keeps its place.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

InnerLr = float | Tensor | Mapping[str, Any]


class ParameterLayout:
    """Where each named parameter of a module stands in the flat vector [P]."""

    def __init__(self, model: nn.Module):
        named = dict(model.named_parameters())
        for name, parameter in named.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise TypeError(
                    f"parameter '{name}' has no shape yet; run the model once before making an Engine of it"
                )
        self.names = tuple(named)
        self.shapes = tuple(tuple(p.shape) for p in named.values())
        self.sizes = tuple(p.numel() for p in named.values())
        self.size = sum(self.sizes)
        if self.size == 0:
            raise ValueError(f"the model ({type(model).__name__}) has no parameters, so there is nothing to meta-train")

    def flatten(self, model: nn.Module) -> Tensor:
        """The parameters of a module with this layout as one vector [P], without a graph."""
        named = dict(model.named_parameters())
        if tuple(named) != self.names or tuple(tuple(p.shape) for p in named.values()) != self.shapes:
            raise ValueError(
                f"this model's parameters are not those the Engine was made for ({len(named)} parameters with "
                f"{sum(p.numel() for p in named.values())} entries, not {len(self.names)} with {self.size}); "
                "make a new Engine"
            )
        return torch.cat([p.detach().reshape(-1) for p in named.values()])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector [..., P] as a dict of tensors [..., *shape], in the module's order; keeps the graph."""
        lead = flat.shape[:-1]
        pieces = flat.split(self.sizes, dim=-1)
        return {n: p.reshape((*lead, *s)) for n, p, s in zip(self.names, pieces, self.shapes)}

    def fitting(self, patterns: Sequence[str]) -> list[str]:
        """The names that fit one of the patterns (fnmatch: "head.*", "*.bias"), in the module's order.

        Raises ValueError for a pattern that fits none.
        """
        for pattern in patterns:
            if not fnmatch.filter(self.names, pattern):
                raise ValueError(f"'{pattern}' fits no parameter of the model ({', '.join(self.names)})")
        return [name for name in self.names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]

    def matching(self, patterns: Sequence[str], like: Tensor) -> Tensor:
        """A mask [P] that is 1 on the parameters of `fitting`."""
        chosen = set(self.fitting(patterns))
        return torch.cat([like.new_full((n,), float(name in chosen)) for name, n in zip(self.names, self.sizes)])

    def positions(self, names: Sequence[str]) -> Tensor:
        """The places [R] of the named parameters in the flat vector, one parameter after the other."""
        starts = dict(zip(self.names, [0, *torch.tensor(self.sizes).cumsum(0).tolist()]))
        sizes = dict(zip(self.names, self.sizes))
        return torch.cat([torch.arange(starts[name], starts[name] + sizes[name]) for name in names])

    def trainable(self, model: nn.Module, like: Tensor) -> Tensor | None:
        """A mask [P] that is 0 on frozen parameters (requires_grad=False) and 1 elsewhere; None when none is frozen."""
        flags = [p.requires_grad for p in model.parameters()]
        if all(flags):
            return None
        return torch.cat([like.new_full((n,), float(f)) for n, f in zip(self.sizes, flags)])


def expand_rates(
    inner_lr: InnerLr, layout: ParameterLayout, mask: Tensor | None, like: Tensor, steps: int = 1
) -> Tensor:
    """Inner learning rates as one row [1, P] for all steps, or a row for each [steps, P]; masked entries get 0.

    inner_lr is a number, a tensor [] or [1] (one rate), [P] (one per entry), [K, 1] or [K, P] (a row per step), or a
    dict from each parameter's name to a number, a tensor [] or of the parameter's shape, or one with a dimension for
    the steps in front: [K, *shape] or [K, 1, ..., 1]. Steps beyond the rows reuse the last row.
    """
    rates = _rows(_checked_rates(inner_lr, layout, mask, like), layout, steps, like)
    return (rates if mask is None else rates * mask).contiguous()


def collapse_rates(
    grad: Tensor, inner_lr: InnerLr, layout: ParameterLayout, mask: Tensor | None, like: Tensor, steps: int = 1
) -> Any:
    """The gradient of expanded rates [1 or steps, P] as that of inner_lr: summed over whatever each rate is shared by."""
    with torch.enable_grad():
        given = _checked_rates(inner_lr, layout, mask, like)
        leaves = {name: rate.clone().requires_grad_() for name, rate in given.items()}
        rows = _rows(leaves, layout, steps, like)
        grads = torch.autograd.grad(rows, list(leaves.values()), grad if mask is None else grad * mask)
    by_name: dict[str | None, Tensor] = dict(zip(leaves, grads))
    return by_name if isinstance(inner_lr, Mapping) else by_name[None]


def _checked_rates(
    inner_lr: InnerLr, layout: ParameterLayout, mask: Tensor | None, like: Tensor
) -> dict[str | None, Tensor]:
    """The rates as tensors without a graph, by parameter name; None is the name of one rate tensor for all."""
    if isinstance(inner_lr, Mapping):
        return _checked_dict(inner_lr, layout, mask, like)
    if not isinstance(inner_lr, Tensor):
        return {None: like.new_tensor(_number_rate("inner_lr", inner_lr))}
    rates = _tensor_rate("inner_lr", inner_lr, like)
    one_row = rates.dim() <= 1 and rates.numel() in (1, layout.size)
    if not one_row and not (rates.dim() == 2 and len(rates) > 0 and rates.shape[1] in (1, layout.size)):
        raise ValueError(
            f"inner_lr {list(inner_lr.shape)} is neither one rate [] nor one per parameter entry [{layout.size}] nor "
            f"a row of them per step [steps, 1] or [steps, {layout.size}]"
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
                raise ValueError(f"inner_lr has no rate for parameter '{name}'; give it 0.0 to leave it as it is")
            continue
        rate = inner_lr[name]
        if not isinstance(rate, Tensor):
            rates[name] = like.new_tensor(_number_rate(f"inner_lr['{name}']", rate))
            continue
        value = _tensor_rate(f"inner_lr['{name}']", rate, like)
        per_step = value.dim() == len(shape) + 1 and tuple(value.shape[1:]) in (shape, (1,) * len(shape))
        if value.dim() > 0 and tuple(value.shape) != shape and not per_step:
            raise ValueError(
                f"inner_lr['{name}'] {list(value.shape)} fits neither one rate [] nor the parameter {list(shape)} nor "
                f"a row of either per step {['steps', *shape]}"
            )
        rates[name] = value
    return rates


def _rows(rates: dict[str | None, Tensor], layout: ParameterLayout, steps: int, like: Tensor) -> Tensor:
    """[1, P], or [steps, P] where a rate has a row per step. Differentiable by the rates."""
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
    index = torch.arange(max(steps, 1), device=rate.device).clamp(max=len(rate) - 1)
    return rate[index]


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
