"""Upsamplers that use the features alone: the baselines that every other upsampler must beat."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from upfeat.geometry import interpolation_matrix
from upfeat.upsamplers.base import UPSAMPLERS, Size, Upsampler, Window
from upfeat.upsamplers.checks import check_preparation

_BACKENDS = ("auto", "eager", "reference")
"""Backends that run in PyTorch, whose interpolation these upsamplers use."""


class InterpolationKernels:
    """Interpolation to one output size, which does not depend on the image."""

    def __init__(self, output_size: Size, mode: str) -> None:
        """Keep the output size and PyTorch's name of the interpolation mode."""
        self.output_size = output_size
        self.mode = mode

    def __call__(self, features: Tensor) -> Tensor:
        """Upsample features, (B, C, h, w) -> (B, C, H, W)."""
        align_corners = None if self.mode == "nearest-exact" else False
        # PyTorch takes four times as long for channels last, the layout of tokens on a grid.
        features = features.contiguous()
        return F.interpolate(
            features, size=self.output_size, mode=self.mode, align_corners=align_corners
        )

    def crop(self, features: Tensor, window: Window) -> Tensor:
        """See :meth:`Kernels.crop`."""
        rows = interpolation_matrix(features.shape[2], self.output_size[0], self.mode, features)
        columns = interpolation_matrix(features.shape[3], self.output_size[1], self.mode, features)
        rows = rows[window.top : window.bottom]
        columns = columns[window.left : window.right]
        return rows @ features @ columns.T


class _Interpolation(Upsampler):
    guidance_bands = None
    exact_parts = "channels"
    mode: ClassVar[str]
    cells: ClassVar[int]

    @property
    def reach(self) -> int:
        """See :attr:`Upsampler.reach`."""
        return self.cells

    def __init__(self, *, backend: str = "auto") -> None:
        """Make the upsampler.

        Args:
            backend: "auto", "eager" or "reference"; all three run PyTorch's interpolation.

        Raises:
            ValueError: ``backend`` is another name.
        """
        super().__init__()
        self.set_backend(backend)

    def set_backend(self, backend: str) -> None:
        """See :meth:`Upsampler.set_backend`."""
        super().set_backend(backend)
        if backend not in _BACKENDS:
            self.backend = "auto"
            raise ValueError(
                f'backend="{backend}" has no interpolation of its own, which is all that '
                f"{self.name} is; choose from {', '.join(_BACKENDS)}"
            )

    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> InterpolationKernels:
        """See :meth:`Upsampler.prepare`; the weights depend on ``output_size`` alone."""
        _, output_size = check_preparation(guidance, grid_size, output_size, bands=None)
        return InterpolationKernels(output_size, self.mode)


@UPSAMPLERS.register
class Nearest(_Interpolation):
    """Nearest-neighbour interpolation: the value of the cell that contains the pixel."""

    name = "nearest"
    cells = 0
    mode = "nearest-exact"


@UPSAMPLERS.register
class Bilinear(_Interpolation):
    """Bilinear interpolation between cell centres (align_corners=False)."""

    name = "bilinear"
    cells = 1
    mode = "bilinear"


@UPSAMPLERS.register
class Bicubic(_Interpolation):
    """Bicubic interpolation between cell centres (a = −0.75, align_corners=False)."""

    name = "bicubic"
    cells = 2
    mode = "bicubic"
