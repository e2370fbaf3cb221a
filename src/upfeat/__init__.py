"""Features of any vision backbone, at any resolution.

>>> import upfeat
>>> model = upfeat.load()
>>> x = model.preprocess("photo.jpg")  # doctest: +SKIP
>>> features = model(x)  # (1, 112, H, W)  # doctest: +SKIP
"""

from upfeat import functional
from upfeat._version import __version__
from upfeat.backbones import Backbone, WrappedBackbone, list_backbones, load_backbone
from upfeat.features import UpsampledFeatures
from upfeat.model import FeatUp, load
from upfeat.upsamplers import (
    Bicubic,
    Bilinear,
    JBUStack,
    JointBilateral,
    Nearest,
    Upsampler,
    list_upsamplers,
)

__all__ = [
    "Backbone",
    "Bicubic",
    "Bilinear",
    "FeatUp",
    "JBUStack",
    "JointBilateral",
    "Nearest",
    "UpsampledFeatures",
    "Upsampler",
    "WrappedBackbone",
    "__version__",
    "functional",
    "list_backbones",
    "list_upsamplers",
    "load",
    "load_backbone",
]
