"""The kernel laboratory: compiles one kernel of csrc/cuda at run time (NVRTC, through cupy) and prints its resources."""

from __future__ import annotations

import argparse
import importlib.util
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.kernels import cubins, sass
from bench.kernels.cubins import CSRC, Missing

HELP = """
examples
  python -m bench.kernels.nvrtc "map<float, SgdUpdate>"
  python -m bench.kernels.nvrtc --threads 128 --shared 29184 --sass \\
      "product<TileProduct<float, Tile<64, 64, 8, 4, 3>, Gemm<Order::along_k, Order::along_rows>, false>>"
  python -m bench.kernels.nvrtc --include trial.cuh "my_kernel<float, 4>"       a trial kernel of your own
  python -m bench.kernels.nvrtc --time trial.py "map<float, SgdUpdate>"         on a machine with a GPU

KERNEL is an expression in namespace fastmaml::cuda. All of csrc/cuda/kernels and the files of --include are included first.
--time FILE: FILE defines  GRID, BLOCK, SHARED = 0  and  arguments(cupy) -> tuple  of cupy arrays, numbers and pack(...)
(structs, such as  pack(array.data.ptr, stride)  for a PerTask). Without a GPU the kernel is only compiled.
"""


@dataclass(frozen=True)
class Compiled:
    symbol: str
    cubin: bytes
    report: cubins.Report


def api() -> Any:
    """cupy's binding of NVRTC. Raises Missing, in one sentence, if it cannot be used."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except ImportError as error:
        raise Missing(f'cupy is not installed (pip install "fastmaml[cuda]"): {error}') from error
    except Exception as error:  # a missing library can raise several exceptions
        raise Missing(
            f"NVRTC cannot be loaded (pip install nvidia-cuda-nvrtc): {str(error).splitlines()[0]}"
        ) from error
    return nvrtc


def source(includes: Sequence[str] = ()) -> str:
    """A source that includes every kernel of csrc/cuda/kernels, and further files."""
    kernels = [f"cuda/kernels/{file.name}" for file in sorted((CSRC / "cuda" / "kernels").glob("*.cuh"))]
    lines = [f'#include "{name}"' for name in [*kernels, *includes]]
    return "\n".join([*lines, "using namespace fastmaml::cuda;", ""])


def options(arch: str) -> list[str]:
    return [f"-arch={arch}", "--std=c++17", f"-I{CSRC}", "-I.", "--ptxas-options=-v", "-default-device"]


def compile_kernels(
    expressions: Sequence[str], arch: str = "sm_90", includes: Sequence[str] = ()
) -> dict[str, Compiled]:
    """Expression -> its compiled form. Raises ValueError with the compiler's message."""
    nvrtc = api()
    program = nvrtc.createProgram(source(includes), "laboratory.cu", [], [])
    try:
        for expression in expressions:
            nvrtc.addNameExpression(program, expression)
        try:
            nvrtc.compileProgram(program, options(arch))
        except nvrtc.NVRTCError as error:
            raise ValueError(f"NVRTC refuses it:\n{nvrtc.getProgramLog(program)}") from error
        reports = cubins.parse_report(nvrtc.getProgramLog(program))
        cubin = whole_elf(bytes(nvrtc.getCUBIN(program)))
        symbols = [nvrtc.getLoweredName(program, expression) for expression in expressions]
    finally:
        nvrtc.destroyProgram(program)
    return {e: Compiled(s, cubin, reports[s]) for e, s in zip(expressions, symbols)}


def whole_elf(data: bytes) -> bytes:
    """Restores the last byte of a cubin: cupy 14.2 treats cubins as strings and cuts it off."""
    program_headers = (
        struct.unpack_from("<Q", data, 32)[0]
        + struct.unpack_from("<HH", data, 54)[0] * struct.unpack_from("<HH", data, 54)[1]
    )
    sections = (
        struct.unpack_from("<Q", data, 40)[0]
        + struct.unpack_from("<HH", data, 58)[0] * struct.unpack_from("<HH", data, 58)[1]
    )
    return data.ljust(max(program_headers, sections), b"\0")


