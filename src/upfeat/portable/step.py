"""Exportable neighbourhood step: one matrix product for the pixels of each cell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.portable import axes
from upfeat.types import Size
from upfeat.upsamplers.contrast import lengths_of
from upfeat.upsamplers.encoder import PyramidEncoder

OUT_OF_REACH = -1e6
"""Addend of the logits of cells out of reach: finite, since within reach it is multiplied by 0."""


def encode(encoder: PyramidEncoder, guidance: Tensor, size: Size | None = None) -> Tensor:
    """Compute the unit queries of every pixel by all scales of an encoder.

    Args:
        encoder: the encoder of the upsampler.
        guidance: (B, 3, H, W).
        size: (height, width) of the output; ``None`` for the guidance's size.

    Returns:
        (B, D, *size).
    """
    scales = [torch.sin(encoder.entry(guidance))]
    for correction in encoder.coarser:
        height, width = scales[-1].shape[-2:]
        device = guidance.device
        halved = axes.resample(
            scales[-1],
            axes.pooled(height, (height + 1) // 2, device, most=3),
            axes.pooled(width, (width + 1) // 2, device, most=3),
        )
        scales.append(correction(halved))
    out = encoder.join[-1](scales.pop())
    for join in reversed(encoder.join[:-1]):  # pyright: ignore[reportArgumentType]
        finer = scales.pop()
        above = F.interpolate(out, size=finer.shape[-2:], mode="bilinear", align_corners=False)
        out = join(finer) + above
    return unit(out if size is None else axes.resize(out, size))


def unit(x: Tensor) -> Tensor:
    """Scale the vectors over channels of (B, D, H, W) to unit length; vectors of 0 stay 0."""
    length = x.square().sum(1, keepdim=True).sqrt()
    return x / length.clamp(min=torch.finfo(x.dtype).tiny)


def rows_of(x: Tensor) -> Tensor:
    """(B, K, H, W) -> (B, H·W, K), a row of channels for each pixel: run-times copy rows fast."""
    return x.flatten(2).mT


class Layout:
    """Arrangement of an output's pixels by the cells of a grid, with the cells around each cell.

    Every method moves whole rows of channels by one gather. Transposing maps of six axes, value by
    value, took three quarters of a graph's time.

    In shapes, P is the number of slots for the pixels of a cell; see :class:`axes.Slots`.
    """

    def __init__(self, output: Tensor, grid: Tensor, radius: int) -> None:
        """Compute the indices for the sizes of two maps.

        Args:
            output: (B, ·, H, W), a map of pixels.
            grid: (B, ·, h, w), a map of cells.
            radius: cells to each side of a neighbourhood.
        """
        self.radius, device = radius, output.device
        self.size, self.grid = output.shape[2:], grid.shape[2:]
        self.down, self.across = (
            axes.slots(length, cells, device)
            for length, cells in zip(self.size, self.grid, strict=True)
        )
        rows, columns = (axes.around(cells, radius, device) for cells in self.grid)
        self._cells = _pairs(rows, columns, self.grid[1])  # (h·w, (2r+1)²)
        self._pixels = _pairs(self.down.pixels, self.across.pixels, self.size[1])  # (h·w, P)
        high, wide = self.down.pixels.shape[1], self.across.pixels.shape[1]
        cell = self.down.own[:, None] * self.grid[1] + self.across.own
        place = self.down.place[:, None] * wide + self.across.place
        self._slots = (cell * (high * wide) + place).flatten()  # (H·W,), counted over all cells

    def pixels(self, x: Tensor) -> Tensor:
        """Gather the pixels of every cell, (B, K, H, W) -> (B, h·w, P, K)."""
        return axes.read(rows_of(x), 1, self._pixels)

    def cells(self, rows: Tensor) -> Tensor:
        """Gather the cells around every cell, (B, h·w, K) -> (B, h·w, (2r+1)², K)."""
        return axes.read(rows, 1, self._cells)

    def image(self, x: Tensor) -> Tensor:
        """Invert :meth:`pixels`: (B, h·w, P, K) -> (B, K, H, W)."""
        rows = x.flatten(1, 2).index_select(1, self._slots)  # (B, H·W, K)
        return rows.mT.unflatten(2, self.size)

    def nearness(self, sharpness: Tensor) -> Tensor:
        """Compute the logits of the distances from pixels to the cells around, (h·w, P, (2r+1)²).

        A term that is common to all cells of a pixel is left out: it does not change the softmax.
        Cells out of reach, see :func:`upfeat.geometry.cell_distances`, have :data:`OUT_OF_REACH`.
        """
        down, across = (
            self._along(length, slots, sharpness)
            for length, slots in zip(self.size, (self.down, self.across), strict=True)
        )
        count = 2 * self.radius + 1
        # (h, P, n) and (w, P', n) -> (h, w, P, P', n·n), with the taps innermost and copied whole
        down = down.repeat_interleave(count, 2)[:, None, :, None]
        across = across.repeat(1, 1, count)[None, :, None, :]
        return (down + across).flatten(2, 3).flatten(0, 1)

    def _along(self, length: int, slots: axes.Slots, sharpness: Tensor) -> Tensor:
        """Compute :meth:`nearness` along one axis, (cells, P, 2r+1).

        With s the sharpness, a the pixel's and δ a neighbour's offset from the cell, in cells:
        −s·(a − δ)² + s·a² = s·δ·(2·a − δ).
        """
        radius = self.radius
        offset = torch.arange(-radius, radius + 1, device=slots.away.device)
        apart = slots.away[:, :, None] - 2 * length * offset
        far = apart.abs() > ((2 * radius + 1) * 10_000 - 2) * length // 10_000
        away = slots.away.float()[:, :, None] / length  # 2·a
        return sharpness * offset * (away - offset) + OUT_OF_REACH * far.float()

    def filled(self) -> Tensor:
        """Return the mask of slots that contain a pixel of their cell, (h·w, P) bool."""
        both = self.down.filled[:, None, :, None] & self.across.filled[None, :, None, :]
        return both.flatten(2, 3).flatten(0, 1)


def _pairs(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Combine (h, n) rows and (w, m) columns to (h·w, n·m) flat indices of a map of that width."""
    places = rows[:, None, :, None] * width + columns[None, :, None, :]
    return places.flatten(2, 3).flatten(0, 1)


