"""Turns an nn.Module into a Program, or gives the reason why not.

`read_network(model)` traces the forward with torch.fx and names every node's layer (fused_layers.py), without shapes.
`Network.program(...)` then takes the shape of an example and writes the text for the C++ parser (program_text.py).
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastmaml.network import fused_layers
from fastmaml.network.fused_layers import TENSOR, Layer, Options, Param, Unsupported
from fastmaml.network.program_text import Writer
from fastmaml.problem.parameters import ParameterLayout


@dataclass(frozen=True)
class Program:
    """The text of one Program, its output shape and its batch norms."""

    text: str
    output_shape: tuple[int, ...]
    buffers: tuple[str, ...]  # names of the running statistics in the text, in its order
    norms: tuple[tuple[str, int], ...]  # batch norms on batch statistics: name and positions per example

    def gather_buffers(self, model: nn.Module, like: Tensor) -> Tensor:
        """The current running statistics as one vector [B]. Empty if every batch norm uses batch statistics."""
        if not self.buffers:
            return like.new_zeros(0)
        named = dict(model.named_buffers())
        return torch.cat([named[name].detach().to(like).reshape(-1) for name in self.buffers])


@dataclass(frozen=True)
class Network:
    """A traced module: layer i makes value i + 1, value 0 is the input."""

    layers: tuple[Layer, ...]
    output: int
    shapes: tuple[tuple[int, ...], ...]  # of the parameters, in the order of theta

    def program(self, input_shape: tuple[int, ...], loss: str, smoothing: float, norm_mode: str) -> Program:
        """The Program for examples of this shape.

        Raises ValueError if the examples do not fit the network, Unsupported if a layer is not fused at these shapes.
        """
        writer = Writer(input_shape, norm_mode)
        values = {0: writer.input}
        for i, layer in enumerate(self.layers):
            values[i + 1] = writer.add(layer, [values[v] for v in layer.inputs])
        output = values[self.output]
        if loss == "cross_entropy" and len(output.shape) != 1:
            raise Unsupported(
                f"the output {list(output.shape)} of an example must be one row of scores for cross_entropy"
            )
        lines = ["fastmaml 1", "input " + " ".join(map(str, input_shape))]
        offset = 0
        for shape in self.shapes:
            lines.append(" ".join(map(str, ("param", offset, *(shape or (1,))))))
            offset += math.prod(shape)
        offset = 0
        for _, size in writer.buffers:
            lines.append(f"buffer {offset} {size}")
            offset += size
        lines += writer.lines
        lines.append(f"output {output.number}")
        lines.append(f"loss {loss}" + (f" smoothing={smoothing!r}" if loss == "cross_entropy" else ""))
        names = tuple(name for name, _ in writer.buffers)
        return Program("\n".join(lines) + "\n", output.shape, names, tuple(writer.norms))


def read_network(model: nn.Module, layout: ParameterLayout) -> Network:
    """Reads the module's forward. Raises Unsupported with one sentence that names the layer."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise Unsupported(f"layer '{name}' ({type(module).__name__}) has a hook, which a fused network would skip")
    with _all_training(model, True):
        graph = _trace(model)
    with _all_training(model, False):
        if str(_trace(model)) != str(graph):
            raise Unsupported(f"the forward of {type(model).__name__} differs between train() and eval()")
    return _Reader(model, layout, graph).network()


def _trace(model: nn.Module) -> fx.Graph:
    arguments = list(inspect.signature(model.forward).parameters.values())
    defaults = {a.name: a.default for a in arguments[1:] if a.default is not inspect.Parameter.empty}
    before = set(vars(model))
    try:
        return fx.Tracer().trace(model, concrete_args=defaults or None)
    except Exception as error:
        sentence = str(error).strip().split("\n")[0]
        raise Unsupported(f"torch.fx cannot trace the forward of {type(model).__name__}: {sentence}") from error
    finally:
        for name in set(vars(model)) - before:  # the tracer keeps tensor constants on the model
            delattr(model, name)


