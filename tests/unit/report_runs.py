# Run folders as the trainer writes them, made up with numpy: `sinusoid`, `glyphs`, `unfinished`; for test_report_*.py.
#   python tests/unit/report_runs.py FOLDER                 writes them with their reports and README pictures
#   python tests/unit/report_runs.py FOLDER --screenshots   and photographs the pages: desktop, phone, light, dark, PDF
from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

STEPS = list(range(11))
CONFIG: dict[str, Any] = {
    "algorithm": "maml",
    "inner_steps": 1,
    "outer_lr": 0.001,
    "schedule": "constant",
    "time_limit": None,
    "root": None,
    "log_every": 10,
    "validation_tasks": 200,
    "eval_tasks": 600,
    "seed": 0,
    "backend": "auto",
    "engine": {"backend": "cpu", "fused": True, "why": ""},
    "batch_norm": "transductive",
    "validate_every": 200,
    "memory": "auto",
    "threads": 2,
    "machine": "2 cores, AVX2+FMA",
    "versions": {"fastmaml": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6", "python": "3.11"},
}


def sinusoid(folder: Path, steps: int = 70_000, every: int = 20, tasks: int = 8) -> Path:
    """A finished regression run with tables for 5, 10 and 20 shots and a comparison of losses."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    more = {"dataset": "sinusoid", "shots": 10, "query_shots": 10, "inner_lr": 0.01, "meta_batch": 25, "steps": steps}
    model = {"name": "mlp", "sizes": [1, 40, 40, 1], "init": "truncated_normal"}
    config = {**CONFIG, **more, "ways": None, "model": model, "loss": "mse", "metric": "mse"}
    write_json(folder / "config.json", config)

    at = np.arange(every, steps + 1, every)
    trend = 0.35 + 3.0 * np.exp(-at / (0.12 * steps))
    after = trend * rng.lognormal(0, 0.28, len(at))
    before = (3.4 + 0.9 * at / steps) * rng.lognormal(0, 0.2, len(at))
    rows = [
        train_row(int(s), a, b, b, a, speed=310 + 25 * rng.standard_normal(), share=0.03, elapsed=s / 310)
        for s, a, b in zip(at, after, before, strict=True)
    ]
    best = np.inf
    for s in np.linspace(steps / 14, steps, 14).astype(int):
        value = (0.33 + 3.0 * np.exp(-s / (0.12 * steps))) * rng.lognormal(0, 0.06)
        rows.append(validation_row(int(s), value, 4.1, value, 0.09 * value, value < best))
        best = min(best, value)
    write_lines(folder / "metrics.jsonl", sorted(rows, key=lambda row: row["step"]))

    tables = []
    for shots, floor in ((5, 0.52), (10, 0.20), (20, 0.07)):
        learner = floor + (4.1 - floor) * np.array(
            [1.0, 0.13, 0.06, 0.04, 0.03, 0.02, 0.016, 0.012, 0.01, 0.008, 0.006]
        )
        random = 4.3 - 0.055 * np.arange(11)
        rows_ = [
            row("MAML, meta-trained", "learner", learner, 0.1 * learner),
            row("same network, random initialisation", "baseline", random, 0.07 * random),
            row("mean predictor", "baseline", np.array([3.1 + 2 / shots]), np.array([0.2])),
        ]
        tables.append({"shots": shots, "rows": rows_})
    write_json(folder / "evaluation.json", evaluation("sinusoid", "mse", tables))

    grid = np.linspace(-5, 5, 100)
    amplitude, phase = rng.uniform(0.5, 5, (tasks, 1)), rng.uniform(0, np.pi, (tasks, 1))
    true = amplitude * np.sin(grid - phase)
    start = np.tile(0.3 * np.sin(grid - 1.2) + 0.1 * np.cos(2.1 * grid), (tasks, 1))
    wobble = 0.06 * amplitude * np.sin(1.7 * grid + 3 * phase)
    fade = np.array([1.0, 0.32, 0.24, 0.18, 0.14, 0.11, 0.09, 0.075, 0.06, 0.05, 0.045])[:, None]
    curves = np.stack([true[t] + fade * (start[t] - true[t]) + (1 - fade) * wobble[t] for t in range(tasks)])
    x = rng.uniform(-5, 5, (tasks, 10, 1))
    y = amplitude[:, :, None] * np.sin(x - phase[:, :, None])
    np.savez(folder / "examples.npz", support_x=x, support_y=y, grid_x=grid, true_y=true, curves=curves)
    write_json(folder / "comparison.json", comparison(rng))
    return folder


def glyphs(folder: Path, steps: int = 2_000, ways: int = 5, shots: int = 1, tasks: int = 6) -> Path:
    """A finished classification run whose pictures are characters of the fonts that matplotlib ships."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    more = {
        "dataset": "glyphs",
        "ways": ways,
        "shots": shots,
        "query_shots": 15,
        "inner_lr": 0.4,
        "meta_batch": 32,
        "steps": steps,
    }
    model = {"name": "conv4", "filters": 64}
    config = {
        **CONFIG,
        **more,
        "model": model,
        "loss": "cross_entropy",
        "metric": "accuracy",
    }
    write_json(folder / "config.json", config)

    rows = []
    best = 0.0
    for s in range(10, steps + 1, 10):
        level = 0.2 + 0.76 * (1 - np.exp(-s / (0.13 * steps)))
        after = float(np.clip(level + 0.025 * rng.standard_normal(), 0, 1))
        before = float(np.clip(0.2 + 0.012 * rng.standard_normal(), 0, 1))
        loss = 1.62 * (1 - after) ** 0.7 + 0.03 * rng.random()
        rows.append(
            train_row(
                s, loss, 1.72 + 0.05 * rng.standard_normal(), before, after, 8.7 + 0.3 * rng.random(), 0.012, s / 8.7
            )
        )
        if s % (steps // 10) == 0:
            value = level - 0.012 + 0.008 * rng.standard_normal()
            rows.append(validation_row(s, 1.62 * (1 - value) ** 0.7, 0.2, value, 0.006, value > best))
            best = max(best, value)
    write_lines(folder / "metrics.jsonl", rows)

    learner = 0.963 + 0.012 * (1 - np.exp(-np.arange(11) / 1.5))
    learner[0] = 0.201
    random = 0.2 + 0.33 * (1 - np.exp(-np.arange(11) / 1.2))
    rows_ = [
        row("MAML, meta-trained", "learner", learner, np.full(11, 0.0024)),
        row("same network, random initialisation", "baseline", random, np.full(11, 0.0085)),
        row("nearest neighbour on pixels", "baseline", np.array([0.512]), np.array([0.0091])),
    ]
    write_json(
        folder / "evaluation.json",
        {**evaluation("glyphs", "accuracy", [{"shots": shots, "rows": rows_}]), "ways": ways},
    )
    np.savez_compressed(folder / "examples.npz", **glyph_examples(rng, ways, shots, 15, tasks))
    return folder


def unfinished(folder: Path) -> Path:
    """A run killed in mid training: no evaluation, no examples, half a last line."""
    glyphs(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:90]) + lines[90][:31])
    for name in ("evaluation.json", "examples.npz"):
        (folder / name).unlink()
    return folder


