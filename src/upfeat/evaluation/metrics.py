"""Scores of label maps and depth maps: counts summed over a dataset, then ratios of the sums."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.evaluation.data.targets import IGNORE_INDEX


def confusion_matrix(
    predicted: Tensor, label: Tensor, n_classes: int, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Count pixels by label and prediction.

    Args:
        predicted: (…, H, W) class indices; leading axes are alternative predictions of one label.
        label: (H, W) class indices, or a label for each prediction in the shape of ``predicted``.
        n_classes: number K of classes.
        ignore_index: label of pixels that are not counted.

    Returns:
        (…, K, K) int64, one row per label and one column per prediction.

    Raises:
        ValueError: shapes differ, or an index is outside 0 to K − 1.
    """
    if predicted.shape[-2:] != label.shape[-2:]:
        raise ValueError(
            f"predicted is {tuple(predicted.shape)} and label {tuple(label.shape)}; bring the "
            "prediction to the label's size"
        )
    label = label.expand_as(predicted).long()
    counted = label != ignore_index
    for name, values in (("label", label[counted]), ("predicted", predicted[counted])):
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >= n_classes):
            raise ValueError(
                f"{name} has indices from {int(values.min())} to {int(values.max())}; they must "
                f"be 0 to {n_classes - 1}, or {ignore_index} in the label for ignored pixels"
            )
    maps = predicted.shape[:-2]
    n_maps = math.prod(maps)
    which = torch.arange(n_maps, device=label.device).view(*maps, 1, 1).expand_as(label)
    cells = (which * n_classes + label) * n_classes + predicted.long()
    counts = torch.bincount(cells[counted], minlength=n_maps * n_classes**2)
    return counts.view(*maps, n_classes, n_classes)


def class_iou(matrix: Tensor) -> Tensor:
    """Compute the intersection over union of every class.

    Args:
        matrix: (K, K), result of :func:`confusion_matrix`.

    Returns:
        (K,) float64; NaN for classes that occur in no label and thus have no score.
    """
    matrix = matrix.double()
    hits = matrix.diagonal()
    labelled = matrix.sum(1)
    union = labelled + matrix.sum(0) - hits
    return torch.where(labelled > 0, hits / union.clamp(min=1), torch.nan)


def mean_iou(matrix: Tensor) -> float:
    """Return the mean of :func:`class_iou` over the classes in the labels; NaN without any."""
    return float(class_iou(matrix).nanmean())


def pixel_accuracy(matrix: Tensor) -> float:
    """Return the fraction of counted pixels that are classified correctly; NaN without pixels."""
    total = int(matrix.sum())
    return float(matrix.diagonal().sum()) / total if total else math.nan


