"""Interface of tasks, which score any method on one dataset with one backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.data.folders import Dataset, Problem, read_photographs, subset
from upfeat.evaluation.data.prepared import OnStep, Prepared, PreparedSet
from upfeat.evaluation.methods import Method
from upfeat.evaluation.results import Row


@dataclass(frozen=True)
class Score:
    """Description of a score for readers.

    Attributes:
        label: heading of the score's column.
        meaning: explanation in one sentence, for the report.
        higher_is_better: good direction of the score.
        percent: whether to show the score times 100.
        digits: number of decimal places to show.
    """

    label: str
    meaning: str
    higher_is_better: bool = True
    percent: bool = False
    digits: int = 4

    @property
    def format(self) -> tuple[float, int]:
        """Factor by which values are shown, and number of decimal places."""
        return (100, 2) if self.percent else (1, self.digits)

    def text(self, value: float | None, *, signed: bool = False) -> str:
        """Format a value for readers: "–" for none, and no sign for one that rounds to 0.

        Args:
            value: value of the score, or a difference of two.
            signed: whether positive values get a plus.
        """
        if value is None:
            return "–"
        factor, digits = self.format
        plain = f"{value * factor:{'+' if signed else ''}.{digits}f}"
        return (plain if float(plain) else plain.lstrip("+-")).replace("-", "−")


DRIFT = Score(
    "cosine to coarse",
    "mean cosine between the coarse features and the upsampled features averaged over each cell; 1 "
    "means that averaging recovers the coarse features, up to their length",
)
"""Scored by every task, under the name ``drift``."""


class Task(ABC):
    """Base of tasks, which score any number of methods on the same data.

    A subclass is registered by its file alone: the file is in :mod:`upfeat.evaluation.tasks`, has
    the task's name, and assigns the class to ``TASK``.

    Attributes:
        parts: prepared images by split.
        problems: weaknesses of the data that concern this task.
    """

    title: ClassVar[str]
    """Title of the report."""
    question: ClassVar[str]
    """Question that the scores answer, for the report."""
    scores: ClassVar[Mapping[str, Score]]
    """All scores of the task's rows, by name; the first score is drawn as a chart."""
    protocols: ClassVar[Mapping[str, str]]
    """Explanations of all protocols of the task's rows, by name."""
    target: ClassVar[str | None] = None
    """Name of the targets, for captions; ``None`` if images have no targets."""
    pictures: ClassVar[str | None] = "shades"
    """Kind of the pictures of predictions: "classes" are coloured and compared with the target,
    "shades" are shown unchanged; ``None`` for no pictures."""
    pictures_title: ClassVar[str] = "Predictions"
    per_class_title: ClassVar[tuple[str, str]] = ("class", "IoU of each class, %")
    """Noun for the members of :attr:`Row.per_class`, and title of their table."""
    compared: ClassVar[tuple[str, ...]] = ()
    """Names of the scores whose differences between methods are shown; :meth:`scores_of` must
    compute them."""
    default_backbone: ClassVar[str] = "efficientnet_lite0"
    max_train: ClassVar[int | None] = None
    """Largest number of training images to use; ``None`` for all."""

    def __init__(
        self,
        parts: Mapping[str, PreparedSet],
        dataset: Dataset,
        backbone: Backbone,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """Store the data.

        Args:
            parts: prepared images of the split ``test``, and of ``train`` for tasks that fit.
            dataset: dataset of the images.
            backbone: backbone whose features are upsampled, in eval mode.
            config: settings of the evaluation.
            on_step: called with the progress.
        """
        self.parts, self.dataset = parts, dataset
        self.backbone, self.config = backbone, config
        self.on_step: OnStep = on_step or (lambda label, done, total: None)
        self.problems: list[Problem] = []

    @classmethod
    def name(cls) -> str:
        """Return the name of the task, which is the name of its file."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def read(cls, folder: Path, layout: str, config: EvalConfig) -> Dataset:
        """List the data; by default photographs without labels, all in the split ``test``.

        Args:
            folder: folder of the data.
            layout: layout of the data on disk.
            config: settings of the evaluation.

        Raises:
            FileNotFoundError: the folder or a required file does not exist.
            ValueError: a split is empty, or the layout is for another task.
        """
        cls.check_layout(layout)
        return read_photographs(folder)

    @classmethod
    def limit(cls, dataset: Dataset, config: EvalConfig) -> None:
        """Keep at most ``max_train`` and ``max_test`` samples, drawn at random.

        Args:
            dataset: dataset to change.
            config: settings of the evaluation.
        """
        limits = [limit for limit in (config.max_train, cls.max_train) if limit is not None]
        dataset.train = subset(dataset.train, min(limits, default=None), seed=config.split_seed)
        dataset.test = subset(dataset.test, config.max_test, seed=config.split_seed)

    @classmethod
    def check_layout(cls, layout: str) -> None:
        """Refuse layouts of labelled sets, for tasks that need photographs alone."""
        if layout != "folder":
            raise ValueError(
                f"layout={layout} is for labelled sets; {cls.name()} takes any folder of "
                "photographs: leave it out"
            )

    @classmethod
    def adapt(cls, backbone: Backbone) -> Backbone:
        """Return the backbone whose features are scored; by default the given backbone."""
        return backbone

    @classmethod
    def facts(cls, settings: Mapping[str, Any]) -> dict[str, str]:
        """Return further facts, derived from the settings, to show in the report."""
        return {}

    @classmethod
    def scores_of(cls, sums: Tensor) -> dict[str, Tensor]:
        """Compute scores from sums over images, (…, M) -> (…) each; by default none.

        Rows that store the contribution of each image to these sums (:attr:`Row.sums`) are compared
        by a paired bootstrap.
        """
        return {}

    def draw_target(self, sample: Prepared) -> str | None:
        """Return the target as a picture for the report; ``None`` if the sample has no target."""
        return None

    @property
    def train(self) -> PreparedSet:
        """Images for fits."""
        return self.parts["train"]

    @property
    def test(self) -> PreparedSet:
        """Images to score."""
        return self.parts["test"]

    def choose_pictures(self) -> list[int]:
        """Return indices of the test images to show in the report; evenly spaced by default."""
        return self.config.choose_pictures(len(self.test))

    @abstractmethod
    def rows(self, label: str, method: Method) -> list[Row]:
        """Score one method: one row for each protocol.

        Args:
            label: name of the method in the table.
            method: method to score.
        """
