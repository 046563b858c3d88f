# Layers of random sizes, beyond the list in cases/op_list.py. Each draw is a separate case, so float32 is judged per draw.
from __future__ import annotations

import cases
from cases import OpCase, draw_op
from compare import expect_close, float32_fuzz
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from op_runs import by_torch, run
from torch import float32

RTOL = 1e-10  # as test_ops


@st.composite
def tasks_and_examples(draw, least_examples: int = 1) -> dict[str, int]:
    return {"tasks": draw(st.integers(1, 3)), "examples": draw(st.integers(least_examples, 5))}


@st.composite
def windows(draw, pool: bool) -> tuple:
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = tuple(draw(st.integers(0, k // 2 if pool else 3)) for k in kernel)
    size = draw(st.tuples(st.integers(1, 11), st.integers(1, 11)))
    assume(all(n + 2 * p >= k for n, k, p in zip(size, kernel, padding, strict=True)))
    return size, kernel, stride, padding


@st.composite
def conv2d(draw) -> OpCase:
    size, kernel, stride, padding = draw(windows(pool=False))
    channels, filters, bias = draw(st.integers(1, 35)), draw(st.integers(1, 35)), draw(st.booleans())
    return cases.conv2d((channels, *size), filters, kernel, stride, padding, bias, **draw(tasks_and_examples()))


@st.composite
def pool2d(draw) -> OpCase:
    size, kernel, stride, padding = draw(windows(pool=True))
    kind, grid = draw(st.sampled_from(["max", "avg"])), draw(st.sampled_from([0.0, 1.0]))
    how = draw(tasks_and_examples()) | ({"grid": grid} if grid else {})
    include = kind == "max" or draw(st.booleans())
    return cases.pool2d(kind, (draw(st.integers(1, 35)), *size), kernel, stride, padding, include, **how)


@st.composite
def linear(draw) -> OpCase:
    inputs, outputs = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    return cases.linear(inputs, outputs, draw(st.booleans()), **draw(tasks_and_examples()))


@st.composite
def norm(draw) -> OpCase:
    eps = draw(st.sampled_from([1e-5, 1e-3, 0.1]))
    affine, shift = draw(st.booleans()), draw(st.sampled_from([0.0, 3.0]))
    kind = draw(st.sampled_from(["batch_norm", "batch_norm_frozen", "group_norm", "layer_norm"]))
    image = draw(st.booleans())
    # At least four values a mean: with two, xhat is +-1 whatever x is, and what remains is the rounding of eps.
    pixels = (draw(st.integers(2, 6)), draw(st.integers(2, 6))) if image else ()
    how = draw(tasks_and_examples(least_examples=1 if image else 4)) | {"shift": shift}
    if kind == "group_norm":
        groups, width = draw(st.integers(1, 5)), draw(st.integers(4, 9))
        return cases.group_norm((groups * width, *pixels), groups, affine, eps, **how)
    channels = draw(st.integers(4, 35))
    if kind == "layer_norm":
        return cases.layer_norm((channels, *pixels), affine, affine and draw(st.booleans()), eps, **how)
    return getattr(cases, kind)((channels, *pixels), affine, eps, **how)


@settings(max_examples=40)
@given(case=st.one_of(conv2d(), pool2d(), linear(), norm()), seed=st.integers(0, 999))
def test_layers_of_any_size_are_torchs(case, seed, compiled):
    inputs = draw_op(case, seed)
    expected = by_torch(case, inputs, case.function)
    for dual in (False, True):
        got = run(case, compiled.name, inputs, dual)
        for name, value in expected.items():
            expect_close(got[name], value, RTOL, f"{case} {name}", atol=1e-14)  # sums that cancel to zero
    if compiled.name == "reference":
        return
    plain, ours = (
        by_torch(case, inputs.to(float32), case.plain or case.function),
        run(case, "cpu", inputs.to(float32), True),
    )
    for name, value in expected.items():
        if value.numel():
            float32_fuzz(f"{case} {name}", ours[name], plain[name], value)
