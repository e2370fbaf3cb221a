"""A whole model as a graph: an image in, upsampled features or a head's outputs out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from upfeat.model import FeatUp
from upfeat.portable import axes
from upfeat.portable.form import form_of
from upfeat.scales import guidance_for
from upfeat.types import Size
from upfeat.upsamplers.head import Head


class PortableModel(nn.Module):
    """A :class:`upfeat.FeatUp` of images of any size, or of one, with a linear head."""

    def __init__(self, model: FeatUp, head: Head, stride: int = 1) -> None:
        """Copy its parts.

        Args:
            model: on the CPU.
            head: applied to the features; ``Head()`` for none.
            stride: pixels of the image for each one of the output, on both axes.
        """
        super().__init__()
        self.backbone = copy.deepcopy(model.backbone)
        self.form = form_of(model.upsampler, head)
        self.bands, self.stride = model.bands, stride
        # In a tuple it is no part of the module: what it is made of is in the form already.
        self.source = (model.upsampler,)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W), normalised for the backbone -> (B, C or K, H/stride, W/stride)."""
        own, size = self.backbone.stride, (image.shape[2], image.shape[3])
        cells = [known_alone(axes.rounded(side, own)) for side in size]
        aligned = (cells[0] * own, cells[1] * own)
        seen = image
        if isinstance(size[0], torch.SymInt) or aligned != size:
            seen = axes.resize(image, aligned)
        features = self.backbone.extract(seen.to(self.backbone.dtype)).to(image.dtype)
        guidance = guidance_for(self.source[0], image, self.backbone, self.bands)
        return self.form(features, guidance, output_size(image, self.stride))


class PortableUpsampler(nn.Module):
    """An upsampler alone: features and the image that guides them in."""

    def __init__(self, form: nn.Module, stride: int = 1) -> None:
        """Keep its form; the stride is as that of :class:`PortableModel`."""
        super().__init__()
        self.form, self.stride = form, stride
        self.eval().requires_grad_(False)

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        """(B, C, h, w), (B, 3, H, W) -> (B, C or K, H/stride, W/stride)."""
        return self.form(features, guidance, output_size(guidance, self.stride))


def output_size(image: Tensor, stride: int) -> Size | None:
    """The output's size, ``stride`` pixels of the image for each; ``None`` for the image's own."""
    return None if stride == 1 else (image.shape[2] // stride, image.shape[3] // stride)


def known_alone(length: int) -> int:
    """A length that a graph is to take as it is, without remembering where it comes from.

    Every size behind it is then short to write, as 16 times this one. Derived from the image's own
    side it would be a nest of quotients, over which a tracer thinks for minutes.
    """
    if not isinstance(length, torch.SymInt):
        return length
    alone = torch.scalar_tensor(length, dtype=torch.int64).item()
    torch._check(alone >= 2)
    torch._check(alone < 1 << 16)
    assert isinstance(alone, int | torch.SymInt)
    _answer_by_example(alone, length)
    return alone


def _answer_by_example(alone: int | torch.SymInt, length: torch.SymInt) -> None:
    """Let questions about a length be answered as the traced example answers them.

    Backbones ask whether a grid is their own before they interpolate position embeddings. The
    example's is not, and what interpolation makes of embeddings of the same size is themselves.
    """
    node: Any = alone.node if isinstance(alone, torch.SymInt) else None
    answers = getattr(getattr(node, "shape_env", None), "real_tensor_prop_unbacked_vals", None)
    if answers is not None and length.node.hint is not None:
        answers[node.expr] = length.node.hint
