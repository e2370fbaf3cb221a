"""Prediction of depth by a linear probe on upsampled features.

The probe predicts depth up to a scale and a shift of each image (see
:func:`upfeat.probes.fit_depth`), so predictions are aligned to each test image's depth before they
are scored.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from upfeat.evaluation.data.prepared import Prepared
from upfeat.evaluation.depth_maps import DepthMapProbing
from upfeat.evaluation.metrics import align_depth, depth_errors, depth_scores
from upfeat.evaluation.report.pictures import encode_values
from upfeat.evaluation.task import DRIFT, Score
from upfeat.probes import LinearProbe, Pixels, fit_depth


class Depth(DepthMapProbing):
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
    def scores_of(cls, sums: Tensor) -> dict[str, Tensor]:
        """See :meth:`Task.scores_of`; sums are those of :func:`depth_errors`."""
        return depth_scores(sums)

    def draw_target(self, sample: Prepared) -> str:
        """See :meth:`Task.draw_target`."""
        return encode_values(sample.label, *depth_range(sample.label))

    def usable(self, target: Tensor) -> Tensor:
        """See :meth:`Probing.usable`."""
        return torch.isfinite(target)

    def fit_head(self, pixels: Pixels, generator: torch.Generator) -> LinearProbe:
        """See :meth:`Probing.fit_head`."""
        return fit_depth(pixels, generator)

    def judge(self, predicted: Tensor, sample: Prepared) -> Tensor:
        """See :meth:`DepthMapProbing.judge`; predictions are aligned to the depth first."""
        depth = sample.label.cpu()
        return torch.stack([depth_errors(align_depth(one[0], depth), depth) for one in predicted])

    def draw(self, predicted: Tensor, sample: Prepared) -> str:
        """See :meth:`DepthMapProbing.draw`."""
        depth = sample.label.cpu()
        return encode_values(align_depth(predicted[0], depth), *depth_range(depth))


def depth_range(depth: Tensor) -> tuple[float, float]:
    """Return the nearest and the farthest known depth of a map."""
    low, high = depth[torch.isfinite(depth)].aminmax()
    return float(low), float(high)


TASK = Depth
