"""The parameters of a module as one flat vector [P].

The order is that of `model.named_parameters()`. A tied parameter appears once; a frozen one keeps its place.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

_shape_of = attrgetter("shape")


class ParameterLayout:
    """The place of each named parameter of a module in the flat vector [P]."""

    def __init__(self, model: nn.Module):
        named = dict(model.named_parameters())
        for name, parameter in named.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise TypeError(f"parameter '{name}' has no shape yet; run the model once before you create an Engine")
        self.names = tuple(named)
        self.shapes = tuple(tuple(p.shape) for p in named.values())
        self._torch_shapes = [p.shape for p in named.values()]
        self.dims = [
            n for shape in self.shapes for n in (len(shape), *shape)
        ]  # in the form of the operator scaled_parts
        self.sizes = tuple(p.numel() for p in named.values())
        self.size = sum(self.sizes)
        # Templates by which torch cuts a vector; each holds one number. Torch changes the shape of empty templates.
        self._templates = None if 0 in self.sizes else tuple(torch.empty(()).expand(shape) for shape in self.shapes)
        if self.size == 0:
            raise ValueError(f"the model ({type(model).__name__}) has no parameters, so there is nothing to meta-train")

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """The named parameters of a module with this layout as one vector [P]: a copy without a graph."""
        parts = self.parts(named)
        with torch.no_grad():
            flat = _flatten_dense_tensors(parts)
            return flat.clone() if len(parts) == 1 else flat  # for a single part torch returns a view

    def parts(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """The named parameters of a module with this layout, in its order."""
        parameters = list(named.values())
        if tuple(named) != self.names or list(map(_shape_of, parameters)) != self._torch_shapes:
            raise ValueError(
                f"this model's parameters do not fit the Engine's model ({len(named)} parameters with "
                f"{sum(p.numel() for p in parameters)} entries, not {len(self.names)} with {self.size}); "
                "create a new Engine"
            )
        return parameters

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector [..., P] as a dict of tensors [..., *shape], in the module's order. Keeps the graph."""
        lead = flat.shape[:-1]
        pieces = flat.split(self.sizes, dim=-1)
        return {n: p.reshape((*lead, *s)) for n, p, s in zip(self.names, pieces, self.shapes)}

    def cut(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The parts of `split` for a vector [P], in one call of torch. Does not work under torch.func."""
        if self._templates is None:
            return tuple(self.split(flat).values())
        return tuple(_unflatten_dense_tensors(flat, self._templates))

    def fitting(self, patterns: Sequence[str]) -> list[str]:
        """The names that fit one of the patterns (fnmatch: "head.*", "*.bias"), in the module's order.

        Raises ValueError for a pattern that fits no name.
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
        """The indices [R] of the named parameters in the flat vector, in the order of `names`."""
        starts = dict(zip(self.names, [0, *torch.tensor(self.sizes).cumsum(0).tolist()]))
        sizes = dict(zip(self.names, self.sizes))
        return torch.cat([torch.arange(starts[name], starts[name] + sizes[name]) for name in names])

    def trainable(self, parameters: Iterable[Tensor], like: Tensor) -> Tensor | None:
        """A mask [P]: 0 on frozen parameters (requires_grad=False), 1 elsewhere. None if no parameter is frozen."""
        flags = [p.requires_grad for p in parameters]
        if all(flags):
            return None
        return torch.cat([like.new_full((n,), float(f)) for n, f in zip(self.sizes, flags)])
