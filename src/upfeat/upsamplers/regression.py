"""Regression of one image's features on its colours and textures."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from upfeat.types import Window
from upfeat.upsamplers.early import Beside, penalty_factor, scale_behind
from upfeat.upsamplers.maps import Computed, Map, cut, inside, widened
from upfeat.upsamplers.queries import Coarser
from upfeat.upsamplers.step import NeighbourhoodKernels

STEP = 16
"""Cells from the start of one window of the regression to the next; windows are twice as wide."""


class _Share(NamedTuple):
    """Weights with which one window's regression contributes to cells of the finer grid."""

    fine: Window
    """Window of the finer grid in which the weights are not 0."""
    down: Tensor
    """Weights of the rows of ``fine``, (fine.height,), in (0, 1], float64."""
    across: Tensor
    """Weights of the columns of ``fine``, (fine.width,), in (0, 1], float64."""

    def factors(self, like: Tensor) -> Tensor:
        """The products of the rows' and columns' weights, (fine.height, fine.width)."""
        return self.down.to(like)[:, None] * self.across.to(like)


class Lacking(Computed):
    """Mean queries of finer cells less those upsampled by the first step, (B, D, *finer grid)."""

    def __init__(self, means: Map, finer: Computed, first: NeighbourhoodKernels) -> None:
        """Keep both maps of means, and the step; see :class:`ImageRegression`."""
        recorded = finer.recorded or first.recorded
        super().__init__(finer.size, whole=finer.whole, recorded=recorded, step=2)
        self.means, self.finer, self.first = means, finer, first

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        return self.finer.at(window) - self.first.at(self.means, window)


