"""The operators that upsamplers are made of: pure functions of tensors.

Every function takes ``backend``:

* ``"auto"`` chooses the fastest that can run on these tensors, and says at DEBUG level which;
* ``"reference"`` is the oracle (unfolding; slow, every intermediate in memory);
* ``"eager"`` is plain PyTorch, on any device and dtype;
* ``"cpu"`` is the compiled C++ library;
* ``"triton"`` is the GPU kernels.

A backend asked for by name that cannot run raises ``ValueError`` with the reason. All of them are
differentiable in every tensor argument.
"""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from upfeat.backends import dispatch
from upfeat.bounds import number, shown, whole
from upfeat.geometry import window_radius

__all__ = [
    "adaptive_conv2d",
    "bilateral_weights",
    "joint_bilateral_upsample",
    "neighbourhood_upsample",
    "neighbourhood_weights",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that are computed with."""
_LARGEST_RADIUS = 127
"""A window of 65,025 taps; that of the published networks is 3."""


def adaptive_conv2d(padded: Tensor, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Correlate every pixel's window with that pixel's own weights, shared by all channels.

    out[b, c, y, x] = Σ_k weights[b, k, y, x] · padded[b, c, y + k // side, x + k % side].

    Args:
        padded: (B, C, H+2r, W+2r) features, already padded by the radius r.
        weights: (B, (2r+1)², H, W), taps row-major.
        backend: see the module's docstring.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run.

    Source: FeatUp, section 3.2 (the adaptive convolution).
    """
    weights = _check_pair("padded", padded, weights)
    radius = window_radius(weights.shape[1])
    expected = (weights.shape[2] + 2 * radius, weights.shape[3] + 2 * radius)
    if tuple(padded.shape[-2:]) != expected:
        raise ValueError(
            f"padded is {_size(padded)} but weights of {weights.shape[1]} taps at {_size(weights)} "
            f"need {expected[0]}×{expected[1]}: pad by the radius ({radius}) on every side"
        )
    return dispatch.call("adaptive_conv2d", backend, padded, weights)


def joint_bilateral_upsample(features: Tensor, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Resize bicubically to the weights' size, reflect-pad, and filter with the weights.

    Args:
        features: (B, C, h, w).
        weights: (B, (2r+1)², H, W), taps row-major; its size is the output's.
        backend: see the module's docstring.

    Returns:
        (B, C, H, W), equal to ``adaptive_conv2d(reflect_pad(bicubic(features)), weights)``.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run.

    Source: FeatUp, section 3.2, equation of one JBU stage.
    """
    weights = _check_pair("features", features, weights)
    window_radius(weights.shape[1])
    _check_not_empty("features", features)
    _check_not_empty("weights", weights)
    return dispatch.call("joint_bilateral_upsample", backend, features, weights)


def neighbourhood_upsample(
    features: Tensor,
    weights: Tensor,
    *,
    output_size: tuple[int, int] | None = None,
    window: tuple[int, int, int, int] | None = None,
    grid_size: tuple[int, int] | None = None,
    cells: tuple[int, int, int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum the coarse cells around each pixel's own cell, weighted per pixel.

    out[b, c, p] = Σ_δ weights[b, δ, p] · features[b, c, cell(p) + δ], |δ|∞ ≤ r, edges replicated,
    where cell(p) = ⌊(p + ½)·h/H⌋ on each axis.

    Args:
        features: (B, C, h, w), or only some cells.
        weights: (B, (2r+1)², H, W), offsets row-major, or only those of the window.
        output_size: (H, W) of the whole output; the weights' size by default.
        window: (top, left, height, width) of the output that ``weights`` are; all of it by default.
        grid_size: (h, w) of the whole grid; the features' size by default.
        cells: (top, left, height, width) of the grid that ``features`` are; all of it by default.
            They must hold the cells that the window reads.
        backend: see the module's docstring.

    Returns:
        (B, C, H, W), or (B, C, height, width) of the window.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the window does not lie in the output or the
            cells in the grid, or the backend cannot run.
    """
    weights = _check_pair("features", features, weights)
    window_radius(weights.shape[1])
    _check_not_empty("features", features)
    _check_not_empty("weights", weights)
    fine = _check_window("weights", weights, output_size, window)
    coarse = _check_window("features", features, grid_size, cells, whole="grid", part="cells")
    return dispatch.call("neighbourhood_upsample", backend, features, weights, *fine, *coarse)


def bilateral_weights(
    keys: Tensor,
    temperature: Tensor | float,
    sigma_spatial: Tensor | float,
    *,
    radius: int = 3,
    backend: str = "auto",
) -> Tensor:
    """Range kernel times spatial kernel, normalised over the window.

    The range kernel is the softmax over the window's taps of temperature·⟨keys[p], keys[p+δ]⟩
    (keys reflect-padded); the spatial one exp(−|u|²/(2·sigma_spatial²)) with u on [−1, 1]².

    Args:
        keys: (B, D, H, W).
        temperature: scalar that multiplies the inner products.
        sigma_spatial: scalar, in units of the half window; not 0.
        radius: r ≥ 0, pixels.
        backend: see the module's docstring.

    Returns:
        (B, (2r+1)², H, W), taps row-major, non-negative, summing to 1 at every pixel.

    Raises:
        ValueError: keys is not (B, D, H, W), the radius is negative, or the backend cannot run.

    Source: FeatUp, section 3.2 (range and spatial kernels).
    """
    _check_tensor("keys", keys)
    radius = whole("radius", radius, 0, _LARGEST_RADIUS)
    _check_not_empty("keys", keys)
    temperature = _scalar("temperature", temperature, keys)
    sigma_spatial = _scalar("sigma_spatial", sigma_spatial, keys, divisor=True)
    return dispatch.call("bilateral_weights", backend, keys, temperature, sigma_spatial, radius)


def neighbourhood_weights(
    queries: Tensor,
    keys: Tensor,
    temperature: Tensor | float,
    sigma: Tensor | float,
    *,
    radius: int = 2,
    output_size: tuple[int, int] | None = None,
    window: tuple[int, int, int, int] | None = None,
    grid_size: tuple[int, int] | None = None,
    cells: tuple[int, int, int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Weigh, for every pixel, the coarse cells around its own.

    weights[b, δ, p] = softmax over |δ|∞ ≤ r of temperature·⟨queries[p], keys[cell(p) + δ]⟩ −
    |p − centre(cell(p) + δ)|²/(2·sigma²), with distances in cells along each axis: pixel p lies at
    (p + ½)·h/H and the centre of cell i at i + ½ (align_corners=False). Past the edges, keys are
    replicated and cells keep their places. A cell farther than r + ½ along an axis has weight 0: a
    pixel on the border of two cells sees as many on either side, so that flips commute.

    Args:
        queries: (B, D, H, W), or only those of the window.
        keys: (B, D, h, w), or only some cells.
        temperature: scalar that multiplies the inner products.
        sigma: scalar width of the Gaussian of distance, in cells; not 0.
        radius: r ≥ 1, cells.
        output_size: (H, W) of the whole output; the queries' size by default.
        window: (top, left, height, width) of the output that ``queries`` are; all of it by default.
        grid_size: (h, w) of the whole grid; the keys' size by default.
        cells: (top, left, height, width) of the grid that ``keys`` are; all of it by default. They
            must hold the cells that the window reads.
        backend: see the module's docstring.

    Returns:
        (B, (2r+1)², H, W) or (B, (2r+1)², height, width), offsets row-major, non-negative, summing
        to 1 at every pixel.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the window does not lie in the output or the
            cells in the grid, the radius is below 1, or the backend cannot run.
    """
    keys = _check_pair("queries", queries, keys, other="keys")
    radius = whole("radius", radius, 1, _LARGEST_RADIUS)
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"queries have {queries.shape[1]} channels and keys {keys.shape[1]}; they must agree"
        )
    _check_not_empty("queries", queries)
    _check_not_empty("keys", keys)
    fine = _check_window("queries", queries, output_size, window)
    coarse = _check_window("keys", keys, grid_size, cells, whole="grid", part="cells")
    scalars = (
        _scalar("temperature", temperature, queries),
        _scalar("sigma", sigma, queries, divisor=True),
    )
    return dispatch.call(
        "neighbourhood_weights", backend, queries, keys, *scalars, radius, *fine, *coarse
    )


def window_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Sequence[int],
    columns: Sequence[int],
    *,
    heads: int = 1,
    blocks: Sequence[int] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention from every pixel to a rectangle of coarse cells.

    Head n compares block n of the D channels: its weights are the softmax over the pixel's cells of
    scale·⟨queries, keys⟩. Heads are averaged and weigh all values alike, or each weighs a block of
    the values' channels of its own. Which cells a pixel attends to depends on its row and its
    column: those of both ranges.

    Args:
        queries: (B, D, H, W).
        keys: (B, D, h, w).
        values: (B, C, h, w), of any floating type; the result has it.
        rows: the first cell of every row of pixels, then one past its last one, 2·H numbers.
        columns: likewise, 2·W.
        heads: N, a divisor of D.
        blocks: channels of the values that go with each head, C in all; ``None`` or one number for
            the mean of the heads.
        scale: of the inner products; ``None`` for 1/√(D/N).
        backend: see the module's docstring.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: shapes, types or devices disagree, a range is empty or leaves the grid, or the
            backend cannot run.
    """
    keys = _check_pair("queries", queries, keys, other="keys")
    _check_tensor("values", values)
    for label, tensor in (("queries", queries), ("keys", keys), ("values", values)):
        _check_not_empty(label, tensor)
    if (values.shape[0], *values.shape[2:]) != (keys.shape[0], *keys.shape[2:]):
        raise ValueError(
            f"values is {tuple(values.shape)} and keys {tuple(keys.shape)}; "
            "batch and grid must agree"
        )
    if values.device != keys.device:
        raise ValueError(f"values is on {values.device} and keys on {keys.device}; move one")
    heads = whole("heads", heads, 1)
    if queries.shape[1] != keys.shape[1] or queries.shape[1] % heads:
        raise ValueError(
            f"queries have {queries.shape[1]} channels and keys {keys.shape[1]}; they must agree, "
            f"and be a multiple of heads={heads}"
        )
    blocks = [values.shape[1]] if blocks is None else _whole_numbers("blocks", blocks)
    if len(blocks) not in (1, heads) or sum(blocks) != values.shape[1] or min(blocks) < 0:
        raise ValueError(
            f"blocks={blocks} must be {heads} numbers of channels, or one, {values.shape[1]} in all"
        )
    rows, columns = _whole_numbers("rows", rows), _whole_numbers("columns", columns)
    for label, bounds, axis in (("rows", rows, 2), ("columns", columns, 3)):
        _check_ranges(label, bounds, queries.shape[axis], keys.shape[axis])
    factor = (queries.shape[1] // heads) ** -0.5 if scale is None else number("scale", scale)
    return dispatch.call(
        "window_attention",
        backend,
        queries,
        keys,
        values,
        rows,
        columns,
        heads,
        factor,
        blocks,
    )


def _check_ranges(label: str, bounds: Sequence[int], length: int, cells: int) -> None:
    """Check that ranges of cells, one for each of ``length`` pixels, lie in the grid."""
    if len(bounds) != 2 * length:
        raise ValueError(f"{label} has {len(bounds)} numbers; give a first and an end for {length}")
    for first, stop in zip(bounds[:length], bounds[length:], strict=True):
        if not 0 <= first < stop <= cells:
            raise ValueError(
                f"{label} holds the cells {first} to {stop}; each range must hold one at least "
                f"and lie in 0 to {cells}"
            )


def _check_window(
    name: str,
    tensor: Tensor,
    output_size: tuple[int, int] | None,
    window: tuple[int, int, int, int] | None,
    *,
    whole: str = "output",
    part: str = "window",
) -> tuple[list[int], list[int]]:
    """The whole map's size and where in it the tensor begins."""
    label = "output_size" if whole == "output" else "grid_size"
    size = list(tensor.shape[-2:]) if output_size is None else _whole_numbers(label, output_size, 2)
    place = (0, 0, *size) if window is None else _whole_numbers(part, window, 4)
    top, left, height, width = place
    if (height, width) != tuple(tensor.shape[-2:]):
        raise ValueError(
            f"{name} are {_size(tensor)} but {part} is {height}×{width}; give those of {part}"
        )
    if top < 0 or left < 0 or top + height > size[0] or left + width > size[1]:
        raise ValueError(
            f"{part}={(top, left, height, width)} does not lie in the {whole} of "
            f"{size[0]}×{size[1]}"
        )
    return size, [top, left]


def _check_pair(name: str, values: Tensor, weights: Tensor, other: str = "weights") -> Tensor:
    """Check that two (B, ·, ·, ·) tensors go together; return the other in the values' dtype."""
    _check_tensor(name, values)
    _check_tensor(other, weights)
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


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Check that something is a dense tensor of four axes whose numbers can be computed with."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is of type {type(tensor).__name__}; give a tensor")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions, not shape {tuple(tensor.shape)}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} is {tensor.layout}; convert it with .to_dense()")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}; convert it with .float()")


def _scalar(name: str, value: Tensor | float, like: Tensor, *, divisor: bool = False) -> Tensor:
    """A number as a tensor beside others; a tensor of one number keeps its gradient."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}; give one real number")
        value = value.reshape(()) if value.dim() else value
        return value.to(like.device, like.dtype)
    if number(name, value) == 0 and divisor:
        raise ValueError(f"{name}={shown(value)} must not be 0")
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _whole_numbers(name: str, values: Sequence[int], count: int | None = None) -> list[int]:
    """A list of whole numbers, those that stand for sizes unknown in a graph included."""
    try:
        found = [n if isinstance(n, int | torch.SymInt) else operator.index(n) for n in values]
    except TypeError:
        found = None
    if found is None or count not in (None, len(found)):
        wanted = "whole numbers" if count is None else f"{count} whole numbers"
        raise ValueError(f"{name}={shown(values)} must be {wanted}")
    return found


def _check_not_empty(name: str, tensor: Tensor) -> None:
    if 0 in tensor.shape[-2:]:
        raise ValueError(f"{name} is {_size(tensor)} pixels; both sides must be at least 1")


def _size(tensor: Tensor) -> str:
    return f"{tensor.shape[-2]}×{tensor.shape[-1]}"
