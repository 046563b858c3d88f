# Backends by name, as fixtures. `backend`: every backend. `compiled`: the C++ ones. `cpu`: each instruction set of this
# machine. `device`: the CUDA kernels, on a GPU and emulated.
from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Two workers and their subprocesses on two cores: an OpenMP thread that spins while it waits takes the core from one that works.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # cases, compare and oracle are imported by plain name
import kernel_launches
from on_device import moved_to, why_no_cuda

# The same examples on every run and machine, so a failure can be repeated. No deadline, because the first call plans and
# allocates. Function-scoped fixtures are allowed: the backend must not change between the examples of one test.
hypothesis.settings.register_profile(
    "fastmaml",
    deadline=None,
    derandomize=True,
    max_examples=8,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fastmaml")

ISAS = ("portable", "avx2", "avx2x16", "avx512")

# Tests are many and tiny, so waiting for a second thread costs more than it gains. Use the fixture `threads` for two.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Backend:
    """A backend for a test. `name`: its name for Engine and the operators."""

    name: str
    isa: str = ""
    layout: str = "auto"

    def __str__(self) -> str:
        return "-".join([self.name, *filter(None, [self.isa]), *([self.layout] if self.layout != "auto" else [])])


# Small networks run with a task in each lane; once, they also run with one task after the other, as large ones do.
CPUS = [*(Backend("cpu", isa) for isa in ISAS), Backend("cpu", "avx2", layout="tasks")]
REFERENCE, AUTODIFF = Backend("reference"), Backend("autodiff")
DEVICES = [Backend("cuda"), Backend("cuda_emulated")]


def activate(backend: Backend) -> Iterator[Backend]:
    """Chooses the backend's instruction set for one test. Skips, with the reason, if it cannot run here."""
    if backend.name == "autodiff":
        yield backend
        return
    from fastmaml import _C

    if backend.name == "cuda":
        if reason := why_no_cuda():
            pytest.skip(reason)
        with moved_to("cuda", "cuda"):
            yield backend
    elif backend.isa:
        if backend.isa not in _C.available_isas():
            pytest.skip(f"this machine has no {backend.isa} (it has {', '.join(_C.available_isas())})")
        before = _C.cpu_isa()
        _C.set_cpu_isa(backend.isa)
        _C.set_cpu_layout(backend.layout)
        yield backend
        _C.set_cpu_layout("auto")
        _C.set_cpu_isa(before)
    else:
        yield backend


@pytest.fixture(params=[REFERENCE, *CPUS, AUTODIFF, *DEVICES], ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    yield from activate(request.param)


@pytest.fixture(params=[REFERENCE, *CPUS, *DEVICES], ids=str)
def compiled(request: pytest.FixtureRequest) -> Iterator[Backend]:
    yield from activate(request.param)


@pytest.fixture(params=CPUS, ids=str)
def cpu(request: pytest.FixtureRequest) -> Iterator[Backend]:
    yield from activate(request.param)


@pytest.fixture(params=DEVICES, ids=str)
def device(request: pytest.FixtureRequest) -> Iterator[Backend]:
    yield from activate(request.param)


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's FASTMAML_* variables must not decide what a test runs on."""
    for name in [name for name in os.environ if name.startswith("FASTMAML_") and name != "FASTMAML_DATA"]:
        monkeypatch.delenv(name)


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that change torch's thread count. Restores the count afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def worker_of(config: pytest.Config) -> str:
    """The name of this worker of `pytest -n`, "" in a process that runs all tests, or hands them out."""
    return getattr(config, "workerinput", {}).get("workerid", "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs the tests of launched kernels last, after the tests that launch them. Workers do not know each other's launches."""
    items.sort(key=lambda item: item.path.name == "test_kernel_coverage.py")
    if worker_of(config):
        items[:] = [item for item in items if item.path.name != "test_kernel_coverage.py"]


def pytest_collection_finish() -> None:
    """Thousands of items stay until the end: the garbage collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionstart(session: pytest.Session) -> None:
    if getattr(session.config.option, "numprocesses", None) and not worker_of(session.config):
        kernel_launches.forget_workers()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if worker := worker_of(session.config):
        kernel_launches.leave(worker)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints where the time went, the launches on the emulator, and the number of checks of the race build."""
    folders, files = Counter[str](), Counter[str]()
    for report in [r for of_one in terminalreporter.stats.values() for r in of_one if isinstance(r, pytest.TestReport)]:
        file = report.nodeid.partition("::")[0]
        files[file] += report.duration
        folders[file.rpartition("/")[0]] += report.duration
    if len(files) > 10:
        for title, seconds in (("folders", folders), ("slowest files", files)):
            listed = ", ".join(f"{Path(name).name} {s:.0f}" for name, s in seconds.most_common(10))
            terminalreporter.write_line(f"seconds of all workers by {title}: {listed}")
    if line := kernel_launches.summary():
        terminalreporter.write_line(line)
    checks = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "race_checks" and report.when == "call"
    ]
    if checks:
        terminalreporter.write_line(f"race build of the CUDA kernels: {sum(checks)} checks passed")
