# The plots of a report as inline SVGs. They use the page's fonts and CSS variables as colours, so one picture serves
# light, dark and print. The draw_* functions also take plain colours, for picture.py.
from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from .run_folder import Columns, Comparison, Evaluation, Row, Table
from .style import THEMED

Colours = dict[str, str]
POINTS_DRAWN = 400  # longer series are drawn in so many bins: the mean as a line, the range behind


@dataclass(frozen=True)
class Mark:
    """The look of one series in the plot and the legend: a role of style.py, a dash pattern, a marker."""

    label: str
    role: str
    dashes: str = "-"  # matplotlib's names: "-", "--", "-.", ":" or "" for no line
    marker: str = ""  # "o", "s", "D", "*" or ""
    band: bool = False


AFTER = Mark("after adaptation", "learner")
BEFORE = Mark("before adaptation", "plain", "--")
VALIDATION = Mark("validation tasks, 95 % interval", "ink", "", "o")
VALIDATION_LOSS = Mark("validation tasks", "ink", "", "o")
BEST = Mark("best checkpoint", "random", "", "*")
CHANCE = Mark("chance", "muted", ":")
TRUTH = Mark("true function", "muted", "--")
SUPPORT = Mark("support points", "ink", "", "o")
_SERIES_MARKS = (("learner", "-"), ("random", "--"), ("plain", "-."), ("early", ":"))


# ---------------------------------------------------------------- the canvas


@contextmanager
def drawing(colours: Colours, font_size: float = 10.0, **more: Any) -> Iterator[Any]:
    """matplotlib's Figure class, with this report's settings. Raises ImportError, with advice, without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the report needs matplotlib: pip install 'fastmaml[report]'") from error
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fastmaml",
        "font.family": "DejaVu Sans",
        "font.size": font_size,
        "axes.titlesize": font_size,
        "axes.labelsize": font_size,
        "xtick.labelsize": font_size * 0.94,
        "ytick.labelsize": font_size * 0.94,
        "text.color": colours["ink"],
        "axes.labelcolor": colours["muted"],
        "axes.titlecolor": colours["muted"],
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "axes.edgecolor": colours["rule"],
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": colours["grid"],
        "grid.linewidth": 0.9,
        "axes.axisbelow": True,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "xtick.major.size": 3.5,
        "xtick.minor.size": 0.0,
        "ytick.major.size": 0.0,
        "ytick.minor.size": 0.0,
        "axes.titlelocation": "left",
        "axes.titlepad": 8.0,
        "axes.unicode_minus": True,
        "text.parse_math": False,
        "lines.solid_capstyle": "round",
        "lines.linewidth": 1.8,
        "path.simplify_threshold": 0.25,
        **more,
    }
    with rc_context(settings):
        yield Figure


def inline_svg(figure: Any, label: str) -> str:
    """The figure as an <svg> element for the page, with fluid width, theme colours and unique ids."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for role, value in THEMED.items():
        text = text.replace(value, f"var(--{role})")
    own = "f" + hashlib.sha256((label + text).encode()).hexdigest()[:8]
    text = re.sub(r'\bid="([^"]+)"', rf'id="{own}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{own}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{own}-\1"', text)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None  # matplotlib always writes one
    body = re.sub(r"\n\s*", "\n", body)
    return f'<svg {box.group()} role="img" aria-label="{escape(label)}">{body.strip()}'


def swatch(mark: Mark) -> str:
    """The 28 x 12 sample of a mark for a legend."""
    colour = f"var(--{mark.role})"
    dash = {"--": "6 3.5", "-.": "7 3 1.5 3", ":": "1.5 3.5"}.get(mark.dashes, "")
    parts = []
    if mark.band:
        parts.append(f'<rect x="0" y="1" width="28" height="10" fill="{colour}" opacity="0.2"/>')
    if mark.dashes:
        parts.append(f'<path d="M1 6H27" stroke="{colour}" stroke-width="2.2" stroke-dasharray="{dash}" fill="none"/>')
    shape = {
        "o": '<circle cx="14" cy="6" r="3.6" {}/>',
        "s": '<rect x="10.6" y="2.6" width="6.8" height="6.8" {}/>',
        "D": '<path d="M14 1.6L18.4 6L14 10.4L9.6 6Z" {}/>',
        "*": '<path d="M14 .2l1.6 3.7 4 .4-3 2.7.9 4L14 8.9 10.5 11l.9-4-3-2.7 4-.4z" {}/>',
    }.get(mark.marker)
    if shape:
        parts.append(shape.format(f'fill="{colour}"'))
    return f'<svg viewBox="0 0 28 12" aria-hidden="true">{"".join(parts)}</svg>'


