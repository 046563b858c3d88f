# Whole models, and the data of a few tasks for each.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NetworkCase:
    name: str
    build: Callable[[], nn.Module]
    input: tuple[int, ...]
    outputs: int
    loss: str = "cross_entropy"
    tasks: int = 2
    support: int = 6
    query: int = 7
    inner_lr: float = 0.1
    smooth: bool = False  # no kinks: finite differences and float32 trajectories mean something
    label_smoothing: float = 0.0
    tags: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return self.name


class Residual(nn.Module):
    """Two residual blocks, the second with a strided 1x1 shortcut, as a user writes them."""

    def __init__(self, smooth: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 9, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(6, 9, 1, stride=2, bias=False)
        self.act = nn.SiLU() if smooth else nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.stem(x)))
        x = x + self.act(self.norm2(self.conv1(x)))
        x = self.act(self.conv2(x) + self.shortcut(x))
        return self.head(torch.flatten(self.pool(x), 1))


class InputResidual(nn.Module):
    """Sums in which one branch is the input itself: no tangent and no gradient on that side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.scale = nn.Conv2d(3, 3, 1, stride=2)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(27, 4)

    def forward(self, x: Tensor) -> Tensor:
        inside = x + torch.tanh(self.conv(x))
        y = self.pool(x) + self.scale(inside) + self.pool(inside)
        return self.head(y.flatten(1))


class Tied(nn.Module):
    """One weight matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(x)))


def conv_block(channels: int, filters: int, *, bias: bool = True) -> list[nn.Module]:
    return [nn.Conv2d(channels, filters, 3, padding=1, bias=bias), nn.BatchNorm2d(filters), nn.ReLU(), nn.MaxPool2d(2)]


def conv4(channels: int, filters: int, size: int, ways: int) -> nn.Module:
    blocks = [layer for i in range(4) for layer in conv_block(channels if i == 0 else filters, filters)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(filters * (size // 16) ** 2, ways))


def frozen_body() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].weight.requires_grad_(False)
    return model


MLP = NetworkCase(
    "mlp", lambda: nn.Sequential(nn.Linear(6, 17), nn.ReLU(), nn.Linear(17, 9), nn.ReLU(), nn.Linear(9, 4)), (6,), 4
)
SINE = NetworkCase(
    "sine mlp",
    lambda: nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)),
    (1,), 1, "mse", tasks=9, support=10, query=10, inner_lr=0.01,
)  # fmt: skip
TANH = NetworkCase(
    "tanh mlp",
    lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2)),
    (3,), 2, "mse", tasks=3, smooth=True,
)  # fmt: skip
CONV4 = NetworkCase("conv4", lambda: conv4(1, 5, 16, 3), (1, 16, 16), 3, support=3, query=6)
CONV4_WIDE = NetworkCase(
    "conv4 32 filters", lambda: conv4(3, 32, 20, 5), (3, 20, 20), 5, tasks=1, support=5, query=5, inner_lr=0.05
)
LAYER_NORM = NetworkCase(
    "layer norm gelu",
    lambda: nn.Sequential(
        nn.Linear(7, 12), nn.LayerNorm(12), nn.GELU(),
        nn.Linear(12, 9), nn.LayerNorm(9, eps=1e-3), nn.GELU("tanh"),
        nn.Linear(9, 4),
    ),
    (7,), 4, smooth=True, label_smoothing=0.1,
)  # fmt: skip
RESIDUAL = NetworkCase("residual", Residual, (3, 6, 6), 4)
MAIN_CASES = [MLP, CONV4, LAYER_NORM, RESIDUAL]

# Smooth pointwise functions whose first or second derivative jumps at 0.
JUMPS = ("elu",)

