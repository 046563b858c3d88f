"""Result files, written case by case, so an interrupted run can continue."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fastmaml as fm
from fastmaml.compiled import introspection
from fastmaml.machine import machine, processor


def facts() -> dict[str, Any]:
    """Machine, threads, versions, instruction set and load: the facts needed to repeat a measurement."""
    described: dict[str, Any] = {
        "machine": machine(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "versions": {"fastmaml": fm.__version__, "python": platform.python_version(), "torch": torch.__version__},
    }
    if fm.Engine(torch.nn.Linear(1, 1), loss="mse", backend="cpu").fused:
        described["instruction_set"] = introspection.instruction_set()
        described["compiler"] = first_line([*os.environ.get("CXX", "c++").split(), "--version"])
    return described


def first_line(command: list[str]) -> str:
    """The first line that a command prints; "" if it fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.strip().split("\n")[0]


class Results:
    """One result file: its `identity` (settings and machine), the facts of the run, and an entry per finished case.

    A file with the same identity is continued. For another identity, raises ValueError that names the first difference;
    again=True starts a new file instead. path "": nothing is written. Each entry holds the digest of its `sources`, its
    commit and its day. An entry of other sources is not done, but stays until it is measured again.
    """

    def __init__(
        self,
        path: str | Path,
        what: str,
        identity: Mapping[str, Any],
        described: Mapping[str, Any],
        again: bool = False,
        sources: str = "",
    ):
        self.path = Path(path) if str(path) else None
        self.identity = json.loads(json.dumps(identity))  # as read back from the file
        self.content: dict[str, Any] = {"what": what, **described, "identity": self.identity, "complete": False}
        self.origin = {"sources": sources} | {key: described[key] for key in ("commit", "date") if key in described}
        self.entries: dict[str, Any] = {}
        if self.path is not None and self.path.is_file() and not again:
            self.entries = self._earlier(self.path)
        self.content["entries"] = self.entries

    def _earlier(self, path: Path) -> dict[str, Any]:
        had = json.loads(path.read_text(encoding="utf-8"))
        before = had.get("identity", {})
        differ = [key for key in self.identity if before.get(key) != self.identity[key]]
        if differ:
            key = differ[0]
            raise ValueError(
                f"{path} was measured with {key} {before.get(key, 'unknown')}, not {self.identity[key]}: "
                "use --again to start a new file, or --out to name another"
            )
        return dict(had["entries"])

    def done(self, name: str) -> bool:
        """Whether the case has been measured with these sources."""
        return name in self.entries and self.entries[name].get("sources") == self.origin["sources"]

    def save(self, name: str, entry: Mapping[str, Any]) -> None:
        """Adds the result of one case and writes the file, whole or not at all."""
        self.entries[name] = {**entry, **self.origin}
        self._write()

    def finish(self) -> None:
        """Marks the run as complete."""
        self.content["complete"] = True
        self._write()
        if self.path is not None:
            print(f"wrote {self.path}")

    def _write(self) -> None:
        if self.path is not None:
            write(self.path, self.content)


def write(path: str | Path, value: Mapping[str, Any]) -> None:
    """Writes a result file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
