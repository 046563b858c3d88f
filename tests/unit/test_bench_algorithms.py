# The table of all algorithms: its cells have equal budgets, finished cells are skipped, interrupted ones resume.
from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # bench is no installed package

from bench import algorithms  # noqa: E402
from fastmaml.algorithms.names import ALGORITHMS  # noqa: E402
from fastmaml.tasks import Sinusoid  # noqa: E402
from fastmaml.training import checkpoint  # noqa: E402

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("tensorboard")
pytestmark = pytest.mark.bench
linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


def test_every_algorithm_has_its_cells_at_the_same_budget():
    found = algorithms.cells()
    assert {(c.algorithm, c.dataset) for c in found} == {
        (a, d) for a in ALGORITHMS for d in algorithms.DATASETS if (a, d) != ("protomaml", "sinusoid")
    }
    for cell in found:
        config = cell.config
        if cell.dataset == "omniglot":
            budget = (config.meta_batch, config.ways, config.shots, config.query_shots, config.steps)
            assert budget == (4, 5, 1, 5, 1000), cell.name
            assert (config.model["filters"], config.model["pooling"]) == (32, "stride"), cell.name
        else:
            assert (config.meta_batch, config.shots, config.query_shots, config.steps) == (25, 10, 10, 5000), cell.name
        assert config.eval_tasks == 600
    assert len({cell.name for cell in found}) == len(found)


def tiny(algorithm="maml", iterations=4):
    (cell,) = algorithms.cells([algorithm], ["sinusoid"], iterations=iterations, eval_tasks=4)
    return cell


@linux
def test_a_cell_is_trained_evaluated_and_then_done(tmp_path):
    cell = tiny()
    assert algorithms.finished(cell, tmp_path) is None
    assert algorithms.run_cell(cell, tmp_path, threads=1, quiet=True) == 0
    row = algorithms.finished(cell, tmp_path)
    assert row is not None and json.loads(json.dumps(row)) == row
    assert (row["algorithm"], row["dataset"], row["metric"], row["tasks"]) == ("maml", "sinusoid", "mse", 4)
    assert row["steps_at_test"] == 1 and row["before"]["mean"] != row["after"]["mean"]
    assert row["ms"] > 0 and row["peak_mib"] >= 0
    assert "root" not in row["config"]
    with pytest.raises(ValueError, match="was made with steps 4, not 5: remove it or choose other --runs"):
        algorithms.finished(tiny(iterations=5), tmp_path)


@linux
def test_an_interrupted_cell_goes_on_to_the_same_result(tmp_path, monkeypatch):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    cell = tiny("reptile", 6)
    assert algorithms.run_cell(cell, straight, threads=1, quiet=True) == 0

    sample, calls = Sinusoid.sample, []

    def sample_and_stop(self, tasks, step=None):
        calls.append(step)
        if calls.count(None) == 3:  # training draws in order, all else names its batch
            os.kill(os.getpid(), signal.SIGINT)
            calls.append(None)
        return sample(self, tasks, step)

    monkeypatch.setattr(Sinusoid, "sample", sample_and_stop)
    assert algorithms.run_cell(cell, parts, threads=1, quiet=True) == 130
    assert algorithms.finished(cell, parts) is None
    assert checkpoint.load(parts / "checkpoints", "last")[1]["step"] == 3
    assert algorithms.run_cell(cell, parts, threads=1, quiet=True) == 0
    one, other = (algorithms.finished(cell, folder) for folder in (straight, parts))
    assert one is not None and other is not None
    assert {key: one[key] for key in ("before", "after", "evaluated")} == {
        key: other[key] for key in ("before", "after", "evaluated")
    }


@linux
def test_the_command_skips_what_is_done_names_what_fails_and_writes_the_table(tmp_path, capfd):
    runs, out = tmp_path / "runs", tmp_path / "table.json"
    options = ["--algorithms", "maml", "--iterations", "2", "--eval-tasks", "4", "--threads", "1", "--runs", str(runs)]
    options += ["--out", str(out)]
    assert algorithms.main([*options, "--datasets", "sinusoid"]) == 0
    first = capfd.readouterr().out
    assert "[1/1] sinusoid-maml\n" in first and "| MAML |" in first
    written = json.loads(out.read_text())
    assert [row["algorithm"] for row in written["rows"]] == ["maml"] and "machine" in written
    assert out.with_suffix(".md").read_text().startswith("| algorithm | sinusoid, MSE: before | after | ms | MiB |")

    for name in ("images_background.zip", "images_evaluation.zip"):
        (tmp_path / name).write_text("no zip")
    assert algorithms.main([*options, "--root", str(tmp_path)]) == 1
    second = capfd.readouterr()
    assert "[1/2] sinusoid-maml: done before" in second.out
    rows = json.loads(out.read_text())["rows"]
    assert rows[0] == written["rows"][0]
    assert rows[1]["dataset"] == "omniglot" and "ROOT/images_background.zip" in rows[1]["error"]
    assert "failed" in out.with_suffix(".md").read_text() and str(tmp_path) not in out.read_text()


def row(algorithm="maml", before=0.2, after=0.9, **more):
    value = {"mean": after, "ci95": 0.01, "median": after}
    return {
        "algorithm": algorithm,
        "dataset": "omniglot",
        "metric": "accuracy",
        "before": {"mean": before, "ci95": 0.02, "median": before},
        "after": value,
        "untrained_after": {"mean": 0.3, "ci95": 0.01, "median": 0.3},
        "without_network": {"name": "nearest neighbour on pixels", "mean": 0.43, "ci95": 0.01, "median": 0.4},
        "ms": 12.345,
        "peak_mib": 33.3,
        "note": "",
        **more,
    }


def test_the_table_shows_results_failures_and_notes():
    failed = {"algorithm": "imaml", "dataset": "omniglot", "error": "fastmaml: the loss is nan at step 3"}
    text = algorithms.markdown([row(), row("cavia", note="rate from trials"), failed])
    lines = text.splitlines()
    assert lines[0] == "| algorithm | Omniglot 5-way 1-shot, %: before | after | ms | MiB |"
    assert lines[2:5] == [
        "| MAML | 20.0 | 90.0 ± 1.0 | 12.3 | 33 |",
        "| iMAML |  | failed |  |  |",
        "| CAVIA | 20.0 | 90.0 ± 1.0 | 12.3 | 33 |",
    ]
    assert "| without a network |  | 43.0 ± 1.0 (nearest neighbour on pixels) |  |  |" in lines
    assert lines[-2:] == ["iMAML, omniglot: fastmaml: the loss is nan at step 3.", "CAVIA, omniglot: rate from trials."]


@pytest.mark.parametrize(("after", "clear"), [(0.9, True), (0.22, False), (0.1, False), (None, False)])
def test_a_result_counts_only_clear_of_the_interval_before_adaptation(after, clear):
    assert algorithms.above_baseline(row(after=after)) is clear
    made = row("protomaml", before=0.9, after=after)  # its baseline is the untrained network at 0.3
    assert algorithms.above_baseline(made) is (after == 0.9)
    if after is not None:
        error = row(before=1.2 - 0.2, after=1.2 - after, metric="mse")
        assert algorithms.above_baseline(error) is clear