# ---------------------------------------------------------------- the parts


def train_row(
    step: int, loss: float, support_loss: float, before: float, after: float, speed: float, share: float, elapsed: float
) -> dict[str, Any]:
    row = {
        "kind": "train",
        "step": step,
        "loss": loss,
        "support_loss": support_loss,
        "metric_before": before,
        "metric_after": after,
    }
    return {**row, "steps_per_second": speed, "sampling_share": share, "elapsed_s": float(elapsed)}


def validation_row(step: int, loss: float, before: float, after: float, ci95: float, best: bool) -> dict[str, Any]:
    row = {
        "kind": "validation",
        "step": step,
        "loss": float(loss),
        "metric_before": before,
        "metric_after": float(after),
    }
    return {**row, "ci95": float(ci95), "best": bool(best)}


def row(name: str, kind: str, mean: np.ndarray, ci95: np.ndarray) -> dict[str, Any]:
    return {"name": name, "kind": kind, "mean": mean.tolist(), "ci95": ci95.tolist(), "median": (0.93 * mean).tolist()}


def evaluation(dataset: str, metric: str, tables: list[dict[str, Any]]) -> dict[str, Any]:
    facts = {"dataset": dataset, "split": "test", "tasks": 600, "query_shots": 15, "checkpoint": "best", "step": 1800}
    return {**facts, "wall_s": 21.4, "metric": metric, "inner_steps": STEPS, "tables": tables}


def comparison(rng: np.random.Generator, points: int = 60) -> list[dict[str, Any]]:
    """Three losses that part slowly, as float32 runs do, the second equal to the first for its first five steps."""
    x = list(range(points))
    base = 3.2 * np.exp(-np.arange(points) / 25) + 0.3 + 0.1 * rng.standard_normal(points)
    apart = np.minimum(1e-7 * np.exp(np.arange(points) / 4.5), 0.08)
    cpu = base + np.where(np.arange(points) < 5, 0, apart) * rng.standard_normal(points)
    moved = base + 1.5 * apart * rng.standard_normal(points)
    names = ("autodiff", "cpu", "autodiff, start moved by 1e-7")
    series = [{"name": n, "x": x, "y": y.tolist()} for n, y in zip(names, (base, cpu, moved), strict=True)]
    note = "The cpu engine leaves autodiff no faster than autodiff leaves itself when its start is moved by 1e-7."
    labels = {"title": "Training loss in float32", "x_label": "outer step", "y_label": "query loss", "log_y": False}
    return [{**labels, "series": series, "note": note}]


