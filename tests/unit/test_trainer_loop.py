"""The trainer: a resumed run equals the run in one piece. Errors are reported and lose no work."""

from __future__ import annotations

import errno
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fastmaml import MAML
from fastmaml.tasks import Sinusoid
from fastmaml.training import checkpoint
from fastmaml.training.experiment import seed_generators
from fastmaml.training.metrics import read_rows
from fastmaml.training.presets import PRESETS
from fastmaml.training.run_config import RunConfig
from fastmaml.training.trainer import Trainer, chunks, member_name

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

TIMES = {"steps_per_second", "sampling_share", "elapsed_s"}
CONFIG = replace(
    PRESETS["sinusoid"],
    steps=20,
    meta_batch=3,
    outer_lr=1e-2,
    schedule="cosine",
    log_every=3,  # rows and checkpoints fall on different steps
    validate_every=4,
    validation_tasks=5,
    ensemble=2,
    backend="autodiff",
)


class NoisySinusoid(Sinusoid):
    """Draws from the generators of torch, numpy and Python, as a user's own tasks, augmentations or dropout may."""

    def _draw(self, tasks, step):
        batch = super()._draw(tasks, step)
        noise = 1e-2 * torch.randn_like(batch.support_y) + 1e-2 * float(np.random.randn()) + random.gauss(0, 1e-2)
        return batch._replace(support_y=batch.support_y + noise)


def make_trainer(run_dir, config: RunConfig = CONFIG, *layers: nn.Module, **tasks) -> Trainer:
    seed_generators(config.seed)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), *layers, nn.Linear(8, 1))
    learner = MAML(model, config.inner_lr, config.inner_steps, loss="mse", backend=config.backend)
    settings = {"shots": 10, "query_shots": 10, "seed": config.seed} | tasks
    train_tasks, validation_tasks = NoisySinusoid(split="train", **settings), Sinusoid(split="val", **settings)
    return Trainer(learner, train_tasks, validation_tasks, config, run_dir, quiet=True)


def rows(run_dir) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run_dir / "metrics.jsonl")]


def expect_same_run(one, other) -> None:
    """Same parameters, optimizer, generators and sampler to the bit, and the same metrics."""
    for name in ("last", "best"):
        tensors, state = checkpoint.load(one / "checkpoints", name)
        tensors_, state_ = checkpoint.load(other / "checkpoints", name)
        assert tensors.keys() == tensors_.keys()
        for key, value in tensors.items():
            assert torch.equal(value, tensors_[key]), key
        assert {k: v for k, v in state.items() if k not in ("elapsed_s", "sampling_s")} == {
            k: v for k, v in state_.items() if k not in ("elapsed_s", "sampling_s")
        }
    assert rows(one) == rows(other)
    members = [member_name(member["step"]) for member in checkpoint.load(one / "checkpoints", "last")[1]["members"]]
    for run in (one, other):
        assert sorted(path.stem for path in (run / "checkpoints").glob("member-*.json")) == sorted(members)
    for name in members:
        for key, value in checkpoint.load(one / "checkpoints", name)[0].items():
            assert torch.equal(value, checkpoint.load(other / "checkpoints", name)[0][key]), key


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight")
    outcome = make_trainer(run_dir).train()
    assert outcome.reason == "finished" and outcome.step == 20
    return run_dir


@pytest.mark.parametrize("stops", [[10], [1, 4, 19]], ids=str)
def test_a_resumed_run_goes_through_the_same_bits(tmp_path, straight, stops):
    for stop in stops:
        trainer = make_trainer(tmp_path)
        if stop != stops[0]:
            trainer.resume()
        outcome = trainer.train(until=stop)
        assert (outcome.reason, outcome.step) == ("interrupted", stop)
    trainer = make_trainer(tmp_path)
    trainer.resume()
    assert trainer.train().reason == "finished"
    expect_same_run(tmp_path, straight)


@pytest.mark.parametrize(
    ("backend", "layers"), [("auto", []), ("autodiff", [nn.Dropout(0.2)])], ids=["compiled engine", "dropout"]
)
def test_other_networks_and_engines_resume_to_the_same_bits(tmp_path, backend, layers):
    config = replace(CONFIG, backend=backend, steps=8, validate_every=3)
    make_trainer(tmp_path / "straight", config, *layers).train()
    make_trainer(tmp_path / "parts", config, *layers).train(until=4)
    trainer = make_trainer(tmp_path / "parts", config, *layers)
    trainer.resume()
    trainer.train()
    expect_same_run(tmp_path / "parts", tmp_path / "straight")


