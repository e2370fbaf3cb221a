"""Features of any vision backbone, at any resolution.

>>> import upfeat
>>> model = upfeat.load()
>>> x = model.preprocess("photo.jpg")  # doctest: +SKIP
>>> features = model(x)  # (1, 112, H, W)  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from upfeat import functional
from upfeat._version import __version__
from upfeat.backbones import Backbone, WrappedBackbone, list_backbones, load_backbone
from upfeat.features import UpsampledFeatures
from upfeat.implicit.features import ImplicitFeatures
from upfeat.model import FeatUp, load
from upfeat.upsamplers import (
    Bicubic,
    Bilinear,
    DetailUpsampler,
    JBUStack,
    JointBilateral,
    Nearest,
    NeighbourhoodUpsampler,
    Upsampler,
    list_upsamplers,
)

if TYPE_CHECKING:
    from upfeat.implicit.fit import FitConfig, fit_implicit
    from upfeat.training import TrainConfig, train

# Imported when first asked for: using an upsampler needs nothing that training does.
_LAZY = {
    "FitConfig": "upfeat.implicit.fit",
    "TrainConfig": "upfeat.training",
    "fit_implicit": "upfeat.implicit.fit",
    "train": "upfeat.training",
}

__all__ = [
    "Backbone",
    "Bicubic",
    "Bilinear",
    "DetailUpsampler",
    "FeatUp",
    "FitConfig",
    "ImplicitFeatures",
    "JBUStack",
    "JointBilateral",
    "Nearest",
    "NeighbourhoodUpsampler",
    "TrainConfig",
    "UpsampledFeatures",
    "Upsampler",
    "WrappedBackbone",
    "__version__",
    "fit_implicit",
    "functional",
    "list_backbones",
    "list_upsamplers",
    "load",
    "load_backbone",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
