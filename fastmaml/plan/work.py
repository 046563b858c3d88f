"""What an outer step asks of the engine, found out without computing it: the step runs, and every operator returns zeros.

calls = engine_calls(lambda: learner(*batch))            batch may be views of a single number (zeros().expand())
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastmaml.engine import Engine


class EngineCall(NamedTuple):
    """One call of a compiled operator, by its sizes."""

    kind: str  # as _C.costs has it: "meta_gradient", "hvp", ...
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
    inputs: tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes of the tensors
    results: tuple[tuple[int, ...], ...]

    def costs(self, memory: str | None = None) -> dict[str, Any]:
        """_C.costs of its plan, with another memory mode where given."""
        from fastmaml import _C

        return dict(_C.costs(
            self.program, self.kind, backend=self.backend, real_bytes=self.real_bytes, support_examples=self.support,
            query_examples=self.query, loop=self.loop, memory=memory or self.memory, solve_steps=self.solve_steps,
        ))  # fmt: skip


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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "fastmaml":
            return func(*args, **(kwargs or {}))
        shapes = pytree.tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), args)
        results = func(*shapes)  # on meta tensors an operator computes shapes alone
        names = [argument.name for argument in func._schema.arguments]
        tensors = [results] if isinstance(results, Tensor) else results
        self.calls.append(_call(func._schema.name.split("::")[1], dict(zip(names, args)), tensors))
        return pytree.tree_map_only(Tensor, lambda x: torch.zeros((), dtype=x.dtype).expand(x.shape), results)


def _call(kind: str, given: dict[str, Any], results: Any) -> EngineCall:
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
        inputs=tuple((name, tuple(tensor.shape)) for name, tensor in tensors),
        results=tuple(tuple(result.shape) for result in results),
    )


def empty_batch(
    tasks: int, support: int, query: int, shape: tuple[int, ...], output: int, classes: bool
) -> tuple[Any, ...]:
    """A batch of the right shapes that takes no memory: every number of it is the same one."""

    def examples(count: int) -> tuple[Tensor, Tensor]:
        x = torch.zeros(()).expand(tasks, count, *shape)
        y = torch.arange(count).remainder(output) if classes else torch.zeros(()).expand(count, output)
        return x, y.expand(tasks, *y.shape)

    return (*examples(support), *examples(query))


def require_compiled(engine: Engine) -> None:
    """Raises ValueError where the engine is not one whose plans are known."""
    if engine.backend != "cpu":
        reason = f": {engine.why}" if engine.why else ""
        raise ValueError(f"only the cpu backend is planned, and the model runs on {engine.backend}{reason}")
