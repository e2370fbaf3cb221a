"""Checks of the operators' arguments; each raises a one-line error that names the argument."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from upfeat.bounds import instance, number, shown

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Data types that operators compute in."""

_LEAST_DIVISOR = 1e-18
"""Least magnitude of a number whose square operators divide by; float32 holds its square."""


def check_ranges(label: str, bounds: Sequence[int], length: int, cells: int) -> None:
    """Check that ranges of cells, one for each of ``length`` pixels, are not empty and in the grid.

    Args:
        label: name of the argument, for error messages.
        bounds: first cell of every range, then one past the last cell of every range.
        length: number of pixels on the axis.
        cells: number of cells on the axis.
    """
    if len(bounds) != 2 * length:
        raise ValueError(f"{label} has {len(bounds)} numbers; give a first and an end for {length}")
    for first, stop in zip(bounds[:length], bounds[length:], strict=True):
        if not 0 <= first < stop <= cells:
            raise ValueError(
                f"{label} holds the cells {first} to {stop}; each range must hold one at least "
                f"and lie in 0 to {cells}"
            )


def check_window(
    name: str,
    tensor: Tensor,
    output_size: tuple[int, int] | None,
    window: tuple[int, int, int, int] | None,
    *,
    whole: str = "output",
    part: str = "window",
) -> tuple[list[int], list[int]]:
    """Check that a tensor contains a window of a map.

    Args:
        name: name of the tensor, for error messages.
        tensor: (…, height, width), values in the window.
        output_size: (height, width) of the map; ``None`` for the tensor's size.
        window: (top, left, height, width); ``None`` for the whole map.
        whole: word for the map in messages, "output" or "grid".
        part: word for the window in messages.

    Returns:
        The map's [height, width], and the window's [top, left].
    """
    label = "output_size" if whole == "output" else "grid_size"
    size = list(tensor.shape[-2:]) if output_size is None else whole_numbers(label, output_size, 2)
    place = (0, 0, *size) if window is None else whole_numbers(part, window, 4)
    top, left, height, width = place
    if (height, width) != tuple(tensor.shape[-2:]):
        raise ValueError(
            f"{name} are {size_of(tensor)} but {part} is {height}×{width}; give those of {part}"
        )
    if top < 0 or left < 0 or top + height > size[0] or left + width > size[1]:
        raise ValueError(
            f"{part}={(top, left, height, width)} does not lie in the {whole} of "
            f"{size[0]}×{size[1]}"
        )
    return size, [top, left]


