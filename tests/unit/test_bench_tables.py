# README.md's table and the pages of bench/results are what the generator makes; the workloads beyond W6 agree with their loops.
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # bench is no installed package

pytest.importorskip("fastmaml._C")
from dataclasses import replace  # noqa: E402

from bench import hvp as bench_hvp  # noqa: E402
from bench import learners, plots, policy, scaling, startup, tables  # noqa: E402
from bench.cases import LEARNERS, PolicyCase  # noqa: E402
from fastmaml.benchmark.cases import HvpCase  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


def test_the_committed_tables_are_those_of_the_committed_results(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out + "run `python -m bench.tables`"


def test_every_table_has_its_place_on_a_page():
    text = "".join((ROOT / page).read_text() for page in tables.MARKED_PAGES)
    assert [found["name"] for found in tables.MARKED.finditer(text)] == list(tables.MARKED_TABLES)
    linked = set(re.findall(r"\]\(results/([\w-]+)\.md\)", (ROOT / "bench" / "README.md").read_text()))
    assert linked >= set(tables.TABLES), "bench/README.md links every page"
    assert set(tables.TITLES) == set(tables.TABLES)


def test_the_pages_of_tables_are_those_of_the_generator():
    made = {f"{name}.md" for name, (stem, *_) in tables.TABLES.items() if tables.read(stem) is not None}
    by_hand = {"ATTEMPTS.md", "algorithms.md", "cuda_static.md"}  # text; bench.algorithms; bench.kernels.static
    assert {path.name for path in tables.RESULTS.glob("*.md")} == made | by_hand


def test_a_changed_table_is_noticed(monkeypatch, tmp_path, capsys):
    for path in tables.RESULTS.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "speed.md").write_text((tmp_path / "speed.md").read_text().replace("| fastmaml |", "| fastmaml  |", 1))
    (tmp_path / "README.md").write_text(
        re.sub(r"(\| W1 .*?\| )\d", r"\g<1>9", (ROOT / "README.md").read_text(), count=1)
    )
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == ["differs: speed.md", "differs: README.md"]


def test_a_marker_without_a_table_is_refused():
    with pytest.raises(ValueError, match="there is no table 'nothing'; there are speed, meta, .*, summary"):
        tables.filled("<!-- table: nothing -->\n<!-- end of table -->\n")


def test_a_missing_result_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = "before\n<!-- table: hvp -->\nold\n<!-- end of table -->\nafter\n"
    new = tables.filled(page)
    assert (
        new
        == "before\n<!-- table: hvp -->\n\nNot measured yet: `python -m bench.hvp`.\n\n<!-- end of table -->\nafter\n"
    )
    assert tables.filled(new) == new


@pytest.mark.parametrize("algorithm", LEARNERS)
@pytest.mark.bench
def test_learners_agree_with_their_loops(algorithm):
    case = LEARNERS[algorithm]
    entry = learners.measure(replace(case, on=replace(case.on, tasks=2, query=5), inner_steps=2), 1, 0, 5.0)
    assert [row["name"] for row in entry["rows"]] == ["fastmaml", "torch_loop"], entry["absent"]


@pytest.mark.bench
def test_the_policy_batch_agrees_with_its_loop(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(policy, "POLICY", {"tiny": PolicyCase("tiny", 3, 2, 6)})
    out = tmp_path / "policy.json"
    assert policy.main(["--rounds", "1", "--threads", "1", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    rows = content["entries"]["tiny"]["rows"]
    assert [row["name"] for row in rows] == list(policy.IMPLEMENTATIONS) and content["complete"]
    assert all(row["error_float64"] < 1e-9 for row in rows) and "GFLOP: meta-gradient" in capsys.readouterr().out
    assert "| tiny | fastmaml |" in tables.policy(content)


def test_policy_gradient_counts():
    case = PolicyCase("one", 1, 1, 1)
    F, F1 = 2 * (17 * 64 + 64 * 64 + 64 * 6), 2 * 17 * 64
    assert policy.gflop(case)["meta-gradient"] == pytest.approx((12 * F - 6 * F1) / 1e9)
    assert policy.gflop(case)["fisher products"] == pytest.approx(30 * (9 * F - 5 * F1) / 1e9)


@pytest.mark.bench
def test_slopes():
    assert scaling.slope([(n, 3.0 * n**2) for n in (1, 2, 4, 8)]) == pytest.approx(2.0)
    found = scaling.measure(replace(scaling.CURVES["W1 tasks"], values=(1, 2, 4)), 1, 1)
    assert [p["size"] for p in found["points"]] == [1, 2, 4] and not found["left_out"]
    cut = scaling.measure(replace(scaling.CURVES["W1 tasks"], values=(1, 2, 4)), 1, 1, limit_s=0.0)
    assert cut["left_out"] == [2, 4], "a curve ends where a call takes too long"
    assert "2, 4 would take too long" in scaling.says({**found, "left_out": [2, 4]})


def test_scaling_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    entries = {"W1 tasks": {"along": "tasks", "wanted": 1.0, "points": [{"size": n, "ms": n} for n in (1, 2, 4)]}}
    scaling.plot(entries, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for stem in ("meta", "peak_memory"):
        rows = [
            {"name": name, "ratio_to_fastmaml": r} for name, r in (("fastmaml", 1.0), ("jax", 3.0), ("higher", 20.0))
        ]
        point = {"name": "fastmaml low", "inner_steps": 1, "peak": {"bytes": 2**20, "seconds": 0.1}}
        content = {"entries": {"case": {"rows": rows, "points": [point, {**point, "inner_steps": 5}]}}}
        plots.PLOTS[stem](content, tmp_path / f"{stem}.png")
        assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.bench
def test_startup_is_measured_in_fresh_processes(tmp_path, capsys):
    out = tmp_path / "startup.json"
    assert startup.main(["--processes", "1", "--cases", "sinusoid-k1", "--threads", "1", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["rows"][0]["first_ms"] > 0 and "| sinusoid-k1 |" in tables.startup(content)


@pytest.mark.bench
def test_hvp_results_make_a_table(tmp_path, monkeypatch):
    out = tmp_path / "hvp.json"
    monkeypatch.setitem(bench_hvp.HVP, "mlp32-t16-n32", HvpCase(8, 16, 32))
    order = ["mlp32-t16-n32", "--peers", "double_backward", "--rounds", "1", "--threads", "1", "--out", str(out)]
    assert bench_hvp.main(order) == 0
    text = tables.hvp(json.loads(out.read_text()))
    assert "| mlp32-t16-n32 |" in text and "Several directions at fixed parameters" in text
