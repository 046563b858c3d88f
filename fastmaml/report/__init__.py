"""Reports of runs, finished or not: reads a run folder from disk, never trains, needs matplotlib (`[report]`)."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["hero", "write"]


def write(run_dir: str | Path) -> Path:
    """Writes `report.html` into the run folder and returns its path.

    The page is one self-contained file. A folder without evaluation.json or examples.npz gives a page that says so;
    without config.json or metrics.jsonl it raises ValueError, without matplotlib ImportError, each with one sentence.
    """
    from . import page, run_folder

    run = run_folder.read(run_dir)
    text = page.html(run)
    path = run.path / "report.html"
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
    return path


def hero(run_dir: str | Path, path: str | Path, theme: str = "light") -> Path:
    """Writes one picture of the result to `path` (.png or .svg): a task and its answers, beside the evaluation.

    `theme` is "light" or "dark". Needs evaluation.json and examples.npz; ValueError names what is missing.
    """
    from . import picture, run_folder

    return picture.write(run_folder.read(run_dir), Path(path), theme)
