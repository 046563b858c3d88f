"""Analyses the CUDA kernels without a GPU: registers, occupancy, inner loops, bytes, launches and roofline times."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.kernels import cubins, sass, workloads
from bench.kernels.cubins import ARCHS, Missing
from bench.kernels.history import history_text, key_of, line, snapshot
from bench.kernels.workloads import FLOPS, LAUNCH_S, MULTIPROCESSORS, Resident, Workload
from bench.measure import RESULTS, facts, write_json
from tests import kernel_launches

HELP = """
method
  Compiles the kernels with nvcc for sm_80 and sm_90 (unchanged sources are kept). Reads ptxas' report and the disassembly.
  Counts whole meta-gradients on the emulator: launches for all tasks, and the global memory bytes that one inner step of
  one task requests. The tables go to bench/results/cuda_static.{md,json}. --note "what was done" adds an entry to the
  history. Nothing here was timed on a GPU.

columns
  regs        registers per thread; spills are named if there are any
  shared      bytes of shared memory per block, static and dynamic (the maximum of all tests and workloads)
  occupancy   warps of a multiprocessor of 64, and the limiting resource
  inner loop  the loop with the most multiply-adds, without inner loops: all instructions, and the share of FFMA, HMMA and
              fp64; for the resident walk, the loop of its products
  requested   bytes that the kernels request from global memory; caches serve many of them. May be below compulsory, because
              a ReLU does not need all operands
  compulsory  every operand of a launch once
  roofline    the longer of compulsory bytes at 3.35 TB/s and products at 67 TFLOP/s (TF32: 495), launch after launch; a
              resident walk only has the arithmetic of its blocks' multiprocessors
"""


# ---------------------------------------------------------------- kernels


ENUMS = {"Order": ("along_k", "along_rows"), "Numbers": ("tf32", "tf32x3", "bf16x3")}


def short(name: str) -> str:
    """A kernel's readable name, without the common parts and with enumerators by name."""
    name = name.replace("fastmaml::cuda::", "")
    for enum, values in ENUMS.items():
        for i, value in enumerate(values):
            name = name.replace(f"({enum}){i}", value)
    return re.sub(r"\s+>", ">", name)


def kernel_rows(
    names: Mapping[str, str], launched: Mapping[str, kernel_launches.Launched], jobs: int
) -> list[dict[str, Any]]:
    """One row per kernel: by architecture, the facts of ptxas and the disassembly."""
    rows: dict[str, dict[str, Any]] = {}
    for arch, machine in ARCHS.items():
        for cubin in cubins.compile_all(arch, jobs):
            reports = cubins.parse_report(cubin.with_suffix(".log").read_text())
            codes = sass.parse(cubins.disassemble(cubin))
            for symbol, report in reports.items():
                size = launched[symbol]
                row = rows.setdefault(
                    symbol,
                    {
                        "kernel": short(names[symbol]),
                        "symbol": symbol,
                        "file": f"{cubin.stem}.cu",
                        "type": "float64" if "double" in names[symbol] else "float32",
                        "threads": size.threads,
                        "static_shared": report.shared_bytes,
                        "dynamic_shared": size.shared_bytes,
                    },
                )
                shared = report.shared_bytes + size.shared_bytes
                fits = cubins.occupancy(machine, size.threads, report.registers, shared)
                products = codes[symbol].of_functions("product_step")  # the resident walk has loops of all ops
                mix = sass.hot_loop(products, shortest=True) if products.instructions else sass.hot_loop(codes[symbol])
                row[arch] = {
                    "registers": report.registers,
                    "spill_bytes": report.spills,
                    "stack_bytes": report.stack_bytes,
                    "warps": fits.warps,
                    "occupancy": fits.share(machine),
                    "limit": fits.limit,
                    "loop": mix.loop,
                    "instructions": mix.total,
                    "math": mix.math,
                    "mix": mix.counts,
                }
    return sorted(rows.values(), key=lambda row: (row["file"], row["kernel"]))


