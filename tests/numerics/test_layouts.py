# The two layouts of tasks on the CPU. The network and the numbers of examples choose one; both pass the same tests.
from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from compare import expect_close, expect_same_bits
from torch import nn

import fastmaml as fm

WIDE, SMALL = [12, 128, 5], [12, 24, 24, 5]


@pytest.fixture(params=["tasks", "lanes"])
def layout(request: pytest.FixtureRequest) -> Iterator[str]:
    from fastmaml import _C

    _C.set_cpu_layout(request.param)
    yield request.param
    _C.set_cpu_layout("auto")


def network(widths: list[int]) -> nn.Sequential:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


def lanes(widths: list[int], examples: int, kind: str = "hvp", real_bytes: int = 4) -> int:
    from fastmaml import _C

    made = fm.Engine(network(widths), backend="cpu")
    program = made.program(torch.zeros(1, examples, widths[0]))
    assert program is not None, made.why
    return _C.lanes(program.text, kind, real_bytes=real_bytes, support_examples=examples, query_examples=examples)


def test_small_networks_go_side_by_side_and_others_do_not():
    assert lanes(SMALL, 10) > 1
    assert lanes(SMALL, 1000) == 1
    assert lanes([12, 128, 128, 5], 10) == 1
    assert lanes([784, 256, 128, 64, 64, 5], 5) == 1


@pytest.mark.parametrize("examples", [10, 1000])
def test_every_kind_of_work_takes_the_same_layout(examples):
    assert (
        len({lanes(SMALL, examples, kind) for kind in ("grad", "hvp", "vjp", "adapt", "meta_gradient", "solve")}) == 1
    )


@pytest.mark.parametrize("widths", [SMALL, WIDE], ids=str)
@pytest.mark.parametrize("tasks", [1, 5, 16, 19])
def test_both_layouts_are_the_reference(widths, tasks, layout, cpu):
    made, exact = (fm.Engine(network(widths).double(), backend=name) for name in ("cpu", "reference"))
    batch = (torch.randn(tasks, 6, 12).double(), torch.randint(0, 5, (tasks, 6)),
             torch.randn(tasks, 9, 12).double(), torch.randint(0, 5, (tasks, 9)))  # fmt: skip
    a, b = (e.meta_gradient(e.flatten(), batch, inner_lr=0.1, inner_steps=3) for e in (made, exact))
    # float64 rounding after three inner steps
    expect_close(a.grad, b.grad, 1e-10, label=f"{layout} {tasks} tasks")
    expect_close(a.loss, b.loss, 1e-10, label=f"{layout} {tasks} tasks")


def test_a_tasks_bits_depend_on_neither_tasks_nor_threads(layout, threads):
    made = fm.Engine(network(SMALL), backend="cpu")
    params = made.flatten() + 0.1 * torch.randn(37, made.flatten().numel())
    x, y, v = torch.randn(37, 6, 12), torch.randint(0, 5, (37, 6)), torch.randn_like(params)
    whole = made.hvp(params, x, y, v)
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows in ([20], [36, 0], list(range(17, 37)), list(reversed(range(37)))):
            part = made.hvp(params[rows], x[rows], y[rows], v[rows])
            expect_same_bits(part, whole[rows], f"{layout}, {count} threads, tasks {rows}")


def test_a_diverged_task_does_not_touch_its_neighbours(layout):
    made = fm.Engine(network(SMALL), backend="cpu")
    params = made.flatten().expand(9, -1).clone()
    x, y = torch.randn(9, 6, 12), torch.randint(0, 5, (9, 6))
    loss, grad = made.grad(params, x, y)
    params[4] = float("nan")
    others = [t for t in range(9) if t != 4]
    loss_beside, grad_beside = made.grad(params, x, y)
    assert bool(loss_beside[4].isnan())
    expect_same_bits(loss_beside[others], loss[others], layout)
    expect_same_bits(grad_beside[others], grad[others], layout)
