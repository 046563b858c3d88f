# Numbers as text: the evaluation table, lists of facts, and values with their intervals.
from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import Any

from .plots import grouped
from .run_folder import Evaluation, Row, Table

MINUS, TIMES, NBSP = "\u2212", "\u00d7", "\u00a0"


def number(value: Any) -> str:
    """A number as readable text: 0.001, 12 000, 1e-07. Other values are unchanged."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return grouped(value) if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(number(item) for item in value)
    return str(value)


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.1f}{NBSP}s" if seconds < 10 else f"{seconds:.0f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min" + (f" {rest:02d}{NBSP}s" if rest and minutes < 10 else "")
    return f"{minutes // 60}{NBSP}h {minutes % 60:02d}{NBSP}min"


def rate(value: float) -> str:
    """A rate with three significant digits and grouped thousands."""
    if not math.isfinite(value):
        return "–"
    return grouped(value) if value >= 100 else f"{value:.3g}"


def measure(metric: str, value: float, half: float = math.nan) -> tuple[str, str]:
    """Value and half width, rounded to the digits that the half width supports. Accuracy in %: ("97.31", "0.22")."""
    if metric == "accuracy":
        value, half = 100 * value, 100 * half
    if not math.isfinite(value):
        return "diverged", ""
    if metric == "accuracy" and not math.isfinite(half):
        return f"{value:.1f}", ""
    scale = half if math.isfinite(half) and half > 0 else 0.01 * abs(value)
    digits = 2 if scale == 0 else min(6, max(0, 1 - math.floor(math.log10(scale))))
    if metric == "accuracy":
        digits = min(2, max(1, digits))
    elif abs(value) < 100:
        digits = max(digits, 2)
    return f"{value:.{digits}f}", f"{half:.{digits}f}" if math.isfinite(half) else ""


def with_interval(metric: str, value: float, half: float = math.nan) -> str:
    """ "97.31 ± 0.22 %" in one line of text."""
    mean, pm = measure(metric, value, half)
    return mean + (f" ± {pm}" if pm else "") + (" %" if metric == "accuracy" and math.isfinite(value) else "")


# ---------------------------------------------------------------- the evaluation table


def evaluation_table(evaluation: Evaluation, steps: list[int], trained_with: int | None, median: bool = False) -> str:
    """A row per predictor and a column for each of `steps`. The column of `trained_with` steps is tinted."""
    columns = [i for i, k in enumerate(evaluation.inner_steps) if k in steps]
    tinted = [" class='as-trained'" if evaluation.inner_steps[i] == trained_with else "" for i in columns]
    head = "".join(
        f"<th scope='col'{tint}>{evaluation.inner_steps[i]}</th>" for i, tint in zip(columns, tinted, strict=True)
    )
    quantity = "median" if median else "mean"
    unit = f"{quantity} accuracy, %" if evaluation.metric == "accuracy" else f"{quantity} MSE"
    body = []
    for table in evaluation.tables:
        if len(evaluation.tables) > 1:
            body.append(
                f"<tr class='group'><th colspan='{len(columns) + 1}' scope='rowgroup'>{_shots(table)}</th></tr>"
            )
        for row in table.rows:
            cells = _cells(evaluation.metric, row, columns, tinted, median)
            body.append(f"<tr class='{escape(row.kind)}'><th scope='row'>{escape(row.name)}</th>{cells}</tr>")
    return (
        f"<div class='scroll'><table><thead><tr><th scope='col'>{unit} after … inner steps</th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _shots(table: Table) -> str:
    return f"{table.shots} support points" if table.shots != 1 else "1 support point"


def _cells(metric: str, row: Row, columns: list[int], tinted: list[str], median: bool) -> str:
    def cell(index: int) -> str:
        if median:
            return measure(metric, float(row.median[index]))[0]
        mean, pm = measure(metric, *row.at(index))
        return mean + (f"<span class='pm'>± {pm}</span>" if pm else "")

    if row.adapts:
        return "".join(f"<td{tint}>{cell(i)}</td>" for i, tint in zip(columns, tinted, strict=True))
    return f"<td class='spans' colspan='{len(columns)}'>{cell(0)} <span class='pm'>(has no inner steps)</span></td>"


# ---------------------------------------------------------------- lists of facts


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """A list of name and value, without those whose value is None."""
    rows = (f"<div><dt>{escape(name)}</dt><dd>{escape(number(v))}</dd></div>" for name, v in pairs if v is not None)
    return f"<dl class='facts'>{''.join(rows)}</dl>"


def config_cards(config: dict[str, Any]) -> str:
    """The settings of config.json by topic: the task, the network, the two loops, the engine."""
    model = config.get("model") or {}
    if not isinstance(model, dict):
        model = {"name": model}
    options = config.get("options")
    options = options if isinstance(options, dict) else {}
    known: dict[str, list[tuple[str, Any]]] = {
        "Task": [
            ("data", config.get("dataset")),
            ("ways", config.get("ways")),
            ("shots", config.get("shots")),
            ("shots in training", config.get("train_shots")),
            (
                "query examples per task" if not config.get("ways") else "query examples per class",
                config.get("query_shots"),
            ),
        ],
        "Network": [(key.replace("_", " "), value) for key, value in model.items() if _plain(value)]
        + [("batch norm", config.get("batch_norm")), ("loss", config.get("loss"))],
        "Inner loop": [
            ("algorithm", config.get("algorithm")),
            ("steps", config.get("inner_steps")),
            ("learning rate", config.get("inner_lr")),
            *((key.replace("_", " "), _in_words(value)) for key, value in options.items()),
        ],
        "Outer loop": [
            ("steps", config.get("steps")),
            ("tasks a step", config.get("meta_batch")),
            ("learning rate", config.get("outer_lr")),
            ("schedule", config.get("schedule")),
            ("learning rate at the end", config.get("outer_lr_min") or None),
            ("gradient clipped at", config.get("clip_grad")),
            ("checkpoints that answer", None if config.get("ensemble") == 1 else config.get("ensemble")),
            ("time limit, s", config.get("time_limit")),
            ("seed", config.get("seed")),
        ],
    }
    cards = [
        f"<div><h3>{title}</h3>{facts(pairs)}</div>"
        for title, pairs in known.items()
        if any(v is not None for _, v in pairs)
    ]
    return f"<div class='cards'>{''.join(cards)}</div>"


def _in_words(value: Any) -> Any:
    """A mapping as text: adam, betas 0, 0.999."""
    if not isinstance(value, dict):
        return value
    return ", ".join(number(part) if key == "name" else f"{key} {number(part)}" for key, part in value.items())


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) or (
        isinstance(value, list) and all(isinstance(v, (str, int, float)) for v in value)
    )
