# Reads a run folder (config.json, metrics.jsonl, evaluation.json, examples.npz, comparison.json) into plain arrays.
# A missing required file raises an error of one sentence. A missing or broken optional file becomes a note.
from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Columns = dict[str, np.ndarray]  # "step" and every other key of metrics.jsonl, each [rows]; NaN if a row lacks the key


@dataclass(frozen=True)
class Row:
    """One line of an evaluation table. `mean`, `ci95` and `median` are [inner steps], or [1] without adaptation."""

    name: str
    kind: str  # "learner" | "baseline"
    mean: np.ndarray
    ci95: np.ndarray  # half width of the 95 % interval of the mean
    median: np.ndarray

    @property
    def adapts(self) -> bool:
        return len(self.mean) > 1

    def at(self, index: int) -> tuple[float, float]:
        """Mean and half width after the index-th entry of `inner_steps`."""
        index = index if self.adapts else 0
        return float(self.mean[index]), float(self.ci95[index])


@dataclass(frozen=True)
class Table:
    shots: int | None
    rows: list[Row]

    @property
    def learner(self) -> Row | None:
        return next((row for row in self.rows if row.kind == "learner"), None)

    @property
    def baselines(self) -> list[Row]:
        return [row for row in self.rows if row.kind != "learner"]


@dataclass(frozen=True)
class Evaluation:
    metric: str  # "accuracy" as a fraction of 1, or "mse"
    inner_steps: list[int]
    tables: list[Table]
    facts: dict[str, Any]  # the other keys of evaluation.json: dataset, split, tasks, ways, wall_s, ...


@dataclass(frozen=True)
class Series:
    name: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Curves for one plot. Distances are from the first series, at every x of both series."""

    title: str
    x_label: str
    y_label: str
    log_y: bool
    series: list[Series]
    note: str


@dataclass
class Run:
    path: Path
    config: dict[str, Any]
    train: Columns
    validation: Columns
    evaluation: Evaluation | None = None
    examples: Columns | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def place(self) -> str:
        """The folder's name for a command: as given, but without an absolute path of this machine."""
        return self.name if self.path.is_absolute() else str(self.path)

    @property
    def metric(self) -> str:
        """ "accuracy" or "mse": from config.json, else from the evaluation or the loss."""
        if self.config.get("metric"):
            return str(self.config["metric"])
        if self.evaluation is not None:
            return self.evaluation.metric
        return "mse" if self.config.get("loss") == "mse" else "accuracy"

    @property
    def last_step(self) -> int:
        steps = self.train["step"]
        return int(steps[-1]) if len(steps) else 0

    @property
    def elapsed_s(self) -> float:
        """Seconds of training; nan if not logged. Parts of a resumed run are added."""
        clock = self.train.get("elapsed_s", np.zeros(0))
        clock = clock[np.isfinite(clock)]
        if not len(clock):
            return math.nan
        restarts = np.flatnonzero(np.diff(clock) < 0)
        return float(clock[restarts].sum() + clock[-1])

    @property
    def finished(self) -> bool:
        """Whether training reached its last outer step or its time limit. A run with neither counts as finished."""
        wanted, limit = self.config.get("steps"), self.config.get("time_limit")
        if (
            isinstance(limit, (int, float)) and self.elapsed_s >= 0.97 * limit
        ):  # the last row may be some steps before the end
            return True
        return not isinstance(wanted, int) or self.last_step >= wanted


class _Unusable(Exception):
    """Why an optional file cannot be shown. Becomes a note."""


def read(run_dir: str | Path) -> Run:
    """Reads a run folder. Raises ValueError, in one sentence, if config.json or metrics.jsonl is missing or no JSON."""
    path = Path(run_dir)
    if not path.is_dir():
        raise ValueError(
            f"there is no run folder {path}; give the folder that `fastmaml train` wrote, for example runs/glyphs"
        )
    config = _required_json(path / "config.json")
    notes: list[str] = []
    train, validation = _metrics(path / "metrics.jsonl", notes)
    run = Run(path, config, train, validation, notes=notes)
    evaluation = _optional(path / "evaluation.json", _read_evaluation, notes)
    examples = _optional(path / "examples.npz", _read_examples, notes)
    run.evaluation, run.examples = evaluation, examples
    run.comparisons = _optional(path / "comparison.json", _read_comparisons, notes) or []
    return run


