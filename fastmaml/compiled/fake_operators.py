"""Result shapes of the compiled operators, for torch.compile, fake tensors and torch.library.opcheck.

loading.py imports this file after the operators are registered. Sizes may be symbolic, so the functions are in Python.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel, register_fake

# These operators return tensors without a graph. The fallthrough skips autograd's dispatch, which costs time per call.
_library = Library("fastmaml", "IMPL")
for _operator in ("plain_meta_gradient", "scaled_parts"):
    _library.impl(_operator, fallthrough_kernel, "Autograd")


def _output(program: str, like: Tensor, x: Tensor) -> Tensor:
    from fastmaml import _C  # type: ignore[attr-defined,unused-ignore]

    return like.new_empty([x.shape[0], x.shape[1], *_C.output_shape(program)])


def _loop_sizes(program: str, loop: str) -> dict[str, int]:
    from fastmaml import _C  # type: ignore[attr-defined,unused-ignore]

    sizes: dict[str, int] = _C.loop_sizes(program, loop)
    return sizes


@register_fake("fastmaml::forward")
def _forward(program: str, backend: str, params: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return _output(program, params, x)


@register_fake("fastmaml::grad")
def _grad(program: str, backend: str, params: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    T, P = x.shape[0], params.shape[-1]
    return params.new_empty([T]), params.new_empty([T, P])


@register_fake("fastmaml::hvp")
def _hvp(program: str, backend: str, params: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return params.new_empty([x.shape[0], params.shape[-1]])


@register_fake("fastmaml::linearise")
def _linearise(
    program: str,
    backend: str,
    gauss_newton: bool,
    params: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    buffers: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from fastmaml import _C  # type: ignore[attr-defined,unused-ignore]

    real, index, tap = _C.tape_sizes(
        program, backend, gauss_newton, params.element_size(), int(x.shape[1]), weights is not None
    )
    T = x.shape[0]
    return (
        params.new_empty([T, real]),
        params.new_empty([T, index], dtype=torch.int32),
        params.new_empty([T, tap], dtype=torch.int8),
    )


@register_fake("fastmaml::curvature")
def _curvature(program: str, backend: str, gauss_newton: bool, params: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return params.new_empty([x.shape[0], params.shape[-1]])


@register_fake("fastmaml::vjp")
def _vjp(program: str, backend: str, params: Tensor, x: Tensor, dy: Tensor, buffers: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dy), params.new_empty([x.shape[0], params.shape[-1]])


@register_fake("fastmaml::adapt")
def _adapt(
    program: str,
    backend: str,
    params: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    rates: Tensor,
    loop: str,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _loop_sizes(program, loop)
    T, P = x.shape[0], params.shape[-1]
    shapes = ([T, P], [T, sizes["steps"]], [T, sizes["states"] * P])
    return params.new_empty(shapes[0]), params.new_empty(shapes[1]), params.new_empty(shapes[2])


@register_fake("fastmaml::meta_gradient")
def _meta_gradient(
    program: str,
    backend: str,
    theta: Tensor,
    support_x: Tensor,
    support_y: Tensor,
    support_weights: Tensor | None,
    query_x: Tensor,
    query_y: Tensor,
    query_weights: Tensor | None,
    task_weights: Tensor | None,
    rates: Tensor,
    loop: str,
    *rest: Any,
) -> tuple[Tensor, ...]:
    sizes = _loop_sizes(program, loop)
    T, P, K, R = support_x.shape[0], theta.shape[-1], sizes["steps"], sizes["step_row"]
    of_tasks = [T] if sizes["per_task"] else []
    return (
        theta.new_empty([T]),
        theta.new_empty([*of_tasks, P]),
        _output(program, theta, query_x),
        theta.new_empty([T, K]),
        theta.new_empty([*of_tasks, *rates.shape] if sizes["rate_grad"] else [0]),
        theta.new_empty([*of_tasks, K, R] if K and R else [0]),
        theta.new_empty([T, sizes["queries"]]),
        theta.new_empty([0] if sizes["per_task"] or theta.device.type != "cpu" else []),
    )


@register_fake("fastmaml::solve")
def _solve(
    program: str,
    backend: str,
    params: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    v: Tensor,
    mask: Tensor | None,
    lam: float,
    steps: int,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    T, P = x.shape[0], params.shape[-1]
    return params.new_empty([T, P]), params.new_empty([T, 1 + steps]), params.new_empty([T, 5])


@register_fake("fastmaml::passes")
def _passes(
    program: str,
    backend: str,
    dual: bool,
    params: Tensor,
    params_dot: Tensor,
    x: Tensor,
    x_dot: Tensor,
    dy: Tensor,
    dy_dot: Tensor,
    buffers: Tensor,
) -> tuple[Tensor, ...]:
    results = (dy, dy_dot, x, x_dot)
    T, P = x.shape[0], params.shape[-1]
    return (*(torch.empty_like(r) for r in results), params.new_empty([T, P]), params.new_empty([T, P]))


@register_fake("fastmaml::plain_meta_gradient")
def _plain_meta_gradient(
    program: str,
    backend: str,
    theta: list[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    rate: float,
    loop: str,
    memory: str,
) -> tuple[Tensor, ...]:
    flat = torch.cat([part.reshape(-1) for part in theta])
    rates = flat.new_empty([1, len(flat)])
    given = (support_x, support_y, None, query_x, query_y, None, None, rates, loop)
    return _meta_gradient(program, backend, flat, *given)


@register_fake("fastmaml::scaled_parts")
def _scaled_parts(flat: Tensor, scale: Tensor, shapes: list[int]) -> list[Tensor]:
    parts, rest = [], list(shapes)
    while rest:
        count = rest.pop(0)
        parts.append(flat.new_empty(rest[:count]))
        rest = rest[count:]
    return parts
