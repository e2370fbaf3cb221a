"""Pixels, cells and windows: reflection at borders, interpolation as matrices, cells of pixels.

On an axis of ``length`` pixels and ``cells`` cells, in units of cells, pixel p is at
(p + ½)·cells/length and the centre of cell i at i + ½ (align_corners=False). The cell of a pixel is
computed with integers, exactly. A *window* is a run of consecutive pixels of the axis.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def reflect(index: Tensor, n: int) -> Tensor:
    """Reflect indices about the centres of the first and last of n pixels, as often as needed.

    Args:
        index: integer or floating-point indices, any shape; integers are reflected exactly.
        n: number of pixels along the axis.

    Returns:
        Indices in [0, n - 1], of the same type and shape.
    """
    if n == 1:
        return torch.zeros_like(index)
    return (torch.remainder(index + (n - 1), 2 * (n - 1)) - (n - 1)).abs()


def reflected_range(start: int, stop: int, length: int, device: torch.device) -> Tensor:
    """Indices from ``start`` to before ``stop``, reflected where outside 0 to ``length`` − 1."""
    return reflect(torch.arange(start, stop, device=device), length)


def window_radius(taps: int) -> int:
    """The radius r of a window with ``taps`` = (2r+1)² taps.

    Raises:
        ValueError: ``taps`` is not the square of an odd number.
    """
    side = math.isqrt(max(taps, 0))
    if side * side != taps or side % 2 == 0:
        raise ValueError(
            f"weights has {taps} taps (dimension 1); a window of radius r has (2r+1)² of them: "
            "1, 9, 25, 49, …"
        )
    return side // 2


def spatial_kernel(radius: int, sigma_spatial: Tensor) -> Tensor:
    """exp(−|u|²/(2σ²)) with u on linspace(−1, 1, 2r+1)², flattened row-major.

    Args:
        radius: r ≥ 0.
        sigma_spatial: scalar tensor σ, as a fraction of the radius; the result has its dtype and
            device.

    Returns:
        ((2r+1)²,).
    """
    axis = torch.linspace(
        -1, 1, 2 * radius + 1, dtype=sigma_spatial.dtype, device=sigma_spatial.device
    )
    squared = axis[:, None] ** 2 + axis[None, :] ** 2
    return torch.exp(-squared / (2 * sigma_spatial**2)).flatten()  # (T,)


def reflect_pad(x: Tensor, radius: int) -> Tensor:
    """Reflect-pad the last two axes by ``radius``, which may exceed their length.

    PyTorch refuses a reflection wider than the tensor; here indices are reflected repeatedly, so
    that a 2-pixel map can be padded too. Where PyTorch's padding works, the results are equal.

    Args:
        x: (B, C, H, W).
        radius: number r of pixels on every side, ≥ 0.

    Returns:
        (B, C, H+2r, W+2r).
    """
    height, width = x.shape[-2:]
    if min(height, width) > radius:
        return F.pad(x, (radius,) * 4, mode="reflect")
    rows, columns = (
        reflected_range(-radius, length + radius, length, x.device) for length in (height, width)
    )
    return x.index_select(2, rows).index_select(3, columns)


def interpolation_matrix(cells: int, length: int, mode: str, like: Tensor) -> Tensor:
    """PyTorch's interpolation from ``cells`` to ``length`` samples, as a matrix.

    Args:
        cells: number of input samples.
        length: number of output samples.
        mode: "nearest-exact", "bilinear" or "bicubic", half-pixel centres.
        like: tensor whose dtype and device the matrix has.

    Returns:
        (length, cells).
    """
    unit = torch.eye(cells, dtype=like.dtype, device=like.device)[
        None, None
    ]  # (1, 1, cells, cells)
    align_corners = None if mode == "nearest-exact" else False
    # Columns keep their size, so that only the rows are resized.
    out = F.interpolate(unit, size=(length, cells), mode=mode, align_corners=align_corners)
    return out[0, 0]


class Slots(NamedTuple):
    """Layout of a window's pixels on one axis, with the same number of slots for every cell."""

    first: int
    """Cell of the window's first pixel."""
    cells: int
    """Number of cells that contain pixels of the window."""
    per_cell: int
    """Number of slots of every cell."""
    pixels: list[int] | None
    """Pixel that fills each slot; pixels are repeated in cells that have fewer than others.
    ``None`` if slots and pixels coincide."""
    slots: list[int] | None
    """Slot that contains each pixel; ``None`` if slots and pixels coincide."""


