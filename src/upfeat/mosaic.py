"""Coarse features of an image too large for one pass of the backbone, strip by strip.

A convolutional backbone looks only so far: tiles with a halo of that many cells give exactly what
the whole image gives. A backbone with global attention sees its whole input: windows that overlap
are blended with raised cosines, which hides the seams but does not make them exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from upfeat.backbones import Backbone
from upfeat.machine import readable
from upfeat.tiling import overlapping, raised_cosine, split
from upfeat.types import Size, Window

Read = Callable[[Window], Tensor]
"""From a window in pixels to (1, 3, height, width), normalised as the backbone wants it."""

_PROBE_CELLS = 64
_LEAST_TILE = 16
_TOLERANCE = 1e-4
# Measured once for each backbone.
_HALOS: WeakKeyDictionary[Backbone, int | None] = WeakKeyDictionary()
_ACTIVATIONS: WeakKeyDictionary[Backbone, float] = WeakKeyDictionary()


class Strip(NamedTuple):
    """Rows of coarse features, all columns."""

    top: int
    """First row, cells."""
    features: Tensor
    """(1, C, rows, columns)."""


def receptive_halo(backbone: Backbone) -> int | None:
    """Measure how many cells beyond its own a cell of the features depends on.

    A NaN in one pixel reaches exactly the cells that depend on the pixel, whatever the weights. The
    result is checked on noise: a tile with that halo must give what the whole image gives.

    Args:
        backbone: in eval mode.

    Returns:
        Cells to each side; ``None`` where a cell depends on more than a quarter of a long image, as
        with global attention, or where tiles disagree with the whole.
    """
    if backbone not in _HALOS:
        _HALOS[backbone] = _measure_halo(backbone)
    return _HALOS[backbone]


@torch.no_grad()
def _measure_halo(backbone: Backbone) -> int | None:
    stride = backbone.stride
    try:
        reaches = [_spread(backbone, offset) for offset in (0, stride - 1)]
        if any(reach is None for reach in reaches):
            return None
        halo = max(reach for reach in reaches if reach is not None)
        return halo if _tiles_agree(backbone, halo) else None
    except (RuntimeError, ValueError):  # the backbone takes one size only
        return None


def _blank(backbone: Backbone, height: int, width: int) -> Tensor:
    return torch.zeros(1, 3, height, width, device=backbone.mean.device)


def _spread(backbone: Backbone, offset: int) -> int | None:
    """Cells to each side that a pixel at ``offset`` in a cell reaches; ``None`` if too many."""
    cells, middle = _PROBE_CELLS, _PROBE_CELLS // 2
    x = _blank(backbone, 2 * backbone.stride, cells * backbone.stride)
    x[..., middle * backbone.stride + offset] = torch.nan
    reached = backbone(x).isnan().any(1)[0].any(0).nonzero()[:, 0]
    if not len(reached):
        return None
    reach = int(max(middle - reached.min(), reached.max() - middle))
    return None if reach >= cells // 4 else reach


def _tiles_agree(backbone: Backbone, halo: int) -> bool:
    stride, cells = backbone.stride, 2 * halo + 4
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 2 * stride, 2 * cells * stride, generator=generator)
    x = x.to(backbone.mean.device)
    whole = backbone(x)[..., halo + 2 : cells]
    part = backbone(x[..., 2 * stride : (cells + halo) * stride])[..., halo : cells - 2]
    return bool((whole - part).abs().max() <= _TOLERANCE * whole.abs().max())


def strips(
    backbone: Backbone,
    read: Read,
    grid: Size,
    *,
    tile: int,
    halo: int | None,
    overlap: int | None = None,
    first_row: int = 0,
) -> Iterator[Strip]:
    """Compute coarse features from top to bottom.

    Args:
        backbone: in eval mode.
        read: gives windows of the image; they begin and end at whole cells.
        grid: (h, w) of the whole image, cells.
        tile: cells to a side that go through the backbone at once, beside the halo.
        halo: of :func:`receptive_halo`; ``None`` to blend overlapping windows.
        overlap: of those windows, cells; ``None`` for a quarter of ``tile``.
        first_row: rows above it are not needed; those that come all the same may be wrong.

    Yields:
        Strips that cover the grid from ``first_row`` on, each row once.

    Raises:
        ValueError: ``tile`` is below 1, or ``overlap`` not below it.
    """
    if halo is None:
        overlap = tile // 4 if overlap is None else overlap
        yield from _blended(backbone, read, grid, tile, overlap, first_row)
        return
    parts: list[Tensor] = []
    for piece in split(grid, tile, halo=halo):
        if piece.core.bottom <= first_row:
            continue
        inner = piece.inner
        features = _extract(backbone, read, piece.outer)
        parts.append(features[:, :, inner.top : inner.bottom, inner.left : inner.right].clone())
        if piece.core.right == grid[1]:
            yield Strip(piece.core.top, torch.cat(parts, dim=3))
            parts = []


def _blended(
    backbone: Backbone, read: Read, grid: Size, tile: int, overlap: int, first_row: int
) -> Iterator[Strip]:
    """Strips of weighted means of overlapping windows."""
    pending: Tensor | None = None  # weighted sums, the last channel the weights
    top = 0  # first row of it
    for window in overlapping(grid, tile, overlap):
        if window.bottom <= first_row:
            continue
        features = _extract(backbone, read, window)
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
        down = raised_cosine(window.top, window.height, grid[0], overlap)
        across = raised_cosine(window.left, window.width, grid[1], overlap)
        weight = features.new_tensor(down)[:, None] * features.new_tensor(across)
        place = pending[:, :, window.top - top : window.bottom - top, window.left : window.right]
        place[:, :-1] += features * weight
        place[:, -1:] += weight
    if pending is not None:
        yield Strip(top, _mean(pending))


def _mean(sums: Tensor) -> Tensor:
    return sums[:, :-1] / sums[:, -1:]


def _extract(backbone: Backbone, read: Read, cells: Window) -> Tensor:
    stride = backbone.stride
    return backbone(read(Window(*(stride * side for side in cells))))


def activation_bytes(backbone: Backbone) -> float:
    """Measure the memory that a backbone takes at its peak, bytes for each pixel of its input.

    Every tensor that its operators make is counted for as long as it lives, on two small images
    whose difference leaves out what does not grow; a quarter is added for what operators take for
    themselves.
    """
    if backbone not in _ACTIVATIONS:
        _ACTIVATIONS[backbone] = _measure_activations(backbone)
    return _ACTIVATIONS[backbone]


@torch.no_grad()
def _measure_activations(backbone: Backbone) -> float:
    sides = (8 * backbone.stride, 16 * backbone.stride)
    peaks = []
    for side in sides:
        x = torch.zeros(1, 3, side, side, device=backbone.mean.device)
        counted = _LiveBytes()
        with counted:
            try:
                backbone(x)
            except (RuntimeError, ValueError):  # it takes one size only
                return 1.5 * 64 * 4
        peaks.append(counted.peak)
    growth = (peaks[1] - peaks[0]) / (sides[1] ** 2 - sides[0] ** 2)
    return 1.25 * max(growth, 12)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators make, for as long as they live."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To keep the compiler out would import it, which takes longer than the measurement.
        return False

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self._count(one)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not self._users.get(place):
            self._held += size
            self.peak = max(self.peak, self._held)
        self._users[place] = self._users.get(place, 0) + 1
        weakref.finalize(tensor, self._forget, place, size).atexit = False

    def _forget(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            self._held -= size


@torch.no_grad()
def extract_within(backbone: Backbone, x: Tensor, memory: float, *, label: str = "image") -> Tensor:
    """Compute an image's coarse features within a bound of memory.

    The whole image goes through the backbone where that fits, otherwise tiles whose halo makes them
    exact.

    Args:
        backbone: in eval mode.
        x: (B, 3, H, W), normalised.
        memory: bytes that may be held beside the image and the result.
        label: what errors call the image.

    Returns:
        (B, C, h, w).

    Raises:
        ValueError: the bound is too small for this backbone.
    """
    a_pixel = activation_bytes(backbone)
    if len(x) > 1 and x.shape[2] * x.shape[3] * len(x) * a_pixel > memory:
        images = [extract_within(backbone, one, memory, label=label) for one in x.split(1)]
        return torch.cat(images)
    if len(x) * x.shape[2] * x.shape[3] * a_pixel <= memory:
        return backbone(x)
    halo, stride = receptive_halo(backbone), backbone.stride
    if halo is None:
        raise ValueError(
            f"{label}: {backbone.name} needs about {readable(x.shape[2] * x.shape[3] * a_pixel)} "
            f"for {x.shape[2]}×{x.shape[3]} pixels and cannot work in tiles; give a smaller size, "
            "or more memory"
        )
    tile = int((memory / a_pixel) ** 0.5 / stride) - 2 * halo
    if tile < _LEAST_TILE:
        least = ((_LEAST_TILE + 2 * halo) * stride) ** 2 * a_pixel
        raise ValueError(
            f"{label}: {readable(max(memory, 0))} of memory are too little for {backbone.name}; "
            f"tiles of {_LEAST_TILE * stride} pixels need about {readable(least)}; give a smaller "
            "size, or more memory"
        )
    height, width = backbone.grid_aligned((x.shape[2], x.shape[3]))
    if (height, width) != tuple(x.shape[2:]):
        x = F.interpolate(
            x, size=(height, width), mode="bilinear", align_corners=False, antialias=True
        )
    parts = strips(
        backbone,
        lambda window: x[:, :, window.top : window.bottom, window.left : window.right],
        (height // stride, width // stride),
        tile=tile,
        halo=halo,
    )
    return torch.cat([part.features for part in parts], dim=2)


class Rows:
    """Rows of a grid, made as they are asked for and forgotten once they are passed."""

    def __init__(self, source: Iterator[Strip]) -> None:
        """Keep the source; nothing is computed yet."""
        self._source = source
        self._top = 0
        self._kept: Tensor | None = None

    def __call__(self, top: int, bottom: int) -> Tensor:
        """Rows ``top`` to ``bottom``, (1, C, bottom − top, w); ``top`` never goes back.

        Raises:
            ValueError: the rows were forgotten, or lie beyond the last.
        """
        if top < self._top:
            raise ValueError(f"row {top} is no longer kept; the first is {self._top}")
        while self._kept is None or self._top + self._kept.shape[2] < bottom:
            strip = next(self._source, None)
            if strip is None:
                raise ValueError(f"row {bottom - 1} lies beyond the last")
            self._forget(top)
            kept = self._kept
            if kept is None or not kept.shape[2]:
                self._top, self._kept = strip.top, strip.features
            else:
                self._kept = torch.cat([kept, strip.features], dim=2)
        self._forget(top)
        return self._kept[:, :, : bottom - self._top]

    def _forget(self, top: int) -> None:
        if self._kept is not None and top > self._top:
            passed = min(top - self._top, self._kept.shape[2])
            self._kept = self._kept[:, :, passed:].clone()
            self._top += passed
