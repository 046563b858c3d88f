# Linear layers wider than a tile, a panel and a slice of the CPU's kernels, in every pass. They use dot products and
# copied panels, with remainders in rows and columns.
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


# The first has 2.2 MB, too large to read in place, and rows longer than a copied run. In the second the last run is part of a vector.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("examples", [1, 6, 7, 16, 17])
@pytest.mark.parametrize("widths", [(3, 1104, 250), (3, 1105, 20)], ids=str)
def test_long_rows_are_the_reference(widths, examples, dtype, cpu):
    _compare(widths, examples, dtype)


def _compare(widths, examples, dtype=torch.float64):
    torch.manual_seed(0)
    a, b, c = widths
    model = nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c, bias=False)).double()
    exact, ours = fm.Engine(model, "mse", "reference"), fm.Engine(model.to(dtype), "mse", "cpu")
    start = ours.flatten().double()
    theta = start.expand(2, -1) + 0.01 * torch.randn(2, len(start), dtype=torch.float64)
    x, y, v = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((examples, a), (examples, c), theta.shape[1:]))
    theta, x, y, v = (given.to(dtype) for given in (theta, x, y, v))
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    wide = [given.double() for given in (theta, x, y, v)]
    for name, found, expected in zip(("loss", "grad"), ours.grad(theta, x, y), exact.grad(*wide[:3]), strict=True):
        expect_close(found.double(), expected, tolerance, name)
    expect_close(ours.hvp(theta, x, y, v).double(), exact.hvp(*wide), tolerance, "hvp")
