"""Choice of the reader of a model's features, by the library that the model comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from upfeat.backbones import hub, open_clip, timm, transformers
from upfeat.backbones.held import held_modules
from upfeat.backbones.outputs import Layer
from upfeat.backbones.pretrained import settings_of_object
from upfeat.backbones.settings import Settings, settings_of


class Adapted(NamedTuple):
    """A model as a function from images to features."""

    module: Callable[[Tensor], Any]
    layers: Sequence[Layer] | None
    """Entries to pick from the function's output; ``None`` if no choice is left."""
    settings: Settings | None
    """Settings from the model's configuration; ``None`` to search the modules inside for them."""


def adapt(
    module: Callable[[Tensor], Any],
    layers: Sequence[Layer] | None,
    *,
    interpolate: bool,
    settings: Settings | None = None,
) -> Adapted:
    """Put the reader of its library around a model; a model of no known library stays as it is.

    Args:
        module: any module or function.
        layers: numbers or names of layers; ``None`` for the last.
        interpolate: interpolate position embeddings for images of other sizes.
        settings: settings of the model's images; ``None`` to read them from its configuration.

    Raises:
        ValueError: a layer does not exist, or the model has no spatial features.
    """
    if timm.is_timm(module):
        assert isinstance(module, nn.Module)
        settings = settings or settings_of(module)
        network = timm.any_size(module) if interpolate else module
        return Adapted(timm.TimmFeatures(network, layers), _all(layers), settings)
    if transformers.is_transformers(module):
        assert isinstance(module, nn.Module)
        return _from_transformers(module, layers, interpolate, settings)
    if open_clip.is_open_clip(module):
        tower = open_clip.image_tower(module)
        settings = settings or open_clip.open_clip_settings(tower)
        trunk = getattr(tower, "trunk", None)
        if trunk is not None:
            return adapt(trunk, layers, interpolate=interpolate, settings=settings)
        reader = open_clip.OpenClipFeatures(tower, layers, interpolate=interpolate)
        return Adapted(reader, _all(layers), settings)
    if isinstance(module, nn.Module) and hasattr(module, "get_intermediate_layers"):
        return _from_intermediates(module, layers, settings)
    return Adapted(module, layers, settings)


def is_known(module: object) -> bool:
    """Return whether a module is a model that :func:`adapt` puts a reader around."""
    return (
        timm.is_timm(module)
        or transformers.is_transformers(module)
        or open_clip.is_open_clip(module)
        or (isinstance(module, nn.Module) and hasattr(module, "get_intermediate_layers"))
    )


def unwrapped(module: Any) -> Any:
    """Return the library's model inside DataParallel, torch.compile or PEFT; else the module."""
    inner = module
    while isinstance(inner, nn.Module):
        if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        elif "_orig_mod" in inner._modules:
            inner = inner._modules["_orig_mod"]
        elif callable(base := getattr(inner, "get_base_model", None)):  # adapters stay in layers
            inner = base()
        else:
            break
    return inner if is_known(inner) else module


def known_inside(module: object, tried: object = None) -> str | None:
    """Name a library's model inside a module or function, for messages; ``None`` without one.

    Args:
        module: the module or function.
        tried: the model inside it that returned no features.
    """
    for top in [module] if isinstance(module, nn.Module) else held_modules(module):
        names = [name for name, one in top.named_modules() if name and _takes_images(one)]
        # The first that holds no other one: a backbone, not the detector around it.
        for name in names:
            inner = top.get_submodule(name)
            if inner is not tried and not any(one.startswith(f"{name}.") for one in names):
                kind = type(inner).__name__
                return f"{type(top).__name__} holds a {kind}: give that, its .{name}"
    return None


def _takes_images(module: nn.Module) -> bool:
    blind = transformers.is_transformers(module) and not transformers.takes_images(module)
    return is_known(module) and not blind


def _all(chosen: Sequence[Layer] | None) -> list[Layer] | None:
    """Return the entries to pick from a reader's output: all if there are several, else none."""
    return None if chosen is None or len(chosen) < 2 else list(range(len(chosen)))


def _from_transformers(
    module: nn.Module,
    layers: Sequence[Layer] | None,
    interpolate: bool,
    settings: Settings | None,
) -> Adapted:
    part = transformers.vision_part(module)
    if not transformers.is_transformers(part) and not hasattr(part, "config"):
        return adapt(part, layers, interpolate=interpolate, settings=settings)
    settings = settings or settings_of_object(module, part)
    reader = transformers.TransformersFeatures(
        part, layers, interpolate=interpolate, blue_first=settings.blue_first
    )
    return Adapted(reader, _all(layers), settings)


def _from_intermediates(
    module: nn.Module, layers: Sequence[Layer] | None, settings: Settings | None
) -> Adapted:
    if layers is not None and any(isinstance(layer, str) for layer in layers):
        return Adapted(module, layers, settings)
    return Adapted(hub.IntermediateLayers(module, layers), _all(layers), settings)
