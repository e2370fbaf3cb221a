"""The fast fit: a Gaussian process of place and query, observed through the views; closed form.

A view's features are, up to noise, a linear map of the features sought: warp, then the mean over
each cell. With fixed basis functions of place and query (``KernelField``), their images under that
map are the columns of a design matrix, and the coefficients of all channels at once are one ridge
regression. Gradient descent does the same in thousands of passes over thousands of views.

The process's mean is what a one-pass upsampler makes of the image's own features, as far as the
basis functions can say it: where the views have nothing to say, that is drawn, not a constant.

Magnified views show more detail, but backbone features shift with scale. A linear map, fitted per
image, undoes that shift; only local differences are then used.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.implicit.config import FitConfig
from upfeat.implicit.fields import BilateralKernel, KernelField, whitening
from upfeat.implicit.guides import QueryGuide, sample
from upfeat.implicit.observe import (
    Basis,
    Observer,
    feature_basis,
    pooled_matrices,
    show,
)
from upfeat.implicit.one_pass import QUERIES, into_own_words, one_pass, shipped
from upfeat.implicit.regression import Regression, details, translate
from upfeat.normalization import HALF
from upfeat.randomness import stream
from upfeat.upsamplers.neighbourhood import NeighbourhoodUpsampler
from upfeat.views import Jitter

SCALES = ((0.75, 0.5, 0.7), (1.0, 5.0, 0.3))
"""The kernel: standard deviation in cells, in query, weight. The second part hardly looks at the
query: where it is unlike all anchors', what remains is the place."""
NUGGET = 1e-3
PENALTIES = (1e-3, 1e-2, 1e-1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
# Of the mean's coefficients, for every pixel of the map; so many of those are looked at, about.
_MEAN_PENALTY = 0.1
_MEAN_PIXELS = 1 << 14
_CANDIDATES = 8192
_ROWS = 1024
_FIRST_ROUND = 32
# Numbers in the table of basis functions over the map: 512 MiB.
_TABLE = 1 << 27
_VIEWS_AT_ONCE = 8
# Values of basis functions below this count as 0: their products are too small for single
# precision's normal range, where processors are slow, and most anchors are far from most pixels.
_NOTHING = 1e-15


class KernelFit:
    """Basis functions of one image, and the coefficients that explain the views so far."""

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
        """Place the anchors; evaluate their functions over the image; find the mean.

        Args:
            guidance: (3, H, W) uint8.
            observer: of the same image.
            basis: of the targets; coordinates of unit variance.
            own: (1, C, h, w), the backbone's features of the image itself.
            hidden: (1, D, h', w'), what its earlier layers say of it; ``None`` for nothing.
            anchors: how many at most.
            seed: draws the candidates for anchors.
        """
        self.observer, self.basis, self.own = observer, basis, own
        self.scales = torch.tensor(SCALES, dtype=torch.float32)
        self.kernel = BilateralKernel(self.scales)
        self.map_size = _map_size(observer.size, observer.grid_size, anchors)
        upsampler = shipped(QUERIES)
        assert isinstance(upsampler, NeighbourhoodUpsampler)
        self.guide = QueryGuide(upsampler.encoder, upsampler.normalization or HALF)
        positions = _positions(self.guide(guidance), self.map_size, observer.grid_size)
        self.anchors = spread_anchors(positions, anchors, self.scales[0], seed)
        self.anchors[:, 2:] = self.anchors[:, 2:].half()  # as they are stored
        self.table = self._table(positions)  # (H', W', M)
        self.regression = Regression.empty(len(self.anchors), len(basis.components))
        self._solved: tuple[Tensor, Tensor] | None = None
        drawn = one_pass(guidance, basis.encode(own), self.map_size, hidden)
        self.mean = self._project(drawn)
        self.held = Regression.empty(len(self.anchors), len(basis.components))
        self._observe(observer.held, self._targets(observer.held_features), self.held)
        self.outside = basis.loss(observer.held_features)

    def add(self, views: Jitter, features: Tensor) -> None:
        """Take in views (N) and what the backbone sees in them, (N, C, h, w)."""
        self._solved = None
        self._observe(views, self._targets(features), self.regression)

    def _observe(self, views: Jitter, targets: Tensor, sums: Regression) -> None:
        """Add views (N), and what is to be seen in them, (N·h·w, k), to sums."""
        parts = targets.split(_VIEWS_AT_ONCE * math.prod(self.observer.grid_size))
        for design, target in zip(self._designs(views), parts, strict=True):
            sums.add(design, target)

    def add_details(self, views: Jitter, features: Tensor) -> None:
        """Take in magnified views: differences of neighbouring cells, in the other views' words.

        Args:
            views: N, magnified so far that features at their grid are details.
            features: (N, C, h, w), what the backbone sees in them.
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
        """Solve; each component has its own penalty.

        Args:
            slack: of the penalties whose held-out loss exceeds the least by no more than this
                fraction, the largest is taken: the smoothest map.

        Returns:
            (M, k), the coefficients that explain the views.
        """
        solutions, errors = self._solutions()
        good = errors <= errors.amin(0) * (1 + slack)
        best = good.long().cumsum(0).argmax(0)  # the last good one
        return solutions[best, :, torch.arange(len(best))].T

    def blend(self, coefficients: Tensor, config: FitConfig) -> tuple[KernelField, Basis]:
        """Blend the fit to views with the one-pass map; return the field and its basis.

        Args:
            coefficients: (M, k), of the views.
            config: says how much of which.

        Returns:
            The field, and the basis of its values.
        """
        basis = self.basis
        translated, shift = self._translate(coefficients, config.translation)
        blended = torch.lerp(self.mean, translated, config.share)
        # Rounded as they are stored: a file draws what its fit drew, to the last bit.
        field = KernelField(
            self.anchors,
            self.scales,
            blended.half().float().contiguous(),
            self.guide,
            grid_size=self.observer.grid_size,
            nugget=NUGGET,
        )
        return field, Basis(basis.components, basis.mean + config.share * shift)

    def loss(self, coefficients: Tensor) -> float:
        """Mean squared error of the held-out views' features, by coefficients (M, k)."""
        lengths = self.basis.components.square().sum(1).double()
        explained = float(self.held.errors(coefficients) @ lengths)
        return explained / self.basis.components.shape[1] + self.outside

    def _translate(self, coefficients: Tensor, part: float) -> tuple[Tensor, Tensor]:
        """Coefficients (M, k) and shift (C,) of the map in the image's words, as far as asked for.

        Many views agree on something else than what the image says by itself: they are magnified,
        and their borders are reflected. A linear map of channels leads from one to the other.
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
        """Coefficients (P, M, k) by penalty and their errors (P, k), kept until views are added."""
        if self._solved is None:
            rest = self.regression.beyond(self.mean)
            solutions = torch.stack([self.mean + rest.solve(penalty) for penalty in PENALTIES])
            self._solved = solutions, torch.stack([self.held.errors(x) for x in solutions])
        return self._solved

    def _project(self, drawn: Tensor) -> Tensor:
        """Coefficients (M, k) that say a map (k, H', W'), by ridge regression on its pixels."""
        step = math.ceil(math.sqrt(math.prod(self.map_size) / _MEAN_PIXELS))
        rows, columns = (slice((n - 1) % step // 2, None, step) for n in self.map_size)
        table = self.table[rows, columns].flatten(0, 1)
        regression = Regression.empty(len(self.anchors), len(drawn))
        regression.add(table, drawn[:, rows, columns].flatten(1).T)
        return regression.solve(_MEAN_PENALTY * len(table) / math.prod(self.map_size))

    def _table(self, positions: Tensor) -> Tensor:
        """Every basis function at every pixel of the map, whitened: (H', W', M)."""
        factor = whitening(self.kernel, self.anchors, NUGGET).float()
        table = positions.new_empty(len(positions), len(self.anchors))
        for part in torch.arange(len(positions)).split(_ROWS):
            bumps = self.kernel(positions[part], self.anchors)
            values = torch.linalg.solve_triangular(factor.mT, bumps, upper=True, left=False)
            table[part] = F.hardshrink(values, _NOTHING)
        return table.view(*self.map_size, -1)

    def _designs(self, views: Jitter) -> Iterator[Tensor]:
        """Basis functions as views show them: (N·h·w, M), some views at a time."""
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
    """The result of a round."""

    field: KernelField
    basis: Basis
    map_size: tuple[int, int]
    """Pixels at which it was fitted."""


Round = tuple[int, Fitted | None]
"""Views looked at so far, with the image itself, and what was fitted to them, if that is new."""


def fit_kernel(
    guidance: Tensor, observer: Observer, views: Jitter, zoomed: Jitter, config: FitConfig
) -> Iterator[Round]:
    """Add views until held-out views are explained no better; then the details of magnified ones.

    First the image itself is looked at; then views in rounds, each doubling their number.

    Args:
        guidance: (3, H, W) uint8.
        observer: of the same image.
        views: to look at, at most; every prefix should be well spread.
        zoomed: magnified views; may be none.
        config: settings.

    Yields:
        Progress; the last round is the result.
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
        yield 1 + goal, Fitted(*fit.blend(coefficients, config), fit.map_size)
        if not more:
            break
        before, done, goal = loss, goal, min(2 * goal, len(views))
        added = views[slice(done, goal)]
        fit.add(added, (yield from _observe(observer, added, 1 + done)))
    if len(zoomed):
        fit.add_details(zoomed, (yield from _observe(observer, zoomed, 1 + goal)))
        fitted = fit.blend(fit.solve(config.slack), config)
        yield 1 + goal + len(zoomed), Fitted(*fitted, fit.map_size)


def _observe(observer: Observer, views: Jitter, before: int) -> Generator[Round, None, Tensor]:
    """Features of views, (N, C, h, w), telling how many views have been looked at."""
    seen = []
    for features in observer.batches(views):
        seen.append(features)
        before += len(features)
        yield before, None
    return torch.cat(seen)


def spread_anchors(positions: Tensor, n: int, scale: Tensor, seed: int) -> Tensor:
    """Choose anchors that cover all places and queries: each the farthest from those before it.

    Args:
        positions: (P, 2 + D) of the pixels.
        n: how many at most.
        scale: (3,) standard deviation in cells and in query, and a weight that is not used.
        seed: draws the pixels among which to choose.

    Returns:
        (M, 2 + D), M ≤ n.
    """
    order = torch.randperm(len(positions), generator=stream(seed, "anchors"))[:_CANDIDATES]
    candidates = positions[order]
    place, query = scale[:2].tolist()
    scaled = candidates / candidates.new_tensor([place, place] + [query] * (positions.shape[1] - 2))
    square = scaled.square().sum(1)
    chosen = torch.empty(min(n, len(candidates)), dtype=torch.long)
    distance = torch.full((len(candidates),), math.inf)
    for index in range(len(chosen)):
        last = chosen[index] = distance.argmax()
        distance[last] = -math.inf  # never again
        away = torch.addmv(square, scaled, scaled[last], alpha=-2).add_(square[last])
        torch.minimum(distance, away, out=distance)
    return candidates[chosen]


def _show_table(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Show (H', W', M) functions in one view: (h, H'), (w, W') -> (h·w, M)."""
    seen = rows.ne(0).any(0).nonzero()
    first, last = int(seen[0]), int(seen[-1]) + 1
    wide = columns @ table[first:last]  # (H'', w, M)
    return (rows[:, first:last] @ wide.flatten(1)).view(-1, table.shape[2])


def _map_size(size: tuple[int, int], grid_size: tuple[int, int], anchors: int) -> tuple[int, int]:
    """Pixels at which functions are evaluated: every other one, where cells are large enough."""
    step = 2 if min(size[0] / grid_size[0], size[1] / grid_size[1]) >= 16 else 1
    step = max(step, math.sqrt(math.prod(size) * anchors / _TABLE))
    return max(round(size[0] / step), grid_size[0]), max(round(size[1] / step), grid_size[1])


def _positions(queries: Tensor, map_size: tuple[int, int], grid_size: tuple[int, int]) -> Tensor:
    """(y, x) in cells and query, of (…, …, D), of every pixel of the map: (H'·W', 2 + D)."""
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in map_size)
    places = torch.cartesian_prod(y, x)
    cells = (places * places.new_tensor(grid_size)).float()
    return torch.cat([cells, sample(queries, places)], dim=1)
