"""Counter-based random streams, and the choice of classes and examples for a batch of tasks, without loops.

Batch `step` of a stream is a function of (seed, split, step). So any batch can be drawn again, and one split never
affects another. A task does not depend on the tasks after it, so a larger batch begins with the tasks of a smaller one.
"""

from __future__ import annotations

import zlib

import numpy as np


def random_stream(seed: int, split: str, step: int, part: int = 0) -> np.random.Generator:
    """Random numbers for batch `step`. `part` separates independent choices within a batch.

    Philox-4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the seed and the
    split's name. The counter holds step and part; its lowest word counts draws.
    """
    key = np.array([seed, zlib.crc32(split.encode())], np.uint64)
    counter = np.array([0, part, step, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def choose_classes(random: np.random.Generator, tasks: int, ways: int, classes: int) -> np.ndarray:
    """Different classes for each task, in random order: int [tasks, ways] in [0, classes)."""
    keys = random.random((tasks, classes))
    chosen = np.argpartition(keys, ways - 1, axis=1)[:, :ways]
    order = np.argsort(np.take_along_axis(keys, chosen, axis=1), axis=1)
    return np.take_along_axis(chosen, order, axis=1)


def choose_examples(random: np.random.Generator, tasks: int, ways: int, count: int, examples: int) -> np.ndarray:
    """Different examples for each class of each task: int [tasks, ways, count] in [0, examples)."""
    return np.argsort(random.random((tasks, ways, examples)), axis=2)[:, :, :count]
