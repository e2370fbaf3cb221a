"""The linear probe of published comparisons: a 1×1 convolution, trained on every pixel.

JAFAR, AnyUp and NAF compare upsamplers by a 1×1 convolution on the upsampled features of images of
448 pixels, trained by AdamW for 20 epochs on the cross-entropy of all labelled pixels. Here the
convolution is applied before upsampling, with the same result and gradients, so that K channels are
upsampled and not C. The published scripts differ in batches and schedules; these are NAF's: two
images per step, and a cosine schedule over all steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.evaluation.data.targets import IGNORE_INDEX
from upfeat.feature_map import FeatureMap
from upfeat.probes import LinearProbe

EPOCHS = 20
RATE = 5e-4
BATCH = 2
"""Number of images per step."""


class Labelled(NamedTuple):
    """Upsampled features of one image, with its labels."""

    features: FeatureMap
    """(1, C, H, W)."""
    label: Tensor
    """(H, W) class indices; 255 is ignored."""


def train_classifier(
    read: Callable[[int], Labelled],
    count: int,
    channels: int,
    n_classes: int,
    generator: torch.Generator,
    on_epoch: Callable[[int], None],
) -> LinearProbe:
    """Train a 1×1 convolution on all labelled pixels of the training images.

    Args:
        read: function that returns one of the images by its index; called anew in every epoch, so
            that no map is kept.
        count: number of training images.
        channels: number of feature channels C.
        n_classes: number K of classes.
        generator: source of the initial weights and of the order of the images, on the CPU.
        on_epoch: called with the number of finished epochs.
    """
    device = read(0).label.device
    bound = 1 / math.sqrt(channels)  # of the initial weights of ``nn.Conv2d``
    made = torch.empty(n_classes, channels + 1).uniform_(-bound, bound, generator=generator)
    probe = LinearProbe(
        made[:, 1:].to(device).contiguous().requires_grad_(),
        made[:, 0].to(device).contiguous().requires_grad_(),
    )
    optimizer = torch.optim.AdamW([probe.weight, probe.bias], lr=RATE)
    steps = EPOCHS * -(-count // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(EPOCHS):
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, BATCH):
            optimizer.zero_grad()
            _add_gradients(probe, [read(index) for index in order[start : start + BATCH]])
            optimizer.step()
            schedule.step()
        on_epoch(epoch + 1)
    return LinearProbe(probe.weight.detach(), probe.bias.detach())


def _add_gradients(probe: LinearProbe, batch: list[Labelled]) -> None:
    """Add the gradients of the mean cross-entropy over all labelled pixels of a batch."""
    count = sum(int((each.label != IGNORE_INDEX).sum()) for each in batch)
    for each in batch:  # one at a time, because sizes may differ
        with torch.enable_grad():
            logits, label = _logits(each.features, probe), each.label[None].long()
            loss = F.cross_entropy(logits, label, ignore_index=IGNORE_INDEX, reduction="sum")
            loss = loss / count
        loss.backward()


def _logits(features: FeatureMap, probe: LinearProbe) -> Tensor:
    """Apply the convolution with gradients, (1, K, H, W)."""
    logits = features.project(probe.weight, probe.bias)
    if logits.requires_grad:
        return logits
    # A map whose heads record no gradients, such as a fit.
    return F.conv2d(features.full(torch.float32), probe.weight[:, :, None, None], probe.bias)
