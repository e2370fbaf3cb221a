"""Checks of what upsamplers are given."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    is_functorch_wrapped_tensor,
)

from upfeat.bounds import shown
from upfeat.operator_checks import FLOATS
from upfeat.types import Size

_BRIGHTEST = 1e18
"""Magnitude of guidance that squares still fit beside; rasters mark missing data by -3.4e38."""
LONGEST_SIDE = 1 << 20
"""Pixels of an output's side, at most."""


def check_inputs(
    features: Tensor, guidance: Tensor, output_size: Size | None, bands: int | None = 3
) -> Size:
    """Check an upsampler's arguments, with its ``guidance_bands``; return the output size.

    Raises:
        TypeError: features or guidance are no tensors.
        ValueError: as :meth:`Upsampler.forward`.
    """
    for label, tensor in (("features", features), ("guidance", guidance)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{label} is of type {type(tensor).__name__}; give a tensor")
        if tensor.dim() != 4 or 0 in tensor.shape[1:]:
            raise ValueError(
                f"{label} must be (B, channels, height, width), none of the last three 0, "
                f"not {tuple(tensor.shape)}"
            )
        if tensor.layout is not torch.strided:
            raise ValueError(f"{label} is {tensor.layout}; give a dense one, as .to_dense() does")
    if bands is not None and guidance.shape[1] != bands:
        raise ValueError(
            f"guidance has {guidance.shape[1]} channels; give the normalised RGB image ({bands}), "
            'or use an upsampler that takes any bands, as "detail_universal"'
        )
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
    check_finite("features", features, "check the backbone's input and its precision")
    check_finite("guidance", guidance, "check the image", most=_BRIGHTEST)
    if output_size is None:
        return guidance.shape[2], guidance.shape[3]
    return check_output_size(output_size)


def check_hidden(hidden: Tensor | None, features: Tensor) -> None:
    """Check what early layers say against the features that they come with.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is no such map of the same images.
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
    """Check that a tensor is of the type of the weights that it meets; autocast sees to it itself.

    Raises:
        ValueError: it is of another.
    """
    if tensor.dtype != weight.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise ValueError(
            f"{label} is {tensor.dtype} and the upsampler's weights are {weight.dtype}; convert "
            f"one with .to({weight.dtype}) or .to({tensor.dtype})"
        )


def check_finite(label: str, tensor: Tensor, fix: str, *, most: float | None = None) -> None:
    """Refuse NaN where it enters: it would spread over a window at every later stage.

    One pass over the inputs, which are small beside the output. Left out where a value must not
    steer the program: in a graph being compiled and under ``torch.func`` transforms.

    Args:
        label: of the argument, for errors.
        tensor: to be checked.
        fix: what to do about NaN and infinity, for errors.
        most: magnitude that a value may have; ``None`` for any that is finite.

    Raises:
        ValueError: a value is NaN or infinite or larger, or of a type that is not computed with.
    """
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{label} is {tensor.dtype}; give floating numbers, as .float() does")
    if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(tensor) or tensor.is_meta:
        return
    # A finite sum has finite parts, and takes a tenth of the time; an infinite one may overflow.
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
    """Check that a size is two whole numbers of at least 1.

    Args:
        output_size: (height, width).
        name: of the argument, for errors.

    Raises:
        ValueError: it is not.
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
