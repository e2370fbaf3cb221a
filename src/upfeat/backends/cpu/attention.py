"""Attention from pixels to rectangles of cells, in the compiled CPU library."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from upfeat.backends.cpu.arguments import output, reason_against
from upfeat.backends.cpu.library import Ranges, call

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def can_run_window_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *_: object
) -> str | None:
    """Return why :func:`window_attention` cannot run on these arguments, or ``None``."""
    return reason_against(mixed=True, queries=queries, keys=keys, values=values)


def window_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    heads: int,
    scale: float,
    blocks: Sequence[int],
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`upfeat.functional.window_attention`; ``out`` may be any strided buffer."""
    out = output(values, queries, None) if out is None else out
    if out.numel():
        ranges = _ranges(rows, columns, heads, scale, blocks)
        call("upfeat_window_forward", queries, keys, values, out, ranges)
    return out


def window_attention_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    heads: int,
    scale: float,
    blocks: Sequence[int],
    needed: Sequence[bool],
) -> Gradients:
    """Gradients of queries, keys and values; ``None`` for those not needed."""
    found = [
        torch.empty_like(tensor) if need else None
        for tensor, need in zip((queries, keys, values), needed, strict=True)
    ]
    if grad.numel() and any(needed):
        ranges = _ranges(rows, columns, heads, scale, blocks)
        call("upfeat_window_backward", queries, keys, values, grad, *found, ranges)
    return found[0], found[1], found[2]


def _ranges(
    rows: Sequence[int],
    columns: Sequence[int],
    heads: int,
    scale: float,
    blocks: Sequence[int],
) -> Ranges:
    arrays = [(ctypes.c_int64 * len(each))(*each) for each in (rows, columns, blocks)]
    addresses = (ctypes.addressof(array) for array in arrays)
    ranges = Ranges(*addresses, len(blocks), heads, scale)
    ranges.keep = arrays
    return ranges
