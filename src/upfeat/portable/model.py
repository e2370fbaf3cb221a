"""Exportable modules of a whole model and of an upsampler alone."""

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
    """Exportable module of a :class:`upfeat.FeatUp` with an optional linear head."""

    def __init__(self, model: FeatUp, head: Head, stride: int = 1) -> None:
        """Copy the parts of a model.

        Args:
            model: backbone and upsampler, on the CPU.
            head: linear head to apply to the features; ``Head()`` for none.
            stride: image pixels for each output pixel, on both axes.
        """
        super().__init__()
        self.backbone = copy.deepcopy(model.backbone)
        self.form = form_of(model.upsampler, head)
        self.bands, self.stride = model.bands, stride
        # A tuple keeps the upsampler from being registered: its weights are in the form already.
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
        seen = self.backbone.place(seen.to(self.backbone.dtype))
        features = self.backbone.extract(seen).to(image.dtype)
        guidance = guidance_for(self.source[0], image, self.backbone, self.bands)
        return self.form(features, guidance, output_size(image, self.stride))


class PortableUpsampler(nn.Module):
    """Exportable module of an upsampler alone, from features and guidance."""

    def __init__(self, form: nn.Module, stride: int = 1) -> None:
        """Keep the upsampler's form; ``stride`` is guidance pixels for each output pixel."""
        super().__init__()
        self.form, self.stride = form, stride
        self.eval().requires_grad_(False)

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        """(B, C, h, w), (B, 3, H, W) -> (B, C or K, H/stride, W/stride)."""
        return self.form(features, guidance, output_size(guidance, self.stride))


def output_size(image: Tensor, stride: int) -> Size | None:
    """Return the output's size, one pixel for ``stride`` of the image; ``None``: the image's."""
    return None if stride == 1 else (image.shape[2] // stride, image.shape[3] // stride)


def known_alone(length: int) -> int:
    """Turn a length into a new symbol of the graph, independent of the image's sides.

    A plain integer is returned unchanged.

    Sizes derived from the symbol are short formulas, such as 16 times its value. Derived from the
    image's side they would be nested quotients, which take a tracer minutes to simplify.
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
    """Let the tracer decide comparisons of a new symbol by the value in the traced example.

    Backbones compare the grid with their own before they interpolate position embeddings. The
    example's grid differs, so the graph always interpolates, which leaves embeddings of the
    backbone's own grid unchanged.
    """
    node: Any = alone.node if isinstance(alone, torch.SymInt) else None
    answers = getattr(getattr(node, "shape_env", None), "real_tensor_prop_unbacked_vals", None)
    if answers is not None and length.node.hint is not None:
        answers[node.expr] = length.node.hint
