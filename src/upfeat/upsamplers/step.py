"""The neighbourhood step from cells to pixels of one image: its weights, corrections and sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat import functional
from upfeat.backends import dispatch
from upfeat.geometry import cell_of_pixels, first_pixel
from upfeat.types import Window
from upfeat.upsamplers.contrast import Lengthened
from upfeat.upsamplers.encoder import own_cells, spans_of, window_of
from upfeat.upsamplers.maps import (
    TILE,
    Computed,
    Map,
    as_map,
    cut,
    inside,
    is_recorded,
    moved,
    tiles,
    widened,
)
from upfeat.upsamplers.queries import cells_of_tile


class PixelWeights:
    """Weights over the coarse cells around each pixel, computed for the requested pixels only."""

    def __init__(
        self,
        queries: Computed,
        keys: Computed,
        temperature: Tensor,
        sigma: Tensor,
        radius: int,
        backend: str,
    ) -> None:
        """Keep the arguments of :func:`upfeat.functional.neighbourhood_weights`."""
        self.queries, self.keys = queries, keys
        self.temperature, self.sigma = temperature, sigma
        self.radius, self.backend = radius, backend
        self.grid_size, self.output_size = keys.size, queries.size
        self.whole = queries.whole
        self.recorded = queries.recorded or keys.recorded or is_recorded(temperature, sigma)

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

    def mean_weights(self, window: Window) -> Tensor | None:
        """Mean weights over the pixels of each cell, (B, (2r+1)², *cells), by a fused operator.

        Args:
            window: window of all pixels of the cells.

        Returns:
            The means, or ``None`` if the pixels' weights have to be computed and kept first.
        """
        arguments = self._unkept(window)
        if arguments is None:
            return None
        return dispatch.call("neighbourhood_mean_weights", self.backend, *arguments)

    def cells_of(self, window: Window) -> Window:
        """The cells that the pixels of a window read."""
        if window == (0, 0, *self.output_size):
            return Window(0, 0, *self.grid_size)
        own = own_cells(window, self.output_size, self.grid_size)
        return widened(own, self.radius, self.grid_size)

    def _unkept(self, window: Window) -> list[dispatch.Argument] | None:
        """Arguments of the fused operators, which keep no weights; ``None`` if those cannot run.

        They cannot run when gradients are recorded, on other backends than the CPU's, under
        autocast, and in traced graphs, which would be valid only for the sizes compared here.
        """
        if self.recorded or self.backend not in ("auto", "cpu") or torch.compiler.is_compiling():
            return None
        cells = self.cells_of(window)
        source, lengths = self.queries, None
        if isinstance(source, Lengthened):
            source, lengths = source.queries, source.lengths_at(window)
        queries, keys = source.at(window), self.keys.at(cells)
        if torch.is_autocast_enabled(queries.device.type):
            return None
        scalars = (self.temperature, self.sigma, self.radius)
        place = (self.output_size, window[:2], self.grid_size, cells[:2])
        arguments = [queries, keys, *scalars, *place, lengths]
        against = dispatch.reason_against("neighbourhood_mean_weights", "cpu", *arguments)
        return arguments if against is None else None


class NeighbourhoodKernels(PixelWeights):
    """Weighted sums of coarse features at every pixel, after back-projections of the features."""

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
        """Keep the arguments of the weights; see :class:`PixelWeights`.

        Args:
            queries: (B, D, H, W).
            keys: (B, D, h, w).
            temperature: scalar.
            sigma: scalar, in cells.
            radius: radius of the neighbourhood, in cells.
            back_projections: number of corrections of the coarse features before they are
                upsampled; each adds the features less the output's means over the cells.
            backend: backend of the operators.
        """
        made_of = (queries, keys, temperature, sigma, radius, backend)
        super().__init__(*made_of)
        self.back_projections = back_projections
        # A separate PixelWeights, not self, as a reference cycle would keep all maps alive until
        # Python's garbage collector runs, which counts objects and not their bytes.
        self.pooled = PooledWeights(PixelWeights(*made_of))

    def __call__(self, features: Tensor | Map) -> Tensor:
        """Upsample features, (B, C, h, w) -> (B, C, H, W)."""
        source, window = as_map(features), Window(0, 0, *self.output_size)
        if self.whole:
            # If the pixels' weights are computed anyway, their means are computed from them.
            cells = Window(0, 0, *self.grid_size)
            fused = self._unkept(window) is not None
            weights = None if fused else self.weights(window)
            if weights is not None and self.back_projections:
                self.pooled.start_from(weights)
            return self._sum(self.corrected(source, cells), window, None, weights)
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
        return self._sum(self.corrected(features, cells), window, cells)

    def precompute(self, features: Tensor | Map) -> tuple[NeighbourhoodKernels, Tensor | Map]:
        """Precompute everything that does not depend on the window.

        Args:
            features: (B, C, h, w).

        Returns:
            Kernels without corrections, and the corrected features, which give the same output; the
            corrections of a large image are computed when they are read.
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

    def corrected(self, features: Map, cells: Window) -> Tensor:
        """Apply the back-projections to features; return the result in a window of cells."""
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
        self,
        features: Tensor,
        window: Window,
        cells: Window | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Sum features at a window of pixels, with given weights or, by default, computed ones.

        Args:
            features: (B, C, *cells).
            window: window of the output in pixels.
            cells: window of the cells that ``features`` covers; ``None`` for the whole grid.
            weights: (B, (2r+1)², window.height, window.width), or ``None``.
        """
        if weights is None:
            operator = "neighbourhood_attention"
            arguments = self._unkept(window)
            if (
                arguments is not None
                and not is_recorded(features)
                and dispatch.reason_against(operator, "cpu", features, *arguments) is None
            ):
                return dispatch.call(operator, self.backend, features, *arguments)
            weights = self.weights(window)
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

    As weights from the grid to itself they compute the mean over each cell of the full output,
    without the output. A cell that contains no pixel, in a small output, keeps its own features.
    """

    def __init__(self, weights: PixelWeights) -> None:
        """Keep the pixels' weights, of which the means are computed."""
        super().__init__(weights.grid_size, whole=weights.whole, recorded=weights.recorded)
        self.kernels = weights

    def start_from(self, weights: Tensor) -> None:
        """Compute all means from the weights of all pixels, (B, T, H, W), computed already."""
        if self._all is None:
            with torch.set_grad_enabled(self.recorded):
                whole = Window(0, 0, *self.kernels.output_size)
                self._all = self._pool(weights, whole, Window(0, 0, *self.size))

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        output_size = self.kernels.output_size
        if self.whole:
            return self._values(Window(0, 0, *output_size), window)
        out = None
        for part in tiles((window.height, window.width), cells_of_tile(output_size, self.size)):
            cells = moved(part, window)
            pixels = window_of(
                *(
                    (first_pixel(count, length, start), first_pixel(count, length, stop))
                    for count, length, (start, stop) in zip(
                        self.size, output_size, spans_of(cells), strict=True
                    )
                )
            )
            values = self._values(pixels, cells)
            if part == (0, 0, window.height, window.width):
                return values
            if out is None:
                out = values.new_empty((*values.shape[:2], window.height, window.width))
            cut(out, part).copy_(values)
        assert out is not None
        return out

    def _values(self, pixels: Window, cells: Window) -> Tensor:
        """Mean weights of ``cells``, all of whose pixels are in the window ``pixels``."""
        if not pixels.height or not pixels.width:  # of an output smaller than the grid
            keys, taps = self.kernels.keys.at(cells), (2 * self.kernels.radius + 1) ** 2
            none = keys.new_empty(len(keys), taps, pixels.height, pixels.width)
            return self._pool(none, pixels, cells)
        values = self.kernels.mean_weights(pixels)
        return self._pool(self.kernels.weights(pixels), pixels, cells) if values is None else values

    def _pool(self, weights: Tensor, pixels: Window, cells: Window) -> Tensor:
        """Average weights of the window ``pixels`` over each of its ``cells``."""
        (height, width), (cells_down, cells_across) = self.kernels.output_size, self.size
        # Not divmod, which torch.compile cannot trace for dynamic sizes.
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
    """Features after the back-projections of a step, (B, C, h, w)."""

    def __init__(self, kernels: NeighbourhoodKernels, features: Map) -> None:
        """Keep the step's kernels and the features, (B, C, h, w)."""
        recorded = torch.is_grad_enabled() and (kernels.recorded or features.recorded)
        whole = kernels.whole or recorded
        super().__init__(kernels.grid_size, whole=whole, recorded=recorded)
        self.kernels, self.features = kernels, features

    def keep_less(self) -> None:
        """Stop the features from keeping their parts; see :meth:`Computed.keep_less`."""
        if isinstance(self.features, Computed):
            self.features.keeps = False
            self.features.keep_less()

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        return self.kernels.corrected(self.features, window)


def _membership(
    cells: int, length: int, own: tuple[int, int], seen: tuple[int, int], like: Tensor
) -> Tensor:
    """Matrix (cells, pixels) whose product is the mean over each cell's pixels along one axis.

    Args:
        cells: number of cells on the axis.
        length: number of pixels on the axis.
        own: first cell of the matrix, and one past the last.
        seen: first pixel of the matrix, and one past the last.
        like: tensor with the matrix's device and dtype.
    """
    places = cell_of_pixels(cells, length, seen[0], seen[1] - seen[0], like.device)
    numbers = torch.arange(*own, device=like.device)
    belongs = (places == numbers[:, None]).to(like.dtype)
    return belongs / belongs.sum(1, keepdim=True).clamp(min=1)