def kernel_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["kernel", "threads", "shared", "regs 80 / 90", "occupancy 80", "occupancy 90", "inner loop on sm_90"]
    lines = [line(head), line(["---"] * len(head))]
    for row in rows:
        a, b = row["sm_80"], row["sm_90"]
        spills = max(a["spill_bytes"], b["spill_bytes"])
        shared = f"{row['static_shared'] + row['dynamic_shared']:,}"
        lines.append(
            line(
                [
                    f"`{row['kernel']}`",
                    str(row["threads"]),
                    shared,
                    f"{a['registers']} / {b['registers']}" + (f", **{spills} bytes spilled**" if spills else ""),
                    f"{a['warps']} ({a['limit']})",
                    f"{b['warps']} ({b['limit']})",
                    loop_text(b),
                ]
            )
        )
    return lines


def loop_text(of_arch: Mapping[str, Any]) -> str:
    """ "662, 77 % math: 512 ffma, 64 lds.128, ..." """
    total, math = of_arch["instructions"], of_arch["math"]
    kinds = sorted(of_arch["mix"].items(), key=lambda item: (-item[1], item[0]))
    share = f", {100 * math / total:.0f} % math" if math else ""
    return (
        f"{total}{share}: "
        + ", ".join(f"{n} {name}" for name, n in kinds[:7])
        + ("" if of_arch["loop"] else " (no loop)")
    )


# ---------------------------------------------------------------- workloads


def workload_table(all_of_them: Sequence[Workload]) -> list[str]:
    head = [
        "meta-gradient", "tasks", "K", "memory", "walk", "launches", "launching", "GFLOP", "MB requested", "MB compulsory", "ratio",
        "roofline", "with requested bytes",
    ]  # fmt: skip
    lines = [line(head), line(["---"] * len(head))]
    for w in all_of_them:
        lines.append(
            line(
                [
                    f"{w.case.network}, {w.case.support} + {w.case.query} examples",
                    str(w.case.tasks),
                    str(w.inner_steps),
                    memory_text(w),
                    w.walk + ("" if w.precision == "float32" else f", {w.precision}"),
                    str(w.launches),
                    _time(w.launching),
                    f"{w.flops / 1e9:.3g}",
                    _megabytes(w.requested),
                    _megabytes(w.compulsory),
                    f"{w.requested / w.compulsory:.2f}",
                    _time(w.seconds()),
                    _time(w.seconds(requested=True)),
                ]
            )
        )
    return lines


def memory_text(w: Workload) -> str:
    return w.memory + (", by auto" if w.auto else "")


def walks_table(all_of_them: Sequence[Workload]) -> list[str]:
    """Each meta-gradient by both walks, or why there is only one."""
    head = [
        "meta-gradient", "tasks", "K", "memory", "launches", "MB requested", "launching and roofline", "of the H100's arithmetic",
        "the resident walk",
    ]  # fmt: skip
    lines = [line(head), line(["---"] * len(head))]
    residents = {_same_work(w): w for w in all_of_them if w.resident}
    for w in (w for w in all_of_them if not w.resident):
        other = residents.get(_same_work(w))
        both = [w, other] if other else [w]
        lines.append(
            line(
                [
                    w.case.network,
                    str(w.case.tasks),
                    str(w.inner_steps),
                    memory_text(w),
                    " / ".join(str(one.launches) for one in both),
                    " / ".join(_megabytes(one.requested) for one in both),
                    " / ".join(_time(one.launching + one.seconds()) for one in both),
                    "100 %"
                    + (f" / {100 * other.resident.share(w.case.tasks):.0f} %" if other and other.resident else ""),
                    resident_text(other.resident) if other and other.resident else f"declines: {w.declines}",
                ]
            )
        )
    return lines


def resident_text(r: Resident) -> str:
    arena = f"and {r.arena:,} bytes of device memory" if r.arena else "and no device memory"
    sm_80 = f" (sm_80: {r.arena_sm_80:,})" if r.arena_sm_80 != r.arena else ""
    return f"{r.threads} threads, {r.shared:,} bytes of shared {arena}{sm_80}; {r.steps} Steps in {r.stages} stages"


