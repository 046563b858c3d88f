"""Hypothesis for tests on every backend. The emulator is a thousand times slower, so it gets fewer examples."""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable
from typing import Any

from hypothesis import given, seed, settings

EMULATED_EXAMPLES = 4  # the first is always the simplest
SAME_SIZES = 2  # where numbers alone are drawn, so that the kernels and their sizes are the same in all examples
NUMBERS = ("seed", "a", "b", "scale")
BACKENDS = ("backend", "compiled")  # the fixtures of conftest.py that name one


def for_all(**strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """hypothesis.given for a test that has one of the BACKENDS among its other arguments."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(test).parameters
        (named,) = [name for name in BACKENDS if name in parameters]

        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            few = SAME_SIZES if set(strategies) <= set(NUMBERS) else EMULATED_EXAMPLES
            emulated = fixtures[named].name == "cuda_emulated"
            # Hypothesis sees one function, so all tests would get the same examples.
            own = f"{test.__module__} {test.__qualname__} {fixtures.get('case')}"

            @seed(zlib.crc32(own.encode()))
            @settings(max_examples=few if emulated else settings.default.max_examples)
            @given(**strategies)
            def on_example(**drawn: Any) -> None:
                test(**fixtures, **drawn)

            on_example()

        run.__signature__ = inspect.Signature([p for name, p in parameters.items() if name not in strategies])  # type: ignore[attr-defined]
        return run

    return decorate
