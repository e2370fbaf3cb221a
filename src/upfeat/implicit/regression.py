"""Ridge regression for fits, and the processing of magnified views before they are added."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.linear import ridge

# Number of stripes in which a symmetric Gram matrix is computed, each up to the diagonal only.
_STRIPES = 4
# Penalty of the translation of magnified views, relative to the variance of their coordinates.
_TRANSLATION_PENALTY = 0.03


@dataclass
class Regression:
    """Running sums of a ridge regression of k targets on M functions, to which views are added."""

    gram: Tensor
    """(M, M) float64, design matrix times itself."""
    moment: Tensor
    """(M, k) float64, design matrix times targets."""
    squares: Tensor
    """(k,) float64, sums of the targets' squares."""
    count: int = 0
    """Number of observations."""

    def add(self, design: Tensor, targets: Tensor) -> None:
        """Add N observations: design matrix (N, M) and targets (N, k)."""
        ends = [len(self.gram) * part // _STRIPES for part in range(_STRIPES + 1)]
        for start, end in itertools.pairwise(ends):
            part = (design[:, start:end].T @ design[:, :end]).double()
            self.gram[start:end, :end] += part
            self.gram[:start, start:end] += part[:, :start].T
        self.moment += (design.T @ targets).double()
        self.squares += targets.double().square().sum(0)
        self.count += len(targets)

    def errors(self, coefficients: Tensor) -> Tensor:
        """Return the mean squared error of coefficients (M, k) for each target: (k,) float64."""
        x = coefficients.double()
        products = (x * (self.gram @ x - 2 * self.moment)).sum(0)
        return (products + self.squares) / self.count

    @staticmethod
    def empty(functions: int, width: int) -> Regression:
        """Return a regression without observations, for M functions and k targets."""
        return Regression(
            torch.zeros(functions, functions, dtype=torch.float64),
            torch.zeros(functions, width, dtype=torch.float64),
            torch.zeros(width, dtype=torch.float64),
        )

    def beyond(self, coefficients: Tensor) -> Regression:
        """Return the regression whose targets are the residuals of coefficients (M, k)."""
        moment = self.moment - self.gram @ coefficients.double()
        squares = self.errors(coefficients) * self.count
        return Regression(self.gram, moment, squares, self.count)

    def solve(self, penalty: float) -> Tensor:
        """Return coefficients (M, k) that minimise squared errors + penalty · squared length."""
        return ridge(self.gram, self.moment, penalty).float()


def details(x: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Subtract the mean of the 3×3 cells around each cell, edges replicated.

    Args:
        x: (N·h·w, K), values of the cells of N views.
        grid_size: (h, w), cells.

    Returns:
        (N·h·w, K).
    """
    maps = x.view(-1, *grid_size, x.shape[1]).permute(0, 3, 1, 2)
    around = F.avg_pool2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (maps - around).permute(0, 2, 3, 1).flatten(0, 2)


def translate(source: Tensor, target: Tensor) -> Tensor:
    """Ridge-regress `target` on `source` and return the prediction, (N, k)."""
    x, y = source.double(), target.double()
    x, mean = x - x.mean(0), y.mean(0)
    gram = x.T @ x / len(x)
    penalty = _TRANSLATION_PENALTY * float(gram.diagonal().mean()) + 1e-9
    return (x @ ridge(gram, x.T @ (y - mean) / len(x), penalty) + mean).float()
