"""Coarse features of an image too large for one pass of the backbone, strip by strip.

The receptive field of a convolutional backbone is limited: tiles with a halo that covers the
receptive field give exactly the features of the whole image. With global attention, features depend
on the whole input: the features of overlapping windows are then blended with raised cosines, which
hides the seams but does not reproduce the features of the whole image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.activations import activation_bytes
from upfeat.backbones import Backbone
from upfeat.machine import readable, trim_memory
from upfeat.receptive_field import odd_sides_agree, receptive_halo, see, unstacked
from upfeat.tiling import Tile, overlapping, raised_cosine, split
from upfeat.types import Size, Window, scaled
from upfeat.upsamplers.maps import cut, inside

Read = Callable[[Window], Tensor]
"""Function from a window in pixels to (1, 3, height, width), normalised for the backbone."""

_LEAST_TILE = 16


class Strip(NamedTuple):
    """Coarse features of some rows of the grid and all its columns."""

    top: int
    """First row, in cells from 0."""
    features: Tensor
    """Features of the rows, (1, C, rows, columns)."""


def strips(
    backbone: Backbone,
    read: Read,
    grid: Size,
    *,
    tile: int,
    halo: int | None,
    overlap: int | None = None,
    first_row: int = 0,
    early: bool = False,
) -> Iterator[Strip]:
    """Compute coarse features from top to bottom.

    Args:
        backbone: backbone in eval mode.
        read: function that reads windows of the image; windows begin and end at whole cells.
        grid: (h, w) of the whole image, in cells.
        tile: side in cells of the tiles to which the backbone is applied, without the halo; with a
            halo, a multiple of :attr:`Backbone.step`.
        halo: result of :func:`receptive_halo`; ``None`` to blend overlapping windows.
        overlap: overlap of adjacent windows without a halo, in cells; ``None`` for a quarter of
            ``tile``.
        first_row: first row of cells that is needed. Strips may contain rows above, whose features
            may be wrong.
        early: whether strips contain early layers too, stacked as by :func:`see`.

    Yields:
        Strips that cover the grid from ``first_row`` on, each row once.

    Raises:
        ValueError: ``tile`` is below 1, or ``overlap`` is not below ``tile``.
    """
    if halo is None:
        overlap = tile // 4 if overlap is None else overlap
        yield from _blended(backbone, read, grid, tile, overlap, first_row, early)
        return
    row: Tensor | None = None
    for piece in split(grid, tile, halo=halo, step=backbone.step):
        core = piece.core
        if core.bottom <= first_row:
            continue
        features = extract_tile(backbone, read, piece, early=early)
        if row is None:
            row = features.new_empty(*features.shape[:2], core.height, grid[1])
        row[..., core.left : core.right] = features
        del features
        if core.right == grid[1]:
            strip, row = Strip(core.top, row), None
            yield strip
            del strip  # only the caller may keep it in memory while the next one is computed


def backbone_tiles(grid: Size, tile: int, halo: int | None, step: int = 1) -> list[Tile]:
    """List the tiles to which :func:`strips` applies the backbone, in the same order.

    Args:
        grid: see :func:`strips`.
        tile: see :func:`strips`.
        halo: see :func:`strips`. With ``None``, the core of each tile is its whole window, and
            cores overlap.
        step: :attr:`Backbone.step`.
    """
    if halo is None:
        return [Tile(window, window) for window in overlapping(grid, tile, tile // 4)]
    return list(split(grid, tile, halo=halo, step=step))


def extract_tile(backbone: Backbone, read: Read, tile: Tile, *, early: bool = False) -> Tensor:
    """Compute the coarse features of a tile's core, (1, C, core.height, core.width).

    With ``early``, they are stacked on early layers as by :func:`see`.
    """
    inner = tile.inner
    features = _extract(backbone, read, tile.outer, early)
    return features[:, :, inner.top : inner.bottom, inner.left : inner.right].clone()


def join_tiles(
    parts: Iterable[tuple[Tile, Tensor]], grid: Size, region: Window, blended: int | None = None
) -> Tensor:
    """Join the features of tiles in a region; equal bit by bit to those of :func:`strips`.

    Args:
        parts: the tiles of :func:`backbone_tiles` that overlap the region, in their order, each
            with its features of :func:`extract_tile`.
        grid: (h, w) of the whole image, in cells.
        region: window of the grid, in cells.
        blended: side in cells of windows to blend; ``None`` for tiles with a halo.

    Returns:
        (1, C, region.height, region.width).
    """
    out: Tensor | None = None
    for tile, features in parts:
        if out is None:
            channels = features.shape[1] + (blended is not None)
            out = features.new_zeros(1, channels, region.height, region.width)
        common = _common(tile.core, region)
        here, there = inside(common, tile.core), inside(common, region)
        if blended is None:
            cut(out, there).copy_(cut(features, here))
        else:
            weight = _blend_weights(tile.core, grid, blended // 4, features)
            place = cut(out, there)
            place[:, :-1] += cut(features * weight, here)
            place[:, -1:] += cut(weight[None, None], here)
    assert out is not None
    return out if blended is None else _mean(out)


def _common(a: Window, b: Window) -> Window:
    """The intersection of two windows."""
    top, left = max(a.top, b.top), max(a.left, b.left)
    bottom, right = min(a.bottom, b.bottom), min(a.right, b.right)
    return Window(top, left, bottom - top, right - left)


def _blend_weights(window: Window, grid: Size, overlap: int, like: Tensor) -> Tensor:
    """Weights with which a window's cells are blended, (height, width)."""
    down = raised_cosine(window.top, window.height, grid[0], overlap)
    across = raised_cosine(window.left, window.width, grid[1], overlap)
    return like.new_tensor(down)[:, None] * like.new_tensor(across)


