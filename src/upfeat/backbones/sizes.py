"""Adaptation of images of any size to a model for one size, by resizing or by tiles."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.tiling import raised_cosine
from upfeat.types import Size

FITS = ("interpolate", "tile", "resize")
"""Ways to apply a model to images of other sizes than the model's."""

_OVERLAP = 0.25
"""Least fraction of a tile that overlaps with its neighbour."""


def resize(x: Tensor, size: Size) -> Tensor:
    """Resize images, (B, 3, H, W) -> (B, 3, *size), computing in float32 or better."""
    if tuple(x.shape[2:]) == size:
        return x
    exact = x.float() if x.dtype.itemsize < 4 else x
    exact = F.interpolate(exact, size=size, mode="bilinear", align_corners=False, antialias=True)
    return exact.to(x.dtype)


def tiled_size(image: Size, window: Size, stride: int) -> Size:
    """Return the size at which an image is tiled: enlarged, if need be, until the window fits.

    Args:
        image: (height, width) of the image, pixels, multiples of the stride.
        window: (height, width) that the model takes, pixels.
        stride: pixels per cell.

    Returns:
        (height, width), pixels, multiples of the stride.
    """
    scale = max(1.0, *(own / length for own, length in zip(window, image, strict=True)))
    if scale == 1:
        return image
    sides = [
        max(math.ceil(length * scale / stride - 1e-9) * stride, own)
        for own, length in zip(window, image, strict=True)
    ]
    return sides[0], sides[1]


def tiles(extract: Callable[[Tensor], Tensor], x: Tensor, window: Size, stride: int) -> Tensor:
    """Extract features from overlapping windows of one size and blend them.

    Args:
        extract: function (B, 3, *window) -> (B, C, window[0]/stride, window[1]/stride).
        x: (B, 3, H, W), at least as large as the window, sides multiples of the stride.
        window: (height, width), multiples of the stride.
        stride: pixels per cell.

    Returns:
        (B, C, H/stride, W/stride).
    """
    grid = (x.shape[2] // stride, x.shape[3] // stride)
    cells = (window[0] // stride, window[1] // stride)
    if grid == cells:
        return extract(x)
    overlaps = [max(round(_OVERLAP * length), 1) if length > 1 else 0 for length in cells]
    rows, columns = (_weights(*axis, x) for axis in zip(grid, cells, overlaps, strict=True))
    out: Tensor | None = None
    total = x.new_zeros(grid, dtype=torch.float32)
    for top, down in rows.items():
        for left, across in columns.items():
            part = x[:, :, top * stride :, left * stride :][:, :, : window[0], : window[1]]
            features = extract(part).float()
            if out is None:
                out = features.new_zeros(*features.shape[:2], *grid)
            weight = down[:, None] * across
            place = (..., slice(top, top + cells[0]), slice(left, left + cells[1]))
            out[place] += weight * features
            total[place] += weight
    assert out is not None
    return (out / total).to(x.dtype)


def _weights(length: int, window: int, overlap: int, like: Tensor) -> dict[int, Tensor]:
    """Map the first cell of every window along one axis to the window's blending weights."""
    last = length - window
    count = math.ceil(last / (window - overlap)) + 1
    # Spread evenly: otherwise the last two windows could overlap almost entirely.
    starts = sorted({round(index * last / max(count - 1, 1)) for index in range(count)})
    return {
        start: torch.tensor(raised_cosine(start, window, length, overlap), device=like.device)
        for start in starts
    }
