"""The oracle: operators written the obvious way, with every intermediate in memory.

Nothing here is fast and nothing here is clever; every other backend is tested against it in
float64. Shapes are checked by ``upfeat.functional`` before a backend is called.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.kernels.window import reflect_pad, spatial_kernel, window_radius


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
    side = 2 * radius + 1
    columns = F.unfold(reflect_pad(keys, radius), side)  # (B, D·T, H·W)
    columns = columns.view(batch, depth, side * side, height, width)
    scores = torch.einsum("bdthw,bdhw->bthw", columns, keys)
    weights = torch.softmax(temperature * scores, dim=1)
    weights = weights * spatial_kernel(radius, sigma_spatial)[:, None, None]
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-7)
