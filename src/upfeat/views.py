"""Views: jittered copies of an image, and the same jitter applied to features of any size.

Multi-view consistency (FeatUp, section 3.1) requires that the same geometric transform is applied
to an image and to its high-resolution features. The published transform has four steps: reflect-pad
by ``pad``, zoom by ``zoom`` (bilinear), crop a window of the original size at ``offset``, flip
left-right. Here the four steps are combined into one map of coordinates.

Coordinates. Pixel indices refer to pixel centres: index 0 is the centre of the first pixel, so an
axis of n pixels covers [-1/2, n - 1/2]. On an axis of n image pixels, index v of the view shows the
image at index

    source(v) = fold((v + offset + 1/2) / zoom - pad - 1/2)

On the horizontal axis of a flipped view, v is first replaced by n - 1 - v. ``fold``
(:func:`reflect`) reflects about the centres of the first and the last pixel of the image, as often
as needed, so that a pad larger than the image is well defined. Maps of another size than the image
are aligned with it edge to edge (``align_corners=False``) and reflected at the same positions, so
that features at any resolution move exactly as the image does.

Each axis is transformed on its own, so the view of a map x is ``rows @ x @ columns.mT``, with one
interpolation matrix per axis and view (:meth:`Jitter.matrices`). Interpolation is bilinear where
the view magnifies the map, as for maps of the image's size at zoom 1 or more. Where the view
reduces the map, the triangular filter is widened (antialiasing). The mean position of its weights
then differs from the exact position: by less than a tenth of a pixel of x inside, and by up to half
of the filter's half-width at the borders of x, where the filter is cut off. ``warp`` computes the
product; its adjoint is ``warp`` with both matrices transposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from upfeat.bounds import LARGEST, flag, indices, instance, number, shown, whole
from upfeat.geometry import reflect
from upfeat.machine import exact_dtype
from upfeat.randomness import device_of
from upfeat.types import shapes_repr
from upfeat.warp import check_map, size_of, warp, working_dtype

__all__ = [
    "Jitter",
    "apply_jitter",
    "apply_jitter_adjoint",
    "sample_jitters",
    "spread_jitters",
]


@dataclass(frozen=True, eq=False)
class Jitter:
    """Parameters of N views of images of one size.

    Args:
        size: (height, width) in pixels of the image and of the view.
        pad: (N, 2), width of the reflected border in image pixels, (vertical, horizontal).
        zoom: (N,), magnification, positive; at least 1 in the published recipe.
        offset: (N, 2), (top, left) corner of the crop, in pixels of the padded and zoomed image.
        flip: (N,) bool, true if the crop is mirrored left-right.

    All tensors are stored on the CPU, numbers in float64.

    Raises:
        TypeError: ``pad``, ``zoom``, ``offset`` or ``flip`` is not a tensor.
        ValueError: the size is below 1, shapes disagree, ``zoom`` is not positive, or ``pad`` or
            ``offset`` contains NaN or infinity.
    """

    size: tuple[int, int]
    pad: Tensor
    zoom: Tensor
    offset: Tensor
    flip: Tensor

    __repr__ = shapes_repr

    def __post_init__(self) -> None:
        """Check shapes and ranges; move every tensor to the CPU and convert numbers to float64."""
        _check_size("size", self.size)
        for name in ("pad", "zoom", "offset", "flip"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(
                    f"{name} is of type {type(getattr(self, name)).__name__}, no tensor"
                )
        for name in ("pad", "zoom", "offset"):
            object.__setattr__(self, name, getattr(self, name).to("cpu", torch.float64))
        object.__setattr__(self, "flip", self.flip.to("cpu", torch.bool))
        if self.zoom.ndim != 1:
            raise ValueError(f"zoom must have shape (N,), got {tuple(self.zoom.shape)}")
        n = len(self.zoom)
        for name, shape in (("pad", (n, 2)), ("offset", (n, 2)), ("flip", (n,))):
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name} must have shape {shape} to match zoom, got {found}")
        for name in ("pad", "offset"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise ValueError(f"{name} holds NaN or infinity; give numbers of pixels")
        if not bool((self.zoom > 0).all()):
            raise ValueError(f"zoom must be positive, got {self.zoom.tolist()}; use 1 for no zoom")

    @staticmethod
    def identity(n: int, *, size: tuple[int, int]) -> Jitter:
        """Return ``n`` views that equal the image."""
        n = whole("n", n, 0)
        none = torch.zeros(n, 2)
        return Jitter(size, none, torch.ones(n), none, torch.zeros(n, dtype=torch.bool))

    @staticmethod
    def cat(jitters: list[Jitter]) -> Jitter:
        """Join views of one image size into one batch, in order.

        Raises:
            ValueError: the list is empty, or the image sizes differ.
        """
        sizes = {jitter.size for jitter in jitters}
        if len(sizes) != 1:
            raise ValueError(f"jitters must share one size, got {sorted(sizes)}; join each alone")
        parts = ("pad", "zoom", "offset", "flip")
        return Jitter(
            jitters[0].size, *(torch.cat([getattr(j, part) for j in jitters]) for part in parts)
        )

    def __len__(self) -> int:
        """Return the number of views."""
        return len(self.zoom)

    def __getitem__(self, index: int | slice | Tensor) -> Jitter:
        """Return the selected views as a batch; an integer selects a batch of one."""
        if isinstance(index, int):
            index = range(len(self))[index]
            index = slice(index, index + 1)
        return Jitter(
            self.size, self.pad[index], self.zoom[index], self.offset[index], self.flip[index]
        )

    def __iter__(self) -> Iterator[Jitter]:
        """Yield the views one by one, each as a batch of one."""
        return (self[i] for i in range(len(self)))

    def to_source(self, points: Tensor) -> Tensor:
        """Convert positions in each view to positions in the image, exactly.

        Args:
            points: (P, 2) or (N, P, 2), positions (y, x) in the view as pixel indices, which may be
                fractional.

        Returns:
            (N, P, 2) float64 on the device of ``points`` (float32 on MPS), positions (y, x) in the
            image, reflected into [0, size - 1].

        Raises:
            ValueError: ``points`` has another shape.
        """
        in_view = self._points(points)
        axes = [self._source(axis, in_view[..., axis]) for axis in (0, 1)]
        return _to_device_of(points, torch.stack(axes, dim=-1))

    def to_view(self, points: Tensor) -> Tensor:
        """Convert positions in the image to positions in each view: the inverse of ``to_source``.

        Args:
            points: (P, 2) or (N, P, 2), positions (y, x) in the image as pixel indices, which may
                be fractional.

        Returns:
            (N, P, 2) float64 on the device of ``points`` (float32 on MPS), positions (y, x) in the
            view, outside [0, size - 1] if the crop does not contain the point. A point that the
            padding reflects into the view also appears, mirrored, at other positions in the view,
            which are not returned.

        Raises:
            ValueError: ``points`` has another shape.
        """
        in_image = self._points(points)
        in_view = (in_image + self.pad[:, None] + 0.5) * self.zoom[:, None, None]
        in_view = in_view - self.offset[:, None] - 0.5  # (N, P, 2)
        mirrored = self.size[1] - 1 - in_view[..., 1]
        in_view[..., 1] = torch.where(self.flip[:, None], mirrored, in_view[..., 1])
        return _to_device_of(points, in_view)

    def matrices(
        self,
        input_size: tuple[int, int] | None = None,
        output_size: tuple[int, int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the warp as one interpolation matrix per axis: view = rows @ x @ columns.mT.

        Args:
            input_size: (h, w) of the map x to warp; ``None`` for the image's size.
            output_size: (height, width) of the warped map; ``None`` for the image's size.
            dtype: floating-point type of the matrices, which are computed in float64.
            device: device of the matrices; ``None`` for the CPU.

        Returns:
            rows (N, output height, input height) and columns (N, output width, input width):
            non-negative, every row sums to 1.
        """
        source = self.size if input_size is None else _check_size("input_size", input_size)
        target = self.size if output_size is None else _check_size("output_size", output_size)
        rows, columns = (self._matrix(axis, source[axis], target[axis]) for axis in (0, 1))
        return rows.to(device, dtype), columns.to(device, dtype)

    def _points(self, points: Tensor) -> Tensor:
        """Check points and expand them to (N, P, 2), in float64 on the CPU."""
        instance("points", points, Tensor, "give a tensor")
        if points.ndim not in (2, 3) or points.shape[-1] != 2:
            shape = tuple(points.shape)
            raise ValueError(f"points must have shape (P, 2) or (N, P, 2) as (y, x), got {shape}")
        if points.ndim == 3 and len(points) not in (1, len(self)):
            raise ValueError(f"points must list 1 or {len(self)} views, got {len(points)}")
        return points.to("cpu", torch.float64).expand(len(self), -1, 2)

    def _source(self, axis: int, index: Tensor) -> Tensor:
        """Convert indices in the views, (N, P), to indices in the image, (N, P), on one axis."""
        n = self.size[axis]
        if axis == 1:
            index = torch.where(self.flip[:, None], n - 1 - index, index)
        index = (index + self.offset[:, axis, None] + 0.5) / self.zoom[:, None]
        return reflect(index - self.pad[:, axis, None] - 0.5, n)

    def _matrix(self, axis: int, inputs: int, outputs: int) -> Tensor:
        """Interpolation matrix (N, outputs, inputs) of one axis, in float64."""
        n = self.size[axis]
        in_view = _rescale(torch.arange(outputs, dtype=torch.float64), outputs, n)
        in_image = self._source(axis, in_view.expand(len(self), -1))
        centre = _rescale(in_image, n, inputs)[..., None]  # (N, outputs, 1), in input pixels
        # Half-width of the triangle in input pixels: the distance between neighbouring outputs, at
        # least 1.
        half = (inputs / (outputs * self.zoom)).clamp(min=1)[:, None, None]
        # Pixels nearer than ``half`` to the centre: at most ⌈2·half⌉.
        first = torch.floor(centre - half) + 1
        taps = math.ceil(2 * float(half.max()))
        pixel = first + torch.arange(taps, dtype=torch.float64)  # (N, outputs, taps)
        weight = (1 - (pixel - centre).abs() / half).clamp(min=0)
        # Pixels outside the map get weight 0; clamping then only keeps their indices valid.
        weight = weight * ((pixel >= 0) & (pixel < inputs))
        weight = weight / weight.sum(-1, keepdim=True)
        matrix = weight.new_zeros(len(self), outputs, inputs)
        return matrix.scatter_add_(-1, pixel.clamp(0, inputs - 1).long(), weight)


