"""Linear probes: fitted on sampled pixels, applied before upsampling.

up(F) = K(g)·M(F) + o, so a linear head gives W·up(F) + b = K(g)·(W·M(F)) + W·o + b: K channels are
upsampled, not C, and the result is the same. The bias is added last, because the weights K(g) of a
JBU stack need not sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upfeat.linear import ridge
from upfeat.optimisers import LBFGS

L2_GRID = (1e-1, 1e-2, 1e-3, 1e-4)
"""Penalties tried, strongest first, on standardised features beside the mean loss."""

HELD_OUT = 0.2
"""Share of the training images on which the penalty is chosen."""

_MAX_ITERATIONS = 60


Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Outputs (N·P, K) and targets (N, P) to the mean loss and its gradient by the outputs."""


@dataclass(frozen=True)
class LinearProbe:
    """A fitted linear map of features: (K, C) weight, (K,) bias.

    Upsamplers apply it as a :class:`upfeat.upsamplers.head.Head`.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(N, C) -> (N, K)."""
        return features @ self.weight.T + self.bias

    @staticmethod
    def cat(heads: Sequence[LinearProbe]) -> LinearProbe:
        """Stack heads over their outputs."""
        return LinearProbe(
            torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])
        )


@dataclass(frozen=True)
class Pixels:
    """Features and targets of pixels drawn from N images, P from each.

    Attributes:
        features: (N, P, C) float32.
        targets: (N, P) class indices or depths.
    """

    features: Tensor
    targets: Tensor

    def __getitem__(self, images: Tensor) -> Pixels:
        return Pixels(self.features[images], self.targets[images])


def draw_pixels(usable: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw pixels with replacement.

    Args:
        usable: (H, W) bool, at least one True.
        count: how many.
        generator: source of randomness.

    Returns:
        (count,) flat indices.

    Raises:
        ValueError: no pixel is usable.
    """
    places = usable.flatten().nonzero()[:, 0]
    if not len(places):
        raise ValueError("no pixel is usable, so none can be drawn; leave such images out")
    return places[torch.randint(len(places), (count,), generator=generator)]


def read_pixels(upsampled: Tensor, places: Tensor) -> Tensor:
    """Features (C, H, W) at flat indices (P,) -> (P, C)."""
    return upsampled.flatten(1)[:, places].T


def read_cells(features: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Coarse features (C, h, w) of the cells that pixels (P,) of an image lie in -> (P, C)."""
    height, width = features.shape[1:]
    rows = (2 * (places // size[1]) + 1) * height // (2 * size[0])
    columns = (2 * (places % size[1]) + 1) * width // (2 * size[1])
    return features.flatten(1)[:, rows * width + columns].T


def fit_classifier(pixels: Pixels, n_classes: int, generator: torch.Generator) -> LinearProbe:
    """Fit multinomial logistic regression; choose its L2 penalty on held-out images.

    Args:
        pixels: of the training images, targets class indices, none ignored.
        n_classes: number K of classes.
        generator: draws the held-out images.

    Returns:
        K outputs: logits, on raw (not standardised) features.

    Raises:
        ValueError: shapes do not fit, features are not finite, or a target is no class.
    """
    _check(pixels)
    lowest, highest = (int(value) for value in pixels.targets.aminmax())
    if lowest < 0 or highest >= n_classes:
        raise ValueError(
            f"targets are from {lowest} to {highest}; give classes 0 to {n_classes - 1}"
        )

    def loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # By hand: for a few classes, three times as fast as cross_entropy and its backward.
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


def fit_depth(pixels: Pixels, generator: torch.Generator) -> LinearProbe:
    """Fit a linear map to depth up to a scale and a shift of every image.

    The loss of an image is 1 − ρ, ρ the correlation of prediction and depth over its pixels: what
    remains of the squared error after the best scale and shift depends on ρ alone. It starts from
    ridge regression on depths standardised per image.

    Args:
        pixels: of the training images, targets depths.
        generator: draws the held-out images.

    Returns:
        One output; its scale and shift mean nothing.

    Raises:
        ValueError: shapes do not fit, or features or depths are not finite.
    """
    _check(pixels)
    targets = _standardised_rows(pixels.targets.float())
    pixels = Pixels(pixels.features, targets)

    def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            rows = _standardised_rows(outputs.view(targets.shape))
            value = 1 - (rows * targets).mean()
            (gradient,) = torch.autograd.grad(value, outputs)
        return value.detach(), gradient

    flat = pixels.features.flatten(0, 1)
    scaled = (flat - flat.mean(0)) / flat.std(0).clamp(min=1e-6)
    moment = scaled.T @ targets.flatten()[:, None]
    weight = ridge(scaled.T @ scaled / len(scaled), moment / len(scaled), 1e-3).T  # (1, C)
    return _fit(pixels, LinearProbe(weight, weight.new_zeros(1)), loss, generator)


def _check(pixels: Pixels) -> None:
    features, targets = pixels.features, pixels.targets
    if features.dim() != 3 or targets.shape != features.shape[:2] or not targets.numel():
        raise ValueError(
            f"features are {tuple(features.shape)} and targets {tuple(targets.shape)}; give "
            "(N, P, C) and (N, P), a pixel of an image at least"
        )
    for name, values in (("features", features), ("targets", targets)):
        if name == "features" and not values.is_floating_point():
            raise ValueError(f"features are {values.dtype}; give floating numbers")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} hold NaN or infinity; leave such pixels out")


def _fit(
    pixels: Pixels,
    start: LinearProbe,
    loss: Loss,
    generator: torch.Generator,
) -> LinearProbe:
    """Standardise, choose the penalty on held-out images, fit again on all of them."""
    flat = pixels.features.flatten(0, 1)
    mean, deviation = flat.mean(0), flat.std(0, correction=0).clamp(min=1e-6)
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
    """(N, P) -> the same with mean 0 and mean square 1 in every row."""
    centred = values - values.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).clamp(min=1e-12).sqrt()
