"""Plots of result files, each a PNG next to its file: the peers' times against fastmaml's, and memory against inner steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastmaml.benchmark.meta import OURS
from fastmaml.report import plots
from fastmaml.report.style import LIGHT

MIB = 2**20
# Colours show the kind of implementation, markers the implementation.
FAMILIES = (("jax", "early"), ("torch_func", "plain"), ("fo_rev", "plain"), ("", "random"))
MARKERS = "osD^vP*X<>"

Content = Mapping[str, Any]


def _look(name: str, names: list[str]) -> dict[str, Any]:
    role = "learner" if name.startswith(OURS) else next(role for prefix, role in FAMILIES if name.startswith(prefix))
    return {"color": LIGHT[role], "marker": MARKERS[names.index(name) % len(MARKERS)]}


def meta(content: Content, path: Path) -> None:
    """A row per case: each implementation's time as a multiple of fastmaml's, on a log scale."""
    entries = {n: e for n, e in content["entries"].items() if any(r["name"] == OURS for r in e["rows"])}
    names = list(dict.fromkeys(row["name"] for entry in entries.values() for row in entry["rows"]))
    with plots.drawing(LIGHT, **{"axes.grid.axis": "x"}) as Figure:
        figure = Figure(figsize=(9.6, 1.6 + 0.32 * len(entries)), layout="constrained", facecolor=LIGHT["paper"])
        axes = figure.add_subplot()
        for name in names:
            points = [(row["ratio_to_fastmaml"], -i) for i, entry in enumerate(entries.values()) for row in entry["rows"]
                      if row["name"] == name]  # fmt: skip
            axes.plot(*zip(*points), linestyle="", markersize=5, label=name, **_look(name, names))
        axes.set_yticks([-i for i in range(len(entries))], list(entries))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title("time as a multiple of fastmaml's (to the right: slower), log scale")
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        figure.savefig(path, dpi=140)


def peak_memory(content: Content, path: Path) -> None:
    """MiB and milliseconds against K, log-log."""
    points = [p for entry in content["entries"].values() for p in entry["points"] if p["peak"]]
    names = list(dict.fromkeys(p["name"] for p in points))
    panels: tuple[tuple[str, Callable[[Content], float]], ...] = (
        ("peak MiB", lambda peak: max(peak["bytes"] / MIB, 0.1)),
        ("ms a meta-gradient", lambda peak: 1e3 * peak["seconds"]),
    )
    with plots.drawing(LIGHT) as Figure:
        figure = Figure(figsize=(9.6, 3.6), layout="constrained", facecolor=LIGHT["paper"])
        for axes, (title, of) in zip(figure.subplots(1, 2), panels):
            for name in names:
                own = [(p["inner_steps"], of(p["peak"])) for p in points if p["name"] == name]
                axes.plot(*zip(*own), linewidth=1.4, markersize=4, label=name, **_look(name, names))
            axes.set(xscale="log", yscale="log", xlabel="inner steps K")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_title(f"{title}, log scale")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
        figure.savefig(path, dpi=140)


PLOTS: dict[str, Callable[[Content, Path], None]] = {"meta": meta, "peak_memory": peak_memory}
