"""Two 1×1 convolutions with a GELU between them, trained without full-size intermediates.

At the size of the image, each intermediate of the plain layers is as large as the result: it is
written to memory, and read again for the gradient. Here the whole network is applied to one run of
pixels at a time, which stays in the caches, and the gradient recomputes the intermediates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.transforms import is_transforming, recorded_gradients

# Pixels of a run: with 50 channels they take less than a megabyte.
_RUN = 4096


class PointwiseNetwork(nn.Sequential):
    """conv1×1, GELU, Dropout2d, conv1×1, with as many hidden channels as outputs."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Make the layers, with PyTorch's initial weights."""
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1),
            nn.GELU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(out_channels, out_channels, 1),
        )

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layers, (B, in_channels, H, W) -> (B, out_channels, H, W)."""
        return super().forward(input)

    def in_runs(self, *inputs: Tensor, share: float = 1.0, residual: bool = False) -> Tensor:
        """Apply the network by runs of pixels: in float32 on a CPU.

        Args:
            inputs: (B, channels, H, W) each; concatenated over channels they are the input.
            share: factor by which the network's output is multiplied.
            residual: add the first of the inputs to the result.

        Returns:
            (B, out_channels, H, W).
        """
        first, last = self[0], self[3]
        assert isinstance(first, nn.Conv2d)
        assert isinstance(last, nn.Conv2d)
        # Dropout2d drops whole channels, so a 1×1 map makes the same random draw as the full map;
        # the result multiplies the columns of the last layer's weight.
        kept = self[2](inputs[0].new_ones(len(inputs[0]), first.out_channels, 1, 1)).flatten(1)
        parameters = first.weight.flatten(1), first.bias, last.weight.flatten(1), last.bias
        return _InRuns.apply(kept, *parameters, share, residual, *inputs)


def can_run_in_runs(*inputs: Tensor) -> bool:
    """Return whether :meth:`PointwiseNetwork.in_runs` supports these inputs, and saves memory.

    It does so only where gradients are recorded.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if not torch.is_grad_enabled() or is_transforming():
        return False
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in inputs)


class _InRuns(torch.autograd.Function):
    """Compute share · (W₁·kept·gelu(W₀·x + b₀) + b₁), plus the first input if ``residual``.

    W₀ and b₀ belong to the first layer, W₁ and b₁ to the last; x are the concatenated inputs and
    ``kept`` the dropout factors of the hidden channels, (B, C).
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        kept, w0, b0, w1, b1, share, residual, *inputs = arguments
        inputs = [x.contiguous() for x in inputs]
        ctx.save_for_backward(kept, w0, b0, w1, b1, *inputs)
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
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _gradients_in_layers(ctx, grads[0])
        kept, w0, b0, w1, _, *inputs = ctx.saved_tensors
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


def _gradients_in_layers(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of :class:`_InRuns`, recorded by autograd: all pixels at once."""

    def forward(
        kept: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor, *inputs: Tensor
    ) -> Tensor:
        hidden = F.gelu(F.conv2d(torch.cat(inputs, dim=1), w0[..., None, None], b0))
        out = F.conv2d(hidden * kept[..., None, None], w1[..., None, None], b1) * ctx.share
        return out + inputs[0] if ctx.residual else out

    needed = [*ctx.needs_input_grad[:5], *ctx.needs_input_grad[7:]]
    found = recorded_gradients(forward, ctx.saved_tensors, needed, grad)
    return (*found[:5], None, None, *found[5:])


def _runs(inputs: list[Tensor]) -> Iterator[tuple[int, slice, list[Tensor]]]:
    """Yield every run of pixels: number of the image, pixels, each input's (channels, pixels)."""
    flat = [x.flatten(2) for x in inputs]
    for image in range(len(inputs[0])):
        for start in range(0, flat[0].shape[2], _RUN):
            run = slice(start, start + _RUN)
            yield image, run, [x[image, :, run] for x in flat]


def _hidden(weight: Tensor, bias: Tensor, parts: list[Tensor]) -> Tensor:
    """Apply the first layer to inputs that are concatenated over channels, (C, pixels)."""
    out = bias[:, None]
    for x, own in zip(parts, weight.split([len(x) for x in parts], 1), strict=True):
        out = torch.addmm(out, own, x)
    return out
