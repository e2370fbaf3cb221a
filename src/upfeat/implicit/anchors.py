"""The fast fit: a Gaussian process of place and query, fitted to views in closed form.

A view's features are, up to noise, a linear function of the image's fine features: the view warps
the fine features, and the backbone averages them over each cell. Fixed basis functions of place and
query (``KernelField``), warped and averaged like this, are the columns of a design matrix, and one
ridge regression gives the coefficients of all channels. Gradient descent, the published way, needs
thousands of steps and views for this task.

The process's mean is the output of a one-pass upsampler for the unjittered image, projected onto
the basis functions. Where the views do not determine the map, it equals this mean, not a constant.
The result is a blend of the fitted map with that of eight passes, on the latter's grid; what the
fit says beyond that map is smoothed as maps of several passes are.

Magnified views show more detail, but a backbone's features shift with scale. A linear map, fitted
for each image, undoes the shift; only differences of neighbouring cells are then used.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.implicit.config import FitConfig
from upfeat.implicit.fields import BilateralKernel, Field, KernelField, whitening
from upfeat.implicit.grid import GridField
from upfeat.implicit.guides import QueryGuide
from upfeat.implicit.observe import (
    Basis,
    Observer,
    feature_basis,
    pooled_matrices,
    show,
)
from upfeat.implicit.one_pass import (
    QUERIES,
    Look,
    into_own_words,
    look_closer,
    mean_upsampler,
    one_pass,
    shipped,
    smooth_difference,
)
from upfeat.implicit.places import choose_map_size, find_positions, spread_anchors
from upfeat.implicit.regression import Regression, details, translate
from upfeat.linear import ridge
from upfeat.normalization import HALF
from upfeat.resampling import on_grid
from upfeat.upsamplers.neighbourhood import NeighbourhoodUpsampler
from upfeat.views import Jitter

SCALES = ((0.75, 0.5, 0.7), (1.0, 5.0, 0.3))
"""Scales of the kernel's two Gaussians: standard deviation in cells, in query, and weight. The
second hardly depends on the query: it covers pixels whose query resembles no anchor's."""
NUGGET = 1e-3
PENALTIES = (1e-3, 1e-2, 1e-1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
# Ridge penalty of a projected map's coefficients, per pixel of the map; and about how many pixels,
# spread over the map, the coefficients are fitted to.
_MEAN_PENALTY = 0.1
_MEAN_PIXELS = 1 << 14
_ROWS = 1024
_FIRST_ROUND = 32
_VIEWS_AT_ONCE = 8
# Values of basis functions below this are set to 0: their products would be denormal numbers, with
# which processors are slow, and most values are tiny since most anchors are far from most pixels.
_NOTHING = 1e-15


class KernelFit:
    """Basis functions of one image, and the regression of their coefficients on views added."""

    def __init__(
        self,
        guidance: Tensor,
        observer: Observer,
        basis: Basis,
        own: Tensor,
        hidden: Tensor | None = None,
        *,
        anchors: int,
        seed: int,
    ) -> None:
        """Choose the anchors, evaluate their functions over the image and fit the mean.

        Args:
            guidance: (3, H, W) uint8, the image.
            observer: an observer of the image.
            basis: the basis of the targets, with coordinates of unit variance.
            own: (1, C, h, w), the backbone's features of the unjittered image.
            hidden: (1, D, h', w'), features of the image from the backbone's earlier layers, or
                ``None``.
            anchors: largest number of anchors.
            seed: seed of the candidates for anchors.
        """
        self.observer, self.basis, self.guidance = observer, basis, guidance
        self.own, self.hidden = own, hidden
        self.scales = torch.tensor(SCALES, dtype=torch.float32)
        self.kernel = BilateralKernel(self.scales)
        self.map_size = choose_map_size(observer.size, observer.grid_size, anchors)
        upsampler = shipped(QUERIES)
        assert isinstance(upsampler, NeighbourhoodUpsampler)
        self.guide = QueryGuide(upsampler.encoder, upsampler.normalization or HALF)
        positions = find_positions(self.guide(guidance), self.map_size, observer.grid_size)
        self.anchors = spread_anchors(positions, anchors, self.scales[0], seed)
        self.anchors[:, 2:] = self.anchors[:, 2:].half()  # the precision of files
        self.table = self._table(positions)  # (H', W', M)
        self.regression = Regression.empty(len(self.anchors), len(basis.components))
        self._solved: tuple[Tensor, Tensor] | None = None
        self.upsampler = mean_upsampler(observer.backbone)
        drawn = one_pass(self.upsampler, guidance, own, hidden, basis, self.map_size)
        self.mean = self._project(drawn)
        self.held = Regression.empty(len(self.anchors), len(basis.components))
        self._observe(observer.held, self._targets(observer.held_features), self.held)
        self.outside = basis.loss(observer.held_features)

    def add(self, views: Jitter, features: Tensor) -> None:
        """Add N views and their features, (N, C, h, w), to the regression."""
        self._solved = None
        self._observe(views, self._targets(features), self.regression)

    def _observe(self, views: Jitter, targets: Tensor, sums: Regression) -> None:
        """Add N views and the coordinates of their features, (N·h·w, k), to a regression."""
        parts = targets.split(_VIEWS_AT_ONCE * math.prod(self.observer.grid_size))
        for design, target in zip(self._designs(views), parts, strict=True):
            sums.add(design, target)

    def add_details(self, views: Jitter, features: Tensor) -> None:
        """Add differences of neighbouring cells of magnified views to the regression.

        The features of magnified views are first translated, by a linear map, to match the map
        fitted to the other views.

        Args:
            views: N views, magnified so far that their cells resolve details of the image.
            features: (N, C, h, w), the backbone's features of these views.
        """
        grid_size = self.observer.grid_size
        drawn = self.table.flatten(0, 1) @ self.solve(0.0)  # (H'·W', k)
        drawn = drawn.T.reshape(-1, *self.map_size)
        known = show(drawn, *pooled_matrices(views, self.map_size, grid_size))
        known = known.permute(0, 2, 3, 1).flatten(0, 2)  # (N·h·w, k)
        translated = details(translate(self._targets(features), known), grid_size)
        parts = translated.split(_VIEWS_AT_ONCE * math.prod(grid_size))
        self._solved = None
        for design, target in zip(self._designs(views), parts, strict=True):
            self.regression.add(details(design, grid_size), target)

    def solve(self, slack: float) -> Tensor:
        """Solve the regression, with a penalty chosen for each component.

        Args:
            slack: fraction by which the held-out loss may exceed the least; of the penalties within
                this limit, the largest is chosen, since it gives the smoothest map.

        Returns:
            (M, k), the coefficients that explain the views.
        """
        solutions, errors = self._solutions()
        good = errors <= errors.amin(0) * (1 + slack)
        best = good.long().cumsum(0).argmax(0)  # the last good one
        return solutions[best, :, torch.arange(len(best))].T

    def blend(self, coefficients: Tensor, config: FitConfig) -> tuple[Field, Basis]:
        """Blend the fit to views with the map of eight passes; return the field and its basis.

        Args:
            coefficients: (M, k), fitted to the views.
            config: its ``share`` and ``translation`` are used.

        Returns:
            The field, and the basis of its values: with a share of 1, the functions themselves,
            otherwise the blend, on the grid of the map of eight passes.
        """
        basis = self.basis
        translated, shift = self._translate(coefficients, config.translation)
        basis = Basis(basis.components, basis.mean + config.share * shift)
        if config.share < 1:
            return self._on_grid(translated, config.share), basis
        # Rounded to the precision of files: a loaded fit renders the same values, to the last bit.
        field = KernelField(
            self.anchors,
            self.scales,
            translated.half().float().contiguous(),
            self.guide,
            grid_size=self.observer.grid_size,
            nugget=NUGGET,
        )
        return field, basis

    def finish(self, coefficients: Tensor, config: FitConfig) -> Fitted:
        """Blend as :meth:`blend` does; return the result of a round."""
        passes = self.few_passes.passes if config.share < 1 else None
        return Fitted(*self.blend(coefficients, config), self.map_size, passes)

    def loss(self, coefficients: Tensor) -> float:
        """Return the mean squared error of coefficients (M, k) on the held-out views' features."""
        lengths = self.basis.components.square().sum(1).double()
        explained = float(self.held.errors(coefficients) @ lengths)
        return explained / self.basis.components.shape[1] + self.outside

    def _translate(self, coefficients: Tensor, part: float) -> tuple[Tensor, Tensor]:
        """Translate a map fitted to views into the features of the unjittered image.

        Features of views differ from those of the image, because views are magnified and have
        reflected borders. A linear map of channels turns the former into the latter.

        Args:
            coefficients: (M, k), fitted to the views.
            part: fraction of the translation to apply, from 0 to 1.

        Returns:
            Coefficients (M, k) of the translated map, and the shift (C,) of its mean.
        """
        shift = torch.zeros_like(self.basis.mean)
        if part == 0:
            return coefficients, shift
        components, mean = self.basis.components, self.basis.mean
        image = Jitter.identity(1, size=self.observer.size)
        cells = torch.cat(list(self._designs(image))) @ coefficients @ components + mean
        said = cells.T.reshape(1, -1, *self.observer.grid_size)
        weight, bias = into_own_words(self.observer.backbone, said, self.own)
        turned = components @ weight.T @ self.basis.inverse.T  # (k, k)
        shift = weight @ mean + bias - mean
        return torch.lerp(coefficients, coefficients @ turned, part), part * shift

    def _solutions(self) -> tuple[Tensor, Tensor]:
        """Coefficients (P, M, k) for the P penalties and their held-out errors (P, k), cached."""
        if self._solved is None:
            rest = self.regression.beyond(self.mean)
            solutions = torch.stack([self.mean + rest.solve(penalty) for penalty in PENALTIES])
            self._solved = solutions, torch.stack([self.held.errors(x) for x in solutions])
        return self._solved

    def _on_grid(self, coefficients: Tensor, share: float) -> GridField:
        """Add a share of what a fit (M, k) says beyond the map of a few passes to this map."""
        look = self.few_passes
        few, lengths = self.basis.encode(look.features)[0], self.basis.components.norm(dim=1)
        size = (few.shape[1], few.shape[2])
        drawn = (self.table @ coefficients).permute(2, 0, 1)
        difference = on_grid(drawn[None], size)[0] - few
        smoothed = smooth_difference(
            difference,
            few * lengths[:, None, None],  # of one unit, that of the features
            self.upsampler,
            self.guidance,
            self.hidden,
            self.observer.grid_size,
        )
        blended = few + share * (difference if smoothed is None else smoothed)
        return GridField(blended, lengths, look.last, smoothed=smoothed is not None)

    @cached_property
    def few_passes(self) -> Look:
        """The image's features in a few passes of the backbone."""
        return look_closer(self.observer, self.guidance)

    def _project(self, drawn: Tensor) -> Tensor:
        """Fit coefficients (M, k) to a map (k, H', W'), by ridge regression on its pixels."""
        (rows, columns), gram = self._sampled
        table = self.table[rows, columns].flatten(0, 1)
        moment = (table.T @ drawn[:, rows, columns].flatten(1).T).double()
        penalty = _MEAN_PENALTY * len(table) / math.prod(self.map_size)
        return ridge(gram, moment, penalty).float()

    @cached_property
    def _sampled(self) -> tuple[tuple[slice, slice], Tensor]:
        """Rows and columns of the pixels to project from, and the functions' Gram matrix there."""
        step = math.ceil(math.sqrt(math.prod(self.map_size) / _MEAN_PIXELS))
        rows, columns = (slice((n - 1) % step // 2, None, step) for n in self.map_size)
        table = self.table[rows, columns].flatten(0, 1)
        regression = Regression.empty(len(self.anchors), 0)
        regression.add(table, table[:, :0])
        return (rows, columns), regression.gram

    def _table(self, positions: Tensor) -> Tensor:
        """Evaluate every basis function, whitened, at every pixel of the map: (H', W', M)."""
        factor = whitening(self.kernel, self.anchors, NUGGET).float()
        table = positions.new_empty(len(positions), len(self.anchors))
        for part in torch.arange(len(positions)).split(_ROWS):
            bumps = self.kernel(positions[part], self.anchors)
            values = torch.linalg.solve_triangular(factor.mT, bumps, upper=True, left=False)
            table[part] = F.hardshrink(values, _NOTHING)
        return table.view(*self.map_size, -1)

    def _designs(self, views: Jitter) -> Iterator[Tensor]:
        """Yield the design matrix of N views, (N·h·w, M), as the rows of a few views at a time."""
        rows, columns = pooled_matrices(views, self.map_size, self.observer.grid_size)
        for start in range(0, len(views), _VIEWS_AT_ONCE):
            designs = [
                _show_table(self.table, *pair)
                for pair in zip(
                    rows[start : start + _VIEWS_AT_ONCE],
                    columns[start : start + _VIEWS_AT_ONCE],
                    strict=True,
                )
            ]
            yield torch.cat(designs)

    def _targets(self, features: Tensor) -> Tensor:
        """Features (N, C, h, w) -> coordinates (N·h·w, k)."""
        return self.basis.encode(features).permute(0, 2, 3, 1).flatten(0, 2)


class Fitted(NamedTuple):
    """The result of a round of a fit."""

    field: Field
    basis: Basis
    map_size: tuple[int, int] | None = None
    """(height, width), pixels, of the map from which to compute the held-out loss: that on which
    the basis functions were evaluated; ``None`` for the size of the image."""
    passes: int | None = None
    """Passes of the backbone for the map that is blended with the fit; ``None`` without one."""


Round = tuple[int, Fitted | None]
"""Number of views observed so far, the image included, and the result where there is a new one."""


def fit_kernel(
    guidance: Tensor, observer: Observer, views: Jitter, zoomed: Jitter, config: FitConfig
) -> Iterator[Round]:
    """Fit to views until the held-out loss stops falling, then to details of magnified views.

    The image itself is observed first, then views in rounds, each of which doubles their number.

    Args:
        guidance: (3, H, W) uint8, the image.
        observer: an observer of the image.
        views: views to observe, in this order and not necessarily all; every prefix should be well
            spread.
        zoomed: magnified views; may be empty.
        config: settings of the fit.

    Yields:
        Progress; the last round contains the final result.
    """
    own, hidden = observer.look_at_image()
    yield 1, None
    goal = min(_FIRST_ROUND, len(views))
    features = yield from _observe(observer, views[slice(0, goal)], 1)
    basis = feature_basis(features, config.components, whiten=True)
    chosen = {"anchors": config.anchors, "seed": config.seed}
    fit = KernelFit(guidance, observer, basis, own, hidden, **chosen)
    fit.add(views[slice(0, goal)], features)
    before = math.inf
    while True:
        coefficients = fit.solve(config.slack)
        loss = fit.loss(coefficients)
        more = goal < len(views) and loss <= before * (1 - config.tolerance)
        yield 1 + goal, fit.finish(coefficients, config)
        if not more:
            break
        before, done, goal = loss, goal, min(2 * goal, len(views))
        added = views[slice(done, goal)]
        fit.add(added, (yield from _observe(observer, added, 1 + done)))
    if len(zoomed):
        fit.add_details(zoomed, (yield from _observe(observer, zoomed, 1 + goal)))
        yield 1 + goal + len(zoomed), fit.finish(fit.solve(config.slack), config)


def _observe(observer: Observer, views: Jitter, before: int) -> Generator[Round, None, Tensor]:
    """Observe views: yield the number observed so far, and return the features (N, C, h, w)."""
    seen = []
    for features in observer.batches(views):
        seen.append(features)
        before += len(features)
        yield before, None
    return torch.cat(seen)


def _show_table(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply one view's matrices (h, H') and (w, W') to M functions (H', W', M): (h·w, M)."""
    seen = rows.ne(0).any(0).nonzero()
    first, last = int(seen[0]), int(seen[-1]) + 1
    wide = columns @ table[first:last]  # (H'', w, M)
    return (rows[:, first:last] @ wide.flatten(1)).view(-1, table.shape[2])
