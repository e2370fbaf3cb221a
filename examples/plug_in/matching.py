"""Points of one photograph found again in another, by features at full resolution."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import upfeat
from upfeat.images import read_image

PHOTO = Path(__file__).parents[1] / "photos" / "astronaut.jpg"


def second_view(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """A photograph seen from elsewhere: turned, nearer and darker.

    Returns:
        (3, H, W), and the (2, 3) map from its coordinates (x, y, 1) to those of the first, both
        from −1 to 1.
    """
    affine = torch.tensor([[0.83, -0.18, 0.06], [0.18, 0.83, -0.04]])
    grid = F.affine_grid(affine[None], [1, *pixels.shape], align_corners=False)
    view = F.grid_sample(pixels[None], grid, padding_mode="reflection", align_corners=False)
    return view[0] * 0.85, affine


def match(first: upfeat.UpsampledFeatures, second: Tensor, points: Tensor) -> Tensor:
    """Find points (N, 2) of the first in the features (1, C, H, W) of the second: (N, 2)."""
    wanted = F.normalize(first.at(points), dim=1)
    known = F.normalize(second[0].flatten(1), dim=0)  # (C, H·W)
    best = (wanted @ known).argmax(1)
    return torch.stack([best // second.shape[3], best % second.shape[3]], 1).float()


def main(size: int = 224) -> dict[str, float]:
    """Return the median distance, in pixels, of matches from the truth."""
    pixels = read_image(PHOTO)
    view, affine = second_view(pixels)
    errors = {}
    for name in ("nearest", "bilinear", "neighbourhood", "detail"):
        model = upfeat.load("efficientnet_lite0", upsampler=name)
        a, b = model.preprocess(view, size), model.preprocess(pixels, size)
        y, x = torch.meshgrid(torch.arange(20, 200, 9), torch.arange(20, 200, 9), indexing="ij")
        points = torch.stack([y.flatten(), x.flatten()], 1).float()
        unit = (points.flip(1) + 0.5) / size * 2 - 1  # (x, y) from −1 to 1
        truth = ((F.pad(unit, (0, 1), value=1.0) @ affine.T + 1) * size / 2 - 0.5).flip(1)
        with torch.inference_mode():
            found = match(model.lazy(a), model(b), points)
        errors[name] = float((found - truth).norm(dim=1).median())
    return errors


if __name__ == "__main__":
    print(main())
