"""What every task is: one dataset, one backbone, and rows of scores for any upsampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from upfeat.backbones import Backbone
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.data.folders import Problem
from upfeat.evaluation.data.prepared import OnStep, PreparedSet
from upfeat.evaluation.results import Row
from upfeat.upsamplers import Upsampler


class Task(ABC):
    """Scores of any number of upsamplers on the same data.

    Attributes:
        parts: prepared images by split.
        problems: what is weak in the data, as the task sees it.
    """

    def __init__(
        self,
        parts: Mapping[str, PreparedSet],
        backbone: Backbone,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """Keep the data.

        Args:
            parts: ``test``, and ``train`` for tasks that fit something.
            backbone: whose features are upsampled, in eval mode.
            config: settings.
            on_step: is told of progress.
        """
        self.parts = parts
        self.backbone, self.config = backbone, config
        self.on_step: OnStep = on_step or (lambda label, done, total: None)
        self.problems: list[Problem] = []

    @property
    def train(self) -> PreparedSet:
        """What is fitted on."""
        return self.parts["train"]

    @property
    def test(self) -> PreparedSet:
        """What is scored."""
        return self.parts["test"]

    @abstractmethod
    def rows(self, label: str, upsampler: Upsampler) -> list[Row]:
        """Score one upsampler: one row for each protocol.

        Args:
            label: its name in the table.
            upsampler: in eval mode.
        """
