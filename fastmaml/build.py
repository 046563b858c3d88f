"""Builds fastmaml._C from csrc/: the one list of sources and flags, for setup.py, `make build` and the first import.

`python -m fastmaml.build` builds in place. `load()` imports the compiled module and builds it first where it is missing,
once, into the user's cache. The module speaks torch's stable ABI, so one build serves every torch from 2.10 on.
This file imports nothing of fastmaml and not torch itself: setup.py runs it where neither is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

PACKAGE = Path(__file__).resolve().parent
MODULE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
STAMP = "_C.stamp"  # lies beside the module and says what it was built from

BASE_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra")
# The oldest torch the module runs with (torch's stable ABI). pybind11's headers come with torch.
TORCH_ABI = "0x020a000000000000"

# Every file of csrc/cpu is compiled once for each: name, bytes of a vector, flags. From narrow to wide, and linked in this
# order: of an inline function that several objects hold, the linker keeps the first, so none runs a wider machine's code.
ISAS: tuple[tuple[str, int, tuple[str, ...]], ...] = (("portable", 16, ()),)
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS += (
        ("avx2", 32, ("-mavx2", "-mfma")),
        ("avx2x16", 64, ("-mavx2", "-mfma")),  # the 16-lane code, executed on machines that have 8 lanes
        ("avx512", 64, ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma")),
    )


# The CUDA kernels on the host: csrc/cuda/emulated.
EMULATE = ("-DFASTMAML_EMULATED", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-sign-compare")


class BuildError(RuntimeError):
    """The compiled module cannot be built here. The message is one sentence."""


class Compilation(NamedTuple):
    """One source file for one machine."""

    source: Path
    name: str  # of the object, below the build folder
    flags: tuple[str, ...]


# ---------------------------------------------------------------- what is built


def source_folder() -> Path:
    """csrc/ of an installed package or of a checkout. Raises BuildError where there is none."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "program" / "op.h").is_file():
            return folder
    raise BuildError(f"the C++ sources are missing beside {PACKAGE}")


def compilations(csrc: Path, bindings: bool = True) -> list[Compilation]:
    """Every compiler call, in link order."""
    result = []
    for folder in ("program", "meta", "ops", "reference", "cpu/isa"):
        for source in sorted((csrc / folder).glob("*.cpp")):
            result.append(Compilation(source, f"{folder}/{source.stem}.o", ("-O2",)))
    for isa, width, flags in ISAS:
        macros = (f"-DFASTMAML_ISA={isa}", f"-DFASTMAML_LANES_BYTES={width}")
        for source in sorted((csrc / "cpu").glob("*.cpp")):
            result.append(Compilation(source, f"cpu/{isa}/{source.stem}.o", ("-O3", "-Wno-psabi", *macros, *flags)))
    if bindings:
        includes = ("-isystem", str(torch_folder() / "include"), "-isystem", sysconfig.get_paths()["include"])
        for source in sorted((csrc / "bindings").glob("*.cpp")):
            flags = ("-O2", f"-DTORCH_TARGET_VERSION={TORCH_ABI}", *includes)
            if source.stem == "backends":  # holds the CUDA library to the same sources
                flags += (f"-DFASTMAML_STAMP={stamp()}",)
            result.append(Compilation(source, f"bindings/{source.stem}.o", flags))
        if sys.platform == "linux":  # the emulator reads ELF symbols
            result += _emulated(csrc)
    return result


def _emulated(csrc: Path) -> list[Compilation]:
    """The CUDA kernels for the host. Last: their inline functions, made for a machine with FMA, must not serve others."""
    flags = EMULATE + (("-mfma",) if _has_fma() else ())
    result = [
        Compilation(source, f"cuda/emulated/{source.stem}.o", ("-O2", *flags))
        for source in sorted((csrc / "cuda" / "emulated").glob("*.cpp"))
        if source.stem != "race"  # the race checker of csrc/Makefile has that one
    ]
    for source in sorted((csrc / "cuda").glob("*.cu")):
        checked = ("-O1", *flags, "-fsanitize=bounds,alignment", "-x", "c++")
        result.append(Compilation(source, f"emulated/cuda/{source.stem}.o", checked))
    return result


