"""Checks of the arguments of upsamplers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    is_functorch_wrapped_tensor,
)

from upfeat.bounds import indices, shown
from upfeat.operator_checks import FLOATS
from upfeat.types import Size, Window, times
from upfeat.upsamplers.head import Head
from upfeat.upsamplers.maps import Map

_BRIGHTEST = 1e18
"""Largest magnitude of guidance, whose squares do not overflow; -3.4e38 marks missing data."""
LONGEST_SIDE = 1 << 20
"""Largest side of an output, in pixels."""


def check_inputs(
    features: Tensor, guidance: Tensor, output_size: Size | None, bands: int | None = 3
) -> Size:
    """Check the arguments of an upsampler with ``guidance_bands=bands``; return the output size.

    Raises:
        TypeError: features or guidance are not tensors.
        ValueError: as :meth:`Upsampler.forward`.
    """
    _check_map("features", features)
    _check_shapes(features, guidance, bands)
    check_finite("features", features, "check the backbone's input and its precision")
    check_finite("guidance", guidance, "check the image", most=_BRIGHTEST)
    if output_size is None:
        return guidance.shape[2], guidance.shape[3]
    return check_output_size(output_size)


def check_preparation(
    guidance: Tensor,
    grid_size: Size,
    output_size: Size,
    features: Tensor | None = None,
    bands: int | None = 3,
) -> tuple[Size, Size]:
    """Check the arguments of :meth:`Upsampler.prepare`, but not the values of tensors.

    Args:
        guidance: as in :meth:`Upsampler.prepare`.
        grid_size: as in :meth:`Upsampler.prepare`.
        output_size: as in :meth:`Upsampler.prepare`.
        features: those that the weights depend on; ``None`` for none.
        bands: :attr:`Upsampler.guidance_bands`.

    Returns:
        Both sizes.

    Raises:
        TypeError: guidance or features are not tensors.
        ValueError: a shape or a size is wrong, or guidance and features disagree.
    """
    if torch.compiler.is_compiling():
        return grid_size, output_size
    _check_shapes(features, guidance, bands)
    for label, tensor in (("features", features), ("guidance", guidance)):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise ValueError(f"{label} is {tensor.dtype}; give floating numbers, as .float() does")
    grid_size = check_output_size(grid_size, "grid_size")
    if features is not None and tuple(features.shape[2:]) != grid_size:
        raise ValueError(
            f"features is of {times(features.shape[2:])} cells, and grid_size={grid_size}; give "
            "features.shape[2:]"
        )
    return grid_size, check_output_size(output_size)


def check_rendering(
    kernels: object, mixed: Tensor | Map, head: Head, window: Window | None
) -> None:
    """Check the arguments of :meth:`Upsampler.render`, but not the values of tensors.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the head does not fit the features, or the window is no window of any map.
    """
    if torch.compiler.is_compiling():
        return
    if not callable(kernels):
        raise TypeError(f"kernels is of type {type(kernels).__name__}; give those of prepare()")
    if isinstance(mixed, Tensor):
        _check_map("mixed", mixed)
        grid = getattr(kernels, "grid_size", None)
        if grid is not None and tuple(mixed.shape[2:]) != tuple(grid):
            raise ValueError(
                f"mixed is of {times(mixed.shape[2:])} cells, and kernels of {times(grid)}; "
                "prepare() those of this grid"
            )
    elif not isinstance(mixed, Map):
        raise TypeError(f"mixed is of type {type(mixed).__name__}; give a tensor")
    _check_head(head, mixed)
    if window is None:
        return
    if not isinstance(window, Window):
        raise TypeError(
            f"window is of type {type(window).__name__}; give Window(top, left, height, width)"
        )
    size = getattr(kernels, "output_size", (LONGEST_SIDE, LONGEST_SIDE))
    inside = len(indices(window, 0, LONGEST_SIDE)) == 4 and window.height and window.width
    if not inside or window.bottom > size[0] or window.right > size[1]:
        raise ValueError(
            f"window={shown(tuple(window))} does not lie in the output of {times(size)} pixels; "
            "give whole numbers, top, left, height and width"
        )


def _check_head(head: Head, mixed: Tensor | Map) -> None:
    """Check a head against features, of which a :class:`Map` does not tell the channels."""
    weight, bias = head.weight, head.bias
    for label, given in (("head", weight), ("bias of head", bias)):
        if given is not None and not isinstance(given, Tensor | slice):
            raise TypeError(
                f"{label} is of type {type(given).__name__}; give a tensor, (K, C) for a head and "
                "(K,) for its bias"
            )
    channels = mixed.shape[1] if isinstance(mixed, Tensor) else None
    if isinstance(weight, Tensor):
        if weight.dim() not in (2, 3) or channels not in (None, weight.shape[-1]):
            of = "C" if channels is None else channels
            raise ValueError(f"head is {tuple(weight.shape)}; give a weight of (K, {of})")
        if isinstance(mixed, Tensor) and not _multiply(weight, mixed):
            raise ValueError(
                f"head is {weight.dtype} on {weight.device} and mixed {mixed.dtype} on "
                f"{mixed.device}; convert it with .to(mixed)"
            )
        channels = weight.shape[-2]
    elif isinstance(weight, slice):
        channels = None if channels is None else len(range(channels)[weight])
    if isinstance(bias, Tensor) and (bias.dim() != 1 or channels not in (None, len(bias))):
        of = "K" if channels is None else channels
        raise ValueError(f"bias of head is {tuple(bias.shape)}; give ({of},)")


def _multiply(weight: Tensor, values: Tensor) -> bool:
    """Return whether a head's weight and features can be multiplied."""
    same = weight.dtype == values.dtype or torch.is_autocast_enabled(values.device.type)
    return same and weight.device == values.device and weight.is_floating_point()


