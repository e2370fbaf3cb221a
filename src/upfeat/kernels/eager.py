"""Plain PyTorch operators for any device and dtype, without copies of the features per tap.

Weights are tap-major, (B, T, H, W), so that each of the T passes reads one contiguous plane of
weights and one shifted view of the features: T multiply-adds over (B, C, H, W). Unfolding would
make T copies of the features instead.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.kernels.window import reflect_pad, spatial_kernel, window_radius


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
    """See :func:`upfeat.functional.bilateral_weights`."""
    height, width = keys.shape[-2:]
    side = 2 * radius + 1
    padded = reflect_pad(keys, radius)
    scores = [
        (keys * padded[:, :, row : row + height, column : column + width]).sum(1)
        for row in range(side)
        for column in range(side)
    ]
    weights = torch.softmax(temperature * torch.stack(scores, dim=1), dim=1)  # (B, T, H, W)
    weights = weights * spatial_kernel(radius, sigma_spatial)[:, None, None]
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-7)


def neighbourhood_upsample(features: Tensor, weights: Tensor) -> Tensor:
    """See :func:`upfeat.functional.neighbourhood_upsample`.

    All pixels of one coarse cell read the same (2r+1)² cells, so the sum is one small matrix
    product per cell: (pixels of the cell × taps)·(taps × C). Where the output is not a whole
    multiple of the grid, cells are padded to the largest and the padding dropped after.
    """
    batch, channels, grid_height, grid_width = features.shape
    taps, height, width = weights.shape[1:]
    radius = window_radius(taps)
    rows, kept_rows = _cell_slots(grid_height, height, features.device)
    columns, kept_columns = _cell_slots(grid_width, width, features.device)
    across, down = len(columns) // grid_width, len(rows) // grid_height
    if len(rows) != height or len(columns) != width:
        weights = weights.index_select(2, rows).index_select(3, columns)
    per_cell = weights.reshape(batch, taps, grid_height, down, grid_width, across)
    per_cell = per_cell.permute(0, 2, 4, 3, 5, 1).reshape(-1, down * across, taps)
    padded = F.pad(features, (radius,) * 4, mode="replicate")
    cells = F.unfold(padded, 2 * radius + 1)  # (B, C·T, h·w)
    cells = cells.view(batch, channels, taps, -1).permute(0, 3, 2, 1).reshape(-1, taps, channels)
    out = torch.bmm(per_cell, cells)  # (B·h·w, pixels, C)
    out = out.view(batch, grid_height, grid_width, down, across, channels)
    out = out.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, len(rows), len(columns))
    if len(rows) != height or len(columns) != width:
        out = out.index_select(2, kept_rows).index_select(3, kept_columns)
    return out


def _cell_slots(cells: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lay ``length`` pixels out as equally many slots per cell.

    Returns:
        For every slot the pixel that fills it (some twice, where a cell has fewer pixels than the
        largest), and for every pixel the slot to read it from.
    """
    # Plain integers: sizes are known, and a compiled graph must not depend on a tensor's value.
    first = [-((cells - 2 * length * index) // (2 * cells)) for index in range(cells + 1)]
    most = max(stop - start for start, stop in pairwise(first))
    slots = [min(start + offset, length - 1) for start in first[:-1] for offset in range(most)]
    kept = [
        index * most + offset
        for index, (start, stop) in enumerate(pairwise(first))
        for offset in range(stop - start)
    ]
    return torch.tensor(slots, device=device), torch.tensor(kept, device=device)