def _same_work(w: Workload) -> tuple[str, int, str, str]:
    return w.case.name, w.inner_steps, w.precision, w.memory


def step_table(w: Workload, most: int) -> list[str]:
    """The slowest Steps by requested bytes or arithmetic."""
    head = ["Step", "launches", "blocks", "MB requested", "ratio", "GFLOP", "roofline", "with requested bytes"]
    lines = [line(head), line(["---"] * len(head))]
    speed = FLOPS[w.precision]
    for a in sorted(w.asked, key=lambda a: -a.seconds(speed, requested=True))[:most]:
        lines.append(
            line(
                [
                    a.name,
                    str(a.launches),
                    f"{max(launch.blocks for launch in a.asked_launches):,}",
                    f"{a.bytes / 1e6:,.2f}",
                    f"{a.bytes / a.compulsory:.2f}",
                    f"{a.flops / 1e9:.3g}",
                    _time(a.seconds(speed)),
                    _time(a.seconds(speed, requested=True)),
                ]
            )
        )
    return lines


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f} us" if seconds < 1e-3 else f"{1e3 * seconds:,.2f} ms"


def _megabytes(number: float) -> str:
    return f"{number / 1e6:,.1f}"


# ---------------------------------------------------------------- the page


def page(
    rows: Sequence[Mapping[str, Any]],
    all_of_them: Sequence[Workload],
    entries: Sequence[Mapping[str, Any]],
    described: Mapping[str, Any],
) -> str:
    float32 = [row for row in rows if row["type"] == "float32"]
    float64 = [row for row in rows if row["type"] == "float64"]
    spilled = [row["kernel"] for row in rows if max(row[arch]["spill_bytes"] for arch in ARCHS)]
    lines = [
        "# The CUDA kernels, judged without a GPU",
        "",
        f"Made by `python -m bench.kernels.static` from commit {described['commit']} on {described['date']}; nvcc {described['nvcc']}. "
        "Compiled and emulated, not yet timed on a GPU: static facts and counts alone. `--help` says what the columns mean.",
        "",
        f"{len(float32)} kernels of float32 and {len(float64)} of float64 for {' and '.join(ARCHS)}; "
        + (f"registers spill in {', '.join(spilled)}." if spilled else "no register spills in any."),
        "",
        "## Whole meta-gradients",
        "",
        "All tasks, exact second order, by the plans that the engine makes; `by auto` marks the memory that it takes by itself. "
        "Launches are announced by the real launchers for all tasks; bytes are counted by executing on the emulator, of one task, two "
        "inner steps and the query pass (resident: the whole Schedule), and multiplied by tasks and steps, which is exact. "
        f"`launching` assumes {1e6 * LAUNCH_S:g} us a launch outside of a CUDA graph. Roofline: H100 SXM, 3.35 TB/s and 67 TFLOP/s; "
        "the products alone count as arithmetic. " + around_text(all_of_them),
        "",
        *workload_table(all_of_them),
        "",
        "### Resident against layered",
        "",
        "Layered / resident, or why that declines. A resident task is one block on one multiprocessor, so its roofline takes "
        f"tasks / {MULTIPROCESSORS} of an H100's arithmetic, and knows nothing of latencies: each stage ends with a barrier, and a product "
        "of ten rows does not fill a block. Its bytes are the encoded Steps, results, and arguments: phi[0] = theta is one, and every "
        "tile of a product asks for it again, which is the L1's work.",
        "",
        *walks_table(all_of_them),
        "",
    ]
    for w in all_of_them:
        if w.inner_steps == 1 and w.walk == "layered" and w.auto:
            lines += [f"### {key_of(w)}: the Steps that matter", "", *step_table(w, 14), ""]
    lines += [
        "## Kernels of float32",
        "",
        *kernel_table(float32),
        "",
        "Those of float64, for gradient checks, are in the JSON file.",
        "",
    ]
    lines += [
        "## History",
        "",
        "Kernels on sm_90; workloads with launches, bytes requested and the roofline with these bytes.",
        "",
    ]
    lines += history_text(entries)
    return "\n".join(lines)


