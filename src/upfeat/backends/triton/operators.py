"""GPU kernels, written in Triton: forward and both gradients, with float32 accumulation.

float32 is computed in float32 (no TF32). If features and weights are both bfloat16 or both float16,
the products run on tensor cores with float32 sums, and weights are rounded once, after folding. Any
size and ratio, both memory formats and any strides are supported. Every gradient is a gather or a
sum of partial sums in a fixed order, so results are reproducible bit for bit.

The table has the least cost of the operator, for B=1, r=3 and float32. The text below predicts the
kernels' times from it; ``benchmarks/gpu_kernels.py`` measures them.

============================  ===========  ===========  ==========================  ============
upsample                      operations   least bytes  at 2.0 / 3.35 / 4.8 TB/s    at 19.5 / 67
                                                        (A100 / H100 / H200)        TFLOP/s
============================  ===========  ===========  ==========================  ============
C=384, 112→224                1.9 GFLOP    106 MB       53 / 32 / 22 µs             97 / 28 µs
C=384, 512→1024               39.5 GFLOP   2.2 GB       1.1 / 0.66 / 0.46 ms        2.0 / 0.6 ms
C=384, 512→1024, bfloat16     39.5 GFLOP   1.1 GB       0.55 / 0.33 / 0.23 ms       (tensor cores)
============================  ===========  ===========  ==========================  ============

In float32 the operator is bound by multiply-adds on an A100, and by multiply-adds and bandwidth
alike on an H100, so the *groups* kernels do no superfluous multiply-adds. 2×2 outputs share each
loaded value; the next limit is the first-level cache, which delivers 32 values per clock, while an
H100 does 128 multiply-adds. In the compiled code, a thread issues 20 loads of 4 bytes for 64
multiply-adds on planar features (at best 80 % of the arithmetic rate), and 2 loads of 16 bytes and
8 of 4 bytes for 32 multiply-adds on channels-last features (50 %). The prediction for 112→224, with
6 µs to fold the weights, is 1.4 (planar) to 2 times the least time on an H100; on an A100 it is 1.1
to 1.3 times the least time of the arithmetic, or 2 to 2.4 times that of the memory traffic.

In half precision the bytes halve, and plain multiply-adds would take 3 to 5 times the least time.
The *tiles* kernels therefore do three times the operations, but on tensor cores: a tile of 8×16
outputs reads 10×14 cells, stored as 10×16, and each output needs 49 of these 160. 6 GFLOP at half
an H100's 990 TFLOP/s take 12 µs, and the memory traffic at least 16 µs. The prediction is 1.5 times
the least time, if gathering the weights is not slower than assumed.

The gradient of the weights multiplies tiles in either precision; in float32, without tensor cores,
it is slow: about 10 times the least time of the arithmetic is predicted. The range kernel moves
16 MB at 224 (5 µs on an H100) and 339 MB at 1024 (0.1 ms). With 1.75 multiply-adds per load, it is
bound by the first-level cache, at 1.3 times the least time; 1.5 to 2 times are predicted.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from upfeat.backends.triton import launch
from upfeat.backends.triton.attention import window_attention, window_attention_backward
from upfeat.backends.triton.availability import reason_against, unavailable_reason
from upfeat.backends.triton.tables import Axis, bicubic_axis, plain_axis, replicated_axis
from upfeat.geometry import window_radius

__all__ = [
    "adaptive_conv2d",
    "adaptive_conv2d_backward",
    "bilateral_weights",
    "bilateral_weights_backward",
    "can_run_adaptive_conv2d",
    "can_run_bilateral_weights",
    "can_run_joint_bilateral_upsample",
    "can_run_neighbourhood_upsample",
    "can_run_window_attention",
    "joint_bilateral_upsample",
    "joint_bilateral_upsample_backward",
    "neighbourhood_upsample",
    "neighbourhood_upsample_backward",
    "unavailable_reason",
    "window_attention",
    "window_attention_backward",
]


def can_run_joint_bilateral_upsample(features: Tensor, weights: Tensor) -> str | None:
    """Return why the operator cannot run on these arguments, or ``None``."""
    return reason_against(features, weights)


def can_run_adaptive_conv2d(padded: Tensor, weights: Tensor) -> str | None:
    """Return why the operator cannot run on these arguments, or ``None``."""
    return reason_against(padded, weights)


def can_run_neighbourhood_upsample(
    features: Tensor, weights: Tensor, *place: Sequence[int]
) -> str | None:
    """Return why the operator cannot run on these arguments, or ``None``."""
    del place  # there are tables for any window
    return reason_against(features, weights)


def can_run_bilateral_weights(
    keys: Tensor, temperature: Tensor | float, sigma_spatial: Tensor | float, radius: int
) -> str | None:
    """Return why the operator cannot run on these arguments, or ``None``."""
    del temperature, sigma_spatial  # scalars of any type are copied to the device
    if radius > 7:
        return f"radius={radius} needs more scores per pixel than registers hold; at most 7"
    return reason_against(keys)


def can_run_window_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *options: object
) -> str | None:
    """Return why the operator cannot run on these arguments, or ``None``."""
    del options  # any ranges, heads and blocks
    return reason_against(queries, keys, values)


def joint_bilateral_upsample(
    features: Tensor, weights: Tensor, *, channels_last: bool | None = None
) -> Tensor:
    """See :func:`upfeat.functional.joint_bilateral_upsample`; not differentiable.

    Args:
        features: (B, C, h, w).
        weights: (B, (2r+1)², H, W).
        channels_last: memory format of the result; by default that of ``features``.

    Returns:
        (B, C, H, W), dtype of ``features``.
    """
    axes = _axes(bicubic_axis, features, weights)
    return _folded_forward(features, weights, axes, channels_last)


def joint_bilateral_upsample_backward(
    grad: Tensor,
    features: Tensor,
    weights: Tensor,
    need_features: bool = True,
    need_weights: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`joint_bilateral_upsample` for ``features`` and ``weights``."""
    axes = _axes(bicubic_axis, features, weights)
    return _folded_backward(grad, features, weights, axes, need_features, need_weights)


