"""Surface normals of depth maps, and their errors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 0.015
"""Radius of the window to which a plane is fitted, divided by the shorter side of the map."""
STEP = 1.2
"""Ratio of the largest to the smallest depth in a window from which on it contains an edge."""
ANGLES = (11.25, 22.5, 30.0)
"""Angles below which a normal counts as close, degrees (Fouhey, Gupta and Hebert, 2013)."""


def normals_of(depth: Tensor, field_of_view: float) -> Tensor:
    """Compute the normals of the surfaces that a depth map shows.

    The reciprocal depth of a plane is linear in the coordinates of the image. It is fitted by least
    squares in a window around each pixel.

    Args:
        depth: (H, W) distance along the optical axis, in any unit; NaN where unknown.
        field_of_view: horizontal field of view of the camera, degrees; the optical axis meets the
            centre of the image.

    Returns:
        (3, H, W), unit vectors (right, down, forward) that point towards the camera; NaN where half
        of the window within the map is unknown or the window contains a step of the depth.
    """
    home = depth.device
    depth = depth.cpu() if home.type == "mps" else depth  # MPS has no float64
    height, width = depth.shape
    focal = width / (2 * math.tan(math.radians(field_of_view) / 2))
    radius = max(1, round(WINDOW * min(height, width)))
    known = torch.isfinite(depth)
    nearness = torch.where(known, 1 / depth.double(), 0.0)
    moments, products = _sums(known.double(), nearness, radius)
    steep = _extreme(depth, known, radius) > STEP * -_extreme(-depth, known, radius)
    inside, _ = _sums(torch.ones_like(nearness), nearness, radius)
    usable = (moments[0] > inside[0] / 2) & ~steep
    # moments: sums of 1, u, v, u², u·v, v² over a window, u and v counted from its centre.
    one, u, v, uu, uv, vv = torch.where(usable, moments, _UNUSED.to(moments)[:, None, None])
    gram = torch.stack([one, u, v, u, uu, uv, v, uv, vv], -1).unflatten(-1, (3, 3))
    gram = gram + 1e-9 * torch.eye(3).to(gram)  # for a map of a single row or column
    level, across, down = torch.linalg.solve(gram, products.movedim(0, -1)).unbind(-1)
    columns = torch.arange(width, device=depth.device) + 0.5 - width / 2
    rows = torch.arange(height, device=depth.device)[:, None] + 0.5 - height / 2
    normal = -torch.stack([across * focal, down * focal, level - across * columns - down * rows])
    return torch.where(usable, F.normalize(normal, dim=0), torch.nan).float().to(home)


_UNUSED = torch.tensor([1.0, 0, 0, 1, 0, 1], dtype=torch.float64)
"""Moments of a window that is not used; any that have an inverse."""


def _sums(known: Tensor, values: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Sum 1, u, v, u², u·v, v², (6, H, W), and values times 1, u, v, (3, H, W), over windows."""
    line = torch.arange(-radius, radius + 1, dtype=torch.float64, device=known.device)
    u, v = line.expand(len(line), -1), line[:, None].expand(-1, len(line))
    one = torch.ones_like(u)
    weights = torch.stack([one, u, v, u * u, u * v, v * v])[:, None]
    moments = F.conv2d(known[None, None], weights, padding=radius)[0]
    return moments, F.conv2d(values[None, None], weights[:3], padding=radius)[0]


def _extreme(values: Tensor, known: Tensor, radius: int) -> Tensor:
    """Largest known value of each window, (H, W)."""
    filled = torch.where(known, values, -torch.inf)
    return F.max_pool2d(filled[None], 2 * radius + 1, 1, radius)[0]


def angles_between(predicted: Tensor, normals: Tensor) -> Tensor:
    """Angles, degrees, float64, between vectors of any length, (…, 3, H, W), and normals."""
    cosine = F.cosine_similarity(predicted.double(), normals.double(), dim=-3)
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))


def angle_errors(predicted: Tensor, normals: Tensor) -> Tensor:
    """Sum the errors of one image; sums over several images add up.

    Args:
        predicted: (S, 3, H, W), vectors of any length, of S seeds.
        normals: (3, H, W), NaN where unknown.

    Returns:
        (S, 6) float64: sums of angles, degrees, and of their squares, number of pixels within each
        of :data:`ANGLES`, and number of known pixels.
    """
    known = torch.isfinite(normals[0])
    angles = angles_between(predicted, normals)[..., known]
    parts = [angles, angles.square(), *((angles < one).double() for one in ANGLES)]
    return torch.stack([part.sum(-1) for part in (*parts, torch.ones_like(angles))], dim=-1)
