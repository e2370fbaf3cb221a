"""Maps computed part by part into a buffer, so that memory stays within a bound.

A part is a window with all channels, or a block of channels of all pixels, depending on which of
the two an upsampler computes bit by bit as in the whole map (:attr:`Upsampler.exact_parts`).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from upfeat import machine
from upfeat.machine import readable
from upfeat.operator_checks import FLOATS
from upfeat.tensor_checks import all_finite, check_not_too_small, largest_magnitude
from upfeat.types import Size, Window, times
from upfeat.upsamplers import JBUStack, Kernels, Upsampler
from upfeat.upsamplers.checks import check_apart, overlaps_itself
from upfeat.upsamplers.head import Head, add_offset, apply_head
from upfeat.upsamplers.maps import WHOLE, Map, windows
from upfeat.upsamplers.smoothing import KEPT, SIDE

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROWS = (512, 256, 128, 64)
"""Heights in pixels of full-width strips, tried first: a file stores adjacent rows together."""
_SIDES = (256, 128, 64, 32)
"""Sides in pixels of square windows, tried if no strip fits."""
_BLOCKS = (256, 64, 16, 4)
"""Numbers of channels to try; 4 at least, since PyTorch sums three and fewer in another order."""

_KEPT_WHOLE = 200
"""Measured bytes per pixel of an image's weights, if they are computed for all pixels at once."""
_COPIES = 4
"""Measured number of maps of all cells at once, if weights are computed for all pixels at once."""
_KEPT_BLOCKS = 24
"""Measured bytes per pixel that are kept while blocks of channels are computed."""
_FIXED = 55 * 10**6
"""Measured bytes that the libraries keep whatever the image's size."""
_STAGES = 280 * 10**6
"""Measured bytes of the stages of a JBU stack while a window is computed."""
_QUERIES, _TAPS = 32, 25
"""Usual numbers of channels of queries, and of weights of a pixel."""
_FITTED = 4.5
"""Measured values of each regressor, for each cell, that fits of a regression keep."""
_A_PIXEL = 300
"""Measured bytes per pixel of a window's temporary tensors, without its values."""


class Buffer:
    """Destination of a map: a caller's tensor or array, on any device or in a file."""

    def __init__(self, out: Any, shape: Sequence[int]) -> None:
        """Check that a tensor or array can store the map.

        Args:
            out: a tensor, or a NumPy array such as :class:`numpy.memmap`.
            shape: (B, C, H, W) of the map.

        Raises:
            ValueError: ``out`` has another shape, is not dense and floating point, is read-only,
                requires gradients, has no memory, or several of its elements share memory.
            TypeError: ``out`` is neither a tensor nor an array.
        """
        if not isinstance(out, Tensor | np.ndarray):
            raise TypeError(f"out must be a tensor or a NumPy array, not {type(out).__name__}")
        if tuple(out.shape) != tuple(shape):
            raise ValueError(f"out is {times(out.shape)}; the map is {times(shape)}")
        self.out, self._file = out, None
        if isinstance(out, np.ndarray):
            if not out.flags.writeable:
                raise ValueError("out is read-only; open it for writing, as mode='r+'")
            if out.dtype.kind != "f" or out.dtype.itemsize > 8 or not out.dtype.isnative:
                raise ValueError(f"out is {out.dtype}; give float16, float32 or float64")
            if any(step < 0 for step in out.strides):
                raise ValueError("out is a view that counts backwards; give the array itself")
            self._tensor = torch.from_numpy(np.asarray(out))
            self._file = out.base if isinstance(out.base, mmap.mmap) else None
            # Read-ahead would map pages of up to 2 MB, each for a few values of a window.
            self._advise("MADV_RANDOM")
        else:
            _check_buffer(out)
            self._tensor = out
        self.dtype, self.largest = self._tensor.dtype, 0.0
        if overlaps_itself(self._tensor):
            raise ValueError("out has the same memory for several values; give out.clone()")

    def check_apart(self, sources: Sequence[Tensor]) -> None:
        """Check that no source of the map is in the buffer's memory, as it is read between writes.

        Raises:
            ValueError: a source shares memory with the buffer.
        """
        check_apart(self._tensor, sources)

    def write(self, channels: slice, window: Window, values: Tensor) -> None:
        """Write a part.

        Args:
            channels: channels of the map that the part contains.
            window: pixels of the map that the part contains.
            values: values of the part, (B, number of channels, window.height, window.width).

        Raises:
            ValueError: a value overflows the buffer's data type.
        """
        rows, columns = slice(window.top, window.bottom), slice(window.left, window.right)
        place = self._tensor[:, channels, rows, columns]
        place.copy_(values)
        narrow = torch.finfo(self.dtype).max < torch.finfo(values.dtype).max
        if narrow and self.dtype is torch.float16:
            self.largest = max(self.largest, largest_magnitude(values))
        if narrow and not all_finite(place):
            raise ValueError(f"the map overflows {self.dtype}; use bfloat16 or float32")
        if self._file is not None:
            # Release written pages, which would count as memory of this process.
            with suppress(OSError, ValueError):
                self._file.flush()
            self._advise("MADV_DONTNEED")

    def finish(self) -> None:
        """Check the whole map, after its last part.

        Raises:
            ValueError: the values are too small for float16, which would round them, down to 0.
        """
        self._advise("MADV_NORMAL")
        check_not_too_small("the map's values", self.largest, self.dtype, "use float32")

    def _advise(self, advice: str) -> None:
        """Tell the system how the buffer's file will be used, where it can be told."""
        if self._file is not None and hasattr(mmap, advice):
            with suppress(OSError, ValueError):
                self._file.madvise(getattr(mmap, advice))


