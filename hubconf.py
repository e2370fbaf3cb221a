"""Entries for ``torch.hub``: published upsamplers, by this library's operators, without NATTEN.

>>> naf = torch.hub.load("OWNER/upfeat", "naf", checkpoint="naf_release.pth")  # doctest: +SKIP
>>> upsampled = naf(image, features, (height, width))  # doctest: +SKIP
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

dependencies = ["torch", "numpy", "PIL", "safetensors"]

try:
    import upfeat
except ImportError:  # as torch.hub fetches it: a source tree that nobody installed
    sys.path.insert(0, str(Path(__file__).parent / "src"))
    import upfeat


def anyup(
    checkpoint: str,
    *,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
) -> upfeat.ImageFirst:
    """AnyUp, called as ``(image, features, output_size)``.

    Args:
        checkpoint: its file; ``anyup_paper.pth``, of the releases of wimmerth/anyup, for what that
            repository calls ``anyup``. Tensors are read, code is not.
        sha256: what the file must hash to; ``None`` for no check.
        device: where to put it.
    """
    return _load("anyup", checkpoint, sha256, device)


def anyup_multi_backbone(
    checkpoint: str,
    *,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
) -> upfeat.ImageFirst:
    """AnyUp trained on several backbones (``anyup_multi_backbone.pth``); see :func:`anyup`."""
    return _load("anyup", checkpoint, sha256, device)


def jafar(
    checkpoint: str,
    *,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
) -> upfeat.ImageFirst:
    """JAFAR (of the releases of PaulCouairon/JAFAR, one for each backbone); see :func:`anyup`."""
    return _load("jafar", checkpoint, sha256, device)


def naf(
    checkpoint: str,
    *,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
) -> upfeat.ImageFirst:
    """NAF (``naf_release.pth``, of the releases of valeoai/NAF); see :func:`anyup`."""
    return _load("naf", checkpoint, sha256, device)


def _load(
    name: str, checkpoint: str, sha256: str | None, device: str | torch.device
) -> upfeat.ImageFirst:
    upsampler = upfeat.load_upsampler(checkpoint, sha256=sha256)
    if upsampler.name != name:
        raise ValueError(f"{checkpoint}: holds {upsampler.name}, not {name}")
    return upfeat.ImageFirst(upsampler).to(device).eval()
