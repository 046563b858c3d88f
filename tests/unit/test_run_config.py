"""Settings of a run: presets, changes, files, and the sentence for each mistake."""

from __future__ import annotations

import re

import pytest
import torch

from fastmaml.algorithms.names import ALGORITHMS
from fastmaml.inner import AdamW
from fastmaml.training.config_file import read_option, read_settings, to_yaml
from fastmaml.training.experiment import make_learner
from fastmaml.training.presets import ALGORITHM_PRESETS, PRESETS, preset
from fastmaml.training.run_config import NEEDS_CLASSES, RunConfig

pytest.importorskip("yaml")

EVERY = [(a, d) for a in ALGORITHMS for d in PRESETS if not (d == "sinusoid" and a in NEEDS_CLASSES)]


def test_every_algorithm_has_its_presets():
    assert ALGORITHM_PRESETS.keys() | {"maml"} == ALGORITHMS.keys()


@pytest.mark.parametrize(("algorithm", "dataset"), EVERY)
def test_a_preset_goes_through_json_and_yaml_unchanged(tmp_path, algorithm, dataset):
    config = preset(dataset, algorithm=algorithm)
    assert (config.algorithm, config.dataset) == (algorithm, dataset)
    assert RunConfig.from_json(config.to_json()) == config
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert preset(dataset, read_settings(tmp_path / "run.yaml")) == config


def test_changes_win_over_a_file_and_a_file_over_the_preset():
    file = {"algorithm": "imaml", "inner_lr": 0.3, "eval_query_shots": None, "options": {"lam": 1.0}}
    config = preset("sinusoid", file, inner_lr=0.2, options={"cg_steps": 3}, steps=None)
    assert (config.algorithm, config.inner_lr, config.eval_query_shots) == ("imaml", 0.2, None)
    assert config.options == preset("sinusoid", algorithm="imaml").options | {"lam": 1.0, "cg_steps": 3}
    assert config.steps == PRESETS["sinusoid"].steps
    assert preset("sinusoid", file, algorithm="maml").algorithm == "maml"


def test_a_model_is_merged_with_the_presets_unless_it_is_another():
    assert preset("glyphs", {"model": {"pooling": "stride"}}).model == {
        "name": "conv4",
        "filters": 32,
        "pooling": "stride",
    }
    assert preset("glyphs", {"model": {"name": "mlp", "sizes": [784, 5]}}).model == {"name": "mlp", "sizes": [784, 5]}
    assert preset("omniglot", ways=20, filters=8).model["filters"] == 8


