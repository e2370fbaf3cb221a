"""Pooling and interpolation of maps: of whole maps by PyTorch, of windows by indices and weights.

PyTorch resamples whole maps only. For windows, its arithmetic is expressed as indices and weights
for any output positions, so that the cost of a window is proportional to the window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.types import Size

_CUBIC = -0.75


class Reads(NamedTuple):
    """Weights and positions by which ``count`` outputs of one axis are sums of T inputs each."""

    first: int
    """First input position that is read."""
    stop: int
    """One past the last input position that is read."""
    places: Tensor
    """Input positions of every output value, counted from ``first``, (T, count)."""
    factor: Tensor
    """Weights of the input values, (T, count), float64; those of an output value sum to 1."""


def on_grid(maps: Tensor, size: Size, interpolation: str = "bilinear") -> Tensor:
    """Resample maps to a grid: means over its cells, or interpolation; (B, D, *size)."""
    if tuple(maps.shape[2:]) == size:
        return maps
    if maps.shape[2] >= size[0] and maps.shape[3] >= size[1]:
        return pool_to(maps, size)
    return F.interpolate(maps, size=size, mode=interpolation, align_corners=False)


def pool_to(maps: Tensor, size: Size) -> Tensor:
    """Adaptive average pooling, also for sizes that are unknown while a program is compiled.

    PyTorch's compiler cannot generate code for its own pooling then.

    Args:
        maps: (B, D, H, W).
        size: (h, w).

    Returns:
        Means over the cells of the grid, (B, D, h, w).
    """
    if not torch.compiler.is_dynamo_compiling():
        return F.adaptive_avg_pool2d(maps, size)
    (height, width), (rows, columns) = maps.shape[-2:], size
    if height % rows == 0 and width % columns == 0:
        cells = (rows, height // rows, columns, width // columns)
        return maps.reshape(*maps.shape[:2], *cells).mean((3, 5))
    down, across = _shares(height, rows, maps), _shares(width, columns, maps)
    return down @ maps @ across.mT


def _shares(length: int, cells: int, like: Tensor) -> Tensor:
    """Weights of ``length`` values in the means of ``cells``, (cells, length)."""
    cell = torch.arange(cells, device=like.device)[:, None]
    value = torch.arange(length, device=like.device)
    start, stop = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
    inside = (value >= start) & (value < stop)
    return inside.to(like.dtype) / (stop - start)


def pooled(length: int, cells: int, positions: Tensor) -> Reads:
    """Adaptive average pooling of ``length`` values to ``cells``, at some of the cells.

    Args:
        length: number of input values.
        cells: number of output values.
        positions: output positions to compute, (count,), integers from 0 to ``cells`` − 1; at least
            one.
    """
    start = positions * length // cells
    stop = -(-(positions + 1) * length // cells)
    # T is the longest run; shorter ones repeat their last position with weight 0.
    taps = torch.arange(int((stop - start).max()), device=start.device)[:, None]
    inside = start + taps < stop
    return _reads((start + taps).minimum(stop - 1), inside / inside.sum(0).double())


def bilinear(
    length: int,
    target: int,
    positions: Tensor,
    *,
    antialias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Reads:
    """Bilinear interpolation of ``length`` values to ``target``, half-pixel centres.

    Args:
        length: number of input values.
        target: number of output values.
        positions: output positions to compute, (count,), integers from 0 to ``target`` − 1; at
            least one.
        antialias: widen the triangular filter if ``target`` is less than ``length``, as PyTorch
            does.
        dtype: type of the map. PyTorch computes the positions of the wider filter in float64 for
            float64, and in float32 for others, which changes weights by 10⁻⁵ in a map of 250.
    """
    scale = length / target
    if antialias and scale > 1:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        centre = scale * (positions.to(exact) + 0.5)
        start = (centre - scale + 0.5).long().clamp(min=0)
        stop = (centre + scale + 0.5).long().clamp(max=length)
        # As in `pooled`, T is the longest run; the others repeat a position with weight 0.
        taps = start + torch.arange(int((stop - start).max()), device=start.device)[:, None]
        factor = (1 - ((taps - centre + 0.5) / scale).abs()).clamp(min=0) * (taps < stop)
        return _reads(taps.minimum(stop - 1), factor / factor.sum(0))
    low, part = _place(length, target, positions)
    below = low < 0
    low, part = low.clamp(min=0), part.masked_fill(below, 0)
    high = (low + 1).clamp(max=length - 1)
    return _reads(torch.stack([low, high]), torch.stack([1 - part, part]))


def corners(
    length: int, target: int, positions: Tensor, *, dtype: torch.dtype = torch.float32
) -> Reads:
    """Bilinear interpolation with the corners aligned; for the arguments see :func:`bilinear`."""
    # As PyTorch computes it, in float64 for float64 only.
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(length - 1, dtype=exact) / max(target - 1, 1)
    place = scale * positions.to(exact)
    low = place.long().clamp(max=length - 1)
    part = (place - low).clamp(0, 1)
    high = (low + 1).clamp(max=length - 1)
    return _reads(torch.stack([low, high]), torch.stack([1 - part, part]))


def bicubic(length: int, target: int, positions: Tensor) -> Reads:
    """Bicubic interpolation (a = −0.75); for the arguments see :func:`bilinear`."""
    low, part = _place(length, target, positions)
    a = _CUBIC

    # The filter at distances x of up to 1, and from 1 to 2.
    def near(x: Tensor) -> Tensor:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    factor = torch.stack([far(part + 1), near(part), near(1 - part), far(2 - part)])
    index = (low + torch.arange(-1, 3, device=low.device)[:, None]).clamp(0, length - 1)
    return _reads(index, factor)


def resample(x: Tensor, rows: Reads, columns: Reads, origin: Size = (0, 0)) -> Tensor:
    """Resample a map, or a part of it that contains all values read.

    Args:
        x: (B, K, height, width).
        rows: weighted sums along the vertical axis.
        columns: weighted sums along the horizontal axis.
        origin: (row, column) in the map of the first value of ``x``.

    Returns:
        (B, K, count of ``rows``, count of ``columns``).
    """
    x = x[
        :,
        :,
        rows.first - origin[0] : rows.stop - origin[0],
        columns.first - origin[1] : columns.stop - origin[1],
    ]
    if _plain(rows) and _plain(columns):
        return F.avg_pool2d(x, (len(rows.places), len(columns.places)))
    return along(along(x, 2, rows), 3, columns)


def resize(x: Tensor, size: Size) -> Tensor:
    """Resize a whole map by PyTorch's bilinear interpolation; antialiased on axes that shrink.

    Args:
        x: (B, C, H, W), of any floating-point type. 16-bit types are computed in float32 on a CPU,
            where PyTorch does not support them.
        size: (height, width) of the result.
    """
    exact = x.float() if x.dtype.itemsize < 4 and x.device.type == "cpu" else x
    # PyTorch 2.13 gives wrong values for results one pixel wide and several high; it is right for
    # their transpose.
    narrow = size[1] == 1
    if narrow:
        exact, size = exact.mT, (1, size[0])
    out = F.interpolate(exact, size=size, mode="bilinear", align_corners=False, antialias=True)
    return (out.mT if narrow else out).to(x.dtype)


def along(x: Tensor, axis: int, reads: Reads) -> Tensor:
    """Resample one axis, 2 or 3, of a map that begins with the first value read."""
    shape = (-1, 1) if axis == 2 else (-1,)
    out = None
    for places, factor in zip(reads.places, reads.factor.to(x.dtype), strict=True):
        part, factor = x.index_select(axis, places.to(x.device)), factor.to(x.device).view(shape)
        out = part * factor if out is None else out.addcmul_(part, factor)
    assert out is not None
    return out


def _plain(reads: Reads) -> bool:
    """Return whether the output values are means of consecutive runs of T input values.

    The weights of an output value sum to 1; they make a mean if they are all equal.
    """
    taps, count = reads.places.shape
    if reads.stop - reads.first != taps * count:
        return False
    ordered = torch.arange(taps * count, device=reads.places.device).view(count, taps).T
    return torch.equal(reads.places, ordered) and bool((reads.factor == reads.factor[0, 0]).all())


def _reads(index: Tensor, factor: Tensor) -> Reads:
    first = int(index.min())
    return Reads(first, int(index.max()) + 1, index - first, factor.double())


def _place(length: int, target: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return floor and fraction of input positions.

    Output position p lies at input position (p + ½)·length/target − ½ = numerator / (2·target).
    Integers keep the floor exact.
    """
    numerator = (2 * positions + 1) * length - target
    low = numerator.div(2 * target, rounding_mode="floor")
    return low, (numerator - low * 2 * target).double() / (2 * target)
