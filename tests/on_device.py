# Tests hold their tensors on the CPU. Under `moved_to` the operators of backend "cuda" copy them to the device, and the
# results back. So every test runs unchanged on a GPU.
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from fastmaml.compiled import loading
from fastmaml.engine import backend as choosing

OPS = ("forward", "grad", "hvp", "linearise", "curvature", "vjp", "adapt", "meta_gradient", "solve", "passes")
ON_THE_HOST = ("plain_meta_gradient", "scaled_parts")  # refuse backend "cuda", whose engines then call the others


@contextmanager
def moved_to(device: str, backend: str) -> Iterator[None]:
    """Within the block "cuda" means `backend` on `device`: ("cuda", "cuda"), or the emulator instead."""

    def moving(op: Any) -> Any:
        def call(text: str, name: str, *given: Any) -> Any:
            if name.split(":")[0] != "cuda":
                return op(text, name, *given)
            if "loss caller" in text:
                pytest.skip("a loss in Python needs tensors on the device: tests/unit/test_engine_cuda.py")
            there = (g.to(device) if isinstance(g, torch.Tensor) else g for g in given)
            result = op(text, name.replace("cuda", backend, 1), *there)
            return result.cpu() if isinstance(result, torch.Tensor) else tuple(r.cpu() for r in result)

        call.default = call  # type: ignore[attr-defined]  # the engine asks for an operator's one overload
        return call

    ops = {op: moving(getattr(torch.ops.fastmaml, op)) for op in OPS}
    with mock.patch.multiple(torch.ops.fastmaml, **ops), mock.patch.object(choosing, "_device_of", lambda name: "cpu"):
        yield


def why_no_cuda() -> str:
    """ "" if this machine can run the CUDA backend, else a sentence that says why not."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return loading.load_cuda()
