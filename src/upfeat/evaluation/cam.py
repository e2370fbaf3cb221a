"""Class activation maps: do upsampled features mark the pixels that a class rests on?

The features are those that the classifier's last layer reads, the 1280 channels after its head. The
map of the most probable class is that layer's weight on each pixel's upsampled features; negative
values are cut and the rest scaled to [0, 1]. The layer is linear, so one channel is upsampled, not
1280, and the map is the same. The image is multiplied by the map, grey elsewhere, and classified
again. A good map keeps the class probable (average drop) or makes it more so (average increase).

Sources: Zhou et al., Learning Deep Features for Discriminative Localization, 2016, for the map;
Chattopadhay et al., Grad-CAM++, 2018, for the scores.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from upfeat.backbones import Backbone, EfficientNetLite0
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.cost import measure
from upfeat.evaluation.pictures import encode_heat
from upfeat.evaluation.prepared import OnStep, PreparedSet, normalised
from upfeat.evaluation.probe import Head, head_map
from upfeat.evaluation.provenance import digest
from upfeat.evaluation.results import Row
from upfeat.evaluation.task import Task
from upfeat.upsamplers import Upsampler

CAM_BACKBONE = "efficientnet_lite0.stride32"
"""The level that the embedded classifier's head reads."""


class Penultimate(Backbone):
    """The features that a classifier's last, linear layer reads, before they are averaged."""

    def __init__(self, network: Backbone) -> None:
        """Put a network's head behind its features.

        Raises:
            ValueError: the network has no classifier that reads its features.
        """
        if not isinstance(network, EfficientNetLite0) or list(network.strides) != [32]:
            raise ValueError(
                f"backbone={network.name} has no classifier on its features; use {CAM_BACKBONE}"
            )
        super().__init__(
            name=f"{network.name}.head",
            embed_dim=network.classifier.in_features,
            stride=network.stride,
            mean=network.mean.flatten().tolist(),
            std=network.std.flatten().tolist(),
        )
        self.network = network

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        return self.network.head(self.network.extract(x))

    def head_of(self, category: int) -> Head:
        """The last layer's weight for one class, (1, 1280), without its bias."""
        weight = self.network.classifier.weight[category][None]
        return Head(weight, weight.new_zeros(1))


class ClassActivation(Task):
    """Quality of activation maps on one set of images; nothing in it is drawn at random."""

    def __init__(
        self,
        parts: Mapping[str, PreparedSet],
        backbone: Penultimate,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """See :meth:`Task.__init__`."""
        super().__init__(parts, backbone, config, on_step)
        self.classifier = backbone

    @torch.no_grad()
    def rows(self, label: str, upsampler: Upsampler) -> list[Row]:
        """See :meth:`Task.rows`."""
        drops, increases, pictures = [], [], {}
        chosen = set(self.config.choose_pictures(len(self.test)))
        for index, sample in enumerate(self.test):
            self.on_step(f"{label}: maps", index, len(self.test))
            image, features = normalised(sample.image, self.backbone), sample.features[None]
            before, category = self._probabilities(features).max(0)
            head = self.classifier.head_of(int(category))
            guidance = upsampler.guidance_from(image, self.backbone)
            heat = activation(upsampler, features, guidance, head)
            # A normalised image is grey at 0.
            after = self._probabilities(self.backbone(image * heat))[category]
            drops.append(float(((before - after) / before).clamp(min=0)))
            increases.append(float(after > before))
            if index in chosen:
                pictures[sample.name] = encode_heat(sample.image, heat)
        self.on_step(f"{label}: maps", len(self.test), len(self.test))
        cost, drift = measure(upsampler, self.test, self.backbone)
        scores = {
            "average_drop": [sum(drops) / len(drops)],
            "average_increase": [sum(increases) / len(increases)],
            "drift": [drift],
        }
        return [Row(label, "cam", digest(upsampler), scores, {}, cost, pictures)]

    def _probabilities(self, features: Tensor) -> Tensor:
        """(1, 1280, h, w) -> (1000,), as the network itself classifies."""
        return self.classifier.network.classifier(features.mean((2, 3)))[0].softmax(0)


def activation(upsampler: Upsampler, features: Tensor, guidance: Tensor, head: Head) -> Tensor:
    """Where features speak for a class.

    Args:
        upsampler: in eval mode.
        features: (1, C, h, w).
        guidance: (1, 3, H, W) the image, in the upsampler's normalisation.
        head: one output, the class's weight.

    Returns:
        (H, W) in [0, 1]; all 0 where nothing speaks for it.
    """
    size = (guidance.shape[2], guidance.shape[3])
    grid = (features.shape[2], features.shape[3])
    kernels = upsampler.prepare(guidance, grid, size, features)
    heat = head_map(upsampler, kernels, features, head)[0, 0].clamp(min=0)  # (H, W)
    return heat / heat.max().clamp(min=1e-12)
