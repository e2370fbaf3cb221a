"""Feature maps of timm models, loaded by ``timm:NAME`` or given as objects."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from upfeat.backbones.libraries import import_library, quiet
from upfeat.backbones.outputs import Layer, ascending, in_given_order, numbers
from upfeat.registry import unknown_name


class TimmFeatures(nn.Module):
    """Feature maps of a timm model's layers, (B, 3, H, W) -> a list of (B, C, h, w).

    Layers are those of ``forward_intermediates``, counted from 0. The last layer alone is normed
    as for the model's head; otherwise maps are returned without norm.
    """

    def __init__(self, network: nn.Module, layers: Sequence[Layer] | None = None) -> None:
        """Choose layers.

        Args:
            network: a timm model.
            layers: numbers of layers; ``None`` for the last.

        Raises:
            ValueError: there is no such layer.
        """
        super().__init__()
        self.network = network
        count = len(getattr(network, "feature_info", None) or ()) or None
        self.layers = numbers(layers, count, type(network).__name__)
        self.norm = self.layers is None

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map (B, C, h, w) for each layer, in the order given."""
        try:
            return self._run(x, self.norm)
        except AssertionError:  # the model's norm cannot be applied, or the image size is refused
            maps = self._run(x, False)
            self.norm = False
            return maps

    def _run(self, x: Tensor, norm: bool) -> list[Tensor]:
        run: Any = self.network
        maps = run.forward_intermediates(
            x,
            indices=1 if self.layers is None else ascending(self.layers),
            norm=norm,
            stop_early=not norm,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return maps if self.layers is None else in_given_order(maps, self.layers)


def is_timm(module: object) -> bool:
    """Return whether a module is a timm model with ``forward_intermediates``."""
    return (
        isinstance(module, nn.Module)
        and callable(getattr(module, "forward_intermediates", None))
        and isinstance(getattr(module, "pretrained_cfg", None), Mapping)
    )


def any_size(network: nn.Module) -> nn.Module:
    """Return a copy of a model that takes images of any size, and shares the model's parameters.

    timm then interpolates position embeddings and masks windows. The given model does not change;
    a model whose class has no such option is returned itself.
    """
    embed = getattr(network, "patch_embed", None)
    if not isinstance(embed, nn.Module) or not hasattr(embed, "strict_img_size"):
        return network
    twin, embed_twin = _twin(network), _twin(embed)
    embed_twin.strict_img_size = False  # pyright: ignore[reportArgumentType]
    # Swin transformers have the first attribute, but their patches are maps already.
    if getattr(network, "dynamic_img_size", None) is False and getattr(embed, "flatten", False):
        twin.dynamic_img_size = True  # pyright: ignore[reportArgumentType]
        formats: Any = type(embed.output_fmt)
        embed_twin.flatten = False  # pyright: ignore[reportArgumentType]
        embed_twin.output_fmt = formats("NHWC")
        rope = getattr(network, "rope", None)
        if getattr(rope, "_use_cached_embed", False):  # EVA, PE: angles of the model's own grid
            twin.rope = _twin(rope)  # pyright: ignore[reportArgumentType]
            twin.rope._use_cached_embed = False
    twin.patch_embed = embed_twin
    return twin


def _twin(module: nn.Module) -> Any:
    """Copy a module so that attributes can be set without changing the original.

    Parameters, buffers and submodules are shared.
    """
    twin = copy.copy(module)
    for registry in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[registry] = dict(module.__dict__[registry])
    return twin


def load_timm(name: str, *, pretrained: bool) -> nn.Module:
    """Make a model of timm.

    Args:
        name: name of the model, with or without the tag of its weights, ``NAME.TAG``.
        pretrained: load trained weights; otherwise random weights.

    Raises:
        ValueError: timm is not installed or cannot be imported, or has no such model or weights
            (close names are suggested).
        FileNotFoundError: the weights cannot be downloaded.
    """
    library = _import_timm()
    base, _, tag = name.partition(".")
    if not library.is_model(base):
        raise ValueError(unknown_name("timm model", base, library.list_models()))
    tags = [one.partition(".")[2] for one in library.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise ValueError(unknown_name(f"weights of timm's {base}", tag, tags))
    try:
        with quiet():
            return _create(library, name, pretrained)
    except Exception as error:
        raise _cannot_make(name, error) from None


def is_model(name: str) -> bool:
    """Return whether timm is installed and has a model of this name."""
    try:
        library = _import_timm()
    except ValueError:
        return False
    return library.is_model(name.partition(".")[0])


def _create(library: Any, name: str, pretrained: bool) -> nn.Module:
    try:
        return library.create_model(name, pretrained=pretrained, **_size_options(name))
    except TypeError:  # the model does not have the option
        return library.create_model(name, pretrained=pretrained)


def _size_options(name: str) -> dict[str, Any]:
    """Return the options with which a model of this name takes images of any size."""
    if name.startswith("swin"):
        return {"strict_img_size": False}
    if name.startswith(("vit", "eva", "deit", "flexivit", "aimv2")):
        return {"dynamic_img_size": True}
    return {}


def _cannot_make(name: str, error: Exception) -> Exception:
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, RuntimeError)) and "pretrained" not in text.lower():
        return ValueError(f"timm:{name}: {text[:200]}")
    return FileNotFoundError(
        f"timm:{name}: its weights are not in the cache and cannot be downloaded "
        f"({type(error).__name__}); give pretrained=False for random ones, or download the model's "
        'file and give a module: timm.create_model(name, checkpoint_path="FILE")'
    )


def _import_timm() -> Any:
    return import_library("timm", extra="timm")