CHARACTERS = "ағҐЖѬβξψДעאשꙮЊԱԲԳაბგლثجخگ᚛ⵣⴼⵥΩλπŧƕɸ"  # in both faces of glyph()


def glyph_examples(
    rng: np.random.Generator, ways: int, shots: int, query_shots: int, tasks: int
) -> dict[str, np.ndarray]:
    arrays: dict[str, list[np.ndarray]] = {}
    for _ in range(tasks):
        chosen = rng.choice(list(CHARACTERS), ways, replace=False)
        support_y, query_y = np.repeat(np.arange(ways), shots), np.repeat(np.arange(ways), query_shots)
        logits = rng.standard_normal((len(query_y), ways)) + 3.6 * np.eye(ways)[query_y]
        odds = np.exp(1.3 * logits)
        parts = {
            "support_x": np.stack([glyph(str(chosen[c]), rng) for c in support_y]),
            "support_y": support_y,
            "query_x": np.stack([glyph(str(chosen[c]), rng) for c in query_y]),
            "query_y": query_y,
            "predictions_before": rng.integers(0, ways, len(query_y)),
            "predictions_after": odds.argmax(axis=1),
            "probabilities_after": odds / odds.sum(axis=1, keepdims=True),
        }
        for key, value in parts.items():
            arrays.setdefault(key, []).append(value)
    return {key: np.stack(values) for key, values in arrays.items()}


def glyph(character: str, rng: np.random.Generator, size: int = 28) -> np.ndarray:
    """One drawing of a character, [1, size, size], ink = 1: turned, scaled and moved a little."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    face = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")[rng.integers(2)]
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / face), int(rng.integers(64, 84)))
    image = Image.new("L", (112, 112))
    ImageDraw.Draw(image).text((56 + rng.integers(-5, 6), 56 + rng.integers(-5, 6)), character, 255, font, anchor="mm")
    image = image.rotate(float(rng.uniform(-14, 14)), Image.Resampling.BICUBIC).resize(
        (size, size), Image.Resampling.LANCZOS
    )
    return np.asarray(image, dtype=np.float32)[None] / 255


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- looking at the pages


def photograph(page: Path, picture: Path, width: int, height: int, dark: bool) -> None:
    """A headless screenshot. A narrow page goes into an iframe: its width is what media queries see."""
    with tempfile.TemporaryDirectory() as profile:
        url = page.resolve().as_uri()
        if width < 600:
            frame = Path(profile) / "frame.html"
            frame.write_text(
                f'<body style="margin:0"><iframe src="{url}" style="border:0;width:{width}px;height:{height}px">'
            )
            url = frame.as_uri()
        quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        plain = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--hide-scrollbars", *quiet]
        theme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        shot = [f"--user-data-dir={profile}", f"--window-size={max(width, 600)},{height}", f"--screenshot={picture}"]
        subprocess.run([_browser(), *plain, *theme, *shot, url], check=True, capture_output=True, timeout=120)


def print_page(page: Path, pdf: Path) -> None:
    with tempfile.TemporaryDirectory() as profile:
        plain = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        subprocess.run(
            [_browser(), *plain, f"--print-to-pdf={pdf}", page.resolve().as_uri()], check=True, capture_output=True
        )


def _browser() -> str:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        raise SystemExit("no chromium found: apt-get install -y chromium")
    return found


def main(folder: Path, screenshots: bool) -> None:
    from fastmaml import report

    makers = {"sinusoid": sinusoid, "glyphs": glyphs, "unfinished": unfinished}
    for name, make in makers.items():
        page = report.write(make(folder / name))
        print(page, f"{page.stat().st_size / 1e6:.2f} MB")
        if name != "unfinished":
            for theme in ("light", "dark"):
                print(report.hero(folder / name, folder / f"{name}_hero_{theme}.png", theme))
        if screenshots:
            for width, height in ((1200, 4000), (400, 8000)):
                for dark in (False, True):
                    picture = folder / f"{name}_{width}_{'dark' if dark else 'light'}.png"
                    photograph(page, picture, width, height, dark)
                    print(picture)
            print_page(page, folder / f"{name}.pdf")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python tests/unit/report_runs.py FOLDER [--screenshots]")
    main(Path(sys.argv[1]), "--screenshots" in sys.argv)
