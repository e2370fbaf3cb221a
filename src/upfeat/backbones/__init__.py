"""Backbones: the base class, the embedded networks, and wrappers of other libraries' models."""

from upfeat.backbones.alignment import estimate_displacement
from upfeat.backbones.base import Backbone
from upfeat.backbones.efficientnet_lite import EfficientNetLite, EfficientNetLite0
from upfeat.backbones.load import list_backbones, load_backbone
from upfeat.backbones.outer import OuterBackbone
from upfeat.backbones.tokens import tokens_to_grid
from upfeat.backbones.wrap import WrappedBackbone

__all__ = [
    "Backbone",
    "EfficientNetLite",
    "EfficientNetLite0",
    "OuterBackbone",
    "WrappedBackbone",
    "estimate_displacement",
    "list_backbones",
    "load_backbone",
    "tokens_to_grid",
]
