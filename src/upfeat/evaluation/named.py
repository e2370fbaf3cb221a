"""Methods by the names that the command line uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from upfeat.backbones import Backbone
from upfeat.evaluation.methods import ImplicitMethod, Method, UpsamplerMethod
from upfeat.evaluation.passes import find_passes
from upfeat.upsamplers import create_upsampler


def load_methods(names: Sequence[str], backbone: Backbone, cache: Path) -> dict[str, Method]:
    """Load methods under distinct labels: the name, or the last part of a path.

    Args:
        names: of upsamplers, as ``upfeat.load`` takes them; "implicit"; and of methods of several
            passes, see :func:`upfeat.evaluation.passes.find_passes`.
        backbone: makes the features.
        cache: folder for fits.

    Raises:
        FileNotFoundError: an upsampler is not there.
        ValueError: there is no such upsampler, or it does not suit the backbone.
    """
    if not names:
        raise ValueError("upsamplers is empty; name at least one")
    methods: dict[str, Method] = {}
    for name in dict.fromkeys(names):
        label, number = Path(name).name or name, 2
        while label in methods:
            label = f"{Path(name).name}-{number}"
            number += 1
        methods[label] = _load(name, backbone, cache)
    return methods


def _load(name: str, backbone: Backbone, cache: Path) -> Method:
    if name == ImplicitMethod.NAME:
        return ImplicitMethod(backbone, cache=cache)
    several = find_passes(name, backbone)
    if several is not None:
        return several
    upsampler = create_upsampler(name, backbone.embed_dim, backbone=backbone.name)
    expected = getattr(upsampler, "embed_dim", None)
    if expected not in (None, backbone.embed_dim):
        raise ValueError(
            f"{name} expects {expected} channels but {backbone.name} has "
            f"{backbone.embed_dim}; use an upsampler made for it, or another backbone"
        )
    return UpsamplerMethod(upsampler, backbone)