class ImageRegression:
    """Predict the detail that coarse features lack, from this image's colours and textures.

    The features of the cells, less their mean over 3×3 cells, are ridge-regressed on the mean
    queries of the cells, less the queries' mean over 3×3 cells. The fitted map is then applied to
    the mean queries of the finer cells, less those that the first step upsamples from the coarse
    ones. The detail is linear in the features and 0 for constant features; features that are a
    linear map of the queries are recovered exactly, up to the penalty. Features of the backbone's
    early layers, where they are given, are further regressors.

    A large image has one regression for each of many windows of 2·``step`` cells that overlap by
    half, and their predictions are blended smoothly from one window's centre to the next. Windows
    begin at multiples of ``step``, so that a part of an image has the windows of the whole. An
    image of at most 2·``step`` cells a side has one regression.
    """

    def __init__(
        self,
        means: Computed,
        finer: Computed,
        first: NeighbourhoodKernels,
        *,
        penalty: float,
        step: int,
        hidden: Tensor | None = None,
    ) -> None:
        """Keep the regressors of one guidance.

        Args:
            means: (B, D, h, w), queries averaged over cells.
            finer: (B, D, f·h, f·w), queries averaged over the cells of a grid f times as fine.
            first: step from the coarse grid to the finer one.
            penalty: ridge penalty of the coefficients, in units of the queries' mean variance, > 0.
            step: number of cells from the start of one window to the next.
            hidden: (B, D', h', w'), features of early layers of a backbone, regressors in addition
                to the queries; ``None`` for none.
        """
        self.behind = 0
        if hidden is not None:
            beside = Beside(finer, hidden)
            self.behind = hidden.shape[1]
            means, finer = Coarser(beside, finer.size[0] // means.size[0]), beside
        self.means, self.lacking = means, Lacking(means, finer, first)
        self.penalty, self.step = penalty * penalty_factor(self.behind), step
        self.counts = tuple(
            1 if length <= 2 * step else math.ceil(length / step) - 1 for length in means.size
        )
        self._fits: dict[tuple[int, int], Tensor] = {}

    def at(self, features: Map, window: Window) -> Tensor:
        """Detail in a window of the finer grid, (B, C, window.height, window.width).

        Args:
            features: (B, C, h, w).
            window: window of the finer grid.
        """
        if self.counts == (1, 1):
            return _apply(self._map(features, 0, 0), self.lacking.at(window))
        shares = self._shares(window)
        self._look_ahead(list(shares))  # before a part of these means is computed alone
        lacking = self.lacking.at(window)
        out = None
        for (row, column), share in shares.items():
            place = inside(share.fine, window)
            part = _apply(
                self._map(features, row, column), cut(lacking, place) * share.factors(lacking)
            )
            if out is None:
                out = part.new_zeros((*part.shape[:2], window.height, window.width))
            cut(out, place).add_(part)
        assert out is not None
        return out

    def _look_ahead(self, windows: list[tuple[int, int]]) -> None:
        """Compute the means of all windows at once: piece by piece, edges are computed twice."""
        new = [self._cells(*one) for one in windows if one not in self._fits]
        if new:
            top, left = min(one.top for one in new), min(one.left for one in new)
            bottom, right = max(one.bottom for one in new), max(one.right for one in new)
            cells = Window(top, left, bottom - top, right - left)
            self.means.at(widened(cells, 1, self.means.size))

    def _map(self, features: Map, row: int, column: int) -> Tensor:
        """The linear map of one window, from queries to features, (B, C, D)."""
        outer = widened(self._cells(row, column), 1, self.means.size)
        values = features.at(outer).flatten(2)
        return values @ self._fit(row, column).to(values.dtype)

    def _fit(self, row: int, column: int) -> Tensor:
        """Matrix (B, N, D) by which features (B, C, N) are multiplied to give one window's map.

        The matrix includes the subtraction of the features' mean over 3×3 cells, as its adjoint,
        because the queries have fewer channels than the features.
        """
        fit = self._fits.get((row, column))
        if fit is None:
            fit = self._solve(self._cells(row, column))
            if not fit.requires_grad:
                self._fits[row, column] = fit
        return fit

    def _solve(self, cells: Window) -> Tensor:
        outer = widened(cells, 1, self.means.size)
        seen = self.means.at(outer)
        with torch.autocast(seen.device.type, enabled=False):
            exact = torch.promote_types(seen.dtype, torch.float32)
            own, around = (
                [
                    make(start, count, first, length, like=seen, dtype=exact)
                    for start, count, first, length in (
                        (cells.top, cells.height, outer.top, outer.height),
                        (cells.left, cells.width, outer.left, outer.width),
                    )
                ]
                for make in (_selection, _mean_of_three)
            )
            seen = seen.to(exact)
            mean = around[0] @ seen @ around[1].T
            inputs = (cut(seen, inside(cells, outer)) - mean).flatten(2)  # (B, D, N)
            factors = None
            if self.behind:
                size = seen[:, -self.behind :].square().mean((1, 2, 3))[:, None]
                factors = scale_behind(inputs, inputs.shape[1] - self.behind, size)
                inputs = factors * inputs
            gram = inputs @ inputs.mT
            # The constant keeps the matrix positive definite for images without colour or texture.
            least = self.penalty * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-6
            eye = torch.eye(gram.shape[1], dtype=exact, device=gram.device)
            factor = torch.linalg.cholesky(gram + least[:, None, None] * eye)
            fit = torch.cholesky_solve(inputs, factor)
            fit = fit if factors is None else factors * fit
            fit = fit.unflatten(2, (cells.height, cells.width))
            spread = own[0].T @ fit @ own[1] if cells != outer else fit
            return (spread - around[0].T @ fit @ around[1]).flatten(2).mT

    def _cells(self, row: int, column: int) -> Window:
        """Cells to which the regression of one window is fitted."""
        spans = []
        for place, count, length in zip((row, column), self.counts, self.means.size, strict=True):
            start = place * self.step
            spans.append((start, length if place == count - 1 else start + 2 * self.step))
        (top, bottom), (left, right) = spans
        return Window(top, left, bottom - top, right - left)

    def _shares(self, window: Window) -> dict[tuple[int, int], _Share]:
        """Regression windows that contribute to a window of the finer grid, by row and column."""
        across = [
            self._shares_along(axis, start, count)
            for axis, start, count in (
                (0, window.top, window.height),
                (1, window.left, window.width),
            )
        ]
        return {
            (row, column): _Share(Window(top, left, len(down), len(over)), down, over)
            for row, (top, down) in across[0].items()
            for column, (left, over) in across[1].items()
        }

    def _shares_along(self, axis: int, start: int, count: int) -> dict[int, tuple[int, Tensor]]:
        """Blending weights along one axis for a run of ``count`` fine cells from ``start`` on.

        Returns:
            By number of a window, for windows that contribute to the run: the first fine cell where
            the window's weight is not 0, and its weights from there on.
        """
        windows, length = self.counts[axis], self.means.size[axis]
        places = torch.arange(start, start + count, dtype=torch.float64, device="cpu")
        cells = (places + 0.5) * length / self.lacking.size[axis]
        # In units of the distance between windows, 0 at the centre of the first window.
        along = (cells / self.step - 1).clamp(0, windows - 1)
        found = {}
        for place in range(windows):
            near = (1 - (along - place).abs()).clamp(min=0)
            used = near.nonzero().flatten()
            if len(used):
                first, last = int(used[0]), int(used[-1]) + 1
                found[place] = start + first, (near * near * (3 - 2 * near))[first:last]
        return found


def _apply(matrix: Tensor, values: Tensor) -> Tensor:
    """Apply a linear map of channels, (B, C, D) and (B, D, h, w) -> (B, C, h, w)."""
    return (matrix @ values.flatten(2).to(matrix.dtype)).unflatten(2, values.shape[2:])


def _selection(
    start: int, count: int, first: int, length: int, *, like: Tensor, dtype: torch.dtype
) -> Tensor:
    """Matrix (count, length) that selects ``count`` values from ``start`` on.

    It applies to ``length`` values from ``first`` on.
    """
    eye = torch.eye(length, dtype=dtype, device=like.device)
    return eye[start - first : start - first + count]


def _mean_of_three(
    start: int, count: int, first: int, length: int, *, like: Tensor, dtype: torch.dtype
) -> Tensor:
    """Matrix (count, length) of the means of each selected value and its two neighbours.

    The ends are replicated; the arguments are those of :func:`_selection`.
    """
    eye = torch.eye(length, dtype=dtype, device=like.device)
    means = (torch.cat([eye[:1], eye[:-1]]) + eye + torch.cat([eye[1:], eye[-1:]])) / 3
    return means[start - first : start - first + count]