def _blended(
    backbone: Backbone,
    read: Read,
    grid: Size,
    tile: int,
    overlap: int,
    first_row: int,
    early: bool,
) -> Iterator[Strip]:
    """Yield strips of weighted means of overlapping windows; see :func:`strips`."""
    pending: Tensor | None = None  # weighted sums of features; the last channel sums the weights
    top = 0  # first row of ``pending``
    for window in overlapping(grid, tile, overlap):
        if window.bottom <= first_row:
            continue
        features = _extract(backbone, read, window, early)
        if pending is None:
            pending = features.new_zeros(1, features.shape[1] + 1, 0, grid[1])
            top = window.top
        if window.top > top:  # no later window reaches these rows
            rows = window.top - top
            yield Strip(top, _mean(pending[:, :, :rows]))
            pending, top = pending[:, :, rows:], window.top
        missing = window.bottom - top - pending.shape[2]
        if missing > 0:
            more = pending.new_zeros(1, pending.shape[1], missing, grid[1])
            pending = torch.cat([pending, more], dim=2)
        weight = _blend_weights(window, grid, overlap, features)
        place = pending[:, :, window.top - top : window.bottom - top, window.left : window.right]
        place[:, :-1] += features * weight
        place[:, -1:] += weight
    if pending is not None:
        yield Strip(top, _mean(pending))


def _mean(sums: Tensor) -> Tensor:
    return sums[:, :-1] / sums[:, -1:]


def _extract(backbone: Backbone, read: Read, cells: Window, early: bool) -> Tensor:
    stride = backbone.stride
    return see(backbone, read(Window(*(stride * side for side in cells))), early=early)