def _check_buffer(out: Tensor) -> None:
    """Check that values can be written to a tensor, which :class:`Buffer` describes."""
    if out.dtype not in FLOATS:
        raise ValueError(f"out is {out.dtype}; give float16, bfloat16, float32 or float64")
    if out.layout is not torch.strided:
        raise ValueError(f"out is {out.layout}; give a dense tensor")
    if out.is_meta:
        raise ValueError("out is on the meta device, which stores no values; give another device")
    if out.requires_grad:
        raise ValueError("out requires gradients; give out.detach()")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("out was made in inference mode and can be written only there")


def free_bytes(max_memory: int | None) -> float:
    """Number of bytes that may still be allocated, within the limits of machine and container.

    Args:
        max_memory: most bytes that the process may use; ``None`` for those limits alone.
    """
    free = machine.available_memory()
    known = [math.inf if free is None else 0.9 * free]
    if max_memory is not None:
        known.append(max_memory - (machine.resident_memory() or 0))
    return min(known)


def kept_bytes(upsampler: Upsampler, cells: int, hidden_dim: int = 0) -> float:
    """Estimate the bytes of maps that are kept while windows of a large map are computed.

    Args:
        upsampler: upsampler of the map.
        cells: number of coarse cells.
        hidden_dim: number of channels of early layers; 0 for none.
    """
    if isinstance(upsampler, JBUStack):
        return _STAGES
    coarse = 2 * _QUERIES + _TAPS
    if upsampler.means_halo is None:
        return _FIXED + cells * 4 * coarse
    # The finer grid has 4 cells for each: the network's maps, means and keys, the regressors and
    # what the first step lacks of them, and weights.
    network = 0 if upsampler.embed_dim is None else getattr(upsampler, "width", 0)
    seen = _QUERIES + hidden_dim
    finer = network + 2 * _QUERIES + 2 * seen + _TAPS
    smoothing = _smoothing_bytes(upsampler, SIDE * SIDE // 4)
    return _FIXED + smoothing + cells * 4 * (4 * finer + coarse + (1 + _FITTED) * seen)


def kept_whole_bytes(upsampler: Upsampler, pixels: int, cells: int, channels: int) -> float:
    """Estimate the bytes that are kept of a small map, whose weights are computed all at once."""
    finer = 1 if upsampler.means_halo is None else 4
    smoothing = _smoothing_bytes(upsampler, cells)
    return pixels * _KEPT_WHOLE + cells * finer * 4 * channels * _COPIES + smoothing


def _smoothing_bytes(upsampler: Upsampler, cells: int) -> float:
    """Estimate the bytes of the weights of a smoothing, and of likenesses that they are made of."""
    radius = getattr(upsampler, "smoothing", 0)
    if not radius:
        return 0
    return 3 * 4 * min(4 * cells * (2 * radius + 1) ** 2, KEPT)


def plan_windows(
    upsampler: Upsampler,
    shape: Sequence[int],
    size: Size,
    grid: Sequence[int],
    free: float,
    held: float,
) -> Iterator[Window]:
    """Cut a map into the largest windows that a bound of memory allows.

    Args:
        upsampler: upsampler of the map.
        shape: (B, C, H, W) of the map.
        size: (height, width) of the guidance.
        grid: (D, h, w), channels of early layers and size of the coarse features.
        free: number of bytes that may be allocated.
        held: bytes of the result if it is to be allocated, 0 for a caller's buffer.

    Raises:
        ValueError: even the smallest windows need more; the message names a sufficient bound.
    """
    batch, channels, height, width = shape
    pixels = batch * max(height * width, size[0] * size[1])
    cells = batch * grid[1] * grid[2]
    if pixels <= batch * WHOLE:
        kept = kept_whole_bytes(upsampler, pixels, cells, channels)
    else:
        kept = kept_bytes(upsampler, cells, grid[0])
    needed = math.inf
    for rows, columns in (*((rows, width) for rows in _ROWS), *((side, side) for side in _SIDES)):
        area = batch * min(rows, height) * min(columns, width)
        needed = held + kept + area * (2 * 4 * channels + _A_PIXEL)
        if needed <= free:
            return windows((height, width), rows, columns)
    raise _too_little(shape, free, needed, held)


def plan_blocks(shape: Sequence[int], free: float, held: float) -> Iterator[slice]:
    """Cut a map into the largest blocks of channels that fit; see :func:`plan_windows`."""
    batch, channels, height, width = shape
    pixels = batch * height * width
    needed = math.inf
    for block in _BLOCKS:
        # The block's output, the output of the stage before, and that of one more stage with
        # margins: together about two float32 maps of the block.
        needed = held + pixels * (2 * 4 * min(block, channels) + _KEPT_BLOCKS)
        if needed <= free:
            # The last block is as wide as the others: it overlaps the block before it.
            last = max(channels - block, 0)
            return (slice(at, at + block) for at in (*range(0, last, block), last))
    raise _too_little(shape, free, needed, held)


def _too_little(shape: Sequence[int], free: float, needed: float, held: float) -> ValueError:
    resident = machine.resident_memory() or 0
    advice = "; give a buffer as out=, such as a numpy.memmap, for less" if held else ""
    return ValueError(
        f"max_memory={readable(free + resident)} is too little for a map of {times(shape)}, of "
        f"which {readable(resident)} are held already; the smallest that can work is about "
        f"{readable(1.02 * (needed + resident))}{advice}"
    )


def made_parts(
    upsampler: Upsampler,
    kernels: Kernels,
    mixed: Tensor | Map,
    head: Tensor | None,
    plan: Iterator[Any],
) -> Iterator[tuple[slice, Window, Tensor]]:
    """Compute a map part by part.

    Args:
        upsampler: upsampler of the map.
        kernels: upsampling weights of the image.
        mixed: coarse features after :meth:`Upsampler.mix`.
        head: linear head (K, C), applied before upsampling; ``None`` for none.
        plan: parts to compute: those of :func:`plan_blocks` if :attr:`Upsampler.exact_parts` is
            "channels", and else those of :func:`plan_windows`.

    Yields:
        The channels, the window and the values of each part.
    """
    if upsampler.exact_parts != "channels":
        for window in plan:
            values = upsampler.render(kernels, mixed, head=head, window=window)
            yield slice(None), window, values
        return
    assert isinstance(mixed, Tensor)
    offset = Head(head).constant(upsampler.offset)
    mixed = apply_head(mixed, head)
    for block in plan:
        values = kernels(mixed[:, block].contiguous())
        if offset is not None:
            values = add_offset(values, offset[block])
        yield block, Window(0, 0, *values.shape[2:]), values
