"""The compiled CPU kernels: operators and their gradients, as plain functions of tensors.

Nothing here is differentiable by itself. Gradients, and everything else, are the same for any
number of threads. :mod:`upfeat.kernels.cpu_library` finds and calls the library.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.kernels.cpu_library import (
    DTYPES,
    Stage,
    call,
    library_info,
    unavailable_reason,
)

__all__ = [
    "adaptive_conv2d",
    "adaptive_conv2d_backward",
    "bilateral_weights",
    "bilateral_weights_backward",
    "can_run_adaptive_conv2d",
    "can_run_bilateral_weights",
    "can_run_jbu_stage",
    "can_run_jbu_stage_weights",
    "can_run_joint_bilateral_upsample",
    "jbu_stage",
    "jbu_stage_weights",
    "joint_bilateral_upsample",
    "joint_bilateral_upsample_backward",
    "library_info",
    "unavailable_reason",
]

_STAGE_PARAMETERS = (
    *("proj_w0", "proj_b0", "proj_w1", "proj_b1", "temperature", "sigma_spatial"),
    *("fix_w0", "fix_b0", "fix_w1", "fix_b1"),
)


def _reason(**tensors: Tensor) -> str | None:
    """What keeps this backend from running on these tensors."""
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
        if tensor.dtype != first.dtype:
            return f"{name} is {tensor.dtype} where the others are {first.dtype}"
    return None


def can_run_joint_bilateral_upsample(features: Tensor, weights: Tensor) -> str | None:
    """Why :func:`joint_bilateral_upsample` cannot run on these; ``None`` when it can."""
    return _reason(features=features, weights=weights)


def can_run_adaptive_conv2d(padded: Tensor, weights: Tensor) -> str | None:
    """Why :func:`adaptive_conv2d` cannot run on these; ``None`` when it can."""
    return _reason(padded=padded, weights=weights)


def can_run_bilateral_weights(keys: Tensor, *_: object) -> str | None:
    """Why :func:`bilateral_weights` cannot run on these; ``None`` when it can."""
    return _reason(keys=keys)


def can_run_jbu_stage_weights(guidance: Tensor, *_: object, **__: object) -> str | None:
    """Why :func:`jbu_stage_weights` cannot run on these; ``None`` when it can."""
    return _reason(guidance=guidance)


def can_run_jbu_stage(features: Tensor, guidance: Tensor, *_: object, **__: object) -> str | None:
    """Why :func:`jbu_stage` cannot run on these; ``None`` when it can."""
    if features.dim() == 4 and guidance.dim() == 4 and _shrinks(features, guidance):
        return "the output is smaller than the features"
    return _reason(features=features, guidance=guidance)


def joint_bilateral_upsample(
    features: Tensor, weights: Tensor, *, channels_last: bool | None = None
) -> Tensor:
    """Bicubic resize, reflect padding and per-pixel correlation in one pass.

    Args:
        features: (B, C, h, w), float32, bfloat16 or float16, any strides.
        weights: (B, (2r+1)², H, W), same type, any strides.
        channels_last: memory format of the result; ``None`` takes that of ``features``.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: the shapes do not fit.
    """
    radius = _check_upsample(features, weights)
    out = _output(features, weights, channels_last)
    if out.numel():
        source = _resized(features, weights)
        call("upfeat_jbu_forward", source, weights, out, radius)
    return out


def joint_bilateral_upsample_backward(
    grad: Tensor, features: Tensor, weights: Tensor, need_features: bool, need_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`joint_bilateral_upsample`; the same for any number of threads.

    Args:
        grad: (B, C, H, W), gradient of the result.
        features: (B, C, h, w).
        weights: (B, (2r+1)², H, W).
        need_features: whether to compute the first gradient.
        need_weights: whether to compute the second.

    Returns:
        (B, C, h, w) and (B, (2r+1)², H, W), ``None`` where not needed.
    """
    radius = _check_upsample(features, weights)
    _check_shape("grad", grad, (*features.shape[:2], *weights.shape[2:]))
    source = _resized(features, weights)
    to_source, to_weights = _gradients(
        "upfeat_jbu_backward", grad, source, weights, radius, need_features, need_weights
    )
    if to_source is not None and source is not features:
        size, coarse = list(source.shape[2:]), list(features.shape)
        to_source = torch.ops.aten.upsample_bicubic2d_backward(to_source, size, coarse, False)
    if to_source is not None:
        to_source = to_source.to(features.dtype)
    return to_source, to_weights


def adaptive_conv2d(
    padded: Tensor, weights: Tensor, *, channels_last: bool | None = None
) -> Tensor:
    """Correlate every pixel with its own weights.

    Args:
        padded: (B, C, H+2r, W+2r), float32, bfloat16 or float16, any strides.
        weights: (B, (2r+1)², H, W), same type, any strides.
        channels_last: memory format of the result; ``None`` takes that of ``padded``.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: the shapes do not fit.
    """
    radius = _check_padded(padded, weights)
    out = _output(padded, weights, channels_last)
    if out.numel():
        call("upfeat_conv_forward", padded, weights, out, radius)
    return out


