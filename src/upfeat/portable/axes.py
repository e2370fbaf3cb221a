"""Resampling along axes by index arithmetic, for lengths that are known only when a graph runs.

The functions use integers, ``arange`` and gathers only: no branch, list or constant depends on a
length, so one graph serves every size. Pixel p of an axis of ``length`` pixels lies in cell
⌊(p + ½)·cells/length⌋ of ``cells``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Length = int
"""Length of an axis; a ``torch.SymInt`` while a graph is traced."""


class Taps(NamedTuple):
    """Positions and factors of the weighted sums that resample an axis to ``count`` values."""

    places: Tensor
    """(count, T) positions that are read, T for each value."""
    factors: Tensor
    """(count, T) float32, the factor of each position."""


def read(x: Tensor, axis: int, taps: Tensor) -> Tensor:
    """Gather positions along an axis.

    Args:
        x: tensor of any shape.
        axis: axis to read along, counted from 0.
        taps: (count, T) positions.

    Returns:
        The shape of ``x``, with count and T in place of the axis.
    """
    found = x.index_select(axis, taps.flatten())
    return found.unflatten(axis, (taps.shape[0], taps.shape[1]))


def weigh(x: Tensor, taps: Taps) -> Tensor:
    """Compute the weighted sums along axis −2: (…, L, width) -> (…, count, width).

    Whole rows are gathered, and their sums are a product of matrices.
    """
    found = read(x, x.dim() - 2, taps.places)  # (…, count, T, width)
    return (taps.factors.to(x.dtype)[:, None, :] @ found).squeeze(-2)


def resample(x: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Resample both axes of a map: (B, K, H, W) -> (B, K, count of rows, count of columns).

    Columns are gathered as rows of the transposed map, since run-times copy rows many times faster.
    """
    return weigh(weigh(x, rows).mT, columns).mT


def pooled(length: Length, cells: Length, device: torch.device, *, most: int | None = None) -> Taps:
    """Return the taps of adaptive average pooling.

    Args:
        length: number of values to pool.
        cells: number of pooled values.
        device: device of the result.
        most: largest number of values in a mean, if that is known; ``None`` to derive a bound.
    """
    index = torch.arange(cells, device=device)
    start = index * length // cells
    stop = ((index + 1) * length + cells - 1) // cells
    taps = length // cells + 2 if most is None else most
    places = start[:, None] + torch.arange(taps, device=device)
    inside = (places < stop[:, None]).float()
    factors = inside / (stop - start)[:, None].float()
    return Taps(places.clamp(max=length - 1), factors)


def bilinear(length: Length, target: Length, device: torch.device) -> Taps:
    """Return the taps of bilinear interpolation from ``length`` to ``target`` values.

    Equals PyTorch's interpolation with ``antialias=True`` and ``align_corners=False``: when
    reducing, the triangle filter is as wide as a value of the result on either side.
    """
    index = torch.arange(target, device=device)
    taps = 2 * (length // target) + 3
    # Half the triangle's base is one value of the result or of the source, the wider of both. In
    # units of 1/(2·target) source values, all positions are exact integers.
    wide = torch.sym_max(length, target)
    centre = (2 * index + 1) * length
    start = ((centre - 2 * wide + target).clamp(min=0)) // (2 * target)
    stop = ((centre + 2 * wide + target) // (2 * target)).clamp(max=length)
    places = start[:, None] + torch.arange(taps, device=device)
    away = ((2 * places + 1) * target - centre[:, None]).abs()
    height = (1 - away.float() / (2 * wide)).clamp(min=0)
    factors = torch.where(places < stop[:, None], height, 0.0)
    return Taps(places.clamp(max=length - 1), factors / factors.sum(1, keepdim=True))


def resize(x: Tensor, size: tuple[Length, Length]) -> Tensor:
    """Resize a map bilinearly, with antialiasing when reducing: (B, K, H, W) -> (B, K, *size)."""
    rows, columns = (
        bilinear(length, target, x.device) for length, target in zip(x.shape[2:], size, strict=True)
    )
    return resample(x, rows, columns)


def on_grid(x: Tensor, size: tuple[Length, Length]) -> Tensor:
    """Resample maps as :func:`upfeat.resampling.on_grid` does, (B, K, H, W) -> (B, K, *size).

    A graph cannot branch on a size, so it computes both the means over cells and the interpolation,
    and selects one.
    """
    rows, columns = (
        pooled(length, cells, x.device) for length, cells in zip(x.shape[2:], size, strict=True)
    )
    means = resample(x, rows, columns)
    between = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    finer = [
        torch.arange(length, length + 1, device=x.device) >= cells
        for length, cells in zip(x.shape[2:], size, strict=True)
    ]
    return torch.where(finer[0] & finer[1], means, between)


class Slots(NamedTuple):
    """Assignment of an axis's pixels to slots, of which every cell has P, enough for its pixels."""

    pixels: Tensor
    """(cells, P) index of the pixel in every slot; surplus slots have a pixel of a later cell."""
    filled: Tensor
    """(cells, P) bool, True where the slot's pixel lies in the cell."""
    own: Tensor
    """(length,) cell of every pixel."""
    place: Tensor
    """(length,) slot of every pixel in its cell."""
    away: Tensor
    """(cells, P) integers: distance from the cell's centre to the pixel, in 1/(2·length) cell."""


def slots(length: Length, cells: Length, device: torch.device) -> Slots:
    """Assign the ``length`` pixels of an axis to slots of the cells that they lie in."""
    most = (length + cells - 1) // cells
    index = torch.arange(cells + 1, device=device)
    first = (2 * length * index + cells - 1) // (2 * cells)  # the first pixel of every cell
    pixels = first[:-1, None] + torch.arange(most, device=device)
    filled = pixels < first[1:, None]
    pixels = pixels.clamp(max=length - 1)
    away = (2 * pixels + 1) * cells - (2 * index[:-1, None] + 1) * length
    pixel = torch.arange(length, device=device)
    own = (2 * pixel + 1) * cells // (2 * length)
    return Slots(pixels, filled, own, pixel - first[own], away)


def around(cells: Length, radius: int, device: torch.device) -> Tensor:
    """Return the indices of the cells around each cell, ends replicated: (cells, 2·radius + 1)."""
    offset = torch.arange(-radius, radius + 1, device=device)
    return (torch.arange(cells, device=device)[:, None] + offset).clamp(min=0).clamp(max=cells - 1)


def rounded(length: Length, stride: int) -> Length:
    """Return ``round(length / stride)`` with Python's rounding of halves to even."""
    twice = 2 * length + stride
    up, rest = twice // (2 * stride), twice % (2 * stride)
    half = 1 - (rest + 2 * stride - 1) // (2 * stride)  # 1 if rest is 0, which means a half
    return up - half * (up % 2)
