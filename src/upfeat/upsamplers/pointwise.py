"""Two 1×1 convolutions with a GELU between them, trained without full-size intermediates.

At an image's own size each intermediate of the plain layers is as large as the result. It leaves
the caches when it is written, and comes back once more for the gradient. Here a run of pixels goes
through the whole network while it is in the caches, and the gradient computes it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    is_functorch_wrapped_tensor,
)
from torch.autograd.function import once_differentiable

# Pixels at a time: 50 channels of them are under a megabyte.
_RUN = 4096


class PointwiseNetwork(nn.Sequential):
    """conv1×1, GELU, Dropout2d, conv1×1, with the hidden width of the output."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Make the layers, with PyTorch's initial weights."""
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1),
            nn.GELU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(out_channels, out_channels, 1),
        )

    def forward(self, input: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        return super().forward(input)

    def in_runs(self, *inputs: Tensor, share: float = 1.0, residual: bool = False) -> Tensor:
        """The same by runs of pixels: float32 on a CPU, differentiable once.

        Args:
            inputs: (B, channels, H, W) each, side by side the input.
            share: factor of the result.
            residual: add the first of the inputs.

        Returns:
            (B, out_channels, H, W).
        """
        first, last = self[0], self[3]
        assert isinstance(first, nn.Conv2d)
        assert isinstance(last, nn.Conv2d)
        # Whole channels are dropped: the same draw as from the map itself, and a factor of the
        # last layer's columns.
        kept = self[2](inputs[0].new_ones(len(inputs[0]), first.out_channels, 1, 1)).flatten(1)
        parameters = first.weight.flatten(1), first.bias, last.weight.flatten(1), last.bias
        return _InRuns.apply(kept, *parameters, share, residual, *inputs)


def can_run_in_runs(*inputs: Tensor) -> bool:
    """Return whether :meth:`PointwiseNetwork.in_runs` is for these, and of use."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return torch.is_grad_enabled() and all(
        x.device.type == "cpu" and x.dtype == torch.float32 and not is_functorch_wrapped_tensor(x)
        for x in inputs
    )


class _InRuns(torch.autograd.Function):
    """share · (W₁·kept·gelu(W₀·x + b₀) + b₁), and the first part of x where it is residual."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        kept, w0, b0, w1, b1, share, residual, *inputs = arguments
        inputs = [x.contiguous() for x in inputs]
        ctx.save_for_backward(kept, w0, b0, w1, *inputs)
        ctx.share, ctx.residual = share, residual
        out = inputs[0].new_empty(len(kept), len(w1), *inputs[0].shape[2:])
        for image, run, parts in _runs(inputs):
            hidden = F.gelu(_hidden(w0, b0, parts))  # (C, pixels)
            target, weight = out.flatten(2)[image, :, run], w1 * kept[image]
            if residual:
                torch.addmm(parts[0], weight, hidden, alpha=share, out=target)
                target += share * b1[:, None]
            else:
                torch.addmm(b1[:, None], weight, hidden, alpha=share, beta=share, out=target)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        kept, w0, b0, w1, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[7:]
        grad = grads[0].contiguous().flatten(2)
        to_inputs = [
            torch.empty_like(x) if n else None for x, n in zip(inputs, needed, strict=True)
        ]
        to_w0, to_w1 = torch.zeros_like(w0), w1.new_zeros(len(kept), *w1.shape)
        to_b0, to_b1 = torch.zeros_like(b0), grad.sum((0, 2)) * ctx.share
        widths = [x.shape[1] for x in inputs]
        own_w1 = (w1 * kept[:, None]) * ctx.share  # (B, C, C)
        for image, run, parts in _runs(inputs):
            hidden, part = _hidden(w0, b0, parts), grad[image, :, run]
            to_w1[image].addmm_(part, F.gelu(hidden).T)
            to_hidden = torch.ops.aten.gelu_backward(own_w1[image].T @ part, hidden)
            to_b0 += to_hidden.sum(1)
            for x, own, weight, to_weight in zip(
                parts, to_inputs, w0.split(widths, 1), to_w0.split(widths, 1), strict=True
            ):
                to_weight.addmm_(to_hidden, x.T)
                if own is not None:
                    target, first = own.flatten(2)[image, :, run], own is to_inputs[0]
                    beta = 1 if first and ctx.residual else 0
                    torch.addmm(part if beta else x, weight.T, to_hidden, beta=beta, out=target)
        to_w1 = (to_w1 * kept[:, None]).sum(0) * ctx.share
        return None, to_w0, to_b0, to_w1, to_b1, None, None, *to_inputs


def _runs(inputs: list[Tensor]) -> Iterator[tuple[int, slice, list[Tensor]]]:
    """Every image's runs of pixels: image, pixels, and each input's (channels, pixels)."""
    flat = [x.flatten(2) for x in inputs]
    for image in range(len(inputs[0])):
        for start in range(0, flat[0].shape[2], _RUN):
            run = slice(start, start + _RUN)
            yield image, run, [x[image, :, run] for x in flat]


def _hidden(weight: Tensor, bias: Tensor, parts: list[Tensor]) -> Tensor:
    """The first layer on inputs side by side, (C, pixels)."""
    out = bias[:, None]
    for x, own in zip(parts, weight.split([len(x) for x in parts], 1), strict=True):
        out = torch.addmm(out, own, x)
    return out
