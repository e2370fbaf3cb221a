"""Interpolation along one axis as a matrix, so that any part of a result can be computed alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backends.window import reflected_indices


def interpolation_matrix(cells: int, length: int, mode: str, like: Tensor) -> Tensor:
    """What PyTorch's interpolation from ``cells`` to ``length`` samples does, as a matrix.

    Args:
        cells: samples in.
        length: samples out.
        mode: "nearest-exact", "bilinear" or "bicubic", half-pixel centres.
        like: gives dtype and device.

    Returns:
        (length, cells).
    """
    unit = torch.eye(cells, dtype=like.dtype, device=like.device)[
        None, None
    ]  # (1, 1, cells, cells)
    align_corners = None if mode == "nearest-exact" else False
    # Columns keep their size, so that only the rows are resized.
    out = F.interpolate(unit, size=(length, cells), mode=mode, align_corners=align_corners)
    return out[0, 0]


def span(matrix: Tensor) -> tuple[int, int]:
    """The first and one past the last column in which a matrix has anything."""
    used = matrix.ne(0).any(0).nonzero().flatten()
    return int(used[0]), int(used[-1]) + 1


def reflected_range(start: int, stop: int, length: int, device: torch.device) -> Tensor:
    """Indices from ``start`` to ``stop``, which may lie outside, mirrored into ``length``."""
    return reflected_indices(torch.arange(start, stop, device=device), length)
