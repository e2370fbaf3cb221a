"""Exportable ridge regression of an image's features on its queries, for all windows at once.

A window is 2 × 2 blocks, each :data:`STEP` cells a side, and its sums are the sums of its blocks'
sums. The number of blocks is an axis of a tensor, so one graph serves any number of windows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.portable import axes
from upfeat.upsamplers.early import WEIGHT, penalty_factor
from upfeat.upsamplers.regression import STEP

PRECISION = 1e-9
"""Relative error of the inverse after Newton's iteration, apart from rounding."""


class Regression(nn.Module):
    """Form of :class:`upfeat.upsamplers.regression.ImageRegression`, which predicts detail.

    Exchange formats have no factorisations of matrices, so the inverse is computed by Newton's
    iteration, which needs products only. The penalty bounds the ratio of the eigenvalues, and
    thereby the number of rounds.
    """

    def __init__(self, penalty: float, width: int) -> None:
        """Keep the settings.

        Args:
            penalty: ridge penalty, in units of the queries' mean variance, > 0.
            width: number of channels of the queries; channels after them are of early layers.
        """
        super().__init__()
        self.penalty, self.width = penalty, width

    def forward(self, features: Tensor, means: Tensor, lacking: Tensor) -> Tensor:
        """Predict the detail of features on the finer grid.

        Args:
            features: (B, C, h, w).
            means: (B, D, h, w), queries averaged over cells, and early layers after them.
            lacking: (B, D, 2h, 2w), the same averaged over finer cells, less ``means`` upsampled
                by the first step.

        Returns:
            (B, C, 2h, 2w).
        """
        inputs, targets = _blocks(_differences(means)), _blocks(_differences(features))
        gram = _windows(inputs @ inputs.mT)  # (B, n, m, D, D)
        moment = _windows(targets @ inputs.mT)  # (B, n, m, C, D)
        penalty = self.penalty * penalty_factor(means.shape[1] - self.width)
        if means.shape[1] > self.width:
            factors = self._factors(gram)
            inverse = inverse_of(factors.mT * gram * factors, penalty)
            matrix = (moment * factors) @ inverse * factors
        else:
            matrix = moment @ inverse_of(gram, penalty)
        return _blend(matrix, lacking, (features.shape[2], features.shape[3]))

    def _factors(self, gram: Tensor) -> Tensor:
        """Factors of :func:`upfeat.upsamplers.early.scale_behind`, (…, D, D) -> (…, 1, D)."""
        squares = gram.diagonal(dim1=-2, dim2=-1)
        own, behind = squares[..., : self.width], squares[..., self.width :]
        least = torch.finfo(gram.dtype).tiny
        ratio = own.mean(-1, keepdim=True) / behind.mean(-1, keepdim=True).clamp(min=least)
        factors = [torch.ones_like(own), (WEIGHT * ratio.sqrt()).expand_as(behind)]
        return torch.cat(factors, dim=-1)[..., None, :]


def inverse_of(gram: Tensor, penalty: float) -> Tensor:
    """Invert positive semidefinite matrices (…, D, D) with the penalty on their diagonal."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    # The constant keeps the matrix of an image without any colour or texture invertible.
    least = penalty * mean + 1e-6
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    most = gram.shape[-1] * mean + least  # no eigenvalue is larger
    matrix = gram + least * eye
    inverse = 2 / (most + least) * eye
    condition = 1 + gram.shape[-1] / penalty
    rounds = math.ceil(math.log2(max(-math.log(PRECISION) * (condition + 1) / 2, 2)))
    for _ in range(rounds):
        inverse = inverse @ (2 * eye - matrix @ inverse)
    return inverse


def _differences(x: Tensor) -> Tensor:
    """Subtract from values (B, K, h, w) their mean over 3×3 cells, with ends replicated."""
    return x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def _blocks(x: Tensor, side: int = STEP) -> Tensor:
    """Cut a map into blocks, padded with 0: (B, K, h, w) -> (B, down, across, K, side²)."""
    for axis in (2, 3):
        cells = x.shape[axis]
        blocks = torch.sym_max((cells + side - 1) // side, 2)
        places = torch.arange(blocks * side, device=x.device)
        inside = (places < cells).to(x.dtype).view(-1, *(1 for _ in range(3 - axis)))
        x = x.index_select(axis, places.clamp(max=cells - 1)) * inside
        x = x.unflatten(axis, (blocks, side)) if axis == 3 else x
    x = x.unflatten(2, (-1, side))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(4, 5)


def _windows(x: Tensor) -> Tensor:
    """Sum over the 2 × 2 blocks of each window, (B, n + 1, m + 1, …) -> (B, n, m, …)."""
    x = x[:, :-1] + x[:, 1:]
    return x[:, :, :-1] + x[:, :, 1:]


def _blend(matrix: Tensor, lacking: Tensor, grid: tuple[int, int]) -> Tensor:
    """Apply the linear maps of the one to four windows around every finer cell, and blend them.

    Args:
        matrix: (B, n, m, C, D), the linear map of each window.
        lacking: (B, D, 2h, 2w), its input; see :meth:`Regression.forward`.
        grid: (h, w).

    Returns:
        (B, C, 2h, 2w).
    """
    down, across = matrix.shape[1:3]
    device = matrix.device
    # Block b lies between the centres of the windows b − 1 and b.
    rows, columns = (_neighbours(count, device) for count in (down, across))
    matrix = axes.read(axes.read(matrix, 2, columns), 1, rows)  # (B, n + 1, 2, m + 1, 2, C, D)
    matrix = matrix.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)  # (B, n + 1, m + 1, C, 4·D)
    below, beside = (_shares(count, device) for count in (down, across))  # (blocks, 2, 2·STEP)
    shares = below[:, None, :, None, :, None] * beside[None, :, None, :, None, :]
    shares = shares.flatten(4).flatten(2, 3)  # (n + 1, m + 1, 4, 4·STEP²)
    values = _blocks(lacking, side=2 * STEP)  # (B, n + 1, m + 1, D, 4·STEP²)
    values = (shares[:, :, :, None].to(values.dtype) * values[:, :, :, None]).flatten(3, 4)
    out = (matrix @ values).unflatten(4, (2 * STEP, 2 * STEP))  # (B, n + 1, m + 1, C, 32, 32)
    out = out.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return out[:, :, : 2 * grid[0], : 2 * grid[1]]


def _neighbours(count: int, device: torch.device) -> Tensor:
    """Return the indices of the windows to either side of every block, (count + 1, 2)."""
    block = torch.arange(count + 1, device=device)
    return torch.stack([(block - 1).clamp(min=0), block.clamp(max=count - 1)], dim=1)


def _shares(count: int, device: torch.device) -> Tensor:
    """Return the weights of the two windows at the finer cells of every block.

    From one window's centre (t = 0) to the next (t = 1), the latter's weight is 3t² − 2t³. Beyond
    the outermost centres, the nearest window has weight 1.

    Returns:
        (count + 1, 2, 2·STEP), in [0, 1].
    """
    side = 2 * STEP
    block = torch.arange(count + 1, device=device)[:, None]
    along = (torch.arange(side, device=device) + 0.5) / side
    along = torch.where(block == 0, 1.0, torch.where(block == count, 0.0, along))
    after = along * along * (3 - 2 * along)
    # Block 0 uses the window after it only, the last block the window before it only.
    return torch.stack([1 - after, after], dim=1)
