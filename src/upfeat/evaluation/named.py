"""Loading of methods by the names that the command line uses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from upfeat.backbones import Backbone
from upfeat.evaluation.methods import ImplicitMethod, Method, UpsamplerMethod
from upfeat.evaluation.passes import SeveralPasses, find_passes
from upfeat.loading import load
from upfeat.upsamplers import Upsampler, create_upsampler

Named = str | Path | Upsampler
"""An upsampler as users give it: a name, a path of a folder or checkpoint, or an object."""


def load_methods(
    upsamplers: Named | Sequence[Named], backbone: Backbone, cache: Path
) -> dict[str, Method]:
    """Load methods under distinct labels: their names, or the last parts of their paths.

    Args:
        upsamplers: one or more upsamplers as for ``upfeat.load``, "implicit", and names of methods
            of several passes, see :func:`upfeat.evaluation.passes.find_passes`.
        backbone: backbone of the coarse features.
        cache: folder in which implicit fits are cached.

    Raises:
        FileNotFoundError: the file or folder of an upsampler does not exist.
        ValueError: there is no such upsampler, or it does not suit the backbone.
    """
    given = [upsamplers] if isinstance(upsamplers, Named) else list(upsamplers)
    if not given:
        raise ValueError("upsamplers is empty; name at least one")
    methods: dict[str, Method] = {}
    for one in dict.fromkeys(given):
        name = one.name if isinstance(one, Upsampler) else Path(one).name or str(one)
        label, number = name, 2
        while label in methods:
            label = f"{name}-{number}"
            number += 1
        methods[label] = _load(one, backbone, cache)
    return methods


def _load(given: Named, backbone: Backbone, cache: Path) -> Method:
    name = given.name if isinstance(given, Upsampler) else str(given)
    if isinstance(given, Upsampler):
        # A copy, because methods freeze and move it, and the caller may be training it.
        upsampler = copy.deepcopy(given)
    elif name == ImplicitMethod.NAME:
        return ImplicitMethod(backbone, cache=cache)
    else:
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
    if upsampler.wants_hidden:
        return SeveralPasses(load(backbone, upsampler=upsampler, device=backbone.mean.device))
    return UpsamplerMethod(upsampler, backbone)
