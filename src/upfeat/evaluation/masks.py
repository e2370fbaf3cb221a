"""Scores of masks by the measures of DAVIS (Perazzi et al. 2016): regions (J) and contours (F)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.evaluation.data.targets import IGNORE_INDEX

TOLERANCE = 0.008
"""Largest distance of contours that match, as a fraction of the image's diagonal."""


def mask_scores(
    predicted: Tensor, label: Tensor, objects: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Score the mask of every object in one frame.

    Args:
        predicted: (H, W), number of the object at each pixel.
        label: (H, W), true numbers; pixels of ``ignore_index`` are outside all masks.
        objects: (K,), numbers of the objects to score.
        ignore_index: label of ignored pixels.

    Returns:
        (K, 2) float64 in [0, 1]: the intersection over union (J) and the F-score of contours (F).
        An object that is neither in the label nor predicted scores 1, as in the official measure.
    """
    valid = label != ignore_index
    guess = (predicted == objects[:, None, None]) & valid
    true = (label == objects[:, None, None]) & valid
    shared, union = (one.flatten(1).sum(1).double() for one in (guess & true, guess | true))
    regions = torch.where(union > 0, shared / union.clamp(min=1), 1.0)
    return torch.stack([regions, contour_f(guess, true)], dim=1)


def contour_f(predicted: Tensor, true: Tensor) -> Tensor:
    """Compute the F-score of the contours of masks, the harmonic mean of precision and recall.

    Args:
        predicted: (K, H, W) bool, masks.
        true: (K, H, W) bool.

    Returns:
        (K,) float64 in [0, 1]: 1 if neither mask has a contour, 0 if only one has.
    """
    radius = math.ceil(TOLERANCE * math.hypot(*true.shape[1:]))
    ours, theirs = contours(predicted), contours(true)
    counts = (
        (ours & dilate(theirs, radius), ours),  # precision
        (theirs & dilate(ours, radius), theirs),  # recall
    )
    totals = [[part.flatten(1).sum(1).double() for part in pair] for pair in counts]
    (near_ours, n_ours), (near_theirs, n_theirs) = totals
    precision, recall = near_ours / n_ours.clamp(min=1), near_theirs / n_theirs.clamp(min=1)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return torch.where((n_ours == 0) & (n_theirs == 0), 1.0, score)


def contours(masks: Tensor) -> Tensor:
    """Mark pixels that differ from the pixel to the right, below, or below to the right.

    Args:
        masks: (K, H, W) bool.

    Returns:
        (K, H, W) bool, lines one pixel wide; the image's border is no contour.
    """
    below = torch.cat([masks[:, 1:], masks[:, -1:]], dim=1)
    right, diagonal = (torch.cat([one[..., 1:], one[..., -1:]], dim=2) for one in (masks, below))
    return (masks ^ right) | (masks ^ below) | (masks ^ diagonal)


def dilate(masks: Tensor, radius: int) -> Tensor:
    """Dilate masks (K, H, W) bool by a disc of ``radius`` pixels; the shape is unchanged."""
    steps = torch.arange(-radius, radius + 1, device=masks.device)
    disc = (steps[:, None].square() + steps.square() <= radius**2).float()
    found = F.conv2d(masks[:, None].float(), disc[None, None], padding=radius)
    return found[:, 0] > 0.5
