"""Cases as data: every numeric test runs them on every backend.

OP_CASES are single fused layers (op_list.py, made by ops.py), LOOP_CASES are inner loops (loops.py), and NETWORK_CASES are whole
models (networks.py).
"""

from cases.loops import LOOP_CASES, LoopCase, LoopInputs, draw_loop
from cases.networks import (
    CONV4,
    LAYER_NORM,
    MAIN_CASES,
    MLP,
    NETWORK_CASES,
    RESIDUAL,
    SINE,
    SMOOTH_CASES,
    TANH,
    Data,
    NetworkCase,
    build,
    draw_data,
    flatten,
)
from cases.op_list import OP_CASES
from cases.ops import (
    KINKED,
    POINTWISE,
    OpCase,
    OpInputs,
    batch_norm,
    batch_norm_frozen,
    conv2d,
    conv_rectified_conv,
    draw_op,
    group_norm,
    layer_norm,
    linear,
    linear_rectified_linear,
    norm_pool_act,
    pool2d,
    torch_pointwise,
)
from cases.programs import program, split

__all__ = [
    "CONV4",
    "KINKED",
    "LAYER_NORM",
    "LOOP_CASES",
    "MAIN_CASES",
    "MLP",
    "NETWORK_CASES",
    "OP_CASES",
    "POINTWISE",
    "RESIDUAL",
    "SINE",
    "SMOOTH_CASES",
    "TANH",
    "Data",
    "LoopCase",
    "LoopInputs",
    "NetworkCase",
    "OpCase",
    "OpInputs",
    "batch_norm",
    "batch_norm_frozen",
    "build",
    "conv2d",
    "conv_rectified_conv",
    "draw_data",
    "draw_loop",
    "draw_op",
    "flatten",
    "group_norm",
    "layer_norm",
    "linear",
    "linear_rectified_linear",
    "norm_pool_act",
    "pool2d",
    "program",
    "split",
    "torch_pointwise",
]
