"""Class activation maps: do upsampled features mark the pixels that a class rests on?

The map of the most probable class is the classifier's weight on each pixel's upsampled features,
after its head; negative values are cut and the rest scaled to [0, 1]. The image is multiplied by
the map, grey elsewhere, and classified again. A good map keeps the class probable (average drop) or
makes it more so (average increase). Source: Chattopadhay et al., Grad-CAM++, 2018.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backbones import Backbone, EfficientNetLite0
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.cost import measure
from upfeat.evaluation.datasets import Problem
from upfeat.evaluation.pictures import encode_heat
from upfeat.evaluation.prepared import OnStep, PreparedSet, digest, normalised
from upfeat.evaluation.results import Row
from upfeat.upsamplers import Upsampler

CAM_BACKBONE = "efficientnet_lite0.stride32"
"""The level that the embedded classifier reads."""

# Rows of pixels whose 1280 head channels are held at once.
_ROWS = 16


class ClassActivation:
    """Quality of activation maps on one set of images, for any number of upsamplers."""

    def __init__(
        self,
        test: PreparedSet,
        backbone: Backbone,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """Keep the data.

        Raises:
            ValueError: the backbone has no classifier that reads its features.
        """
        if not isinstance(backbone, EfficientNetLite0) or list(backbone.strides) != [32]:
            raise ValueError(
                f"backbone={backbone.name} has no classifier on its features; use {CAM_BACKBONE}"
            )
        self.test, self.backbone, self.config = test, backbone, config
        self.on_step: OnStep = on_step or (lambda label, done, total: None)
        self.problems: list[Problem] = []

    @torch.no_grad()
    def rows(self, label: str, upsampler: Upsampler) -> list[Row]:
        """Score one upsampler; nothing here is drawn at random.

        Args:
            label: its name in the table.
            upsampler: in eval mode.
        """
        drops, increases, pictures = [], [], {}
        chosen = set(self.config.choose_pictures(len(self.test)))
        for index, sample in enumerate(self.test):
            self.on_step(f"{label}: maps", index, len(self.test))
            image = normalised(sample.image, self.backbone)
            before, category = self.backbone.classify(image).softmax(1)[0].max(0)
            upsampled = upsampler(sample.features[None], image)
            heat = activation(self.backbone, upsampled, int(category))
            # A normalised image is grey at 0.
            after = self.backbone.classify(image * heat).softmax(1)[0, category]
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


def activation(backbone: EfficientNetLite0, features: Tensor, category: int) -> Tensor:
    """Where features speak for a class.

    Args:
        backbone: whose head and classifier are used.
        features: (1, 320, H, W), of stride 32, upsampled or not.
        category: index of the class.

    Returns:
        (H, W) in [0, 1]; all 0 where nothing speaks for it.
    """
    weight = backbone.classifier.weight[category][None, :, None, None]  # (1, 1280, 1, 1)
    parts = [F.conv2d(backbone.head(part), weight) for part in features.split(_ROWS, dim=2)]
    heat = torch.cat(parts, dim=2)[0, 0].clamp(min=0)
    return heat / heat.max().clamp(min=1e-12)
