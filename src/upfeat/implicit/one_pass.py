"""One pass over an image, and the shipped upsamplers that every fit makes use of."""

from __future__ import annotations

import torch
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.implicit.guides import normalised
from upfeat.normalization import HALF
from upfeat.scales import Translation, fit_to_image, shipped_translation
from upfeat.upsamplers.base import Upsampler
from upfeat.upsamplers.pretrained import create_upsampler

QUERIES = "neighbourhood_universal"
"""The upsampler whose queries the kernel compares."""
ONE_PASS = "detail_universal"
"""The upsampler that draws the mean."""
# Of a translation learnt from the cells of a single image.
_PENALTY = 4.0
# Of the image that the one-pass upsampler is shown, at most.
_ONE_PASS_PIXELS = 1 << 21


def one_pass(
    guidance: Tensor, features: Tensor, map_size: tuple[int, int], hidden: Tensor | None = None
) -> Tensor:
    """Upsample features by the best upsampler for any backbone.

    Args:
        guidance: (3, H, W) uint8.
        features: (1, k, h, w) of the image itself.
        map_size: of the result.
        hidden: (1, D, h', w'), what earlier layers say of the image; ``None`` for nothing.

    Returns:
        (k, *map_size).
    """
    upsampler = shipped(ONE_PASS)
    image = normalised(guidance, upsampler.normalization or HALF, _ONE_PASS_PIXELS)
    with torch.no_grad():
        return upsampler(features, image, map_size, hidden=hidden)[0]


def into_own_words(backbone: Backbone, said: Tensor, own: Tensor) -> Translation:
    """The linear map of channels that turns what views agree on into the image's own features.

    Args:
        backbone: of both; what is shipped for it is taken.
        said: (1, C, h, w), means over cells of what was fitted to views.
        own: (1, C, h, w), the image's features, from which it is learnt where nothing is shipped.
    """
    found = shipped_translation(backbone, "views")
    if found is None:
        weight, bias = fit_to_image(own, said, _PENALTY)
        found = Translation(weight[0], bias[0])
    return found


def shipped_models() -> list[Upsampler]:
    """The upsamplers whose weights every fit depends on."""
    return [shipped(name) for name in (QUERIES, ONE_PASS)]


def shipped(name: str) -> Upsampler:
    """An upsampler with the weights that are shipped for any backbone."""
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn, then replaced
        return create_upsampler(name).float()
