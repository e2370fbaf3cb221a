"""Launching of the Triton kernels: choice of the kernel, number of programs, further arguments.

Triton is imported when the first kernel is launched, so ``import upfeat`` never imports it.
"""

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from upfeat.backends.triton.tables import (
    Axis,
    Blocks,
    audience,
    blocks,
    on_device,
    power_of_two,
    reach,
)

INT32_REACH = 2**31
OPTIONS = {"enable_fp_fusion": True}
"""Options of every kernel: multiply-adds in one instruction, which Triton 3.10 no longer makes by
default."""


def interpreted() -> bool:
    """Return whether Triton's interpreter is on, which runs kernels on the CPU for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def in_half(source: Tensor, weights: Tensor) -> bool:
    """Return whether products run in half precision: if both tensors have the same half dtype."""
    return source.dtype == weights.dtype != torch.float32


def fold(weights: Tensor, source: Tensor, axes: tuple[Axis, Axis]) -> Tensor:
    """Fold weights over taps to weights over source positions, (B, T, H, W) -> (B, I, J, H, W)."""
    half = in_half(source, weights)
    in_groups = not half and all(axis.factor for axis in axes)
    # A pixel's positions are contiguous in memory, except for the kernels whose threads run along
    # pixels: the groups kernels on planar features.
    window = new_window(
        weights,
        axes,
        source.dtype if half else torch.float32,
        pixels_first=not in_groups or source.stride(1) == 1,
    )
    run_folding("fold", weights, window, axes)
    return window


def run_folding(kernel: str, read: Tensor, written: Tensor, axes: tuple[Axis, Axis]) -> None:
    """Launch ``kernel``, "fold" or "unfold", from ``read`` to ``written``."""
    rows, columns = (on_device(axis, read.device) for axis in axes)
    block = blocks(kernel, _capability(read))
    batch, height, width = read.shape[0], rows.target, columns.target
    assert rows.coefficients is not None
    assert columns.coefficients is not None
    pitch = power_of_two(columns.window)
    # The block in the table is for windows of up to 8 columns; wider windows allow fewer pixels.
    pixels = min(block.columns, max(block.columns * 8 // pitch, 16))
    programs = batch * -(-height * width // pixels)
    with _device_of(read):
        getattr(_kernels("window"), kernel)[(programs,)](
            read, written, rows.coefficients, columns.coefficients, height * width, width,
            *read.stride(), *written.stride(),
            K=rows.coefficients.shape[1], I=rows.window, J=columns.window,
            J2=pitch, BLOCK=pixels,
            INDEX=_index_type(read, written), num_warps=block.warps,
            **OPTIONS,
        )  # fmt: skip


def gather(source: Tensor, window: Tensor, out: Tensor, axes: tuple[Axis, Axis]) -> None:
    """Out (B, C, H, W) = Σ window (B, I, J, H, W) · source (B, C, h, w)."""
    tensors, half = (source, window, out), in_half(source, window)
    rows, columns = axes
    if not half and rows.factor and columns.factor:
        _launch_groups("gather_groups", tensors, out.shape[2:], axes)
        return
    block = blocks("gather_tiles", _capability(out), _precision(half), out.shape[1])
    pitch = power_of_two(reach(columns, block.columns))
    rows, columns = (on_device(axis, out.device) for axis in axes)
    _launch_tiles("gather_tiles", tensors, (rows.start, columns.start), axes, block, pitch, half)


def scatter(grad: Tensor, window: Tensor, out: Tensor, axes: tuple[Axis, Axis]) -> None:
    """Adjoint of :func:`gather` with respect to its source; ``out`` is (B, C, h, w)."""
    tensors, half = (grad, window, out), in_half(grad, window)
    rows, columns = axes
    if not half and rows.factor and columns.factor:
        _launch_groups("scatter_groups", tensors, out.shape[2:], axes)
        return
    block = blocks("scatter_tiles", _capability(out), _precision(half), out.shape[1])
    pitch = power_of_two(audience(columns, block.columns))
    rows, columns = (on_device(axis, out.device) for axis in axes)
    tables = (rows.start, columns.start, rows.begin, rows.end, columns.begin, columns.end)
    _launch_tiles("scatter_tiles", tensors, tables, axes, block, pitch, half)


def outer(grad: Tensor, source: Tensor, out: Tensor, axes: tuple[Axis, Axis], half: bool) -> None:
    """Gradient of the window: ``out`` (B, I, J, H, W) = Σ_c grad · source."""
    block = blocks("outer_tiles", _capability(out), _precision(half), grad.shape[1])
    pitch = power_of_two(reach(axes[1], block.columns))
    rows, columns = (on_device(axis, out.device) for axis in axes)
    tensors = grad, source, out
    _launch_tiles("outer_tiles", tensors, (rows.start, columns.start), axes, block, pitch, half)


def _launch_groups(
    kernel: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    size: torch.Size,
    axes: tuple[Axis, Axis],
) -> None:
    rows, columns = axes
    out = tensors[2]
    batch, channels = out.shape[:2]
    kind = "channels_last" if tensors[0].stride(1) == 1 else "planar"
    block = blocks(kernel, _capability(out), kind, channels)
    tiles = -(-size[0] // (2 * block.rows)) * -(-size[1] // (2 * block.columns))
    programs = batch * tiles * -(-channels // block.channels)
    with _device_of(out):
        getattr(_kernels("window"), kernel)[(programs,)](
            *tensors, rows.source, columns.source, rows.target, columns.target, channels,
            rows.origin, columns.origin, *(n for tensor in tensors for n in tensor.stride()),
            I=rows.window, J=columns.window, FY=rows.factor, FX=columns.factor,
            ROWS=block.rows, COLUMNS=block.columns, BC=block.channels,
            INDEX=_index_type(*tensors), num_warps=block.warps, num_stages=block.stages,
            **OPTIONS,
        )  # fmt: skip


def _launch_tiles(
    kernel: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, ...],
    axes: tuple[Axis, Axis],
    block: Blocks,
    pitch: int,
    half: bool,
) -> None:
    rows, columns = axes
    out = tensors[2]
    down, across = out.shape[-2:]
    channels = tensors[0].shape[1]
    tiles = -(-down // block.rows) * -(-across // block.columns)
    per_tile = 1 if kernel == "outer_tiles" else -(-channels // block.channels)
    with _device_of(out):
        getattr(_kernels("window"), kernel)[(out.shape[0] * tiles * per_tile,)](
            *tensors, *tables, rows.source, columns.source, rows.target, columns.target, channels,
            *(n for tensor in tensors for n in tensor.stride()),
            I=rows.window, J=columns.window, PITCH=pitch,
            COMPUTE=_product_type(tensors[0].dtype if half else torch.float32),
            ROWS=block.rows, COLUMNS=block.columns, BC=block.channels, BK=block.inner,
            INDEX=_index_type(*tensors), num_warps=block.warps, num_stages=block.stages,
            **OPTIONS,
        )  # fmt: skip


def range_kernel(
    kernel: str, radius: int, keys: Tensor, scalars: tuple[Tensor, Tensor], *tensors: Tensor
) -> Tensor:
    """Run ``range_forward`` or ``range_backward``.

    Args:
        kernel: name of the kernel.
        radius: radius r of the windows.
        keys: (B, D, H, W), not empty.
        scalars: temperature and sigma_spatial, float32 on the device.
        tensors: the other tensors that the kernel reads and writes, each (B, T, H, W).

    Returns:
        (programs, 2) float32: each program's term of the gradients of the scalars, which only
        ``range_backward`` writes.
    """
    batch, depth, height, width = keys.shape
    block = blocks(kernel, _capability(keys))
    side = power_of_two(2 * radius + 2)
    strip = max(block.columns * 64 // side**2, 16)  # the block in the table is for radius 3
    programs = batch * -(-height // 2) * -(-width // strip)
    partial = torch.empty(programs, 2, device=keys.device)
    also = (partial,) if kernel == "range_backward" else ()
    strides = (n for tensor in (keys, *tensors) for n in tensor.stride())
    with _device_of(keys):
        getattr(_kernels("range"), kernel)[(programs,)](
            keys, *scalars, *tensors, *also, depth, height, width, *strides,
            RADIUS=radius, SIDE=side, BLOCK=strip,
            INDEX=_index_type(keys, *tensors), num_warps=block.warps, num_stages=block.stages,
            **OPTIONS,
        )  # fmt: skip
    return partial


def new_window(
    like: Tensor, axes: tuple[Axis, Axis], dtype: torch.dtype, pixels_first: bool
) -> Tensor:
    """Allocate a window (B, I, J, H, W), in memory (B, H, W, I, padded J) if ``pixels_first``."""
    rows, columns = axes
    batch, size = like.shape[0], (rows.target, columns.target)
    if not pixels_first:
        return like.new_empty(batch, rows.window, columns.window, *size, dtype=dtype)
    # J is rounded up to a power of two, so that every row of a window starts on a memory sector.
    pitch = power_of_two(columns.window)
    whole = like.new_empty(batch, *size, rows.window, pitch, dtype=dtype)
    return whole[..., : columns.window].permute(0, 3, 4, 1, 2)


def _precision(half: bool) -> str:
    return "half" if half else "single"


def _index_type(*tensors: Tensor) -> Any:
    """Triton's int64 if an offset inside one batch entry may need it, otherwise int32."""
    spans = (
        sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
        for t in tensors
    )
    name = "int64" if max(spans) >= INT32_REACH else "int32"
    return getattr(importlib.import_module("triton.language"), name)


def _product_type(dtype: torch.dtype) -> Any:
    """Triton's type in which ``tl.dot`` multiplies."""
    if dtype == torch.bfloat16 and interpreted():
        dtype = torch.float32  # the interpreter multiplies bfloat16's bits as integers
    return getattr(importlib.import_module("triton.language"), str(dtype).removeprefix("torch."))


def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"upfeat.backends.triton.{module}")


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Context in which the tensor's device is current, as kernels start on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _capability(tensor: Tensor) -> int:
    """Compute capability of the tensor's device, as 80 or 90; 0 on the CPU."""
    return _device_capability(tensor.device.index) if tensor.is_cuda else 0


@lru_cache
def _device_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
