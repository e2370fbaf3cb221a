"""Values written at every pixel: the features themselves, or a linear head's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from upfeat.model import FeatUp
from upfeat.upsamplers import Kernels, Upsampler, Window
from upfeat.upsamplers.head import Head
from upfeat.upsamplers.maps import moved, tiles

NO_CLASS = 255
"""No-data of class maps."""

_BLOCK = 256
"""Channels that exist in float32 at once."""
_SIDE = 512
"""Side of the windows that are upsampled at once, pixels."""


class RasterTile(NamedTuple):
    """A part of a raster with what is known of it."""

    coarse: Tensor
    """(1, C, h, w) features of the tile and its halo."""
    guidance: Tensor
    """(1, 3, H, W) its image, as the upsampler wants it."""
    means: Tensor | None
    """Of :meth:`Upsampler.cell_means`, of all its cells."""
    inner: Window
    """Pixels to be written."""


class Output(ABC):
    """One kind of output.

    Attributes:
        names: of the K outputs.
        dtype: of the stored values.
        nodata: written where the raster is masked.
        facts: all that decides it, as JSON values.
    """

    names: list[str]
    dtype: np.dtype[Any]
    nodata: float = float("nan")
    facts: dict[str, Any]

    @property
    def count(self) -> int:
        """Number K of values at a pixel."""
        return len(self.names)

    def render(self, model: FeatUp, tile: RasterTile) -> Any:
        """Values of a tile.

        Args:
            model: backbone and upsampler.
            tile: its image and features.

        Returns:
            (K, tile.inner.height, tile.inner.width) of ``dtype``.
        """
        kernels = model.upsampler.prepare_tile(
            tile.guidance,
            (tile.coarse.shape[2], tile.coarse.shape[3]),
            tile.coarse,
            tile.means,
        )
        mixed = model.upsampler.mix(tile.coarse)
        inner = tile.inner
        out = np.empty((self.count, inner.height, inner.width), dtype=self.dtype)
        # Windows that fit into the processor's cache; always the same ones.
        for part in tiles((inner.height, inner.width), _SIDE):
            rows, columns = slice(part.top, part.bottom), slice(part.left, part.right)
            self._fill(out[:, rows, columns], model.upsampler, kernels, mixed, moved(part, inner))
        return out

    @abstractmethod
    def _fill(
        self, out: Any, upsampler: Upsampler, kernels: Kernels, mixed: Tensor, window: Window
    ) -> None:
        """Write the values of a window, (K, window.height, window.width)."""

    def empty(self, window: Window) -> Any:
        """A window without a valid pixel."""
        return np.full((self.count, window.height, window.width), self.nodata, dtype=self.dtype)


class Features(Output):
    """All channels, as they are."""

    def __init__(self, embed_dim: int, facts: dict[str, Any], dtype: str = "float16") -> None:
        """Say how many.

        Args:
            embed_dim: number C of channels.
            facts: what makes the features.
            dtype: of the stored values, "float16" or "float32".
        """
        self.names = [f"feature {index}" for index in range(embed_dim)]
        self.dtype = np.dtype(dtype)
        self.facts = {"output": "features", "dtype": dtype, **facts}

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
    """Output of a linear head: it runs on the coarse features, so K channels are upsampled."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        names: Sequence[str],
        facts: dict[str, Any],
        *,
        form: str = "values",
    ) -> None:
        """Take a head.

        Args:
            weight: (K, C).
            bias: (K,).
            names: of the K outputs.
            facts: what makes the features and the head.
            form: "values" as they are, float32; "probabilities" of classes, their softmax,
                float32; "classes", the index of the largest, uint8.

        Raises:
            ValueError: there is no such form, or more classes than a byte holds.
        """
        if form not in ("values", "probabilities", "classes"):
            raise ValueError(f'form="{form}" must be values, probabilities or classes')
        if form == "classes" and len(names) > NO_CLASS:
            raise ValueError(f"{len(names)} classes are more than a class map holds, {NO_CLASS}")
        self._weight, self._bias, self._form = weight, bias, form
        self.classes = list(names)
        self.names = ["class"] if form == "classes" else list(names)
        self.dtype = np.dtype("uint8" if form == "classes" else "float32")
        self.nodata = NO_CLASS if form == "classes" else float("nan")
        self.facts = {"output": form, "classes": self.classes, **facts}

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
    """Index of the largest of K maps (K, H, W), uint8 (1, H, W); faster than argmax."""
    best = values[0].clone()
    index = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
    for number in range(1, len(values)):
        index.masked_fill_(values[number] > best, number)
        torch.maximum(best, values[number], out=best)
    return index[None]
