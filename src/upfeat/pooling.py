"""Weighted sums of a map over one patch of pixels for each cell of a coarse grid.

Geometry. The h×w grid is laid over the H×W map edge to edge (``align_corners=False``), so cell i is
centred, in pixel indices, at

    centre(i) = (i + 1/2) · H / h - 1/2.

The patch of a cell has k×k taps one pixel apart, placed symmetrically about the centre: tap t is at
centre(i) + t - (k - 1)/2 on each axis. This has the following consequences:

* k = stride: the patches tile the map, and each pixel belongs to one cell;
* k > stride: patches overlap. At the border they are reflected about the centre of the outermost
  pixel (as views are padded), so that every cell has k² taps and mirrored maps give mirrored grids;
* k and the stride of different parity, or a stride that is not a whole number: taps are between
  pixels and are interpolated bilinearly, rather than rounded to one side.

Positions are computed as fractions of integers, so that taps on pixels are exactly on them.

Computation. Interpolation and reflection are linear, so they are applied to the cell's weights (one
channel) instead of the values (C channels). One matrix product per row of cells then remains
(:func:`pool_patches`), which reads the map in place and keeps no copy of it for the gradient. A
warp is linear too: to pool views of a map, the weights are transformed by the warp's matrices, and
the warped values are never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upfeat.bounds import shown
from upfeat.geometry import reflect
from upfeat.transforms import lasting
from upfeat.warp import check_map, warp

# Number of cells of a row in one matrix product. The matrix is zero outside each cell's own
# columns, so wide rows are cut into runs; with 16, products are large and few factors are zero.
_RUN = 16


def pool_patches(
    values: Tensor, weights: Tensor, *, views: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return each cell's weighted sum over its patch; linear in values and in weights.

    The function is differentiable in both arguments, and keeps no copy of the patches for the
    gradient.

    Args:
        values: (B, C, H, W).
        weights: (N or 1, h, w, k, k), weights of each cell's taps, whose positions the module's
            docstring defines.
        views: matrices (N, height, H) and (N, width, W) of :meth:`upfeat.views.Jitter.matrices`, to
            pool ``warp(values, *views)`` without computing it. View n is of map n mod B, and N is a
            multiple of B. ``None`` to pool the maps themselves.

    Returns:
        (N, C, h, w), in the dtype of ``values``; N = B without views.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: the shapes do not match, or the grid is finer than the map.
    """
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights is of type {type(weights).__name__}; give a tensor")
    if weights.ndim != 5 or weights.shape[3] != weights.shape[4] or 0 in weights.shape[1:]:
        raise ValueError(
            f"weights must have shape (B, h, w, k, k), k at least 1, got {tuple(weights.shape)}"
        )
    check_grid(values, (weights.shape[1], weights.shape[2]), views)
    count = len(values) if views is None else len(views[0])
    if len(weights) not in (1, count):
        raise ValueError(f"weights must be for 1 or {count} maps, got {len(weights)}")
    work = torch.promote_types(values.dtype, torch.float32)
    with torch.autocast(values.device.type, enabled=False):
        if views is not None and values.device.type == "cpu":
            plans = _plan_views(values, weights, views)
            return _PoolPatches.apply(values.to(work), weights.to(work), plans).to(values.dtype)
        if views is not None:  # on GPUs, whole products are faster than many small ones
            values = warp(repeat_maps(values, count), *views)
        return _pool(values.to(work), weights.to(work)).to(values.dtype)


def _pool(values: Tensor, weights: Tensor) -> Tensor:
    """Pool maps without views; see :func:`pool_patches`."""
    batch, channels, height, width = values.shape
    _, rows, columns, kernel_size, _ = weights.shape
    if len(weights) == 1:  # one kernel for all maps: their channels form one product
        values = values.reshape(1, batch * channels, height, width)
    kind, every = (values.dtype, values.device), slice(None)
    plan = _Plan(
        every,
        every,
        _spans(height, rows, kernel_size, 1, *kind),
        _spans(width, columns, kernel_size, _RUN, *kind),
    )
    return _PoolPatches.apply(values, weights, [plan]).view(batch, channels, rows, columns)


