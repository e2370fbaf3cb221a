"""The contract of a task: one dataset, one backbone, and rows of scores for any method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.data.folders import Dataset, Problem, read_photographs
from upfeat.evaluation.data.prepared import OnStep, Prepared, PreparedSet
from upfeat.evaluation.methods import Method
from upfeat.evaluation.results import Row


@dataclass(frozen=True)
class Score:
    """A score as people read it.

    Attributes:
        label: head of its column.
        meaning: one sentence for the report.
        higher_is_better: its good direction.
        percent: shown times 100.
    """

    label: str
    meaning: str
    higher_is_better: bool = True
    percent: bool = False


DRIFT = Score(
    "cosine to coarse",
    "cosine between the upsampled features, averaged over each cell, and the coarse ones; 1 means "
    "that upsampling leaves the features' meaning alone",
)
"""Scored by every task, under the name ``drift``."""


class Task(ABC):
    """Scores of any number of methods on the same data.

    A subclass lies in a file of :mod:`upfeat.evaluation.tasks`, which is named after the task and
    binds the class to ``TASK``; nothing else need know of it.

    Attributes:
        parts: prepared images by split.
        problems: what is weak in the data, as the task sees it.
    """

    title: ClassVar[str]
    """Of the report."""
    question: ClassVar[str]
    """The question that scores answer, for the report."""
    scores: ClassVar[Mapping[str, Score]]
    """Every score of its rows; the first one is drawn as a chart."""
    protocols: ClassVar[Mapping[str, str]]
    """Every protocol of its rows, explained."""
    target: ClassVar[str | None] = None
    """The targets' name, for captions; ``None`` where images have none."""
    pictures: ClassVar[str | None] = "shades"
    """Of predictions: "classes" are coloured and compared with the target; "shades" are shown as
    they are; ``None`` for no pictures."""
    pictures_title: ClassVar[str] = "Predictions"
    compared: ClassVar[tuple[str, ...]] = ()
    """Scores of which differences between methods are shown; :meth:`scores_of` gives them."""
    default_backbone: ClassVar[str] = "efficientnet_lite0"
    max_train: ClassVar[int | None] = None
    """Training images that are used at most; ``None`` for all."""

    def __init__(
        self,
        parts: Mapping[str, PreparedSet],
        dataset: Dataset,
        backbone: Backbone,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """Keep the data.

        Args:
            parts: ``test``, and ``train`` for tasks that fit something.
            dataset: that they are of.
            backbone: whose features are upsampled, in eval mode.
            config: settings.
            on_step: is told of progress.
        """
        self.parts, self.dataset = parts, dataset
        self.backbone, self.config = backbone, config
        self.on_step: OnStep = on_step or (lambda label, done, total: None)
        self.problems: list[Problem] = []

    @classmethod
    def name(cls) -> str:
        """Its name: that of its file."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def read(cls, folder: Path, layout: str, config: EvalConfig) -> Dataset:
        """List the data; here photographs without labels, all of them to test on.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: a split is empty, or the layout is for another task.
        """
        cls.check_layout(layout)
        return read_photographs(folder)

    @classmethod
    def check_layout(cls, layout: str) -> None:
        """Refuse layouts of labelled sets for a task that takes photographs alone."""
        if layout != "folder":
            raise ValueError(
                f"layout={layout} is for labelled sets; {cls.name()} takes any folder of "
                "photographs: leave it out"
            )

    @classmethod
    def adapt(cls, backbone: Backbone) -> Backbone:
        """The backbone whose features are scored; here the one that was asked for."""
        return backbone

    @classmethod
    def facts(cls, settings: Mapping[str, Any]) -> dict[str, str]:
        """Settings worth a line in the report."""
        return {}

    @classmethod
    def scores_of(cls, sums: Tensor) -> dict[str, Tensor]:
        """Scores from what images add to them, summed: (…, M) -> (…) each; here none.

        Rows that keep what each image adds (:attr:`Row.sums`) are compared by a paired bootstrap.
        """
        return {}

    @classmethod
    def draw_target(cls, sample: Prepared) -> str | None:
        """The target as a picture for the report; ``None`` where there is none."""
        return None

    @property
    def train(self) -> PreparedSet:
        """Images that are fitted on."""
        return self.parts["train"]

    @property
    def test(self) -> PreparedSet:
        """Images that are scored."""
        return self.parts["test"]

    @abstractmethod
    def rows(self, label: str, method: Method) -> list[Row]:
        """Score one method: one row for each protocol.

        Args:
            label: its name in the table.
            method: to score.
        """
