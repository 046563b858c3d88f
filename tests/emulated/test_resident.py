# The resident walk (one launch for a whole call) against the layered walk and the reference. Every kind of call on
# networks without convolutions, every inner loop, and the sentences of refusal.
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import LOOP_CASES, NETWORK_CASES, NetworkCase, draw_loop, program
from compare import expect_close, expect_same_bits
from conftest import REFERENCE, Backend
from engines import engine, normal, rates, setup
from loop_runs import adapt, meta_gradient
from torch import Tensor, nn

_C = pytest.importorskip("fastmaml._C")

EMULATED = Backend("cuda_emulated")
RTOL = 1e-9  # float64: sums in another order, amplified by batch norms over few samples and by the inner steps
RTOL32 = 3e-4  # the same in float32


def is_vector_network(case: NetworkCase) -> bool:
    images = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    return not any(isinstance(module, images) for module in case.build().modules())


VECTOR_CASES = [case for case in NETWORK_CASES if is_vector_network(case)]
every_network = pytest.mark.parametrize("case", VECTOR_CASES, ids=str)
every_loop = pytest.mark.parametrize("case", [case for case in LOOP_CASES if case.network == "mlp"], ids=str)


@pytest.fixture(autouse=True)
def usual_walk() -> Iterator[None]:
    yield
    _C.set_cuda_walk("auto")


def expect_walks_agree(case: object, work: Callable[[Backend], dict[str, Tensor]], rtol: float = RTOL) -> None:
    """The resident walk's results are the reference's and the layered walk's, and the same when it runs twice."""
    expected = work(REFERENCE)
    results = {}
    for walk in ("layered", "resident", "resident again"):
        _C.set_cuda_walk(walk.split()[0])
        results[walk] = work(EMULATED)
    for name, value in results["resident"].items():
        expect_close(value, expected[name], rtol, f"{case} {name} against the reference", atol=1e-14)
        expect_close(value, results["layered"][name], rtol, f"{case} {name} against the layered walk", atol=1e-14)
        expect_same_bits(value, results["resident again"][name], f"{case} {name}")


@pytest.mark.parametrize("memory", ["low", "stash"])
@every_loop
def test_inner_loops(case, memory):
    inputs = draw_loop(case, 0)
    expect_walks_agree(case, lambda backend: meta_gradient(case, backend.name, inputs, memory))


@every_loop
def test_adapt_of_inner_loops(case):
    inputs = draw_loop(case, 1)
    expect_walks_agree(case, lambda backend: adapt(case, backend.name, inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("inner_steps", [1, 3])
@every_network
def test_meta_gradient(case, inner_steps, dtype):
    s = setup(case)

    def work(backend: Backend) -> dict[str, Tensor]:
        exact = torch.float64 if backend is REFERENCE else dtype
        got = engine(case, backend).meta_gradient(
            s.theta.to(exact), s.batch(exact), inner_lr=rates(case, True).to(exact), inner_steps=inner_steps
        )
        return {
            name: getattr(got, name) for name in ("loss", "grad", "query_output", "support_losses", "inner_lr_grad")
        }

    expect_walks_agree(case, work, RTOL if dtype == torch.float64 else RTOL32)


@every_network
def test_other_calls(case):
    s = setup(case)
    x, y = s.data.support_x, s.data.support_y
    params = s.theta + 0.05 * normal(case.tasks, s.P, seed=1)
    v = normal(case.tasks, s.P, seed=2)

    def work(backend: Backend) -> dict[str, Tensor]:
        made = engine(case, backend)
        loss, grad = made.grad(params, x, y)
        solution = made.solve(params, x, y, v, lam=50.0, steps=4)
        return {
            "output": made.forward(params, s.data.query_x),
            "loss": loss,
            "grad": grad,
            "hvp": made.hvp(params, x, y, v),
            "adapted": made.adapt(s.theta, x, y, inner_lr=case.inner_lr, inner_steps=2),
            "solution": solution.solution,
            "residual": solution.residual,
        }

    expect_walks_agree(case, work, 1e-7)  # four steps of conjugate gradients


def test_results_do_not_depend_on_the_batch():
    case = next(case for case in VECTOR_CASES if case.name == "sine mlp")
    s = setup(case)
    made = engine(case, EMULATED)
    _C.set_cuda_walk("resident")
    v = normal(case.tasks, s.P, seed=2).float()
    x, y = s.data.support_x.float(), s.data.support_y.float()
    together = made.hvp(s.theta.float(), x, y, v)
    for t in (0, 3, case.tasks - 1):
        expect_same_bits(
            made.hvp(s.theta.float(), x[t : t + 1], y[t : t + 1], v[t : t + 1])[0], together[t], f"task {t}"
        )


# ---------------------------------------------------------------- which walk


def mlp_text(sizes: tuple[int, ...], loss: str = "mse") -> str:
    params = [shape for i, o in itertools.pairwise(sizes) for shape in ((o, i), (o,))]
    lines, value = [], 0
    for layer in range(len(sizes) - 1):
        lines.append(f"linear {value} weight={2 * layer} bias={2 * layer + 1}")
        value += 1
        if layer + 2 < len(sizes):
            lines.append(f"tanh {value}")
            value += 1
    return program((sizes[0],), params, lines, loss=loss)


def walk_of(text: str, **how) -> str:
    given = {"support_examples": 10, "query_examples": 10, "loop": "steps=5", **how}
    return _C.walk(text, "meta_gradient", "cuda_emulated", **given)


def test_the_sinusoid_network_is_walked_in_one_launch_without_an_arena():
    for steps in (1, 5, 20):
        said = walk_of(mlp_text((1, 40, 40, 1)), loop=f"steps={steps}")
        assert said.startswith("resident: 256 threads, ") and " and 0 of device memory for each task" in said, said


def test_a_policy_network_is_walked_with_an_arena():
    said = walk_of(mlp_text((2, 100, 100, 2)), support_examples=40, query_examples=40, loop="steps=1")
    assert said.startswith("resident: 256 threads, ") and " and 0 of device memory" not in said, said


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (mlp_text((64, 300, 300, 5)), "of shared memory, or most of them, and a block has 227 KB"),
        (mlp_text((3, 9, 2), "caller"), "the loss is written in Python"),
    ],
    ids=["large", "python loss"],
)
def test_it_declines_with_a_sentence(text, sentence):
    said = walk_of(text)
    assert said.startswith("layered: ") and sentence in said


def test_convolutions_are_walked_by_layers_and_raise_where_the_other_walk_is_asked_for():
    case = next(case for case in NETWORK_CASES if case.name == "input residual")
    s = setup(case)
    made = engine(case, EMULATED)
    assert made.forward(s.theta, s.data.query_x).isfinite().all()
    _C.set_cuda_walk("resident")
    with pytest.raises((ValueError, RuntimeError), match="no resident walk: the resident walk has no conv2d_fwd"):
        made.forward(s.theta, s.data.query_x)


def test_a_walk_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match='walk "fast" is not one of auto, layered, resident'):
        _C.set_cuda_walk("fast")
