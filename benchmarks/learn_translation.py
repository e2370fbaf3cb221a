"""Learn the translation between two scales of a backbone from photographs, without labels.

    python benchmarks/learn_translation.py PHOTOS -o translation.safetensors

``upfeat.load(backbone, passes=5, translation="translation.safetensors")`` uses it. The shipped one
of the embedded backbone was made from 80 photographs, one each of 80 ImageNet classes, 256 pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import upfeat
from upfeat.scales import PENALTY, fit_translation
from upfeat.training.photographs import SUFFIXES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photos", type=Path, help="a folder of photographs")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--size", type=int, default=256, help="shorter side, pixels")
    parser.add_argument("--count", type=int, default=80, help="photographs, evenly spaced")
    parser.add_argument("--penalty", type=float, default=PENALTY)
    options = parser.parse_args()

    backbone = upfeat.load_backbone(options.backbone).eval().requires_grad_(False)
    paths = sorted(path for path in options.photos.iterdir() if path.suffix.lower() in SUFFIXES)
    chosen = paths[:: max(len(paths) // options.count, 1)][: options.count]
    images = (backbone.preprocess(path, options.size, align=True) for path in chosen)
    with torch.inference_mode():
        translation = fit_translation(backbone, images, penalty=options.penalty)
    translation.save(options.output, backbone)
    print(f"{options.output}: from {len(chosen)} photographs")


if __name__ == "__main__":
    main()
