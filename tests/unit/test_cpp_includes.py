# Which folder of csrc/ may include which: calls go one way, and the core knows neither Python nor torch (csrc/README.md).
from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# By folder: the folders, or single headers, whose files it may include. The longest folder that holds a file counts.
MAY_INCLUDE = {
    "program": {"program"},
    "meta": {"meta", "program"},
    "plan": {"plan", "meta", "ops", "program"},
    "ops": {"ops", "program"},
    "reference": {"reference", "ops"},
    "cpu": {"cpu", "ops", "program"},
    "cpu/isa": {"cpu/isa", "ops"},
    "cuda": {"cuda", "ops", "program"},
    "cuda/emulated": {"cuda/emulated"},
    # A backend is its table and what Python asks of it, never its kernels.
    "bindings": {
        "bindings", "plan", "meta", "ops", "program",
        "cpu/isa/choose_isa.h", "cuda/cuda_tables.h", "cuda/emulated/emu.h",
    },
}  # fmt: skip

# By the first folder of a header that is not the project's, or its name: who may include it.
OUTSIDE = {"torch": "bindings", "pybind11": "bindings", "Python.h": "bindings", "cuda_runtime.h": "cuda"}

SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def wrong_includes(csrc: Path) -> list[str]:
    """One sentence for each include that MAY_INCLUDE or OUTSIDE forbids."""
    wrong = []
    for file in sorted(f for f in csrc.rglob("*") if f.suffix in SUFFIXES):
        name = file.relative_to(csrc)
        rows = [str(folder) for folder in name.parents if str(folder) in MAY_INCLUDE]
        if not rows:
            wrong.append(f"{name}: its folder has no row in MAY_INCLUDE")
            continue
        for quote, header in INCLUDE.findall(file.read_text()):
            if quote == '"':
                places = {header, *map(str, Path(header).parents)}
                allowed = bool(places & MAY_INCLUDE[rows[0]])
            else:
                first = header.split("/")[0]
                allowed = OUTSIDE.get(first, rows[0]) == rows[0]
                allowed &= "/" not in header or first in OUTSIDE or first == "sys"
            if not allowed:
                wrong.append(f"{name} includes {header}, and {rows[0]}/ may not")
    return wrong


def test_every_folder_includes_what_it_may():
    assert not wrong_includes(CSRC)


def test_the_table_has_no_folder_that_is_gone():
    assert not [folder for folder in MAY_INCLUDE if not (CSRC / folder).is_dir()]


@pytest.mark.parametrize(
    "file, include",
    [
        ("plan/plan.cpp", "<torch/csrc/stable/tensor.h>"),
        ("plan/plan.h", '"bindings/arguments.h"'),
        ("plan/plan.h", '"cpu/choose.h"'),
        ("meta/adapt.cpp", '"ops/ops.h"'),
        ("meta/meta.h", '"plan/plan.h"'),
        ("program/forward_pass.cpp", '"meta/meta.h"'),
        ("program/op.cpp", "<pybind11/pybind11.h>"),
        ("ops/walk.cpp", '"meta/meta.h"'),
        ("ops/walk.cpp", '"plan/plan.h"'),
        ("ops/walk.cpp", '"cpu/cpu.h"'),
        ("reference/loss.cpp", '"cpu/vec.h"'),
        ("cpu/lanes/loss.cpp", '"meta/meta.h"'),
        ("cpu/isa/choose_isa.cpp", '"cpu/cpu.h"'),
        ("cuda/linear.cu", '"plan/plan.h"'),
        ("cuda/kernels/linear.cuh", '"reference/reference.h"'),
        ("cuda/emulated/warp.cpp", '"cuda/device.h"'),
        ("bindings/operators.cpp", '"cuda/choose.h"'),
        ("bindings/operators.cpp", "<cuda_runtime.h>"),
        ("cpu/vec.h", "<ATen/ATen.h>"),
    ],
)
def test_a_planted_include_is_found(file, include, tmp_path):
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(f"#include <vector>\n  # include {include}\n")
    found = wrong_includes(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{file} includes {include[1:-1]}, and ")


def test_a_folder_without_a_row_is_found(tmp_path):
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "new.h").write_text("#pragma once\n")
    assert wrong_includes(tmp_path) == ["extra/new.h: its folder has no row in MAY_INCLUDE"]
