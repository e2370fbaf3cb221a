"""Prediction of surface normals by a linear probe on upsampled features.

The true normals are computed from depth maps (:func:`upfeat.evaluation.normals.normals_of`). The
probe has three outputs, which are divided by their length.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.data.folders import Dataset, Problem
from upfeat.evaluation.data.prepared import OnStep, Prepared, PreparedSet
from upfeat.evaluation.depth_maps import DepthMapProbing
from upfeat.evaluation.normals import ANGLES, angle_errors, normals_of
from upfeat.evaluation.report.pictures import encode_normals
from upfeat.evaluation.task import DRIFT, Score
from upfeat.probes import LinearProbe, Pixels, fit_normals


class Normals(DepthMapProbing):
    """One dataset's probes of normals and scores, for any number of methods."""

    title = "Probes of surface normals"
    question = "How well does a linear map of upsampled features predict the normal of each pixel?"
    scores: ClassVar = {
        "mean_angle": Score(
            "mean angle",
            "mean angle between the predicted and the true normal, degrees",
            higher_is_better=False,
            digits=2,
        ),
        "rmse_angle": Score(
            "RMSE angle",
            "root mean square angle between the predicted and the true normal, degrees",
            higher_is_better=False,
            digits=2,
        ),
        **{
            f"within_{angle:g}": Score(
                f"< {angle:g}°",
                f"fraction of pixels whose normal is predicted within {angle:g}°, %",
                percent=True,
            )
            for angle in ANGLES
        },
        "drift": DRIFT,
    }
    outputs = 3
    compared = ("mean_angle", "within_11.25")
    target = "normals"

    @classmethod
    def read(cls, folder: Path, layout: str, config: EvalConfig) -> Dataset:
        """See :meth:`Task.read`."""
        dataset = super().read(folder, layout, config)
        # Normals depend on it, and with the name of prepared files so do stored rows.
        dataset.reading += f" field_of_view={dataset.field_of_view}"
        return dataset

    @classmethod
    def scores_of(cls, sums: Tensor) -> dict[str, Tensor]:
        """See :meth:`Task.scores_of`; sums are those of :func:`angle_errors`."""
        angle, square, *close, count = sums.unbind(-1)
        scores = {"mean_angle": angle / count, "rmse_angle": (square / count).sqrt()}
        fractions = (one / count for one in close)
        return scores | dict(zip((f"within_{angle:g}" for angle in ANGLES), fractions, strict=True))

    def __init__(
        self,
        parts: Mapping[str, PreparedSet],
        dataset: Dataset,
        backbone: Backbone,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """Leave out images that show no normals.

        Raises:
            ValueError: no image of a split shows any.
        """
        super().__init__(parts, dataset, backbone, config, on_step)
        self.parts = {name: self._with_normals(name, part) for name, part in parts.items()}

    def _with_normals(self, name: str, part: PreparedSet) -> PreparedSet:
        kept = []
        for index, sample in enumerate(part):
            if bool(self.usable(self.target_of(sample)).any()):
                kept.append(index)
            else:
                reason = "no normals: the depth has steps or unknown values everywhere"
                self.problems.append(Problem(sample.name, reason))
        if not kept:
            raise ValueError(f"no depth map of {name} shows the normals of a surface")
        return part.subset(kept)

    def draw_target(self, sample: Prepared) -> str:
        """See :meth:`Task.draw_target`."""
        return encode_normals(self.target_of(sample).movedim(-1, 0))

    def target_of(self, sample: Prepared) -> Tensor:
        """See :meth:`Probing.target_of`; the normals, (H, W, 3)."""
        return normals_of(sample.label, self.dataset.field_of_view).movedim(0, -1)

    def usable(self, target: Tensor) -> Tensor:
        """See :meth:`Probing.usable`."""
        return torch.isfinite(target[..., 0])

    def fit_head(self, pixels: Pixels, generator: torch.Generator) -> LinearProbe:
        """See :meth:`Probing.fit_head`."""
        return fit_normals(pixels, generator)

    def judge(self, predicted: Tensor, sample: Prepared) -> Tensor:
        """See :meth:`DepthMapProbing.judge`."""
        return angle_errors(predicted, self.target_of(sample).movedim(-1, 0).cpu())

    def draw(self, predicted: Tensor, sample: Prepared) -> str:
        """See :meth:`DepthMapProbing.draw`."""
        return encode_normals(predicted)


TASK = Normals
