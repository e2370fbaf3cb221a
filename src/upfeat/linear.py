"""Linear algebra of features: ridge regression, principal components and unit vectors."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def ridge(gram: Tensor, moment: Tensor, penalty: Tensor | float) -> Tensor:
    """Solve a ridge regression from outputs Y to inputs X, given their products.

    Args:
        gram: (..., M, M), products of inputs, X·Xᵀ.
        moment: (..., M, K), products of inputs and outputs, X·Yᵀ.
        penalty: penalty of the squared coefficients, > 0: a number, (..., 1), or one for each
            input, (..., M).

    Returns:
        (..., M, K), the coefficients W that minimise |Wᵀ·X − Y|² + penalty·|W|².
    """
    matrix = gram.clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(penalty)
    return torch.cholesky_solve(moment, torch.linalg.cholesky(matrix))


class Components(NamedTuple):
    """Principal components of samples."""

    mean: Tensor
    """Mean of the samples, (C,)."""
    axes: Tensor
    """Principal axes, (k, C): orthonormal rows, in descending order of variance."""
    variances: Tensor
    """Variances along the axes, (k,), never negative."""


def principal_components(samples: Tensor, k: int) -> Components:
    """Fit principal components to samples.

    Args:
        samples: N samples of C values, (N, C).
        k: number of components, at most C.
    """
    mean = samples.mean(0)
    centred = samples - mean
    return Components(mean, *leading_axes(centred.T @ centred / len(samples), k))


def leading_axes(covariance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of largest variance, (k, C), and their variances, (k,), in descending order.

    Args:
        covariance: (C, C), symmetric.
        k: number of eigenvectors; if k exceeds C, all C are returned.
    """
    variances, axes = torch.linalg.eigh(covariance)  # ascending
    return axes[:, -k:].flip(1).T, variances[-k:].flip(0).clamp(min=0)


def unit_vectors(vectors: Tensor, dim: int = 1) -> Tensor:
    """Divide vectors along an axis by their lengths, in float32 or more; zeros remain.

    The vectors may have any unit: their largest values are first brought to [0.5, 1) by powers of
    two, so that squares do not underflow and no bound of the lengths has an effect.
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    largest = vectors.detach().abs().amax(dim, keepdim=True)
    exponent = torch.frexp(largest).exponent.clamp(-126, 126)
    # Not ldexp of the vectors: its gradient is wrong in PyTorch 2.13.
    return F.normalize(vectors * torch.ldexp(torch.ones_like(largest), -exponent), dim=dim)
