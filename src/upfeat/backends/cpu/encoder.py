"""Layers of convolutional encoders through the compiled library: inference only.

A layer reads pixels once and writes them once: the norm and activation before a convolution are
applied on the way in, bias, residual and the sums for the next norm on the way out. 3×3 kernels of
many channels go through Winograd's minimal filtering, 16 or 24 multiplications in place of 36.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backends.cpu.library import LAYER_ARRAYS, Layer, call

_LANES = 16
"""Channels are padded to a multiple of it: the widest vectors."""


@dataclass(frozen=True)
class Before:
    """Steps applied to pixels before a convolution, in this order."""

    rotate: tuple[Tensor, Tensor] | None = None
    """Angles of rows (H, C) and of columns (W, C), which add up: channel i turns against i + pair,
    in blocks of 2·pair."""
    pair: int = 0
    scale: Tensor | None = None
    """(B, C), with the next."""
    shift: Tensor | None = None
    silu: bool = False
    unit: float | None = None
    """Divide by √(mean of squares + this)."""

    def describe(self, layer: Layer, channels: int) -> None:
        """Fill in the library's description."""
        layer.inputs = channels
        layer.silu, layer.pair = int(self.silu), self.pair
        layer.unit, layer.epsilon = int(self.unit is not None), self.unit or 0.0
        if self.rotate is not None:
            for name, angles in zip(("rows", "columns"), self.rotate, strict=True):
                table = torch.stack([angles.cos(), angles.sin()], dim=1)
                _point(layer, f"rotate_{name}", table.float().contiguous())
        if self.scale is not None and self.shift is not None:
            _point(layer, "scale", _padded(self.scale))
            _point(layer, "shift", _padded(self.shift))
            layer.in_pitch = -(-channels // _LANES) * _LANES


@dataclass(frozen=True)
class Sums:
    """Sums of an output and of its squares over groups of channels, for the norm that follows."""

    values: Tensor
    """(B, groups, 2), float64."""
    count: int
    """The count of numbers that each is made of."""
    channels: int

    def norm(self, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Before:
        """A group norm as a scale and a shift of each channel."""
        mean, square = (self.values / self.count).unbind(2)
        scale = (square - mean.square()).clamp(min=0).add(epsilon).rsqrt()
        repeats = self.channels // self.values.shape[1]
        # Not by repeat_interleave, which takes 0.2 ms for as few numbers.
        scale, mean = (
            each[:, :, None].expand(-1, -1, repeats).flatten(1) for each in (scale, mean)
        )
        if weight is not None:
            scale = scale * weight.double()
        shift = -mean * scale
        if bias is not None:
            shift = shift + bias.double()
        return Before(scale=scale.float(), shift=shift.float())

    def part(self, start: int, stop: int) -> Sums:
        """Select the sums of channels ``start`` to ``stop``, which are whole groups."""
        size = self.channels // self.values.shape[1]
        return Sums(self.values[:, start // size : stop // size], self.count, stop - start)


def layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    before: Before | None = None,
    residual: Tensor | None = None,
    reflect: bool = True,
    groups: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Sums | None]:
    """A convolution that keeps the size, and what stands before and behind it.

    Args:
        x: (B, I, H, W), float32 or half, best channels last.
        weight: (O, I, k, k), k 1 or 3; or (O, I).
        bias: (O,).
        before: what is done to ``x`` first.
        residual: (B, O, H, W), added.
        reflect: borders of a 3×3 kernel; or else zeros.
        groups: of the sums; 0 for none.
        out: (B, O, H, W); may be the residual, or ``x`` where k is 1; ``None`` for a new one,
            channels last.

    Returns:
        The output, and its sums.
    """
    outputs, kernel = weight.shape[0], weight.shape[-1] if weight.dim() == 4 else 1
    batch, channels, height, width = x.shape
    description = Layer()
    before = before or Before()
    windows = kernel == 3 and before == Before() and channels < _LANES
    if windows:
        description.inputs = 9 * channels
    else:
        before.describe(description, channels)
    matrix = weight if kernel == 1 else weight.permute(0, 2, 3, 1)
    _point(description, "weight", _padded(matrix.reshape(outputs, -1).mT))
    if bias is not None:
        _point(description, "bias", _padded(bias))
    description.outputs = outputs
    description.pitch = -(-outputs // _LANES) * _LANES
    description.kernel, description.winograd = kernel, int(kernel == 3 and not windows)
    description.reflect, description.groups = int(reflect), groups
    if out is None:
        out = _channels_last(batch, outputs, height, width, x.dtype)
    values = torch.empty(batch, groups, 2, dtype=torch.float64) if groups else None
    address = None if values is None else ctypes.c_void_p(values.data_ptr())
    call("upfeat_layer_forward", x, description, residual, out, address)
    if values is None:
        return out, None
    return out, Sums(values, height * width * outputs // groups, outputs)


def pool(x: Tensor, size: tuple[int, int], before: Before | None = None) -> Tensor:
    """Means over the cells of a grid of what ``before`` makes of ``x``, float32, channels last."""
    description = Layer()
    (before or Before()).describe(description, x.shape[1])
    out = _channels_last(x.shape[0], x.shape[1], size[0], size[1], torch.float32)
    call("upfeat_layer_pool", x, description, out)
    return out


def apply(x: Tensor, before: Before) -> Tensor:
    """Apply ``before`` to ``x``, written over it."""
    description = Layer()
    before.describe(description, x.shape[1])
    call("upfeat_layer_prepare", x, description, x)
    return x


def match_patterns(features: Tensor, patterns: Tensor) -> Tensor:
    """Features in terms of patterns, as AnyUp's keys see them.

    Args:
        features: (B, C, h, w).
        patterns: (K, 1, side, side).

    Returns:
        (B, K, h, w), float32, channels last.
    """
    count, side = patterns.shape[0], patterns.shape[-1]
    matrix = _padded(patterns.reshape(count, -1).mT)
    batch, _, height, width = features.shape
    out = _channels_last(batch, count, height, width, torch.float32)
    address = ctypes.c_void_p(matrix.data_ptr())
    call("upfeat_patterns", features, address, side, matrix.shape[1], out)
    return out


def _channels_last(
    batch: int, channels: int, height: int, width: int, dtype: torch.dtype
) -> Tensor:
    return torch.empty(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)


def _padded(x: Tensor) -> Tensor:
    """The last axis in whole vectors, dense float32."""
    short = -x.shape[-1] % _LANES
    return (F.pad(x, (0, short)) if short else x).float().contiguous()


def _point(description: Layer, name: str, array: Tensor) -> None:
    assert name in LAYER_ARRAYS
    setattr(description, name, array.data_ptr())
    if not hasattr(description, "keep"):
        description.keep = []
    description.keep.append(array)
