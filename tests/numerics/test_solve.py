# Conjugate gradients on ((1 + damping) I + H / lam) s = v against the dense system in float64.
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import oracle
import pytest
import torch
from cases import NETWORK_CASES
from compare import expect_close
from engines import engine, normal, setup

from fastmaml.autodiff.conjugate_gradients import conjugate_gradients as by_products

CASES = [case for case in NETWORK_CASES if case.name in ("linear", "tanh mlp", "frozen weight")]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@cache
def dense(case):
    s = setup(case)
    H = oracle.hessian(oracle.network(s.model), s.theta, s.data.support_x, s.data.support_y, s.loss)
    return s.mask[:, None] * H * s.mask  # rows and columns of frozen parameters are zero


def system(case, lam, damping):
    return (1 + damping) * torch.eye(setup(case).P).double() + dense(case) / lam


def lam_of(case) -> float:
    """Large enough that the matrix is positive definite and its condition number near three."""
    return 2.0 * max(1.0, float(torch.linalg.eigvalsh(dense(case)).abs().max()))


class Expected(NamedTuple):
    solution: torch.Tensor
    iterations: int
    negative: bool
    history: list[float]


def conjugate_gradients(A, v, steps, stop=1e-10) -> Expected:
    """The textbook recursion of ALGORITHMS 2.5, from zero; stops at |r|^2 < stop or p.Ap <= 0."""
    s, r, p = torch.zeros_like(v), v, v
    iterations, ended, negative, history = 0, False, False, [1.0]
    for _ in range(steps):
        Ap = A @ p
        negative = negative or (not ended and bool(p @ Ap <= 0))
        ended = ended or negative
        if not ended:
            alpha = (r @ r) / (p @ Ap)
            s, after = s + alpha * p, r - alpha * Ap
            p, r = after + (after @ after) / (r @ r) * p, after
            iterations, ended = iterations + 1, bool(r @ r < stop)
        history.append(float((v - A @ s).norm() / v.norm()))
    return Expected(s, iterations, negative, history)


def expect_steps(solution, systems, v, steps, label, stop=1e-10, atol=1e-14):
    """The solution and how it was reached, as the textbook has both."""
    expected = [conjugate_gradients(A, of_task, steps, stop) for A, of_task in zip(systems, v)]
    history = torch.tensor([e.history for e in expected], dtype=torch.float64)
    expect_close(solution.solution, torch.stack([e.solution for e in expected]), 1e-9, label)  # float64 recursions
    expect_close(solution.history, history, 1e-8, f"{label} history", atol=atol)  # converged: rounding of v
    assert torch.equal(solution.history[:, -1], solution.residual)
    assert solution.iterations.tolist() == [e.iterations for e in expected]
    assert solution.negative_curvature.tolist() == [e.negative for e in expected]


@every_case
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_solve_meets_the_dense_solution(case, damping, backend):
    s, lam = setup(case), lam_of(case)
    v = normal(case.tasks, s.P, seed=3)
    solution = engine(case, backend).solve(s.theta, s.data.support_x, s.data.support_y, v, lam, s.P, damping=damping)
    A = system(case, lam, damping)
    # CG stops at |r| < 1e-5 and the smallest eigenvalue of A is at least 1/2
    expect_close(solution.solution, torch.linalg.solve(A, v), 0.0, case, atol=2e-5)


@every_case
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_solve_takes_the_textbook_steps(case, steps, backend):
    s, lam = setup(case), lam_of(case)
    v = normal(case.tasks, s.P, seed=3)
    solution = engine(case, backend).solve(s.theta, s.data.support_x, s.data.support_y, v, lam, steps, damping=0.1)
    expect_steps(solution, system(case, lam, 0.1), v, steps, case)


# What only a compiled plan, and what only the loop over products does.
each_way = pytest.mark.parametrize("steps", [5, 20], ids=["in one plan", "step by step"])


@every_case
@each_way
def test_solve_of_some_parameters(case, steps, backend):
    s, lam, made = setup(case), lam_of(case), engine(case, backend)
    v = normal(case.tasks, s.P, seed=3)
    chosen = made.layout.names[1:]
    solution = made.solve(s.theta, s.data.support_x, s.data.support_y, v, lam, steps, 0.3, adapted=chosen)
    mask = made.layout.matching(chosen, s.theta)
    assert 0 < int(mask.sum()) < s.P
    A = 1.3 * torch.eye(s.P).double() + mask[:, None] * dense(case) * mask / lam
    expect_steps(solution, A, v, steps, case)


