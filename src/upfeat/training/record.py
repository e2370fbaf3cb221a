"""Record of a run: a line per logged step, a report for callbacks, and optionally TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from upfeat.optional import import_optional
from upfeat.training.folder import RunFolder

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class StepReport:
    """Result of one step.

    Attributes:
        step: number of the step, from 1.
        steps: number of steps of the whole run.
        images: number of photographs of the step.
        backbone: name of the step's backbone.
        losses: loss and its terms, by name.
        learning_rate: learning rate of the step.
        validation: scores on held-out photographs by name; empty if the step was not validated.
    """

    step: int
    steps: int
    images: int
    backbone: str
    losses: dict[str, float]
    learning_rate: float
    validation: dict[str, float] = field(default_factory=dict)


OnStep = Callable[[StepReport], None]
"""Callback that receives the report of every step."""


class Record:
    """Writer of reports to the log and to TensorBoard; a context manager, which closes files."""

    def __init__(self, folder: RunFolder, *, log_every: int, tensorboard: bool, first: int) -> None:
        """Open the files.

        Args:
            folder: folder of the run.
            log_every: number of steps between lines.
            tensorboard: whether to write for TensorBoard too.
            first: number of steps already done; TensorBoard hides earlier records of later steps.

        Raises:
            ValueError: ``tensorboard`` is True and TensorBoard is not installed.
        """
        self.log_every = log_every
        self.writer: Any = None
        if tensorboard:
            self.writer = writer_class()(str(folder.path / "tensorboard"), purge_step=first + 1)
        self.file = folder.open_log()

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.file.close()
        except OSError:
            # If there is an error already, it may be a failed write, which close would repeat.
            if error is None:
                raise
        if self.writer is not None:
            self.writer.close()

    def write(self, report: StepReport) -> None:
        """Write a report, if its step is to be logged or has a validation."""
        if report.step % self.log_every and not report.validation:
            return
        line: dict[str, Any] = {
            "step": report.step,
            "backbone": report.backbone,
            **report.losses,
            "learning_rate": report.learning_rate,
        }
        if report.validation:
            line["validation"] = report.validation
        try:
            self.file.write(json.dumps(line) + "\n")
        except OSError as error:
            reason = f"log not written ({error.strerror})"
            raise OSError(error.errno, reason, self.file.name) from None
        if self.writer is None:
            return
        for name, value in report.losses.items():
            self.writer.add_scalar(f"train/{name}", value, report.step)
        self.writer.add_scalar("learning_rate", report.learning_rate, report.step)
        for name, value in report.validation.items():
            self.writer.add_scalar(f"validation/{name}", value, report.step)

    def show(self, picture: Image.Image, step: int) -> None:
        """Write a picture for TensorBoard, if it is enabled."""
        if self.writer is not None:
            pixels = np.asarray(picture.convert("RGB"))
            self.writer.add_image("features", pixels, step, dataformats="HWC")


def writer_class() -> Any:
    """Return TensorBoard's class of writers.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    missing = 'tensorboard=True needs TensorBoard; pip install "upfeat[train]", or leave it off'
    for name in ("tensorboard", "torch.utils.tensorboard.writer"):
        module = import_optional(name, missing)
    return module.SummaryWriter
