"""Methods that use several passes of the backbone over an image, as training-free baselines."""

from __future__ import annotations

import copy
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.backbones import Backbone, OuterBackbone
from upfeat.backbones.conv_norm import ConvNorm
from upfeat.backbones.efficientnet_lite import EfficientNetLite
from upfeat.bounds import PASSES
from upfeat.evaluation.data.prepared import Prepared, normalised
from upfeat.evaluation.methods import Method
from upfeat.features import UpsampledFeatures
from upfeat.loading import load
from upfeat.model import FeatUp
from upfeat.provenance import digest, identify_backbone, identify_upsampler
from upfeat.types import Size
from upfeat.upsamplers import Bilinear, Upsampler, create_upsampler

SUFFIXES = {f"@{passes}": passes for passes in PASSES if passes > 1}
"""Suffixes of the names of upsamplers, for features of several passes; see :func:`upfeat.load`."""
_ALIGNED = re.compile(r"(?P<upsampler>.+)@(?P<pixels>[+-]\d{1,3})")
_AT_RATIO = re.compile(r"(?P<upsampler>.+)@x(?P<ratio>\d{1,3})")
EARLY = "@early"
"""Suffix of the names of upsamplers that are given activations of early layers."""


class Finer(OuterBackbone):
    """Base of backbones whose grid is twice as fine as that of the backbone they use.

    Attributes:
        passes: total cost in passes of the backbone over the image.
    """

    passes: float = 4

    def __init__(self, backbone: Backbone, suffix: str) -> None:
        """Copy another backbone's properties, with half its stride.

        Args:
            backbone: backbone to use.
            suffix: suffix of the new backbone's name.

        Raises:
            ValueError: the stride is odd.
        """
        if backbone.stride % 2:
            raise ValueError(
                f"{suffix} needs a backbone of an even stride; {backbone.name} has "
                f"{backbone.stride}"
            )
        super().__init__(backbone, suffix=f".{suffix}", finer=2)


class LargeImage(Finer):
    """Unmodified features of the image enlarged to twice its size."""

    def __init__(self, backbone: Backbone) -> None:
        """Use a backbone of even stride."""
        super().__init__(backbone, "large_image")

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        return self.backbone(
            F.interpolate(x, scale_factor=2.0, mode="bicubic", align_corners=False)
        )


