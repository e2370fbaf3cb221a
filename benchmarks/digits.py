"""Compare the features of two versions of the code, with the same weights on the same image.

    PYTHONPATH=OLD/src python benchmarks/digits.py write old.pt --weights OLD/src/upfeat/weights
    python benchmarks/digits.py write new.pt --weights OLD/src/upfeat/weights
    python benchmarks/digits.py write exact.pt --weights OLD/src/upfeat/weights --double
    python benchmarks/digits.py compare old.pt new.pt exact.pt --commits OLD NEW
    python benchmarks/digits.py rounding

Writes benchmarks/digits.json: for each upsampler, and for the embedded backbone, the largest
relative difference, ‖a − b‖/‖b‖, over images that fit into one window of the regression.
``rounding`` needs no other version: it compares ways to compute the backbone with float64.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import upfeat
from upfeat.backbones.conv_norm import ConvNorm

TARGET = Path(__file__).with_name("digits.json")
PHOTO = Path(__file__).parents[1] / "examples" / "photos" / "coffee.jpg"
# Size of the image, of its grid, and of the output (``None`` for the size of the image).
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
    """Compute features of the backbone and of every upsampler with weights in a folder."""
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
        cls = CLASSES.get(folder.name.partition("_")[0])
        if cls is None:  # a file, or weights for early layers, which these cases do not have
            continue
        upsampler = cls.from_pretrained(folder).eval().to(dtype)
        channels = upsampler.config().get("embed_dim") or 112
        found[folder.name] = []
        for number, (_, grid, target) in enumerate(CASES):
            generator = torch.Generator().manual_seed(number)
            coarse = torch.randn(1, channels, *grid, generator=generator).to(dtype)
            found[folder.name].append(upsampler(coarse, images[number].to(dtype), target).clone())
    return found


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the largest relative difference ‖a − b‖/‖b‖ over pairs of tensors."""
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def shift_after(layers: ConvNorm, input: torch.Tensor) -> torch.Tensor:
    """Run the layers with the normalisation's scale folded and its shift added afterwards."""
    weight, shift = layers._fold(input.device)
    conv = layers[0]
    assert isinstance(conv, torch.nn.Conv2d)
    border, both, uneven = layers._borders(input)
    input = input if border is None else F.pad(input, border)
    out = F.conv2d(input, weight, None, layers.stride, both, 1, conv.groups)
    out = out + shift[:, None, None]
    out = out.clamp_(0, 6) if len(layers) > 2 else out
    return out[:, :, int(uneven[0]) :, int(uneven[1]) :]


@torch.inference_mode()
def rounding() -> dict[str, dict[str, float]]:
    """Compare ways to compute the embedded backbone with float64 and with its separate layers."""
    torch.set_num_threads(1)
    photo = Image.open(PHOTO).convert("RGB")
    images = [
        ((torch.from_numpy(np.array(photo.resize(size[::-1]))).permute(2, 0, 1) / 255 - 0.5) / 0.5)
        for size, grid, _ in CASES
        if grid[0] * 16 == size[0] and grid[1] * 16 == size[1]
    ]
    separate = mock.patch.object(ConvNorm, "_can_fold", return_value=False)
    ways = {
        "folded": [],
        "scale folded, shift added after": [mock.patch.object(ConvNorm, "_folded", shift_after)],
        "layers": [separate],
        "layers, without oneDNN": [separate, torch.backends.mkldnn.flags(enabled=False)],
    }
    backbone = upfeat.load_backbone("efficientnet_lite0")
    found = {}
    for name, changes in ways.items():
        with contextlib.ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            found[name] = [backbone(image[None]) for image in images]
    backbone = backbone.to(torch.float64)
    exact = [backbone(image[None].double()) for image in images]
    return {
        name: {
            "from_float64": difference(features, exact),
            "from_float64_largest": largest(features, exact),
            "from_layers": difference(features, found["layers"]),
            "from_layers_largest": largest(features, found["layers"]),
        }
        for name, features in found.items()
    }


def largest(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the largest max|a − b| / max|b| over pairs of tensors."""
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def main() -> None:
    """Write features, compare written files, or measure rounding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["write", "compare", "rounding"])
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--commits", nargs=2)
    options = parser.parse_args()
    if options.action == "write":
        dtype = torch.float64 if options.double else torch.float32
        torch.save(features_of(options.weights, dtype), options.files[0])
        return
    if options.action == "rounding":
        content = json.loads(TARGET.read_text()) | {"backbone_rounding": rounding()}
        TARGET.write_text(json.dumps(content, indent=1) + "\n")
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
    content = json.loads(TARGET.read_text())
    content |= {"commits": options.commits, "torch": torch.__version__, "rows": rows}
    TARGET.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