def sample_jitters(
    n: int,
    *,
    size: tuple[int, int],
    max_pad: float = 20,
    max_zoom: float = 2.0,
    zoom_probability: float = 0.5,
    flip_probability: float = 0.5,
    subpixel: bool = False,
    generator: torch.Generator | None = None,
) -> Jitter:
    """Draw ``n`` independent views (FeatUp, section 3.1; the defaults are the values for JBU).

    Args:
        n: number of views.
        size: (height, width) of the image in pixels, of any size and aspect ratio.
        max_pad: width of the reflected border of every view, in pixels (30 for the implicit
            upsampler).
        max_zoom: largest zoom; zooms of zoomed views are uniform in [1, max_zoom] (1.8 for the
            implicit upsampler).
        zoom_probability: probability that a view is zoomed, in [0, 1].
        flip_probability: probability that a view is mirrored, in [0, 1].
        subpixel: let the crop start between pixels. By default it starts on a pixel of the zoomed
            image, as published, so that a view without zoom copies pixels without blur if
            ``max_pad`` is a whole number.
        generator: source of randomness; ``None`` for PyTorch's global generator.

    Returns:
        The parameters of the views.

    Raises:
        TypeError: ``generator`` is no generator.
        ValueError: an argument is out of range.
    """
    n = whole("n", n)
    device = device_of(generator)
    uniform = torch.rand(n, 4, dtype=torch.float64, generator=generator, device=device).cpu()
    chances = zoom_probability, flip_probability
    return _from_uniform(uniform, size, max_pad, max_zoom, chances, subpixel)