class Step(nn.Module):
    """Neighbourhood step: weights of the cells around every pixel, applied to features."""

    def __init__(
        self,
        temperature: Tensor,
        sigma: Tensor,
        *,
        radius: int,
        back_projections: int = 0,
        least_contrast: float = 0.0,
    ) -> None:
        """Keep the settings; see :class:`upfeat.upsamplers.step.NeighbourhoodKernels`.

        ``temperature`` and ``sigma`` are scalars; ``least_contrast`` is that of
        :class:`upfeat.upsamplers.NeighbourhoodUpsampler`.
        """
        super().__init__()
        self.register_buffer("temperature", temperature.detach().clone())
        self.register_buffer("sharpness", (1 / (2 * sigma.detach() ** 2)).clone())
        self.temperature: Tensor
        self.sharpness: Tensor
        self.radius, self.back_projections = radius, back_projections
        self.least_contrast = least_contrast

    def weights(self, layout: Layout, queries: Tensor, keys: Tensor) -> Tensor:
        """Compute the weights of the cells around the pixels of every cell.

        Args:
            layout: layout of the queries' pixels by the keys' cells.
            queries: (B, D, H, W).
            keys: (B, D, h, w).

        Returns:
            (B, h·w, P, (2r+1)²).
        """
        around = layout.cells(rows_of(self.temperature * keys))
        products = layout.pixels(queries) @ around.mT
        if self.least_contrast:
            products = self.lengths(keys).flatten(2).mT[:, :, None] * products
        return (products + layout.nearness(self.sharpness)).softmax(3)

    def lengths(self, keys: Tensor) -> Tensor:
        """Compute the lengths of the queries in the keys' cells, (B, D, h, w) -> (B, 1, h, w)."""
        if not self.least_contrast:
            return torch.ones_like(keys[:, :1])
        return lengths_of(keys, self.radius, self.least_contrast)

    def forward(self, layout: Layout, weights: Tensor, features: Tensor) -> Tensor:
        """Upsample features by weights from :meth:`weights`, (B, C, h, w) -> (B, C, H, W)."""
        rows = self.corrected(layout, weights, rows_of(features))
        return layout.image(weights @ layout.cells(rows))

    def corrected(self, layout: Layout, weights: Tensor, rows: Tensor) -> Tensor:
        """Apply the back-projections to features, (B, h·w, C) -> (B, h·w, C)."""
        if not self.back_projections:
            return rows
        filled = layout.filled().to(weights.dtype)  # (h·w, P)
        count = filled.sum(1, keepdim=True)
        mean = (filled / count.clamp(min=1))[:, None] @ weights  # (B, h·w, 1, T)
        # The mean over a cell without pixels is defined as the cell's own features.
        own = torch.zeros((2 * self.radius + 1) ** 2, dtype=mean.dtype, device=mean.device)
        own[own.shape[0] // 2] = 1
        mean = mean + own * (count < 0.5).to(mean.dtype)[:, None]
        given = rows
        for _ in range(self.back_projections):
            rows = rows + (given - (mean @ layout.cells(rows))[:, :, 0])
        return rows
