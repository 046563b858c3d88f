# fastmaml.compat.learn2learn gives learn2learn's numbers. Compared with learn2learn itself, if its sources are in the
# cache, and with our own unrolled loop.
from __future__ import annotations

import copy
import importlib
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from unrolled import (
    cross_entropy,
    flat,
    image_batch,
    meta_gradient,
    mse,
    rates_like,
    regression_batch,
    relative_error,
    small_conv,
    small_mlp,
)

import fastmaml as fm
from fastmaml.checking import check
from fastmaml.compat import learn2learn as ours

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # bench is no installed package

BATCH = regression_batch()
IMAGES = image_batch(support=6)
EXACT = 1e-12  # both sides are the same float64 autograd, up to the order of sums


@pytest.fixture(scope="module")
def theirs():
    """learn2learn.algorithms, as bench/ loads it; nothing is fetched here."""
    from bench.peers import fetch, learn2learn_maml

    if not fetch.folder(f"learn2learn-{learn2learn_maml.VERSION}-source").is_dir():
        pytest.skip(
            "learn2learn's sources are not in the cache; `python -m bench.meta_gradient sinusoid-k1 --peers learn2learn` fetches them"
        )
    learn2learn_maml.wrapper()
    meta_sgd = importlib.import_module("learn2learn.algorithms.meta_sgd")
    utils = importlib.import_module("learn2learn.utils")
    return type(
        "Theirs",
        (),
        {"MAML": learn2learn_maml.wrapper(), "MetaSGD": meta_sgd.MetaSGD, "clone_module": utils.clone_module},
    )


def loop(wrapper, batch, loss, steps=2, **adapt):
    """The loop of learn2learn's examples; returns the mean query loss."""
    total = 0.0
    for support_x, support_y, query_x, query_y in zip(*batch):
        learner = wrapper.clone()
        for _ in range(steps):
            learner.adapt(loss(learner(support_x), support_y), **adapt)
        evaluation = loss(learner(query_x), query_y) / len(batch[0])
        evaluation.backward()
        total += evaluation.item()
    return total


