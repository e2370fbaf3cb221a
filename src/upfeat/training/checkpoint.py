"""Checkpoints: atomic writing, removal of old files, and loading of the newest undamaged file."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfeat.storage import write_bytes
from upfeat.upsamplers.tensor_files import UNREADABLE, check_archive

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
            with suppress(OSError):  # one that is open elsewhere can stay until the next time
                old.unlink(missing_ok=True)
        return path

    def newest(
        self, check: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any] | None:
        """Load the newest undamaged state, with a warning for each damaged file that is skipped.

        A state that contains NaN or infinity counts as damaged. No code in a file is executed.

        Args:
            check: function that raises ``ValueError`` for a state that does not fit the run, which
                then counts as damaged; ``None`` for none.

        Returns:
            The state; ``None`` if there are no checkpoints.

        Raises:
            ValueError: there are checkpoints, and all are damaged.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                check_archive(path)
                state = torch.load(path, map_location="cpu", weights_only=True)
                if not isinstance(state, dict) or state.get("format") != FORMAT:
                    raise ValueError("another format")
                _check_whole(state)
                if check is not None:
                    check(state)
                return state
            except pickle.UnpicklingError:
                reason = "not a checkpoint"
            except UNREADABLE as error:
                reason = _first_line(error).removeprefix(f"{path}: damaged: ")
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
    kinds = {"objectives": dict, "optimizer": dict, "best": dict, "step": int, "stale": int}
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"lacks {name}")
    for name, tensor in _tensors(state, ""):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity")


def check_weights(label: str, weights: object, expected: Mapping[str, Tensor]) -> None:
    """Check that a state's weights have the names and shapes of a module's.

    Args:
        label: name of the weights in the state, for error messages.
        weights: tensors by name, if the state is undamaged.
        expected: the module's ``state_dict()``.

    Raises:
        ValueError: they are no weights, or one is missing, unknown or of another shape.
    """
    found = weights if isinstance(weights, dict) else {}
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        if not isinstance(found.get(name), Tensor):
            raise ValueError(f"{label} lacks {name}")
        if tuple(found[name].shape) != shape:
            raise ValueError(f"{label}.{name} is {tuple(found[name].shape)}, not {shape}")
    unknown = [str(name) for name in found if name not in expected]
    if unknown:
        raise ValueError(f"{label} holds {unknown[0]}, which this run does not have")


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