def disassembly(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([cubins.nvdisasm(), "-c", file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"nvdisasm cannot read this cubin: {done.stderr.strip()}")
    return done.stdout


def pack(*fields: float) -> Any:
    """A struct for a kernel argument by value: 8-byte integers (also pointers), or numpy scalars of their own size."""
    import numpy as np

    data, widest = b"", 1
    for field in fields:
        scalar = field if isinstance(field, np.generic) else np.int64(field)
        widest = max(widest, scalar.itemsize)
        data += b"\0" * (-len(data) % scalar.itemsize) + scalar.tobytes()
    data += b"\0" * (-len(data) % widest)
    return np.frombuffer(data, dtype=f"V{len(data)}")[0]


def gpu() -> str:
    """Why kernels cannot be timed here; "" if they can."""
    import cupy

    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "no CUDA device on this machine"
    except cupy.cuda.runtime.CUDARuntimeError:
        return "no CUDA driver on this machine"


def time_kernel(expression: str, trial: ModuleType, includes: Sequence[str], rounds: int = 50) -> list[float]:
    """Seconds of each of `rounds` launches on the current device, by CUDA events."""
    import cupy

    arch = f"sm_{cupy.cuda.Device().compute_capability}"
    words = tuple(word for word in options(arch) if not word.startswith(("-arch", "--ptxas")))
    module = cupy.RawModule(code=source(includes), options=words, name_expressions=[expression])
    kernel, arguments, shared = module.get_function(expression), trial.arguments(cupy), getattr(trial, "SHARED", 0)
    if shared > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = shared
    seconds = []
    for _ in range(rounds + 5):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        kernel(trial.GRID, trial.BLOCK, arguments, shared_mem=shared)
        end.record()
        end.synchronize()
        seconds.append(1e-3 * cupy.cuda.get_elapsed_time(start, end))
    return seconds[5:]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return run(args)
    except (Missing, ValueError) as error:
        print(f"bench.kernels.nvrtc: {error}", file=sys.stderr)
        return 2 if isinstance(error, Missing) else 1


def run(args: argparse.Namespace) -> int:
    compiled = compile_kernels([args.kernel], args.arch, args.include)[args.kernel]
    report = compiled.report
    print(f"{args.kernel}\n  {args.arch}: {report.registers} registers, {report.spills} bytes spilled, {report.shared_bytes} bytes "
          "of static shared memory")  # fmt: skip
    if args.threads and args.arch in cubins.ARCHS:
        machine = cubins.ARCHS[args.arch]
        fits = cubins.occupancy(machine, args.threads, report.registers, report.shared_bytes + args.shared)
        print(
            f"  {fits.blocks} blocks and {fits.warps} of {machine.warps} warps of a multiprocessor, limited by {fits.limit}"
        )
    try:
        text = disassembly(compiled.cubin)
        mix = sass.hot_loop(sass.parse(text)[compiled.symbol])
        where = "inner loop" if mix.loop else "no loop"
        print(f"  {where}: {mix.total} instructions, {100 * mix.share:.0f} % math: {mix.text()}")
        if args.sass:
            print(text)
    except Missing as missing:
        print(f"  {missing}")
        if args.sass:
            return 2
    if why := gpu():
        print(f"  compiled only, not timed: {why}")
    elif args.time:
        spec = importlib.util.spec_from_file_location("trial", args.time)
        assert spec is not None and spec.loader is not None
        trial = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(trial)
        seconds = sorted(time_kernel(args.kernel, trial, args.include))
        quarter = len(seconds) // 4
        print(
            f"  {1e6 * seconds[len(seconds) // 2]:.2f} us, quartiles {1e6 * seconds[quarter]:.2f} and {1e6 * seconds[-1 - quarter]:.2f}"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.nvrtc",
        description=__doc__,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kernel", metavar="KERNEL", help="an expression in namespace fastmaml::cuda")
    parser.add_argument("--arch", default="sm_90", help="default sm_90")
    parser.add_argument(
        "--include", action="append", default=[], metavar="FILE", help="a header with a trial kernel; may be repeated"
    )
    parser.add_argument("--threads", type=int, default=0, help="of a block, for the occupancy")
    parser.add_argument("--shared", type=int, default=0, help="bytes of dynamic shared memory, for the occupancy")
    parser.add_argument("--sass", action="store_true", help="print the disassembly")
    parser.add_argument(
        "--time", type=Path, metavar="FILE", help="time it, with the grid and arguments of this Python file"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
