"""Checkpoints: atomic writing, removal of old files, and loading of the newest undamaged file."""

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
    """The checkpoints of a run, in a folder that contains nothing else."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Use a folder, which must exist before a checkpoint is written.

        Args:
            folder: folder of the checkpoints.
            keep: number of newest checkpoints to keep.
        """
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Return the paths of all checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step)

    def write(self, state: dict[str, Any]) -> Path:
        """Write the state after ``state["step"]`` steps, then remove all but the newest ``keep``.

        Raises:
            OSError: writing failed; earlier checkpoints are unchanged.
        """
        path = self.folder / f"step-{state['step']:08d}.ckpt"
        # Serialised in memory, because torch.save reports a full disk as an error in the archive.
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
        """Load the newest undamaged state, with a warning for each damaged file that is skipped.

        A state that contains NaN or infinity counts as damaged. No code in a file is executed.

        Returns:
            The state; ``None`` if there are no checkpoints.

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
    """Check that the entries on which further steps depend exist, and that tensors are finite.

    Raises:
        ValueError: an entry is missing, or a tensor contains NaN or infinity.
    """
    for name, kind in (("objectives", dict), ("optimizer", dict), ("best", dict), ("step", int)):
        if not isinstance(state.get(name), kind):
            raise ValueError(f"lacks {name}")
    for name, tensor in _tensors(state, ""):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a nested state with their names."""
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
