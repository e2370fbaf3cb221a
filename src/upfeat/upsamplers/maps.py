"""Lazy maps, of which only requested windows are computed.

An upsampler computes a chain of maps from one image: queries of pixels, their means over cells,
weights averaged over cells, features on a finer grid. A window of a map depends on slightly larger
windows of the maps before it. For small images, and where gradients are recorded, whole maps are
computed at once; otherwise each map keeps the windows that have been requested.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import product
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from upfeat.transforms import is_transformed
from upfeat.types import Size, Window

WHOLE = 1 << 20
"""Number of pixels up to which all maps of an image are computed whole and kept."""

TILE = 512
"""Side, in pixels, of the windows in which maps of larger images are computed."""


@runtime_checkable
class Map(Protocol):
    """A map (B, K, H, W) that is read by windows."""

    size: Size
    """Size of the map, (H, W)."""
    recorded: bool
    """True if autograd records the map's values."""

    def at(self, window: Window) -> Tensor:
        """Values in a window, (B, K, window.height, window.width)."""
        ...


class Given:
    """A map of values that exist already."""

    whole = True
    """As of :class:`Computed`: there is nothing to compute."""
    step = 1
    """As of :class:`Computed`: windows are cut as they are asked for."""

    def __init__(self, values: Tensor) -> None:
        """Keep the values, (B, K, H, W)."""
        self.values = values
        self.recorded = is_recorded(values)
        self.size: Size = (values.shape[2], values.shape[3])

    def at(self, window: Window) -> Tensor:
        """See :meth:`Map.at`."""
        return cut(self.values, window)


