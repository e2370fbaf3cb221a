"""Classical joint bilateral upsampling: fixed Gaussians on colour and distance, no training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat import functional
from upfeat.upsamplers.base import Size, Upsampler


class NeighbourhoodKernels:
    """Convex weights over the coarse cells around every pixel."""

    def __init__(self, weights: Tensor) -> None:
        """Keep the weights, (B, (2r+1)², H, W)."""
        self.weights = weights

    def __call__(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W)."""
        return functional.neighbourhood_upsample(features, self.weights.to(features.dtype))


class JointBilateral(Upsampler):
    """One step from the grid to the image: nearby cells, weighed by distance and by likeness.

    Pixel p takes the mean of the cells c within ``radius`` of its own, weighted by
    exp(−|p − c|²/(2·sigma_spatial²) − |g(p) − g(c)|²/(2·sigma_range²)), where distances are in
    cells and g(c) is the guidance averaged over the cell. The weights are positive and sum to 1:
    constants stay constant and no value leaves the range of the features.

    Source: Kopf, Cohen, Lischinski and Uyttendaele, Joint Bilateral Upsampling, 2007.
    """

    name = "joint_bilateral"

    def __init__(
        self, *, radius: int = 2, sigma_spatial: float = 0.7, sigma_range: float = 0.3
    ) -> None:
        """Choose the Gaussians.

        Args:
            radius: how many cells to each side take part, ≥ 1.
            sigma_spatial: standard deviation of distance, in cells, > 0.
            sigma_range: standard deviation of colour, in units of the normalised guidance, > 0.

        Raises:
            ValueError: one of them is out of range.
        """
        super().__init__()
        if radius < 1:
            raise ValueError(f"radius={radius} must be 1 or more")
        for label, sigma in (("sigma_spatial", sigma_spatial), ("sigma_range", sigma_range)):
            if not sigma > 0:
                raise ValueError(f"{label}={sigma} must be above 0")
        self.radius = radius
        self.sigma_spatial = sigma_spatial
        self.sigma_range = sigma_range

    def config(self) -> dict[str, Any]:
        """See :meth:`Upsampler.config`."""
        return {
            "radius": self.radius,
            "sigma_spatial": self.sigma_spatial,
            "sigma_range": self.sigma_range,
        }

    def prepare(self, guidance: Tensor, grid_size: Size, output_size: Size) -> NeighbourhoodKernels:
        """See :meth:`Upsampler.prepare`."""
        fine = F.adaptive_avg_pool2d(guidance, output_size)  # (B, 3, H, W)
        coarse = F.adaptive_avg_pool2d(guidance, grid_size)  # (B, 3, h, w)
        logits = self._distance_logits(grid_size, fine)  # (1, T, H, W)
        side = 2 * self.radius + 1
        padded = F.pad(coarse, (self.radius,) * 4, mode="replicate")
        shifted = [
            _nearest_cell(
                padded[:, :, row : row + grid_size[0], column : column + grid_size[1]], fine
            )
            for row in range(side)
            for column in range(side)
        ]
        colour = torch.stack([(fine - cell).square().sum(1) for cell in shifted], dim=1)
        return NeighbourhoodKernels(
            torch.softmax(logits - colour / (2 * self.sigma_range**2), dim=1)
        )

    def _distance_logits(self, grid_size: Size, fine: Tensor) -> Tensor:
        """−|p − c|²/(2σ²) of every pixel and offset, (1, T, H, W)."""
        rows, columns = (
            self._axis_distances(cells, length, fine)
            for cells, length in zip(grid_size, fine.shape[-2:], strict=True)
        )
        # A pixel on the border of two cells has one cell more on one side: leave it out, so that
        # the window is symmetric and flips commute.
        rows, columns = (
            axis.masked_fill(axis.abs() > self.radius + 0.5 - 1e-4, torch.inf)
            for axis in (rows, columns)
        )
        squared = rows.square()[:, None, :, None] + columns.square()[None, :, None, :]
        return -squared.flatten(0, 1)[None] / (2 * self.sigma_spatial**2)

    def _axis_distances(self, cells: int, length: int, like: Tensor) -> Tensor:
        """Signed distances in cells along one axis, (2r+1, length)."""
        position = (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) * (
            cells / length
        )
        own = cell_of_pixels(cells, length, like.device)
        offset = torch.arange(-self.radius, self.radius + 1, device=like.device)
        return position - (own + offset[:, None] + 0.5)


def cell_of_pixels(cells: int, length: int, device: torch.device) -> Tensor:
    """The cell ⌊(p + ½)·cells/length⌋ of every pixel p along one axis, in exact integers."""
    return (2 * torch.arange(length, device=device) + 1) * cells // (2 * length)


def _nearest_cell(cells: Tensor, fine: Tensor) -> Tensor:
    """Spread (B, C, h, w) over the pixels of each cell, to the size of ``fine``."""
    rows = cell_of_pixels(cells.shape[2], fine.shape[2], fine.device)
    columns = cell_of_pixels(cells.shape[3], fine.shape[3], fine.device)
    return cells.index_select(2, rows).index_select(3, columns)
