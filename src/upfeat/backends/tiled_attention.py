"""Window attention in plain PyTorch: matrix products of tiles of pixels with their cells.

Neighbouring pixels attend to nearly the same cells. A tile reads all cells that any of its pixels
attends to, and masks those that a given pixel does not. The weights of only one tile at a time are
in memory.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_WEIGHTS = 2**21
"""Largest number of weights in a tile of one image: 8 MiB in float32."""
_SLACK = 2
"""Number of cells along an axis that a tile may read beyond those of its first pixel."""
_STRIP = 32
"""Width in pixels that must fit in a tile, whatever number of rows is chosen."""


class Run(NamedTuple):
    """Neighbouring pixels on one axis, and the cells that any of them attends to."""

    start: int
    stop: int
    """One past the last pixel."""
    first: int
    end: int
    """One past the last cell."""


def window_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    heads: int,
    scale: float,
    blocks: Sequence[int],
) -> Tensor:
    """See :func:`upfeat.functional.window_attention`."""
    # Inner products, softmax and sums of values are computed in float32 at least.
    exact = torch.promote_types(torch.promote_types(queries.dtype, values.dtype), torch.float32)
    queries = (queries.to(exact) * scale).unflatten(1, (heads, -1))  # (B, N, D/N, H, W)
    keys = keys.to(exact).unflatten(1, (heads, -1))
    # With runs of one pixel this is the largest number of cells that a pixel attends to.
    widest = max(run.end - run.first for run in runs(columns, 0, 1))
    bands = []
    for band in runs(rows, _SLACK, _most_rows(rows, widest, heads)):
        a_pixel = (band.end - band.first) * (widest + _SLACK) * heads
        most = max(_MOST_WEIGHTS // (a_pixel * (band.stop - band.start)), 1)
        tiles = [
            _tile(queries, keys, values, band, run, (rows, columns), blocks)
            for run in runs(columns, _SLACK, most)
        ]
        bands.append(torch.cat(tiles, dim=3).to(values.dtype))
    return torch.cat(bands, dim=2)


def _most_rows(rows: Sequence[int], widest: int, heads: int) -> int:
    """Most rows of pixels in a band of which :data:`_STRIP` columns fit in a tile."""
    tallest = max(run.end - run.first for run in runs(rows, 0, 1)) + _SLACK
    return max(_MOST_WEIGHTS // (tallest * (widest + _SLACK) * heads * _STRIP), 1)


def runs(bounds: Sequence[int], slack: int, most: int) -> Iterator[Run]:
    """Divide an axis into runs of pixels that attend to nearly the same cells.

    Args:
        bounds: the first cell of every pixel, then one past the last cell of every pixel.
        slack: number of cells that a run may read beyond those of its first pixel.
        most: largest number of pixels in a run.
    """
    length = len(bounds) // 2
    start, first, last = 0, bounds[0], bounds[length]
    width = last - first
    for pixel in range(1, length):
        low, high = min(first, bounds[pixel]), max(last, bounds[length + pixel])
        if high - low > width + slack or pixel - start >= most:
            yield Run(start, pixel, first, last)
            start, first, last = pixel, bounds[pixel], bounds[length + pixel]
            width = last - first
        else:
            first, last = low, high
    yield Run(start, length, first, last)


def _tile(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    band: Run,
    run: Run,
    bounds: tuple[Sequence[int], Sequence[int]],
    blocks: Sequence[int],
) -> Tensor:
    """Attend at the pixels of one band of rows and one run of columns, (B, C, height, width)."""
    query = queries[..., band.start : band.stop, run.start : run.stop].flatten(3)  # (B, N, d, P)
    cells = (..., slice(band.first, band.end), slice(run.first, run.end))
    key, value = keys[cells].flatten(3), values[cells].flatten(2)  # (B, N, d, M), (B, C, M)
    logits = query.mT @ key  # (B, N, P, M)
    outside = _outside(bounds, band, run, logits.device)
    if outside is not None:
        logits = logits.masked_fill(outside, -torch.inf)
    weights = logits.softmax(3)
    if len(blocks) == 1:
        weights = weights.mean(1, keepdim=True)
    value = value.to(weights.dtype)
    parts = [block @ weights[:, n].mT for n, block in enumerate(value.split(list(blocks), dim=1))]
    return torch.cat(parts, dim=1).unflatten(2, (band.stop - band.start, run.stop - run.start))


def _outside(
    bounds: tuple[Sequence[int], Sequence[int]], band: Run, run: Run, device: torch.device
) -> Tensor | None:
    """Mask (P, M) of the cells that each pixel does not attend to; ``None`` if there are none."""
    seen = []
    for axis, tile in zip(bounds, (band, run), strict=True):
        length = len(axis) // 2
        first = axis[tile.start : tile.stop]
        stop = axis[length + tile.start : length + tile.stop]
        cells = range(tile.first, tile.end)
        seen.append([[a <= cell < b for cell in cells] for a, b in zip(first, stop, strict=True)])
    if all(all(map(all, axis)) for axis in seen):
        return None
    rows, columns = (torch.tensor(axis, device=device) for axis in seen)
    # (rows, 1, their cells, 1) and (1, columns, 1, their cells) -> (P, M)
    return ~(rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
