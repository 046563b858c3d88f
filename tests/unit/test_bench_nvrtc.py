# The kernel laboratory: every kind of kernel of csrc/cuda compiles with NVRTC. Skipped if cupy or NVRTC is missing.
from __future__ import annotations

import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # bench is no installed package

from bench.kernels import nvrtc  # noqa: E402
from bench.kernels.cubins import CSRC, Missing  # noqa: E402


@pytest.fixture(scope="module")
def laboratory():
    try:
        return nvrtc.api()
    except Missing as missing:
        pytest.skip(str(missing))


def one_of_each_template():
    """The shortest instance of every __global__ template, in float32 and, of products, on tensor cores too."""
    _C = pytest.importorskip("fastmaml._C")
    shortest: dict[str, str] = {}
    for name in sorted((name for _, name in _C.emulated_kernels().values()), key=len):
        if "double" not in name:
            numbers = re.findall(r"Numbers\)\d", name)
            shortest.setdefault(name.split("<")[0] + "".join(numbers), name)
    return list(shortest.values())


def test_every_kernel_compiles(laboratory):
    expressions = one_of_each_template()
    compiled = nvrtc.compile_kernels(expressions)
    assert len(expressions) >= 20
    for expression in expressions:
        assert 8 < compiled[expression].report.registers <= 255, expression
        assert compiled[expression].symbol.encode() in compiled[expression].cubin


def test_what_it_prints(laboratory, capsys):
    assert nvrtc.main(["map<float, SgdUpdate>", "--threads", "256", "--arch", "sm_80"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"sm_80: \d+ registers, 0 bytes spilled", text)
    assert "warps of a multiprocessor" in text


def test_compilers_words_reach_the_caller(laboratory, capsys):
    assert nvrtc.main(["map<float, NoSuchFunction>"]) == 1
    assert "NoSuchFunction" in capsys.readouterr().err


def test_source_includes_every_kernel():
    text = nvrtc.source(["trial.cuh"])
    for file in (CSRC / "cuda" / "kernels").glob("*.cuh"):
        assert f'"cuda/kernels/{file.name}"' in text
    assert '"trial.cuh"' in text


@pytest.mark.parametrize("cut", [0, 1])
def test_cubin_gets_its_last_byte_back(cut):
    header = bytearray(64)
    struct.pack_into("<QQ", header, 32, 100, 64)  # program headers at 100, sections at 64
    struct.pack_into("<HHHH", header, 54, 56, 2, 32, 1)
    whole = bytes(header) + bytes(100 + 2 * 56 - 64)
    assert nvrtc.whole_elf(whole[: len(whole) - cut]) == whole


def test_struct_arguments_lie_as_in_c():
    packed = nvrtc.pack(np.int32(1), 2, np.int32(3))  # int, int64_t, int
    assert packed.tobytes() == struct.pack("<i4xqi4x", 1, 2, 3)
