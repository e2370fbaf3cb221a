"""Smoothing of features among cells that look alike, to a backbone's early layers or by colour.

Features of neighbouring cells differ even where the image shows one thing: a part of the difference
is noise, and no cell alone has seen all of its surroundings. Early layers, which have smaller
receptive fields and a finer grid, show which cells belong together. Where cells are a few pixels
wide, colours and the features themselves show it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from upfeat import functional
from upfeat.resampling import on_grid
from upfeat.types import Window
from upfeat.upsamplers.encoder import unit
from upfeat.upsamplers.maps import (
    Computed,
    Given,
    cut,
    inside,
    is_recorded,
    moved,
    tiles,
    widened,
)


class Likeness(NamedTuple):
    """Factors of the cosines by which cells are compared, and the likeness that is too little."""

    queries: float
    """Factor of the cosine between queries of the image, in the exponent of the likeness."""
    early: float
    """Factor of the cosine between features of early layers."""
    features: float
    """Factor of the cosine between the features themselves, less their mean over the image."""
    threshold: float
    """Likeness that counts nothing, as a multiple of its mean over the neighbourhood …"""
    highest: float
    """… but at most this fraction of the cell's likeness to itself, which is the largest."""


BY_LOOKS = Likeness(queries=10.0, early=2.0, features=0.0, threshold=3.0, highest=0.5)
"""Weights that do not depend on the features, so that the result is linear in them."""
BY_FEATURES_TOO = Likeness(queries=10.0, early=2.0, features=2.0, threshold=5.0, highest=0.25)
"""Weights for features of several passes."""
ON_A_FINE_GRID = Likeness(queries=30.0, early=0.0, features=4.0, threshold=5.0, highest=0.25)
"""Weights where a cell is a few pixels wide: colours say more, and early layers no more."""
ON_PIXELS = Likeness(queries=100.0, early=0.0, features=12.0, threshold=5.0, highest=0.25)
"""Weights for pixels, whose colours are exact where those of wider cells are mixed."""
PIXEL_SMOOTHINGS = 4
"""Number of smoothings of a map of pixels."""
KEPT = 1 << 22
"""Most weights of a batch of images that are kept once they are computed."""
SIDE = 32
"""Side, in cells, of the windows in which more weights are computed."""


