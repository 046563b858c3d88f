# The plots show the right numbers: smoothing, best checkpoint, distances, and values with their interval.
from __future__ import annotations

import math

import numpy as np
import pytest

from fastmaml.report import examples, picture, plots, style, tables
from fastmaml.report.run_folder import Evaluation, Row, Series, Table


def test_smoothing_keeps_a_straight_line() -> None:
    x = np.arange(200)
    curve = plots.smoothed(x, 3.0 * x + 1)
    inside = slice(curve.window, -curve.window)
    np.testing.assert_allclose(curve.mean[inside], 3.0 * x[inside] + 1, rtol=1e-12)
    assert curve.window == 7


def test_smoothing_is_the_plain_mean_in_the_middle() -> None:
    y = np.random.default_rng(0).standard_normal(101)
    curve = plots.smoothed(np.arange(101), y, share=0.1)
    assert curve.window == 11
    assert curve.mean[50] == pytest.approx(y[45:56].mean(), rel=1e-12)


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    y = np.where(np.arange(50) % 7 == 0, np.nan, 2.0)
    curve = plots.smoothed(np.arange(50), y)
    assert len(curve.x) == 42 and np.all(curve.mean == pytest.approx(2.0))
    assert len(plots.smoothed(np.arange(3), np.full(3, np.nan)).x) == 0


def test_a_long_series_is_binned_and_its_range_holds_every_value() -> None:
    y = np.random.default_rng(1).standard_normal(10_007)
    curve = plots.smoothed(np.arange(10_007), y)
    assert len(curve.x) == len(curve.mean) == plots.POINTS_DRAWN
    assert curve.low.min() == y.min() and curve.high.max() == y.max()
    assert np.all(np.diff(curve.x) > 0)


def test_the_best_checkpoint_is_the_last_one_marked() -> None:
    columns = {
        "step": np.arange(4),
        "metric_after": np.array([0.5, 0.9, 0.7, 0.8]),
        "best": np.array([1.0, 0.0, 1.0, 0.0]),
    }
    assert plots.best_index(columns, lower_is_better=False) == 2


@pytest.mark.parametrize("lower, expected", [(True, 0), (False, 1)])
def test_without_a_mark_the_best_checkpoint_is_the_best_value(lower: bool, expected: int) -> None:
    columns = {"step": np.arange(3), "metric_after": np.array([0.5, 0.9, math.nan])}
    assert plots.best_index(columns, lower) == expected
    assert plots.best_index({"step": np.arange(0)}, lower) is None


def test_distance_is_taken_where_both_series_have_a_point() -> None:
    first = Series("a", np.array([0.0, 1, 2, 3]), np.array([1.0, 2, 3, 4]))
    other = Series("b", np.array([3.0, 1, 7]), np.array([4.5, 2.0, 0.0]))
    x, apart = plots.distance(first, other)
    assert x.tolist() == [1, 3] and apart.tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    "value, text", [(0.01, "0.01"), (1.0, "1"), (1e-7, "10⁻⁷"), (1e6, "10⁶"), (200.0, "200"), (2e-7, ""), (0.0, "")]
)
def test_labels_of_a_log_axis_are_plain_text(value: float, text: str) -> None:
    assert plots.decade(value) == text


def test_a_label_is_escaped_and_ids_are_the_plots_own() -> None:
    pictures = []
    for label in ("a<b", "c&d"):
        with plots.drawing(style.THEMED) as Figure:
            figure = Figure(figsize=(2, 1))
            figure.add_subplot().plot([0, 1], "o-", color=style.THEMED["learner"])
            pictures.append(plots.inline_svg(figure, label))
    assert 'aria-label="a&lt;b"' in pictures[0]
    ids = [set(__import__("re").findall(r'id="([^"]+)"', text)) for text in pictures]
    assert ids[0] and not ids[0] & ids[1]
    assert "var(--learner)" in pictures[0] and "#0f0e" not in pictures[0]


def test_drawing_leaves_the_users_matplotlib_settings_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with plots.drawing(style.THEMED):
        pass
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("share", [0.02, 0.5, 2.0])
def test_spread_moves_labels_apart_and_keeps_their_order(share: float) -> None:
    heights = [0.5, 0.51, 0.1, 0.52]
    placed = picture.spread(heights, 0.1 * share)
    assert np.argsort(placed).tolist() == np.argsort(heights).tolist()
    assert np.diff(np.sort(placed)).min() >= 0.1 * share - 1e-6


