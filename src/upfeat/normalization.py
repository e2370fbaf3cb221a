"""Normalisation of an image's colours, and conversion between normalisations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from torch import Tensor

from upfeat.bounds import shown

Colour = tuple[float, ...]
"""One value for each of red, green and blue, or for each band."""


class Normalization(NamedTuple):
    """Normalisation (colour − ``mean``) / ``std`` of colours in [0, 1]."""

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
        """Convert an image from this normalisation to another.

        Args:
            x: (…, 3, H, W), image in this normalisation.
            target: normalisation of the result.

        Returns:
            ``x`` itself if the normalisations are equal; otherwise a tensor of its shape and dtype.
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
    """Protocol of objects that require normalised images, such as backbones."""

    @property
    def normalization(self) -> Normalization:
        """Normalisation that images must have."""
        ...


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Normalisation by the statistics of ImageNet, with which most backbones are trained."""
HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Normalisation to colours from −1 to 1."""


STD_BOUNDS = (1e-6, 1e6)
"""Least and largest standard deviation; normalisation by a smaller one could overflow float32."""


def check_normalization(mean: object, std: object, channels: int = 3) -> Normalization:
    """Check a mean and a standard deviation.

    Args:
        mean: one number per channel, for colours in [0, 1]; from -1e6 to 1e6.
        std: one number per channel, from 1e-6 to 1e6.
        channels: number of channels of the images.

    Raises:
        ValueError: the count or range of the numbers is wrong.
    """
    means, stds = _numbers(mean, channels), _numbers(std, channels)
    if means is None or stds is None or min(stds) <= 0:
        raise ValueError(
            f"mean={shown(mean)} and std={shown(std)} must be {channels} values each, std above 0"
        )
    low, high = STD_BOUNDS
    if not all(low <= one <= high for one in stds) or max(map(abs, means)) > high:
        raise ValueError(
            f"mean={shown(mean)} and std={shown(std)} are beyond any image; give std from {low:g} "
            f"to {high:g} and mean from {-high:g} to {high:g}, in units of the images in [0, 1]"
        )
    return Normalization(means, stds)


def _numbers(values: object, count: int) -> Colour | None:
    """Convert values to floats; ``None`` unless they are ``count`` finite numbers."""
    if not isinstance(values, Iterable):
        return None
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None
