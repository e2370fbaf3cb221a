"""Semantic correspondence: points of one image found in another by nearest neighbours.

The upsampled features at a point of the source image, interpolated bilinearly between pixels, are
compared with those of every pixel of the target image by their cosine; the best pixel is the
prediction. Of equally good pixels, the one nearest to their mean position is taken, so that maps
that are constant over cells are not displaced to a corner of the cell. A prediction is correct if
its distance from the annotated point, in pixels of the target's file, is at most α times the longer
side of the target's object.

Source: Min et al., SPair-71k: A Large-scale Benchmark for Semantic Correspondence, 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.cost import measure
from upfeat.evaluation.data.folders import Dataset
from upfeat.evaluation.data.pairs import (
    PairedDataset,
    Point,
    limit_pairs,
    read_pairs,
)
from upfeat.evaluation.data.prepared import OnStep, PreparedSet
from upfeat.evaluation.differences import pack_sums
from upfeat.evaluation.methods import Method
from upfeat.evaluation.results import Row
from upfeat.evaluation.task import DRIFT, Score, Task
from upfeat.linear import unit_vectors
from upfeat.types import Size

ALPHAS = {"pck_0.1": 0.1, "pck_0.05": 0.05, "pck_0.01": 0.01}
"""Largest error of correct points, in longer sides of the target's object, by name of the score."""

_TIE = 1e-6
"""Cosines that differ by less, the rounding of float32, are equal."""

_AT_ONCE = 64
"""Points compared with all pixels at once, which bounds the memory."""


