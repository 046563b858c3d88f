# The CUDA library: its sources and devices, and its messages on a machine without a GPU.
from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import kernel_launches
import pytest

from fastmaml import build
from fastmaml.compiled import loading

_C = pytest.importorskip("fastmaml._C", reason="make build")
LIBRARY = build.PACKAGE / build.CUDA_LIBRARY


@pytest.fixture
def library() -> Path:
    if reason := kernel_launches.why_no_nvcc():
        pytest.skip(reason)
    return LIBRARY


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


# ---------------------------------------------------------------- as it is built


def test_the_library_is_of_these_sources_and_a_launch_without_a_driver_is_one_sentence(library):
    said = in_a_new_process(
        "import fastmaml.build as b; b.load()\nfrom fastmaml import _C\n"
        f"_C.load_cuda({str(library)!r})\nassert _C.cuda_loaded()\n"
        "try: _C.try_cuda(); print('ok')\nexcept RuntimeError as e: print(e)"
    )
    assert said in ("ok", "no CUDA driver on this machine", "no CUDA device on this machine")


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here")
def test_the_library_knows_no_torch_and_exports_two_functions(library):
    symbols = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"torch|c10|Py", symbols)
    assert {line.split()[-1] for line in symbols.splitlines() if " T " in line} == {
        "fastmaml_cuda_table",
        "fastmaml_cuda_stamp",
    }


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here")
def test_the_module_needs_nothing_that_only_one_build_of_torch_has():
    # So the same module, and the same library, serve torch for the CPU and torch for CUDA.
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    wanted = {line.split()[-1].split("@")[0] for line in symbols.splitlines()}
    of_torch = {name for name in wanted if re.search(r"torch|c10", name)}
    assert of_torch and all(re.match(r"aoti_torch_|torch_", name) for name in of_torch)
    assert not any("cuda" in name.lower() for name in of_torch - {"aoti_torch_device_type_cuda"})


@pytest.mark.skipif(
    not (build.PACKAGE.parent / "build" / "cuda" / "cuda").is_dir(), reason="no objects of make cuda here"
)
def test_no_float32_kernel_of_the_layered_walk_spills(library):
    assert [spill for spill in build.spills(kernel_launches.CUDA) if not spill.allowed] == []


# ---------------------------------------------------------------- what else may be there


def test_a_library_of_other_sources_is_refused(tmp_path):
    source, target = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(
        'const void* fastmaml_cuda_table(int p, long b) { return 0; }\nconst char* fastmaml_cuda_stamp(void) { return "x"; }\n'
    )
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    with pytest.raises(
        RuntimeError, match=r"other.so was built from other sources than the compiled module; run `make cuda`"
    ):
        _C.load_cuda(str(target))
    source, target = tmp_path / "another.c", tmp_path / "another.so"
    source.write_text("int nothing;\n")
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    with pytest.raises(RuntimeError, match=r"another.so is not fastmaml's CUDA library"):
        _C.load_cuda(str(target))
    with pytest.raises(RuntimeError, match=r"nowhere.so does not load"):
        _C.load_cuda(str(tmp_path / "nowhere.so"))


def test_without_a_driver_nothing_is_built(monkeypatch):
    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(loading.ctypes, "CDLL", no_driver)
    monkeypatch.setattr(build, "load_cuda", lambda: pytest.fail("built for nobody"))
    assert loading.load_cuda.__wrapped__() == "no CUDA driver on this machine"


def test_nvcc_is_found_in_its_places(tmp_path, monkeypatch):
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path), "platlib": str(tmp_path)})
    with pytest.raises(build.BuildError, match="no CUDA compiler found"):
        build.nvcc()
    places = {"pip": tmp_path / "nvidia" / "cu13" / "bin", "home": tmp_path / "cuda" / "bin"}
    for place in places.values():
        place.mkdir(parents=True)
        (place / "nvcc").touch(mode=0o755)
    assert build.nvcc() == str(places["pip"] / "nvcc")
    (tmp_path / "nvcc").touch(mode=0o755)
    assert build.nvcc() == str(tmp_path / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert build.nvcc() == str(places["home"] / "nvcc")
    monkeypatch.setenv("NVCC", "ccache nvcc")
    assert build.nvcc() == "ccache nvcc"


def test_architectures_are_chosen_by_name(monkeypatch):
    monkeypatch.delenv("FASTMAML_CUDA_ARCHS", raising=False)
    assert build.cuda_archs() == ("80", "90")
    for text, expected in (("all", ("80", "90", "100", "120")), ("86", ("86",)), ("80;90a", ("80", "90a"))):
        monkeypatch.setenv("FASTMAML_CUDA_ARCHS", text)
        assert build.cuda_archs() == expected
    monkeypatch.setenv("FASTMAML_CUDA_ARCHS", "sm_80")
    with pytest.raises(build.BuildError, match="holds 'sm_80', which is no architecture like 80 or 90"):
        build.cuda_archs()


def test_a_spill_is_found_and_forgiven_by_kernel_and_device(tmp_path):
    (tmp_path / "cuda").mkdir()
    compiled, told = (
        "ptxas info    : Compiling entry function '_Zx' for 'sm_{}'\n",
        (
            "ptxas info    : Function properties for {}\n    8 bytes stack frame, {} bytes spill stores, 8 bytes spill loads\n"
        ),
    )
    (tmp_path / "cuda" / "x.o.log").write_text(
        compiled.format("80") + told.format("_Z3mapIfE", 0) + told.format("_Z4normIfE", 12) + told.format("_Z3mapIdE", 4)
        + told.format("_Z8residentIfEv", 8) + told.format("_Z12product_stepIfEv4HereE", 4)
        + compiled.format("120") + told.format("_Z3mapIfE", 16)
    )  # fmt: skip
    found = {(spill.symbol, spill.arch, spill.stored): spill.allowed for spill in build.spills(tmp_path)}
    assert found == {
        ("_Z4normIfE", "80", 12): False,
        ("_Z3mapIdE", "80", 4): True,
        ("_Z8residentIfEv", "80", 8): True,
        ("_Z12product_stepIfEv4HereE", "80", 4): True,
        ("_Z3mapIfE", "120", 16): True,
    }


@pytest.mark.parametrize("text, has", [("cuda: Optional[str] = None", False), ("cuda: Optional[str] = '12.8'", True)])
def test_a_torch_for_cuda_is_told_without_importing_it(text, has, tmp_path, monkeypatch):
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ndebug = False\n{text}\ngit_version = 'x'\n")
    monkeypatch.setattr(build, "torch_folder", lambda: tmp_path)
    assert build.torch_has_cuda() is has
