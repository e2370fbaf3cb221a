"""Multi-view consistency: do features upsampled once explain views that were not seen?

The objective that upsamplers are trained for (FeatUp, section 3.1), on held-out images and jitters:
upsampled features are warped as the image is, brought back to the backbone's grid, and compared
with what the backbone makes of the jittered image. A protocol is a way back to the grid:

* ``box``: the mean over each cell, the same for every upsampler;
* ``simple``, ``attention``: a downsampler fitted to each upsampler, on the training images alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.cost import measure
from upfeat.evaluation.downsampler_fit import (
    N_DIRECTIONS,
    Cells,
    Fitted,
    count_cells,
    fit,
    leading_components,
    to_cells,
)
from upfeat.evaluation.prepared import OnStep, Prepared, PreparedSet, guidance_of
from upfeat.evaluation.probe import Head, head_map
from upfeat.evaluation.probing import named_generator
from upfeat.evaluation.provenance import digest
from upfeat.evaluation.results import Row
from upfeat.evaluation.task import Task
from upfeat.evaluation.view_features import view_features
from upfeat.losses import gaussian_reconstruction, random_projection
from upfeat.upsamplers import Upsampler
from upfeat.views import Jitter, apply_jitter

N_FIT_IMAGES = 64
"""Training images that downsamplers are fitted on; with fewer, each is viewed more often."""

_SUMS = ("error", "variance", "cosine", "likelihood")


class Consistency(Task):
    """View errors on one set of images, for any number of upsamplers."""

    def __init__(
        self,
        parts: Mapping[str, PreparedSet],
        backbone: Backbone,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """See :meth:`Task.__init__`; finds the features' principal components."""
        super().__init__(parts, backbone, config, on_step)
        self.leading = leading_components(self.train)  # (D, C)

    @torch.no_grad()
    def rows(self, label: str, upsampler: Upsampler) -> list[Row]:
        """See :meth:`Task.rows`; a seed draws jitters and fits, the same for all upsamplers."""
        names = self.config.downsamplers
        fitted = self._fit(label, upsampler)
        sums = torch.zeros(self.config.seeds, len(names), len(_SUMS), dtype=torch.float64)
        for index, sample in enumerate(self.test):
            self.on_step(f"{label}: views", index, len(self.test))
            guidance = guidance_of(sample.image, self.backbone, upsampler)
            upsampled = upsampler(sample.features[None], guidance)
            centre = sample.features.mean((1, 2))[None, :, None, None]
            for seed, each in enumerate(fitted):
                views, seen = view_features(
                    self.test, index, self.backbone, self.config.views, seed
                )
                sums[seed] += self._compare(upsampled, views, seen, centre, each)
        self.on_step(f"{label}: views", len(self.test), len(self.test))
        cost, drift = measure(upsampler, self.test, self.backbone)
        weights, count = digest(upsampler), len(self.test) * self.config.views
        return [
            Row(label, name, weights, _scores(sums[:, index], count, drift), {}, cost)
            for index, name in enumerate(names)
        ]

    def _compare(
        self,
        upsampled: Tensor,
        views: Jitter,
        seen: Tensor,
        centre: Tensor,
        fitted: Sequence[Fitted],
    ) -> Tensor:
        """Sums over views of one image, for every downsampler: (downsamplers, 4)."""
        sums = torch.zeros(len(fitted), len(_SUMS), dtype=torch.float64)
        grid = (seen.shape[2], seen.shape[3])
        for index, shown in enumerate(seen.split(1)):
            warped = apply_jitter(upsampled, views[index])
            variance = (shown - shown.mean((2, 3), keepdim=True)).square().mean()
            for row, each in zip(sums, fitted, strict=True):
                guess = each.downsampler(warped, grid)
                squared = (guess - shown).square()
                cosine = F.cosine_similarity(guess - centre, shown - centre, dim=1).mean()
                likelihood = gaussian_reconstruction(guess, shown, each.uncertainty(shown))
                row += torch.stack([squared.mean(), variance, cosine, likelihood]).cpu().double()
        return sums

    def _fit(self, label: str, upsampler: Upsampler) -> list[list[Fitted]]:
        """Every downsampler of every seed; each image is upsampled once for all."""
        drawn: list[list[Cells]] = [[] for _ in range(self.config.seeds)]
        for index, sample in enumerate(self.train):
            self.on_step(f"{label}: cells", index, len(self.train))
            for seed, cells in enumerate(self._draw(upsampler, index, sample)):
                drawn[seed].append(cells)
        fitted = []
        for seed, parts in enumerate(drawn):
            self.on_step(f"{label}: downsamplers", seed, len(drawn))
            cells = Cells.cat(parts)
            fitted.append(
                [fit(kind, cells, self.leading, seed) for kind in self.config.downsamplers]
            )
            parts.clear()
        self.on_step(f"{label}: downsamplers", len(drawn), len(drawn))
        return fitted

    def _draw(self, upsampler: Upsampler, index: int, sample: Prepared) -> list[Cells]:
        """Cells of one training image, for every seed.

        Only the directions and components that are fitted on are upsampled.
        """
        generators = [named_generator(seed, f"cells {sample.name}") for seed in self._seeds]
        directions = [
            random_projection(len(sample.features), N_DIRECTIONS, generator=generator).T
            for generator in generators
        ]
        rows = torch.cat([self.leading, *(each.to(self.leading) for each in directions)])
        head = Head(rows, rows.new_zeros(len(rows)))  # D + 30 S outputs
        guidance = guidance_of(sample.image, self.backbone, upsampler)
        features = sample.features[None]
        grid = (features.shape[2], features.shape[3])
        kernels = upsampler.prepare(guidance, grid, sample.size, features)
        maps = head_map(upsampler, kernels, features, head)
        n_views = -(-N_FIT_IMAGES // len(self.train))
        n_cells = -(-count_cells(self.backbone.stride, len(self.leading)) // len(self.train))
        drawn = []
        parts = maps.split([len(self.leading), *[N_DIRECTIONS] * len(generators)], dim=1)
        for seed, generator in enumerate(generators):
            views, seen = view_features(self.train, index, self.backbone, n_views, seed)
            both = torch.cat([parts[0], parts[1 + seed]], dim=1)
            patches = to_cells(apply_jitter(both, views), grid)  # (V·h·w, D + 30, k, k)
            target = to_cells(F.conv2d(seen, rows[:, :, None, None]), grid)[..., 0, 0]
            chosen = torch.randperm(len(patches), generator=generator)[:n_cells]
            leading, values = patches[chosen].split([len(self.leading), N_DIRECTIONS], dim=1)
            seen_leading, *targets = target[chosen].split(
                [len(self.leading), *[N_DIRECTIONS] * len(generators)], dim=1
            )
            drawn.append(Cells(values, leading, targets[seed], seen_leading))
        return drawn

    @property
    def _seeds(self) -> range:
        return range(self.config.seeds)


def _scores(sums: Tensor, count: int, drift: float) -> dict[str, list[float]]:
    """(seeds, 4) sums over views -> scores."""
    error, variance, cosine, likelihood = sums.unbind(1)
    return {
        "error": (error / variance.clamp(min=1e-30)).tolist(),
        "cosine": (cosine / count).tolist(),
        "nll": (likelihood / count).tolist(),
        "drift": [drift],
    }
