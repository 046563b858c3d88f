# Every __global__ function was executed on the emulator by some test.
from __future__ import annotations

from collections import Counter

import kernel_launches
import pytest

pytest.importorskip("fastmaml._C")
if not hasattr(__import__("fastmaml._C")._C, "emulated_kernels"):
    pytest.skip("the emulator runs on Linux alone", allow_module_level=True)


@pytest.fixture(scope="module")
def launches():
    """Of the C++ test programs, which run first where they are not up to date, and of all tests before."""
    kernel_launches.make("emulated")
    return kernel_launches.of_programs() + kernel_launches.of_workers() + kernel_launches.of_this_process()


def missing(kernels, launches, names):
    return sorted(names.get(kernel, kernel) for kernel in kernels if not launches[kernel])


def test_every_compiled_kernel_was_launched(launches):
    names = kernel_launches.readable_names()
    assert len(names) > 100
    assert missing(names, launches, names) == []


def test_every_kernel_that_nvcc_emits_was_launched(launches):
    if reason := kernel_launches.why_no_nvcc():
        pytest.skip(reason)
    emitted = kernel_launches.of_nvcc()
    assert len(emitted) > 100
    names = kernel_launches.readable_names()
    assert missing(emitted, launches, names) == []
    assert sorted(set(names) - emitted) == [], "kernels of the emulator that nvcc does not know"


def test_a_kernel_that_nobody_launched_is_named():
    counts = Counter({symbol: k.launches for symbol, k in kernel_launches.parse("3 32 0 _Z1av\n0 0 0 _Z1bv\n").items()})
    assert counts["_Z1av"] == 3
    assert missing(["_Z1av", "_Z1bv", "_Z1cv"], counts, {"_Z1bv": "b"}) == ["_Z1cv", "b"]


def test_launches_of_several_programs_add_up(tmp_path, monkeypatch):
    (tmp_path / "test_cuda_a.launched").write_text("3 32 0 _Z1av\n0 0 0 _Z1bv\n")
    (tmp_path / "test_cuda_b.launched").write_text("2 64 512 _Z1av\n1 32 128 _Z1bv\n")
    (tmp_path / "test_cuda_b_race.launched").write_text("7 64 512 _Z1av\n")
    monkeypatch.setattr(kernel_launches, "CORE", tmp_path)
    assert kernel_launches.sizes() == {"_Z1av": (5, 64, 512), "_Z1bv": (1, 32, 128)}
    assert kernel_launches.of_programs() == {"_Z1av": 5, "_Z1bv": 1}


def test_ptxas_names_its_entries():
    log = (
        "ptxas info    : Compiling entry function '_Z1av' for 'sm_80'\nptxas info    : Function properties for _Z1bv\n"
    )
    assert kernel_launches.ptxas_entries(log) == {"_Z1av"}
