"""Classical joint bilateral upsampling: fixed Gaussians of colour and distance, no training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.bounds import number, whole
from upfeat.normalization import HALF
from upfeat.resampling import pool_to, pooled, resample
from upfeat.types import Window
from upfeat.upsamplers.bands import even_bands
from upfeat.upsamplers.base import UPSAMPLERS, Size, Upsampler
from upfeat.upsamplers.checks import check_preparation
from upfeat.upsamplers.encoder import spans_of
from upfeat.upsamplers.maps import Computed, is_recorded, is_whole
from upfeat.upsamplers.neighbourhood import MOST_RADIUS
from upfeat.upsamplers.queries import CellMeans, Pixels
from upfeat.upsamplers.step import NeighbourhoodKernels


@UPSAMPLERS.register
class JointBilateral(Upsampler):
    """One step from the grid to the pixels, with weights by distance and by difference of colour.

    The output at pixel p is the mean of the cells c within ``radius`` of the pixel's cell, weighted
    by exp(−|p − c|²/(2·sigma_spatial²) − |g(p) − g(c)|²/(2·sigma_range²)), where distances are in
    cells, g(p) is the guidance at the pixel and g(c) its mean over the cell. The weights are
    positive and sum to 1: constants stay constant and no value leaves the range of the features.

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
        """Make an upsampler with these Gaussians.

        Args:
            radius: number of cells to each side that have weights, from 1 to 16.
            sigma_spatial: standard deviation of distance, in cells, from 0.001 to 1000.
            sigma_range: standard deviation of colour, in units of the normalised guidance (black
                is −1, white 1), from 0.001 to 1000.
            backend: backend of the operators; see :mod:`upfeat.functional`.

        Raises:
            ValueError: an argument is out of range.
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
        grid_size, output_size = check_preparation(guidance, grid_size, output_size, bands=None)
        if guidance.shape[1] != 3:
            guidance = even_bands(guidance) * HALF.std[0]  # the spread of RGB from −1 to 1
        colours = Colours(guidance, output_size, self.sigma_range)
        return NeighbourhoodKernels(
            colours,
            ColourKeys(CellMeans(colours, grid_size)),
            guidance.new_tensor(1.0),
            guidance.new_tensor(self.sigma_spatial),
            radius=self.radius,
            backend=self.backend,
        )

    @property
    def reach(self) -> int:
        """See :attr:`Upsampler.reach`; the 1 is for cells that overlap by shared pixels."""
        return self.radius + 1


class Colours(Pixels):
    """Queries: colours of the output's pixels in units of σ, and a channel of ones, (B, 4, H, W).

    For a pixel's colour a and a cell's colour b, −|a − b|²/2 = ⟨a, b⟩ − |b|²/2 − |a|²/2. The last
    term does not change a softmax over cells, and the others are an inner product with one more
    channel: of (a, 1) and (b, −|b|²/2).
    """

    def __init__(self, guidance: Tensor, output_size: Size, sigma: float) -> None:
        """Keep the guidance and σ.

        Args:
            guidance: (B, 3, H', W').
            output_size: (H, W).
            sigma: standard deviation σ of colour.
        """
        self.guidance, self.sigma = guidance, sigma
        self.seen: Size = (guidance.shape[2], guidance.shape[3])
        recorded = is_recorded(guidance)
        whole = is_whole(recorded, self.seen, output_size)
        super().__init__(output_size, whole=whole, recorded=recorded)

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        if window == (0, 0, *self.size):
            colours = pool_to(self.guidance, self.size)
        else:
            rows, columns = (
                pooled(length, target, torch.arange(*span, device="cpu"))
                for length, target, span in zip(self.seen, self.size, spans_of(window), strict=True)
            )
            colours = resample(self.guidance, rows, columns)
        return F.pad(colours / self.sigma, (0, 0, 0, 0, 0, 1), value=1.0)


class ColourKeys(Computed):
    """Keys for :class:`Colours`: cells' colours b in units of σ, and −|b|²/2, (B, 4, h, w)."""

    def __init__(self, means: CellMeans) -> None:
        """Keep the mean colours of cells."""
        super().__init__(means.size, whole=means.whole, recorded=means.recorded, step=means.step)
        self.means = means

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        coarse = self.means.at(window)[:, :-1]
        return torch.cat([coarse, coarse.square().sum(1, keepdim=True) / -2], dim=1)