def _required_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}, so it is not a run folder of `fastmaml train`")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _optional(path: Path, reader: Any, notes: list[str]) -> Any:
    """The result of `reader`. None if there is no file; None and a note if the file is unusable."""
    if not path.is_file():
        return None
    try:
        return reader(path)
    except (json.JSONDecodeError, UnicodeDecodeError, zipfile.BadZipFile, EOFError) as error:
        notes.append(f"{path.name} is unreadable ({error}), so this page does not use it.")
    except _Unusable as error:
        notes.append(f"{path.name} is not usable: {error}. This page does not use it.")
    return None


# ---------------------------------------------------------------- metrics.jsonl


def _metrics(path: Path, notes: list[str]) -> tuple[Columns, Columns]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: no outer step was logged, so there is nothing to report")
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    rows: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "validation": {}}
    broken: list[int] = []
    repeated = 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            kind, step = rows[row["kind"]], int(row["step"])
        except (ValueError, KeyError, TypeError):
            broken.append(number)
            continue
        repeated += step in kind
        kind[step] = row  # a resumed run logs some steps again; the later line counts
    if broken and broken[-1] == len(lines):
        notes.append("The last line of metrics.jsonl is half-written and was skipped.")
        broken = broken[:-1]
    if broken:
        notes.append(f"metrics.jsonl: {_count(len(broken), 'unreadable line')} skipped, the first is line {broken[0]}.")
    if repeated:
        notes.append(
            f"metrics.jsonl: {_count(repeated, 'row')} logged twice, as after a resume. The later row is shown."
        )
    train, validation = _columns(rows["train"]), _columns(rows["validation"])
    lost = int(np.sum(~np.isfinite(train.get("loss", np.zeros(0)))))
    if lost:
        notes.append(f"metrics.jsonl: {_count(lost, 'training row')} without a finite loss, left out of the curves.")
    return train, validation


def _columns(rows: dict[int, dict[str, Any]]) -> Columns:
    steps = sorted(rows)
    keys = {key for row in rows.values() for key in row} - {"kind", "step"}
    columns: Columns = {"step": np.array(steps, dtype=np.int64)}
    for key in sorted(keys):
        columns[key] = np.array([_number(rows[step].get(key)) for step in steps], dtype=np.float64)
    return columns


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}{'' if n == 1 else 's'}"


# ---------------------------------------------------------------- evaluation.json


def _read_evaluation(path: Path) -> Evaluation:
    value = json.loads(path.read_text(encoding="utf-8"))
    _need(isinstance(value, dict), "it is not an object")
    for key in ("metric", "inner_steps", "tables"):
        _need(key in value, f"it has no {key!r}")
    steps = value["inner_steps"]
    _need(isinstance(steps, list) and len(steps) > 0, "inner_steps is not a list of step counts")
    tables = [
        Table(table.get("shots"), [_row(row, len(steps)) for row in table.get("rows", [])]) for table in value["tables"]
    ]
    _need(any(table.rows for table in tables), "it has no rows")
    facts = {key: item for key, item in value.items() if key not in ("metric", "inner_steps", "tables")}
    return Evaluation(str(value["metric"]), [int(step) for step in steps], tables, facts)


def _row(row: dict[str, Any], steps: int) -> Row:
    name = str(row.get("name", "unnamed row"))
    columns = []
    for key in ("mean", "ci95", "median"):
        values = np.atleast_1d(np.array([_number(v) for v in _listed(row.get(key, math.nan))], dtype=np.float64))
        columns.append(values)
    mean = columns[0]
    _need(len(mean) in (1, steps), f"row {name!r} has {len(mean)} means for {steps} inner step counts")
    # A row may lack an interval or a median.
    ci95, median = (c if len(c) == len(mean) else np.full(len(mean), math.nan) for c in columns[1:])
    return Row(name, str(row.get("kind", "baseline")), mean, ci95, median)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _need(truth: bool, reason: str) -> None:
    if not truth:
        raise _Unusable(reason)


