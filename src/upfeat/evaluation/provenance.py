"""Names for what a stored result depends on: code, weights, and functions that have none."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from upfeat.backbones import Backbone
from upfeat.backends.cpu import library as cpu_library
from upfeat.upsamplers import Upsampler

_PACKAGE = Path(__file__).parents[1]

PREPARING = ("images.py", "backbones", "evaluation/datasets.py", "evaluation/readers.py")
PREPARING += ("evaluation/prepared.py",)
"""Source that decides what a prepared image is."""

VIEWING = (*PREPARING, "geometry.py", "views.py", "evaluation/view_features.py")
"""Source that decides what the backbone sees of a jittered view."""

SCORING = ("images.py", "backbones", "backends", "evaluation", "functional.py", "implicit")
SCORING += ("downsamplers.py", "geometry.py", "losses.py", "pooling.py", "upsamplers", "views.py")
"""Source that decides a score."""

_DRAWING = ("evaluation/report.py", "evaluation/report_figures.py")
"""Only show scores."""


@lru_cache
def source_digest(parts: tuple[str, ...]) -> str:
    """SHA-256 over source files of this package, so that results of older code are not reused.

    Args:
        parts: files, or folders of which every ``.py`` counts; the compiled kernels count wherever
            ``backends`` does.
    """
    found = hashlib.sha256()
    for part in parts:
        path = _PACKAGE / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            name = file.relative_to(_PACKAGE).as_posix()
            if name not in _DRAWING:
                found.update(f"{name}\n".encode())
                found.update(file.read_bytes())
    if "backends" in parts and cpu_library.unavailable_reason() is None:
        library = cpu_library.library_info()
        found.update(f"{library['isa']}\n".encode())
        found.update(Path(library["path"]).read_bytes())
    return found.hexdigest()


def digest(module: nn.Module) -> str:
    """A name for a module's weights: SHA-256 over its parameters and buffers, with their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def identify_upsampler(upsampler: Upsampler) -> str:
    """A name for all that decides what an upsampler does: class, configuration, weights."""
    cls = type(upsampler)
    known = f"{cls.__module__}.{cls.__qualname__}|{upsampler.config()}|{digest(upsampler)}"
    return f"{known}|{upsampler.normalization}"


@torch.no_grad()
def identify_backbone(backbone: Backbone) -> str:
    """A name for all that decides a backbone's features.

    A function has no weights to go by, so what the backbone makes of one fixed picture counts too.
    """
    cls = type(backbone)
    side = 2 * backbone.stride
    ramp = torch.arange(3 * side * side, dtype=torch.float32).mul(0.7).sin().view(1, 3, side, side)
    response = backbone(ramp.to(backbone.mean.device))
    known = f"{cls.__module__}.{cls.__qualname__}|{backbone.name}|{digest(backbone)}"
    return f"{known}|{backbone.normalization}|{hashlib.sha256(_bytes(response)).hexdigest()}"


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()
