# The algebra of any right meta-gradient: symmetry, linearity, permutations, limits, and the same bits every time.
from __future__ import annotations

import pytest
import torch
from cases import CONV4, LAYER_NORM, MLP, NETWORK_CASES, RESIDUAL, SINE, SMOOTH_CASES, TANH, NetworkCase, draw_data
from compare import expect_close, expect_same_bits
from engines import engine, normal, setup
from for_all import for_all
from hypothesis import strategies as st
from torch import nn

import fastmaml as fm
from fastmaml.network import fused_layers

NETWORKS = [MLP, SINE, CONV4, LAYER_NORM, RESIDUAL]
SMALL = [MLP, CONV4, LAYER_NORM]
seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64])

every_network = pytest.mark.parametrize("case", NETWORKS, ids=str)


def batch(case: NetworkCase, seed: int, tasks: int, dtype=torch.float64) -> fm.TaskBatch:
    return fm.TaskBatch(*draw_data(case, seed % 10007, tasks).to(dtype).tuple)


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1)


@every_network
@for_all(seed=seeds)
def test_hvp_is_symmetric(case, backend, seed):
    s, made, data = setup(case), engine(case, backend), batch(case, seed, 2)
    params = s.theta + 0.1 * normal(2, s.P, seed=seed)
    u, w = normal(2, s.P, seed=seed + 1), normal(2, s.P, seed=seed + 2)
    hu, hw = (made.hvp(params, data.support_x, data.support_y, v) for v in (u, w))
    # 1e-10 of the norms: <u, Hw> may be a small number between large vectors
    expect_close(inner(w, hu), inner(u, hw), 0.0, case, atol=1e-10 * float(u.norm() * hw.norm()))


