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
from upfeat.types import Size
from upfeat.upsamplers import DetailUpsampler
from upfeat.upsamplers.base import Upsampler
from upfeat.upsamplers.neighbourhood import NeighbourhoodUpsampler
from upfeat.upsamplers.pretrained import create_upsampler, trained_for_early

QUERIES = "neighbourhood_universal"
"""Name of the upsampler whose queries the kernel compares."""
ONE_PASS = "detail_universal"
"""Name of the upsampler whose result is the mean of the fit, unless one was trained on the
backbone's early layers."""
# Penalty of a translation fitted to the cells of a single image.
_PENALTY = 4.0
ONE_PASS_PIXELS = 1 << 21
"""Most pixels of an image for upsamplers; a larger image is reduced."""


def mean_upsampler(backbone: Backbone) -> DetailUpsampler:
    """Return the upsampler whose result is the mean of a fit: the best for the backbone.

    Args:
        backbone: the backbone of the fit.
    """
    trained = trained_for_early(backbone.name)
    found = None if trained is None else shipped(trained)
    if getattr(found, "embed_dim", None) != backbone.embed_dim:
        found = shipped(ONE_PASS)
    assert isinstance(found, DetailUpsampler)
    return found


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
    image = normalised(guidance, upsampler.normalization or HALF, ONE_PASS_PIXELS)
    drawn = UpsampledFeatures(features, image, upsampler, map_size, hidden=hidden)
    with torch.no_grad():
        return drawn.project(basis.inverse, -(basis.inverse @ basis.mean))[0]


@torch.no_grad()
def smooth_difference(
    difference: Tensor,
    alike: Tensor,
    upsampler: DetailUpsampler,
    guidance: Tensor,
    hidden: Tensor | None,
    grid: Size,
) -> Tensor | None:
    """Smooth what a fit says beyond a map of a few passes, among cells alike in that map.

    The difference is smoothed as maps of several passes are, on both of their grids. The map itself
    stays as it is.

    Args:
        difference: (k, h', w'), on the finest grid.
        alike: (k', h', w'), the map of a few passes, all of whose values have the same unit.
        upsampler: from :func:`mean_upsampler`.
        guidance: (3, H, W) uint8, the image.
        hidden: (1, D, h'', w''), features of the image from earlier layers, or ``None``.
        grid: (h, w), the backbone's grid, cells.

    Returns:
        (k, h', w'); ``None`` without earlier layers.
    """
    image = normalised(guidance, upsampler.normalization or HALF, ONE_PASS_PIXELS)
    size, finest = (image.shape[2], image.shape[3]), (alike.shape[1], alike.shape[2])
    kernels = upsampler.prepare_with(image, grid, size, hidden=hidden)
    if kernels.smoothing is None:
        return None
    half, map_of_few = kernels.smoothing.size, alike[None]
    rough = on_grid(difference[None], half)
    smooth = kernels.smoothing.smooth_among_alike(rough, SMOOTHINGS, on_grid(map_of_few, half))
    last = upsampler.last_step()
    step = last.prepare(image, half, finest)
    difference = difference[None] + last.render(step, smooth - rough)
    cell = size[0] / finest[0]
    return smooth_on_fine_grid(difference, step.queries, cell, upsampler.backend, map_of_few)[0]


class Look(NamedTuple):
    """Features of the image in a few passes of the backbone, as the last step reads them."""

    features: Tensor
    """(1, C, h', w'), on the finest grid."""
    last: NeighbourhoodUpsampler
    """The last step, from the grid to the pixels."""
    passes: int
    """Cost of the features, in passes of the backbone over the image."""


@torch.no_grad()
def look_closer(observer: Observer, guidance: Tensor) -> Look:
    """Extract the image's features in eight passes, or in two where the backbone allows no more.

    Two passes are over the image and its mirror image, and six more over both at √3 times their
    sides, which needs an even stride (a multiple of 4 with early layers of the backbone's own) and
    a backbone that takes images of any size.

    Args:
        observer: an observer of the image.
        guidance: (3, H, W) uint8, the image.

    Raises:
        ValueError: the backbone gives NaN or infinity.
    """
    backbone = observer.backbone
    upsampler, device = mean_upsampler(backbone), observer.image.device
    last, guided = upsampler.last_step(), isinstance(backbone, Guided)
    if isinstance(backbone, Guided):  # the guide sees the image once, and helps both steps
        backbone = backbone.backbone
    several: SecondScale | Mirrored
    try:
        found = shipped_translation(backbone)
        there = None if found is None else Translation(*(one.to(device) for one in found))
        several = SecondScale(
            backbone,
            upsampler.to(device),
            translation=there,
            mirrored=True,
            early=not guided and has_layers_at_both_sizes(backbone),
        )
        seen = observer.look_at_image(with_early_layers(several) if guided else several)
    except torch.OutOfMemoryError:  # the result must not depend on the memory
        raise
    except (ValueError, RuntimeError, AssertionError):  # as networks refuse a size
        several = Mirrored(backbone)
        seen = observer.look_at_image(with_early_layers(several) if guided else several)
    features, hidden = seen
    if isinstance(several, Mirrored) or guided:  # the steps before the last follow
        upsampler = upsampler.cpu()
        image = normalised(guidance, upsampler.normalization or HALF, ONE_PASS_PIXELS)
        grid, size = (features.shape[2], features.shape[3]), (image.shape[2], image.shape[3])
        kernels = upsampler.prepare_with(image, grid, size, hidden=hidden)
        features = upsampler.on_finer_grid(kernels, upsampler.mix(features))
    return Look(features, last, round(several.passes))


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
