"""Compare the features of two versions of the code, with the same weights on the same image.

    PYTHONPATH=OLD/src python benchmarks/digits.py write old.pt --weights OLD/src/upfeat/weights
    python benchmarks/digits.py write new.pt --weights OLD/src/upfeat/weights
    python benchmarks/digits.py write exact.pt --weights OLD/src/upfeat/weights --double
    python benchmarks/digits.py compare old.pt new.pt exact.pt --commits OLD NEW

Writes benchmarks/digits.json: for each upsampler, and for the embedded backbone, the largest
relative difference, ‖a − b‖/‖b‖, over images that fit into one window of the regression.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import upfeat

TARGET = Path(__file__).with_name("digits.json")
PHOTO = Path(__file__).parents[1] / "examples" / "photos" / "coffee.jpg"
# Image, grid, and output where it is not the image's size.
CASES = [
    ((224, 224), (14, 14), None),
    ((304, 416), (19, 26), None),
    ((225, 301), (16, 21), None),
    ((112, 96), (7, 6), (100, 333)),
    ((512, 512), (32, 32), None),
]
CLASSES = {
    "detail": upfeat.DetailUpsampler,
    "jbu": upfeat.JBUStack,
    "neighbourhood": upfeat.NeighbourhoodUpsampler,
}


@torch.inference_mode()
def features_of(weights: Path, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """Features of the backbone and of every upsampler whose weights lie in a folder."""
    torch.set_num_threads(1)
    found: dict[str, list[torch.Tensor]] = {"backbone": []}
    photo = Image.open(PHOTO).convert("RGB")
    backbone = upfeat.load_backbone("efficientnet_lite0").to(dtype)
    images = []
    for size, _, _ in CASES:
        pixels = np.asarray(photo.resize(size[::-1]))
        images.append((torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - 0.5)[None] / 0.5)
        if size[0] % 16 == 0 and size[1] % 16 == 0:
            found["backbone"].append(backbone(images[-1].to(dtype)))
    for folder in sorted(weights.iterdir()):
        cls = CLASSES[folder.name.partition("_")[0]]
        upsampler = cls.from_pretrained(folder).eval().to(dtype)
        channels = upsampler.config().get("embed_dim") or 112
        found[folder.name] = []
        for number, (_, grid, target) in enumerate(CASES):
            generator = torch.Generator().manual_seed(number)
            coarse = torch.randn(1, channels, *grid, generator=generator).to(dtype)
            found[folder.name].append(upsampler(coarse, images[number].to(dtype), target).clone())
    return found


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest of ‖a − b‖/‖b‖."""
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def main() -> None:
    """Write features, or compare what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["write", "compare"])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--commits", nargs=2)
    options = parser.parse_args()
    if options.action == "write":
        dtype = torch.float64 if options.double else torch.float32
        torch.save(features_of(options.weights, dtype), options.files[0])
        return
    old, new, exact = (torch.load(path) for path in options.files)
    rows = {
        name: {
            "new_from_old": difference(new[name], old[name]),
            "old_from_float64": difference(old[name], exact[name]),
            "new_from_float64": difference(new[name], exact[name]),
        }
        for name in old
    }
    content = {"commits": options.commits, "torch": torch.__version__, "rows": rows}
    TARGET.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