# ---------------------------------------------------------------- examples.npz


_IMAGE_KEYS = ("support_x", "support_y", "query_x", "query_y", "predictions_before", "predictions_after")
_CURVE_KEYS = ("support_x", "support_y", "grid_x", "true_y", "curves")


def _read_examples(path: Path) -> Columns:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, OSError) as error:
        raise _Unusable(str(error).splitlines()[0].rstrip(".")) from error
    wanted = _CURVE_KEYS if "curves" in arrays else _IMAGE_KEYS
    missing = [key for key in wanted if key not in arrays]
    _need(not missing, f"it has no {', '.join(missing)}")
    tasks = {len(arrays[key]) for key in wanted if key != "grid_x"}
    _need(len(tasks) == 1, f"its arrays disagree about the number of tasks: {sorted(tasks)}")
    need = _need_curves if "curves" in arrays else _need_images
    need(arrays, {key: list(array.shape) for key, array in arrays.items()})
    return arrays


def _need_curves(arrays: Columns, shape: dict[str, list[int]]) -> None:
    points = arrays["grid_x"].size
    fits = len(shape["curves"]) == 3 and shape["curves"][2] == points and arrays["true_y"][0].size == points
    _need(fits, f"curves {shape['curves']} and true_y {shape['true_y']} do not fit grid_x {shape['grid_x']}")
    same = arrays["support_x"].size == arrays["support_y"].size
    _need(same, f"support_x {shape['support_x']} and support_y {shape['support_y']} differ in size")


def _need_images(arrays: Columns, shape: dict[str, list[int]]) -> None:
    for part, labels in (("support", ["support_y"]), ("query", ["query_y", "predictions_before", "predictions_after"])):
        name = f"{part}_x"
        _need(len(shape[name]) == 5, f"{name} {shape[name]} is not [tasks, examples, C, H, W]")
        for key in labels:
            _need(shape[key] == shape[name][:2], f"{key} {shape[key]} does not fit {name} {shape[name]}")
    sure = shape.get("probabilities_after", shape["query_y"])
    _need(sure[:2] == shape["query_y"], f"probabilities_after {sure} does not fit query_y {shape['query_y']}")


# ---------------------------------------------------------------- comparison.json


def _read_comparisons(path: Path) -> list[Comparison]:
    """One block or a list of blocks. Each block is drawn as its series, and their distance from the first series:

    {"title": "Training loss, float32", "x_label": "outer step", "y_label": "loss", "log_y": false,
     "series": [{"name": "autodiff", "x": [0, 1, ...], "y": [1.61, 1.60, ...]},
                {"name": "cpu", ...}, {"name": "autodiff, start moved by 1e-7", ...}],
     "note": "What to see here, in a sentence or two."}
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    return [_comparison(block, f"block {i}") for i, block in enumerate(_listed(value), start=1)]


def _comparison(block: Any, where: str) -> Comparison:
    _need(isinstance(block, dict) and isinstance(block.get("series"), list), f"{where} has no list of series")
    _need(len(block["series"]) > 0, f"{where} has no series")
    series: list[Series] = []
    for item in block["series"]:
        name = str(item.get("name", f"series {len(series) + 1}"))
        x = np.array([_number(v) for v in item.get("x", [])], dtype=np.float64)
        y = np.array([_number(v) for v in item.get("y", [])], dtype=np.float64)
        _need(len(x) == len(y) and len(x) > 0, f"{where}, series {name!r}, has {len(x)} x and {len(y)} y")
        series.append(Series(name, x, y))
    text = {key: str(block.get(key, default)) for key, default in _COMPARISON_TEXT.items()}
    return Comparison(
        text["title"], text["x_label"], text["y_label"], bool(block.get("log_y", False)), series, text["note"]
    )


_COMPARISON_TEXT = {"title": "Comparison", "x_label": "outer step", "y_label": "loss", "note": ""}