def around_text(all_of_them: Sequence[Workload]) -> str:
    if not all_of_them:
        return ""
    of_call = {len(w.around) for w in all_of_them}
    most = max(sum(a.bytes for a in w.around) for w in all_of_them)
    return (
        f"A call adds, by either walk, {' or '.join(map(str, sorted(of_call)))} launches that are not counted here, with at most "
        f"{most / 1e6:.1f} MB: gathers of parameters, rates and gradient into another order, and copies of results."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, read, count, write. Returns 2 if a tool is missing, 1 if a float32 kernel of the layered walk spills."""
    args = _parser().parse_args(argv)
    try:
        return run(args)
    except Missing as missing:
        print(f"bench.kernels.static: {missing}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    cubins.nvcc(), cubins.nvdisasm()  # fail before minutes of work
    described = {**facts(), "nvcc": nvcc_version()}
    kernel_launches.make("emulated")
    counted: list[Workload] = []
    for size in args.workloads:
        counted += workloads.count(size, (1,) if size == "mini" else (1, 5))
    sizes = workloads.largest_launches(kernel_launches.sizes(), counted)
    rows = kernel_rows(kernel_launches.readable_names(), sizes, args.jobs)
    spilled = [
        row["kernel"]
        for row in rows
        if row["type"] == "float32" and row["file"] != "resident.cu" and max(row[arch]["spill_bytes"] for arch in ARCHS)
    ]
    for kernel in spilled:
        print(f"registers spill: {kernel}", file=sys.stderr)

    folder = Path(args.out)
    file = folder / "cuda_static_history.json"
    entries = json.loads(file.read_text())["entries"] if file.is_file() else []
    if args.note:
        entries.append(snapshot(args.note, rows, counted, described))
        write_json(file, {"what": "the static table after each change of the kernels", "entries": entries})
    text = page(rows, counted, entries, described)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cuda_static.md").write_text(text, encoding="utf-8")
    write_json(
        folder / "cuda_static.json",
        {"what": __doc__, **described, "kernels": rows, "workloads": [as_json(w) for w in counted]},
    )
    print("\n".join(workload_table(counted)))
    return 1 if spilled else 0


def as_json(w: Workload) -> dict[str, Any]:
    return {
        "case": w.case.name.rsplit("-k", 1)[0],
        "network": w.case.network,
        "tasks": w.case.tasks,
        "inner_steps": w.inner_steps,
        "precision": w.precision,
        "walk": w.walk,
        "memory": w.memory,
        "memory_by_auto": w.auto,
        "declines": w.declines,
        "resident": asdict(w.resident) if w.resident else None,
        "launches": w.launches,
        "flops": w.flops,
        "requested_bytes": w.requested,
        "compulsory_bytes": w.compulsory,
        "roofline_us": 1e6 * w.seconds(),
        "roofline_requested_us": 1e6 * w.seconds(requested=True),
        "around": [{"name": a.name, "launches": a.launches, "requested_bytes": a.bytes} for a in w.around],
        "steps": [
            {
                "name": a.name,
                "launches": a.launches,
                "blocks": [launch.blocks for launch in a.asked_launches],
                "flops": a.flops,
                "compulsory_bytes": a.compulsory,
                "requested_bytes": a.requested,
            }
            for a in w.asked
        ],
    }


def nvcc_version() -> str:
    answer = subprocess.run([*cubins.nvcc(), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release ([\d.]+)", answer)
    return found[1] if found else "of unknown version"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.static",
        description=__doc__,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--note", default="", help="adds an entry with this text to the history")
    parser.add_argument(
        "--workloads", nargs="*", choices=workloads.SIZES, default=list(workloads.SIZES), help="default: all"
    )
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (default 2)")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