class Shifted(Finer):
    """Interleaved features of four copies of the image, shifted by a quarter of a cell.

    The shifts are up or down and left or right, so that the centres of all four grids' cells
    together form a grid twice as fine.
    """

    def __init__(self, backbone: Backbone) -> None:
        """Use a backbone of even stride."""
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
    """An EfficientNet-Lite without its last stride, with dilated filters in the layers after it.

    Away from the borders, every second cell of every second row equals a cell of the coarse grid;
    the network computes the cells between them. The layers after the stride cost four times as
    much.
    """

    passes = 2.5

    def __init__(self, backbone: Backbone) -> None:
        """Remove the stride of a copy of the backbone.

        Raises:
            ValueError: the backbone is not an EfficientNet-Lite of stride 16.
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
            module.kernel_size = 2 * (module.kernel_size - 1) + 1  # the extent, for the padding

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        return self.backbone.extract(x)


def _convolution(module: ConvNorm) -> nn.Conv2d:
    found = module[0]
    assert isinstance(found, nn.Conv2d)
    return found


def _moved(x: Tensor, down: float, right: float) -> Tensor:
    """Sample an image ``down`` and ``right`` pixels from each pixel, with replicated borders."""
    height, width = x.shape[2:]
    matrix = x.new_tensor([[1, 0, 2 * right / width], [0, 1, 2 * down / height]])
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


class AtRatio(OuterBackbone):
    """Features upsampled to a grid several times as fine, not to the size of the image."""

    passes: float = 1

    def __init__(self, backbone: Backbone, upsampler: Upsampler, ratio: int) -> None:
        """Upsample a backbone's features.

        Args:
            backbone: backbone to use.
            upsampler: upsampler, in eval mode.
            ratio: ratio of the finer grid to the backbone's, from 1 to its stride.

        Raises:
            ValueError: the ratio is out of range, or the upsampler was trained on early layers.
        """
        suffix = f"@x{ratio}"
        if not 1 <= ratio <= backbone.stride:
            raise ValueError(
                f"{upsampler.name}{suffix}: the ratio must be from 1 to {backbone.stride}, the "
                f"stride of {backbone.name}"
            )
        if upsampler.wants_hidden:
            raise ValueError(
                f"{upsampler.name}{suffix}: upsamplers trained on early layers have no ratio; take "
                "detail_universal"
            )
        super().__init__(backbone, suffix=suffix)
        self.inner, self.ratio = upsampler, ratio

    def grid_size(self, size: Size) -> Size:
        """See :meth:`Backbone.grid_size`."""
        height, width = self.backbone.grid_size(size)
        return self.ratio * height, self.ratio * width

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        guidance = self.inner.guidance_from(x, self.backbone)
        size = self.grid_size((x.shape[2], x.shape[3]))
        return self.inner(self.backbone(x), guidance, size)


WAYS = {"large_image": LargeImage, "shifted": Shifted, "strided": Strided}
"""Backbones with a grid twice as fine, by the names that ``upfeat eval`` uses."""


class SeveralPasses(Method):
    """A model that extracts its own features of the image; the given coarse features are unused."""

    def __init__(self, model: FeatUp, *, inner: Upsampler | None = None) -> None:
        """Store a model and its cost in passes.

        Args:
            model: the model.
            inner: upsampler that the model's backbone contains; ``None`` for none.
        """
        self.model, self.passes = model, model.passes
        self.weights = digest(inner or model.upsampler)
        upsamplers = [model.upsampler] if inner is None else [inner, model.upsampler]
        known = identify_backbone(model.backbone), *map(identify_upsampler, upsamplers)
        self.identity = "|".join(known)

    def __call__(self, sample: Prepared) -> UpsampledFeatures:
        """See :meth:`Method.__call__`."""
        return self.model.lazy(normalised(sample.image, self.model.backbone))


def find_passes(name: str, backbone: Backbone) -> SeveralPasses | None:
    """Return the method of several passes of a name; ``None`` if the name is not of this kind.

    Args:
        name: a name of :data:`WAYS`, or the name of an upsampler followed by "@2",
            "@5", "@8", "@early", or passes and then "@early"; by a displacement of the backbone
            that is corrected first, as "@+2"; or by a ratio, as "@x4", for features on a grid 4
            times as fine, from which the image's pixels are interpolated bilinearly.
        backbone: backbone that extracts the features.

    Raises:
        ValueError: there is no such upsampler, or the backbone does not suit the method.
    """
    device = backbone.mean.device
    if name in WAYS:
        return SeveralPasses(FeatUp(WAYS[name](backbone), Bilinear()).to(device))
    aligned = _ALIGNED.fullmatch(name)
    if aligned is not None:
        network = backbone.aligned(int(aligned["pixels"]))
        return SeveralPasses(load(network, upsampler=aligned["upsampler"], device=device))
    at_ratio = _AT_RATIO.fullmatch(name)
    if at_ratio is not None:
        upsampler = create_upsampler(
            at_ratio["upsampler"], backbone.embed_dim, backbone=backbone.name
        ).requires_grad_(False)
        network = AtRatio(backbone, upsampler, int(at_ratio["ratio"]))
        return SeveralPasses(FeatUp(network, Bilinear()).to(device), inner=upsampler)
    early = name.endswith(EARLY)
    upsampler, passes = name.removesuffix(EARLY), 1
    for suffix, number in SUFFIXES.items():
        if upsampler.endswith(suffix):
            upsampler, passes = upsampler.removesuffix(suffix), number
    if passes == 1 and not early:
        return None
    chosen = {"upsampler": upsampler, "passes": passes, "early": early}
    return SeveralPasses(load(backbone, **chosen, device=device))
