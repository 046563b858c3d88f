"""How each fused layer is recognised, as an nn module or as a function or method call, and its options.

No shapes are needed here. One reader serves both a layer's module and its function; `Arguments` hides the difference.
program_text.py writes a layer once the shape of an example is known.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

Options = dict[str, Any]
_REQUIRED = object()


class Unsupported(Exception):
    """Why a network is not fused, in one sentence. Never leaves the Engine."""


@dataclass(frozen=True)
class Layer:
    """One layer of a network: its kind, the values it reads, its name for sentences, its options."""

    kind: str
    inputs: tuple[int, ...]
    where: str
    options: Options


@dataclass(frozen=True)
class Param:
    """A parameter of the model in a call: its index in named_parameters() and its shape."""

    index: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Computed:
    """A value that the forward computes. The only known number is `x.shape[0]`, the number of examples."""

    what: str


BATCH, SHAPE, TENSOR = Computed("batch"), Computed("shape"), Computed("tensor")
NO_PARAM = Param(-1, ())


class Arguments:
    """The arguments that a layer was built or called with, by name."""

    def __init__(self, where: str, name: str, values: Callable[[str], Any]):
        self.where = where
        self.name = name
        self._values = values

    def __getitem__(self, name: str) -> Any:
        value = self._values(name)
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(part, (fx.Node, Computed, Param)) for part in parts):
            raise self.refuse(f"takes a computed value for '{name}', which is not fused")
        return value

    def param(self, name: str) -> Param:
        value = self._values(name)
        if value is None:
            return NO_PARAM
        if not isinstance(value, Param):
            raise self.refuse(f"takes a '{name}' that is not a parameter of the model")
        return value

    def refuse(self, because: str) -> Unsupported:
        return Unsupported(f"{self.where} {because}")


Reader = Callable[[Arguments], tuple[str, Options]]


# ---------------------------------------------------------------- one reader per kind


def _plain(kind: str) -> Reader:
    return lambda a: (kind, {})


def _linear(a: Arguments) -> tuple[str, Options]:
    return "linear", {"weight": a.param("weight"), "bias": a.param("bias")}


def _conv2d(a: Arguments) -> tuple[str, Options]:
    if a["padding_mode"] != "zeros":
        raise a.refuse(f"pads with padding_mode='{a['padding_mode']}', only zeros are fused")
    if a["groups"] != 1:
        raise a.refuse(f"has groups={a['groups']}, only groups=1 is fused")
    _only_dilation_1(a)
    weight, padding = a.param("weight"), a["padding"]
    if padding == "valid":
        padding = 0
    elif padding == "same":
        kernel = weight.shape[2:]
        if any(k % 2 == 0 for k in kernel):
            raise a.refuse(f"has padding='same' with the even kernel {list(kernel)}, which pads unevenly")
        padding = tuple(k // 2 for k in kernel)
    return "conv2d", {
        "weight": weight,
        "bias": a.param("bias"),
        "stride": _pair(a["stride"]),
        "padding": _pair(padding),
    }


def _batch_norm(dims: int) -> Reader:
    def read(a: Arguments) -> tuple[str, Options]:
        options = {"eps": a["eps"], "channels": a["num_features"], "name": a.name, "dims": dims}
        return "batch_norm", {"weight": a.param("weight"), "bias": a.param("bias"), **options}

    return read


def _layer_norm(a: Arguments) -> tuple[str, Options]:
    trailing = a["normalized_shape"]
    trailing = (trailing,) if isinstance(trailing, int) else tuple(trailing)
    return "layer_norm", {
        "weight": a.param("weight"),
        "bias": a.param("bias"),
        "eps": a["eps"],
        "trailing": trailing,
    }


def _group_norm(a: Arguments) -> tuple[str, Options]:
    return "group_norm", {
        "weight": a.param("weight"),
        "bias": a.param("bias"),
        "eps": a["eps"],
        "groups": a["num_groups"],
    }


def _max_pool2d(a: Arguments) -> tuple[str, Options]:
    if a["return_indices"]:
        raise a.refuse("has return_indices=True, which is not fused")
    _only_dilation_1(a)
    return "max_pool2d", _window(a)


def _avg_pool2d(a: Arguments) -> tuple[str, Options]:
    if a["divisor_override"] is not None:
        raise a.refuse(f"has divisor_override={a['divisor_override']}, which is not fused")
    return "avg_pool2d", {**_window(a), "count_include_pad": int(bool(a["count_include_pad"]))}


def _window(a: Arguments) -> Options:
    if a["ceil_mode"]:
        raise a.refuse("has ceil_mode=True, only floor is fused")
    kernel, stride = _pair(a["kernel_size"]), a["stride"]
    return {
        "kernel": kernel,
        "stride": kernel if stride is None or stride == () else _pair(stride),
        "padding": _pair(a["padding"]),
    }


def _only_dilation_1(a: Arguments) -> None:
    if _pair(a["dilation"]) != (1, 1):
        raise a.refuse(f"has dilation={a['dilation']}, only 1 is fused")


def _adaptive_avg_pool2d(a: Arguments) -> tuple[str, Options]:
    if _pair(a["output_size"]) != (1, 1):
        raise a.refuse(f"pools to {a['output_size']}, only output size 1 is fused")
    return "global_avg_pool2d", {"keepdim": True}


def _mean(a: Arguments) -> tuple[str, Options]:
    dims = a["dim"]
    if dims is None or isinstance(dims, int) or len(dims) != 2 or a["dtype"] is not None:
        raise a.refuse("is not a mean over height and width, so it is not fused")
    return "mean", {"dims": tuple(dims), "keepdim": bool(a["keepdim"])}


def _add(a: Arguments) -> tuple[str, Options]:
    if a["alpha"] != 1:
        raise a.refuse(f"has alpha={a['alpha']}, only a plain sum is fused")
    return "add", {}


def _pair(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        return (value, value)
    return tuple(value) * 2 if len(value) == 1 else tuple(value)


def _refuse(because: str) -> Reader:
    def read(a: Arguments) -> tuple[str, Options]:
        raise a.refuse(because)

    return read


_dropout = _refuse("is dropout, which is not fused")

# ---------------------------------------------------------------- modules

_MODULES: dict[type, Reader] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batch_norm(1),
    nn.BatchNorm2d: _batch_norm(3),
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.ReLU: _plain("relu"),
    nn.LeakyReLU: lambda a: ("leaky_relu", {"slope": a["negative_slope"]}),
    nn.Tanh: _plain("tanh"),
    nn.Sigmoid: _plain("sigmoid"),
    nn.GELU: lambda a: ("gelu_tanh" if a["approximate"] == "tanh" else "gelu", {}),
    nn.SiLU: _plain("silu"),
    nn.ELU: lambda a: ("elu", {"alpha": a["alpha"]}),
    nn.MaxPool2d: _max_pool2d,
    nn.AvgPool2d: _avg_pool2d,
    nn.AdaptiveAvgPool2d: _adaptive_avg_pool2d,
    nn.Flatten: lambda a: ("flatten", {"start": a["start_dim"], "end": a["end_dim"]}),
    nn.Identity: _plain("identity"),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), _dropout),
}


def read_module(module: nn.Module, name: str, param: Callable[[Any, str], Param]) -> tuple[str, str, Options]:
    """(kind, where, options) of a leaf module. `param` looks up a tensor among the parameters. Raises Unsupported."""
    where = f"layer '{name}' ({type(module).__name__})"
    reader = _MODULES.get(type(module))
    if reader is None:
        raise Unsupported(f"{where} is not one of the fused layers")

    def value(attribute: str) -> Any:
        found = getattr(module, attribute)
        return param(found, where) if isinstance(found, torch.Tensor) else found

    kind, options = reader(Arguments(where, name, value))
    return kind, where, options


# ---------------------------------------------------------------- functions and methods


class _Signature:
    """Names and defaults of a call's arguments. The first `tensors` arguments are values of the network."""

    def __init__(self, reader: Reader, tensors: int = 1, **defaults: Any):
        self.reader = reader
        self.tensors = tensors
        self.defaults = {"input": _REQUIRED, **defaults}


