"""Displacement of a backbone's features from the cells that they are taken for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from upfeat.backbones.base import Backbone
from upfeat.bounds import instance


@torch.no_grad()
def estimate_displacement(backbone: Backbone, images: Iterable[Tensor]) -> tuple[float, float]:
    """Estimate by how many pixels features lie below and right of their cells, without labels.

    Features of the mirror image, mirrored back, are displaced the other way. Their difference from
    the image's own features is therefore, to first order, twice the displacement times the slope of
    the two's mean, and is fitted by least squares over all images, cells and channels.
    :meth:`Backbone.aligned` corrects a displacement, in whole pixels.

    Args:
        backbone: makes the features; 2 passes of each image for each axis.
        images: (B, 3, H, W) each, normalised, of 3 or more cells along both sides; some tens of
            photographs are enough.

    Returns:
        (down, right), pixels; about 0 for networks that treat both sides of an image alike.

    Raises:
        TypeError: ``backbone`` is no :class:`Backbone`, for example a name.
        ValueError: there are no images, or they have the same features in every cell.

    Example:
        >>> from upfeat.backbones import load_backbone
        >>> backbone = load_backbone(torch.nn.Conv2d(3, 4, 8, 8))
        >>> down, right = estimate_displacement(backbone, torch.rand(2, 1, 3, 64, 64))
    """
    instance("backbone", backbone, Backbone, "give what load_backbone() returns")
    moments = torch.zeros(2, 2, dtype=torch.float64)  # (axis, slope·difference and slope²)
    for x in images:
        own = backbone(x)
        for axis in (0, 1):
            mirrored = backbone(x.flip(axis + 2)).flip(axis + 2)
            mean = (own + mirrored).transpose(2, axis + 2) / 2  # (B, C, cells along the axis, …)
            slope = ((mean[:, :, 2:] - mean[:, :, :-2]) / 2).cpu().double()
            difference = (own - mirrored).transpose(2, axis + 2)[:, :, 1:-1].cpu().double()
            moments[axis, 0] += (slope * difference).sum()
            moments[axis, 1] += slope.square().sum()
    if not bool((moments[:, 1] > 0).all()):
        raise ValueError(
            "images have the same features in every cell, or there are none; give photographs of "
            "3 or more cells along both sides"
        )
    down, right = (backbone.stride / 2 * moments[:, 0] / moments[:, 1]).tolist()
    return down, right
