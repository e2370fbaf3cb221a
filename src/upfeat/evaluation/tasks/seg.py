"""Segmentation by a linear probe on upsampled features.

Besides ``own`` and ``transfer`` (see :mod:`upfeat.evaluation.probing`) there is the protocol
``probabilities``: the probe of ``transfer`` is applied on the coarse grid, and its softmax is
upsampled instead of the features. The result differs from ``transfer`` because softmax is not
linear; upsampled logits would equal ``transfer``, if the bias is added after upsampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.evaluation import metrics
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.cost import measure
from upfeat.evaluation.data.folders import Dataset, Problem
from upfeat.evaluation.data.layouts import read_dataset
from upfeat.evaluation.data.prepared import OnStep, Prepared, PreparedSet
from upfeat.evaluation.data.targets import IGNORE_INDEX
from upfeat.evaluation.differences import pack_sums
from upfeat.evaluation.methods import Method, UpsamplerMethod
from upfeat.evaluation.probing import PROTOCOLS, Probing
from upfeat.evaluation.report.pictures import encode_indices
from upfeat.evaluation.results import Row
from upfeat.evaluation.task import DRIFT, Score
from upfeat.evaluation.trained_probe import Labelled, train_classifier
from upfeat.feature_map import FeatureMap
from upfeat.features import UpsampledFeatures
from upfeat.probes import LinearProbe, Pixels, fit_classifier
from upfeat.upsamplers import Kernels


class Segmentation(Probing):
    """One dataset's probes and scores, for any number of methods."""

    title = "Segmentation probes"
    question = "How well does a linear map of upsampled features classify every pixel?"
    protocols: ClassVar = {
        **PROTOCOLS,
        "probabilities": "the probe is trained on the coarse features, and its softmax on the "
        "coarse grid is upsampled instead of the features",
    }
    scores: ClassVar = {
        "miou": Score(
            "mIoU",
            "intersection over union, averaged over the classes in the test labels, %",
            percent=True,
        ),
        "accuracy": Score(
            "accuracy", "fraction of labelled pixels that are classified correctly, %", percent=True
        ),
        "boundary_f": Score(
            "boundary F",
            "harmonic mean of precision and recall of class boundaries, matched within 0.75 % of "
            "the image's diagonal, %",
            percent=True,
        ),
        "boundary_miou": Score(
            "mIoU at edges",
            "mIoU of the pixels at most 0.75 % of the image's diagonal from a label edge, %",
            percent=True,
        ),
        "drift": DRIFT,
    }
    compared = ("miou", "boundary_f")
    target = "label"
    pictures = "classes"

    @classmethod
    def read(cls, folder: Path, layout: str, config: EvalConfig) -> Dataset:
        """See :meth:`Task.read`."""
        return read_dataset(folder, "seg", layout=layout, split_seed=config.split_seed)

    def draw_target(self, sample: Prepared) -> str:
        """See :meth:`Task.draw_target`."""
        return encode_indices(sample.label)

    @classmethod
    def scores_of(cls, sums: Tensor) -> dict[str, Tensor]:
        """See :meth:`Task.scores_of`; sums are the counts that :meth:`_Scores.add` stores."""
        hits, labelled, predicted = sums[..., :-4].unflatten(-1, (3, -1)).unbind(-2)
        iou = hits / (labelled + predicted - hits).clamp(min=1)
        iou = torch.where(labelled > 0, iou, torch.nan)
        near_guess, guess, near_true, true = sums[..., -4:].unbind(-1)
        precision, recall = near_guess / guess.clamp(min=1), near_true / true
        boundary_f = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return {"miou": iou.nanmean(-1), "boundary_f": boundary_f}

    def __init__(
        self,
        parts: Mapping[str, PreparedSet],
        dataset: Dataset,
        backbone: Backbone,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """Check the labels of all images for classes that cannot be scored.

        Raises:
            ValueError: no class is in both train and test, so nothing can be scored.
        """
        super().__init__(parts, dataset, backbone, config, on_step)
        self.classes = list(dataset.classes)
        self.unseen = self._check_classes()

    def usable(self, target: Tensor) -> Tensor:
        """See :meth:`Probing.usable`."""
        return target != IGNORE_INDEX

    def fit_head(self, pixels: Pixels, generator: torch.Generator) -> LinearProbe:
        """See :meth:`Probing.fit_head`."""
        return fit_classifier(pixels, len(self.classes), generator)

    def train_head(
        self,
        read: Callable[[Prepared], FeatureMap],
        generator: torch.Generator,
        on_epoch: Callable[[int], None],
    ) -> LinearProbe:
        """See :meth:`Probing.train_head`."""

        def labelled(index: int) -> Labelled:
            sample = self.train[index]
            return Labelled(read(sample), sample.label)

        sizes = len(self.train), self.backbone.embed_dim, len(self.classes)
        return train_classifier(labelled, *sizes, generator, on_epoch)

    def rows(self, label: str, method: Method) -> list[Row]:
        """See :meth:`Task.rows`; the probes are fitted first."""
        linear = isinstance(method, UpsamplerMethod) and method.upsampler.linear
        protocols = [p for p in self.config.protocols if p != "probabilities" or linear]
        heads = self.heads(label, method, protocols)
        scores = {name: _Scores(self.config.seeds, len(self.classes)) for name in heads}
        chosen = set(self.choose_pictures())
        for index, sample in enumerate(self.test):
            self.on_step(f"{label}: test", index, len(self.test))
            target = self._scored_label(sample)
            for name, maps in self._predict(method, sample, heads).items():
                scores[name].add(maps, target)
                if index in chosen:
                    scores[name].pictures[sample.name] = encode_indices(maps[0])
        self.on_step(f"{label}: test", len(self.test), len(self.test))
        cost, drift = measure(method, self.test)
        return [
            scores[name].row(label, name, method.weights, self.classes, cost, drift)
            for name in protocols
        ]

    def _predict(
        self, method: Method, sample: Prepared, heads: dict[str, list[LinearProbe]]
    ) -> dict[str, Tensor]:
        """Predict class maps (S, H, W) of S seeds for every protocol, on the CPU.

        Heads are applied before upsampling, so K channels per seed are upsampled.
        """
        n_classes = len(self.classes)
        with torch.no_grad():
            upsampled, maps = method(sample), {}
            for name, group in heads.items():
                stacked = LinearProbe.cat(group)
                if name == "probabilities":
                    assert isinstance(upsampled, UpsampledFeatures)
                    coarse = sample.features[None]
                    out = upsample_probabilities(upsampled.kernels, coarse, stacked, n_classes)
                else:
                    out = upsampled.project(stacked.weight, stacked.bias)
                maps[name] = out.view(len(group), n_classes, *sample.size).argmax(1).cpu()
        return maps

    def _scored_label(self, sample: Prepared) -> Tensor:
        """Return the label, with classes that occur in no training image ignored."""
        unseen = torch.zeros(256, dtype=torch.bool)
        unseen[self.unseen] = True
        label = sample.label.cpu()
        return torch.where(unseen[label.long()], IGNORE_INDEX, label)

    def _check_classes(self) -> list[int]:
        counts = {}
        for name, images in (("train", self.train), ("test", self.test)):
            total = torch.zeros(256, dtype=torch.int64)
            for sample in images:
                total += torch.bincount(sample.label.cpu().flatten().long(), minlength=256)
            counts[name] = total[: len(self.classes)] > 0
        unseen = []
        for index, name in enumerate(self.classes):
            in_train, in_test = bool(counts["train"][index]), bool(counts["test"][index])
            if in_test and not in_train:
                unseen.append(index)
                reason = "is in test but not in train: its pixels are not scored"
            elif not in_test:
                where = "test" if in_train else "train and test"
                reason = f"is absent from {where}: it has no score and no part in the mean"
            else:
                continue
            self.problems.append(Problem(f"class {name}", reason))
        if not bool((counts["train"] & counts["test"]).any()):
            raise ValueError("no class is both in train and in test: nothing can be scored")
        return unseen


def upsample_probabilities(
    kernels: Kernels, features: Tensor, head: LinearProbe, n_classes: int
) -> Tensor:
    """Upsample the softmax of coarse logits.

    Args:
        kernels: kernels of the image.
        features: (1, C, h, w), coarse features of the image.
        head: S heads of ``n_classes`` outputs each, stacked.
        n_classes: number K of classes.

    Returns:
        (1, S·K, H, W). The channel mix of a JBU stack applies to features, and is omitted here.
    """
    logits = F.conv2d(features, head.weight[:, :, None, None], head.bias)  # (1, S·K, h, w)
    grouped = logits.unflatten(1, (-1, n_classes))
    return kernels(grouped.softmax(2).flatten(1, 2))


class _Scores:
    """Counts of one protocol for each seed, summed over test images."""

    def __init__(self, seeds: int, n_classes: int) -> None:
        self.n_classes = n_classes
        self.matrix = torch.zeros(seeds, n_classes, n_classes, dtype=torch.int64)
        self.near = torch.zeros_like(self.matrix)
        self.boundary = torch.zeros(seeds, 4, dtype=torch.int64)
        self.pictures: dict[str, str] = {}
        self.sums: list[Tensor] = []

    def add(self, maps: Tensor, label: Tensor) -> None:
        """Add the counts of one image, given predictions (S, H, W) and the label (H, W).

        The image's counts are also stored separately, (S, 3·K + 4): correct, labelled and predicted
        pixels of each class, then the counts of boundaries.
        """
        distance = metrics.edge_distance((label.shape[0], label.shape[1]))
        matrix = metrics.confusion_matrix(maps, label, self.n_classes)
        self.matrix += matrix
        band = metrics.near_edges(label, distance)
        self.near += metrics.confusion_matrix(maps, band, self.n_classes)
        boundary = metrics.boundary_counts(maps, label, distance)
        self.boundary += boundary
        classes = (matrix.diagonal(dim1=1, dim2=2), matrix.sum(2), matrix.sum(1))
        self.sums.append(torch.cat([*classes, boundary], dim=1))

    def row(
        self,
        label: str,
        protocol: str,
        weights: str,
        classes: list[str],
        cost: dict[str, float | None],
        drift: float,
    ) -> Row:
        """Turn the counts into a row of scores."""
        scores = {
            "miou": [metrics.mean_iou(matrix) for matrix in self.matrix],
            "accuracy": [metrics.pixel_accuracy(matrix) for matrix in self.matrix],
            "boundary_f": [metrics.boundary_f(counts) for counts in self.boundary],
            "boundary_miou": [metrics.mean_iou(matrix) for matrix in self.near],
            "drift": [drift],
        }
        iou = torch.stack([metrics.class_iou(matrix) for matrix in self.matrix])  # (S, K)
        per_class = {name: iou[:, index].tolist() for index, name in enumerate(classes)}
        sums = pack_sums(torch.stack(self.sums))
        return Row(label, protocol, weights, scores, per_class, cost, self.pictures, sums)


TASK = Segmentation