def spread_jitters(
    n: int,
    *,
    size: tuple[int, int],
    max_pad: float = 20,
    max_zoom: float = 2.0,
    zoom_probability: float = 0.5,
    flip_probability: float = 0.5,
    subpixel: bool = False,
    generator: torch.Generator | None = None,
) -> Jitter:
    """Draw ``n`` views that cover the parameters evenly, by a scrambled Sobol sequence.

    Each view alone is distributed as in :func:`sample_jitters`, but together the views leave
    smaller gaps in position, zoom and flip, so that fewer views suffice to cover the whole image at
    every scale. Every prefix of the sequence is also evenly spread, best at powers of two: to use
    the views in batches, draw all of them once and take slices.

    Arguments and errors are those of :func:`sample_jitters`; the generator draws the scrambling.
    """
    n = whole("n", n)
    device = device_of(generator)
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    sobol = torch.quasirandom.SobolEngine(4, scramble=True, seed=seed)
    chances = zoom_probability, flip_probability
    uniform = sobol.draw(n, dtype=torch.float64)
    return _from_uniform(uniform, size, max_pad, max_zoom, chances, subpixel)


def apply_jitter(
    x: Tensor, jitter: Jitter, *, output_size: tuple[int, int] | None = None
) -> Tensor:
    """Warp images, or features of any size, to views; linear and differentiable in x.

    Args:
        x: (B, C, h, w), floating point; B is N (one map per view), or either of B and N is 1.
        jitter: N views.
        output_size: (height, width) of the result; ``None`` for the size of the jitter's image.

    Returns:
        (max(B, N), C, height, width).

    Raises:
        ValueError: x is not a batch of maps, or its batch does not fit the number of views.
    """
    check_map("x", x)
    instance("jitter", jitter, Jitter, "give views, as sample_jitters() draws them")
    return warp(
        x, *jitter.matrices(size_of(x), output_size, dtype=working_dtype(x), device=x.device)
    )


