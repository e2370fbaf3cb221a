"""Entries for ``torch.hub``: published upsamplers, by this library's operators, without NATTEN.

>>> naf = torch.hub.load("OWNER/upfeat", "naf", checkpoint="naf_release.pth")  # doctest: +SKIP
>>> upsampled = naf(image, features, (height, width))  # doctest: +SKIP

FeatUp's JBU stacks go by the names that FeatUp published them under:

>>> stack = torch.hub.load("OWNER/upfeat", "dino16")  # doctest: +SKIP
>>> upsampled = stack(features, image)  # doctest: +SKIP
>>> backbone = "timm:vit_small_patch16_224.dino"
>>> model = torch.hub.load("OWNER/upfeat", "dino16", backbone=backbone)  # doctest: +SKIP
>>> upsampled, coarse = model(image), model.backbone(image)  # doctest: +SKIP
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_FEATUP = (
    "https://marhamilresearch4.blob.core.windows.net/feature-upsampling-public/pretrained/"
    "{folder}{name}_jbu_stack_cocostuff.ckpt"
)

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


def uplift(
    checkpoint: str,
    *,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
) -> upfeat.ImageFirst:
    """UPLiFT for a ViT (of UPLiFT-upsampler on Hugging Face); see :func:`anyup`."""
    return _load("uplift", checkpoint, sha256, device)


def _entry(name: str, channels: int, backbone_of: str) -> Callable[..., Any]:
    def featup(
        pretrained: bool = True,
        use_norm: bool = True,
        *,
        checkpoint: str | None = None,
        backbone: str | torch.nn.Module | None = None,
        device: str | torch.device = "cpu",
    ) -> upfeat.JBUStack | upfeat.FeatUp:
        return _featup(name, channels, pretrained, use_norm, checkpoint, backbone, device)

    featup.__name__ = featup.__qualname__ = name
    featup.__doc__ = _DOCUMENTATION.format(backbone_of, channels)
    return featup


_DOCUMENTATION = """FeatUp's JBU stack for {} ({} channels), called as ``(features, image)``.

    Args:
        pretrained: read the published weights; otherwise initial ones.
        use_norm: those trained on features after a norm over channels; the published code puts one
            behind its backbone.
        checkpoint: their file; ``None`` for that of :func:`torch.hub.get_dir`, downloaded if it is
            not there. Tensors are read, code is not.
        backbone: a name or module as :func:`upfeat.load` takes it, to join with the stack; the
            result is then called with the image alone. ``None`` for the stack.
        device: where to put it.

    Raises:
        FileNotFoundError: the file is not there and cannot be downloaded; the message says which
            and where to put it.
    """

dino16 = _entry("dino16", 384, "DINO ViT-S/16")
dinov2 = _entry("dinov2", 384, "DINOv2 ViT-S/14")
vit = _entry("vit", 384, "a supervised ViT-S/16")
clip = _entry("clip", 512, "CLIP ViT-B/16")
maskclip = _entry("maskclip", 512, "MaskCLIP")
resnet50 = _entry("resnet50", 2048, "ResNet-50")


def _featup(
    name: str,
    channels: int,
    pretrained: bool,
    use_norm: bool,
    checkpoint: str | None,
    backbone: str | torch.nn.Module | None,
    device: str | torch.device,
) -> upfeat.JBUStack | upfeat.FeatUp:
    if pretrained:
        path = _published(name, use_norm) if checkpoint is None else Path(checkpoint)
        stack = upfeat.JBUStack.from_featup(path)
    else:
        stack = upfeat.JBUStack(channels)
    if stack.embed_dim != channels:
        raise ValueError(f"{checkpoint}: is for {stack.embed_dim} channels; {name} has {channels}")
    if backbone is None:
        return stack.to(device).eval()
    return upfeat.load(backbone, upsampler=stack).to(device)


def _published(name: str, use_norm: bool) -> Path:
    """The published file, downloaded once into the folder of torch.hub."""
    folder = "" if use_norm else "no_norm/"
    url = _FEATUP.format(folder=folder, name=name)
    path = Path(torch.hub.get_dir()) / "checkpoints" / "featup" / f"{folder}{name}.ckpt"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except OSError as error:  # URLError is one
        raise FileNotFoundError(
            f"{name}: its weights cannot be downloaded ({error}); download {url} and put it at "
            f"{path}, or give checkpoint=FILE"
        ) from None
    return path


def _load(
    name: str, checkpoint: str, sha256: str | None, device: str | torch.device
) -> upfeat.ImageFirst:
    upsampler = upfeat.load_upsampler(checkpoint, sha256=sha256)
    if upsampler.name != name:
        raise ValueError(f"{checkpoint}: holds {upsampler.name}, not {name}")
    return upfeat.ImageFirst(upsampler).to(device).eval()
