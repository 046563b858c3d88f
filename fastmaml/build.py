"""Builds fastmaml._C from csrc/. The only list of sources and flags, for setup.py, `make build` and the first import.

`python -m fastmaml.build` builds in place. `load()` imports the compiled module. If the module is missing, `load()` builds
it once, into the user's cache. The module uses torch's stable ABI, so one build serves every torch from 2.10 on.
The CUDA backend is a separate library without torch (`--cuda`, `load_cuda()`). Only this library needs nvcc.
This file imports neither fastmaml nor torch, because setup.py runs it before they are installed. For the same reason it is one
file: setup.py and the Makefile load it by its path, and stamp() hashes it alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

PACKAGE = Path(__file__).resolve().parent
MODULE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
STAMP = "_C.stamp"  # next to the module: a hash of the sources it was built from
CUDA_LIBRARY = "_cuda.so"

BASE_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Werror=switch")
# The oldest torch the module runs with (torch's stable ABI). pybind11's headers come with torch.
TORCH_ABI = "0x020a000000000000"

# Every file of csrc/cpu is compiled once for each entry: name, bytes of a vector, flags. Linked from narrow to wide: the
# linker keeps the first copy of an inline function, so no narrow machine runs code of a wider one.
# -O3 takes GCC twice as long. Only instruction sets that current machines use get it.
ISAS: tuple[tuple[str, int, tuple[str, ...]], ...] = (("portable", 16, ("-O3",)),)
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS = (
        ("portable", 16, ("-O2",)),
        ("avx2", 32, ("-O3", "-mavx2", "-mfma")),
        ("avx2x16", 64, ("-O1", "-mavx2", "-mfma")),  # the 16-lane code, executed on machines that have 8 lanes
        ("avx512", 64, ("-O3", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma")),
    )


# Compute capabilities of the CUDA library, without the point. The last one is also built as PTX, for later devices.
CUDA_ARCHS = ("80", "90")
ALL_CUDA_ARCHS = ("80", "90", "100", "120")
CUDA_FLAGS = ("-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden,-g0")

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
    """csrc/ of an installed package or of a checkout. Raises BuildError if there is none."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "program" / "op.h").is_file():
            return folder
    raise BuildError(f"the C++ sources are missing next to {PACKAGE}")


def compilations(csrc: Path, bindings: bool = True) -> list[Compilation]:
    """Every compiler call, in link order."""
    result = []
    for folder in ("program", "meta", "plan", "ops", "reference", "cpu/isa"):
        for source in sorted((csrc / folder).glob("*.cpp")):
            result.append(Compilation(source, f"{folder}/{source.stem}.o", ("-O2",)))
    for isa, width, flags in ISAS:
        macros = (f"-DFASTMAML_ISA={isa}", f"-DFASTMAML_LANES_BYTES={width}")
        for folder in ("", "lanes/"):
            for source in sorted((csrc / "cpu" / folder).glob("*.cpp")):
                name = f"cpu/{isa}/{folder}{source.stem}.o"
                result.append(Compilation(source, name, ("-Wno-psabi", *macros, *flags)))
    if bindings:
        includes = ("-isystem", str(torch_folder() / "include"), "-isystem", sysconfig.get_paths()["include"])
        for source in sorted((csrc / "bindings").glob("*.cpp")):
            flags = ("-O2", f"-DTORCH_TARGET_VERSION={TORCH_ABI}", *includes)
            if source.stem == "backends":  # checks that the CUDA library has the same sources
                flags += (f"-DFASTMAML_STAMP={stamp()}",)
            result.append(Compilation(source, f"bindings/{source.stem}.o", flags))
        if sys.platform == "linux":  # the emulator reads ELF symbols
            result += _emulated(csrc)
    return result


def _emulated(csrc: Path) -> list[Compilation]:
    """The CUDA kernels for the host. Linked last: their inline functions use FMA and must not replace others."""
    flags = EMULATE + (("-mfma",) if _has_fma() else ())
    result = [
        Compilation(source, f"cuda/emulated/{source.stem}.o", ("-O2", *flags))
        for source in sorted((csrc / "cuda" / "emulated").glob("*.cpp"))
        if source.stem != "race"  # only the race checker of csrc/Makefile uses this file
    ]
    for source in sorted((csrc / "cuda").glob("*.cu")):
        checked = ("-O1", *flags, "-fsanitize=bounds,alignment", "-x", "c++")
        result.append(Compilation(source, f"emulated/cuda/{source.stem}.o", checked))
    return result


