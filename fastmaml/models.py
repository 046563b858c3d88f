"""Small networks of few-shot papers as plain torch modules: mlp, sinusoid_mlp, conv4, and CAVIA's two networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
}
INITS = ("torch", "xavier", "truncated_normal")
NORMS = ("batch", "layer", "group", "none")


def mlp(sizes: Sequence[int], activation: str = "relu", init: str = "torch", std: float = 0.01) -> nn.Sequential:
    """Linear layers of these sizes with activations between them: mlp([1, 40, 40, 1]) maps [N, 1] to [N, 1].

    init: "torch" (nn.Linear's own), "xavier" (uniform, biases 0) or "truncated_normal" (cut at 2 std, biases 0).
    Raises ValueError for fewer than two sizes or an unknown name.
    """
    if len(sizes) < 2 or any(size < 1 for size in sizes):
        raise ValueError(f"sizes {list(sizes)} must hold at least an input and an output size, all positive")
    _known("activation", activation, ACTIVATIONS)
    _known("init", init, INITS)
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        layers.append(_initialised(nn.Linear(sizes[i], sizes[i + 1]), init, std))
        if i < len(sizes) - 2:
            layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


def sinusoid_mlp() -> nn.Sequential:
    """The 1-40-40-1 ReLU network of the sinusoid task (Finn et al. 2017): truncated normal, std 0.01, biases 0."""
    return mlp([1, 40, 40, 1], init="truncated_normal", std=0.01)


def conv4(
    in_channels: int = 1,
    ways: int = 5,
    filters: int = 64,
    image_size: int = 28,
    pooling: str = "max",
    norm: str = "batch",
    eps: float = 1e-3,
    activation: str = "relu",
) -> nn.Sequential:
    """Four blocks of 3x3 convolution, norm, activation and halving, then a linear head: [N, C, H, W] -> [N, ways].

    pooling:
        "max"          halves by 2x2 max pooling and flattens (miniImageNet)
        "stride"       halves by the convolution's stride and takes the spatial mean (Omniglot in Finn's code)
        "stride_flat"  halves by stride and flattens (Omniglot in the code of Reptile and of iMAML)

    Convolutions start Xavier uniform with bias 0. The head starts N(0, 1) for "stride", like Finn's Omniglot head, else
    Xavier uniform. eps of the norm: 1e-3 in Finn's code, 1e-5 in torch. Raises ValueError for an image too small for
    four halvings, or for an unknown name.
    """
    _known("pooling", pooling, ("max", "stride", "stride_flat"))
    _known("norm", norm, NORMS)
    _known("activation", activation, ACTIVATIONS)
    layers: list[nn.Module] = []
    channels, size = in_channels, image_size
    for _ in range(4):
        stride = 1 if pooling == "max" else 2
        layers.append(_initialised(nn.Conv2d(channels, filters, 3, stride=stride, padding=1), "xavier", 0.0))
        size = size if pooling == "max" else (size + 1) // 2
        layers += _norm(norm, filters, size, eps)
        layers.append(ACTIVATIONS[activation]())
        if pooling == "max":
            layers.append(nn.MaxPool2d(2))
            size //= 2
        channels = filters
    if size < 1:
        raise ValueError(f"image_size {image_size} is too small for four halvings; use at least 16 or pooling='stride'")
    if pooling == "stride":
        head = nn.Linear(filters, ways)
        nn.init.normal_(head.weight)
        nn.init.zeros_(head.bias)
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    head = nn.Linear(filters * size * size, ways)
    return nn.Sequential(*layers, nn.Flatten(), _initialised(head, "xavier", 0.0))


# ---------------------------------------------------------------- networks with context parameters (CAVIA)


class ContextInput(nn.Module):
    """`net` on its input joined with the context parameters [context]: x [N, D] -> net([N, D + context])."""

    def __init__(self, net: nn.Module, context: int):
        super().__init__()
        self.context = nn.Parameter(torch.zeros(context))
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, self.context.expand(x.shape[0], -1)], dim=1))


class ContextFiLM(nn.Module):
    """`after(gamma * before(x) + beta)`. gamma and beta [channels] are a linear function of the context parameters."""

    def __init__(self, before: nn.Module, after: nn.Module, channels: int, context: int):
        super().__init__()
        self.context = nn.Parameter(torch.zeros(context))
        self.before, self.after = before, after
        self.film = nn.Linear(context, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta = self.film(self.context).view(2, 1, -1, 1, 1)
        return self.after(gamma * self.before(x) + beta)


def context_mlp(sizes: Sequence[int], context: int = 5, **options: Any) -> ContextInput:
    """An mlp with `context` parameters as extra input, for CAVIA: context_mlp([1, 40, 40, 1]) maps [N, 1] to [N, 1].

    options: as for mlp. Zintgraf et al. 2019, section 5.1, use 5 context parameters on the sinusoid.
    """
    _at_least_one("context", context)
    return ContextInput(mlp([sizes[0] + context, *sizes[1:]], **options), context)


def context_conv4(context: int = 100, activation: str = "relu", **options: Any) -> ContextFiLM:
    """conv4 with a FiLM layer of `context` parameters after its third convolution, norm and pooling, for CAVIA.

    options: as for conv4. Zintgraf et al. 2019, section 5.2, use 100 context parameters. As in their released code,
    gamma is the linear layer's output itself, without adding 1.
    """
    _at_least_one("context", context)
    layers = list(conv4(activation=activation, **options))
    _, _, third, fourth = (i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d))
    block = layers[third:fourth]
    scores = [layer for layer in block if not isinstance(layer, ACTIVATIONS[activation])]  # type: ignore[arg-type]
    convolution = layers[third]
    assert isinstance(convolution, nn.Conv2d)
    before = nn.Sequential(*layers[:third], *scores)
    after = nn.Sequential(ACTIVATIONS[activation](), *layers[fourth:])
    return ContextFiLM(before, after, convolution.out_channels, context)


def _at_least_one(what: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{what} is {number}; it must be at least 1")


# ---------------------------------------------------------------- parts


def _norm(name: str, channels: int, size: int, eps: float) -> list[nn.Module]:
    if name == "batch":
        return [nn.BatchNorm2d(channels, eps=eps)]
    if name == "layer":
        return [nn.LayerNorm([channels, size, size], eps=eps)]
    if name == "group":
        return [nn.GroupNorm(min(8, channels), channels, eps=eps)]
    return []


def _initialised(layer: nn.Linear | nn.Conv2d, init: str, std: float) -> nn.Module:
    if init == "torch":
        return layer
    if init == "xavier":
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _known(what: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise ValueError(f"{what} {name!r} is not one of {', '.join(names)}")
