"""Maps of the image that implicit features read at points, beside the place."""

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

# Numbers in a map of queries: 256 MiB. Of larger images the map is coarser than they are.
_LARGEST_MAP = 1 << 26


def colours(guidance: Tensor) -> Tensor:
    """RGB in [0, 1]: (3, H, W) uint8 -> (H, W, 3) float32."""
    return (guidance.float() / 255).permute(1, 2, 0).contiguous()


class QueryGuide:
    """The unit queries of a neighbourhood upsampler: like where colours and textures are alike.

    The encoder's weights are rounded to half precision, as files hold them, so that a file draws
    what its fit drew.
    """

    def __init__(self, encoder: PyramidEncoder, normalization: Normalization = HALF) -> None:
        """Take a copy of the encoder.

        Args:
            encoder: of an upsampler.
            normalization: of the images that its weights were trained on.
        """
        self.normalization = normalization
        self.encoder = copy.deepcopy(encoder).float().eval().requires_grad_(False)
        for value in self.encoder.state_dict().values():
            value.copy_(value.half())
        self.width, self.levels = encoder.entry.out_channels, len(encoder.join)

    @torch.no_grad()
    def __call__(self, guidance: Tensor) -> Tensor:
        """(3, H, W) uint8 -> (H', W', width) float32; the image's size, but for huge images."""
        image = normalised(guidance, self.normalization, _LARGEST_MAP // self.width)
        return unit(self.encoder(image), over=True)[0].permute(1, 2, 0).contiguous()

    def tensors(self) -> dict[str, Tensor]:
        """Weights, in half precision without loss."""
        return {name: value.half() for name, value in self.encoder.state_dict().items()}

    def facts(self) -> dict[str, Any]:
        """Settings that :meth:`rebuild` needs, as JSON values."""
        mean, std = (list(one) for one in self.normalization)
        return {"width": self.width, "levels": self.levels, "mean": mean, "std": std}

    @staticmethod
    def rebuild(tensors: dict[str, Tensor], facts: dict[str, Any]) -> QueryGuide:
        """Make a guide from what :meth:`tensors` and :meth:`facts` said.

        Raises:
            KeyError: a setting is missing.
            ValueError: one is out of bounds, or the weights do not fit the settings.
        """
        width = whole("width", facts["width"], 1, MOST_WIDTH)
        levels = whole("levels", facts["levels"], 1, MOST_LEVELS)
        # Files that do not say are older than the question.
        normalization = check_normalization(*(facts.get(key, HALF.mean) for key in ("mean", "std")))
        with torch.device("meta"):
            expected = PyramidEncoder(width, levels).state_dict()
        check_layouts("guide", layouts_of(tensors), expected)
        with torch.random.fork_rng(devices=[]):  # the first weights are drawn, then replaced
            encoder = PyramidEncoder(width, levels)
        encoder.load_state_dict(tensors)
        return QueryGuide(encoder, normalization)


def normalised(guidance: Tensor, normalization: Normalization, most: int) -> Tensor:
    """Normalise an image for an upsampler.

    Args:
        guidance: (3, H, W) uint8.
        normalization: of the images that the upsampler's weights were trained on.
        most: pixels; a larger image is reduced.

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
    """Values between pixels, bilinear; beyond the outermost centres, theirs.

    Args:
        maps: (H, W, D) float32, laid over the image edge to edge.
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
