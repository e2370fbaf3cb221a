"""Operators of which upsamplers are composed: pure functions of tensors.

Every function has an argument ``backend``:

* ``"auto"``: the fastest backend that can run on the given tensors; logged at DEBUG level;
* ``"reference"``: the definition, for tests (by unfolding: slow, and with all intermediate tensors
  in memory);
* ``"eager"``: plain PyTorch, on any device and dtype;
* ``"cpu"``: the compiled C++ library;
* ``"triton"``: GPU kernels.

A backend that is requested by name but cannot run raises ``ValueError`` with the reason. All
backends are differentiable with respect to every tensor argument.

NaN or infinity in the features stays in its channel. There, it may also reach pixels close by whose
windows do not contain it: backends multiply some cells beyond the window by 0.
"""

from collections.abc import Sequence

from torch import Tensor

from upfeat.backends import dispatch
from upfeat.bounds import number, whole
from upfeat.geometry import window_radius
from upfeat.operator_checks import (
    check_cells,
    check_not_empty,
    check_pair,
    check_ranges,
    check_tensor,
    check_window,
    scalar,
    size_of,
    whole_numbers,
)

__all__ = [
    "adaptive_conv2d",
    "bilateral_weights",
    "joint_bilateral_upsample",
    "neighbourhood_upsample",
    "neighbourhood_weights",
    "window_attention",
]

_LARGEST_RADIUS = 127
"""Upper bound of a radius: 65,025 taps per window. Published networks have radius 3."""


