"""Forms of the JBU stack and of plain interpolation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from upfeat.portable.form import PORTABLE, Form
from upfeat.portable.neighbourhood import cell_means
from upfeat.types import Size
from upfeat.upsamplers import Bicubic, Bilinear, JBUStack, Nearest
from upfeat.upsamplers.head import Head
from upfeat.upsamplers.interpolate import InterpolationKernels
from upfeat.upsamplers.jbu import JBUStage


@PORTABLE.register
class PortableJBU(Form):
    """Form of :class:`JBUStack`."""

    name = JBUStack.name

    def __init__(self, upsampler: JBUStack, head: Head) -> None:
        """See :class:`Form`."""
        super().__init__(upsampler, head)
        self.stages = copy.deepcopy(upsampler.stages)
        for stage in self.stages:
            assert isinstance(stage, JBUStage)
            stage.backend = "eager"

    def kernels(
        self,
        features: Tensor,
        guidance: Tensor,
        size: Size | None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Form.kernels`."""
        target = guidance.shape[2:] if size is None else size
        grid = features.shape[2:]
        for number, stage in enumerate(self.stages, start=1):
            assert isinstance(stage, JBUStage)
            if number == len(self.stages):
                seen = guidance if size is None else cell_means(guidance, size)
            else:
                sides: list[Any] = [
                    torch.sym_min(cells * 2**number, side)
                    for cells, side in zip(grid, target, strict=True)
                ]
                seen = cell_means(guidance, sides)
            features = stage.upsample(features, seen)
        return features


class _Interpolation(Form):
    mode: str

    def kernels(
        self,
        features: Tensor,
        guidance: Tensor,
        size: Size | None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Form.kernels`."""
        target = (guidance.shape[2], guidance.shape[3]) if size is None else size
        return InterpolationKernels(target, self.mode)(features)


@PORTABLE.register
class PortableNearest(Form):
    """Form of :class:`Nearest`, by explicit indices, since run-times round halves differently.

    If a pixel's centre lies on the border of two cells, float32 rounding decides, as in PyTorch.
    """

    name = Nearest.name

    def kernels(
        self,
        features: Tensor,
        guidance: Tensor,
        size: Size | None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Form.kernels`."""
        target = guidance.shape[2:] if size is None else size
        for axis, length in zip((2, 3), target, strict=True):
            cells, device = features.shape[axis], features.device
            scale = torch.arange(cells, cells + 1, device=device).float() / length
            own = ((torch.arange(length, device=device) + 0.5) * scale).floor().long()
            features = features.index_select(axis, own.clamp(max=cells - 1))
        return features


@PORTABLE.register
class PortableBilinear(_Interpolation):
    """Form of :class:`Bilinear`."""

    name, mode = Bilinear.name, Bilinear.mode


@PORTABLE.register
class PortableBicubic(_Interpolation):
    """Form of :class:`Bicubic`."""

    name, mode = Bicubic.name, Bicubic.mode
