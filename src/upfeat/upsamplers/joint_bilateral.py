"""Classical joint bilateral upsampling: fixed Gaussians on colour and distance, no training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.bounds import number, whole
from upfeat.normalization import HALF
from upfeat.upsamplers.bands import even_bands
from upfeat.upsamplers.base import UPSAMPLERS, Size, Upsampler
from upfeat.upsamplers.neighbourhood import MOST_RADIUS, NeighbourhoodKernels


@UPSAMPLERS.register
class JointBilateral(Upsampler):
    """One step from the grid to the image: nearby cells, weighed by distance and by likeness.

    Pixel p takes the mean of the cells c within ``radius`` of its own, weighted by
    exp(−|p − c|²/(2·sigma_spatial²) − |g(p) − g(c)|²/(2·sigma_range²)), where distances are in
    cells and g(c) is the guidance averaged over the cell. The weights are positive and sum to 1:
    constants stay constant and no value leaves the range of the features.

    Source: Kopf, Cohen, Lischinski and Uyttendaele, Joint Bilateral Upsampling, 2007.
    """

    name = "joint_bilateral"
    guidance_bands = None
    mean, std = HALF

    def __init__(
        self,
        *,
        radius: int = 2,
        sigma_spatial: float = 0.7,
        sigma_range: float = 0.3,
        backend: str = "auto",
    ) -> None:
        """Choose the Gaussians.

        Args:
            radius: how many cells to each side take part, from 1 to 16.
            sigma_spatial: standard deviation of distance, in cells, from 0.001 to 1000.
            sigma_range: standard deviation of colour, in units of the normalised guidance (black
                is −1, white 1), from 0.001 to 1000.
            backend: of the operators; see :mod:`upfeat.functional`.

        Raises:
            ValueError: one of them is out of range.
        """
        super().__init__()
        self.radius = whole("radius", radius, 1, MOST_RADIUS)
        self.sigma_spatial = number("sigma_spatial", sigma_spatial, 1e-3, 1e3)
        self.sigma_range = number("sigma_range", sigma_range, 1e-3, 1e3)
        self.set_backend(backend)

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
        if guidance.shape[1] != 3:
            guidance = even_bands(guidance) * HALF.std[0]  # as widely spread as RGB from −1 to 1
        fine = F.adaptive_avg_pool2d(guidance, output_size) / self.sigma_range  # (B, 3, H, W)
        coarse = F.adaptive_avg_pool2d(fine, grid_size)  # (B, 3, h, w)
        # −|a − b|²/2 is ⟨a, b⟩ − |b|²/2 but for what depends on the pixel a alone, which softmax
        # drops: an inner product with one more channel.
        queries = F.pad(fine, (0, 0, 0, 0, 0, 1), value=1.0)
        keys = torch.cat([coarse, coarse.square().sum(1, keepdim=True) / -2], dim=1)

        return NeighbourhoodKernels(
            queries,
            keys,
            guidance.new_tensor(1.0),
            guidance.new_tensor(self.sigma_spatial),
            radius=self.radius,
            backend=self.backend,
        )
