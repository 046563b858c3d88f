# Whole networks in float32 at identical parameters, by the rule of DESIGN section 5. The yardstick is plain torch:
# F.batch_norm, double backward, the same float32 numbers. Draws in which a mask or an argmax falls the other way are
# left out by name.
from __future__ import annotations

import copy
from functools import cache

import oracle
import pytest
import torch
from branch_flips import branch_flips
from cases import CONV4, MAIN_CASES, NETWORK_CASES, SMOOTH_CASES
from compare import Draw, float32_rule
from engines import engine, exact, normal, rates, setup
from test_meta_gradient import program_of

every_network = pytest.mark.parametrize("case", NETWORK_CASES, ids=str)


@cache
def gradient_and_hvp(case, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    s = setup(case, seed)
    apply = oracle.network(copy.deepcopy(s.model).to(dtype), plain=dtype == torch.float32)
    data, v = s.data.to(dtype), normal(case.tasks, s.P, seed=seed).to(dtype)
    mask, theta = s.mask.to(dtype), s.theta.to(dtype)  # rows and columns of frozen parameters are zero
    loss, grad = oracle.loss_and_grad(apply, theta, data.support_x, data.support_y, s.loss)
    hv = oracle.hvp(apply, theta, data.support_x, data.support_y, mask * v, s.loss)
    return {"loss": loss, "grad": mask * grad, "hvp": mask * hv}


def flips(made, case, s, params, exact_params, x) -> list[str]:
    return branch_flips(program_of(made, case), params, exact_params, x, torch.empty(0))


@every_network
def test_gradient_and_hvp_keep_the_rule(case, cpu):
    def draw(seed: int) -> Draw:
        s = setup(case, seed)
        made = engine(case, cpu, seed)
        data, theta, v = s.data.to(torch.float32), s.theta.float(), normal(case.tasks, s.P, seed=seed).float()
        loss, grad = made.grad(theta, data.support_x, data.support_y)
        ours = {"loss": loss, "grad": grad, "hvp": made.hvp(theta, data.support_x, data.support_y, v)}
        found = flips(made, case, s, s.theta, s.theta, s.data.support_x)
        return Draw(
            ours, gradient_and_hvp(case, seed, torch.float32), gradient_and_hvp(case, seed, torch.float64), found
        )

    float32_rule(case, draw)


@cache
def plain_meta_gradient(case, inner_steps: int, seed: int) -> oracle.Result:
    s = setup(case, seed)
    apply = oracle.network(copy.deepcopy(s.model).float(), plain=True)
    return oracle.meta_gradient(
        apply,
        s.theta.float(),
        s.data.to(torch.float32).tuple,
        s.loss,
        rates(case, seed=seed).float(),
        inner_steps,
        mask=s.mask,
    )


@pytest.mark.parametrize(
    ("case", "inner_steps"), [*((case, 1) for case in MAIN_CASES), *((case, 3) for case in SMOOTH_CASES)], ids=str
)
@pytest.mark.parametrize("memory", ["low", "stash"])
def test_meta_gradient_keeps_the_rule(case, inner_steps, memory, cpu):
    # Kinked networks at K = 1 only, where the flips along the way can still be named.
    names = ("loss", "grad", "query_output", "support_losses")

    def draw(seed: int) -> Draw:
        s, expected, plain = (
            setup(case, seed),
            exact(case, inner_steps, seed=seed),
            plain_meta_gradient(case, inner_steps, seed),
        )
        made = engine(case, cpu, seed, memory=memory)
        got = made.meta_gradient(
            s.theta.float(), s.batch(torch.float32), inner_lr=case.inner_lr, inner_steps=inner_steps
        )
        found = flips(made, case, s, s.theta, s.theta, s.data.support_x)
        if not case.smooth:
            data = s.data.to(torch.float32)
            adapted = made.adapt(s.theta.float(), data.support_x, data.support_y, inner_lr=case.inner_lr, inner_steps=1)
            found += [f"{flip} (query)" for flip in flips(made, case, s, adapted, expected.params, s.data.query_x)]
        return Draw(*({name: getattr(result, name) for name in names} for result in (got, plain, expected)), found)

    float32_rule(f"{case} K={inner_steps} {memory}", draw)


def test_flips_are_found_and_named(cpu):
    s = setup(CONV4)
    made = engine(CONV4, cpu)
    assert flips(made, CONV4, s, s.theta, s.theta, s.data.support_x) == []
    other = flips(made, CONV4, s, s.theta, s.theta + 0.01 * normal(s.P), s.data.support_x)
    assert any(flip.startswith("relu 3: ") for flip in other) and any(
        flip.startswith("max_pool2d 4: ") for flip in other
    ), other
