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


def times(shape: Sequence[int]) -> str:
    """Sizes as people write them: "1×112×400×608"."""
    return "×".join(map(str, shape))
