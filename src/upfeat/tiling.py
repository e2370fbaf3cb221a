"""Tiles, halos, overlaps and blends of a large map as integers; nothing here touches pixels.

Two ways to cut: :func:`split` gives tiles that do not overlap, each with a halo that is read but
not written (exact where what is computed looks no further than the halo); :func:`overlapping` gives
windows of one size that overlap, blended by the weights of :func:`raised_cosine` (for what looks as
far as its window goes).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from upfeat.types import Size, Window


class Tile(NamedTuple):
    """A part of a map: what it writes, and what it must read to do so."""

    core: Window
    """Written by this tile and by no other."""
    outer: Window
    """Read: the core and its halo, as far as the map goes."""

    @property
    def inner(self) -> Window:
        """The core in coordinates of the outer window."""
        top, left = self.core.top - self.outer.top, self.core.left - self.outer.left
        return Window(top, left, self.core.height, self.core.width)


def split(size: Size, tile: int, *, halo: int = 0, step: int = 1) -> Iterator[Tile]:
    """Cut a map into tiles, row by row.

    Args:
        size: (height, width) of the map.
        tile: side of a core; the last of a row or column may be smaller.
        halo: units read on every side of a core, ≥ 0; rounded up to a multiple of ``step``.
        step: cores and outer windows begin at multiples of it; ``tile`` must be one.

    Yields:
        Tiles whose cores cover the map once.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> [tile.core for tile in split((4, 6), 4)]
        [Window(top=0, left=0, height=4, width=4), Window(top=0, left=4, height=4, width=2)]
    """
    if step < 1 or tile < 1 or tile % step:
        raise ValueError(f"tile={tile} must be a multiple of step={step}, both 1 or more")
    if halo < 0:
        raise ValueError(f"halo={halo} must be 0 or more")
    halo = step * math.ceil(halo / step)
    for top, bottom, outer_top, outer_bottom in _spans(size[0], tile, halo):
        for left, right, outer_left, outer_right in _spans(size[1], tile, halo):
            yield Tile(
                Window(top, left, bottom - top, right - left),
                Window(outer_top, outer_left, outer_bottom - outer_top, outer_right - outer_left),
            )


def _spans(length: int, tile: int, halo: int) -> Iterator[tuple[int, int, int, int]]:
    """Start and end of every core along one axis, and of its outer window."""
    for start in range(0, length, tile):
        end = min(start + tile, length)
        yield start, end, max(start - halo, 0), min(end + halo, length)


def overlapping(size: Size, window: int, overlap: int) -> Iterator[Window]:
    """Cover a map with windows of one size that overlap.

    Args:
        size: (height, width) of the map.
        window: side of every window; an axis shorter than it is covered by one that is as long.
        overlap: least number of units that neighbours share, below ``window``.

    Yields:
        Windows, row by row; the last ones of a row or column are moved back into the map.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 <= overlap < window:
        raise ValueError(f"overlap={overlap} must be at least 0 and below window={window}")
    for top in _starts(size[0], window, overlap):
        for left in _starts(size[1], window, overlap):
            yield Window(top, left, min(window, size[0]), min(window, size[1]))


def _starts(length: int, window: int, overlap: int) -> list[int]:
    last = max(length - window, 0)
    return [*range(0, last, window - overlap), last]


def raised_cosine(start: int, window: int, length: int, overlap: int) -> list[float]:
    """Weights of one overlapping window along one axis: 1 inside, falling towards its ends.

    Divide a sum of weighted windows by the sum of their weights. Ends at the border of the map do
    not fall, and no weight is 0, so that the sum never is.

    Args:
        start: first unit of the window.
        window: its length.
        length: of the map.
        overlap: units over which the weight rises from 0 to 1.

    Returns:
        ``window`` weights in (0, 1].
    """

    def rise(distance: int) -> float:
        """The weight of a unit that lies ``distance`` units inside a falling end."""
        if distance >= overlap:
            return 1.0
        return 0.5 - 0.5 * math.cos(math.pi * (distance + 0.5) / overlap)

    before = [rise(i) if start > 0 else 1.0 for i in range(window)]
    after = [rise(window - 1 - i) if start + window < length else 1.0 for i in range(window)]
    return [low * high for low, high in zip(before, after, strict=True)]
