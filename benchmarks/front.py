"""Draw one photograph's features from one pass, five passes, an implicit fit and rivals.

Colours are three principal components, the same in every panel.

    python benchmarks/front.py examples/photos/cat.jpg -o docs/images/front.jpg
    python benchmarks/front.py photo.jpg --backbone hf:FOLDER --rivals anyup.pth -o front.jpg
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import upfeat
from upfeat.upsamplers import create_upsampler
from upfeat.visualize import PCABasis, side_by_side, to_image

_COLUMNS = 4


def ways(
    backbone: upfeat.Backbone, photo: Path, size: int, rivals: list[Path], *, fit: bool
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return functions from the prepared image to features of its size, by caption."""

    def loaded(upsampler: str | Path | None, **options: object) -> Callable[[Tensor], Tensor]:
        return upfeat.load(backbone, upsampler=upsampler, **options)  # pyright: ignore[reportArgumentType]

    found = {
        "bilinear": loaded("bilinear"),
        "joint bilateral": loaded("joint_bilateral"),
        "one pass": loaded("detail_universal"),
    }
    found["one pass, early layers"] = loaded(None, early=True)
    for name, passes in (("two", 2), ("five", 5), ("eight", 8)):
        found[f"{name} passes"] = loaded(None, passes=passes, early=True)
    if fit:

        def fitted(x: Tensor) -> Tensor:
            config = upfeat.FitConfig(size=size)
            return upfeat.fit_implicit(photo, backbone, config).render((x.shape[2], x.shape[3]))

        found["all passes (fit)"] = fitted
    for path in rivals:
        found[create_upsampler(path, backbone.embed_dim).name] = loaded(path)
    return found


@torch.no_grad()
def main() -> None:
    """Compute all panels and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photo", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--size", type=int, default=224, help="shorter side, pixels")
    parser.add_argument("--rivals", type=Path, nargs="*", default=[], help="published checkpoints")
    parser.add_argument("--no-fit", action="store_true", help="leave the implicit fit out")
    options = parser.parse_args()
    backbone = upfeat.load_backbone(options.backbone)
    x = backbone.preprocess(options.photo, options.size, align=True)
    size, coarse = (x.shape[2], x.shape[3]), backbone(x)[0]
    basis = PCABasis(coarse)

    def coloured(values: Tensor) -> Image.Image:
        return to_image(basis.colours(basis.project(values)))

    blocks = F.interpolate(coarse[None], size=size, mode="nearest-exact")[0]
    panels = [
        ("image", to_image(backbone.denormalize(x)[0])),
        (f"coarse, {coarse.shape[1]} x {coarse.shape[2]}", coloured(blocks)),
    ]
    every = ways(backbone, options.photo, options.size, options.rivals, fit=not options.no_fit)
    for caption, way in every.items():
        begin = time.process_time()
        panels.append((caption, coloured(way(x)[0])))
        print(f"{caption}: {time.process_time() - begin:.2f} s of processor time")
    rows = [side_by_side(panels[i : i + _COLUMNS]) for i in range(0, len(panels), _COLUMNS)]
    width = max(row.width for row in rows)
    picture = Image.new("RGB", (width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height
    picture.save(options.output, quality=88)


if __name__ == "__main__":
    main()
