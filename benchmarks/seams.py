"""Seams in features that were computed in tiles, compared with features of the whole image.

    python benchmarks/seams.py --backbones efficientnet_lite0 hf:FOLDER --json seams.json

Coarse features of one photograph are computed in three ways and then upsampled: from the whole
image; like ``upfeat raster`` (exact tiles, or windows of 512 pixels that overlap by a quarter and
are blended); and from plain tiles of 512 pixels without halo or overlap. The score of seams is the
mean difference of features between neighbouring pixels across the borders of the tiles, over the
mean difference everywhere else. For the whole image, the score shows the contribution of image
content at these borders; its spread over shifted borders is the noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import upfeat
from upfeat.features import UpsampledFeatures
from upfeat.linear import principal_components
from upfeat.model import FeatUp
from upfeat.mosaic import strips
from upfeat.receptive_field import receptive_halo
from upfeat.tiling import overlapping
from upfeat.types import Window

PHOTO = Path(__file__).parents[1] / "examples" / "photos" / "coffee.jpg"
WINDOW, COMPONENTS = 512, 16


def tiled(model: FeatUp, x: Tensor, *, halo: int | None, overlap: int) -> Tensor:
    """Compute coarse features strip by strip, (1, C, h, w)."""
    stride = model.backbone.stride
    grid = (x.shape[2] // stride, x.shape[3] // stride)

    def read(window: Window) -> Tensor:
        return x[:, :, window.top : window.bottom, window.left : window.right]

    tile = WINDOW // stride
    parts = strips(model.backbone, read, grid, tile=tile, halo=halo, overlap=overlap)
    return torch.cat([part.features for part in parts], dim=2)


def steps(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean differences of neighbouring rows, (H − 1,), and columns, (W − 1,)."""
    down = features.diff(dim=1).norm(dim=0).mean(1)
    across = features.diff(dim=2).norm(dim=0).mean(0)
    return down, across


def score(features: Tensor, rows: list[int], columns: list[int]) -> float:
    """Return the mean difference at the given rows and columns over that at all others."""
    at, others = [], []
    for values, places in zip(steps(features), (rows, columns), strict=True):
        mask = torch.zeros(len(values), dtype=torch.bool)
        mask[[place - 1 for place in places]] = True
        at.append(values[mask])
        others.append(values[~mask])
    return float(torch.cat(at).mean() / torch.cat(others).mean())


@torch.inference_mode()
def measure(name: str, side: int) -> dict[str, object]:
    """Compute the scores of one backbone."""
    model = upfeat.load(name, upsampler="detail")
    stride = model.backbone.stride
    side = side // stride * stride
    photo = Image.open(PHOTO).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    x = model.preprocess(photo)
    halo = receptive_halo(model.backbone)
    tile = WINDOW // stride
    ways = {
        "whole": model.backbone(x),
        "raster": tiled(model, x, halo=halo, overlap=tile // 4),
        "plain tiles": tiled(model, x, halo=0, overlap=0),
    }
    basis = principal_components(ways["whole"][0].flatten(1).T, COMPONENTS)[1]
    maps = {
        way: UpsampledFeatures(coarse, model.guidance(x), model.upsampler).project(basis)[0]
        for way, coarse in ways.items()
    }
    blended = halo is None
    starts = {w.left for w in overlapping((side // stride,) * 2, tile, tile // 4)}
    cells = sorted(starts | {w + tile for w in starts}) if blended else range(0, 999, tile)
    borders = [stride * cell for cell in cells if 0 < stride * cell < side]
    plain = [stride * cell for cell in range(tile, side // stride, tile)]
    shifts = [stride * cells for cells in range(1, tile // 2)]
    control = [score(maps["whole"], *[[b - s for b in plain if b > s]] * 2) for s in shifts]
    noise = torch.tensor(control)
    difference = (ways["raster"] - ways["whole"]).norm() / ways["whole"].norm()
    return {
        "backbone": name.rpartition("/")[2],
        "side": side,
        "halo": halo,
        "whole": round(score(maps["whole"], borders, borders), 4),
        "raster": round(score(maps["raster"], borders, borders), 4),
        "whole_at_plain": round(score(maps["whole"], plain, plain), 4),
        "plain": round(score(maps["plain tiles"], plain, plain), 4),
        "noise": round(float(noise.std()), 4),
        "relative_difference": float(f"{difference:.2e}"),
    }


def main() -> None:
    """Measure all backbones."""
    parser = argparse.ArgumentParser(description="Measure seams of tiled features.")
    parser.add_argument("--backbones", nargs="+", default=["efficientnet_lite0"])
    parser.add_argument("--side", type=int, default=1344)
    parser.add_argument("--json", type=Path, metavar="PATH", help="file of the results")
    options = parser.parse_args()
    rows = [measure(name, options.side) for name in options.backbones]
    text = json.dumps({"window": WINDOW, "rows": rows}, indent=1) + "\n"
    print(text)
    if options.json is not None:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
