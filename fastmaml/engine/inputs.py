"""Checks the arguments of a call against the network, and converts them to the form that the backends take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaml.engine.backend import BackendChoice
from fastmaml.network.trace import Program
from fastmaml.problem import checks
from fastmaml.problem.examples import Examples
from fastmaml.problem.named_parameters import NamedParameters
from fastmaml.problem.pytrees import Packing, check_inputs, is_one_tensor


class Names(NamedTuple):
    """The names of a set of examples and their weights in error sentences."""

    x: str = "x"
    y: str = "y"
    weights: str = "weights"


ONE_SET = Names()
SUPPORT = Names("support_x", "support_y", "support_weights")
QUERY = Names("query_x", "query_y", "query_weights")


def plain(x: Tensor) -> Tensor:
    """x contiguous, without a graph, and as a normal tensor if it was an inference tensor."""
    x = x.clone() if x.is_inference() else x.detach() if x.requires_grad else x
    return x.contiguous()


class Inputs:
    """The checks of one Engine. Each raises ValueError or TypeError; one sentence holds the shapes."""

    def __init__(self, choice: BackendChoice, parameters: NamedParameters):
        self.choice = choice
        self.named_parameters = parameters
        self._output_shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def parameters(self, name: str, params: Any) -> Tensor:
        """A vector [P] or [T, P]."""
        checks.vector(name, params, self.choice.layout.size)
        return plain(params)

    def direction(self, v: Any, x: Tensor, params: Tensor) -> Tensor:
        """A vector for each task [T, P]."""
        return plain(checks.weights("v", v, (x.shape[0], self.choice.layout.size), params))

    def trainable(self, like: Tensor) -> Tensor | None:
        """A mask [P] that is 0 on frozen parameters. None if no parameter is frozen."""
        return self.choice.layout.trainable(self.named_parameters.named().values(), like)

    def one_tensor(self, name: str, x: Any, params: Any, as_before: bool = False) -> Tensor:
        """The examples as one floating point tensor [T, N, ...]. Several inputs, or integers, are packed side by side.

        as_before: raise ValueError unless x has the structure of the examples that were packed last.
        """
        autodiff = self.choice.autodiff
        if self.choice.fused or is_one_tensor(x) or not isinstance(x, (Tensor, tuple, list, dict)):
            packing = None
        else:
            floating = isinstance(params, Tensor) and params.is_floating_point()
            dtype = params.dtype if floating else torch.get_default_dtype()
            check_inputs(name, x, dtype)
            packing = Packing.of(x, 2)
        if as_before and packing != autodiff.inputs:
            raise ValueError(f"{name} and the other examples hold inputs of different types, shapes or number")
        autodiff.inputs = packing
        return x if packing is None else packing.pack(x, 2, dtype)

    def as_returned(self, output: Tensor) -> Any:
        """An output [T, N, ...] unpacked into the structure that the model returns."""
        outputs = self.choice.autodiff.outputs
        return output if outputs is None else outputs.unpack(output, 2)

    def inputs_alone(self, x: Any, params: Tensor) -> tuple[Program | None, Tensor]:
        """Examples without targets: (the Program that runs them, x)."""
        x = self.one_tensor("x", x, params)
        checks.examples("x", x, params)
        checks.tasks_of("params", params, x)
        return self.choice.program("x", x, params), x

    def examples(
        self,
        names: Names,
        x: Tensor,
        y: Any,
        w: Tensor | None,
        params: Tensor,
        support_x: Tensor | None = None,
        minibatch: int | None = None,
    ) -> tuple[Program | None, Examples]:
        """(the Program that runs the examples, the checked examples). minibatch: the number that one step sees."""
        checks.examples(names.x, x, params)
        checks.tasks_of("params", params, x)
        if support_x is not None:
            checks.same_tasks("support_x", support_x, names.x, x)
        program = self.choice.program(names.x, x, params)
        # In mode 'support' the support set normalises the query set, so one query example is enough.
        by_others = support_x is not None and self.choice.batch_norm == "support"
        at_once = support_x if by_others and support_x is not None else x if minibatch is None else x[:, :minibatch]
        output = self.output_shape(names.x, at_once, params, program)
        y = self._targets(names, y, x, output)
        if w is not None:
            w = plain(checks.weights(names.weights, w, tuple(x.shape[:2]), params))
        return program, Examples(plain(x), plain(y), w)

    def _targets(self, names: Names, y: Any, x: Tensor, output: tuple[int, ...]) -> Tensor:
        if self.choice.loss_name == "cross_entropy":
            if len(output) != 1:
                raise ValueError(
                    f"cross_entropy takes one row of scores per example, but the model gives {list(output)}"
                )
            checks.labels(names.y, y, names.x, x, output[0])
            return y.long()  # type: ignore[no-any-return]
        if self.choice.loss_name == "mse":
            checks.targets(names.y, y, names.x, x, output)
        else:
            checks.any_target(names.y, y, names.x, x)
        return y  # type: ignore[no-any-return]

    def output_shape(self, name: str, x: Tensor, params: Tensor, program: Program | None) -> tuple[int, ...]:
        """The shape of the network's output per example. Raises ValueError if x does not fit the model."""
        if program is None:
            return self._output_of_autodiff(name, x, params)
        for layer, positions in program.norms:
            if positions * x.shape[1] == 1:
                raise ValueError(
                    f"batch norm '{layer}' needs more than one value per channel; {name} {checks.shape(x)} gives one"
                )
        return program.output_shape

    def _output_of_autodiff(self, name: str, x: Tensor, params: Tensor) -> tuple[int, ...]:
        """Evaluates one task once, and remembers the result by the examples' shape."""
        shape = tuple(x.shape[1:])
        if shape in self._output_shapes:
            return self._output_shapes[shape]
        autodiff, loss = self.choice.autodiff, self.choice.loss_name
        one = (params if params.dim() == 1 else params[0]).unsqueeze(0)
        try:
            output = autodiff.begin(seed=0).forward(one, plain(x[:1]))
        except Exception as error:
            sentence = str(error).strip().split("\n")[0]
            raise ValueError(f"{name} {checks.shape(x)} does not fit the model: {sentence}") from error
        if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[1] != x.shape[1]:
            raise ValueError(f"the model must return tensors with a row for each of the {x.shape[1]} examples")
        if autodiff.outputs is not None and not callable(loss):
            count = len(autodiff.outputs.shapes)
            raise ValueError(f"the model returns {count} tensors; loss={loss!r} takes one, so give a function as loss")
        self._output_shapes[shape] = tuple(output.shape[2:])
        return self._output_shapes[shape]