NETWORK_CASES: list[NetworkCase] = [
    *MAIN_CASES,
    SINE,
    TANH,
    CONV4_WIDE,
    NetworkCase("residual silu", lambda: Residual(smooth=True), (3, 6, 6), 4, smooth=True),
    NetworkCase(
        "strided conv net",  # MAML's Omniglot network: strides instead of pooling, then the spatial mean
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6, eps=1e-3), nn.ReLU(),
            nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6, eps=1e-3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
        ),
        (1, 9, 9), 5,
    ),
    NetworkCase(
        "group norm net",
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.SiLU(), nn.AvgPool2d(2),
            nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3),
        ),
        (2, 8, 8), 3, smooth=True,
    ),
    NetworkCase(
        "leaky avg pool net",
        lambda: nn.Sequential(
            nn.Conv2d(2, 5, (3, 2), padding=(1, 0)), nn.LeakyReLU(0.2),
            nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
            nn.Conv2d(5, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, affine=False), nn.LeakyReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Identity(), nn.Flatten(), nn.Linear(16, 3, bias=False),
        ),
        (2, 7, 8), 3,
    ),
    NetworkCase(
        "image layer norm net",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.LayerNorm([3, 4, 5]), nn.GELU(), nn.Flatten(), nn.Linear(60, 3)
        ),
        (2, 4, 5), 3, smooth=True,
    ),
    NetworkCase(
        "batch norm mlp",
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(18, 16), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 4),
        ),
        (2, 3, 3), 4, tasks=5,
    ),
    NetworkCase(
        "norms first",  # nothing upstream has parameters: the first layers see no tangent and owe no gradient
        lambda: nn.Sequential(
            nn.MaxPool2d(2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(),
            nn.Linear(12, 7), nn.BatchNorm1d(7), nn.Linear(7, 3),
        ),
        (2, 4, 6), 3,
    ),
    NetworkCase(
        "elu",
        lambda: nn.Sequential(nn.Linear(5, 9), nn.ELU(), nn.Linear(9, 8), nn.ELU(0.4), nn.Linear(8, 3)), (5,), 3,
    ),
    NetworkCase(
        "layer norm first",
        lambda: nn.Sequential(nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)),
        (6,), 2, smooth=True,
    ),
    NetworkCase(
        "group norm first",
        lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
        (4, 4, 4), 3, smooth=True,
    ),
    NetworkCase("input residual", InputResidual, (3, 6, 6), 4, smooth=True),
    NetworkCase("tied weights", Tied, (6,), 3, smooth=True),
    NetworkCase("frozen weight", frozen_body, (5,), 3, smooth=True),
    NetworkCase("linear", lambda: nn.Linear(4, 3), (4,), 3, "mse", smooth=True),
]  # fmt: skip
SMOOTH_CASES = [case for case in NETWORK_CASES if case.smooth]


def build(case: NetworkCase, seed: int = 0) -> nn.Module:
    """The model in float64 with weights that float32 holds; affines and running statistics off their defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case.build()
        for module in model.modules():
            if (
                isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm))
                and module.weight is not None
            ):
                nn.init.normal_(module.weight, 1.0, 0.2)
                nn.init.normal_(module.bias, 0.0, 0.2)
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.normal_(module.running_mean, 0.0, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.double()


def flatten(model: nn.Module) -> Tensor:
    """[P] in the order of named_parameters(), written without the engine."""
    return torch.cat([p.detach().reshape(-1) for _, p in model.named_parameters()])


@dataclass(frozen=True)
class Data:
    support_x: Tensor  # [T, N, *input]
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def to(self, dtype: torch.dtype) -> Data:
        return Data(*(v.to(dtype) if v.is_floating_point() else v for v in self.tuple))

    @property
    def tuple(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.support_x, self.support_y, self.query_x, self.query_y


def draw_data(case: NetworkCase, seed: int = 0, tasks: int | None = None) -> Data:
    """Float64 numbers that float32 holds exactly."""
    generator = torch.Generator().manual_seed(7919 * seed + 13)
    T = case.tasks if tasks is None else tasks

    def x(examples: int) -> Tensor:
        return torch.randn(T, examples, *case.input, generator=generator).double()

    def y(examples: int) -> Tensor:
        if case.loss == "cross_entropy":
            return torch.randint(case.outputs, (T, examples), generator=generator)
        return torch.randn(T, examples, case.outputs, generator=generator).double()

    return Data(x(case.support), y(case.support), x(case.query), y(case.query))