def neighbourhood_upsample(
    features: Tensor,
    weights: Tensor,
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
    *,
    channels_last: bool | None = None,
) -> Tensor:
    """See :func:`upfeat.functional.neighbourhood_upsample`; not differentiable.

    Args:
        features: (B, C, h, w).
        weights: (B, (2r+1)², H, W) over the cells around each pixel's own, edges replicated.
        output_size: (height, width) of the whole output, of which the weights cover a window.
        origin: first row and column of the window of the output.
        grid_size: (h, w) of the whole grid, of which the features cover a window.
        grid_origin: first row and column of the window of the grid.
        channels_last: memory format of the result; by default that of ``features``.

    Returns:
        (B, C, H, W), dtype of ``features``.
    """
    axes = _cell_axes(features, weights, output_size, origin, grid_size, grid_origin)
    return _folded_forward(features, weights, axes, channels_last)


def neighbourhood_upsample_backward(
    grad: Tensor,
    features: Tensor,
    weights: Tensor,
    need_features: bool,
    need_weights: bool,
    *place: Sequence[int],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`neighbourhood_upsample` for ``features`` and ``weights``."""
    axes = _cell_axes(features, weights, *place)
    return _folded_backward(grad, features, weights, axes, need_features, need_weights)


def adaptive_conv2d(
    padded: Tensor, weights: Tensor, *, channels_last: bool | None = None
) -> Tensor:
    """See :func:`upfeat.functional.adaptive_conv2d`; not differentiable.

    Args:
        padded: (B, C, H+2r, W+2r).
        weights: (B, (2r+1)², H, W).
        channels_last: memory format of the result; by default that of ``padded``.

    Returns:
        (B, C, H, W), dtype of ``padded``.
    """
    axes = _plain_axes(padded, weights)
    out = _like(padded, weights.shape[2:], channels_last)
    if out.numel():
        launch.gather(padded, _taps_as_window(weights), out, axes)
    return out


def adaptive_conv2d_backward(
    grad: Tensor,
    padded: Tensor,
    weights: Tensor,
    need_padded: bool = True,
    need_weights: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`adaptive_conv2d` for ``padded`` and ``weights``."""
    axes = _plain_axes(padded, weights)
    for_padded = _like(padded, padded.shape[2:], None) if need_padded else None
    for_weights = torch.empty_like(weights) if need_weights else None
    if grad.numel() == 0:
        return _zeroed(for_padded), _zeroed(for_weights)
    if for_padded is not None:
        launch.scatter(grad, _taps_as_window(weights), for_padded, axes)
    if for_weights is not None:
        launch.outer(
            grad, padded, _taps_as_window(for_weights), axes, launch.in_half(padded, weights)
        )
    return for_padded, for_weights


def bilateral_weights(
    keys: Tensor, temperature: Tensor | float, sigma_spatial: Tensor | float, radius: int
) -> Tensor:
    """See :func:`upfeat.functional.bilateral_weights`; not differentiable.

    Args:
        keys: (B, D, H, W).
        temperature: τ, a scalar.
        sigma_spatial: σ, a scalar.
        radius: r ≥ 0, at most 7.

    Returns:
        (B, (2r+1)², H, W), dtype of ``keys``.
    """
    batch, _, height, width = keys.shape
    out = keys.new_empty(batch, (2 * radius + 1) ** 2, height, width)
    if out.numel() == 0:
        return out
    scalars = _scalar(temperature, keys.device), _scalar(sigma_spatial, keys.device)
    launch.range_kernel("range_forward", radius, keys, scalars, out)
    return out


def bilateral_weights_backward(
    grad: Tensor,
    keys: Tensor,
    temperature: Tensor | float,
    sigma_spatial: Tensor | float,
    radius: int,
    need_keys: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of :func:`bilateral_weights` for keys, temperature and sigma_spatial.

    The gradient of the keys is a window sum of the keys, weighted by the gradients of the products,
    plus the adjoint of this sum. Both are computed with the operators' gather and scatter kernels.

    Returns:
        (B, D, H, W) or ``None``, and two float32 scalars.
    """
    if grad.numel() == 0:
        zero = torch.zeros((), device=keys.device)
        return (torch.zeros_like(keys) if need_keys else None), zero, zero.clone()
    pairwise = torch.empty(grad.shape, device=keys.device)  # (B, T, H, W)
    scalars = _scalar(temperature, keys.device), _scalar(sigma_spatial, keys.device)
    partial = launch.range_kernel("range_backward", radius, keys, scalars, grad, pairwise)
    for_temperature, for_sigma = partial.double().sum(0).float().unbind()
    if not need_keys:
        return None, for_temperature, for_sigma
    if keys.shape[1] == 0:
        return torch.zeros_like(keys), for_temperature, for_sigma
    axes = _axes(bicubic_axis, keys, pairwise)
    window = launch.fold(pairwise, keys, axes)
    ahead = _like(keys, keys.shape[2:], None, torch.float32)
    behind = torch.empty_like(ahead)
    launch.gather(keys, window, ahead, axes)
    launch.scatter(keys, window, behind, axes)
    return ahead.add_(behind).to(keys.dtype), for_temperature, for_sigma


def _folded_forward(
    features: Tensor, weights: Tensor, axes: tuple[Axis, Axis], channels_last: bool | None
) -> Tensor:
    out = _like(features, weights.shape[2:], channels_last)
    if out.numel():
        launch.gather(features, launch.fold(weights, features, axes), out, axes)
    return out


def _folded_backward(
    grad: Tensor,
    features: Tensor,
    weights: Tensor,
    axes: tuple[Axis, Axis],
    need_features: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    for_features = _like(features, features.shape[2:], None) if need_features else None
    for_weights = torch.empty_like(weights) if need_weights else None
    if grad.numel() == 0:
        return _zeroed(for_features), _zeroed(for_weights)
    if for_features is not None:
        launch.scatter(grad, launch.fold(weights, features, axes), for_features, axes)
    if for_weights is not None:
        window = launch.new_window(weights, axes, torch.float32, pixels_first=True)
        launch.outer(grad, features, window, axes, launch.in_half(features, weights))
        launch.run_folding("unfold", window, for_weights, axes)
    return for_features, for_weights


def _axes(
    kind: Callable[[int, int, int], Axis], features: Tensor, weights: Tensor
) -> tuple[Axis, Axis]:
    """Make the tables of both axes; an empty output, which no kernel writes, gets one pixel's."""
    radius = _checked_radius(features, weights)
    (h, w), (height, width) = features.shape[2:], weights.shape[2:]
    rows = kind(max(h, 1), max(height, 1), radius)
    return rows, kind(max(w, 1), max(width, 1), radius)


def _cell_axes(
    features: Tensor,
    weights: Tensor,
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
) -> tuple[Axis, Axis]:
    """Make the tables of both axes for a window of an output, to read the cells around pixels."""
    radius = _checked_radius(features, weights)
    rows, columns = (
        replicated_axis(
            max(cells, 1), max(count, 1), radius, max(length, 1), start, max(every, 1), skip
        )
        for cells, count, length, start, every, skip in zip(
            *(features.shape[2:], weights.shape[2:], output_size, origin, grid_size, grid_origin),
            strict=True,
        )
    )
    return rows, columns


def _checked_radius(features: Tensor, weights: Tensor) -> int:
    """Check the shapes of features and weights, and return the weights' radius.

    ``upfeat.functional`` checks shapes, too, but a kernel on wrong shapes could read anywhere.
    """
    radius = window_radius(weights.shape[1])
    if len(features) != len(weights):
        raise ValueError(f"batches differ: features {len(features)}, weights {len(weights)}")
    if weights.numel() and not min(features.shape[2:]):
        raise ValueError(f"features is {tuple(features.shape)}: nothing to upsample from")
    return radius


def _plain_axes(padded: Tensor, weights: Tensor) -> tuple[Axis, Axis]:
    radius = window_radius(weights.shape[1])
    height, width = weights.shape[2:]
    expected = (len(weights), height + 2 * radius, width + 2 * radius)
    if (len(padded), *padded.shape[2:]) != expected:
        raise ValueError(
            f"padded is {tuple(padded.shape)} but weights {tuple(weights.shape)} need batch, "
            f"height and width {expected}"
        )
    return plain_axis(max(height, 1), radius), plain_axis(max(width, 1), radius)


def _taps_as_window(weights: Tensor) -> Tensor:
    side = 2 * window_radius(weights.shape[1]) + 1
    return weights.unflatten(1, (side, side))  # (B, K, K, H, W), never a copy


def _like(
    x: Tensor,
    size: tuple[int, ...],
    channels_last: bool | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Allocate (B, C, *size), channels last if so chosen; by default in the format of ``x``."""
    if channels_last is None:
        # A tensor with one channel or one pixel has both formats; it counts as contiguous.
        channels_last = x.stride(1) == 1 and not x.is_contiguous()
    form = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (*x.shape[:2], *size), dtype=dtype or x.dtype, device=x.device, memory_format=form
    )


def _zeroed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.zero_()


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    return torch.as_tensor(value).detach().to(device, torch.float32)