def slots_of_cells(cells: int, length: int, start: int, count: int, skip: int = 0) -> Slots:
    """Lay out the ``count`` pixels of a window on one axis as slots of their cells.

    Args:
        cells: number of cells on the axis.
        length: number of pixels on the axis.
        start: first pixel of the window.
        count: number of pixels of the window.
        skip: cell from which :attr:`Slots.first` is counted.
    """
    if start == 0 and count == length and length % cells == 0:
        # Without lists of that length: an exported graph may have symbolic sizes.
        return Slots(-skip, cells, length // cells, None, None)
    # Plain integers: sizes are known, and a compiled graph must not depend on a tensor's value.
    low = (2 * start + 1) * cells // (2 * length)
    high = (2 * (start + count) - 1) * cells // (2 * length)
    # First pixel of every cell, and of the cell after the last, counted from the window's start.
    first = [
        min(max(first_pixel(cells, length, index) - start, 0), count)
        for index in range(low, high + 2)
    ]
    most = max(stop - begin for begin, stop in pairwise(first))
    pixels = [min(begin + offset, count - 1) for begin in first[:-1] for offset in range(most)]
    slots = [
        index * most + offset
        for index, (begin, stop) in enumerate(pairwise(first))
        for offset in range(stop - begin)
    ]
    if len(pixels) == len(slots):
        return Slots(low - skip, high + 1 - low, most, None, None)
    return Slots(low - skip, high + 1 - low, most, pixels, slots)


def gather_pixels(x: Tensor, rows: Slots, columns: Slots) -> Tensor:
    """Rearrange (B, K, H, W) to one matrix per cell, (B·cells, pixels of the cell, K)."""
    for axis, pixels in ((2, rows.pixels), (3, columns.pixels)):
        if pixels is not None:
            x = x.index_select(axis, torch.tensor(pixels, device=x.device))
    batch, depth, down, across = *x.shape[:2], rows.per_cell, columns.per_cell
    x = x.reshape(batch, depth, rows.cells, down, columns.cells, across)
    cells = batch * rows.cells * columns.cells  # -1 would be ambiguous with an empty batch
    return x.permute(0, 2, 4, 3, 5, 1).reshape(cells, down * across, depth)


def scatter_pixels(x: Tensor, batch: int, rows: Slots, columns: Slots) -> Tensor:
    """Inverse of :func:`gather_pixels`: (B·cells, pixels of the cell, K) to (B, K, H, W)."""
    down, across = rows.per_cell, columns.per_cell
    x = x.reshape(batch, rows.cells, columns.cells, down, across, x.shape[-1])
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, K, cells, down, cells, across)
    x = x.reshape(batch, x.shape[1], rows.cells * down, columns.cells * across)
    for axis, slots in ((2, rows.slots), (3, columns.slots)):
        if slots is not None:
            x = x.index_select(axis, torch.tensor(slots, device=x.device))
    return x


def gather_cells(coarse: Tensor, radius: int, rows: Slots, columns: Slots) -> Tensor:
    """Gather the cells around each cell: (B, K, h, w) to (B·cells, K, (2r+1)²).

    Edges are replicated. The centres are the cells of ``rows`` and ``columns``.
    """
    batch, depth = coarse.shape[:2]
    padded = F.pad(coarse, (radius,) * 4, mode="replicate")
    padded = padded[:, :, rows.first : rows.first + rows.cells + 2 * radius]
    padded = padded[..., columns.first : columns.first + columns.cells + 2 * radius]
    taps, cells = (2 * radius + 1) ** 2, rows.cells * columns.cells
    around = F.unfold(padded, 2 * radius + 1).view(batch, depth, taps, cells)
    return around.permute(0, 3, 1, 2).reshape(batch * cells, depth, taps)


def cell_of_pixels(cells: int, length: int, start: int, count: int, device: torch.device) -> Tensor:
    """The cells ⌊(p + ½)·cells/length⌋ of the pixels p in ``start`` to ``start + count − 1``."""
    pixels = torch.arange(start, start + count, device=device)
    return (2 * pixels + 1) * cells // (2 * length)


def first_pixel(cells: int, length: int, cell: int) -> int:
    """The first of ``length`` pixels in a cell, or the first after the cell if it has none."""
    return min(max(-((cells - 2 * length * cell) // (2 * cells)), 0), length)


def cells_of_window(
    shape: Sequence[int],
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
) -> tuple[int, int]:
    """Count the rows and columns of cells that contain the pixels of a window.

    Args:
        shape: (height, width) of the window, in pixels.
        output_size: (height, width) of the whole output, in pixels.
        origin: (top, left) of the window, in pixels.
        grid_size: (h, w) of the whole grid, in cells.
    """
    rows, columns = (
        ((2 * (start + count) - 1) * cells) // (2 * length)
        + 1
        - ((2 * start + 1) * cells) // (2 * length)
        for count, length, start, cells in zip(shape, output_size, origin, grid_size, strict=True)
    )
    return rows, columns


def cell_distances(
    cells: int, length: int, start: int, count: int, radius: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared distances from pixels to the 2r+1 cells around their own cell, on one axis.

    Args:
        cells: number of cells on the axis.
        length: number of pixels on the axis.
        start: first pixel.
        count: number of pixels.
        radius: radius r in cells, ≥ 1.
        like: tensor whose dtype and device the distances have.

    Returns:
        Squared distances in cells, (2r+1, count); and a mask, (2r+1, count), true for cells farther
        than r + ½. A pixel on the border of two cells has one cell more on one side, which the mask
        excludes, so that windows are symmetric and flips commute.
    """
    own = cell_of_pixels(cells, length, start, count, like.device)
    pixels = torch.arange(start, start + count, device=like.device)
    offset = torch.arange(-radius, radius + 1, device=like.device)[:, None]
    apart = (2 * pixels + 1) * cells - (2 * (own + offset) + 1) * length  # in cells / (2·length)
    far = apart.abs() > ((2 * radius + 1) * 10_000 - 2) * length // 10_000
    exact = torch.promote_types(like.dtype, torch.float32)
    return (apart.to(exact) / (2 * length)).square().to(like.dtype), far
