"""Neighbourhood operators of the compiled CPU library: weights over cells, and weighted sums."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from upfeat.backends.cpu.arguments import (
    check_image,
    check_shape,
    check_upsample,
    gradients,
    output,
    reason_against,
    weights_shape,
)
from upfeat.backends.cpu.library import Window, call
from upfeat.geometry import cells_of_window

Gradients = tuple[Tensor | None, Tensor | None]


def can_run_neighbourhood_upsample(
    features: Tensor,
    weights: Tensor,
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
) -> str | None:
    """Return why :func:`neighbourhood_upsample` cannot run on these arguments, or ``None``."""
    del origin, grid_origin
    return _too_coarse(grid_size, output_size) or reason_against(features=features, weights=weights)


def can_run_neighbourhood_weights(
    queries: Tensor, keys: Tensor, *arguments: Sequence[int] | Tensor | int | None
) -> str | None:
    """Return why :func:`neighbourhood_weights` cannot run on these arguments, or ``None``."""
    output_size, grid_size = arguments[3], arguments[5]
    assert isinstance(output_size, Sequence)
    assert isinstance(grid_size, Sequence)
    if not queries.shape[1]:
        return "queries and keys have no channels"
    return _too_coarse(grid_size, output_size) or reason_against(queries=queries, keys=keys)


def can_run_neighbourhood_attention(
    features: Tensor, queries: Tensor, keys: Tensor, *arguments: Sequence[int] | Tensor | int | None
) -> str | None:
    """Return why :func:`neighbourhood_attention` cannot run on these arguments, or ``None``."""
    if features.dtype != queries.dtype:
        return f"features is {features.dtype} where queries is {queries.dtype}"
    return can_run_neighbourhood_mean_weights(queries, keys, *arguments)


def can_run_neighbourhood_mean_weights(
    queries: Tensor, keys: Tensor, *arguments: Sequence[int] | Tensor | int | None
) -> str | None:
    """Return why :func:`neighbourhood_mean_weights` cannot run on these arguments, or ``None``."""
    output_size, grid_size = arguments[3], arguments[5]
    assert isinstance(output_size, Sequence)
    assert isinstance(grid_size, Sequence)
    if any(a > b for a, b in zip(grid_size, output_size, strict=True)):
        return "the output has fewer pixels than the grid has cells along an axis"
    return can_run_neighbourhood_weights(queries, keys, *arguments)


def neighbourhood_attention(
    features: Tensor,
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    sigma: float | Tensor,
    radius: int,
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
    lengths: Tensor | None = None,
) -> Tensor:
    """Sum features over cells with weights of which only one tile is in memory; no gradients.

    ``features`` cover the same cells as ``keys``; products of each pixel are multiplied by
    ``lengths`` (B, 1, H, W) if given; the other arguments are those of
    :func:`neighbourhood_weights`.

    Returns:
        (B, C, H, W) in the memory format of ``features``.
    """
    place = output_size, origin, grid_size, grid_origin
    window = _check_queries(queries, keys, radius, *place)
    _check_lengths(lengths, queries)
    check_image("features", features, radius)
    check_shape("features", features, (keys.shape[0], features.shape[1], *keys.shape[2:]))
    out = output(features, queries, None)
    if out.numel():
        scalars = (float(temperature), float(sigma))
        call("upfeat_attend_sum", features, queries, keys, lengths, out, window, radius, *scalars)
    return out


def neighbourhood_mean_weights(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    sigma: float | Tensor,
    radius: int,
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
    lengths: Tensor | None = None,
) -> Tensor:
    """Average weights over the pixels of each cell, without storing all weights; no gradients.

    The arguments are those of :func:`neighbourhood_attention`.

    Returns:
        (B, (2r+1)², h', w'), for the h' × w' cells that contain the window's pixels.
    """
    place = output_size, origin, grid_size, grid_origin
    window = _check_queries(queries, keys, radius, *place)
    _check_lengths(lengths, queries)
    cells = cells_of_window(queries.shape[2:], output_size, origin, grid_size)
    out = queries.new_empty((queries.shape[0], (2 * radius + 1) ** 2, *cells))
    if out.numel():
        scalars = (float(temperature), float(sigma))
        call("upfeat_attend_means", queries, keys, lengths, out, window, radius, *scalars)
    return out


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
    """See :func:`upfeat.functional.neighbourhood_upsample`.

    The weights cover a window, from ``origin`` on, of an output of ``output_size``; the features
    cover a window, from ``grid_origin`` on, of a grid of ``grid_size``. ``channels_last`` is the
    memory format of the result; ``None`` chooses the format of ``features``.
    """
    radius = check_upsample(features, weights)
    place = output_size, origin, grid_size, grid_origin
    window = _window_of({"weights": weights, "features": features}, *place)
    out = output(features, weights, channels_last)
    if out.numel():
        call("upfeat_neighbourhood_forward", features, weights, out, window, radius)
    return out


def neighbourhood_upsample_backward(
    grad: Tensor,
    features: Tensor,
    weights: Tensor,
    need_features: bool,
    need_weights: bool,
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
) -> Gradients:
    """Gradients of :func:`neighbourhood_upsample`; ``None`` for those not needed."""
    radius = check_upsample(features, weights)
    place = output_size, origin, grid_size, grid_origin
    window = _window_of({"weights": weights, "features": features}, *place)
    needed = (need_features, need_weights)
    return gradients(
        "upfeat_neighbourhood_backward", grad, features, weights, needed, window, radius
    )


def neighbourhood_weights(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    sigma: float | Tensor,
    radius: int,
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
) -> Tensor:
    """See :func:`upfeat.functional.neighbourhood_weights`.

    The queries cover a window, from ``origin`` on, of an output of ``output_size``; the keys cover
    a window, from ``grid_origin`` on, of a grid of ``grid_size``.
    """
    place = output_size, origin, grid_size, grid_origin
    window = _check_queries(queries, keys, radius, *place)
    out = queries.new_empty(weights_shape(queries, radius))
    if out.numel():
        scalars = (float(temperature), float(sigma))
        call("upfeat_attend_forward", queries, keys, out, window, radius, *scalars)
    return out


def neighbourhood_weights_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    sigma: float | Tensor,
    radius: int,
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
) -> tuple[Tensor, Tensor, float, float]:
    """Gradients of :func:`neighbourhood_weights` for queries, keys, temperature and sigma."""
    place = output_size, origin, grid_size, grid_origin
    window = _check_queries(queries, keys, radius, *place)
    check_shape("grad", grad, weights_shape(queries, radius))
    new = torch.empty_like if grad.numel() else torch.zeros_like
    to_queries, to_keys, scalars = new(queries), new(keys), (ctypes.c_double * 2)()
    call(
        *(
            "upfeat_attend_backward",
            queries,
            keys,
            grad,
            to_queries,
            to_keys,
            scalars,
            window,
        ),
        *(radius, float(temperature), float(sigma)),
    )
    return to_queries, to_keys, scalars[0], scalars[1]


def _too_coarse(grid_size: Sequence[int], output_size: Sequence[int]) -> str | None:
    # The kernels load the cells between neighbouring pixels too, as part of one shared window,
    # which would be too wide for a coarser output.
    if any(a > 4 * b for a, b in zip(grid_size, output_size, strict=True)):
        return "the output is less than a quarter of the grid along an axis"
    return None


def _check_queries(
    queries: Tensor,
    keys: Tensor,
    radius: int,
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
) -> Window:
    check_image("queries", queries, radius)
    check_image("keys", keys, radius)
    check_shape("keys", keys, (*queries.shape[:2], *keys.shape[2:]))
    if queries.dtype != keys.dtype or not queries.shape[1] or 0 in keys.shape[2:] or radius < 1:
        raise ValueError(
            f"queries {tuple(queries.shape)}, {queries.dtype}, keys {tuple(keys.shape)}, "
            f"{keys.dtype} and radius={radius} do not go together: give one type, at least one "
            "channel, one cell and radius 1"
        )
    place = output_size, origin, grid_size, grid_origin
    return _window_of({"queries": queries, "keys": keys}, *place)


def _check_lengths(lengths: Tensor | None, queries: Tensor) -> None:
    if lengths is not None:
        check_shape("lengths", lengths, (len(queries), 1, *queries.shape[2:]))


def _window_of(
    tensors: dict[str, Tensor],
    output_size: Sequence[int],
    origin: Sequence[int],
    grid_size: Sequence[int],
    grid_origin: Sequence[int],
) -> Window:
    """Check the windows that tensors cover: first the one of the output, then that of the grid."""
    places = (output_size, origin), (grid_size, grid_origin)
    for (name, tensor), (size, start) in zip(tensors.items(), places, strict=True):
        for first, count, length in zip(start, tensor.shape[2:], size, strict=True):
            if first < 0 or first + count > length:
                raise ValueError(f"{tuple(start)} puts {name} outside {tuple(size)}")
    return Window(*output_size, *origin, *grid_size, *grid_origin)