def apply_jitter_adjoint(
    y: Tensor, jitter: Jitter, *, input_size: tuple[int, int] | None = None
) -> Tensor:
    """Apply the exact transpose of :func:`apply_jitter` to views, view by view.

    Args:
        y: (B, C, height, width), maps in the coordinates of the views.
        jitter: N views, with B and N as in :func:`apply_jitter`.
        input_size: (h, w) of the maps before ``apply_jitter``; ``None`` for the image's size.

    Returns:
        (max(B, N), C, h, w). For the transpose with respect to one map that was warped to many
        views, sum over the first axis.
    """
    check_map("y", y)
    instance("jitter", jitter, Jitter, "give views, as sample_jitters() draws them")
    rows, columns = jitter.matrices(input_size, size_of(y), dtype=working_dtype(y), device=y.device)
    return warp(y, rows.mT, columns.mT)


def _from_uniform(
    uniform: Tensor,
    size: tuple[int, int],
    max_pad: float,
    max_zoom: float,
    chances: tuple[float, float],
    subpixel: bool,
) -> Jitter:
    """Convert (N, 4) numbers in [0, 1), for zoom, top, left and flip, to N views.

    ``chances`` are the probabilities of zoom and of flip.
    """
    _check_size("size", size)
    max_pad = number("max_pad", max_pad, 0, 1e9)
    max_zoom = number("max_zoom", max_zoom, 1, 1e9)
    zoom_chance = number("zoom_probability", chances[0], 0, 1)
    flip_chance = number("flip_probability", chances[1], 0, 1)
    # One number u decides whether a view is zoomed and by how much: below 1 − zoom_chance the zoom
    # is 1; from there to 1 it rises linearly from 1 to max_zoom.
    rise = ((uniform[:, 0] - (1 - zoom_chance)) / max(zoom_chance, 1e-12)).clamp(min=0)
    zoom = 1 + (max_zoom - 1) * rise
    extent = torch.tensor(size, dtype=torch.float64)
    room = (extent + 2 * max_pad) * zoom[:, None] - extent  # (N, 2), largest start of the crop
    subpixel = flag("subpixel", subpixel)
    offset = uniform[:, 1:3] * (room if subpixel else torch.floor(room) + 1)
    offset = offset if subpixel else torch.floor(offset)
    pad = torch.full_like(offset, max_pad)
    return Jitter(size, pad, zoom, offset, uniform[:, 3] < flip_chance)


def _to_device_of(points: Tensor, positions: Tensor) -> Tensor:
    """Move float64 positions to the device of ``points``; as float32 to MPS, without float64."""
    dtype = exact_dtype(points.device)
    return positions.to(dtype).to(points.device)


def _rescale(index: Tensor, source: int, target: int) -> Tensor:
    """Convert indices on an axis of ``source`` pixels to one of ``target`` pixels, edge to edge."""
    ratio = target / source
    return index * ratio + (ratio - 1) / 2


def _check_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    sides = indices(size, 1, LARGEST)
    if len(sides) != 2:
        raise ValueError(f"{name}={shown(size)} must be (height, width), each at least 1")
    return sides[0], sides[1]
