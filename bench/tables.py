"""Makes a page of tables for each result file: bench/results/*.md from *.json, the plots of bench/plots.py, and README.md's table.

README.md's table stands between the lines `<!-- table: summary -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plan, ranks
from bench.cases import CASES
from bench.measure import RESULTS, ROOT
from bench.meta_gradient import PEERS
from bench.plots import PLOTS
from fastmaml.benchmark.meta import OURS
from fastmaml.benchmark.peers.fastmaml_engine import NAME as ENGINE
from fastmaml.benchmark.text import markdown, number, share

MARKED_PAGES = ("README.md",)
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
# The cases of `speed` and `summary`; `meta` has all.
SHOWN = (
    "sinusoid-k1",
    "sinusoid-k5",
    "mlp-k1",
    "mlp-k5",
    "omniglot-t8-k1",
    "omniglot-t8-k5",
    "mini-s5-t2-k1",
    "mini-s5-t2-k5",
)
LIBRARIES = ("learn2learn", "higher")
MIB = 2**20

Content = Mapping[str, Any]


def read(stem: str) -> Content | None:
    """A result file's content; None where it was never measured."""
    path = RESULTS / f"{stem}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def belongs_to(content: Content) -> str:
    """What the numbers belong to, in one line below a table."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if name != "python")
    parts = [
        content.get("processor") or content["machine"],
        f"{content['threads']} threads",
        content.get("instruction_set", ""),
    ]
    if content.get("compiler"):
        parts.append(content["compiler"])
    return f"{', '.join(filter(None, parts))}; {versions}; {_commits(content)}."


def _commits(content: Content) -> str:
    """Commit and day of the numbers, or of each case's where they differ."""
    cases: dict[str, list[str]] = {}
    for name, entry in content.get("entries", {}).items():
        cases.setdefault(f"commit {entry['commit']}, {entry['date']}", []).append(name)
    if len(cases) > 1:
        return "; ".join(f"{commit}: {', '.join(names)}" for commit, names in cases.items())
    return next(iter(cases), None) or f"commit {content['commit']}, {content['date']}"


# ---------------------------------------------------------------- W1 to W4


def summary(content: Content) -> str:
    """README.md's table: fastmaml, its engine and the fastest peer on the cases of SHOWN."""
    lines = []
    for name in (name for name in SHOWN if name in content["entries"]):
        rows = {row["name"]: row for row in content["entries"][name]["rows"]}
        peers = {of: row["median_ms"] for of, row in rows.items() if not of.startswith(OURS)}
        best = min(peers, key=peers.__getitem__, default=None)
        times = [number(rows[of]["median_ms"], 3) if of in rows else "" for of in (OURS, ENGINE)]
        ahead = [_ahead(rows, peers, of) for of in (OURS, ENGINE)]
        lines.append([_title(CASES[name]), *times, f"{number(peers[best], 3)} ({best})" if best else "", *ahead])
    head = ["ms", OURS, ENGINE, "fastest peer", f"peer / {OURS}", f"peer / {ENGINE}"]
    machine = f"{content.get('processor') or content['machine']}, {content['threads']} threads"
    where = f"{machine}, {content['instruction_set']}" if content.get("instruction_set") else machine
    return (
        f"{markdown(head, lines)}\n\nMeasured on {where}. All peers, versions and commits are in "
        "[bench/results/speed.md](bench/results/speed.md)."
    )


def speed(content: Content) -> str:
    """Milliseconds of every implementation on the cases of SHOWN; below, how far ahead of whom."""
    entries = {name: content["entries"][name] for name in SHOWN if name in content["entries"]}
    medians = {name: {row["name"]: row for row in entry["rows"]} for name, entry in entries.items()}
    names = list(dict.fromkeys(row for rows in medians.values() for row in rows))
    lines = []
    for name in names:
        cells = []
        for case, rows in medians.items():
            row = rows.get(name)
            cell = "" if row is None else number(row["median_ms"], 3)
            best = row is not None and row["median_ms"] == min(r["median_ms"] for r in rows.values())
            if name == OURS and row is not None and entries[case]["gflop"] > 1:
                cell += f" ({share(row['share_of_sgemm'])} of sgemm)"
            cells.append(f"**{cell}**" if best else cell)
        lines.append([name, *cells])
    lines.append(["fastest peer / fastmaml", *(_ahead(rows, None) for rows in medians.values())])
    if ENGINE in names:
        lines.append([f"fastest peer / {ENGINE}", *(_ahead(rows, None, ENGINE) for rows in medians.values())])
    lines.append(["learn2learn, higher / fastmaml", *(_ahead(rows, LIBRARIES) for rows in medians.values())])
    head = ["ms", *(_title(CASES[name]) for name in entries)]
    without = [name for name in PEERS if name not in names]
    note = f"\n\nWithout a row in this run: {', '.join(without)}." if without else ""
    return f"{markdown(head, lines)}{note}\n\n{belongs_to({**content, 'entries': entries})}"


