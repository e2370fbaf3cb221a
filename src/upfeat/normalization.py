"""Normalisation of an image's colours, and conversion from one to another."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from torch import Tensor

Colour = tuple[float, ...]
"""A value for each of red, green and blue, or for each band."""


class Normalization(NamedTuple):
    """Colours in [0, 1] less ``mean``, over ``std``."""

    mean: Colour
    std: Colour

    def apply(self, pixels: Tensor) -> Tensor:
        """Normalise colours: (…, 3, H, W) in [0, 1] -> the same shape."""
        mean, std = self._tensors(pixels)
        return (pixels - mean) / std

    def undo(self, x: Tensor) -> Tensor:
        """Recover colours: (…, 3, H, W) normalised -> the same shape, in [0, 1]."""
        mean, std = self._tensors(x)
        return x * std + mean

    def convert(self, x: Tensor, target: Normalization) -> Tensor:
        """Bring an image from this normalisation into another.

        Args:
            x: (…, 3, H, W), normalised by this one.
            target: the normalisation wanted.

        Returns:
            ``x`` itself where both agree; otherwise the same shape and dtype.
        """
        if self == target:
            return x
        scale = [own / other for own, other in zip(self.std, target.std, strict=True)]
        gaps = [own - other for own, other in zip(self.mean, target.mean, strict=True)]
        shift = [gap / std for gap, std in zip(gaps, target.std, strict=True)]
        exact = x.float() if x.dtype.itemsize < 4 else x
        factor, constant = (exact.new_tensor(one)[:, None, None] for one in (scale, shift))
        return (exact * factor + constant).to(x.dtype)

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (like.new_tensor(values)[:, None, None] for values in self)
        return mean, std


class Normalized(Protocol):
    """Whatever takes normalised images and says how, as backbones do."""

    @property
    def normalization(self) -> Normalization:
        """The normalisation of its images."""
        ...


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of the photographs of ImageNet, which most backbones are trained with."""
HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Colours from −1 to 1."""


STD_BOUNDS = (1e-6, 1e6)
"""Standard deviations that images can have: a colour over a smaller one leaves float32."""


def check_normalization(mean: object, std: object, channels: int = 3) -> Normalization:
    """Check a mean and a standard deviation.

    Args:
        mean: 3 numbers, RGB in [0, 1]; or as many as there are channels.
        std: likewise, from 1e-6 to 1e6.
        channels: of the images.

    Raises:
        ValueError: they are not.
    """
    means, stds = _numbers(mean, channels), _numbers(std, channels)
    if means is None or stds is None or min(stds) <= 0:
        raise ValueError(
            f"mean={mean!r} and std={std!r} must be {channels} values each, std above 0"
        )
    low, high = STD_BOUNDS
    if not all(low <= one <= high for one in stds) or max(map(abs, means)) > high:
        raise ValueError(
            f"mean={mean!r} and std={std!r} are beyond any image; give std from {low:g} to "
            f"{high:g} and mean from {-high:g} to {high:g}, in units of the images in [0, 1]"
        )
    return Normalization(means, stds)


def _numbers(values: object, count: int) -> Colour | None:
    """So many finite numbers, or ``None`` where they are not."""
    if not isinstance(values, Iterable):
        return None
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None
