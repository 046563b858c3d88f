"""The named parameters of one module, walked again only where the module has changed.

`dict(module.named_parameters())` takes longer than the meta-gradient of a small network, and a call needs it several times.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import nn

_tables_of = attrgetter("_parameters", "_modules")


class ModelParameters:
    """`named()` is what `dict(model.named_parameters())` is at that time.

    A parameter or module that was replaced, added, removed, renamed or put elsewhere is noticed: the tables of every module
    are held against those of the last walk, entry by entry and by identity. Values, types, devices and requires_grad
    flags are read from the parameters themselves, so nothing of them is kept.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._held = 0
        self._walk()

    def named(self) -> Mapping[str, nn.Parameter]:
        """The parameters by name; the same object as long as nothing has changed."""
        if not self._held and not self._unchanged():
            self._walk()
        return self._named

    def __enter__(self) -> None:
        """Within the block named() is what it was at its beginning: for a call that asks several times."""
        self.named()
        self._held += 1

    def __exit__(self, *error: object) -> None:
        self._held -= 1

    def _walk(self) -> None:
        self._named = dict(self.model.named_parameters())
        self._modules = list(self.model.modules())
        self._tables: list[dict[str, Any]] = list(chain.from_iterable(map(_tables_of, self._modules)))
        self._empty = [table for table in self._tables if not table]
        self._filled = [table for table in self._tables if table]
        self._keys = [tuple(table) for table in self._filled]
        self._values = [value for table in self._filled for value in table.values()]

    def _unchanged(self) -> bool:
        # As few steps of the interpreter as possible: this takes 2 us for an MLP of 3 layers.
        return (
            all(map(is_, chain.from_iterable(map(_tables_of, self._modules)), self._tables))
            and not any(self._empty)
            and [tuple(table) for table in self._filled] == self._keys
            and all(map(is_, chain.from_iterable([table.values() for table in self._filled]), self._values))
        )
