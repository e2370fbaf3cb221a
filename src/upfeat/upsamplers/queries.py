"""Queries of the pixels of one image, and their means over cells."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backends import dispatch
from upfeat.resampling import bilinear, pool_to, pooled, resample, resize
from upfeat.types import Size, Window
from upfeat.upsamplers.checks import check_precision
from upfeat.upsamplers.encoder import PyramidEncoder, spans_of, unit, window_of
from upfeat.upsamplers.maps import TILE, Computed, cut, inside, is_recorded, is_whole, moved, tiles


class Pixels(Computed):
    """A map of pixels, kept whole if it is computed whole; otherwise its last window is kept."""

    _last: tuple[Window, Tensor] | None = None

    def at(self, window: Window) -> Tensor:
        """See :meth:`Map.at`."""
        if self.whole:
            return cut(self.all(), window)
        last = self._last  # another thread may replace it
        if last is None or not _holds(last[0], window):
            with torch.no_grad():
                self._last = last = window, self.compute(window)
        outer, values = last
        return cut(values, inside(window, outer))

    def means(self, grid_size: Size, cells: Window) -> Tensor | None:
        """Means over cells, (B, K, *cells), from a fused operator; ``None`` if there is none."""
        del grid_size, cells
        return None

    @abstractmethod
    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""


class Queries(Pixels):
    """Unit queries at the pixels of an output, (B, D, H, W)."""

    def __init__(
        self, encoder: PyramidEncoder, guidance: Tensor, output_size: Size, backend: str
    ) -> None:
        """Keep the encoder and the guidance.

        Args:
            encoder: encoder that computes the queries.
            guidance: (B, channels, H', W').
            output_size: (H, W).
            backend: backend of the operators.

        Raises:
            ValueError: the guidance has another dtype than the encoder's weights.
        """
        check_precision("guidance", guidance, encoder.entry.weight)
        self.encoder, self.guidance, self.backend = encoder, guidance, backend
        self.seen: Size = (guidance.shape[2], guidance.shape[3])
        recorded = is_recorded(guidance, *encoder.parameters())
        whole = is_whole(recorded, self.seen, output_size)
        super().__init__(output_size, whole=whole, recorded=recorded)

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        if self.seen == self.size:
            return self._encode(window, unit_length=True)
        if window == (0, 0, *self.size):
            queries = resize(self._encode(Window(0, 0, *self.seen)), self.size)
            return unit(queries, over=True)
        rows, columns = (
            bilinear(
                length,
                target,
                torch.arange(*span, device="cpu"),
                antialias=True,
                dtype=self.guidance.dtype,
            )
            for length, target, span in zip(self.seen, self.size, spans_of(window), strict=True)
        )
        source = window_of((rows.first, rows.stop), (columns.first, columns.stop))
        queries = resample(self._encode(source), rows, columns, (source.top, source.left))
        return unit(queries, over=True)

    def _encode(self, window: Window, *, unit_length: bool = False) -> Tensor:
        """A window of the encoder's output, from the compiled encoder where that can run."""
        if self._can_fuse():
            parameters = self.encoder.parameters_in_order()
            return dispatch.call(
                "pyramid_queries", self.backend, self.guidance, parameters, window, unit_length
            )
        whole = window == (0, 0, *self.seen)
        queries = (
            self.encoder(self.guidance) if whole else self.encoder.window(self.guidance, window)
        )
        return unit(queries, over=True) if unit_length else queries

    def means(self, grid_size: Size, cells: Window) -> Tensor | None:
        """See :meth:`Pixels.means`."""
        if self.seen != self.size or not self._can_fuse():
            return None
        parameters = self.encoder.parameters_in_order()
        return dispatch.call(
            "pyramid_means", self.backend, self.guidance, parameters, grid_size, cells
        )

    def _can_fuse(self) -> bool:
        """Return whether the compiled encoder, which has no gradients, can run."""
        if self.recorded or self.backend not in ("auto", "cpu"):
            return False
        if torch.is_autocast_enabled(self.guidance.device.type):
            return False
        if self.guidance.dtype != self.encoder.entry.weight.dtype:
            return False
        return dispatch.reason_against("pyramid_queries", "cpu", self.guidance) is None


class CellMeans(Computed):
    """The mean of a map over each cell of a grid; cells overlap if the grid does not divide it."""

    def __init__(self, source: Pixels, grid_size: Size) -> None:
        """Keep the map and the size of the grid.

        Args:
            source: map of pixels, (B, K, H, W).
            grid_size: (h, w).
        """
        super().__init__(grid_size, whole=source.whole, recorded=source.recorded, step=2)
        self.source = source

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        if self.whole:
            return pool_to(self.source.all(), self.size)
        out = None
        for part in tiles(
            (window.height, window.width), cells_of_tile(self.source.size, self.size)
        ):
            values = self._part(moved(part, window))
            if out is None:
                out = values.new_empty((*values.shape[:2], window.height, window.width))
            cut(out, part).copy_(values)
        assert out is not None
        return out

    def start_from(self, means: Tensor) -> None:
        """Use given means of all cells, (B, K, h, w), instead of computing them."""
        self._all = means
        self._parts = means, [bytearray(b"\1" * means.shape[3]) for _ in range(means.shape[2])]

    def _part(self, cells: Window) -> Tensor:
        means = self.source.means(self.size, cells)
        if means is not None:
            return means
        rows, columns = (
            pooled(length, count, torch.arange(*span, device="cpu"))
            for length, count, span in zip(
                self.source.size, self.size, spans_of(cells), strict=True
            )
        )
        seen = window_of((rows.first, rows.stop), (columns.first, columns.stop))
        return resample(self.source.at(seen), rows, columns, (seen.top, seen.left))


class Coarser(Computed):
    """The means of a finer map over squares of f × f cells, (B, K, h, w)."""

    def __init__(self, finer: Computed, factor: int) -> None:
        """Keep the finer map.

        Args:
            finer: (B, K, f·h, f·w).
            factor: f.
        """
        size = finer.size[0] // factor, finer.size[1] // factor
        step = max(finer.step // factor, 1)
        super().__init__(size, whole=finer.whole, recorded=finer.recorded, step=step)
        self.finer, self.factor = finer, factor

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        return F.avg_pool2d(self.finer.at(Window(*(self.factor * n for n in window))), self.factor)


class Units(Computed):
    """A map whose vectors over channels are scaled to unit length."""

    def __init__(self, source: Computed) -> None:
        """Keep the map that is scaled, (B, D, H, W)."""
        super().__init__(
            source.size, whole=source.whole, recorded=source.recorded, step=source.step
        )
        self.source = source

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        return unit(self.source.at(window))


def cells_of_tile(size: Size, grid_size: Size) -> int:
    """Number of cells along the side of a tile of :data:`.maps.TILE` pixels."""
    pixels = max(length / cells for length, cells in zip(size, grid_size, strict=True))
    return max(int(TILE / pixels), 1)


def _holds(outer: Window, window: Window) -> bool:
    return (
        outer.top <= window.top
        and outer.left <= window.left
        and window.bottom <= outer.bottom
        and window.right <= outer.right
    )