@pytest.mark.parametrize(
    "metric, value, half, text",
    [
        ("accuracy", 0.97314, 0.00221, "97.31 ± 0.22 %"),
        ("accuracy", 0.5, 0.0213, "50.0 ± 2.1 %"),
        ("accuracy", 0.2, math.nan, "20.0 %"),
        ("mse", 0.094217, 0.0094, "0.0942 ± 0.0094"),
        ("mse", 4.2471, 0.3012, "4.25 ± 0.30"),
        ("mse", 4.2471, 1.1, "4.25 ± 1.10"),
        ("mse", 5120.3, 830.0, "5120 ± 830"),
        ("mse", math.nan, math.nan, "diverged"),
    ],
)
def test_a_value_has_the_digits_of_its_interval(metric: str, value: float, half: float, text: str) -> None:
    assert tables.with_interval(metric, value, half) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (4.23, "4.2 s"),
        (45.2, "45 s"),
        (200.0, "3 min 20 s"),
        (1800.0, "30 min"),
        (7500.0, "2 h 05 min"),
        (math.nan, "–"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert tables.duration(seconds).replace("\u00a0", " ") == text


def evaluation(mean: list[float], metric: str = "accuracy") -> Evaluation:
    values = np.array(mean)
    row = Row("learner", "learner", values, 0.01 * np.ones(len(values)), values)
    flat = Row("flat", "baseline", np.array([0.4]), np.array([0.02]), np.array([0.4]))
    return Evaluation(metric, list(range(len(values))), [Table(1, [row, flat])], {})


def test_the_table_tints_the_trained_column_and_spans_what_does_not_adapt() -> None:
    text = tables.evaluation_table(evaluation([0.2, 0.9, 0.95]), [0, 1, 2], trained_with=1)
    assert text.count("as-trained") == 2
    assert "colspan='3'" in text and "has no inner steps" in text
    assert "90.0<span class='pm'>± 1.0</span>" in text


def test_a_diverged_mean_is_written_as_such() -> None:
    assert "<td>diverged</td>" in tables.evaluation_table(evaluation([1.0, math.nan], "mse"), [0, 1], None)


@pytest.mark.parametrize("metric", ["accuracy", "mse"])
def test_a_plot_survives_values_that_diverged(metric: str) -> None:
    figures, marks = plots.inner_steps_plots(evaluation([1.0, math.nan, math.nan], metric), None)
    assert len(figures) == 1 and [mark.label for mark in marks] == ["learner", "flat"]


def test_ink_becomes_black_on_transparent_and_colour_stays_colour() -> None:
    import io

    from PIL import Image

    ink = np.zeros((1, 4, 4))
    ink[0, 1, 2] = 1.0
    read = np.asarray(Image.open(io.BytesIO(examples.png(ink))).convert("RGBA"))
    assert read[1, 2].tolist() == [0, 0, 0, 255] and read[0, 0, 3] == 0
    colour = np.zeros((3, 4, 4))
    colour[0] = 1.0
    assert np.asarray(Image.open(io.BytesIO(examples.png(colour))))[0, 0].tolist() == [255, 0, 0]


def test_normalised_pictures_are_stretched_into_range() -> None:
    import io

    from PIL import Image

    read = np.asarray(Image.open(io.BytesIO(examples.png(np.linspace(-2.1, 2.6, 48).reshape(3, 4, 4)))))
    assert read.min() == 0 and read.max() == 255


def test_probabilities_may_be_of_the_answer_alone() -> None:
    arrays = {
        "support_x": np.zeros((1, 2, 1, 3, 3)),
        "support_y": np.array([[0, 1]]),
        "query_x": np.zeros((1, 2, 1, 3, 3)),
        "query_y": np.array([[0, 1]]),
        "predictions_before": np.array([[1, 1]]),
        "predictions_after": np.array([[0, 0]]),
    }
    for probabilities in (np.array([[0.9, 0.6]]), np.array([[[0.9, 0.1], [0.6, 0.4]]])):
        (task,) = examples.tasks({**arrays, "probabilities_after": probabilities})
        assert [a.probability for a in task.answers] == [0.9, 0.6]
        assert task.accuracy("before") == (1, 2) and task.accuracy("after") == (1, 2)