_UNARY: dict[str, Any] = {"inplace": False}
_WEIGHTS: dict[str, Any] = {"weight": None, "bias": None}
_SUM = _Signature(_add, 2, other=_REQUIRED, alpha=1)
_FLATTEN = _Signature(lambda a: ("flatten", {"start": a["start_dim"], "end": a["end_dim"]}), start_dim=0, end_dim=-1)
_MEAN = _Signature(_mean, dim=None, keepdim=False, dtype=None)
_RELU, _TANH = _Signature(_plain("relu"), **_UNARY), _Signature(_plain("tanh"))
_SIGMOID = _Signature(_plain("sigmoid"))
_SAME = _Signature(_plain("identity"), memory_format=None)
_NO_DROPOUT = _Signature(_dropout, p=0.5, training=True, inplace=False)

_FUNCTIONS: dict[Any, _Signature] = {
    F.linear: _Signature(_linear, weight=_REQUIRED, bias=None),
    F.conv2d: _Signature(
        _conv2d, weight=_REQUIRED, bias=None, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros"
    ),
    F.layer_norm: _Signature(_layer_norm, normalized_shape=_REQUIRED, **_WEIGHTS, eps=1e-5),
    F.group_norm: _Signature(_group_norm, num_groups=_REQUIRED, **_WEIGHTS, eps=1e-5),
    F.relu: _RELU,
    torch.relu: _RELU,
    torch.relu_: _RELU,
    F.leaky_relu: _Signature(lambda a: ("leaky_relu", {"slope": a["negative_slope"]}), negative_slope=0.01, **_UNARY),
    torch.tanh: _TANH,
    torch.sigmoid: _SIGMOID,
    F.gelu: _Signature(lambda a: ("gelu_tanh" if a["approximate"] == "tanh" else "gelu", {}), approximate="none"),
    F.silu: _Signature(_plain("silu"), **_UNARY),
    F.elu: _Signature(lambda a: ("elu", {"alpha": a["alpha"]}), alpha=1.0, **_UNARY),
    F.max_pool2d: _Signature(
        _max_pool2d,
        kernel_size=_REQUIRED,
        stride=None,
        padding=0,
        dilation=1,
        ceil_mode=False,
        return_indices=False,
    ),
    F.avg_pool2d: _Signature(
        _avg_pool2d,
        kernel_size=_REQUIRED,
        stride=None,
        padding=0,
        ceil_mode=False,
        count_include_pad=True,
        divisor_override=None,
    ),
    F.adaptive_avg_pool2d: _Signature(_adaptive_avg_pool2d, output_size=_REQUIRED),
    torch.flatten: _FLATTEN,
    torch.mean: _MEAN,
    torch.add: _SUM,
    operator.add: _SUM,
    operator.iadd: _SUM,
    F.dropout: _NO_DROPOUT,
    F.dropout2d: _NO_DROPOUT,
    F.batch_norm: _Signature(
        _refuse("is not fused, because batch_norm modes need the module; use nn.BatchNorm2d"),
        running_mean=None,
        running_var=None,
        **_WEIGHTS,
        training=False,
        momentum=0.1,
        eps=1e-5,
    ),
}

