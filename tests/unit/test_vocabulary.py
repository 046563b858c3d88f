# The lists of csrc that enums, parsers, tables and tests are made from: nobody can forget a word of one.
from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from torch import nn

from fastmaml import build
from fastmaml.network import fused_layers

_C = pytest.importorskip("fastmaml._C", reason="make build")

# header, a row of its list, the row that is planted behind it, and the sources that must not compile then
PLANTED = {
    "a rectifier": (
        "program/pointwise.h", 'X(leaky_relu, "slope")', 'X(planted, "")',
        ("reference/pointwise.o", "cpu/portable/pointwise.o", "emulated/cuda/pointwise.o"),
    ),
    "a smooth function": (
        "program/pointwise.h", 'X(silu, "")', 'X(planted, "")',
        ("reference/pointwise.o", "cpu/portable/pointwise.o", "emulated/cuda/pointwise.o"),
    ),
    "a loss": ("program/layers.h", 'X(mse, "", row)', 'X(planted, "", row)', ("meta/gradient.o",)),
    "an update rule": (
        "meta/inner_loop.h", 'X(sgd, "momentum", "dampening", "nesterov")', 'X(planted, "rho")',
        ("meta/inner_loop.o", "meta/update_rule.o"),
    ),
    "a layer": ("program/program.h", "X(linear)", "X(planted)", ("program/passes.o",)),
}  # fmt: skip


@pytest.mark.parametrize("what, source", [(what, source) for what in PLANTED for source in PLANTED[what][-1]])
def test_a_forgotten_word_does_not_compile(tmp_path: Path, what: str, source: str):
    header, row, planted, _ = PLANTED[what]
    csrc = build.source_folder()
    text = (csrc / header).read_text()
    assert text.count(row) == 1
    copy = tmp_path / header
    copy.parent.mkdir()
    copy.write_text(text.replace(row, f"{row} {planted}"))
    found = [c for c in build.compilations(csrc) if c.name == source]
    if not found:
        pytest.skip("the emulated backend is built on Linux alone")
    command = [build.compiler(), *build.BASE_FLAGS, f"-I{tmp_path}", f"-I{csrc}", *found[0].flags, "-fsyntax-only"]
    result = subprocess.run(
        [*command, str(found[0].source)], capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    assert result.returncode != 0
    assert "planted" in result.stderr


@pytest.mark.parametrize("sanitize", ["", "address,undefined", "thread"])
def test_every_build_of_the_core_refuses_a_forgotten_word(sanitize: str):
    folder = "../build/core" + f"-{sanitize.replace(',', '-')}" * bool(sanitize)
    objects = ["program/op.o", "tests/test_fuse.o", "emulated/cuda/pointwise.o", "race/cuda/pointwise.o"]
    said = subprocess.run(
        ["make", "-s", "-n", "-B", "-C", str(build.source_folder()), f"SANITIZE={sanitize}",
         *(f"{folder}/{name}" for name in objects)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    compiled = [line for line in said.splitlines() if " -c " in line]
    assert len(compiled) == len(objects)
    assert all(" -Werror=switch " in line for line in compiled)


FUSED = [kind for kind in fused_layers._MODULES if not issubclass(kind, nn.modules.dropout._DropoutNd)]


def test_the_readme_names_every_fused_layer():
    readme = (build.PACKAGE.parent / "README.md").read_text().replace("BatchNorm1d/2d", "BatchNorm1d, BatchNorm2d")
    assert {kind.__name__ for kind in FUSED} <= set(re.findall(r"\w+", readme))


def test_python_reads_every_pointwise_function():
    words = set()
    for kind in FUSED:
        for how in ({}, {"approximate": "tanh"}):
            try:
                module = kind(**how)
            except TypeError:
                continue
            words.add(fused_layers.read_module(module, "", lambda tensor, where: None)[0])
    assert {*_C.vocabulary()["rectifiers"], *_C.vocabulary()["smooth"]} <= words
