# Conjugate gradients on ((1 + damping) I + H / lam) s = v against the dense system in float64.
from __future__ import annotations

from functools import cache

import oracle
import pytest
import torch
from cases import NETWORK_CASES
from compare import expect_close
from engines import engine, normal, setup

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


def conjugate_gradients(A, v, steps):
    """The textbook recursion of ALGORITHMS 2.5, from zero; stops at |r|^2 < 1e-10."""
    s, r = torch.zeros_like(v), v.clone()
    p = r.clone()
    for _ in range(steps):
        if r @ r < 1e-10:
            break
        Ap = A @ p
        alpha = (r @ r) / (p @ Ap)
        s, after = s + alpha * p, r - alpha * Ap
        p = after + (after @ after) / (r @ r) * p
        r = after
    return s


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
    A = system(case, lam, 0.1)
    expected = torch.stack([conjugate_gradients(A[t], v[t], steps) for t in range(case.tasks)])
    expect_close(solution.solution, expected, 1e-9, case)  # five steps of float64 recursion
    residual = torch.stack([(v[t] - A[t] @ expected[t]).norm() / v[t].norm() for t in range(case.tasks)])
    expect_close(solution.residual, residual, 1e-8, f"{case} residual", atol=1e-14)  # converged: rounding of v


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
