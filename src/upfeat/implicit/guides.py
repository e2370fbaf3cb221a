"""Maps of the image, such as its colours, that implicit features sample at their points."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.bounds import whole
from upfeat.normalization import HALF, Normalization, check_normalization
from upfeat.tensor_checks import check_layouts, layouts_of
from upfeat.upsamplers.encoder import PyramidEncoder, unit
from upfeat.upsamplers.neighbourhood import MOST_LEVELS, MOST_WIDTH

# Most numbers in a map of queries: 256 MiB. A larger image is reduced to fit.
_LARGEST_MAP = 1 << 26


def colours(guidance: Tensor) -> Tensor:
    """Convert an image to RGB in [0, 1]: (3, H, W) uint8 -> (H, W, 3) float32."""
    return (guidance.float() / 255).permute(1, 2, 0).contiguous()


class QueryGuide:
    """The queries of a neighbourhood upsampler: unit vectors, similar for similar image content.

    The encoder's weights are rounded to half precision, the precision of files, so that a loaded
    fit renders the same values as the original.
    """

    def __init__(self, encoder: PyramidEncoder, normalization: Normalization = HALF) -> None:
        """Copy the encoder.

        Args:
            encoder: encoder of a neighbourhood upsampler.
            normalization: normalisation of the images that the encoder was trained on.
        """
        self.normalization = normalization
        self.encoder = copy.deepcopy(encoder).float().eval().requires_grad_(False)
        for value in self.encoder.state_dict().values():
            value.copy_(value.half())
        self.width, self.levels = encoder.entry.out_channels, len(encoder.join)

    @torch.no_grad()
    def __call__(self, guidance: Tensor) -> Tensor:
        """Compute the queries of an image: (3, H, W) uint8 -> (H', W', width) float32.

        The map has the size of the image, unless its numbers would exceed ``_LARGEST_MAP``.
        """
        image = normalised(guidance, self.normalization, _LARGEST_MAP // self.width)
        return unit(self.encoder(image), over=True)[0].permute(1, 2, 0).contiguous()

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights in half precision, to which they are rounded already."""
        return {name: value.half() for name, value in self.encoder.state_dict().items()}

    def facts(self) -> dict[str, Any]:
        """Return the settings that :meth:`rebuild` needs, as JSON values."""
        mean, std = (list(one) for one in self.normalization)
        return {"width": self.width, "levels": self.levels, "mean": mean, "std": std}

    @staticmethod
    def rebuild(tensors: dict[str, Tensor], facts: dict[str, Any]) -> QueryGuide:
        """Build a guide from its :meth:`tensors` and :meth:`facts`.

        Raises:
            KeyError: a setting is missing.
            ValueError: a setting is out of bounds, or the weights do not fit the settings.
        """
        width = whole("width", facts["width"], 1, MOST_WIDTH)
        levels = whole("levels", facts["levels"], 1, MOST_LEVELS)
        # Old files do not record the normalisation; it was always HALF.
        normalization = check_normalization(
            facts.get("mean", HALF.mean), facts.get("std", HALF.std)
        )
        with torch.device("meta"):
            expected = PyramidEncoder(width, levels).state_dict()
        check_layouts("guide", layouts_of(tensors), expected)
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then replaced
            encoder = PyramidEncoder(width, levels)
        encoder.load_state_dict(tensors)
        return QueryGuide(encoder, normalization)


def normalised(guidance: Tensor, normalization: Normalization, most: int) -> Tensor:
    """Normalise an image for an upsampler.

    Args:
        guidance: (3, H, W) uint8, the image.
        normalization: normalisation of the images that the upsampler was trained on.
        most: largest number of pixels; a larger image is reduced.

    Returns:
        (1, 3, H', W') float32.
    """
    image = normalization.apply(guidance[None].float() / 255)
    height, width = guidance.shape[1:]
    share = math.sqrt(most / (height * width))
    if share >= 1:
        return image
    size = (max(int(height * share), 1), max(int(width * share), 1))
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)


def sample(maps: Tensor, places: Tensor) -> Tensor:
    """Interpolate a map bilinearly; beyond the outermost pixel centres, their values are repeated.

    Args:
        maps: (H, W, D) float32, a map that covers the image from border to border.
        places: (N, 2) float64, (y, x) in [0, 1] from border to border.

    Returns:
        (N, D) float32.
    """
    height, width = maps.shape[:2]
    last = places.new_tensor([height - 1, width - 1])
    index = (places * places.new_tensor([height, width]) - 0.5).clamp(min=0).minimum(last)
    low = index.floor()
    down, across = (index - low).float().split(1, dim=1)  # (N, 1)
    (y, x), (below, right) = low.long().unbind(1), (low + 1).minimum(last).long().unbind(1)
    upper = torch.lerp(maps[y, x], maps[y, right], across)
    lower = torch.lerp(maps[below, x], maps[below, right], across)
    return torch.lerp(upper, lower, down)
