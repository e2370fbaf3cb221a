"""Prediction of unseen views by features upsampled once (multi-view consistency).

The task evaluates the objective of training (FeatUp, section 3.1) on held-out images and jitters.
Upsampled features are warped like the image, downsampled to the backbone's grid, and compared with
the backbone's features of the jittered image. The protocol is the downsampler:

* ``box``: the mean over each cell, for every upsampler;
* ``simple``, ``attention``: a downsampler fitted to each upsampler, on the training images alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.cost import measure
from upfeat.evaluation.data.folders import Dataset, read_photographs
from upfeat.evaluation.data.prepared import OnStep, Prepared, PreparedSet, named_generator
from upfeat.evaluation.data.view_features import view_features
from upfeat.evaluation.downsampler_fit import (
    N_DIRECTIONS,
    Cells,
    Fitted,
    count_cells,
    fit,
    leading_components,
    to_cells,
)
from upfeat.evaluation.methods import Method
from upfeat.evaluation.results import Row
from upfeat.evaluation.task import DRIFT, Score, Task
from upfeat.losses import gaussian_reconstruction, random_projection
from upfeat.views import Jitter, apply_jitter

N_FIT_IMAGES = 64
"""Training images to fit downsamplers on; with fewer images, more views of each are used."""

_SUMS = ("error", "variance", "cosine", "likelihood")


class Consistency(Task):
    """Errors in the features of views on one set of images, for any number of methods."""

    title = "Multi-view consistency"
    question = (
        "Do features that were upsampled once predict the backbone's features of jittered views of "
        "the same image?"
    )
    protocols: ClassVar = {
        "box": "warped features are downsampled by the mean over each cell, for every upsampler",
        "simple": "warped features are downsampled by one blur, fitted to each upsampler on "
        "training images",
        "attention": "warped features are downsampled by FeatUp's attention downsampler, fitted to "
        "each upsampler on training images",
    }
    scores: ClassVar = {
        "error": Score(
            "view error",
            "squared error of the predicted features of unseen views, over the variance of the "
            "true features; 0 is perfect, 1 is as good as predicting their mean",
            higher_is_better=False,
        ),
        "cosine": Score(
            "view cosine",
            "mean cosine between predicted and true features of unseen views, from both of which "
            "the mean of the image's coarse features is subtracted",
        ),
        "nll": Score(
            "view NLL",
            "mean Gaussian negative log-likelihood of the features of unseen views, without its "
            "constant; a model fitted on training images gives the standard deviation of each "
            "cell; the score depends on the features' scale",
            higher_is_better=False,
        ),
        "drift": DRIFT,
    }
    pictures = None
    max_train = N_FIT_IMAGES

    @classmethod
    def read(cls, folder: Path, layout: str, config: EvalConfig) -> Dataset:
        """See :meth:`Task.read`."""
        cls.check_layout(layout)
        return read_photographs(folder, split_seed=config.split_seed)

    @classmethod
    def facts(cls, settings: Mapping[str, Any]) -> dict[str, str]:
        """See :meth:`Task.facts`."""
        return {"views": f"{settings['views']} of each test image"}

    def __init__(
        self,
        parts: Mapping[str, PreparedSet],
        dataset: Dataset,
        backbone: Backbone,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """See :meth:`Task.__init__`; computes the features' principal components and unit."""
        super().__init__(parts, dataset, backbone, config, on_step)
        self.leading, self.unit = leading_components(self.train)  # (D, C)

    @torch.no_grad()
    def rows(self, label: str, method: Method) -> list[Row]:
        """See :meth:`Task.rows`; the jitters of a seed are the same for all upsamplers."""
        names = self.config.downsamplers
        fitted = self._fit(label, method)
        sums = torch.zeros(self.config.seeds, len(names), len(_SUMS), dtype=torch.float64)
        for index, sample in enumerate(self.test):
            self.on_step(f"{label}: views", index, len(self.test))
            upsampled = method(sample).full()
            centre = sample.features.mean((1, 2))[None, :, None, None]
            for seed, each in enumerate(fitted):
                views, seen = view_features(
                    self.test, index, self.backbone, self.config.views, seed
                )
                sums[seed] += self._compare(upsampled, views, seen, centre, each)
        self.on_step(f"{label}: views", len(self.test), len(self.test))
        cost, drift = measure(method, self.test)
        weights, count = method.weights, len(self.test) * self.config.views
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
        """Sum the measures ``_SUMS`` over views of one image, for every downsampler.

        Args:
            upsampled: (1, C, H, W), upsampled features of the image.
            views: V views of the image.
            seen: (V, C, h, w), the backbone's features of the views.
            centre: (1, C, 1, 1), mean of the image's coarse features, subtracted for cosines.
            fitted: downsamplers of one seed.

        Returns:
            (downsamplers, 4).
        """
        sums = torch.zeros(len(fitted), len(_SUMS), dtype=torch.float64)
        grid = (seen.shape[2], seen.shape[3])
        centre = centre / self.unit
        for index, (view, shown) in enumerate(
            zip(seen.split(1), (seen / self.unit).split(1), strict=True)
        ):
            warped = apply_jitter(upsampled, views[index])
            variance = (shown - shown.mean((2, 3), keepdim=True)).square().mean()
            for row, each in zip(sums, fitted, strict=True):
                guess = each.downsampler(warped, grid) / self.unit
                squared = (guess - shown).square()
                cosine = F.cosine_similarity(guess - centre, shown - centre, dim=1).mean()
                likelihood = gaussian_reconstruction(guess, shown, each.uncertainty(view))
                likelihood = likelihood + math.log(self.unit)
                row += torch.stack([squared.mean(), variance, cosine, likelihood]).cpu().double()
        return sums

    def _fit(self, label: str, method: Method) -> list[list[Fitted]]:
        """Fit every downsampler for every seed; each image is upsampled once for all of them."""
        drawn: list[list[Cells]] = [[] for _ in range(self.config.seeds)]
        for index, sample in enumerate(self.train):
            self.on_step(f"{label}: cells", index, len(self.train))
            for seed, cells in enumerate(self._draw(method, index, sample)):
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

    def _draw(self, method: Method, index: int, sample: Prepared) -> list[Cells]:
        """Draw cells of one training image, for every seed.

        Features are projected to the random directions and leading components before upsampling.
        """
        generators = [named_generator(seed, f"cells {sample.name}") for seed in self._seeds]
        directions = [
            random_projection(len(sample.features), N_DIRECTIONS, generator=generator).T
            for generator in generators
        ]
        rows = torch.cat(
            [self.leading, *(each.to(self.leading) / self.unit for each in directions)]
        )
        grid = (sample.features.shape[1], sample.features.shape[2])
        maps = method(sample).project(rows)  # D + 30 S outputs
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
    """Turn sums (seeds, 4) over ``count`` views into scores by name."""
    error, variance, cosine, likelihood = sums.unbind(1)
    # With a single cell or constant features, the variance is 0 and the error undefined.
    return {
        "error": torch.where(variance > 0, error / variance, torch.nan).tolist(),
        "cosine": (cosine / count).tolist(),
        "nll": (likelihood / count).tolist(),
        "drift": [drift],
    }


TASK = Consistency
