# One picture of a result for a README. Left: a task (support, then answers or curves). Right: all tasks.
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from . import examples as image_tasks
from . import page, plots
from .run_folder import Evaluation, Run
from .style import DARK, LIGHT

SIZE = (10.4, 4.0)  # inches


def write(run: Run, path: Path, theme: str = "light") -> Path:
    """Draws the picture. The suffix chooses PNG (at 2x) or SVG. Raises ValueError if the run folder lacks the data."""
    if theme not in ("light", "dark"):
        raise ValueError(f"theme {theme!r} is not 'light' or 'dark'")
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"a picture is written as .png or .svg, not as {path.name!r}")
    if run.evaluation is None or run.examples is None:
        missing = "evaluation.json" if run.evaluation is None else "examples.npz"
        raise ValueError(f"{run.path} has no usable {missing}, which the picture needs; run `fastmaml evaluate` first")
    colours = dict(LIGHT if theme == "light" else DARK)
    # Text as paths in the SVG, because a README's viewer may lack the fonts.
    with plots.drawing(colours, font_size=10.0, **{"svg.fonttype": "path"}) as Figure:
        figure = Figure(figsize=SIZE, facecolor=colours["paper"])
        _right(figure, run, run.evaluation, colours)
        if "curves" in run.examples:
            _left_curves(figure, run.examples, colours)
        else:
            _left_pictures(figure, run, run.evaluation, colours)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=200, facecolor=colours["paper"], metadata=metadata)
    return path


def _right(figure: Any, run: Run, evaluation: Evaluation, colours: plots.Colours) -> None:
    """Accuracy or MSE against inner steps, each line named at its end."""
    axes = figure.add_axes((0.60, 0.15, 0.225, 0.66))
    table = page.main_table(run, evaluation)
    ways = page._ways(run)
    plots.draw_inner_steps(axes, colours, evaluation, table, 1 / ways if ways else None)
    tasks = f"{evaluation.facts['tasks']} unseen tasks" if "tasks" in evaluation.facts else "unseen tasks"
    unit = "accuracy, %" if evaluation.metric == "accuracy" else "MSE"
    _heading(figure, 0.60, f"{tasks}: {unit}", colours)
    scale = 100.0 if evaluation.metric == "accuracy" else 1.0
    labels = [(scale * row.at(-1)[0], row.name.replace(", ", ",\n"), mark.role) for row, mark in plots.row_marks(table)]
    if ways:
        labels.append((scale / ways, "chance", "muted"))
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((0, value))[1]) for value, *_ in labels]
    for y, (_, name, role) in zip(spread(heights, 0.135), labels, strict=True):
        axes.text(
            1.04,
            y,
            _wrap(name),
            transform=axes.transAxes,
            color=colours[role],
            va="center",
            fontsize=9.3,
            linespacing=1.1,
        )


def spread(heights: list[float], gap: float) -> list[float]:
    """The heights, moved up as little as needed for a distance of at least `gap`, in the same order."""
    order = np.argsort(heights)
    placed = np.array(heights, dtype=float)
    for _ in range(200):
        steps = np.diff(placed[order])
        tight = np.flatnonzero(steps < gap - 1e-9)
        if not len(tight):
            break
        for i in tight:
            push = (gap - (placed[order[i + 1]] - placed[order[i]])) / 2
            placed[order[i]] -= push
            placed[order[i + 1]] += push
    return [float(y) for y in placed]


def _wrap(name: str, width: int = 22) -> str:
    lines = [""]
    for word in name.replace("\n", " ").split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _heading(figure: Any, x: float, text: str, colours: plots.Colours) -> None:
    figure.text(x, 0.93, text, color=colours["ink"], fontsize=11, fontweight="bold", va="center")