@each_way
def test_solve_stops_where_it_is_told_to(steps, backend):
    case = next(case for case in CASES if case.name == "tanh mlp")
    s, lam = setup(case), lam_of(case)
    v = (
        normal(case.tasks, s.P, seed=3)
        * torch.tensor([1.0, 1e-2, 10.0]).double().repeat(case.tasks)[: case.tasks, None]
    )
    reached = [conjugate_gradients(A, of_task, 3) for A, of_task in zip(system(case, lam, 0.0), v)]
    stop = 2 * float((reached[0].history[2] * v[0].norm()) ** 2)  # of the first task after two steps
    solution = engine(case, backend).solve(s.theta, s.data.support_x, s.data.support_y, v, lam, steps, stop=stop)
    expect_steps(solution, system(case, lam, 0.0), v, steps, case, stop)
    assert int(solution.iterations[0]) <= 2 and len(set(solution.iterations.tolist())) > 1


@each_way
def test_solve_says_where_the_curvature_is_negative(steps, backend):
    case = next(case for case in CASES if case.name == "tanh mlp")
    s, made = setup(case), engine(case, backend)
    eigenvalues, vectors = torch.linalg.eigh(dense(case))
    lam = 0.5 * float(eigenvalues[:, 0].abs().min())
    A = system(case, lam, 0.0)
    up, next_up, down = vectors[:, :, -1], vectors[:, :, -2], vectors[:, :, 0]
    # two positive directions: solved in two steps; a negative one that the second step meets, or the first
    v = torch.stack([up[0] + 0.5 * next_up[0], up[1] + 0.1 * down[1], down[2]])
    solution = made.solve(s.theta, s.data.support_x, s.data.support_y, v, lam, steps)
    # a solved task's residual is H's rounding
    expect_steps(solution, A, v, steps, case, atol=1e-9)
    assert solution.iterations.tolist() == [2, 1, 0]
    assert solution.negative_curvature.tolist() == [False, True, True]


@each_way
def test_solve_has_nothing_to_do_for_zero(steps, backend):
    case = next(case for case in CASES if case.name == "tanh mlp")
    s = setup(case)
    v = normal(case.tasks, s.P, seed=3)
    v[0] = 0.0
    solution = engine(case, backend).solve(s.theta, s.data.support_x, s.data.support_y, v, 50.0, steps)
    assert not solution.solution[0].any() and not solution.history[0].any()
    assert solution.iterations[0] == 0 and not solution.negative_curvature[0]
    assert bool((solution.iterations[1:] > 0).all())


def test_a_nan_goes_on_and_shows_in_the_solution(compiled):
    case = next(case for case in CASES if case.name == "tanh mlp")
    s, made = setup(case), engine(case, compiled)
    v = normal(case.tasks, s.P, seed=3)
    v[1, 2] = torch.nan  # as in a task that has diverged
    start, program, examples = made._one_set(s.theta, s.data.support_x, s.data.support_y, None)
    in_one_plan = made.choice.compiled(program).solve(start, examples, v, 50.0, 3, 0.0, 1e-10, None)
    for found in (in_one_plan, by_products(lambda p: 2.0 * p, v, 3)):
        assert bool(found.solution[1].isnan().all()) and bool(found.history[1].isnan().all())
        assert not found.negative_curvature[1]
        assert bool(found.solution[[0, 2]].isfinite().all())


@every_case
def test_solve_with_huge_lam_is_v(case, backend):
    s = setup(case)
    v = normal(case.tasks, s.P, seed=3)
    solution = engine(case, backend).solve(s.theta, s.data.support_x, s.data.support_y, v, 1e14, 3)
    expect_close(solution.solution, v, 1e-11, case)  # H / lam is 1e-13 of v


def test_solve_stops_where_the_curvature_is_negative(backend):
    # p.Ap <= 0: keep the current x (ALGORITHMS 2.5). A tiny lam makes A indefinite at a random point of a tanh net.
    case = next(case for case in CASES if case.name == "tanh mlp")
    s = setup(case)
    eigenvalues, vectors = torch.linalg.eigh(dense(case))
    assert bool((eigenvalues[:, 0] < -1e-3).all())
    v = vectors[:, :, 0].contiguous()  # the most negative direction of each task
    solution = engine(case, backend).solve(s.theta, s.data.support_x, s.data.support_y, v, 1e-4, 5)
    assert float(solution.solution.abs().max()) == 0.0
    expect_close(solution.residual, torch.ones(case.tasks), 1e-12)
