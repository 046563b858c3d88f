"""The profile's table: every second of the workers has a row, and bounds follow the roofline."""

from __future__ import annotations

import pytest
import torch

import fastmaml as fm
from fastmaml.benchmark import profile
from fastmaml.benchmark.ceilings import Ceilings
from fastmaml.benchmark.profile import OUTSIDE, WAITING, Profile, Row

pytest.importorskip("fastmaml._C")

# 1 thread and 2: 100 and 200 GFLOP/s, 50 and 100 GB/s in cache, 10 and 10 GB/s in memory
CEILINGS = Ceilings(2, 10**6, (100e9, 200e9), (50e9, 100e9), (10e9, 10e9))


def _row(seconds: float, products: float, bytes_: float, calls: int = 1) -> Row:
    return Row("query", "conv2d_fwd", "conv2d", 5, calls, seconds, seconds, products, 0.0, bytes_)


def test_a_row_is_bound_by_the_slower_of_its_products_and_its_bytes() -> None:
    compute = profile.bound(_row(2.0, 100e9, 1e3), CEILINGS, workers=2)
    assert (compute.by, compute.share, compute.ceiling_s) == ("compute", 0.5, 1.0)
    memory = profile.bound(_row(2.0, 1.0, 5e9), CEILINGS, workers=2)
    assert (memory.by, memory.share) == ("memory", 0.5)  # 5 GB/s is each worker's part
    cache = profile.bound(_row(2.0, 1.0, 25e9, calls=25_000), CEILINGS, workers=1)
    assert (cache.by, cache.share) == ("cache", 0.25)


def test_the_next_bottleneck_is_what_wastes_most() -> None:
    good, bad = _row(1.0, 90e9, 1e3), _row(0.5, 5e9, 1e3)._replace(op="linear_fwd")
    found = Profile(wall_s=1.0, walks_s=0.9, workers=2, calls=1, rows=(good, bad))
    text = profile.bottleneck(found, CEILINGS)
    assert "linear_fwd" in text and "10 % of its compute ceiling" in text
    assert OUTSIDE in profile.bottleneck(Profile(10.0, 1.0, 1, 1, (good,)), CEILINGS)


def test_rows_waiting_and_outside_make_up_the_workers_time() -> None:
    engine = fm.Engine(fm.models.mlp([3, 4, 2]), "mse", "cpu")
    x, y = torch.rand(3, 5, 3), torch.rand(3, 5, 2)
    theta = engine.flatten()
    found = profile.measure(lambda: engine.meta_gradient(theta, (x, y, x, y), inner_lr=0.1), least_s=0.01)
    assert found.busy_s + found.waiting_s + found.outside_s == pytest.approx(found.worker_s, rel=0.05)
    forward = {row.layer: row for row in found.rows if row.op == "linear_fwd" and row.phase == "query"}
    assert forward["linear 3 to 4"].products == 3 * 2 * 5 * 3 * 4  # three tasks
    text = profile.show(found, CEILINGS, most=len(found.rows))  # which are the largest is the machine's business
    assert WAITING in text and OUTSIDE in text and "linear" in text and "next bottleneck" in text


def test_what_runs_nowhere_in_the_engine_has_no_profile() -> None:
    with pytest.raises(ValueError, match="no Step ran"):
        profile.measure(lambda: torch.ones(2).sum())