def cuda_compilations(csrc: Path, archs: tuple[str, ...]) -> list[Compilation]:
    """nvcc's calls: the kernels, and two files of the core."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    result = []
    longest_first = sorted((csrc / "cuda").glob("*.cu"), key=lambda source: (source.stem != "resident", source))
    for source in longest_first:
        stamped = (f"-DFASTMAML_STAMP={stamp()}",) if source.stem == "cuda_ops" else ()
        result.append(Compilation(source, f"cuda/{source.stem}.o", ("-std=c++17", *CUDA_FLAGS, *codes, *stamped)))
    for source in (csrc / "program" / "op.cpp", csrc / "ops" / "workspace.cpp"):
        result.append(Compilation(source, f"cuda/{source.stem}.o", ("-std=c++20", *CUDA_FLAGS)))
    return result


def _has_fma() -> bool:
    try:
        return " fma " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def link_flags() -> tuple[str, ...]:
    """No rpath and no OpenMP: torch is loaded first and brings the threads."""
    flags = ("-shared", f"-L{torch_folder() / 'lib'}", "-ltorch_cpu", "-lc10")
    return (*flags, "-undefined", "dynamic_lookup") if sys.platform == "darwin" else flags


def stamp() -> str:
    """A hash of everything the module is built from: sources, this file, the compiler's target and Python."""
    digest = hashlib.sha256()
    csrc = source_folder()
    for file in [Path(__file__), *sorted(f for f in csrc.rglob("*") if f.suffix in (".h", ".cpp", ".cu", ".cuh"))]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    digest.update(f"{sys.implementation.cache_tag} {platform.machine()}".encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- what it needs


def compiler() -> str:
    """$CXX, or the first of g++, clang++, c++. Raises BuildError if there is none."""
    if "CXX" in os.environ:
        command = os.environ["CXX"]
        if not command or shutil.which(command.split()[0]) is None:
            raise BuildError(f"CXX names the compiler {command!r}, which does not exist")
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return name
    raise BuildError("no C++ compiler found (g++, clang++, c++ or $CXX)")


def torch_folder() -> Path:
    """Where torch is installed. Raises BuildError if torch is missing or too old."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed")
    version = importlib.metadata.version("torch")
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (2, 10):
        raise BuildError(f"torch {version} is too old; fastmaml needs torch 2.10 or later")
    return Path(spec.origin).parent


def nvcc() -> str:
    """nvcc from $NVCC, $CUDA_HOME, the PATH or a pip package. Raises BuildError if there is none."""
    if os.environ.get("NVCC"):
        return os.environ["NVCC"]
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for folder in folders:
        if (folder / "nvcc").is_file():
            return str(folder / "nvcc")
    if found := shutil.which("nvcc"):
        return found
    for site in dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib")):
        for file in sorted(Path(site, "nvidia").glob("*/bin/nvcc")):  # from nvidia-cuda-nvcc
            return str(file)
    raise BuildError("no CUDA compiler found (nvcc in $CUDA_HOME, on the PATH or from pip's nvidia-cuda-nvcc)")


def torch_has_cuda() -> bool:
    """Whether the installed torch is a build for CUDA. Does not import torch."""
    try:
        text = (torch_folder() / "version.py").read_text()
    except (BuildError, OSError):
        return False
    return re.search(r"^cuda\b[^=]*= *'", text, re.MULTILINE) is not None


def cuda_archs() -> tuple[str, ...]:
    """The architectures in $FASTMAML_CUDA_ARCHS ("80 90", or "all"), or the default. Raises BuildError for other text."""
    text = os.environ.get("FASTMAML_CUDA_ARCHS", "").strip()
    archs = ALL_CUDA_ARCHS if text == "all" else tuple(text.replace(";", " ").replace(",", " ").split()) or CUDA_ARCHS
    if bad := [arch for arch in archs if not re.fullmatch(r"\d{2,3}[a-z]?", arch)]:
        raise BuildError(f"FASTMAML_CUDA_ARCHS holds {bad[0]!r}, which is no architecture like 80 or 90")
    return archs


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
    """Builds the module as `target` with the objects in `folder`. With ninja, compiles only changed files.

    Raises BuildError with one sentence; `folder`/build.log then holds the compiler's output.
    """
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        raise BuildError("Python.h is missing (install Python's development files)")
    csrc, cxx = source_folder(), compiler()
    tools = Tools(
        cxx, f"{cxx} {' '.join(BASE_FLAGS)}", "-MMD", f"{cxx} -o {{}} {{}} {' '.join(map(_quoted, link_flags()))}"
    )
    _compile(tools, csrc, compilations(csrc), folder, MODULE, progress)
    _put(folder / MODULE, target)
    (target.parent / STAMP).write_text(stamp() + "\n")
    return target


def build_cuda(target: Path, folder: Path, progress: Progress | None = None) -> Path:
    """Builds the CUDA backend's library as `target`, for cuda_archs(). ptxas' output is kept as .log next to the objects.

    Raises BuildError with one sentence.
    """
    csrc, compiler = source_folder(), nvcc()
    link = f"{compiler} -shared -cudart static -Xlinker --no-undefined -o {{}} {{}}"
    tools = Tools(compiler, compiler, "-MD", link, logs=True)
    _compile(tools, csrc, cuda_compilations(csrc, cuda_archs()), folder, CUDA_LIBRARY, progress)
    _put(folder / CUDA_LIBRARY, target)
    return target


class Spill(NamedTuple):
    """A function of a CUDA build that spills registers, as ptxas reports."""

    symbol: str
    arch: str  # "90"
    stored: int  # bytes

    @property
    def allowed(self) -> bool:
        """Float32 kernels of the layered walk must not spill on sm_80 and sm_90. Other functions may."""
        resident = "resident" in self.symbol or self.symbol.endswith("4HereE")
        return "Id" in self.symbol or resident or self.arch not in CUDA_ARCHS


def spills(folder: Path) -> list[Spill]:
    """The register spills of the kernels and device functions compiled into `folder`."""
    found, arch = [], ""
    said = re.compile(r"for 'sm_(\w+)'|Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores")
    for log in sorted(folder.glob("cuda/*.log")):
        for compiled_for, symbol, stored in said.findall(log.read_text()):
            arch = compiled_for or arch
            if symbol and int(stored):
                found.append(Spill(symbol, arch, int(stored)))
    return found


class Tools(NamedTuple):
    """How to compile and link one thing."""

    name: str
    compile: str  # the command and the flags for all files
    dependencies: str  # the flag that writes a make file of headers
    link: str  # with a {} for the target and one for the objects
    logs: bool = False  # keep the compiler's output next to each object


def _compile(
    tools: Tools, csrc: Path, work: list[Compilation], folder: Path, made: str, progress: Progress | None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.log").open("w") as log:
        run = _with_ninja if _ninja() else _without_ninja
        code = run(tools, csrc, work, folder, made, progress or (lambda done, of, what: None), log)
    if code:
        first = next((line for line in (folder / "build.log").read_text().splitlines() if "error" in line), "")
        raise BuildError(
            f"{tools.name} failed{': ' + first.strip() if first else ''} (full output in {folder / 'build.log'})"
        )


def _put(made: Path, target: Path) -> None:
    """Replaces `target` by a rename: running processes keep the old file, and nobody sees half of the new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(made, aside)
    os.replace(aside, target)


def _ninja_file(tools: Tools, csrc: Path, work: list[Compilation], made: str) -> str:
    def escaped(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    compile = f"{tools.compile} -I'{csrc}' $more {tools.dependencies} -MF $out.d -c $in -o $out"
    if tools.logs:
        compile += " > $out.log 2>&1 || { cat $out.log; exit 1; }"
    lines = [
        "ninja_required_version = 1.3",
        "rule compile",
        f"  command = {compile}",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {tools.link.format('$out', '$in')}",
        "  description = $out",
    ]
    for c in work:
        more = " ".join(map(_quoted, c.flags))
        lines += [f"build {escaped(c.name)}: compile {escaped(c.source)}", f"  more = {more}"]
    lines.append(f"build {escaped(made)}: link {' '.join(escaped(c.name) for c in work)}")
    return "\n".join(lines) + "\n"


def _quoted(flag: str) -> str:
    return f"'{flag}'" if " " in flag else flag


def _with_ninja(
    tools: Tools, csrc: Path, work: list[Compilation], folder: Path, made: str, progress: Progress, log: IO[str]
) -> int:
    text, file = _ninja_file(tools, csrc, work, made), folder / "build.ninja"
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
    tools: Tools, csrc: Path, work: list[Compilation], folder: Path, made: str, progress: Progress, log: IO[str]
) -> int:
    def compile_one(c: Compilation) -> subprocess.CompletedProcess[str]:
        (folder / c.name).parent.mkdir(parents=True, exist_ok=True)
        command = [*tools.compile.split(), f"-I{csrc}", *c.flags, "-c", str(c.source), "-o", c.name]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if tools.logs:
            (folder / f"{c.name}.log").write_text(result.stdout + result.stderr)
        return result

    code = 0
    with ThreadPoolExecutor(_jobs()) as pool:
        for done, (c, result) in enumerate(zip(work, pool.map(compile_one, work), strict=True), start=1):
            if result.returncode or not tools.logs:
                log.write(result.stderr)
            code = code or result.returncode
            progress(done, len(work) + 1, c.name)
    if not code:
        objects = " ".join(c.name for c in work)
        command = shlex.split(tools.link.format(made, objects))
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        log.write(result.stderr)
        code = result.returncode
    return code


# ---------------------------------------------------------------- at import


def load() -> None:
    """Imports fastmaml._C from the package, else from the user's cache. Builds it there if needed.

    The cache is $FASTMAML_CACHE or ~/.cache/fastmaml, with a folder for each hash of sources and versions. Raises
    BuildError, with one sentence, if the module cannot be built or does not load.
    """
    try:
        importlib.import_module("fastmaml._C")
        return
    except ImportError as error:
        reason = error
    folder = _cache() / "build" / f"{stamp()}-torch-{importlib.metadata.version('torch')}"
    target = folder / MODULE
    if not target.is_file():
        missing = isinstance(reason, ModuleNotFoundError)
        why = f"the compiled module is {'missing' if missing else f'unusable here ({reason})'}"
        _build_in_cache(folder, MODULE, why, "a minute or two", build)
    try:
        _import_from(target)
    except ImportError as error:
        raise BuildError(f"{target} does not load: {error}") from error


def load_cuda() -> None:
    """Loads the CUDA backend's library into the compiled module, from the package, else from the user's cache.

    If neither exists, or both come from other sources, and nvcc is installed, builds it into the cache. Raises
    BuildError, with one sentence.
    """
    _C: Any = importlib.import_module("fastmaml._C")
    if _C.cuda_loaded():
        return
    folder = _cache() / "build" / f"{stamp()}-cuda-{'-'.join(cuda_archs())}"
    reason = "the CUDA library is missing"
    for file in (PACKAGE / CUDA_LIBRARY, folder / CUDA_LIBRARY):
        if file.is_file():
            try:
                return _C.load_cuda(str(file))
            except RuntimeError as error:
                reason = str(error)
    try:
        nvcc()
    except BuildError as error:
        raise BuildError(f"{reason}, and {error}") from None
    _build_in_cache(folder, CUDA_LIBRARY, "the CUDA library is missing", "a few minutes", build_cuda)
    try:
        _C.load_cuda(str(folder / CUDA_LIBRARY))
    except RuntimeError as error:
        raise BuildError(str(error)) from None


def _cache() -> Path:
    return Path(os.environ.get("FASTMAML_CACHE") or Path.home() / ".cache" / "fastmaml")


def _build_in_cache(folder: Path, made: str, why: str, long: str, build: Callable[..., Path]) -> None:
    """One process builds folder/made; others wait."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / "lock"):
            if not (folder / made).is_file():
                with _progress_line(why, long) as progress:
                    build(folder / made, folder / "objects", progress)
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {error.strerror or error}") from error


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
    """One process builds; others wait. The lock ends with its process, even if the process is killed."""
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("fastmaml: another process builds the compiled module; waiting", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _progress_line(why: str, long: str) -> Iterator[Progress]:
    start, live = time.monotonic(), sys.stderr.isatty()
    print(f"fastmaml: {why}; building it once ({long})", file=sys.stderr, flush=True)

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
    """Builds in place: the module, or with --cuda the CUDA library."""
    start = time.monotonic()
    cuda = sys.argv[1:] == ["--cuda"]
    if sys.argv[1:] and not cuda:
        print(f"fastmaml: build.py takes --cuda or nothing, not {' '.join(sys.argv[1:])}", file=sys.stderr)
        return 2
    folder = PACKAGE.parent / "build" / ("cuda" if cuda else str(sys.implementation.cache_tag))

    def progress(done: int, of: int, what: str) -> None:
        print(f"[{done}/{of}] {what}", flush=True)

    try:
        target = (
            build_cuda(PACKAGE / CUDA_LIBRARY, folder, progress) if cuda else build(PACKAGE / MODULE, folder, progress)
        )
    except BuildError as error:
        log = folder / "build.log"
        if log.is_file():
            print(log.read_text(), file=sys.stderr)
        print(f"fastmaml: {error}", file=sys.stderr)
        return 1
    print(f"{target.name} is built ({time.monotonic() - start:.0f} s)")
    return _report_spills(folder) if cuda else 0


def _report_spills(folder: Path) -> int:
    found = spills(folder)
    for spill in found:
        print(
            f"registers spill on sm_{spill.arch}, {spill.stored} bytes{'' if spill.allowed else ', not allowed'}: {spill.symbol}"
        )
    logs = "".join(log.read_text() for log in folder.glob("cuda/*.log"))
    kernels = set(re.findall(r"Compiling entry function '(\S+)'", logs))
    bad = sum(not spill.allowed for spill in found)
    print(f"{len(kernels)} kernels for {', '.join(f'sm_{arch}' for arch in cuda_archs())}")
    if bad:
        print(f"fastmaml: {bad} float32 kernels of the layered walk spill registers", file=sys.stderr)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