def grads(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


PROBLEMS = {"mlp": (small_mlp, BATCH, mse), "conv with batch norm": (small_conv, IMAGES, cross_entropy)}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
@pytest.mark.parametrize("options", [{}, {"first_order": True}], ids=["second order", "first order"])
def test_maml_is_learn2learns(theirs, problem, options):
    make, batch, loss = problem
    mine, other = (library(make(), lr=0.3, **options) for library in (ours.MAML, theirs.MAML))
    assert loop(mine, batch, loss) == pytest.approx(loop(other, batch, loss), rel=EXACT)
    assert list(grads(mine)) == list(grads(other)) and list(mine.state_dict()) == list(other.state_dict())
    assert relative_error(flat(grads(mine)), flat(grads(other))) < EXACT
    for name, buffer in mine.named_buffers():
        assert torch.equal(buffer, dict(other.named_buffers())[name])


@pytest.mark.parametrize("options", [{}, {"first_order": True}], ids=["second order", "first order"])
def test_meta_sgd_is_learn2learns(theirs, options):
    mine, other = (library(small_mlp(), lr=0.3, **options) for library in (ours.MetaSGD, theirs.MetaSGD))
    assert loop(mine, BATCH, mse) == pytest.approx(loop(other, BATCH, mse), rel=EXACT)
    assert list(grads(mine)) == list(grads(other))
    assert any(name.startswith("lrs") for name in grads(mine))
    assert relative_error(flat(grads(mine)), flat(grads(other))) < EXACT


class Peculiar(nn.Module):
    """A recurrent layer, tied weights and a module in two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(1, 3, batch_first=True)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.again = self.second
        self.head = nn.Linear(3, 1)
        self.double()

    def forward(self, x):
        h = self.lstm(x.unsqueeze(-1))[0][:, -1]
        return self.head(torch.tanh(self.again(self.second(torch.tanh(self.first(h))))))


def test_peculiar_modules_are_learn2learns(theirs):
    mine, other = (library(Peculiar(), lr=0.3) for library in (ours.MAML, theirs.MAML))
    loop(mine, BATCH, mse)
    loop(other, BATCH, mse)
    assert relative_error(flat(grads(mine)), flat(grads(other))) < EXACT


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_maml_against_an_unrolled_loop(steps):
    model = small_mlp()
    maml = ours.MAML(model, lr=0.3)
    losses, expected, _ = meta_gradient(copy.deepcopy(model), BATCH, rates_like(model, 0.3), steps, mse)
    assert loop(maml, BATCH, mse, steps) == pytest.approx(float(losses.mean()), rel=EXACT)
    assert relative_error(flat(grads(model)), flat(expected)) < EXACT


def test_first_order_against_an_unrolled_loop():
    model = small_mlp()
    loop(ours.MAML(model, lr=0.3), BATCH, mse, first_order=True)
    expected = meta_gradient(copy.deepcopy(model), BATCH, rates_like(model, 0.3), 2, mse, first_order=True)[1]
    assert relative_error(flat(grads(model)), flat(expected)) < EXACT


def test_meta_sgd_against_an_unrolled_loop():
    model = small_mlp()
    learner = ours.MetaSGD(model, lr=0.3)
    _, expected, of_rates = meta_gradient(copy.deepcopy(model), BATCH, rates_like(model, 0.3), 2, mse)
    loop(learner, BATCH, mse)
    assert relative_error(flat(grads(model)), flat(expected)) < EXACT
    assert relative_error(flat(dict(enumerate(r.grad for r in learner.lrs))), flat(of_rates)) < EXACT


def test_fastmamls_learner_gives_the_same_gradient():
    old, new = small_conv(), small_conv()
    loop(ours.MAML(old, lr=0.3), IMAGES, cross_entropy)
    fm.MAML(new, inner_lr=0.3, inner_steps=2)(*IMAGES).loss.backward()
    assert relative_error(flat(grads(new)), flat(grads(old))) < 1e-10  # compiled against autograd


def test_a_loop_passes_the_check():
    report = check(
        lambda model, batch: loop(ours.MAML(model, lr=0.3), batch, cross_entropy),
        IMAGES, model=small_conv(), inner_lr=0.3, inner_steps=2, directions=0,
    )  # fmt: skip
    assert report.ok, str(report)
    assert any(sentence.startswith("Stateful layer '1'") for sentence in report.sentences)


# ---------------------------------------------------------------- the module


def test_clones_keep_up_the_running_statistics():
    model = small_conv()
    for _ in range(2):
        learner = ours.MAML(model, lr=0.3).clone()
        learner(IMAGES[0][0])
    assert int(model[1].num_batches_tracked) == 2 and learner.module[1].running_mean is model[1].running_mean
    assert learner.training and type(learner.module) is type(model)


def test_clones_of_clones_go_on_from_the_adapted_parameters():
    model = small_mlp()
    first = ours.MAML(model, lr=0.3).clone()
    first.adapt(mse(first(BATCH[0][0]), BATCH[1][0]))
    second = first.clone()
    assert torch.equal(second(BATCH[0][0]), first(BATCH[0][0]))
    second.adapt(mse(second(BATCH[0][0]), BATCH[1][0]))
    assert not torch.equal(second(BATCH[0][0]), first(BATCH[0][0]))
    mse(second(BATCH[2][0]), BATCH[3][0]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_tied_parameters_and_shared_modules_stay_so():
    clone = ours.clone_module(Peculiar())
    assert clone.second.weight is clone.first.weight and clone.again is clone.second
    assert all(w is getattr(clone.lstm, n) for n, w in zip(clone.lstm._flat_weights_names, clone.lstm._flat_weights))


def test_attributes_are_the_modules():
    maml = ours.MAML(small_mlp(), lr=0.3)
    assert maml.lr == 0.3 and maml.extend == maml.module.extend
    with pytest.raises(AttributeError, match="nothing_like_that"):
        maml.nothing_like_that  # noqa: B018


def test_the_import_is_the_one_line_that_changes():
    assert ours.algorithms.MAML is ours.MAML and ours.algorithms.MetaSGD is ours.MetaSGD


# ---------------------------------------------------------------- unused and frozen parameters, errors


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()

    def forward(self, x):
        return self.used(x)


def test_unused_parameters_stay_where_allowed():
    learner = ours.MAML(Partly(), lr=0.3).clone()
    loss = mse(learner(BATCH[0][0]), BATCH[1][0])
    with pytest.raises(
        ValueError, match="the loss does not depend on parameter 'spare.weight'; allow that with allow_unused=True"
    ):
        learner.adapt(loss)
    learner = ours.MAML(Partly(), lr=0.3, allow_unused=True).clone()
    before = learner.module.spare.weight
    learner.adapt(mse(learner(BATCH[0][0]), BATCH[1][0]))
    assert learner.module.spare.weight is before


def test_frozen_parameters_stay_where_allowed():
    model = small_mlp()
    model[0].weight.requires_grad_(False)
    learner = ours.MAML(model, lr=0.3).clone()
    with pytest.raises(
        ValueError, match=r"parameter '0.weight' has requires_grad=False; leave it out with allow_nograd=True"
    ):
        learner.adapt(mse(learner(BATCH[0][0]), BATCH[1][0]))
    learner = ours.MAML(model, lr=0.3, allow_nograd=True).clone()
    learner.adapt(mse(learner(BATCH[0][0]), BATCH[1][0]))
    assert torch.equal(learner.module[0].weight, model[0].weight)
    assert not torch.equal(learner.module[0].bias, model[0].bias)


def test_a_loss_without_a_graph_is_refused():
    learner = ours.MAML(small_mlp(), lr=0.3).clone()
    with pytest.raises(ValueError, match="the loss does not depend on the learner's parameters: it carries no graph"):
        learner.adapt(torch.tensor(1.0))


def test_the_fast_way_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(ours, "_advised", False)
    with caplog.at_level(logging.INFO, "fastmaml"):
        for _ in range(2):
            ours.MAML(small_mlp(), lr=0.5).clone()
    assert [record.getMessage() for record in caplog.records] == [
        "fastmaml.compat.learn2learn runs the inner loop task by task in plain autograd. fastmaml.MAML(model, inner_lr=0.5, "
        "inner_steps=...) called with (support_x, support_y, query_x, query_y) of all tasks gives the same meta-gradient much "
        "faster."
    ]
