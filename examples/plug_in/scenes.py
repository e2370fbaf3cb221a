"""Generated scenes for the examples: bundled photographs in regions with curved borders."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.images import read_image

PHOTOS = sorted((Path(__file__).parents[1] / "photos").glob("*.jpg"))[:4]
SIZE = (224, 288)


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make images whose every region shows another photograph.

    Returns:
        (count, 3, 224, 288) in [0, 1], and labels (count, 224, 288): which photograph.
    """
    generator = torch.Generator().manual_seed(seed)
    photos = [read_image(path) for path in PHOTOS]
    images, labels = [], []
    for _ in range(count):
        label = _regions(len(photos), generator)
        cuts = torch.stack([_cut(photo, generator) for photo in photos])  # (4, 3, H, W)
        images.append(torch.gather(cuts, 0, label.expand(1, 3, -1, -1))[0])
        labels.append(label)
    return torch.stack(images), torch.stack(labels)


def depths(labels: Tensor, seed: int) -> Tensor:
    """Depth in metres for scenes: each region a slanted plane, near or far by what it shows."""
    generator = torch.Generator().manual_seed(seed)
    near = 1 + labels.float() * 1.5
    slope = torch.rand(len(labels), 1, 1, generator=generator) * 0.2
    return near + slope * torch.linspace(0, 1, labels.shape[1])[:, None]


def _regions(count: int, generator: torch.Generator) -> Tensor:
    """Labels (H, W) of regions that are largest where a smooth random field is."""
    fields = torch.rand(1, count, 4, 5, generator=generator)
    return F.interpolate(fields, size=SIZE, mode="bicubic")[0].argmax(0)


def _cut(photo: Tensor, generator: torch.Generator) -> Tensor:
    """A window of a photograph at its own scale."""
    top, left = (
        math.floor(float(torch.rand((), generator=generator)) * (whole - part))
        for whole, part in zip(photo.shape[1:], SIZE, strict=True)
    )
    return photo[:, top : top + SIZE[0], left : left + SIZE[1]]
