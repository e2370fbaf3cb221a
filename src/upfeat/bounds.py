"""Checks of single values: whole, finite and within bounds, or an error that says what would be.

Settings come from flags, files and strangers' folders. What is let through here is built, allocated
and run, so every number has a largest value too, far beyond sense but short of harm.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, overload

from upfeat.registry import unknown_name

LARGEST = 1 << 31
"""Of counts without a bound of their own."""
MOST_CHANNELS = 1 << 15
"""Of features that a channel mix is made for: its weights are their square, 4 GiB."""


@overload
def whole(name: str, value: Any, least: int = ..., most: int = ...) -> int: ...
@overload
def whole(
    name: str, value: Any, least: int = ..., most: int = ..., *, optional: bool
) -> int | None: ...


def whole(
    name: str, value: Any, least: int = 1, most: int = LARGEST, *, optional: bool = False
) -> int | None:
    """Check a whole number; 2.0 counts as one, true and "2" do not.

    Args:
        name: of the argument, for errors.
        value: to be checked.
        least: smallest that is allowed.
        most: largest.
        optional: let ``None`` through.

    Raises:
        ValueError: it is not one, or out of bounds.

    Example:
        >>> whole("radius", 2.0)
        2
    """
    if value is None and optional:
        return None
    number = _integer(value)
    if number is None:
        raise ValueError(f"{name}={shown(value)} must be a whole number")
    if number < least:
        raise ValueError(f"{name}={shown(number)} must be {least} or more")
    if number > most:
        raise ValueError(f"{name}={shown(number)} must be {most} or less")
    return number


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    text: bool = False,
) -> float:
    """Check a finite number.

    Args:
        name: of the argument, for errors.
        value: to be checked.
        low: smallest that is allowed.
        high: largest.
        above: ``low`` itself is not allowed.
        below: ``high`` itself is not allowed.
        text: take a number as text too: YAML reads 1e-3, without a point, as a word.

    Raises:
        ValueError: it is not one, NaN, infinite or out of bounds.

    Example:
        >>> number("ridge", 0.3, 0, 1e6)
        0.3
    """
    found = _real(value, text)
    inside = low <= found <= high and math.isfinite(found)
    if inside and not (above and found == low) and not (below and found == high):
        return found
    first = f"above {low:g}" if above else f"of at least {low:g}"
    last = f"below {high:g}" if below else f"of at most {high:g}"
    if (low, high) == (0, 1) and not (above or below):
        allowed = "a number from 0 to 1"
    elif low == -math.inf and high == math.inf:
        allowed = "a finite number"
    elif (found >= high or low == -math.inf) and high < math.inf:
        allowed = f"a number {last}"
    else:  # the bound that it lies beyond, or the first one where it is no number at all
        allowed = f"a finite number {first}" if found == math.inf else f"a number {first}"
    raise ValueError(f"{name}={shown(value)} must be {allowed}")


def indices(values: Any, first: int, last: int) -> list[int]:
    """Values as whole numbers; an empty list if any is not one from ``first`` to ``last``."""
    try:
        found = [operator.index(value) for value in values]
    except TypeError:
        return []
    inside = all(first <= one <= last for one in found)
    return found if inside and not any(_is_bool(value) for value in values) else []


def flag(name: str, value: Any) -> bool:
    """Check a yes or no.

    Raises:
        ValueError: it is neither true nor false.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be true or false")
    return value


def choice(name: str, value: Any, known: Iterable[str]) -> str:
    """Check a name among a few; close ones are suggested.

    Raises:
        ValueError: it is none of them.
    """
    known = list(known)
    if not isinstance(value, str) or value not in known:
        text = value[:60] if isinstance(value, str) else shown(value)
        raise ValueError(f"{name}: {unknown_name('value', text, known)}")
    return value


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long: for messages."""
    try:
        written = repr(value)
    except Exception:  # such as a number of more digits than Python is willing to write
        written = type(value).__name__
    return written if len(written) <= 60 else f"{written[:57]}…"


def _integer(value: Any) -> int | None:
    if _is_bool(value):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _real(value: Any, text: bool) -> float:
    if _is_bool(value) or isinstance(value, bytes | bytearray):
        return math.nan
    if isinstance(value, str) and not text:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _is_bool(value: Any) -> bool:
    """Return whether a value is true or false, NumPy's and PyTorch's included."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