@every_network
@for_all(seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_hvp_is_linear(case, backend, seed, a, b):
    s, made, data = setup(case), engine(case, backend), batch(case, seed, 2)
    u, w = normal(2, s.P, seed=seed + 1), normal(2, s.P, seed=seed + 2)
    hu, hw, both = (made.hvp(s.theta, data.support_x, data.support_y, v) for v in (u, w, a * u + b * w))
    expect_close(
        both, a * hu + b * hw, 0.0, case, atol=1e-11 * float((hu.abs() + hw.abs()).max()) * (1 + abs(a) + abs(b))
    )


@every_network
@for_all(seed=seeds, dtype=dtypes, order=st.permutations(range(5)))
def test_permuting_tasks_permutes_results_bit_for_bit(case, compiled, seed, dtype, order):
    dtype = torch.float64 if compiled.name == "reference" else dtype
    tasks = 3 if compiled.name == "cuda_emulated" else 5
    order = [t for t in order if t < tasks]
    s, made, data = setup(case), engine(case, compiled), batch(case, seed, tasks, dtype)
    theta = s.theta.to(dtype)
    moved = fm.TaskBatch(*(v[order] for v in data))
    a, b = (made.meta_gradient(theta, d, inner_lr=case.inner_lr, inner_steps=2) for d in (data, moved))
    for name in ("loss", "query_output", "support_losses"):
        expect_same_bits(getattr(b, name), getattr(a, name)[order], f"{case} {name}")
    # the sum over tasks is a fixed tree over positions, so another order rounds differently
    eps = torch.finfo(dtype).eps
    each = made.meta_gradient(theta, data, inner_lr=case.inner_lr, inner_steps=2, per_task=True).grad
    bound = 64 * eps * float(each.abs().max())
    expect_close(b.grad, a.grad, 0.0, case, atol=bound)


def task_gradients(made, case, theta, data) -> torch.Tensor:
    """[T, P]: each task's own gradient after one step, through task weights that select it."""
    T = data.support_x.shape[0]
    rows = torch.eye(T, dtype=theta.dtype)
    return torch.stack(
        [
            made.meta_gradient(theta, data, inner_lr=case.inner_lr, inner_steps=1, task_weights=rows[t]).grad
            for t in range(T)
        ]
    )


def alone(data, t):
    return fm.TaskBatch(*(v[t : t + 1].contiguous() for v in data))


@every_network
@for_all(seed=seeds, dtype=dtypes, tasks=st.integers(2, 19), data=st.data())
def test_a_tasks_bits_do_not_depend_on_its_batch(case, compiled, seed, dtype, tasks, data):
    # alone, in a batch of another size and at another place: loss, outputs, adapted parameters and its own meta-
    # gradient
    dtype = torch.float64 if compiled.name == "reference" else dtype
    tasks = min(tasks, 4) if compiled.name == "cuda_emulated" else tasks
    t = data.draw(st.integers(0, tasks - 1), label="place")
    memory = data.draw(st.sampled_from(["low", "stash"]), label="memory")
    s, made = setup(case), engine(case, compiled, memory=memory)
    theta, many = s.theta.to(dtype), batch(case, seed, tasks, dtype)
    one = alone(many, t)
    select = torch.zeros(tasks, dtype=dtype)
    select[t] = 1
    how = {"inner_lr": case.inner_lr, "inner_steps": 2}
    a = made.meta_gradient(theta, many, **how, task_weights=select)
    b = made.meta_gradient(theta, one, **how, task_weights=torch.ones(1, dtype=dtype))
    for name in ("loss", "query_output", "support_losses"):
        expect_same_bits(getattr(a, name)[t : t + 1], getattr(b, name), f"{case} {name}")
    expect_same_bits(a.grad, b.grad, f"{case} grad")  # the others count 0 x finite, which adds exactly nothing
    x, y = many.support_x, many.support_y
    expect_same_bits(
        made.adapt(theta, x, y, **how)[t], made.adapt(theta, one.support_x, one.support_y, **how)[0], f"{case} adapt"
    )
    v = normal(tasks, s.P, seed=seed).to(dtype)
    expect_same_bits(
        made.hvp(theta, x, y, v)[t], made.hvp(theta, one.support_x, one.support_y, v[t : t + 1])[0], f"{case} hvp"
    )
    expect_same_bits(made.grad(theta, x, y)[1][t], made.grad(theta, one.support_x, one.support_y)[1][0], f"{case} grad")
    expect_same_bits(made.forward(theta, x)[t], made.forward(theta, one.support_x)[0], f"{case} forward")


@pytest.mark.parametrize("case", [MLP, CONV4], ids=str)
@for_all(seed=seeds, dtype=dtypes, blocks=st.sampled_from([2, 4]), size=st.sampled_from([1, 2, 4]))
def test_sums_of_aligned_blocks_make_the_whole_sum(case, compiled, seed, dtype, blocks, size):
    # The sum over tasks is one binary tree, so ranks that own aligned power-of-two blocks reproduce it bit for bit.
    dtype = torch.float64 if compiled.name == "reference" else dtype
    s, made, data = setup(case), engine(case, compiled), batch(case, seed, blocks * size, dtype)

    def total(part: fm.TaskBatch) -> torch.Tensor:
        weights = torch.ones(part.support_x.shape[0], dtype=dtype)
        how = {"inner_lr": case.inner_lr, "inner_steps": 1, "task_weights": weights}
        return made.meta_gradient(s.theta.to(dtype), part, **how).grad

    sums = [total(fm.TaskBatch(*(v[i * size : (i + 1) * size] for v in data))) for i in range(blocks)]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    expect_same_bits(total(data), sums[0], case)


@pytest.mark.parametrize("case", [MLP, CONV4, RESIDUAL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_diverged_task_harms_no_other(case, compiled, dtype):
    # Numbers overflow, masks and argmaxes see NaN: the task says so, its neighbours keep their bits and nothing crashes.
    dtype = torch.float64 if compiled.name == "reference" else dtype
    s, made, data = setup(case), engine(case, compiled), batch(case, 3, 5, dtype)
    bad = fm.TaskBatch(*(v.clone() for v in data))
    for x in (bad.support_x, bad.query_x):
        x[2] = x[2].sign() * torch.finfo(dtype).max  # finite, and the first product is not
    how = {"inner_lr": case.inner_lr, "inner_steps": 2}
    a, b = (made.meta_gradient(s.theta.to(dtype), d, **how) for d in (data, bad))
    assert not torch.isfinite(b.loss[2]) and not torch.isfinite(b.grad).all()
    others = [0, 1, 3, 4]
    for name in ("loss", "query_output", "support_losses"):
        expect_same_bits(getattr(b, name)[others], getattr(a, name)[others], f"{case} {name}")
    again = made.meta_gradient(s.theta.to(dtype), data, **how)
    expect_same_bits(again.grad, a.grad, f"{case}: the arena keeps nothing of it")


@every_network
@for_all(seed=seeds, dtype=dtypes, tasks=st.sampled_from([1, 2, 7, 16, 25]))
def test_bits_are_equal_for_one_and_two_threads(case, compiled, threads, seed, dtype, tasks):
    dtype = torch.float64 if compiled.name == "reference" else dtype
    counts = (1, 2, 2)
    if compiled.name == "cuda_emulated":  # the host's threads take no part in its kernels
        tasks, counts = min(tasks, 3), (1, 2)
    s, made, data = setup(case), engine(case, compiled), batch(case, seed, tasks, dtype)
    results = []
    for count in counts:
        torch.set_num_threads(count)
        got = made.meta_gradient(s.theta.to(dtype), data, inner_lr=case.inner_lr, inner_steps=2)
        results.append((got.grad, got.loss, got.query_output, got.inner_lr_grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            expect_same_bits(b, a, case)


def test_two_threads_really_run(cpu, threads):
    # at::parallel_for without -fopenmp is silently serial, and the test above would then prove nothing.
    from fastmaml import _C

    torch.set_num_threads(2)
    assert _C.threads_seen() == 2


@every_network
@for_all(seed=seeds)
def test_running_twice_gives_the_same_bits(case, backend, seed):
    s, made, data, other = setup(case), engine(case, backend), batch(case, seed, 3), batch(case, seed + 1, 5)
    how = {"inner_lr": case.inner_lr, "inner_steps": 2}
    first = made.meta_gradient(s.theta, data, **how)
    made.meta_gradient(s.theta, other, **how)  # another size in between moves the arena's slots
    again = made.meta_gradient(s.theta, data, **how)
    for name in ("loss", "grad", "query_output", "support_losses", "inner_lr_grad"):
        expect_same_bits(getattr(again, name), getattr(first, name), f"{case} {name}")


@every_network
@for_all(seed=seeds)
def test_no_inner_steps_is_the_plain_gradient(case, backend, seed):
    s, made, data = setup(case), engine(case, backend), batch(case, seed, 3)
    got = made.meta_gradient(s.theta, data, inner_lr=0.4, inner_steps=0)
    loss, grad = made.grad(s.theta, data.query_x, data.query_y)
    expect_close(got.loss, loss, 1e-13, case)
    expect_close(got.grad, grad.mean(0), 1e-12, case)  # the same sums, perhaps in another order
    assert got.support_losses.shape == (3, 0)
    assert torch.equal(
        made.adapt(s.theta, data.support_x, data.support_y, inner_lr=0.4, inner_steps=0), s.theta.expand(3, -1)
    )


@pytest.mark.parametrize("case", SMALL, ids=str)
@for_all(seed=seeds)
def test_first_order_is_the_limit_of_small_rates(case, backend, seed):
    # exact - first order = -a H q + O(a^2): the difference shrinks in proportion to a, and is there at all
    s, made, data = setup(case), engine(case, backend), batch(case, seed, 2)

    def difference(a: float) -> float:
        exact, first = (
            made.meta_gradient(s.theta, data, inner_lr=a, inner_steps=2, first_order=f).grad for f in (False, True)
        )
        return float((exact - first).norm() / first.norm())

    assert difference(1e-3) > 1e-7
    assert difference(1e-9) < 1e-3 * difference(1e-5) + 1e-13


@for_all(seed=seeds)
@pytest.mark.parametrize("case", SMOOTH_CASES, ids=str)
def test_finite_differences_of_the_query_loss(case, backend, seed):
    s, made, data = setup(case), engine(case, backend), batch(case, seed, 2)
    direction = normal(s.P, seed=seed) * s.mask
    direction /= direction.norm()
    how = {"inner_lr": case.inner_lr, "inner_steps": 2}

    def central(h: float) -> torch.Tensor:
        return (
            made.meta_gradient(s.theta + h * direction, data, **how).loss.mean()
            - made.meta_gradient(s.theta - h * direction, data, **how).loss.mean()
        ) / (2 * h)

    numeric = (4 * central(5e-4) - central(1e-3)) / 3  # O(h^4)
    got = made.meta_gradient(s.theta, data, **how).grad
    expect_close(got @ direction, numeric, 0.0, case, atol=1e-7 * float(got.norm()) + 1e-11)


@every_network
@for_all(seed=seeds, scale=st.floats(0.1, 4))
def test_the_gradient_is_linear_in_task_weights(case, backend, seed, scale):
    s, made, data = setup(case), engine(case, backend), batch(case, seed, 3)
    w = normal(3, seed=seed)
    how = {"inner_lr": case.inner_lr, "inner_steps": 1}
    each = task_gradients(made, case, s.theta, data)
    got = made.meta_gradient(s.theta, data, **how, task_weights=scale * w).grad
    expect_close(got, scale * (w @ each), 0.0, case, atol=1e-12 * scale * float(each.abs().max()))


@for_all(seed=seeds)
def test_permuting_support_examples_changes_nothing_but_rounding(backend, seed):
    case = TANH
    s, made, data = setup(case), engine(case, backend), batch(case, seed, 2)
    order = torch.randperm(case.support, generator=torch.Generator().manual_seed(seed))
    moved = data._replace(support_x=data.support_x[:, order], support_y=data.support_y[:, order])
    a, b = (made.meta_gradient(s.theta, d, inner_lr=case.inner_lr, inner_steps=3).grad for d in (data, moved))
    expect_close(b, a, 1e-11)


def test_cases_cover_the_fused_layers():
    # A layer without a network case would pass this whole file unseen.
    kinds = set()
    for case in NETWORK_CASES:
        kinds |= {type(module).__name__ for module in setup(case).model.modules()}
    dropout = nn.modules.dropout._DropoutNd  # is named there to be refused
    assert {kind.__name__ for kind in fused_layers._MODULES if not issubclass(kind, dropout)} <= kinds
