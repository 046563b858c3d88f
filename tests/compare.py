# Compares results. `expect_close` compares with an exact result. `float32_rule` and `float32_fuzz` limit a float32 error by
# plain torch's float32 error on the same numbers (DESIGN section 5).
from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


def expect_close(actual: Tensor, expected: Tensor, rtol: float, label: object = "", atol: float = 0.0) -> None:
    """Every entry is within `rtol` of the largest magnitude of `expected`, plus `atol` (for algebraic zeros).

    The scale is the tensor's largest entry, not each entry's own: a sum that cancels keeps the rounding of its terms.
    """
    assert isinstance(actual, Tensor), f"{label}: got a {type(actual).__name__}, not a tensor"
    assert actual.shape == expected.shape, f"{label}: shape {list(actual.shape)} instead of {list(expected.shape)}"
    if expected.numel() == 0:
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    assert bool(torch.isfinite(expected).all()), (
        f"{label}: the expected result is not finite, the case itself is broken"
    )
    error = (actual - expected).abs()
    error = torch.where(torch.isfinite(error), error, torch.inf)
    scale = float(expected.abs().max())
    tolerance = rtol * scale + atol
    flat = int(error.argmax())
    worst = float(error.flatten()[flat])
    if worst <= tolerance:
        return
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), expected.shape)]
    a, e = float(actual.flatten()[flat]), float(expected.flatten()[flat])
    ratio = f"ratio {a / e:.12g}" if e else "ratio undefined"
    wrong = int((~(error <= tolerance)).sum())
    raise AssertionError(
        f"{label}: worst entry {index} is {a:.17g}, expected {e:.17g} ({ratio}); error {worst:.3e} above the tolerance"
        f" {tolerance:.3e} = {rtol:g} x {scale:.3e} + {atol:g}; {wrong} of {error.numel()} entries miss"
    )


def expect_same_bits(actual: Tensor, expected: Tensor, label: object = "") -> None:
    """Equal to the last bit, and finite."""
    assert actual.shape == expected.shape, f"{label}: shape {list(actual.shape)} instead of {list(expected.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{label}: not finite"
    if torch.equal(actual, expected):
        return
    differ = (actual != expected).nonzero()
    index = differ[0].tolist()
    a, e = actual[tuple(index)].item(), expected[tuple(index)].item()
    raise AssertionError(
        f"{label}: {len(differ)} of {actual.numel()} entries differ in bits, first {index}: {a!r} and {e!r}"
    )


@dataclass
class Draw:
    """One random draw. Results by name: the engine's and plain torch's in float32, and the exact ones in float64."""

    ours: dict[str, Tensor]
    plain: dict[str, Tensor]
    exact: dict[str, Tensor]
    flips: list[str] = field(default_factory=list)  # branch flips by name, e.g. "relu 3: 2 of 480 masks"


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Error in the 2-norm over the norm of the exact result (which must not be zero)."""
    norm = float(exact.double().norm())
    return float((result.double() - exact.double()).norm()) / norm


def float32_rule(label: object, draw: Callable[[int], Draw], draws: int = 10) -> None:
    """DESIGN section 5: over >= 10 draws the median error is at most twice plain torch float32's plus 8 eps.

    Errors are 2-norms over the norm of the exact result. A draw with a branch flip is left out and named. The rule fails
    if fewer than `draws` of the first 3 x `draws` seeds remain, because flips would hide the arithmetic.
    """
    assert draws >= 10, "the rule wants the median of at least 10 draws"
    ours: dict[str, list[float]] = {}
    plain: dict[str, list[float]] = {}
    excluded: list[str] = []
    for seed in range(3 * draws):
        one = draw(seed)
        if one.flips:
            excluded += [f"draw {seed}: {flip}" for flip in one.flips]
            continue
        assert one.ours.keys() == one.plain.keys() == one.exact.keys()
        for name, exact in one.exact.items():
            assert (
                one.ours[name].dtype == torch.float32
                and one.plain[name].dtype == torch.float32
                and exact.dtype == torch.float64
            )
            assert one.ours[name].shape == exact.shape == one.plain[name].shape, f"{label}, {name}: shapes differ"
            assert bool(torch.isfinite(one.ours[name]).all()), f"{label}, {name}, draw {seed}: not finite"
            if exact.numel() == 0:
                continue
            if float(exact.norm()) == 0.0:
                assert float(one.ours[name].norm()) == 0.0, (
                    f"{label}, {name}, draw {seed}: not zero where the exact result is"
                )
                continue
            ours.setdefault(name, []).append(relative_error(one.ours[name], exact))
            plain.setdefault(name, []).append(relative_error(one.plain[name], exact))
        if len(next(iter(ours.values()), [])) == draws:
            break
    taken = len(next(iter(ours.values()), []))
    assert taken >= draws, f"{label}: only {taken} of {3 * draws} draws without a branch flip: {'; '.join(excluded)}"
    misses = []
    for name in ours:
        mine, theirs = statistics.median(ours[name]), statistics.median(plain[name])
        if not mine <= 2 * theirs + 8 * EPS32:
            misses.append(
                f"{name}: median error {mine:.3e}, plain torch {theirs:.3e}"
                f" (limit 2 x that + 8 eps = {2 * theirs + 8 * EPS32:.3e})"
            )
    assert not misses, (
        f"{label}, {taken} draws" + (f", left out {excluded}" if excluded else "") + ": " + "; ".join(misses)
    )


def float32_fuzz(label: object, ours: Tensor, plain: Tensor, exact: Tensor, flips: Iterable[str] = ()) -> None:
    """DESIGN section 5, one case: at most 10 times plain torch float32's error plus 64 eps, unless a branch flipped."""
    if list(flips) or float(exact.norm()) == 0.0:
        return
    mine, theirs = relative_error(ours, exact), relative_error(plain, exact)
    limit = 10 * theirs + 64 * EPS32
    assert mine <= limit, (
        f"{label}: error {mine:.3e}, plain torch {theirs:.3e} (limit 10 x that + 64 eps = {limit:.3e})"
    )
