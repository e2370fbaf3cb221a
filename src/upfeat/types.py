"""Sizes and windows of maps, in whole pixels."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

Size: TypeAlias = tuple[int, int]
"""(height, width), pixels or cells."""


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
    """A window in finer or coarser units: cells as pixels, by the stride.

    Args:
        window: the window.
        factor: that its sides and place are multiplied by.
        divisor: that they are divided by.

    Example:
        >>> scaled(Window(1, 2, 3, 4), 16)
        Window(top=16, left=32, height=48, width=64)
    """
    return Window(*(factor * side // divisor for side in window))


def times(shape: Sequence[int]) -> str:
    """Sizes as people write them: "1×112×400×608"."""
    return "×".join(map(str, shape))
