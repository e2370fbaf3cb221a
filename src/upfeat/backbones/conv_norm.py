"""Convolution and batch normalisation, computed as one layer where only features are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.machine import exact_dtype
from upfeat.transforms import channels_last, is_plain, is_transformed


class _Folded(NamedTuple):
    """A convolution and its normalisation as one layer."""

    layers: list[Tensor]
    """Weights and statistics of both, of which ``weight`` and ``bias`` were made."""
    weight: Tensor
    """(C_out, C_in, k, k), channels last."""
    bias: Tensor
    """(C_out,)."""


class _Packed(NamedTuple):
    """Weights of a convolution in oneDNN's order."""

    weight: Tensor
    """The weights in their ordinary order."""
    reordered: Tensor
    """Best for the first inputs; for inputs of another shape, oneDNN may reorder them again."""


class ConvNorm(nn.Sequential):
    """Convolution, batch normalisation and, unless it is a projection, ReLU6.

    At stride 2, even sides are padded by one pixel more after than before, as in the training of
    the weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        activate: bool = True,
    ) -> None:
        """Build the layers; arguments as in ``nn.Conv2d``."""
        layers: list[nn.Module] = [
            nn.Conv2d(
                in_channels, out_channels, kernel_size, stride=stride, groups=groups, bias=False
            ),
            nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01),
        ]
        super().__init__(*layers, *([nn.ReLU6()] if activate else []))
        self.kernel_size = kernel_size
        self.stride = stride
        self._kept: _Folded | None = None
        self._packed: _Packed | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files contain the layers only: what is kept is made from them."""
        return {**self.__dict__, "_kept": None, "_packed": None}

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, ⌈H/stride⌉, ⌈W/stride⌉)."""
        if self._can_fold(input):
            return self._folded(input)
        if self.kernel_size > 1:
            input = F.pad(input, [*self._padding(input.shape[-1]), *self._padding(input.shape[-2])])
        return super().forward(input)

    def _can_fold(self, input: Tensor) -> bool:
        """Return whether the layers need not run one by one: no gradients, statistics or hooks."""
        if self.training or torch.compiler.is_compiling() or is_transformed(input):
            return False
        watched = torch.is_grad_enabled() and (
            input.requires_grad or any(one.requires_grad for one in self.parameters())
        )
        hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in self)
        return not watched and not hooked

    def _folded(self, input: Tensor) -> Tensor:
        """Apply the layers as one convolution that does not copy its input, twice as fast on a CPU.

        The result differs from the layers' by rounding only, and by less than the layers' own
        rounding error: the folded weights are computed in float64.
        """
        conv = self[0]
        assert isinstance(conv, nn.Conv2d)
        weight, bias = self._fold_if_changed()
        border, both, uneven = self._borders(input)
        if border is not None:
            input = F.pad(input, border)
        sizes = both, [self.stride, self.stride], list(conv.dilation), conv.groups
        if packs(input):
            packed = self._packed  # another thread may replace it
            if packed is None or packed.weight is not weight:
                shape = list(input.shape)
                reordered = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, shape)
                self._packed = packed = _Packed(weight, reordered)
            after = ("hardtanh", [0.0, 6.0], "") if len(self) > 2 else ("none", [], "")
            arguments = packed.reordered, bias, *sizes, *after
            out = torch.ops.mkldnn._convolution_pointwise.default(input, *arguments)
        else:
            out = F.conv2d(input, weight, bias, sizes[1], both, conv.dilation, conv.groups)
            out = out.clamp_(0, 6) if len(self) > 2 else out
        # out: (B, C_out, ⌈H/stride⌉, ⌈W/stride⌉), plus 1 along uneven axes
        return out[:, :, int(uneven[0]) :, int(uneven[1]) :] if any(uneven) else out

    def _borders(self, input: Tensor) -> tuple[list[int] | None, list[int], list[bool]]:
        """Choose the padding of an input.

        Returns:
            Padding to apply in a copy of the input, or ``None``; padding (H, W) that the
            convolution applies itself; and whether to drop the first output along H and W.
        """
        pads = [self._padding(length) for length in input.shape[-2:]]
        conv = self[0]
        assert isinstance(conv, nn.Conv2d)
        if conv.groups == 1 and self.kernel_size > 1:
            # If the stem's convolution pads, the order of its sums depends on the image's size.
            return [*pads[1], *pads[0]], [0, 0], [False, False]
        # A convolution pads both ends equally. One stride more at both ends and the first output
        # dropped equal one pixel more after than before.
        uneven = [before != after for before, after in pads]
        both = [before + self.stride * more for (before, _), more in zip(pads, uneven, strict=True)]
        return None, both, uneven

    def _fold_if_changed(self) -> tuple[Tensor, Tensor]:
        """Return :meth:`_fold`'s result; on a CPU, the last one while the layers have its values.

        Values are compared, since not every change of a tensor can be seen from the tensor itself
        (``parameter.data.mul_(…)``). This takes a fraction of the time of folding.
        """
        conv, norm = self[0], self[1]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        layers = [conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var]
        if layers[0].device.type != "cpu" or not is_plain(layers[0]):  # or would wait for a GPU
            return self._fold(*layers)
        kept = self._kept  # another thread may replace it
        if kept is None or not all(map(_are_equal, kept.layers, layers)):
            copies = [one.detach().clone() for one in layers]
            self._kept = kept = _Folded(copies, *self._fold(*copies))
        return kept.weight, kept.bias

    def _fold(
        self, weight: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return weight, channels last, and bias of convolution and normalisation as one layer."""
        norm = self[1]
        assert isinstance(norm, nn.BatchNorm2d)
        dtype, device = weight.dtype, weight.device
        exact = exact_dtype(device)
        scale = gain.to(exact) * torch.rsqrt(variance.to(exact) + norm.eps)
        folded = (weight.to(exact) * scale[:, None, None, None]).to(dtype)
        bias = (shift.to(exact) - mean.to(exact) * scale).to(dtype)
        return channels_last(folded), bias

    def _padding(self, length: int) -> tuple[int, int]:
        steps = -(-length // self.stride)
        total = max((steps - 1) * self.stride + self.kernel_size - length, 0)
        return total // 2, total - total // 2


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one, other)


