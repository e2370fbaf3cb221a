"""Checkpoints: written whole or not at all, the newest few kept, the newest whole one found."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfeat.storage import write_bytes
from upfeat.upsamplers.tensor_files import UNREADABLE

FORMAT = "upfeat-train-1"

_NAME = re.compile(r"step-(\d+)\.ckpt")


class Checkpoints:
    """The checkpoints of a run, in a folder of their own."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Use a folder, which must exist before anything is written.

        Args:
            folder: of the checkpoints alone.
            keep: how many of the newest stay.
        """
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Checkpoints there are, oldest first."""
        found = [path for path in self.folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step)

    def write(self, state: dict[str, Any]) -> Path:
        """Write the state after ``state["step"]`` steps, then remove the oldest over the count.

        Raises:
            OSError: it could not be written; earlier checkpoints are as they were.
        """
        path = self.folder / f"step-{state['step']:08d}.ckpt"
        # In memory first: torch.save reports a full disk as an error of its own archive.
        content = io.BytesIO()
        torch.save({"format": FORMAT, **state}, content)
        try:
            write_bytes(path, content.getvalue())
        except OSError as error:
            raise OSError(error.errno, self._cannot_write(error), str(path)) from error
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> dict[str, Any] | None:
        """The newest state that can be read whole; damaged ones are warned of. ``None``: no file.

        One that holds NaN or infinity counts as damaged. Nothing in a file is executed.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                if not isinstance(state, dict) or state.get("format") != FORMAT:
                    raise ValueError("another format")
                _check_whole(state)
                return state
            except pickle.UnpicklingError:
                reason = "not a checkpoint"
            except UNREADABLE as error:
                reason = _first_line(error)
            warnings.warn(f"{path}: damaged ({reason}); the one before is used", stacklevel=2)
        if paths:
            raise ValueError(
                f"{self.folder}: all {len(paths)} checkpoints are damaged; remove the run's folder "
                "and start again"
            )
        return None

    def _cannot_write(self, error: OSError) -> str:
        reason = f"checkpoint not written ({error.strerror or error})"
        paths = self.paths()
        if not paths:
            return f"{reason}; there is none before it"
        return f"{reason}; resume from that of step {_step(paths[-1])} when this is mended"


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _check_whole(state: dict[str, Any]) -> None:
    """Check that what coming steps depend on is there, and finite."""
    for name, kind in (("objectives", dict), ("optimizer", dict), ("best", dict), ("step", int)):
        if not isinstance(state.get(name), kind):
            raise ValueError(f"lacks {name}")
    for name, tensor in _tensors(state, ""):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors in a nested state, by name."""
    if isinstance(value, Tensor):
        yield name.removeprefix("."), value
    elif isinstance(value, dict):
        for key, inside in value.items():
            yield from _tensors(inside, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, inside in enumerate(value):
            yield from _tensors(inside, f"{name}.{index}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__
