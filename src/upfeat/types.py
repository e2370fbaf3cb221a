"""Sizes and windows of maps, in whole pixels."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeAlias, TypeVar

Size: TypeAlias = tuple[int, int]
"""(height, width), pixels or cells."""

Filled = TypeVar("Filled")
"""Type of a buffer that is filled, a tensor or an array, and returned."""


class Window(NamedTuple):
    """A rectangle of a map, in pixels or cells."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """One past the last row."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """One past the last column."""
        return self.left + self.width


def scaled(window: Window, factor: int, divisor: int = 1) -> Window:
    """Convert a window to finer or coarser units, such as cells to pixels by the stride.

    Args:
        window: the window.
        factor: factor by which its sides and position are multiplied.
        divisor: number by which the products are divided, rounding down.

    Example:
        >>> scaled(Window(1, 2, 3, 4), 16)
        Window(top=16, left=32, height=48, width=64)
    """
    return Window(*(factor * side // divisor for side in window))


def times(shape: Sequence[int]) -> str:
    """Format a shape for messages, such as "1×112×400×608"."""
    return "×".join(map(str, shape))


def shapes_repr(self: Any) -> str:
    """Format a dataclass or a named tuple for ``repr``, tensors by their types and shapes."""
    names = getattr(self, "_fields", None) or [field.name for field in fields(self)]
    parts = [f"{name}={_described(getattr(self, name))}" for name in names]
    return f"{type(self).__name__}({', '.join(parts)})"


def _described(value: Any) -> str:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}[{times(value.shape)}]"
