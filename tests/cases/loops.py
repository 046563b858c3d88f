# Inner loops as the compiled operators take them.
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from oracle import written_batch_norm
from torch import Tensor

from cases.programs import program, split


@dataclass(frozen=True)
class LoopCase:
    """An inner loop, as csrc/meta/inner_loop.cpp reads it, on one of two small networks."""

    loop: str
    network: str = "mlp"  # or "conv"
    tasks: int = 2
    rates_per_step: bool = False
    support_weights: bool = False
    query_weights: bool = False
    loss_weights: bool = False
    mask: bool = False
    adapted: tuple[int, ...] | None = None  # the parameters whose rate is not zero; None: all

    def __str__(self) -> str:
        flags = ("rates_per_step", "support_weights", "query_weights", "loss_weights", "mask")
        words = [self.network, *self.loop.split(), *(flag for flag in flags if getattr(self, flag))]
        return "-".join(words) + (f"-T{self.tasks}" if self.tasks != 2 else "")

    @property
    def params(self) -> tuple[tuple[int, ...], ...]:
        if self.network == "mlp":
            return (11, 3), (11,), (2, 11), (2,)
        return (5, 2, 3, 3), (5,), (5,), (5,), (3, 20), (3,)

    @property
    def param_count(self) -> int:
        return sum(math.prod(shape) for shape in self.params)

    def program(self, loss: str = "") -> str:
        if self.network == "mlp":
            lines = ("linear 0 weight=0 bias=1", "tanh 1", "linear 2 weight=2 bias=3")
            return program((3,), self.params, lines, loss=loss or "mse")
        lines = (
            "conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1", "batch_norm 1 weight=2 bias=3 eps=1e-3 mode=batch",
            "silu 2", "avg_pool2d 3 kernel=2,2 stride=2,2 padding=0,0 count_include_pad=1", "flatten 4",
            "linear 5 weight=4 bias=5",
        )  # fmt: skip
        return program((2, 4, 4), self.params, lines, loss=loss or "cross_entropy smoothing=0.1")

    @property
    def text(self) -> str:
        return self.program()

    def function(self, p: list[Tensor], x: Tensor) -> Tensor:
        if self.network == "mlp":
            return torch.tanh(x @ p[0].T + p[1]) @ p[2].T + p[3]
        y = F.silu(written_batch_norm(F.conv2d(x, p[0], p[1], padding=1), p[2], p[3], 1e-3))
        return F.avg_pool2d(y, 2).flatten(1) @ p[4].T + p[5]

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """[examples]"""
        if self.network == "mlp":
            return (z - y).square().mean(1)
        wanted = 0.9 * F.one_hot(y, 3).to(z.dtype) + 0.1 / 3
        return -(wanted * (z - torch.logsumexp(z, -1, keepdim=True))).sum(-1)


@dataclass(frozen=True)
class LoopInputs:
    """What the inner loop takes; float64 numbers that float32 holds."""

    theta: Tensor  # [P]
    support_x: Tensor  # [T, N, *input]
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    rates: Tensor  # [1, P] or [K, P]
    support_weights: Tensor | None  # [T, N]
    query_weights: Tensor | None
    loss_weights: Tensor | None  # [K + 1]
    step_rows: Tensor | None  # [K, R]
    lam: Tensor | None  # [1]
    mask: Tensor | None  # [P]

    def to(self, dtype: torch.dtype) -> LoopInputs:
        return LoopInputs(
            **{
                name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in self.__dict__.items()
            }
        )


@cache
def draw_loop(case: LoopCase, seed: int) -> LoopInputs:
    generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, str(case))))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    words = dict(word.split("=") for word in case.loop.split())
    K, T, P = int(words["steps"]), case.tasks, case.param_count
    image = (3,) if case.network == "mlp" else (2, 4, 4)
    support, query = K * int(words.get("minibatch", 0)) or 5, 4

    def y(examples: int) -> Tensor:
        if case.network == "mlp":
            return normal(T, examples, 2)
        return torch.randint(3, (T, examples), generator=generator)

    def positive(*shape: int) -> Tensor:
        return 0.1 + torch.rand(*shape, generator=generator)

    parts = split(torch.arange(P), case.params)
    theta = torch.cat([normal(p.numel()) / math.sqrt(max(1, p[0].numel() if p.dim() > 1 else 1)) for p in parts])
    rates = positive(K if case.rates_per_step else 1, P) * (0.02 if "adam" in case.loop else 0.2)
    listed = [int(row) for row in words.get("rows", "").split(",") if row]
    for i, part in enumerate(parts):
        if i in listed or (case.adapted is not None and i not in case.adapted):
            rates[:, part.reshape(-1)] = 0
    step_rows = None
    if listed:
        rows = torch.cat([parts[i].reshape(-1) for i in listed])
        step_rows = theta[rows] + 0.3 * normal(K, len(rows))
        theta[rows] = step_rows[0]
    mask = (rates[0] != 0).float() if case.mask else None
    inputs = LoopInputs(
        theta,
        normal(T, support, *image),
        y(support),
        normal(T, query, *image),
        y(query),
        rates,
        positive(T, support) / support if case.support_weights else None,
        positive(T, query) / query if case.query_weights else None,
        normal(K + 1) if case.loss_weights else None,
        step_rows,
        positive(1) if "proximal" in words else None,
        mask,
    )
    return inputs.to(torch.float64)