def packs(input: Tensor) -> bool:
    """Return whether oneDNN's fused convolution can be used for an input.

    The operator is an internal one of PyTorch's compiler for CPUs. Where it is missing or returns
    unexpected values, plain convolutions are used; as they are under autocast, for tracers and
    counters of operations, which do not know it, and for images with NaN, which its ReLU6 loses.
    """
    return (
        input.dtype is torch.float32
        and input.device.type == "cpu"
        and not _contains_nan.get()
        and not torch.is_autocast_enabled("cpu")
        and is_plain(input)
        and _has_fused()
    )


_contains_nan: ContextVar[bool] = ContextVar("contains_nan", default=False)


def watching_for_nan(image: Tensor) -> AbstractContextManager[None]:
    """Tell the layers inside whether NaN or infinity of the image may reach them."""
    # The compiler fuses layers by itself, and cannot trace the variable.
    return nullcontext() if torch.compiler.is_compiling() else _watching(image)


@contextmanager
def _watching(image: Tensor) -> Iterator[None]:
    token = _contains_nan.set(packs(image) and not bool(image.sum().isfinite()))
    try:
        yield
    finally:
        _contains_nan.reset(token)


@cache
def _has_fused() -> bool:
    try:
        with torch.inference_mode():
            x = channels_last(torch.linspace(-9, 9, 2 * 5 * 5).view(1, 2, 5, 5))
            weight, bias = channels_last(torch.ones(3, 2, 1, 1)), torch.ones(3)
            sizes = [0, 0], [1, 1], [1, 1], 1
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, list(x.shape))
            out = torch.ops.mkldnn._convolution_pointwise(
                x, packed, bias, *sizes, "hardtanh", [0.0, 6.0], ""
            )
            return torch.allclose(out, F.conv2d(x, weight, bias).clamp(0, 6), atol=1e-4)
    except (AttributeError, RuntimeError, TypeError):
        return False
