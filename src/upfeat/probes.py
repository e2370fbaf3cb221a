"""Linear probes: fitted on sampled pixels, applied before upsampling.

An upsampler computes up(F) = K(g)·M(F) + o, with kernels K(g) of the guidance g, channel mix M and
offset o. A head with weight W and bias b then gives W·up(F) + b = K(g)·(W·M(F)) + W·o + b: the K
outputs of the head are upsampled instead of C channels, with the same result. The bias is added
last, because the weights K(g) of a JBU stack need not sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.bounds import instance, whole
from upfeat.linear import ridge
from upfeat.optimisers import LBFGS
from upfeat.randomness import device_of
from upfeat.types import shapes_repr
from upfeat.upsamplers.checks import check_output_size

__all__ = [
    "LinearProbe",
    "Pixels",
    "draw_pixels",
    "fit_classifier",
    "fit_depth",
    "fit_normals",
    "read_cells",
    "read_pixels",
]

L2_GRID = (1e-1, 1e-2, 1e-3, 1e-4)
"""L2 penalties to try, strongest first, relative to the mean loss on standardised features."""

HELD_OUT = 0.2
"""Fraction of the training images that are held out to choose the penalty."""

_MAX_ITERATIONS = 60


Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Function from outputs (N·P, K) and targets (N, P) to the mean loss and its gradient."""


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Linear head fitted to features, with weight (K, C) and bias (K,).

    Upsamplers apply a head as a :class:`upfeat.upsamplers.head.Head`.
    """

    weight: Tensor
    bias: Tensor

    __repr__ = shapes_repr

    def __call__(self, features: Tensor) -> Tensor:
        """Apply the head to features: (N, C) -> (N, K)."""
        return features @ self.weight.T + self.bias

    @staticmethod
    def cat(heads: Sequence[LinearProbe]) -> LinearProbe:
        """Combine heads into one head with the outputs of all."""
        return LinearProbe(
            torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
        )


@dataclass(frozen=True, eq=False)
class Pixels:
    """Features and targets of pixels drawn from N images, P from each.

    Attributes:
        features: features of the pixels, (N, P, C), float32.
        targets: class indices or depths of the pixels, (N, P), or their normals, (N, P, 3).
    """

    features: Tensor
    targets: Tensor

    __repr__ = shapes_repr

    def __getitem__(self, images: Tensor) -> Pixels:
        return Pixels(self.features[images], self.targets[images])


def draw_pixels(usable: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw pixels with replacement.

    Args:
        usable: (H, W) bool, true for the pixels to draw from; at least one is true.
        count: number of pixels to draw.
        generator: source of randomness.

    Returns:
        Row-major indices of the pixels, (count,).

    Raises:
        TypeError: ``usable`` is not a tensor, or ``generator`` not a generator.
        ValueError: no pixel is usable, ``usable`` is not (H, W) bool, or ``count`` no whole number.
    """
    instance("usable", usable, Tensor, "give a tensor")
    if usable.dim() != 2 or usable.dtype != torch.bool:
        raise ValueError(
            f"usable is {usable.dtype} {tuple(usable.shape)}; give (H, W) bool, as label != 255"
        )
    count = whole("count", count, 0)
    device_of(generator)
    places = usable.flatten().nonzero()[:, 0]
    if not len(places):
        raise ValueError("no pixel is usable, so none can be drawn; leave such images out")
    return places[torch.randint(len(places), (count,), generator=generator)]


def read_pixels(upsampled: Tensor, places: Tensor) -> Tensor:
    """Read features (C, H, W) at pixels given by row-major indices (P,): (P, C).

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an argument has another shape, or ``places`` are not whole numbers.
    """
    _check_reading("upsampled", upsampled, places)
    return upsampled.flatten(1)[:, places].T


