# The memory of large results is reused after the last tensor over it is gone, and not before.
from __future__ import annotations

import pytest
import torch

import fastmaml as fm

_C = pytest.importorskip("fastmaml._C")


@pytest.fixture
def products():
    model = fm.models.mlp([64, 64, 64, 64])
    engine = fm.Engine(model, "mse", "cpu")
    theta = engine.flatten().expand(4, -1).contiguous()
    x, y = torch.rand(4, 8, 64), torch.rand(4, 8, 64)
    _C.release_memory()
    yield lambda scale=1.0: engine.hvp(theta, x, y, scale * torch.ones_like(theta))
    _C.release_memory()


def test_a_result_stays_as_long_as_it_or_a_view_of_it_is_held(products):
    held = products()
    view, expected = held[1], held[1].clone()
    del held
    for scale in (2.0, 3.0):
        assert not torch.equal(products(scale)[1], expected)
    assert torch.equal(view, expected)


@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.11", reason="this torch does not say when a tensor is gone"
)
def test_the_next_result_takes_the_memory_of_one_that_is_gone(products):
    first = products()
    place = first.data_ptr()
    second = products()
    assert second.data_ptr() != place
    del first
    assert products().data_ptr() == place


def test_a_result_survives_the_release_of_what_is_idle(products):
    held, gone = products(), products()
    expected = held.clone()
    del gone
    _C.release_memory()
    assert torch.equal(held, expected)
    assert torch.equal(products(), expected)
