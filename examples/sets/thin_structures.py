"""Counting thin structures: threads a few pixels wide, as vessels or the veins of leaves are.

    python thin_structures.py

A few strokes on one picture train a linear classifier on features of pixels; on another picture,
the threads that it finds are counted as connected regions. On the backbone's grid, interpolated,
threads run together; upsampled by the image they stay apart.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from upfeat.adapters import PixelFeatures

Array = NDArray[np.generic]


def threads(count: int, seed: int, size: tuple[int, int] = (192, 256)) -> tuple[Array, Array]:
    """A picture (H, W, 3) of waving threads on a noisy ground, and where they are."""
    generator = np.random.default_rng(seed)
    rows, columns = np.indices(size)
    mask = np.zeros(size, bool)
    spacing = size[0] / (count + 1)
    for number in range(count):
        phase, length = generator.uniform(0, 6), generator.uniform(30, 60)
        middle = spacing * (number + 1) + 3 * np.sin(columns / length + phase)
        start, end = generator.uniform(8, 40), size[1] - generator.uniform(8, 40)
        mask |= (abs(rows - middle) < 2.5) & (columns > start) & (columns < end)
    ground = 105 + generator.normal(0, 8, (*size, 3)) + 15 * np.sin(rows / 50)[..., None]
    thread = np.array((190, 75, 60)) + generator.normal(0, 8, (*size, 3))
    picture = np.where(mask[..., None], thread, ground)
    return picture.clip(0, 255).astype(np.uint8), mask


def fit_classifier(features: Tensor, labels: Tensor) -> torch.nn.Linear:
    """Logistic regression of (N, k) features."""
    torch.manual_seed(0)
    scale = features.std(0).clamp(min=1e-6)
    linear = torch.nn.Linear(features.shape[1], 1)
    optimiser = torch.optim.LBFGS(linear.parameters(), max_iter=60)

    def loss() -> Tensor:
        optimiser.zero_grad()
        out = linear(features / scale)[:, 0]
        value = F.binary_cross_entropy_with_logits(out, labels)
        value = value + 1e-3 * linear.weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    linear.weight.data /= scale
    return linear


def count_regions(mask: Tensor, least: int = 500) -> int:
    """Number of connected regions of at least that many pixels; gaps of 8 pixels are bridged."""
    mask = F.max_pool2d(mask[None].float(), 9, stride=1, padding=4)[0] > 0
    label = torch.arange(1.0, mask.numel() + 1).view(1, 1, *mask.shape) * mask
    while True:
        grown = F.max_pool2d(label, 3, stride=1, padding=1) * mask
        if torch.equal(grown, label):
            break
        label = grown
    _, sizes = label[label > 0].unique(return_counts=True)
    return int((sizes >= least).sum())


def count_threads(upsampler: str, count: int = 8) -> tuple[int, float]:
    """Train on strokes, count on another picture; the count, and the mask's IoU."""
    picture, mask = threads(count, seed=0)
    strokes = np.zeros(mask.shape, bool)
    strokes[:, 60:90] = strokes[:, 150:180] = True  # what a person would paint over
    pixels = PixelFeatures("efficientnet_lite0.stride8", upsampler, n_components=40).fit(picture)
    features = torch.from_numpy(pixels.transform(picture))
    drawn = torch.from_numpy(strokes.ravel())
    labels = torch.from_numpy(mask.ravel()).float()
    classify = fit_classifier(features[drawn], labels[drawn])

    other, truth = threads(count, seed=1)
    with torch.no_grad():
        scores = classify(torch.from_numpy(pixels.transform(other)))
    found = scores.view(truth.shape) > 0
    expected = torch.from_numpy(truth)
    overlap = float((found & expected).sum() / (found | expected).sum())
    return count_regions(found), overlap


def main() -> dict[str, tuple[int, float]]:
    """Count 8 threads by features that are interpolated, and by upsampled ones."""
    return {name: count_threads(name) for name in ("bilinear", "detail")}


if __name__ == "__main__":
    for name, (count, overlap) in main().items():
        print(f"{name}: {count} of 8 threads, IoU {overlap:.2f}")
