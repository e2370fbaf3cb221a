"""Losses that ask high-resolution features to explain a backbone's views (FeatUp, section 3).

The main term is a Gaussian likelihood whose width the model predicts from the backbone's own
features, so that cells which disagree between views for reasons of their own count less. The others
keep magnitudes smooth and plausible, and neighbours of one colour alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from upfeat.bounds import number
from upfeat.downsamplers import gaussian_blur
from upfeat.warp import check_map

# Weights of the published recipes, beside a reconstruction term of weight 1.
JBU_CRF_WEIGHT = 1e-3
JBU_TOTAL_VARIATION_WEIGHT = 0.0
IMPLICIT_MAGNITUDE_WEIGHT = 1e-3
IMPLICIT_MAGNITUDE_VARIATION_WEIGHT = 0.05
IMPLICIT_BLUR_PIN_WEIGHT = 0.1
JBU_PROJECTION_DIM = 30


class SpatialUncertainty(nn.Module):
    """The likelihood's standard deviation at each cell, from the backbone's features there.

    s = max(exp(conv1×1(features) + 0.1), 1e-4). The convolution starts at a tenth of its usual
    size, so s starts near 1.1 everywhere.
    """

    def __init__(self, embed_dim: int, *, generator: torch.Generator | None = None) -> None:
        """Draw the initial values.

        Args:
            embed_dim: channels C of the features.
            generator: source of the initial values; the global one by default.

        Raises:
            ValueError: ``embed_dim`` below 1.
        """
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, got {embed_dim}")
        self.embed_dim = embed_dim
        bound = 0.1 / math.sqrt(embed_dim)
        self.weight = nn.Parameter(torch.empty(1, embed_dim, 1, 1))
        self.bias = nn.Parameter(torch.empty(1))
        with torch.no_grad():
            self.weight.uniform_(-bound, bound, generator=generator)
            self.bias.uniform_(-bound, bound, generator=generator)

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

    mean of (predicted - target)² / (2 scale²) + log scale over maps, cells and channels; for a free
    scale it is least where the scale is the residual's root mean square.

    Args:
        predicted: (B, C, h, w) warped and downsampled features.
        target: (B, C, h, w) the backbone's features of the view.
        scale: (B, 1, h, w) standard deviations (or any shape that spreads over the target), > 0.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes that do not fit together.
    """
    for name, value in (("predicted", predicted), ("target", target), ("scale", scale)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is of type {type(value).__name__}; give a tensor")
    _check_same("predicted", predicted, "target", target)
    try:
        scale.expand_as(target)  # torch.broadcast_shapes would import SymPy, a second's work
    except RuntimeError:
        raise ValueError(
            f"scale must spread over target {tuple(target.shape)}, got {tuple(scale.shape)}"
        ) from None
    squared = (predicted - target).square()
    return (squared / (2 * scale.square()) + scale.log()).mean()


def total_variation(x: Tensor) -> Tensor:
    """Return the squared differences of neighbours, vertical and horizontal, per element of x.

    Args:
        x: (B, C, H, W).

    Returns:
        A scalar; zero for constant maps.

    Raises:
        ValueError: these are no maps.
    """
    check_map("x", x)
    vertical = (x[..., 1:, :] - x[..., :-1, :]).square().sum()
    horizontal = (x[..., :, 1:] - x[..., :, :-1]).square().sum()
    return (vertical + horizontal) / x.numel()


def magnitude(x: Tensor) -> Tensor:
    """Return the Euclidean length over channels: (B, C, H, W) -> (B, 1, H, W).

    Its gradient at a zero vector is zero.

    Raises:
        ValueError: these are no maps.
    """
    check_map("x", x)
    return torch.linalg.vector_norm(x, dim=1, keepdim=True)


def magnitude_consistency(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of a magnitude map and the magnitude of the target.

    Args:
        predicted: (B, 1, h, w) a magnitude map brought to the grid, as the published term takes it
            (warp and downsample ``magnitude(features)``); or (B, C, h, w) downsampled features,
            whose magnitude is then taken here.
        target: (B, C, h, w) the backbone's features of the view.

    Returns:
        A scalar.
    """
    check_map("predicted", predicted)
    if predicted.shape[1] != 1:
        predicted = magnitude(predicted)
    length = magnitude(target)
    _check_same("predicted magnitude", predicted, "target magnitude", length)
    return (predicted - length).square().mean()


def magnitude_variation(features: Tensor) -> Tensor:
    """Return the total variation of the magnitude map of features (B, C, H, W); a scalar."""
    return total_variation(magnitude(features))


def blur_pin(features: Tensor) -> Tensor:
    """Return the mean squared difference of features and their 5×5, sigma 1 Gaussian blur.

    It holds down detail finer than the image supports: (B, C, H, W) -> scalar.
    """
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
    """Return a pairwise term that pulls together features of pixels alike in place and colour.

    Over all pairs of ``n_points`` random pixels, the mean of |features_i - features_j|² times

        w1 exp(-d²/(2 alpha) - c²/(2 beta)) + w2 exp(-d²/(2 gamma)) - shift,

    with d the distance in units of the image's longer side and c the distance of the colours.
    Features and image must show the same frame: both plain, or both warped by one jitter.

    Args:
        features: (B, C, H, W).
        image: (B, 3, H, W), normalised, in the frame of the features.
        n_points: pixels drawn, with replacement, the same for the whole batch.
        alpha: variance of place in the first kernel.
        beta: variance of colour in the first kernel.
        gamma: variance of place in the second kernel.
        w1: weight of the first kernel.
        w2: weight of the second kernel.
        shift: subtracted from the kernels; pushes apart pairs that are alike in neither.
        generator: source of the points; the global one by default.

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
    if n_points < 1:
        raise ValueError(f"n_points must be at least 1, got {n_points}")
    height, width = image.shape[-2:]
    device = generator.device if generator is not None else None
    y, x = (
        torch.randint(n, (n_points,), generator=generator, device=device).to(image.device)
        for n in (height, width)
    )
    place = torch.stack([y, x], dim=-1).to(image.dtype) / max(height, width)  # (P, 2)
    colour = _at(image, y * width + x)  # (B, P, 3)
    # Both variances are taken into the coordinates, so that one distance holds place and colour.
    both = [place.expand(len(image), -1, -1) / alpha**0.5, colour / beta**0.5]
    near = torch.exp(_squared_distances(place) / (-2 * gamma))  # (P, P)
    kernel = torch.exp(_squared_distances(torch.cat(both, dim=-1)) * -0.5)  # (B, P, P)
    kernel = torch.add(w2 * near - shift, kernel, alpha=w1)
    points = _at(features, y * width + x)  # (B, P, C)
    # The sum of kernel · |f_i - f_j|² is twice f' L f with L the kernel's graph Laplacian. It does
    # not change when all f move together; measured from one of them, nothing large cancels.
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
    """Return ``n`` random directions in feature space, to compare features by (section 3.3).

    Args:
        embed_dim: channels C of the features.
        n: how many directions.
        generator: source of randomness; the global one by default.
        dtype: floating type of the result.
        device: where to put it.

    Returns:
        (embed_dim, n), columns of length 1. Its transpose is the weight of a 1×1 convolution.

    Raises:
        ValueError: a count below 1.
    """
    if embed_dim < 1 or n < 1:
        raise ValueError(f"embed_dim and n must be at least 1, got {embed_dim} and {n}")
    source = generator.device if generator is not None else device
    draw = torch.randn(embed_dim, n, generator=generator, dtype=dtype, device=source)
    return functional.normalize(draw, dim=0).to(device or draw.device)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """The vectors at P pixels, numbered row by row: (B, C, H, W) -> (B, P, C)."""
    return x.flatten(2).index_select(2, index).mT


def _squared_distances(points: Tensor) -> Tensor:
    """Squared distances of all pairs, by one product: (…, P, D) -> (…, P, P)."""
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
