"""Compares `fastmaml plan` with measurements of W1 to W6: time within 30 %, peak memory within 15 %.

Time: the fastest of interleaved rounds against the predicted meta-gradient (or Hessian product). Each pass measures the
machine again and then every case. Clocks change, so the smallest value of all passes counts, for both numbers.
Memory: the rise of VmHWM in a new process, which first makes the tasks and a tiny run. The prediction leaves out the batch
and the outer optimizer, which does not run here. Below a few MiB the allocator dominates, so the limit is 15 % or 1 MiB.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import fastmaml as fm
from bench.cases import CASES, HVP, MEMORY, MEMORY_STEPS
from bench.measure import RESULTS, open_results
from fastmaml.benchmark import hvp, peak
from fastmaml.benchmark.peers import fastmaml_maml
from fastmaml.benchmark.problem import Case, problem
from fastmaml.benchmark.text import share, table
from fastmaml.benchmark.timing import interleaved
from fastmaml.prediction.calibration import Machine, measure
from fastmaml.prediction.predict import BATCH, OPTIMIZER_STATE, Prediction, predict, predict_call

TIME_LIMIT, MEMORY_LIMIT, MEMORY_FLOOR = 0.30, 0.15, 2**20
HEAD = ["case", "memory", "ms", "predicted", "off by", "MiB", "predicted", "off by"]


class Row(NamedTuple):
    """One case with its measurement and prediction."""

    case: str
    memory: str
    measured_s: float
    predicted_s: float
    others: float | None  # share of the machine that other programs used
    measured_bytes: int | None
    predicted_bytes: int | None
    passes: int = 1

    @property
    def time_off(self) -> float:
        return self.predicted_s / self.measured_s - 1

    @property
    def memory_off(self) -> float | None:
        if self.measured_bytes is None or self.predicted_bytes is None:
            return None
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def good(self) -> bool:
        if abs(self.time_off) > TIME_LIMIT:
            return False
        if self.measured_bytes is None or self.predicted_bytes is None:
            return True
        return abs(self.predicted_bytes - self.measured_bytes) <= max(MEMORY_LIMIT * self.measured_bytes, MEMORY_FLOOR)

    def cells(self) -> list[str]:
        mib = ["" if b is None else f"{b / 2**20:.1f}" for b in (self.measured_bytes, self.predicted_bytes)]
        off = "" if self.memory_off is None else share(self.memory_off)
        times = [f"{1e3 * s:.4g}" for s in (self.measured_s, self.predicted_s)]
        return [self.case, self.memory, *times, share(self.time_off), *mib, off]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, compare, print, write. Returns 1 if a prediction exceeds its limit."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    known = [*CASES, *(f"{name}-k{steps}" for name in MEMORY for steps in MEMORY_STEPS), *HVP]
    if args.passes < 1:
        _parser().error(f"--passes is {args.passes}; it must be at least 1")
    unknown = [name for name in args.cases if name not in known]
    if unknown:
        _parser().error(f"there is no case {unknown[0]!r}; there are {', '.join(known)}")
    try:
        results = open_results(args.out, __doc__ or "", {"rounds": args.rounds}, args.again, __file__)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    chosen = runs(args.cases or known)
    for turn in range(1, args.passes + 1):
        machine_of = _Machines()
        for key, (name, mode) in chosen.items():
            kept = of_entries({key: results.entries[key]})[0] if results.done(key) else None
            if kept is None or kept.passes < turn:
                row = measured(name, mode, args.rounds, args.threads, machine_of, kept)
                results.save(key, row._asdict())
                print(table(HEAD, [row.cells()]).split("\n")[-1], flush=True)
    rows = of_entries({key: results.entries[key] for key in chosen})
    print(f"\n{table(HEAD, [row.cells() for row in rows])}\n{verdict(rows)}")
    if all(results.done(key) and results.entries[key]["passes"] >= args.passes for key in runs(known)):
        results.finish()
    return 0 if all(row.good for row in rows) else 1


def of_entries(entries: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The rows of a result file. Older files have no passes."""
    return [Row(**{field: entry[field] for field in Row._fields if field in entry}) for entry in entries.values()]


