"""Values written at every pixel: the features themselves, or a linear head's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upfeat.model import FeatUp
from upfeat.upsamplers import Window

NO_CLASS = 255
"""No-data of class maps."""

_BLOCK = 64
"""Channels that exist in float32 at once."""


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

    @abstractmethod
    def render(self, model: FeatUp, coarse: Tensor, guidance: Tensor, window: Window) -> Any:
        """Values in a window of a tile.

        Args:
            model: backbone and upsampler.
            coarse: (1, C, h, w) features of the tile.
            guidance: (1, 3, H, W) its image, as the upsampler wants it.
            window: of the tile, pixels.

        Returns:
            (K, window.height, window.width) of ``dtype``.
        """

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

    def render(self, model: FeatUp, coarse: Tensor, guidance: Tensor, window: Window) -> Any:
        """See :meth:`Output.render`."""
        out = np.empty((self.count, window.height, window.width), dtype=self.dtype)
        kernels, mixed = _prepare(model, coarse, guidance)
        for start in range(0, self.count, _BLOCK):
            block = slice(start, min(start + _BLOCK, self.count))
            values = model.upsampler.render(kernels, mixed, head=block, window=window)[0]
            out[block] = values.cpu().numpy()
        if not np.isfinite(out).all():
            raise ValueError(f"features overflow {self.dtype}; store them as float32")
        return out


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

    def render(self, model: FeatUp, coarse: Tensor, guidance: Tensor, window: Window) -> Any:
        """See :meth:`Output.render`."""
        kernels, mixed = _prepare(model, coarse, guidance)
        weight = self._weight.to(mixed)
        out = model.upsampler.render(kernels, mixed, head=weight, window=window)[0]
        out = out + self._bias.to(out)[:, None, None]
        if self._form == "classes":
            return _largest(out).cpu().numpy()
        return (out.softmax(0) if self._form == "probabilities" else out).float().cpu().numpy()


def _largest(values: Tensor) -> Tensor:
    """Index of the largest of K maps (K, H, W), uint8 (1, H, W); faster than argmax."""
    best = values[0].clone()
    index = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
    for number in range(1, len(values)):
        index.masked_fill_(values[number] > best, number)
        torch.maximum(best, values[number], out=best)
    return index[None]


def _prepare(model: FeatUp, coarse: Tensor, guidance: Tensor) -> tuple[Any, Tensor]:
    grid = (coarse.shape[2], coarse.shape[3])
    size = (guidance.shape[2], guidance.shape[3])
    kernels = model.upsampler.prepare(guidance, grid, size, features=coarse)
    return kernels, model.upsampler.mix(coarse)
