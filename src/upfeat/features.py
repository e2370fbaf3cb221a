"""Upsampled features that are computed only where they are requested.

The map of C channels at the image's size is large (77 MB for 384 channels at 224 pixels), and
applications seldom need all of it. Upsampling is linear, with weights that depend on the image: a
linear head can therefore be applied on the coarse grid before upsampling, and a point or a crop
needs only the cells and pixels within reach of its own pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from upfeat.bounds import shown, whole
from upfeat.budget import Buffer, free_bytes, made_parts, plan_blocks, plan_windows
from upfeat.feature_map import (
    blank,
    check_head,
    check_missing,
    check_points,
    check_window,
    interpolate,
)
from upfeat.lazy_files import Parts, read_parts, write_parts
from upfeat.linear import principal_components
from upfeat.machine import parse_memory, readable
from upfeat.normalization import check_normalization
from upfeat.operator_checks import FLOATS
from upfeat.prepared_map import PreparedMap
from upfeat.snapshots import watched
from upfeat.types import Filled, shapes_repr, times
from upfeat.upsamplers import Kernels, Upsampler, Window
from upfeat.upsamplers.checks import check_hidden, check_inputs, check_result
from upfeat.upsamplers.head import add_offset
from upfeat.upsamplers.maps import Map
from upfeat.upsamplers.pretrained import require_upsampler

_TILE = 32


class PCA(NamedTuple):
    """Principal components of a feature map."""

    map: Tensor
    """Coordinates of every pixel in the basis, (B, k, H, W)."""
    components: Tensor
    """The basis, (k, C): orthonormal rows, in descending order of variance."""
    mean: Tensor
    """Mean of the coarse features, (C,)."""

    __repr__ = shapes_repr


class UpsampledFeatures(PreparedMap):
    """Upsampled features (B, C, H, W), computed only where they are requested.

    Each method's result equals the result computed from :meth:`full`, up to rounding.

    Attributes:
        shape: (B, C, H, W) of the whole map.
    """

    def __init__(
        self,
        features: Tensor,
        guidance: Tensor,
        upsampler: Upsampler,
        output_size: tuple[int, int] | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        missing: Tensor | None = None,
        hidden: Tensor | None = None,
        max_memory: int | str | None = None,
    ) -> None:
        """Keep the inputs of the upsampler; nothing is computed yet.

        Args:
            features: (B, C, h, w), coarse features.
            guidance: (B, 3, H', W'), normalised image, or as many bands as the upsampler takes.
            upsampler: upsampler of the features.
            output_size: (H, W) of the map; ``None`` for the guidance's size.
            mean: mean of each channel that the guidance was normalised with, RGB in [0, 1];
                with ``mean`` and ``std``, :meth:`save` stores an 8-bit image without loss.
            std: standard deviation of each channel that the guidance was normalised with; given
                with ``mean``, or neither.
            missing: bool tensor that broadcasts to (B, 1, H, W): true for pixels without data,
                whose features are 0; ``None`` if all pixels have data.
            hidden: (B, D, h', w'), features of early layers of the backbone, for upsamplers that
                use them; ``None`` for none.
            max_memory: most memory that the process may use while :meth:`full` and :meth:`project`
                run, in bytes or as "2GB"; ``None`` for no bound.

        Raises:
            TypeError: ``features`` or ``guidance`` is not a tensor, or ``upsampler`` not an
                upsampler.
            ValueError: an input is invalid; see :meth:`Upsampler.forward`.
        """
        require_upsampler(upsampler)
        size = check_inputs(features, guidance, output_size, upsampler.guidance_bands)
        check_hidden(hidden, features)
        self.features, self.hidden = features, hidden
        self.max_memory = None if max_memory is None else parse_memory(max_memory)
        self.guidance = guidance
        self.upsampler = upsampler
        self.shape = torch.Size((*features.shape[:2], *size))
        self._normalization = None
        if mean is not None or std is not None:
            self._normalization = check_normalization(mean, std, guidance.shape[1])
        self.missing = None if missing is None else check_missing(missing, self.shape)

    def __repr__(self) -> str:
        """One line: shape, device, inputs and upsampler of the map, and the memory of all of it."""
        dtype = str(self.features.dtype).removeprefix("torch.")
        early = ""
        if self.hidden is not None:
            early = f", early layers {times(self.hidden.shape)}"
        memory = readable(math.prod(self.shape) * self.features.element_size())
        return (
            f"{type(self).__name__}({times(self.shape)}, {dtype} on {self.features.device}; from "
            f"features {times(self.features.shape)}{early} and guidance "
            f"{times(self.guidance.shape)} by {self.upsampler.name}; {memory} if full)"
        )

    @property
    def parts(self) -> Parts:
        """Inputs of the map, as :func:`upfeat.lazy_files.write_parts` writes them."""
        size = (self.shape[2], self.shape[3])
        inputs = self.features, self.guidance, self.upsampler, size
        return Parts(*inputs, self._normalization, self.missing, self.hidden)

    @overload
    def full(
        self,
        dtype: torch.dtype | None = ...,
        *,
        out: None = ...,
        max_memory: int | str | None = ...,
    ) -> Tensor: ...
    @overload
    def full(
        self,
        dtype: torch.dtype | None = ...,
        *,
        out: Filled,
        max_memory: int | str | None = ...,
    ) -> Filled: ...
    def full(
        self,
        dtype: torch.dtype | None = None,
        *,
        out: Any = None,
        max_memory: int | str | None = None,
    ) -> Any:
        """The whole map, (B, C, H, W).

        Args:
            dtype: data type of the result; ``None`` for that of the features, or of ``out``. For a
                type other than the features', the result is filled part by part, so that no map in
                the features' type is allocated.
            out: a tensor on any device, or a NumPy array such as a :class:`numpy.memmap`, of the
                map's shape: the map is written to it part by part.
            max_memory: most memory that the process may use, including the memory that it uses
                already, in bytes or as "2GB"; ``None`` for :attr:`max_memory`. On one thread the
                result is the same bit by bit with any bound. Memory of ``out`` is not counted,
                since the caller has allocated it.

        Returns:
            A new tensor, or ``out``.

        Raises:
            ValueError: ``dtype`` is not a floating-point type, the map overflows it or is too small
                for float16, ``out`` has another shape or type, or ``max_memory`` is too small; the
                message names the smallest sufficient bound.

        Example::

            file = np.memmap("map.bin", np.float16, "w+", shape=lazy.shape)
            lazy.full(out=file, max_memory="1GB")
        """
        known = isinstance(dtype, torch.dtype | None) and dtype in (None, *FLOATS)
        if not known:
            raise ValueError(f"dtype={shown(dtype)} must be one of floating numbers")
        bound = self.max_memory if max_memory is None else parse_memory(max_memory)
        if out is None and bound is None and dtype in (None, self.features.dtype):
            return self._render()
        return self._fill(dtype, out, bound)

    def crop(self, top: int, left: int, height: int, width: int) -> Tensor:
        """A window of the map.

        Args:
            top: first row, in pixels from 0.
            left: first column, in pixels from 0.
            height: number of rows, ≥ 1.
            width: number of columns, ≥ 1.

        Returns:
            (B, C, height, width).

        Raises:
            ValueError: the window is not inside the map.
        """
        window = check_window((self.shape[2], self.shape[3]), top, left, height, width)
        # With a memory bound, features on finer grids are computed again rather than kept.
        made = self._precompute() if self.max_memory is None else self._parts()
        out = self.upsampler.render(*made, window=window)
        expected = (*self.shape[:2], window.height, window.width)
        return self._blank(check_result(self.upsampler.name, out, expected), window)

    def at(self, points: Tensor) -> Tensor:
        """Features at points, interpolated bilinearly between pixels.

        Args:
            points: (N, 2), rows (y, x) in pixels; integers are pixel centres.

        Returns:
            (N, C).

        Raises:
            ValueError: the map has several images, or a point is outside the map.
        """
        if self.shape[0] != 1:
            raise ValueError(f"at() takes one image; these are features of {self.shape[0]}")
        height, width = self.shape[2:]
        check_points(points)
        last = torch.tensor([height - 1, width - 1], device=points.device)
        if not bool(((points >= 0) & (points <= last)).all()):
            raise ValueError(
                f"points must lie in the map: y from 0 to {height - 1}, x from 0 to {width - 1}"
            )
        out = self.features.new_empty((len(points), self.shape[1]))
        precomputed = self._precompute()
        tiles = points.long() // _TILE
        for tile in torch.unique(tiles, dim=0):
            inside = (tiles == tile).all(1)
            out[inside] = self._sample_tile(precomputed, points[inside])
        if self.missing is not None:
            rows, columns = points.round().long().unbind(1)
            out[self.missing[0, 0, rows, columns]] = 0
        return out

    @overload
    def project(
        self,
        weight: Tensor,
        bias: Tensor | None = ...,
        *,
        out: None = ...,
        max_memory: int | str | None = ...,
    ) -> Tensor: ...
    @overload
    def project(
        self,
        weight: Tensor,
        bias: Tensor | None = ...,
        *,
        out: Filled,
        max_memory: int | str | None = ...,
    ) -> Filled: ...
    def project(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        out: Any = None,
        max_memory: int | str | None = None,
    ) -> Any:
        """Apply a linear head at every pixel, at the cost of K channels instead of C.

        Args:
            weight: (K, C), of any floating-point type, such as the float64 of scikit-learn.
            bias: (K,), or ``None``.
            out: buffer of shape (B, K, H, W); see :meth:`full`.
            max_memory: see :meth:`full`.

        Returns:
            (B, K, H, W), equal to the head applied to :meth:`full`.

        Raises:
            ValueError: the head does not have C input channels, or an error of :meth:`full`.
        """
        check_head(weight, bias, self.shape[1])
        weight = weight.to(self.features)
        bias = None if bias is None else bias.to(self.features)
        check_head(weight, bias, self.shape[1])  # again: a narrower type may overflow
        bound = self.max_memory if max_memory is None else parse_memory(max_memory)
        if out is not None or bound is not None:
            return self._fill(None, out, bound, weight, bias)
        made = self._render(weight)
        return made if bias is None else add_offset(made, bias)

    def pca(self, k: int = 3) -> PCA:
        """Principal components, fitted to the coarse features and applied at every pixel.

        Args:
            k: number of components, from 1 to C.

        Returns:
            The map of coordinates, equal to ``components·(full − mean)``, with the basis.

        Raises:
            ValueError: k is out of range.
        """
        k = whole("k", k, 1, self.shape[1])
        samples = self.features.detach().transpose(0, 1).flatten(1).float().T  # (B·h·w, C)
        mean, components, _ = principal_components(samples, k)
        components = components.to(self.features.dtype).contiguous()
        mean = mean.to(self.features.dtype)
        return PCA(self.project(components, -components @ mean), components, mean)

    def save(self, path: str | Path, *, exact: bool = False) -> None:
        """Write the inputs of the map to a file, a fiftieth to a hundredth of the map's own size.

        Args:
            path: the safetensors file.
            exact: store features and guidance unchanged. Otherwise features are stored as float16.
                Guidance that is a normalised photograph is stored with 8 bits per colour, without
                loss if the photograph had 8 bits and was not resized; other guidance with 16 bits
                over its range of values, or unchanged where 16 bits are too coarse.

        Raises:
            ValueError: features or guidance contain NaN or infinity, or the features overflow
                float16 or are too small for it.
        """
        write_parts(path, self.parts, exact=exact)

    @classmethod
    def load(cls, path: str | Path, upsampler: Upsampler | None = None) -> UpsampledFeatures:
        """Read a map that :meth:`save` wrote.

        Args:
            path: the safetensors file.
            upsampler: the upsampler of the saved map; ``None`` suffices for one without weights.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a saved map, or was saved with another upsampler.
        """
        parts = read_parts(path, upsampler)
        mean, std = parts.normalization or (None, None)
        try:
            return cls(*parts[:4], mean=mean, std=std, missing=parts.missing, hidden=parts.hidden)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _render(self, head: Tensor | None = None) -> Tensor:
        out = self.upsampler.render(*self._parts(), head=head)
        channels = self.shape[1] if head is None else len(head)
        expected = (self.shape[0], channels, *self.shape[2:])
        return self._blank(check_result(self.upsampler.name, out, expected))

    def _fill(
        self,
        dtype: torch.dtype | None,
        out: Any,
        bound: int | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Any:
        """Compute the map, or a head's map, part by part, into ``out`` or a new tensor."""
        if watched(self._sources()):
            raise ValueError(
                "out=, dtype= and max_memory= record no gradients; use torch.no_grad()"
            )
        channels = self.shape[1] if weight is None else len(weight)
        shape = (self.shape[0], channels, *self.shape[2:])
        held, free = 0, math.inf if bound is None else free_bytes(bound)
        if out is None:
            dtype = dtype or self.features.dtype
            held = math.prod(shape) * dtype.itemsize
        elif dtype not in (None, Buffer(out, shape).dtype):
            raise ValueError(f"dtype={dtype} and out of {out.dtype} disagree; leave out dtype")
        by_channels = self.upsampler.exact_parts == "channels"
        seen = (self.guidance.shape[2], self.guidance.shape[3])
        grid = (0 if self.hidden is None else self.hidden.shape[1], *self.features.shape[2:])
        plan = (
            plan_blocks(shape, free, held)
            if by_channels
            else plan_windows(self.upsampler, shape, seen, grid, free, held)
        )
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=self.features.device)
        buffer = Buffer(out, shape)
        buffer.check_apart(self._sources())
        keeps = not by_channels and weight is None and bound is None
        with torch.no_grad():
            parts = self._precompute() if keeps else self._parts()
            for block, window, values in made_parts(self.upsampler, *parts, weight, plan):
                values = self._blank(values, window)
                if bias is not None:
                    values = add_offset(values, bias[block])
                buffer.write(block, window, values)
        buffer.finish()
        return out

    def _blank(self, out: Tensor, window: Window | None = None) -> Tensor:
        """Set pixels without data to 0, in the whole map or a window of it."""
        if self.missing is None:
            return out
        missing = self.missing
        if window is not None:
            missing = missing[..., window.top : window.bottom, window.left : window.right]
        return blank(out, missing)

    def _sample_tile(self, precomputed: tuple[Kernels, Tensor | Map], points: Tensor) -> Tensor:
        """Features at points (N, 2) of one tile, (N, C), computed from one window."""
        (top, left), (bottom, right) = torch.stack(points.aminmax(dim=0)).long().tolist()
        height = min(bottom + 2, self.shape[2]) - top
        width = min(right + 2, self.shape[3]) - left
        window = Window(top, left, height, width)
        patch = self.upsampler.render(*precomputed, window=window)[0]
        return interpolate(patch, points - torch.tensor([top, left], device=points.device))