@contextmanager
def _all_training(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, was in before:
            module.training = was


_INPLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


class _Reader:
    """Walks an fx graph once and turns its nodes into Layers with numbered values."""

    def __init__(self, model: nn.Module, layout: ParameterLayout, graph: fx.Graph):
        self.model = model
        self.layout = layout
        self.nodes = list(graph.nodes)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.param_of = {id(p): i for i, (_, p) in enumerate(model.named_parameters())}
        self.layers: list[Layer] = []
        self.meaning: dict[fx.Node, Any] = {}  # a value's number, a Param, or a number the forward computes

    def network(self) -> Network:
        live = self._live()
        self._refuse_values_changed_in_place(live)
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        for node in inputs[1:]:
            if any(user in live for user in node.users):
                raise Unsupported(f"the forward of {type(self.model).__name__} takes a second input '{node.target}'")
        self.meaning[inputs[0]] = 0
        output: Any = None
        for node in self.nodes:
            if node not in live or node.op == "placeholder":
                continue
            if node.op == "output":
                output = node.args[0]
            else:
                self.meaning[node] = self._read(node)
        number = self.meaning.get(output) if isinstance(output, fx.Node) else None
        if not isinstance(number, int):
            raise Unsupported(
                f"the forward of {type(self.model).__name__} does not return one tensor made from its input"
            )
        return Network(tuple(self.layers), number, self.layout.shapes)

    def _read(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            value: Any = self.model
            for part in str(node.target).split("."):
                value = getattr(value, part, None)
            return self._param(value, f"'{node.target}'")
        if node.op == "call_module":
            name = str(node.target)
            kind, where, options = fused_layers.read_module(self.modules[name], name, self._param)
            return self._append(kind, where, options, (*node.args, *node.kwargs.values()))
        where = f"'{node.name}' ({fused_layers.function_name(node)})"
        if fused_layers.is_shape_query(node):
            return fused_layers.read_shape_query(node, where, self._understood(node.args[0]))
        kind, operands, options = fused_layers.read_function(node, where, self._understood)
        return self._append(kind, where, options, operands)

    def _append(self, kind: str, where: str, options: Options, operands: tuple[Any, ...]) -> int:
        meanings = [self.meaning[v] for v in operands if isinstance(v, fx.Node)]
        numbers = tuple(n for n in meanings if isinstance(n, int))
        if not numbers or len(numbers) < len(operands):
            raise Unsupported(f"{where} takes a value that is not computed from the input, which is not fused")
        if kind == "identity":
            return numbers[0]
        self.layers.append(Layer(kind, numbers, where, options))
        return len(self.layers)

    def _understood(self, value: Any) -> Any:
        """An argument as plain data: numbers stay, a node becomes its meaning."""
        if isinstance(value, (tuple, list)):
            return tuple(self._understood(v) for v in value)
        if not isinstance(value, fx.Node):
            return value
        meaning = self.meaning[value]
        return TENSOR if isinstance(meaning, int) else meaning

    def _param(self, tensor: Any, where: str) -> Param:
        index = self.param_of.get(id(tensor))
        if index is None:
            raise Unsupported(f"{where} uses a tensor that is not one of the model's parameters")
        return Param(index, self.layout.shapes[index])

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _inplace(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self._module(node), "inplace", False))
        if node.op == "call_method":
            return str(node.target).endswith("_") and not str(node.target).endswith("__")
        if node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            in_name = name.endswith("_") and not name.startswith("_")
            return node.target in _INPLACE_OPERATORS or bool(node.kwargs.get("inplace")) or in_name
        return False

    def _live(self) -> set[fx.Node]:
        live: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node.op in ("output", "placeholder") or self._inplace(node) or any(user in live for user in node.users):
                live.add(node)
        return live

    def _refuse_values_changed_in_place(self, live: set[fx.Node]) -> None:
        """A value overwritten by an in-place layer must not be read again under its old name: Steps have no aliases."""
        root: dict[fx.Node, fx.Node] = {}  # the node whose memory a node shares
        changed_by: dict[fx.Node, fx.Node] = {}
        for node in (n for n in self.nodes if n in live):
            for read in node.all_input_nodes:
                if read in changed_by:
                    raise Unsupported(
                        f"'{changed_by[read].name}' changes '{read.name}' in place before it is read again"
                    )
            first = node.args[0] if node.args else None
            inplace = self._inplace(node)
            shares = isinstance(first, fx.Node) and (inplace or fused_layers.is_view(node, self._module(node)))
            root[node] = root[first] if shares and isinstance(first, fx.Node) else node
            if inplace:
                changed_by.update({old: node for old in root if old is not node and root[old] is root[node]})
