"""fastmaml bench --profile, for its three kinds and for the user's own model."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastmaml.benchmark import ceilings, profile
from fastmaml.benchmark.ceilings import Ceilings
from fastmaml.cli.main import main

pytest.importorskip("fastmaml._C")

OWN = """
import torch
def problem():
    x = torch.rand(2, 3, 4)
    return torch.nn.Linear(4, 2), (x, torch.zeros(2, 3).long(), x, torch.zeros(2, 3).long()), "cross_entropy", 0.1, 2
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda: Ceilings(2, 10**6, (1e11, 2e11), (5e10, 1e11), (1e10, 1e10)))


@pytest.mark.parametrize("kind", ["meta", "hvp", "memory"])
def test_every_kind_has_a_profile_of_an_own_model(kind: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "own.py", tmp_path / "profile.json"
    file.write_text(OWN)
    steps = ["--inner-steps", "2"] if kind == "memory" else []
    assert main(["bench", kind, "--model", f"{file}:problem", *steps, "--profile", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "linear 4 to 2" in printed and "next bottleneck" in printed and profile.OUTSIDE in printed
    (entry,) = json.loads(out.read_text())["entries"].values()
    assert entry["rows"] and entry["bottleneck"].startswith("next bottleneck")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "autodiff"], "--profile takes the cpu or reference backend, not autodiff on cpu"),
        (["--peers", "torch_loop"], "--profile measures only fastmaml; leave out --peers torch_loop"),
    ],
)
def test_bad_arguments_cost_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "meta", "--cases", "sinusoid-k1", "--profile", *arguments]) == 1
    assert capsys.readouterr().err.strip() == f"fastmaml: {words}"
