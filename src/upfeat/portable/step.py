"""The neighbourhood step for any size: one matrix product for the pixels of each cell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.portable import axes
from upfeat.types import Size
from upfeat.upsamplers.encoder import PyramidEncoder, pointwise


def encode(encoder: PyramidEncoder, guidance: Tensor, size: Size | None = None) -> Tensor:
    """Unit queries of every pixel; all scales of the encoder are used.

    Args:
        encoder: makes them.
        guidance: (B, 3, H, W).
        size: of the output; ``None`` for the guidance's.

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
    out = pointwise(encoder.join[-1], scales.pop())
    for join in reversed(encoder.join[:-1]):  # pyright: ignore[reportArgumentType]
        finer = scales.pop()
        above = F.interpolate(out, size=finer.shape[-2:], mode="bilinear", align_corners=False)
        out = pointwise(join, finer) + above
    return unit(out if size is None else axes.resize(out, size))


def unit(x: Tensor) -> Tensor:
    """Vectors over channels at unit length, 0 where they are 0; (B, D, H, W)."""
    length = x.square().sum(1, keepdim=True).sqrt()
    return x / length.clamp(min=torch.finfo(x.dtype).tiny)


class Layout:
    """Pixels of an output laid out by the cells of a grid, and the cells around each."""

    def __init__(self, output: Tensor, grid: Tensor, radius: int) -> None:
        """Read the sizes off two maps.

        Args:
            output: (B, ·, H, W).
            grid: (B, ·, h, w).
            radius: cells to each side.
        """
        self.radius, device = radius, output.device
        self.size, self.grid = output.shape[2:], grid.shape[2:]
        self.down, self.across = (
            axes.slots(length, cells, device)
            for length, cells in zip(self.size, self.grid, strict=True)
        )
        self.rows, self.columns = (axes.around(cells, radius, device) for cells in self.grid)

    def pixels(self, x: Tensor) -> Tensor:
        """(B, K, H, W) -> (B, h·w, P, K), the pixels of every cell."""
        x = axes.read(axes.read(x, 3, self.across.pixels), 2, self.down.pixels)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)

    def cells(self, x: Tensor) -> Tensor:
        """(B, K, h, w) -> (B, h·w, (2r+1)², K), the cells around every cell."""
        x = axes.read(axes.read(x, 3, self.columns), 2, self.rows)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)

    def image(self, x: Tensor) -> Tensor:
        """The way back from :meth:`pixels`: (B, h·w, P, K) -> (B, K, H, W)."""
        (height, down), (width, across) = self.down.pixels.shape, self.across.pixels.shape
        x = x.unflatten(2, (down, across)).unflatten(1, (height, width))
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, K, h·P, w·P')
        return x.index_select(2, self.down.slots).index_select(3, self.across.slots)

    def away(self) -> tuple[Tensor, Tensor]:
        """Squared distances of pixels to the cells around, and which are out of reach.

        In cells; (h·w, P, (2r+1)²) both.
        """
        down, below = self._away(self.size[0], self.grid[0], self.down, self.radius)
        across, beside = self._away(self.size[1], self.grid[1], self.across, self.radius)
        # (h, P, n) and (w, P', n) -> (h, w, P, P', n, n)
        squared = down[:, None, :, None, :, None] + across[None, :, None, :, None, :]
        far = below[:, None, :, None, :, None] | beside[None, :, None, :, None, :]
        return tuple(  # pyright: ignore[reportReturnType]
            one.flatten(4, 5).flatten(2, 3).flatten(0, 1) for one in (squared, far)
        )

    @staticmethod
    def _away(length: int, cells: int, slots: axes.Slots, radius: int) -> tuple[Tensor, Tensor]:
        """See :func:`upfeat.geometry.cell_distances`; (cells, P, 2r+1)."""
        device = slots.pixels.device
        offset = torch.arange(-radius, radius + 1, device=device)
        centre = torch.arange(cells, device=device)[:, None] + offset  # (cells, n)
        apart = (2 * slots.pixels[:, :, None] + 1) * cells - (2 * centre[:, None] + 1) * length
        far = apart.abs() > ((2 * radius + 1) * 10_000 - 2) * length // 10_000
        return (apart.float() / (2 * length)).square(), far

    def filled(self) -> Tensor:
        """A mask of the slots that are pixels of their cell, (h·w, P)."""
        both = self.down.filled[:, None, :, None] & self.across.filled[None, :, None, :]
        return both.flatten(2, 3).flatten(0, 1)


class Step(nn.Module):
    """Weights of the cells around every pixel, and what features become by them."""

    def __init__(
        self, temperature: Tensor, sigma: Tensor, *, radius: int, back_projections: int = 0
    ) -> None:
        """Keep the settings, scalars; see :class:`upfeat.upsamplers.step.NeighbourhoodKernels`."""
        super().__init__()
        self.register_buffer("temperature", temperature.detach().clone())
        self.register_buffer("sharpness", (1 / (2 * sigma.detach() ** 2)).clone())
        self.temperature: Tensor
        self.sharpness: Tensor
        self.radius, self.back_projections = radius, back_projections

    def weights(self, layout: Layout, queries: Tensor, keys: Tensor) -> Tensor:
        """(B, h·w, P, (2r+1)²), of the pixels of every cell.

        Args:
            layout: of both.
            queries: (B, D, H, W).
            keys: (B, D, h, w).
        """
        products = layout.pixels(queries) @ layout.cells(keys).mT
        squared, far = layout.away()
        logits = self.temperature * products - squared * self.sharpness
        return logits.masked_fill(far, -torch.inf).softmax(3)

    def forward(self, layout: Layout, weights: Tensor, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W)."""
        features = self.corrected(layout, weights, features)
        return layout.image(weights @ layout.cells(features))

    def corrected(self, layout: Layout, weights: Tensor, features: Tensor) -> Tensor:
        """Features with what is lost when the output is averaged over cells."""
        if not self.back_projections:
            return features
        filled = layout.filled().to(weights.dtype)  # (h·w, P)
        count = filled.sum(1)[:, None]
        mean = (weights * filled[..., None]).sum(2) / count.clamp(min=1)  # (B, h·w, T)
        # A cell in which no pixel lies keeps its own features.
        own = torch.zeros((2 * self.radius + 1) ** 2, dtype=mean.dtype, device=mean.device)
        own[own.shape[0] // 2] = 1
        mean = mean + own * (count < 0.5).to(mean.dtype)
        given = features
        for _ in range(self.back_projections):
            means = (mean[:, :, None] @ layout.cells(features))[:, :, 0]  # (B, h·w, C)
            means = means.mT.unflatten(2, layout.grid)
            features = features + (given - means)
        return features
