"""Base of tasks whose probes predict numbers at every pixel from sets with depth maps."""

from __future__ import annotations

from abc import abstractmethod
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
from upfeat.evaluation.probing import Probing
from upfeat.evaluation.results import Row
from upfeat.probes import LinearProbe


class DepthMapProbing(Probing):
    """Probes on one dataset with depth maps; subclasses define what is predicted and scored."""

    outputs: ClassVar[int] = 1
    """Number of outputs of a probe."""

    @classmethod
    def read(cls, folder: Path, layout: str, config: EvalConfig) -> Dataset:
        """See :meth:`Task.read`.

        Raises:
            ValueError: the probe is not a regression.
        """
        if config.probe != "regression":
            raise ValueError(
                f"probe={config.probe} is for seg; probes of {cls.name()} are regressions: leave "
                "it out"
            )
        return read_dataset(folder, "depth", layout=layout, split_seed=config.split_seed)

    @abstractmethod
    def judge(self, predicted: Tensor, sample: Prepared) -> Tensor:
        """Sum the errors of one image, as :meth:`scores_of` reads them.

        Args:
            predicted: (S, outputs, H, W), predictions of S seeds, on the CPU.
            sample: the image, with its target.

        Returns:
            (S, M) float64.
        """

    @abstractmethod
    def draw(self, predicted: Tensor, sample: Prepared) -> str:
        """Draw the predictions (outputs, H, W) of one seed, as a base64 picture."""

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
        sizes = len(heads), self.config.seeds, self.outputs
        for index, sample in enumerate(self.test):
            self.on_step(f"{label}: test", index, len(self.test))
            with torch.no_grad():
                maps = method(sample).project(stacked.weight, stacked.bias)[0].cpu()
            for name, predicted in zip(heads, maps.unflatten(0, sizes), strict=True):
                sums[name].append(self.judge(predicted, sample))
                if index in chosen:
                    pictures[name][sample.name] = self.draw(predicted[0], sample)
        self.on_step(f"{label}: test", len(self.test), len(self.test))
        cost, drift = measure(method, self.test)
        rows = []
        for name in heads:
            kept = torch.stack(sums[name])  # (images, seeds, M)
            scores = {key: value.tolist() for key, value in self.scores_of(kept.sum(0)).items()}
            row = Row(label, name, method.weights, scores | {"drift": [drift]}, {}, cost)
            rows.append(replace(row, pictures=pictures[name], sums=pack_sums(kept)))
        return rows
