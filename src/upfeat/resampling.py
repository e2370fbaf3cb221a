"""Pooling and interpolation of any part of a map: how positions of one axis read another.

PyTorch resamples whole maps. Here the same arithmetic is laid out as indices and factors along each
axis, so that a window of the result costs that window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.types import Size

_CUBIC = -0.75


class Reads(NamedTuple):
    """Dependence of a run of values along one axis on those along another."""

    first: int
    """The first position that is read."""
    stop: int
    """One past the last."""
    places: Tensor
    """(T, count), positions from ``first`` on; T of them make one value."""
    factor: Tensor
    """(T, count) float64."""


def pooled(length: int, cells: int, positions: Tensor) -> Reads:
    """Adaptive average pooling of ``length`` values to ``cells``, at some of the cells.

    Args:
        length: values in.
        cells: values out.
        positions: (count,) whole numbers below ``cells``, at least one.
    """
    start = positions * length // cells
    stop = -(-(positions + 1) * length // cells)
    taps = torch.arange(int((stop - start).max()))[:, None]
    inside = start + taps < stop
    return _reads((start + taps).minimum(stop - 1), inside / inside.sum(0).double())


def bilinear(length: int, target: int, positions: Tensor, *, antialias: bool = False) -> Reads:
    """Bilinear interpolation of ``length`` values to ``target``, half-pixel centres.

    Args:
        length: values in.
        target: values out.
        positions: (count,) whole numbers below ``target``, at least one.
        antialias: widen the triangle where the result is smaller, as PyTorch does.
    """
    scale = length / target
    if antialias and scale > 1:
        centre = scale * (positions + 0.5)
        start = (centre - scale + 0.5).long().clamp(min=0)
        stop = (centre + scale + 0.5).long().clamp(max=length)
        taps = start + torch.arange(int((stop - start).max()))[:, None]
        factor = (1 - ((taps - centre + 0.5) / scale).abs()).clamp(min=0) * (taps < stop)
        return _reads(taps.minimum(stop - 1), factor / factor.sum(0))
    low, part = _place(length, target, positions)
    below = low < 0
    low, part = low.clamp(min=0), part.masked_fill(below, 0)
    high = (low + 1).clamp(max=length - 1)
    return _reads(torch.stack([low, high]), torch.stack([1 - part, part]))


def bicubic(length: int, target: int, positions: Tensor) -> Reads:
    """Bicubic interpolation (a = −0.75) of ``length`` values to ``target``."""
    low, part = _place(length, target, positions)
    a = _CUBIC

    def near(x: Tensor) -> Tensor:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    factor = torch.stack([far(part + 1), near(part), near(1 - part), far(2 - part)])
    index = (low + torch.arange(-1, 3)[:, None]).clamp(0, length - 1)
    return _reads(index, factor)


def resample(x: Tensor, rows: Reads, columns: Reads, origin: Size = (0, 0)) -> Tensor:
    """Read a map.

    Args:
        x: (B, K, height, width), at least as far as rows and columns read it.
        rows: count values down.
        columns: count values across.
        origin: the position of the first value of ``x`` on either axis.

    Returns:
        (B, K, rows' count, columns' count).
    """
    x = x[
        :,
        :,
        rows.first - origin[0] : rows.stop - origin[0],
        columns.first - origin[1] : columns.stop - origin[1],
    ]
    if _plain(rows) and _plain(columns):
        return F.avg_pool2d(x, (len(rows.places), len(columns.places)))
    return _along(_along(x, 2, rows), 3, columns)


def resize(x: Tensor, size: Size) -> Tensor:
    """Bilinear interpolation of a whole map, as PyTorch's; antialiased where it becomes smaller.

    Args:
        x: (B, C, H, W), of any floating type: PyTorch on a CPU has none of 16 bits.
        size: (height, width) of the result.
    """
    exact = x.float() if x.dtype.itemsize < 4 and x.device.type == "cpu" else x
    # PyTorch 2.13 gives wrong values for results one pixel wide; those one pixel high are right.
    narrow = size[1] == 1
    if narrow:
        exact, size = exact.mT, (1, size[0])
    out = F.interpolate(exact, size=size, mode="bilinear", align_corners=False, antialias=True)
    return (out.mT if narrow else out).to(x.dtype)


def _along(x: Tensor, axis: int, reads: Reads) -> Tensor:
    shape = (-1, 1) if axis == 2 else (-1,)
    out = None
    for places, factor in zip(reads.places, reads.factor.to(x.dtype), strict=True):
        part = x.index_select(axis, places.to(x.device)) * factor.to(x.device).view(shape)
        out = part if out is None else out + part
    assert out is not None
    return out


def _plain(reads: Reads) -> bool:
    """Return whether every value is the mean of equally many, side by side."""
    taps, count = reads.places.shape
    if reads.stop - reads.first != taps * count:
        return False
    ordered = torch.arange(taps * count).view(count, taps).T
    return torch.equal(reads.places, ordered) and bool((reads.factor == reads.factor[0, 0]).all())


def _reads(index: Tensor, factor: Tensor) -> Reads:
    first = int(index.min())
    return Reads(first, int(index.max()) + 1, index - first, factor.double())


def _place(length: int, target: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Position in the source, ((p + ½)·length/target − ½), as floor and fraction."""
    numerator = (2 * positions + 1) * length - target
    low = numerator.div(2 * target, rounding_mode="floor")
    return low, (numerator - low * 2 * target).double() / (2 * target)
