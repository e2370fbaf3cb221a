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
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.cost import measure
from upfeat.evaluation.datasets import Problem
from upfeat.evaluation.prepared import OnStep, PreparedSet, digest, normalised
from upfeat.evaluation.probing import named_generator
from upfeat.evaluation.results import Row
from upfeat.upsamplers import Upsampler
from upfeat.views import Jitter, apply_jitter, sample_jitters, warp


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
                sums[seed] += self._compare(image, upsampled, centre, views)
        self.on_step(f"{label}: views", len(self.test), len(self.test))
        cost, drift = measure(upsampler, self.test, self.backbone)
        scores = {
            "error": (sums[:, 0] / sums[:, 1].clamp(min=1e-30)).tolist(),
            "cosine": (sums[:, 2] / (len(self.test) * self.config.views)).tolist(),
            "drift": [drift],
        }
        return [Row(label, "views", digest(upsampler), scores, {}, cost)]

    def _compare(self, image: Tensor, upsampled: Tensor, centre: Tensor, views: Jitter) -> Tensor:
        """Sums over views of squared error, variance of the backbone's features, cosine: (3,)."""
        seen = self.backbone(apply_jitter(image, views))
        guess = warp_to_grid(upsampled, views, (seen.shape[2], seen.shape[3]))
        parts = (
            (guess - seen).square().mean((1, 2, 3)),
            (seen - seen.mean((2, 3), keepdim=True)).square().mean((1, 2, 3)),
            F.cosine_similarity(guess - centre, seen - centre, dim=1).mean((1, 2)),
        )
        return torch.stack([part.sum() for part in parts])


def warp_to_grid(upsampled: Tensor, views: Jitter, grid_size: tuple[int, int]) -> Tensor:
    """Show features as the views do and take the mean over each cell, in one step per axis.

    Both are one matrix per axis, so the product of the two is as well: no view is ever as large as
    the image.

    Args:
        upsampled: (1, C, H, W).
        views: N jitters of the image.
        grid_size: (h, w) cells.

    Returns:
        (N, C, h, w).
    """
    matrices = views.matrices((upsampled.shape[2], upsampled.shape[3]))
    rows, columns = (
        F.adaptive_avg_pool1d(matrix.mT, cells).mT
        for matrix, cells in zip(matrices, grid_size, strict=True)
    )
    return warp(upsampled, rows, columns)