def repeat_maps(x: Tensor, count: int) -> Tensor:
    """Repeat maps for ``count`` views, view n of map n mod B: (B, …) -> (count, …).

    Raises:
        ValueError: ``count`` is no multiple of B.
    """
    if count % len(x):
        raise ValueError(f"{count} views cannot be of {len(x)} maps alike; give each as many")
    return x if count == len(x) else x.repeat(count // len(x), *(1 for _ in x.shape[1:]))


class _Taps(NamedTuple):
    """Pixels between which every cell's taps are on one axis, after reflection into the map."""

    low: Tensor  # (cells, k), index of the pixel before the tap
    high: Tensor  # (cells, k), index of the pixel after the tap
    fraction: Tensor  # (cells, k), weight of the pixel after the tap, float64 in [0, 1)


class _Span(NamedTuple):
    """A run of cells on one axis, the pixels that they read, and their interpolation weights."""

    cells: slice
    pixels: slice
    reading: Tensor  # (cells, k, pixels), weights of the pixels in each tap, of sum 1


class _Plan(NamedTuple):
    """Maps to pool with one set of spans, and the views that they result in."""

    maps: slice
    views: slice  # indices into the result, and into the weights unless these are shared
    rows: tuple[_Span, ...]
    columns: tuple[_Span, ...]


@lru_cache(maxsize=64)
def _taps(pixels: int, cells: int, kernel_size: int) -> _Taps:
    """Compute the positions centre(i) + t - (k - 1)/2, in integer units of 1/(2 · cells) pixels."""
    with lasting():
        cell = torch.arange(cells, device="cpu")[:, None]
        tap = torch.arange(kernel_size, device="cpu")[None]
        position = (2 * cell + 1) * pixels + (2 * tap - kernel_size) * cells
        low = torch.div(position, 2 * cells, rounding_mode="floor")
        fraction = (position - low * 2 * cells).double() / (2 * cells)
        high = torch.where(fraction > 0, low + 1, low)
        return _Taps(reflect(low, pixels), reflect(high, pixels), fraction)


@lru_cache(maxsize=64)
def _spans(
    pixels: int, cells: int, kernel_size: int, run: int, dtype: torch.dtype, device: torch.device
) -> tuple[_Span, ...]:
    """Cut an axis into runs of at most ``run`` cells, each with the pixels that it reads."""
    taps = _taps(pixels, cells, kernel_size)
    spans = []
    for start in range(0, cells, run):
        with lasting():
            low, high, fraction = (part[start : start + run] for part in taps)
            first = int(torch.minimum(low, high).min())
            last = int(torch.maximum(low, high).max()) + 1
            reading = fraction.new_zeros(*low.shape, last - first)
            reading.scatter_add_(-1, (low - first)[..., None], (1 - fraction)[..., None])
            reading.scatter_add_(-1, (high - first)[..., None], fraction[..., None])
            reading = reading.to(device, dtype)
        spans.append(_Span(slice(start, start + len(low)), slice(first, last), reading))
    return tuple(spans)


def sample_patches(x: Tensor, output_size: tuple[int, int], kernel_size: int) -> Tensor:
    """Interpolate a one-channel map at all taps: (B, 1, H, W) -> (B, h, w, k, k)."""
    x = x[:, 0]
    for axis, cells in zip((1, 2), output_size, strict=True):
        low, high, fraction = _taps(x.shape[axis], cells, kernel_size)
        near = x.index_select(axis, low.flatten().to(x.device))
        if bool((fraction > 0).any()):
            share = fraction.flatten().to(x.device, x.dtype)
            far = x.index_select(axis, high.flatten().to(x.device))
            near = torch.lerp(near, far, share[:, None] if axis == 1 else share)
        x = near
    height, width = output_size
    x = x.view(-1, height, kernel_size, width, kernel_size)
    return x.transpose(2, 3)  # (B, h, w, k, k)


def _plan_views(values: Tensor, weights: Tensor, views: tuple[Tensor, Tensor]) -> list[_Plan]:
    """Make one plan per view, whose spans combine interpolation with the warp's matrices."""
    kernel_size, work = weights.shape[3], torch.promote_types(values.dtype, torch.float32)
    axes = [
        _warped_spans(matrices.to(values.device, work), cells, kernel_size, run)
        for matrices, cells, run in zip(views, weights.shape[1:3], (1, _RUN), strict=True)
    ]
    maps = [number % len(values) for number in range(len(views[0]))]
    return [
        _Plan(slice(m, m + 1), slice(n, n + 1), rows, columns)
        for n, (m, rows, columns) in enumerate(zip(maps, *axes, strict=True))
    ]


def _warped_spans(
    matrices: Tensor, cells: int, kernel_size: int, run: int
) -> list[tuple[_Span, ...]]:
    """Spans of N views on one axis, from their warp's matrices (N, view pixels, map pixels)."""
    if cells * kernel_size == matrices.shape[1]:  # every pixel is a tap of exactly one cell
        near = matrices
    else:
        taps = _taps(matrices.shape[1], cells, kernel_size)
        low, high = (matrices.index_select(1, index.flatten()) for index in taps[:2])
        near = torch.lerp(low, high, taps.fraction.flatten()[:, None].to(matrices.dtype))
    reading = near.unflatten(1, (cells, kernel_size))  # (N, cells, k, map pixels)
    starts, count = range(0, cells, run), len(matrices)
    if len(starts) == 1:  # a single run reads the whole axis, without a copy
        first, last = [[0]] * count, [[matrices.shape[2]]] * count
    else:
        used = (reading != 0).any(2)
        used = torch.stack([part.any(1) for part in used.split(run, dim=1)], dim=1)  # (N, runs, ·)
        first = used.int().argmax(-1).tolist()
        last = (used.shape[-1] - used.flip(-1).int().argmax(-1)).tolist()
    return [
        tuple(
            _Span(slice(s, min(s + run, cells)), slice(a, z), one[s : s + run, :, a:z])
            for s, a, z in zip(starts, own_first, own_last, strict=True)
        )
        for one, own_first, own_last in zip(reading, first, last, strict=True)
    ]


class _PoolPatches(torch.autograd.Function):
    """Pool values (B, C, H, W) by weights (B, h, w, k, k) to (B, C, h, w), row by row of cells.

    The weights of a run of cells are first converted from taps to pixels, which accounts for
    interpolation, reflection and warp; they are then multiplied with the values in place.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor, plans: list[_Plan]) -> Tensor:
        ctx.save_for_backward(values, weights)
        ctx.plans = plans
        count = len(values) if plans[0].views == slice(None) else len(plans)
        out = values.new_empty(count, values.shape[1], *weights.shape[1:3])
        for plan in plans:
            maps, kernels, pooled = _parts(plan, values, weights, out)
            for row, span in product(plan.rows, plan.columns):
                spread = _spread(kernels, row, span)  # (B, cells, pixels)
                pooled[:, :, row.cells.start, span.cells] = _window(maps, row, span) @ spread.mT
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, weights = ctx.saved_tensors
        for_values, for_weights, _ = ctx.needs_input_grad
        to_values = None
        if for_values:  # of whole rows, which _add_product joins, whatever the values' strides
            to_values = torch.zeros_like(values, memory_format=torch.contiguous_format)
        to_weights = torch.zeros_like(weights) if for_weights else None
        for plan in ctx.plans:
            maps, kernels, grad = _parts(plan, values, weights, grads[0])
            for row, span in product(plan.rows, plan.columns):
                part = grad[:, :, row.cells.start, span.cells]  # (B, C, cells)
                if to_values is not None:
                    _add_product(to_values[plan.maps], part, _spread(kernels, row, span), row, span)
                if to_weights is not None:
                    spread = part.mT @ _window(maps, row, span)  # (B, cells, pixels)
                    own = to_weights if len(weights) == 1 else to_weights[plan.views]
                    own[:, row.cells.start, span.cells] += _gather(spread, row, span)
        return to_values, to_weights, None


def _parts(
    plan: _Plan, values: Tensor, weights: Tensor, pooled: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the maps, weights and results of a plan."""
    kernels = weights if len(weights) == 1 else weights[plan.views]
    return values[plan.maps], kernels, pooled[plan.views]


def _window(values: Tensor, row: _Span, span: _Span) -> Tensor:
    """Pixels that a run reads, (B, C, pixels); not copied if the run spans the whole width."""
    return values[:, :, row.pixels, span.pixels].flatten(2)


def _add_product(maps: Tensor, part: Tensor, spread: Tensor, row: _Span, span: _Span) -> None:
    """Add the product (B, C, cells) @ (B, cells, pixels) to the pixels of ``maps`` in a run."""
    target = maps[:, :, row.pixels, span.pixels]
    if target.shape[3] == maps.shape[3]:  # whole rows of pixels are contiguous: one matrix
        target.flatten(2).baddbmm_(part, spread)
    else:
        target += (part @ spread).view_as(target)


def _spread(weights: Tensor, row: _Span, span: _Span) -> Tensor:
    """Convert a run's weights from taps to pixels: (B, cells, k, k) -> (B, cells, pixels)."""
    tall = row.reading[0].T @ weights[:, row.cells.start, span.cells]  # (B, cells, rows, k)
    return (tall @ span.reading).flatten(2)


def _gather(spread: Tensor, row: _Span, span: _Span) -> Tensor:
    """Transpose of :func:`_spread`: (B, cells, pixels) -> (B, cells, k, k)."""
    rows = row.pixels.stop - row.pixels.start
    return row.reading[0] @ (spread.unflatten(2, (rows, -1)) @ span.reading.mT)


def check_grid(
    values: Tensor,
    output_size: tuple[int, int],
    views: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Check that maps (B, C, H, W), or views of them, can be pooled to a grid.

    Raises:
        TypeError: ``values`` is not a tensor.
        ValueError: ``values`` is not (B, C, H, W), does not match the views, or is coarser than the
            grid; or the grid is empty.
    """
    check_map("values", values)
    whole = isinstance(output_size, Sequence) and all(isinstance(n, int) for n in output_size)
    if not whole or len(output_size) != 2:
        raise ValueError(
            f"output_size={shown(output_size)} must be (height, width), whole numbers of cells"
        )
    height, width = values.shape[2:]
    if views is not None:
        if (views[0].shape[2], views[1].shape[2]) != (height, width):
            expected = (views[0].shape[2], views[1].shape[2])
            raise ValueError(f"values must be {expected} pixels to fit views, got {height, width}")
        if len(views[0]) % len(values):
            raise ValueError(
                f"{len(views[0])} views cannot be of {len(values)} maps; give each map as many"
            )
        height, width = views[0].shape[1], views[1].shape[1]
    if not (1 <= output_size[0] <= height and 1 <= output_size[1] <= width):
        raise ValueError(
            f"output_size must lie between (1, 1) and the map's ({height}, {width}), got "
            f"{tuple(output_size)}; a downsampler needs features finer than the grid"
        )
