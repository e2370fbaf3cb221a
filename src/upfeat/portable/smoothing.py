"""Exportable smoothing: for each row of cells, one product with each of the rows around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upfeat.portable import axes
from upfeat.portable.step import OUT_OF_REACH, unit
from upfeat.upsamplers.smoothing import BY_LOOKS


class Smoothing(nn.Module):
    """Form of :class:`upfeat.upsamplers.smoothing.Smoothing`.

    The products of a row's cells with all cells of another row are computed, and those farther than
    the radius are masked. Gathering the neighbourhood of each cell would copy every feature once
    for each of hundreds of neighbours.
    """

    def __init__(self, radius: int) -> None:
        """Keep the radius, in cells."""
        super().__init__()
        self.radius = radius

    def forward(self, features: Tensor, queries: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
        """Smooth features.

        Args:
            features: (B, C, h, w).
            queries: (B, D, h, w), of length 1 or more.
            keys: (B, D, h, w), the same vectors, of unit length.
            hidden: (B, D', h, w), features of early layers.

        Returns:
            (B, C, h, w).
        """
        early = BY_LOOKS.early**0.5 * unit(hidden)
        rows, others = (
            torch.cat([BY_LOOKS.queries**0.5 * one, early], dim=1).permute(0, 2, 3, 1)
            for one in (queries, keys)
        )  # (B, h, w, D)
        logits = [
            rows @ other.mT + self._nearness(rows.shape[2], offset, rows)
            for offset, other in self._rows_around(others)
        ]
        likeness = torch.stack(logits, dim=3).flatten(3).softmax(3)  # (B, h, w, (2r+1)·(w + 2r))
        own = likeness.amax(3, keepdim=True)
        level = (BY_LOOKS.highest * own).clamp(max=BY_LOOKS.threshold / (2 * self.radius + 1) ** 2)
        weights = (likeness - level).clamp(min=0)
        weights = (weights / weights.sum(3, keepdim=True)).unflatten(3, (2 * self.radius + 1, -1))
        values = features.permute(0, 2, 3, 1)
        out = torch.zeros_like(values)
        for number, (_, other) in enumerate(self._rows_around(values)):
            out = out + weights[:, :, :, number] @ other
        return out.permute(0, 3, 1, 2)

    def _rows_around(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """Offsets, and x with its rows moved up by each and edges replicated, (B, h, w + 2r, K)."""
        places = axes.around(x.shape[1], self.radius, x.device)  # (h, 2r+1)
        wide = x.index_select(2, self._across(x))
        return [
            (number - self.radius, wide.index_select(1, places[:, number]))
            for number in range(2 * self.radius + 1)
        ]

    def _across(self, x: Tensor) -> Tensor:
        """Columns of the width with r columns replicated on either side, (w + 2r,)."""
        places = torch.arange(x.shape[2] + 2 * self.radius, device=x.device) - self.radius
        return places.clamp(min=0).clamp(max=x.shape[2] - 1)

    def _nearness(self, width: int, down: int, like: Tensor) -> Tensor:
        """Logits of the distances from cells to those of a row ``down`` rows away, (w, w + 2r)."""
        own = torch.arange(width, device=like.device)[:, None]
        others = torch.arange(width + 2 * self.radius, device=like.device) - self.radius
        apart = others - own
        far = (apart.abs() > self.radius).to(like.dtype)
        squares = (apart * apart + down**2).to(like.dtype)
        return OUT_OF_REACH * far - squares / (2 * self.radius**2)
