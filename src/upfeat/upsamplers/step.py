"""The step from cells to pixels, and the maps of one image that it is made of."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat import functional
from upfeat.backends import dispatch
from upfeat.geometry import cell_of_pixels, first_pixel
from upfeat.resampling import bilinear, pooled, resample, resize
from upfeat.types import Size, Window
from upfeat.upsamplers.encoder import PyramidEncoder, spans_of, unit, window_of
from upfeat.upsamplers.maps import (
    TILE,
    Computed,
    Map,
    as_map,
    cut,
    inside,
    is_recorded,
    is_whole,
    moved,
    tiles,
    widened,
)


class Pixels(Computed):
    """A map of pixels, too large to keep unless it is computed whole: the last part is."""

    _last: tuple[Window, Tensor] | None = None

    def at(self, window: Window) -> Tensor:
        """See :meth:`Map.at`."""
        if self.whole:
            return cut(self.all(), window)
        if self._last is None or not _holds(self._last[0], window):
            with torch.no_grad():
                self._last = window, self.compute(window)
        outer, values = self._last
        return cut(values, inside(window, outer))

    def means(self, grid_size: Size, cells: Window) -> Tensor | None:
        """Means over cells, (B, K, *cells), where they can be had without the pixels."""
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
        """Keep what they are made of.

        Args:
            encoder: makes them.
            guidance: (B, channels, H', W').
            output_size: (H, W).
            backend: of the operators.
        """
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
            bilinear(length, target, torch.arange(*span), antialias=True)
            for length, target, span in zip(self.seen, self.size, spans_of(window), strict=True)
        )
        source = window_of((rows.first, rows.stop), (columns.first, columns.stop))
        queries = resample(self._encode(source), rows, columns, (source.top, source.left))
        return unit(queries, over=True)

    def _encode(self, window: Window, *, unit_length: bool = False) -> Tensor:
        """A window of what the encoder gives; compiled where nothing has to be kept."""
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
        """Return whether the compiled encoder can run, which has no gradients."""
        if self.recorded or self.backend not in ("auto", "cpu"):
            return False
        if torch.is_autocast_enabled(self.guidance.device.type):
            return False
        if self.guidance.dtype != self.encoder.entry.weight.dtype:
            return False
        return dispatch.reason_against("pyramid_queries", "cpu", self.guidance) is None


class CellMeans(Computed):
    """The mean of a map over each cell of a grid, cells that share pixels overlapping."""

    def __init__(self, source: Pixels, grid_size: Size) -> None:
        """Keep the map and the grid.

        Args:
            source: (B, K, H, W).
            grid_size: (h, w).
        """
        super().__init__(grid_size, whole=source.whole, recorded=source.recorded, step=8)
        self.source = source

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        if self.whole:
            return F.adaptive_avg_pool2d(self.source.all(), self.size)
        out = None
        for part in tiles(
            (window.height, window.width), _cells_of_tile(self.source.size, self.size)
        ):
            values = self._part(moved(part, window))
            if out is None:
                out = values.new_empty((*values.shape[:2], window.height, window.width))
            cut(out, part).copy_(values)
        assert out is not None
        return out

    def start_from(self, means: Tensor) -> None:
        """Take the means of all cells, (B, K, h, w), which are known."""
        self._all = means
        self._parts = means, [bytearray(b"\1" * means.shape[3]) for _ in range(means.shape[2])]

    def _part(self, cells: Window) -> Tensor:
        means = self.source.means(self.size, cells)
        if means is not None:
            return means
        rows, columns = (
            pooled(length, count, torch.arange(*span))
            for length, count, span in zip(
                self.source.size, self.size, spans_of(cells), strict=True
            )
        )
        seen = window_of((rows.first, rows.stop), (columns.first, columns.stop))
        return resample(self.source.at(seen), rows, columns, (seen.top, seen.left))


class Coarser(Computed):
    """The mean over each square of cells of a finer map."""

    def __init__(self, finer: Computed, factor: int) -> None:
        """Keep the map.

        Args:
            finer: (B, K, f·h, f·w).
            factor: f.
        """
        size = finer.size[0] // factor, finer.size[1] // factor
        super().__init__(size, whole=finer.whole, recorded=finer.recorded, step=finer.step)
        self.finer, self.factor = finer, factor

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        return F.avg_pool2d(self.finer.at(Window(*(self.factor * n for n in window))), self.factor)


class Units(Computed):
    """A map with vectors of unit length."""

    def __init__(self, source: Computed) -> None:
        """Keep the map, (B, D, H, W)."""
        super().__init__(
            source.size, whole=source.whole, recorded=source.recorded, step=source.step
        )
        self.source = source

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        return unit(self.source.at(window))


class NeighbourhoodKernels:
    """Weights over the coarse cells around every pixel, made for the pixels that are asked for."""

    def __init__(
        self,
        queries: Computed,
        keys: Computed,
        temperature: Tensor,
        sigma: Tensor,
        *,
        radius: int,
        back_projections: int = 0,
        backend: str = "auto",
    ) -> None:
        """Keep what weights are made of; see :func:`upfeat.functional.neighbourhood_weights`.

        Args:
            queries: (B, D, H, W).
            keys: (B, D, h, w).
            temperature: scalar.
            sigma: scalar, in cells.
            radius: in cells.
            back_projections: how often the coarse features are corrected by what their mean over
                each cell of the output lacks, before they are upsampled.
            backend: of the operators.
        """
        self.queries, self.keys = queries, keys
        self.temperature, self.sigma = temperature, sigma
        self.radius, self.back_projections, self.backend = radius, back_projections, backend
        self.grid_size, self.output_size = keys.size, queries.size
        self.whole = queries.whole
        self.recorded = queries.recorded or keys.recorded or is_recorded(temperature, sigma)
        self.pooled = PooledWeights(self)

    def __call__(self, features: Tensor | Map) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W)."""
        source, window = as_map(features), Window(0, 0, *self.output_size)
        if self.whole:
            weights = self.weights(window)
            if self.back_projections:
                self.pooled.start_from(weights)
            return self._sum(self.corrected(source, Window(0, 0, *self.grid_size)), weights, window)
        kernels, kept = self.precompute(source)
        out = None
        for window in tiles(self.output_size, TILE):
            part = kernels.crop(kept, window)
            if out is None:
                out = part.new_empty((*part.shape[:2], *self.output_size))
            cut(out, window).copy_(part)
        assert out is not None
        return out

    def crop(self, features: Tensor | Map, window: Window) -> Tensor:
        """See :meth:`Kernels.crop`."""
        return self.at(as_map(features), window)

    def at(self, features: Map, window: Window) -> Tensor:
        """A window of the output, (B, C, height, width), from features (B, C, h, w)."""
        if self.whole and window == (0, 0, *self.output_size):
            return self(features)
        cells = self.cells_of(window)
        values = self.corrected(features, cells)
        return self._sum(values, self.weights(window), window, cells)

    def precompute(self, features: Tensor | Map) -> tuple[NeighbourhoodKernels, Tensor | Map]:
        """Precompute everything that does not depend on the window.

        Args:
            features: (B, C, h, w).

        Returns:
            Kernels and features that give the same, with the corrections made, or made where they
            are needed.
        """
        if not self.back_projections:
            return self, features
        plain = NeighbourhoodKernels(
            self.queries,
            self.keys,
            self.temperature,
            self.sigma,
            radius=self.radius,
            backend=self.backend,
        )
        corrected = Corrected(self, as_map(features))
        return plain, corrected.all() if corrected.whole else corrected

    def weights(self, window: Window) -> Tensor:
        """The weights of a window's pixels, (B, (2r+1)², window.height, window.width)."""
        cells = self.cells_of(window)
        return functional.neighbourhood_weights(
            self.queries.at(window),
            self.keys.at(cells),
            self.temperature,
            self.sigma,
            radius=self.radius,
            output_size=self.output_size,
            window=window,
            grid_size=self.grid_size,
            cells=cells,
            backend=self.backend,
        )

    def cells_of(self, window: Window) -> Window:
        """The cells that a window's pixels read."""
        if window == (0, 0, *self.output_size):
            return Window(0, 0, *self.grid_size)
        spans = [
            [(2 * pixel + 1) * cells // (2 * length) for pixel in (start, stop - 1)]
            for (start, stop), cells, length in zip(
                spans_of(window), self.grid_size, self.output_size, strict=True
            )
        ]
        own = window_of(*((low, high + 1) for low, high in spans))
        return widened(own, self.radius, self.grid_size)

    def corrected(self, features: Map, cells: Window) -> Tensor:
        """Features with what is lost when the output is averaged over cells, at some cells."""
        parts = [cells]
        for _ in range(self.back_projections):
            parts.append(widened(parts[-1], self.radius, self.grid_size))
        outer = parts.pop()
        values = given = features.at(outer)
        while parts:
            window = parts.pop()
            weights = self.pooled.at(window).to(values.dtype)
            means = functional.neighbourhood_upsample(
                values,
                weights,
                output_size=self.grid_size,
                window=window,
                grid_size=self.grid_size,
                cells=outer,
                backend=self.backend,
            )
            place = inside(window, outer)
            given = cut(given, place)
            values, outer = cut(values, place) + (given - means), window
        return values

    def _sum(
        self, features: Tensor, weights: Tensor, window: Window, cells: Window | None = None
    ) -> Tensor:
        return functional.neighbourhood_upsample(
            features,
            weights.to(features.dtype),
            output_size=self.output_size,
            window=window,
            grid_size=self.grid_size,
            cells=cells,
            backend=self.backend,
        )


class PooledWeights(Computed):
    """Mean weights over the pixels of each cell, (B, T, h, w).

    They upsample to the grid itself: what comes out is the mean over each cell of the whole output.
    A cell in which no pixel of a small output lies keeps its own features.
    """

    def __init__(self, kernels: NeighbourhoodKernels) -> None:
        """Keep the kernels whose weights they are."""
        super().__init__(kernels.grid_size, whole=kernels.whole, recorded=kernels.recorded, step=4)
        self.kernels = kernels

    def start_from(self, weights: Tensor) -> None:
        """Take the weights of all pixels, (B, T, H, W), which are at hand."""
        if self._all is None:
            with torch.set_grad_enabled(self.recorded):
                whole = Window(0, 0, *self.kernels.output_size)
                self._all = self._pool(weights, whole, Window(0, 0, *self.size))

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        out = None
        output_size = self.kernels.output_size
        side = max(window.height, window.width)
        if not self.whole:
            side = _cells_of_tile(output_size, self.size)
        for part in tiles((window.height, window.width), side):
            cells = moved(part, window)
            pixels = window_of(
                *(
                    (first_pixel(count, length, start), first_pixel(count, length, stop))
                    for count, length, (start, stop) in zip(
                        self.size, output_size, spans_of(cells), strict=True
                    )
                )
            )
            values = self._pool(self.kernels.weights(pixels), pixels, cells)
            if part == (0, 0, window.height, window.width):
                return values
            if out is None:
                out = values.new_empty((*values.shape[:2], window.height, window.width))
            cut(out, part).copy_(values)
        assert out is not None
        return out

    def _pool(self, weights: Tensor, pixels: Window, cells: Window) -> Tensor:
        """Pool the weights of all pixels of some cells."""
        (height, width), (cells_down, cells_across) = self.kernels.output_size, self.size
        # Not by divmod, which compilers cannot trace for sizes that they do not know.
        if height % cells_down == 0 and width % cells_across == 0:
            return F.avg_pool2d(weights, (height // cells_down, width // cells_across))
        rows, columns = (
            _membership(count, length, own, seen, weights)
            for count, length, own, seen in zip(
                *(self.size, self.kernels.output_size, spans_of(cells), spans_of(pixels)),
                strict=True,
            )
        )
        values = rows @ weights @ columns.T
        empty = 1 - rows.sum(1)[:, None] * columns.sum(1)
        own = torch.zeros_like(values)
        own[:, weights.shape[1] // 2] = empty
        return values + own


class Corrected(Computed):
    """Features with the corrections of a step, (B, C, h, w)."""

    def __init__(self, kernels: NeighbourhoodKernels, features: Map) -> None:
        """Keep both."""
        recorded = torch.is_grad_enabled() and (kernels.recorded or features.recorded)
        whole = kernels.whole or recorded
        super().__init__(kernels.grid_size, whole=whole, recorded=recorded, step=4)
        self.kernels, self.features = kernels, features

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        return self.kernels.corrected(self.features, window)


def _membership(
    cells: int, length: int, own: tuple[int, int], seen: tuple[int, int], like: Tensor
) -> Tensor:
    """The mean over the pixels of each cell along one axis, as a matrix (cells, pixels)."""
    places = cell_of_pixels(cells, length, seen[0], seen[1] - seen[0], like.device)
    numbers = torch.arange(*own, device=like.device)
    belongs = (places == numbers[:, None]).to(like.dtype)
    return belongs / belongs.sum(1, keepdim=True).clamp(min=1)


def _cells_of_tile(size: Size, grid_size: Size) -> int:
    """Width of a tile of pixels, in cells."""
    pixels = max(length / cells for length, cells in zip(size, grid_size, strict=True))
    return max(int(TILE / pixels), 1)


def _holds(outer: Window, window: Window) -> bool:
    return (
        outer.top <= window.top
        and outer.left <= window.left
        and window.bottom <= outer.bottom
        and window.right <= outer.right
    )
