"""Propagation of labels from frame to frame by the similarity of features.

The rule is that of Jabri et al., Space-time correspondence as a contrastive random walk, 2020, as
used for frozen features by Caron et al. (DINO, 2021): every cell takes the mean label of the most
similar cells in its neighbourhood, in the first frame and in the frames just before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.linear import unit_vectors
from upfeat.types import Size, Window
from upfeat.upsamplers.maps import widened, windows

CONTEXT = 7
"""Number of previous frames, besides the first, whose labels are used."""

TOP_K = 5
"""Number of similar cells whose labels are averaged."""

TEMPERATURE = 0.1
"""Temperature of the softmax of cosine similarities."""

REACH = 0.2
"""Radius of the neighbourhood as a fraction of the shorter side: 12 of 60 cells, as published."""

# Similarities that differ by less are equal. Otherwise rounding would choose among cells of equal
# features, which upsampling by nearest neighbour has everywhere.
_ROUNDING = 1e-5

# Similarity of cells that are no neighbours: the softmax gives them exactly 0.
_APART = -1e4


class Tracker:
    """Labels of one sequence, propagated frame by frame."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        """Start from the first frame.

        Args:
            features: (h, w, C), of unit length.
            labels: (h, w, K), weights of K labels for each cell.
        """
        self.keys = features.new_empty(1 + CONTEXT, *features.shape)
        self.labels = labels.new_empty(1 + CONTEXT, *labels.shape)
        self.keys[0], self.labels[0] = features, labels
        self.count = 1
        self.radius = max(1, round(REACH * min(features.shape[:2])))

    def step(self, features: Tensor) -> Tensor:
        """Propagate labels to the next frame: features (h, w, C) -> labels (h, w, K)."""
        known = min(self.count, 1 + CONTEXT)
        found = propagate(features, self.keys[:known], self.labels[:known], self.radius)
        oldest = 1 + (self.count - 1) % CONTEXT
        self.keys[oldest], self.labels[oldest] = features, found
        self.count += 1
        return found


def to_cells(features: Tensor, grid: Size) -> Tensor:
    """Average features (C, H, W) over the cells of a grid, and scale them to unit length.

    Returns:
        (h, w, C).
    """
    return unit_vectors(_means(features, grid), 2)


def to_soft(label: Tensor, objects: Tensor, grid: Size) -> Tensor:
    """Compute the part of every cell of a grid that each object covers.

    Args:
        label: (H, W), numbers of objects.
        objects: (K,), numbers to find; pixels of other numbers count for none.
        grid: (h, w), number of rows and columns of cells.

    Returns:
        (h, w, K) in [0, 1].
    """
    return _means((label == objects[:, None, None]).float(), grid)


def propagate(
    query: Tensor,
    keys: Tensor,
    labels: Tensor,
    radius: int,
    *,
    top_k: int = TOP_K,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Give every cell the mean label of the most similar cells around it in other frames.

    Weights are the softmax of the cosine similarities of the ``top_k`` most similar cells of all
    frames together. Cells as similar as the last of them count too, as in the published code, so
    the result does not depend on the order of cells.

    Args:
        query: (h, w, C), features of unit length.
        keys: (N, h, w, C), features of N frames, of unit length.
        labels: (N, h, w, K), labels of the N frames.
        radius: largest distance of rows and of columns, cells.
        top_k: number of similar cells.
        temperature: temperature of the softmax.

    Returns:
        (h, w, K). Memory beyond the result is that of the neighbourhoods of a square of cells.
    """
    height, width = query.shape[:2]
    out = query.new_empty(height, width, labels.shape[3])
    # Larger squares compare more cells that are no neighbours, smaller ones copy keys more often.
    side = max(4, radius * 2 // 3)
    for own in windows((height, width), side, side):
        near = widened(own, radius, (height, width))
        wanted = _cut(query[None], own).flatten(0, 2)
        similar = wanted @ _cut(keys, near).flatten(0, 2).T
        apart = _apart(own, near, radius).to(similar.device)
        similar.unflatten(1, (len(keys), -1)).masked_fill_(apart[:, None], _APART)
        weights = _weights(similar, top_k, temperature)
        found = weights @ _cut(labels, near).flatten(0, 2)
        _cut(out[None], own)[0] = found.unflatten(0, (own.height, own.width))
    return out


def _means(maps: Tensor, grid: Size) -> Tensor:
    return F.adaptive_avg_pool2d(maps, grid).permute(1, 2, 0).contiguous()


def _cut(maps: Tensor, window: Window) -> Tensor:
    """Return a window of maps (N, h, w, C)."""
    return maps[:, window.top : window.bottom, window.left : window.right]


def _apart(own: Window, near: Window, radius: int) -> Tensor:
    """Mark pairs of cells of two windows that are no neighbours: (own cells, near cells) bool."""
    rows = torch.arange(own.top, own.bottom)[:, None] - torch.arange(near.top, near.bottom)
    columns = torch.arange(own.left, own.right)[:, None] - torch.arange(near.left, near.right)
    far = rows.abs()[:, None, :, None].maximum(columns.abs()[None, :, None]) > radius
    return far.flatten(2).flatten(0, 1)


def _weights(similar: Tensor, top_k: int, temperature: float) -> Tensor:
    """Turn similarities (cells, M), ``_APART`` of no neighbours, into weights of sum 1."""
    best = similar.topk(min(top_k, similar.shape[1]), dim=1).values
    similar[similar < best[:, -1:] - _ROUNDING] = _APART
    return (similar / temperature).softmax(1)
