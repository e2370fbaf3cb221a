"""Alignment of a backbone as an upsampler expects it."""

from __future__ import annotations

from upfeat.backbones import Backbone
from upfeat.upsamplers import Upsampler


def align_for(upsampler: Upsampler, backbone: Backbone) -> Backbone:
    """Align a backbone as the upsampler was trained, unless it is aligned already.

    Raises:
        ValueError: the upsampler was trained on early layers of another backbone.
    """
    name, expected = backbone.origin.name, upsampler.trained_for
    if upsampler.wants_hidden and expected not in (None, name):
        raise ValueError(
            f"upsampler={upsampler.name!r} was trained on early layers of {expected}, not of "
            f"{name}; give one for it or any other, as detail, or set upsampler.trained_for=None "
            "if its layers are the same"
        )
    displacement = 0 if backbone.displacement else upsampler.displacement
    return backbone.aligned(displacement) if displacement else backbone
