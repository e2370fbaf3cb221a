"""Conversion of models' outputs (maps, tokens, and containers of them) to (B, C, h, w).

A model is run once on a square image, and :func:`recognise` infers the layout of each tensor from
its shape. Later outputs are converted by that layout, without inferring it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backbones.tokens import square_grid, tokens_to_grid
from upfeat.registry import unknown_name
from upfeat.types import Size

LAYOUTS = ("NCHW", "NHWC", "tokens")
"""Layouts of a tensor: (B, C, h, w), (B, h, w, C), (B, N, C)."""

# Keys of spatial features in containers, best first: of DINOv2, transformers and torchvision, then
# other common keys.
_KNOWN_KEYS = ("x_norm_patchtokens", "last_hidden_state", "features", "feature_maps", "out", "x")

Layer = int | str
"""Number or name of a layer."""


class NothingToPick(ValueError):
    """Layers were given for a model that returns one tensor."""


class NoFeatures(ValueError):
    """A model returns no features of images, although a module inside it might."""


class Ambiguous(ValueError):
    """The shape of a tensor fits two layouts."""


class Layout(NamedTuple):
    """Layout of one tensor of a model's output, inferred from a square image."""

    kind: str
    """One of :data:`LAYOUTS`."""
    cells: int
    """Cells along each side of the square image."""
    side: int
    """Side of the square image, pixels."""
    prefix_tokens: int = 0
    """Number of tokens before the cells' tokens."""
    padding: int = 0
    """Pixels by which later images are enlarged, on each axis, without making more cells."""

    def read(self, tensor: Tensor, image: Size, name: str) -> Tensor:
        """Convert a tensor of this layout to (B, C, h, w).

        Args:
            tensor: output of the model.
            image: (height, width) of the image that the tensor was computed from, pixels.
            name: name of the model, for messages.

        Raises:
            ValueError: the tensor has another number of axes, or its tokens form no grid.
        """
        if tensor.dim() != (3 if self.kind == "tokens" else 4):
            raise ValueError(
                f"{name} returned {tuple(tensor.shape)} for an image of {image[0]}×{image[1]}, "
                f"which is not {self.kind} as before"
            )
        if self.kind == "NHWC":
            return tensor.permute(0, 3, 1, 2)
        if self.kind == "NCHW":
            return tensor
        return tokens_to_grid(tensor, self._grid(tensor.shape[1], image), self.prefix_tokens)

    def _grid(self, count: int, image: Size) -> Size:
        """Return the grid that ``count`` tokens form on an image of (height, width).

        A partial cell at the image's end may have a token or none: the grid that fits the count is
        taken.
        """
        image = (image[0] - self.padding, image[1] - self.padding)
        down, across = (length * self.cells for length in image)
        whole = (down // self.side, across // self.side)
        rests = (down % self.side, across % self.side)
        # Integers wherever they suffice: while a program is traced, sizes are symbolic integers.
        if rests == (0, 0) and whole[0] * whole[1] == count - self.prefix_tokens:
            return whole
        exact = [length * self.cells / self.side for length in image]
        less, more = (
            [math.floor(value + 1e-6) for value in exact],
            [math.ceil(value - 1e-6) for value in exact],
        )
        for grid in ((round(exact[0]), round(exact[1])), (less[0], less[1]), (more[0], more[1])):
            if grid[0] * grid[1] == count - self.prefix_tokens:
                return grid
        return round(exact[0]), round(exact[1])


def select(output: object, layers: Sequence[Layer] | None, name: str) -> list[Tensor]:
    """Select the tensors that contain features from a model's output.

    Args:
        output: a tensor; a list, tuple or dictionary of tensors; or an object with
            ``last_hidden_state``.
        layers: numbers or keys of a container's entries; ``None`` for the features under a known
            key, the only map or tokens, or the last entry of a list.
        name: name of the model, for messages.

    Raises:
        ValueError: the output contains no features, or several entries without a choice.
    """
    if isinstance(output, Tensor):
        if layers is not None:
            raise NothingToPick(f"{name} returns one tensor: layer={_shown(layers)} picks nothing")
        return [output]
    entries = _entries(output)
    if entries is None:
        raise ValueError(
            f"{name} returned a {type(output).__name__}, not features (B, C, h, w); wrap it in a "
            "function that picks the feature map"
        )
    if "last_hidden_state" in entries and any(isinstance(layer, int) for layer in layers or ()):
        raise NoFeatures(
            f"{name}: layer={_shown(layers or [])} does not number the layers of a model inside; "
            "give that model itself, or the name of one of its modules"
        )
    if layers is not None:
        return [_pick(entries, layer, name) for layer in layers]
    for key in _KNOWN_KEYS:
        if _holds(entries.get(key)):
            return select(entries[key], None, name)
    spatial = {key: value for key, value in entries.items() if _holds(value)}
    if not spatial:
        shapes = ", ".join(f"{key}: {_described(value)}" for key, value in entries.items())
        raise ValueError(f"{name} returned {{{shapes}}}, in which there are no spatial features")
    if len(spatial) == 1 or not isinstance(output, Mapping):
        return select(list(spatial.values())[-1], None, name)
    choices = ", ".join(repr(key) for key in spatial)
    raise ValueError(f"{name} returned several maps: choose by layer=, one or a list of {choices}")


def _entries(output: object) -> dict[Any, Any] | None:
    """Return a container's entries by key or number; ``None`` if the output is no container."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, Sequence) and not isinstance(output, str):
        return dict(enumerate(output))
    features = getattr(output, "last_hidden_state", None)
    return None if features is None else {"last_hidden_state": features}


def _holds(value: object) -> bool:
    """Return whether a value is, or contains, a map or tokens."""
    if isinstance(value, Tensor):
        return value.dim() in (3, 4) and value.is_floating_point()
    entries = None if value is None else _entries(value)
    return entries is not None and any(_holds(entry) for entry in entries.values())


def _pick(entries: dict[Any, Any], layer: Layer, name: str) -> Tensor:
    keys = list(entries)
    if layer not in entries and isinstance(layer, int) and -len(keys) <= layer < len(keys):
        layer = keys[layer]
    if layer not in entries:
        raise ValueError(f"{name}: {missing_layer(layer, [str(key) for key in keys])}")
    value = entries[layer]
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: layer={layer!r} is a {type(value).__name__}, not a tensor")
    return value


def missing_layer(layer: Layer, names: Sequence[str]) -> str:
    """Return a one-line message about a layer that does not exist."""
    if isinstance(layer, str):
        return unknown_name("layer", layer, list(names))
    return f"layer={layer} does not exist; there are {len(names)}, 0 to {len(names) - 1}"


def numbers(layers: Sequence[Layer] | None, count: int | None, name: str) -> list[int] | None:
    """Check the numbers of a library model's layers; negative ones count from the last layer.

    Args:
        layers: what the user chose; ``None`` for the last layer.
        count: number of layers; ``None`` if unknown, and numbers are then returned as they are.
        name: name of the model, for messages.

    Returns:
        The numbers; ``None`` if only the last layer is chosen. Thus every reader treats the last
        layer's number as it treats its default, the library's own final output.

    Raises:
        ValueError: a layer is given by name, or there is no such layer.
    """
    found: list[int] = []
    for layer in layers or ():
        if not isinstance(layer, int):
            raise ValueError(f"{name}: layer={layer!r} must be a number; its layers are counted")
        if count is not None and not -count <= layer < count:
            raise ValueError(
                f"{name}: layer={layer} does not exist; its layers are 0 to {count - 1}"
            )
        found.append(layer if count is None else layer % count)
    last = -1 if count is None else count - 1
    return None if layers is None or found == [last] else found


def ascending(layers: Sequence[int]) -> list[int]:
    """Sort layers in the order in which a network runs them, each once."""
    # Numbers are negative only if the layers could not be counted: they then count from the last.
    return sorted(set(layers), key=lambda layer: (layer < 0, layer))


def in_given_order(maps: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
    """Return the maps of ``ascending(layers)`` in the order of ``layers``, repeated as there."""
    order = ascending(layers)
    return [maps[order.index(layer)] for layer in layers]


def recognise(
    tensor: Tensor,
    side: int,
    name: str,
    *,
    layout: str | None = None,
    prefix_tokens: int | None = None,
) -> Layout:
    """Infer the layout of a tensor that a model computed from a square image.

    Args:
        tensor: output of the model, of any shape.
        side: side of the image, pixels.
        name: name of the model, for messages.
        layout: one of :data:`LAYOUTS`; ``None`` to infer it.
        prefix_tokens: number of class and register tokens; ``None`` to infer it.

    Raises:
        ValueError: the tensor is no feature map, or its shape fits two layouts; the message names
            the fix.
    """
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} returned {kind} {shape}; return floating numbers")
    if tensor.dim() in (3, 4) and shape[0] != 1:
        raise ValueError(
            f"{name} returned {shape} for one image: the first axis is not the batch; wrap it in a "
            "function that returns (B, C, h, w) or (B, N, C)"
        )
    if tensor.dim() == 3 and layout in (None, "tokens"):
        found = square_grid(shape[1], side, prefix_tokens)
        if found is None:
            raise ValueError(
                f"{name} returned {shape} for an image of {side}×{side}: {shape[1]} tokens form no "
                "square grid; give prefix_tokens= (class and register tokens), or wrap it in a "
                "function that uses upfeat.tokens_to_grid"
            )
        return Layout("tokens", found[0], side, found[1])
    if tensor.dim() != 4 or layout == "tokens":
        raise NoFeatures(f"{name} returned a tensor of shape {shape}, {_what(tensor)}")
    fits = {"NCHW": shape[2:], "NHWC": shape[1:3]}
    kinds = [kind for kind, (rows, columns) in fits.items() if rows == columns <= side]
    if layout is not None:
        kinds = [kind for kind in kinds if kind == layout]
    if len(kinds) == 2:
        raise Ambiguous(
            f"{name} returned {shape} for an image of {side}×{side}, which may be (B, C, h, w) or "
            '(B, h, w, C): give layout="NCHW" or layout="NHWC"'
        )
    if not kinds:
        rows, columns = fits[layout or "NCHW"]
        fix = "return one cell at most for a pixel"
        if rows != columns:
            fix = "cells must be square: pool or resize one axis in a function around it"
        raise ValueError(
            f"{name} turns {side}×{side} pixels into {rows}×{columns} cells, which is no whole "
            f"stride; {fix}"
        )
    return Layout(kinds[0], fits[kinds[0]][0], side)


def concatenate(maps: Sequence[Tensor]) -> Tensor:
    """Resize maps bilinearly to the finest map's grid and concatenate them: (B, ΣC, h, w)."""
    if len(maps) == 1:
        return maps[0]
    size = max((tuple(one.shape[2:]) for one in maps), key=lambda grid: grid[0] * grid[1])
    return torch.cat([resized(one, (size[0], size[1])) for one in maps], dim=1)


def resized(maps: Tensor, size: Size) -> Tensor:
    """Resize maps to a grid, bilinearly; maps on that grid already are returned as they are."""
    if tuple(maps.shape[2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _what(tensor: Tensor) -> str:
    if tensor.dim() == 2:
        return (
            "a pooled vector or logits, not features (B, C, h, w); give layer= (the name of a "
            "module inside), or a function that returns the map before the pooling"
        )
    return "not features (B, C, h, w); wrap it in a function that picks the feature map"


def _described(value: object) -> str:
    return f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _shown(layers: Sequence[Layer]) -> str:
    return repr(layers[0] if len(layers) == 1 else list(layers))
