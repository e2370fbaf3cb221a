"""Checks that a value is a number within bounds, a flag, a known name, a path or of a class.

Settings come from command lines, files and untrusted folders, and set how much is allocated and
computed. Every number therefore has an upper bound too, well above sensible values but low enough
to prevent harm. Messages of errors name the values that are allowed.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, overload

from upfeat.registry import unknown_name

Instance = TypeVar("Instance")

LARGEST = 1 << 31
"""Upper bound of counts that have no bound of their own."""
PASSES = (1, 2, 5, 8)
"""Values of ``passes``: cost of the features, in passes of the backbone over the image."""

MOST_CHANNELS = 1 << 15
"""Upper bound of channels with a channel mix, a square matrix: 4 GiB of weights at this bound."""


@overload
def whole(name: str, value: Any, least: int = ..., most: int = ...) -> int: ...
@overload
def whole(
    name: str, value: Any, least: int = ..., most: int = ..., *, optional: bool
) -> int | None: ...


def whole(
    name: str, value: Any, least: int = 1, most: int = LARGEST, *, optional: bool = False
) -> int | None:
    """Check a whole number; 2.0 counts as a whole number, true and "2" do not.

    Args:
        name: name of the argument, for error messages.
        value: value to check.
        least: smallest allowed number.
        most: largest allowed number.
        optional: also allow ``None``.

    Raises:
        ValueError: the value is not a whole number, or out of bounds.

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
        name: name of the argument, for error messages.
        value: value to check.
        low: smallest allowed number.
        high: largest allowed number.
        above: exclude ``low`` itself.
        below: exclude ``high`` itself.
        text: also accept a string: YAML reads 1e-3, which has no decimal point, as a string.

    Raises:
        ValueError: the value is not a number, NaN, infinite or out of bounds.

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
    else:  # below ``low``, infinite, or not a number: name the lower bound
        allowed = f"a finite number {first}" if found == math.inf else f"a number {first}"
    raise ValueError(f"{name}={shown(value)} must be {allowed}")


def indices(values: Any, first: int, last: int) -> list[int]:
    """Convert values to integers; an empty list if any is no integer from ``first`` to ``last``."""
    try:
        found = [operator.index(value) for value in values]
    except TypeError:
        return []
    inside = all(first <= one <= last for one in found)
    return found if inside and not any(_is_bool(value) for value in values) else []


def flag(name: str, value: Any) -> bool:
    """Check a boolean.

    Raises:
        ValueError: the value is neither true nor false.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be true or false")
    return value


def choice(name: str, value: Any, known: Iterable[str]) -> str:
    """Check that a value is one of the known names.

    Raises:
        ValueError: the value is not a known name; the message suggests close ones.
    """
    known = list(known)
    if not isinstance(value, str) or value not in known:
        text = value[:60] if isinstance(value, str) else shown(value)
        raise ValueError(f"{name}: {unknown_name('value', text, known)}")
    return value


def one_of(name: str, value: Any, known: tuple[int, ...]) -> int:
    """Check that a value is one of a few whole numbers.

    Raises:
        ValueError: the value is none of them.
    """
    number = _integer(value)
    if number not in known:
        raise ValueError(f"{name}={shown(value)} must be one of {known}")
    return number


def instance(name: str, value: Any, kind: type[Instance], fix: str) -> Instance:
    """Check the class of an argument.

    Args:
        name: name of the argument, for error messages.
        value: value to check.
        kind: the class.
        fix: advice, for error messages.

    Raises:
        TypeError: the value is of another class.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} is of type {type(value).__name__}; {fix}")
    return value


def check_callback(name: str, value: Any) -> None:
    """Check a function that is called with the progress of long work; ``None`` for none.

    Raises:
        TypeError: the value cannot be called.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} is of type {type(value).__name__}; give a function")


def path_of(name: str, value: Any) -> Path:
    """Convert a path.

    Raises:
        TypeError: the value is neither text nor a path.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} is of type {type(value).__name__}; give a path")
    return Path(value)


def paths_of(name: str, values: Any) -> list[Path]:
    """Convert one path or several to a list of paths.

    Raises:
        TypeError: a value is neither text nor a path.
    """
    if isinstance(values, str | bytes | os.PathLike) or not isinstance(values, Iterable):
        return [path_of(name, values)]
    several: Iterable[Any] = values
    return [path_of(name, value) for value in several]


def shown(value: Any) -> str:
    """Return the ``repr`` of a value in one line, cut to 60 characters, for messages."""
    try:
        written = " ".join(line.strip() for line in repr(value).splitlines())
    except Exception:  # for example an integer with more digits than Python converts
        written = type(value).__name__
    return written if len(written) <= 60 else f"{written[:57]}…"


def quoted(value: Any) -> str:
    """Return a value as text in double quotes, in one line and cut as by :func:`shown`."""
    text = value if isinstance(value, str) else shown(value)
    text = " ".join(text[:121].splitlines())
    return f'"{text}"' if len(text) <= 120 else f'"{text[:117]}…"'


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
    """Return whether a value is a boolean of Python, NumPy or PyTorch."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
