"""Evaluation: a learner's predictions step by step, their summary with reference predictors, and the written files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import Pictures

from fastmaml.cli.text import command, duration, evaluation_table, size
from fastmaml.tasks import TaskBatch
from fastmaml.training import checkpoint, experiment
from fastmaml.training.evaluation import (
    adapted_outputs,
    ensemble_outputs,
    evaluate_run,
    evaluation_steps,
    quoted_steps,
)
from fastmaml.training.experiment import (
    load_learners,
    make_learner,
    make_model,
    make_tasks,
    read_config,
    write_config,
)
from fastmaml.training.metrics import accuracy, mse
from fastmaml.training.presets import preset

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

SMALL = {"steps": 1, "backend": "autodiff", "eval_tasks": 30}


def write_run(run_dir, config):
    """A run folder as training leaves it, with slightly changed parameters as its result."""
    learner = make_learner(config)
    tensors = {
        f"model/{name}": value + 0.01 * torch.randn_like(value)
        for name, value in learner.state_dict().items()
        if value.dim()
    }
    tensors |= {f"model/{name}": value for name, value in learner.state_dict().items() if not value.dim()}
    write_config(run_dir, config, learner.engine)
    checkpoint.save(run_dir / "checkpoints", "best", tensors, {"step": 1})


@pytest.fixture(scope="module")
def sinusoid_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("sinusoid")
    write_run(run_dir, preset("sinusoid", **SMALL))
    return run_dir, evaluate_run(run_dir, quiet=True)


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.setitem(experiment._SOURCES, "glyphs", Pictures)


@pytest.mark.parametrize(
    "options",
    [{}, {"inner": {"name": "sgd", "momentum": 0.9}}, {"inner": "adam"}, {"adapted": ["4.*"]}],
    ids=["sgd", "momentum", "adam", "head alone"],
)
def test_outputs_step_by_step_are_those_of_adapting_anew(options):
    config = preset("sinusoid", {"options": options}, **SMALL)
    learner, batch = make_learner(config), make_tasks(config, "test").sample(3)
    found = list(adapted_outputs(learner, batch, (0, 1, 4)))
    assert len(found) == 3
    for steps, output in zip((0, 1, 4), found):
        expected = learner.adapt(batch.support_x, batch.support_y, inner_steps=steps).predict(batch.query_x)
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-7)


def test_an_ensemble_answers_with_the_mean_output():
    configs = [preset("sinusoid", seed=seed, **SMALL) for seed in (0, 1)]
    learners, batch = [make_learner(config) for config in configs], make_tasks(configs[0], "test").sample(2)
    parts = [list(adapted_outputs(learner, batch, (0, 2))) for learner in learners]
    for i, output in enumerate(ensemble_outputs(learners, batch, (0, 2))):
        torch.testing.assert_close(output, (parts[0][i] + parts[1][i]) / 2)


def test_an_evaluation_looks_at_the_first_steps_the_last_and_those_it_quotes():
    config = preset("sinusoid", **SMALL)
    learner = make_learner(config)
    assert quoted_steps(learner) == 1 and evaluation_steps(config, learner) == list(range(11))
    learner.eval_steps = 50
    assert quoted_steps(learner) == 50 and evaluation_steps(config, learner) == [*range(11), 20, 50]
    assert evaluation_steps(replace(config, eval_inner_steps=3), make_learner(config)) == [0, 1, 2, 3]


def test_an_ensemble_is_read_from_its_checkpoints_and_says_so(tmp_path):
    config = preset("sinusoid", ensemble=2, **SMALL)
    write_run(tmp_path, config)
    folder = tmp_path / "checkpoints"
    tensors, _ = checkpoint.load(folder, "best")
    for step, scale in ((7, 1.0), (4, 1.5)):
        checkpoint.save(folder, f"member-{step}", {k: scale * v for k, v in tensors.items()}, {"step": step})
    checkpoint.save(folder, "last", tensors, {"step": 9, "members": [{"step": 7}, {"step": 4}]})
    results = evaluate_run(tmp_path, tasks=5, quiet=True)
    assert (results["checkpoint"], results["step"], results["ensemble"]) == ("ensemble", 7, [7, 4])
    (first, second), _ = load_learners(tmp_path, config)
    batch = make_tasks(config, "test", 5, 100).sample(5, step=0)
    answers = [learner.adapt(*batch[:2], inner_steps=0).predict(batch.query_x) for learner in (first, second)]
    expected = mse((answers[0] + answers[1]) / 2, batch.query_y).mean().item()
    assert results["tables"][0]["rows"][0]["mean"][0] == pytest.approx(expected, rel=1e-5)


def test_query_normalised_by_the_support_set_reaches_the_evaluation(pictures):
    config = preset("glyphs", filters=2, batch_norm="support", **SMALL)
    learner, batch = make_learner(config), make_tasks(config, "test").sample(2)
    *_, output = adapted_outputs(learner, batch, (0, 1))
    adapted = learner.adapt(batch.support_x, batch.support_y, inner_steps=1)
    torch.testing.assert_close(output, adapted.predict(batch.query_x), rtol=1e-5, atol=1e-6)
    one = TaskBatch(*batch[:2], batch.query_x[:, :1], batch.query_y[:, :1])
    *_, alone = adapted_outputs(learner, one, (0, 1))
    torch.testing.assert_close(alone[:, 0], output[:, 0], rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_sinusoid_results_have_the_agreed_form(sinusoid_run):
    run_dir, results = sinusoid_run
    assert json.loads((run_dir / "evaluation.json").read_text()) == results
    facts = {key: results[key] for key in ("dataset", "split", "tasks", "metric", "ways", "query_shots", "inner_steps")}
    assert facts == {
        "dataset": "sinusoid",
        "split": "test",
        "tasks": 30,
        "metric": "mse",
        "ways": None,
        "query_shots": 100,
        "inner_steps": list(range(11)),
    }
    assert [table["shots"] for table in results["tables"]] == [5, 10, 20]
    for table in results["tables"]:
        assert [(row["name"], row["kind"], len(row["mean"])) for row in table["rows"]] == [
            ("MAML, meta-trained", "learner", 11),
            ("same network, random initialisation", "baseline", 11),
            ("mean predictor", "baseline", 1),
        ]
        assert all(len(row["ci95"]) == len(row["median"]) == len(row["mean"]) for row in table["rows"])


def test_sinusoid_tables_share_curves_and_query_points(sinusoid_run):
    # Before any inner step the support set plays no part, so the three tables must agree.
    at_zero = [[row["mean"][0] for row in table["rows"][:2]] for table in sinusoid_run[1]["tables"]]
    assert at_zero[0] == at_zero[1] == at_zero[2]


def test_the_results_are_those_of_the_tasks_one_by_one(sinusoid_run):
    run_dir, results = sinusoid_run
    config = read_config(run_dir)
    (learner,), _ = load_learners(run_dir, config)
    tasks = make_tasks(config, "test", shots=5, query_shots=100)
    parts = []
    for chunk, count in enumerate((25, 5)):
        batch = tasks.sample(count, step=chunk)
        adapted = learner.adapt(batch.support_x, batch.support_y, inner_steps=10)
        parts.append(mse(adapted.predict(batch.query_x), batch.query_y))
    row = results["tables"][0]["rows"][0]
    values = torch.cat(parts)
    assert row["mean"][10] == pytest.approx(values.mean().item(), rel=1e-4)
    assert row["ci95"][10] == pytest.approx(1.96 * values.std().item() / 30**0.5, rel=1e-4)
    assert row["median"][10] == pytest.approx(values.quantile(0.5).item(), rel=1e-4)


def test_sinusoid_examples_hold_curves_and_truth(sinusoid_run):
    with np.load(sinusoid_run[0] / "examples.npz", allow_pickle=False) as found:
        shapes = {name: found[name].shape for name in found.files}
        assert shapes == {
            "support_x": (6, 10, 1),
            "support_y": (6, 10, 1),
            "grid_x": (201,),
            "true_y": (6, 201),
            "curves": (6, 11, 201),
        }
        for task in range(6):  # the truth goes through the support points
            x, y = found["support_x"][task, :, 0], found["support_y"][task, :, 0]
            np.testing.assert_allclose(np.interp(x, found["grid_x"], found["true_y"][task]), y, atol=5e-3)


def test_image_results_and_examples_have_the_agreed_form(tmp_path, pictures):
    config = preset("glyphs", filters=2, query_shots=3, **SMALL)
    write_run(tmp_path, config)
    results = evaluate_run(tmp_path, tasks=7, quiet=True)
    (table,) = results["tables"]
    assert (results["metric"], results["ways"], results["query_shots"], table["shots"]) == ("accuracy", 5, 3, 1)
    nearest = table["rows"][2]
    assert nearest["name"] == "nearest neighbour on pixels" and nearest["mean"] == [1.0], (
        "these pictures are easy for pixels"
    )
    with np.load(tmp_path / "examples.npz", allow_pickle=False) as found:
        shapes = {name: found[name].shape for name in found.files}
        assert shapes == {
            "support_x": (6, 5, 1, 28, 28),
            "support_y": (6, 5),
            "query_x": (6, 15, 1, 28, 28),
            "query_y": (6, 15),
            "predictions_before": (6, 15),
            "predictions_after": (6, 15),
            "probabilities_after": (6, 15, 5),
        }
        np.testing.assert_allclose(found["probabilities_after"].sum(-1), 1, rtol=1e-5)
        np.testing.assert_array_equal(found["probabilities_after"].argmax(-1), found["predictions_after"])
        (learner,), _ = load_learners(tmp_path, config)
        adapted = learner.adapt(torch.from_numpy(found["support_x"]), torch.from_numpy(found["support_y"]))
        expected = adapted.predict(torch.from_numpy(found["query_x"])).argmax(-1)
        np.testing.assert_array_equal(found["predictions_after"], expected.numpy())
        assert accuracy(torch.from_numpy(found["probabilities_after"]), torch.from_numpy(found["query_y"])).shape == (
            6,
        )


def test_the_random_baseline_is_the_network_training_started_from(sinusoid_run):
    config = read_config(sinusoid_run[0])
    one, other = make_model(config), make_model(config)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    changed = make_model(replace(config, seed=config.seed + 1))
    assert not torch.equal(next(one.parameters()), next(changed.parameters()))


def test_another_seed_gives_other_test_tasks_and_out_keeps_the_run(sinusoid_run, tmp_path):
    run_dir, results = sinusoid_run
    before = (run_dir / "evaluation.json").read_bytes()
    other = evaluate_run(run_dir, tasks=5, seed=7, out=tmp_path / "elsewhere", quiet=True)
    assert other["tables"][0]["rows"][0]["mean"] != results["tables"][0]["rows"][0]["mean"]
    assert (run_dir / "evaluation.json").read_bytes() == before
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"evaluation.json", "examples.npz"}


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run folder of fastmaml: it has no config\.json"):
        evaluate_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json has no dataset, loss, model"):
        evaluate_run(tmp_path)


def test_the_table_is_aligned_and_says_what_diverged(sinusoid_run):
    results = json.loads(json.dumps(sinusoid_run[1]))
    results["tables"][0]["rows"][0]["mean"][10] = None
    results["tables"][0]["rows"][0]["ci95"][10] = None
    blocks = evaluation_table(results).split("\n\n")
    assert len(blocks) == 3
    head, steps, *rows = blocks[0].splitlines()
    assert head == "5 support points, 30 test tasks: mean squared error, mean ± 95 % interval"
    assert steps.split() == ["inner", "steps", "0", "1", "2", "3", "5", "10"]
    assert rows[0].endswith("diverged") and rows[1].startswith("  median")
    assert len({len(row) for row in (steps, *rows[:4])}) == 1


def test_numbers_are_for_people():
    assert [duration(s) for s in (4.25, 200, 7500)] == ["4.2 s", "3 min 20 s", "2 h 05 min"]
    assert [size(n) for n in (812, 111_261, 12_424_320)] == ["812", "111.3 k", "12.4 M"]
    assert command("train", "--resume", "runs/my run").endswith("train --resume 'runs/my run'")
