"""A linear head trained on the coarse grid, used at every pixel: no retraining, three lines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scenes import PHOTOS, scenes
from torch import Tensor, nn

import upfeat


class Segmenter(nn.Module):
    """A frozen backbone and a head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = upfeat.load_backbone("efficientnet_lite0").requires_grad_(False)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits on the grid of the backbone."""
        return self.head(self.backbone(x))


def train(network: Segmenter, images: Tensor, labels: Tensor, steps: int = 80) -> None:
    """Train the head on the coarse grid, as one would without an upsampler."""
    with torch.no_grad():
        features = network.backbone(network.backbone.normalization.apply(images))
    one_hot = F.one_hot(labels, len(PHOTOS)).movedim(3, 1).float()
    shares = F.adaptive_avg_pool2d(one_hot, features.shape[-2:])  # of each class in each cell
    optimiser = torch.optim.Adam(network.head.parameters(), 1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(network.head(features), shares).backward()
        optimiser.step()


def mean_iou(logits: Tensor, labels: Tensor) -> float:
    """Mean intersection over union at every pixel; coarse logits are interpolated bilinearly."""
    logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear")
    hits = F.one_hot(logits.argmax(1), len(PHOTOS)), F.one_hot(labels, len(PHOTOS))
    both, either = (hits[0] * hits[1]).sum((0, 1, 2)), (hits[0] | hits[1]).sum((0, 1, 2))
    return float((both / either.clamp(min=1)).mean())


def compare(head: nn.Module) -> dict[str, float]:
    """Train coarsely, then score interpolated logits and those of upsampled features."""
    network = Segmenter(head)
    train(network, *scenes(6, seed=0))
    images, labels = scenes(3, seed=1)
    norm = network.backbone.normalization
    x = norm.apply(images)
    scores = {}
    with torch.no_grad():
        scores["interpolated"] = mean_iou(network(x), labels)

        upsampler = upfeat.load_upsampler("detail_universal")
        with upfeat.attach(
            network, "backbone", upsampler, mean=norm.mean, std=norm.std, head="head"
        ):
            scores["upsampled"] = mean_iou(network(x), labels)
    return scores


def main() -> dict[str, float]:
    """Return the mean IoU of both."""
    torch.manual_seed(0)
    return compare(nn.Conv2d(112, len(PHOTOS), 1))


if __name__ == "__main__":
    print(main())
