"""Methods that use several passes of the backbone over an image, as training-free baselines."""

from __future__ import annotations

import copy
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.backbones import Backbone, OuterBackbone
from upfeat.backbones.efficientnet_lite import ConvNorm, EfficientNetLite
from upfeat.bounds import PASSES
from upfeat.evaluation.data.prepared import Prepared, normalised
from upfeat.evaluation.methods import Method
from upfeat.features import UpsampledFeatures
from upfeat.model import FeatUp, load
from upfeat.provenance import digest, identify_backbone, identify_upsampler
from upfeat.upsamplers import Bilinear

SUFFIXES = {f"@{passes}": passes for passes in PASSES if passes > 1}
"""Suffixes of the names of upsamplers, for features of several passes; see :func:`upfeat.load`."""
_ALIGNED = re.compile(r"(?P<upsampler>.+)@(?P<pixels>[+-]\d{1,3})")
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


WAYS = {"large_image": LargeImage, "shifted": Shifted, "strided": Strided}
"""Backbones with a grid twice as fine, by the names that ``upfeat eval`` uses."""


class SeveralPasses(Method):
    """A model that extracts its own features of the image; the given coarse features are unused."""

    def __init__(self, model: FeatUp) -> None:
        """Store a model and its cost in passes."""
        self.model, self.passes = model, model.passes
        self.weights = digest(model.upsampler)
        known = identify_backbone(model.backbone), identify_upsampler(model.upsampler)
        self.identity = "|".join(known)

    def __call__(self, sample: Prepared) -> UpsampledFeatures:
        """See :meth:`Method.__call__`."""
        return self.model.lazy(normalised(sample.image, self.model.backbone))


def find_passes(name: str, backbone: Backbone) -> SeveralPasses | None:
    """Return the method of several passes of a name; ``None`` if the name is not of this kind.

    Args:
        name: a name of :data:`WAYS`, or the name of an upsampler followed by "@2",
            "@5", "@6", "@early", or passes and then "@early"; or by a displacement of the backbone
            that is corrected first, as "@+2".
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
    early = name.endswith(EARLY)
    upsampler, passes = name.removesuffix(EARLY), 1
    for suffix, number in SUFFIXES.items():
        if upsampler.endswith(suffix):
            upsampler, passes = upsampler.removesuffix(suffix), number
    if passes == 1 and not early:
        return None
    chosen = {"upsampler": upsampler, "passes": passes, "early": early}
    return SeveralPasses(load(backbone, **chosen, device=device))
