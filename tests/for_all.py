"""Hypothesis for tests on every backend. The emulator is a thousand times slower, and autodiff ten times: they get fewer examples."""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable
from typing import Any

from hypothesis import given, seed, settings

FEW = 4  # the first is always the simplest
EMULATED_NUMBERS = 2  # where numbers alone are drawn, and all examples launch the same kernels with the same sizes
NUMBERS = ("seed", "a", "b", "scale")
BACKENDS = ("backend", "compiled")  # the fixtures of conftest.py that name one


def for_all(**strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """hypothesis.given for a test that has one of the BACKENDS among its other arguments."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(test).parameters
        (named,) = [name for name in BACKENDS if name in parameters]

        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            most = settings.default.max_examples
            if fixtures[named].name in ("cuda_emulated", "autodiff"):
                most = FEW
            if fixtures[named].name == "cuda_emulated" and set(strategies) <= set(NUMBERS):
                most = EMULATED_NUMBERS
            # Hypothesis sees one function, so all tests would get the same examples.
            own = f"{test.__module__} {test.__qualname__} {fixtures.get('case')}"

            @seed(zlib.crc32(own.encode()))
            @settings(max_examples=most)
            @given(**strategies)
            def on_example(**drawn: Any) -> None:
                test(**fixtures, **drawn)

            on_example()

        run.__signature__ = inspect.Signature([p for name, p in parameters.items() if name not in strategies])  # type: ignore[attr-defined]
        return run

    return decorate
