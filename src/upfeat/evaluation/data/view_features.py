"""Backbone features of jittered views, computed once and stored on disk for all upsamplers."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.evaluation.data.prepared import PreparedSet, named_generator, normalised, read_whole
from upfeat.provenance import source_digest
from upfeat.storage import write_tensors
from upfeat.views import Jitter, apply_jitter, sample_jitters


def view_features(
    images: PreparedSet, index: int, backbone: Backbone, count: int, seed: int
) -> tuple[Jitter, Tensor]:
    """Draw views of one image, by the seed and the image's name, and extract their features.

    Args:
        images: images prepared with the backbone.
        index: index of the image.
        backbone: backbone, in eval mode.
        count: number N of views.
        seed: seed of the jitters.

    Returns:
        The jitters, and the backbone's features of the views, (N, C, h, w).
    """
    sample = images[index]
    generator = named_generator(seed, sample.name)
    views = sample_jitters(count, size=sample.size, generator=generator)
    recipe = f"{sample.name}|{seed}|{count}|{source_digest(__name__)}"
    name = f"{images.files[index].stem}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    path = images.files[index].with_name(f"{name}.safetensors")
    stored = read_whole(path)
    if stored is None:
        with torch.no_grad():
            seen = backbone(apply_jitter(normalised(sample.image, backbone), views))
        write_tensors(path, {"features": seen.contiguous()}, {"sample": sample.name})
    else:
        seen = stored["features"].to(images.device)
    return views, seen