def read_cells(features: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Read coarse features at pixels: each pixel gets the features of its cell.

    Args:
        features: (C, h, w), coarse features.
        places: row-major indices of pixels, (P,).
        size: (height, width) of the image, in pixels.

    Returns:
        (P, C).

    Raises:
        TypeError: ``features`` or ``places`` is not a tensor.
        ValueError: an argument has another shape, or ``places`` are not whole numbers.
    """
    _check_reading("features", features, places)
    size = check_output_size(size, "size")
    height, width = features.shape[1:]
    rows = (2 * (places // size[1]) + 1) * height // (2 * size[0])
    columns = (2 * (places % size[1]) + 1) * width // (2 * size[1])
    return features.flatten(1)[:, rows * width + columns].T


@torch.inference_mode(False)
def fit_classifier(pixels: Pixels, n_classes: int, generator: torch.Generator) -> LinearProbe:
    """Fit multinomial logistic regression; choose its L2 penalty on held-out images.

    Args:
        pixels: pixels of the training images; the targets are class indices, without ignored ones.
        n_classes: number K of classes.
        generator: source of randomness for the choice of held-out images.

    Returns:
        A head from raw (not standardised) features to K logits.

    Raises:
        TypeError: ``pixels`` are no :class:`Pixels`, or ``generator`` is no generator.
        ValueError: the shapes do not match, features are not finite, or a target is not one of the
            K classes.
    """
    n_classes = whole("n_classes", n_classes)
    pixels = _checked(pixels, generator)
    lowest, highest = (float(value) for value in pixels.targets.aminmax())
    if lowest < 0 or highest >= n_classes or bool((pixels.targets != pixels.targets.long()).any()):
        raise ValueError(
            f"targets are from {lowest:g} to {highest:g}; give classes 0 to {n_classes - 1}, "
            "whole numbers"
        )

    def loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # The explicit gradient is three times as fast as cross_entropy and backward() for few
        # classes.
        right = targets.flatten().long()[:, None]
        scale = logits.logsumexp(1, keepdim=True)
        value = (scale - logits.gather(1, right)).mean()
        gradient = (logits - scale).exp_()
        gradient.scatter_add_(1, right, gradient.new_full((1, 1), -1.0).expand_as(right))
        return value, gradient.div_(len(right))

    features = pixels.features
    start = LinearProbe(
        features.new_zeros(n_classes, features.shape[2]), features.new_zeros(n_classes)
    )
    return _fit(pixels, start, loss, generator)


@torch.inference_mode(False)
def fit_depth(pixels: Pixels, generator: torch.Generator) -> LinearProbe:
    """Fit a linear map from features to depth, up to a scale and a shift of every image.

    The loss of an image is 1 − ρ, where ρ is the correlation of prediction and depth over its
    pixels: the squared error after the best scale and shift depends on ρ alone. The optimisation
    starts from ridge regression on depths that are standardised per image.

    Args:
        pixels: pixels of the training images; the targets are depths.
        generator: source of randomness for the choice of held-out images.

    Returns:
        A head with one output, whose scale and shift are arbitrary.

    Raises:
        TypeError: ``pixels`` are no :class:`Pixels`, or ``generator`` is no generator.
        ValueError: the shapes do not match, or features or depths are not finite.
    """
    pixels = _checked(pixels, generator)
    targets = _standardised_rows(pixels.targets.to(pixels.features))
    pixels = Pixels(pixels.features, targets)

    def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            rows = _standardised_rows(outputs.view(targets.shape))
            value = 1 - (rows * targets).mean()
            (gradient,) = torch.autograd.grad(value, outputs)
        return value.detach(), gradient

    flat = pixels.features.flatten(0, 1)
    scaled = (flat - flat.mean(0)) / _deviation(flat, 1)
    moment = scaled.T @ targets.flatten()[:, None]
    weight = ridge(scaled.T @ scaled / len(scaled), moment / len(scaled), 1e-3).T  # (1, C)
    return _fit(pixels, LinearProbe(weight, weight.new_zeros(1)), loss, generator)


@torch.inference_mode(False)
def fit_normals(pixels: Pixels, generator: torch.Generator) -> LinearProbe:
    """Fit a linear map from features to surface normals; outputs of any length are directions.

    The loss is 1 − cos of the angle between output and normal. The optimisation starts from ridge
    regression.

    Args:
        pixels: pixels of the training images; the targets are unit vectors, (N, P, 3).
        generator: source of randomness for the choice of held-out images.

    Returns:
        A head with three outputs.

    Raises:
        TypeError: ``pixels`` are no :class:`Pixels`, or ``generator`` is no generator.
        ValueError: the shapes do not match, or features or normals are not finite.
    """
    pixels = _checked(pixels, generator, 3)
    pixels = Pixels(pixels.features, pixels.targets.to(pixels.features))

    def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            cosine = F.cosine_similarity(outputs, targets.flatten(0, 1), dim=1)
            value = 1 - cosine.mean()
            (gradient,) = torch.autograd.grad(value, outputs)
        return value.detach(), gradient

    flat, targets = pixels.features.flatten(0, 1), pixels.targets.flatten(0, 1)
    scaled = (flat - flat.mean(0)) / _deviation(flat, 1)
    moment = scaled.T @ (targets - targets.mean(0))
    weight = ridge(scaled.T @ scaled / len(scaled), moment / len(scaled), 1e-3).T  # (3, C)
    return _fit(pixels, LinearProbe(weight, targets.mean(0)), loss, generator)


def _check_reading(label: str, maps: Tensor, places: Tensor) -> None:
    """Check that a map is of one image, (C, H, W), and places are indices, (P,)."""
    instance(label, maps, Tensor, "give a tensor")
    instance("places", places, Tensor, "give a tensor")
    if maps.dim() != 3:
        fix = f"; give {label}[0]" if maps.dim() == 4 and len(maps) == 1 else ""
        raise ValueError(f"{label} must be (C, height, width), not {tuple(maps.shape)}{fix}")
    if places.dim() != 1 or places.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"places are {places.dtype} {tuple(places.shape)}; give (P,) row-major indices of "
            "pixels, whole numbers"
        )


def _checked(pixels: Pixels, generator: torch.Generator, *sizes: int) -> Pixels:
    """Check arguments, and return the pixels with features of float32 at least.

    ``sizes`` are those of the axes of a target.
    """
    instance("pixels", pixels, Pixels, "give Pixels(features, targets)")
    device_of(generator)
    for name, given in (("features", pixels.features), ("targets", pixels.targets)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} are of type {type(given).__name__}; give a tensor")
    # Clones of what inference_mode made can be differentiated; others stay as they are.
    features, targets = (
        one.clone() if one.is_inference() else one.detach()
        for one in (pixels.features, pixels.targets)
    )
    shape = (*features.shape[:2], *sizes)
    if features.dim() != 3 or targets.shape != shape or not targets.numel():
        expected = ", ".join(map(str, ("N", "P", *sizes)))
        raise ValueError(
            f"features are {tuple(features.shape)} and targets {tuple(targets.shape)}; give "
            f"(N, P, C) and ({expected}), a pixel of an image at least"
        )
    for name, values in (("features", features), ("targets", targets)):
        if name == "features" and not values.is_floating_point():
            raise ValueError(f"features are {values.dtype}; give floating numbers")
        if values.device != features.device:
            raise ValueError(
                f"features are on {features.device} and targets on {values.device}; move one with "
                ".to()"
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} hold NaN or infinity; leave such pixels out")
    exact = torch.promote_types(features.dtype, torch.float32)
    return Pixels(features.to(exact), targets)


def _deviation(flat: Tensor, correction: int) -> Tensor:
    """Standard deviation of every channel of (N, C), not less than its rounding."""
    least = 1e-6 * flat.abs().amax(0).clamp(min=1e-25)
    return flat.std(0, correction=correction).clamp(min=least)


def _fit(
    pixels: Pixels,
    start: LinearProbe,
    loss: Loss,
    generator: torch.Generator,
) -> LinearProbe:
    """Standardise features, choose the penalty on held-out images, and fit again on all images."""
    flat = pixels.features.flatten(0, 1)
    mean, deviation = flat.mean(0), _deviation(flat, 0)
    scaled = Pixels((pixels.features - mean) / deviation, pixels.targets)
    n_images = len(pixels.features)
    order = torch.randperm(n_images, generator=generator)
    n_held_out = round(n_images * HELD_OUT)
    best, chosen = (start, L2_GRID[-2])
    if n_held_out:
        held_out, fitted = scaled[order[:n_held_out]], scaled[order[n_held_out:]]
        lowest = torch.inf
        head = start
        for penalty in L2_GRID:
            head = _minimise(head, fitted, loss, penalty)
            value = float(loss(head(held_out.features.flatten(0, 1)), held_out.targets)[0])
            if value >= lowest:
                break
            lowest, best, chosen = value, head, penalty
    head = _minimise(best, scaled, loss, chosen)
    weight = head.weight / deviation
    return LinearProbe(weight, head.bias - weight @ mean)


def _minimise(start: LinearProbe, pixels: Pixels, loss: Loss, penalty: float) -> LinearProbe:
    weight, bias = start.weight.clone().requires_grad_(), start.bias.clone().requires_grad_()
    flat = pixels.features.flatten(0, 1)  # (N·P, C)
    optimiser = LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        value, gradient = loss(LinearProbe(weight, bias)(flat), pixels.targets)
        weight.grad = gradient.T @ flat + penalty * weight
        bias.grad = gradient.sum(0)
        return value + penalty / 2 * weight.square().sum()

    optimiser.step(closure)
    return LinearProbe(weight.detach(), bias.detach())


def _standardised_rows(values: Tensor) -> Tensor:
    """Shift and scale every row of (N, P) to mean 0 and mean square 1."""
    centred = values - values.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).clamp(min=1e-12).sqrt()
