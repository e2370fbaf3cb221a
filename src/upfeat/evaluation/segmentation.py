"""The segmentation probe: how well a linear map of upsampled features tells classes apart.

Beside the protocols ``own`` and ``transfer`` (see :mod:`upfeat.evaluation.probing`) there is
``probabilities``: the probe of ``transfer`` on the coarse grid, its softmax upsampled instead of
the features. Softmax is not linear, so this is a method of its own; logits would be the same as
``transfer``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.evaluation import metrics
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.cost import measure
from upfeat.evaluation.datasets import IGNORE_INDEX, Problem
from upfeat.evaluation.pictures import encode_indices
from upfeat.evaluation.prepared import OnStep, Prepared, PreparedSet, guidance_of
from upfeat.evaluation.probe import Head, Pixels, fit_classifier, head_map
from upfeat.evaluation.probing import Probing
from upfeat.evaluation.provenance import digest
from upfeat.evaluation.results import Row
from upfeat.upsamplers import Kernels, Upsampler


class Segmentation(Probing):
    """One dataset's probes and scores, for any number of upsamplers."""

    def __init__(
        self,
        parts: Mapping[str, PreparedSet],
        classes: Sequence[str],
        backbone: Backbone,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """Look through the labels.

        Raises:
            ValueError: no class is in both train and test, so nothing can be scored.
        """
        super().__init__(parts, backbone, config, on_step)
        self.classes = list(classes)
        self.unseen = self._check_classes()

    def usable(self, target: Tensor) -> Tensor:
        """See :meth:`Probing.usable`."""
        return target != IGNORE_INDEX

    def fit_head(self, pixels: Pixels, generator: torch.Generator) -> Head:
        """See :meth:`Probing.fit_head`."""
        return fit_classifier(pixels, len(self.classes), generator)

    def rows(self, label: str, upsampler: Upsampler) -> list[Row]:
        """See :meth:`Task.rows`; fits its probes first."""
        protocols = [p for p in self.config.protocols if upsampler.linear or p != "probabilities"]
        heads = self.heads(label, upsampler, protocols)
        scores = {name: _Scores(self.config.seeds, len(self.classes)) for name in heads}
        chosen = set(self.config.choose_pictures(len(self.test)))
        for index, sample in enumerate(self.test):
            self.on_step(f"{label}: test", index, len(self.test))
            target = self._scored_label(sample)
            for name, maps in self._predict(upsampler, sample, heads).items():
                scores[name].add(maps, target)
                if index in chosen:
                    scores[name].pictures[sample.name] = encode_indices(maps[0])
        self.on_step(f"{label}: test", len(self.test), len(self.test))
        cost, drift = measure(upsampler, self.test, self.backbone)
        weights = digest(upsampler)
        return [
            scores[name].row(label, name, weights, self.classes, cost, drift) for name in protocols
        ]

    def _predict(
        self, upsampler: Upsampler, sample: Prepared, heads: dict[str, list[Head]]
    ) -> dict[str, Tensor]:
        """Class maps (S, H, W) of every protocol, on the CPU; only K channels are upsampled."""
        features = sample.features[None]
        guidance = guidance_of(sample.image, self.backbone, upsampler)
        n_classes = len(self.classes)
        with torch.no_grad():
            grid = (features.shape[2], features.shape[3])
            kernels = upsampler.prepare(guidance, grid, sample.size, features)
            maps = {}
            for name, group in heads.items():
                stacked = Head.cat(group)
                if name == "probabilities":
                    out = upsample_probabilities(kernels, features, stacked, n_classes)
                else:
                    out = head_map(upsampler, kernels, features, stacked)
                maps[name] = out.view(len(group), n_classes, *sample.size).argmax(1).cpu()
        return maps

    def _scored_label(self, sample: Prepared) -> Tensor:
        """The label without classes that no training image shows: no probe could know them."""
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
    kernels: Kernels, features: Tensor, head: Head, n_classes: int
) -> Tensor:
    """Upsample the softmax of coarse logits.

    Args:
        kernels: of the image.
        features: (1, C, h, w).
        head: S heads of ``n_classes`` outputs each, stacked.
        n_classes: K.

    Returns:
        (1, S·K, H, W). The channel mix of a JBU stack belongs to features and is left out.
    """
    logits = F.conv2d(features, head.weight[:, :, None, None], head.bias)  # (1, S·K, h, w)
    grouped = logits.unflatten(1, (-1, n_classes))
    return kernels(grouped.softmax(2).flatten(1, 2))


class _Scores:
    """Counts of one protocol, summed over test images, one set per seed."""

    def __init__(self, seeds: int, n_classes: int) -> None:
        self.n_classes = n_classes
        self.matrix = torch.zeros(seeds, n_classes, n_classes, dtype=torch.int64)
        self.near = torch.zeros_like(self.matrix)
        self.boundary = torch.zeros(seeds, 4, dtype=torch.int64)
        self.pictures: dict[str, str] = {}

    def add(self, maps: Tensor, label: Tensor) -> None:
        """Count one image: (S, H, W) predictions, (H, W) label."""
        distance = metrics.edge_distance((label.shape[0], label.shape[1]))
        self.matrix += metrics.confusion_matrix(maps, label, self.n_classes)
        band = metrics.near_edges(label, distance)
        self.near += metrics.confusion_matrix(maps, band, self.n_classes)
        self.boundary += metrics.boundary_counts(maps, label, distance)

    def row(
        self,
        label: str,
        protocol: str,
        weights: str,
        classes: list[str],
        cost: dict[str, float | None],
        drift: float,
    ) -> Row:
        """Turn the counts into scores."""
        scores = {
            "miou": [metrics.mean_iou(matrix) for matrix in self.matrix],
            "accuracy": [metrics.pixel_accuracy(matrix) for matrix in self.matrix],
            "boundary_f": [metrics.boundary_f(counts) for counts in self.boundary],
            "boundary_miou": [metrics.mean_iou(matrix) for matrix in self.near],
            "drift": [drift],
        }
        iou = torch.stack([metrics.class_iou(matrix) for matrix in self.matrix])  # (S, K)
        per_class = {name: iou[:, index].tolist() for index, name in enumerate(classes)}
        return Row(label, protocol, weights, scores, per_class, cost, self.pictures)
