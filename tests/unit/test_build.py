# The compiled module comes from these sources, uses torch's threads and refuses wrong input. Also the errors if it is
# missing or cannot be built.
from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastmaml import build
from fastmaml.compiled.loading import load_compiled

_C = pytest.importorskip("fastmaml._C", reason="make build")

TEXT = """fastmaml 1
input 2 6 6
param 0 4 2 3 3
param 72 4
param 76 3 36
conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1
max_pool2d 1 kernel=2,2 stride=2,2 padding=0,0
tanh 2
flatten 3
linear 4 weight=2 bias=-1
output 5
loss cross_entropy smoothing=0
"""
P, T, N = 184, 3, 4


def arguments(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "params": 0.3 * normal(T, P),
        "theta": 0.3 * normal(P),
        "x": normal(T, N, 2, 6, 6),
        "query_x": normal(T, N + 1, 2, 6, 6),
        "y": torch.randint(3, (T, N), generator=generator),
        "query_y": torch.randint(3, (T, N + 1), generator=generator),
        "v": normal(T, P),
        "dy": normal(T, N, 3),
        "rates": torch.full((1, P), 0.1, dtype=dtype),
        "weights": torch.rand(T, N, generator=generator).to(dtype),
        "buffers": torch.empty(0, dtype=dtype),
    }


def meta_gradient(a: dict[str, torch.Tensor], backend: str = "cpu", inner_steps: int = 2) -> tuple[torch.Tensor, ...]:
    return torch.ops.fastmaml.meta_gradient(
        TEXT, backend, a["theta"], a["x"], a["y"], None, a["query_x"], a["query_y"], None, None, a["rates"],
        f"steps={inner_steps} rate_grad=1", "low", None, None, None, None, a["buffers"],
    )  # fmt: skip


# ---------------------------------------------------------------- the module


def test_the_compiled_module_is_the_one_of_these_sources():
    stamp = Path(_C.__file__).with_name(build.STAMP)
    assert stamp.is_file(), "run `make build`"
    assert stamp.read_text().strip() == build.stamp(), "the compiled module is older than csrc/: run `make build`"


def test_two_threads_run_in_torchs_own_openmp(threads):
    torch.set_num_threads(2)
    assert _C.threads_seen() == 2
    torch.set_num_threads(1)
    assert _C.threads_seen() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_loaded():
    # numpy's or another package's may be there too in the test process, so ask a fresh one.
    code = (
        "import torch, fastmaml, fastmaml._C as C; C.threads_seen();"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l or 'libiomp' in l or 'libomp' in l}))"
    )
    assert python(code).stdout.strip() == "1"