class Smoothing(Computed):
    """Weights of the cells around each cell of the finer grid, (B, (2r+1)², h, w).

    With unit vectors q of the cells' mean queries and e of their early layers,

        k[i, j] = exp(10·⟨q[i], q[j]⟩ + 2·⟨e[i], e[j]⟩ − |i − j|²/(2r²)),    |i − j|∞ ≤ r

    is the likeness of cells i and j, largest for i = j. Weights are proportional to what exceeds a
    threshold, max(k[i, j] − t[i], 0), where t[i] is three times the mean of k[i, ·] over the
    neighbourhood, or half of k[i, i] if that is less. So unlike cells, of which there are many,
    count nothing, and a thin object is not mixed with what surrounds it. Weights sum to 1.

    The features f themselves, less their mean over the image, may be compared as well, by one more
    cosine in the exponent. The result is then not linear in the features. All factors and
    thresholds are those of a :class:`Likeness`; the above are :data:`BY_LOOKS`.

    Queries longer than 1 (:class:`.contrast.Lengthened`) multiply the cosine between queries by the
    length of q[i].

    The unit of early layers has no effect. An offset in all channels of several times their spread,
    which activations after a ReLU do not have, makes all cells alike.

    Source: ours; related to non-local means (Buades, Coll and Morel, 2005) and to the bilateral
    filter (Tomasi and Manduchi, 1998), with early layers in place of patches and colours.
    """

    def __init__(
        self,
        queries: Computed | Given,
        hidden: Tensor | None,
        *,
        radius: int,
        backend: str,
        likeness: Likeness = BY_LOOKS,
        features: Tensor | None = None,
    ) -> None:
        """Keep what the weights are computed from.

        Args:
            queries: (B, D, h, w), queries of the cells, of length 1 or more.
            hidden: (B, D', h', w'), features of early layers on any grid; ``None`` for none.
            radius: radius r of the neighbourhood, in cells, ≥ 1.
            backend: backend of the operators.
            likeness: factors and thresholds.
            features: (B, C, h, w), features to compare as well, less their mean, of which all
                weights are then kept; ``None`` for weights that do not depend on the features.
        """
        given = [one for one in (hidden, features) if one is not None]
        recorded = queries.recorded or is_recorded(*given)
        count = len(given[0]) * (2 * radius + 1) ** 2 * queries.size[0] * queries.size[1]
        whole = recorded or torch.compiler.is_compiling() or (queries.whole and count <= KEPT)
        super().__init__(queries.size, whole=whole or features is not None, recorded=recorded)
        self.keeps = False
        self.queries = queries
        self.hidden = None if hidden is None else on_grid(hidden, queries.size)
        self.radius, self.backend = radius, backend
        self.likeness, self.features = likeness, features

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        around = self.around(window)
        queries = self.queries.at(around)
        terms = self.likeness
        parts = []
        if self.hidden is not None:
            early = unit(cut(self.hidden, around)).to(queries.dtype)
            parts.append(terms.early**0.5 * early)
        if self.features is not None:
            alike = unit(cut(self.features, around)).to(queries.dtype)
            parts.append(terms.features**0.5 * alike)
        looks = torch.cat([terms.queries**0.5 * queries, *parts], dim=1)
        keys = torch.cat([terms.queries**0.5 * unit(queries), *parts], dim=1)
        likeness = functional.neighbourhood_weights(
            cut(looks, inside(window, around)),
            keys,
            1.0,
            float(self.radius),
            radius=self.radius,
            output_size=self.size,
            window=window,
            grid_size=self.size,
            cells=around,
            backend=self.backend,
        )  # sums to 1
        count = likeness.shape[1]
        own = likeness[:, count // 2, None]
        bound = (terms.highest * own).clamp(max=terms.threshold / count)
        weights = (likeness - bound).clamp(min=0)
        return weights / weights.sum(1, keepdim=True)

    def around(self, window: Window) -> Window:
        """The cells that are read in order to smooth a window."""
        return widened(window, self.radius, self.size)

    def smooth(self, features: Tensor, window: Window) -> Tensor:
        """Smooth features in a window of the grid.

        Args:
            features: (B, C, h', w'), features of the cells :meth:`around` the window.
            window: window of the grid.

        Returns:
            (B, C, window.height, window.width).
        """
        outer = self.around(window)
        if self.whole or is_recorded(features):
            return self._sum(features, outer, window)
        out = features.new_empty((*features.shape[:2], window.height, window.width))
        for part in tiles((window.height, window.width), SIDE):
            own = moved(part, window)
            around = self.around(own)
            cut(out, part).copy_(self._sum(cut(features, inside(around, outer)), around, own))
        return out

    def smooth_among_alike(
        self, features: Tensor, times: int, alike: Tensor | None = None
    ) -> Tensor:
        """Smooth features of the whole grid several times, among cells alike in them as well.

        Args:
            features: (B, C, h, w).
            times: how often the same weights are applied.
            alike: (B, C', h, w), features to compare, by :data:`BY_FEATURES_TOO`; ``None`` for
                ``features``.
        """
        stricter = Smoothing(
            self.queries,
            self.hidden,
            radius=self.radius,
            backend=self.backend,
            likeness=BY_FEATURES_TOO,
            features=centred(features if alike is None else alike),
        )
        return stricter.smooth_often(features, times)

    def smooth_often(self, features: Tensor, times: int) -> Tensor:
        """Smooth features (B, C, h, w) of the whole grid several times with the same weights."""
        for _ in range(times):
            features = self.smooth(features, Window(0, 0, *self.size))
        return features

    def _sum(self, features: Tensor, cells: Window, window: Window) -> Tensor:
        """Weighted sums at a window of the grid, of features in the window ``cells``."""
        return functional.neighbourhood_upsample(
            features,
            self.at(window).to(features.dtype),
            output_size=self.size,
            window=window,
            grid_size=self.size,
            cells=cells,
            backend=self.backend,
        )


def centred(features: Tensor) -> Tensor:
    """Features (B, C, h, w) less their means over the image."""
    return features - features.mean((2, 3), keepdim=True)


def smooth_pixels(features: Tensor, queries: Tensor, alike: Tensor, radius: int) -> Tensor:
    """Smooth a window of pixels among those that are alike in colours and in features.

    Near a border of the window that is inside the image, within :data:`PIXEL_SMOOTHINGS` times the
    radius, values depend on where the border is.

    Args:
        features: (B, C, H, W).
        queries: (B, D, H, W), of length 1 or more, from the image.
        alike: (B, C', H, W), features to compare, less their means over the image.
        radius: radius of the neighbourhood, pixels, ≥ 1.

    Returns:
        (B, C, H, W).
    """
    made = Smoothing(
        Given(queries), None, radius=radius, backend="auto", likeness=ON_PIXELS, features=alike
    )
    return made.smooth_often(features, PIXEL_SMOOTHINGS)
