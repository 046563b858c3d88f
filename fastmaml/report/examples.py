# A few image tasks as HTML: for each class its support pictures, then queries with the network's answers.
from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from .run_folder import Columns


@dataclass(frozen=True)
class Answer:
    """One query of a task: its picture [C, H, W], its class, and the answers before and after adaptation."""

    picture: np.ndarray
    label: int
    before: int
    after: int
    probability: float  # of the answer after adaptation; nan if unknown

    @property
    def right(self) -> bool:
        return self.after == self.label


@dataclass(frozen=True)
class Task:
    support: dict[int, np.ndarray]  # class -> [shots, C, H, W]
    answers: list[Answer]

    def accuracy(self, when: str) -> tuple[int, int]:
        """(right answers, queries). `when` is "before" or "after"."""
        return sum(getattr(a, when) == a.label for a in self.answers), len(self.answers)


def class_name(label: int) -> str:
    """A to Z, then numbers. Letters cannot be confused with counts and probabilities."""
    return chr(ord("A") + label) if 0 <= label < 26 else str(label)


def tasks(examples: Columns) -> list[Task]:
    """The image tasks of examples.npz. `probabilities_after` is [E, Q, ways], or [E, Q] for the answer alone."""
    found = []
    for e in range(len(examples["support_x"])):
        labels, pictures = examples["support_y"][e].reshape(-1).astype(int), examples["support_x"][e]
        support = {int(c): pictures[labels == c] for c in np.unique(labels)}
        truth, before, after = (
            examples[key][e].reshape(-1).astype(int) for key in ("query_y", "predictions_before", "predictions_after")
        )
        sure = _probabilities(examples, e, after)
        queries = zip(examples["query_x"][e], truth, before, after, sure, strict=True)
        found.append(Task(support, [Answer(x, int(y), int(b), int(a), float(p)) for x, y, b, a, p in queries]))
    return found


def _probabilities(examples: Columns, e: int, after: np.ndarray) -> np.ndarray:
    if "probabilities_after" not in examples:
        return np.full(len(after), np.nan)
    values = examples["probabilities_after"][e]
    return values[np.arange(len(after)), after] if values.ndim == 2 else values.reshape(-1)


# ---------------------------------------------------------------- pictures


def png(picture: np.ndarray) -> bytes:
    """A PNG: [1, H, W] ink becomes black on transparent, [3, H, W] RGB. Values outside 0 to 1 are rescaled."""
    from PIL import Image

    picture = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    if picture.min() < -1e-6 or picture.max() > 1 + 1e-6:
        picture = (picture - picture.min()) / max(float(np.ptp(picture)), 1e-12)
    levels = np.round(255 * picture).astype(np.uint8)
    if len(levels) == 1:
        image = Image.fromarray(np.stack([np.zeros_like(levels[0]), levels[0]], axis=-1), "LA")
    else:
        image = Image.fromarray(np.ascontiguousarray(levels[:3].transpose(1, 2, 0)), "RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _img(picture: np.ndarray, alt: str) -> str:
    ink = " ink" if len(picture) == 1 else ""
    data = base64.b64encode(png(picture)).decode()
    return f'<span class="picture{ink}"><img src="data:image/png;base64,{data}" alt="{escape(alt)}"></span>'


def _sure(answer: Answer) -> str:
    return "" if np.isnan(answer.probability) else f"&nbsp;{100 * answer.probability:.0f}&#8239;%"


# ---------------------------------------------------------------- HTML


def task_html(task: Task, number: int, queries_per_class: int) -> str:
    """One task: a column per class, its support on top, its first queries below."""
    columns = []
    for label, pictures in task.support.items():
        name = class_name(label)
        support = "".join(_img(p, f"support picture of class {name}") for p in pictures[:10])
        shown = [a for a in task.answers if a.label == label][:queries_per_class]
        queries = "".join(_query_html(a) for a in shown)
        one = " one" if len(pictures) == 1 else ""
        columns.append(
            f'<div class="class"><h4>{name}</h4><div class="pictures support{one}">{support}</div>'
            f'<div class="pictures query">{queries}</div></div>'
        )
    rows = math.ceil(len(columns) / 10)
    grid = f"--columns:{math.ceil(len(columns) / rows)}"
    (before, n), (after, _) = task.accuracy("before"), task.accuracy("after")
    return (
        f'<div class="task"><header><h3>Task {number}</h3><p>{after} of {n} queries right after adaptation, '
        f'{before} before</p></header><div class="classes" style="{grid}">{"".join(columns)}</div></div>'
    )


def _query_html(answer: Answer) -> str:
    verdict, sign = ("right", "✓") if answer.right else ("wrong", f"✗&nbsp;{class_name(answer.after)}")
    alt = f"query of class {class_name(answer.label)}, answered {class_name(answer.after)}"
    return f'<div class="{verdict}">{_img(answer.picture, alt)}<div class="answer">{sign}{_sure(answer)}</div></div>'


def mistakes_html(found: list[Task], most: int = 12) -> str:
    """The wrong answers of all saved tasks, most confident first. Empty if there are none.

    Each query is shown with a support picture of the answered class and one of the true class.
    """
    wrong = [
        (a, task)
        for task in found
        for a in task.answers
        if not a.right and a.after in task.support and a.label in task.support
    ]
    wrong.sort(key=lambda pair: -np.nan_to_num(pair[0].probability))
    items = []
    for a, task in wrong[:most]:
        cells: list[tuple[Any, str]] = [
            (a.picture, "query"),
            (task.support[a.after][0], f"answered<br>{class_name(a.after)}{_sure(a)}"),
            (task.support[a.label][0], f"truth<br>{class_name(a.label)}"),
        ]
        pictures = "".join(_img(picture, text.split("<")[0]) for picture, text in cells)
        items.append(
            f'<div class="mistake">{pictures}{"".join(f"<span class=caption>{text}</span>" for _, text in cells)}</div>'
        )
    return f'<div class="mistakes">{"".join(items)}</div>' if items else ""
