"""Division of a raster into tiles as large as a memory budget allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from upfeat import machine
from upfeat.activations import activation_bytes
from upfeat.machine import readable
from upfeat.model import FeatUp
from upfeat.mosaic import receptive_halo
from upfeat.raster.outputs import Output
from upfeat.raster.scene import CACHE_BYTES
from upfeat.tiling import Size

DEFAULT_BUDGET = 4 * 10**9
"""Bytes."""
CHUNK = 128
"""Side of the parts that a tile is stored in, pixels, or the nearest below that divides it."""
MASK_HALO = 4
"""Masked cells so near to valid ones take their features; those farther away are 0."""

_TILES = (2048, 1536, 1024, 768, 512, 384, 256, 192, 128)
"""Sides tried, pixels, largest first."""
_WINDOW = 512
"""Side of the windows of a backbone with global attention, pixels."""
_BACKBONE_TILES = (4096, 3584, 3072, 2560, *_TILES)
"""Sides of the backbone's own tiles, pixels; the larger, the less their halos cost."""
_LEAST_SHARE = 2
"""A tile of the backbone is at least so many times as wide as its halo, where it may choose."""

# Bytes of an upsampler for each pixel of a tile with its halo: image, guidance, maps on the grid.
_TILE_BYTES = 80
# Bytes of what is alive while a window is upsampled: queries, weights, values.
_WINDOW_BYTES = 300 * 10**6
# What the allocator takes for each byte that is asked of it, measured over 400 megapixels.
_ALLOCATED = 1.15
# Bytes of shared means for each cell, on a grid twice as fine.
_MEANS_BYTES = 4 * 32 * 4


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
    backbone_tile: int | None = None,
) -> Plan:
    """Choose tiles for a raster.

    Args:
        size: (height, width) of the raster, pixels.
        model: backbone and upsampler.
        what: is written.
        max_memory: bytes that the process may hold, with what it holds already.
        tile: side of a tile, pixels; ``None`` for the largest that the budget allows.
        backbone_tile: of those that go through the backbone, cells; likewise.

    Raises:
        ValueError: the upsampler looks at the whole image or at early layers, or no tile is small
            enough; the smallest budget that can work is named.
    """
    stride, reach = model.backbone.stride, model.upsampler.reach
    if reach is None:
        raise ValueError(
            f"{model.upsampler.name} looks at the whole image and cannot work in tiles; choose an "
            "upsampler that does not, such as detail"
        )
    if model.early:
        raise ValueError(
            "early=True: rasters are made without early layers; load with early=False, and another "
            "upsampler than early_detail"
        )
    step = model.upsampler.step
    height, width = (step * -(-side // (stride * step)) for side in size)
    halo = receptive_halo(model.backbone)
    resident = machine.resident_memory() or 0
    activations = activation_bytes(model.backbone)
    needed, plan = math.inf, None
    for side, through in _candidates(stride, halo, tile, backbone_tile):
        cells = _tile_cells(side, stride, step)
        plan = Plan((height, width), cells, reach + MASK_HALO, step, through, halo)
        needed = resident + _needed(plan, model, what, activations)
        if needed <= max_memory:
            return plan
    if tile is not None and plan is not None:
        return plan  # an output that was begun goes on with its tiles
    raise ValueError(
        f"max_memory={readable(max_memory)} is too little for a raster of {size[0]}×{size[1]} "
        f"pixels, of which {readable(resident)} are held already; the smallest that can work is "
        f"about {readable(1.02 * needed)}"
    )


def _candidates(
    stride: int, halo: int | None, tile: int | None, backbone_tile: int | None
) -> Iterator[tuple[int, int]]:
    """Sides of tiles in pixels, and of the backbone's in cells, the best first."""
    for side in _TILES if tile is None else (tile,):
        if backbone_tile is not None:
            yield side, backbone_tile
        elif halo is None:
            yield side, max(_WINDOW // stride, 1)
        else:
            sides = [max(own // stride, 1) for own in _BACKBONE_TILES]
            wide = [own for own in sides if own >= _LEAST_SHARE * halo]
            yield from ((side, own) for own in (sides if side == _TILES[-1] else wide))


def _tile_cells(side: int, stride: int, step: int) -> int:
    """Cells along a tile of at most so many pixels: whole chunks of the store, whole steps."""
    chunk = step * max(1, CHUNK // (stride * step))
    unit = chunk if side >= chunk * stride else step
    return unit * max(1, side // (unit * stride))


def _needed(plan: Plan, model: FeatUp, what: Output, activations: float) -> float:
    """Bytes that a plan needs beyond what the process holds already."""
    stride, channels = model.backbone.stride, model.embed_dim
    outer = min(plan.tile + 2 * (plan.halo + plan.step), max(plan.grid))
    seen = min(plan.backbone_tile + 2 * (plan.backbone_halo or 0), max(plan.grid))
    # What is kept of rows is copied when more come.
    rows = 2 * (outer + plan.backbone_tile) * plan.grid[1] * channels * 4
    if model.upsampler.means_halo is not None:
        rows += 2 * (outer + plan.tile) * plan.grid[1] * _MEANS_BYTES
    # The image, as it is read and as it is normalised.
    backbone = (seen * stride) ** 2 * (activations + 30)
    upsampler = (outer * stride) ** 2 * _TILE_BYTES + _WINDOW_BYTES
    # One tile is being written while the next is computed; a shard is put together of its chunks.
    written = (plan.tile * stride) ** 2 * what.count * 4 * what.dtype.itemsize
    return _ALLOCATED * (CACHE_BYTES + rows + max(backbone, upsampler) + written)
