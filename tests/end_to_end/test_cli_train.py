"""The command line as a user sees it: train, stop in every way, resume, evaluate, report."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastmaml.cli.main import main
from fastmaml.training import checkpoint
from fastmaml.training.metrics import read_rows

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")

SMALL = ["sinusoid", "--backend", "autodiff", "--meta-batch", "2", "--validation-tasks", "20", "--seed", "3"]
QUICK = ["--no-evaluate", "--quiet"]
TIMES = {"steps_per_second", "sampling_share", "elapsed_s"}


def fastmaml(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fastmaml", *map(str, arguments)]


def environment() -> dict[str, str]:
    source = Path(checkpoint.__file__).parents[1]
    return os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        fastmaml(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def wait_for_rows(run_dir: Path, count: int, child: subprocess.Popen[str]) -> None:
    """Until training has written so many rows of metrics."""
    deadline = time.monotonic() + 60
    path = run_dir / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < count:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline, "training writes no metrics"
        time.sleep(0.02)


def expect_same_run(one: Path, other: Path) -> None:
    tensors, state = checkpoint.load(one / "checkpoints", "last")
    tensors_, state_ = checkpoint.load(other / "checkpoints", "last")
    assert state["step"] == state_["step"] and tensors.keys() == tensors_.keys()
    for name, value in tensors.items():
        assert torch.equal(value, tensors_[name]), name
    rows, rows_ = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(run / "metrics.jsonl")]
        for run in (one, other)
    )
    assert rows == rows_


def test_ctrl_c_says_how_to_go_on_and_the_run_ends_in_the_same_bits(tmp_path):
    run_dir = tmp_path / "a run"
    child = start("train", *SMALL, *QUICK, "--steps", 100_000, "--validate-every", 10, "--out", run_dir)
    wait_for_rows(run_dir, 2, child)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    (line,) = re.findall(r"continue with:  (.*)", out)
    _, state = checkpoint.load(run_dir / "checkpoints", "last")
    stopped, steps = state["step"], state["step"] + 25

    # The line must work as it stands; --steps only ends it soon.
    resume = [*shlex.split(line), "--steps", str(steps), *QUICK]
    resumed = subprocess.run(resume, check=False, capture_output=True, text=True, env=environment(), timeout=60)
    assert resumed.returncode == 0, resumed.stderr
    assert f"from step {stopped}" in resumed.stdout
    assert f"{steps} of {steps} steps" in resumed.stdout

    straight = tmp_path / "straight"
    options = ["--steps", str(steps), "--validate-every", "10", "--out", str(straight)]
    assert main(["train", *SMALL, *QUICK, *options]) == 0
    expect_same_run(run_dir, straight)


def test_sigterm_saves_too(tmp_path):
    run_dir = tmp_path / "run"
    child = start("train", *SMALL, *QUICK, "--steps", 100_000, "--validate-every", 1000, "--out", run_dir)
    wait_for_rows(run_dir, 1, child)
    child.terminate()
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "continue with" in out, err
    assert checkpoint.load(run_dir / "checkpoints", "last")[1]["step"] >= 1


def test_kill_9_while_checkpoints_are_written_loses_nothing(tmp_path):
    child = start("train", *SMALL, *QUICK, "--steps", 100_000, "--validate-every", 1, "--out", tmp_path / "run")
    wait_for_rows(tmp_path / "run", 5, child)
    child.kill()
    child.communicate()
    _, state = checkpoint.load(tmp_path / "run" / "checkpoints", "last")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "validation", "st')
    steps = state["step"] + 3
    assert state["step"] >= 3
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", str(steps), *QUICK]) == 0
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "validation"]
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), "every step once"


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit, which sets another process's limits, is Linux's")
def test_a_disk_that_fills_up_is_one_sentence_and_the_run_goes_on_later(tmp_path):
    run_dir = tmp_path / "run"
    child = start("train", *SMALL, *QUICK, "--steps", 100_000, "--validate-every", 5, "--out", run_dir)
    wait_for_rows(run_dir, 3, child)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (16_000, 16_000))  # bytes a file; a checkpoint needs more
    _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    sentence = err.strip()
    assert sentence.startswith("fastmaml: cannot write checkpoint") and "file too large" in sentence, err
    assert "\n" not in sentence and "untouched" in sentence
    _, state = checkpoint.load(run_dir / "checkpoints", "last")
    assert state["step"] >= 5
    assert main(["train", "--resume", str(run_dir), "--steps", str(state["step"] + 1), *QUICK]) == 0


def test_train_ends_with_evaluation_and_the_report(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run_dir = tmp_path / "run"
    assert main(["train", *SMALL, "--steps", "3", "--eval-tasks", "4", "--out", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert "sinusoid: MAML, 10 support points, 1 inner step(s) at 0.01, 2 tasks a step, 3 steps" in out
    assert re.search(r"3 of 3 steps in .* s, \d+\.\d % of it sampling tasks; best validation mse \S+ at step 3", out)
    for row in ("MAML, meta-trained", "same network, random initialisation", "mean predictor"):
        assert out.count(row) == 3, "one for each of 5, 10 and 20 shots"
    assert f"report: {run_dir / 'report.html'}" in out
    assert {path.name for path in run_dir.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "evaluation.json",
        "examples.npz",
        "report.html",
    }
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["dataset"], config["seed"], config["meta_batch"], config["metric"]) == ("sinusoid", 3, 2, "mse")
    assert config["machine"] and config["threads"] >= 1 and config["versions"]["torch"] == torch.__version__

    assert main(["evaluate", str(run_dir), "--eval-tasks", "5", "--quiet", "--out", str(tmp_path / "again")]) == 0
    assert "5 support points, 5 test tasks" in capsys.readouterr().out
    assert json.loads((tmp_path / "again" / "evaluation.json").read_text())["tasks"] == 5

    page = tmp_path / "page.html"
    assert main(["report", str(run_dir), "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"report: {page}\n" and page.stat().st_size > 1000


def test_first_order_and_other_options_reach_the_run(tmp_path, capsys):
    options = [
        "--algorithm",
        "fomaml",
        "--shots",
        "7",
        "--query-shots",
        "4",
        "--inner-steps",
        "2",
        "--inner-lr",
        "0.02",
        "--outer-lr",
        "0.003",
    ]
    assert main(["train", *SMALL, *QUICK, *options, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    expected = {
        "algorithm": "fomaml",
        "shots": 7,
        "query_shots": 4,
        "inner_steps": 2,
        "inner_lr": 0.02,
        "outer_lr": 0.003,
    }
    assert {key: config[key] for key in expected} == expected
    assert "FOMAML" in capsys.readouterr().out


def test_without_out_every_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", *SMALL, *QUICK, "--steps", "1"]) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"sinusoid-maml-10shot", "sinusoid-maml-10shot-2"}


def expect_error(capsys, arguments: list[str], sentence: str) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert re.fullmatch(f"fastmaml: .*{sentence}.*\n", captured.err), captured.err


def test_wrong_uses_are_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastmaml.training.experiment.load_cuda", lambda: "no CUDA driver on this machine")
    run_dir = tmp_path / "run"
    assert main(["train", *SMALL, *QUICK, "--steps", "1", "--out", str(run_dir)]) == 0
    capsys.readouterr()
    resume = ["train", "--resume", str(run_dir)]
    expect_error(capsys, ["train"], "train needs a data set")
    expect_error(capsys, ["train", *SMALL, "--out", str(run_dir)], "already holds a run: continue it with --resume")
    expect_error(capsys, [*resume, "--inner-lr", "1"], "--inner-lr cannot change when a run is resumed")
    expect_error(capsys, [*resume, "--out", str(tmp_path)], "leave out DATASET, --out and --config")
    expect_error(capsys, ["train", "--resume", str(tmp_path)], "is not a run folder of fastmaml")
    expect_error(capsys, ["evaluate", str(tmp_path)], "is not a run folder of fastmaml")
    expect_error(capsys, ["train", *SMALL, "--ways", "5"], "sinusoid is a regression")
    expect_error(capsys, ["train", *SMALL, "--inner-steps=-1"], "inner_steps is -1")
    expect_error(
        capsys, ["train", *SMALL, "--backend", "cuda"], "backend 'cuda' cannot run: no CUDA driver on this machine"
    )
    expect_error(
        capsys, ["train", *SMALL, "--backend", "cpu", "--precision", "tf32"], "is for the backends cuda and cuda_emu"
    )
    expect_error(capsys, ["train", *SMALL, "--batch-norm", "per_step"], "belongs to MAML")
    expect_error(capsys, [*SMALL_DIVERGING, "--out", str(tmp_path / "nan")], "the loss is (nan|inf) at step 1")
    (run_dir / "checkpoints" / "best.json").unlink()
    (run_dir / "checkpoints" / "last.json").write_text("{")
    expect_error(capsys, ["evaluate", str(run_dir)], "is damaged")
    expect_error(capsys, resume, "is damaged")


SMALL_DIVERGING = ["train", *SMALL, *QUICK, "--inner-lr", "1e30"]


def test_an_unwritable_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    expect_error(capsys, ["train", *SMALL, *QUICK, "--out", str(tmp_path / "file" / "run")], "[Nn]ot a directory")


@pytest.mark.parametrize("command", ["train", "evaluate", "report", "data", "doctor"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--seed" in text and "--out" in text


def test_an_unknown_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["trian"])
    assert stopped.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def printed_config(capsys, *arguments: str) -> str:
    assert main(["train", *arguments, "--print-config"]) == 0
    return capsys.readouterr().out


def test_print_config_prints_what_config_takes_and_trains_nothing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("yaml")
    monkeypatch.chdir(tmp_path)
    options = ["--algorithm", "fomaml", "--inner-lr", "1e-2", "--clip-grad", "5", "--option", "adapted=[4.*]"]
    text = printed_config(capsys, *SMALL, *options)
    for line in ("dataset: sinusoid", "algorithm: fomaml", "inner_lr: 0.01", "clip_grad: 5.0", "seed: 3"):
        assert line in text.splitlines()
    Path("run.yaml").write_text(text)
    assert printed_config(capsys, "--config", "run.yaml") == text
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml"}

    assert main(["train", "--config", "run.yaml", "--steps", "2", "--inner-lr", "0.02", "--out", "run", *QUICK]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert (config["algorithm"], config["options"], config["seed"]) == ("fomaml", {"adapted": ["4.*"]}, 3)
    assert (config["steps"], config["inner_lr"]) == (2, 0.02), "what the command line says wins"
    capsys.readouterr()
    assert "inner_lr: 0.02" in printed_config(capsys, "--resume", "run")


def test_a_config_file_may_be_toml_and_mistakes_in_it_are_one_sentence(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text('dataset = "sinusoid"\nsteps = 1\nmeta_batch = 2\nvalidation_tasks = 2\n')
    assert main(["train", "--config", str(path), "--out", str(tmp_path / "run"), *QUICK]) == 0
    capsys.readouterr()
    path.write_text("inner_rate = 1")
    expect_error(
        capsys, ["train", "glyphs", "--config", str(path)], "no setting 'inner_rate'; the nearest is 'inner_lr'"
    )
    path.write_text("steps = 1")
    expect_error(capsys, ["train", "--config", str(path)], "train needs a data set .*, a --config that names one")
    resume = ["train", "--resume", str(tmp_path / "run")]
    expect_error(capsys, [*resume, "--config", str(path)], "leave out DATASET, --out and --config")
    expect_error(capsys, [*resume, "--option", "lam=2"], "--option cannot change when a run is resumed")
    expect_error(
        capsys, ["train", "sinusoid", "--option", "lam=2"], "MAML with options {'lam': 2}: .*unexpected keyword"
    )
    expect_error(capsys, ["train", "sinusoid", "--option", "inner=rmsprop"], "'rmsprop' is not one of sgd, adam, adamw")
    expect_error(capsys, ["train", "sinusoid", "--algorithm", "protomaml"], "sinusoid is a regression")
