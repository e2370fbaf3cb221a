"""Picture of one photograph's results: features, or the outputs of a head, before and after."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from upfeat.heads import SavedHead
from upfeat.model import FeatUp
from upfeat.types import Size
from upfeat.visualize import (
    PCABasis,
    as_rgb,
    class_colours,
    draw_comparison,
    from_bytes,
    side_by_side,
    to_bytes,
    to_image,
)

STRIP = 64
"""Rows of a map that are computed at once; fixed, so that results do not depend on a memory bound,
and a multiple of the squares of :func:`reduced`."""
_SHOWN = 2048
"""Longest side of a panel of the picture, in pixels."""


def image_panel(model: FeatUp, x: Tensor) -> Tensor:
    """Reduce the photograph for the picture, (3, h, w), uint8; computed a few rows at a time."""
    strips = []
    for part in x.split(4 * STRIP, dim=2):
        image = as_rgb(reduced(model.backbone.denormalize(part), max(x.shape[2:]))[0])
        strips.append(to_bytes(image).cpu())
    return torch.cat(strips, dim=1)


def draw_results(
    model: FeatUp,
    image: Tensor,
    coarse: Tensor,
    shows: SavedHead | PCABasis,
    fine: Tensor,
    size: Size,
) -> Image.Image:
    """Draw the photograph beside coarse and upsampled features, or a head's outputs for both.

    Args:
        model: backbone and upsampler.
        image: (3, h, w) uint8, from :func:`image_panel`.
        coarse: (C, h, w), features that the upsampler got.
        shows: the head, or the basis of the colours of features.
        fine: (3, h, w) uint8, colours of upsampled features in the basis; or outputs (K, H, W) of
            the head.
        size: (height, width) of the whole map.
    """
    passes = model.passes
    before = "coarse features" if passes == 1 else f"features of {passes:g} passes"
    label = model.upsampler.name.replace("_", " ")
    draw: Any = _draw_head if isinstance(shows, SavedHead) else draw_comparison
    return draw(image, coarse, shows, fine, label=label, size=size, before=before)


def _draw_head(
    image: Tensor,
    coarse: Tensor,
    head: SavedHead,
    said: Tensor,
    *,
    label: str,
    size: Size,
    before: str,
) -> Image.Image:
    """Draw the photograph, the head's outputs for coarse features, and those for upsampled ones."""
    cells = torch.einsum("kc,chw->khw", head.weight, coarse.float()) + head.bias[:, None, None]
    step = -(-max(said.shape[1:]) // _SHOWN)
    low, high = cells[0].aminmax()
    span = high - low if high > low else 1.0
    palette = class_colours(len(cells), head.names)

    def colours(values: Tensor) -> Tensor:
        if head.kind == "classes":
            return palette[values.argmax(0)].permute(2, 0, 1)
        return ((values[:1].float() - low) / span).expand(3, -1, -1)

    said = said[:, ::step, ::step]
    fine, legend = colours(said), []
    if head.kind == "classes":
        seen = torch.cat([cells.argmax(0).flatten(), said.argmax(0).flatten()]).unique().tolist()
        legend = [(head.names[index], palette[index].tolist()) for index in seen]
    panels = [(before, cells.shape[1:], colours(cells)), (label, size, fine)]
    drawn = [(name, shape, to_image(picture)) for name, shape, picture in panels]
    return side_by_side(
        [
            (f"{name}\n{height} x {width}", picture)
            for name, (height, width), picture in [("image", size, from_bytes(image)), *drawn]
        ],
        legend,
    )


def reduced(x: Tensor, longest: int) -> Tensor:
    """Average a map (B, C, H, W) over squares, so that the longest side fits into a panel.

    Args:
        x: the map, or a strip of it.
        longest: longest side of the whole map in pixels.
    """
    factor = _factor(longest)
    return x if factor == 1 else F.avg_pool2d(x, factor, ceil_mode=True, count_include_pad=False)


def panel_pixels(height: int, width: int) -> int:
    """Number of pixels of a panel that shows a map of this size."""
    factor = _factor(max(height, width))
    return -(-height // factor) * -(-width // factor)


def _factor(longest: int) -> int:
    factor = 1
    while longest > factor * _SHOWN and factor < STRIP:
        factor *= 2
    return factor
