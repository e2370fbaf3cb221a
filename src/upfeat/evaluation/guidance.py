"""Images as upsamplers take them."""

from __future__ import annotations

from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.evaluation.data.prepared import normalised
from upfeat.upsamplers import Upsampler


def guidance_of(image: Tensor, backbone: Backbone, upsampler: Upsampler) -> Tensor:
    """(3, H, W) uint8 -> (1, 3, H, W) as an upsampler of the backbone's features takes it."""
    return upsampler.guidance_from(normalised(image, backbone), backbone)
