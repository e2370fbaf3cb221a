"""Early layers of another network, for backbones that have none on a finer grid."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backbones import Backbone, OuterBackbone, load_backbone
from upfeat.normalization import Normalization
from upfeat.resampling import on_grid
from upfeat.types import Size
from upfeat.upsamplers.detail import FINER

GUIDE = "efficientnet_lite0.stride8+16"
"""Name of the network whose layers are used if none is given."""
GUIDE_DISPLACEMENT = 2
"""Displacement of its features, pixels; see :func:`upfeat.backbones.estimate_displacement`."""


class Guided(OuterBackbone):
    """A backbone with the layers of a second network in place of early layers of its own.

    All layers of a vision transformer have the same grid, so none of them says more of a place than
    the last. A small convolutional network that sees the same image has finer grids. Its layers are
    a guide only: the features are the backbone's own, unchanged, and an upsampler may predict their
    detail from the guide (:meth:`Backbone.with_hidden`). The second network need not know the first
    one, because the regression of :class:`upfeat.DetailUpsampler` is fitted to each image.

    Attributes:
        backbone: the backbone of the features.
        guide: the second network, whose features and early layers guide.
        passes: cost, in passes of the innermost backbone over the image; the guide is not counted.
    """

    def __init__(
        self,
        backbone: Backbone,
        guide: Backbone | None = None,
        *,
        bands: Sequence[int] | None = None,
    ) -> None:
        """Wrap a backbone.

        Args:
            backbone: any backbone.
            guide: the second network, aligned if need be (:meth:`Backbone.aligned`); ``None`` for
                the embedded EfficientNet-Lite0, layers of strides 4, 8 and 16.
            bands: bands of the image, counted from 0, that the guide sees as its own, such as red,
                green and blue; ``None`` for all bands.

        Raises:
            ValueError: the guide takes images of another number of bands.
        """
        if guide is None:
            guide = load_backbone(GUIDE).aligned(GUIDE_DISPLACEMENT)
        shown = backbone.in_channels if bands is None else len(bands)
        if shown != guide.in_channels:
            raise ValueError(
                f"early=True: {backbone.name} takes images of {shown} bands, and {guide.name}, "
                f"whose layers would be used, of {guide.in_channels}; give as many bands=, or "
                "early=False"
            )
        super().__init__(backbone)
        self.guide = guide
        self.bands = None if bands is None else list(bands)
        self.passes = getattr(backbone, "passes", 1)

    def aligned(self, displacement: int) -> Guided:
        """See :meth:`Backbone.aligned`; the inner backbone is aligned, and the guide is not."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.backbone = self.backbone.aligned(displacement)
        other.displacement = displacement
        return other

    @property
    def step(self) -> int:
        """See :attr:`Backbone.step`; whole cells of the guide's coarsest layer too."""
        guide = self.guide.step * self.guide.stride
        return math.lcm(super().step * self.stride, guide) // self.stride

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        return self.backbone(x)

    def extract_with_hidden(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Backbone.extract_with_hidden`; the guide's layers, finest first."""
        features = self.backbone(x)
        return features, self._layers(x, (features.shape[2], features.shape[3]))

    def hidden(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.hidden`; only the guide is applied."""
        ready = self._ready(x)
        return self._layers(ready, self.grid_size((ready.shape[2], ready.shape[3]))).to(x.dtype)

    def _layers(self, x: Tensor, grid: Size) -> Tensor:
        """The guide's layers, finest first, on a grid twice as fine as ``grid``."""
        finer = FINER * grid[0], FINER * grid[1]
        layers, early = self.guide.with_hidden(self._seen(x))
        maps = [layers] if early is None else [early, layers]
        return torch.cat([on_grid(one, finer) for one in maps], dim=1).to(x.dtype)

    def converted(self, x: Tensor) -> Tensor:
        """Select the guide's bands of an image and normalise them for it, (B, bands, H, W)."""
        mean, std = self.normalization
        if self.bands is not None:
            mean, std = (tuple(one[band] for band in self.bands) for one in (mean, std))
            x = x[:, self.bands]
        return Normalization(mean, std).convert(x, self.guide.normalization)

    def _seen(self, x: Tensor) -> Tensor:
        """The image as the guide sees it, of a size that every grid of the guide covers exactly."""
        x = self.converted(x)
        cell = self.guide.step * self.guide.stride
        size = [max(round(side / cell), 1) * cell for side in x.shape[2:]]
        if size == list(x.shape[2:]):
            return x
        x = x.float() if x.dtype.itemsize < 4 else x
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


def has_early_layers(backbone: Backbone) -> bool:
    """Return whether a backbone returns early layers, on a finer grid than its features.

    Raises:
        ValueError: its early layers are not maps on a finer grid.
    """
    if type(backbone).extract_with_hidden is Backbone.extract_with_hidden:
        return False
    side = 4 * backbone.stride
    blank = torch.zeros(1, backbone.in_channels, side, side, device=backbone.mean.device)
    with torch.no_grad():
        features, hidden = backbone.with_hidden(blank)
    if hidden is not None and (hidden.dim() != 4 or not hidden.shape[2] > features.shape[2]):
        raise ValueError(
            f"early=True: the earlier layers of {backbone.name} are {tuple(hidden.shape)} where "
            f"its features are {tuple(features.shape)}: no finer grid; use early=False"
        )
    return hidden is not None


def has_layers_at_both_sizes(backbone: Backbone) -> bool:
    """Return whether several passes read a backbone's own early layers, at both image sizes."""
    return backbone.stride % FINER**2 == 0 and has_early_layers(backbone)


def early_by_default(
    backbone: Backbone, bands: Sequence[int] | None = None, passes: int = 1
) -> bool:
    """Return whether :func:`upfeat.load` gives early layers to the best upsampler for a backbone.

    It does so wherever they are to be had: the backbone's own, or those of the embedded guide,
    which takes images of three bands.

    Args:
        backbone: the backbone.
        bands: the bands of the image that the upsampler gets; ``None`` for all.
        passes: number of passes; with 5 and 8, the own layers of a backbone whose stride is no
            multiple of 4 are not used.
    """
    has_guide = len(bands or range(backbone.in_channels)) == 3
    try:
        own = has_early_layers(backbone)
    except (RuntimeError, ValueError):  # of no use, or for larger images only
        return False
    return has_guide or (own and (passes in (1, 2) or backbone.stride % FINER**2 == 0))