def test_a_regression_is_also_tested_with_the_shots_that_it_was_trained_with():
    assert preset("sinusoid", shots=7).eval_shots == (5, 7, 10, 20)
    assert preset("sinusoid", {"eval_shots": (5,)}, shots=7).eval_shots == (5,)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"ways": 1}, "ways is 1; it must be at least 2"),
        ({"meta_batch": 0}, "meta_batch is 0"),
        ({"outer_lr": 0.0}, "outer_lr is 0.0; it must be above 0"),
        ({"clip_grad": -1.0}, "clip_grad is -1.0; it must be above 0"),
        ({"outer_lr_min": 1.0}, "outer_lr_min is 1.0; it must be between 0 and outer_lr (0.001)"),
        ({"inner_steps": -1}, "inner_steps is -1"),
        ({"train_shots": 0}, "train_shots is 0; it must be at least 1"),
        ({"ensemble": 0}, "ensemble is 0; it must be at least 1"),
        ({"time_limit": -1.0}, "time_limit is -1.0 seconds"),
        ({"algorithm": "sgd"}, "algorithm 'sgd' is not one of maml, fomaml, reptile, foml, maml++"),
        ({"schedule": "step"}, "schedule 'step' is not one of constant, cosine, linear"),
        ({"options": {"inner_steps": 3}}, "inner_steps is a separate setting, not one of the options"),
    ],
)
def test_a_value_out_of_range_is_named(wrong, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        preset("omniglot", **wrong)


def test_what_does_not_fit_the_data_set_is_named():
    with pytest.raises(ValueError, match="ways is 5: sinusoid is a regression, its tasks have no classes"):
        preset("sinusoid", ways=5)
    with pytest.raises(ValueError, match="ways is null: the tasks of glyphs have classes"):
        preset("glyphs", {"ways": None})
    with pytest.raises(ValueError, match="has no filters"):
        preset("sinusoid", filters=5)
    with pytest.raises(ValueError, match="unknown data set 'mnist'"):
        preset("mnist")
    with pytest.raises(
        ValueError, match="ProtoMAML builds its head from the classes of a task, and sinusoid is a regr"
    ):
        preset("sinusoid", algorithm="protomaml")


YAML = """
dataset: glyphs
algorithm: imaml
inner_lr: 1e-1          # a number, although YAML 1.1 reads a word
root: null
options: {lam: 2e0, solver: gd, learn_lam: true}
model: {filters: 8}
"""
TOML = """
dataset = "glyphs"
algorithm = "imaml"
inner_lr = 1e-1
options = {lam = 2e0, solver = "gd", learn_lam = true}
[model]
filters = 8
"""


@pytest.mark.parametrize(("name", "text"), [("run.yaml", YAML), ("run.YML", YAML), ("run.toml", TOML)])
def test_files_in_yaml_and_toml_say_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    settings = read_settings(tmp_path / name)
    settings.pop("root", None)
    assert settings == {
        "dataset": "glyphs",
        "algorithm": "imaml",
        "inner_lr": 0.1,
        "options": {"lam": 2.0, "solver": "gd", "learn_lam": True},
        "model": {"filters": 8},
    }


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("run.yaml", "inner_rate: 0.1", "there is no setting 'inner_rate'; the nearest is 'inner_lr'"),
        ("run.toml", "step = 5", "there is no setting 'step'; the nearest is 'steps'"),
        ("run.yaml", "steps: many", "steps is 'many'; it must be a whole number"),
        ("run.yaml", "steps: 1.5", "steps is 1.5; it must be a whole number"),
        ("run.yaml", "steps: true", "steps is True; it must be a whole number"),
        ("run.yaml", "outer_lr: null", "outer_lr is None; it must be a number"),
        ("run.yaml", "clip_grad: .inf", "clip_grad is inf; it must be a number or null"),
        ("run.yaml", "inner_lr: [1, 2, 3]", "inner_lr is (1, 2, 3); it must be a number or two in a list"),
        ("run.yaml", "eval_shots: 5", "eval_shots is 5; it must be a list of whole numbers"),
        ("run.yaml", "options: [lam]", "options is ['lam']; it must be a mapping"),
        ("run.yaml", "backend: 3", "backend is 3; it must be text"),
        ("run.yaml", "- 1", "must hold settings by name, not a list"),
        ("run.yaml", "a: [", "cannot be read as yaml"),
        ("run.toml", "a = [", "cannot be read as toml"),
        ("run.json", "{}", "must be named .yaml, .yml or .toml"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, name, text, sentence):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        read_settings(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(ValueError, match="there is no config file"):
        read_settings(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_settings(tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lam=2.0", ("lam", 2.0)),
        ("lam=1e-3", ("lam", 0.001)),
        ("cg_steps=5", ("cg_steps", 5)),
        ("learn_lam=true", ("learn_lam", True)),
        ("solver=newton_cg", ("solver", "newton_cg")),
        ("head=null", ("head", None)),
        ("head=*.weight=x", ("head", "*.weight=x")),
        ("inner={name: adam, betas: [0, 0.999]}", ("inner", {"name": "adam", "betas": [0, 0.999]})),
    ],
)
def test_an_option_is_read_as_yaml_reads_it(text, expected):
    name, value = read_option(text)
    assert (name, value) == expected and type(value) is type(expected[1])


@pytest.mark.parametrize("text", ["lam", "=3", "a b=3", "lam=[1"])
def test_an_option_that_cannot_be_read_is_one_sentence(text):
    with pytest.raises(ValueError, match="--option") as error:
        read_option(text)
    assert "\n" not in str(error.value)


def test_settings_reach_the_learner_in_its_own_words():
    assert make_learner(preset("sinusoid", algorithm="imaml", options={"solver": "newton_cg"})).solver == "newton_cg"
    learner = make_learner(preset("glyphs", algorithm="maml++", filters=2, batch_norm="per_step"))
    assert learner.keeps_statistics
    inner = make_learner(preset("sinusoid", options={"inner": {"name": "adamw", "betas": [0, 0.9]}})).inner
    assert (type(inner), inner.lr, inner.betas) == (AdamW, 0.01, (0, 0.9))
    first, again, other = (
        make_learner(preset("sinusoid", algorithm="metasgd", seed=seed)).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["inner_lr.0.weight"], other["inner_lr.0.weight"])
