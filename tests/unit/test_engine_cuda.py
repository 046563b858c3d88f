# Engines and learners whose tensors are on a device. The same bodies run on the emulator, whose device is the CPU.
from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from on_device import why_no_cuda

import fastmaml as fm

pytest.importorskip("fastmaml._C", reason="make build")


@dataclass(frozen=True)
class Place:
    backend: str
    device: str

    def __str__(self) -> str:
        return self.backend


@pytest.fixture(params=[Place("cuda_emulated", "cpu"), Place("cuda", "cuda")], ids=str)
def place(request) -> Place:
    if request.param.backend == "cuda" and (reason := why_no_cuda()):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def cuda() -> None:
    if reason := why_no_cuda():
        pytest.skip(reason)


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return fm.models.conv4(ways=3, filters=4, image_size=16).to(dtype)


def batch(tasks: int = 2, dtype: torch.dtype = torch.float32) -> fm.TaskBatch:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(tasks, 9, 1, 16, 16, generator=generator), torch.arange(3).repeat(tasks, 3)
    return fm.TaskBatch(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:]).to(dtype=dtype)


def close(found: torch.Tensor, expected: torch.Tensor, device: str, rtol: float = 1e-9) -> None:
    assert found.device.type == device
    torch.testing.assert_close(found.cpu(), expected, rtol=rtol, atol=1e-10)


def test_every_method_answers_on_the_device(place):
    there, here = batch(dtype=torch.float64).to(place.device), batch(dtype=torch.float64)
    net = model(torch.float64)
    expected = fm.Engine(net, backend="reference")
    engine = fm.Engine(model(torch.float64).to(place.device), backend=place.backend)
    theta, start = engine.flatten(), expected.flatten()
    v = torch.randn(2, len(start), generator=torch.Generator().manual_seed(1)).double()
    for name, found, right in (
        ("grad", engine.grad(theta, *there[:2]), expected.grad(start, *here[:2])),
        ("hvp", [engine.hvp(theta, *there[:2], v.to(theta))], [expected.hvp(start, *here[:2], v)]),
        ("forward", [engine.forward(theta, there[2])], [expected.forward(start, here[2])]),
        ("solve", engine.solve(theta, *there[:2], v.to(theta), 50.0, 2), expected.solve(start, *here[:2], v, 50.0, 2)),
        (
            "adapt_with",
            engine.adapt_with(theta, *there[:2], inner=fm.inner.SGD(lr=0.1, momentum=0.9), inner_steps=2),
            expected.adapt_with(start, *here[:2], inner=fm.inner.SGD(lr=0.1, momentum=0.9), inner_steps=2),
        ),
        ("meta_gradient", engine.meta_gradient(theta, there, 0.1, 2), expected.meta_gradient(start, here, 0.1, 2)),
    ):
        for a, b in zip(found, right):
            if isinstance(b, torch.Tensor):
                assert a.shape == b.shape, name
                close(a, b, place.device, 1e-7)


def test_a_loss_in_python_meets_the_tasks_on_the_device(place):
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(output, target, reduction="none") + output.square().sum(1)

    engine = fm.Engine(model(torch.float64).to(place.device), loss, place.backend)
    expected = fm.Engine(model(torch.float64), loss, "autodiff")
    there, here = batch(dtype=torch.float64).to(place.device), batch(dtype=torch.float64)
    found = engine.meta_gradient(engine.flatten(), there, 0.05, 2)
    right = expected.meta_gradient(expected.flatten(), here, 0.05, 2)
    close(found.grad, right.grad, place.device, 1e-7)
    close(found.loss, right.loss, place.device, 1e-9)


@pytest.mark.parametrize("learner", [fm.MAML, fm.MetaSGD, fm.ANIL, fm.MAMLPlusPlus], ids=lambda of: of.__name__)
def test_learners_train_there(learner, place):
    maml = learner(model().to(place.device), 0.1, 1, backend=place.backend)
    optimizer = torch.optim.SGD(maml.parameters(), lr=0.05)
    there, losses = batch().to(place.device), []
    for _ in range(4):
        out = maml(*there)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None or p.grad.device.type == place.device for p in maml.parameters())
    output = maml.adapt(*there[:2]).predict(there[2])
    assert output.device.type == place.device


# ---------------------------------------------------------------- only a device has these


def test_auto_goes_with_the_parameters(cuda):
    maml = fm.MAML(model(), 0.1)
    assert maml.engine.backend == "cpu"
    maml.to("cuda")
    grads = maml(*batch().to("cuda")).loss
    assert maml.engine.backend == "cuda" and maml.engine.fused and grads.is_cuda
    maml.to("cpu")
    maml(*batch())
    assert maml.engine.backend == "cpu"
    assert fm.Engine(model().to("cuda")).backend == "cuda"


def test_work_is_ordered_by_the_current_stream(cuda):
    engine = fm.Engine(model().to("cuda"), backend="cuda")
    theta, there = engine.flatten(), batch().to("cuda")
    expected = engine.meta_gradient(theta, there, 0.1, 2).grad
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            late = theta + torch.zeros(1, device="cuda")  # ready on this stream alone
            found = engine.meta_gradient(late, there, 0.1, 2).grad
    stream.synchronize()
    assert torch.equal(found, expected)


def test_the_current_device_stays_what_it_was(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device alone")
    engine = fm.Engine(model().to("cuda:1"), backend="cuda")
    result = engine.meta_gradient(engine.flatten(), batch().to("cuda:1"), 0.1, 2)
    assert result.grad.device.index == 1 and torch.cuda.current_device() == 0


def test_cupy_arrays_stay_on_the_device(cuda):
    cupy = pytest.importorskip("cupy")
    engine = fm.Engine(model().to("cuda"), backend="cuda")
    theta, there = engine.flatten(), batch().to("cuda")
    arrays = [cupy.from_dlpack(t.contiguous()) for t in there]
    found = engine.meta_gradient(cupy.from_dlpack(theta), arrays, 0.1, 2).grad
    assert isinstance(found, cupy.ndarray)
    assert torch.equal(torch.from_dlpack(found), engine.meta_gradient(theta, there, 0.1, 2).grad)
