"""Probing tasks: linear heads fitted on randomly drawn pixels of each method's features.

Protocols:

* ``own``: the probe is trained on the upsampled features of the training images.
* ``transfer``: the probe is trained on coarse features, those of the cell that contains a pixel,
  and applied to upsampled features. It measures the gain of an existing model without retraining.

All upsamplers are probed on the same pixels, since the draw depends on seed and image name alone.
With ``probe="adamw"``, probes are trained on all pixels instead
(:mod:`upfeat.evaluation.trained_probe`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.data.folders import Dataset
from upfeat.evaluation.data.prepared import OnStep, Prepared, PreparedSet, named_generator
from upfeat.evaluation.methods import Method, UpsamplerMethod
from upfeat.evaluation.task import Task
from upfeat.evaluation.trained_probe import EPOCHS
from upfeat.feature_map import FeatureMap
from upfeat.probes import LinearProbe, Pixels, draw_pixels, read_cells, read_pixels
from upfeat.upsamplers import create_upsampler

PROTOCOLS = {
    "own": "the probe is trained on the upsampled features of the training images",
    "transfer": "the probe is trained on the coarse features and applied to the upsampled features",
}


class Probing(Task):
    """Base of tasks that fit probes on one dataset; subclasses define heads and scores."""

    def __init__(
        self,
        parts: Mapping[str, PreparedSet],
        dataset: Dataset,
        backbone: Backbone,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """See :meth:`Task.__init__`."""
        super().__init__(parts, dataset, backbone, config, on_step)
        self._transfer_heads: list[LinearProbe] | None = None

    protocols = PROTOCOLS

    @classmethod
    def facts(cls, settings: Mapping[str, Any]) -> dict[str, str]:
        """See :meth:`Task.facts`."""
        if settings.get("probe") == "adamw":
            return {"probes": f"1×1 convolution, AdamW, {EPOCHS} epochs, all pixels"}
        return {"probes": f"{settings['pixels']} pixels of each training image"}

    def target_of(self, sample: Prepared) -> Tensor:
        """Return what a probe predicts of a sample, (H, W) or (H, W, D); by default its label."""
        return sample.label

    @abstractmethod
    def usable(self, target: Tensor) -> Tensor:
        """Return a mask (H, W) of the pixels on which a probe may be trained.

        Args:
            target: result of :meth:`target_of`.
        """

    @abstractmethod
    def fit_head(self, pixels: Pixels, generator: torch.Generator) -> LinearProbe:
        """Train one probe.

        Args:
            pixels: features and targets of pixels of the training images.
            generator: random generator of the split on which the penalty is chosen.
        """

    @property
    def seeds(self) -> range:
        """Seeds of the repetitions."""
        return range(self.config.seeds)

    def heads(
        self, label: str, method: Method, protocols: Sequence[str]
    ) -> dict[str, list[LinearProbe]]:
        """Fit the probes of each protocol, one per seed.

        All protocols but ``own`` share the probes on coarse features.
        """
        return {
            name: self._on_upsampled(label, method) if name == "own" else self._on_coarse()
            for name in protocols
        }

    def _on_upsampled(self, label: str, method: Method) -> list[LinearProbe]:
        if self.config.probe == "adamw":
            return self._train(f"{label}: epoch", method)
        return self._fit_upsampled(label, method)

    def _on_coarse(self) -> list[LinearProbe]:
        if self._transfer_heads is None:
            self._transfer_heads = (
                self._train("coarse features: epoch", self._nearest())
                if self.config.probe == "adamw"
                else self._fit_coarse()
            )
        return self._transfer_heads

    def _nearest(self) -> UpsamplerMethod:
        """The method that gives each pixel the coarse features of the cell that contains it."""
        return UpsamplerMethod(create_upsampler("nearest"), self.backbone)

    def train_head(
        self,
        read: Callable[[Prepared], FeatureMap],
        generator: torch.Generator,
        on_epoch: Callable[[int], None],
    ) -> LinearProbe:
        """Train one probe on all pixels of the training images, for ``probe="adamw"``.

        Args:
            read: function that returns the features of an image.
            generator: source of the initial weights and of the order of the images.
            on_epoch: called with the number of finished epochs.
        """
        raise NotImplementedError(f"{self.name()} has no probe of this kind")

    def _train(self, label: str, read: Callable[[Prepared], FeatureMap]) -> list[LinearProbe]:
        """Train a probe per seed on all pixels."""
        heads, total = [], len(self.seeds) * EPOCHS
        for seed in self.seeds:
            done = seed * EPOCHS
            heads.append(
                self.train_head(
                    read,
                    torch.Generator().manual_seed(seed),
                    lambda epoch, done=done: self.on_step(label, done + epoch, total),
                )
            )
        return heads

    def _fit_upsampled(self, label: str, method: Method) -> list[LinearProbe]:
        """Fit a probe per seed on upsampled features; an image is upsampled once for all seeds."""
        drawn: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.seeds]
        for index, sample in enumerate(self.train):
            self.on_step(f"{label}: train", index, len(self.train))
            with torch.no_grad():
                upsampled = method(sample).full()[0]
            target = self.target_of(sample)
            for seed in self.seeds:
                places = self._places(sample, target, seed)
                read = read_pixels(upsampled, places), target.flatten(0, 1)[places]
                drawn[seed].append(read)
        return self._fit_each(f"{label}: probe", drawn)

    def _fit_coarse(self) -> list[LinearProbe]:
        """Fit a probe per seed on the cells that contain the drawn pixels, for all upsamplers."""
        drawn: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.seeds]
        for sample in self.train:
            target = self.target_of(sample)
            for seed in self.seeds:
                places = self._places(sample, target, seed)
                cells = read_cells(sample.features, places, sample.size)
                drawn[seed].append((cells, target.flatten(0, 1)[places]))
        return self._fit_each("probe on coarse features", drawn)

    def _fit_each(self, label: str, drawn: list[list[tuple[Tensor, Tensor]]]) -> list[LinearProbe]:
        heads = []
        for seed, read in enumerate(drawn):
            self.on_step(label, seed, len(drawn))
            features, targets = zip(*read, strict=True)
            pixels = Pixels(torch.stack(features), torch.stack(targets))
            heads.append(self.fit_head(pixels, torch.Generator().manual_seed(seed)))
        self.on_step(label, len(drawn), len(drawn))
        return heads

    def _places(self, sample: Prepared, target: Tensor, seed: int) -> Tensor:
        generator = named_generator(seed, sample.name)
        return draw_pixels(self.usable(target), self.config.pixels, generator)
