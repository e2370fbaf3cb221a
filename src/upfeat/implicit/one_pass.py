"""Maps of one and of eight passes for fits, translation, and the shipped models fits depend on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.features import UpsampledFeatures
from upfeat.guided import Guided, early_by_default, has_early_layers, has_layers_at_both_sizes
from upfeat.implicit.guides import normalised
from upfeat.implicit.observe import Basis, Observer
from upfeat.mirrored import Mirrored
from upfeat.normalization import HALF
from upfeat.resampling import on_grid
from upfeat.scales import SMOOTHINGS, SecondScale, smooth_on_fine_grid
from upfeat.translation import Translation, fit_to_image, shipped_translation
from upfeat.upsamplers import DetailUpsampler
from upfeat.upsamplers.base import Upsampler
from upfeat.upsamplers.detail import FINER
from upfeat.upsamplers.pretrained import create_upsampler, trained_for_early

QUERIES = "neighbourhood_universal"
"""Name of the upsampler whose queries the kernel compares."""
ONE_PASS = "detail_universal"
"""Name of the upsampler whose result is the mean of the fit, unless one was trained on the
backbone's early layers."""
# Penalty of a translation fitted to the cells of a single image.
_PENALTY = 4.0
# Largest image for the one-pass upsampler; a larger image is reduced.
_ONE_PASS_PIXELS = 1 << 21


def mean_upsampler(backbone: Backbone) -> Upsampler:
    """Return the upsampler whose result is the mean of a fit: the best for the backbone.

    Args:
        backbone: the backbone of the fit.
    """
    trained = trained_for_early(backbone.name)
    if trained is not None:
        upsampler = shipped(trained)
        if getattr(upsampler, "embed_dim", None) == backbone.embed_dim:
            return upsampler
    return shipped(ONE_PASS)


def with_early_layers(backbone: Backbone) -> Backbone:
    """Return a backbone with the early layers that :func:`upfeat.load` would use, if any.

    Args:
        backbone: the backbone of the fit; the embedded guide is added if it has none of its own.
    """
    if not early_by_default(backbone) or has_early_layers(backbone):
        return backbone
    return Guided(backbone).to(backbone.mean.device)


def one_pass(
    upsampler: Upsampler,
    guidance: Tensor,
    features: Tensor,
    hidden: Tensor | None,
    basis: Basis,
    map_size: tuple[int, int],
) -> Tensor:
    """Upsample an image's features in one pass, as coordinates of a basis.

    Args:
        upsampler: from :func:`mean_upsampler`.
        guidance: (3, H, W) uint8, the image.
        features: (1, C, h, w), features of the unjittered image.
        hidden: (1, D, h', w'), features of the image from earlier layers, or ``None``.
        basis: the basis, of k components.
        map_size: (height, width) of the result, pixels.

    Returns:
        (k, *map_size).
    """
    image = normalised(guidance, upsampler.normalization or HALF, _ONE_PASS_PIXELS)
    drawn = UpsampledFeatures(features, image, upsampler, map_size, hidden=hidden)
    with torch.no_grad():
        return drawn.project(basis.inverse, -(basis.inverse @ basis.mean))[0]


def change_by_smoothing(
    upsampler: Upsampler,
    observer: Observer,
    guidance: Tensor,
    hidden: Tensor | None,
    drawn: Tensor,
) -> Tensor | None:
    """Smooth a map among cells that are alike, as maps of several passes are smoothed.

    Those of a guided backbone are smoothed once, others often, and then on a finer grid, too.

    Args:
        upsampler: from :func:`mean_upsampler`.
        observer: an observer of the image.
        guidance: (3, H, W) uint8, the image.
        hidden: (1, D, h', w'), features of the image from earlier layers, or ``None``.
        drawn: (k, H', W'), coordinates of which all have the same unit.

    Returns:
        What to add to the map, (k, H', W'); ``None`` without earlier layers.
    """
    image = normalised(guidance, upsampler.normalization or HALF, _ONE_PASS_PIXELS)
    size, grid = (image.shape[2], image.shape[3]), observer.grid_size
    assert isinstance(upsampler, DetailUpsampler)
    with torch.no_grad():
        kernels = upsampler.prepare_with(image, grid, size, hidden=hidden)
        if kernels.smoothing is None:
            return None
        last, map_size = upsampler.last_step(), (drawn.shape[1], drawn.shape[2])
        guided = isinstance(observer.backbone, Guided)
        rough = on_grid(drawn[None], kernels.smoothing.size)
        times = 1 if guided else SMOOTHINGS
        change = kernels.smoothing.smooth_among_alike(rough, times) - rough
        change = last(change, image, map_size)[0]
        if guided:
            return change
        finest = (FINER**2 * grid[0], FINER**2 * grid[1])
        rough = on_grid((drawn + change)[None], finest)
        queries = last.prepare(image, kernels.smoothing.size, finest).queries
        cell = observer.backbone.stride / FINER**2
        finer = smooth_on_fine_grid(rough, queries, cell, upsampler.backend) - rough
        return change + last(finer, image, map_size)[0]


class Look(NamedTuple):
    """Features of the image in a few passes of the backbone, and the upsampler for them."""

    features: Tensor
    """(1, C, h, w)."""
    hidden: Tensor | None
    """(1, D, h', w'), features of earlier layers, for the upsampler; or ``None``."""
    upsampler: Upsampler
    passes: int
    """Cost of the features, in passes of the backbone over the image."""


def look_closer(observer: Observer) -> Look:
    """Extract the image's features in eight passes, or in two where the backbone allows no more.

    Two passes are over the image and its mirror image, and six more over both at √3 times their
    sides, which needs an even stride (a multiple of 4 with early layers of the backbone's own) and
    a backbone that takes images of any size.

    Args:
        observer: an observer of the image.

    Raises:
        ValueError: the backbone gives NaN or infinity.
    """
    backbone = observer.backbone
    upsampler, device = mean_upsampler(backbone), observer.image.device
    assert isinstance(upsampler, DetailUpsampler)
    last, guided = upsampler.last_step(), isinstance(backbone, Guided)
    if isinstance(backbone, Guided):  # the guide sees the image once, and helps both steps
        backbone = backbone.backbone
    try:
        found = shipped_translation(backbone)
        there = None if found is None else Translation(*(one.to(device) for one in found))
        scales = SecondScale(
            backbone,
            upsampler.to(device),
            translation=there,
            mirrored=True,
            early=not guided and has_layers_at_both_sizes(backbone),
        )
        if guided:
            seen = observer.look_at_image(with_early_layers(scales))
            return Look(*seen, upsampler.cpu(), round(scales.passes))
        return Look(*observer.look_at_image(scales), last, round(scales.passes))
    except torch.OutOfMemoryError:  # the result must not depend on the memory
        raise
    except (ValueError, RuntimeError, AssertionError):  # as networks refuse a size
        mirrored = Mirrored(backbone)
        seen = observer.look_at_image(with_early_layers(mirrored) if guided else mirrored)
        return Look(*seen, upsampler.cpu(), mirrored.passes)


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


def shipped_models(backbone: Backbone) -> list[Upsampler]:
    """Return the upsamplers whose weights a fast fit to a backbone's features depends on."""
    return [shipped(QUERIES), mean_upsampler(backbone)]


def shipped(name: str) -> Upsampler:
    """Create an upsampler with its shipped weights, in single precision."""
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then replaced
        return create_upsampler(name).float()
