"""The image encoders of published attention upsamplers, and their layers.

AnyUp, JAFAR and NAF share one design: a convolution, then blocks of twice (group norm, SiLU,
convolution), mostly 1×1; then queries and keys are rotated by their position in the image. Group
norms depend on the whole image, so an encoder runs once for an image; only later computations can
be split into windows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.geometry import reflect_pad
from upfeat.transforms import channels_last, is_transformed
from upfeat.types import Size

GROUPS = 8
"""Number of groups of every group norm in each of the published models."""


class NormBlock(nn.Module):
    """Twice group norm, SiLU and convolution; a residual block adds the result to its input."""

    def __init__(self, width: int, kernel_size: int, *, bias: bool, residual: bool) -> None:
        """Make a block with PyTorch's initial weights.

        Args:
            width: number of input and output channels, a multiple of :data:`GROUPS`.
            kernel_size: kernel size of both convolutions, odd; edges are reflected.
            bias: whether the convolutions have a bias.
            residual: whether the input is added to the result.
        """
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv1 = reflecting(width, width, kernel_size, bias=bias)
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.conv2 = reflecting(width, width, kernel_size, bias=bias)
        self.residual = residual

    def hidden(self, x: Tensor) -> Tensor:
        """Compute the input of the second convolution, (B, width, H, W) -> (B, width, H, W)."""
        x = convolve(self.conv1, _activate(self.norm1, x))
        return _activate(self.norm2, x)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, (B, width, H, W) -> (B, width, H, W)."""
        out = convolve(self.conv2, self.hidden(x))
        return x + out if self.residual else out


class ResidualEncoder(nn.Sequential):
    """A convolution and :class:`NormBlock` layers, with the tensor names of the published models.

    Maps are channels last: on a CPU a 1×1 convolution is then a matrix product.
    """

    def __init__(
        self,
        inputs: int | None,
        width: int,
        *,
        entry_size: int = 1,
        kernel_size: int = 1,
        depth: int = 2,
        bias: bool = False,
        residual: bool = True,
    ) -> None:
        """Make an encoder with PyTorch's initial weights.

        Args:
            inputs: number of input channels; ``None`` for no first convolution (the caller then
                replaces layer 0 with another module).
            width: number of output channels.
            entry_size: kernel size of the first convolution.
            kernel_size: kernel size of the convolutions in the blocks.
            depth: number of blocks.
            bias: whether convolutions have a bias.
            residual: whether blocks add their input to their result.
        """
        entry = nn.Identity()
        if inputs is not None:
            entry = reflecting(inputs, width, entry_size, bias=bias)
        super().__init__(
            entry,
            *(NormBlock(width, kernel_size, bias=bias, residual=residual) for _ in range(depth)),
        )

    @property
    def entry(self) -> nn.Module:
        """The first convolution."""
        return self[0]

    @property
    def blocks(self) -> list[NormBlock]:
        """The blocks after the first convolution."""
        return [block for block in self if isinstance(block, NormBlock)]

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Encode an image, (B, inputs, H, W) -> (B, width, H, W), channels last."""
        return self.blocks_of(
            convolve(self[0], x) if isinstance(self[0], nn.Conv2d) else self[0](x)
        )

    def blocks_of(self, x: Tensor) -> Tensor:
        """Apply the blocks to the first layer's output, (B, width, H, W) -> (B, width, H, W)."""
        for block in self.blocks:
            x = block(x)
        return x

    def pooled(self, x: Tensor, size: Size) -> Tensor:
        """Average the result of :meth:`forward` over the cells of a grid, (B, width, *size).

        The last convolution, if it is 1×1, commutes with the mean, so it is applied after the mean:
        on a coarser grid it then costs next to nothing.
        """
        *blocks, last = self.blocks
        if size[0] * size[1] >= x.shape[2] * x.shape[3] or last.conv2.kernel_size != (1, 1):
            return mean_over_cells(self(x), size)
        x = convolve(self[0], x) if isinstance(self[0], nn.Conv2d) else self[0](x)
        for block in blocks:
            x = block(x)
        out = convolve(last.conv2, mean_over_cells(last.hidden(x), size))
        return mean_over_cells(x, size) + out if last.residual else out


def reflecting(inputs: int, outputs: int, kernel_size: int, *, bias: bool) -> nn.Conv2d:
    """Make a convolution that keeps the size and reflects the edges."""
    return nn.Conv2d(
        inputs,
        outputs,
        kernel_size,
        padding=kernel_size // 2,
        padding_mode="reflect" if kernel_size > 1 else "zeros",
        bias=bias,
    )


def convolve(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution to channels-last maps, in their dtype; 1×1 as a matrix product.

    Edges are reflected repeatedly if need be, so maps smaller than the kernel are accepted, too.
    """
    assert isinstance(layer, nn.Conv2d)
    weight = layer.weight.to(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if layer.kernel_size == (1, 1):
        out = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias)
        return out.permute(0, 3, 1, 2)
    x = channels_last(x)
    reach = layer.kernel_size[0] // 2
    if layer.padding_mode == "reflect":
        return F.conv2d(reflect_pad(x, reach), weight, bias)
    return F.conv2d(x, weight, bias, padding=reach)


def group_norm(x: Tensor, groups: int, *rest: Any) -> Tensor:
    """Apply PyTorch's group norm, which needs tensors of ``torch.func`` to be channels first."""
    return F.group_norm(x.contiguous() if is_transformed(x) else x, groups, *rest)


def _activate(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    x = group_norm(x, norm.num_groups, weight, bias, norm.eps)
    return F.silu(x) if torch.is_grad_enabled() else F.silu(x, inplace=True)


def mean_over_cells(x: Tensor, size: Size) -> Tensor:
    """Average over cells, by adaptive pooling; return ``x`` itself if it has this size."""
    return x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size)


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel i against channel i + D/2 (rotary position codes).

    Args:
        x: (…, D, H, W).
        angles: (D, H, W) in radians, one for each channel.
    """
    first, second = x.chunk(2, dim=-3)
    return x * angles.cos() + torch.cat([-second, first], dim=-3) * angles.sin()
