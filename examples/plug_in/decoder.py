"""A small decoder trained on the coarse grid, and trained on with the upsampler in place.

A decoder that is not linear has learned what averages over cells look like. Behind an upsampler its
3×3 convolution is dilated, so that it sees as far as it did; but it was never shown such features,
and a few steps of training with the upsampler in place mend that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scenes import PHOTOS, scenes
from segmentation_head import Segmenter, mean_iou, train
from torch import Tensor, nn

import upfeat

STRIDE = 4
"""Pixels per cell of what the decoder sees: every fourth costs a sixteenth, and is fine enough."""


def train_in_place(network: Segmenter, x: Tensor, labels: Tensor, steps: int = 16) -> None:
    """Train the decoder on, on what it will see."""
    labels = labels[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]
    optimiser = torch.optim.Adam(network.head.parameters(), 3e-3)
    for step in range(steps):
        part = slice(step % 2, None, 2)
        optimiser.zero_grad()
        F.cross_entropy(network(x[part]), labels[part]).backward()
        optimiser.step()


def main(steps: int = 16) -> dict[str, float]:
    """Return mean IoUs at every pixel: interpolated, upsampled, and trained in place."""
    torch.manual_seed(0)
    decoder = nn.Sequential(
        nn.Conv2d(112, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, len(PHOTOS), 1)
    )
    network = Segmenter(decoder)
    images, labels = scenes(6, seed=0)
    train(network, images, labels)
    seen, wanted = scenes(3, seed=1)
    norm = network.backbone.normalization
    x, scores = norm.apply(seen), {}
    with torch.no_grad():
        scores["interpolated"] = mean_iou(network(x), wanted)
    upsampler = upfeat.load_upsampler("detail_universal").requires_grad_(False)
    place = {"stride": STRIDE, "mean": norm.mean, "std": norm.std}
    with torch.no_grad(), upfeat.attach(network, "backbone", upsampler, **place):
        scores["not dilated"] = mean_iou(network(x), wanted)
    with upfeat.attach(network, "backbone", upsampler, head="head", **place):
        with torch.no_grad():
            scores["dilated"] = mean_iou(network(x), wanted)
        train_in_place(network, norm.apply(images), labels, steps)
        with torch.no_grad():
            scores["trained in place"] = mean_iou(network(x), wanted)
    return scores


if __name__ == "__main__":
    print(main())
