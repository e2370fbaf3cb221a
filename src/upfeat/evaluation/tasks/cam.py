"""Class activation maps from upsampled features, scored by masking the image with them.

The features are the input of the classifier's last layer, 1280 channels. The activation map of the
most probable class is the product of this layer's weight for the class and the upsampled features
of each pixel, with negative values set to 0, scaled to at most 1. Since the layer is linear, it is
applied first, and one channel is upsampled, not 1280, with the same result. The image is blended
with grey where the map is low, and classified again. With a good map, the class stays probable
(average drop) or becomes more probable (average increase).

Sources: Zhou et al., Learning Deep Features for Discriminative Localization, 2016, for the map;
Chattopadhay et al., Grad-CAM++, 2018, for the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.backbones.efficientnet_lite import EfficientNetLite
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.cost import measure
from upfeat.evaluation.data.folders import Dataset
from upfeat.evaluation.data.prepared import OnStep, PreparedSet, normalised
from upfeat.evaluation.methods import Method
from upfeat.evaluation.report.pictures import encode_heat
from upfeat.evaluation.results import Row
from upfeat.evaluation.task import DRIFT, Score, Task
from upfeat.feature_map import FeatureMap
from upfeat.probes import LinearProbe

CAM_BACKBONE = "efficientnet_lite0.stride32"
"""Level of the embedded backbone whose features are the input of its classifier's head."""


class Penultimate(Backbone):
    """Input of a classifier's last, linear layer, before it is averaged over cells."""

    def __init__(self, network: Backbone) -> None:
        """Append a network's head, without its last layer, to its features.

        Raises:
            ValueError: the network has no classifier for its features.
        """
        if not isinstance(network, EfficientNetLite) or list(network.strides) != [32]:
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

    def head_of(self, category: int) -> LinearProbe:
        """Return the last layer's weight for one class, (1, 1280), without its bias, as a probe."""
        weight = self.network.classifier.weight[category][None]
        return LinearProbe(weight, weight.new_zeros(1))


class ClassActivation(Task):
    """Quality of activation maps on one set of images; the task has no randomness."""

    title = "Class activation maps"
    question = "Do maps from upsampled features mark the pixels that determine the predicted class?"
    protocols: ClassVar = {
        "cam": "the image is masked by its class activation map, and classified again",
    }
    scores: ClassVar = {
        "average_drop": Score(
            "average drop",
            "mean relative drop of the class's probability when the map masks the image, %",
            higher_is_better=False,
            percent=True,
        ),
        "average_increase": Score(
            "average increase",
            "fraction of images whose class becomes more probable when the map masks the image, %",
            percent=True,
        ),
        "drift": DRIFT,
    }
    pictures_title = "Maps"
    default_backbone = CAM_BACKBONE

    @classmethod
    def adapt(cls, backbone: Backbone) -> Penultimate:
        """See :meth:`Task.adapt`."""
        return Penultimate(backbone)

    @classmethod
    def facts(cls, settings: Mapping[str, Any]) -> dict[str, str]:
        """See :meth:`Task.facts`."""
        return {"repetitions": "one, since the task has no randomness"}

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
        assert isinstance(backbone, Penultimate)
        self.classifier = backbone

    @torch.no_grad()
    def rows(self, label: str, method: Method) -> list[Row]:
        """See :meth:`Task.rows`."""
        drops, increases, pictures = [], [], {}
        chosen = set(self.choose_pictures())
        for index, sample in enumerate(self.test):
            self.on_step(f"{label}: maps", index, len(self.test))
            image, features = normalised(sample.image, self.backbone), sample.features[None]
            before, category = self._probabilities(features).max(0)
            heat = activation(method(sample), self.classifier.head_of(int(category)))
            # A normalised image is grey at 0.
            after = self._probabilities(self.backbone(image * heat))[category]
            drops.append(float(((before - after) / before).clamp(min=0)))
            increases.append(float(after > before))
            if index in chosen:
                pictures[sample.name] = encode_heat(sample.image, heat)
        self.on_step(f"{label}: maps", len(self.test), len(self.test))
        cost, drift = measure(method, self.test)
        scores = {
            "average_drop": [sum(drops) / len(drops)],
            "average_increase": [sum(increases) / len(increases)],
            "drift": [drift],
        }
        return [Row(label, "cam", method.weights, scores, {}, cost, pictures)]

    def _probabilities(self, features: Tensor) -> Tensor:
        """Classify features as the network does: (1, 1280, h, w) -> probabilities (1000,)."""
        return self.classifier.network.classifier(features.mean((2, 3)))[0].softmax(0)


def activation(upsampled: FeatureMap, head: LinearProbe) -> Tensor:
    """Compute the activation map of a class.

    Args:
        upsampled: (1, C, H, W), upsampled features.
        head: head with one output, the logit of the class.

    Returns:
        (H, W) in [0, 1]; all 0 if no pixel has a positive logit.
    """
    heat = upsampled.project(head.weight, head.bias)[0, 0].clamp(min=0)  # (H, W)
    return heat / heat.max().clamp(min=1e-12)


TASK = ClassActivation