def verdict(rows: Sequence[Row]) -> str:
    """A sentence: the number of rows within the limits, and the names of the others."""
    bad = [f"{row.case} {row.memory}".strip() for row in rows if not row.good]
    limits = f"{share(TIME_LIMIT)} of the time and {share(MEMORY_LIMIT)} or {MEMORY_FLOOR // 2**20} MiB of the memory"
    text = f"{len(rows) - len(bad)} of {len(rows)} rows within {limits}"
    return f"{text}, all but {', '.join(bad)}." if bad else f"{text}."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases of W1 to W6 (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each case (default 7)")
    parser.add_argument("--passes", type=int, default=3, help="passes over all cases (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--again", action="store_true", help="forget the results of an earlier run")
    parser.add_argument("--out", default=str(RESULTS / "plan.json"), help='JSON file; "" writes none')
    return parser


def runs(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """key -> (case, memory mode). W6 takes both modes, other cases the engine's choice; Hessian products have none."""
    found = {}
    for name in names:
        for mode in ("low", "stash") if name.rpartition("-k")[0] in MEMORY else ("",) if name in HVP else ("auto",):
            found[f"{name} {mode}".strip()] = (name, mode)
    return found


class _Machines:
    """One pass' measurements of the machine, by number of workers. Does not change the cache of `fastmaml plan`."""

    def __init__(self) -> None:
        self.known: dict[int, Machine] = {}

    def __call__(self, workers: int) -> Machine:
        if workers not in self.known:
            self.known[workers] = measure(workers)
        return self.known[workers]


def measured(
    name: str, mode: str, rounds: int, threads: int, machine_of: Callable[[int], Machine], kept: Row | None
) -> Row:
    """One row, from this pass and earlier ones."""
    row = _one_pass(name, mode, rounds, threads, machine_of, kept is None)
    if kept is None:
        return row
    faster = min(kept, row, key=lambda one: one.measured_s)
    return kept._replace(
        measured_s=faster.measured_s,
        others=faster.others,
        predicted_s=min(kept.predicted_s, row.predicted_s),
        passes=kept.passes + 1,
    )


def _one_pass(
    name: str, mode: str, rounds: int, threads: int, machine_of: Callable[[int], Machine], memory: bool
) -> Row:
    if name in HVP:
        return _hvp(name, rounds, threads, machine_of)
    base, _, steps = name.rpartition("-k")
    case = replace(MEMORY[base], inner_steps=int(steps)) if base in MEMORY else CASES[name]
    which = {"case": base if base in MEMORY else name, "inner_steps": case.inner_steps}
    source = peak.Source("fastmaml.benchmark.peak:built_in", which) if memory else None
    return _meta(name, case, mode, source, rounds, threads, machine_of)


def _meta(
    name: str,
    case: Case,
    mode: str,
    source: peak.Source | None,
    rounds: int,
    threads: int,
    machine_of: Callable[[int], Machine],
) -> Row:
    """Measures a meta-gradient. source: the case for a process that measures memory; None: no memory."""
    given = problem(case)
    learner = fm.MAML(given.own().model, case.inner_lr, case.inner_steps, case.loss, backend="cpu", memory=mode)
    found = predict(learner, given.batch, threads, machine_of)
    times = _time(fastmaml_maml.prepare(given, "cpu", mode), rounds)
    held = source and peak.in_a_process(fastmaml_maml, source, {"backend": "cpu", "memory": mode}).bytes
    return Row(name, found.chosen or mode, *_pair(times, found.meta_gradient_s), held, without_optimizer(found))


def without_optimizer(found: Prediction) -> int:
    """The predicted rise of a process that already holds the batch and takes no outer step."""
    return found.peak_bytes - found.parts[BATCH] - found.parts[OPTIMIZER_STATE]


def _hvp(name: str, rounds: int, threads: int, machine_of: Callable[[int], Machine]) -> Row:
    given = hvp.problem(HVP[name])
    engine = fm.Engine(given.model, given.loss, "cpu")
    predicted = predict_call(lambda: engine.hvp(given.params, given.x, given.y, given.v), threads, machine_of)
    times = _time(lambda: engine.hvp(given.params, given.x, given.y, given.v), rounds)
    return Row(name, "", *_pair(times, predicted), None, None)


def _time(call: Any, rounds: int) -> Any:
    call()
    return interleaved({"fastmaml": call}, rounds)["fastmaml"]


def _pair(times: Any, predicted: float) -> tuple[float, float, float | None]:
    return times.fastest, predicted, times.others


if __name__ == "__main__":
    sys.exit(main())
