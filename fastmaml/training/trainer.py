"""Meta-training: sample tasks, follow the meta-gradient, validate, keep checkpoints.

    trainer = Trainer(learner, train_tasks, validation_tasks, config, run_dir)
    outcome = trainer.train()

A run is a function of its config. Stopping and resuming from the last checkpoint changes no bit.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmaml.algorithms import Learner
from fastmaml.tasks.source import TaskSource
from fastmaml.training import checkpoint
from fastmaml.training.metrics import METRICS, MetricsWriter, better, show, summarise
from fastmaml.training.progress import progress, stop_on_signal
from fastmaml.training.run_config import RunConfig

CHUNK = 25  # validation and test tasks at a time
SAVE_EVERY_S = 60.0  # between validations; the moment of a save changes no result


@dataclass(frozen=True)
class Outcome:
    """How training ended. reason: "finished", "interrupted" or "time limit". best: the best validation row, or None."""

    reason: str
    step: int
    elapsed_s: float
    sampling_share: float
    best: dict[str, Any] | None


class Trainer:
    """Meta-trains a Learner on `train_tasks`, with its outer optimizer at `config.outer_lr`. Writes into `run_dir`.

    Every validation uses the same first tasks of `validation_tasks`, with the learner in eval mode.
    """

    def __init__(
        self,
        learner: Learner,
        train_tasks: TaskSource,
        validation_tasks: TaskSource,
        config: RunConfig,
        run_dir: str | Path,
        quiet: bool = False,
    ) -> None:
        self.learner = learner
        self.train_tasks, self.validation_tasks = train_tasks, validation_tasks
        self.config, self.run_dir, self.quiet = config, Path(run_dir), quiet
        parameters = [p for p in learner.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("the learner has no trainable parameter")
        self.optimizer = learner.outer_optimizer(config.outer_lr)
        self._first_rates = [group["lr"] for group in self.optimizer.param_groups]
        rates = {id(rate) for rate in learner.learnable_rates().values()}
        self._clipped = [p for p in parameters if id(p) not in rates]
        self.metric = METRICS[config.metric]
        self.step = 0
        self.elapsed_s = 0.0
        self.sampling_s = 0.0
        self.best: dict[str, Any] | None = None
        self.members: list[dict[str, Any]] = []  # of the ensemble: step and validation metric, the best first
        self._since_row = _Window()
        self.tensorboard = False  # whether TensorBoard is written; known after the start of training
        self._writer: MetricsWriter | None = None

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def resume(self) -> None:
        """Continue from the last checkpoint of the run folder. Raises `CheckpointError` if there is none."""
        tensors, state = checkpoint.load(self.checkpoints, "last")
        self.learner.load_state_dict(model_tensors(tensors))
        checkpoint.unpack_optimizer(self.optimizer, tensors, state["optimizer"])
        checkpoint.unpack_rng(tensors, state["rng"])
        self.step, self.best, self.members = state["step"], state["best"], state.get("members", [])
        if self.step:
            self.learner.at_step(self.step - 1)
        self.elapsed_s, self.sampling_s = state["elapsed_s"], state["sampling_s"]
        self._since_row = _Window(**state["since_row"])
        self.train_tasks.load_state_dict(state["sampler"])

    def train(self, until: int | None = None) -> Outcome:
        """Train to `config.steps`, or stop at step `until`. Checkpoint `last` holds the final state.

        After the first Ctrl-C or SIGTERM, finishes the step, saves and returns. Raises ValueError if the loss is not
        finite, `CheckpointError` if a checkpoint cannot be written. In both cases the earlier checkpoint stays valid.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._writer = MetricsWriter(self.run_dir, last_step=self.step if self.step else -1)
        self.tensorboard = self._writer.tensorboard
        title = f"{self.config.dataset} {self.config.algorithm}"
        try:
            with stop_on_signal() as stop, progress(self.config.steps, title, "step", self.step, self.quiet) as bar:
                reason = self._loop(bar, stop, until)
        finally:
            self._writer.close()
        share = self.sampling_s / self.elapsed_s if self.elapsed_s else 0.0
        return Outcome(reason, self.step, self.elapsed_s, share, self.best)

    def _loop(self, bar: Any, stop: Any, until: int | None) -> str:
        config = self.config
        if self.step == 0:
            self.save()  # so a run can always be resumed, and an unwritable folder fails at once
        clock = saved_at = time.perf_counter()
        shown = _Shown()
        reason = "finished"
        while self.step < config.steps:
            if config.time_limit is not None and self.elapsed_s >= config.time_limit:
                reason = "time limit"
                if self.step % config.validate_every:
                    self._validate(shown)
                break
            self._outer_step(shown)
            validate = self.step % config.validate_every == 0 or self.step == config.steps
            if validate:
                self._validate(shown)
            now = time.perf_counter()
            self.elapsed_s, clock = self.elapsed_s + now - clock, now
            if validate or now - saved_at > SAVE_EVERY_S:
                self.save()
                saved_at = time.perf_counter()
            bar.set_postfix_str(shown.text(config.metric), refresh=False)
            bar.update()
            if (stop or self.step == until) and self.step < config.steps:
                reason = "interrupted"
                break
        if reason != "finished":
            self.save()
        return reason

    def _outer_step(self, shown: _Shown) -> None:
        """One step of the outer loop and, if due, its row of metrics."""
        config = self.config
        started = time.perf_counter()
        batch = self.train_tasks.sample(config.meta_batch).to(self.learner.device)
        sampled = time.perf_counter()
        self._set_outer_lr()
        self.learner.at_step(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        out = self.learner(*batch)
        loss = out.loss.item()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.step + 1}: lower inner_lr ({config.inner_lr}) or outer_lr "
                f"({config.outer_lr}); the last checkpoint in {self.checkpoints} is older and still valid"
            )
        out.loss.backward()
        step = self.step + 1
        due = step == 1 or step % config.log_every == 0 or step == config.steps
        looked = time.perf_counter()
        before = self._metric_before(batch) if due else math.nan
        looked = time.perf_counter() - looked  # not part of learning
        if config.clip_grad is not None:
            nn.utils.clip_grad_value_(self._clipped, config.clip_grad, foreach=False)
        self.optimizer.step()
        self.step = step
        after = self.metric(out.query_output, batch[3]).mean().item()
        support_loss = out.support_losses[:, -1].mean().item() if out.support_losses.numel() else math.nan
        ended = time.perf_counter()
        self.sampling_s += sampled - started
        self._since_row.add(loss, support_loss, after, ended - started - looked, sampled - started)
        if due:
            shown.loss, shown.before, shown.after = loss, before, after
            row = self._since_row.row()
            assert self._writer is not None
            self._writer.write("train", step, **row, metric_before=before, elapsed_s=self.elapsed_s + ended - started)
            self._since_row = _Window()

    def _metric_before(self, batch: Any) -> float:
        support_x, support_y, query_x, query_y = batch
        with torch.no_grad():
            output = self.learner.adapt(support_x, support_y, inner_steps=0).predict(query_x)
        return self.metric(output, query_y).mean().item()

    def _set_outer_lr(self) -> None:
        done, least = self.step / self.config.steps, self.config.outer_lr_min
        left = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
        for group, first in zip(self.optimizer.param_groups, self._first_rates):
            group["lr"] = least + (first - least) * left[self.config.schedule]

    def _validate(self, shown: _Shown) -> None:
        """Loss and metric on the validation tasks. The best parameters so far become checkpoint `best`."""
        losses, before, after = [], [], []
        training = self.learner.training
        self.learner.eval()  # no dropout; batch norm follows the learner's own setting
        with torch.no_grad():
            for chunk, count in enumerate(chunks(self.config.validation_tasks, CHUNK)):
                batch = self.validation_tasks.sample(count, step=chunk).to(self.learner.device)
                out = self.learner(*batch)
                losses.append(out.task_losses.double())
                after.append(self.metric(out.query_output, batch[3]))
                before.append(self.metric(self.learner.adapt(*batch[:2], inner_steps=0).predict(batch[2]), batch[3]))
        self.learner.train(training)
        loss, result = summarise(torch.cat(losses)), summarise(torch.cat(after))
        value = math.nan if result.mean is None else result.mean
        row: dict[str, Any] = {
            "loss": loss.mean,
            "metric_before": summarise(torch.cat(before)).mean,
            "metric_after": result.mean,
            "ci95": result.ci95,
        }
        is_best = better(self.config.metric, value, self.best["metric_after"] if self.best else None)
        if is_best:
            self.best = {"step": self.step, **row}
            checkpoint.save(self.checkpoints, "best", self._model_tensors(), self.best)
        if self.config.ensemble > 1:
            self._consider_member(value)
        shown.validation = value
        assert self._writer is not None
        self._writer.write("validation", self.step, **row, best=is_best)

    def _consider_member(self, value: float) -> None:
        """Keep the parameters as a member of the ensemble, unless `config.ensemble` earlier ones are at least as good."""
        worse = [
            i for i, member in enumerate(self.members) if better(self.config.metric, value, member["metric_after"])
        ]
        place = worse[0] if worse else len(self.members)
        if place < self.config.ensemble and not math.isnan(value):
            member = {"step": self.step, "metric_after": value}
            self.members = [*self.members[:place], member, *self.members[place:]][: self.config.ensemble]
            checkpoint.save(self.checkpoints, member_name(self.step), self._model_tensors(), member)

    def save(self) -> None:
        """Write checkpoint `last`: model, optimizer, generators, sampler, step, and the best so far."""
        tensors = self._model_tensors()
        broken = next(
            (name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())), None
        )
        if broken is not None:
            raise ValueError(
                f"{broken} holds NaN or infinity after step {self.step}, so this state is not saved: lower inner_lr "
                f"({self.config.inner_lr}) or outer_lr ({self.config.outer_lr})"
            )
        optimizer_tensors, optimizer_rest = checkpoint.pack_optimizer(self.optimizer)
        rng_tensors, rng_rest = checkpoint.pack_rng()
        state = {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "sampling_s": self.sampling_s,
            "best": self.best,
            "members": self.members,
            "since_row": vars(self._since_row),
            "optimizer": optimizer_rest,
            "rng": rng_rest,
            "sampler": self.train_tasks.state_dict(),
        }
        checkpoint.save(self.checkpoints, "last", {**tensors, **optimizer_tensors, **rng_tensors}, state)
        # Only now, because the old checkpoint `last` on disk may name a member that has been replaced.
        checkpoint.keep_only(self.checkpoints, member_name("*"), [member_name(m["step"]) for m in self.members])

    def _model_tensors(self) -> dict[str, Tensor]:
        return {f"model/{name}": value for name, value in self.learner.state_dict().items()}


