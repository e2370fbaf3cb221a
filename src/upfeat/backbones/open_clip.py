"""Image towers of open_clip models, loaded by ``open_clip:NAME/TAG`` or given as objects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from upfeat.backbones.libraries import import_library, quiet
from upfeat.backbones.outputs import Layer, ascending, in_given_order, numbers
from upfeat.backbones.settings import OPENAI, Settings
from upfeat.normalization import check_normalization
from upfeat.registry import unknown_name


class OpenClipFeatures(nn.Module):
    """Feature maps of an image tower's layers, (B, 3, H, W) -> a list of (B, C, h, w).

    Layers are counted from 0. The last layer alone is normed as for the tower's head; otherwise
    maps are returned without norm.
    """

    def __init__(
        self, tower: nn.Module, layers: Sequence[Layer] | None = None, *, interpolate: bool = True
    ) -> None:
        """Choose layers.

        Args:
            tower: image tower, ``model.visual``.
            layers: numbers of layers; ``None`` for the last.
            interpolate: interpolate the position embeddings for images of other sizes.

        Raises:
            ValueError: the tower has no method ``forward_intermediates``, or no such layer.
        """
        super().__init__()
        if not callable(getattr(tower, "forward_intermediates", None)):
            raise ValueError(
                f"{type(tower).__name__} gives no intermediate features; this open_clip is too old"
            )
        chosen = numbers(layers, _count_layers(tower), type(tower).__name__)
        self.tower = _Intermediates(tower, chosen)
        self.interpolate = interpolate

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map (B, C, h, w) for each layer, in the order given."""
        tower: Any = self.tower.tower
        positions = getattr(tower, "positional_embedding", None)
        patch = getattr(tower, "patch_size", None)
        if not self.interpolate or not isinstance(positions, Tensor) or patch is None:
            return self.tower(x)
        if positions.dim() != 2 or not isinstance(patch, (tuple, list)):
            return self.tower(x)
        grid = (x.shape[2] // patch[0], x.shape[3] // patch[1])
        own = tuple(tower.grid_size)
        if grid == own:
            return self.tower(x)
        swapped = {"tower.positional_embedding": _interpolated(positions, own, grid)}
        return functional_call(self.tower, swapped, (x,))


class _Intermediates(nn.Module):
    """A tower whose ``forward`` is ``forward_intermediates``, for ``functional_call``."""

    def __init__(self, tower: nn.Module, layers: Sequence[int] | None) -> None:
        super().__init__()
        self.tower = tower
        self.layers = layers

    def forward(self, x: Tensor) -> list[Tensor]:
        tower: Any = self.tower
        output = tower.forward_intermediates(
            x,
            indices=1 if self.layers is None else ascending(self.layers),
            # ResNets of open_clip take it the other way round.
            stop_early=not hasattr(tower, "layer4"),
            normalize_intermediates=self.layers is None,
            intermediates_only=True,
            output_fmt="NCHW",
        )
        maps = output["image_intermediates"]
        return maps if self.layers is None else in_given_order(maps, self.layers)


def _count_layers(tower: Any) -> int | None:
    """Return the number of a tower's layers; ``None`` if unknown."""
    if hasattr(tower, "layer4"):  # a ResNet: the stem and four stages
        return 5
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    return None if blocks is None else len(blocks)


def _interpolated(positions: Tensor, own: tuple[int, ...], grid: tuple[int, int]) -> Tensor:
    """Interpolate position embeddings to another grid; those of the P prefix tokens stay.

    Args:
        positions: (P + h·w, C).
        own: (h, w), the grid of ``positions``.
        grid: (h', w'), the new grid.

    Returns:
        (P + h'·w', C).
    """
    prefix = len(positions) - math.prod(own)
    cells = positions[prefix:].mT.unflatten(1, own)[None]
    cells = F.interpolate(
        cells.float(), size=grid, mode="bicubic", align_corners=False, antialias=True
    )
    return F.pad(cells[0].flatten(1).mT.to(positions.dtype), (0, 0, prefix, 0)) + F.pad(
        positions[:prefix], (0, 0, 0, math.prod(grid))
    )


def is_open_clip(module: object) -> bool:
    """Return whether a module is a model of open_clip, or the image tower of one."""
    return type(module).__module__.startswith("open_clip.") and (
        hasattr(module, "visual") or hasattr(module, "forward_intermediates")
    )


def image_tower(module: Any) -> nn.Module:
    """Return a model's image tower; a tower is returned itself."""
    return getattr(module, "visual", module)


def open_clip_settings(tower: Any) -> Settings:
    """Read image size, normalisation and interpolation from a tower's configuration."""
    config = getattr(tower, "preprocess_cfg", None) or {}
    mean = getattr(tower, "image_mean", None) or config.get("mean") or OPENAI.mean
    std = getattr(tower, "image_std", None) or config.get("std") or OPENAI.std
    size = getattr(tower, "image_size", None)
    side = max(size) if isinstance(size, (tuple, list)) else size
    interpolation = "bilinear" if config.get("interpolation") == "bilinear" else "bicubic"
    return Settings(*check_normalization(mean, std), interpolation, side)


def load_open_clip(name: str, *, pretrained: bool, whole: bool = False) -> nn.Module:
    """Load the image tower of a model of open_clip.

    Args:
        name: ``NAME/TAG``, where TAG names the weights; ``NAME`` for random weights.
        pretrained: load the tag's weights; otherwise random weights.
        whole: return the model itself rather than its image tower.

    Raises:
        FileNotFoundError: the weights cannot be downloaded.
        ValueError: open_clip is not installed, or has no such model or weights.
    """
    library = import_library("open_clip", extra="open_clip")
    model, _, tag = name.partition("/")
    if model not in library.list_models():
        raise ValueError(unknown_name("open_clip model", model, library.list_models()))
    tags = library.list_pretrained_tags_by_model(model)
    if tag and tag not in tags:
        raise ValueError(unknown_name(f"weights of open_clip's {model}", tag, tags))
    if pretrained and not tag:
        choices = ", ".join(tags[:4]) or "none"
        raise ValueError(
            f"open_clip:{name}: name the weights, as open_clip:{model}/TAG (there are {choices}), "
            "or give pretrained=False for random ones"
        )
    try:
        with quiet():
            made = library.create_model(model, pretrained=tag if pretrained else None)
        return made if whole else image_tower(made)
    except Exception as error:
        if not pretrained:
            raise
        raise FileNotFoundError(
            f"open_clip:{name}: its weights are not in the cache and cannot be downloaded "
            f"({type(error).__name__}); download them and give a module: "
            f'open_clip.create_model(NAME, pretrained="FILE"){"" if whole else ".visual"}'
        ) from None