def _has_fma() -> bool:
    try:
        return " fma " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def link_flags() -> tuple[str, ...]:
    """No rpath and no OpenMP: torch is loaded first, and its libraries bring the threads."""
    flags = ("-shared", f"-L{torch_folder() / 'lib'}", "-ltorch_cpu", "-lc10")
    return (*flags, "-undefined", "dynamic_lookup") if sys.platform == "darwin" else flags


def stamp() -> str:
    """A hash of the sources, this file, the compiler's target and Python: what the module was built from."""
    digest = hashlib.sha256()
    csrc = source_folder()
    for file in [Path(__file__), *sorted(f for f in csrc.rglob("*") if f.suffix in (".h", ".cpp", ".cu", ".cuh"))]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    digest.update(f"{sys.implementation.cache_tag} {platform.machine()}".encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- what it needs


def compiler() -> str:
    """$CXX, or the first of g++, clang++, c++. Raises BuildError where there is none."""
    if "CXX" in os.environ:
        command = os.environ["CXX"]
        if not command or shutil.which(command.split()[0]) is None:
            raise BuildError(f"CXX names the compiler {command!r}, which is not there")
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return name
    raise BuildError("no C++ compiler found (g++, clang++, c++ or $CXX)")


def torch_folder() -> Path:
    """Where torch is installed. Raises BuildError where it is missing or too old."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed")
    version = importlib.metadata.version("torch")
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (2, 10):
        raise BuildError(f"torch {version} is older than 2.10, the first that fastmaml runs with")
    return Path(spec.origin).parent


def _ninja() -> str | None:
    beside = Path(sys.executable).parent / "ninja"
    return str(beside) if beside.is_file() else shutil.which("ninja")


def _jobs() -> int:
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------- building

Progress = Callable[[int, int, str], None]  # done, of, what


def build(target: Path, folder: Path, progress: Progress | None = None) -> Path:
    """Builds the module as `target` with the objects in `folder`; compiles only what changed where ninja is there.

    Raises BuildError with one sentence; the compiler's output lies in `folder`/build.log then.
    """
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        raise BuildError("Python.h is missing (install Python's development files)")
    csrc, cxx = source_folder(), compiler()
    work = compilations(csrc)
    current = stamp()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.log").open("w") as log:
        run = _with_ninja if _ninja() else _without_ninja
        code = run(csrc, cxx, work, folder, progress or (lambda done, of, what: None), log)
    if code:
        first = next((line for line in (folder / "build.log").read_text().splitlines() if "error" in line), "")
        raise BuildError(f"{cxx} failed{': ' + first.strip() if first else ''} (all of it in {folder / 'build.log'})")
    # Written aside and renamed: a process that runs the old module keeps it, none sees half of the new one.
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(folder / MODULE, aside)
    os.replace(aside, target)
    (target.parent / STAMP).write_text(current + "\n")
    return target


def _ninja_file(csrc: Path, cxx: str, work: list[Compilation]) -> str:
    def escaped(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {cxx}",
        f"flags = {' '.join(BASE_FLAGS)} -I'{csrc}'",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $cxx -o $out $in {' '.join(map(_quoted, link_flags()))}",
        "  description = $out",
    ]
    for c in work:
        more = " ".join(map(_quoted, c.flags))
        lines += [f"build {escaped(c.name)}: compile {escaped(c.source)}", f"  more = {more}"]
    lines.append(f"build {escaped(MODULE)}: link {' '.join(escaped(c.name) for c in work)}")
    return "\n".join(lines) + "\n"


def _quoted(flag: str) -> str:
    return f"'{flag}'" if " " in flag else flag


def _with_ninja(csrc: Path, cxx: str, work: list[Compilation], folder: Path, progress: Progress, log: IO[str]) -> int:
    text, file = _ninja_file(csrc, cxx, work), folder / "build.ninja"
    if not file.is_file() or file.read_text() != text:
        file.write_text(text)
    command = [str(_ninja()), "-C", str(folder), "-j", str(_jobs())]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as ninja:
        assert ninja.stdout is not None
        for line in ninja.stdout:
            log.write(line)
            if match := re.match(r"\[(\d+)/(\d+)\] (.*)", line):
                progress(int(match[1]), int(match[2]), match[3])
            elif "warning:" in line:
                print(line, end="", file=sys.stderr)
    return ninja.returncode


def _without_ninja(
    csrc: Path, cxx: str, work: list[Compilation], folder: Path, progress: Progress, log: IO[str]
) -> int:
    def compile_one(c: Compilation) -> subprocess.CompletedProcess[str]:
        (folder / c.name).parent.mkdir(parents=True, exist_ok=True)
        command = [*cxx.split(), *BASE_FLAGS, f"-I{csrc}", *c.flags, "-c", str(c.source), "-o", c.name]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    code = 0
    with ThreadPoolExecutor(_jobs()) as pool:
        for done, (c, result) in enumerate(zip(work, pool.map(compile_one, work), strict=True), start=1):
            log.write(result.stderr)
            code = code or result.returncode
            progress(done, len(work) + 1, c.name)
    if not code:
        command = [*cxx.split(), "-o", MODULE, *(c.name for c in work), *link_flags()]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        log.write(result.stderr)
        code = result.returncode
    return code


# ---------------------------------------------------------------- at import


def load() -> None:
    """Imports fastmaml._C: the one in the package, else the one in the user's cache, which is built if need be.

    The cache is $FASTMAML_CACHE or ~/.cache/fastmaml, with a folder for each hash of sources and versions. Raises
    BuildError, with one sentence, where the module cannot be built or does not load.
    """
    try:
        importlib.import_module("fastmaml._C")
        return
    except ImportError as error:
        reason = error
    cache = Path(os.environ.get("FASTMAML_CACHE") or Path.home() / ".cache" / "fastmaml")
    folder = cache / "build" / f"{stamp()}-torch-{importlib.metadata.version('torch')}"
    target = folder / MODULE
    if not target.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(folder / "lock"):
                if not target.is_file():
                    missing = isinstance(reason, ModuleNotFoundError)
                    with _progress_line("missing" if missing else f"unusable here ({reason})") as progress:
                        build(target, folder / "objects", progress)
        except OSError as error:
            raise BuildError(f"{folder} cannot be written: {error.strerror or error}") from error
    try:
        _import_from(target)
    except ImportError as error:
        raise BuildError(f"{target} does not load: {error}") from error


def _import_from(target: Path) -> None:
    spec = importlib.util.spec_from_file_location("fastmaml._C", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastmaml._C"] = module
    try:
        spec.loader.exec_module(module)
    except ImportError:
        del sys.modules["fastmaml._C"]
        raise
    sys.modules["fastmaml"]._C = module  # type: ignore[attr-defined]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process builds, the others wait. The lock goes with its process, however that ends."""
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("fastmaml: another process builds the compiled module; waiting", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _progress_line(why: str) -> Iterator[Progress]:
    start, live = time.monotonic(), sys.stderr.isatty()
    print(f"fastmaml: the compiled module is {why}; building it once (a minute or two)", file=sys.stderr, flush=True)

    def progress(done: int, of: int, what: str) -> None:
        if live:
            print(f"\r\033[Kfastmaml: [{done}/{of}] {what}", end="", file=sys.stderr, flush=True)

    try:
        yield progress
    finally:
        if live:
            print("\r\033[K", end="", file=sys.stderr)
    print(f"fastmaml: built in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def main() -> int:
    start = time.monotonic()

    def progress(done: int, of: int, what: str) -> None:
        print(f"[{done}/{of}] {what}", flush=True)

    try:
        target = build(PACKAGE / MODULE, PACKAGE.parent / "build" / str(sys.implementation.cache_tag), progress)
    except BuildError as error:
        log = PACKAGE.parent / "build" / str(sys.implementation.cache_tag) / "build.log"
        if log.is_file():
            print(log.read_text(), file=sys.stderr)
        print(f"fastmaml: {error}", file=sys.stderr)
        return 1
    print(f"{target.name} is built ({time.monotonic() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
