# A loss written in Python, called between two compiled segments, gives the same numbers as the engine's own loss.
from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from cases import LoopCase, OpCase, draw_loop, draw_op, program
from compare import expect_close, expect_same_bits
from loop_runs import META_GRADIENT, adapt, meta_gradient

from fastmaml.compiled.python_loss import tensor_of

_C = pytest.importorskip("fastmaml._C")
NOTHING = torch.empty(0, dtype=torch.float64)


class InPython(LoopCase):
    """The case, with its loss in Python."""

    @property
    def text(self) -> str:
        return self.program("caller")


class ByTorch:
    """The loss of a LoopCase for _C.set_python_loss: values, gradients and tangents by autograd on all tasks at once."""

    def __init__(self, case: LoopCase, support_y: torch.Tensor, query_y: torch.Tensor | None = None) -> None:
        self.case, self.y, self.calls = case, {False: support_y, True: query_y}, []

    def __call__(self, query, first_row, z, z_dot, loss_out, dz_out, backend="") -> None:
        z, z_dot, loss_out, dz_out = (tensor_of(a, backend, self.y[query].device) for a in (z, z_dot, loss_out, dz_out))
        self.calls.append((query, first_row, z.shape[1], z_dot is not None))
        T, N = z.shape[:2]
        y = self.y[query][:, first_row : first_row + N]
        at = z.contiguous().requires_grad_(True)
        loss = torch.stack(
            [self.case.loss(at[t], y[t].to(at.dtype) if y.is_floating_point() else y[t]).mean() for t in range(T)]
        )
        (dz,) = torch.autograd.grad(loss.sum(), at, create_graph=z_dot is not None)
        if z_dot is None:
            assert loss_out.shape == (T,)
            loss_out[:] = loss.detach()
        else:
            assert loss_out is None
            (dz,) = torch.autograd.grad((dz * z_dot).sum(), at)
        dz_out[:] = dz


@contextmanager
def python_loss(function) -> Iterator[None]:
    _C.set_python_loss(function)
    try:
        yield
    finally:
        _C.set_python_loss(None)


LOOPS = [
    LoopCase("steps=3", tasks=5),
    LoopCase("steps=3", "conv", tasks=3),
    LoopCase("steps=3 order=0", "conv"),
    LoopCase("steps=3 minibatch=2 rule=adam eps=0.001", "conv"),
    LoopCase("steps=3 queries=1,2 momentum=0.9 order=2", loss_weights=True),
    LoopCase("steps=0"),
]


@pytest.mark.parametrize("memory", ["low", "stash"])
@pytest.mark.parametrize("case", LOOPS, ids=str)
def test_a_python_loss_is_the_engines_own(case, memory, compiled):
    inputs, in_python = draw_loop(case, 0), InPython(**case.__dict__)
    loss = ByTorch(case, inputs.support_y, inputs.query_y)
    expected = meta_gradient(case, compiled.name, inputs, memory)
    with python_loss(loss):
        got = meta_gradient(in_python, compiled.name, inputs, memory)
    for name in META_GRADIENT:
        expect_close(got[name], expected[name], 1e-11, f"{case} {name}", atol=1e-14)
    with python_loss(loss):
        again = adapt(in_python, compiled.name, inputs)
    for name, value in adapt(case, compiled.name, inputs).items():
        expect_close(again[name], value, 1e-11, f"{case} {name}", atol=1e-14)


def test_the_loss_is_asked_for_what_the_contract_says(compiled):
    case = LoopCase("steps=2 minibatch=3", "conv")
    inputs = draw_loop(case, 0)
    loss = ByTorch(case, inputs.support_y, inputs.query_y)
    with python_loss(loss):
        meta_gradient(InPython(**case.__dict__), compiled.name, inputs, "stash")
    # (query, first row, rows, tangent): the inner steps, the query, the sweep
    expected = [
        (False, 0, 3, False),
        (False, 3, 3, False),
        (True, 0, 4, False),
        (False, 3, 3, True),
        (False, 0, 3, True),
    ]
    assert loss.calls == expected


def test_grad_hvp_and_solve_take_a_python_loss(compiled):
    case = LoopCase("steps=1", "conv", tasks=3)
    i, in_python = draw_loop(case, 0), InPython(**case.__dict__)
    v = torch.randn(3, case.param_count, generator=torch.Generator().manual_seed(1)).double()
    ops = torch.ops.fastmaml
    calls = {
        "grad": lambda text: ops.grad(text, compiled.name, i.theta, i.support_x, i.support_y, None, NOTHING),
        "hvp": lambda text: (ops.hvp(text, compiled.name, i.theta, i.support_x, i.support_y, None, v, NOTHING),),
        "solve": lambda text: ops.solve(
            text, compiled.name, i.theta, i.support_x, i.support_y, None, v, None, 2.0, 3, 0.1, 1e-10, NOTHING
        ),
    }
    for name, call in calls.items():
        expected = call(case.text)
        with python_loss(ByTorch(case, i.support_y)):
            got = call(in_python.text)
        for a, b in zip(got, expected, strict=True):
            expect_close(a, b, 1e-11, name)


