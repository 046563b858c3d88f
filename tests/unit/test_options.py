"""MetaGradientOptions: the same meta-gradient as the keywords give, compared and hashed by value, refused in one sentence."""

from __future__ import annotations

import copy
import pickle

import options_table
import pytest
import torch
from unrolled import BACKENDS, regression_batch, small_mlp

import fastmaml as fm
from fastmaml import Engine, MetaGradientOptions, inner


@pytest.fixture(params=BACKENDS)
def engine(request):
    return Engine(small_mlp(), "mse", request.param)


SETTINGS = {
    "defaults": {},
    "steps": {"inner_steps": 3},
    "first order": {"inner_steps": 2, "first_order": True},
    "truncated": {"inner_steps": 3, "truncate": 1},
    "no gradient of the rate": {"inner_steps": 2, "inner_lr_grad": False},
    "mini-batches": {"inner_steps": 2, "minibatch": 2},
    "adapted": {"inner_steps": 2, "adapted": "0.*"},
    "per task": {"inner_steps": 2, "per_task": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_options_give_what_keywords_give(name, engine):
    theta, batch = engine.flatten(), regression_batch()
    batch = tuple(part[:, :4] for part in batch)
    expected = engine.meta_gradient(theta, batch, 0.1, **SETTINGS[name])
    for _ in range(2):  # the second call may be a prepared one
        found = engine.meta_gradient(theta, batch, 0.1, options=MetaGradientOptions(**SETTINGS[name]))
        for ours, theirs in zip(found, expected):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_the_rates_of_a_call_replace_those_of_the_optimizer(engine):
    theta, batch = engine.flatten(), regression_batch()
    options = MetaGradientOptions(inner_steps=2, inner=inner.SGD(0.5, momentum=0.9))
    given = engine.meta_gradient(theta, batch, 0.1, options=options).grad
    assert torch.equal(
        given, engine.meta_gradient(theta, batch, inner=inner.SGD(0.1, momentum=0.9), inner_steps=2).grad
    )
    own = engine.meta_gradient(theta, batch, options=options).grad
    assert torch.equal(own, engine.meta_gradient(theta, batch, inner=inner.SGD(0.5, momentum=0.9), inner_steps=2).grad)
    adapted = engine.adapt(theta, *batch[:2], 0.1, options=options)
    assert torch.equal(adapted, engine.adapt(theta, *batch[:2], inner=inner.SGD(0.1, momentum=0.9), inner_steps=2))


@pytest.mark.parametrize("given", [{"inner_steps": 2}, {"first_order": True}, {"adapted": ["0.*"]}, {"truncate": 0}])
def test_settings_come_in_one_way(given, engine):
    with pytest.raises(TypeError, match="as keywords or as options"):
        engine.meta_gradient(engine.flatten(), regression_batch(), 0.1, options=MetaGradientOptions(), **given)


def test_adapting_takes_settings_in_one_way(engine):
    with pytest.raises(TypeError, match="as keywords or as options"):
        engine.adapt(engine.flatten(), *regression_batch()[:2], 0.1, 2, options=MetaGradientOptions())


@pytest.mark.parametrize(
    "given, error, sentence",
    [
        ({"inner_steps": -1}, ValueError, "inner_steps is -1; it must be at least 0"),
        ({"inner_steps": 1.0}, TypeError, "inner_steps must be a whole number, not 1.0"),
        ({"inner_steps": [1]}, TypeError, r"inner_steps must be a whole number, not \[1\]"),
        ({"truncate": True}, TypeError, "truncate must be a whole number"),
        ({"minibatch": 0}, ValueError, "minibatch is 0; it must be at least 1"),
    ],
)
def test_a_wrong_setting_is_refused_at_once(given, error, sentence, engine):
    with pytest.raises(error, match=sentence):
        MetaGradientOptions(**given)
    with pytest.raises(error, match=sentence):
        engine.meta_gradient(engine.flatten(), regression_batch(), 0.1, **given)


def test_a_wrong_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"inner must be fm\.inner\.SGD, Adam or AdamW, not float"):
        MetaGradientOptions(inner=0.1)


def test_no_rate_is_refused(engine):
    with pytest.raises(TypeError, match="give either inner_lr"):
        engine.meta_gradient(engine.flatten(), regression_batch(), options=MetaGradientOptions())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda options: pickle.loads(pickle.dumps(options))])
def test_options_are_compared_by_value(copied):
    options = MetaGradientOptions(inner_steps=2, adapted="head.*", inner=inner.Adam(1e-3))
    assert options.adapted == ("head.*",)
    assert len({options, copied(options), MetaGradientOptions(2, adapted=["head.*"], inner=inner.Adam(1e-3))}) == 1
    assert options != MetaGradientOptions(inner_steps=2, adapted="head.*")


def test_a_learner_hands_its_settings_over_as_they_are_now():
    learner = fm.MAML(small_mlp(), inner_lr=0.1, inner_steps=2, loss="mse")
    assert learner.options() == MetaGradientOptions(2, inner=inner.SGD(0.0), inner_lr_grad=False)
    assert learner.options() is learner.options()
    learner.inner_steps, learner.first_order = 3, True
    assert learner.options() == MetaGradientOptions(3, True, inner=inner.SGD(0.0), inner_lr_grad=False)


def test_the_memory_mode_may_change_later_and_is_checked(engine):
    engine.memory = "low"
    assert engine.memory == "low"
    with pytest.raises(ValueError, match="memory 'lots' is not one of auto, low, stash"):
        engine.memory = "lots"


def test_the_page_shows_every_setting():
    page = options_table.PAGE.read_text()
    assert page == options_table.written(page), "python tests/options_table.py writes the table"
    assert all(f"| `{name}` |" in page for name in MetaGradientOptions.__dataclass_fields__)
