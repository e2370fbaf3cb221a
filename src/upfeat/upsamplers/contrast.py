"""Contrast of an image's keys, and queries that are longer where the contrast is low.

Weights of neighbouring cells depend on cosines between queries and keys, multiplied by a learned
temperature. In an image of low contrast (fog, a dark room, vessels of a retina, raw reflectances)
all cosines are close to 1, and upsampling blurs. Where the contrast is less than that of ordinary
photographs, queries are lengthened, which is the same as a higher temperature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.geometry import cell_of_pixels
from upfeat.transforms import is_plain
from upfeat.types import Window
from upfeat.upsamplers.encoder import own_cells
from upfeat.upsamplers.maps import Computed, Given, cut, inside, widened

AROUND = 28
"""Cells to each side over which contrast is averaged: the whole grid of most images, so that noise
in a flat part of an image of ordinary contrast is not raised."""
LONGEST = 64.0
"""Largest length of a query. In half precision, keys of even less contrast differ by rounding."""


class Lengths(Computed):
    """Length of the queries in each cell of a grid, (B, 1, h, w), from 1 to 64.

    The contrast of a cell is the mean of 1 − ⟨key, key'⟩ over the keys of its neighbourhood, cut at
    the image's border. It is averaged over cells at most :data:`AROUND` rows and columns away.
    The length is the least contrast that is wanted, divided by this average.
    """

    def __init__(self, keys: Computed | Given, radius: int, least: float) -> None:
        """Keep the keys.

        Args:
            keys: (B, D, h, w), of unit length.
            radius: radius of the neighbourhood, cells.
            least: contrast below which queries are longer than 1, > 0.
        """
        super().__init__(keys.size, whole=keys.whole, recorded=keys.recorded, step=AROUND)
        self.keys, self.radius, self.least = keys, radius, least

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        seen = widened(window, AROUND + self.radius, self.size)
        lengths = lengths_of(self.keys.at(seen), self.radius, self.least)
        return cut(lengths, inside(window, seen))


class Lengthened(Computed):
    """Queries (B, D, H, W) times the lengths of the cells that they are in."""

    def __init__(self, queries: Computed | Given, lengths: Lengths) -> None:
        """Keep the queries, of unit length, and the lengths, (B, 1, h, w)."""
        super().__init__(
            queries.size,
            whole=queries.whole,
            recorded=queries.recorded or lengths.recorded,
            step=queries.step,
        )
        self.queries, self.lengths = queries, lengths

    def at(self, window: Window) -> Tensor:
        """See :meth:`Map.at`; values are not kept, as the queries are."""
        return self.compute(window)

    def all(self) -> Tensor:
        """See :meth:`Computed.all`; values are not kept, as the queries are."""
        return self.compute(Window(0, 0, *self.size))

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        values, lengths = self.queries.at(window), self.lengths_at(window)
        return values if lengths is None else values * lengths.to(values.dtype)

    def lengths_at(self, window: Window) -> Tensor | None:
        """Lengths in a window, (B, 1, height, width); ``None`` if they are known to be 1."""
        seen = own_cells(window, self.size, self.lengths.size)
        lengths = self.lengths.at(seen)
        if self._are_one(lengths):
            return None
        rows, columns = (
            cell_of_pixels(cells, length, start, count, lengths.device) - first
            for cells, length, start, count, first in zip(
                self.lengths.size, self.size, window[:2], window[2:], seen[:2], strict=True
            )
        )
        return lengths[:, :, rows[:, None], columns]

    def _are_one(self, lengths: Tensor) -> bool:
        """Return whether there is nothing to do; a GPU is not asked, as it would be waited for."""
        if self.recorded or lengths.device.type != "cpu" or not is_plain(lengths):
            return False
        return not bool((lengths > 1).any())


def lengths_of(keys: Tensor, radius: int, least: float) -> Tensor:
    """Lengths of the queries in the cells of a map of keys, as :class:`Lengths` defines them.

    Args:
        keys: (B, D, h, w), of unit length.
        radius: radius of the neighbourhood, cells.
        least: contrast below which queries are longer than 1, > 0.

    Returns:
        (B, 1, h, w), from 1 to :data:`LONGEST`, in float32, or float64 for such keys.
    """
    with torch.autocast(keys.device.type, enabled=False):
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        apart = 1 - (keys * box_mean(keys, radius)).sum(1, keepdim=True)
        # The difference of equal keys is rounded to less than 0, or to little more.
        contrast = box_mean(apart, AROUND).clamp(min=least / LONGEST)
        return (least / contrast).clamp(min=1)


def box_mean(x: Tensor, radius: int) -> Tensor:
    """Mean over at most ``radius`` rows and columns to each side, (B, K, h, w) -> (B, K, h, w).

    Cells beyond the border do not count.
    """
    side = 2 * radius + 1
    x = F.avg_pool2d(x, (side, 1), 1, (radius, 0), count_include_pad=False)
    return F.avg_pool2d(x, (1, side), 1, (0, radius), count_include_pad=False)
