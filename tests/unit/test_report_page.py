# The page shows the run's results in one valid file that fetches nothing. It names missing files.
from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import report_runs

from fastmaml import report
from fastmaml.report import page, run_folder, tables

VOID = {"meta", "img", "br", "input", "link"}


class Checker(HTMLParser):
    """Follows the open elements, and collects ids, addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attributes:
            if key == "id" and value:
                self.ids.append(value)
            if key in ("src", "href", "action", "data", "srcset") and value:
                self.addresses.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "sinusoid": report_runs.sinusoid(folder / "sinusoid", steps=20_000, tasks=3),
        "glyphs": report_runs.glyphs(folder / "glyphs", steps=200, tasks=2),
        "unfinished": report_runs.unfinished(folder / "unfinished"),
    }


@pytest.fixture(scope="module")
def pages(runs: dict[str, Path]) -> dict[str, str]:
    return {name: report.write(folder).read_text(encoding="utf-8") for name, folder in runs.items()}


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    return checker


@pytest.mark.parametrize("name", ["sinusoid", "glyphs", "unfinished"])
def test_the_page_is_well_formed_and_fetches_nothing(pages: dict[str, str], name: str) -> None:
    text = pages[name]
    checker = checked(text)
    assert checker.open == []
    outside = [a for a in checker.addresses if not a.startswith(("#", "data:image/png;base64,"))]
    assert outside == [] and "@import" not in text
    styled = re.findall(r"url\(([^)]*)\)", text)
    assert all(reference.startswith("#") for reference in styled + checker.references)
    assert re.findall(r"https?://(?!www\.w3\.org/)", text) == []


@pytest.mark.parametrize("name", ["sinusoid", "glyphs"])
def test_every_reference_inside_a_plot_meets_its_target(pages: dict[str, str], name: str) -> None:
    checker = checked(pages[name])
    wanted = {a[1:] for a in checker.addresses if a.startswith("#")} | {r[1:] for r in checker.references}
    assert wanted and wanted <= set(checker.ids)
    assert len(set(checker.ids)) == len(checker.ids)


@pytest.mark.parametrize("name", ["sinusoid", "glyphs"])
def test_plots_carry_theme_colours_only(pages: dict[str, str], name: str) -> None:
    text = pages[name]
    body = text.split("</style></head>", 1)[1]
    assert "var(--learner)" in body and "var(--ink)" in body
    assert re.findall(r"#[0-9a-f]{6}\b", body) == []


def test_the_same_folder_gives_the_same_bytes(runs: dict[str, Path], pages: dict[str, str]) -> None:
    path = report.write(runs["glyphs"])
    assert path.read_text(encoding="utf-8") == pages["glyphs"]
    assert sorted(p.name for p in path.parent.glob("report*")) == ["report.html"]


def test_the_headline_of_images_names_the_result_and_every_baseline(runs: dict[str, Path]) -> None:
    line = page.headline(run_folder.read(runs["glyphs"]))
    assert line == (
        "After 1 gradient step on 1 picture of each class, the meta-trained network names <b>96.88 ± 0.24 %</b> of the "
        "query pictures correctly (5-way, 600 held-out test tasks), against 38.7\u00a0% (same network, random "
        "initialisation) and 51.2\u00a0% (nearest neighbour on pixels)."
    )


def test_the_headline_of_a_sinusoid_is_that_of_the_trained_shots(runs: dict[str, Path]) -> None:
    line = page.headline(run_folder.read(runs["sinusoid"]))
    assert line.startswith("After 1 gradient step on 10 points of an unseen curve")
    assert "goes from 4.10 to <b>0.707 ± 0.071</b> (600 held-out test tasks)" in line
    assert "against 4.25 (same network, random initialisation) and 3.30 (mean predictor)" in line


def test_the_headline_uses_the_last_step_count_where_the_trained_one_was_not_evaluated(runs: dict[str, Path]) -> None:
    run = run_folder.read(runs["glyphs"])
    run.config["inner_steps"] = 20
    assert page.headline(run).startswith("After 10 gradient steps on 1 picture")


def test_sections_of_a_finished_image_run(pages: dict[str, str]) -> None:
    text = pages["glyphs"]
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == ["Accuracy against inner steps", "A few tasks", "Learning", "Time and machine", "Setup"]
    assert "MAML on Glyphs, 5-way 1-shot" in text
    assert "Best checkpoint: " in text and "1.2 %</span> of the training time" in text


def test_sections_of_a_finished_sinusoid_run(pages: dict[str, str]) -> None:
    text = pages["sinusoid"]
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Error against inner steps",
        "Fitted curves",
        "Learning",
        "Training loss in float32",
        "Time and machine",
        "Setup",
    ]
    assert [f"{shots} support points" in text for shots in (5, 10, 20)] == [True] * 3
    assert "cpu equals autodiff in 5 of 60 points" in text


def test_an_unfinished_run_says_what_is_missing(pages: dict[str, str]) -> None:
    text = pages["unfinished"]
    assert "Training is not finished: the last logged outer step is 860 of 2\u2009000." in text
    assert "the run folder has no evaluation.json and examples.npz yet" in text
    assert "The last line of metrics.jsonl is half-written and was skipped." in text
    assert "it has not been evaluated on held-out tasks yet" in text
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Learning", "Time and machine", "Setup"]


def test_a_run_killed_before_its_first_row_still_has_a_page(tmp_path: Path) -> None:
    folder = report_runs.unfinished(tmp_path / "early")
    (folder / "metrics.jsonl").write_text("")
    text = report.write(folder).read_text(encoding="utf-8")
    assert "No outer step has been logged yet." in text
    assert checked(text).open == []


def test_one_row_of_metrics_is_enough_for_a_page(tmp_path: Path) -> None:
    folder = report_runs.unfinished(tmp_path / "one")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0])
    text = report.write(folder).read_text(encoding="utf-8")
    assert "the last logged outer step is 10 of" in text and "No validation has run yet." in text


def test_a_config_with_markup_is_shown_not_run(tmp_path: Path) -> None:
    folder = report_runs.glyphs(tmp_path / "evil", steps=50, tasks=1)
    config = json.loads((folder / "config.json").read_text())
    config.update(dataset="<script>alert(1)</script>", machine="a<b&c", algorithm='"><img src=x>')
    (folder / "config.json").write_text(json.dumps(config))
    text = report.write(folder).read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<img src=x>" not in text
    assert "a&lt;b&amp;c" in text
    assert checked(text).open == []


def test_right_and_wrong_are_told_by_sign_and_by_class(tmp_path: Path) -> None:
    folder = report_runs.glyphs(tmp_path / "wrong", steps=50, ways=3, tasks=1)
    arrays = dict(np.load(folder / "examples.npz"))
    arrays["predictions_after"][:] = arrays["query_y"]
    arrays["predictions_after"][0, 0] = 2
    arrays["probabilities_after"][0, 0] = [0.1, 0.2, 0.7]
    np.savez(folder / "examples.npz", **arrays)
    text = report.write(folder).read_text(encoding="utf-8")
    assert text.count('<div class="wrong">') == 1 and text.count('<div class="right">') == 8
    assert "✗&nbsp;C&nbsp;70&#8239;%" in text and "44 of 45 queries right after adaptation" in text
    assert "1 of 45 answers in 1 saved task are wrong" in text and text.count('class="mistake"') == 1


def test_a_page_without_mistakes_or_probabilities(tmp_path: Path) -> None:
    folder = report_runs.glyphs(tmp_path / "right", steps=50, ways=3, tasks=1)
    arrays = dict(np.load(folder / "examples.npz"))
    arrays["predictions_after"] = arrays["query_y"]
    arrays.pop("probabilities_after")
    np.savez(folder / "examples.npz", **arrays)
    text = report.write(folder).read_text(encoding="utf-8")
    assert "Wrong answers" not in text and text.count('<div class="answer">✓</div>') == 9


def test_an_absolute_path_of_the_machine_is_not_in_the_commands(runs: dict[str, Path], pages: dict[str, str]) -> None:
    text = pages["glyphs"]
    assert "fastmaml evaluate glyphs" in text and str(runs["glyphs"].parent) not in text


@pytest.mark.parametrize("name", ["sinusoid", "glyphs"])
def test_the_command_trains_the_same_run(runs: dict[str, Path], name: str) -> None:
    import shlex

    from fastmaml.cli.main import make_parser

    run = run_folder.read(runs[name])
    run.config.update(time_limit=230.5, root="/somewhere/on/this/machine")
    words = shlex.split(page.command(run).replace("\\\n", " "))
    given = vars(make_parser().parse_args(words[1:]))
    for setting in page._OPTIONS:
        expected = run.config["model"].get("filters") if setting == "filters" else run.config.get(setting)
        assert given[setting] == expected, setting
    assert given["dataset"] == name and given["out"] == name and given["root"] is None
    assert max(map(len, page.command(run).splitlines())) <= 100


def test_the_command_and_the_cards_name_what_an_algorithm_adds(runs: dict[str, Path]) -> None:
    import shlex

    from fastmaml.cli.main import make_parser
    from fastmaml.training.config_file import read_option

    pytest.importorskip("yaml")
    run = run_folder.read(runs["glyphs"])
    options = {"inner": {"name": "adam", "betas": [0.0, 0.999]}, "minibatch": 10, "head": None}
    added = {"algorithm": "reptile", "train_shots": 10, "clip_grad": 10.0, "ensemble": 3, "outer_lr_min": 0.1}
    run.config.update(added, schedule="linear", options=options)
    given = vars(make_parser().parse_args(shlex.split(page.command(run).replace("\\\n", " "))[1:]))
    assert {name: given[name] for name in added} == added
    assert dict(map(read_option, given["options"])) == options
    assert page.title(run) == "Reptile on Glyphs, 5-way 1-shot"
    cards = tables.config_cards(run.config)
    for name, value in {
        "shots in training": "10",
        "inner": "adam, betas 0, 0.999",
        "gradient clipped at": "10",
        "checkpoints that answer": "3",
    }.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in cards


def test_a_result_is_quoted_where_the_evaluation_says(runs: dict[str, Path]) -> None:
    run = run_folder.read(runs["glyphs"])
    assert run.evaluation is not None
    run.evaluation.facts.update(quoted_steps=5, ensemble=[400, 200], checkpoint="ensemble", step=400)
    text = page.html(run)
    assert "After 5 gradient steps on 1 picture of each class" in text
    assert "The tinted column is the number of inner steps used by this algorithm at test, 5." in text
    assert "the mean output of the best checkpoints by validation, outer steps 200 and 400." in text


def test_commands_name_a_relative_folder_as_it_was_given(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs["glyphs"].parents[1])
    place = Path(runs["glyphs"].parent.name) / "glyphs"
    assert f"fastmaml evaluate {place}" in report.write(place).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["sinusoid", "glyphs"])
@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_hero_writes_a_picture(runs: dict[str, Path], tmp_path: Path, name: str, suffix: str, magic: bytes) -> None:
    path = report.hero(runs[name], tmp_path / f"hero{suffix}", theme="dark")
    content = path.read_bytes()
    assert content.startswith(magic) and len(content) > 20_000
    assert b"#0f0ed" not in content


def test_hero_refuses_what_it_cannot_draw(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable evaluation.json"):
        report.hero(runs["unfinished"], tmp_path / "hero.png")
    with pytest.raises(ValueError, match="not as 'hero.gif'"):
        report.hero(runs["glyphs"], tmp_path / "hero.gif")
    with pytest.raises(ValueError, match="theme 'blue'"):
        report.hero(runs["glyphs"], tmp_path / "hero.png", theme="blue")


def test_without_matplotlib_one_sentence_names_the_extra(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"fastmaml\[report\]"):
        report.write(runs["glyphs"])
