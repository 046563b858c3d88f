# Which backends fuse batch norm, max-pool and ReLU into one layer, and ReLU into its neighbours. Also the plans that show it.
from __future__ import annotations

import pytest
from cases import OpCase, conv_rectified_conv, linear_rectified_linear, norm_pool_act

_C = pytest.importorskip("fastmaml._C")

CASES = [norm_pool_act((4, 6, 6), (2, 2)), norm_pool_act((4, 6, 6), act="leaky_relu")]
PARTS = {"batch_norm_fwd", "batch_norm_bwd_weight", "batch_norm_bwd_data", "pointwise_fwd", "pointwise_bwd"}
WHOLE = {"norm_pool_act_fwd", "norm_pool_act_bwd_weight", "norm_pool_act_bwd_data"}


def ops(case: OpCase, backend: str) -> set[str]:
    text = case.text.replace("loss none", "loss mse")
    return {line.split()[0] for line in _C.steps(text, "grad", backend, 8, 3, 0).splitlines()}


@pytest.mark.parametrize(
    "backend, case",
    [
        ("reference", CASES[0]),
        ("reference", CASES[1]),
        ("cpu", CASES[0]),
        ("cpu", CASES[1]),
        ("cuda_emulated", CASES[0]),
    ],
    ids=str,
)
def test_a_backend_with_the_ops_runs_one_layer(case, backend):
    listed = ops(case, backend)
    assert listed >= WHOLE - {"norm_pool_act_bwd_data"}  # nobody asked for the gradient by the input
    assert not {op for op in listed if op in PARTS or op.startswith("max_pool2d")}
    assert "batch_norm_stats" in listed


def test_a_resident_walk_runs_the_parts():
    listed = ops(CASES[1], "cuda_emulated")
    assert not {op for op in listed if op.startswith("norm_pool_act")}
    assert listed >= PARTS - {"batch_norm_bwd_data"}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_fused_plan_takes_less_memory(backend):
    # x, and y, the winners and their taps at a quarter of the pixels - instead of x, the norm's output and three quarters.
    text = norm_pool_act((32, 16, 16), (2, 2)).text.replace("loss none", "loss mse")
    apart = text.replace("relu 1", "leaky_relu 1 slope=0")  # a slope of 0 is not a ReLU's 0, so nothing is joined
    assert apart != text
    fused, parts = (_C.arena_bytes(t, "grad", backend, 8, 3, 0) for t in (text, apart))
    assert fused < 0.7 * parts


CONV, MLP = conv_rectified_conv((2, 5, 5), 4), linear_rectified_linear((3, 5, 2))


# The CPU's small networks, whose tasks go side by side, have rectifiers in their layers; the others keep their ReLU.
@pytest.mark.parametrize(
    "backend, case", [("reference", CONV), ("reference", MLP), ("cuda_emulated", CONV), ("cpu", MLP)], ids=str
)
def test_a_backend_that_rectifies_runs_no_relu_of_its_own(case, backend):
    assert not {op for op in ops(case, backend) if op.startswith("pointwise")}


@pytest.mark.parametrize("backend, case", [("cpu", CONV), ("cuda_emulated", MLP)], ids=str)
def test_a_backend_that_does_not_or_a_resident_walk_runs_it(case, backend):
    assert ops(case, backend) >= {"pointwise_fwd", "pointwise_bwd"}


def test_what_was_rectified_takes_no_memory():
    case = conv_rectified_conv((2, 16, 16), 32)
    text = case.text.replace("loss none", "loss mse")
    fused, parts = (_C.arena_bytes(text, "grad", backend, 8, 3, 0) for backend in ("reference", "cpu"))
    assert fused < 0.8 * parts
