"""Checkpoints survive kill -9, a full disk and damage. One test each."""

from __future__ import annotations

import errno
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from fastmaml.training import checkpoint

pytest.importorskip("safetensors")


def state_of(step: int, size: int = 1000) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    return {"weight": torch.full((size,), float(step))}, {"step": step}


def expect_checkpoint(folder, step: int) -> None:
    tensors, state = checkpoint.load(folder, "last")
    assert state == {"step": step}
    assert torch.equal(tensors["weight"], torch.full_like(tensors["weight"], step))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_come_back_with_type_shape_and_bits(tmp_path):
    tensors = {
        "double": torch.randn(3, 4, dtype=torch.float64),
        "single.T": torch.randn(3, 4).T,
        "scalar": torch.tensor(7),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "empty": torch.zeros(0),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    tied = torch.randn(5)
    checkpoint.save(tmp_path, "last", {**tensors, "a": tied, "b": tied}, {"loss": 0.1, "best": None})
    loaded, state = checkpoint.load(tmp_path, "last")
    assert state == {"loss": 0.1, "best": None}
    for name, value in {**tensors, "a": tied, "b": tied}.items():
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        assert loaded[name].numpy().tobytes() == value.contiguous().numpy().tobytes()


def test_a_new_checkpoint_replaces_the_old_one_and_leaves_others_alone(tmp_path):
    for step in range(3):
        checkpoint.save(tmp_path, "last", *state_of(step))
        checkpoint.save(tmp_path, "last-but-one", *state_of(step + 10))
    expect_checkpoint(tmp_path, 2)
    assert checkpoint.load(tmp_path, "last-but-one")[1] == {"step": 12}
    assert len(names(tmp_path)) == 4


def test_saving_the_same_state_twice_keeps_it(tmp_path):
    for _ in range(2):
        checkpoint.save(tmp_path, "last", *state_of(1))
    expect_checkpoint(tmp_path, 1)
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("failing_write", [1, 2], ids=["tensors", "json"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch, failing_write, code):
    checkpoint.save(tmp_path, "last", *state_of(1))
    before = names(tmp_path)
    writes = 0
    write = checkpoint._write

    def full(file, data):
        nonlocal writes
        writes += 1
        if writes == failing_write:
            write(file, data[: len(data) // 2])
            raise OSError(code, "No space left on device")
        write(file, data)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"no space left on device.*the earlier .*last.json is untouched"
    ) as error:
        checkpoint.save(tmp_path, "last", *state_of(2))
    assert "\n" not in str(error.value)
    expect_checkpoint(tmp_path, 1)
    assert names(tmp_path) == before
    monkeypatch.undo()
    checkpoint.save(tmp_path, "last", *state_of(2))
    expect_checkpoint(tmp_path, 2)


def test_a_full_disk_before_the_first_checkpoint_says_there_is_none(tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(checkpoint.CheckpointError, match="there is no earlier one"):
        checkpoint.save(tmp_path, "last", *state_of(1))
    assert names(tmp_path) == []


def test_a_real_file_size_limit_keeps_the_earlier_checkpoint(tmp_path):
    script = (
        "import resource, sys, torch\n"
        "from fastmaml.training import checkpoint\n"
        "checkpoint.save(sys.argv[1], 'last', {'weight': torch.full((1000,), 1.0)}, {'step': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    checkpoint.save(sys.argv[1], 'last', {'weight': torch.full((100_000,), 2.0)}, {'step': 2})\n"
        "except checkpoint.CheckpointError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "file too large" in done.stdout and "untouched" in done.stdout
    expect_checkpoint(tmp_path, 1)
    assert len(names(tmp_path)) == 2
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000  # the limit was the child's alone


def test_kill_9_at_any_moment_leaves_a_valid_checkpoint(tmp_path):
    script = (
        "import sys, torch\n"
        "from fastmaml.training import checkpoint\n"
        "step = int(sys.argv[2])\n"
        "while True:\n"
        "    checkpoint.save(sys.argv[1], 'last', {'weight': torch.full((100_000,), float(step))}, {'step': step})\n"
        "    step += 1\n"
        "    if step == int(sys.argv[2]) + 3: print('saving', flush=True)\n"
    )
    reached = 0
    for attempt in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(reached)], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None and child.stdout.readline() == b"saving\n"
            time.sleep(0.003 + 0.0037 * attempt)
            child.send_signal(signal.SIGKILL)
        _, state = checkpoint.load(tmp_path, "last")
        assert state["step"] >= reached + 2
        expect_checkpoint(tmp_path, state["step"])
        reached = state["step"]
    checkpoint.save(tmp_path, "last", *state_of(1))
    assert len(names(tmp_path)) == 2, "a save clears away what killed ones left"


@pytest.mark.parametrize("stop", ["write tensors", "rename tensors", "write json", "rename json", "remove"])
def test_a_stop_between_any_two_steps_of_a_save_leaves_a_valid_checkpoint(tmp_path, monkeypatch, stop):
    """What kill -9 does, at each place it can do harm: the process is gone and nothing after that place happens."""

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    checkpoint.save(tmp_path, "last", *state_of(1))
    action, _, kind = stop.partition(" ")
    targets = {
        "write": (checkpoint, "_write"),
        "rename": (checkpoint.os, "replace"),
        "remove": (checkpoint, "_remove_leftovers"),
    }
    module, name = targets[action]
    original, calls = getattr(module, name), 0

    def stopping(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return die() if calls == (2 if kind == "json" else 1) else original(*args, **kwargs)

    monkeypatch.setattr(module, name, stopping)
    with pytest.raises(Killed):
        checkpoint.save(tmp_path, "last", *state_of(2))
    monkeypatch.undo()
    expect_checkpoint(tmp_path, 2 if stop == "remove" else 1)


def test_damage_is_named(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint"):
        checkpoint.load(tmp_path, "last")
    checkpoint.save(tmp_path, "last", *state_of(1))
    (tensor_file,) = tmp_path.glob("*.safetensors")
    data = tensor_file.read_bytes()
    tensor_file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(checkpoint.CheckpointError, match=r"damaged.*is not the file it was saved with"):
        checkpoint.load(tmp_path, "last")
    tensor_file.unlink()
    with pytest.raises(checkpoint.CheckpointError, match="which is missing"):
        checkpoint.load(tmp_path, "last")
    (tmp_path / "last.json").write_text('{"format": 1')
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.load(tmp_path, "last")
    (tmp_path / "last.json").write_text('{"format": 99, "tensors": "", "sha256": ""}')
    with pytest.raises(checkpoint.CheckpointError, match="format 99"):
        checkpoint.load(tmp_path, "last")


def test_generators_go_on_where_they_stood(tmp_path):
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    random.gauss(0, 1), np.random.randn()  # each holds back a second normal number
    tensors, rest = checkpoint.pack_rng()
    checkpoint.save(tmp_path, "last", tensors, {"rng": rest})

    def draw() -> list[object]:
        return [
            torch.randn(3).tolist(),
            np.random.randn(3).tolist(),
            [random.gauss(0, 1) for _ in range(3)],
            np.random.randint(9**9),
        ]

    expected = draw()
    tensors, state = checkpoint.load(tmp_path, "last")
    checkpoint.unpack_rng(tensors, state["rng"])
    assert draw() == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.RAdam([{"params": p[:1], "lr": 0.03}, {"params": p[1:]}], lr=0.01),
    ],
    ids=["adam", "adamw", "momentum", "sgd", "groups"],
)
def test_optimizers_go_on_to_the_same_bits(tmp_path, make):
    def steps(parameters, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            sum((p**4).sum() for p in parameters).backward()
            optimizer.step()

    torch.manual_seed(0)
    straight = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2, 2))]
    optimizer = make(straight)
    steps(straight, optimizer, 3)
    tensors, rest = checkpoint.pack_optimizer(optimizer)
    checkpoint.save(tmp_path, "last", tensors, {"optimizer": rest})
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in straight]
    steps(straight, optimizer, 3)

    tensors, state = checkpoint.load(tmp_path, "last")
    second = make(resumed)
    checkpoint.unpack_optimizer(second, tensors, state["optimizer"])
    steps(resumed, second, 3)
    for p, q in zip(straight, resumed):
        assert torch.equal(p, q)
