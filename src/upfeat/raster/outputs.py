"""Values to write at every pixel: the features themselves, or a linear head's output."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from upfeat.bounds import choice, instance, whole
from upfeat.model import FeatUp
from upfeat.tensor_checks import check_not_too_small, largest_magnitude
from upfeat.upsamplers import Kernels, Upsampler, Window
from upfeat.upsamplers.head import Head
from upfeat.upsamplers.maps import moved, tiles

NO_CLASS = 255
"""No-data value of class maps."""

_BLOCK = 256
"""Largest number of channels that are upsampled, in float32, at once."""
_SIDE = 512
"""Side of the windows that are upsampled at once, pixels."""


class RasterTile(NamedTuple):
    """Inputs of the upsampler for one tile of a raster."""

    coarse: Tensor
    """(1, C, h, w) features of the tile and its halo."""
    hidden: Tensor | None
    """(1, D, 2h, 2w), early layers of the tile and its halo; ``None`` without early layers."""
    guidance: Tensor
    """(1, 3, H, W) guidance of the tile and its halo."""
    means: Tensor | None
    """:meth:`Upsampler.cell_means` of the tile and its halo; ``None`` if there are no means."""
    inner: Window
    """Pixels to be written, in coordinates of ``guidance``."""


class Output(ABC):
    """One kind of output.

    Attributes:
        names: names of the K values at a pixel.
        dtype: type of the stored values.
        nodata: value written where the raster is masked.
        facts: everything about model and output that determines the values, as JSON values.
    """

    names: list[str]
    dtype: np.dtype[Any]
    nodata: float = float("nan")
    facts: dict[str, Any]

    def __repr__(self) -> str:
        """One line: number of values at a pixel and their type."""
        return f"{type(self).__name__}({self.count} values, {np.dtype(self.dtype).name})"

    @property
    def count(self) -> int:
        """Number K of values at a pixel."""
        return len(self.names)

    def render(self, model: FeatUp, tile: RasterTile) -> Any:
        """Upsample a tile and return the values to write.

        Args:
            model: backbone and upsampler.
            tile: inputs of the upsampler.

        Returns:
            (K, tile.inner.height, tile.inner.width) of ``dtype``.
        """
        kernels = model.upsampler.prepare_tile(
            tile.guidance,
            (tile.coarse.shape[2], tile.coarse.shape[3]),
            tile.coarse,
            tile.means,
            tile.hidden,
        )
        mixed = model.upsampler.mix(tile.coarse)
        inner = tile.inner
        out = np.empty((self.count, inner.height, inner.width), dtype=self.dtype)
        # Windows that fit into the processor's cache, at places that depend on the tile alone.
        for part in tiles((inner.height, inner.width), _SIDE):
            rows, columns = slice(part.top, part.bottom), slice(part.left, part.right)
            self._fill(out[:, rows, columns], model.upsampler, kernels, mixed, moved(part, inner))
        return out

    @abstractmethod
    def _fill(
        self, out: Any, upsampler: Upsampler, kernels: Kernels, mixed: Tensor, window: Window
    ) -> None:
        """Write the values of a window into ``out``, (K, window.height, window.width)."""

    def empty(self, window: Window) -> Any:
        """Return the values of a window without a valid pixel, (K, height, width) no-data."""
        return np.full((self.count, window.height, window.width), self.nodata, dtype=self.dtype)


class Features(Output):
    """Output of all feature channels, unchanged."""

    def __init__(self, embed_dim: int, facts: dict[str, Any], dtype: str = "float16") -> None:
        """Name the channels by their indices.

        Args:
            embed_dim: number C of channels.
            facts: description of the model that makes the features.
            dtype: type of the stored values, "float16" or "float32".

        Raises:
            ValueError: ``embed_dim`` is no whole number, or ``dtype`` is another type.
        """
        embed_dim = whole("embed_dim", embed_dim)
        self.names = [f"feature {index}" for index in range(embed_dim)]
        self.dtype = np.dtype(choice("dtype", dtype, ("float16", "float32")))
        self.facts = {**facts, "output": "features", "dtype": dtype}
        self._fits = False  # whether features of a tile were large enough for the type

    def render(self, model: FeatUp, tile: RasterTile) -> Any:
        """See :meth:`Output.render`.

        Raises:
            ValueError: the features overflow the type, or are too small for it in the first tile
                with features; those of a tile without content may be small.
        """
        if not self._fits:
            largest, dtype = largest_magnitude(tile.coarse), getattr(torch, self.dtype.name)
            check_not_too_small("features of a tile", largest, dtype, "store them as float32")
            self._fits = largest > 0
        return super().render(model, tile)

    def _fill(
        self, out: Any, upsampler: Upsampler, kernels: Kernels, mixed: Tensor, window: Window
    ) -> None:
        for start in range(0, self.count, _BLOCK):
            block = slice(start, min(start + _BLOCK, self.count))
            values = upsampler.render(kernels, mixed, head=block, window=window)[0]
            out[block] = values.cpu().numpy()
        if not np.isfinite(out).all():
            raise ValueError(f"features overflow {self.dtype}; store them as float32")


class HeadOutput(Output):
    """Output of a linear head, applied before upsampling: K channels are upsampled, not C."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        names: Sequence[str],
        facts: dict[str, Any],
        *,
        form: str = "values",
    ) -> None:
        """Keep a head and the form of its output.

        Args:
            weight: (K, C) matrix of the head.
            bias: (K,) offset of the head.
            names: names of the head's K outputs.
            facts: description of the model and the head.
            form: "values", the head's outputs, float32; "probabilities", their softmax, float32;
                or "classes", the index of the largest output, uint8.

        Raises:
            TypeError: weight or bias is not a tensor.
            ValueError: there is no such form, weight, bias and names do not match, or a class map
                cannot hold that many classes.
        """
        for label, one in (("weight", weight), ("bias", bias)):
            instance(label, one, Tensor, "give a tensor")
        names = list(names)
        if weight.dim() != 2 or bias.shape != weight.shape[:1] or len(names) != len(weight):
            raise ValueError(
                f"weight is {tuple(weight.shape)}, bias {tuple(bias.shape)}, and names are "
                f"{len(names)}; give (K, C), (K,) and K names"
            )
        if form not in ("values", "probabilities", "classes"):
            raise ValueError(f'form="{form}" must be values, probabilities or classes')
        if form == "classes" and len(names) > NO_CLASS:
            raise ValueError(f"{len(names)} classes are more than a class map holds, {NO_CLASS}")
        self._weight, self._bias, self._form = weight, bias, form
        self.classes = names
        self.names = ["class"] if form == "classes" else names
        self.dtype = np.dtype("uint8" if form == "classes" else "float32")
        self.nodata = NO_CLASS if form == "classes" else float("nan")
        numbers = b"".join(one.detach().cpu().float().numpy().tobytes() for one in (weight, bias))
        own = {"classes": self.classes, "weights of the head": hashlib.sha256(numbers).hexdigest()}
        self.facts = {**facts, "output": form, **own}

    def _fill(
        self, out: Any, upsampler: Upsampler, kernels: Kernels, mixed: Tensor, window: Window
    ) -> None:
        head = Head(self._weight.to(mixed), self._bias.to(mixed))
        values = upsampler.render(kernels, mixed, head=head, window=window)[0]
        if self._form == "classes":
            values = _largest(values)
        elif self._form == "probabilities":
            values = values.softmax(0)
        out[:] = values.cpu().numpy()


def _largest(values: Tensor) -> Tensor:
    """Return the index of the largest of K maps (K, H, W), uint8 (1, H, W); faster than argmax."""
    best = values[0].clone()
    index = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
    for number in range(1, len(values)):
        index.masked_fill_(values[number] > best, number)
        torch.maximum(best, values[number], out=best)
    return index[None]
