"""The parameters of a module as one flat vector [P], and inner learning rates in the layout of that vector.

The order is that of `model.named_parameters()`. A tied parameter has one entry, a frozen one keeps its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
        return {n: p.reshape(*lead, *s) for n, p, s in zip(self.names, pieces, self.shapes)}

    def trainable(self, model: nn.Module, like: Tensor) -> Tensor | None:
        """A mask [P] that is 0 on frozen parameters (requires_grad=False) and 1 elsewhere; None when none is frozen."""
        flags = [p.requires_grad for p in model.parameters()]
        if all(flags):
            return None
        return torch.cat([like.new_full((n,), float(f)) for n, f in zip(self.sizes, flags)])


def expand_rates(inner_lr: InnerLr, layout: ParameterLayout, mask: Tensor | None, like: Tensor) -> Tensor:
    """Inner learning rates as one row [1, P]; frozen parameters get 0.

    inner_lr is a number, a tensor [] or [1] (one rate), a tensor [P] (one per entry), or a dict from each parameter's
    name to a number, a 0-d tensor or a tensor of the parameter's shape.
    """
    if isinstance(inner_lr, Mapping):
        rates = torch.cat(_dict_rates(inner_lr, layout, mask, like))
    elif isinstance(inner_lr, Tensor):
        rates = _tensor_rate("inner_lr", inner_lr, like)
        if rates.dim() > 1 or rates.numel() not in (1, layout.size):
            raise ValueError(
                f"inner_lr {list(inner_lr.shape)} is neither one rate [] nor one per parameter entry [{layout.size}]"
            )
        rates = rates.reshape(-1).expand(layout.size)
    else:
        rates = like.new_full((layout.size,), _number_rate("inner_lr", inner_lr))
    if mask is not None:
        rates = rates * mask
    return rates.reshape(1, -1).contiguous()


def collapse_rates(grad: Tensor, inner_lr: InnerLr, layout: ParameterLayout) -> Any:
    """The gradient of the rates [P], summed over whatever each rate is shared across: same form as inner_lr."""
    if isinstance(inner_lr, Mapping):
        pieces = layout.split(grad)
        return {
            name: pieces[name] if isinstance(rate, Tensor) and rate.dim() > 0 else pieces[name].sum()
            for name, rate in inner_lr.items()
        }
    if not isinstance(inner_lr, Tensor) or inner_lr.dim() == 0:
        return grad.sum()
    return grad.clone() if inner_lr.numel() == layout.size else grad.sum().reshape(1)


def _dict_rates(
    inner_lr: Mapping[str, Any], layout: ParameterLayout, mask: Tensor | None, like: Tensor
) -> list[Tensor]:
    unknown = [name for name in inner_lr if name not in layout.names]
    if unknown:
        raise ValueError(
            f"inner_lr names '{unknown[0]}', which is not a parameter of the model ({', '.join(layout.names)})"
        )
    frozen = dict.fromkeys(layout.names, False)
    if mask is not None:
        frozen = {name: not bool(piece.any()) for name, piece in layout.split(mask).items()}
    rows = []
    for name, shape, size in zip(layout.names, layout.shapes, layout.sizes):
        if name not in inner_lr:
            if not frozen[name]:
                raise ValueError(f"inner_lr has no rate for parameter '{name}'; give it 0.0 to leave it as it is")
            rows.append(like.new_zeros(size))
            continue
        rate = inner_lr[name]
        if not isinstance(rate, Tensor):
            rows.append(like.new_full((size,), _number_rate(f"inner_lr['{name}']", rate)))
            continue
        value = _tensor_rate(f"inner_lr['{name}']", rate, like)
        if value.dim() > 0 and tuple(value.shape) != shape:
            raise ValueError(
                f"inner_lr['{name}'] {list(value.shape)} fits neither one rate [] nor the parameter {list(shape)}"
            )
        rows.append(value.reshape(-1).expand(size) if value.dim() == 0 else value.reshape(-1))
    return rows


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
