"""The engine calls of an outer step, found without computing: the step runs, and operators return made-up numbers.

calls = engine_calls(lambda: learner(*batch))            batch may be views of a single number (zeros().expand())
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastmaml.compiled import introspection
from fastmaml.engine.engine import Engine


class EngineCall(NamedTuple):
    """One call of a compiled operator, by its sizes."""

    kind: str  # as in introspection.costs: "meta_gradient", "hvp", ...
    program: str
    backend: str
    real_bytes: int
    tasks: int
    parameters: int
    support: int  # examples
    query: int
    loop: str
    memory: str
    solve_steps: int
    uniform_rate: bool  # whether all parameters share one rate, which the engine exploits
    inputs: tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes of the tensors
    results: tuple[tuple[int, ...], ...]

    @property
    def python_loss(self) -> bool:
        return "\nloss caller" in self.program

    def costs(self, memory: str | None = None) -> dict[str, Any]:
        """introspection.costs of the call's plan. memory: another memory mode."""
        return introspection.costs(
            self.program, self.kind, backend=self.backend, real_bytes=self.real_bytes, support_examples=self.support,
            query_examples=self.query, loop=self.loop, memory=memory or self.memory, solve_steps=self.solve_steps,
            uniform_rate=self.uniform_rate,
        )  # fmt: skip


def engine_calls(step: Callable[[], Any]) -> list[EngineCall]:
    """The operators that `step` calls, in order."""
    recorder = _Recorder()
    with recorder:
        step()
    return recorder.calls


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[EngineCall] = []
        self.random = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default and _repeats_itself(args[0]):  # .contiguous() of an empty batch
            return torch.ops.aten.alias.default(args[0])
        if func.namespace != "fastmaml" or func is torch.ops.fastmaml.scaled_parts.default:
            return func(*args, **(kwargs or {}))
        shapes = pytree.tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), args)
        results = func(*shapes)  # on meta tensors an operator computes only shapes
        names = [argument.name for argument in func._schema.arguments]
        tensors = [results] if isinstance(results, Tensor) else results
        rates = dict(zip(names, args)).get("rates")
        uniform = rates.stride(-1) == 0 if isinstance(rates, Tensor) else "rate" in names
        call = _call(func._schema.name.split("::")[1], _with_vectors(dict(zip(names, shapes))), tensors)
        self.calls.append(call._replace(uniform_rate=uniform))
        return pytree.tree_map_only(Tensor, self._made_up, results)

    def _made_up(self, result: Tensor) -> Tensor:
        """Made-up numbers: positive and unequal, so conjugate gradients continue; equal for all tasks, to save memory."""
        row = torch.rand(result.shape[-1:], generator=self.random, dtype=result.dtype)
        return (row + 0.5).expand(result.shape)


def _repeats_itself(x: Tensor) -> bool:
    return x.numel() * x.element_size() > x.untyped_storage().nbytes()


def _with_vectors(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of plain_meta_gradient as arguments of meta_gradient, which it calls."""
    if "rate" not in given:
        return given
    theta = given["theta"]
    flat = theta[0].new_empty(sum(part.numel() for part in theta), device="meta")
    return given | {"theta": flat, "rates": flat.unsqueeze(0)}


def _call(kind: str, given: dict[str, Any], results: Any) -> EngineCall:
    kind = kind.removeprefix("plain_")
    params = given["theta"] if "theta" in given else given["params"]
    query = given.get("query_x")
    x = given["support_x"] if query is not None else given["x"]
    if kind == "forward":
        query, x = x, given["support_x"]
    examples = query if x is None else x
    assert isinstance(examples, Tensor)
    tensors = ((name, value) for name, value in given.items() if isinstance(value, Tensor))
    return EngineCall(
        kind=kind,
        program=given["program"],
        backend=given["backend"],
        real_bytes=params.element_size(),
        tasks=examples.shape[0],
        parameters=params.shape[-1],
        support=0 if x is None else x.shape[1],
        query=1 if query is None else query.shape[1],
        loop=given.get("loop", "steps=1"),
        memory=given.get("memory", "low"),
        solve_steps=given.get("steps", 1),
        uniform_rate=False,
        inputs=tuple((name, tuple(tensor.shape)) for name, tensor in tensors),
        results=tuple(tuple(result.shape) for result in results),
    )


def empty_batch(
    tasks: int,
    support: int,
    query: int,
    shape: tuple[int, ...],
    targets: tuple[int, ...],
    ways: int | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """A batch of the right shapes that takes no memory: a view of one number, and of one row of labels.

    ways: number of classes, which take turns; None: real targets of the shape `targets`.
    """  # fmt: skip

    def examples(count: int) -> tuple[Tensor, Tensor]:
        x = torch.zeros((), dtype=dtype).expand(tasks, count, *shape)
        if ways is None:
            return x, torch.zeros((), dtype=dtype).expand(tasks, count, *targets)
        return x, torch.arange(count).remainder(ways).expand(tasks, count)

    return (*examples(support), *examples(query))


def require_compiled(engine: Engine) -> None:
    """Raises ValueError unless the engine's plans are known."""
    if engine.backend != "cpu":
        reason = f": {engine.why}" if engine.why else ""
        raise ValueError(f"only the cpu backend is planned, but the model runs on {engine.backend}{reason}")