def check_cells(
    name: str,
    values: Tensor,
    coarse: tuple[list[int], list[int]],
    pixels: Sequence[int],
    fine: tuple[list[int], list[int]],
    radius: int,
) -> None:
    """Check that values of a part of the grid include all cells that a window of pixels reads.

    Args:
        name: name of the values, for error messages.
        values: (…, rows, columns), the part of the grid.
        coarse: size of the grid, and top and left of the part, from :func:`check_window`.
        pixels: (…, height, width), shape of the window of pixels.
        fine: size of the output, and top and left of the window, from :func:`check_window`.
        radius: number of cells that a pixel reads on either side of its own.
    """
    if tuple(values.shape[-2:]) == tuple(coarse[0]):  # the whole grid
        return
    given, needed = [], []
    for axis in (0, 1):
        grid, length, start = coarse[0][axis], fine[0][axis], fine[1][axis]
        last = start + pixels[axis - 2] - 1
        low, high = ((2 * pixel + 1) * grid // (2 * length) for pixel in (start, last))
        needed.append((max(low - radius, 0), min(high + radius + 1, grid)))
        first = coarse[1][axis]
        given.append((first, first + values.shape[axis - 2]))
    if any(own[0] > all_[0] or own[1] < all_[1] for own, all_ in zip(given, needed, strict=True)):
        (top, bottom), (left, right) = needed
        raise ValueError(
            f"{name} are of the cells {given[0][0]} to {given[0][1] - 1} × {given[1][0]} to "
            f"{given[1][1] - 1}; the window reads cells={(top, left, bottom - top, right - left)}"
        )


def check_pair(name: str, values: Tensor, weights: Tensor, other: str = "weights") -> Tensor:
    """Check that batch, device and dtype of two (B, ·, ·, ·) tensors agree.

    Returns:
        ``weights``, under autocast converted to the dtype of ``values``.
    """
    check_tensor(name, values)
    check_tensor(other, weights)
    if values.shape[0] != weights.shape[0]:
        raise ValueError(
            f"{name} has batch size {values.shape[0]} and {other} {weights.shape[0]}; "
            "expand() the smaller one"
        )
    if values.device != weights.device:
        raise ValueError(
            f"{name} is on {values.device} and {other} on {weights.device}; move one with .to()"
        )
    if values.dtype == weights.dtype:
        return weights
    if torch.is_autocast_enabled(values.device.type):
        return weights.to(values.dtype)
    raise ValueError(
        f"{name} is {values.dtype} and {other} {weights.dtype}; convert one with .to(dtype)"
    )


def check_tensor(name: str, tensor: Tensor) -> None:
    """Check that the argument is a dense tensor of four dimensions and a type of :data:`FLOATS`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is of type {type(tensor).__name__}; give a tensor")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions, not shape {tuple(tensor.shape)}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} is {tensor.layout}; convert it with .to_dense()")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}; convert it with .float()")


def scalar(name: str, value: Tensor | float, like: Tensor, *, divisor: bool = False) -> Tensor:
    """Convert a number to a tensor on the device of ``like``, of its dtype or at least float32.

    In 16 bits, a large temperature would be infinite, and the square of a small sigma 0.

    Args:
        name: name of the argument, for error messages.
        value: a number, or a tensor of one number, whose gradient is kept.
        like: tensor whose device, and dtype unless it is narrower than float32, the result has.
        divisor: refuse numbers whose square is 0 in float32.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}; give one real number")
        value = value.reshape(()) if value.dim() else value
        return value.to(like.device, dtype)
    if divisor and abs(number(name, value)) < _LEAST_DIVISOR:
        raise ValueError(f"{name}={shown(value)} must not be 0, nor that close to it")
    return torch.as_tensor(number(name, value), dtype=dtype, device=like.device)


def whole_numbers(name: str, values: Sequence[int], count: int | None = None) -> list[int]:
    """Convert values to a list of integers; symbolic sizes of a traced graph are kept."""
    try:
        found = [n if isinstance(n, int | torch.SymInt) else operator.index(n) for n in values]
    except TypeError:
        found = None
    if found is None or count not in (None, len(found)):
        wanted = "whole numbers" if count is None else f"{count} whole numbers"
        raise ValueError(f"{name}={shown(values)} must be {wanted}")
    return found


def check_not_empty(name: str, tensor: Tensor) -> None:
    """Check that a map has pixels."""
    if 0 in tensor.shape[-2:]:
        raise ValueError(f"{name} is {size_of(tensor)} pixels; both sides must be at least 1")


def size_of(tensor: Tensor) -> str:
    """Format a map's height × width, for messages."""
    return f"{tensor.shape[-2]}×{tensor.shape[-1]}"


def check_image(x: object, bands: int) -> None:
    """Check that the argument x is a batch of images for a backbone.

    Args:
        x: the value, (B, bands, H, W).
        bands: number of the backbone's input channels.

    Raises:
        TypeError: x is no tensor.
        ValueError: x has another shape.
    """
    advice = (
        "give the normalised image, as preprocess(…) returns it for a path, an array or a picture"
    )
    x = instance("x", x, Tensor, advice)
    if x.dim() == 4 and x.shape[1] == bands:
        return
    fix = ""
    if x.dim() == 3 and x.shape[0] == bands:
        fix = "; for one image, give x[None]"
    elif x.dim() == 4 and x.shape[3] == bands:
        fix = "; with channels last, give x.permute(0, 3, 1, 2)"
    raise ValueError(f"x must be (B, {bands}, H, W), not {tuple(x.shape)}{fix}")
