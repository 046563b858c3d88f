# Program text, and flat vectors as tensors.
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

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
