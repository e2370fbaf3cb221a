"""Attention from pixels to rectangles of cells on a GPU: the forward pass in Triton.

The gradients are those of the tiled implementation in plain PyTorch (:mod:`..tiled_attention`),
computed on the same device. All results are reproducible bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from upfeat.backends import tiled_attention
from upfeat.backends.triton import launch
from upfeat.backends.triton.tables import power_of_two

_BLOCK, _CELLS, _CHANNELS = 64, 16, 64
"""Pixels of a row, cells, and channels that a program processes at a time."""
_WARPS = 8


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
    """See :func:`upfeat.functional.window_attention`; not differentiable."""
    batch, channels, height, width = values.shape[0], values.shape[1], *queries.shape[2:]
    last = not values.is_contiguous() and values.stride(1) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    out = torch.empty(
        (batch, channels, height, width),
        dtype=values.dtype,
        device=values.device,
        memory_format=layout,
    )
    if not out.numel():
        return out
    tables = [_table(each, out.device) for each in (rows, columns, _channel_blocks(blocks))]
    depth = queries.shape[1] // heads
    norms = torch.empty(batch, heads, height, width, device=out.device)
    sizes = (height, width, keys.shape[2], keys.shape[3], depth, scale)
    shared = {"D": max(power_of_two(depth), 16), "BLOCK": _BLOCK, "CELLS": _CELLS}
    strips, n_blocks = height * -(-width // _BLOCK), len(tables[2]) // 3
    strides = (*queries.stride(), *keys.stride())
    kernels = launch._kernels("attend")
    with launch._device_of(out):
        kernels.attend_norms[(batch * heads * strips,)](
            queries, keys, norms, *tables[:2], *sizes, *strides,
            HEADS=heads, **shared, num_warps=_WARPS,
            **launch.OPTIONS,
        )  # fmt: skip
        kernels.attend_values[(batch * n_blocks * strips,)](
            queries, keys, values, norms, out, *tables, *sizes, n_blocks, *strides,
            *values.stride(), *out.stride(),
            HEADS=heads, MEAN=len(blocks) == 1, **shared, BC=_CHANNELS, num_warps=_WARPS,
            **launch.OPTIONS,
        )  # fmt: skip
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of queries, keys and values; ``None`` for those not needed."""
    given = [
        each.detach().requires_grad_(need)
        for each, need in zip((queries, keys, values), needed, strict=True)
    ]
    wanted = [each for each in given if each.requires_grad]
    if not wanted:
        return None, None, None
    with torch.enable_grad():
        q, k, v = given
        out = tiled_attention.window_attention(q, k, v, rows, columns, heads, scale, blocks)
        found = iter(torch.autograd.grad(out, wanted, grad))
    parts = [next(found) if need else None for need in needed]
    return parts[0], parts[1], parts[2]


def _table(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _channel_blocks(blocks: Sequence[int]) -> list[int]:
    """Divide heads' blocks into pieces of at most :data:`_CHANNELS` channels.

    Returns:
        The head of every piece, then the first channels, then one past the last channels.
    """
    pieces, start = [], 0
    for head, count in enumerate(blocks):
        for first in range(0, count, _CHANNELS):
            piece = (head, start + first, start + min(first + _CHANNELS, count))
            pieces.append(piece)
        start += count
    return [number for column in zip(*pieces, strict=True) for number in column]