_METHODS: dict[str, _Signature] = {
    "relu": _RELU,
    "relu_": _RELU,
    "tanh": _TANH,
    "tanh_": _TANH,
    "sigmoid": _SIGMOID,
    "sigmoid_": _SIGMOID,
    "flatten": _FLATTEN,
    "mean": _MEAN,
    "add": _SUM,
    "add_": _SUM,
    "contiguous": _SAME,
    "clone": _SAME,
}

_VIEWS = {"flatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze", "transpose", "permute", "t"}
_VIEWS |= {"getitem", "expand", "narrow", "chunk", "split", "detach"}


def function_name(node: fx.Node) -> str:
    """A call's name as its author would write it: 'relu', 'x.view'."""
    if node.op == "call_method":
        return f"x.{node.target}"
    return "max_pool2d" if node.target is F.max_pool2d else getattr(node.target, "__name__", str(node.target))


def is_view(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node's result may share memory with its first argument."""
    if module is not None:
        return isinstance(module, (nn.Flatten, nn.Identity))
    return function_name(node).removeprefix("x.") in _VIEWS


def is_shape_query(node: fx.Node) -> bool:
    return node.target in ("size", "dim") or node.target is getattr or node.target is operator.getitem


def read_shape_query(node: fx.Node, where: str, of: Any) -> Computed:
    """x.shape and x.size() -> SHAPE, x.shape[0] and x.size(0) -> BATCH; `of` is what x means. Raises Unsupported."""
    rest = [*node.args[1:], *node.kwargs.values()]
    if (node.target is getattr and rest == ["shape"]) or (node.target == "size" and not rest):
        return SHAPE
    if rest == [0] and (node.target == "size" or (node.target is operator.getitem and of == SHAPE)):
        return BATCH
    if node.target is operator.getitem and of != SHAPE:
        raise Unsupported(f"{where} indexes a tensor, which is not fused")
    raise Unsupported(f"{where} computes with shapes other than the batch size x.shape[0]")


def read_function(node: fx.Node, where: str, understood: Callable[[Any], Any]) -> tuple[str, tuple[Any, ...], Options]:
    """(kind, the tensors it reads, options) of a call. `understood` interprets an argument. Raises Unsupported."""
    if node.target in ("view", "reshape") or node.target is torch.reshape:
        return _read_view(node, where, understood)
    table: dict[Any, _Signature] = _METHODS if node.op == "call_method" else _FUNCTIONS
    signature = table.get(node.target)
    if signature is None:
        raise Unsupported(f"{where} is not one of the fused layers")
    names = list(signature.defaults)
    if len(node.args) > len(names) or any(k not in names for k in node.kwargs):
        raise Unsupported(f"{where} is called with arguments that are not fused")
    given = {**signature.defaults, **dict(zip(names, node.args)), **node.kwargs}
    missing = [k for k, v in given.items() if v is _REQUIRED]
    if missing:
        raise Unsupported(f"{where} is called without '{missing[0]}'")
    arguments = Arguments(where, node.name, lambda name: understood(given[name]))
    kind, options = signature.reader(arguments)
    return kind, tuple(given[name] for name in names[: signature.tensors]), options


def _read_view(node: fx.Node, where: str, understood: Callable[[Any], Any]) -> tuple[str, tuple[Any, ...], Options]:
    x, *sizes = [*node.args, *node.kwargs.values()]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    known = [understood(s) for s in sizes]
    if not known or not all(isinstance(s, int) or s == BATCH for s in known) or known[0] not in (BATCH, -1):
        raise Unsupported(f"{where} gives a shape that does not begin with the batch size x.shape[0]")
    if any(s == BATCH for s in known[1:]):
        raise Unsupported(f"{where} uses the batch size for another dimension")
    return "view", (x,), {"leading": known[0] == BATCH, "sizes": tuple(known[1:])}
