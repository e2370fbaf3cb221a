"""Reads along one axis by index arithmetic alone, for lengths that are known when a graph runs.

Everything here is made of whole numbers, ``arange`` and gathers: no branch, list or constant
depends on a length, so one graph serves every size. Pixel p of ``length`` lies in cell
⌊(p + ½)·cells/length⌋.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Length = int
"""Of an axis; ``torch.SymInt`` while a graph is traced."""


class Taps(NamedTuple):
    """Positions and factors of which every value along an axis is made."""

    places: Tensor
    """(count, T), positions that are read."""
    factors: Tensor
    """(count, T) float32."""


def read(x: Tensor, axis: int, taps: Tensor) -> Tensor:
    """Gather positions along an axis.

    Args:
        x: any shape.
        axis: counted from 0.
        taps: (count, T) positions.

    Returns:
        The shape of ``x``, with count and T in place of the axis.
    """
    found = x.index_select(axis, taps.flatten())
    return found.unflatten(axis, (taps.shape[0], taps.shape[1]))


def weigh(x: Tensor, taps: Taps) -> Tensor:
    """Sum what is read along axis −2 with its factors: (…, L, width) -> (…, count, width).

    Rows are copied whole, and summed as a product of matrices.
    """
    found = read(x, x.dim() - 2, taps.places)  # (…, count, T, width)
    return (taps.factors.to(x.dtype)[:, None, :] @ found).squeeze(-2)


def resample(x: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """(B, K, H, W) -> (B, K, rows' count, columns' count).

    Columns are read as rows of the transposed map: run-times copy rows many times as fast.
    """
    return weigh(weigh(x, rows).mT, columns).mT


def pooled(length: Length, cells: Length, device: torch.device, *, most: int | None = None) -> Taps:
    """Adaptive average pooling of ``length`` values to ``cells``.

    Args:
        length: values in.
        cells: values out.
        device: of the result.
        most: values that make one at most, where that is known; ``None`` where it is not.
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
    """Bilinear interpolation of ``length`` values to ``target``; a wider triangle where fewer.

    As PyTorch's with ``antialias=True`` and ``align_corners=False``.
    """
    index = torch.arange(target, device=device)
    taps = 2 * (length // target) + 3
    # The triangle is as wide as a value of the result, or of the source where that is wider. In
    # units of 1/(2·target): places are exact whole numbers.
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
    """Bilinear interpolation, antialiased where it becomes smaller: (B, K, *size)."""
    rows, columns = (
        bilinear(length, target, x.device) for length, target in zip(x.shape[2:], size, strict=True)
    )
    return resample(x, rows, columns)


class Slots(NamedTuple):
    """Pixels of an axis laid out as equally many slots of each cell."""

    pixels: Tensor
    """(cells, P), the pixel in every slot; a neighbour's where a cell has fewer than others."""
    filled: Tensor
    """(cells, P) bool, whether it is a pixel of the cell."""
    own: Tensor
    """(length,), the cell of every pixel."""
    place: Tensor
    """(length,), the slot of every pixel in its cell."""
    away: Tensor
    """(cells, P) whole numbers, from the cell's centre to the pixel, in 1/(2·length) of a cell."""


def slots(length: Length, cells: Length, device: torch.device) -> Slots:
    """Lay the pixels of an axis out by the cells that they lie in."""
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
    """The cells around each one, the last replicated: (cells, 2·radius + 1)."""
    offset = torch.arange(-radius, radius + 1, device=device)
    return (torch.arange(cells, device=device)[:, None] + offset).clamp(min=0).clamp(max=cells - 1)


def rounded(length: Length, stride: int) -> Length:
    """``round(length / stride)``, halves to the even number, as Python rounds."""
    twice = 2 * length + stride
    up, rest = twice // (2 * stride), twice % (2 * stride)
    half = 1 - (rest + 2 * stride - 1) // (2 * stride)  # 1 where the rest is 0
    return up - half * (up % 2)
