"""Division of a raster into tiles as large as a memory budget allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from upfeat.machine import resident_memory
from upfeat.model import FeatUp
from upfeat.mosaic import activation_bytes, receptive_halo
from upfeat.raster.outputs import Output
from upfeat.tiling import Size

DEFAULT_BUDGET = 4 * 10**9
"""Bytes."""
MASK_HALO = 4
"""Masked cells so near to valid ones take their features; those farther away are 0."""

_TILES = (2048, 1536, 1024, 768, 512, 384, 256, 192, 128)
"""Sides tried, pixels, largest first."""
_WINDOW = 512
"""Side of the windows of a backbone with global attention, pixels."""
_UPSAMPLER_BYTES = 600
"""Of an upsampler, for each pixel of a tile: image, queries and temporaries."""


@dataclass(frozen=True)
class Plan:
    """Division of a raster; all sides in cells.

    Attributes:
        grid: (h, w) of all coarse features; whole steps, beyond the raster if need be.
        tile: side of a tile that is written.
        halo: cells around it that the upsampler reads.
        step: tiles read from multiples of it.
        backbone_tile: side of a tile that goes through the backbone.
        backbone_halo: cells around that; ``None`` for overlapping windows.
    """

    grid: Size
    tile: int
    halo: int
    step: int
    backbone_tile: int
    backbone_halo: int | None


def make_plan(
    size: Size,
    model: FeatUp,
    what: Output,
    *,
    max_memory: int = DEFAULT_BUDGET,
    tile: int | None = None,
) -> Plan:
    """Choose tiles for a raster.

    Args:
        size: (height, width) of the raster, pixels.
        model: backbone and upsampler.
        what: is written.
        max_memory: bytes that the process may hold, with what it holds already.
        tile: side of a tile, pixels; ``None`` for the largest that the budget allows.

    Raises:
        ValueError: the upsampler looks at the whole image, or no tile is small enough; the
            smallest budget that can work is named.
    """
    stride, reach = model.backbone.stride, model.upsampler.reach
    if reach is None:
        raise ValueError(
            f"{model.upsampler.name} looks at the whole image and cannot work in tiles; choose an "
            "upsampler that does not, such as detail"
        )
    step = model.upsampler.step
    height, width = (step * -(-side // (stride * step)) for side in size)
    halo = receptive_halo(model.backbone)
    resident = resident_memory() or 0
    activations = activation_bytes(model.backbone)
    needed = math.inf
    for side in _TILES if tile is None else (tile,):
        cells = step * max(1, side // (stride * step))
        through = cells if halo is not None else max(_WINDOW // stride, 1)
        plan = Plan((height, width), cells, reach + MASK_HALO, step, through, halo)
        needed = resident + _needed(plan, model, what, activations)
        if needed <= max_memory or tile is not None:
            return plan
    raise ValueError(
        f"max_memory={max_memory / 1e9:.2f}GB is too little for a raster of {size[0]}×{size[1]} "
        f"pixels; the smallest that can work is about {needed / 1e9 + 0.05:.1f}GB"
    )


def _needed(plan: Plan, model: FeatUp, what: Output, activations: float) -> float:
    """Bytes that a plan needs beyond what the process holds already."""
    stride, channels = model.backbone.stride, model.embed_dim
    outer = min(plan.tile + 2 * (plan.halo + plan.step), max(plan.grid))
    seen = min(plan.backbone_tile + 2 * (plan.backbone_halo or 0), max(plan.grid))
    rows = (outer + plan.backbone_tile) * plan.grid[1] * channels * 4
    backbone = (seen * stride) ** 2 * activations
    upsampler = (outer * stride) ** 2 * _UPSAMPLER_BYTES
    # One tile is being written while the next is computed, in float32 and as it is stored.
    written = (plan.tile * stride) ** 2 * what.count * (4 + 3 * what.dtype.itemsize)
    return rows + max(backbone, upsampler + written)
