"""The fast fit: a Gaussian process of place and colour, observed through the views; closed form.

A view's features are, up to noise, a linear map of the features sought: warp, then the mean over
each cell. With fixed basis functions of place and colour (``KernelField``), their images under that
map are the columns of a design matrix, and the coefficients of all channels at once are one ridge
regression. Gradient descent does the same in thousands of passes over thousands of views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from upfeat.training.implicit_views import (
    Basis,
    Observer,
    pooled_matrices,
    principal_components,
)
from upfeat.training.randomness import stream
from upfeat.upsamplers.implicit import sample_colours
from upfeat.upsamplers.implicit_fields import BilateralKernel, KernelField, whitening
from upfeat.views import Jitter

SCALES = ((0.75, 0.3, 0.7), (1.0, 3.0, 0.3))
"""The kernel: standard deviation in cells, in colour, weight. The second part hardly looks at
colour: where a colour is unlike all anchors, what remains is the place."""
NUGGET = 1e-3
PENALTIES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
# Of penalties that do about equally well on held-out views, the largest: the smoothest map.
_EQUALLY_WELL = 1.003
_CANDIDATES = 8192
_ROWS = 1024
# Numbers in the table of basis functions over the map: 512 MiB.
_TABLE = 1 << 27
_VIEWS_AT_ONCE = 8


@dataclass
class Regression:
    """Sums that a ridge regression needs, to which views are added."""

    gram: Tensor
    """(M, M) float64."""
    moment: Tensor
    """(M, k) float64."""

    def add(self, design: Tensor, targets: Tensor) -> None:
        """Add observations: (N, M), (N, k)."""
        self.gram += (design.T @ design).double()
        self.moment += (design.T @ targets).double()

    def solve(self, penalty: float) -> Tensor:
        """Coefficients (M, k) that minimise squared error plus penalty · squared length."""
        matrix = self.gram.clone()
        matrix.diagonal().add_(penalty)
        factor = torch.linalg.cholesky(matrix)
        return torch.cholesky_solve(self.moment, factor).float()


class KernelFit:
    """Basis functions of one image, and the coefficients that explain the views so far."""

    def __init__(
        self, guidance: Tensor, observer: Observer, basis: Basis, *, anchors: int, seed: int
    ) -> None:
        """Place the anchors; evaluate their functions over the image.

        Args:
            guidance: (3, H, W) uint8.
            observer: of the same image.
            basis: of the targets; coordinates of unit variance.
            anchors: how many at most.
            seed: draws the candidates for anchors.
        """
        self.observer, self.basis = observer, basis
        self.scales = torch.tensor(SCALES)
        self.kernel = BilateralKernel(self.scales)
        self.map_size = _map_size(observer.size, observer.grid_size, anchors)
        positions = _positions(guidance, self.map_size, observer.grid_size)
        self.anchors = spread_anchors(positions, anchors, self.scales[0], seed)
        self.table = self._table(positions)  # (H', W', M)
        n, k = len(self.anchors), len(basis.components)
        self.regression = Regression(
            torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, k, dtype=torch.float64)
        )
        self.held = torch.cat(list(self._designs(observer.held)))
        self.held_targets = self._targets(observer.held_features)
        self.outside = basis.loss(observer.held_features)

    def add(self, views: Jitter, features: Tensor) -> None:
        """Take in views (N) and what the backbone sees in them, (N, C, h, w)."""
        targets = self._targets(features).split(_VIEWS_AT_ONCE * math.prod(self.observer.grid_size))
        for design, target in zip(self._designs(views), targets, strict=True):
            self.regression.add(design, target)

    def solve(self) -> tuple[KernelField, float]:
        """Solve with the penalty that suits each component's held-out views best.

        Returns:
            The field, and the mean squared error of the held-out views' features.
        """
        solutions = [self.regression.solve(penalty) for penalty in PENALTIES]
        errors = torch.stack(
            [(self.held @ x - self.held_targets).square().mean(0) for x in solutions]
        )  # (penalties, k)
        good = errors <= errors.amin(0) * _EQUALLY_WELL
        best = good.long().cumsum(0).argmax(0)  # the last good one
        coefficients = torch.stack(solutions)[best, :, torch.arange(len(best))].T
        # Rounded as they are stored: a file draws what its fit drew, to the last bit.
        coefficients = coefficients.half().float().contiguous()
        field = KernelField(
            self.anchors,
            self.scales,
            coefficients,
            grid_size=self.observer.grid_size,
            nugget=NUGGET,
        )
        errors = (self.held @ coefficients - self.held_targets).square().mean(0)
        explained = float(errors @ self.basis.components.square().sum(1))
        return field, explained / self.basis.components.shape[1] + self.outside

    def _table(self, positions: Tensor) -> Tensor:
        """Every basis function at every pixel of the map, whitened: (H', W', M)."""
        factor = whitening(self.kernel, self.anchors, NUGGET).float()
        table = torch.empty(len(positions), len(self.anchors))
        for part in torch.arange(len(positions)).split(_ROWS):
            bumps = self.kernel(positions[part], self.anchors)
            table[part] = torch.linalg.solve_triangular(factor.mT, bumps, upper=True, left=False)
        return table.view(*self.map_size, -1)

    def _designs(self, views: Jitter) -> Iterator[Tensor]:
        """What the basis functions look like in views: (N·h·w, M), some views at a time."""
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


def fit_kernel(
    guidance: Tensor,
    observer: Observer,
    views: Jitter,
    *,
    components: int,
    anchors: int,
    tolerance: float,
    seed: int,
    on_round: Callable[[KernelField, Basis, int], None],
    on_views: Callable[[int], None],
) -> tuple[KernelField, Basis, int]:
    """Add views until held-out views are explained no better.

    Views are looked at in rounds, each doubling their number.

    Args:
        guidance: (3, H, W) uint8.
        observer: of the same image.
        views: to look at, at most; every prefix should be well spread.
        components: of the basis, at most.
        anchors: basis functions, at most.
        tolerance: stop when a round lowers the held-out loss by less than this share.
        seed: draws the candidates for anchors.
        on_round: is given the field, its basis and the number of views after every round.
        on_views: is told how many views have been looked at.

    Returns:
        What ``on_round`` was given last.
    """
    done, goal = 0, min(32, len(views))
    features = observer.observe(views[slice(0, goal)], on_views)
    basis = principal_components(features, components, whiten=True)
    fit = KernelFit(guidance, observer, basis, anchors=anchors, seed=seed)
    last = math.inf
    while True:
        fit.add(views[slice(done, goal)], features)
        field, loss = fit.solve()
        on_round(field, basis, goal)
        if goal == len(views) or loss > last * (1 - tolerance):
            return field, basis, goal
        last, done, goal = loss, goal, min(2 * goal, len(views))
        so_far = done

        def tell(n: int, so_far: int = so_far) -> None:
            on_views(so_far + n)

        features = observer.observe(views[slice(done, goal)], tell)


def spread_anchors(positions: Tensor, n: int, scale: Tensor, seed: int) -> Tensor:
    """Choose anchors that cover all places and colours: each the farthest from those before it.

    Args:
        positions: (P, 5) of the pixels.
        n: how many at most.
        scale: (3,) standard deviation in cells and in colour, and a weight that is not used.
        seed: draws the pixels among which to choose.

    Returns:
        (M, 5), M ≤ n.
    """
    order = torch.randperm(len(positions), generator=stream(seed, "anchors"))[:_CANDIDATES]
    candidates = positions[order]
    place, colour = scale[:2].tolist()
    scaled = candidates / candidates.new_tensor([place, place, colour, colour, colour])
    chosen = torch.empty(min(n, len(candidates)), dtype=torch.long)
    distance = torch.full((len(candidates),), math.inf)
    for index in range(len(chosen)):
        chosen[index] = distance.argmax()
        torch.minimum(distance, (scaled - scaled[chosen[index]]).square().sum(1), out=distance)
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


def _positions(guidance: Tensor, map_size: tuple[int, int], grid_size: tuple[int, int]) -> Tensor:
    """(y, x) in cells and colour of every pixel of the map, (H'·W', 5)."""
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in map_size)
    places = torch.cartesian_prod(y, x)
    cells = (places * places.new_tensor(grid_size)).float()
    return torch.cat([cells, sample_colours(guidance, places)], dim=1)
