"""Classical joint bilateral upsampling: fixed Gaussians on colour and distance, no training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat import functional
from upfeat.backends import eager
from upfeat.backends.cells import cell_of_pixels
from upfeat.upsamplers.base import Size, Upsampler, Window


class NeighbourhoodKernels:
    """Weights over the coarse cells around every pixel, made for the pixels that are asked for."""

    def __init__(
        self,
        weights: Callable[[Window], Tensor],
        grid_size: Size,
        output_size: Size,
        back_projections: int = 0,
    ) -> None:
        """Keep how to make weights.

        Args:
            weights: from a window of the output to (B, (2r+1)², window.height, window.width).
            grid_size: (h, w).
            output_size: (H, W).
            back_projections: how often the coarse features are corrected by what their mean over
                each cell of the output lacks, before they are upsampled.
        """
        self.weights = weights
        self.grid_size = grid_size
        self.output_size = output_size
        self.back_projections = back_projections
        self._pooled: Tensor | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W)."""
        weights = self._whole()
        features = self._correct(features, weights)
        return functional.neighbourhood_upsample(features, weights.to(features.dtype))

    def crop(self, features: Tensor, window: Window) -> Tensor:
        """See :meth:`Kernels.crop`; a matrix product for each cell that the window touches."""
        if window == (0, 0, *self.output_size):
            return self(features)
        features = self._correct(features)
        weights = self.weights(window).to(features.dtype)
        origin = (window.top, window.left)
        return eager.neighbourhood_upsample(features, weights, self.output_size, origin)

    def settle(self, features: Tensor) -> tuple[NeighbourhoodKernels, Tensor]:
        """Do what no window changes, once for any number of them.

        Args:
            features: (B, C, h, w).

        Returns:
            Kernels and features that give the same, with the corrections made already.
        """
        if not self.back_projections:
            return self, features
        plain = NeighbourhoodKernels(self.weights, self.grid_size, self.output_size)
        return plain, self._correct(features)

    def _whole(self) -> Tensor:
        """The weights of all pixels."""
        return self.weights(Window(0, 0, *self.output_size))

    def _correct(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """Add what is lost when the output is averaged over cells, (B, C, h, w) -> the same.

        ``weights`` are those of all pixels, where they are at hand.
        """
        if self.back_projections and self._pooled is None:
            self._pooled = self._pool(self._whole() if weights is None else weights)
        corrected = features
        for _ in range(self.back_projections):
            assert self._pooled is not None
            pooled = self._pooled.to(features.dtype)
            lacking = features - functional.neighbourhood_upsample(corrected, pooled)
            corrected = corrected + lacking
        return corrected

    def _pool(self, weights: Tensor) -> Tensor:
        """Mean weights over the pixels of each cell, (B, T, H, W) -> (B, T, h, w).

        They upsample to the grid itself: what comes out is the mean over each cell of the whole
        output. A cell in which no pixel of a small output lies keeps its own features.
        """
        down, across = (
            divmod(length, cells)
            for cells, length in zip(self.grid_size, self.output_size, strict=True)
        )
        if not (down[1] or across[1]):
            return F.avg_pool2d(weights, (down[0], across[0]))
        rows, columns = (
            _membership(cells, length, weights)
            for cells, length in zip(self.grid_size, self.output_size, strict=True)
        )
        pooled = rows @ weights @ columns.T
        empty = 1 - rows.sum(1)[:, None] * columns.sum(1)
        own = torch.zeros_like(pooled)
        own[:, weights.shape[1] // 2] = empty
        return pooled + own


def _membership(cells: int, length: int, like: Tensor) -> Tensor:
    """The mean over the pixels of each cell along one axis, as a matrix (cells, length)."""
    own = cell_of_pixels(cells, length, 0, length, like.device)
    inside = (own == torch.arange(cells, device=like.device)[:, None]).to(like.dtype)
    return inside / inside.sum(1, keepdim=True).clamp(min=1)


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

    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> NeighbourhoodKernels:
        """See :meth:`Upsampler.prepare`."""
        fine = F.adaptive_avg_pool2d(guidance, output_size) / self.sigma_range  # (B, 3, H, W)
        coarse = F.adaptive_avg_pool2d(fine, grid_size)  # (B, 3, h, w)
        # −|a − b|²/2 is ⟨a, b⟩ − |b|²/2 but for what depends on the pixel a alone, which softmax
        # drops: an inner product with one more channel.
        queries = F.pad(fine, (0, 0, 0, 0, 0, 1), value=1.0)
        keys = torch.cat([coarse, coarse.square().sum(1, keepdim=True) / -2], dim=1)

        def weights(window: Window) -> Tensor:
            return functional.neighbourhood_weights(
                queries[:, :, window.top : window.bottom, window.left : window.right],
                keys,
                1.0,
                self.sigma_spatial,
                radius=self.radius,
                output_size=output_size,
                window=window,
            )

        return NeighbourhoodKernels(weights, grid_size, output_size)
