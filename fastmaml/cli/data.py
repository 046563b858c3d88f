"""fastmaml data NAME: prepare a data set, check it, and list its contents."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastmaml.tasks import Glyphs, Omniglot, Sinusoid
from fastmaml.tasks.image_tasks import ImageTasks
from fastmaml.tasks.source import SPLITS, TaskSource

NAMES = ("sinusoid", "glyphs", "omniglot")
TIMED_BATCHES = 20


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this command to the parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "data", help="prepare and check a data set", description=__doc__
    )
    parser.add_argument("name", choices=NAMES, help="the data set")
    parser.add_argument(
        "--root", type=Path, help="folder of the data files (default: $FASTMAML_DATA, then the cache folder)"
    )
    parser.add_argument("--download", action="store_true", help="download missing files (omniglot)")
    parser.add_argument(
        "--splits", choices=("vinyals", "lake"), default="vinyals", help="which published split (omniglot)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the tasks (default 0)")
    parser.add_argument("--out", type=Path, metavar="PNG", help="write a picture of some test characters")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the contents of the data set. Errors propagate."""
    sources = {split: _source(args, split) for split in SPLITS}
    for split, source in sources.items():
        print(f"{args.name:9} {split:5}  {_contents(source)}")
    print(f"{args.name:9} a batch of 32 tasks takes {_milliseconds(sources['train']):.1f} ms to sample")
    if args.out is not None:
        test = sources["test"]
        if not isinstance(test, ImageTasks):
            raise ValueError(f"--out draws images, but {args.name} has none")
        _write_sheet(test, args.out)
        print(f"wrote {args.out}")
    return 0


def _source(args: argparse.Namespace, split: str) -> TaskSource:
    if args.name == "sinusoid":
        return Sinusoid(split=split, seed=args.seed)
    if args.name == "glyphs":
        return Glyphs(split=split, seed=args.seed, root=args.root)
    return Omniglot(split=split, splits=args.splits, seed=args.seed, root=args.root, download=args.download)


def _contents(source: TaskSource) -> str:
    if not isinstance(source, ImageTasks):
        return "y = amplitude * sin(x - phase), amplitude 0.1 to 5, phase 0 to pi, x -5 to 5"
    turned = f", {source.classes} classes with rotations" if source.turned else ""
    alphabets = len({name.split("/")[0] for name in source.class_names})
    size = "x".join(map(str, source.input_shape))
    return f"{source.characters} characters of {alphabets} alphabets, {source.examples} images each of {size}{turned}"


def _milliseconds(source: TaskSource) -> float:
    times = []
    for step in range(TIMED_BATCHES):
        start = time.perf_counter()
        source.sample(32, step=step)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def _write_sheet(source: ImageTasks, path: Path, rows: int = 16, columns: int = 20) -> None:
    """Rows are characters chosen by the seed; columns are their drawings."""
    from PIL import Image

    chosen = np.sort(
        np.random.default_rng(source.seed).choice(source.characters, min(rows, source.characters), replace=False)
    )
    images = 255 - source.images[chosen, :columns, 0]  # [rows, columns, H, W]
    sheet = images.transpose(0, 2, 1, 3).reshape(-1, images.shape[1] * images.shape[3])
    Image.fromarray(sheet).resize((2 * sheet.shape[1], 2 * sheet.shape[0]), Image.Resampling.NEAREST).save(path, "PNG")
