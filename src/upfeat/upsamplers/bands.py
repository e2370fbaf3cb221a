"""Guidance that is not RGB: any number of bands, in any units, standardised and decorrelated.

Three bands are used unchanged: the normalised RGB image, or three that the caller chose. Any other
number of bands is brought to mean 0 and decorrelated, image by image: bands with the same content
count once, however many they are, and the content of a single band counts as much as theirs.
Offset, gain and order of the bands have no effect.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 0.1
"""Variance, as a fraction of the bands' mean variance, below which a direction is mostly noise."""


def even_bands(guidance: Tensor) -> Tensor:
    """Decorrelate the bands of every image, unless there are three.

    Each band is standardised over the image, then all are multiplied by (Σ + εI)^(−½), where Σ is
    the matrix of their correlations and ε a tenth of its mean eigenvalue. The sum of variances
    becomes 3, as for a normalised RGB image.

    Args:
        guidance: (B, N, H, W), any units; a constant band becomes 0.

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
    """Reduce any number of bands to three, for upsamplers that accept RGB alone.

    A single band is repeated. More than three bands are replaced by their three principal
    components, two by their two and a band of 0. A component is divided by the root of its variance
    plus ε, as in :func:`even_bands`; its sign makes it increase with most bands.

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
    """Scale every band to mean 0 and variance 1, a constant one to 0; in float32 or more."""
    exact = guidance.to(torch.promote_types(guidance.dtype, torch.float32))
    # Divide by the largest value first, so that squares neither overflow nor underflow.
    largest = exact.abs().amax((2, 3), keepdim=True).clamp(min=torch.finfo(exact.dtype).tiny)
    centred = exact / largest
    centred = centred - centred.mean((2, 3), keepdim=True)
    deviation = centred.square().mean((2, 3), keepdim=True).sqrt()
    # Below this bound the deviation of a constant band can be rounding alone.
    varies = deviation > 1e-5
    standard = torch.where(varies, centred / deviation.clamp(min=1e-12), 0)
    return standard.to(guidance.dtype)


def _spectrum(standard: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, N) in ascending order and eigenvectors (B, N, N) of the correlations."""
    with torch.autocast(standard.device.type, enabled=False):
        flat = standard.flatten(2).to(torch.promote_types(standard.dtype, torch.float32))
        return torch.linalg.eigh(flat @ flat.mT / flat.shape[2])


def _apply(matrix: Tensor, bands: Tensor) -> Tensor:
    return (matrix.to(bands.dtype) @ bands.flatten(2)).unflatten(2, bands.shape[2:])
