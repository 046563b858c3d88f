"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake et al., Science 350, 2015)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .image_tasks import ImageTasks
from .omniglot_files import load_omniglot
from .omniglot_splits import lake_split, vinyals_split
from .source import check_split


class Omniglot(ImageTasks):
    """Handwritten character recognition, read from the public zips. Images are float32 [1, 28, 28], ink = 1.

    Args:
        ways, shots, query_shots: classes in a task, and support and query examples of each; 20 drawings a character.
        split: "train", "val" or "test".
        splits: "vinyals" (1028 / 172 / 423 characters) or "lake" (background: 813 train and 151 val, evaluation: 659).
        root: folder with images_background.zip and images_evaluation.zip; default $FASTMAML_DATA, then the cache folder.
        rotations: True turns each character of "train" into four classes (Vinyals: 4112), "all" the characters of every
            split (as MAML's code does), False none.
        download: download missing zips.
        seed: seed of the tasks.
        resize: how 105 by 105 pixels become 28 by 28. "lanczos" smooths, like the loaders of torchvision and learn2learn.
            "nearest" keeps one bit per pixel, like MAML's code. 5-way nearest neighbour on pixels: 42 % and 36.5 %.

    Raises:
        FileNotFoundError: a zip is missing and `download` is False.
        ConnectionError: a zip is missing and cannot be downloaded.
        ValueError: a zip is damaged or is not Omniglot, or an argument does not fit.
    """

    name = "omniglot"

    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        query_shots: int = 15,
        split: str = "train",
        splits: str = "vinyals",
        root: str | Path | None = None,
        rotations: bool | str = True,
        download: bool = True,
        seed: int = 0,
        resize: str = "lanczos",
    ) -> None:
        check_split(split)
        if resize not in ("nearest", "lanczos"):
            raise ValueError(f"unknown resize {resize!r}: choose 'nearest' or 'lanczos'")
        if splits not in ("vinyals", "lake"):
            raise ValueError(f"unknown splits {splits!r}: choose 'vinyals' or 'lake'")
        self.splits, self.resize = splits, resize
        background, evaluation = load_omniglot(root, download, resize)
        owner = vinyals_split() if splits == "vinyals" else lake_split(background.names, evaluation.names)
        names = background.names + evaluation.names
        missing = sorted(set(owner) - set(names))
        if missing:
            raise ValueError(f"the Omniglot zips lack {missing[0]} and {len(missing) - 1} more characters of the split")
        chosen = [index for index, name in enumerate(names) if owner[name] == split]
        images = np.concatenate((background.images, evaluation.images))[chosen][:, :, None]
        super().__init__(images, [names[i] for i in chosen], ways, shots, query_shots, split, rotations, seed)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "splits": self.splits, "resize": self.resize}
