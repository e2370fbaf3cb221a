"""Division of a raster into tiles as large as a memory budget allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from upfeat import machine
from upfeat.activations import activation_bytes
from upfeat.bounds import instance, whole
from upfeat.budget import free_bytes
from upfeat.machine import readable
from upfeat.model import FeatUp
from upfeat.operator_checks import whole_numbers
from upfeat.raster.outputs import Output
from upfeat.raster.scene import CACHE_BYTES
from upfeat.receptive_field import receptive_halo, stacked_channels
from upfeat.tiling import Size

DEFAULT_BUDGET = 4 * 10**9
"""Memory budget of the process, bytes."""
CHUNK = 128
"""Side of the chunks in which a tile is stored, pixels; if it does not divide the tile's side, the
largest smaller number that does."""
MASK_HALO = 4
"""Largest distance, in cells, from which masked cells take features of valid ones; beyond, 0."""

_TILES = (2048, 1536, 1024, 768, 512, 384, 256, 192, 128)
"""Sides of tiles to try, pixels, largest first."""
_WINDOW = 512
"""Side of the windows of a backbone with global attention, pixels."""
_BACKBONE_TILES = (4096, 3584, 3072, 2560, *_TILES)
"""Sides of the backbone's tiles to try, pixels; the larger the tile, the less its halo costs."""
_LEAST_SHARE = 2
"""Smallest ratio of the backbone's tile to its halo, except with the smallest tiles to write."""

# Bytes of an upsampler for each pixel of a tile with its halo: image, guidance, maps on the grid.
_TILE_BYTES = 80
# Bytes of the intermediate results while a window is upsampled: queries, weights, values.
_WINDOW_BYTES = 300 * 10**6
# Bytes that the allocator takes for each requested byte, measured over 400 megapixels.
_ALLOCATED = 1.15
# Number of maps of the size of the early layers that an upsampler keeps of a tile and its halo: the
# layers, their copy beside the queries, what the first step lacks of it, and maps of a network.
_EARLY_COPIES = 5
# Bytes of cell means for each cell: 4 finer cells of 32 channels in float32.
_MEANS_BYTES = 4 * 32 * 4


