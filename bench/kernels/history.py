"""What the history of bench/results/cuda_static.json keeps of each state of the kernels, and what changed between two."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bench.kernels.workloads import Workload


def lasting(name: str) -> str:
    """What the history calls a kernel: without the stages of its tile, which it may gain and lose."""
    return re.sub(r"\b(Tile<\d+, \d+, \d+, \d+), \d+>", r"\1>", name)


def snapshot(
    note: str, rows: Sequence[Mapping[str, Any]], all_of_them: Sequence[Workload], described: Mapping[str, Any]
) -> dict[str, Any]:
    """What the history keeps of one state of the kernels."""
    return {
        "note": note,
        "date": described["date"],
        "commit": described["commit"],
        "kernels": {
            lasting(row["kernel"]): {
                "registers": row["sm_90"]["registers"],
                "warps": row["sm_90"]["warps"],
                "instructions": row["sm_90"]["instructions"],
                "math": row["sm_90"]["math"],
            }
            for row in rows
            if row["type"] == "float32"
        },
        "workloads": {
            key_of(w): {
                "launches": w.launches,
                "requested": w.requested,
                "compulsory": w.compulsory,
                "roofline_us": 1e6 * w.seconds(),
                "requested_us": 1e6 * w.seconds(requested=True),
            }
            for w in all_of_them
        },
    }


def key_of(w: Workload) -> str:
    words = [w.precision] if w.precision != "float32" else []
    words += [w.memory] if w.memory != "low" else []
    words += [w.walk] if w.walk != "layered" else []
    return ", ".join([f"{w.case.network}, K = {w.inner_steps}", *words])


def history_text(entries: Sequence[Mapping[str, Any]], most: int = 24) -> list[str]:
    """Every entry with what it changed against the one before: workloads, and the kernels that changed most."""
    lines: list[str] = []
    before: dict[str, Any] = {}
    for after in entries:
        lines += [f"### {after['date']}, {after['commit']}: {after['note']}", ""]
        changed = changes(before, after, most) if before else []
        if before and not changed:
            lines += ["No number of this table changed.", ""]
        elif changed:
            lines += [line(["what", "before", "after"]), line(["---"] * 3), *(line(row) for row in changed), ""]
        # An entry need not hold all workloads.
        before = {"kernels": after["kernels"], "workloads": {**before.get("workloads", {}), **after["workloads"]}}
    return lines


def changes(before: Mapping[str, Any], after: Mapping[str, Any], most: int) -> list[list[str]]:
    rows = []
    for name, now in after["workloads"].items():
        # A resident walk is first of all one instead of a layered walk.
        was = before["workloads"].get(name) or before["workloads"].get(name.removesuffix(", resident"))
        if was and (was["launches"], was["requested"]) != (now["launches"], now["requested"]):
            rows.append([name, workload_text(was), workload_text(now)])
    kernels = []
    for name, now in after["kernels"].items():
        was = before["kernels"].get(name)
        if was is None or was == now:
            continue
        by = max(abs(now[key] - was[key]) / max(was[key], 1) for key in now)
        kernels.append((by, [f"`{name}`", *(kernel_text(k) for k in (was, now))]))
    kernels.sort(key=lambda item: -item[0])
    rows += [row for _, row in kernels[:most]]
    fresh = sorted(set(after["kernels"]) - set(before["kernels"]))
    gone = sorted(set(before["kernels"]) - set(after["kernels"]))
    rows += [[f"`{name}`", "", kernel_text(after["kernels"][name])] for name in fresh[:most]]
    rows += [[f"`{name}`", kernel_text(before["kernels"][name]), ""] for name in gone[:most]]
    left = max(len(kernels) - most, 0) + max(len(fresh) - most, 0) + max(len(gone) - most, 0)
    if left:
        rows.append([f"and {left} kernels more", "", ""])
    return rows


def workload_text(w: Mapping[str, Any]) -> str:
    return f"{w['launches']} launches, {w['requested'] / 1e6:,.1f} MB, {w['requested_us']:,.1f} us"


def kernel_text(k: Mapping[str, Any]) -> str:
    share = f" ({100 * k['math'] / k['instructions']:.0f} % math)" if k["math"] else ""
    return f"{k['registers']} registers, {k['warps']} warps, loop of {k['instructions']}{share}"


def line(cells: Sequence[str]) -> str:
    """A row of a table of Markdown."""
    return "| " + " | ".join(cells) + " |"
