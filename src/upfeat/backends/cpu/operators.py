"""The compiled CPU kernels: operators and their gradients, as plain functions of tensors.

The operators are those of :mod:`upfeat.functional`, with the same arguments, shapes and errors, for
tensors of any strides; values and weights have one dtype, float32, bfloat16 or float16. The
functions are not differentiable by themselves. All results, including gradients, are the same for
any number of threads. :mod:`upfeat.backends.cpu.library` finds and calls the library.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backends.cpu.arguments import (
    check_image,
    check_shape,
    check_upsample,
    check_weights,
    gradients,
    output,
    reason_against,
    shrinks,
    weights_shape,
)
from upfeat.backends.cpu.attention import (
    can_run_window_attention,
    window_attention,
    window_attention_backward,
)
from upfeat.backends.cpu.library import call, library_info, unavailable_reason
from upfeat.backends.cpu.neighbourhood import (
    can_run_neighbourhood_attention,
    can_run_neighbourhood_mean_weights,
    can_run_neighbourhood_upsample,
    can_run_neighbourhood_weights,
    neighbourhood_attention,
    neighbourhood_mean_weights,
    neighbourhood_upsample,
    neighbourhood_upsample_backward,
    neighbourhood_weights,
    neighbourhood_weights_backward,
)
from upfeat.backends.cpu.pyramid import (
    can_run_pyramid_means,
    can_run_pyramid_queries,
    pyramid_means,
    pyramid_queries,
)
from upfeat.backends.cpu.stage import (
    can_run_jbu_stage,
    can_run_jbu_stage_weights,
    jbu_stage,
    jbu_stage_weights,
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
    "can_run_neighbourhood_attention",
    "can_run_neighbourhood_mean_weights",
    "can_run_neighbourhood_upsample",
    "can_run_neighbourhood_weights",
    "can_run_pyramid_means",
    "can_run_pyramid_queries",
    "can_run_window_attention",
    "jbu_stage",
    "jbu_stage_weights",
    "joint_bilateral_upsample",
    "joint_bilateral_upsample_backward",
    "library_info",
    "neighbourhood_attention",
    "neighbourhood_mean_weights",
    "neighbourhood_upsample",
    "neighbourhood_upsample_backward",
    "neighbourhood_weights",
    "neighbourhood_weights_backward",
    "pyramid_means",
    "pyramid_queries",
    "unavailable_reason",
    "window_attention",
    "window_attention_backward",
]

Gradients = tuple[Tensor | None, Tensor | None]


def can_run_adaptive_conv2d(padded: Tensor, weights: Tensor) -> str | None:
    """Return why :func:`adaptive_conv2d` cannot run on these arguments, or ``None``."""
    return reason_against(padded=padded, weights=weights)


def can_run_joint_bilateral_upsample(features: Tensor, weights: Tensor) -> str | None:
    """Return why :func:`joint_bilateral_upsample` cannot run on these arguments, or ``None``."""
    return reason_against(features=features, weights=weights)


def can_run_bilateral_weights(keys: Tensor, *_: object) -> str | None:
    """Return why :func:`bilateral_weights` cannot run on these arguments, or ``None``."""
    return reason_against(keys=keys)


def adaptive_conv2d(
    padded: Tensor, weights: Tensor, *, channels_last: bool | None = None
) -> Tensor:
    """See :func:`upfeat.functional.adaptive_conv2d`.

    ``channels_last`` is the memory format of the result; ``None`` chooses that of ``padded``.
    """
    radius = _check_padded(padded, weights)
    out = output(padded, weights, channels_last)
    if out.numel():
        call("upfeat_conv_forward", padded, weights, out, radius)
    return out


def adaptive_conv2d_backward(
    grad: Tensor, padded: Tensor, weights: Tensor, need_padded: bool, need_weights: bool
) -> Gradients:
    """Gradients of :func:`adaptive_conv2d`; ``None`` for those not needed."""
    radius = _check_padded(padded, weights)
    needed = (need_padded, need_weights)
    return gradients("upfeat_conv_backward", grad, padded, weights, needed, radius)


def joint_bilateral_upsample(
    features: Tensor, weights: Tensor, *, channels_last: bool | None = None
) -> Tensor:
    """See :func:`upfeat.functional.joint_bilateral_upsample`; one pass resizes and filters.

    ``channels_last`` is the memory format of the result; ``None`` chooses that of ``features``.
    """
    radius = check_upsample(features, weights)
    out = output(features, weights, channels_last)
    if out.numel():
        call("upfeat_jbu_forward", _resized(features, weights), weights, out, radius)
    return out


def joint_bilateral_upsample_backward(
    grad: Tensor,
    features: Tensor,
    weights: Tensor,
    need_features: bool,
    need_weights: bool,
) -> Gradients:
    """Gradients of :func:`joint_bilateral_upsample`; ``None`` for those not needed."""
    radius = check_upsample(features, weights)
    source, needed = _resized(features, weights), (need_features, need_weights)
    to_source, to_weights = gradients("upfeat_jbu_backward", grad, source, weights, needed, radius)
    if to_source is not None and source is not features:
        size, coarse = list(source.shape[2:]), list(features.shape)
        to_source = torch.ops.aten.upsample_bicubic2d_backward(to_source, size, coarse, False)
    if to_source is not None:
        to_source = to_source.to(features.dtype)
    return to_source, to_weights


def bilateral_weights(
    keys: Tensor,
    temperature: float | Tensor,
    sigma_spatial: float | Tensor,
    radius: int,
) -> Tensor:
    """See :func:`upfeat.functional.bilateral_weights`."""
    check_image("keys", keys, radius)
    out = keys.new_empty(weights_shape(keys, radius))
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
    """Gradients of :func:`bilateral_weights` for keys, temperature and sigma_spatial."""
    check_image("keys", keys, radius)
    check_shape("grad", grad, weights_shape(keys, radius))
    to_keys = torch.zeros_like(keys) if not grad.numel() else torch.empty_like(keys)
    scalars = (ctypes.c_double * 2)()
    arguments = (
        keys,
        grad,
        to_keys,
        scalars,
        radius,
        float(temperature),
        float(sigma_spatial),
    )
    call("upfeat_bilateral_backward", *arguments)
    return to_keys, scalars[0], scalars[1]


def _resized(features: Tensor, weights: Tensor) -> Tensor:
    """Return ``features`` resized to the output along the axes on which the output is smaller.

    The kernels fold bicubic enlargement into the weights. Reduction is done here: folded, it would
    need windows of any size, while the resized copy is no larger than ``features``. Bicubic
    resizing is separable, so the result is exact.
    """
    if not shrinks(features, weights):
        return features
    size = [min(a, b) for a, b in zip(features.shape[2:], weights.shape[2:], strict=True)]
    return F.interpolate(features.float(), size=size, mode="bicubic", align_corners=False)


def _check_padded(padded: Tensor, weights: Tensor) -> int:
    radius = check_weights("padded", padded, weights)
    height, width = weights.shape[2:]
    check_shape("padded", padded, (*padded.shape[:2], height + 2 * radius, width + 2 * radius))
    return radius