def test_the_core_makefile_builds_the_same_list():
    csrc = build.source_folder()
    listed = subprocess.run(
        ["make", "-s", "--no-print-directory", "-C", str(csrc), "list"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    objects = [c.name for c in build.compilations(csrc, bindings=False)]
    isas = [" ".join((name, f"-DFASTMAML_LANES_BYTES={width}", *flags)) for name, width, flags in build.ISAS]
    assert sorted(listed) == sorted(objects + isas)
    position = [listed.index(next(o for o in objects if o.startswith(f"cpu/{name}/"))) for name, _, _ in build.ISAS]
    assert position == sorted(position)  # from narrow to wide: build.py says why


# ---------------------------------------------------------------- the operators

OPERATORS = {
    "forward": lambda a: (a["params"], a["x"], None, a["buffers"]),
    "grad": lambda a: (a["params"], a["x"], a["y"], a["weights"], a["buffers"]),
    "hvp": lambda a: (a["theta"], a["x"], a["y"], None, a["v"], a["buffers"]),
    "linearise": lambda a: (True, a["params"], a["x"], a["y"], a["weights"], a["buffers"]),
    "curvature": lambda a: (
        *(False, a["params"], a["x"], a["y"], None),
        *torch.ops.fastmaml.linearise(TEXT, "cpu", False, a["params"], a["x"], a["y"], None, a["buffers"]),
        *(a["v"], a["buffers"]),
    ),
    "vjp": lambda a: (a["params"], a["x"], a["dy"], a["buffers"]),
    "adapt": lambda a: (
        *(a["theta"], a["x"], a["y"], None, a["rates"], "steps=2 rule=adam"),
        *(None, None, None, None, None, a["buffers"]),
    ),
    "meta_gradient": lambda a: (
        *(a["theta"], a["x"], a["y"], None, a["query_x"], a["query_y"], None, None, a["rates"]),
        *("steps=2 rate_grad=1", "auto", None, None, None, None, a["buffers"]),
    ),
    "plain_meta_gradient": lambda a: (
        *([a["theta"][:7], a["theta"][7:]], a["x"], a["y"], a["query_x"], a["query_y"]),
        *(0.1, "steps=2 rate_grad=1", "auto"),
    ),
    "solve": lambda a: (a["params"], a["x"], a["y"], None, a["v"], None, 2.0, 3, 0.1, 1e-10, a["buffers"]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_accepts(name):
    assert not load_compiled()  # it registers the operators' shapes too
    operator = getattr(torch.ops.fastmaml, name).default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if (
        name == "linearise"
    ):  # two runs leave different numbers in the gaps between a tape's parts, which the last compares
        checks = checks[:-1]
    torch.library.opcheck(operator, (TEXT, "cpu", *OPERATORS[name](arguments())), test_utils=checks)


def test_passes_answers_in_torchs_layout_on_both_backends():
    a = arguments(dtype=torch.float64)
    x_dot, dy, dy_dot = torch.randn_like(a["x"]), *(torch.randn(T, N, 3, dtype=torch.float64) for _ in range(2))
    results = [
        torch.ops.fastmaml.passes(TEXT, b, False, a["params"], a["v"], a["x"], x_dot, dy, dy_dot, a["buffers"])
        for b in ("cpu", "reference")
    ]
    assert [tuple(r.shape) for r in results[0]] == [(T, N, 3)] * 2 + [(T, N, 2, 6, 6)] * 2 + [(T, P)] * 2
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)  # rounding: float64, sums of 100s of terms


def test_reference_answers_float32_in_float32():
    exact = meta_gradient(arguments(dtype=torch.float64), "reference")
    for got, want in zip(meta_gradient(arguments(), "reference"), exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)  # the inputs are rounded to float32


def test_calls_from_several_threads_do_not_disturb_each_other():
    inputs = [arguments(seed) for seed in range(6)]
    alone = [meta_gradient(a, inner_steps=3) for a in inputs]
    got: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in inputs]

    def repeat(i: int) -> None:
        for _ in range(5):
            got[i].append(meta_gradient(inputs[i], inner_steps=3))

    workers = [threading.Thread(target=repeat, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for want, results in zip(alone, got, strict=True):
        assert len(results) == 5
        for result in results:
            assert all(torch.equal(r, w) for r, w in zip(result, want, strict=True))


def changed(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**arguments(), **changes}


BAD = {
    "x of another size": (changed(x=torch.zeros(T, N, 1, 6, 6)), r"support_x \[3, 4, 1, 6, 6\] does not fit input \[2, 6, 6\]"),
    "no tasks": (changed(x=torch.zeros(0, N, 2, 6, 6)), r"support_x \[0, 4, 2, 6, 6\] holds no tasks"),
    "other tasks": (changed(query_x=torch.zeros(2, N, 2, 6, 6)), "query_x .* holds 2 tasks, but the other inputs hold 3"),
    "label too large": (changed(y=torch.full((T, N), 3)), "support_y .* holds label 3 for a network with 3 outputs"),
    "negative label": (changed(y=torch.full((T, N), -1)), "support_y .* holds label -1"),
    "labels as floats": (changed(y=torch.zeros(T, N)), "support_y .* must hold labels as int64"),
    "two types": (changed(x=torch.zeros(T, N, 2, 6, 6).double()), "support_x .* must have the type of the parameters, float32"),
    "half precision": (changed(theta=torch.zeros(P).half()), r"params \[184\] must be float32 or float64"),
    "short theta": (changed(theta=torch.zeros(P - 1)), r"theta \[183\] must be \[184\]"),
    "rates for other steps": (changed(rates=torch.zeros(3, P)), r"rates \[3, 184\] must be \[1, 184\] or \[2, 184\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_in_one_sentence(name):
    inputs, sentence = BAD[name]
    with pytest.raises(ValueError, match=sentence) as error:
        meta_gradient(inputs)
    assert "\n" not in str(error.value)


def test_unknown_words_are_refused():
    a = arguments()
    with pytest.raises(ValueError, match='backend "gpu" is not one of cpu, reference'):
        meta_gradient(a, "gpu")
    with pytest.raises(ValueError, match="steps=-1"):
        meta_gradient(a, inner_steps=-1)
    with pytest.raises(ValueError, match='unknown instruction set "sse9"'):
        _C.set_cpu_isa("sse9")
    with pytest.raises(ValueError, match="blend 0"):
        _C.describe(TEXT.replace("tanh 2", "blend 0"))


# ---------------------------------------------------------------- building


# An editable install finds fastmaml._C of the checkout where the copy on the path has none.
NOT_EDITABLE = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]; "
)


def python(code: str, package: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python with the checkout's package, or a copy of it, on its path."""
    path = str((package or build.PACKAGE).parent)
    return subprocess.run(
        [sys.executable, "-c", NOT_EDITABLE + code],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **environment}, cwd=path, check=True,
    )  # fmt: skip


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package without its compiled module, as after `pip install .` with build isolation."""
    copy = tmp_path / "site" / "fastmaml"
    copy.mkdir(parents=True)
    for item in build.PACKAGE.iterdir():
        if not item.name.startswith(("_C", "__pycache__")):
            (copy / item.name).symlink_to(item)
    (copy / "build.py").unlink()
    (copy / "build.py").write_bytes((build.PACKAGE / "build.py").read_bytes())  # it looks for csrc/ beside itself
    (copy / "csrc").symlink_to(build.source_folder())
    return copy


# Stands in for the compiler: hands out the module that is there, and counts.
FAKE = f"""
import shutil, time
from fastmaml import build
def fake(target, folder, progress):
    time.sleep(1); folder.mkdir(); shutil.copy({_C.__file__!r}, target)
    with open(target.with_name("count"), "a") as f: f.write("built\\n")
build.build = fake
"""
USE = "import fastmaml as fm; e = fm.Engine(fm.models.mlp([1, 4, 1]), loss='mse'); print(e.backend, e.why)"


def test_a_missing_module_is_built_once_into_the_cache(package, tmp_path):
    cache = tmp_path / "cache"
    code = FAKE + USE + "; import fastmaml._C as C; print(C.__file__)"
    results: list[subprocess.CompletedProcess[str]] = []
    both = [
        threading.Thread(target=lambda: results.append(python(code, package, FASTMAML_CACHE=str(cache))))
        for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
    (folder,) = (cache / "build").iterdir()
    assert folder.name == f"{build.stamp()}-torch-{importlib.metadata.version('torch')}"
    assert (folder / "count").read_text() == "built\n"
    assert [r.stdout.split() for r in results] == [["cpu", str(folder / build.MODULE)]] * 2
    progress = "".join(r.stderr for r in results)
    assert progress.count("the compiled module is missing; building it once") == 1
    again = python(USE, package, FASTMAML_CACHE=str(cache))
    assert again.stdout.split() == ["cpu"]
    assert again.stderr == ""


def test_without_a_compiler_autodiff_runs_and_says_why(package, tmp_path):
    # This process may have found its compiler on PATH; an empty one has none.
    result = python(USE, package, FASTMAML_CACHE=str(tmp_path), PATH=str(tmp_path), CXX="g++")
    assert result.stdout.startswith(
        "autodiff the compiled module is not available: CXX names the compiler 'g++', which"
    )
    assert "runs on autodiff" in result.stderr


def test_a_cache_that_cannot_be_written_is_one_sentence(package, tmp_path):
    (tmp_path / "file").touch()
    result = python(USE, package, FASTMAML_CACHE=str(tmp_path / "file"))
    assert "autodiff the compiled module is not available:" in result.stdout
    assert "cannot be written: Not a directory" in result.stdout


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no ninja"])
def test_a_failing_compiler_is_one_sentence_with_its_first_error(ninja, monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    if not ninja:
        monkeypatch.setattr(build, "_ninja", lambda: None)
    with pytest.raises(build.BuildError, match=r"failed: x.cpp:1: error: no such thing \(full output in .*build.log\)"):
        build.build(tmp_path / "out" / build.MODULE, tmp_path / "objects")
    assert not (tmp_path / "out").exists()


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.1")
    with pytest.raises(build.BuildError, match=r"torch 2.9.1 is too old; fastmaml needs torch 2.10 or later"):
        build.torch_folder()


@pytest.mark.slow
@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no ninja"])
def test_the_sources_build_from_nothing(ninja, package, tmp_path):
    without = "" if ninja else "from fastmaml import build; build._ninja = lambda: None\n"
    result = python(without + USE, package, FASTMAML_CACHE=str(tmp_path / "cache"))
    assert result.stdout.split() == ["cpu"]
    assert "built in" in result.stderr


@pytest.mark.slow
def test_a_wheel_carries_the_sources(tmp_path):
    root = build.PACKAGE.parent
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(root)],
        check=True, env={**os.environ, "FASTMAML_NO_COMPILE": "1"},
    )  # fmt: skip
    import zipfile

    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fastmaml/csrc/program/op.h", "fastmaml/csrc/bindings/module.cpp", "fastmaml/engine/engine.py"} <= names
    assert not any(name.endswith((".o", ".so")) for name in names)
