"""A torch.nn.Sequential as a function of JAX arrays, for the layers below. Batch norm uses elementary operations.

Max pooling is lax.reduce_window, because for reshape and max JAX on CPU gives a wrong second derivative.
JAX chooses its own thread count (the cores this process may use).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastmaml.benchmark.peers import Missing
from fastmaml.problem.losses import Loss


def version() -> str:
    if importlib.util.find_spec("jax") is None:
        raise Missing("jax is not installed: pip install jax")
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    return jax.__version__


def array(value: torch.Tensor) -> Any:
    """A copy in JAX, in the same type."""
    version()
    return importlib.import_module("jax.numpy").asarray(value.detach().cpu().numpy())


def loss_of(model: nn.Module, kind: Loss) -> Callable[[Any, Any, Any], Any]:
    """(parameters as a list, x [N, ...], y) -> the mean loss. Raises Missing for an unknown layer or loss."""
    version()
    jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
    if kind not in ("mse", "cross_entropy"):
        raise Missing("its loss is not written in JAX")
    if not isinstance(model, nn.Sequential):
        raise Missing(f"{type(model).__name__} is not written in JAX, which takes nn.Sequential alone")
    steps = [_layer(layer, jax, jnp) for layer in model]

    def loss(phi: Any, x: Any, y: Any) -> Any:
        at = 0
        for count, step in steps:
            x, at = step(phi[at : at + count], x), at + count
        if kind == "mse":
            return ((x - y) ** 2).mean()
        return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1).mean()

    return loss


def _layer(layer: nn.Module, jax: Any, jnp: Any) -> tuple[int, Callable[[Any, Any], Any]]:
    """(number of parameters, function of the parameters and x)."""
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        return 2, lambda p, x: x @ p[0].T + p[1]
    if isinstance(layer, nn.Conv2d) and layer.bias is not None and layer.groups == 1:
        stride, padding = layer.stride, [(n, n) for n in layer.padding]  # type: ignore[union-attr]
        names = ("NCHW", "OIHW", "NCHW")

        def convolve(p: Any, x: Any) -> Any:
            y = jax.lax.conv_general_dilated(x, p[0], stride, padding, dimension_numbers=names)
            return y + p[1][:, None, None]

        return 2, convolve
    if isinstance(layer, nn.BatchNorm2d) and layer.affine:
        eps = layer.eps

        def normalise(p: Any, x: Any) -> Any:
            mean = x.mean((0, 2, 3), keepdims=True)
            centred = x - mean
            variance = (centred**2).mean((0, 2, 3), keepdims=True)
            return centred / jnp.sqrt(variance + eps) * p[0][:, None, None] + p[1][:, None, None]

        return 2, normalise
    if isinstance(layer, nn.MaxPool2d) and layer.kernel_size == layer.stride == 2:
        window = (1, 1, 2, 2)
        return 0, lambda p, x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
    plain: dict[type, Callable[[Any], Any]] = {
        nn.ReLU: jax.nn.relu,
        nn.Tanh: jnp.tanh,
        nn.Flatten: lambda x: x.reshape(x.shape[0], -1),
        nn.AdaptiveAvgPool2d: lambda x: x.mean((2, 3), keepdims=True),
    }
    if type(layer) not in plain:
        raise Missing(f"{layer} is not written in JAX")
    return 0, lambda p, x: plain[type(layer)](x)
