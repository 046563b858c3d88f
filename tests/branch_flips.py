# Finds masks and argmaxes that differ between float32 and the float64 reference. A flip is a decision, not an arithmetic
# error, so such draws are left out of the float32 rule, by name (ALGORITHMS section 7).
from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import KINKED
from torch import Tensor


def _prefixes(text: str) -> list[tuple[str, dict[str, str], str]]:
    """For every kinked layer: (its kind and number, its settings, the Program that ends with the layer's input)."""
    lines = text.strip().splitlines()
    is_layer = [line.split()[0] not in ("fastmaml", "input", "param", "buffer", "output", "loss") for line in lines]
    first = is_layer.index(True) if any(is_layer) else len(lines)
    found = []
    for i, line in enumerate(lines):
        kind, *words = line.split()
        if is_layer[i] and kind in (*KINKED, "max_pool2d"):
            value = int(words[0])
            kept = lines[: first + value]  # layer line k makes value k + 1; the layer's own input is `value`
            settings = dict(word.split("=") for word in words[1:])
            found.append(
                (f"{kind} {i - first + 1}", settings, "\n".join([*kept, f"output {value}", "loss none"]) + "\n")
            )
    return found


def branch_flips(text: str, params: Tensor, exact_params: Tensor, x: Tensor, buffers: Tensor) -> list[str]:
    """Names of `cpu`'s float32 decisions at params that differ from `reference`'s at exact_params, for inputs x."""
    flips = []
    shape = [int(word) for word in text.splitlines()[1].split()[1:]]
    for name, settings, prefix in _prefixes(text):
        if prefix.splitlines()[-2] == "output 0":
            ours, exact = x.float(), x.double()
        else:
            ours = torch.ops.fastmaml.forward(prefix, "cpu", params.float(), x.float(), None, buffers.float())
            exact = torch.ops.fastmaml.forward(
                prefix, "reference", exact_params.double(), x.double(), None, buffers.double()
            )
        assert list(x.shape[2:]) == shape
        if name.startswith("max_pool2d"):
            kernel, stride, padding = (
                tuple(int(n) for n in settings[key].split(",")) for key in ("kernel", "stride", "padding")
            )
            a, b = (
                F.max_pool2d(v.flatten(0, 1), kernel, stride, padding, return_indices=True)[1] for v in (ours, exact)
            )
        else:
            a, b = ours > 0, exact > 0
        differ = int((a != b).sum())
        if differ:
            flips.append(f"{name}: {differ} of {a.numel()}")
    return flips
