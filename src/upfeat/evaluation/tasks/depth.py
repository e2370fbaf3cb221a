"""Prediction of depth by a linear probe on upsampled features.

The probe predicts depth up to a scale and a shift of each image (see
:func:`upfeat.probes.fit_depth`), so predictions are aligned to each test image's depth before they
are scored.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.cost import measure
from upfeat.evaluation.data.folders import Dataset
from upfeat.evaluation.data.layouts import read_dataset
from upfeat.evaluation.data.prepared import Prepared
from upfeat.evaluation.differences import pack_sums
from upfeat.evaluation.methods import Method
from upfeat.evaluation.metrics import align_depth, depth_errors, depth_scores
from upfeat.evaluation.probing import Probing, needs_regression
from upfeat.evaluation.report.pictures import encode_values
from upfeat.evaluation.results import Row
from upfeat.evaluation.task import DRIFT, Score
from upfeat.probes import LinearProbe, Pixels, fit_depth


class Depth(Probing):
    """One dataset's depth probes and scores, for any number of methods."""

    title = "Depth probes"
    question = "How well does a linear map of upsampled features predict the depth of every pixel?"
    scores: ClassVar = {
        "rmse": Score(
            "RMSE",
            "root mean square error after each prediction is aligned to the true depth by the best "
            "scale and shift, in the unit of the depth maps",
            higher_is_better=False,
        ),
        "abs_rel": Score(
            "relative error",
            "mean of the absolute error over the true depth, after alignment by scale and shift",
            higher_is_better=False,
        ),
        "delta_1.25": Score(
            "δ < 1.25",
            "fraction of pixels whose predicted depth, after alignment by scale and shift, is "
            "within a factor of 1.25 of the true depth, %",
            percent=True,
        ),
        "drift": DRIFT,
    }
    compared = ("rmse", "abs_rel")
    target = "depth"

    @classmethod
    def read(cls, folder: Path, layout: str, config: EvalConfig) -> Dataset:
        """See :meth:`Task.read`.

        Raises:
            ValueError: the probe is not a regression.
        """
        needs_regression("depth", config)
        return read_dataset(folder, "depth", layout=layout, split_seed=config.split_seed)

    @classmethod
    def scores_of(cls, sums: Tensor) -> dict[str, Tensor]:
        """See :meth:`Task.scores_of`; sums are those of :func:`depth_errors`."""
        squared, relative, close, count = sums.unbind(-1)
        return {
            "rmse": (squared / count).sqrt(),
            "abs_rel": relative / count,
            "delta_1.25": close / count,
        }

    def draw_target(self, sample: Prepared) -> str:
        """See :meth:`Task.draw_target`."""
        return encode_values(sample.label, *depth_range(sample.label))

    def usable(self, target: Tensor) -> Tensor:
        """See :meth:`Probing.usable`."""
        return torch.isfinite(target)

    def fit_head(self, pixels: Pixels, generator: torch.Generator) -> LinearProbe:
        """See :meth:`Probing.fit_head`."""
        return fit_depth(pixels, generator)

    def rows(self, label: str, method: Method) -> list[Row]:
        """See :meth:`Task.rows`; the probes are fitted first."""
        protocols = [name for name in self.config.protocols if name in self.protocols]
        if not protocols:
            return []
        heads = self.heads(label, method, protocols)
        sums: dict[str, list[Tensor]] = {name: [] for name in heads}
        pictures: dict[str, dict[str, str]] = {name: {} for name in heads}
        chosen = set(self.choose_pictures())
        stacked = LinearProbe.cat([head for group in heads.values() for head in group])
        for index, sample in enumerate(self.test):
            self.on_step(f"{label}: test", index, len(self.test))
            maps, depth = self._predict(method, sample, stacked).cpu(), sample.label.cpu()
            for name, group in zip(heads, maps.split(self.config.seeds), strict=True):
                aligned = [align_depth(predicted, depth) for predicted in group]
                sums[name].append(torch.stack([depth_errors(each, depth) for each in aligned]))
                if index in chosen:
                    bounds = depth_range(depth)
                    pictures[name][sample.name] = encode_values(aligned[0], *bounds)
        self.on_step(f"{label}: test", len(self.test), len(self.test))
        cost, drift = measure(method, self.test)
        rows = []
        for name in heads:
            kept = torch.stack(sums[name])  # (images, seeds, 4)
            each = [depth_scores(seed) for seed in kept.sum(0)]
            scores = {key: [found[key] for found in each] for key in each[0]} | {"drift": [drift]}
            row = Row(label, name, method.weights, scores, {}, cost, pictures[name])
            rows.append(replace(row, sums=pack_sums(kept)))
        return rows

    @torch.no_grad()
    def _predict(self, method: Method, sample: Prepared, head: LinearProbe) -> Tensor:
        """Predict one map per output of the head: (K, H, W)."""
        return method(sample).project(head.weight, head.bias)[0]


def depth_range(depth: Tensor) -> tuple[float, float]:
    """Return the nearest and the farthest known depth of a map."""
    low, high = depth[torch.isfinite(depth)].aminmax()
    return float(low), float(high)


TASK = Depth