def _ahead(rows: Mapping[str, Any], of: Collection[str] | None, ours: str = OURS) -> str:
    """How many times faster fastmaml is than the fastest of these, and which one that is."""
    others = {n: r["median_ms"] for n, r in rows.items() if not n.startswith(OURS) and (of is None or n in of)}
    if ours not in rows or not others:
        return ""
    best = min(others, key=others.__getitem__)
    return f"{others[best] / rows[ours]['median_ms']:.1f}" + (f" ({best})" if of is None else "")


def _title(case: Any) -> str:
    return f"{case.workload} {case.network}, {case.tasks} tasks, {case.support}+{case.query}, K={case.inner_steps}"


def meta(content: Content) -> str:
    """Every case with all columns."""
    parts = []
    for name in (name for name in CASES if name in content["entries"]):
        entry = content["entries"][name]
        case = CASES[name]
        parts.append(
            f"**{name}** ({case.workload}: {case.network}, {case.sizes}; {entry['gflop']:.4g} GFLOP, sgemm "
            f"{entry['sgemm_gflop_per_s']:.0f} GFLOP/s, memory {entry.get('memory', 'auto')}, plain torch's float32 error "
            f"{_error(entry.get('plain_torch_error_float32'))})\n\n{_rows(entry)}{_notes(entry)}"
        )
    return "\n\n".join([*parts, belongs_to(content)])


def _rows(entry: Content, count: str = "tasks_per_s", unit: str = "tasks/s") -> str:
    head = ["implementation", "ms", "±", unit, "GFLOP/s", "of sgemm", "MiB", "error f64", "error f32", "rounds (again, kept disturbed)",
            "others", "first call, s", "ratio"]  # fmt: skip
    lines = []
    for row in entry["rows"]:
        again = f" ({row['retaken']}, {row['disturbed']})" if row.get("retaken") or row.get("disturbed") else ""
        lines.append([
            f"**{row['name']}**" if row["name"] == OURS else row["name"], number(row["median_ms"]), share(row["spread"]),
            number(row[count]), f"{row['gflop_per_s']:.1f}", share(row["share_of_sgemm"]), _mib(row.get("peak_bytes")),
            _error(row.get("error_float64")), _error(row["error_float32"]), f"{row['rounds']}{again}",
            share(row.get("others_share")), number(row.get("first_call_s"), 3), number(row.get("ratio_to_fastmaml"), 3),
        ])  # fmt: skip
    keep = [i for i in range(len(head)) if any(line[i] for line in lines)]
    return markdown([head[i] for i in keep], [[line[i] for i in keep] for line in lines])


def _notes(entry: Content) -> str:
    return "".join(f"\n\n{name}: not measured, {why}." for name, why in entry["absent"].items())


def _mib(count: float | None) -> str:
    return "" if count is None else f"{count / MIB:.0f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


# ---------------------------------------------------------------- W5 to W8


def hvp(content: Content) -> str:
    """Products a second of every implementation on every case, then how far ahead."""
    entries = content["entries"]
    single = {case: {r["name"]: r for r in entry["rows"] if r["products"] == 1} for case, entry in entries.items()}
    several = {case: {r["name"]: r for r in entry["rows"] if r["products"] > 1} for case, entry in entries.items()}
    parts = [_products(single)]
    if any(several.values()):
        parts.append("Several directions at fixed parameters, the linearisation that they share included (`Engine.curvature`; peers "
                     "keep one where they can):\n\n" + _products({c: r for c, r in several.items() if r}))  # fmt: skip
    absent = {f"{who}: {why}" for entry in entries.values() for who, why in entry["absent"].items()}
    parts.append("Not measured on some cases: " + "; ".join(sorted(absent)) + "." if absent else "")
    return "\n\n".join(filter(None, [*parts, belongs_to(content)]))


