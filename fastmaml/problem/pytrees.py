"""Packs several inputs or outputs of a module, and integer inputs, into one floating point tensor and back.

The engine takes one tensor [T, N, ...] of examples. A module that takes (tokens, mask) or returns two heads runs on
autodiff, with its tensors packed into one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Packing:
    """The structure of examples: how tensors [N, *shape] of any type are packed into one tensor [N, F]."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    structure: Any

    @classmethod
    def of(cls, values: Any, lead: int) -> Packing:
        """The packing of tensors that share their `lead` first dimensions."""
        leaves, structure = pytree.tree_flatten(values)
        shapes = tuple(tuple(leaf.shape[lead:]) for leaf in leaves)
        return cls(shapes, tuple(leaf.dtype for leaf in leaves), structure)

    def pack(self, values: Any, lead: int, dtype: torch.dtype) -> Tensor:
        leaves = [leaf.to(dtype) for leaf in pytree.tree_leaves(values)]
        if len(leaves) == 1:  # keeps its shape, for error messages
            return leaves[0]
        return torch.cat([leaf.reshape(*leaf.shape[:lead], -1) for leaf in leaves], dim=lead)

    def unpack(self, packed: Tensor, lead: int) -> Any:
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        pieces = packed.split(sizes, dim=lead) if len(sizes) > 1 else (packed,)
        leaves = [
            # Floating point inputs get the parameters' type, like a single input.
            piece.reshape(*packed.shape[:lead], *shape).to(packed.dtype if dtype.is_floating_point else dtype)
            for piece, shape, dtype in zip(pieces, self.shapes, self.dtypes)
        ]
        return pytree.tree_unflatten(leaves, self.structure)


def is_one_tensor(values: Any) -> bool:
    """Whether the values are one tensor already, so no packing is needed."""
    return isinstance(values, Tensor) and values.is_floating_point()


def check_inputs(name: str, values: Any, dtype: torch.dtype) -> None:
    """Raises TypeError or ValueError, in one sentence, for inputs that cannot be packed."""
    leaves = pytree.tree_leaves(values)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(f"{name} must be a tensor, not {type(values).__name__}")
    leads = {tuple(leaf.shape[:2]) for leaf in leaves}
    if len(leads) != 1 or any(leaf.dim() < 2 for leaf in leaves):
        shapes = ", ".join(str(list(leaf.shape)) for leaf in leaves)
        raise ValueError(f"the inputs of {name} ({shapes}) must begin with the same [tasks, examples]")
    exact = 2 / torch.finfo(dtype).eps
    for leaf in leaves:
        if (
            not leaf.is_floating_point()
            and leaf.numel()
            and int(leaf.abs().max() if leaf.dtype != torch.bool else 1) > exact
        ):
            raise ValueError(f"{name} holds integers beyond {int(exact)}, which {dtype} cannot represent exactly")
