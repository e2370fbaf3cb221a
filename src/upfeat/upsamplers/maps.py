"""Maps of which only the part that is asked for is computed.

What an upsampler makes of one image is a chain of maps: queries of pixels, their means over cells,
weights averaged over cells, features on a finer grid. Each part of one depends on a part of those
before it that is a little larger. Small images, and those that gradients go through, are computed
whole; of others each map keeps the parts that it was asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from upfeat.types import Size, Window

WHOLE = 1 << 20
"""Pixels up to which everything of an image is computed at once and kept."""


class Map(Protocol):
    """A map (B, K, H, W) that gives its windows."""

    size: Size
    """(H, W)."""

    def at(self, window: Window) -> Tensor:
        """(B, K, window.height, window.width)."""
        ...


class Given:
    """A map that is there."""

    def __init__(self, values: Tensor) -> None:
        """Keep (B, K, H, W)."""
        self.values = values
        self.size: Size = (values.shape[2], values.shape[3])

    def at(self, window: Window) -> Tensor:
        """See :meth:`Map.at`."""
        return cut(self.values, window)


class Computed(ABC):
    """A map that is computed where it is asked for, and kept."""

    def __init__(self, size: Size, *, whole: bool, step: int = 1) -> None:
        """Start with nothing.

        Args:
            size: (H, W).
            whole: compute all of it at the first call.
            step: otherwise parts are widened to multiples of this.
        """
        self.size = size
        self.whole = whole
        self.step = step
        self._all: tuple[Tensor, bool] | None = None
        self._parts: tuple[Tensor, list[bytearray]] | None = None

    @abstractmethod
    def compute(self, window: Window) -> Tensor:
        """Values of a window, (B, K, window.height, window.width)."""

    def at(self, window: Window) -> Tensor:
        """See :meth:`Map.at`."""
        if self.whole or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return cut(self.all(), window)
        kept = self._parts
        missing = self._missing(window, None if kept is None else kept[1])
        if missing is not None:
            self._parts = kept = self._keep(missing, self.compute(missing), kept)
        assert kept is not None
        return cut(kept[0], window)

    def all(self) -> Tensor:
        """The whole map, (B, K, H, W)."""
        # What was computed without gradients will not do where they are recorded.
        if self._all is None or torch.is_grad_enabled() > self._all[1]:
            self._all = self.compute(Window(0, 0, *self.size)), torch.is_grad_enabled()
        return self._all[0]

    def _missing(self, window: Window, known: list[bytearray] | None) -> Window | None:
        """The smallest rectangle of blocks that holds all of a window that is not known."""
        step = self.step
        blocks = [
            (row, column)
            for row in range(window.top // step, -(-window.bottom // step))
            for column in range(window.left // step, -(-window.right // step))
            if known is None or not known[row][column]
        ]
        if not blocks:
            return None
        (top, bottom), (left, right) = (
            (step * min(places), step * (max(places) + 1)) for places in zip(*blocks, strict=True)
        )
        height, width = (
            min(stop, length) - start
            for start, stop, length in ((top, bottom, self.size[0]), (left, right, self.size[1]))
        )
        return Window(top, left, height, width)

    def _keep(
        self, window: Window, values: Tensor, kept: tuple[Tensor, list[bytearray]] | None
    ) -> tuple[Tensor, list[bytearray]]:
        if kept is None:
            rows, columns = (math.ceil(length / self.step) for length in self.size)
            # Memory that is not written is not used; and not a tensor of inference mode, which
            # could not be written outside of it.
            with torch.inference_mode(False):
                room = torch.empty(
                    (*values.shape[:2], *self.size), dtype=values.dtype, device=values.device
                )
            kept = room, [bytearray(columns) for _ in range(rows)]
        cut(kept[0], window).copy_(values)
        for row in range(window.top // self.step, -(-window.bottom // self.step)):
            for column in range(window.left // self.step, -(-window.right // self.step)):
                kept[1][row][column] = 1
        return kept


def cut(values: Tensor, window: Window) -> Tensor:
    """The window of (B, K, H, W); ``values`` themselves where it is all of them."""
    if window == (0, 0, *values.shape[2:]):
        return values
    return values[:, :, window.top : window.bottom, window.left : window.right]


def widened(window: Window, margin: int, size: Size) -> Window:
    """A window with a margin on every side, as far as the map goes."""
    top, left = max(window.top - margin, 0), max(window.left - margin, 0)
    bottom, right = min(window.bottom + margin, size[0]), min(window.right + margin, size[1])
    return Window(top, left, bottom - top, right - left)


def inside(window: Window, outer: Window) -> Window:
    """A window in coordinates of one that holds it."""
    return Window(window.top - outer.top, window.left - outer.left, window.height, window.width)
