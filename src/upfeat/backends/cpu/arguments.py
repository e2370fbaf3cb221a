"""Checks of the arguments of the compiled CPU kernels, and allocation of their outputs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from upfeat.backends.cpu.library import DTYPES, Window, call, unavailable_reason


def reason_against(*, mixed: bool = False, **tensors: Tensor) -> str | None:
    """Return why this backend cannot run on tensors, of ``mixed`` types or of one; or ``None``."""
    missing = unavailable_reason()
    if missing is not None:
        return missing
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, not on the CPU"
        if tensor.layout != torch.strided:
            return f"{name} is {tensor.layout}, not strided"
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; float32, bfloat16 and float16 are supported"
        if tensor.dtype != first.dtype and not mixed:
            return f"{name} is {tensor.dtype} where the others are {first.dtype}"
    return None


def output(source: Tensor, like: Tensor, channels_last: bool | None) -> Tensor:
    """Allocate a result (B, C, H, W) of the dtype of ``source`` and the size of ``like``.

    ``channels_last`` chooses its memory format; ``None`` chooses the format of ``source``.
    """
    shape = (*source.shape[:2], *like.shape[2:])
    if channels_last is None:
        channels_last = not source.is_contiguous() and source.stride(1) == 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=layout)


def shrinks(features: Tensor, fine: Tensor) -> bool:
    """Return whether ``features`` has more rows or more columns than ``fine``."""
    return features.shape[2] > fine.shape[2] or features.shape[3] > fine.shape[3]


def weights_shape(image: Tensor, radius: int) -> tuple[int, int, int, int]:
    """Shape (B, (2r+1)², H, W) of the weights of an image (B, ·, H, W)."""
    return (image.shape[0], (2 * radius + 1) ** 2, image.shape[2], image.shape[3])


def check_weights(name: str, source: Tensor, weights: Tensor) -> int:
    """Check that values and weights have 4 axes, one batch size, and a supported dtype and device.

    Returns:
        The radius of the weights.

    Raises:
        ValueError: the shapes do not match, or the library cannot run on the tensors.
    """
    check_rank(name, source)
    check_rank("weights", weights)
    reason = reason_against(mixed=False, **{name: source, "weights": weights})
    if reason is not None:
        raise ValueError(f"the cpu backend cannot run: {reason}")
    if source.shape[0] != weights.shape[0]:
        raise ValueError(
            f"weights has a batch of {weights.shape[0]}, {name} one of {source.shape[0]}; "
            "they must agree"
        )
    return radius_of("weights", weights.shape[1])


def check_image(name: str, image: Tensor, radius: int) -> None:
    """Check a map from which weights are computed.

    Raises:
        ValueError: the image does not have 4 axes, the library cannot run on it, or the radius is
            negative.
    """
    check_rank(name, image)
    reason = reason_against(mixed=False, **{name: image})
    if reason is not None:
        raise ValueError(f"the cpu backend cannot run: {reason}")
    if radius < 0:
        raise ValueError(f"radius={radius} is negative; use 0 or more")


def check_rank(name: str, tensor: Tensor) -> None:
    """Check that a tensor has 4 axes.

    Raises:
        ValueError: the tensor has another number of axes.
    """
    if tensor.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have 4 axes")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Check a tensor's shape, type and device.

    Raises:
        ValueError: the shape is another one, or the dtype or device is not supported.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
    if tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}; "
            "give float32, bfloat16 or float16 on the CPU"
        )


def radius_of(name: str, taps: int) -> int:
    """Compute the radius of a window of ``taps`` taps.

    Raises:
        ValueError: no window has this number of taps.
    """
    side = math.isqrt(taps)
    if side * side != taps or side % 2 == 0:
        raise ValueError(f"{name} has {taps} taps; give an odd square: 1, 9, 25, 49, …")
    return side // 2


def check_upsample(features: Tensor, weights: Tensor) -> int:
    """Check as :func:`check_weights` does, and that the grid of the features is not empty.

    Returns:
        The radius of the weights.

    Raises:
        ValueError: the shapes do not match, or there are no cells.
    """
    radius = check_weights("features", features, weights)
    if weights.numel() and 0 in features.shape[2:]:
        raise ValueError(f"features has shape {tuple(features.shape)}; its grid is empty")
    return radius


def gradients(
    function: str,
    grad: Tensor,
    source: Tensor,
    weights: Tensor,
    needed: tuple[bool, bool],
    *options: Window | int,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of ``source`` and ``weights``; ``None`` for those not ``needed``."""
    check_shape("grad", grad, (*source.shape[:2], *weights.shape[2:]))
    # For an empty ``grad`` the library is not called, and all gradients are 0.
    new = torch.empty_like if grad.numel() else torch.zeros_like
    to_source = new(source) if needed[0] else None
    to_weights = new(weights) if needed[1] else None
    if grad.numel() and any(needed):
        call(function, source, weights, grad, to_source, to_weights, *options)
    return to_source, to_weights
