"""Losses between high-resolution features and a backbone's features of views (FeatUp, section 3).

The main term is the negative log-likelihood of a Gaussian whose standard deviation is predicted
from the backbone's features, so that cells whose features differ between views for other reasons
than resolution count less. The other terms keep magnitudes smooth and close to the backbone's, and
make features of neighbouring pixels of similar colour similar.

Losses of 16-bit maps are computed and returned in float32, since their sums overflow 16 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from upfeat.bounds import number, whole
from upfeat.downsamplers import gaussian_blur
from upfeat.randomness import device_of, draw_uniform
from upfeat.warp import check_map, working_dtype

__all__ = [
    "SpatialUncertainty",
    "blur_pin",
    "crf_pairwise",
    "gaussian_reconstruction",
    "magnitude",
    "magnitude_consistency",
    "magnitude_variation",
    "random_projection",
    "total_variation",
    "unit_of",
]

# Weights of the terms in the published recipes, where the reconstruction term has weight 1.
JBU_CRF_WEIGHT = 1e-3
JBU_TOTAL_VARIATION_WEIGHT = 0.0
IMPLICIT_MAGNITUDE_WEIGHT = 1e-3
IMPLICIT_MAGNITUDE_VARIATION_WEIGHT = 0.05
IMPLICIT_BLUR_PIN_WEIGHT = 0.1
JBU_PROJECTION_DIM = 30

_USUAL = 1 / 16, 16.0
"""Root mean squares of features that are used as they are; initial values, step sizes and the
floor of the uncertainty are meant for them."""


def unit_of(rms: float) -> float:
    """Return the number by which to divide features of a root mean square before losses.

    It is 1 for usual features, else a power of two, division by which is exact.
    """
    if not 0 < rms < math.inf:
        return 1.0
    return 2.0 ** round(math.log2(rms / min(max(rms, _USUAL[0]), _USUAL[1])))


class SpatialUncertainty(nn.Module):
    """Standard deviation s of the likelihood at each cell, predicted from the cell's features.

    s = max(exp(conv1×1(features) + 0.1), 1e-4). The initial weights of the convolution are a tenth
    of PyTorch's default, so that s is initially about 1.1 everywhere.
    """

    def __init__(self, embed_dim: int, *, generator: torch.Generator | None = None) -> None:
        """Draw the initial values.

        Args:
            embed_dim: number of feature channels C.
            generator: source of the initial values; ``None`` for PyTorch's global generator.

        Raises:
            ValueError: ``embed_dim`` is below 1.
        """
        super().__init__()
        self.embed_dim = embed_dim = whole("embed_dim", embed_dim)
        bound = 0.1 / math.sqrt(embed_dim)
        self.weight = nn.Parameter(torch.empty(1, embed_dim, 1, 1))
        self.bias = nn.Parameter(torch.empty(1))
        draw_uniform(self.weight, -bound, bound, generator)
        draw_uniform(self.bias, -bound, bound, generator)

    def forward(self, features: Tensor) -> Tensor:
        """Return the standard deviation at each cell.

        Args:
            features: (B, embed_dim, h, w), the backbone's features of the view.

        Returns:
            (B, 1, h, w), at least 1e-4.
        """
        check_map("features", features)
        if features.shape[1] != self.embed_dim:
            shape = tuple(features.shape)
            raise ValueError(f"features must have shape (B, {self.embed_dim}, h, w), got {shape}")
        weight, bias = self.weight.to(features), self.bias.to(features)
        log_scale = functional.conv2d(features, weight, bias) + 0.1
        return log_scale.exp().clamp(min=1e-4)


def gaussian_reconstruction(predicted: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of a view's features, without its constant.

    The loss is the mean of (predicted - target)² / (2 scale²) + log scale over maps, cells and
    channels. As a function of scale it is least if scale is the root mean square of the residual.

    Args:
        predicted: (B, C, h, w), warped and downsampled features.
        target: (B, C, h, w), the backbone's features of the view.
        scale: (B, 1, h, w), standard deviations > 0, or any shape that broadcasts to the target's.

    Returns:
        A scalar.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: the shapes do not match.
    """
    for name, value in (("predicted", predicted), ("target", target), ("scale", scale)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is of type {type(value).__name__}; give a tensor")
    _check_same("predicted", predicted, "target", target)
    try:
        scale.expand_as(target)  # torch.broadcast_shapes would import SymPy, which takes a second
    except RuntimeError:
        raise ValueError(
            f"scale must spread over target {tuple(target.shape)}, got {tuple(scale.shape)}"
        ) from None
    predicted, target, scale = _wide(predicted), _wide(target), _wide(scale)
    squared = (predicted - target).square()
    return (squared / (2 * scale.square()) + scale.log()).mean()


def total_variation(x: Tensor) -> Tensor:
    """Return the sum of squared differences of neighbouring pixels, divided by the size of x.

    Args:
        x: (B, C, H, W).

    Returns:
        A scalar; 0 for constant maps.

    Raises:
        ValueError: ``x`` is not (B, C, H, W).
    """
    check_map("x", x)
    x = _wide(x)
    vertical = (x[..., 1:, :] - x[..., :-1, :]).square().sum()
    horizontal = (x[..., :, 1:] - x[..., :, :-1]).square().sum()
    return (vertical + horizontal) / x.numel()


def magnitude(x: Tensor) -> Tensor:
    """Return the Euclidean length over channels: (B, C, H, W) -> (B, 1, H, W).

    The gradient at a zero vector is zero.

    Raises:
        ValueError: ``x`` is not (B, C, H, W).
    """
    check_map("x", x)
    return torch.linalg.vector_norm(x, dim=1, keepdim=True)


def magnitude_consistency(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of a magnitude map and the magnitude of the target.

    Args:
        predicted: (B, 1, h, w), ``magnitude(features)`` warped and downsampled, as in the published
            term; or (B, C, h, w), downsampled features, whose magnitude is computed.
        target: (B, C, h, w), the backbone's features of the view.

    Returns:
        A scalar.

    Raises:
        ValueError: an argument is of another shape.
    """
    check_map("predicted", predicted)
    check_map("target", target)
    # The magnitude of a map of magnitudes is the map itself.
    predicted, length = magnitude(_wide(predicted)), magnitude(_wide(target))
    _check_same("predicted magnitude", predicted, "target magnitude", length)
    return (predicted - length).square().mean()


def magnitude_variation(features: Tensor) -> Tensor:
    """Return the total variation of the magnitude map of features (B, C, H, W); a scalar."""
    check_map("features", features)
    return total_variation(magnitude(_wide(features)))


def blur_pin(features: Tensor) -> Tensor:
    """Return the mean squared difference of features and their 5×5, sigma 1 Gaussian blur.

    The term suppresses detail finer than the image supports: (B, C, H, W) -> scalar.
    """
    check_map("features", features)
    features = _wide(features)
    return (gaussian_blur(features) - features).square().mean()


def crf_pairwise(
    features: Tensor,
    image: Tensor,
    *,
    n_points: int = 1000,
    alpha: float = 0.1,
    beta: float = 0.15,
    gamma: float = 0.005,
    w1: float = 10.0,
    w2: float = 3.0,
    shift: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a pairwise term that makes features of pixels of similar position and colour similar.

    The term is the mean, over all pairs of ``n_points`` random pixels, of |features_i -
    features_j|² times

        w1 exp(-d²/(2 alpha) - c²/(2 beta)) + w2 exp(-d²/(2 gamma)) - shift,

    where d is the pixels' distance in units of the image's longer side and c the distance of their
    colours. Features and image must be aligned: both unwarped, or both warped by the same jitter.

    Args:
        features: (B, C, H, W).
        image: (B, 3, H, W), normalised, aligned with the features.
        n_points: number of pixels, drawn with replacement, the same for the whole batch.
        alpha: variance of position in the first kernel.
        beta: variance of colour in the first kernel.
        gamma: variance of position in the second kernel.
        w1: weight of the first kernel.
        w2: weight of the second kernel.
        shift: constant subtracted from the kernels; it drives apart the features of pixels that are
            similar in neither position nor colour.
        generator: source of the points; ``None`` for PyTorch's global generator.

    Returns:
        A scalar. Time and memory grow with B · n_points², not with C · n_points².

    Raises:
        ValueError: features and image differ in batch or size, or a number is out of range.
    """
    check_map("features", features)
    check_map("image", image)
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        number(name, value, 0, above=True)
    for name, value in (("w1", w1), ("w2", w2), ("shift", shift)):
        number(name, value)
    if features.shape[-2:] != image.shape[-2:] or len(features) != len(image):
        raise ValueError(
            f"features {tuple(features.shape)} and image {tuple(image.shape)} must agree in batch "
            "and size; warp both by the same jitter, to one size"
        )
    n_points = whole("n_points", n_points, 1, 1 << 16)
    height, width = image.shape[-2:]
    device = device_of(generator)
    y, x = (
        torch.randint(n, (n_points,), generator=generator, device=device).to(image.device)
        for n in (height, width)
    )
    features, image = _wide(features), _wide(image)
    with torch.autocast(image.device.type, enabled=False):  # squared distances cancel digits
        place = torch.stack([y, x], dim=-1).to(image.dtype) / max(height, width)  # (P, 2)
        colour = _at(image, y * width + x)  # (B, P, 3)
        # Coordinates are divided by their standard deviations: one distance combines both.
        both = [place.expand(len(image), -1, -1) / alpha**0.5, colour / beta**0.5]
        near = torch.exp(_squared_distances(place) / (-2 * gamma))  # (P, P)
        kernel = torch.exp(_squared_distances(torch.cat(both, dim=-1)) * -0.5)  # (B, P, P)
        kernel = torch.add(w2 * near - shift, kernel, alpha=w1)
        points = _at(features, y * width + x)  # (B, P, C)
        # The sum of kernel · |f_i - f_j|² is twice f' L f with L the kernel's graph Laplacian. It
        # does not change if a constant is added to all f; subtracting one of them avoids
        # cancellation.
        points = points.to(torch.promote_types(points.dtype, kernel.dtype))
        points = points - points[:, :1].detach()
        own = (points.square().sum(-1) * kernel.sum(-1)).sum()
        shared = (points * (kernel.to(points.dtype) @ points)).sum()
        return 2 * (own - shared) / (len(features) * n_points**2)


def random_projection(
    embed_dim: int,
    n: int = JBU_PROJECTION_DIM,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return ``n`` random directions of feature space, to compare features along (section 3.3).

    Args:
        embed_dim: number of feature channels C.
        n: number of directions.
        generator: source of randomness; ``None`` for PyTorch's global generator.
        dtype: floating-point type of the result.
        device: device of the result.

    Returns:
        (embed_dim, n), columns of length 1; the transpose can be used as the weight of a 1×1
        convolution.

    Raises:
        ValueError: ``embed_dim`` or ``n`` is below 1.
    """
    embed_dim, n = whole("embed_dim", embed_dim), whole("n", n)
    source = device_of(generator, device)
    draw = torch.randn(embed_dim, n, generator=generator, dtype=dtype, device=source)
    return functional.normalize(draw, dim=0).to(device or draw.device)


def _wide(x: Tensor) -> Tensor:
    """Convert 16-bit tensors to float32."""
    return x.to(working_dtype(x))


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Vectors at P pixels, given by their row-major indices: (B, C, H, W) -> (B, P, C)."""
    return x.flatten(2).index_select(2, index).mT


def _squared_distances(points: Tensor) -> Tensor:
    """Squared distances of all pairs of points, by one matrix product: (…, P, D) -> (…, P, P)."""
    points = points - points.mean(-2, keepdim=True)
    square, one = points.square().sum(-1, keepdim=True), torch.ones_like(points[..., :1])
    left, right = torch.cat([-2 * points, square, one], -1), torch.cat([points, one, square], -1)
    return (left @ right.mT).clamp(min=0)


def _check_same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{name} {tuple(value.shape)} and {other_name} {tuple(other.shape)} must have the same "
            "shape; downsample to the grid of the target"
        )
