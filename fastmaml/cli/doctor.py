"""fastmaml doctor: this machine, the backends that run here, why others do not, and whether their gradients agree."""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastmaml
from fastmaml import Engine, models
from fastmaml.compiled import introspection
from fastmaml.compiled.loading import load_cuda
from fastmaml.engine.backend import BACKENDS
from fastmaml.machine import machine
from fastmaml.tasks import TaskBatch
from fastmaml.tasks.cache import cache_folder
from fastmaml.training import checkpoint

EXTRAS = {
    "train": ("tqdm", "tensorboard", "safetensors", "pyyaml"),
    "report": ("matplotlib",),
    "vision": ("pillow", "matplotlib"),
    "test": ("pytest", "hypothesis"),
}


class Finding(NamedTuple):
    """One line of the output. `state`: "ok", "note" (something optional is missing) or "broken" (exit code 1)."""

    state: str
    topic: str
    text: str


def add_parser(subparsers: Any) -> None:
    """Add this command to the parser."""
    parser = subparsers.add_parser(
        "doctor",
        help="show what works on this machine",
        description="Shows this machine and its backends, and checks that the backends agree. Exit code 0: the compiled "
        "engine works. 1: something is broken.",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the network and tasks of the check (default 0)")
    parser.add_argument("--out", metavar="FILE", help="also write the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings. Returns 1 if one is broken, else 0."""
    found = list(findings(args.seed))
    marks = {"ok": " ", "note": "-", "broken": "!"}
    for finding in found:
        print(f"{marks[finding.state]} {finding.topic:21} {finding.text}")
    broken = sum(finding.state == "broken" for finding in found)
    print(f"\n{broken} broken (marked !)" if broken else "\nall is well")
    if args.out is not None:
        text = json.dumps([finding._asdict() for finding in found], indent=1) + "\n"
        checkpoint.write_durably(Path(args.out), text.encode())
    return 1 if broken else 0


def findings(seed: int) -> Iterator[Finding]:
    """All findings, from the version down to the optional packages."""
    yield Finding("ok", "fastmaml", f"{fastmaml.__version__}, {Path(fastmaml.__file__).parent}")
    yield Finding("ok", "machine", machine())
    yield Finding("ok", "python", f"{platform.python_version()}, {sys.executable}")
    yield Finding(
        "ok",
        "torch",
        f"{torch.__version__}, {torch.get_num_threads()} threads, {'CUDA' if torch.cuda.is_available() else 'no CUDA'}",
    )
    yield _compiler()
    yield _cache(cache_folder())
    yield from _backends(seed)
    yield from _compiled_module()
    for extra, packages in EXTRAS.items():
        yield _extra(extra, packages)
    for name in ("FASTMAML_BACKEND", "FASTMAML_STRICT", "FASTMAML_CACHE", "FASTMAML_DATA"):
        if name in os.environ:
            yield Finding("ok", name, os.environ[name])


def _compiler() -> Finding:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        path = shutil.which(name.split()[0])
        if path is not None:
            answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            return Finding(
                "ok", "compiler", f"{path}: {answer.splitlines()[0] if answer else 'answers nothing to --version'}"
            )
    return Finding(
        "note",
        "compiler",
        "no C++ compiler found (c++, g++, clang++ or $CXX); only a module that is already compiled can run",
    )


def _cache(folder: Path) -> Finding:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"fastmaml")
            file.flush()
    except OSError as error:
        return Finding(
            "broken",
            "cache",
            f"{folder} is not writable: {checkpoint.why(error)}; set FASTMAML_CACHE to another folder",
        )
    return Finding("ok", "cache", f"{folder}, {shutil.disk_usage(folder).free / 1e9:.1f} GB free")


def _backends(seed: int) -> Iterator[Finding]:
    """For every backend: whether it runs a small convolutional network, and its distance from autodiff's result."""
    model, batch = _small_problem(seed)
    expected = _meta_gradient(model, batch, "autodiff")
    for name in BACKENDS[1:]:
        try:
            grad = _meta_gradient(model, batch, name)
        except ValueError as error:
            # Only `cpu` must run everywhere. Other backends report what is missing.
            yield Finding("broken" if name == "cpu" else "note", f"backend {name}", str(error))
            continue
        distance = ((grad - expected).norm() / expected.norm()).item()
        good = distance <= 1e-9  # in float64: far above rounding, far below any wrong term
        text = (
            f"{'works' if good else 'WRONG'}, meta-gradient within {distance:.0e} of autodiff"
            if name != "autodiff"
            else "works"
        )
        yield Finding("ok" if good else "broken", f"backend {name}", text)
    level = logging.getLogger("fastmaml").level
    logging.getLogger("fastmaml").setLevel(logging.ERROR)
    try:
        auto = Engine(model)
    finally:
        logging.getLogger("fastmaml").setLevel(level)
    yield Finding("ok" if auto.fused else "note", "backend auto", auto.backend + (f": {auto.why}" if auto.why else ""))


def _small_problem(seed: int) -> tuple[torch.nn.Module, TaskBatch]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.conv4(ways=3, filters=4, image_size=16).double()
        images = torch.rand(4, 3, 1, 16, 16, dtype=torch.float64), torch.rand(4, 6, 1, 16, 16, dtype=torch.float64)
    labels = torch.arange(3).repeat(4, 1)
    return model, TaskBatch(images[0], labels, images[1], labels.repeat(1, 2))


def _meta_gradient(model: torch.nn.Module, batch: TaskBatch, backend: str) -> torch.Tensor:
    if backend == "cuda":
        if missing := load_cuda():
            raise ValueError(missing)
        model, batch = copy.deepcopy(model).to("cuda"), batch.to("cuda")
    engine = Engine(model, backend=backend)
    return engine.meta_gradient(engine.flatten(), batch, inner_lr=0.4, inner_steps=2).grad.cpu()


def _compiled_module() -> Iterator[Finding]:
    compiled = introspection.module()  # the engine has loaded it, if possible
    if compiled is None:
        return
    yield Finding("ok", "compiled module", str(compiled.__file__))
    yield Finding("ok", "instruction sets", f"{', '.join(compiled.available_isas())}; in use: {compiled.cpu_isa()}")
    threads, wanted = compiled.threads_seen(), torch.get_num_threads()
    text = f"{threads} seen by the engine, {wanted} wanted by torch"
    yield Finding("ok" if threads == wanted else "note", "threads", text)


def _extra(extra: str, packages: tuple[str, ...]) -> Finding:
    found, missing = [], []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    text = ", ".join(found + [f"no {package}" for package in missing])
    hint = f" (pip install 'fastmaml[{extra}]')" if missing else ""
    return Finding("note" if missing else "ok", f"extra [{extra}]", text + hint)
