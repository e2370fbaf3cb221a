"""Operators in plain PyTorch for any device and dtype, without a copy of the features per tap.

Weights are tap-major, (B, T, H, W) for T taps, so that each of T passes reads one contiguous plane
of weights and one shifted view of the features, and does one multiply-add over (B, C, H, W).
Unfolding would make T copies of the features instead.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backends.tiled_attention import window_attention
from upfeat.geometry import (
    cell_distances,
    gather_cells,
    gather_pixels,
    reflect_pad,
    scatter_pixels,
    slots_of_cells,
    spatial_kernel,
    window_radius,
)

__all__ = [
    "adaptive_conv2d",
    "bilateral_weights",
    "joint_bilateral_upsample",
    "neighbourhood_upsample",
    "neighbourhood_weights",
    "window_attention",
]


def adaptive_conv2d(padded: Tensor, weights: Tensor) -> Tensor:
    """See :func:`upfeat.functional.adaptive_conv2d`."""
    taps, height, width = weights.shape[1:]
    side = 2 * window_radius(taps) + 1
    out = padded[:, :, :height, :width] * weights[:, :1]
    for tap in range(1, taps):
        row, column = divmod(tap, side)
        window = padded[:, :, row : row + height, column : column + width]
        out = torch.addcmul(out, window, weights[:, tap : tap + 1])
    return out


def joint_bilateral_upsample(features: Tensor, weights: Tensor) -> Tensor:
    """See :func:`upfeat.functional.joint_bilateral_upsample`."""
    size = (weights.shape[2], weights.shape[3])
    resized = F.interpolate(features, size=size, mode="bicubic", align_corners=False)
    return adaptive_conv2d(reflect_pad(resized, window_radius(weights.shape[1])), weights)


def bilateral_weights(
    keys: Tensor, temperature: Tensor, sigma_spatial: Tensor, radius: int
) -> Tensor:
    """See :func:`upfeat.functional.bilateral_weights`; computed in float32 at least."""
    dtype, keys = keys.dtype, keys.to(torch.promote_types(keys.dtype, torch.float32))
    scores = [(keys * part).sum(1) for part in _taps(reflect_pad(keys, radius), radius)]
    weights = torch.softmax(temperature * torch.stack(scores, dim=1), dim=1)  # (B, T, H, W)
    weights = weights * spatial_kernel(radius, sigma_spatial)[:, None, None]
    return (weights / weights.sum(1, keepdim=True).clamp(min=1e-7)).to(dtype)


_COPIES = 49
"""Taps up to which neighbourhoods are copied, for one product per cell, on a grid to itself too."""


def _tap_by_tap(radius: int, output_size: Sequence[int], grid_size: Sequence[int]) -> bool:
    """Return whether a cell is one pixel and its neighbourhood too large to be copied."""
    return (2 * radius + 1) ** 2 > _COPIES and tuple(output_size) == tuple(grid_size)


def _around(
    cells: Tensor,
    radius: int,
    counts: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
) -> Tensor:
    """A window of cells and ``radius`` more on every side, edges replicated.

    Args:
        cells: (B, K, h, w), a window of the grid from ``grid_origin`` on.
        radius: number of cells more on every side.
        counts: height and width of the window.
        origin: its first row and column.
        grid_size: size of the whole grid.
        grid_origin: first row and column of ``cells``.

    Returns:
        (B, K, height + 2r, width + 2r).
    """
    for axis, (count, start, length, skip) in enumerate(
        zip(counts, origin, grid_size, grid_origin, strict=True), start=2
    ):
        places = torch.arange(start - radius, start + count + radius, device=cells.device)
        cells = cells.index_select(axis, places.clamp(0, length - 1) - skip)
    return cells


def _taps(around: Tensor, radius: int) -> list[Tensor]:
    """Views of a padded map at each offset, row-major, (B, K, height, width) each."""
    side = 2 * radius + 1
    height, width = (length - 2 * radius for length in around.shape[2:])
    return [
        around[:, :, row : row + height, column : column + width]
        for row in range(side)
        for column in range(side)
    ]


def neighbourhood_upsample(
    features: Tensor,
    weights: Tensor,
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
) -> Tensor:
    """See :func:`upfeat.functional.neighbourhood_upsample`.

    The weights cover a window, from ``origin`` on, of an output of ``output_size``; the features
    cover a window, from ``grid_origin`` on, of a grid of ``grid_size``.

    All pixels of one coarse cell read the same (2r+1)² cells, so the sum is one small matrix
    product per cell: (pixels of the cell × taps)·(taps × C). If the output is not a whole multiple
    of the grid, cells have different numbers of pixels; all are padded to the largest number, and
    the padding is dropped from the result.
    """
    radius, counts = window_radius(weights.shape[1]), weights.shape[2:]
    if _tap_by_tap(radius, output_size, grid_size):
        around = _around(features, radius, counts, origin, grid_size, grid_origin)
        total = features.new_zeros(())
        for tap, part in enumerate(_taps(around, radius)):
            total = torch.addcmul(total, part, weights[:, tap, None])
        return total
    rows, columns = (
        slots_of_cells(*axis, skip=skip)
        for *axis, skip in zip(grid_size, output_size, origin, counts, grid_origin, strict=True)
    )
    # Keep only the cells that are read: the whole map may be many times larger.
    top, left = (max(axis.first - radius, 0) for axis in (rows, columns))
    features = features[
        :,
        :,
        top : rows.first + rows.cells + radius,
        left : columns.first + columns.cells + radius,
    ]
    rows, columns = (
        axis._replace(first=axis.first - before) for axis, before in ((rows, top), (columns, left))
    )
    around = gather_cells(features, radius, rows, columns).mT  # (B·h·w, T, C)
    out = torch.bmm(gather_pixels(weights, rows, columns), around)  # (B·h·w, pixels, C)
    return scatter_pixels(out, features.shape[0], rows, columns)


def neighbourhood_weights(
    queries: Tensor,
    keys: Tensor,
    temperature: Tensor,
    sigma: Tensor,
    radius: int,
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
) -> Tensor:
    """See :func:`upfeat.functional.neighbourhood_weights`; one matrix product per coarse cell.

    Computed in float32 at least: a temperature multiplies the rounding of the products.
    """
    dtype, exact = queries.dtype, torch.promote_types(queries.dtype, torch.float32)
    queries, keys = queries.to(exact), keys.to(exact)
    batch, _, height, width = queries.shape
    axes = [
        (cells, length, start, count)
        for cells, length, start, count in zip(
            grid_size, output_size, origin, (height, width), strict=True
        )
    ]
    if _tap_by_tap(radius, output_size, grid_size):
        around = _around(keys, radius, (height, width), origin, grid_size, grid_origin)
        scores = [(queries * part).sum(1) for part in _taps(around, radius)]
        products = torch.stack(scores, dim=1)  # (B, T, height, width)
    else:
        rows, columns = (
            slots_of_cells(*axis, skip=skip) for axis, skip in zip(axes, grid_origin, strict=True)
        )
        around = gather_cells(keys, radius, rows, columns)  # (cells, D, T)
        products = torch.bmm(gather_pixels(queries, rows, columns), around)  # (cells, pixels, T)
        products = scatter_pixels(products, batch, rows, columns)  # (B, T, height, width)
    (down, below), (across, beside) = (cell_distances(*axis, radius, queries) for axis in axes)
    squared = down[:, None, :, None] + across[:, None]  # (2r+1, 2r+1, height, width)
    far = below[:, None, :, None] | beside[:, None]
    away = (squared / (2 * sigma**2)).masked_fill(far, torch.inf).flatten(0, 1)
    return torch.softmax(temperature * products - away, dim=1).to(dtype)
