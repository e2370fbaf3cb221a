"""Runner of named properties, for the conformance suites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from upfeat.registry import unknown_name

Property = Callable[..., Any]


def run(
    subject: str,
    properties: Mapping[str, Property],
    arguments: tuple[Any, ...],
    without: Iterable[str] = (),
) -> list[str]:
    """Check properties one after the other.

    Args:
        subject: name of the tested object, for messages.
        properties: functions by name; a function returns False if its property does not apply.
        arguments: arguments of every function.
        without: names of properties to skip.

    Returns:
        Names of the properties that hold.

    Raises:
        AssertionError: a property does not hold; the message contains its name and the first line
            of its function's docstring.
        ValueError: ``without`` names no property.
    """
    without = (without,) if isinstance(without, str) else tuple(without)
    for name in without:
        if name not in properties:
            raise ValueError(f"without: {unknown_name('property', name, list(properties))}")
    held = []
    for name, check in properties.items():
        if name in without:
            continue
        try:
            applies = check(*arguments)
        except Exception as error:
            claim = (check.__doc__ or "").partition("\n")[0]
            raise AssertionError(f"{subject}: {name}: {claim} {error}") from error
        if applies is not False:
            held.append(name)
    return held


def require(condition: bool, found: str) -> None:
    """Raise :class:`AssertionError` unless a condition holds, under ``python -O`` too."""
    if not condition:
        raise AssertionError(found)
