"""Exportable modules of a whole model and of an upsampler alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from upfeat.guided import Guided
from upfeat.model import FeatUp
from upfeat.portable import axes
from upfeat.portable.form import form_of
from upfeat.scales import guidance_for
from upfeat.types import Size
from upfeat.upsamplers.detail import FINER
from upfeat.upsamplers.head import Head


class PortableModel(nn.Module):
    """Exportable module of a :class:`upfeat.FeatUp` with an optional linear head."""

    def __init__(self, model: FeatUp, head: Head, stride: int = 1) -> None:
        """Copy the parts of a model.

        Args:
            model: backbone and upsampler, on the CPU.
            head: linear head to apply to the features; ``Head()`` for none.
            stride: image pixels per output pixel, on both axes.
        """
        super().__init__()
        self.backbone, self.early = copy.deepcopy(model.backbone), model.early
        self.form = form_of(model.upsampler, head)
        self.bands, self.output_stride = model.bands, stride
        # The upsampler is read for its guidance only. A tuple keeps it from being registered as a
        # submodule: the form contains its weights already.
        self.source = (model.upsampler,)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W), normalised for the backbone -> (B, C or K, *output size).

        The output has C channels, or K with a head of K outputs; :func:`output_size` is its size.
        """
        stride, size = self.backbone.stride, (image.shape[2], image.shape[3])
        cells = [known_alone(axes.rounded(side, stride)) for side in size]
        aligned = (cells[0] * stride, cells[1] * stride)
        seen = image
        # A graph for any size cannot branch on a size, so it always resizes; at an aligned size
        # this changes nothing. Either both sides are symbols or neither is.
        if isinstance(size[0], torch.SymInt) or aligned != size:
            seen = axes.resize(image, aligned)
        seen, hidden = seen.to(self.backbone.dtype), None
        if not self.early:
            features = self.backbone.extract(self.backbone.place(seen))
        elif isinstance(self.backbone, Guided):
            features, hidden = guided(self.backbone, seen)
        else:
            features, hidden = self.backbone.extract_with_hidden(self.backbone.place(seen))
            assert hidden is not None
        features = features.to(image.dtype)
        hidden = None if hidden is None else hidden.to(image.dtype)
        guidance = guidance_for(self.source[0], image, self.backbone, self.bands)
        return self.form(features, guidance, output_size(image, self.output_stride), hidden)


def guided(backbone: Guided, image: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what :meth:`Guided.extract_with_hidden` returns, without a branch on a size.

    Args:
        backbone: the backbone and its guide.
        image: (B, 3, H, W), normalised, of whole cells of the backbone.
    """
    inner, guide = backbone.backbone, backbone.guide
    features = inner.extract(inner.place(image))
    seen = backbone.converted(image)
    cell = guide.step * guide.stride
    cells = [known_alone(axes.rounded(side, cell)) for side in seen.shape[2:]]
    seen = axes.resize(seen, (cells[0] * cell, cells[1] * cell))
    layers, early = guide.extract_with_hidden(guide.place(seen))
    finer = FINER * features.shape[2], FINER * features.shape[3]
    maps = [layers] if early is None else [early, layers]
    return features, torch.cat([axes.on_grid(one, finer) for one in maps], dim=1)


class PortableUpsampler(nn.Module):
    """Exportable module of an upsampler alone, from features, guidance and early layers."""

    def __init__(self, form: nn.Module, stride: int = 1) -> None:
        """Store the upsampler's form; ``stride`` is the guidance pixels per output pixel."""
        super().__init__()
        self.form, self.output_stride = form, stride
        self.eval().requires_grad_(False)

    def forward(self, features: Tensor, guidance: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Upsample features; see :class:`PortableModel`.

        Args:
            features: (B, C, h, w).
            guidance: (B, 3, H, W).
            hidden: (B, D, h', w'), for upsamplers that were trained on early layers.

        Returns:
            (B, C or K, *output size).
        """
        return self.form(features, guidance, output_size(guidance, self.output_stride), hidden)


def output_size(image: Tensor, stride: int) -> Size | None:
    """Return the image's sides divided by ``stride``, rounded down; ``None`` for stride 1.

    Forms take ``None`` for the guidance's size, which is the image's size.
    """
    return None if stride == 1 else (image.shape[2] // stride, image.shape[3] // stride)


def known_alone(length: int) -> int:
    """Give a computed length a symbol of its own; return a plain integer unchanged.

    The symbol's value still comes from the image, but the tracer no longer knows the formula. Sizes
    derived from the symbol are short formulas, such as 16 times its value. Derived from the image's
    side they would be nested quotients, which take a tracer minutes to simplify.
    """
    if not isinstance(length, torch.SymInt):
        return length
    # ``item`` of a tensor gives a symbol whose origin the tracer does not follow.
    symbol = torch.scalar_tensor(length, dtype=torch.int64).item()
    # Exported sides are at least two strides (``_Task.least`` in exporting.py), so a grid has at
    # least 2 cells on a side.
    torch._check(symbol >= 2)
    assert isinstance(symbol, int | torch.SymInt)
    _answer_by_example(symbol, length)
    return symbol


def _answer_by_example(symbol: int | torch.SymInt, length: torch.SymInt) -> None:
    """Let the tracer decide comparisons of a new symbol by the value in the traced example.

    Many backbones interpolate position embeddings only if an image's grid differs from the grid
    they were trained on. The traced example's grid is normally 4×5 cells (``trace`` in
    exporting.py), which differs, so the graph interpolates for every image; at the trained grid's
    size this changes nothing.
    """
    node: Any = symbol.node if isinstance(symbol, torch.SymInt) else None
    # The tracer's table of values for symbols without a formula, internal to PyTorch and absent in
    # some cases; without it such comparisons stay undecided, and the trace fails.
    values = getattr(getattr(node, "shape_env", None), "real_tensor_prop_unbacked_vals", None)
    hint = length.node.hint  # the length in the traced example
    if values is not None and hint is not None:
        values[node.expr] = hint