class Correspondence(Task):
    """Points found in other images, for any number of methods; the task has no randomness."""

    title = "Semantic correspondence"
    question = (
        "How precisely do nearest neighbours of upsampled features find a point of an object in "
        "another image?"
    )
    protocols: ClassVar = {
        "per_image": "the fraction of correct points of each pair, averaged over pairs",
        "per_point": "the fraction of correct points among the points of all pairs",
    }
    scores: ClassVar = {
        **{
            name: Score(
                f"PCK@{alpha:.2f}",
                f"fraction of points found within {alpha:g} times the longer side of the target's "
                "object, %",
                percent=True,
            )
            for name, alpha in ALPHAS.items()
        },
        "drift": DRIFT,
    }
    compared = ("pck_0.1", "pck_0.01")
    pictures = None
    per_class_title = ("category", "PCK@0.10 of each category, %")

    @classmethod
    def read(cls, folder: Path, layout: str, config: EvalConfig) -> Dataset:
        """See :meth:`Task.read`."""
        return read_pairs(folder, layout=layout)

    @classmethod
    def limit(cls, dataset: Dataset, config: EvalConfig) -> None:
        """See :meth:`Task.limit`; the limit is one of pairs."""
        assert isinstance(dataset, PairedDataset)
        limit_pairs(dataset, config.max_test, config.split_seed)

    @classmethod
    def facts(cls, settings: Mapping[str, Any]) -> dict[str, str]:
        """See :meth:`Task.facts`."""
        return {"repetitions": "one, since the task has no randomness"}

    @classmethod
    def scores_of(cls, sums: Tensor) -> dict[str, Tensor]:
        """See :meth:`Task.scores_of`; sums are correct points for each α, and their largest sum."""
        ratios = sums[..., :-1] / sums[..., -1:]
        return dict(zip(ALPHAS, ratios.unbind(-1), strict=True))

    def __init__(
        self,
        parts: Mapping[str, PreparedSet],
        dataset: Dataset,
        backbone: Backbone,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """See :meth:`Task.__init__`; leaves out pairs of images that could not be prepared.

        Raises:
            ValueError: no pair remains.
        """
        super().__init__(parts, dataset, backbone, config, on_step)
        assert isinstance(dataset, PairedDataset)
        dataset.keep_usable(self.test.names)
        if not dataset.pairs:
            raise ValueError(f"{dataset.name}: no usable pair remains ({dataset.problems[-1]})")
        self.pairs, self.sizes = dataset.pairs, dataset.sizes
        self.places = {name: index for index, name in enumerate(self.test.names)}

    @torch.no_grad()
    def rows(self, label: str, method: Method) -> list[Row]:
        """See :meth:`Task.rows`; one target is upsampled at a time, for all of its pairs."""
        described = self._describe(label, method)
        points = torch.zeros(len(self.pairs), len(ALPHAS) + 1, dtype=torch.float64)
        groups = _grouped([pair.target for pair in self.pairs])
        for done, (target, places) in enumerate(groups.items()):
            self.on_step(f"{label}: targets", done, len(groups))
            sample = self.test[self.places[target]]
            upsampled = unit_vectors(method(sample).full()[0], 0)
            for place in places:
                pair = self.pairs[place]
                queries = torch.stack([described[pair.source][one] for one in pair.source_points])
                found = to_file(find_pixels(upsampled, queries), self.sizes[target], sample.size)
                errors = (found - _tensor(pair.target_points)).norm(dim=1)
                points[place] = _count(errors, pair.side)
            del upsampled
        self.on_step(f"{label}: targets", len(groups), len(groups))
        cost, drift = measure(method, self.test)
        sums = {"per_image": points / points[:, -1:], "per_point": points}
        return [
            self._row(label, protocol, method.weights, sums[protocol], cost, drift)
            for protocol in self.protocols
        ]

    def _describe(self, label: str, method: Method) -> dict[str, dict[Point, Tensor]]:
        """Return the features (C,) of every point of every source, by its name and the point."""
        groups = _grouped([pair.source for pair in self.pairs])
        described = {}
        for done, (source, places) in enumerate(groups.items()):
            self.on_step(f"{label}: sources", done, len(groups))
            sample = self.test[self.places[source]]
            listed = (point for place in places for point in self.pairs[place].source_points)
            points = list(dict.fromkeys(listed))
            there = to_map(_tensor(points), self.sizes[source], sample.size)
            features = method(sample).at(there.to(sample.features.device))
            described[source] = dict(zip(points, features, strict=True))
        self.on_step(f"{label}: sources", len(groups), len(groups))
        return described

    def _images(self) -> list[list[int]] | None:
        """Return the images of each pair, for the bootstrap; ``None`` if pairs share none."""
        images = [[self.places[one] for one in (pair.source, pair.target)] for pair in self.pairs]
        every = [image for pair in images for image in set(pair)]
        return images if len(set(every)) < len(every) else None

    def _row(
        self,
        label: str,
        protocol: str,
        weights: str,
        sums: Tensor,
        cost: dict[str, float | None],
        drift: float,
    ) -> Row:
        """Make a row from the sums (pairs, alphas + 1), see :meth:`scores_of`."""
        scores = {name: [float(one)] for name, one in self.scores_of(sums.sum(0)).items()}
        categories = sorted({pair.category for pair in self.pairs} - {""})
        per_class = {}
        for category in categories:
            chosen = torch.tensor([pair.category == category for pair in self.pairs])
            per_class[category] = [float(self.scores_of(sums[chosen].sum(0))["pck_0.1"])]
        packed = pack_sums(sums[:, None], self._images())
        return Row(
            label, protocol, weights, {**scores, "drift": [drift]}, per_class, cost, sums=packed
        )


def find_pixels(directions: Tensor, queries: Tensor) -> Tensor:
    """Find the pixel with the largest cosine for each query.

    Args:
        directions: (C, H, W), features of unit length.
        queries: (N, C), features of any length.

    Returns:
        (N, 2) float64 on the CPU, (x, y) of pixels. Of equally good pixels, the one nearest to
        their mean position.
    """
    width = directions.shape[2]
    found = []
    for part in unit_vectors(queries).split(_AT_ONCE):
        cosines = part @ directions.flatten(1)  # (n, H·W)
        best = cosines.amax(1, keepdim=True)
        for mask in cosines >= best - _TIE:
            places = mask.nonzero()[:, 0].cpu()
            points = torch.stack([places % width, places // width], 1).double()
            distances = (points - points.mean(0)).square().sum(1)
            found.append(points[distances.argmin()])
    return torch.stack(found)


def to_map(points: Tensor, own: Size, size: Size) -> Tensor:
    """Scale points (x, y) of a file to the prepared image.

    Args:
        points: (N, 2), (x, y) in pixels of the file; whole numbers are pixel centres.
        own: (height, width) of the file.
        size: (height, width) of the prepared image.

    Returns:
        (N, 2), (y, x) in pixels of the prepared image, moved to the nearest pixel centre if outside
        of all pixel centres.
    """
    scale = points.new_tensor([size[1] / own[1], size[0] / own[0]])
    last = points.new_tensor([size[1] - 1, size[0] - 1])
    return ((points + 0.5) * scale - 0.5).clamp(min=0).minimum(last).flip(1)


def to_file(points: Tensor, own: Size, size: Size) -> Tensor:
    """Scale points (N, 2), (x, y) in pixels of the prepared image, to pixels of the file."""
    scale = points.new_tensor([own[1] / size[1], own[0] / size[0]])
    return (points + 0.5) * scale - 0.5


def _tensor(points: Sequence[Point]) -> Tensor:
    return torch.tensor(points, dtype=torch.float64)


def _count(errors: Tensor, side: float) -> Tensor:
    """Count points with an error (N,) of at most α·side for each α, then all points."""
    limits = errors.new_tensor([alpha * side for alpha in ALPHAS.values()])
    correct = (errors[:, None] <= limits).sum(0).double()
    return torch.cat([correct, correct.new_tensor([len(errors)])])


def _grouped(keys: Sequence[str]) -> dict[str, list[int]]:
    """Return the indices at which each key stands, by key."""
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return groups


TASK = Correspondence
