"""Log of a run: a line a step, a callback, and TensorBoard where it is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from upfeat.training.folder import RunFolder

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class StepReport:
    """Result of one step.

    Attributes:
        step: its number, from 1.
        steps: how many there are to be.
        images: photographs it looked at.
        backbone: name of the one it was done with.
        losses: the loss and its terms.
        learning_rate: that it was done with.
        validation: figures on held-out photographs, where it was a step to validate after.
    """

    step: int
    steps: int
    images: int
    backbone: str
    losses: dict[str, float]
    learning_rate: float
    validation: dict[str, float] = field(default_factory=dict)


OnStep = Callable[[StepReport], None]
"""Told of every step when it is done."""


class Record:
    """Writes reports down; a context manager, so that files are closed."""

    def __init__(self, folder: RunFolder, *, log_every: int, tensorboard: bool, first: int) -> None:
        """Open the files.

        Args:
            folder: of the run.
            log_every: steps between lines.
            tensorboard: write for it too.
            first: steps done before; what TensorBoard has after them is hidden.

        Raises:
            ValueError: TensorBoard is asked for and not installed.
        """
        self.log_every = log_every
        self.writer: Any = _writer(folder, first) if tensorboard else None
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
            # What could not be written was reported when it happened.
            if error is None:
                raise
        if self.writer is not None:
            self.writer.close()

    def write(self, report: StepReport) -> None:
        """Write a report down, if its step is to be logged or brought a validation."""
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
        """Give TensorBoard a picture."""
        if self.writer is not None:
            pixels = np.asarray(picture.convert("RGB"))
            self.writer.add_image("features", pixels, step, dataformats="HWC")


def _writer(folder: RunFolder, first: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise ValueError(
            'tensorboard=True needs TensorBoard; pip install "upfeat[train]", or leave it off'
        ) from None
    return SummaryWriter(str(folder.path / "tensorboard"), purge_step=first + 1)