def grouped(value: float) -> str:
    """A number with thin spaces between thousands: 12 000."""
    return f"{value:,.0f}".replace(",", "\u2009")


def decade(value: float, _position: Any = None) -> str:
    """A label of a logarithmic axis as plain text: 0.01, 1, 10⁻⁷."""
    if value <= 0:
        return ""
    exponent = math.log10(value)
    if -3.001 < exponent < 4.001:
        return f"{value:g}"
    power = str(round(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    factor = value / 10 ** round(exponent)
    return f"10{power}" if abs(factor - 1) < 0.01 else ""


def _tidy_x(axes: Any, label: str, whole: bool = True) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel(label)
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: grouped(v)))


def _log_y(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    span = math.log10(high / low)
    subs = (1.0,) if span > 2.2 else (1.0, 2.0, 5.0) if span > 0.8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(decade))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _percent(axes: Any, top: float = 103.0) -> None:
    axes.set_ylim(0, top)
    axes.set_yticks([0, 20, 40, 60, 80, 100])


# ---------------------------------------------------------------- learning curves


@dataclass(frozen=True)
class Smoothed:
    """A noisy series for drawing: at most POINTS_DRAWN places x, with the moving average and the raw range."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    window: int  # logged steps under one point of the mean


def smoothed(x: np.ndarray, y: np.ndarray, share: float = 0.03) -> Smoothed:
    """Centred moving average of y [n] over `share` of its length (at least 5 points if n >= 15), narrower at the ends."""
    keep = np.isfinite(y)
    x, y = np.asarray(x)[keep].astype(float), np.asarray(y)[keep].astype(float)
    n = len(y)
    half = 0 if n < 15 else max(2, round(share * n / 2))
    index = np.arange(n)
    # Near the ends the window stays symmetric, so the curve does not lag. It shrinks to a quarter, to avoid noise.
    reach = np.maximum(np.minimum(half, np.minimum(index, n - 1 - index)), half // 4)
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, n)
    total = np.concatenate([[0.0], np.cumsum(y)])
    mean = (total[last] - total[first]) / (last - first)
    if n <= POINTS_DRAWN:
        return Smoothed(x, mean, y, y, 2 * half + 1)
    edges = np.linspace(0, n, POINTS_DRAWN + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, n))
    low, high = np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)
    centre = np.add.reduceat(x, edges) / sizes
    return Smoothed(centre, np.interp(centre, x, mean), low, high, 2 * half + 1)


def draw_smoothed(axes: Any, colours: Colours, mark: Mark, x: np.ndarray, y: np.ndarray) -> Smoothed | None:
    curve = smoothed(x, y)
    if not len(curve.x):
        return None
    colour = colours[mark.role]
    if np.array_equal(curve.low, curve.high):
        axes.plot(curve.x, curve.low, color=colour, alpha=0.22, linewidth=0.8)
    else:
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(curve.x, curve.mean, color=colour, linestyle=mark.dashes, linewidth=2.0)
    return curve


def best_index(validation: Columns, lower_is_better: bool) -> int | None:
    """The row of the best checkpoint: the last row marked as best, else the row with the best value."""
    values = validation.get("metric_after")
    if values is None or not np.isfinite(values).any():
        return None
    marked = np.flatnonzero(validation.get("best", np.zeros(len(values))) == 1)
    if len(marked):
        return int(marked[-1])
    return int(np.nanargmin(values) if lower_is_better else np.nanargmax(values))


def loss_curves(train: Columns, validation: Columns, loss: str, inner_steps: int | None) -> tuple[str, list[Mark]]:
    """Query loss after adaptation and support loss at the last inner step, against the outer step.

    The validation loss is drawn as points.
    """
    marks: list[Mark] = []
    when = "before adaptation" if inner_steps == 1 else "before the last inner step"
    with drawing(THEMED) as Figure:
        figure, axes = _figure(Figure, (5.0, 3.15), _LOSS_LABELS.get(loss, "loss per example"))
        support_loss = Mark(f"support loss {when}", "plain", "--")
        for key, mark in (("loss", Mark("query loss after adaptation", "learner")), ("support_loss", support_loss)):
            if key in train and draw_smoothed(axes, THEMED, mark, train["step"], train[key]) is not None:
                marks.append(mark)
        if np.isfinite(validation.get("loss", np.zeros(0))).any():
            axes.plot(validation["step"], validation["loss"], "o", color=THEMED["ink"], markersize=3.6, zorder=4)
            marks.append(VALIDATION_LOSS)
        _tidy_x(axes, "outer step")
        if loss == "mse":
            _log_y(axes)
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        return inline_svg(figure, "loss against outer step"), marks


_LOSS_LABELS = {"mse": "MSE per example, log scale", "cross_entropy": "cross-entropy per example, nats"}


def metric_curves(train: Columns, validation: Columns, metric: str) -> tuple[str, list[Mark]]:
    """The metric on query examples before and after adaptation, against the outer step, with validation as points."""
    marks: list[Mark] = []
    scale = 100.0 if metric == "accuracy" else 1.0
    with drawing(THEMED) as Figure:
        figure, axes = _figure(Figure, (5.0, 3.15), metric_label(metric))
        for key, mark in (("metric_before", BEFORE), ("metric_after", AFTER)):
            if key in train and draw_smoothed(axes, THEMED, mark, train["step"], scale * train[key]) is not None:
                marks.append(mark)
        best = best_index(validation, metric != "accuracy")
        if best is not None:
            x, y = validation["step"], scale * validation["metric_after"]
            error = scale * np.nan_to_num(validation.get("ci95", np.zeros(len(y))))
            if metric != "accuracy":
                error = np.minimum(error, 0.95 * y)  # a log axis cannot show an interval that reaches zero
            ink = THEMED["ink"]
            axes.errorbar(x, y, error, fmt="o", color=ink, markersize=3.6, elinewidth=1.1, capsize=0, zorder=4)
            axes.plot(x[best], y[best], "*", color=THEMED["random"], markersize=12, zorder=5, markeredgewidth=0)
            marks += [VALIDATION, BEST]
        _tidy_x(axes, "outer step")
        if metric == "accuracy":
            _percent(axes)
        else:
            _log_y(axes)
        order = {AFTER: 0, BEFORE: 1}
        return inline_svg(figure, f"{metric} against outer step"), sorted(marks, key=lambda m: order.get(m, 2))


def metric_label(metric: str) -> str:
    return "accuracy on query examples, %" if metric == "accuracy" else "MSE on query examples, log scale"


def speed_curve(train: Columns) -> str:
    """Outer steps per second during the run."""
    with drawing(THEMED) as Figure:
        figure, axes = _figure(Figure, (5.0, 2.1), "outer steps per second")
        draw_smoothed(axes, THEMED, AFTER, train["step"], train["steps_per_second"])
        axes.set_ylim(bottom=0)
        _tidy_x(axes, "outer step")
        return inline_svg(figure, "outer steps per second against outer step")


def _figure(Figure: Any, size: tuple[float, float], title: str) -> tuple[Any, Any]:
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.03)
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


# ---------------------------------------------------------------- accuracy or MSE against inner steps


def row_marks(table: Table) -> list[tuple[Row, Mark]]:
    """Each row of the table with its look: the learner, then other rows that adapt, then rows that do not."""
    looks: list[tuple[Row, Mark]] = []
    adapting = [("random", "--", "s"), ("early", ":", "D")]
    for row in sorted(table.rows, key=lambda r: (r.kind != "learner", not r.adapts)):
        if row.kind == "learner":
            look = ("learner", "-", "o")
        elif row.adapts and adapting:
            look = adapting.pop(0)
        else:
            look = ("plain", "-.", "")
        looks.append((row, Mark(row.name, *look, band=True)))
    return looks


def draw_inner_steps(axes: Any, colours: Colours, evaluation: Evaluation, table: Table, chance: float | None) -> None:
    """Draws every row of the table against the number of inner steps, with its 95 % band."""
    scale = 100.0 if evaluation.metric == "accuracy" else 1.0
    steps = np.array(evaluation.inner_steps, dtype=float)
    ends = np.array([steps[0], steps[-1]])
    for row, mark in row_marks(table)[::-1]:
        x = steps if row.adapts else ends
        mean = scale * (row.mean if row.adapts else np.repeat(row.mean, 2))
        half = scale * np.nan_to_num(row.ci95 if row.adapts else np.repeat(row.ci95, 2))
        low = mean - half
        if evaluation.metric != "accuracy":
            low = np.maximum(low, 0.05 * mean)
        colour = colours[mark.role]
        axes.fill_between(x, low, mean + half, color=colour, alpha=0.2, linewidth=0)
        axes.plot(
            x, mean, color=colour, linestyle=mark.dashes, marker=mark.marker or None, markersize=4.4, linewidth=2.0
        )
    if chance is not None:
        axes.plot(ends, [scale * chance] * 2, color=colours["muted"], linestyle=":", linewidth=1.3)
    axes.set_xlim(steps[0] - 0.02 * np.ptp(steps), steps[-1] + 0.02 * np.ptp(steps))
    _tidy_x(axes, "inner steps")
    if np.ptp(steps) <= 10:
        axes.set_xticks(steps[:: 1 if len(steps) <= 6 else 2])
    if evaluation.metric == "accuracy":
        _percent(axes)
    else:
        _log_y(axes)


def inner_steps_plots(evaluation: Evaluation, chance: float | None) -> tuple[list[str], list[Mark]]:
    """One plot per table (number of shots), all with the same y axis."""
    several = len(evaluation.tables) > 1
    plots = []
    limits = _metric_limits(evaluation)
    for table in evaluation.tables:
        title = metric_label(evaluation.metric)
        if several:
            title = (
                f"{table.shots} shots: MSE, log scale"
                if evaluation.metric == "mse"
                else f"{table.shots} shots: accuracy, %"
            )
        with drawing(THEMED) as Figure:
            figure, axes = _figure(Figure, (3.6, 2.9) if several else (5.6, 3.4), title)
            if evaluation.metric != "accuracy":
                axes.set_ylim(limits)
            draw_inner_steps(axes, THEMED, evaluation, table, chance)
            plots.append(inline_svg(figure, f"{title} against inner steps"))
    marks = [mark for _, mark in row_marks(evaluation.tables[0])]
    return plots, marks + ([CHANCE] if chance is not None else [])


def _metric_limits(evaluation: Evaluation) -> tuple[float, float]:
    values = np.concatenate([row.mean for table in evaluation.tables for row in table.rows])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return 0.1, 10.0
    return float(values.min()) / 1.6, float(values.max()) * 1.5


# ---------------------------------------------------------------- sinusoid: fitted curves


def curve_steps(curves: np.ndarray) -> list[int]:
    """The numbers of inner steps drawn together, 0, 1 and the last, for curves [tasks, steps + 1, grid]."""
    return sorted({0, min(1, curves.shape[1] - 1), curves.shape[1] - 1})


def curve_marks(curves: np.ndarray) -> list[Mark]:
    looks = {0: ("plain", ":"), 1: ("early", "-."), curves.shape[1] - 1: ("learner", "-")}
    names = {0: "before adaptation", 1: "after 1 inner step"}
    return [Mark(names.get(k, f"after {k} inner steps"), *looks[k]) for k in curve_steps(curves)]


def draw_fit(axes: Any, colours: Colours, examples: Columns, task: int, steps: Sequence[int]) -> None:
    """Draws one task: the true function, the support points and the network's curve after each of `steps`."""
    grid = examples["grid_x"].reshape(-1)
    axes.plot(
        grid,
        examples["true_y"][task].reshape(-1),
        color=colours["muted"],
        linestyle=(0, (5, 2.5)),
        linewidth=1.3,
        zorder=2,
    )
    for k, mark in zip(curve_steps(examples["curves"]), curve_marks(examples["curves"]), strict=True):
        if k in steps:
            curve = examples["curves"][task, k]
            axes.plot(
                grid, curve, color=colours[mark.role], linestyle=mark.dashes, linewidth=1.9, zorder=3, gid=f"still-{k}"
            )
    x, y = examples["support_x"][task].reshape(-1), examples["support_y"][task].reshape(-1)
    axes.plot(
        x, y, "o", color=colours["ink"], markersize=4.6, zorder=5, markeredgecolor=colours["paper"], markeredgewidth=0.9
    )
    _tidy_x(axes, "x", whole=False)
    reach = 1.06 * max(1.0, float(np.max(np.abs(examples["true_y"]))))
    axes.set_ylim(-reach, reach)