class _Window:
    """Sums over the steps since the last row of metrics. Saved in checkpoints, so a resumed run has the same rows."""

    def __init__(
        self,
        steps: int = 0,
        loss: float = 0.0,
        support_loss: float = 0.0,
        after: float = 0.0,
        seconds: float = 0.0,
        sampling: float = 0.0,
    ) -> None:
        self.steps, self.loss, self.support_loss, self.after = steps, loss, support_loss, after
        self.seconds, self.sampling = seconds, sampling

    def add(self, loss: float, support_loss: float, after: float, seconds: float, sampling: float) -> None:
        self.steps += 1
        self.loss += loss
        self.support_loss += support_loss
        self.after += after
        self.seconds += seconds
        self.sampling += sampling

    def row(self) -> dict[str, float]:
        """Means over the steps, steps per second, and the share of time spent sampling."""
        return {
            "loss": self.loss / self.steps,
            "support_loss": self.support_loss / self.steps,
            "metric_after": self.after / self.steps,
            "steps_per_second": self.steps / self.seconds,
            "sampling_share": self.sampling / self.seconds,
        }


class _Shown:
    """The text after the progress bar."""

    loss = before = after = validation = math.nan

    def text(self, metric: str) -> str:
        parts = [f"loss {self.loss:.3f}", f"{metric} {show(metric, self.before)} -> {show(metric, self.after)}"]
        if not math.isnan(self.validation):
            parts.append(f"validation {show(metric, self.validation)}")
        return ", ".join(parts)


def member_name(step: int | str) -> str:
    """The checkpoint that holds a member of the ensemble."""
    return f"member-{step}"


def model_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The learner's state_dict, from the tensors of a checkpoint."""
    return {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}


def chunks(total: int, size: int) -> list[int]:
    """`total` tasks in chunks of `size`, plus a rest: chunks(7, 3) is [3, 3, 1]."""
    return [size] * (total // size) + ([total % size] if total % size else [])
