"""Peak memory and time for several numbers of inner steps K. Each implementation and K runs in its own process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastmaml.benchmark import peak
from fastmaml.benchmark.meta import OURS
from fastmaml.benchmark.peers import Implementation, Missing
from fastmaml.benchmark.text import number, table

MIB = 2**20
MODES = ("low", "stash", "auto")  # fastmaml's memory modes, a row each
CALL_LIMIT_S = 60.0  # an implementation that is expected to take longer is skipped, with a note


class Point(NamedTuple):
    """One implementation at one K: its measurement, or why there is none."""

    name: str
    inner_steps: int
    peak: peak.Peak | None
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        measured = None if self.peak is None else self.peak._asdict()
        return {"name": self.name, "inner_steps": self.inner_steps, "peak": measured, "why": self.why}


def measure_steps(
    steps: int,
    earlier: Sequence[Point],
    source: peak.Source,
    peers: Mapping[str, Implementation],
    ours: Implementation,
    backend: str = "cpu",
    missing: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda name: None,
    modes: Sequence[str] = MODES,
    device: str = "cpu",
) -> list[Point]:
    """Measures all implementations at one K, on the problem that source builds.

    earlier: the points of smaller K, which show if a call would take too long.
    """
    own = {f"{OURS} {mode}": (ours, {"backend": backend, "memory": mode}) for mode in modes}
    points = []
    for name, (module, options) in {**own, **{peer: (m, {}) for peer, m in peers.items()}}.items():
        say(f"{name}, K = {steps}")
        why = (missing or {}).get(name) or _too_much(steps, [p for p in earlier if p.name == name])
        if why:
            points.append(Point(name, steps, None, why))
            continue
        try:
            points.append(Point(name, steps, peak.in_a_process(module, source, options, device)))
        except Missing as reason:
            points.append(Point(name, steps, None, str(reason)))
    return points


def _too_much(steps: int, earlier: Sequence[Point]) -> str:
    failed = next((p for p in earlier if p.peak is None), None)
    if failed is not None:
        return f"as at K = {failed.inner_steps}: {failed.why}"
    if not earlier or earlier[-1].peak is None:
        return ""
    foreseen = earlier[-1].peak.seconds * steps / max(earlier[-1].inner_steps, 1)
    # Inner steps may cost less than the query pass, so this estimate from K = 1 is too high. Hence the wide margin.
    return f"a call would take {foreseen:.0f} s, over {CALL_LIMIT_S:.0f} s" if foreseen > 10 * CALL_LIMIT_S else ""


def show(points: Sequence[Point]) -> str:
    """Two tables, MiB and seconds, with a column for each K."""
    steps = sorted({p.inner_steps for p in points})
    by = {(p.name, p.inner_steps): p for p in points}
    names = list(dict.fromkeys(p.name for p in points))

    def cells(name: str, of: Callable[[peak.Peak], str]) -> list[str]:
        found = [by.get((name, k)) for k in steps]
        return [of(p.peak) if p and p.peak else "" for p in found]

    head = [f"K={k}" for k in steps]
    memory = table(["MiB", *head], [[n, *cells(n, lambda p: f"{p.bytes / MIB:.1f}")] for n in names])
    times = table(["ms", *head], [[n, *cells(n, lambda p: number(1e3 * p.seconds))] for n in names])
    notes = [f"{p.name}, K = {p.inner_steps}: not measured, {p.why}" for p in points if p.peak is None]
    return "\n".join([memory, "", times, *notes])