def _products(cases: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for rows in cases.values() for name in rows))
    lines = []
    for case, rows in cases.items():
        best = max(r["products_per_s"] for r in rows.values())
        cells = []
        for name in names:
            rate = rows[name]["products_per_s"] if name in rows else None
            cells.append("" if rate is None else f"**{number(rate)}**" if rate == best else number(rate))
        ours = next((r for n, r in rows.items() if n.split(",")[0] == OURS), None)
        others = [r["products_per_s"] for r in rows.values() if r is not ours]
        ahead = f"{ours['products_per_s'] / max(others):.2f}" if ours and others else ""
        worst = max((r["error_float32"] for r in rows.values()), default=None)
        lines.append([case, *cells, ahead, share(ours["share_of_sgemm"]) if ours else "", _error(worst)])
    return markdown(["HVP/s", *names, "ahead of the fastest", "of sgemm", "largest error f32"], lines)


def peak_memory(content: Content) -> str:
    """MiB and milliseconds against K."""
    points = [point for entry in content["entries"].values() for point in entry["points"]]
    steps = sorted({p["inner_steps"] for p in points})
    by = {(p["name"], p["inner_steps"]): p["peak"] for p in points}
    names = list(dict.fromkeys(p["name"] for p in points))

    def rows(of: Callable[[Content], str]) -> list[list[str]]:
        return [[name, *(of(by[name, k]) if by.get((name, k)) else "" for k in steps)] for name in names]

    memory = markdown(["peak MiB", *(f"K={k}" for k in steps)], rows(lambda p: f"{p['bytes'] / MIB:.0f}"))
    times = markdown(["ms", *(f"K={k}" for k in steps)], rows(lambda p: number(1e3 * p["seconds"])))
    why = [f"{p['name']}, K={p['inner_steps']}: {p['why']}" for p in points if p["peak"] is None]
    return "\n\n".join([memory, times, *([f"Not measured: {'; '.join(why)}."] if why else []), belongs_to(content)])


def learners(content: Content) -> str:
    lines = []
    for name, entry in content["entries"].items():
        for row in entry["rows"]:
            lines.append([name, row["name"], number(row["median_ms"]), share(row["spread"]), _error(row["error_float64"]),
                          _error(row["error_float32"]), number(row["ratio_to_fastmaml"], 3)])  # fmt: skip
    return f"{markdown(['step', 'implementation', 'ms', '±', 'error f64', 'error f32', 'ratio'], lines)}\n\n{belongs_to(content)}"


def policy(content: Content) -> str:
    lines = []
    for name, entry in content["entries"].items():
        for row in entry["rows"]:
            parts = [number(of["median_ms"]) for of in row["parts"].values()]
            lines.append([name, row["name"], *parts, number(row["total_ms"]), f"{row['gflop_per_s']:.1f}",
                          share(row["gflop_per_s"] / entry["sgemm_gflop_per_s"]), _error(row["error_float64"]),
                          _error(row["error_float32"]), number(row["ratio_to_fastmaml"], 3)])  # fmt: skip
        lines.append([name, "GFLOP", *(f"{count:.1f}" for count in entry["gflop"].values()),
                      f"{sum(entry['gflop'].values()):.1f}", *[""] * 5])  # fmt: skip
    parts = next((list(entry["gflop"]) for entry in content["entries"].values()), [])
    head = ["batch", "implementation", *(f"{part}, ms" for part in parts), "all, ms", "GFLOP/s", "of sgemm", "error f64",
            "error f32", "ratio"]  # fmt: skip
    return f"{markdown(head, lines)}\n\n{belongs_to(content)}"


def scaling(content: Content) -> str:
    lines = []
    for name, entry in content["entries"].items():
        first, last = entry["points"][0], entry["points"][-1]
        span = f"{first['size']} to {last['size']}: {number(first['ms'], 3)} to {number(last['ms'], 3)} ms"
        beyond = number(entry["slope_beyond_overhead"], 3)
        lines.append([name, span, number(entry["slope"], 3), beyond, f"{entry['wanted']:g}"])
    head = ["curve", "from, to", "slope", "slope beyond the fixed cost", "of the arithmetic"]
    return f"{markdown(head, lines)}\n\n{belongs_to(content)}"


def predicted(content: Content) -> str:
    """Time and memory, measured and by `fastmaml plan`."""
    rows = plan.of_entries(content["entries"])
    return f"{plan.verdict(rows)}\n\n{markdown(plan.HEAD, [row.cells() for row in rows])}\n\n{belongs_to(content)}"


def startup(content: Content) -> str:
    keys = ("first_ms", "later_ms", "extra_ms", "collector_ms")
    lines = [[row["case"], *(number(row[key], 3) for key in keys)] for row in content["rows"]]
    head = ["first call", "ms", "later, ms", "more, ms", "of it the garbage collector, ms"]
    text = (f"Import of fastmaml beyond torch's own {content['import_torch_s']:.2f} s: {content['import_fastmaml_s']:.3f} s "
            f"(median of {content['processes']} processes).")  # fmt: skip
    return f"{text}\n\n{markdown(head, lines)}\n\n{belongs_to(content)}"


