"""Metrics of a batch of tasks, their summary over tasks, and the writer of a run (JSONL and TensorBoard)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmaml.training import checkpoint

Metric = Callable[[Tensor, Tensor], Tensor]


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of examples whose largest logit is the label, 0 to 1: output [T, N, ways], target [T, N] -> [T]."""
    return (output.argmax(-1) == target).double().mean(-1)


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each task: output and target [T, N, ...] -> [T]."""
    return (output.double() - target.double()).square().flatten(1).mean(-1)


METRICS: dict[str, Metric] = {"accuracy": accuracy, "mse": mse}


def better(metric: str, value: float, than: float | None) -> bool:
    """Whether `value` beats the best so far. NaN never does; any other value beats None."""
    if math.isnan(value):
        return False
    return than is None or (value > than if metric == "accuracy" else value < than)


def show(metric: str, value: float | None) -> str:
    """A value of the metric as text: "97.3 %" or "0.462"; "diverged" if it is not finite."""
    if value is None or not math.isfinite(value):
        return "diverged"
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.3g}"


class Summary(NamedTuple):
    """Over tasks: the mean, the half width of its 95 % interval, the median. None if not finite."""

    mean: float | None
    ci95: float | None
    median: float | None


def summarise(values: Tensor) -> Summary:
    """Mean, 1.96 std / sqrt(n) (the interval of Finn et al. 2017, section 5.2) and median of `values` [n].

    A task that diverged to NaN counts as infinitely bad: the mean becomes None, the median stays finite.
    """
    if values.numel() == 0:
        raise ValueError("no tasks to summarise: values [0]")
    values = values.double()
    median = torch.nan_to_num(values, nan=math.inf, posinf=math.inf, neginf=-math.inf).quantile(0.5).item()
    mean = values.mean().item()
    spread = values.std().item() if values.numel() > 1 else 0.0
    return Summary(_finite(mean), _finite(1.96 * spread / math.sqrt(values.numel())), _finite(median))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class MetricsWriter:
    """Appends rows to `metrics.jsonl` of a run folder and, if tensorboard is installed, scalars to `tensorboard/`.

    last_step: later rows are removed first, so a resumed run writes each row once; -1 removes all rows.
    """

    def __init__(self, run_dir: str | Path, last_step: int = -1) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        checkpoint.write_durably(self.path, _rows_until(self.path, last_step))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._board = _tensorboard(Path(run_dir) / "tensorboard", purge_step=last_step + 1 if last_step >= 0 else None)
        self.tensorboard = self._board is not None

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Appends a row {"kind": kind, "step": step, **values}. A number that is not finite becomes null."""
        row = {key: _finite(value) if isinstance(value, float) else value for key, value in values.items()}
        with self._named_errors():
            self._file.write(json.dumps({"kind": kind, "step": step, **row}, allow_nan=False) + "\n")
            self._file.flush()
            if self._board is not None:
                for key, value in row.items():
                    if isinstance(value, (int, float)) and not isinstance(value, bool):
                        self._board.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        """Flush and close both writers."""
        with self._named_errors():
            self._file.close()
            if self._board is not None:
                self._board.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"cannot write the metrics in {self.path.parent}: {checkpoint.why(error)}") from error


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _rows_until(path: Path, last_step: int) -> bytes:
    """The complete rows up to and including last_step. The last row of a killed run may be incomplete."""
    if not path.exists():
        return b""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if step <= last_step and line.endswith(b"\n"):
            kept.append(line)
    return b"".join(kept)


def _tensorboard(folder: Path, purge_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)
