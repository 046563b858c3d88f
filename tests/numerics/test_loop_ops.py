# Every inner loop that is compiled: reference against unrolled autograd in float64, cpu against reference, cpu float32
# by the rule. The ops of the update rules are covered by the cases that name them.
from __future__ import annotations

import dataclasses
import re
from functools import cache

import pytest
import torch
from cases import LOOP_CASES, LoopCase, draw_loop
from compare import Draw, expect_close, expect_same_bits, float32_rule
from loop_runs import ADAPT, META_GRADIENT, adapt, meta_gradient, unrolled

_C = pytest.importorskip("fastmaml._C")

# Float64 rounding is 1e-16; Adam divides by eps = 1e-3 and is differentiated twice.
RTOL = 1e-10

every_loop = pytest.mark.parametrize("case", LOOP_CASES, ids=str)


@cache
def exact(case: LoopCase, seed: int) -> dict[str, torch.Tensor]:
    return unrolled(case, draw_loop(case, seed))


@cache
def plain_float32(case: LoopCase, seed: int) -> dict[str, torch.Tensor]:
    return unrolled(case, draw_loop(case, seed).to(torch.float32))


@pytest.mark.parametrize("memory", ["low", "stash"])
@every_loop
def test_reference_is_unrolled_autograd(case, memory):
    for seed in (0, 1):
        got, expected = meta_gradient(case, "reference", draw_loop(case, seed), memory), exact(case, seed)
        for name in META_GRADIENT:
            if expected[name].numel():
                expect_close(got[name], expected[name].reshape(got[name].shape), RTOL, f"{case} {name}", atol=1e-14)


@pytest.mark.parametrize("memory", ["low", "stash"])
@every_loop
def test_cpu_float64_is_reference(case, memory, cpu):
    inputs = draw_loop(case, 0)
    got, expected = (meta_gradient(case, name, inputs, memory) for name in ("cpu", "reference"))
    for name in META_GRADIENT:
        expect_close(got[name], expected[name], RTOL, f"{case} {name}", atol=1e-14)


@every_loop
def test_cpu_float32_keeps_the_rule(case, cpu):
    def draw(seed: int) -> Draw:
        single = draw_loop(case, seed).to(torch.float32)
        results = [meta_gradient(case, "cpu", single), plain_float32(case, seed), exact(case, seed)]
        shapes = {name: x.shape for name, x in results[0].items()}
        return Draw(*({name: x[name].reshape(shapes[name]) for name in META_GRADIENT} for x in results))

    float32_rule(case, draw)


@every_loop
def test_adapt_is_the_forward_half(case, compiled):
    got, expected = adapt(case, compiled.name, draw_loop(case, 0)), exact(case, 0)
    for name, of_case in zip(ADAPT, ("params", "support_losses", "state"), strict=True):
        expect_close(got[name], expected[of_case].reshape(got[name].shape), RTOL, f"{case} {name}", atol=1e-14)


@every_loop
def test_per_task_gradients_average_to_the_reduced_ones(case, compiled):
    inputs = draw_loop(case, 0)
    reduced = meta_gradient(case, compiled.name, inputs)
    each = meta_gradient(case, compiled.name, inputs, words="per_task=1")
    assert each["total_loss"].numel() == 0  # nothing is reduced to one loss
    for name in META_GRADIENT:
        if name == "total_loss":
            continue
        if each[name].shape == reduced[name].shape:
            expect_same_bits(each[name], reduced[name], f"{case} {name}")
        else:
            expect_close(each[name].mean(0), reduced[name], 1e-14, f"{case} {name}")
    starts = dataclasses.replace(inputs, theta=inputs.theta.expand(case.tasks, -1).contiguous())
    for name, value in meta_gradient(case, compiled.name, starts, words="per_task=1").items():
        expect_same_bits(value, each[name], f"{case} {name}, theta [T, P]")


@pytest.mark.parametrize("case", [c for c in LOOP_CASES if "steps=4" in c.loop and "rows" not in c.loop], ids=str)
def test_adapt_goes_on_from_a_state(case, compiled):
    # Two steps and two more are four: the state is handed over, and Adam's bias correction counts on.
    case = dataclasses.replace(case, rates_per_step=False, loop=case.loop.replace(" order=2", ""))
    inputs = draw_loop(case, 0)
    half = dataclasses.replace(case, loop=case.loop.replace("steps=4", "steps=2"))
    whole, first = adapt(case, compiled.name, inputs), adapt(half, compiled.name, inputs)
    middle = dataclasses.replace(inputs, theta=first["params"])
    second = adapt(half, compiled.name, middle, first["state"], torch.tensor([2.0], dtype=torch.float64))
    for name in ("params", "state"):
        expect_close(second[name], whole[name], 1e-14, f"{case} {name}")
    expect_close(torch.cat([first["losses"], second["losses"]], 1), whole["losses"], 1e-14)


