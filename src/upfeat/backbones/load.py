"""Loading of backbones by name, from files, and from models of other libraries."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn

from upfeat.backbones import hub, open_clip, timm
from upfeat.backbones.adapt import adapt, known_inside, unwrapped
from upfeat.backbones.base import Backbone
from upfeat.backbones.efficientnet_lite import STRIDES, EfficientNetLite, EfficientNetLite0
from upfeat.backbones.outputs import Layer, NoFeatures
from upfeat.backbones.pretrained import load_transformers
from upfeat.backbones.settings import Settings
from upfeat.backbones.wrap import WrappedBackbone, as_list
from upfeat.bounds import flag, shown
from upfeat.machine import find_device
from upfeat.registry import unknown_name

_COMBINATIONS = ((8, 16), (8, 32), (16, 32), (8, 16, 32))
_BACKBONES: dict[str, tuple[int, tuple[int, ...]]] = {
    f"efficientnet_lite{variant}{level}": (variant, strides)
    for variant in (0, 1, 2)
    for level, strides in (
        ("", (16,)),
        *((f".stride{stride}", (stride,)) for stride in STRIDES),
        *((f".stride{'+'.join(map(str, strides))}", strides) for strides in _COMBINATIONS),
    )
}
_LIBRARIES = {
    "timm": "timm:NAME",
    "hf": "hf:ID-OR-FOLDER",
    "open_clip": "open_clip:NAME/TAG",
    "hub": "hub:REPO:NAME",
}
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def list_backbones() -> list[str]:
    """List the names of the embedded backbones.

    :func:`load_backbone` also takes ``timm:NAME``, ``hf:ID``, ``open_clip:NAME/TAG`` and
    ``hub:REPO:NAME``.
    """
    return list(_BACKBONES)


def load_backbone(
    backbone: str | Path | Callable[[Tensor], Any],
    *,
    pretrained: bool = True,
    layer: Layer | Sequence[Layer] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    fit: str | None = None,
    **options: Any,
) -> Backbone:
    """Load a backbone by name, or make a backbone from a module or function.

    Args:
        backbone: one of

            * a name from :func:`list_backbones`;
            * a name in a library: ``"timm:NAME"``, ``"hf:ID-OR-FOLDER"``,
              ``"open_clip:NAME/TAG"`` or ``"hub:REPO:NAME"``;
            * a name in a library with layers: ``"timm:NAME@8"``, ``"hf:FOLDER@5,8"``,
              ``"hub:REPO:NAME@layer3"``;
            * a file: TorchScript (``.pt``, ``.ts``), an exported program (``.pt2``), or
              ``"my_file.py:make"``, a function without arguments that makes a model;
            * a model of timm, transformers or open_clip, or any module or function from images
              (B, 3, H, W) to features in one of the forms that :class:`WrappedBackbone` lists;
            * a :class:`Backbone`, which is returned itself.
        pretrained: load the trained weights of a named backbone; otherwise random weights.
        layer: number of the layer, from 0, counting a transformer's blocks or a hierarchical
            network's stages. For a module without numbered layers, the name of a module inside;
            for a model with several outputs, the key of an output. The layers of a list are
            concatenated on the finest grid, in the order given, without the last norm. ``None``,
            or the last layer's number, for the last layer after the last norm.
        device: device to move the backbone to; ``None`` to leave it where it is.
        dtype: floating-point type that the backbone computes in, such as ``torch.bfloat16``; the
            features' dtype is the image's all the same.
        fit: treatment of images of other sizes by a model for one size: ``"interpolate"``
            interpolates the position embeddings (the default if the library can), ``"tile"``
            covers the image with windows (the default otherwise), ``"resize"`` resizes the image.
        **options: arguments of :class:`WrappedBackbone`: ``mean``, ``std``, ``input_size``,
            ``name``, ``layout``, ``prefix_tokens``, ``stride``, ``embed_dim``.

    Raises:
        FileNotFoundError: a file or folder does not exist, or a download fails.
        TypeError: ``backbone`` is no name, module or function.
        ValueError: there is no such backbone (close names are suggested), a library is missing, or
            the model has no spatial features; the message is one line and names the fix.

    Example:
        >>> load_backbone("efficientnet_lite0.stride8").embed_dim
        40
    """
    inside = getattr(backbone, "backbone", None)
    if isinstance(inside, Backbone) and hasattr(backbone, "upsampler"):
        raise ValueError(
            f"backbone is a {type(backbone).__name__}, whose features are upsampled already; give "
            "its own backbone, as model.backbone"
        )
    if isinstance(backbone, type):
        name = backbone.__name__
        raise TypeError(f"backbone={name} is a class; give a model of it, as {name}(…) makes one")
    pretrained = flag("pretrained", pretrained)
    if isinstance(backbone, Backbone):
        _refuse("a Backbone", {"layer": layer, "fit": fit, **options})
        return _place(backbone, device, dtype)
    layers = as_list(layer)
    name, settings = None, None
    if isinstance(backbone, (str, Path)):
        name, layers = _split_layers(str(backbone), layers)
        if name in _BACKBONES:
            what = f"{name}, whose levels are named as efficientnet_lite0.stride8"
            _refuse(what, {"layer": layers, "fit": fit, **options})
            return _place(_embedded(name, pretrained), device, dtype)
        module, settings = _load_named(name, pretrained)
        if isinstance(module, Backbone):
            made_by = f"the Backbone that {name} makes"
            _refuse(made_by, {"layer": layers, "fit": fit, **options})
            return _place(module, device, dtype)
        name = name if layers is None else f"{name}@{','.join(map(str, layers))}"
    elif callable(backbone):
        module = backbone
    else:
        raise TypeError(
            f"backbone={shown(backbone)} is no model; give a name, a module or "
            "a function (B, 3, H, W) -> (B, C, h, w)"
        )
    module = _cast(unwrapped(module), device, dtype)
    options = {
        "name": name or getattr(module, "__name__", None) or type(module).__name__,
        **options,
    }
    reader: Any = None
    try:
        adapted = adapt(module, layers, interpolate=fit in (None, "interpolate"), settings=settings)
        reader = adapted.module
        made = WrappedBackbone(
            reader, layer=adapted.layers, settings=adapted.settings, fit=fit, **options
        )
    except NoFeatures as error:
        hint = known_inside(module, getattr(reader, "network", None))
        if hint is None:
            raise
        raise NoFeatures(f"{error}; {hint}") from error
    return _place(made, device, dtype)


def _split_layers(name: str, layers: Sequence[Layer] | None) -> tuple[str, Sequence[Layer] | None]:
    """Split a name such as "timm:NAME@3,8" into the name and its layers, [3, 8]."""
    found = re.fullmatch(r"(.+)@(-?\d+(?:,-?\d+)*)", name)
    if found is None:  # names of modules, of models without numbered layers
        found = re.fullmatch(r"(hub:.+|.+\.py:\w+)@([\w.]+(?:,[\w.]+)*)", name)
    if found is None:
        whole, at, after = name.rpartition("@")
        if at and Path(whole.removeprefix("hf:")).expanduser().is_dir():
            raise ValueError(f'{whole}: "@{after}" names no layers; give numbers, as {whole}@5,8')
        return name, layers
    if layers is not None:
        raise ValueError(f"layer={layers}: {name} names layers already; give one of both")
    parts = found[2].split(",")
    return found[1], [int(part) if re.fullmatch(r"-?\d+", part) else part for part in parts]


def _embedded(name: str, pretrained: bool) -> Backbone:
    variant, strides = _BACKBONES[name]
    if variant == 0:
        return EfficientNetLite0(strides, pretrained=pretrained)
    return EfficientNetLite(variant, strides, pretrained=pretrained)


def _load_named(name: str, pretrained: bool) -> tuple[Any, Settings | None]:
    """Load the model of a name, with its image settings if the loader reads them."""
    library, separator, rest = name.partition(":")
    if separator and library in _LIBRARIES:
        if not rest:
            raise ValueError(f'"{name}" names no model; give {_LIBRARIES[library]}')
        if library == "timm":
            return timm.load_timm(rest, pretrained=pretrained), None
        if library == "hf":
            return load_transformers(rest, pretrained=pretrained)
        if library == "open_clip":
            return open_clip.load_open_clip(rest, pretrained=pretrained), None
        return hub.load_hub(rest, pretrained=pretrained), None
    if Path(name).suffix in hub.PROGRAMS:
        return hub.load_program(Path(name).expanduser()), None
    if name.rpartition(":")[0].endswith(".py"):
        return hub.load_function(name), None
    if Path(name).suffix == ".py":
        raise ValueError(f'"{name}" names no function; give {name}:FUNCTION, which makes a model')
    if meant := _with_library(name):  # first: C:/folder is no model of a library C
        raise ValueError(f'backbone "{name}" is unknown; did you mean {meant}?')
    if separator and not PureWindowsPath(name).drive:
        raise ValueError(f"{unknown_name('library', library, list(_LIBRARIES))} {_forms()}")
    known = list_backbones()
    # Suggestions of Lite1 and Lite2 would crowd out Lite0.
    if not any(f"lite{variant}" in name for variant in (1, 2)):
        known = [one for one in known if one.startswith("efficientnet_lite0")]
    raise ValueError(f"{unknown_name('backbone', name, known)} {_forms()}")


def _with_library(name: str) -> str | None:
    """Complete a name whose library was left out, for a suggestion; ``None`` without a guess."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return f"hf:{name}"
    if (folder / "hubconf.py").is_file():
        return f"hub:{name}:NAME"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not folder.exists():
        return f"hf:{name} or open_clip:{name}"
    return f"timm:{name}" if timm.is_model(name) else None


def _forms() -> str:
    return f"(or give {', '.join(_LIBRARIES.values())})"


def _refuse(what: str, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: not an option of {what}")


def _cast(module: Any, device: str | torch.device | None, dtype: str | torch.dtype | None) -> Any:
    """Move a module to the device and dtype that it will compute in, before it is probed."""
    if not isinstance(module, nn.Module) or (device is None and dtype is None):
        return module
    return _place(module, device, dtype)


def _place(module: Any, device: str | torch.device | None, dtype: str | torch.dtype | None) -> Any:
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ValueError(unknown_name("dtype", dtype, list(_DTYPES)))
        dtype = _DTYPES[dtype]
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={shown(dtype)} must be a type of numbers, as torch.bfloat16")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be a floating-point type, as torch.bfloat16")
    if dtype is not None:
        module = module.to(dtype=dtype)
    return module if device is None else module.to(find_device(device))
