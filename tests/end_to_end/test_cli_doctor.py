"""fastmaml doctor: its findings, and its exit code if something is broken."""

from __future__ import annotations

import json

import pytest
import torch

from fastmaml import Engine, models
from fastmaml.cli import doctor
from fastmaml.cli.main import main


def topics(findings) -> dict[str, tuple[str, str]]:
    return {topic: (state, text) for state, topic, text in findings}


def test_doctor_names_machine_backends_and_extras(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTMAML_CACHE", str(tmp_path / "cache"))
    compiled = Engine(models.mlp([1, 2])).fused
    code = main(["doctor", "--out", str(tmp_path / "findings.json")])
    assert code == (0 if compiled else 1)
    out = capsys.readouterr().out
    assert ("all is well" in out) == compiled
    found = topics(entry.values() for entry in json.loads((tmp_path / "findings.json").read_text()))
    assert found["backend autodiff"] == ("ok", "works")
    assert found["backend cuda"][0] == ("ok" if torch.cuda.is_available() else "note")
    assert torch.cuda.is_available() or "CUDA" in found["backend cuda"][1]
    assert found["cache"][1].startswith(str(tmp_path / "cache"))
    expected = {"machine", "python", "torch", "compiler", "backend cpu", "backend reference", "backend auto"}
    assert expected | {"extra [train]", "extra [report]", "extra [vision]"} <= found.keys()
    assert all(topic in out and text in out for topic, (_, text) in found.items())


def test_a_cache_that_cannot_be_written_is_broken(tmp_path):
    (tmp_path / "file").write_text("")
    finding = doctor._cache(tmp_path / "file" / "cache")
    assert finding.state == "broken"
    assert "is not writable: not a directory; set FASTMAML_CACHE to another folder" in finding.text


@pytest.mark.parametrize("wrong", ["cpu", "reference"])
def test_a_backend_with_a_wrong_gradient_is_broken(monkeypatch, capsys, wrong):
    meta_gradient = doctor._meta_gradient

    def slightly_off(model, batch, backend):
        grad = meta_gradient(model, batch, "autodiff")
        return grad * (1 + 1e-6) if backend == wrong else grad

    monkeypatch.setattr(doctor, "_meta_gradient", slightly_off)
    found = topics(doctor._backends(seed=0))
    assert found[f"backend {wrong}"] == ("broken", "WRONG, meta-gradient within 1e-06 of autodiff")
    assert main(["doctor"]) == 1
    assert "1 broken (marked !)" in capsys.readouterr().out


def test_a_missing_extra_names_its_install_command():
    finding = doctor._extra("train", ("tqdm", "no-such-package"))
    assert finding.state == "note"
    assert finding.text.endswith("no no-such-package (pip install 'fastmaml[train]')")
