"""Mean features of an image and of its mirror image, for two passes of the backbone."""

from __future__ import annotations

import torch
from torch import Tensor

from upfeat.backbones import Backbone


class Mirrored(Backbone):
    """A backbone whose features are those of the image and of its mirror image, averaged.

    Networks do not treat an image and its mirror image alike: features of the two, mirrored back,
    differ by three quarters of the features' variance (EfficientNet-Lite0, photographs of 224
    pixels). Most of the difference is noise to whatever reads the features, and the mean has half
    of its variance. Early layers are averaged too.

    Attributes:
        backbone: the backbone that is applied twice.
        passes: cost, in passes of the innermost backbone over the image.
    """

    def __init__(self, backbone: Backbone) -> None:
        """Wrap a backbone.

        Args:
            backbone: any backbone; aligned, if at all, before it is wrapped.
        """
        mean, std = backbone.normalization
        super().__init__(
            name=f"{backbone.name}.mirrored",
            embed_dim=backbone.embed_dim,
            stride=backbone.stride,
            mean=mean,
            std=std,
            interpolation=backbone.interpolation,
            in_channels=backbone.in_channels,
        )
        self.backbone = backbone
        self.passes = 2 * getattr(backbone, "passes", 1)
        self.displacement = backbone.displacement

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the image; the inner backbone converts its own input."""
        return self.backbone.dtype

    @property
    def origin(self) -> Backbone:
        """See :attr:`Backbone.origin`."""
        return self.backbone.origin

    def aligned(self, displacement: int) -> Mirrored:
        """See :meth:`Backbone.aligned`; the inner backbone is aligned."""
        return Mirrored(self.backbone.aligned(displacement))

    def grid_aligned(self, size: tuple[int, int]) -> tuple[int, int]:
        """See :meth:`Backbone.grid_aligned`."""
        return self.backbone.grid_aligned(size)

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """See :meth:`Backbone.grid_size`."""
        return self.backbone.grid_size(size)

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        return (self.backbone(x) + self.backbone(x.flip(3)).flip(3)) / 2

    def extract_with_hidden(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Backbone.extract_with_hidden`."""
        features, hidden = self.backbone.with_hidden(x)
        mirrored, mirrored_hidden = self.backbone.with_hidden(x.flip(3))
        features = (features + mirrored.flip(3)) / 2
        if hidden is None or mirrored_hidden is None:
            return features, None
        return features, (hidden + mirrored_hidden.flip(3)) / 2

    def place(self, x: Tensor) -> Tensor:
        """Return the image as it is: the inner backbone moves it."""
        return x
