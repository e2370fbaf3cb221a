"""A linear depth head trained on the coarse grid, used at every pixel.

``python depth_head.py FOLDER`` takes a folder of ``train`` and ``test``, each with ``images`` and
16-bit ``depth`` in millimetres (0: unknown), in place of generated scenes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from scenes import depths, scenes
from torch import Tensor, nn

import upfeat
from upfeat.images import read_image


def fit(features: Tensor, depth: Tensor, penalty: float = 1.0) -> nn.Conv2d:
    """Ridge-regress the depth of cells on their features; cells without any are left out."""
    known = depth > 0
    size = features.shape[-2:]
    share = F.adaptive_avg_pool2d(known[:, None].float(), size)
    target = F.adaptive_avg_pool2d(depth[:, None], size) / share.clamp(min=1e-6)
    rows = features.movedim(1, -1)[share[:, 0] > 0.5]  # (N, C)
    target = target[:, 0][share[:, 0] > 0.5]
    mean, offset = rows.mean(0), target.mean()
    gram = (rows - mean).T @ (rows - mean)
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram)) / 100
    weight = torch.linalg.solve(gram, (rows - mean).T @ (target - offset))
    head = nn.Conv2d(len(weight), 1, 1).requires_grad_(False)
    head.weight.copy_(weight[None, :, None, None])
    assert head.bias is not None
    head.bias.fill_(float(offset - mean @ weight))
    return head


def error(prediction: Tensor, depth: Tensor, shrink: int) -> float:
    """Root mean square error in metres, where the depth is known, at a fraction of the size."""
    size = [side // shrink for side in depth.shape[-2:]]
    wanted = F.interpolate(depth[:, None], size=size, mode="nearest-exact")
    given = F.interpolate(prediction, size=size, mode="bilinear", antialias=True)
    return float((given - wanted)[wanted > 0].square().mean().sqrt())


def compare(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], shrink: int) -> dict:
    """Fit on the coarse grid; score interpolated depth and that of upsampled features."""
    backbone = upfeat.load_backbone("efficientnet_lite0")
    norm = backbone.normalization
    with torch.no_grad():
        network = nn.Sequential(backbone, fit(backbone(norm.apply(train[0])), train[1]))
        x, scores = norm.apply(test[0]), {}
        scores["interpolated"] = error(network(x), test[1], shrink)
        upsampler = upfeat.load_upsampler("detail_universal")
        with upfeat.attach(network, "0", upsampler, mean=norm.mean, std=norm.std):
            scores["upsampled"] = error(network(x), test[1], shrink)
    return scores


def read(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first images and depths in metres of a folder, at half their size."""
    images, found = [], []
    for path in sorted((folder / "images").iterdir())[:count]:
        images.append(F.interpolate(read_image(path)[None], scale_factor=0.5, mode="area"))
        depth = read_image(folder / "depth" / f"{path.stem}.png", max_value=65535)[:1] * 65.535
        found.append(F.interpolate(depth[None], scale_factor=0.5, mode="nearest-exact")[0])
    return torch.cat(images), torch.cat(found)


def main(folder: Path | None = None) -> dict[str, float]:
    """Return both errors, in metres."""
    if folder is not None:
        # A Kinect's depth is not registered to its colours: a quarter of the size is fair.
        return compare(read(folder / "train", 24), read(folder / "test", 8), shrink=2)
    images, labels = scenes(9, seed=0)
    depth = depths(labels, seed=2)
    return compare((images[:6], depth[:6]), (images[6:], depth[6:]), shrink=1)


if __name__ == "__main__":
    print(main(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
