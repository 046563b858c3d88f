"""Reports of runs, finished or not. Reads a run folder from disk and never trains. Needs matplotlib (`[report]`)."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["hero", "write"]


def write(run_dir: str | Path) -> Path:
    """Writes `report.html` into the run folder and returns its path.

    The page is one self-contained file. If evaluation.json or examples.npz is missing, the page says so. Raises
    ValueError if config.json or metrics.jsonl is missing, ImportError without matplotlib, each in one sentence.
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
    """Writes one picture of the result to `path` (.png or .svg): a task with its answers, and the evaluation.

    `theme` is "light" or "dark". Needs evaluation.json and examples.npz; raises ValueError that names a missing file.
    """
    from . import picture, run_folder

    return picture.write(run_folder.read(run_dir), Path(path), theme)