def sinusoid(content: Content) -> str:
    return (
        f"{content['iterations']:,} iterations, sampling and Adam included, by the wall clock: {content['wall_s']:.0f} s; "
        f"{content['first_ms']:.3f} ms an iteration in the first tenth, {content['last_ms']:.3f} in the last.\n\n"
        f"{belongs_to(content)}"
    )


# By name: the result file, the table, the command that measures it.
TABLES: dict[str, tuple[str, Callable[[Content], str], str]] = {
    "speed": ("meta", speed, "bench.meta_gradient"),
    "meta": ("meta", meta, "bench.meta_gradient"),
    "ranks": ("meta", ranks.table, "bench.meta_gradient"),
    "meta-jax": ("meta_jax", meta, "bench.meta_gradient omniglot-t8-k1 --peers jax jax_map jax_fo_rev jax_fo_rev_map"),
    "speed-avx512": ("meta_avx512", speed, "bench.meta_gradient"),
    "hvp-avx512": ("hvp_avx512", hvp, "bench.hvp"),
    "hvp": ("hvp", hvp, "bench.hvp"),
    "peak-memory": ("peak_memory", peak_memory, "bench.peak_memory"),
    "learners": ("learners", learners, "bench.learners"),
    "policy": ("policy", policy, "bench.policy"),
    "scaling": ("scaling", scaling, "bench.scaling"),
    "plan": ("plan", predicted, "bench.plan"),
    "startup": ("startup", startup, "bench.startup"),
    "sinusoid": ("sinusoid_paper", sinusoid, "bench.sinusoid --paper"),
}
# Between the markers of a page instead of on a page of its own.
MARKED_TABLES: dict[str, tuple[str, Callable[[Content], str], str]] = {
    "summary": ("meta", summary, "bench.meta_gradient")
}

TITLES = {
    "speed": "W1 to W4: one exact meta-gradient",
    "meta": "W1 to W4: every case with all columns",
    "ranks": "What more ranks would take, on paper",
    "meta-jax": "JAX on a convolution",
    "speed-avx512": "W1 to W4 on a machine with AVX-512",
    "hvp-avx512": "W5 on a machine with AVX-512",
    "hvp": "W5: Hessian-vector products",
    "peak-memory": "W6: memory against inner steps",
    "learners": "W7: a step of other learners",
    "policy": "W8: a policy's recorded batch",
    "scaling": "Scaling",
    "plan": "`fastmaml plan`: predicted and measured",
    "startup": "Import and first call",
    "sinusoid": "The sinusoid paper run",
}

# Which of them have a picture (by bench.plots, or beside its file already), and what it shows.
PICTURES = {
    "meta": "Every implementation's time as a multiple of fastmaml's, case by case",
    "peak-memory": "Peak memory and time against the number of inner steps",
    "scaling": "Time against tasks, inner steps, examples and width, with the slope of the arithmetic",
}


def make(name: str) -> str:
    """The text of a table, or the command that would measure it."""
    known = TABLES | MARKED_TABLES
    if name not in known:
        raise ValueError(f"there is no table '{name}'; there are {', '.join(known)}")
    stem, table, command = known[name]
    content = read(stem)
    if content is None:
        return f"Not measured yet: `python -m {command}`."
    picture = f"![{PICTURES[name]}]({stem}.png)\n\n" if name in PICTURES else ""
    return picture + table(content)


def page(name: str) -> str:
    """A page of bench/results."""
    return f"# {TITLES[name]}\n\n`python -m {TABLES[name][2]}`; [bench/README.md](../README.md) has the method.\n\n{make(name)}\n"


def filled(text: str) -> str:
    """A page with the tables between its markers made anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{make(found['name'])}\n\n{found[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write all tables; with --check only say what differs, and 1 if something does."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if a file is not what this makes"
    )
    args = parser.parse_args(argv)
    wanted = {RESULTS / f"{name}.md": page(name) for name, (stem, *_) in TABLES.items() if read(stem) is not None}
    wanted |= {ROOT / marked: filled((ROOT / marked).read_text(encoding="utf-8")) for marked in MARKED_PAGES}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{'differs' if args.check else 'wrote'}: {path.relative_to(ROOT)}")
        if not args.check:
            Path(path).write_text(wanted[path], encoding="utf-8")
    if not args.check:
        for stem, draw in PLOTS.items():
            if content := read(stem):
                draw(content, RESULTS / f"{stem}.png")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
