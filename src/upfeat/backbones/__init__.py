"""Backbones: the contract, the embedded one, and a wrapper for any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from upfeat.backbones.base import Backbone
from upfeat.backbones.efficientnet_lite import STRIDES, EfficientNetLite0
from upfeat.backbones.wrap import WrappedBackbone
from upfeat.registry import unknown_name

__all__ = ["Backbone", "EfficientNetLite0", "WrappedBackbone", "list_backbones", "load_backbone"]

_LITE0 = "efficientnet_lite0"
_BACKBONES: dict[str, tuple[int, ...]] = {
    _LITE0: (16,),
    **{f"{_LITE0}.stride{stride}": (stride,) for stride in STRIDES},
    f"{_LITE0}.stride8+16": (8, 16),
    f"{_LITE0}.stride8+32": (8, 32),
    f"{_LITE0}.stride16+32": (16, 32),
    f"{_LITE0}.stride8+16+32": (8, 16, 32),
}


def list_backbones() -> list[str]:
    """The names that :func:`load_backbone` takes."""
    return list(_BACKBONES)


def load_backbone(
    backbone: str | Callable[[Tensor], Tensor], *, pretrained: bool = True, **options: Any
) -> Backbone:
    """Load a backbone by name, or wrap a module.

    Args:
        backbone: one of :func:`list_backbones`, a :class:`Backbone` (returned as it is), or any
            module or function from (B, 3, H, W) to (B, C, h, w).
        pretrained: load a named backbone's trained weights.
        **options: for a module or function, those of :class:`WrappedBackbone`.

    Raises:
        ValueError: there is no such backbone (close names are suggested), or the module's output
            is not a feature map.

    Example:
        >>> load_backbone("efficientnet_lite0.stride8").embed_dim
        40
    """
    if isinstance(backbone, Backbone):
        return backbone
    if not isinstance(backbone, str):
        return WrappedBackbone(backbone, **options)
    if options:
        raise ValueError(f"{', '.join(options)}: these options are for a module, not for a name")
    if backbone not in _BACKBONES:
        raise ValueError(unknown_name("backbone", backbone, list_backbones()))
    return EfficientNetLite0(_BACKBONES[backbone], pretrained=pretrained)
