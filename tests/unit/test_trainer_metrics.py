"""Metrics of tasks, their summary, and a run's metric files."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastmaml.training.metrics import MetricsWriter, accuracy, better, mse, read_rows, show, summarise
from fastmaml.training.trivial_predictors import mean_predictor, nearest_neighbour


def test_accuracy_counts_each_task_by_itself():
    output = torch.tensor([[[2.0, 1.0], [0.0, 3.0]], [[2.0, 1.0], [3.0, 0.0]]])
    target = torch.tensor([[0, 1], [1, 0]])
    assert accuracy(output, target).tolist() == [1.0, 0.5]


def test_mse_averages_over_examples_and_outputs():
    output, target = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    target[1, 0, 1] = 6.0
    assert mse(output, target).tolist() == [0.0, 6.0]


def test_the_interval_is_that_of_the_paper():
    values = torch.tensor([0.2, 0.4, 0.4, 1.0])
    summary = summarise(values)
    assert summary.mean == pytest.approx(0.5)
    assert summary.ci95 == pytest.approx(1.96 * math.sqrt(0.36 / 3) / math.sqrt(4))
    assert summary.median == pytest.approx(0.4)


def test_a_diverged_task_spoils_the_mean_but_not_the_median():
    for bad in (math.nan, math.inf):
        assert summarise(torch.tensor([1.0, 2.0, bad])) == (None, None, 2.0)
    with pytest.raises(ValueError, match="no tasks"):
        summarise(torch.zeros(0))


@pytest.mark.parametrize(
    ("metric", "value", "than", "expected"),
    [
        ("accuracy", 0.6, 0.5, True),
        ("accuracy", 0.5, 0.5, False),
        ("accuracy", math.nan, None, False),
        ("accuracy", 0.0, None, True),
        ("mse", 0.4, 0.5, True),
        ("mse", 0.6, 0.5, False),
        ("mse", math.nan, 0.5, False),
    ],
)
def test_better_knows_the_direction(metric, value, than, expected):
    assert better(metric, value, than) is expected


def test_values_are_shown_for_people():
    assert show("accuracy", 0.97345) == "97.3 %"
    assert show("mse", 0.46218) == "0.462"
    assert show("mse", None) == show("mse", math.inf) == "diverged"


def test_rows_are_json_lines_without_nan(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write("train", 1, loss=0.5, metric_before=math.nan)
    writer.write("validation", 1, loss=0.25, best=True)
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"kind": "train", "step": 1, "loss": 0.5, "metric_before": None}
    assert json.loads(lines[1]) == {"kind": "validation", "step": 1, "loss": 0.25, "best": True}


def test_a_resumed_run_keeps_the_rows_up_to_its_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write("train", step, loss=float(step))
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 2, "lo')  # what a kill leaves of a row
    writer = MetricsWriter(tmp_path, last_step=3)
    writer.write("train", 4, loss=40.0)
    writer.close()
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def test_a_new_run_starts_with_no_rows(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 0}\n')
    MetricsWriter(tmp_path).close()
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_nearest_neighbour_agrees_with_a_loop():
    torch.manual_seed(0)
    support_x, query_x = torch.rand(3, 10, 1, 4, 4), torch.rand(3, 7, 1, 4, 4)
    support_y = torch.stack([torch.randperm(10) % 5 for _ in range(3)])
    found = nearest_neighbour(support_x, support_y, query_x).argmax(-1)
    for task in range(3):
        for query in range(7):
            distances = [(support_x[task, s] - query_x[task, query]).square().sum().item() for s in range(10)]
            assert found[task, query] == support_y[task, distances.index(min(distances))]


def test_nearest_neighbour_finds_an_exact_copy_among_near_ones():
    support_x = 1000.0 + 1e-3 * torch.arange(5.0).reshape(1, 5, 1)  # distances that cancel in float32
    found = nearest_neighbour(support_x, torch.tensor([[3, 1, 4, 0, 2]]), support_x).argmax(-1)
    assert found.tolist() == [[3, 1, 4, 0, 2]]


def test_the_mean_predictor_ignores_the_input():
    support_y = torch.tensor([[[1.0], [3.0]], [[5.0], [6.0]]])
    assert mean_predictor(torch.zeros(2, 2, 1), support_y, torch.zeros(2, 3, 1)).tolist() == [[[2.0]] * 3, [[5.5]] * 3]


def test_baselines_refuse_what_does_not_belong_together():
    with pytest.raises(ValueError, match=r"support_x \[1, 2, 3\].*query_x \[1, 2, 4\]"):
        nearest_neighbour(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 4))
