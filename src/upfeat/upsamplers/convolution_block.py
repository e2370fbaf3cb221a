"""Blocks of convolutions with batch norms, as UPLiFT's networks consist of."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.backends.cpu.encoder import Before, layer

_EPSILON = 1e-5
"""Added to the variance by batch norms."""


class BatchNorm(nn.Module):
    """A batch norm by fixed mean and variance, in training as well, as a scale and a shift."""

    def __init__(self, width: int) -> None:
        """Make a norm of ``width`` channels that changes nothing."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, (C,) each."""
        scale = self.weight * (self.running_var + _EPSILON).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        variance = state_dict.get(f"{prefix}running_var")
        if isinstance(variance, Tensor) and not variance.is_meta and bool((variance < 0).any()):
            raise ValueError(f"{prefix}running_var holds {float(variance.min()):.3g}, less than 0")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ConvolutionBlock(nn.Module):
    """3×3 convolutions, each with a batch norm and a ReLU, then a 1×1 convolution and a residual.

    The residual is the input, cut to the channels of the output, or filled up with zeros.
    """

    def __init__(self, inputs: int, width: int, convolutions: int) -> None:
        """Make the layers with PyTorch's initial weights.

        Args:
            inputs: number of input channels.
            width: number of output channels.
            convolutions: number of 3×3 convolutions.
        """
        super().__init__()
        channels = [inputs] + convolutions * [width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False)
            for before, after in pairwise(channels)
        )
        self.norms = nn.ModuleList(BatchNorm(width) for _ in range(convolutions))
        self.mixture = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, every: int = 1, *, compiled: bool = False) -> Tensor:
        """Apply the block.

        Args:
            x: (B, inputs, H, W).
            every: compute every n-th row and column of the result only, from the first; of a block
                of one convolution.
            compiled: whether the compiled library runs the convolutions.

        Returns:
            (B, width, ⌈H/every⌉, ⌈W/every⌉).
        """
        if compiled:
            return self._compiled(x, every)
        y = x
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(norm, BatchNorm)
            scale, shift = norm.affine()
            weight = convolution.weight * scale.view(-1, 1, 1, 1)
            y = F.relu(convolve(y, weight, shift, padding=1, stride=every))
        y = convolve(y, self.mixture.weight, self.mixture.bias)
        return y + self._residual(x[:, :, ::every, ::every])

    def _compiled(self, x: Tensor, every: int) -> Tensor:
        y, before = x, None
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            assert isinstance(convolution, nn.Conv2d)
            assert isinstance(norm, BatchNorm)
            y, _ = layer(y, convolution.weight, before=before, reflect=False)
            # The layer that follows applies the norm and the ReLU to the pixels it reads.
            scale, shift = (each.expand(len(x), -1) for each in norm.affine())
            before = Before(scale=scale, shift=shift, relu=True)
        mixture, y = self.mixture, y[:, :, ::every, ::every]
        residual = self._residual(x[:, :, ::every, ::every])
        return layer(y, mixture.weight, mixture.bias, before=before, residual=residual)[0]

    def _residual(self, x: Tensor) -> Tensor:
        missing = self.mixture.out_channels - x.shape[1]
        if missing > 0:
            return F.pad(x, (0, 0, 0, 0, 0, missing))
        return x[:, : self.mixture.out_channels]


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int = 0, stride: int = 1
) -> Tensor:
    """Apply a convolution in the dtype of ``x``."""
    shift = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), shift, padding=padding, stride=stride)
