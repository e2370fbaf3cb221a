"""Learn the translation between two scales of a backbone from photographs, without labels.

    python benchmarks/learn_translation.py PHOTOS -o translation.safetensors
    python benchmarks/learn_translation.py PHOTOS -o views.safetensors --views --count 48 --size 176

The first command learns the translation of features of the enlarged image, which
``upfeat.load(backbone, passes=5, translation="translation.safetensors")`` uses. The second learns
the translation of maps fitted to many views, for ``upfeat.fit_implicit``; a photograph takes as
long as its fit. The backbone is aligned (``Backbone.aligned``), by the displacement that the
photographs show. The shipped translations of the embedded backbones were learnt from 80 photographs
of 256 pixels, one for each of 80 ImageNet classes, and from fits to 48 of 176 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import upfeat
from upfeat.alignment import align_for
from upfeat.backbones import Backbone, estimate_displacement
from upfeat.images import read_image
from upfeat.implicit.config import FitConfig
from upfeat.implicit.features import resize_image
from upfeat.implicit.fit import fit_guidance
from upfeat.implicit.one_pass import mean_upsampler
from upfeat.photo_search import search
from upfeat.scales import fit_translation
from upfeat.translation import PENALTY, learn_translation


def pairs_of_fits(
    backbone: Backbone, paths: list[Path], size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair an image's features with the map fitted to its views, averaged over the cells."""
    config = FitConfig(share=1.0, translation=0.0)
    for path in paths:
        pixels = read_image(path)
        shape = backbone.preprocess(pixels, size, align=True).shape[-2:]
        guidance = resize_image(pixels, (shape[0], shape[1]))
        aligned = align_for(mean_upsampler(backbone), backbone)  # as the fit does
        own = aligned(backbone.normalization.apply(guidance[None].float() / 255))
        fitted = fit_guidance(guidance, backbone, config).render()
        yield own, F.adaptive_avg_pool2d(fitted, own.shape[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photos", type=Path, help="folder of photographs")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--size", type=int, default=256, help="shorter side, pixels")
    parser.add_argument(
        "--count", type=int, default=80, help="number of photographs, evenly spaced over the folder"
    )
    parser.add_argument("--penalty", type=float, default=PENALTY)
    parser.add_argument(
        "--views", action="store_true", help="learn the translation of fits to many views"
    )
    options = parser.parse_args()

    backbone = upfeat.load_backbone(options.backbone).eval().requires_grad_(False)
    paths = [photo.path for photo in search(options.photos)]
    step = max(len(paths) // options.count, 1)
    chosen = paths[step // 2 if options.views else 0 :: step][: options.count]
    with torch.no_grad():
        if options.views:
            pairs = pairs_of_fits(backbone, chosen, options.size)
            translation = learn_translation(pairs, options.penalty)
        else:
            images = [backbone.preprocess(path, options.size, align=True) for path in chosen]
            aligned = backbone.aligned(round(sum(estimate_displacement(backbone, images)) / 2))
            translation = fit_translation(aligned, images, penalty=options.penalty)
    translation.save(options.output, backbone)
    print(f"{options.output}: from {len(chosen)} photographs")


if __name__ == "__main__":
    main()
