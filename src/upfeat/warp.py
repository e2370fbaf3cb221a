"""Multiplication of maps by one matrix per axis; most elements of the matrices are zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Number of output rows (or columns) computed by one product: a block of 32 reads about
# 32 / zoom + 2 input rows, so that the product skips nearly all zeros of the matrices.
_BLOCK = 32


def warp(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply maps by one matrix per axis: ``rows @ x @ columns.mT``, skipping zeros.

    The product is differentiable in x any number of times; the matrices are constants.

    Args:
        x: (B, C, h, w); B is N, or either of B and N is 1.
        rows: (N, height, h), matrices of the vertical axis.
        columns: (N, width, w), matrices of the horizontal axis.

    Returns:
        (max(B, N), C, height, width), in the dtype of x; 16-bit types are computed in float32.

    Raises:
        ValueError: the shapes do not match.
    """
    check_map("x", x)
    if rows.ndim != 3 or columns.ndim != 3 or len(rows) != len(columns):
        raise ValueError(
            "rows and columns must have shapes (N, height, h) and (N, width, w), got "
            f"{tuple(rows.shape)} and {tuple(columns.shape)}"
        )
    if (rows.shape[2], columns.shape[2]) != size_of(x):
        expected = (rows.shape[2], columns.shape[2])
        raise ValueError(f"x must be {expected} pixels to fit the matrices, got {size_of(x)}")
    if len(x) != len(rows) and 1 not in (len(x), len(rows)):
        raise ValueError(f"x must hold 1 or {len(rows)} maps, one per view, got {len(x)}")
    work = working_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        maps, rows, columns = x.to(work), rows.to(x.device, work), columns.to(x.device, work)
        if x.device.type == "cpu":
            return _Warp.apply(maps, rows, columns, False).to(x.dtype)
        return (rows[:, None] @ maps @ columns.mT[:, None]).to(x.dtype)


class _Warp(torch.autograd.Function):
    """Compute ``rows @ x @ columns.mT`` on a CPU, and the backward with transposed matrices.

    With ``total``, the result is summed over the batch. This is the backward of one map that was
    warped to many views; it then needs memory for one map only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, total: bool) -> Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.one_map, ctx.one_view = len(x) == 1, len(rows) == 1
        return _banded_product(x, rows, columns, total=total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns = ctx.saved_tensors
        total = ctx.one_map and not ctx.one_view
        return _Warp.apply(grads[0], rows.mT, columns.mT, total), None, None, None


def _banded_product(x: Tensor, rows: Tensor, columns: Tensor, *, total: bool) -> Tensor:
    """Compute ``rows @ x @ columns.mT`` by blocks of outputs, each from the inputs it depends on.

    With ``total``, results are summed over the batch.
    """
    batch, channels = max(len(x), len(rows)), x.shape[1]
    height, width = rows.shape[1], columns.shape[1]
    bands = list(zip(_bands(rows), _bands(columns), strict=True))
    shape = (1 if total else batch, channels, height, width)
    out = x.new_zeros(shape) if total else x.new_empty(shape)
    tall = x.new_empty(channels, height, x.shape[3])
    for i in range(batch):
        view, source = i % len(rows), x[i % len(x)]
        for start, stop, first, last in bands[view][0]:
            tall[:, start:stop] = rows[view, start:stop, first:last] @ source[:, first:last]
        lines = tall.view(channels * height, -1)
        target = out[0 if total else i].view(channels * height, width)
        for start, stop, first, last in bands[view][1]:
            part = lines[:, first:last] @ columns[view, start:stop, first:last].T
            target[:, start:stop].add_(part) if total else target[:, start:stop].copy_(part)
    return out


def _bands(matrix: Tensor) -> list[list[tuple[int, int, int, int]]]:
    """Blocks (start, stop) of outputs of each view, with the range (first, last) of their inputs.

    The range excludes ``last``.
    """
    inputs = matrix.shape[2]
    starts = range(0, matrix.shape[1], _BLOCK)
    used = torch.stack([(matrix[:, s : s + _BLOCK] != 0).any(1) for s in starts], dim=1)
    first = used.int().argmax(-1).tolist()  # (N, blocks)
    last = (inputs - used.flip(-1).int().argmax(-1)).tolist()
    return [
        [
            (s, min(s + _BLOCK, matrix.shape[1]), first[view][i], last[view][i])
            for i, s in enumerate(starts)
        ]
        for view in range(len(matrix))
    ]


def working_dtype(x: Tensor) -> torch.dtype:
    """Data type to compute in: float64 for float64, and float32 for all other types."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def size_of(x: Tensor) -> tuple[int, int]:
    """(height, width) of a map."""
    return x.shape[-2], x.shape[-1]


def check_map(name: str, x: Tensor) -> None:
    """Check that maps are a dense floating-point tensor (B, C, h, w), with C, h and w at least 1.

    Raises:
        TypeError: ``x`` is not a tensor.
        ValueError: the shape, layout or type of ``x`` is wrong.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is of type {type(x).__name__}; give a tensor")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must have shape (B, C, h, w), got {tuple(x.shape)}")
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be dense, got {x.layout}; convert it with .to_dense()")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}; convert it with .float()")
