"""Methods that let the backbone see the image more than once: what that buys, without training."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.backbones import Backbone
from upfeat.backbones.efficientnet_lite import ConvNorm, EfficientNetLite
from upfeat.evaluation.data.prepared import Prepared, normalised
from upfeat.evaluation.methods import Method
from upfeat.features import UpsampledFeatures
from upfeat.model import FeatUp, load
from upfeat.provenance import digest, identify_backbone, identify_upsampler
from upfeat.upsamplers import Bilinear

SUFFIX = "@5"
"""Ends the names of upsamplers that are given features of two scales."""
EARLY = "@early"
"""Ends the names of those that are given what early layers say."""


class Finer(Backbone):
    """Features on a grid twice as fine, from further passes of a backbone.

    Attributes:
        passes: over the image, in all.
    """

    passes: float = 4

    def __init__(self, backbone: Backbone, suffix: str) -> None:
        """Take another backbone's properties, and half its stride.

        Args:
            backbone: makes the features.
            suffix: of the name.

        Raises:
            ValueError: the stride is odd.
        """
        if backbone.stride % 2:
            raise ValueError(
                f"{suffix} needs a backbone of an even stride; {backbone.name} has "
                f"{backbone.stride}"
            )
        mean, std = backbone.normalization
        super().__init__(
            name=f"{backbone.name}.{suffix}",
            embed_dim=backbone.embed_dim,
            stride=backbone.stride // 2,
            mean=mean,
            std=std,
            in_channels=backbone.in_channels,
        )
        self.backbone = backbone

    def grid_aligned(self, size: tuple[int, int]) -> tuple[int, int]:
        """Round to whole cells of the backbone within."""
        return self.backbone.grid_aligned(size)


class LargeImage(Finer):
    """The backbone's features of the image at twice its size, as they are."""

    def __init__(self, backbone: Backbone) -> None:
        """Enlarge for this backbone."""
        super().__init__(backbone, "large_image")

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        return self.backbone(
            F.interpolate(x, scale_factor=2.0, mode="bicubic", align_corners=False)
        )


class Shifted(Finer):
    """Four passes over the image shifted by a quarter of a cell up or down, left or right.

    Their cells lie between each other's, on a grid twice as fine.
    """

    def __init__(self, backbone: Backbone) -> None:
        """Shift for this backbone."""
        super().__init__(backbone, "shifted")

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        quarter = self.backbone.stride / 4
        rows = [
            torch.stack([self.backbone(_moved(x, down, right)) for right in (-quarter, quarter)], 4)
            for down in (-quarter, quarter)
        ]
        return torch.stack(rows, 3).flatten(4, 5).flatten(2, 3)  # (B, C, h, 2, w, 2)


class Strided(Finer):
    """An EfficientNet-Lite whose last stride is taken out, the layers after it dilated instead.

    Every second cell of every second row is, away from the borders, the coarse grid's; what lies
    between is computed rather than guessed. The layers after the stride cost four times as much.
    """

    passes = 2.5

    def __init__(self, backbone: Backbone) -> None:
        """Take out the stride of a copy.

        Raises:
            ValueError: it is another backbone, or has no stride in its last layers.
        """
        super().__init__(backbone, "strided")
        if not isinstance(backbone, EfficientNetLite) or backbone.strides != [16]:
            raise ValueError(
                f"strided is for EfficientNet-Lite at stride 16, not {backbone.name}; use "
                "large_image or shifted"
            )
        self.backbone: EfficientNetLite = copy.deepcopy(backbone)
        filters = [
            module
            for group in self.backbone.groups[3:5]
            for module in group.modules()
            if isinstance(module, ConvNorm) and module.kernel_size > 1
        ]
        first, *rest = filters
        first.stride = 1
        _convolution(first).stride = (1, 1)
        for module in rest:
            _convolution(module).dilation = (2, 2)
            module.kernel_size = 2 * (module.kernel_size - 1) + 1  # as its padding sees it

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        return self.backbone.extract(x)


def _convolution(module: ConvNorm) -> nn.Conv2d:
    found = module[0]
    assert isinstance(found, nn.Conv2d)
    return found


def _moved(x: Tensor, down: float, right: float) -> Tensor:
    """The image as seen from so many pixels further down and right, its borders replicated."""
    height, width = x.shape[2:]
    matrix = x.new_tensor([[1, 0, 2 * right / width], [0, 1, 2 * down / height]])
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


WAYS = {"large_image": LargeImage, "shifted": Shifted, "strided": Strided}
"""Grids twice as fine, by the names that ``upfeat eval`` uses."""


class SeveralPasses(Method):
    """A model that starts from the image, not from coarse features at hand."""

    def __init__(self, model: FeatUp) -> None:
        """Keep it, with its cost in passes."""
        self.model, self.passes = model, model.passes
        self.weights = digest(model.upsampler)
        known = identify_backbone(model.backbone), identify_upsampler(model.upsampler)
        self.identity = "|".join(known)

    def __call__(self, sample: Prepared) -> UpsampledFeatures:
        """See :meth:`Method.__call__`."""
        return self.model.lazy(normalised(sample.image, self.model.backbone))


def find_passes(name: str, backbone: Backbone) -> SeveralPasses | None:
    """A method of several passes by name; ``None`` where it is none.

    Args:
        name: one of :data:`WAYS`, or an upsampler's with "@5" or "@early" behind it.
        backbone: makes the features.

    Raises:
        ValueError: there is no such upsampler, or the backbone cannot make them.
    """
    device = backbone.mean.device
    if name in WAYS:
        return SeveralPasses(FeatUp(WAYS[name](backbone), Bilinear()).to(device))
    if name.endswith(SUFFIX):
        upsampler = name.removesuffix(SUFFIX)
        return SeveralPasses(load(backbone, upsampler=upsampler, passes=5, device=device))
    if name.endswith(EARLY):
        upsampler = name.removesuffix(EARLY)
        return SeveralPasses(load(backbone, upsampler=upsampler, early=True, device=device))
    return None