@torch.no_grad()
def see_within(
    backbone: Backbone, x: Tensor, memory: float, *, early: bool = False, label: str = "image"
) -> tuple[Tensor, Tensor | None]:
    """Compute an image's coarse features, and those of early layers, within a bound of memory.

    The backbone is applied to the whole image if memory suffices, or else to tiles with a halo that
    makes their features exact.

    Args:
        backbone: backbone in eval mode.
        x: (B, 3, H, W), normalised image.
        memory: bytes that may be used besides the image and the result.
        early: also compute features of early layers; see :meth:`Backbone.with_hidden`.
        label: name of the image, for error messages.

    Returns:
        Coarse features (B, C, h, w); and features of early layers (B, D, h', w'), or ``None``.

    Raises:
        ValueError: ``memory`` is too small for this backbone.
    """
    a_pixel = activation_bytes(backbone, early=early)
    if len(x) > 1 and x.shape[2] * x.shape[3] * len(x) * a_pixel > memory:
        images = [see_within(backbone, y, memory, early=early, label=label) for y in x.split(1)]
        features, hidden = zip(*images, strict=True)
        return torch.cat(features), torch.cat(hidden) if hidden[0] is not None else None
    if len(x) * x.shape[2] * x.shape[3] * a_pixel <= memory:
        return backbone.with_hidden(x) if early else (backbone(x), None)
    halo, tile = _tile_within(backbone, x, memory, a_pixel, label, early=early)
    height, width = backbone.grid_aligned((x.shape[2], x.shape[3]))
    if (height, width) != tuple(x.shape[2:]):
        x = F.interpolate(
            x, size=(height, width), mode="bilinear", align_corners=False, antialias=True
        )
    grid = (height // backbone.stride, width // backbone.stride)
    out: Tensor | None = None
    for piece in split(grid, tile, halo=halo, step=backbone.step):
        values = see(backbone, cut(x, scaled(piece.outer, backbone.stride)), early=early)
        if out is None:
            out = values.new_empty(*values.shape[:2], *grid)
        cut(out, piece.core).copy_(cut(values, piece.inner))
        del values
        trim_memory()  # of tiles of several sizes, the allocator would keep a multiple of one
    assert out is not None
    return unstacked(out, backbone.embed_dim)


def _tile_within(
    backbone: Backbone, x: Tensor, memory: float, a_pixel: float, label: str, *, early: bool
) -> tuple[int, int]:
    """Halo of the backbone, and side of the largest tiles within a bound of memory, in cells.

    Raises:
        ValueError: the backbone has no halo, or the tiles would be too small.
    """
    halo, stride = receptive_halo(backbone, early=early), backbone.stride
    step, grid = backbone.step, backbone.grid_size((x.shape[2], x.shape[3]))
    if halo is not None:
        halo = step * -(-halo // step)
        if any(side % step for side in grid) and not odd_sides_agree(backbone, halo, early):
            halo = None
    if halo is None:
        raise ValueError(
            f"{label}: {backbone.name} needs about {readable(x.shape[2] * x.shape[3] * a_pixel)} "
            f"for {x.shape[2]}×{x.shape[3]} pixels and cannot work in tiles; give a smaller size, "
            "or more memory"
        )
    tile = (int((max(memory, 0) / a_pixel) ** 0.5 / stride) - 2 * halo) // step * step
    if tile < _LEAST_TILE:
        least = ((_LEAST_TILE + 2 * halo) * stride) ** 2 * a_pixel
        raise ValueError(
            f"{label}: {readable(max(memory, 0))} of memory are too little for {backbone.name}; "
            f"tiles of {_LEAST_TILE * stride} pixels need about {readable(least)}; give a smaller "
            "size, or more memory"
        )
    return halo, tile


class Rows:
    """Rows of a grid that are read in order: computed on request, and dropped after use."""

    def __init__(self, source: Iterator[Strip]) -> None:
        """Keep the strips' iterator; nothing is computed yet."""
        self._source = source
        self._top = 0
        self._kept: list[Strip] = []

    def __call__(self, top: int, bottom: int, left: int = 0, right: int | None = None) -> Tensor:
        """Return rows ``top`` to ``bottom`` − 1, (1, C, bottom − top, w); drop rows above ``top``.

        Args:
            top: first row.
            bottom: row after the last.
            left: first column.
            right: column after the last; ``None`` for all columns from ``left`` on.

        Raises:
            ValueError: ``top`` is less than in an earlier call, or ``bottom`` exceeds the grid.
        """
        if top < self._top:
            raise ValueError(f"row {top} is no longer kept; the first is {self._top}")
        while not self._kept or _end(self._kept[-1]) < bottom:
            self._forget(top)
            strip = next(self._source, None)
            if strip is None:
                raise ValueError(f"row {bottom - 1} lies beyond the last")
            if not self._kept:
                self._top = strip.top
            self._kept.append(strip)
            del strip
        self._forget(top)
        # Strips are joined in the columns asked for alone, lest all rows be held twice.
        parts = [
            strip.features[:, :, max(top - strip.top, 0) : bottom - strip.top, left:right]
            for strip in self._kept
            if strip.top < bottom
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _forget(self, top: int) -> None:
        """Drop all rows above ``top``."""
        while self._kept and _end(self._kept[0]) <= top:
            self._top = _end(self._kept.pop(0))
        if self._kept and self._kept[0].top < top:
            strip = self._kept[0]
            self._kept[0] = Strip(top, strip.features[:, :, top - strip.top :].clone())
            self._top = top


def _end(strip: Strip) -> int:
    """Row after a strip's last."""
    return strip.top + strip.features.shape[2]
