"""Compiles the kernels with nvcc for one architecture, and reads ptxas' report and the disassembly."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.measure import ROOT

CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "kernels"


class Missing(RuntimeError):
    """A missing tool, in one sentence."""


# ---------------------------------------------------------------- tools


def nvcc() -> list[str]:
    """$NVCC, else the nvcc of $CUDA_HOME or of the PATH. Raises Missing."""
    if os.environ.get("NVCC"):
        return os.environ["NVCC"].split()
    return [_tool("nvcc", "the kernels cannot be compiled: no nvcc on the PATH or in CUDA_HOME")]


def nvdisasm() -> str:
    """nvdisasm of the PATH, of $CUDA_HOME, or of the triton wheel. Raises Missing."""
    return _tool(
        "nvdisasm",
        "the inner loops cannot be read: no nvdisasm on the PATH, in CUDA_HOME or in an installed triton wheel "
        "(pip install triton --no-deps brings one)",
    )


def _tool(name: str, otherwise: str) -> str:
    folders = [Path(os.environ[key]) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    folders.append(Path(sysconfig.get_paths()["purelib"]) / "triton" / "backends" / "nvidia" / "bin")
    found = shutil.which(name) or next((str(f / name) for f in folders if (f / name).is_file()), None)
    if not found:
        raise Missing(otherwise)
    return found


# ---------------------------------------------------------------- compiling


def sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def _hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def compile_all(arch: str, jobs: int = 2) -> list[Path]:
    """A cubin for each .cu, with ptxas' report next to it as .log. Cubins of unchanged sources are reused."""
    headers = sorted(
        f for folder in ("cuda", "ops", "program") for f in (CSRC / folder).rglob("*") if f.suffix in (".h", ".cuh")
    )

    def compile_one(source: Path) -> Path:
        cubin = BUILD / arch / f"{source.stem}.cubin"
        stamp, current = cubin.with_suffix(".stamp"), _hash([source, *headers])
        if cubin.is_file() and stamp.is_file() and stamp.read_text() == current:
            return cubin
        cubin.parent.mkdir(parents=True, exist_ok=True)
        command = [
            *nvcc(),
            "-std=c++17",
            f"-arch={arch}",
            "-I.",
            "-Xptxas",
            "-v",
            "-cubin",
            f"cuda/{source.name}",
            "-o",
            str(cubin),
        ]
        done = subprocess.run(command, cwd=CSRC, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source.name}:\n{done.stdout}{done.stderr}")
        cubin.with_suffix(".log").write_text(done.stdout + done.stderr)
        stamp.write_text(current)
        return cubin

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compile_one, sources()))


def disassemble(cubin: Path) -> str:
    """The SASS of all kernels of a cubin, with labels. Saved next to the cubin."""
    text = cubin.with_suffix(".sass")
    if not text.is_file() or text.stat().st_mtime < cubin.stat().st_mtime:
        done = subprocess.run([nvdisasm(), "-c", str(cubin)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvdisasm cannot read {cubin.name}: {done.stderr.strip()}")
        text.write_text(done.stdout)
    return text.read_text()


# ---------------------------------------------------------------- ptxas' report


@dataclass(frozen=True)
class Report:
    """ptxas' report on one kernel."""

    registers: int
    spill_bytes: int  # stores and loads; of the kernel itself
    stack_bytes: int
    shared_bytes: int  # static
    called_spill_bytes: int = 0  # of all functions that it calls

    @property
    def spills(self) -> int:
        return self.spill_bytes + self.called_spill_bytes


def parse_report(log: str) -> dict[str, Report]:
    """The -Xptxas -v report by kernel. A function that is no entry belongs to the kernel before it."""
    properties = r"properties for (\w+)\s+(?:ptxas\s+\.\s+)?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    result = {}
    for name, body in re.findall(
        r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", log, re.DOTALL
    ):
        said = {of: list(map(int, numbers)) for of, *numbers in re.findall(properties, body)}
        used = re.search(r"Used (\d+) registers([^\n]*)", body)
        if name not in said or not used:
            raise ValueError(f"ptxas' report on {name} is not as expected")
        shared = re.search(r"(\d+) bytes smem", used[2])
        stack, stores, loads = said.pop(name)
        called = sum(more_stores + more_loads for _, more_stores, more_loads in said.values())
        result[name] = Report(int(used[1]), stores + loads, stack, int(shared[1]) if shared else 0, called)
    return result


# ---------------------------------------------------------------- occupancy


@dataclass(frozen=True)
class Multiprocessor:
    """The resources that the blocks of one multiprocessor share."""

    shared_bytes: int
    block_shared_bytes: int  # limit per block
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    reserved_shared: int = 1024  # by the system, a block
    shared_unit: int = 128
    register_unit: int = 256  # of a warp


ARCHS = {"sm_80": Multiprocessor(164 * 1024, 163 * 1024), "sm_90": Multiprocessor(228 * 1024, 227 * 1024)}


@dataclass(frozen=True)
class Occupancy:
    blocks: int  # of a multiprocessor
    warps: int
    limit: str  # the limiting resource: registers, shared memory, warps, blocks

    def share(self, machine: Multiprocessor) -> float:
        return self.warps / machine.warps


def occupancy(machine: Multiprocessor, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """The number of such blocks that one multiprocessor runs at once. Raises ValueError if not even one fits."""
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // machine.register_unit) * machine.register_unit
    shared = -(-(shared_bytes + machine.reserved_shared) // machine.shared_unit) * machine.shared_unit
    fits = {
        "registers": machine.registers // of_warp // warps if of_warp else machine.blocks,
        "shared memory": machine.shared_bytes // shared if shared_bytes <= machine.block_shared_bytes else 0,
        "warps": machine.warps // warps,
        "blocks": machine.blocks,
    }
    limit = min(fits, key=lambda name: fits[name])
    if fits[limit] == 0:
        raise ValueError(
            f"a block of {threads} threads, {registers} registers, {shared_bytes} bytes does not fit: {limit}"
        )
    return Occupancy(fits[limit], fits[limit] * warps, limit)