def edges(label: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return a mask of the pixels on both sides of every class change.

    Args:
        label: (…, H, W) class indices.
        valid: (…, H, W) bool; a change counts only between two valid pixels.

    Returns:
        (…, H, W) bool.
    """
    found = torch.zeros_like(label, dtype=torch.bool)
    for axis in (-2, -1):
        length = label.shape[axis] - 1
        first, second = label.narrow(axis, 0, length), label.narrow(axis, 1, length)
        change = first != second
        if valid is not None:
            change = change & valid.narrow(axis, 0, length) & valid.narrow(axis, 1, length)
        found.narrow(axis, 0, length).logical_or_(change)
        found.narrow(axis, 1, length).logical_or_(change)
    return found


def within(mask: Tensor, distance: int) -> Tensor:
    """Dilate a mask (…, H, W) bool by ``distance`` rows and columns; the shape is unchanged."""
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    side = 2 * distance + 1
    flat = F.max_pool2d(flat, (side, 1), stride=1, padding=(distance, 0))
    flat = F.max_pool2d(flat, (1, side), stride=1, padding=(0, distance))
    return flat.view(mask.shape) > 0


def edge_distance(size: tuple[int, int]) -> int:
    """Return the tolerance of edges, pixels: 0.75 % of an image's diagonal, at least 1."""
    return max(1, round(0.0075 * math.hypot(*size)))


def boundary_counts(
    predicted: Tensor, label: Tensor, distance: int, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Count boundary pixels of one image for :func:`boundary_f`; counts of several images add up.

    A change to or from an ignored pixel is no edge. Edge pixels within ``distance`` of ignored
    pixels are not counted either, whether of the label or predicted, because the ignored pixels may
    hide the edge that matches them. Counted edge pixels may still be matched with such pixels.

    Args:
        predicted: (…, H, W) class indices.
        label: (H, W) class indices.
        distance: largest distance of two edges that match, pixels.
        ignore_index: label of ignored pixels.

    Returns:
        (…, 4) int64, numbers of pixels: predicted edge pixels within ``distance`` of a label edge,
        all predicted edge pixels, label edge pixels within ``distance`` of a predicted edge, and
        all label edge pixels; each without the pixels that are not counted.
    """
    valid = label != ignore_index
    true = edges(label, valid)
    guess = edges(predicted)
    near_true, near_guess = within(true, distance), within(guess, distance)
    clear = ~within(~valid, distance)
    true, guess = true & clear, guess & clear
    pairs = (guess & near_true, guess, true & near_guess, true.expand_as(guess))
    return torch.stack([pair.flatten(-2).sum(-1) for pair in pairs], dim=-1)


def boundary_f(counts: Tensor) -> float:
    """Compute the F-score of class boundaries, the harmonic mean of precision and recall.

    Args:
        counts: (4,), result of :func:`boundary_counts`, summed over images.

    Returns:
        A score in [0, 1]; NaN if no label has an edge.
    """
    near_guess, guess, near_true, true = (int(value) for value in counts)
    if true == 0:
        return math.nan
    precision = near_guess / guess if guess else 0.0
    recall = near_true / true
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def near_edges(label: Tensor, distance: int, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Set a label (H, W) to ``ignore_index`` except within ``distance`` pixels of its edges."""
    band = within(edges(label, label != ignore_index), distance)
    return torch.where(band, label, ignore_index)


def align_depth(predicted: Tensor, depth: Tensor) -> Tensor:
    """Scale and shift a prediction to fit a depth map best, by least squares.

    Args:
        predicted: (H, W), in any unit.
        depth: (H, W), NaN where unknown.

    Returns:
        (H, W) float64, the prediction in the unit of the depth.
    """
    known = torch.isfinite(depth)
    x, y = predicted.double(), depth.double()[known]
    centre, level = x[known].mean(), y.mean()
    spread = x[known] - centre
    variance = spread.square().mean()
    slope = (spread * (y - level)).mean() / variance if variance > 0 else variance
    return slope * (x - centre) + level


def depth_errors(predicted: Tensor, depth: Tensor) -> Tensor:
    """Sum the depth errors of one image; sums over several images add up.

    Args:
        predicted: (H, W), in the unit of the depth.
        depth: (H, W), NaN where unknown.

    Returns:
        (4,) float64: sum of squared errors, sum of absolute errors relative to the depth, number of
        pixels within a factor of 1.25 of the depth, and number of known pixels.
    """
    known = torch.isfinite(depth)
    x, y = predicted[known].double(), depth[known].double()
    tiny = torch.finfo(x.dtype).tiny
    ratio = torch.maximum(x / y, y / x.clamp(min=tiny))
    sums = ((x - y).square(), (x - y).abs() / y, (ratio < 1.25).double(), torch.ones_like(y))
    return torch.stack([value.sum() for value in sums])


def depth_scores(sums: Tensor) -> dict[str, Tensor]:
    """Compute RMSE, mean relative error and δ<1.25, (…), from sums of :func:`depth_errors`, (…, 4).

    NaN where no pixel is known.
    """
    squared, relative, close, count = sums.unbind(-1)
    return {
        "rmse": (squared / count).sqrt(),
        "abs_rel": relative / count,
        "delta_1.25": close / count,
    }
