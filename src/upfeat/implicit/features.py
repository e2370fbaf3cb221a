"""Implicit features: one image's features as a function of place, at any resolution.

A backbone sees many jittered copies of an image; a small function of the place, and of what the
image shows there, is fitted to all of them at once (``upfeat.fit_implicit``). What is kept is that
function, the image, and the basis in which it works: about a hundredth of the map that it can draw.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat._version import __version__
from upfeat.feature_map import FeatureMap, check_head, check_points, check_window
from upfeat.images import read_image
from upfeat.implicit.fields import Field
from upfeat.implicit.guides import sample
from upfeat.implicit.stored import FORMAT, encode, read_stored
from upfeat.machine import readable
from upfeat.storage import write_tensors
from upfeat.types import Size, times
from upfeat.upsamplers.checks import check_output_size

if TYPE_CHECKING:
    from upfeat.images import ImageLike

# Points whose values exist at once, beside the result.
_POINTS = 1 << 16


class ImplicitFeatures(FeatureMap):
    """Features (1, C, H, W) of one image that can be asked for at any point and resolution.

    Everything is defined by the value at a point of the image, so renderings at different
    resolutions agree wherever they sample the same point. Nothing here builds a gradient.

    Attributes:
        shape: (1, C, H, W) at the resolution of the fit.
        facts: provenance: backbone, preset, views, held-out loss.
    """

    def __init__(
        self,
        field: Field,
        guidance: Tensor,
        components: Tensor,
        mean: Tensor,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            field: place, and what the image shows there, to k coordinates.
            guidance: (3, H, W) uint8, the image as it was fitted.
            components: (k, C) features of one unit of each coordinate.
            mean: (C,) features where all coordinates are 0.
            facts: provenance, JSON values.
        """
        self.field, self.guidance = field, guidance
        self.components, self.mean = components, mean
        self.facts = dict(facts or {})
        self.shape = torch.Size((1, components.shape[1], *guidance.shape[1:]))

    def __repr__(self) -> str:
        """One line: the shape, what draws it, and the memory that the whole would take."""
        coefficients = sum(one.numel() for one in self.field.tensors().values())
        held = self.facts.get("held_out")
        loss = f", held-out loss {held:.4f}" if isinstance(held, float) else ""
        return (
            f"{type(self).__name__}({times(self.shape)} at the size of the fit, any other by "
            f"render(); {self.facts.get('backbone', 'an unknown backbone')}, {self.field.kind} "
            f"field of {coefficients:,} numbers, {len(self.components)} components{loss}; "
            f"{readable(4 * math.prod(self.shape))} if full)"
        )

    def render(
        self,
        output_size: Size | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:
        """Draw the whole map, a strip of rows at a time.

        Args:
            output_size: (height, width), any; ``None`` for the resolution of the fit. Each value is
                the features at the centre of its pixel.
            dtype: of the result.
            out: (1, C, height, width) to write to, such as a file mapped into memory.

        Returns:
            (1, C, height, width).

        Raises:
            ValueError: the size is not two whole numbers, ``out`` has another shape, or the dtype
                is not of floating numbers or overflows.
        """
        size = self._size(output_size)
        own = dtype if out is None else out.dtype
        if not isinstance(own, torch.dtype) or not own.is_floating_point:
            raise ValueError(f"dtype={own} must be one of floating numbers, as torch.float16")
        shape = (1, self.shape[1], *size)
        if out is None:
            out = torch.empty(shape, dtype=dtype)
        elif tuple(out.shape) != shape:
            raise ValueError(f"out must be {shape}, got {tuple(out.shape)}")
        for top, strip in self.strips(size):
            part = out[0, :, top : top + strip.shape[1]]
            part.copy_(strip)
            if own.itemsize < strip.dtype.itemsize and not bool(torch.isfinite(part).all()):
                raise ValueError(f"the map overflows {own}; use bfloat16 or float32")
        return out

    def full(self, dtype: torch.dtype | None = None) -> Tensor:
        """The map at the resolution of the fit, see :meth:`render`; (1, C, H, W)."""
        return self.render(dtype=dtype or torch.float32)

    def strips(self, output_size: Size | None = None) -> Iterator[tuple[int, Tensor]]:
        """Draw the map as strips (C, rows, width) with their first row, for maps of any size.

        Args:
            output_size: as for :meth:`render`.
        """
        size = self._size(output_size)
        rows = max(1, _POINTS // size[1])
        for top in range(0, size[0], rows):
            height = min(rows, size[0] - top)
            yield top, self._window((top, 0, height, size[1]), size, self.components, self.mean)

    def crop(
        self, top: int, left: int, height: int, width: int, *, output_size: Size | None = None
    ) -> Tensor:
        """A window of the map.

        Args:
            top: first row, pixels.
            left: first column.
            height: rows, ≥ 1.
            width: columns, ≥ 1.
            output_size: of the whole map; as for :meth:`render`.

        Returns:
            (1, C, height, width).

        Raises:
            ValueError: the window does not lie in the map.
        """
        size = self._size(output_size)
        window = check_window(size, top, left, height, width)
        return self._window(window, size, self.components, self.mean)[None]

    def at(self, points: Tensor) -> Tensor:
        """Features at points of the image, exactly: nothing is interpolated but the image.

        Args:
            points: (N, 2), (y, x) in pixels of the fit; whole numbers are pixel centres, the
                image's border is half a pixel outside the first and the last.

        Returns:
            (N, C).

        Raises:
            ValueError: points of another shape, or outside the image.
        """
        check_points(points)
        size = points.new_tensor(self.shape[2:], dtype=torch.float64)
        places = (points.double() + 0.5) / size
        if not bool(((places >= 0) & (places <= 1)).all()):
            raise ValueError(
                f"points must lie in the image: y from -0.5 to {self.shape[2] - 0.5}, x from -0.5 "
                f"to {self.shape[3] - 0.5}"
            )
        return self._evaluate(places) @ self.components + self.mean

    def project(
        self, weight: Tensor, bias: Tensor | None = None, *, output_size: Size | None = None
    ) -> Tensor:
        """Apply a linear head at every pixel; the C channels are never made.

        Args:
            weight: (K, C).
            bias: (K,), or ``None``.
            output_size: as for :meth:`render`.

        Returns:
            (1, K, height, width), equal to the head applied to :meth:`render`.

        Raises:
            ValueError: the head does not take C channels.
        """
        check_head(weight, bias, self.shape[1])
        with torch.no_grad():
            weight = weight.detach().to(self.components)
            components, constant = self.components @ weight.T, weight @ self.mean
            if bias is not None:
                constant = constant + bias.detach().to(constant)
        size = self._size(output_size)
        out = components.new_empty(1, len(weight), *size)
        rows = max(1, _POINTS // size[1])
        for top in range(0, size[0], rows):
            window = (top, 0, min(rows, size[0] - top), size[1])
            out[0, :, top : top + window[2]] = self._window(window, size, components, constant)
        return out

    def save(self, path: str | Path, *, guidance: bool = True) -> None:
        """Write one safetensors file, whole or not at all.

        Args:
            path: the file.
            guidance: keep the image inside; otherwise only its fingerprint, and :meth:`load` needs
                the image.

        Raises:
            ValueError: something to be written is NaN or infinite.
        """
        tensors = {f"field.{name}": value for name, value in self.field.tensors().items()}
        tensors |= {"components": self.components, "mean": self.mean}
        for name, value in tensors.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} holds NaN or infinity; nothing is written")
        if guidance:
            tensors["guidance_png"] = encode(self.guidance)
        facts = {
            "format": FORMAT,
            "upfeat_version": __version__,
            "field": self.field.kind,
            "field_facts": json.dumps(self.field.facts()),
            "image_size": json.dumps(list(self.shape[2:])),
            "image_digest": fingerprint(self.guidance),
            "facts": json.dumps(self.facts),
        }
        write_tensors(path, {key: value.contiguous() for key, value in tensors.items()}, facts)

    @classmethod
    def load(cls, path: str | Path, image: ImageLike | None = None) -> ImplicitFeatures:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            image: the photograph; needed where the file does not hold it, checked where it does.

        Raises:
            FileNotFoundError: there is no such file or image.
            ValueError: the file is truncated, of another kind or version, or was made from another
                image.
        """
        stored = read_stored(path)
        guidance = stored.guidance
        if guidance is not None and fingerprint(guidance) != stored.image_digest:
            raise ValueError(f"{path}: damaged: its image is not that of the fit")
        if image is not None:
            guidance = resize_image(read_image(image), stored.image_size)
            if fingerprint(guidance) != stored.image_digest:
                raise ValueError(f"{path}: was made from another image than the one given")
        if guidance is None:
            raise ValueError(f"{path}: does not hold its image; give it as image=")
        return cls(stored.field, guidance, stored.components, stored.mean, stored.facts)

    def _size(self, output_size: Size | None) -> Size:
        if output_size is None:
            return self.shape[2], self.shape[3]
        return check_output_size(output_size)

    def _window(
        self, window: tuple[int, int, int, int], size: Size, components: Tensor, constant: Tensor
    ) -> Tensor:
        """Rows and columns (top, left, height, width) of a map of ``size``: (C, height, width)."""
        top, left, height, width = window
        y = (torch.arange(top, top + height, dtype=torch.float64) + 0.5) / size[0]
        x = (torch.arange(left, left + width, dtype=torch.float64) + 0.5) / size[1]
        out = components.new_empty(components.shape[1], height, width)
        rows = max(1, _POINTS // width)
        for start in range(0, height, rows):
            part = y[start : start + rows]
            places = torch.cartesian_prod(part, x)  # (N, 2)
            values = torch.addmm(constant[:, None], components.T, self._evaluate(places).T)
            out[:, start : start + len(part)] = values.view(-1, len(part), width)
        return out

    @cached_property
    def _seen(self) -> Tensor:
        """The map that the field looks at, (H', W', D); made when first needed."""
        return self.field.look(self.guidance)

    @torch.no_grad()
    def _evaluate(self, places: Tensor) -> Tensor:
        """Coordinates at places (N, 2), (y, x) in [0, 1] float64: (N, k)."""
        return self.field(places.float(), sample(self._seen, places))


def resize_image(pixels: Tensor, size: Size) -> Tensor:
    """(3, H, W) in [0, 1] -> (3, *size) uint8, as :meth:`Backbone.preprocess` resizes."""
    if tuple(pixels.shape[1:]) != tuple(size):
        pixels = F.interpolate(
            pixels[None], size=tuple(size), mode="bicubic", align_corners=False, antialias=True
        )[0].clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8)


def fingerprint(guidance: Tensor) -> str:
    """A name for an image's pixels: SHA-256 over size and colours of (3, H, W) uint8."""
    found = hashlib.sha256(str(tuple(guidance.shape)).encode())
    found.update(guidance.contiguous().numpy().tobytes())
    return found.hexdigest()
