"""Processing of one item of a set: decoding, computing, writing."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfeat import machine
from upfeat._version import __version__
from upfeat.array_files import create_array
from upfeat.batch.budget import Budget
from upfeat.batch.extraction import Extraction
from upfeat.batch.replicas import Replica
from upfeat.decoding import image_size
from upfeat.failures import failure_reason
from upfeat.features import UpsampledFeatures
from upfeat.lazy_files import FORMAT as LAZY
from upfeat.lazy_files import digest, write_parts
from upfeat.marks import FEATURES, kind_of
from upfeat.outputs import Inputs, check_output, file_digest
from upfeat.storage import write_tensors
from upfeat.tensor_checks import all_finite, check_not_too_small, largest_magnitude

Entry = dict[str, Any]
Task = tuple[Entry, Any]
"""An item's ledger entry, and its content: the bytes of a file, or a frame."""

# Bytes a pixel of the image, its guidance and the maps that the upsampler keeps; measured.
_UPSAMPLING = 70
# Bytes a pixel of the image, and of the guidance as it is written; nothing is upsampled.
_UNUPSAMPLED = 24
_SMALL, _GENEROUS = 1 << 16, 4000
"""Largest image, in pixels, for whose backbone memory is reserved without measuring; and the bytes
a pixel that are reserved, more than any backbone needs."""
_STRIPED = 1 << 26
"""Bytes of a map in float32 above which it is written in strips and never exists as a whole."""
_STRIP = 64
"""Rows of a strip, pixels."""


_OF_THE_NAME = {
    errno.ENAMETOOLONG,
    errno.EILSEQ,
    errno.EINVAL,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
}
"""Errors of writing that are of one item's name, and end no run."""


class Maker:
    """Callable that computes and writes the file of one item at a time."""

    def __init__(
        self,
        replica: Replica,
        extraction: Extraction,
        folder: Path,
        inputs: Inputs,
        *,
        overwrite: bool = False,
        budget: Budget | None = None,
        activations: Callable[[], float] = lambda: 0,
    ) -> None:
        """Keep the model, the settings and the files that must not be overwritten.

        Args:
            replica: a copy of the model, and the lock to hold while it runs.
            extraction: kind and settings of the results.
            folder: folder of the results.
            inputs: files that are read, and must not be overwritten.
            overwrite: replace existing files that are no earlier results.
            budget: memory budget, shared by the makers of a process; ``None`` for no bound.
            activations: function that returns the bytes that the backbone needs for each pixel.
                It is not called for small images: a measurement takes as long as many of them.
        """
        self._model, self._turn = replica
        self._extraction, self._folder = extraction, folder
        self._inputs, self._overwrite = inputs, overwrite
        self._budget, self._activations = budget, activations
        self._weights = digest(self._model.upsampler)

    def __call__(self, task: Task) -> Entry:
        """Make one item and return its ledger entry."""
        entry, content = task
        if "error" in entry:
            return entry
        try:
            if self._budget is None:
                self._make(entry["file"], content)
            else:
                with self._budget.take(self._needed(content)):
                    self._make(entry["file"], content)
        except _WriteError as error:
            # A disk that cannot be written ends the run: the item itself did not fail.
            raise error.reason from None
        except Exception as error:
            reason = failure_reason(error)
            if reason is None:
                raise
            self._discard(self._folder / entry["file"])
            # The key names the image, whose content alone was read.
            reason = reason.removeprefix("image: ")
            return {"key": entry["key"], "sha256": entry["sha256"], "error": reason}
        path = self._folder / entry["file"]
        return entry | {"size": path.stat().st_size, "file_sha256": file_digest(path)}

    def _make(self, name: str, content: Any) -> None:
        x = self._model.preprocess(content, self._extraction.size, **self._extraction.reading)
        path = self._folder / name
        kind = LAZY if self._extraction.kind == "lazy" else FEATURES
        with torch.inference_mode():
            with self._turn:
                lazy = self._model.lazy(x)
                stored = self._map(lazy)
            check_output(path, self._inputs, kind, overwrite=self._overwrite)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._write(path, lazy, stored)
            except OSError as error:
                if error.errno in _OF_THE_NAME:
                    raise
                raise _WriteError(error) from None

    def _discard(self, path: Path) -> None:
        """Remove an earlier result of an item that has failed: it is that of another image."""
        with suppress(OSError):
            if kind_of(path) in (LAZY, FEATURES) and self._inputs.find(path) is None:
                path.unlink()

    def _map(self, lazy: UpsampledFeatures) -> Tensor | None:
        """Compute the map to store, (C, H, W); ``None`` if parts or strips are stored instead."""
        extraction = self._extraction
        dtype = getattr(torch, extraction.dtype)
        if extraction.head is not None:
            head = extraction.head
            weight, bias = head.weight.to(lazy.features), head.bias.to(lazy.features)
            values = lazy.project(weight, bias)[0]
            largest = largest_magnitude(values)
            check_not_too_small("outputs of the head", largest, dtype, "use float32")
            values = values.to(dtype).cpu().contiguous()
            self._check_range(values)
            return values
        if extraction.kind == "lazy":
            return None
        check_not_too_small("features", largest_magnitude(lazy.features), dtype, "use float32")
        if _is_striped(lazy.shape):
            return None
        return lazy.full(dtype)[0].cpu().contiguous()

    def _write(self, path: Path, lazy: UpsampledFeatures, stored: Tensor | None) -> None:
        if self._extraction.kind == "lazy":
            write_parts(path, lazy.parts, weights=self._weights)
            return
        facts = {"format": FEATURES, "upfeat_version": __version__, "kind": self._extraction.kind}
        if stored is not None:
            write_tensors(path, {"features": stored}, facts)
            return
        with self._turn, create_array(path, lazy.shape[1:], self._extraction.dtype, facts) as file:
            for top in range(0, lazy.shape[2], _STRIP):
                rows = min(_STRIP, lazy.shape[2] - top)
                strip = lazy.crop(top, 0, rows, lazy.shape[3])[0]
                strip = strip.to(getattr(torch, self._extraction.dtype)).cpu()
                self._check_range(strip)
                file.write_rows(top, strip.numpy())

    def _check_range(self, values: Tensor) -> None:
        if not all_finite(values):
            raise ValueError(f"the map overflows {self._extraction.dtype}; use float32")

    def _needed(self, content: Any) -> float:
        """Estimate the bytes that an item needs, from the image size in its header; 0 without."""
        own = image_size(content) if isinstance(content, bytes) else content.shape[:2]
        if own is None:
            return 0
        model, extraction = self._model, self._extraction
        height, width = machine.resized((int(own[0]), int(own[1])), extraction.size)
        small = height * width <= _SMALL
        activations = _GENEROUS if small else self._activations()
        decoding = own[0] * own[1] * machine.DECODING
        if extraction.kind == "lazy":
            return max(decoding, height * width * (_UNUPSAMPLED + activations))
        channels = model.embed_dim if extraction.head is None else len(extraction.head.weight)
        rows = min(height, _STRIP) if _is_striped((channels, height, width)) else height
        # 8 bytes a value: the map as computed, and as stored, each at most float32.
        held = rows * width * channels * 8
        return decoding + height * width * (_UPSAMPLING + activations) + held


def _is_striped(shape: tuple[int, ...]) -> bool:
    return 4 * math.prod(shape) > _STRIPED


class _WriteError(Exception):
    """Wrapper of an ``OSError`` that was raised while a result was written."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason
