# Run folders are read right, even if they are damaged, half-written or not ours.
from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import report_runs

from fastmaml.report import run_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return report_runs.glyphs(tmp_path / "glyphs", steps=200, ways=3, tasks=2)


def test_a_finished_folder_is_read_whole_and_without_a_note(folder: Path) -> None:
    run = run_folder.read(folder)
    assert run.notes == []
    assert run.train["step"].tolist() == list(range(10, 201, 10))
    assert run.validation["best"].tolist().count(1.0) >= 1
    assert run.evaluation is not None and run.evaluation.tables[0].learner is not None
    assert run.examples is not None and run.examples["support_x"].shape == (2, 3, 1, 28, 28)
    assert run.finished and run.metric == "accuracy" and run.name == "glyphs"


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_missing_required_file_is_one_sentence_that_names_it(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}") as error:
        run_folder.read(folder)
    assert "\n" not in str(error.value)


def test_a_folder_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no run folder"):
        run_folder.read(tmp_path / "nothing")


@pytest.mark.parametrize("text, reason", [("{", "is not JSON"), ("[1]", "expected an object")])
def test_a_broken_config_is_one_sentence(folder: Path, text: str, reason: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        run_folder.read(folder)


def test_a_half_written_last_line_is_skipped_with_a_note(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text[: len(text) - 40])
    run = run_folder.read(folder)
    assert run.notes == ["The last line of metrics.jsonl is half-written and was skipped."]
    assert len(run.validation["step"]) == len(run_folder._metrics(path, [])[1]["step"]) == 9


def test_unreadable_lines_inside_are_counted(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "not json", '{"kind": "train"}', '{"kind": "other", "step": 1}', *lines[1:]]))
    run = run_folder.read(folder)
    assert run.notes == ["metrics.jsonl: 3 unreadable lines skipped, the first is line 2."]
    assert len(run.train["step"]) == 20


def test_the_later_of_two_rows_for_a_step_counts(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    row = report_runs.train_row(10, 7.0, 7.0, 0.1, 0.9, 5.0, 0.01, 2.0)
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    run = run_folder.read(folder)
    assert run.train["loss"][0] == 7.0 and len(run.train["step"]) == 20
    assert run.notes == ["metrics.jsonl: 1 row logged twice, as after a resume. The later row is shown."]


def test_a_null_becomes_nan_and_a_note(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "step": 210, "loss": null}\n')
    run = run_folder.read(folder)
    assert math.isnan(run.train["loss"][-1])
    assert run.notes == ["metrics.jsonl: 1 training row without a finite loss, left out of the curves."]


def test_elapsed_adds_the_parts_of_a_clock_that_started_again(folder: Path) -> None:
    run = run_folder.read(folder)
    run.train["elapsed_s"] = np.array([1.0, 5.0, math.nan, 2.0, 3.0])
    assert run.elapsed_s == 8.0
    run.train.pop("elapsed_s")
    assert math.isnan(run.elapsed_s)


@pytest.mark.parametrize(
    "steps, limit, finished", [(200, None, True), (210, None, False), (9000, 23.0, True), (9000, 60.0, False)]
)
def test_a_run_is_finished_at_its_last_step_or_its_time_limit(
    folder: Path, steps: int, limit: float | None, finished: bool
) -> None:
    run = run_folder.read(folder)
    run.config.update(steps=steps, time_limit=limit)
    assert run.elapsed_s == pytest.approx(200 / 8.7)
    assert run.finished is finished


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"inner_steps": [0, 1]}, "has 11 means for 2 inner step counts"),
        ({"inner_steps": []}, "inner_steps is not a list"),
        ({"tables": []}, "it has no rows"),
    ],
)
def test_an_evaluation_that_does_not_fit_is_left_out_with_the_reason(
    folder: Path, change: dict[str, object], reason: str
) -> None:
    path = folder / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    run = run_folder.read(folder)
    assert run.evaluation is None
    assert len(run.notes) == 1 and reason in run.notes[0] and "evaluation.json" in run.notes[0]


