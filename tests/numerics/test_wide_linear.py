# Linear layers wider than a tile, a panel and a slice of the CPU's kernels: dot products and copied panels, rows and columns
# that leave remainders, in every pass.
from __future__ import annotations

import pytest
import torch
from compare import expect_close
from torch import nn

import fastmaml as fm


@pytest.mark.parametrize("examples", [1, 2, 3, 5, 6, 7, 12, 20, 33, 400])
@pytest.mark.parametrize("widths", [(300, 70, 5), (13, 270, 3), (37, 160, 300)], ids=str)
def test_is_the_reference(widths, examples, cpu):
    _compare(widths, examples)


# of 2.2 MB, which is more than is read in place, and in rows of more than a copied run
@pytest.mark.parametrize("examples", [1, 6, 7, 16, 17])
def test_a_matrix_from_memory_is_the_reference(examples, cpu):
    _compare((3, 1104, 250), examples)


def _compare(widths, examples):
    torch.manual_seed(0)
    a, b, c = widths
    model = nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c, bias=False)).double()
    ours, exact = (fm.Engine(model, "mse", name) for name in ("cpu", "reference"))
    theta = ours.flatten().expand(2, -1) + 0.01 * torch.randn(2, len(ours.flatten()), dtype=torch.float64)
    x, y, v = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((examples, a), (examples, c), theta.shape[1:]))
    for name, found, expected in zip(("loss", "grad"), ours.grad(theta, x, y), exact.grad(theta, x, y), strict=True):
        expect_close(found, expected, 1e-11, name)
    expect_close(ours.hvp(theta, x, y, v), exact.hvp(theta, x, y, v), 1e-11, "hvp")