@pytest.mark.parametrize("loop", ["steps=2 rule=adam eps=0.001", "steps=2 rule=adam eps=0.001 weight_decay=0.1"])
def test_adam_survives_gradients_that_are_zero(loop, compiled):
    # Second moments that are exactly zero: the root has no derivative there, and nothing is passed on (ALGORITHMS 1.4).
    case = LoopCase(loop)
    inputs = draw_loop(case, 0)
    blank = dataclasses.replace(
        inputs, support_x=torch.zeros_like(inputs.support_x)
    )  # no gradient by the first weights
    got, expected = meta_gradient(case, compiled.name, blank), unrolled(case, blank)
    for name in ("grad", "rate_grad"):
        expect_close(got[name], expected[name].reshape(got[name].shape), RTOL, f"{case} {name}")


# ---------------------------------------------------------------- memory


def arena_bytes(loop: str, memory: str = "low") -> int:
    return _C.arena_bytes(LoopCase("steps=1", "conv").text, "meta_gradient", loop=loop, memory=memory)


@pytest.mark.parametrize(
    ("words", "vectors"),
    [
        ("", 1),  # phi
        ("rate_grad=1", 1),
        ("weight_decay=0.1 rate_grad=1", 1),
        ("proximal=1 rate_grad=1", 1),
        ("momentum=0.9", 1),
        ("momentum=0.9 nesterov=1", 1),
        ("momentum=0.9 rate_grad=1", 2),  # and the direction
        ("momentum=0.9 nesterov=1 rate_grad=1", 2),
        ("clip_norm=1", 2),  # and the raw gradient
        ("clip_value=1 rate_grad=1", 2),
        ("momentum=0.9 clip_norm=1 rate_grad=1", 3),
        ("rule=adam", 4),  # phi, m, s, g
        ("rule=adam rate_grad=1 weight_decay=0.1", 4),
        ("rule=adam clip_norm=1 rate_grad=1", 4),
        ("order=0", 0),
        ("order=0 momentum=0.9", 0),
        ("order=0 rule=adam", 0),
        ("order=0 rate_grad=1", 1),  # the gradient
        ("order=0 momentum=0.9 nesterov=1 rate_grad=1", 1),
        ("order=0 rule=adam rate_grad=1", 3),  # m, s, g
        ("order=3", 0),  # only the last three steps are kept
    ],
)
def test_each_inner_step_takes_this_many_vectors(words, vectors):
    P = LoopCase("steps=1", "conv").param_count
    slot = -(-P * 4 // 64) * 64
    sizes = [arena_bytes(f"steps={K} {words}") for K in (10, 30)]
    assert sizes[1] - sizes[0] == 20 * vectors * slot, (sizes, slot)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("loop", "sentence"),
    [
        ("momentum=0.9", "does not say steps="),
        ("steps=2.5", 'word "steps=2.5" must be whole'),
        ("steps=2 speed=3", 'word "speed=3" is not known'),
        ("steps=2 rule=lion", "is not one of sgd, adam"),
        ("steps=2 fast", "is not key=value"),
        ("steps=2 steps=3", "comes twice"),
        ("steps=2 rule=adam momentum=0.9", "momentum=, which goes with rule=sgd"),
        ("steps=2 eps=1", "eps=, which goes with rule=adam"),
        ("steps=2 rule=adam beta1=1", "must be less than 1"),
        ("steps=2 nesterov=1", "nesterov=1 without momentum="),
        ("steps=2 clip_norm=1 clip_value=1", "choose one"),
        ("steps=2 proximal=1 clip_norm=1", "beside a proximal term"),
        ("steps=2 clip_norm=0", "must be greater than 0"),
        ("steps=2 queries=3", "behind its last step"),
        ("steps=2 queries=1", "loss_weights are missing"),
        ("steps=2 rows=1", "step_rows are missing"),
        ("steps=2 rows=9", "names parameter 9"),
        ("steps=2 proximal=1", "must be given together"),
        ("steps=2 minibatch=4", "take 8"),
    ],
)
def test_an_inner_loop_that_makes_no_sense_is_refused(loop, sentence):
    case = LoopCase("steps=2")
    with pytest.raises((ValueError, RuntimeError), match=re.escape(sentence)):
        meta_gradient(dataclasses.replace(case, loop=loop), "cpu", draw_loop(case, 0))
