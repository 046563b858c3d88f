# The fused layers that every numeric test runs on every backend. A new layer is a few lines here.
from __future__ import annotations

import torch
import torch.nn.functional as F
from oracle import written_batch_norm

from cases.ops import (
    POINTWISE,
    SMOOTH,
    OpCase,
    batch_norm,
    batch_norm_frozen,
    conv2d,
    conv_rectified_conv,
    group_norm,
    layer_norm,
    linear,
    linear_rectified_linear,
    norm_pool_act,
    pointwise,
    pool2d,
    rectified,
)

OP_CASES: list[OpCase] = [
    linear(
        1, 40, tasks=9, examples=10
    ),  # the sinusoid's first layer: widths that fill no vector, tasks that fill no group of 8
    linear(40, 1, tasks=9, examples=10),
    linear(7, 5, examples=1),
    linear(5, 3, bias=False),
    linear(33, 65, examples=17, tasks=3),  # one past the tiles of 16, 32 and 64
    linear(300, 19, examples=5),
    linear(16, 16, examples=4, tasks=17),
    linear(64, 32, examples=25, tasks=1),
    conv2d((3, 7, 6), 5),
    conv2d((1, 5, 5), 4, padding=(0, 0), examples=1),
    conv2d((1, 4, 4), 1, examples=1, tasks=1),
    conv2d((4, 9, 8), 8, stride=(2, 2)),
    conv2d((6, 4, 5), 3, kernel=(1, 1), padding=(0, 0), bias=False),
    conv2d((5, 7, 7), 4, kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    conv2d((2, 8, 7), 3, kernel=(5, 3), stride=(2, 1), padding=(1, 2)),
    conv2d((3, 6, 6), 5, kernel=(2, 2), stride=(2, 2), padding=(0, 0), bias=False),
    conv2d((4, 3, 5), 6, kernel=(3, 5), padding=(0, 0)),  # the kernel covers the image: one output pixel
    conv2d((2, 4, 4), 3, padding=(2, 2)),  # more padding than half the kernel
    conv2d((3, 8, 8), 4, stride=(3, 3), padding=(0, 0)),  # the last rows and columns touch no output
    conv2d((2, 1, 9), 3, kernel=(1, 4), padding=(0, 1)),
    conv2d((16, 8, 8), 16, examples=2),
    conv2d((16, 13, 14), 32, examples=3),  # Winograd's tiles: several blocks, a last row of half tiles
    conv2d((32, 8, 9), 16, padding=(0, 2), examples=2),
    conv2d((16, 6, 11), 16, padding=(2, 0), examples=1, bias=False),
    conv2d((17, 5, 6), 33, examples=2),
    conv2d((32, 7, 7), 64, examples=2, tasks=1),
    conv2d((3, 20, 40), 4, examples=1, tasks=9),
    conv2d((64, 3, 3), 64, examples=5, tasks=1),
    # past the blocks of the cpu kernels: 384 rows, 256 deep, 128 pixels, 256 KB of images
    linear(300, 5, examples=400, tasks=1),
    linear(5, 300, examples=150, tasks=1),
    linear(301, 70, examples=150, tasks=1),  # weight gradients by way of copies, in two blocks of examples
    conv2d((64, 26, 26), 8, examples=2, tasks=1),
    conv2d((100, 9, 8), 5, stride=(2, 2), tasks=1),
    batch_norm((4, 5, 6)),
    batch_norm((17, 3, 3), examples=1),
    batch_norm((1, 6, 6), eps=1e-3),
    batch_norm((5, 3, 4), affine=False),
    batch_norm((13,), examples=6),
    batch_norm((8,), examples=7, affine=False, tasks=9),
    batch_norm((3, 6, 5), shift=100.0),  # |mean| >> std: E[x^2] - mean^2 has nothing left in float32
    batch_norm((32, 2, 2), examples=5),
    batch_norm((3, 4, 4), blank=True),  # a constant channel: 1/std = eps^-1/2
    batch_norm_frozen((4, 5, 3)),
    batch_norm_frozen((6,), eps=1e-3, affine=False),
    batch_norm_frozen((19,), examples=1),
    layer_norm((7,)),
    layer_norm((33,), examples=1, eps=1e-3),
    layer_norm((16,), weight=False, bias=False, tasks=9),
    layer_norm((12,), bias=False),
    layer_norm((3, 4, 5)),  # an image: the affine is [C, H, W]
    layer_norm((40,), examples=9, shift=30.0),
    group_norm((6, 4, 3), 2),
    group_norm((6, 3, 3), 1, eps=1e-3),
    group_norm((5, 4, 4), 5, affine=False),
    group_norm((32, 3, 3), 8, examples=1),
    group_norm((12,), 3),
    *(pointwise(kind, (13,), tasks=3) for kind in POINTWISE),
    *(pointwise(kind, (3, 4, 5)) for kind in POINTWISE),
    *(pointwise(kind, (16,), examples=1, tasks=9) for kind in ("relu", "gelu", "silu")),
    *(pointwise(kind, (37,), scale=20.0) for kind in SMOOTH),  # saturated, no NaN
    pointwise("relu", (4, 5, 5), grid=1.0),
    *(pointwise(kind, (21,), grid=1.0) for kind in POINTWISE if kind != "relu"),
    pool2d("max", (3, 7, 5), (2, 2), (2, 2)),
    pool2d("max", (1, 4, 4), (2, 2), (2, 2), examples=1, tasks=1),
    pool2d("max", (17, 6, 6), (3, 3), (2, 2), (1, 1)),
    pool2d("max", (4, 5, 6), (3, 3), (1, 1)),  # windows overlap: gradients of several windows meet in one pixel
    pool2d("max", (8, 6, 6), (2, 2), (2, 2), grid=1.0),  # ties: the first in scan order
    pool2d("max", (3, 6, 7), (3, 2), (2, 1), (1, 0), grid=1.0),
    pool2d("avg", (3, 7, 5), (2, 2), (2, 2)),
    pool2d("avg", (5, 6, 6), (3, 3), (2, 2), (1, 1)),
    pool2d("avg", (5, 6, 6), (3, 3), (2, 2), (1, 1), count_include_pad=False),
    pool2d("avg", (2, 5, 6), (3, 2), (1, 1), (1, 1), examples=1),
    OpCase("global_avg_pool2d", (5, 3, 4), ("global_avg_pool2d 0",), lambda p, x: x.mean((2, 3), keepdim=True)),
    OpCase(
        "global_avg_pool2d", (17, 1, 1), ("global_avg_pool2d 0",), lambda p, x: x.mean((2, 3), keepdim=True), examples=1
    ),
    norm_pool_act((4, 6, 6), (2, 2), tasks=1),
    norm_pool_act((1, 5, 7), (2, 2), act="leaky_relu"),  # rest pixels: a last row and column outside of all windows
    norm_pool_act((2, 9, 8), (3, 3), examples=1),
    norm_pool_act((3, 7, 5), (3, 3), (2, 2), (1, 1), act="leaky_relu"),  # overlapping windows
    norm_pool_act((5, 6, 7), (3, 2), (1, 2), (1, 0)),
    norm_pool_act((33, 5, 4), (2, 2), (1, 1), affine=False),
    norm_pool_act((3, 7, 8), (2, 2), (3, 3), tasks=3),  # pixels between the windows
    norm_pool_act((8, 4, 6), (2, 2), grid=1.0),
    norm_pool_act((5, 6, 5), (2, 2), act="leaky_relu", frozen=True),
    norm_pool_act((3, 5, 5), (3, 3), (2, 2), (1, 1), frozen=True, affine=False),
    norm_pool_act((5, 3, 4)),
    norm_pool_act((3, 3, 3), act="leaky_relu", frozen=True, tasks=1),
    norm_pool_act((13,), examples=6),
    linear_rectified_linear((3, 5, 2)),
    linear_rectified_linear((1, 33, 1), "leaky_relu", examples=5, tasks=1),
    linear_rectified_linear((33, 65, 3), examples=5),
    linear_rectified_linear((5, 1, 2), "leaky_relu", examples=1),
    conv_rectified_conv((2, 5, 3), 3),
    conv_rectified_conv((1, 5, 5), 33, "relu", stride=(2, 1), tasks=1),
    conv_rectified_conv((3, 1, 2), 1, examples=1),
    rectified(
        "conv2d relu flatten linear",
        (2, 5, 3),
        ((3, 2, 3, 3), (3,), (5, 45), (5,)),
        ("conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1", "relu 1", "flatten 2", "linear 3 weight=2 bias=3"),
        lambda p, x: F.relu(F.conv2d(x, p[0], p[1], padding=1)).flatten(1) @ p[2].T + p[3],
    ),
    rectified(
        "group_norm relu conv2d",
        (6, 3, 5),
        ((6,), (6,), (3, 6, 1, 2)),
        (
            "group_norm 0 weight=0 bias=1 eps=1e-3 groups=3",
            "relu 1",
            "conv2d 2 weight=2 bias=-1 stride=1,1 padding=0,0",
        ),
        lambda p, x: F.conv2d(F.relu(F.group_norm(x, 3, p[0], p[1], 1e-3)), p[2]),
        gains=(0,),
    ),
    rectified(  # the norm itself masks: the sum reads y twice
        "group_norm leaky_relu added to itself",
        (5, 3, 2),
        ((5,), (5,)),
        ("group_norm 0 weight=0 bias=1 eps=1e-3 groups=1", "leaky_relu 1 slope=0.1", "add 2,2"),
        lambda p, x: 2 * F.leaky_relu(F.group_norm(x, 1, p[0], p[1], 1e-3), 0.1),
        gains=(0,),
        tasks=1,
    ),
    rectified(
        "layer_norm relu linear",
        (33,),
        ((33,), (33,), (3, 33), (3,)),
        ("layer_norm 0 weight=0 bias=1 eps=1e-3 dims=1", "relu 1", "linear 2 weight=2 bias=3"),
        lambda p, x: F.relu(F.layer_norm(x, (33,), p[0], p[1], 1e-3)) @ p[2].T + p[3],
        gains=(0,),
        examples=5,
    ),
    OpCase("flatten", (3, 4, 5), ("flatten 0",), lambda p, x: x.flatten(1)),
    OpCase("flatten", (9, 2, 2), ("flatten 0",), lambda p, x: x.flatten(1), examples=1, tasks=9),
    OpCase("add to itself", (3, 4, 5), ("add 0,0",), lambda p, x: x + x),
    OpCase("add a branch", (11,), ("tanh 0", "add 0,1"), lambda p, x: x + torch.tanh(x)),
    OpCase(
        "add three branches of one value",
        (4, 3, 3),
        ("tanh 0", "sigmoid 1", "silu 1", "add 2,3", "add 4,1"),
        lambda p, x: torch.sigmoid(torch.tanh(x)) + F.silu(torch.tanh(x)) + torch.tanh(x),
    ),
    OpCase(
        "linear twice with one weight",
        (6,),
        ("linear 0 weight=0 bias=1", "tanh 1", "linear 2 weight=0 bias=1"),
        lambda p, x: torch.tanh(x @ p[0].T + p[1]) @ p[0].T + p[1],
        params=((6, 6), (6,)),
    ),
    OpCase(
        "conv2d flatten linear",  # layouts meet: the engine keeps images channels-last, flatten is in torch's order
        (3, 4, 5),
        ("conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1", "tanh 1", "flatten 2", "linear 3 weight=2 bias=3"),
        lambda p, x: torch.tanh(F.conv2d(x, p[0], p[1], padding=1)).flatten(1) @ p[2].T + p[3],
        params=((4, 3, 3, 3), (4,), (5, 80), (5,)),
    ),
    OpCase(
        "conv2d batch_norm max_pool2d relu",  # the order after fusion of Conv4's block
        (3, 6, 6),
        (
            "conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1",
            "batch_norm 1 weight=2 bias=3 eps=1e-05 mode=batch",
            "relu 2",
            "max_pool2d 3 kernel=2,2 stride=2,2 padding=0,0",
        ),
        lambda p, x: F.max_pool2d(F.relu(written_batch_norm(F.conv2d(x, p[0], p[1], padding=1), p[2], p[3], 1e-5)), 2),
        params=((8, 3, 3, 3), (8,), (8,), (8,)),
        gains=(2,),
        examples=5,
    ),
]
