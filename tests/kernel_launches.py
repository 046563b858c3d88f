"""The CUDA kernels launched on the emulator: by the C++ test programs of csrc, and by this process through _C."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fastmaml import build

ROOT = Path(__file__).resolve().parents[1]
CORE, CUDA = ROOT / "build" / "core", ROOT / "build" / "cuda"


def make(target: str) -> None:
    """Runs `make -C csrc TARGET`. Raises AssertionError with the end of its output."""
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    command = ["make", jobs, "-C", str(ROOT / "csrc"), target, f"BUILT={built()}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"make -C csrc {target}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def built() -> str:
    """The folder with the objects of the Python module, if it was built in place from these sources; else ""."""
    folder, stamp = ROOT / "build" / str(sys.implementation.cache_tag), build.PACKAGE / build.STAMP
    return str(folder) if folder.is_dir() and stamp.is_file() and stamp.read_text().strip() == build.stamp() else ""


class Launched(NamedTuple):
    """A program's launches of one kernel: their number, and the largest block and shared memory."""

    launches: int
    threads: int
    shared_bytes: int


def parse(text: str) -> dict[str, Launched]:
    """A program's lines "launches threads shared_bytes symbol", by symbol. A kernel that never ran has 0 launches."""
    lines = [line.split() for line in text.splitlines()]
    return {symbol: Launched(int(launches), int(threads), int(shared)) for launches, threads, shared, symbol in lines}


def sizes() -> dict[str, Launched]:
    """The launches of the C++ programs' last run, by symbol: the sum of launches and the largest sizes."""
    all_of_them: dict[str, Launched] = {}
    for file in sorted(set(CORE.glob("test_cuda_*.launched")) - set(CORE.glob("*_race.launched"))):
        for symbol, more in parse(file.read_text()).items():
            one = all_of_them.get(symbol, Launched(0, 0, 0))
            all_of_them[symbol] = Launched(
                one.launches + more.launches, max(one.threads, more.threads), max(one.shared_bytes, more.shared_bytes)
            )
    return all_of_them


def of_programs() -> Counter[str]:
    """symbol -> launches by the C++ programs."""
    return Counter({symbol: kernel.launches for symbol, kernel in sizes().items()})


def of_this_process() -> Counter[str]:
    """This process' launches through fastmaml._C; empty if the module is not imported."""
    module = sys.modules.get("fastmaml._C")
    if not hasattr(module, "emulated_kernels"):  # not imported, or built where there is no emulator
        return Counter()
    return Counter({symbol: launches for symbol, (launches, _) in module.emulated_kernels().items()})


def forget_workers() -> None:
    for file in CORE.glob("pytest_*.launched"):
        file.unlink()


def leave(worker: str) -> None:
    """Writes this process' launches for of_workers(), because pytest's `worker` ends before they are needed."""
    CORE.mkdir(parents=True, exist_ok=True)
    lines = [build.stamp(), *(f"{launches} 0 0 {symbol}" for symbol, launches in of_this_process().items())]
    (CORE / f"pytest_{worker}.launched").write_text("\n".join(lines) + "\n")


def of_workers() -> Counter[str]:
    """symbol -> launches by the workers of the last `pytest -n` on these sources."""
    found: Counter[str] = Counter()
    for file in CORE.glob("pytest_*.launched"):
        stamp, _, text = file.read_text().partition("\n")
        if stamp == build.stamp():
            found.update({symbol: kernel.launches for symbol, kernel in parse(text).items()})
    return found


def readable_names() -> dict[str, str]:
    from fastmaml import _C

    return {symbol: name for symbol, (_, name) in _C.emulated_kernels().items()}


def of_nvcc() -> set[str]:
    """The symbols of the kernels in the CUDA library, from ptxas' lines in the build logs."""
    return ptxas_entries("".join(log.read_text() for log in sorted((CUDA / "cuda").glob("*.log"))))


def why_no_nvcc() -> str:
    """ "" if `make cuda` has built the library from these sources, else why there is nothing to compare with."""
    library = build.PACKAGE / build.CUDA_LIBRARY
    if not library.is_file() or not (CUDA / "cuda").is_dir():
        return "the CUDA library is not built here: make cuda"
    return "" if build.stamp().encode() in library.read_bytes() else "the CUDA library is of other sources: make cuda"


def ptxas_entries(log: str) -> set[str]:
    return set(re.findall(r"Compiling entry function '(\w+)'", log))


def summary() -> str:
    """One line about the launches; "" if there were none."""
    here, programs = of_this_process(), of_programs()
    here.update(of_workers())
    if not sum(here.values()) + sum(programs.values()):
        return ""
    both = here + programs  # without the kernels that count 0
    return (
        f"emulated CUDA kernels: {sum(here.values())} launches of {len(+here)} kernels by pytest, "
        f"{sum(programs.values())} of {len(+programs)} by the C++ tests; {len(both)} of {len({*here, *programs})} covered"
    )
