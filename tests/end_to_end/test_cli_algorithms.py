"""Every algorithm from the command line: it trains, stops, resumes bit for bit, is evaluated and reported."""

from __future__ import annotations

import json

import pytest
import torch
from pictures import Pictures

from fastmaml.algorithms.names import ALGORITHMS
from fastmaml.cli.main import main
from fastmaml.training import checkpoint, experiment
from fastmaml.training.run_config import NEEDS_CLASSES

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("yaml")

SMALL = ["--meta-batch", "2", "--validation-tasks", "2", "--validate-every", "2", "--eval-tasks", "3", "--quiet"]
SHORTER = {  # the long inner loops, cut
    "reptile": ["--option", "eval_steps=3"],
    "foml": ["--option", "eval_steps=3"],
    "imaml": ["--inner-steps", "2"],
}
CASES = [(a, d) for d in ("sinusoid", "glyphs") for a in ALGORITHMS if not (d == "sinusoid" and a in NEEDS_CLASSES)]


def last_state(run_dir) -> dict[str, torch.Tensor]:
    return checkpoint.load(run_dir / "checkpoints", "last")[0]


@pytest.mark.parametrize(("algorithm", "dataset"), CASES)
def test_it_trains_goes_on_and_is_evaluated(tmp_path, monkeypatch, capsys, algorithm, dataset):
    monkeypatch.setitem(experiment._SOURCES, "glyphs", Pictures)
    filters = ["--filters", "2"] if dataset == "glyphs" else []
    train = ["train", dataset, "--algorithm", algorithm, *SMALL, *filters, *SHORTER.get(algorithm, [])]
    train += ["--schedule", "constant", "--no-evaluate"]
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert main([*train, "--steps", "4", "--out", str(straight)]) == 0
    assert f"{dataset}: {ALGORITHMS[algorithm]}, " in capsys.readouterr().out

    assert main([*train, "--steps", "2", "--out", str(parts)]) == 0
    before = last_state(parts)
    assert main(["train", "--resume", str(parts), "--steps", "4", "--no-evaluate", "--quiet"]) == 0
    one, other = last_state(straight), last_state(parts)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    moved = [name for name, value in one.items() if name.startswith("model/") and not torch.equal(value, before[name])]
    assert moved, "training changes something"

    capsys.readouterr()
    assert main(["evaluate", str(straight), "--quiet"]) == 0
    first = json.loads((straight / "evaluation.json").read_text())
    assert f"{ALGORITHMS[algorithm]}, meta-trained" in capsys.readouterr().out
    for table in first["tables"]:
        trained, untrained, _ = table["rows"]
        assert all(value is not None for value in trained["mean"]), "no task diverges"
        assert trained["mean"] != untrained["mean"] or dataset == "glyphs"
    assert first["quoted_steps"] in first["inner_steps"]
    torch.rand(1)  # an evaluation is the same whatever was drawn before it
    assert main(["evaluate", str(straight), "--quiet"]) == 0
    again = json.loads((straight / "evaluation.json").read_text())
    assert again["tables"] == first["tables"]
    if algorithm in ("reptile", "maml++"):  # those that add most to a run folder
        pytest.importorskip("matplotlib")
        assert main(["report", str(straight)]) == 0