def _check_map(label: str, tensor: Tensor) -> None:
    """Check that an argument is a dense tensor (B, channels, height, width)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{label} is of type {type(tensor).__name__}; give a tensor")
    if tensor.dim() != 4 or 0 in tensor.shape[1:]:
        raise ValueError(
            f"{label} must be (B, channels, height, width), none of the last three 0, "
            f"not {tuple(tensor.shape)}"
        )
    if tensor.layout is not torch.strided:
        raise ValueError(f"{label} is {tensor.layout}; give a dense one, as .to_dense() does")


def _check_shapes(features: Tensor | None, guidance: Tensor, bands: int | None) -> None:
    """Check the shapes of features, if any, and guidance, and that they agree."""
    if features is not None:
        _check_map("features", features)
    _check_map("guidance", guidance)
    if bands is not None and guidance.shape[1] != bands:
        raise ValueError(
            f"guidance has {guidance.shape[1]} channels; give the normalised RGB image ({bands}), "
            'or use an upsampler that takes any bands, as "detail_universal"'
        )
    if features is None:
        return
    if features.shape[0] != guidance.shape[0]:
        raise ValueError(
            f"features has batch size {features.shape[0]} and guidance {guidance.shape[0]}; "
            "give one image per feature map, or expand() the smaller"
        )
    if features.device != guidance.device:
        raise ValueError(
            f"features is on {features.device} and guidance on {guidance.device}; "
            "move one with .to()"
        )


def check_result(name: str, out: Tensor, expected: tuple[int, ...]) -> Tensor:
    """Return what an upsampler made, after a check of its shape; not while a graph is compiled.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has another shape.
    """
    if torch.compiler.is_compiling():
        return out
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}: its kernels returned a {type(out).__name__}; return a tensor")
    if tuple(out.shape) != tuple(expected):
        raise ValueError(
            f"{name}: its kernels returned {tuple(out.shape)}; return (B, C, height, width), here "
            f"{tuple(expected)}"
        )
    return out


def check_hidden(hidden: Tensor | None, features: Tensor) -> None:
    """Check the features of early layers against the features of the same images.

    Raises:
        TypeError: ``hidden`` is not a tensor.
        ValueError: ``hidden`` is not (B, D, h', w') with the batch size and device of ``features``,
            or contains NaN or infinity.
    """
    if hidden is None:
        return
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden is of type {type(hidden).__name__}; give a tensor")
    if hidden.dim() != 4 or 0 in hidden.shape[1:] or len(hidden) != len(features):
        raise ValueError(
            f"hidden must be ({len(features)}, channels, height, width), as "
            f"Backbone.with_hidden gives it, not {tuple(hidden.shape)}"
        )
    if hidden.device != features.device:
        raise ValueError(
            f"hidden is on {hidden.device} and features on {features.device}; move one with .to()"
        )
    check_finite("hidden", hidden, "check the backbone's input and its precision")


def check_precision(label: str, tensor: Tensor, weight: Tensor) -> None:
    """Check that a tensor and the weights have one dtype, except under autocast, which converts.

    Raises:
        ValueError: the dtypes differ.
    """
    if tensor.dtype != weight.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise ValueError(
            f"{label} is {tensor.dtype} and the upsampler's weights are {weight.dtype}; convert "
            f"one with .to({weight.dtype}) or .to({tensor.dtype})"
        )


def check_finite(label: str, tensor: Tensor, fix: str, *, most: float | None = None) -> None:
    """Refuse NaN and infinity in an input, as each later stage would spread them over a window.

    This takes one pass over the inputs, which are small compared with the output. The values are
    not checked where control flow must not depend on them: in a graph that is being compiled and
    under ``torch.func`` transforms.

    Args:
        label: name of the argument, for error messages.
        tensor: the argument.
        fix: advice about NaN and infinity, for error messages.
        most: largest magnitude allowed; ``None`` for any finite value.

    Raises:
        ValueError: a value is NaN, infinite or larger than ``most``, or the dtype is unsupported.
    """
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{label} is {tensor.dtype}; give floating numbers, as .float() does")
    if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(tensor) or tensor.is_meta:
        return
    # A finite sum has finite terms, and takes a tenth of the time of a check of every value. An
    # infinite sum proves nothing, since it may have overflowed.
    if abs(float(tensor.detach().sum())) <= (
        torch.finfo(tensor.dtype).max if most is None else most
    ):
        return
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{label} holds NaN or infinity; {fix} (float16 overflows at 65504: use bfloat16 or "
            "float32)"
        )
    if most is None:
        return
    least, largest = (float(one) for one in tensor.detach().aminmax())
    outlier = largest if largest >= -least else least
    if abs(outlier) > most:
        raise ValueError(
            f"{label} holds {outlier:.3g}; if that stands for missing data, replace it, by the "
            "mean of its band say"
        )


def check_output_size(output_size: Size, name: str = "output_size") -> Size:
    """Check that a size is two whole numbers, from 1 to :data:`LONGEST_SIDE`, and return it.

    Args:
        output_size: (height, width).
        name: name of the argument, for error messages.

    Raises:
        ValueError: the size is not two such numbers.
    """
    try:
        height, width = (int(side) for side in output_size)
        valid = (height, width) == tuple(output_size) and min(height, width) >= 1
        valid = valid and not any(isinstance(side, bool | str) for side in output_size)
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        raise ValueError(
            f"{name}={shown(output_size)} must be (height, width), two whole numbers of pixels of "
            "at least 1"
        )
    if max(height, width) > LONGEST_SIDE:  # pyright: ignore[reportPossiblyUnboundVariable]
        raise ValueError(
            f"{name}={shown(output_size)} has a side of more than {LONGEST_SIDE} pixels; "
            "render parts of it"
        )
    return height, width  # pyright: ignore[reportPossiblyUnboundVariable]


def check_buffer(out: Tensor, expected: tuple[int, ...], *sources: Tensor) -> None:
    """Check that a map of shape ``expected`` can be written to a buffer, bit by bit.

    Raises:
        TypeError: ``out`` is not a tensor.
        ValueError: ``out`` has another shape, is not floating point, or shares memory with a source
            of the map or among its own elements.
    """
    if not isinstance(out, Tensor):
        raise TypeError(f"out is of type {type(out).__name__}; give a tensor")
    if tuple(out.shape) != expected or not out.is_floating_point():
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)}; give a floating-point buffer of {expected}"
        )
    if overlaps_itself(out):
        raise ValueError("out has the same memory for several values; give out.clone()")
    check_apart(out, sources)


def check_apart(out: Tensor, sources: Sequence[Tensor]) -> None:
    """Check that no source of a map is in the buffer's memory, as it is read between writes.

    Raises:
        ValueError: a source shares memory with the buffer.
    """
    start, end = _extent(out)
    for source in sources:
        if source.device == out.device and source.numel():
            first, last = _extent(source)
            if first < end and start < last:
                raise ValueError("out shares memory with the map's inputs; give another buffer")


def overlaps_itself(x: Tensor) -> bool:
    """Return whether elements share memory, or lie in an order that no view of a tensor has."""
    reached = 1
    for step, length in sorted(zip(x.stride(), x.shape, strict=True)):
        if length > 1:
            if step < reached:
                return True
            reached = step * (length - 1) + reached
    return False


def _extent(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor's elements and after the last."""
    last = sum(step * (length - 1) for step, length in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
