"""Maps multiplied by one matrix per axis, of which most is zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Output rows (or columns) whose inputs are multiplied together: a block of 32 needs about
# 32 / zoom + 2 input rows, so the product skips nearly all of the matrices' zeros.
_BLOCK = 32


def warp(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply maps by one matrix per axis: ``rows @ x @ columns.mT``, without their zeros.

    Differentiable in x, as often as needed; the matrices are constants.

    Args:
        x: (B, C, h, w).
        rows: (N, height, h).
        columns: (N, width, w).

    Returns:
        (max(B, N), C, height, width), in the type of x (half types are computed in float32).

    Raises:
        ValueError: shapes that do not fit together.
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
    """``rows @ x @ columns.mT`` on a CPU; its own backward, with the matrices transposed.

    ``total`` sums the result over the batch: the backward of one map shown by many views, which
    then needs memory for one map only.
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
    """``rows @ x @ columns.mT`` by blocks of outputs, each reading only the inputs it uses."""
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
    """For each view, blocks (start, stop) of outputs and the inputs (first, last) they use."""
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
    """The type to compute in: float64 for itself, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def size_of(x: Tensor) -> tuple[int, int]:
    """(height, width)."""
    return x.shape[-2], x.shape[-1]


def check_map(name: str, x: Tensor) -> None:
    """Check that maps have four axes, with something along each but the first.

    Raises:
        TypeError: they are no tensor.
        ValueError: they have not, or do not hold dense floating numbers.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is of type {type(x).__name__}; give a tensor")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must have shape (B, C, h, w), got {tuple(x.shape)}")
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be dense, got {x.layout}; convert it with .to_dense()")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}; convert it with .float()")
