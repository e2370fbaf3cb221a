"""Division of a large map into tiles or overlapping windows, by integer coordinates.

There are two divisions. :func:`split` gives tiles that do not overlap, each with a halo that is
read but not written; results are exact if the computation depends on no pixels beyond the halo.
:func:`overlapping` gives overlapping windows of one size, whose results are blended by the weights
of :func:`raised_cosine`; it is for computations that depend on all pixels of their window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from upfeat.types import Size, Window


class Tile(NamedTuple):
    """Part of a map: the window that the tile writes, and the window that it reads."""

    core: Window
    """Window that this tile writes, and no other tile."""
    outer: Window
    """Window that is read: the core and its halo, cut at the map's border."""

    @property
    def inner(self) -> Window:
        """Core in coordinates of the outer window."""
        top, left = self.core.top - self.outer.top, self.core.left - self.outer.left
        return Window(top, left, self.core.height, self.core.width)


def split(size: Size, tile: int, *, halo: int = 0, step: int = 1) -> Iterator[Tile]:
    """Cut a map into tiles, row by row.

    Args:
        size: (height, width) of the map.
        tile: side of a core; the last cores of a row or column may be smaller.
        halo: width of the halo on every side of a core, ≥ 0; rounded up to a multiple of ``step``.
        step: number of which the start of every core and outer window is a multiple; ``tile`` must
            be a multiple too.

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
    """Start and end of every core on one axis, and start and end of its outer window."""
    for start in range(0, length, tile):
        end = min(start + tile, length)
        yield start, end, max(start - halo, 0), min(end + halo, length)


def overlapping(size: Size, window: int, overlap: int) -> Iterator[Window]:
    """Cover a map with overlapping windows of one size.

    Args:
        size: (height, width) of the map.
        window: side of every window; cut to the side of a smaller map.
        overlap: least overlap of neighbouring windows, below ``window``.

    Yields:
        Windows, row by row; the last windows of a row or column end at the map's border.

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
    """Weights of one overlapping window on one axis: 1 inside, and falling towards its ends.

    To blend windows, divide the sum of weighted windows by the sum of weights. The latter is never
    0: no weight is 0. Weights do not fall at ends on the map's border.

    Args:
        start: start of the window.
        window: length of the window.
        length: length of the map.
        overlap: distance over which the weights rise from 0 to 1.

    Returns:
        ``window`` weights in (0, 1].
    """

    def rise(distance: int) -> float:
        """Weight at ``distance`` from a falling end of the window."""
        if distance >= overlap:
            return 1.0
        return 0.5 - 0.5 * math.cos(math.pi * (distance + 0.5) / overlap)

    before = [rise(i) if start > 0 else 1.0 for i in range(window)]
    after = [rise(window - 1 - i) if start + window < length else 1.0 for i in range(window)]
    return [low * high for low, high in zip(before, after, strict=True)]
