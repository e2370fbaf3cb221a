"""Features of any vision backbone, at any resolution.

>>> import upfeat
>>> model = upfeat.load()
>>> x = model.preprocess("photo.jpg")
>>> features = model(x)  # (1, 112, H, W)
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from upfeat._version import __version__

if TYPE_CHECKING:
    from upfeat import functional
    from upfeat.attachment import attach
    from upfeat.backbones import (
        Backbone,
        WrappedBackbone,
        list_backbones,
        load_backbone,
        tokens_to_grid,
    )
    from upfeat.exporting import export
    from upfeat.features import UpsampledFeatures
    from upfeat.implicit.features import ImplicitFeatures
    from upfeat.implicit.fit import FitConfig, fit_implicit
    from upfeat.loading import load
    from upfeat.model import FeatUp
    from upfeat.text import TextBackbone, load_text_backbone
    from upfeat.training import TrainConfig, train
    from upfeat.upsamplers import (
        JAFAR,
        NAF,
        AnyUp,
        Bicubic,
        Bilinear,
        DetailUpsampler,
        EarlyDetailUpsampler,
        ImageFirst,
        JBUStack,
        JointBilateral,
        Nearest,
        NeighbourhoodUpsampler,
        UPLiFT,
        Upsampler,
        list_upsamplers,
        load_upsampler,
    )

# Public names and their modules, imported on first access: the command answers --help without
# loading PyTorch, and an upsampler can be used without the packages for training. Type checkers
# read the imports above. No module has the name of a public function, because importing the module
# would replace the function.
_LAZY = {
    "AnyUp": "upfeat.upsamplers",
    "Backbone": "upfeat.backbones",
    "Bicubic": "upfeat.upsamplers",
    "Bilinear": "upfeat.upsamplers",
    "DetailUpsampler": "upfeat.upsamplers",
    "EarlyDetailUpsampler": "upfeat.upsamplers",
    "FeatUp": "upfeat.model",
    "FitConfig": "upfeat.implicit.fit",
    "ImageFirst": "upfeat.upsamplers",
    "ImplicitFeatures": "upfeat.implicit.features",
    "JAFAR": "upfeat.upsamplers",
    "JBUStack": "upfeat.upsamplers",
    "JointBilateral": "upfeat.upsamplers",
    "NAF": "upfeat.upsamplers",
    "Nearest": "upfeat.upsamplers",
    "NeighbourhoodUpsampler": "upfeat.upsamplers",
    "TextBackbone": "upfeat.text",
    "TrainConfig": "upfeat.training",
    "UPLiFT": "upfeat.upsamplers",
    "UpsampledFeatures": "upfeat.features",
    "Upsampler": "upfeat.upsamplers",
    "WrappedBackbone": "upfeat.backbones",
    "attach": "upfeat.attachment",
    "export": "upfeat.exporting",
    "fit_implicit": "upfeat.implicit.fit",
    "list_backbones": "upfeat.backbones",
    "list_upsamplers": "upfeat.upsamplers",
    "load": "upfeat.loading",
    "load_backbone": "upfeat.backbones",
    "load_text_backbone": "upfeat.text",
    "load_upsampler": "upfeat.upsamplers",
    "tokens_to_grid": "upfeat.backbones",
    "train": "upfeat.training",
}

__all__ = [
    "AnyUp",
    "Backbone",
    "Bicubic",
    "Bilinear",
    "DetailUpsampler",
    "EarlyDetailUpsampler",
    "FeatUp",
    "FitConfig",
    "ImageFirst",
    "ImplicitFeatures",
    "JAFAR",
    "JBUStack",
    "JointBilateral",
    "NAF",
    "Nearest",
    "NeighbourhoodUpsampler",
    "TextBackbone",
    "TrainConfig",
    "UPLiFT",
    "UpsampledFeatures",
    "Upsampler",
    "WrappedBackbone",
    "__version__",
    "attach",
    "export",
    "fit_implicit",
    "functional",
    "list_backbones",
    "list_upsamplers",
    "load",
    "load_backbone",
    "load_text_backbone",
    "tokens_to_grid",
    "load_upsampler",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, on first access (PEP 562)."""
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    elif not name.startswith("__") and find_spec(f"{__name__}.{name}"):
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Register the operators if PyTorch is already imported: torch.export.load finds them by name.
if "torch" in sys.modules:
    import_module("upfeat.functional")
