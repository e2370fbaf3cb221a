"""Inputs of a raster's tiles, computed tile by tile, and the output values made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.model import FeatUp
from upfeat.raster.coarse import Source, read_image, streamed
from upfeat.raster.outputs import Output, RasterTile
from upfeat.raster.plan import MASK_HALO, Plan
from upfeat.raster.scene import Scene
from upfeat.receptive_field import unstacked
from upfeat.tiling import Tile, split
from upfeat.types import Size, Window, scaled
from upfeat.upsamplers.maps import cut, inside


class Piece(NamedTuple):
    """Inputs of one tile, ready to be upsampled.

    Attributes:
        number: index of the tile.
        pixels: window of the raster that the tile writes.
        coarse: (1, C, h, w) features of the tile and its halo; ``None`` if no pixel is valid.
        hidden: (1, D, 2h, 2w), early layers of the same cells; ``None`` without early layers, or
            if no pixel is valid.
        guidance: (1, 3, H, W) guidance of the tile and its halo.
        means: :meth:`Upsampler.cell_means` of the tile and its halo; ``None`` if the upsampler has
            no means or no pixel is valid.
        inner: ``pixels`` in coordinates of ``guidance``.
        valid: (pixels.height, pixels.width) bool array, True where the raster has data.
    """

    number: int
    pixels: Window
    coarse: Tensor | None
    hidden: Tensor | None
    guidance: Tensor
    means: Tensor | None
    inner: Window
    valid: Any


@torch.inference_mode()
def pieces(
    scene: Scene, model: FeatUp, plan: Plan, wanted: Callable[[int, Window], bool]
) -> Iterator[Piece]:
    """Compute the inputs of a raster's tiles from top to bottom.

    Args:
        scene: an open raster.
        model: backbone and upsampler.
        plan: division of the raster.
        wanted: predicate of a tile's index and its pixels of the raster; tiles for which it
            returns False are skipped.
    """
    stride = model.backbone.stride
    tiles = enumerate(split(plan.grid, plan.tile, halo=plan.halo, step=plan.step))
    waiting = [
        (index, tile)
        for index, tile in tiles
        if wanted(index, _pixels(tile.core, stride, scene.size))
    ]
    if not waiting:
        return
    source = streamed(scene, model, plan, waiting[0][1].outer.top)
    for index, tile in waiting:
        yield make_piece(scene, model, source, index, tile)


@torch.inference_mode()
def make_piece(scene: Scene, model: FeatUp, source: Source, index: int, tile: Tile) -> Piece:
    """Read and compute the inputs of one tile.

    Args:
        scene: an open raster.
        model: backbone and upsampler.
        source: coarse features and cell means of the raster.
        index: index of the tile.
        tile: the tile, in cells.
    """
    outer, stride = tile.outer, model.backbone.stride
    pixels = _pixels(tile.core, stride, scene.size)
    seen = scaled(outer, stride)
    valid = scene.read_valid(seen)
    inner = inside(pixels, seen)
    usable = cut(valid[None, None], inner)[0, 0].numpy()
    coarse = hidden = means = None
    if usable.any():
        known = _cut_at(outer, source.size)
        coarse, hidden = unstacked(source.features(known), model.embed_dim)
        coarse = _fill_cells(_extended(coarse, known, outer), valid)
        hidden = None if hidden is None else _fill_cells(_extended(hidden, known, outer), valid)
        means = None if source.means is None else source.means(outer)
    shown = outer
    if source.means is not None:
        shown = _around(tile.core, model.upsampler.means_halo, outer)
    guidance = _guidance(scene, model, shown, outer)
    return Piece(index, pixels, coarse, hidden, guidance, means, inner, usable)


@torch.inference_mode()
def render(piece: Piece, model: FeatUp, what: Output) -> Any:
    """Upsample a tile and return its values, (K, height, width); masked pixels are no-data."""
    if piece.coarse is None:
        return what.empty(piece.pixels)
    tile = RasterTile(piece.coarse, piece.hidden, piece.guidance, piece.means, piece.inner)
    values = what.render(model, tile)
    values[:, ~piece.valid] = what.nodata
    return values


def _pixels(cells: Window, stride: int, size: tuple[int, int]) -> Window:
    """Return the pixels of a window of cells, cropped to the raster."""
    top, left = cells.top * stride, cells.left * stride
    bottom, right = min(cells.bottom * stride, size[0]), min(cells.right * stride, size[1])
    return Window(top, left, bottom - top, right - left)


def _cut_at(cells: Window, size: Size) -> Window:
    """The part of a window that begins in a map of ``size`` and may extend beyond it."""
    bottom, right = min(cells.bottom, size[0]), min(cells.right, size[1])
    return Window(cells.top, cells.left, bottom - cells.top, right - cells.left)


def _extended(maps: Tensor, known: Window, outer: Window) -> Tensor:
    """Repeat the lower and right edges of a map of ``known`` up to those of ``outer``.

    Args:
        maps: (1, K, f·h, f·w), of the cells of ``known`` or finer ones.
        known: window of cells.
        outer: window with the same start.
    """
    factor = maps.shape[2] // known.height
    below, beside = outer.bottom - known.bottom, outer.right - known.right
    if not below and not beside:
        return maps.contiguous()  # a view would keep the early layers
    return F.pad(maps, (0, factor * beside, 0, factor * below), mode="replicate")


def _around(core: Window, halo: int | None, outer: Window) -> Window:
    """Extend a window of cells by a halo, cropped to the outer window."""
    assert halo is not None
    top, left = max(core.top - halo, outer.top), max(core.left - halo, outer.left)
    bottom, right = min(core.bottom + halo, outer.bottom), min(core.right + halo, outer.right)
    return Window(top, left, bottom - top, right - left)


def _guidance(scene: Scene, model: FeatUp, shown: Window, outer: Window) -> Tensor:
    """Read the guidance of the cells ``shown`` and return it padded with 0 to ``outer``."""
    stride = model.backbone.stride
    guidance = model.guidance(read_image(scene, model, shown))
    if shown == outer:
        return guidance
    shape = (1, guidance.shape[1], stride * outer.height, stride * outer.width)
    if guidance.device.type == "cpu" and guidance.dtype is torch.float32:
        # Zeros of NumPy occupy no memory until they are written; PyTorch's do.
        out = torch.from_numpy(np.zeros(shape, np.float32))
    else:
        out = guidance.new_zeros(shape)
    cut(out, scaled(inside(shown, outer), stride)).copy_(guidance)
    return out


def _fill_cells(coarse: Tensor, valid: Tensor) -> Tensor:
    """Replace values of mostly masked cells, (1, C, h, w), by the mean of their valid neighbours.

    Each of :data:`MASK_HALO` rounds reaches one cell farther; cells beyond them become 0.
    """
    if bool(valid.all()):
        return coarse
    grid = coarse.shape[2], coarse.shape[3]
    share = F.adaptive_avg_pool2d(valid[None, None].to(coarse.dtype), grid)
    known = (share >= 0.5).to(coarse.device, coarse.dtype)
    filled = coarse * known
    for _ in range(MASK_HALO):
        count = F.avg_pool2d(known, 3, 1, 1, count_include_pad=False)
        mean = F.avg_pool2d(filled, 3, 1, 1, count_include_pad=False) / count.clamp(min=1e-6)
        reached = (count > 0).to(coarse.dtype)
        filled = torch.where(known > 0, filled, mean * reached)
        known = reached
    return filled
