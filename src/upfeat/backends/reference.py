"""The reference implementation: operators written plainly, with every intermediate in memory.

This backend is simple rather than fast; every other backend is tested against it in float64.
``upfeat.functional`` checks shapes before it calls a backend.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.geometry import cell_of_pixels, reflect_pad, spatial_kernel, window_radius


def adaptive_conv2d(padded: Tensor, weights: Tensor) -> Tensor:
    """See :func:`upfeat.functional.adaptive_conv2d`."""
    batch, taps, height, width = weights.shape
    columns = F.unfold(padded, 2 * window_radius(taps) + 1)  # (B, C·T, H·W)
    columns = columns.view(batch, padded.shape[1], taps, height, width)
    return torch.einsum("bcthw,bthw->bchw", columns, weights)


def joint_bilateral_upsample(features: Tensor, weights: Tensor) -> Tensor:
    """See :func:`upfeat.functional.joint_bilateral_upsample`."""
    size = (weights.shape[2], weights.shape[3])
    resized = F.interpolate(features, size=size, mode="bicubic", align_corners=False)
    return adaptive_conv2d(reflect_pad(resized, window_radius(weights.shape[1])), weights)


def bilateral_weights(
    keys: Tensor, temperature: Tensor, sigma_spatial: Tensor, radius: int
) -> Tensor:
    """See :func:`upfeat.functional.bilateral_weights`."""
    batch, depth, height, width = keys.shape
    dtype, keys = keys.dtype, keys.to(torch.promote_types(keys.dtype, torch.float32))
    side = 2 * radius + 1
    columns = F.unfold(reflect_pad(keys, radius), side)  # (B, D·T, H·W)
    columns = columns.view(batch, depth, side * side, height, width)
    scores = torch.einsum("bdthw,bdhw->bthw", columns, keys)
    weights = torch.softmax(temperature * scores, dim=1)
    weights = weights * spatial_kernel(radius, sigma_spatial)[:, None, None]
    return (weights / weights.sum(1, keepdim=True).clamp(min=1e-7)).to(dtype)


def neighbourhood_upsample(
    features: Tensor,
    weights: Tensor,
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
) -> Tensor:
    """See :func:`upfeat.functional.neighbourhood_upsample`."""
    place = output_size, origin, grid_size, grid_origin
    cells = _cells_around(features, window_radius(weights.shape[1]), weights.shape[2:], *place)
    return torch.einsum("bcthw,bthw->bchw", cells, weights)


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
    """See :func:`upfeat.functional.neighbourhood_weights`."""
    place = output_size, origin, grid_size, grid_origin
    exact, apart = torch.promote_types(keys.dtype, torch.float32), []
    cells = _cells_around(keys.to(exact), radius, queries.shape[2:], *place)
    products = torch.einsum("bdthw,bdhw->bthw", cells, queries.to(exact))
    for axis in (0, 1):
        start, count = origin[axis], queries.shape[2 + axis]
        grid, length = grid_size[axis], output_size[axis]
        own = cell_of_pixels(grid, length, start, count, keys.device)
        pixels = torch.arange(start, start + count, device=keys.device, dtype=exact)
        offset = torch.arange(-radius, radius + 1, device=keys.device)[:, None]
        apart.append((pixels + 0.5) * grid / length - (own + offset + 0.5))  # (2r+1, count)
    rows, columns = apart[0][:, None, :, None], apart[1][None, :, None, :]
    logits = temperature * products - (rows**2 + columns**2).flatten(0, 1) / (2 * sigma**2)
    far = (rows.abs() > radius + 0.5 - 1e-4) | (columns.abs() > radius + 0.5 - 1e-4)
    weights = torch.softmax(logits.masked_fill(far.flatten(0, 1), -torch.inf), dim=1)
    return weights.to(queries.dtype)


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
    """See :func:`upfeat.functional.window_attention`; all cells for all pixels, mostly masked."""
    seen = []
    for axis, bounds in ((2, rows), (3, columns)):
        first, stop = torch.tensor(bounds, device=keys.device).unflatten(0, (2, -1))
        cell = torch.arange(keys.shape[axis], device=keys.device)
        seen.append((cell >= first[:, None]) & (cell < stop[:, None]))  # (pixels, cells)
    inside = seen[0][:, None, :, None] & seen[1][None, :, None, :]  # (H, W, h, w)
    exact = torch.promote_types(torch.promote_types(queries.dtype, values.dtype), torch.float32)
    products = torch.einsum(
        "bndyx,bndij->bnyxij",
        queries.to(exact).unflatten(1, (heads, -1)),
        keys.to(exact).unflatten(1, (heads, -1)),
    )
    logits = (scale * products).masked_fill(~inside, -torch.inf)
    weights = logits.flatten(4).softmax(4).view_as(logits)
    if len(blocks) == 1:
        weights = weights.mean(1, keepdim=True)
    parts = [
        torch.einsum("byxij,bcij->bcyx", weights[:, n], block.to(exact))
        for n, block in enumerate(values.split(list(blocks), dim=1))
    ]
    return torch.cat(parts, dim=1).to(values.dtype)


def _cells_around(
    coarse: Tensor,
    radius: int,
    size: Sequence[int],
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
) -> Tensor:
    """Gather the cells around every pixel of a window, (B, K, h, w) -> (B, K, (2r+1)², *size)."""
    rows, columns = (
        cell_of_pixels(cells, length, start, count, coarse.device) - first
        for cells, length, start, count, first in zip(
            grid_size, output_size, origin, size, grid_origin, strict=True
        )
    )
    padded = F.pad(coarse, (radius,) * 4, mode="replicate")
    offsets = range(2 * radius + 1)
    taps = [padded[:, :, rows + a][..., columns + b] for a in offsets for b in offsets]
    return torch.stack(taps, dim=2)