def adaptive_conv2d_backward(
    grad: Tensor, padded: Tensor, weights: Tensor, need_padded: bool, need_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`adaptive_conv2d`, ``None`` where not needed.

    Args:
        grad: (B, C, H, W), gradient of the result.
        padded: (B, C, H+2r, W+2r).
        weights: (B, (2r+1)², H, W).
        need_padded: whether to compute the first gradient.
        need_weights: whether to compute the second.

    Returns:
        (B, C, H+2r, W+2r) and (B, (2r+1)², H, W).
    """
    radius = _check_padded(padded, weights)
    _check_shape("grad", grad, (*padded.shape[:2], *weights.shape[2:]))
    return _gradients(
        "upfeat_conv_backward", grad, padded, weights, radius, need_padded, need_weights
    )


def bilateral_weights(
    keys: Tensor, temperature: float | Tensor, sigma_spatial: float | Tensor, radius: int
) -> Tensor:
    """Range kernel times spatial kernel, normalised over taps (FeatUp, section 3.2).

    Args:
        keys: (B, D, H, W), any strides.
        temperature: factor of the key products, before the softmax over taps.
        sigma_spatial: width of the spatial kernel, where the window spans -1 to 1.
        radius: r ≥ 0.

    Returns:
        (B, (2r+1)², H, W), contiguous, of the keys' type.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_image("keys", keys, radius)
    out = keys.new_empty(_weights_shape(keys, radius))
    if out.numel():
        scalars = (float(temperature), float(sigma_spatial))
        call("upfeat_bilateral_forward", keys, out, radius, *scalars)
    return out


def bilateral_weights_backward(
    grad: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    sigma_spatial: float | Tensor,
    radius: int,
) -> tuple[Tensor, float, float]:
    """Gradients of :func:`bilateral_weights`; the same for any number of threads.

    Args:
        grad: (B, (2r+1)², H, W), gradient of the weights.
        keys: (B, D, H, W).
        temperature: as in the forward call.
        sigma_spatial: as in the forward call.
        radius: as in the forward call.

    Returns:
        Gradients of the keys (B, D, H, W), of the temperature and of sigma_spatial.
    """
    _check_image("keys", keys, radius)
    _check_shape("grad", grad, _weights_shape(keys, radius))
    to_keys = torch.zeros_like(keys) if not grad.numel() else torch.empty_like(keys)
    scalars = (ctypes.c_double * 2)()
    arguments = (keys, grad, to_keys, scalars, radius, float(temperature), float(sigma_spatial))
    call("upfeat_bilateral_backward", *arguments)
    return to_keys, scalars[0], scalars[1]


def jbu_stage_weights(guidance: Tensor, *parameters: Any, fixup_scale: float = 0.1) -> Tensor:
    """All weights of one JBU stage from its guidance, without gradients and intermediates.

    Args:
        guidance: (B, G, H, W), any strides; G is 3 for an image.
        parameters: ``proj_w0`` (D, G), ``proj_b0``, ``proj_w1`` (D, D), ``proj_b1``,
            ``temperature``, ``sigma_spatial``, ``fix_w0`` (T, T+G), ``fix_b0``, ``fix_w1`` (T, T),
            ``fix_b1``; matrices may carry trailing axes of size 1 (1×1 convolutions).
        fixup_scale: share of the fix-up network's output that is added.

    Returns:
        (B, T, H, W), contiguous, of the guidance's type.

    Raises:
        ValueError: the shapes do not fit.
    """
    stage, radius = _stage(guidance, parameters, fixup_scale)
    out = guidance.new_empty(_weights_shape(guidance, radius))
    if out.numel():
        call("upfeat_stage_weights", guidance, stage, out, radius)
    return out


def jbu_stage(
    features: Tensor,
    guidance: Tensor,
    *parameters: Any,
    fixup_scale: float = 0.1,
    channels_last: bool | None = None,
) -> Tensor:
    """One whole JBU stage without gradients: the weights exist one tile at a time.

    Args:
        features: (B, C, h, w), any strides.
        guidance: (B, G, H, W), the stage's output size; H ≥ h and W ≥ w.
        parameters: as in :func:`jbu_stage_weights`.
        fixup_scale: as in :func:`jbu_stage_weights`.
        channels_last: memory format of the result; ``None`` takes that of ``features``.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_rank("features", features)
    stage, radius = _stage(guidance, parameters, fixup_scale)
    _check_shape("guidance", guidance, (features.shape[0], *guidance.shape[1:]))
    if 0 in features.shape[2:] or _shrinks(features, guidance):
        raise ValueError(
            f"guidance has size {tuple(guidance.shape[2:])}, smaller than the features' "
            f"{tuple(features.shape[2:])}; a stage enlarges"
        )
    out = _output(features, guidance, channels_last)
    if out.numel():
        call("upfeat_stage_forward", features, guidance, stage, out, radius)
    return out


def _gradients(
    name: str,
    grad: Tensor,
    source: Tensor,
    weights: Tensor,
    radius: int,
    need_source: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    # Nothing is written where there is no pixel or no channel.
    new = torch.empty_like if grad.numel() else torch.zeros_like
    to_source = new(source) if need_source else None
    to_weights = new(weights) if need_weights else None
    if grad.numel() and (need_source or need_weights):
        call(name, source, weights, grad, to_source, to_weights, radius)
    return to_source, to_weights


def _stage(guidance: Tensor, parameters: Sequence[Any], fixup_scale: float) -> tuple[Stage, int]:
    if len(parameters) != len(_STAGE_PARAMETERS):
        names = ", ".join(_STAGE_PARAMETERS)
        raise ValueError(f"parameters has {len(parameters)} entries; give {names}")
    named = dict(zip(_STAGE_PARAMETERS, parameters, strict=True))
    taps, width = named["fix_b0"].numel(), named["proj_b0"].numel()
    radius = _radius("fix_b0", taps)
    _check_image("guidance", guidance, radius)
    channels = guidance.shape[1]
    shapes = {
        "proj_w0": (width, channels),
        "proj_b0": (width,),
        "proj_w1": (width, width),
        "proj_b1": (width,),
        "fix_w0": (taps, taps + channels),
        "fix_b0": (taps,),
        "fix_w1": (taps, taps),
        "fix_b1": (taps,),
    }
    if not width:
        raise ValueError("proj_b0 is empty; keys need at least one channel")
    dense = {name: _dense(name, named[name], shape) for name, shape in shapes.items()}
    stage = Stage(
        **{name: value.data_ptr() for name, value in dense.items()},
        key_width=width,
        temperature=float(named["temperature"]),
        sigma_spatial=float(named["sigma_spatial"]),
        fixup_scale=fixup_scale,
    )
    stage.keep = dense  # the structure holds bare addresses
    return stage, radius


def _dense(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    trailing = value.shape[len(shape) :]
    if tuple(value.shape[: len(shape)]) != shape or any(size != 1 for size in trailing):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}")
    return value.detach().reshape(shape).to("cpu", torch.float32).contiguous()


def _output(source: Tensor, like: Tensor, channels_last: bool | None) -> Tensor:
    shape = (*source.shape[:2], *like.shape[2:])
    if channels_last is None:
        channels_last = not source.is_contiguous() and source.stride(1) == 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=layout)


def _resized(features: Tensor, weights: Tensor) -> Tensor:
    """``features``, already resized along the axes that shrink.

    The kernels fold enlargement only: a shrinking axis would need windows without bound, and its
    resized copy is no larger than ``features``. Bicubic resizing is separable, so this is exact.
    """
    if not _shrinks(features, weights):
        return features
    size = [min(a, b) for a, b in zip(features.shape[2:], weights.shape[2:], strict=True)]
    return F.interpolate(features.float(), size=size, mode="bicubic", align_corners=False)


def _shrinks(features: Tensor, fine: Tensor) -> bool:
    return features.shape[2] > fine.shape[2] or features.shape[3] > fine.shape[3]


def _weights_shape(image: Tensor, radius: int) -> tuple[int, int, int, int]:
    return (image.shape[0], (2 * radius + 1) ** 2, image.shape[2], image.shape[3])


def _check_upsample(features: Tensor, weights: Tensor) -> int:
    radius = _check_weights("features", features, weights)
    if weights.numel() and 0 in features.shape[2:]:
        raise ValueError(f"features has shape {tuple(features.shape)}; its grid is empty")
    return radius


def _check_padded(padded: Tensor, weights: Tensor) -> int:
    radius = _check_weights("padded", padded, weights)
    height, width = weights.shape[2:]
    _check_shape("padded", padded, (*padded.shape[:2], height + 2 * radius, width + 2 * radius))
    return radius


def _check_weights(name: str, source: Tensor, weights: Tensor) -> int:
    _check_rank(name, source)
    _check_rank("weights", weights)
    reason = _reason(**{name: source, "weights": weights})
    if reason is not None:
        raise ValueError(f"the cpu backend cannot run: {reason}")
    if source.shape[0] != weights.shape[0]:
        raise ValueError(
            f"weights has a batch of {weights.shape[0]}, {name} one of {source.shape[0]}; "
            "they must agree"
        )
    return _radius("weights", weights.shape[1])


def _check_image(name: str, image: Tensor, radius: int) -> None:
    _check_rank(name, image)
    reason = _reason(**{name: image})
    if reason is not None:
        raise ValueError(f"the cpu backend cannot run: {reason}")
    if radius < 0:
        raise ValueError(f"radius={radius} is negative; use 0 or more")


def _check_rank(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have 4 axes")


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
    if tensor.device.type != "cpu" or tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; give float on the CPU")


def _radius(name: str, taps: int) -> int:
    side = math.isqrt(taps)
    if side * side != taps or side % 2 == 0:
        raise ValueError(f"{name} has {taps} taps; give an odd square: 1, 9, 25, 49, …")
    return side // 2