def test_the_support_statistics_of_batch_norm_leave_the_loss_the_query_rows(compiled):
    case = LoopCase("steps=2", "conv")
    inputs = draw_loop(case, 0)
    own, in_python = (dataclasses.replace(of(**case.__dict__)) for of in (LoopCase, InPython))
    texts = [c.text.replace("mode=batch", "mode=support") for c in (own, in_python)]
    i = inputs
    results = []
    for text in texts:
        with python_loss(ByTorch(case, i.support_y, i.query_y)):
            results.append(
                torch.ops.fastmaml.meta_gradient(
                    text, compiled.name, i.theta, i.support_x, i.support_y, None, i.query_x, i.query_y, None, None,
                    i.rates, "steps=2", "low", None, None, None, None, NOTHING,
                )
            )  # fmt: skip
    for a, b in zip(results[1], results[0], strict=True):
        if b.numel():
            expect_close(a, b, 1e-11)


def test_an_image_output_arrives_in_torchs_order(compiled):
    # One convolution, its output the image: z is what torch computes, and the gradient goes back to its own pixel.
    T, N = 2, 3
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(T, N, 2, 4, 5, generator=generator).double(),
        torch.randn(3, 2, 3, 3, generator=generator).double(),
    )
    weight = torch.randn(3, 4, 5, generator=generator).double()
    text = program((2, 4, 5), ((3, 2, 3, 3),), ("conv2d 0 weight=0 bias=-1 stride=1,1 padding=1,1",), loss="caller")
    seen = []

    def loss(query, first_row, z, z_dot, loss_out, dz_out, backend=""):
        z, loss_out, dz_out = (tensor_of(a, backend, x.device) for a in (z, loss_out, dz_out))
        seen.append(z.clone())
        loss_out[:] = (z * weight).sum((1, 2, 3, 4))
        dz_out[:] = weight

    with python_loss(loss):
        value, grad = torch.ops.fastmaml.grad(text, compiled.name, w.flatten(), x, x, None, NOTHING)
    at = w.clone().requires_grad_(True)
    for t in range(T):
        z = torch.nn.functional.conv2d(x[t], at, padding=1)
        expect_close(seen[0][t], z, 1e-12)
        expected = (z * weight).sum()
        expect_close(value[t], expected, 1e-12)
        expect_close(grad[t], torch.autograd.grad(expected, at)[0].flatten(), 1e-12)


def test_what_the_loss_raises_reaches_the_caller(compiled):
    case = InPython("steps=2")
    inputs = draw_loop(case, 0)

    def broken(*arguments):
        raise KeyError("no such action")

    with (
        python_loss(broken),
        pytest.raises(RuntimeError, match="the loss written in Python raised KeyError: 'no such action'"),
    ):
        meta_gradient(case, compiled.name, inputs)
    with pytest.raises((ValueError, RuntimeError), match="set_python_loss has not been called"):
        meta_gradient(case, compiled.name, inputs)
    with python_loss(ByTorch(case, inputs.support_y, inputs.query_y)):
        meta_gradient(case, compiled.name, inputs)


def test_float32_arrays_are_float32(cpu):
    case = InPython("steps=1")
    inputs = draw_loop(case, 0).to(torch.float32)
    types = []

    def loss(query, first_row, z, z_dot, loss_out, dz_out):
        types.append({a.dtype for a in (z, z_dot, loss_out, dz_out) if a is not None})
        if loss_out is not None:
            loss_out[:] = 0
        dz_out[:] = z if z_dot is None else z_dot

    with python_loss(loss):
        meta_gradient(case, "cpu", inputs)
    assert types == [{np.dtype(np.float32)}] * len(types)


def test_threads_change_no_bit(cpu, threads):
    case = LoopCase("steps=3", "conv", tasks=5)
    inputs, results = draw_loop(case, 0), []
    for count in (1, 2):
        torch.set_num_threads(count)
        with python_loss(ByTorch(case, inputs.support_y, inputs.query_y)):
            results.append(meta_gradient(InPython(**case.__dict__), "cpu", inputs))
    for name in META_GRADIENT:
        expect_same_bits(results[1][name], results[0][name], name)


# ---------------------------------------------------------------- vjp

CONV = OpCase(
    "conv2d batch_norm tanh",
    (3, 5, 4),
    ("conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1", "batch_norm 1 weight=2 bias=3 eps=1e-05 mode=batch", "tanh 2"),
    lambda p, x: x,
    params=((4, 3, 3, 3), (4,), (4,), (4,)),
)


def test_vjp_is_the_primal_half_of_passes(compiled):
    i = draw_op(CONV, 0)
    dy = torch.randn(2, 3, 4, 5, 4, generator=torch.Generator().manual_seed(2)).double()
    expected = torch.ops.fastmaml.passes(
        CONV.text, compiled.name, False, i.params, i.params_dot, i.x, i.x_dot, dy, dy, i.buffers
    )
    y, grad = torch.ops.fastmaml.vjp(CONV.text, compiled.name, i.params, i.x, dy, i.buffers)
    expect_same_bits(y, expected[0])
    expect_same_bits(grad, expected[4])