def adaptive_conv2d(padded: Tensor, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Correlate every pixel's window with that pixel's own weights, shared by all channels.

    out[b, c, y, x] = Σ_k weights[b, k, y, x] · padded[b, c, y + k // side, x + k % side], where
    k counts the taps of a window of radius r row by row and side = 2r + 1.

    Args:
        padded: (B, C, H+2r, W+2r), features padded by r pixels on every side.
        weights: (B, (2r+1)², H, W), taps row-major.
        backend: see the module's docstring.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run.

    Source: FeatUp, section 3.2 (the adaptive convolution).
    """
    weights = check_pair("padded", padded, weights)
    radius = window_radius(weights.shape[1])
    expected = (weights.shape[2] + 2 * radius, weights.shape[3] + 2 * radius)
    if tuple(padded.shape[-2:]) != expected:
        raise ValueError(
            f"padded is {size_of(padded)} but weights of {weights.shape[1]} taps at "
            f"{size_of(weights)} need {expected[0]}×{expected[1]}: pad by the radius ({radius}) on "
            "every side"
        )
    return dispatch.call("adaptive_conv2d", backend, padded, weights)


def joint_bilateral_upsample(features: Tensor, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Resize bicubically to the weights' size, reflect-pad, and filter with the weights.

    Args:
        features: (B, C, h, w).
        weights: (B, (2r+1)², H, W), taps row-major; H×W is the size of the output.
        backend: see the module's docstring.

    Returns:
        (B, C, H, W), equal to ``adaptive_conv2d(reflect_pad(bicubic(features)), weights)``.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend cannot run.

    Source: FeatUp, section 3.2, equation of one JBU stage.
    """
    weights = check_pair("features", features, weights)
    window_radius(weights.shape[1])
    check_not_empty("features", features)
    check_not_empty("weights", weights)
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

    out[b, c, p] = Σ_δ weights[b, δ, p] · features[b, c, cell(p) + δ] over offsets |δ|∞ ≤ r, edges
    replicated, where cell(p) = ⌊(p + ½)·h/H⌋ on each axis is the cell of pixel p.

    Args:
        features: (B, C, h, w); with ``cells``, only the features of these cells.
        weights: (B, (2r+1)², H, W), offsets row-major; with ``window``, only the weights of its
            pixels.
        output_size: (H, W) of the whole output; ``None`` for the size of ``weights``.
        window: (top, left, height, width) of the part of the output that is computed; ``None`` for
            the whole output.
        grid_size: (h, w) of the whole grid; ``None`` for the size of ``features``.
        cells: (top, left, height, width) of the part of the grid that ``features`` contains, which
            must include all cells that the window reads; ``None`` for the whole grid.
        backend: see the module's docstring.

    Returns:
        (B, C, H, W), or with ``window`` (B, C, height, width).

    Raises:
        ValueError: shapes, dtypes or devices disagree, the window is not inside the output, the
            cells are not inside the grid or lack cells that the window reads, or the backend cannot
            run.
    """
    weights = check_pair("features", features, weights)
    radius = window_radius(weights.shape[1])
    check_not_empty("features", features)
    check_not_empty("weights", weights)
    fine = check_window("weights", weights, output_size, window)
    coarse = check_window("features", features, grid_size, cells, whole="grid", part="cells")
    check_cells("features", features, coarse, weights.shape, fine, radius)
    return dispatch.call("neighbourhood_upsample", backend, features, weights, *fine, *coarse)


def bilateral_weights(
    keys: Tensor,
    temperature: Tensor | float,
    sigma_spatial: Tensor | float,
    *,
    radius: int = 3,
    backend: str = "auto",
) -> Tensor:
    """Range kernel times spatial kernel, normalised over the window of each pixel.

    The range kernel of pixel p is the softmax over the offsets δ of its window of
    temperature·⟨keys[p], keys[p+δ]⟩, with keys reflect-padded. The spatial kernel is
    exp(−|u|²/(2·sigma_spatial²)), where u in [−1, 1]² is δ as a fraction of the radius.

    Args:
        keys: (B, D, H, W).
        temperature: scalar that multiplies the inner products.
        sigma_spatial: scalar standard deviation, as a fraction of the radius; not 0.
        radius: radius r of the window in pixels, ≥ 0.
        backend: see the module's docstring.

    Returns:
        (B, (2r+1)², H, W), taps row-major, non-negative, summing to 1 at every pixel.

    Raises:
        ValueError: keys is not (B, D, H, W), the radius is negative, or the backend cannot run.

    Source: FeatUp, section 3.2 (range and spatial kernels).
    """
    check_tensor("keys", keys)
    radius = whole("radius", radius, 0, _LARGEST_RADIUS)
    check_not_empty("keys", keys)
    temperature = scalar("temperature", temperature, keys)
    sigma_spatial = scalar("sigma_spatial", sigma_spatial, keys, divisor=True)
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
    """Compute the weight of each coarse cell around every pixel's own cell.

    weights[b, δ, p] = softmax over offsets |δ|∞ ≤ r of temperature·⟨queries[p], keys[cell(p) + δ]⟩
    − |p − centre(cell(p) + δ)|²/(2·sigma²). Distances are in cells: on each axis, pixel p is at
    (p + ½)·h/H and the centre of cell i at i + ½ (align_corners=False). Beyond the edges, keys are
    replicated, but the centres of cells continue on the grid. A cell farther than r + ½ along an
    axis has weight 0: a pixel on the border of two cells then has as many cells on either side, and
    the weights of a flipped image are the flipped weights.

    Args:
        queries: (B, D, H, W); with ``window``, only the queries of its pixels.
        keys: (B, D, h, w); with ``cells``, only the keys of these cells.
        temperature: scalar that multiplies the inner products.
        sigma: scalar standard deviation of the Gaussian of distance, in cells; not 0.
        radius: radius r in cells, ≥ 1.
        output_size: (H, W) of the whole output; ``None`` for the size of ``queries``.
        window: (top, left, height, width) of the part of the output that is computed; ``None`` for
            the whole output.
        grid_size: (h, w) of the whole grid; ``None`` for the size of ``keys``.
        cells: (top, left, height, width) of the part of the grid that ``keys`` contains, which must
            include all cells that the window reads; ``None`` for the whole grid.
        backend: see the module's docstring.

    Returns:
        (B, (2r+1)², H, W), or with ``window`` (B, (2r+1)², height, width): offsets row-major,
        non-negative, summing to 1 at every pixel.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the window is not inside the output, the
            cells are not inside the grid or lack cells that the window reads, the radius is below
            1, or the backend cannot run.
    """
    keys = check_pair("queries", queries, keys, other="keys")
    radius = whole("radius", radius, 1, _LARGEST_RADIUS)
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"queries have {queries.shape[1]} channels and keys {keys.shape[1]}; they must agree"
        )
    check_not_empty("queries", queries)
    check_not_empty("keys", keys)
    fine = check_window("queries", queries, output_size, window)
    coarse = check_window("keys", keys, grid_size, cells, whole="grid", part="cells")
    check_cells("keys", keys, coarse, queries.shape, fine, radius)
    scalars = (
        scalar("temperature", temperature, queries),
        scalar("sigma", sigma, queries, divisor=True),
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

    Head n reads block n of the D channels of queries and keys: its weights are the softmax over the
    pixel's cells of scale·⟨queries, keys⟩. Either the heads' weights are averaged and applied to
    all values, or each head's weights are applied to a block of the values' channels of its own.
    The rectangle of a pixel consists of the cells in the range of rows for the pixel's row and in
    the range of columns for its column.

    Args:
        queries: (B, D, H, W).
        keys: (B, D, h, w).
        values: (B, C, h, w), of any floating-point type, which is the type of the result.
        rows: 2·H numbers: for every row of pixels the first row of cells, then for every row of
            pixels one past the last.
        columns: 2·W numbers: the columns of cells, in the order of ``rows``.
        heads: number N of heads, a divisor of D.
        blocks: number of channels of the values for each head, C in all; ``None`` or one number for
            the mean of the heads.
        scale: factor of the inner products; ``None`` for 1/√(D/N).
        backend: see the module's docstring.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: shapes, types or devices disagree, a range is empty or leaves the grid, or the
            backend cannot run.
    """
    keys = check_pair("queries", queries, keys, other="keys")
    check_tensor("values", values)
    for label, tensor in (("queries", queries), ("keys", keys), ("values", values)):
        check_not_empty(label, tensor)
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
    blocks = [values.shape[1]] if blocks is None else whole_numbers("blocks", blocks)
    if len(blocks) not in (1, heads) or sum(blocks) != values.shape[1] or min(blocks) < 0:
        raise ValueError(
            f"blocks={blocks} must be {heads} numbers of channels, or one, {values.shape[1]} in all"
        )
    rows, columns = whole_numbers("rows", rows), whole_numbers("columns", columns)
    for label, bounds, axis in (("rows", rows, 2), ("columns", columns, 3)):
        check_ranges(label, bounds, queries.shape[axis], keys.shape[axis])
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
