"""Implicit features: one image's features as a function of place, at any resolution.

``upfeat.fit_implicit`` extracts a backbone's features from many views of an image and fits one
small function of place and image content to all of them. The function, the image and the basis of
its values are stored: a hundredth to a twentieth of the size of the map that they render.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat._version import __version__
from upfeat.bounds import flag, shown
from upfeat.budget import Buffer
from upfeat.feature_map import FeatureMap, check_head, check_points, check_window
from upfeat.images import read_image
from upfeat.implicit.fields import Field
from upfeat.implicit.guides import sample
from upfeat.implicit.stored import FORMAT, encode, read_stored
from upfeat.machine import readable
from upfeat.operator_checks import FLOATS
from upfeat.storage import write_tensors
from upfeat.types import Filled, Size, Window, times
from upfeat.upsamplers.checks import check_output_size

if TYPE_CHECKING:
    from upfeat.images import ImageLike

# Points evaluated at a time, which bounds the memory needed besides the result.
_POINTS = 1 << 16

Method = TypeVar("Method", bound=Callable[..., Any])


def _exactly(method: Method) -> Method:
    """Make a method compute without gradients, in full precision, on the CPU.

    Neither autocast nor a default device changes that.
    """

    @wraps(method)
    def exact(*given: Any, **options: Any) -> Any:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            return method(*given, **options)

    return cast(Method, exact)


class ImplicitFeatures(FeatureMap):
    """Features (1, C, H, W) of one image, rendered at any point and resolution.

    A value depends on its point of the image alone, so renderings at different resolutions agree
    wherever they sample the same point. No method records gradients.

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
        """Assemble features from a field and a basis.

        Args:
            field: function of place and image content that gives k coordinates.
            guidance: (3, H, W) uint8, the image at the size of the fit.
            components: (k, C), the features that one unit of each coordinate adds.
            mean: (C,), the features where all coordinates are 0.
            facts: provenance, as JSON values.
        """
        self.field, self.guidance = field, guidance
        self.components, self.mean = components, mean
        self.facts = dict(facts or {})
        self.shape = torch.Size((1, components.shape[1], *guidance.shape[1:]))

    def __repr__(self) -> str:
        """Show the shape, the backbone, the field and the memory that the full map would take."""
        coefficients = sum(one.numel() for one in self.field.tensors().values())
        held = self.facts.get("held_out")
        loss = f", held-out loss {held:.4f}" if isinstance(held, float) else ""
        return (
            f"{type(self).__name__}({times(self.shape)} at the size of the fit, any other by "
            f"render(); {self.facts.get('backbone', 'an unknown backbone')}, {self.field.kind} "
            f"field of {coefficients:,} numbers, {len(self.components)} components{loss}; "
            f"{readable(4 * math.prod(self.shape))} if full)"
        )

    @overload
    def render(
        self, output_size: Size | None = ..., *, dtype: torch.dtype | None = ..., out: None = ...
    ) -> Tensor: ...
    @overload
    def render(
        self, output_size: Size | None = ..., *, dtype: torch.dtype | None = ..., out: Filled
    ) -> Filled: ...
    def render(
        self,
        output_size: Size | None = None,
        *,
        dtype: torch.dtype | None = None,
        out: Any = None,
    ) -> Any:
        """Draw the whole map, a strip of rows at a time.

        Args:
            output_size: any (height, width), pixels; ``None`` for the resolution of the fit. Each
                pixel has the features of its centre.
            dtype: type of the result; ``None`` for float32, or the type of ``out``.
            out: (1, C, height, width), a tensor or NumPy array to write to, such as
                :class:`numpy.memmap`.

        Returns:
            (1, C, height, width); ``out`` if it is given.

        Raises:
            ValueError: the size is not two whole numbers, ``out`` has another shape or cannot be
                written, or the dtype is not a floating-point type or too small for the values.
            TypeError: ``out`` is neither a tensor nor an array.
        """
        size = self._size(output_size)
        if not isinstance(dtype, torch.dtype | None) or dtype not in (None, *FLOATS):
            raise ValueError(f"dtype={shown(dtype)} must be one of floating numbers")
        shape = (1, self.shape[1], *size)
        if out is None:
            out = torch.empty(shape, dtype=dtype or torch.float32, device="cpu")
        buffer = Buffer(out, shape)
        if dtype not in (None, buffer.dtype):
            raise ValueError(f"dtype={dtype} and out of {out.dtype} disagree; leave out dtype")
        for top, strip in self.strips(size):
            rows = Window(top, 0, strip.shape[1], size[1])
            buffer.write(slice(None), rows, strip[None])
        buffer.finish()
        return out

    def full(self, dtype: torch.dtype | None = None) -> Tensor:
        """Render the map at the resolution of the fit, (1, C, H, W); see :meth:`render`."""
        return self.render(dtype=dtype)

    def strips(self, output_size: Size | None = None) -> Iterator[tuple[int, Tensor]]:
        """Render a map that need not fit into memory, as strips of rows.

        Args:
            output_size: (height, width) of the map; ``None`` for the resolution of the fit.

        Yields:
            The index of a strip's first row, and the strip (C, rows, width).
        """
        size = self._size(output_size)
        rows = max(1, _POINTS // size[1])
        for top in range(0, size[0], rows):
            height = min(rows, size[0] - top)
            yield top, self._window((top, 0, height, size[1]), size, self.components, self.mean)

    def crop(
        self, top: int, left: int, height: int, width: int, *, output_size: Size | None = None
    ) -> Tensor:
        """Render a window of the map.

        Args:
            top: first row, pixels.
            left: first column, pixels.
            height: number of rows, ≥ 1.
            width: number of columns, ≥ 1.
            output_size: (height, width) of the whole map; ``None`` for the resolution of the fit.

        Returns:
            (1, C, height, width).

        Raises:
            ValueError: the window is not inside the map.
        """
        size = self._size(output_size)
        window = check_window(size, top, left, height, width)
        return self._window(window, size, self.components, self.mean)[None]

    @_exactly
    def at(self, points: Tensor) -> Tensor:
        """Evaluate the features at points of the image.

        Between pixels, the pixels' values are interpolated bilinearly; with ``share=1``, what is
        interpolated are the image's queries or colours.

        Args:
            points: (N, 2), (y, x) in pixels of the fit; whole numbers are pixel centres, and the
                image's border is half a pixel outside the first and the last centre.

        Returns:
            (N, C).

        Raises:
            ValueError: ``points`` has another shape, or a point is outside the image.
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

    @_exactly
    def project(
        self, weight: Tensor, bias: Tensor | None = None, *, output_size: Size | None = None
    ) -> Tensor:
        """Apply a linear head at every pixel, without computing the C channels.

        Args:
            weight: (K, C) weights of the head.
            bias: (K,) offsets of the head, or ``None``.
            output_size: (height, width) of the map; ``None`` for the resolution of the fit.

        Returns:
            (1, K, height, width), equal to the head applied to :meth:`render`.

        Raises:
            ValueError: the head does not take C channels.
        """
        check_head(weight, bias, self.shape[1])
        weight = weight.to(self.components)
        components, constant = self.components @ weight.T, weight @ self.mean
        if bias is not None:
            constant = constant + bias.to(constant)
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
            path: the file to write.
            guidance: store the image in the file; otherwise only its fingerprint is stored, and
                :meth:`load` needs the image.

        Raises:
            ValueError: a value to be written is NaN or infinite, or ``facts`` are no JSON values.
        """
        try:
            provenance = json.dumps(self.facts, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"facts must be values of JSON ({error}); nothing is written"
            ) from None
        tensors = {f"field.{name}": value for name, value in self.field.tensors().items()}
        tensors |= {"components": self.components, "mean": self.mean}
        for name, value in tensors.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} holds NaN or infinity; nothing is written")
        if flag("guidance", guidance):
            tensors["guidance_png"] = encode(self.guidance)
        facts = {
            "format": FORMAT,
            "upfeat_version": __version__,
            "field": self.field.kind,
            "field_facts": json.dumps(self.field.facts()),
            "image_size": json.dumps(list(self.shape[2:])),
            "image_digest": fingerprint(self.guidance),
            "facts": provenance,
        }
        write_tensors(path, {key: value.contiguous() for key, value in tensors.items()}, facts)

    @classmethod
    def load(cls, path: str | Path, image: ImageLike | None = None) -> ImplicitFeatures:
        """Read a file that :meth:`save` wrote.

        Args:
            path: the file to read.
            image: the photograph: required if the file does not contain it, else only compared with
                the stored image.

        Raises:
            FileNotFoundError: there is no such file or image.
            ValueError: the file is truncated, of another kind or version, or was made from another
                image; or it contains no image and none is given.
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
            raise ValueError(f"{path}: does not hold its image; give it as image= (--image)")
        return cls(stored.field, guidance, stored.components, stored.mean, stored.facts)

    def _size(self, output_size: Size | None) -> Size:
        if output_size is None:
            return self.shape[2], self.shape[3]
        return check_output_size(output_size)

    @_exactly
    def _window(
        self, window: tuple[int, int, int, int], size: Size, components: Tensor, constant: Tensor
    ) -> Tensor:
        """Render a window (top, left, height, width) of a map of ``size``: (C, height, width)."""
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
        """The field's map of the image, (H', W', D); computed on first use."""
        return self.field.look(self.guidance)

    def _evaluate(self, places: Tensor) -> Tensor:
        """Return the coordinates (N, k) at places (N, 2) float64, (y, x) in [0, 1]."""
        return self.field(places.float(), sample(self._seen, places))


def resize_image(pixels: Tensor, size: Size) -> Tensor:
    """Resize an image (3, H, W) in [0, 1] as :meth:`Backbone.preprocess` does: (3, *size) uint8."""
    if tuple(pixels.shape[1:]) != tuple(size):
        pixels = F.interpolate(
            pixels[None], size=tuple(size), mode="bicubic", align_corners=False, antialias=True
        )[0].clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8)


def fingerprint(guidance: Tensor) -> str:
    """Return the SHA-256, in hexadecimal, of the shape and the pixels of (3, H, W) uint8."""
    found = hashlib.sha256(str(tuple(guidance.shape)).encode())
    found.update(guidance.contiguous().numpy().tobytes())
    return found.hexdigest()
