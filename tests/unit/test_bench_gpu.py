# `make gpu` without a GPU: its message, and its parts with the emulated backend instead of the device.
from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("fastmaml._C")
import fastmaml as fm
from bench import gpu
from bench.cases import CASES
from fastmaml.benchmark.cases import HvpCase
from fastmaml.compiled import loading

pytestmark = pytest.mark.bench

TINY = replace(
    CASES["mlp-k1"],
    name="tiny",
    model=lambda: fm.models.mlp([4, 6, 3]),
    input_shape=(4,),
    ways=3,
    tasks=2,
    support=3,
    query=6,
)
STAND_IN = gpu.Target(
    backend="cuda_emulated",
    device="cpu",
    clock=None,
    tests=("tests/numerics/test_solve.py",),
    sanitized=("tests/numerics/test_solve.py",),
    cases=(TINY,),
    hvps=(HvpCase(5, 2, 3),),
    peers=("torch_loop", "torch_func"),
    hvp_peers=("double_backward", "func_jvp"),
)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_cuda", lambda: "no CUDA driver on this machine")
    assert gpu.main([]) == 3
    assert capsys.readouterr().err == "no GPU was found: no CUDA driver on this machine\n"


def test_all_tools_of_compute_sanitizer_are_run():
    assert set(gpu.SANITIZERS) == {"memcheck", "racecheck", "initcheck", "synccheck"}


def fake_sanitizer(folder: Path, code: int) -> None:
    """Runs the program that it is given, notes the tool, and ends like one that found nothing (0) or something."""
    program = folder / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$2" >> {folder}/tools\nshift 6\n"$@" || exit $?\nexit {code}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_all_parts_run_and_leave_their_results(tmp_path, monkeypatch, capsys):
    fake_sanitizer(tmp_path, 0)
    monkeypatch.setattr(gpu, "SANITIZERS", ("memcheck", "racecheck"))  # each is a process with torch
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    out = tmp_path / "gpu.json"
    assert gpu.main(["--rounds", "2", "--out", str(out)], STAND_IN) == 0
    found = json.loads(out.read_text())
    assert set(found["parts"]) == {"tests", "sanitizers", "meta-gradients", "hvps"}
    assert all(part["good"] for part in found["parts"].values())
    assert (tmp_path / "tools").read_text().split() == ["memcheck", "racecheck"]
    assert "passed" in found["parts"]["tests"]["summary"]
    (case,) = found["parts"]["meta-gradients"]["cases"]
    assert [row["name"] for row in case["rows"]] == ["fastmaml", "fastmaml engine", "torch_loop", "torch_func"]
    assert all(row["error_float64"] < 1e-8 and row["median_ms"] > 0 for row in case["rows"])
    (case,) = found["parts"]["hvps"]["cases"]
    assert {"fastmaml", "fastmaml tf32", "double_backward", "func_jvp"} <= {row["name"] for row in case["rows"]}
    assert found["device"]["device"] == "none, cuda_emulated in its place"
    assert found["commit"] is not None and found["date"]


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "commit", lambda: "abc")
    out = tmp_path / "gpu.json"
    assert gpu.main(["--rounds", "2", "--out", str(out), "--parts", "hvps"], STAND_IN) == 0
    monkeypatch.setitem(gpu.PARTS, "hvps", lambda *_: pytest.fail("done before"))
    assert gpu.main(["--rounds", "2", "--out", str(out), "--parts", "meta-gradients", "hvps"], STAND_IN) == 0
    assert set(json.loads(out.read_text())["parts"]) == {"meta-gradients", "hvps"}
    monkeypatch.setattr(gpu, "commit", lambda: "def")  # other code: nothing counts any more
    with pytest.raises(pytest.fail.Exception, match="done before"):
        gpu.main(["--out", str(out), "--parts", "hvps"], STAND_IN)


@pytest.mark.parametrize("found", ["something", "nothing there"])
def test_what_is_not_good_makes_the_exit_code_1(found, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "SANITIZERS", ("memcheck",))
    if found == "something":
        fake_sanitizer(tmp_path, 9)
    monkeypatch.setenv(
        "PATH", str(tmp_path) if found == "nothing there" else f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    )
    monkeypatch.setattr(
        gpu.shutil, "which", lambda name, path=None: str(tmp_path / name) if found == "something" else None
    )
    assert gpu.main(["--out", str(tmp_path / "gpu.json"), "--parts", "sanitizers"], STAND_IN) == 1
    part = json.loads((tmp_path / "gpu.json").read_text())["parts"]["sanitizers"]
    assert not part["good"]
    if found == "something":
        assert not any(tool["good"] for tool in part["tools"].values())
    else:
        assert part["why"] == "compute-sanitizer is neither on the PATH nor in CUDA_HOME"
