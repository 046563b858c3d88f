"""Writes each layer, for examples of a given shape: a line of Program text and the shape of its output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastmaml.network.fused_layers import Layer, Options, Param, Unsupported

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A numbered value of the Program and its shape per example."""

    number: int
    shape: Shape


class Writer:
    """Collects the layer lines of one Program. Value 0 is the input, line i makes value i + 1."""

    def __init__(self, input_shape: Shape, norm_mode: str):
        if len(input_shape) not in (1, 3):
            raise Unsupported(f"examples {list(input_shape)} are neither [features] nor [channels, height, width]")
        self.input = Value(0, input_shape)
        self.norm_mode = norm_mode
        self.lines: list[str] = []
        self.buffers: list[tuple[str, int]] = []  # name and size
        self.norms: list[tuple[str, int]] = []  # batch norms on batch statistics: name and positions per example

    def add(self, layer: Layer, inputs: list[Value]) -> Value:
        """Writes a layer. Raises ValueError if its input does not fit, Unsupported if this case is not fused."""
        write = getattr(self, f"_{layer.kind}", None)
        if write is None:
            return self._same_shape(layer, inputs[0])
        return write(layer, *inputs)

    def _line(self, kind: str, inputs: tuple[Value, ...], options: Options, shape: Shape) -> Value:
        words = [kind, ",".join(str(v.number) for v in inputs)]
        words += [f"{name}={_text(value)}" for name, value in options.items()]
        self.lines.append(" ".join(words))
        return Value(len(self.lines), shape)

    # ---- layers

    def _same_shape(self, layer: Layer, x: Value) -> Value:
        return self._line(layer.kind, (x,), layer.options, x.shape)

    def _linear(self, layer: Layer, x: Value) -> Value:
        out_features, in_features = layer.options["weight"].shape
        if x.shape[-1] != in_features:
            raise ValueError(f"{layer.where} takes {in_features} features and gets {list(x.shape)}")
        if len(x.shape) != 1:
            raise Unsupported(f"{layer.where} acts on the last dimension of {list(x.shape)}, only flat input is fused")
        return self._line("linear", (x,), layer.options, (out_features,))

    def _conv2d(self, layer: Layer, x: Value) -> Value:
        filters, channels, *kernel = layer.options["weight"].shape
        if len(x.shape) != 3 or x.shape[0] != channels:
            raise ValueError(f"{layer.where} takes [{channels}, height, width] and gets {list(x.shape)}")
        return self._line("conv2d", (x,), layer.options, (filters, *_windows(layer, kernel, x)))

    def _max_pool2d(self, layer: Layer, x: Value) -> Value:
        return self._pool(layer, x)

    def _avg_pool2d(self, layer: Layer, x: Value) -> Value:
        return self._pool(layer, x)

    def _pool(self, layer: Layer, x: Value) -> Value:
        kernel, padding = layer.options["kernel"], layer.options["padding"]
        _need_image(layer, x)
        if any(2 * p > k for p, k in zip(padding, kernel)):
            raise ValueError(f"{layer.where} has padding {list(padding)}, more than half its kernel {list(kernel)}")
        return self._line(layer.kind, (x,), layer.options, (x.shape[0], *_windows(layer, kernel, x)))

    def _global_avg_pool2d(self, layer: Layer, x: Value) -> Value:
        _need_image(layer, x)
        pooled = self._line("global_avg_pool2d", (x,), {}, (x.shape[0], 1, 1))
        return pooled if layer.options["keepdim"] else self._line("flatten", (pooled,), {}, (x.shape[0],))

    def _mean(self, layer: Layer, x: Value) -> Value:
        rank = len(x.shape) + 1
        if rank != 4 or sorted(d % rank for d in layer.options["dims"]) != [2, 3]:
            raise Unsupported(
                f"{layer.where} is a mean over {list(layer.options['dims'])} of {['N', *x.shape]}, which is not fused"
            )
        return self._global_avg_pool2d(layer, x)

    def _flatten(self, layer: Layer, x: Value) -> Value:
        rank = len(x.shape) + 1
        start, end = layer.options["start"] % rank, layer.options["end"] % rank
        if start == 0:
            raise Unsupported(f"{layer.where} flattens the batch dimension as well")
        if start == end:
            return x
        if (start, end) != (1, rank - 1):
            raise Unsupported(f"{layer.where} flattens only dimensions {start} to {end} of {['N', *x.shape]}")
        return self._line("flatten", (x,), {}, (math.prod(x.shape),))

    def _view(self, layer: Layer, x: Value) -> Value:
        sizes, entries = list(layer.options["sizes"]), math.prod(x.shape)
        if sizes.count(-1) == 1:
            known = math.prod(s for s in sizes if s != -1)
            sizes[sizes.index(-1)] = entries // known if known else 0
        if math.prod(sizes) != entries:
            sentence = f"{layer.where} cannot give {list(x.shape)} the shape {list(layer.options['sizes'])}"
            raise (ValueError if layer.options["leading"] else Unsupported)(sentence)
        if tuple(sizes) == x.shape:
            return x
        if len(sizes) != 1:
            raise Unsupported(f"{layer.where} reshapes {list(x.shape)} to {sizes}, only flattening is fused")
        return self._line("flatten", (x,), {}, (entries,))

    def _add(self, layer: Layer, x: Value, y: Value) -> Value:
        if x.shape != y.shape:
            raise Unsupported(f"{layer.where} adds {list(x.shape)} and {list(y.shape)}, only equal shapes are fused")
        return self._line("add", (x, y), {}, x.shape)

    def _batch_norm(self, layer: Layer, x: Value) -> Value:
        weight, bias, eps, channels, name, dims = (
            layer.options[key] for key in ("weight", "bias", "eps", "channels", "name", "dims")
        )
        if len(x.shape) != dims or x.shape[0] != channels:
            raise ValueError(f"{layer.where} takes {channels} channels and gets {list(x.shape)}")
        affine = {"weight": weight, "bias": bias, "eps": eps}
        if self.norm_mode == "frozen":
            first = len(self.buffers)
            self.buffers += [(f"{name}.running_mean", channels), (f"{name}.running_var", channels)]
            return self._line(
                "batch_norm", (x,), {**affine, "mode": "frozen", "mean": first, "var": first + 1}, x.shape
            )
        self.norms.append((name, math.prod(x.shape[1:])))
        mode = "support" if self.norm_mode == "support" else "batch"
        return self._line("batch_norm", (x,), {**affine, "mode": mode}, x.shape)

    def _layer_norm(self, layer: Layer, x: Value) -> Value:
        trailing = layer.options["trailing"]
        if x.shape[-len(trailing) :] != trailing:
            raise ValueError(f"{layer.where} normalises {list(trailing)} and gets {list(x.shape)}")
        if len(trailing) < len(x.shape):
            raise Unsupported(f"{layer.where} normalises only the last of {list(x.shape)}, a fused one takes them all")
        weight, bias, eps = (layer.options[key] for key in ("weight", "bias", "eps"))
        options = {"weight": weight, "bias": bias, "eps": eps, "dims": len(trailing)}
        return self._line("layer_norm", (x,), options, x.shape)

    def _group_norm(self, layer: Layer, x: Value) -> Value:
        weight, groups = layer.options["weight"], layer.options["groups"]
        if x.shape[0] % groups or (weight.shape and weight.shape[0] != x.shape[0]):
            raise ValueError(f"{layer.where} with {groups} groups does not fit {list(x.shape)}")
        return self._line("group_norm", (x,), layer.options, x.shape)


def _need_image(layer: Layer, x: Value) -> None:
    if len(x.shape) != 3:
        raise ValueError(f"{layer.where} takes [channels, height, width] and gets {list(x.shape)}")


def _windows(layer: Layer, kernel: Any, x: Value) -> tuple[int, int]:
    stride, padding = layer.options["stride"], layer.options["padding"]
    height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(x.shape[1:], kernel, stride, padding))
    if height < 1 or width < 1:
        raise ValueError(f"{layer.where} with kernel {list(kernel)} does not fit into {list(x.shape)}")
    return height, width


def _text(value: Any) -> str:
    if isinstance(value, Param):
        return str(value.index)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return repr(value) if isinstance(value, float) else str(value)
