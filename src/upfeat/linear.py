"""Linear algebra of features: ridge regression and principal components, once for all uses."""

from typing import NamedTuple

import torch
from torch import Tensor


def ridge(gram: Tensor, moment: Tensor, penalty: Tensor | float) -> Tensor:
    """Solve a ridge regression from its sums.

    Args:
        gram: (..., M, M), inputs times inputs, X·Xᵀ.
        moment: (..., M, K), inputs times outputs, X·Yᵀ.
        penalty: of squared coefficients, > 0: a number, (..., 1), or one for each input, (..., M).

    Returns:
        (..., M, K), the coefficients W that minimise |Wᵀ·X − Y|² + penalty·|W|².
    """
    matrix = gram.clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(penalty)
    return torch.cholesky_solve(moment, torch.linalg.cholesky(matrix))


class Components(NamedTuple):
    """Principal components of samples."""

    mean: Tensor
    """(C,)."""
    axes: Tensor
    """(k, C), orthonormal, most variance first."""
    variances: Tensor
    """(k,), along the axes, never negative."""


def principal_components(samples: Tensor, k: int) -> Components:
    """Fit principal components.

    Args:
        samples: (N, C).
        k: number of components, at most C.
    """
    mean = samples.mean(0)
    centred = samples - mean
    return Components(mean, *leading_axes(centred.T @ centred / len(samples), k))


def leading_axes(covariance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of most variance, (k, C), and their variances, (k,), largest first.

    Args:
        covariance: (C, C), symmetric.
        k: number of axes; all where there are fewer.
    """
    variances, axes = torch.linalg.eigh(covariance)  # ascending
    return axes[:, -k:].flip(1).T, variances[-k:].flip(0).clamp(min=0)
