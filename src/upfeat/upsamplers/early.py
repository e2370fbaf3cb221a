"""Features of a backbone's early layers, on a finer grid, as regressors in addition to queries."""

from __future__ import annotations

import torch
from torch import Tensor

from upfeat.resampling import on_grid
from upfeat.types import Window
from upfeat.upsamplers.maps import Computed, cut, is_recorded

WEIGHT = 0.4
"""Spread of early layers as regressors, divided by that of queries; a small one counts less."""


FEW = 48
"""Number of channels of early layers above which the regression's penalty grows with it."""


class Beside(Computed):
    """Queries with features of early layers appended to their channels, (B, D + D', H, W)."""

    def __init__(self, queries: Computed, hidden: Tensor) -> None:
        """Resample the early layers to the grid of the queries.

        Args:
            queries: (B, D, H, W).
            hidden: (B, D', h', w'), features of early layers of the same image.
        """
        recorded = queries.recorded or is_recorded(hidden)
        super().__init__(queries.size, whole=queries.whole, recorded=recorded, step=queries.step)
        self.queries, self.hidden = queries, on_grid(hidden, queries.size)

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        queries = self.queries.at(window)
        return torch.cat([queries, cut(self.hidden, window).to(queries.dtype)], dim=1)


def penalty_factor(behind: int) -> float:
    """Factor of the regression's penalty with ``behind`` channels of early layers.

    An image has as many cells as before from which the coefficients are fitted.
    """
    return max(behind / FEW, 1.0)


def scale_behind(inputs: Tensor, first: int, size: Tensor) -> Tensor:
    """Compute factors that scale early layers to :data:`WEIGHT` times the spread of the queries.

    Args:
        inputs: (B, D + D', N), queries and early layers, each less its mean.
        first: D, the number of channels of the queries.
        size: (B, 1), mean square of the early layers before their mean was subtracted.

    Returns:
        (B, D + D', 1): 1 for the queries, and one common factor for the early layers of an image.
    """
    squares = inputs.square().mean(2, keepdim=True)
    own, behind = squares[:, :first].mean(1), squares[:, first:].mean(1)  # (B, 1)
    # Bounded in the unit of the early layers, which may be any.
    least = (1e-20 * size.detach()).clamp(min=torch.finfo(size.dtype).tiny)
    factor = WEIGHT * (own / behind.maximum(least)).sqrt()
    factors = torch.where(
        torch.arange(inputs.shape[1], device=inputs.device) < first, 1.0, factor.to(inputs.dtype)
    )
    return factors[..., None]
