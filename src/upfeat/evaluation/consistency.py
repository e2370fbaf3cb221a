"""Multi-view consistency: do features upsampled once explain views that were not seen?

The objective that upsamplers are trained for (FeatUp, section 3.1), on held-out images and jitters:
upsampled features are warped as the image is, brought back to the backbone's grid, and compared
with what the backbone makes of the jittered image. The way back is the mean over each cell, the
same for every upsampler, so that none profits from a downsampler of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.downsamplers import SimpleDownsampler
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.cost import measure
from upfeat.evaluation.datasets import Problem
from upfeat.evaluation.prepared import OnStep, PreparedSet, digest, normalised
from upfeat.evaluation.probing import named_generator
from upfeat.evaluation.results import Row
from upfeat.upsamplers import Upsampler
from upfeat.views import Jitter, apply_jitter, sample_jitters


class Consistency:
    """View errors on one set of images, for any number of upsamplers."""

    def __init__(
        self,
        test: PreparedSet,
        backbone: Backbone,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """Keep the data."""
        self.test, self.backbone, self.config = test, backbone, config
        self.on_step: OnStep = on_step or (lambda label, done, total: None)
        self.problems: list[Problem] = []
        self._down = SimpleDownsampler(backbone.stride)

    @torch.no_grad()
    def rows(self, label: str, upsampler: Upsampler) -> list[Row]:
        """Score one upsampler; a seed draws the jitters, the same for all upsamplers.

        Args:
            label: its name in the table.
            upsampler: in eval mode.
        """
        sums = torch.zeros(self.config.seeds, 3, dtype=torch.float64)
        for index, sample in enumerate(self.test):
            self.on_step(f"{label}: views", index, len(self.test))
            image, features = normalised(sample.image, self.backbone), sample.features[None]
            upsampled = upsampler(features, image)
            centre = features.mean((2, 3), keepdim=True)
            for seed in range(self.config.seeds):
                generator = named_generator(seed, sample.name)
                views = sample_jitters(self.config.views, size=sample.size, generator=generator)
                for jitter in views:
                    sums[seed] += self._compare(image, upsampled, centre, jitter)
        self.on_step(f"{label}: views", len(self.test), len(self.test))
        cost, drift = measure(upsampler, self.test, self.backbone)
        scores = {
            "error": (sums[:, 0] / sums[:, 1].clamp(min=1e-30)).tolist(),
            "cosine": (sums[:, 2] / (len(self.test) * self.config.views)).tolist(),
            "drift": [drift],
        }
        return [Row(label, "views", digest(upsampler), scores, {}, cost)]

    def _compare(self, image: Tensor, upsampled: Tensor, centre: Tensor, jitter: Jitter) -> Tensor:
        """Squared error, variance of the backbone's features, and cosine, of one view: (3,)."""
        seen = self.backbone(apply_jitter(image, jitter))
        guess = self._down(apply_jitter(upsampled, jitter), (seen.shape[2], seen.shape[3]))
        return torch.stack(
            [
                (guess - seen).square().mean(),
                (seen - seen.mean((2, 3), keepdim=True)).square().mean(),
                F.cosine_similarity(guess - centre, seen - centre, dim=1).mean(),
            ]
        )
