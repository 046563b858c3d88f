"""Bad input gives one sentence with the shapes or values, before any computation."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from unrolled import BACKENDS, image_batch, regression_batch, small_conv, small_mlp

from fastmaml import Engine


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def meta_gradient(backend, batch=None, model=None, theta=None, loss="cross_entropy", inner_lr=0.1, steps=1, **options):
    engine = Engine(model or small_conv(), loss, backend)
    batch = image_batch() if batch is None else batch
    return engine.meta_gradient(engine.flatten() if theta is None else theta, batch, inner_lr, steps, **options)


def swap(batch, **changes):
    names = ("support_x", "support_y", "query_x", "query_y")
    return tuple(changes.get(n, b) for n, b in zip(names, batch))


def nan_at(x, *where):
    x = x.clone()
    x[where] = float("nan")
    return x


B = image_batch()  # 3 tasks, 4 support and 5 query examples of [1, 8, 8], 3 classes
SX, SY, QX, QY = B
MLP = {"model": small_mlp(), "loss": "mse"}
R = regression_batch()

BAD = {
    "no tasks": ({"batch": tuple(b[:0] for b in B)}, ValueError, "support_x [0, 4, 1, 8, 8] holds no tasks"),
    "no support": ({"batch": swap(B, support_x=SX[:, :0], support_y=SY[:, :0])}, ValueError, "[3, 0, 1, 8, 8] holds no examples"),
    "no query": ({"batch": swap(B, query_x=QX[:, :0], query_y=QY[:, :0])}, ValueError, "query_x [3, 0, 1, 8, 8] holds no examples"),
    "integer x": ({"batch": swap(B, support_x=(SX * 9).long())}, TypeError, "support_x [3, 4, 1, 8, 8] is torch.int64; it must be a floating"),
    "not a tensor": ({"batch": swap(B, query_x=QX.tolist())}, TypeError, "query_x must be a tensor, not list"),
    "a word": ({"batch": swap(B, support_x="images")}, TypeError, "support_x must be a tensor, not str"),
    "three parts": ({"batch": B[:3]}, TypeError, "batch must be (support_x, support_y, query_x, query_y)"),
    "float32 x": ({"batch": swap(B, support_x=SX.float())}, ValueError, "support_x is torch.float32 but the parameters are torch.float64"),
    "device": ({"batch": swap(B, support_x=SX.to("meta"))}, ValueError, "support_x is on meta but the parameters are on cpu"),
    "query device": ({"batch": swap(B, query_x=QX.to("meta"))}, ValueError, "query_x is on meta but the parameters are on cpu"),
    "label device": ({"batch": swap(B, support_y=SY.to("meta"))}, ValueError, "support_y is on meta but support_x is on cpu"),
    "nan in support": ({"batch": swap(B, support_x=nan_at(SX, 1, 2, 0, 3, 4))}, ValueError, "support_x [3, 4, 1, 8, 8] holds 1 NaN or infinite values, the first at [1, 2, 0, 3, 4]"),
    "inf in query": ({"batch": swap(B, query_x=QX / torch.zeros(3, 1, 1, 1, 1).double())}, ValueError, "query_x [3, 5, 1, 8, 8] holds 960 NaN or infinite"),
    "nan target": ({**MLP, "batch": swap(R, query_y=nan_at(R[3], 0, 0, 0))}, ValueError, "query_y [3, 5, 1] holds 1 NaN"),
    "tasks differ": ({"batch": swap(B, query_x=QX[:2], query_y=QY[:2])}, ValueError, "support_x [3, 4, 1, 8, 8] and query_x [2, 5, 1, 8, 8] hold different numbers of tasks"),
    "shapes differ": ({"batch": swap(B, query_x=QX[..., :7])}, ValueError, "query_x [3, 5, 1, 8, 7] hold examples of different shapes"),
    "channels": ({"batch": swap(B, support_x=SX.expand(3, 4, 2, 8, 8), query_x=QX.expand(3, 5, 2, 8, 8))}, ValueError, "support_x [3, 4, 2, 8, 8] does not fit the model"),
    "image size": ({"batch": swap(B, support_x=SX[..., :6], query_x=QX[..., :6])}, ValueError, "support_x [3, 4, 1, 8, 6] does not fit the model"),
    "no examples dimension": ({"batch": swap(B, support_x=SX[0, 0, 0, 0])}, ValueError, "support_x [8] does not begin with [tasks, examples]"),
    "label too high": ({"batch": swap(B, support_y=SY + 2)}, ValueError, "support_y holds labels from 2 to 4, but the network has 3 outputs (0 to 2)"),
    "label negative": ({"batch": swap(B, query_y=QY - 1)}, ValueError, "query_y holds labels from -1 to 1"),
    "label shape": ({"batch": swap(B, support_y=SY[:, :3])}, ValueError, "support_y [3, 3] does not give one label to each example of support_x [3, 4, 1, 8, 8]"),
    "one hot": ({"batch": swap(B, support_y=nn.functional.one_hot(SY, 3))}, ValueError, "support_y [3, 4, 3] does not give one label"),
    "float labels": ({"batch": swap(B, support_y=SY.double())}, TypeError, "support_y is torch.float64; cross_entropy takes integer labels"),
    "target shape": ({**MLP, "batch": swap(R, support_y=R[1][..., 0])}, ValueError, "support_y [3, 4] does not fit the network's output [3, 4, 1]"),
    "integer target": ({**MLP, "batch": swap(R, query_y=R[3].long())}, TypeError, "query_y [3, 5, 1] is torch.int64"),
    "negative steps": ({"steps": -1}, ValueError, "inner_steps is -1; it must be at least 0"),
    "half a step": ({"steps": 0.5}, TypeError, "inner_steps must be a whole number, not 0.5"),
    "theta size": ({"theta": torch.zeros(10).double()}, ValueError, "theta [10] must be [243] or [tasks, 243]"),
    "theta per task": ({"theta": torch.zeros(3, 243).double()}, ValueError, "theta [3, 243] must be one start [243] for all tasks"),
    "integer theta": ({"theta": torch.zeros(243).long()}, TypeError, "theta [243] is torch.int64"),
    "nan rate": ({"inner_lr": float("nan")}, ValueError, "inner_lr is nan; a learning rate must be finite"),
    "rate text": ({"inner_lr": "0.1"}, TypeError, "inner_lr must be a number, a tensor or a dict by parameter name, not str"),
    "rate size": ({"inner_lr": torch.ones(7).double()}, ValueError, "inner_lr [7] must be one rate [], a rate per parameter entry [243]"),
    "rate unknown": ({"inner_lr": {"head.weight": 0.1}}, ValueError, "inner_lr names 'head.weight', which is not a parameter of the model (0.weight, "),
    "rate missing": ({"inner_lr": {"0.weight": 0.1}}, ValueError, "inner_lr has no rate for parameter '0.bias'; give 0.0 to keep the parameter fixed"),
    "rate shape": ({"inner_lr": {"0.weight": torch.ones(2)}}, ValueError, "inner_lr['0.weight'] [2] must be one rate [], the parameter's shape [4, 1, 3, 3]"),
    "integer rate": ({"inner_lr": torch.tensor(1)}, TypeError, "inner_lr is torch.int64; a learning rate must be a floating point tensor"),
    "task weights": ({"task_weights": torch.ones(2).double()}, ValueError, "task_weights [2] must be [3]"),
    "support weights": ({"support_weights": torch.ones(3, 5).double()}, ValueError, "support_weights [3, 5] must be [3, 4]"),
    "nan weights": ({"query_weights": nan_at(torch.ones(3, 5).double(), 2, 1)}, ValueError, "query_weights [3, 5] holds 1 NaN or infinite values, the first at [2, 1]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(name, backend):
    arguments, kind, sentence = BAD[name]
    if name == "integer x" and backend == "autodiff":  # a model may take tokens; whether it does shows in its forward
        kind, sentence = ValueError, "query_x and the other examples hold inputs of different types"
    with pytest.raises(kind, match=re.escape(sentence)) as caught:
        meta_gradient(backend, **arguments)
    assert "\n" not in str(caught.value)


def test_an_engine_works_after_bad_input(backend):
    engine, theta = Engine(small_conv(), backend=backend), None
    theta = engine.flatten()
    good = engine.meta_gradient(theta, B, 0.1, 1).grad
    for name in ("channels", "label too high", "nan in support"):
        with pytest.raises(ValueError, match="support"):
            engine.meta_gradient(theta, BAD[name][0]["batch"], 0.1, 1)
    assert torch.equal(engine.meta_gradient(theta, B, 0.1, 1).grad, good)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_an_engine_that_knows_the_call(name, backend):
    given, error, sentence = BAD[name]
    options = {"batch": B, "model": small_conv(), "loss": "cross_entropy", "inner_lr": 0.1, "steps": 1} | given
    engine = Engine(options.pop("model"), options.pop("loss"), backend)
    theta = options.pop("theta", None)
    batch, inner_lr, steps = (options.pop(key) for key in ("batch", "inner_lr", "steps"))
    good = R if engine.loss_name == "mse" else B
    for _ in range(2):
        engine.meta_gradient(engine.flatten(), good, 0.1, 1)
    with pytest.raises(error, match=re.escape(sentence)):
        engine.meta_gradient(engine.flatten() if theta is None else theta, batch, inner_lr, steps, **options)


def test_other_entries_check_as_well(backend):
    engine = Engine(small_conv(), backend=backend)
    theta = engine.flatten()
    v = torch.zeros(3, engine.layout.size, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=re.escape("params [2, 243] holds 2 tasks but the examples [3, 4, 1, 8, 8] hold 3")
    ):
        engine.grad(theta.expand(2, -1), SX, SY)
    with pytest.raises(ValueError, match=re.escape("v [243] must be [3, 243]")):
        engine.hvp(theta, SX, SY, theta)
    with pytest.raises(ValueError, match="lam is -1.0; it must be positive"):
        engine.solve(theta, SX, SY, v, lam=-1.0, steps=3)
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
        engine.solve(theta, SX, SY, v, lam=1.0, steps=0)
    with pytest.raises(ValueError, match="inner_steps is -3"):
        engine.adapt(theta, SX, SY, 0.1, -3)
    with pytest.raises(ValueError, match=re.escape("x [3, 4, 2, 8, 8] does not fit the model")):
        engine.forward(theta, SX.expand(3, 4, 2, 8, 8))
    with pytest.raises(ValueError, match="support_y holds labels from 3 to 5"):
        engine.adapt(theta, SX, SY + 3, 0.1, 1)
    with pytest.raises(ValueError, match=re.escape("theta [7] must be [243]")):
        engine.unflatten(torch.zeros(7))


def test_a_model_that_changed_is_refused():
    model = small_mlp()
    engine = Engine(model, "mse", "autodiff")
    model[4] = nn.Linear(7, 2)
    with pytest.raises(ValueError, match="this model's parameters do not fit the Engine's model"):
        engine.flatten(model)


def test_a_python_loss_must_give_one_loss_per_example():
    engine = Engine(small_mlp(), lambda output, y: ((output - y) ** 2).mean(), "autodiff")
    with pytest.raises(
        ValueError, match=re.escape("the loss returned [] for 4 examples; it must return one loss for each")
    ):
        engine.grad(engine.flatten(), R[0], R[1])


def test_engine_arguments():
    with pytest.raises(TypeError, match="model must be an nn.Module, not function"):
        Engine(lambda x: x)
    with pytest.raises(ValueError, match="has no parameters, so there is nothing to meta-train"):
        Engine(nn.ReLU())
    with pytest.raises(ValueError, match="loss 'hinge' is not one of cross_entropy, mse nor a function"):
        Engine(small_mlp(), "hinge")
    with pytest.raises(ValueError, match="memory 'none' is not one of auto, low, stash"):
        Engine(small_mlp(), memory="none")
    with pytest.raises(ValueError, match="label_smoothing is 2; it must lie between 0 and 1"):
        Engine(small_mlp(), label_smoothing=2)
    with pytest.raises(ValueError, match="label_smoothing=0.1 works only with loss='cross_entropy', not with 'mse'"):
        Engine(small_mlp(), "mse", label_smoothing=0.1)
    with pytest.raises(TypeError, match="parameter '0.weight' has no shape yet"):
        Engine(nn.Sequential(nn.LazyLinear(3)))
