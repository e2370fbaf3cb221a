"""One-pass upsampling and translation for fits, and the shipped upsamplers that fits depend on."""

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
"""Name of the upsampler whose queries the kernel compares."""
ONE_PASS = "detail_universal"
"""Name of the upsampler whose result is the mean of the fit."""
# Penalty of a translation fitted to the cells of a single image.
_PENALTY = 4.0
# Largest image for the one-pass upsampler; a larger image is reduced.
_ONE_PASS_PIXELS = 1 << 21


def one_pass(
    guidance: Tensor, features: Tensor, map_size: tuple[int, int], hidden: Tensor | None = None
) -> Tensor:
    """Upsample features with ``ONE_PASS``, the best shipped upsampler for any backbone.

    Args:
        guidance: (3, H, W) uint8, the image.
        features: (1, k, h, w), coordinates of the unjittered image's features.
        map_size: (height, width) of the result, pixels.
        hidden: (1, D, h', w'), features of the image from earlier layers, or ``None``.

    Returns:
        (k, *map_size).
    """
    upsampler = shipped(ONE_PASS)
    image = normalised(guidance, upsampler.normalization or HALF, _ONE_PASS_PIXELS)
    with torch.no_grad():
        return upsampler(features, image, map_size, hidden=hidden)[0]


def into_own_words(backbone: Backbone, said: Tensor, own: Tensor) -> Translation:
    """Return the linear map of channels that turns features of views into the image's own features.

    If no map is shipped for the backbone, one is fitted to the cells of this image.

    Args:
        backbone: the backbone that gave the features.
        said: (1, C, h, w), means over the cells of a map that was fitted to views.
        own: (1, C, h, w), the backbone's features of the unjittered image.
    """
    found = shipped_translation(backbone, "views")
    if found is None:
        weight, bias = fit_to_image(own, said, _PENALTY)
        found = Translation(weight[0], bias[0])
    return found


def shipped_models() -> list[Upsampler]:
    """Return the upsamplers whose weights every fast fit depends on."""
    return [shipped(name) for name in (QUERIES, ONE_PASS)]


def shipped(name: str) -> Upsampler:
    """Create an upsampler with its shipped weights, in single precision."""
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then replaced
        return create_upsampler(name).float()
