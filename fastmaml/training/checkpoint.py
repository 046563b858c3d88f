"""Checkpoints: tensors in safetensors, everything else in JSON, nothing pickled.

`NAME.json` is the checkpoint: it names its tensor file and the file's SHA-256. A save writes a new tensor file, replaces
the JSON by one rename, then removes the old tensor file. If anything stops the save (kill -9, a full disk, a power cut),
NAME.json still names a complete tensor file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 1

# Errors of a full disk, a full quota and a file size limit (ulimit -f).
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(OSError):
    """A checkpoint cannot be written, is missing, or is damaged."""


def save(folder: str | Path, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write checkpoint `name` of `folder`: named `tensors` and a JSON-able `state`. Returns the path of the JSON file.

    The earlier checkpoint of that name stays valid until the new one is complete. Raises `CheckpointError` if the disk
    is full or not writable (the earlier checkpoint is then unchanged), `TypeError` for a state that JSON cannot hold.
    """
    folder = Path(folder)
    # Clones: safetensors refuses tensors that share memory, such as tied parameters.
    data = _safetensors().save({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    tensor_file = f"{name}-{digest[:16]}.safetensors"
    record = {"format": FORMAT, "tensors": tensor_file, "sha256": digest, "state": dict(state)}
    text = json.dumps(record, indent=1, allow_nan=True).encode()
    target = folder / f"{name}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / tensor_file, data)
        write_durably(target, text)
    except OSError as error:
        _remove_leftovers(folder, name, keep=_named_tensor_file(target))
        kept = f"the earlier {target} is untouched" if target.exists() else "there is no earlier one"
        raise CheckpointError(f"cannot write checkpoint {target}: {why(error)}; {kept}") from error
    _remove_leftovers(folder, name, keep=tensor_file)
    return target


def load(folder: str | Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read checkpoint `name` of `folder`: its tensors (on the CPU) and its state.

    Raises `CheckpointError` if it is missing, has another format, or its tensor file has changed since the save.
    """
    path = Path(folder) / f"{name}.json"
    try:
        record = json.loads(path.read_text())
        format_, tensor_file, digest = record["format"], record["tensors"], record["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error!r}") from error
    if format_ != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {format_}, but this fastmaml reads format {FORMAT}")
    try:
        data = (path.parent / tensor_file).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} names {tensor_file}, which is missing") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {tensor_file} ({len(data)} bytes) is not the file it was saved with"
        )
    return _safetensors().load(data), record["state"]


def exists(folder: str | Path, name: str) -> bool:
    """Whether `folder` holds a checkpoint of that name."""
    return (Path(folder) / f"{name}.json").exists()


def keep_only(folder: str | Path, pattern: str, names: Sequence[str]) -> None:
    """Remove the checkpoints whose names fit `pattern` (such as "member-*"), except `names`."""
    for path in Path(folder).glob(f"{pattern}.json"):
        if path.stem not in names:
            path.unlink()
            _remove_leftovers(path.parent, path.stem, keep=None)


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one rename. The data is on disk before the return; a failure keeps the old file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            _write(file, data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def why(error: OSError) -> str:
    """The reason of an `OSError`, with advice if a disk is full."""
    reason = (error.strerror or str(error)).lower()
    return f"{reason} (free some space and continue with --resume)" if error.errno in _FULL else reason


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of any torch optimizer: tensors named `optimizer/<parameter>/<key>`, and the rest, for JSON."""
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in packed["state"].items():
        scalars[str(index)] = {key: value for key, value in entries.items() if not isinstance(value, Tensor)}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
    return tensors, {"state": scalars, "param_groups": packed["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Restore the state from `pack_optimizer`. Other tensors are ignored."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in rest["state"].items()}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            state[int(index)][key] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})


def pack_rng() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The random generators of torch, numpy and Python: tensors named `rng/...`, and the rest, for JSON."""
    numpy_state: Any = np.random.get_state(legacy=False)
    version, words, gauss = random.getstate()
    tensors = {
        "rng/torch": torch.get_rng_state(),
        "rng/numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "rng/python": torch.tensor(words, dtype=torch.int64),
    }
    numpy_rest = {
        "pos": int(numpy_state["state"]["pos"]),
        "has_gauss": int(numpy_state["has_gauss"]),
        "gauss": float(numpy_state["gauss"]),
    }
    return tensors, {"numpy": numpy_rest, "python": {"version": version, "gauss": gauss}}


def unpack_rng(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Restore the generators from `pack_rng`."""
    torch.set_rng_state(tensors["rng/torch"])
    keys = tensors["rng/numpy"].numpy().astype(np.uint32)
    numpy_rest = rest["numpy"]
    np.random.set_state(("MT19937", keys, numpy_rest["pos"], numpy_rest["has_gauss"], numpy_rest["gauss"]))
    words = tuple(tensors["rng/python"].tolist())
    random.setstate((rest["python"]["version"], words, rest["python"]["gauss"]))


def _write(file: Any, data: bytes) -> None:
    file.write(data)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. If the folder cannot be opened, durability is up to the file system."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _named_tensor_file(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text())["tensors"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove_leftovers(folder: Path, name: str, keep: str | None) -> None:
    """Remove tensor files of earlier checkpoints of this name, and leftovers of a killed save."""
    for pattern in (f"{name}-*.safetensors", f".{name}-*.tmp", f".{name}.json.*.tmp"):
        for path in folder.glob(pattern):
            if path.name != keep:
                path.unlink(missing_ok=True)


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("checkpoints need safetensors: pip install 'fastmaml[train]'") from None
    return safetensors.torch