@dataclass(frozen=True)
class Plan:
    """Division of a raster into tiles; all lengths are in cells.

    Attributes:
        seen: (h, w) of the cells that the backbone is applied to: those that cover the raster.
        grid: (h, w) of the cells that are upsampled, multiples of ``step``; may extend beyond the
            raster.
        tile: side of a tile that is written.
        halo: cells around such a tile that the upsampler reads.
        step: a tile and its halo begin at multiples of this number.
        backbone_tile: side of the part that the backbone computes at once, without its halo.
        backbone_halo: cells around such a part that the backbone reads; ``None``: the parts are
            overlapping windows instead.
    """

    seen: Size
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
    max_memory: int | str = DEFAULT_BUDGET,
    tile: int | None = None,
    backbone_tile: int | None = None,
) -> Plan:
    """Choose the largest tiles that a memory budget allows.

    Args:
        size: (height, width) of the raster, pixels.
        model: backbone and upsampler.
        what: output to write.
        max_memory: most memory that the process may use, including the memory that it uses
            already, in bytes or as "2GB"; the machine's free memory, and limits of containers and
            of ``ulimit``, count too.
        tile: side of a tile, pixels; ``None`` for the largest that the budget allows.
        backbone_tile: side of the backbone's tiles, cells; ``None`` for the largest that the
            budget allows.

    Raises:
        TypeError: ``model`` or ``what`` is of another class.
        ValueError: a number is no whole number from 1, the upsampler's reach is the whole image, or
            no tile fits the budget; the message then names the smallest budget that can work.
    """
    instance("model", model, FeatUp, "give what upfeat.load() returns")
    instance("what", what, Output, "give Features(…) or HeadOutput(…)")
    height, width = (whole("size", side) for side in whole_numbers("size", size, 2))
    size = (height, width)
    tile = whole("tile", tile, optional=True)
    backbone_tile = whole("backbone_tile", backbone_tile, optional=True)
    max_memory = machine.parse_memory(max_memory)
    stride, reach = model.backbone.stride, model.upsampler.reach
    if reach is None:
        raise ValueError(
            f"{model.upsampler.name} looks at the whole image and cannot work in tiles; choose an "
            "upsampler that does not, such as detail"
        )
    step, own_step = model.upsampler.step, model.backbone.step
    height, width = (own_step * -(-side // (stride * own_step)) for side in size)
    seen, grid = (height, width), (step * -(-height // step), step * -(-width // step))
    halo = receptive_halo(model.backbone, early=model.early)
    halo = None if halo is None else own_step * -(-halo // own_step)
    resident = machine.resident_memory() or 0
    activations = activation_bytes(model.backbone, early=model.early)
    bound = min(max_memory, resident + free_bytes(None))
    needed, plan = math.inf, None
    for side, through in _candidates(stride, halo, tile, backbone_tile, own_step):
        cells = _tile_cells(side, stride, step)
        plan = Plan(seen, grid, cells, reach + MASK_HALO, step, through, halo)
        needed = resident + _needed(plan, model, what, activations)
        if needed <= bound:
            return plan
    if tile is not None and plan is not None:
        return plan  # an unfinished output can only be continued with the tiles it was begun with
    limit = f"max_memory={readable(bound)}"
    if bound < max_memory:
        limit = f"the free memory here, {readable(bound)} with what is in use,"
    raise ValueError(
        f"{limit} is too little for a raster of {size[0]}×{size[1]} pixels, of which "
        f"{readable(resident)} are held already; the smallest that can work is about "
        f"{readable(1.02 * needed)}"
    )


def _candidates(
    stride: int, halo: int | None, tile: int | None, backbone_tile: int | None, step: int
) -> Iterator[tuple[int, int]]:
    """Yield sides of a tile, pixels, and of the backbone's tiles, cells, in order of preference."""
    for side in _TILES if tile is None else (tile,):
        if backbone_tile is not None:
            yield side, backbone_tile
        elif halo is None:
            yield side, max(_WINDOW // stride, 1)
        else:
            sides = [step * max(own // (stride * step), 1) for own in _BACKBONE_TILES]
            wide = [own for own in sides if own >= _LEAST_SHARE * halo]
            yield from ((side, own) for own in (sides if side == _TILES[-1] else wide))


def _tile_cells(side: int, stride: int, step: int) -> int:
    """Return the cells along a tile of at most ``side`` pixels: whole chunks, or whole steps."""
    chunk = step * max(1, CHUNK // (stride * step))
    unit = chunk if side >= chunk * stride else step
    return unit * max(1, side // (unit * stride))


def _needed(plan: Plan, model: FeatUp, what: Output, activations: float) -> float:
    """Estimate the bytes that a plan needs beyond those the process uses already."""
    stride, channels = model.backbone.stride, stacked_channels(model.backbone, early=model.early)
    outer = min(plan.tile + 2 * (plan.halo + plan.step), max(plan.grid))
    seen = min(plan.backbone_tile + 2 * (plan.backbone_halo or 0), max(plan.grid))
    # The rows of a tile and its halo, and the rest of the last strip of them.
    strip = plan.backbone_tile * plan.grid[1] * channels * 4
    rows = outer * plan.grid[1] * channels * 4 + strip
    if plan.backbone_halo is None:  # sums of windows that are not complete, and their copies
        rows, strip = rows + strip, 3 * strip
    if model.upsampler.means_halo is not None:
        rows += (outer + 2 * plan.tile) * plan.grid[1] * _MEANS_BYTES
    # 30 bytes a pixel for the image, as read and as normalised.
    backbone = (seen * stride) ** 2 * (activations + 30) + strip
    upsampler = (outer * stride) ** 2 * _TILE_BYTES + _WINDOW_BYTES
    upsampler += outer**2 * _EARLY_COPIES * (channels - model.embed_dim) * 4
    # Up to four copies: one tile is written while the next is computed, and the store assembles a
    # shard from its chunks.
    written = (plan.tile * stride) ** 2 * what.count * 4 * what.dtype.itemsize
    return _ALLOCATED * (CACHE_BYTES + rows + max(backbone, upsampler) + written)
