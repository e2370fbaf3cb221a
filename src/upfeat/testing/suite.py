"""Running named properties: which there are, which are left out, which one failed."""

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
    """Run properties one after the other.

    Args:
        subject: what is tested, for messages.
        properties: functions by name; one that returns False does not apply here.
        arguments: given to each.
        without: names of those to leave out.

    Returns:
        Names of the properties that were found to hold.

    Raises:
        AssertionError: one does not; its name and its docstring's first line are in the message.
        ValueError: ``without`` names one that there is not.
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