def fit_plots(examples: Columns, most: int = 6) -> list[str]:
    """One plot for each of the first tasks, with the curves of curve_steps.

    For the page's slider it also holds every step's curve under the id "...-play-K", hidden by the style sheet.
    """
    plots = []
    curves, grid = examples["curves"], examples["grid_x"].reshape(-1)
    for task in range(min(most, len(curves))):
        with drawing(THEMED, font_size=9.5) as Figure:
            figure, axes = _figure(Figure, (3.6, 2.6), f"task {task + 1}: y")
            draw_fit(axes, THEMED, examples, task, curve_steps(curves))
            for k in range(curves.shape[1]):
                axes.plot(grid, curves[task, k], color=THEMED["learner"], linewidth=2.2, zorder=4, gid=f"play-{k}")
            plots.append(inline_svg(figure, f"task {task + 1}: fitted curves"))
    return plots


# ---------------------------------------------------------------- comparisons


def comparison_marks(block: Comparison) -> list[Mark]:
    return [Mark(s.name, *_SERIES_MARKS[i % len(_SERIES_MARKS)]) for i, s in enumerate(block.series)]


def comparison_plots(block: Comparison) -> list[tuple[str, list[Mark]]]:
    """One plot of all series. With two or more, also a plot of their distance from the first, on a log scale."""
    marks = comparison_marks(block)
    with drawing(THEMED) as Figure:
        figure, axes = _figure(Figure, (5.0, 3.15), block.y_label + (", log scale" if block.log_y else ""))
        for series, mark in zip(block.series, marks, strict=True):
            axes.plot(series.x, series.y, color=THEMED[mark.role], linestyle=mark.dashes, linewidth=1.9)
        _tidy_x(axes, block.x_label)
        if block.log_y:
            _log_y(axes)
        plots = [(inline_svg(figure, f"{block.title}: {block.y_label}"), marks)]
    apart = [(*distance(block.series[0], s), mark) for s, mark in zip(block.series[1:], marks[1:], strict=True)]
    apart = [(x, d, mark) for x, d, mark in apart if (d > 0).any()]
    if apart:
        with drawing(THEMED) as Figure:
            figure, axes = _figure(Figure, (5.0, 3.15), f"distance from {block.series[0].name}, log scale")
            for x, d, mark in apart:
                gaps = np.where(d > 0, d, np.nan)
                look = {"linestyle": mark.dashes, "linewidth": 1.6, "color": THEMED[mark.role]}
                axes.plot(x, gaps, marker="o" if len(x) <= 60 else None, markersize=2.8, **look)
            _tidy_x(axes, block.x_label)
            _log_y(axes)
            plots.append((inline_svg(figure, f"{block.title}: distance"), [mark for *_, mark in apart]))
    return plots


def distance(first: Any, other: Any) -> tuple[np.ndarray, np.ndarray]:
    """|other - first| at every x of both series."""
    x, i, j = np.intersect1d(first.x, other.x, return_indices=True)
    return x, np.abs(other.y[j] - first.y[i])


def legend(marks: Iterable[Mark]) -> str:
    items = "".join(f"<li>{swatch(mark)}{escape(mark.label)}</li>" for mark in marks)
    return f'<ul class="legend">{items}</ul>'