def test_a_signal_ends_the_step_and_saves(tmp_path, straight):
    trainer = make_trainer(tmp_path)
    sample = trainer.train_tasks.sample

    def sample_and_signal(tasks):
        if trainer.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return sample(tasks)

    trainer.train_tasks.sample = sample_and_signal
    handler = signal.getsignal(signal.SIGINT)
    outcome = trainer.train()
    assert (outcome.reason, outcome.step) == ("interrupted", 7)
    assert signal.getsignal(signal.SIGINT) is handler
    trainer = make_trainer(tmp_path)
    trainer.resume()
    trainer.train()
    expect_same_run(tmp_path, straight)


def test_a_full_disk_stops_training_and_loses_nothing(tmp_path, straight, monkeypatch):
    trainer = make_trainer(tmp_path)
    write = checkpoint._write

    def full(file, data):
        if trainer.step >= 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(checkpoint.CheckpointError, match=r"no space left on device.*untouched"):
        trainer.train()
    monkeypatch.undo()
    trainer = make_trainer(tmp_path)
    trainer.resume()
    assert trainer.step == 4
    trainer.train()
    expect_same_run(tmp_path, straight)


def test_rows_hold_what_the_report_reads(straight):
    found = read_rows(straight / "metrics.jsonl")
    train = [row for row in found if row["kind"] == "train"]
    validation = [row for row in found if row["kind"] == "validation"]
    assert [row["step"] for row in train] == [1, 3, 6, 9, 12, 15, 18, 20]
    assert [row["step"] for row in validation] == [4, 8, 12, 16, 20]
    keys = {"kind", "step", "loss", "support_loss", "metric_before", "metric_after"}
    assert all(row.keys() == keys | TIMES for row in train)
    assert all(
        row.keys() == {"kind", "step", "loss", "metric_before", "metric_after", "ci95", "best"} for row in validation
    )
    assert all(0 < row["sampling_share"] < 1 for row in train)
    assert [row["elapsed_s"] for row in train] == sorted(row["elapsed_s"] for row in train)


def test_the_best_checkpoint_is_the_best_validation_row(straight):
    validation = [row for row in read_rows(straight / "metrics.jsonl") if row["kind"] == "validation"]
    best = min(validation, key=lambda row: row["metric_after"])
    _, state = checkpoint.load(straight / "checkpoints", "best")
    assert (state["step"], state["metric_after"]) == (best["step"], best["metric_after"])
    lowest = float("inf")
    for row in validation:
        assert row["best"] is (row["metric_after"] < lowest)
        lowest = min(lowest, row["metric_after"])


def test_the_members_of_the_ensemble_are_the_best_validation_rows(straight):
    validation = [row for row in read_rows(straight / "metrics.jsonl") if row["kind"] == "validation"]
    ordered = sorted(validation, key=lambda row: row["metric_after"])
    _, state = checkpoint.load(straight / "checkpoints", "last")
    assert [m["step"] for m in state["members"]] == [row["step"] for row in ordered[:2]]
    best, member = (
        checkpoint.load(straight / "checkpoints", name)[0] for name in ("best", member_name(ordered[0]["step"]))
    )
    assert all(torch.equal(member[key], value) for key, value in best.items())


def test_validation_meets_the_same_tasks_every_time(tmp_path):
    trainer = make_trainer(tmp_path, replace(CONFIG, outer_lr=1e-30, steps=8))
    trainer.train()
    first, second = (row for row in rows(tmp_path) if row["kind"] == "validation")
    assert first["metric_after"] == second["metric_after"] and first["metric_before"] == second["metric_before"]


def test_validation_runs_without_dropout_and_training_with_it(tmp_path):
    trainer = make_trainer(tmp_path, replace(CONFIG, outer_lr=1e-30, steps=8, log_every=1), nn.Dropout(0.5))
    trainer.train_tasks.sample = lambda tasks: trainer.validation_tasks.sample(tasks, step=0)
    trainer.train()
    found = rows(tmp_path)
    assert len({row["loss"] for row in found if row["kind"] == "validation"}) == 1
    assert len({row["loss"] for row in found if row["kind"] == "train"}) == 8
    assert trainer.learner.training


