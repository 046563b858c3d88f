"""Runs every benchmark, one after the other, and makes the tables. Continues an interrupted run without measuring again."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

from bench.measure import RESULTS, ROOT

# With estimated minutes on two quiet cores; the real times are printed. The cases of README.md's tables come early. A case
# that an earlier part has measured is not measured again.
PARTS: dict[str, tuple[list[str], int]] = {
    "startup": (["bench.startup"], 2),
    "sinusoid": (["bench.sinusoid"], 1),
    "sinusoid, 70,000 iterations": (["bench.sinusoid", "--paper"], 2),
    "arena": (["bench.arena"], 1),
    "scaling": (["bench.scaling"], 6),
    "W1 W2": (["bench.meta_gradient", "W1", "W2"], 20),
    "W3 W4, shown": (["bench.meta_gradient", "omniglot-t8-k1", "omniglot-t8-k5", "mini-s5-t2-k1", "mini-s5-t2-k5"], 60),
    "W8 policy": (["bench.policy"], 8),
    "W7 learners": (["bench.learners"], 8),
    "W5 hvp": (["bench.hvp"], 45),
    "W6 peak memory": (["bench.peak_memory"], 25),
    "W3": (["bench.meta_gradient", "W3"], 40),
    "W4": (["bench.meta_gradient", "W4"], 50),
    "plan": (["bench.plan"], 40),
}
RESUMED = {
    "bench.scaling",
    "bench.policy",
    "bench.learners",
    "bench.peak_memory",
    "bench.hvp",
    "bench.meta_gradient",
    "bench.plan",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen parts. Returns 1 if one failed (the others still run), 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(map(repr, PARTS))}"
    )
    parser.add_argument("--again", action="store_true", help="forget what earlier runs have measured")
    args = parser.parse_args(argv)
    failed, forgotten = [], set()
    for part in args.parts or PARTS:
        words, minutes = PARTS[part]
        more = ["--again"] if args.again and words[0] in RESUMED and words[0] not in forgotten else []
        forgotten.add(words[0])
        print(f"== {part} (about {minutes} min): python -m {' '.join([*words, *more])}", flush=True)
        started = time.monotonic()
        try:
            code = subprocess.run([sys.executable, "-m", *words, *more], cwd=ROOT, check=False).returncode
        except KeyboardInterrupt:
            print("stopped; repeat the command without --again to continue with the next case", file=sys.stderr)
            return 130
        print(
            f"== {part}: {'done' if code == 0 else f'FAILED, exit code {code}'} in {(time.monotonic() - started) / 60:.1f} min"
        )
        if code:
            failed.append(part)
    print(f"results are in {RESULTS.relative_to(ROOT)}; python -m bench.tables makes the tables")
    code = subprocess.run([sys.executable, "-m", "bench.tables"], cwd=ROOT, check=False).returncode
    for part in failed:
        print(f"failed: {part}", file=sys.stderr)
    return 1 if failed or code else 0


if __name__ == "__main__":
    sys.exit(main())