LOOP_CASES: list[LoopCase] = [
    LoopCase("steps=3"),
    LoopCase("steps=3 order=2", rates_per_step=True),
    LoopCase("steps=3 order=0", "conv"),
    LoopCase("steps=3 weight_decay=0.3", rates_per_step=True),
    LoopCase("steps=3 weight_decay=0.3 order=0"),
    LoopCase("steps=2 clip_value=0.05 weight_decay=0.1", "conv"),
    LoopCase("steps=3 clip_value=0.1 order=0"),
    LoopCase("steps=3 clip_norm=0.2", adapted=(2, 3), mask=True),
    LoopCase("steps=3 clip_norm=0.3 weight_decay=0.1 order=2", "conv", rates_per_step=True),
    LoopCase("steps=3 clip_norm=1e6"),
    LoopCase("steps=3 proximal=1", rates_per_step=True),
    LoopCase("steps=3 proximal=1 order=1 weight_decay=0.2", "conv"),
    LoopCase("steps=3 proximal=1 order=0"),
    LoopCase("steps=3 minibatch=2", "conv", support_weights=True),
    LoopCase("steps=2 minibatch=1"),
    LoopCase("steps=3 queries=1,2,3", loss_weights=True, query_weights=True),
    LoopCase("steps=3 queries=0,2 order=1", "conv", loss_weights=True),
    LoopCase("steps=2", loss_weights=True),
    LoopCase("steps=0 queries=0", loss_weights=True),
    LoopCase("steps=3 rows=2,3", "conv"),
    LoopCase("steps=3 rows=2,3 queries=1,2,3", "conv", loss_weights=True, rates_per_step=True),
    LoopCase("steps=4 rows=3,0 queries=1,3 order=2 weight_decay=0.1", "conv", loss_weights=True),
    LoopCase("steps=3 rows=2,3 order=0 queries=2", "conv", loss_weights=True),
    LoopCase("steps=4 momentum=0.9", rates_per_step=True),
    LoopCase("steps=3 momentum=0.7 dampening=0.4 weight_decay=0.1", "conv"),
    LoopCase("steps=3 momentum=0.8 nesterov=1 weight_decay=0.2 order=2", rates_per_step=True),
    LoopCase("steps=3 momentum=0.8 nesterov=1 dampening=0.3 clip_norm=0.4", "conv"),
    LoopCase("steps=3 momentum=0.9 weight_decay=0.3 order=0"),
    LoopCase("steps=3 momentum=0.9 order=0 clip_value=0.1 nesterov=1"),
    LoopCase("steps=3 momentum=0.9 proximal=1 queries=1,2", loss_weights=True),
    LoopCase("steps=3 rule=adam eps=0.001"),
    LoopCase("steps=3 rule=adam eps=0.001 beta1=0 rows=2,3 minibatch=3", "conv", rates_per_step=True),
    LoopCase("steps=4 rule=adam eps=0.01 beta1=0.7 beta2=0.9 weight_decay=0.2 order=2", tasks=3),
    LoopCase("steps=3 rule=adam eps=0.001 weight_decay=0.5 decoupled=1 clip_norm=0.3", rates_per_step=True),
    LoopCase("steps=3 rule=adam eps=0.001 weight_decay=0.5 decoupled=1 order=0", "conv"),
    LoopCase("steps=3 rule=adam eps=0.001 proximal=1 order=0 queries=1", loss_weights=True),
    LoopCase("steps=2 rule=adam eps=0.01 clip_value=0.05 weight_decay=0.2"),
]