class Computed(ABC):
    """A map whose windows are computed when they are requested, and kept.

    ``recorded`` is fixed when the map is made, whatever the state of autograd at a later request.
    """

    def __init__(self, size: Size, *, whole: bool, recorded: bool, step: int = 1) -> None:
        """Start with no values.

        Args:
            size: (H, W).
            whole: compute the whole map at the first request.
            recorded: let autograd record the computation.
            step: windows are widened to multiples of ``step`` before they are computed.
        """
        self.size = size
        self.whole = whole
        self.recorded = recorded
        self.step = step
        self.keeps = True
        self._all: Tensor | None = None
        self._parts: tuple[Tensor, list[bytearray]] | None = None

    def keep_less(self) -> None:
        """Stop maps that only this map reads from keeping their windows; these are recomputed.

        For readers that request large windows, each once. By default there are no such maps.
        """
        return

    @abstractmethod
    def compute(self, window: Window) -> Tensor:
        """Compute the values in a window, (B, K, window.height, window.width)."""

    def at(self, window: Window) -> Tensor:
        """See :meth:`Map.at`."""
        if self.whole:
            return cut(self.all(), window)
        if not self.keeps:
            rows, columns = self._blocks(window)
            outer = self._of_blocks(rows, columns)
            with torch.no_grad():
                return cut(self.compute(outer), inside(window, outer))
        kept = self._parts
        missing = self._missing(window, None if kept is None else kept[1])
        if missing is not None:
            with torch.no_grad():
                self._parts = kept = self._keep(missing, self.compute(missing), kept)
        assert kept is not None
        return cut(kept[0], window)

    def all(self) -> Tensor:
        """The whole map, (B, K, H, W)."""
        if self._all is None:
            with torch.set_grad_enabled(self.recorded):
                self._all = self.compute(Window(0, 0, *self.size))
        return self._all

    def _missing(self, window: Window, known: list[bytearray] | None) -> Window | None:
        """Smallest rectangle of blocks that covers all blocks of a window not yet ``known``."""
        rows, columns = self._blocks(window)
        if known is not None:
            gaps = [
                (row, first, known[row].rfind(0, columns.start, columns.stop))
                for row in rows
                if (first := known[row].find(0, columns.start, columns.stop)) >= 0
            ]
            if not gaps:
                return None
            rows = range(gaps[0][0], gaps[-1][0] + 1)
            columns = range(min(gap[1] for gap in gaps), max(gap[2] for gap in gaps) + 1)
        return self._of_blocks(rows, columns)

    def _of_blocks(self, rows: range, columns: range) -> Window:
        (top, bottom), (left, right) = (
            (self.step * places.start, min(self.step * places.stop, length))
            for places, length in zip((rows, columns), self.size, strict=True)
        )
        return Window(top, left, bottom - top, right - left)

    def _keep(
        self, window: Window, values: Tensor, kept: tuple[Tensor, list[bytearray]] | None
    ) -> tuple[Tensor, list[bytearray]]:
        if kept is None:
            rows, columns = (-(-length // self.step) for length in self.size)
            # The system reserves no memory for pages that are never written. An inference tensor
            # would not do, as it cannot be written outside inference mode.
            with torch.inference_mode(False):
                shape = (*values.shape[:2], *self.size)
                room = torch.empty(shape, dtype=values.dtype, device=values.device)
            kept = room, [bytearray(columns) for _ in range(rows)]
        cut(kept[0], window).copy_(values)
        rows, columns = self._blocks(window)
        for row in rows:
            kept[1][row][columns.start : columns.stop] = b"\1" * len(columns)
        return kept

    def _blocks(self, window: Window) -> tuple[range, range]:
        """Rows and columns of the blocks that a window touches."""
        return (
            range(window.top // self.step, -(-window.bottom // self.step)),
            range(window.left // self.step, -(-window.right // self.step)),
        )


class Assembled:
    """A map (B, K, H, W) that is put together from windows; a window of all of it is not copied."""

    def __init__(self, size: Size) -> None:
        """Start with no values; ``size`` is (H, W)."""
        self.size = size
        self._values: Tensor | None = None

    def put(self, window: Window, values: Tensor, place: Window | None = None) -> None:
        """Take the values in a window, from those in ``place`` (the window itself by default)."""
        part = values if place is None else cut(values, inside(window, place))
        if window == (0, 0, *self.size):
            self._values = part
            return
        if self._values is None:
            layout = torch.channels_last if part.stride(1) == 1 else torch.contiguous_format
            shape = (*part.shape[:2], *self.size)
            self._values = torch.empty(
                shape, dtype=part.dtype, device=part.device, memory_format=layout
            )
        cut(self._values, window).copy_(part)

    def values(self) -> Tensor:
        """The whole map."""
        assert self._values is not None
        return self._values


def as_map(features: Tensor | Map) -> Map:
    """Return ``features`` as a map."""
    return Given(features) if isinstance(features, Tensor) else features


def is_recorded(*tensors: Tensor) -> bool:
    """Return whether autograd, or a transform of ``torch.func``, records these tensors."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return torch.is_grad_enabled() and any(
        one.requires_grad or is_transformed(one) for one in tensors
    )


def is_whole(recorded: bool, *sizes: Size) -> bool:
    """Return whether all maps of an image with these sizes are computed whole."""
    return recorded or torch.compiler.is_compiling() or max(h * w for h, w in sizes) <= WHOLE


def tiles(size: Size, side: int) -> Iterator[Window]:
    """Split a map into windows of at most ``side``² and about equal size, row by row."""
    height, width = (-(-length // -(-length // side)) for length in size)
    return windows(size, height, width)


def windows(size: Size, rows: int, columns: int) -> Iterator[Window]:
    """Yield windows of at most ``rows`` × ``columns`` that cover a map once, row by row."""
    for top, left in product(range(0, size[0], rows), range(0, size[1], columns)):
        yield Window(top, left, min(rows, size[0] - top), min(columns, size[1] - left))


def cut(values: Tensor, window: Window) -> Tensor:
    """The values (B, K, H, W) in a window; ``values`` itself if the window covers all of them."""
    if window == (0, 0, *values.shape[2:]):
        return values
    return values[:, :, window.top : window.bottom, window.left : window.right]


def widened(window: Window, margin: int, size: Size) -> Window:
    """The window with a margin on every side, clipped to a map of ``size``."""
    if window == (0, 0, *size):
        return window
    top, left = max(window.top - margin, 0), max(window.left - margin, 0)
    bottom, right = min(window.bottom + margin, size[0]), min(window.right + margin, size[1])
    return Window(top, left, bottom - top, right - left)


def inside(window: Window, outer: Window) -> Window:
    """The window in coordinates of ``outer``, which contains it."""
    return Window(window.top - outer.top, window.left - outer.left, window.height, window.width)


def moved(window: Window, by: Window) -> Window:
    """Inverse of :func:`inside`: shift a window by the top left corner of ``by``."""
    return Window(window.top + by.top, window.left + by.left, window.height, window.width)
