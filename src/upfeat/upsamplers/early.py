"""Early layers beside the queries: what a backbone knew of finer cells before it coarsened them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.types import Size, Window
from upfeat.upsamplers.maps import Computed, cut, is_recorded

WEIGHT = 0.4
"""Spread of early layers as regressors, over that of the queries: the less, the less trusted."""


class Beside(Computed):
    """A map with what early layers say behind its channels, (B, D + D', H, W)."""

    def __init__(self, queries: Computed, hidden: Tensor) -> None:
        """Bring the early layers to the map's grid: means over its cells, or values in between.

        Args:
            queries: (B, D, H, W).
            hidden: (B, D', h', w'), of the same image.
        """
        recorded = queries.recorded or is_recorded(hidden)
        super().__init__(queries.size, whole=queries.whole, recorded=recorded, step=queries.step)
        self.queries, self.hidden = queries, on_grid(hidden, queries.size)

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        queries = self.queries.at(window)
        return torch.cat([queries, cut(self.hidden, window).to(queries.dtype)], dim=1)


def on_grid(maps: Tensor, size: Size) -> Tensor:
    """Bring maps to a grid: means over its cells, or values in between; (B, D, *size)."""
    if tuple(maps.shape[2:]) == size:
        return maps
    if maps.shape[2] >= size[0] and maps.shape[3] >= size[1]:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def scale_behind(inputs: Tensor, first: int) -> Tensor:
    """Factors that scale early layers to :data:`WEIGHT` times the spread of the queries.

    Args:
        inputs: (B, D + D', N), each less its mean.
        first: D.

    Returns:
        (B, D + D', 1).
    """
    squares = inputs.square().mean(2, keepdim=True)
    own, behind = squares[:, :first].mean(1), squares[:, first:].mean(1)  # (B, 1)
    factor = WEIGHT * (own / behind.clamp(min=1e-20)).sqrt()
    factors = torch.where(
        torch.arange(inputs.shape[1], device=inputs.device) < first, 1.0, factor.to(inputs.dtype)
    )
    return factors[..., None]
