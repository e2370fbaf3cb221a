"""Downsamplers: high-resolution features back to the backbone's grid (FeatUp, section 3.2).

Geometry. The h×w grid is laid over the H×W map edge to edge (``align_corners=False``), so cell i is
centred, in pixel indices, at

    centre(i) = (i + 1/2) · H / h - 1/2.

A cell looks at a k×k patch of taps one pixel apart, placed symmetrically about that centre: tap t
sits at centre(i) + t - (k - 1)/2. Everything follows from this one rule:

* k = stride: the patches tile the map, each pixel belongs to one cell;
* k > stride: patches overlap, and those at the border reflect about the centre of the outermost
  pixel (as views are padded), so that every cell has k² taps and mirrored maps give mirrored grids;
* k and the stride of different parity, or a stride that is no whole number: taps fall between
  pixels and read them by bilinear interpolation. Nothing is rounded to one side.

Positions are computed as fractions of whole numbers, so taps that lie on pixels lie there exactly.

Computation. A downsampler is, per cell, a weighted sum over pixels. Interpolation, reflection and
the optional blur are linear, so they act on the cell's weights (one channel), never on the values
(C channels): what remains is one matrix product per row of cells (:func:`pool_patches`), which
reads the map in place and keeps no copy of it for the gradient. Given its weights it is linear in
the values, so values may be projected to few channels first, and a saliency computed before
upsampling (the 1×1 convolution commutes with it) can be handed in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from upfeat.views import reflect

_BLUR_SIZE = 5
_BLUR_SIGMA = 1.0
# Cells of a row that share one matrix product. Their matrix is mostly zeros outside each cell's own
# columns, so very wide maps are cut into runs; 16 keeps the products large and the waste small.
_RUN = 16


class SimpleDownsampler(nn.Module):
    """One learned blur, the same for every cell: a k×k kernel, non-negative, of sum 1."""

    def __init__(self, kernel_size: int) -> None:
        """Start from a box.

        Args:
            kernel_size: taps per side, k; usually the backbone's stride, about twice it for the
                implicit upsampler.

        Raises:
            ValueError: a kernel size below 1.
        """
        super().__init__()
        self.kernel_size = _check_kernel_size(kernel_size)
        self.kernel_weight = nn.Parameter(torch.ones(kernel_size, kernel_size))

    def kernel(self) -> Tensor:
        """Return the blur that is applied: (k, k), non-negative, of sum 1."""
        positive = self.kernel_weight.abs()
        return positive / positive.sum().clamp(min=torch.finfo(positive.dtype).tiny)

    def forward(self, values: Tensor, output_size: tuple[int, int]) -> Tensor:
        """Downsample maps to the backbone's grid.

        Args:
            values: (B, C, H, W) features at image resolution; any size and aspect.
            output_size: (h, w) cells of the backbone's grid, at most (H, W).

        Returns:
            (B, C, h, w).
        """
        height, width = output_size
        weights = self.kernel().expand(1, height, width, -1, -1)
        return pool_patches(values, weights)


class AttentionDownsampler(nn.Module):
    """A blur that follows the content: softmax weights from a learned saliency (section 3.2).

    Per cell, weights = softmax over its k×k taps of (saliency · w + b), where saliency is a linear
    map of the features and w, b are learned (k, k); the cell is the weighted sum of its taps.
    """

    def __init__(
        self,
        embed_dim: int,
        kernel_size: int,
        *,
        blur: bool = False,
        dropout: float = 0.2,
        generator: torch.Generator | None = None,
    ) -> None:
        """Start close to a box: w about 1, b about 0.

        Args:
            embed_dim: channels C of the features that the saliency is computed from.
            kernel_size: taps per side, k; usually the backbone's stride, about twice it for the
                implicit upsampler.
            blur: first blur the features with a 5×5 Gaussian of sigma 1.
            dropout: while training, the share of cells whose saliency is set to zero, which leaves
                them softmax(b). The published code did this in evaluation too.
            generator: source of the initial values; the global one by default.

        Raises:
            ValueError: a parameter outside its range.
        """
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, got {embed_dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}; use 0 for none")
        self.embed_dim = embed_dim
        self.kernel_size = _check_kernel_size(kernel_size)
        self.blur = blur
        self.dropout = dropout
        self.saliency_weight = nn.Parameter(torch.empty(1, embed_dim))
        self.saliency_bias = nn.Parameter(torch.empty(1))
        self.w = nn.Parameter(torch.empty(kernel_size, kernel_size))
        self.b = nn.Parameter(torch.empty(kernel_size, kernel_size))
        self.reset_parameters(generator=generator)

    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """Draw the initial values: w about 1, b about 0, saliency as a fresh linear layer."""
        bound = 1 / math.sqrt(self.embed_dim)
        with torch.no_grad():
            self.saliency_weight.uniform_(-bound, bound, generator=generator)
            self.saliency_bias.uniform_(-bound, bound, generator=generator)
            self.w.normal_(1, 0.01, generator=generator)
            self.b.normal_(0, 0.01, generator=generator)

    def extra_repr(self) -> str:
        """Return the settings, for printing."""
        return (
            f"{self.embed_dim}, kernel_size={self.kernel_size}, blur={self.blur}, "
            f"dropout={self.dropout}"
        )

    def saliency(self, features: Tensor) -> Tensor:
        """Return the saliency of features at any resolution: a linear map of their channels.

        Being linear it commutes with upsampling and warping: saliency(up(features)) equals
        up(saliency(features)) for upsamplers whose weights sum to 1; otherwise append
        ``saliency_weight`` to the projection, upsample, and add ``saliency_bias`` after.

        Args:
            features: (B, embed_dim, H, W).

        Returns:
            (B, 1, H, W).

        Raises:
            ValueError: another number of channels.
        """
        if features.ndim != 4 or features.shape[1] != self.embed_dim:
            shape = tuple(features.shape)
            raise ValueError(
                f"features must have shape (B, {self.embed_dim}, H, W), got {shape}; if these are "
                "projected values, pass the saliency of the whole features as saliency="
            )
        return functional.conv2d(
            features, self.saliency_weight[..., None, None], self.saliency_bias
        )

    def weights(
        self,
        saliency: Tensor,
        output_size: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return every cell's weights, non-negative and of sum 1.

        Args:
            saliency: (B, 1, H, W) from :meth:`saliency`, at the resolution of the values.
            output_size: (h, w) cells of the backbone's grid.
            generator: source of the dropout while training; the global one by default.

        Returns:
            (B, h, w, K, K), where K is k, or k + 4 with the blur folded in.
        """
        _check_grid(saliency, output_size)
        if saliency.shape[1] != 1:
            raise ValueError(f"saliency must have one channel, got {tuple(saliency.shape)}")
        if self.blur:
            saliency = gaussian_blur(saliency)
        patches = _sample_patches(saliency, output_size, self.kernel_size)
        if self.training and self.dropout > 0:
            patches = patches * self._kept(patches, generator)
        logits = patches * self.w + self.b
        weights = logits.flatten(-2).softmax(-1).view_as(logits)  # (B, h, w, k, k)
        return _blurred_weights(weights) if self.blur else weights

    def forward(
        self,
        values: Tensor,
        output_size: tuple[int, int],
        *,
        saliency: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Downsample maps to the backbone's grid.

        Args:
            values: (B, C, H, W) features at image resolution, or any linear map of their channels
                when ``saliency`` is given.
            output_size: (h, w) cells of the backbone's grid, at most (H, W).
            saliency: (B, 1, H, W); computed from the values by default.
            generator: source of the dropout while training; the global one by default.

        Returns:
            (B, C, h, w).

        Raises:
            ValueError: shapes that do not fit together.
        """
        if saliency is None:
            saliency = self.saliency(values)
        elif saliency.shape[-2:] != values.shape[-2:] or len(saliency) != len(values):
            raise ValueError(
                f"saliency must match values {tuple(values.shape)} in batch and size, got "
                f"{tuple(saliency.shape)}; upsample and warp both alike"
            )
        return pool_patches(values, self.weights(saliency, output_size, generator=generator))

    def _kept(self, patches: Tensor, generator: torch.Generator | None) -> Tensor:
        shape = (*patches.shape[:3], 1, 1)
        device = generator.device if generator is not None else patches.device
        draw = torch.rand(shape, generator=generator, device=device)
        return (draw >= self.dropout).to(patches)


def pool_patches(values: Tensor, weights: Tensor) -> Tensor:
    """Return each cell's weighted sum over its patch; linear in values and in weights.

    Differentiable in both arguments; the gradient keeps no copy of the patches.

    Args:
        values: (B, C, H, W).
        weights: (B or 1, h, w, k, k), placed by the rule at the top of this module.

    Returns:
        (B, C, h, w), in the type of the values.

    Raises:
        ValueError: shapes that do not fit together, or a grid finer than the map.
    """
    if weights.ndim != 5 or weights.shape[3] != weights.shape[4]:
        raise ValueError(f"weights must have shape (B, h, w, k, k), got {tuple(weights.shape)}")
    height, width = weights.shape[1:3]
    _check_grid(values, (height, width))
    if len(weights) not in (1, len(values)):
        raise ValueError(f"weights must be for 1 or {len(values)} maps, got {len(weights)}")
    batch, channels = values.shape[:2]
    work = torch.promote_types(values.dtype, torch.float32)
    maps = values.to(work)
    if len(weights) == 1:  # one kernel for all maps: their channels form one product
        maps = maps.reshape(1, batch * channels, *values.shape[2:])
    with torch.autocast(values.device.type, enabled=False):
        pooled = _PoolPatches.apply(maps, weights.to(work))
    return pooled.view(batch, channels, height, width).to(values.dtype)


def gaussian_blur(x: Tensor) -> Tensor:
    """Blur maps with a 5×5 Gaussian of sigma 1 pixel, reflected at the border.

    Args:
        x: (B, C, H, W), any size.

    Returns:
        (B, C, H, W).
    """
    channels = x.shape[1]
    taps = _gaussian().to(x)
    margin = _BLUR_SIZE // 2
    if min(x.shape[2:]) > margin:
        x = functional.pad(x, (margin,) * 4, mode="reflect")
    else:  # torch does not reflect a map smaller than its border
        for axis in (2, 3):
            n = x.shape[axis]
            index = reflect(torch.arange(-margin, n + margin, device=x.device), n)
            x = x.index_select(axis, index)
    x = functional.conv2d(x, taps.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return functional.conv2d(
        x, taps.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels
    )


class _Taps(NamedTuple):
    """Where the taps of every cell along one axis lie: between two pixels, inside the map."""

    low: Tensor  # (cells, k) index of the pixel before
    high: Tensor  # (cells, k) index of the pixel after
    fraction: Tensor  # (cells, k) weight of the pixel after, float64 in [0, 1)


class _Span(NamedTuple):
    """A run of cells along one axis, the pixels they read, and how their taps read them."""

    cells: slice
    pixels: slice
    reading: Tensor  # (cells, k, pixels), rows of sum 1


@lru_cache(maxsize=64)
def _taps(pixels: int, cells: int, kernel_size: int) -> _Taps:
    """Positions centre(i) + t - (k - 1)/2, in whole numbers of 1 / (2 · cells) pixels."""
    cell = torch.arange(cells)[:, None]
    tap = torch.arange(kernel_size)[None]
    position = (2 * cell + 1) * pixels + (2 * tap - kernel_size) * cells
    low = torch.div(position, 2 * cells, rounding_mode="floor")
    fraction = (position - low * 2 * cells).double() / (2 * cells)
    high = torch.where(fraction > 0, low + 1, low)
    return _Taps(reflect(low, pixels), reflect(high, pixels), fraction)


@lru_cache(maxsize=64)
def _spans(
    pixels: int, cells: int, kernel_size: int, run: int, dtype: torch.dtype, device: torch.device
) -> tuple[_Span, ...]:
    """Cut an axis into runs of cells and give each the pixels that it reads."""
    taps = _taps(pixels, cells, kernel_size)
    spans = []
    for start in range(0, cells, run):
        low, high, fraction = (part[start : start + run] for part in taps)
        first = int(torch.minimum(low, high).min())
        last = int(torch.maximum(low, high).max()) + 1
        reading = torch.zeros(*low.shape, last - first, dtype=torch.float64)
        reading.scatter_add_(-1, (low - first)[..., None], (1 - fraction)[..., None])
        reading.scatter_add_(-1, (high - first)[..., None], fraction[..., None])
        spans.append(
            _Span(slice(start, start + len(low)), slice(first, last), reading.to(device, dtype))
        )
    return tuple(spans)


def _sample_patches(x: Tensor, output_size: tuple[int, int], kernel_size: int) -> Tensor:
    """The taps of a one-channel map: (B, 1, H, W) -> (B, h, w, k, k)."""
    x = x[:, 0]
    for axis, cells in zip((1, 2), output_size, strict=True):
        low, high, fraction = _taps(x.shape[axis], cells, kernel_size)
        near = x.index_select(axis, low.flatten().to(x.device))
        if bool((fraction > 0).any()):
            share = fraction.flatten().to(x.device, x.dtype)
            far = x.index_select(axis, high.flatten().to(x.device))
            near = torch.lerp(near, far, share[:, None] if axis == 1 else share)
        x = near
    height, width = output_size
    x = x.view(-1, height, kernel_size, width, kernel_size)
    return x.transpose(2, 3)  # (B, h, w, k, k)


class _PoolPatches(torch.autograd.Function):
    """Values (B, C, H, W) and weights (B, h, w, k, k) to (B, C, h, w), one row of cells at a time.

    The weights of a run of cells are first spread over the pixels that the run reads, which undoes
    interpolation and reflection; the values are then read where they lie.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(values, weights)
        out = values.new_empty(*values.shape[:2], *weights.shape[1:3])
        for row, span in _runs(values, weights):
            spread = _spread(weights, row, span)  # (B, cells, pixels)
            out[:, :, row.cells.start, span.cells] = _window(values, row, span) @ spread.mT
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        values, weights = ctx.saved_tensors
        for_values, for_weights = ctx.needs_input_grad
        grad_values = torch.zeros_like(values) if for_values else None
        grad_weights = torch.empty_like(weights) if for_weights else None
        for row, span in _runs(values, weights):
            part = grads[0][:, :, row.cells.start, span.cells]  # (B, C, cells)
            if grad_values is not None:
                target = grad_values[:, :, row.pixels, span.pixels]
                target += (part @ _spread(weights, row, span)).view_as(target)
            if grad_weights is not None:
                spread = part.mT @ _window(values, row, span)  # (B, cells, pixels)
                grad_weights[:, row.cells.start, span.cells] = _gather(spread, row, span)
        return grad_values, grad_weights


def _runs(values: Tensor, weights: Tensor) -> Iterator[tuple[_Span, _Span]]:
    """Every row of cells with every run of columns."""
    (height, width), (rows, columns, kernel_size) = values.shape[2:], weights.shape[1:4]
    kind = values.dtype, values.device
    return product(
        _spans(height, rows, kernel_size, 1, *kind),
        _spans(width, columns, kernel_size, _RUN, *kind),
    )


def _window(values: Tensor, row: _Span, span: _Span) -> Tensor:
    """The pixels that a run reads, (B, C, pixels): no copy where the run spans the whole width."""
    return values[:, :, row.pixels, span.pixels].flatten(2)


def _spread(weights: Tensor, row: _Span, span: _Span) -> Tensor:
    """A run's weights over its pixels: (B, cells, k, k) taps -> (B, cells, pixels)."""
    spread = weights[:, row.cells.start, span.cells] @ span.reading  # (B, cells, k, columns)
    return (row.reading[0].T @ spread).flatten(2)


def _gather(spread: Tensor, row: _Span, span: _Span) -> Tensor:
    """The transpose of ``_spread``: (B, cells, pixels) -> (B, cells, k, k)."""
    rows = row.pixels.stop - row.pixels.start
    spread = spread.unflatten(2, (rows, -1))
    return (row.reading[0] @ spread) @ span.reading.mT


def _blurred_weights(weights: Tensor) -> Tensor:
    """Weights on blurred values, as weights on the values: (…, k, k) -> (…, k + 4, k + 4)."""
    kernel_size, taps = weights.shape[-1], _gaussian().to(weights)
    matrix = weights.new_zeros(kernel_size + _BLUR_SIZE - 1, kernel_size)
    for shift, tap in enumerate(taps):
        matrix.diagonal(-shift).fill_(tap)
    return matrix @ weights @ matrix.T


def _gaussian() -> Tensor:
    offset = torch.arange(_BLUR_SIZE, dtype=torch.float64) - _BLUR_SIZE // 2
    taps = torch.exp(-offset.square() / (2 * _BLUR_SIGMA**2))
    return taps / taps.sum()


def _check_kernel_size(kernel_size: int) -> int:
    if kernel_size < 1:
        raise ValueError(
            f"kernel_size must be at least 1, got {kernel_size}; use the backbone's stride"
        )
    return kernel_size


def _check_grid(values: Tensor, output_size: tuple[int, int]) -> None:
    if values.ndim != 4:
        raise ValueError(f"values must have shape (B, C, H, W), got {tuple(values.shape)}")
    height, width = values.shape[2:]
    if not (1 <= output_size[0] <= height and 1 <= output_size[1] <= width):
        raise ValueError(
            f"output_size must lie between (1, 1) and the map's ({height}, {width}), got "
            f"{tuple(output_size)}; a downsampler needs features finer than the grid"
        )
