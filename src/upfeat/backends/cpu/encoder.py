"""Layers of convolutional encoders in the compiled library: inference only.

A layer reads and writes each pixel once: the norm and activation before a convolution are applied
when pixels are read, and bias, residual and the sums for the next norm when they are written. 3×3
kernels with many channels use Winograd's minimal filtering, with 36 multiplications in place of 144
for 4×4 outputs, or 16 in place of 36 for 2×2 outputs with AMX.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from upfeat.backends.cpu.library import LAYER_ARRAYS, Layer, call, chosen_isa

_LANES = 16
"""Numbers of channels are padded to a multiple of this, the lanes of the widest vectors."""


@dataclass(frozen=True)
class Before:
    """Steps applied to pixels before a convolution, in the order of the fields."""

    rotate: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of the angles of rows (H, 2, C) and of columns (W, 2, C), see
    :func:`turns`. A pixel's angles are the sum of both; channels i and i + ``pair`` of each block
    of 2·``pair`` are rotated."""
    pair: int = 0
    scale: Tensor | None = None
    """(B, C), factor of each channel; given together with ``shift``."""
    shift: Tensor | None = None
    """(B, C), added to each channel after ``scale``."""
    sums: Sums | None = None
    """Sums of the input, for a group norm in place of ``scale`` and ``shift``."""
    gain: Tensor | None = None
    """(C,), weights of the group norm."""
    offset: Tensor | None = None
    """(C,), biases of the group norm."""
    sum_epsilon: float = 0.0
    """Number that is added to the variances of the group norm."""
    silu: bool = False
    relu: bool = False
    unit: float | None = None
    """Divide by √(mean of squares over channels + ``unit``); ``None`` for no division."""

    def describe(self, layer: Layer, channels: int) -> None:
        """Write these steps into the library's description of a layer of ``channels`` inputs."""
        layer.inputs = channels
        layer.activation, layer.pair = 2 if self.relu else int(self.silu), self.pair
        layer.unit, layer.epsilon = int(self.unit is not None), self.unit or 0.0
        if self.rotate is not None:
            for name, table in zip(("rows", "columns"), self.rotate, strict=True):
                _point(layer, f"rotate_{name}", table)
        if self.scale is not None and self.shift is not None:
            _point(layer, "scale", _padded(self.scale))
            _point(layer, "shift", _padded(self.shift))
            layer.in_pitch = -(-channels // _LANES) * _LANES
        if self.sums is not None:
            _point(layer, "sums", self.sums.values.contiguous())
            layer.sum_groups, layer.sum_count = self.sums.values.shape[1], self.sums.count
            layer.sum_epsilon = self.sum_epsilon
            for name, array in (("gain", self.gain), ("offset", self.offset)):
                if array is not None:
                    _point(layer, name, array.detach().float().contiguous())


def turns(angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute :attr:`Before.rotate` from angles of rows (H, C) and of columns (W, C)."""
    rows, columns = (
        torch.stack([each.cos(), each.sin()], dim=1).float().contiguous() for each in angles
    )
    return rows, columns


@dataclass(frozen=True)
class Sums:
    """Sums of an output and of its squares over groups of channels, for the next group norm."""

    values: Tensor
    """(B, groups, 2), float64."""
    count: int
    """Number of values in each sum."""
    channels: int

    def norm(
        self, weight: Tensor | None, bias: Tensor | None, epsilon: float, *, silu: bool = False
    ) -> Before:
        """Return the group norm as steps before a layer, which computes it from the sums."""
        return Before(sums=self, gain=weight, offset=bias, sum_epsilon=epsilon, silu=silu)

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
    """Apply a convolution that keeps the size, with steps before it and a residual after it.

    Args:
        x: (B, I, H, W), float32 or half precision; fastest with channels last.
        weight: (O, I, k, k), k 1 or 3; or (O, I).
        bias: (O,), or ``None``.
        before: steps applied to ``x`` before the convolution.
        residual: (B, O, H, W), added to the result; ``None`` for nothing.
        reflect: whether a 3×3 kernel reflects the borders; otherwise they are padded with 0.
        groups: number of groups of channels to sum the result over; 0 for no sums.
        out: (B, O, H, W) to write to; may be ``residual``, or ``x`` if k is 1; ``None`` for a new
            tensor, channels last.

    Returns:
        The output, and its sums or ``None``.
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
    if bias is not None:
        _point(description, "bias", _padded(bias))
    description.outputs = outputs
    description.pitch = -(-outputs // _LANES) * _LANES
    description.kernel, description.winograd = kernel, int(kernel == 3 and not windows)
    description.reflect, description.groups = int(reflect), groups
    packed = _pack_if_changed(weight, description)
    _point(description, "packed", packed)
    description.packed_bytes = packed.numel()
    if out is None:
        out = _channels_last(batch, outputs, height, width, x.dtype)
    values = x.new_empty(batch, groups, 2, dtype=torch.float64) if groups else None
    address = None if values is None else ctypes.c_void_p(values.data_ptr())
    call("upfeat_layer_forward", x, description, residual, out, address)
    if values is None:
        return out, None
    return out, Sums(values, height * width * outputs // groups, outputs)


class _Packed(NamedTuple):
    """A layer's packed weights, and what they were packed from and for."""

    weight: Tensor
    kind: tuple[int, int, int]
    packed: Tensor


_PACKED = WeakTensorKeyDictionary()
"""The last :class:`_Packed` of each parameter."""


def _pack_if_changed(weight: Tensor, description: Layer) -> Tensor:
    """Pack the weights of a layer, or return those of the last call if the values are the same.

    Values are compared, since not every change of a tensor can be seen from the tensor itself
    (``parameter.data.mul_(…)``). This takes a fraction of the time of packing.
    """
    if not isinstance(weight, nn.Parameter):  # made for one call
        return _pack(weight, description)
    kind = (chosen_isa(), description.inputs, description.winograd)
    kept = _PACKED.get(weight)
    if kept is None or kept.kind != kind or not _are_equal(kept.weight, weight):
        copy = weight.detach().clone()
        _PACKED[weight] = kept = _Packed(copy, kind, _pack(copy, description))
    return kept.packed


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one, other)


def _pack(weight: Tensor, description: Layer) -> Tensor:
    matrix = weight.permute(2, 3, 1, 0) if description.kernel == 3 else weight.flatten(1).mT
    _point(description, "weight", _padded(matrix.reshape(-1, weight.shape[0])))
    size = (ctypes.c_int64 * 1)()
    call("upfeat_layer_pack", description, None, size)
    packed = weight.new_empty(size[0], dtype=torch.uint8)
    call("upfeat_layer_pack", description, ctypes.c_void_p(packed.data_ptr()), size)
    return packed


def pool(x: Tensor, size: tuple[int, int], before: Before | None = None) -> Tensor:
    """Apply ``before`` to ``x``, and average over the cells of a grid; float32, channels last."""
    description = Layer()
    (before or Before()).describe(description, x.shape[1])
    out = _channels_last(x.shape[0], x.shape[1], size[0], size[1], torch.float32)
    call("upfeat_layer_pool", x, description, out)
    return out


def apply(x: Tensor, before: Before) -> Tensor:
    """Apply ``before`` to ``x`` in place, and return ``x``."""
    description = Layer()
    before.describe(description, x.shape[1])
    call("upfeat_layer_prepare", x, description, x)
    return x


def match_patterns(features: Tensor, patterns: Tensor) -> Tensor:
    """Compute AnyUp's :class:`~upfeat.upsamplers.anyup.FeatureBasis` of features.

    Args:
        features: (B, C, h, w), any C.
        patterns: (K, 1, side, side), the learned patterns.

    Returns:
        (B, K, h, w) less 1 / K, float32, channels last.
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
    made = torch.empty(batch, height, width, channels, dtype=dtype, device="cpu")
    return made.permute(0, 3, 1, 2)


def _padded(x: Tensor) -> Tensor:
    """Pad the last axis with zeros to whole vectors, as dense float32."""
    short = -x.shape[-1] % _LANES
    return (F.pad(x, (0, short)) if short else x).float().contiguous()


def _point(description: Layer, name: str, array: Tensor) -> None:
    assert name in LAYER_ARRAYS
    setattr(description, name, array.data_ptr())
    if not hasattr(description, "keep"):
        description.keep = []
    description.keep.append(array)