@pytest.mark.parametrize("name", ["evaluation.json", "examples.npz", "comparison.json"])
@pytest.mark.parametrize("content", ["", '{"a": '])
def test_an_unreadable_optional_file_is_a_note(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    run = run_folder.read(folder)
    assert len(run.notes) == 1 and run.notes[0].startswith(name) and "without it" in run.notes[0]


def test_a_truncated_archive_of_examples_is_a_note(folder: Path) -> None:
    path = folder / "examples.npz"
    path.write_bytes(path.read_bytes()[:500])
    run = run_folder.read(folder)
    assert run.examples is None and run.notes[0].startswith("examples.npz is unreadable")


def test_pickled_examples_are_refused(folder: Path) -> None:
    np.savez(folder / "examples.npz", support_x=np.array([{"a": 1}], dtype=object))
    run = run_folder.read(folder)
    assert run.examples is None and "examples.npz is not usable" in run.notes[0]


def test_examples_without_an_array_are_a_note_that_names_it(folder: Path) -> None:
    arrays = dict(np.load(folder / "examples.npz"))
    arrays.pop("predictions_before")
    np.savez(folder / "examples.npz", **arrays)
    assert run_folder.read(folder).notes == [
        "examples.npz is not usable: it has no predictions_before. This page does not use it."
    ]


@pytest.mark.parametrize(
    "key, shape, reason",
    [
        ("query_y", (2, 44), "query_y [2, 44] does not fit query_x [2, 45, 1, 28, 28]"),
        ("support_x", (2, 3, 28, 28), "support_x [2, 3, 28, 28] is not [tasks, examples, C, H, W]"),
        ("probabilities_after", (2, 4, 3), "probabilities_after [2, 4, 3] does not fit query_y [2, 45]"),
        ("query_x", (3, 45, 1, 28, 28), "its arrays disagree about the number of tasks: [2, 3]"),
    ],
)
def test_image_examples_of_wrong_shape_are_a_note(folder: Path, key: str, shape: tuple[int, ...], reason: str) -> None:
    arrays = dict(np.load(folder / "examples.npz"))
    arrays[key] = np.zeros(shape)
    np.savez(folder / "examples.npz", **arrays)
    run = run_folder.read(folder)
    assert run.examples is None and reason in run.notes[0]


def test_curves_that_do_not_fit_their_grid_are_a_note(tmp_path: Path) -> None:
    folder = report_runs.sinusoid(tmp_path / "sinusoid", steps=400, tasks=2)
    arrays = dict(np.load(folder / "examples.npz"))
    arrays["grid_x"] = arrays["grid_x"][:50]
    np.savez(folder / "examples.npz", **arrays)
    assert "do not fit grid_x [50]" in run_folder.read(folder).notes[0]


def test_a_diverged_row_keeps_its_place(folder: Path) -> None:
    path = folder / "evaluation.json"
    value = json.loads(path.read_text())
    value["tables"][0]["rows"][0]["mean"][10] = None
    path.write_text(json.dumps(value))
    evaluation = run_folder.read(folder).evaluation
    assert evaluation is not None and math.isnan(evaluation.tables[0].rows[0].mean[10])


def test_comparisons_are_one_block_or_a_list(folder: Path) -> None:
    block = report_runs.comparison(np.random.default_rng(0))[0]
    for value in (block, [block, block]):
        (folder / "comparison.json").write_text(json.dumps(value))
        comparisons = run_folder.read(folder).comparisons
        assert len(comparisons) == len(value if isinstance(value, list) else [value])
        assert [s.name for s in comparisons[0].series] == ["autodiff", "cpu", "autodiff, start moved by 1e-7"]


def test_a_comparison_with_unequal_lengths_is_a_note(folder: Path) -> None:
    series = [{"name": "cpu", "x": [1, 2, 3], "y": [1, 2]}]
    (folder / "comparison.json").write_text(json.dumps({"title": "t", "series": series}))
    run = run_folder.read(folder)
    assert run.comparisons == [] and "series 'cpu', has 3 x and 2 y" in run.notes[0]
