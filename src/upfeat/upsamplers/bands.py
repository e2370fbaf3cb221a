"""Guidance that is not RGB: any number of bands, of any units, on one footing.

The rule. Three bands are taken as they are: the normalised RGB image, or three that the caller
chose. Of any other number, each image's bands are brought to mean 0, and decorrelated: bands that
show the same thing count once, however many they are, and what one band alone shows counts as much
as the rest. Offset, gain and order of the bands play no part.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 0.1
"""Variance, over the bands' mean one, below which a direction is mostly noise."""


def even_bands(guidance: Tensor) -> Tensor:
    """Decorrelate the bands of every image, unless they are three.

    Each band is standardised over the image, then all are multiplied by (Σ + εI)^(−½), Σ their
    correlations; the sum of variances becomes 3, that of a normalised RGB image.

    Args:
        guidance: (B, N, H, W), any units; a band that is constant says nothing and becomes 0.

    Returns:
        (B, N, H, W); ``guidance`` itself where N is 3.
    """
    if guidance.shape[1] == 3:
        return guidance
    standard = _standardise(guidance)
    with torch.no_grad():
        values, vectors = _spectrum(standard)
        least = _FLOOR * values.mean(1, keepdim=True).clamp(min=1e-6)
        kept = (values / (values + least)).sum(1).clamp(min=1e-6)  # (B,): directions that count
        scale = (3 / kept)[:, None].sqrt() * (values + least).rsqrt()
        matrix = (vectors * scale[:, None]) @ vectors.mT  # (B, N, N)
    return _apply(matrix, standard)


def three_bands(guidance: Tensor) -> Tensor:
    """Make three bands of any number, for what takes RGB alone.

    One band is repeated. Of others, it is their three principal components, as
    :func:`even_bands` scales them, each with the sign that makes it go with most of the bands.

    Args:
        guidance: (B, N, H, W), any units.

    Returns:
        (B, 3, H, W); ``guidance`` itself where N is 3.
    """
    if guidance.shape[1] == 3:
        return guidance
    standard = _standardise(guidance)
    if guidance.shape[1] == 1:
        return standard.expand(-1, 3, -1, -1)
    with torch.no_grad():
        values, vectors = _spectrum(standard)
        values, vectors = values[:, -3:].flip(1), vectors[..., -3:].flip(2)
        least = _FLOOR * values.mean(1, keepdim=True).clamp(min=1e-6)
        sign = torch.where(vectors.sum(1, keepdim=True) < 0, -1, 1)
        matrix = (vectors * sign * (values + least).rsqrt()[:, None]).mT  # (B, up to 3, N)
    out = _apply(matrix, standard)
    missing = out.new_zeros(out.shape[0], 3 - out.shape[1], *out.shape[2:])
    return torch.cat([out, missing], dim=1)


def _standardise(guidance: Tensor) -> Tensor:
    """Every band of every image to mean 0 and variance 1, a constant one to 0; float32 or more."""
    exact = guidance.to(torch.promote_types(guidance.dtype, torch.float32))
    # By its largest value first, so that no unit overflows or underflows when it is squared.
    largest = exact.abs().amax((2, 3), keepdim=True).clamp(min=torch.finfo(exact.dtype).tiny)
    centred = exact / largest
    centred = centred - centred.mean((2, 3), keepdim=True)
    deviation = centred.square().mean((2, 3), keepdim=True).sqrt()
    # Rounding alone makes a deviation of this size out of a constant.
    varies = deviation > 1e-5
    standard = torch.where(varies, centred / deviation.clamp(min=1e-12), 0)
    return standard.to(guidance.dtype)


def _spectrum(standard: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, least first, and vectors of the correlations, (B, N) and (B, N, N)."""
    with torch.autocast(standard.device.type, enabled=False):
        flat = standard.flatten(2).to(torch.promote_types(standard.dtype, torch.float32))
        return torch.linalg.eigh(flat @ flat.mT / flat.shape[2])


def _apply(matrix: Tensor, bands: Tensor) -> Tensor:
    return (matrix.to(bands.dtype) @ bands.flatten(2)).unflatten(2, bands.shape[2:])