@pytest.mark.parametrize(
    ("schedule", "least", "expected"),
    [
        ("constant", 0.0, [1e-2, 1e-2, 1e-2]),
        ("cosine", 0.0, [1e-2, 8.536e-3, 0.0]),
        ("cosine", 2e-3, [1e-2, 8.828e-3, 2e-3]),
        ("linear", 0.0, [1e-2, 7.5e-3, 0.0]),
    ],
)
def test_the_schedule_goes_from_the_outer_rate_to_its_end(tmp_path, schedule, least, expected):
    trainer = make_trainer(tmp_path, replace(CONFIG, schedule=schedule, outer_lr_min=least))
    rates = []
    for trainer.step in (0, 5, 20):
        trainer._set_outer_lr()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected, rel=1e-4)


def test_clipping_limits_every_entry_of_the_networks_gradient_and_no_learned_rate(tmp_path):
    config = replace(CONFIG, clip_grad=0.1, steps=1)
    trainer = make_trainer(tmp_path, config)
    rate = nn.Parameter(torch.tensor(0.01))
    learner = MAML(trainer.learner.model, rate, 1, loss="mse", backend="autodiff")
    Trainer(learner, trainer.train_tasks, trainer.validation_tasks, config, tmp_path, quiet=True).train()
    grads = torch.cat([p.grad.reshape(-1) for p in learner.model.parameters()])
    assert grads.abs().max().item() == pytest.approx(0.1) and (grads.abs() < 0.1).any()
    assert rate.grad.abs().item() > 0.1


def test_the_learner_is_told_every_step_and_brings_its_optimizer(tmp_path):
    told = []

    class Told(MAML):
        def at_step(self, step):
            told.append(step)

        def outer_optimizer(self, lr):
            return torch.optim.SGD(self.parameters(), lr=lr)

    def trainer():
        made = make_trainer(tmp_path)
        learner = Told(made.learner.model, 0.01, 1, loss="mse", backend="autodiff")
        return Trainer(learner, made.train_tasks, made.validation_tasks, CONFIG, tmp_path, quiet=True)

    first = trainer()
    first.train(until=3)
    assert isinstance(first.optimizer, torch.optim.SGD) and told == [0, 1, 2]
    told.clear()
    resumed = trainer()
    resumed.resume()
    resumed.train(until=5)
    assert told == [2, 3, 4], "a resumed learner stands where the last step left it"


def test_training_learns(tmp_path):
    config = replace(CONFIG, steps=60, schedule="constant", validate_every=60, validation_tasks=20, meta_batch=8)
    trainer = make_trainer(tmp_path, config)
    before = {name: p.detach().clone() for name, p in trainer.learner.named_parameters()}
    trainer.train()
    losses = [row["loss"] for row in rows(tmp_path) if row["kind"] == "train"]
    assert sum(losses[-5:]) < 0.95 * sum(losses[1:6])
    assert all(not torch.equal(before[name], p) for name, p in trainer.learner.named_parameters())


def test_a_loss_that_is_not_finite_is_refused_and_the_checkpoint_stays(tmp_path):
    trainer = make_trainer(tmp_path, replace(CONFIG, inner_lr=1e30))
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step 1: lower inner_lr \(1e\+30\)"):
        trainer.train()
    assert checkpoint.load(tmp_path / "checkpoints", "last")[1]["step"] == 0


def test_a_state_with_nan_is_not_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save()
    with torch.no_grad():
        next(trainer.learner.parameters())[0] = float("nan")
    with pytest.raises(ValueError, match=r"model/0\.weight holds NaN or infinity"):
        trainer.save()
    tensors, _ = checkpoint.load(tmp_path / "checkpoints", "last")
    assert torch.isfinite(tensors["model/0.weight"]).all()


def test_the_time_limit_ends_training_and_is_counted_over_a_resume(tmp_path):
    config = replace(CONFIG, steps=10_000, time_limit=0.5)
    outcome = make_trainer(tmp_path, config).train()
    assert outcome.reason == "time limit" and 0 < outcome.step < 10_000
    assert outcome.best is not None, "what is reached at the limit is validated"
    again = make_trainer(tmp_path, config)
    again.resume()
    assert (again.train().step, again.step) == (outcome.step, outcome.step)


def test_resuming_on_other_tasks_is_refused(tmp_path):
    make_trainer(tmp_path).train(until=2)
    with pytest.raises(ValueError, match="shots"):
        make_trainer(tmp_path, shots=5).resume()


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint"):
        make_trainer(tmp_path).resume()


def test_chunks_cover_all_tasks():
    assert chunks(7, 3) == [3, 3, 1]
    assert chunks(6, 3) == [3, 3]
    assert chunks(2, 3) == [2]