def _left_curves(figure: Any, examples: dict[str, np.ndarray], colours: plots.Colours) -> None:
    axes = figure.add_axes((0.045, 0.15, 0.46, 0.66))
    plots.draw_fit(axes, colours, examples, 0, plots.curve_steps(examples["curves"]))
    drawn = np.concatenate([examples["curves"][0].ravel(), examples["true_y"][0].ravel()])
    reach = np.ptp(drawn)
    axes.set_ylim(drawn.min() - 0.42 * reach, drawn.max() + 0.06 * reach)  # room for the legend below
    points = examples["support_x"][0].reshape(-1).size
    _heading(figure, 0.045, f"one unseen sine wave from {points} points", colours)
    marks = [plots.TRUTH, *plots.curve_marks(examples["curves"])]
    handles = [line for line in axes.get_lines() if line.get_linestyle() != "None"]
    axes.legend(
        handles,
        [m.label for m in marks],
        frameon=False,
        ncols=2,
        loc="lower center",
        fontsize=9,
        bbox_to_anchor=(0.5, -0.01),
    )


def _left_pictures(figure: Any, run: Run, evaluation: Evaluation, colours: plots.Colours) -> None:
    """The first task: its support pictures in a row, an arrow, and the first queries of each class with answers."""
    assert run.examples is not None
    task = image_tasks.tasks(run.examples)[0]
    labels = list(task.support)[:6]
    rows = 2
    left, right, top = 0.10, 0.515, 0.815
    width = (right - left) / len(labels)
    height = width * SIZE[0] / SIZE[1]
    side = 0.84
    figure.text(0.015, top - height * side / 2, "support", color=colours["muted"], va="center")
    steps = evaluation.inner_steps[page.trained_index(run, evaluation)]
    _heading(figure, 0.015, f"one unseen task, {page._count(steps, 'inner step')}", colours)
    shots = min(len(task.support[label]) for label in labels)
    below = top - height * side - 0.105
    arrow = {"arrowstyle": "-|>,head_width=0.28,head_length=0.5", "color": colours["learner"], "linewidth": 1.6}
    middle = (left + right - width * (1 - side)) / 2
    figure.text(
        middle + 0.012,
        below + 0.062,
        f"adapt on {page._count(shots, 'picture')} a class",
        color=colours["learner"],
        va="center",
    )
    figure.add_artist(_arrow((middle, below + 0.1), (middle, below + 0.015), arrow, figure))
    figure.text(0.015, below - height * side / 2, "query", color=colours["muted"], va="center")
    for column, label in enumerate(labels):
        x = left + column * width
        name = image_tasks.class_name(label)
        figure.text(x, top + 0.028, name, color=colours["muted"], fontsize=8.6, fontweight="bold", va="center")
        _show(
            figure, (x, top - height * side, width * side, height * side), task.support[label][0], colours, "muted", 1.0
        )
        mine = [a for a in task.answers if a.label == label][:rows]
        for row, answer in enumerate(mine):
            role = "learner" if answer.right else "random"
            y = below - (row + 1) * height * side - row * 0.085
            _show(figure, (x, y, width * side, height * side), answer.picture, colours, role, 1.8)
            sign = "✓" if answer.right else f"✗ {image_tasks.class_name(answer.after)}"
            sure = "" if np.isnan(answer.probability) else f" {100 * answer.probability:.0f} %"
            figure.text(x, y - 0.043, sign + sure, color=colours[role], fontsize=8.6, va="center")


def _arrow(start: tuple[float, float], end: tuple[float, float], look: dict[str, Any], figure: Any) -> Any:
    from matplotlib.patches import FancyArrowPatch

    return FancyArrowPatch(start, end, transform=figure.transFigure, mutation_scale=9, shrinkA=0, shrinkB=0, **look)


def _show(
    figure: Any, box: tuple[float, ...], picture: np.ndarray, colours: plots.Colours, edge: str, weight: float
) -> None:
    axes = figure.add_axes(box)
    if len(picture) == 1:
        from matplotlib.colors import LinearSegmentedColormap

        shades = LinearSegmentedColormap.from_list("ink", [colours["paper"], colours["ink"]])
        axes.imshow(picture[0], cmap=shades, vmin=0, vmax=1, interpolation="nearest")
    else:
        span = float(np.ptp(picture)) or 1.0
        axes.imshow(((picture - picture.min()) / span)[:3].transpose(1, 2, 0), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, color=colours[edge], linewidth=weight)
