"""Square windows: how many taps they have, how they weigh distance, what they read at a border."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
        sigma_spatial: scalar tensor σ, in units of the half window; gives dtype and device.

    Returns:
        ((2r+1)²,).
    """
    axis = torch.linspace(
        -1, 1, 2 * radius + 1, dtype=sigma_spatial.dtype, device=sigma_spatial.device
    )
    squared = axis[:, None] ** 2 + axis[None, :] ** 2
    return torch.exp(-squared / (2 * sigma_spatial**2)).flatten()  # (T,)


def reflect_pad(x: Tensor, radius: int) -> Tensor:
    """Reflect-pad the last two axes by ``radius``, also when they are shorter than it.

    PyTorch refuses a reflection wider than the tensor; this one bounces as often as it must, so
    that a 2-pixel map has borders too. Where PyTorch's works, the two agree.

    Args:
        x: (B, C, H, W).
        radius: r ≥ 0, pixels on every side.

    Returns:
        (B, C, H+2r, W+2r).
    """
    height, width = x.shape[-2:]
    if min(height, width) > radius:
        return F.pad(x, (radius,) * 4, mode="reflect")
    rows, columns = (
        reflected_indices(torch.arange(-radius, length + radius, device=x.device), length)
        for length in (height, width)
    )
    return x.index_select(2, rows).index_select(3, columns)


def reflected_indices(positions: Tensor, length: int) -> Tensor:
    """Mirror positions, however far outside, into 0 … ``length`` - 1."""
    period = max(2 * (length - 1), 1)
    folded = positions.remainder(period)
    return torch.minimum(folded, period - folded) if length > 1 else torch.zeros_like(positions)
