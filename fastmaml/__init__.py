"""fastmaml: exact meta-gradients of few-shot learners, by an adjoint sweep over hand-written kernels.

import fastmaml as fm

maml = fm.MAML(fm.models.conv4(ways=5), inner_lr=0.4, inner_steps=1)
out = maml(*fm.tasks.Glyphs(ways=5, shots=1).sample(32))
out.loss.backward()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastmaml import algorithms, inner, models
from fastmaml.algorithms import (
    ANIL,
    BOIL,
    CAVIA,
    FOMAML,
    FOML,
    IMAML,
    MAML,
    MAMLPlusPlus,
    MetaCurvature,
    MetaSGD,
    ProtoMAML,
    Reptile,
)
from fastmaml.engine.engine import Engine
from fastmaml.engine.options import MetaGradientOptions
from fastmaml.problem.results import MetaGradient, Solution

if TYPE_CHECKING:
    from fastmaml import tasks
    from fastmaml.checking import check
    from fastmaml.tasks import TaskBatch

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  in the order one learns them
    "MAML",
    "FOMAML",
    "Reptile",
    "FOML",
    "MAMLPlusPlus",
    "ANIL",
    "BOIL",
    "MetaSGD",
    "IMAML",
    "MetaCurvature",
    "ProtoMAML",
    "CAVIA",
    "models",
    "inner",
    "tasks",
    "TaskBatch",
    "check",
    "Engine",
    "MetaGradientOptions",
    "MetaGradient",
    "Solution",
    "algorithms",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: the tasks import numpy and data set readers, which not everyone needs.
    if name == "tasks":
        return importlib.import_module("fastmaml.tasks")
    if name == "TaskBatch":
        return importlib.import_module("fastmaml.tasks").TaskBatch
    if name == "check":
        return importlib.import_module("fastmaml.checking").check
    raise AttributeError(f"module 'fastmaml' has no attribute '{name}'")
