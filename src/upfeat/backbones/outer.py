"""Base of backbones that are made of another one, which they apply."""

from __future__ import annotations

import torch
from torch import Tensor

from upfeat.backbones.base import Backbone
from upfeat.types import Size


class OuterBackbone(Backbone):
    """A backbone made of another one, whose features mean the same; images are prepared alike.

    Attributes:
        backbone: the inner backbone. It moves images itself if it is aligned.
    """

    def __init__(self, backbone: Backbone, *, suffix: str = "", finer: int = 1) -> None:
        """Copy the properties of the inner backbone.

        Args:
            backbone: the inner backbone; aligned, if at all, before it is wrapped.
            suffix: what is appended to its name.
            finer: ratio of its stride, a multiple of this number, to this backbone's.
        """
        mean, std = backbone.normalization
        super().__init__(
            name=f"{backbone.name}{suffix}",
            embed_dim=backbone.embed_dim,
            stride=backbone.stride // finer,
            mean=mean,
            std=std,
            interpolation=backbone.interpolation,
            in_channels=backbone.in_channels,
        )
        self.to(backbone.mean.device)
        self.backbone = backbone
        self.displacement = backbone.displacement

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the image; the inner backbone converts its own input."""
        return self.backbone.dtype

    @property
    def step(self) -> int:
        """See :attr:`Backbone.step`."""
        return self.backbone.step * (self.backbone.stride // self.stride)

    @property
    def origin(self) -> Backbone:
        """See :attr:`Backbone.origin`."""
        return self.backbone.origin

    def grid_aligned(self, size: Size) -> Size:
        """Round a size to whole cells of the inner backbone."""
        return self.backbone.grid_aligned(size)

    def grid_size(self, size: Size) -> Size:
        """See :meth:`Backbone.grid_size`."""
        height, width = self.backbone.grid_size(size)
        finer = self.backbone.stride // self.stride
        return finer * height, finer * width

    def place(self, x: Tensor) -> Tensor:
        """Return the image as it is: the inner backbone moves it."""
        return x
