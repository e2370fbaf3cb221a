"""Downsamplers: high-resolution features back to the backbone's grid (FeatUp, section 3.2).

A downsampler computes each cell as a weighted sum over a patch of pixels; :mod:`upfeat.pooling`
defines the position of the patch. The optional blur is linear, so it is applied to the cell's
weights (one channel) instead of the values (C channels). For given weights a downsampler is linear
in the values, which may therefore be projected to few channels first. The saliency is then passed
as an argument. Its 1×1 convolution commutes with upsampling and may be applied first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from upfeat.bounds import flag, instance, number, whole
from upfeat.geometry import reflect
from upfeat.pooling import check_grid, pool_patches, repeat_maps, sample_patches
from upfeat.randomness import device_of, draw_normal, draw_uniform
from upfeat.views import Jitter
from upfeat.warp import check_map, warp

__all__ = [
    "AttentionDownsampler",
    "CellDownsampler",
    "SimpleDownsampler",
    "gaussian_blur",
    "pool_patches",
]

_BLUR_SIZE = 5
_BLUR_SIGMA = 1.0
# Learning rate of the logits relative to other parameters: they are few and have a large effect.
_CELL_RATE = 10.0
_LARGEST_KERNEL = 1 << 12


class SimpleDownsampler(nn.Module):
    """Downsampler with one learned blur for all cells: a k×k kernel, non-negative, of sum 1."""

    def __init__(self, kernel_size: int) -> None:
        """Initialise the kernel to equal weights.

        Args:
            kernel_size: taps per side, k; usually the backbone's stride, or about twice the stride
                for the implicit upsampler.

        Raises:
            ValueError: ``kernel_size`` is below 1.
        """
        super().__init__()
        self.kernel_size = whole("kernel_size", kernel_size, 1, _LARGEST_KERNEL)
        self.kernel_weight = nn.Parameter(torch.ones(self.kernel_size, self.kernel_size))

    def kernel(self) -> Tensor:
        """Return the normalised kernel: (k, k), non-negative, of sum 1."""
        positive = self.kernel_weight.abs()
        return positive / positive.sum().clamp(min=torch.finfo(positive.dtype).tiny)

    def forward(
        self,
        values: Tensor,
        output_size: tuple[int, int],
        *,
        jitter: Jitter | None = None,
    ) -> Tensor:
        """Downsample maps to the backbone's grid.

        Args:
            values: (B, C, H, W), features at image resolution, of any size and aspect ratio.
            output_size: (h, w) of the backbone's grid, in cells, at most (H, W).
            jitter: N views, view n of map n mod B, to downsample instead of the maps. The result is
                that of warping the maps first, but no warped map is allocated.

        Returns:
            (B, C, h, w); with ``jitter``, (N, C, h, w).
        """
        views = _matrices(jitter, values)
        check_grid(values, output_size, views)
        weights = self.kernel().expand(1, *output_size, -1, -1)
        return pool_patches(values, weights, views=views)


class CellDownsampler(nn.Module):
    """Downsampler that averages each cell, then applies one learned blur to the cells around it.

    It equals a :class:`SimpleDownsampler` with a kernel of ``blur_size`` strides that is constant
    within each cell. The kernel is wider than a cell because a backbone's features depend on more
    pixels than their cell's; this lets the upsampled features be sharper than the backbone's. The
    cost is small: a view and the mean over its cells are combined into one matrix per axis, so that
    no view is computed at the image's size.
    """

    def __init__(self, blur_size: int = 5) -> None:
        """Initialise the blur with nearly all weight on the central cell.

        Args:
            blur_size: side of the blur in cells, odd.

        Raises:
            ValueError: ``blur_size`` is even or below 1.
        """
        super().__init__()
        self.blur_size = blur_size = whole("blur_size", blur_size, 1, _LARGEST_KERNEL)
        if blur_size % 2 == 0:
            raise ValueError(f"blur_size={blur_size} must be odd")
        self.logits = nn.Parameter(torch.full((blur_size, blur_size), -0.8))
        with torch.no_grad():
            self.logits[blur_size // 2, blur_size // 2] = 0.0

    def kernel(self) -> Tensor:
        """Return the blur over cells: (blur_size, blur_size), positive, of sum 1."""
        return (_CELL_RATE * self.logits).flatten().softmax(0).view_as(self.logits)

    def forward(
        self,
        values: Tensor,
        output_size: tuple[int, int],
        *,
        jitter: Jitter | None = None,
    ) -> Tensor:
        """Downsample maps to the backbone's grid.

        Args:
            values: (B, C, H, W), features at image resolution, of any size and aspect ratio.
            output_size: (h, w) of the backbone's grid, in cells, at most (H, W).
            jitter: N views, view n of map n mod B, to downsample instead of the maps.

        Returns:
            (B, C, h, w); with ``jitter``, (N, C, h, w).
        """
        check_grid(values, output_size)
        if jitter is None:
            means = functional.adaptive_avg_pool2d(values, output_size)
        else:
            means = self._means_of_views(values, output_size, jitter)
        around = functional.pad(means, (self.blur_size // 2,) * 4, mode="replicate")
        blurred = functional.conv2d(
            around.flatten(0, 1)[:, None], self.kernel()[None, None].to(means)
        )
        return blurred.view_as(means)

    def _means_of_views(
        self, values: Tensor, output_size: tuple[int, int], jitter: Jitter
    ) -> Tensor:
        batch, views = len(values), _matrices(jitter, values)
        assert views is not None
        if len(jitter) % batch:
            raise ValueError(
                f"{len(jitter)} views cannot be of {batch} maps alike; give each as many"
            )
        rows, columns = (
            functional.adaptive_avg_pool1d(matrix.mT, cells).mT
            for matrix, cells in zip(views, output_size, strict=True)
        )
        # One view of every map at a time, so that maps need not be repeated in memory.
        rounds = [
            warp(values, rows[start : start + batch], columns[start : start + batch])
            for start in range(0, len(rows), batch)
        ]
        return torch.cat(rounds)


class AttentionDownsampler(nn.Module):
    """Downsampler whose weights depend on the content, by a learned saliency (section 3.2).

    The weights of a cell are the softmax of saliency · w + b over its k×k taps. Saliency is a
    linear map of the features to one channel, and w and b are learned, (k, k). The cell is the
    weighted sum of its taps.
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
        """Draw initial values with w about 1 and b about 0.

        Args:
            embed_dim: channels C of the features that the saliency is computed from.
            kernel_size: taps per side, k; usually the backbone's stride, or about twice the stride
                for the implicit upsampler.
            blur: first blur the features with a 5×5 Gaussian of sigma 1 pixel.
            dropout: fraction of cells whose saliency is set to 0 in training, in [0, 1); their
                weights are then softmax(b). The published code did this in evaluation too.
            generator: source of the initial values; ``None`` for PyTorch's global generator.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__()
        self.embed_dim = embed_dim = whole("embed_dim", embed_dim)
        self.kernel_size = kernel_size = whole("kernel_size", kernel_size, 1, _LARGEST_KERNEL)
        self.blur = flag("blur", blur)
        self.dropout = number("dropout", dropout, 0, 1, below=True)
        self.saliency_weight = nn.Parameter(torch.empty(1, embed_dim))
        self.saliency_bias = nn.Parameter(torch.empty(1))
        self.w = nn.Parameter(torch.empty(kernel_size, kernel_size))
        self.b = nn.Parameter(torch.empty(kernel_size, kernel_size))
        self.reset_parameters(generator=generator)

    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        """Draw initial values: w about 1, b about 0, the saliency as ``nn.Linear`` does."""
        bound = 1 / math.sqrt(self.embed_dim)
        draw_uniform(self.saliency_weight, -bound, bound, generator)
        draw_uniform(self.saliency_bias, -bound, bound, generator)
        draw_normal(self.w, 1, 0.01, generator)
        draw_normal(self.b, 0, 0.01, generator)

    def extra_repr(self) -> str:
        """Return the settings, for ``repr``."""
        return (
            f"{self.embed_dim}, kernel_size={self.kernel_size}, blur={self.blur}, "
            f"dropout={self.dropout}"
        )

    def saliency(self, features: Tensor) -> Tensor:
        """Return the saliency of features at any resolution: a linear map of their channels.

        A linear map of channels commutes with upsampling and warping: saliency(up(features)) equals
        up(saliency(features)) for upsamplers whose weights sum to 1. For other upsamplers, append
        ``saliency_weight`` to the projection, upsample, and then add ``saliency_bias``.

        Args:
            features: (B, embed_dim, H, W).

        Returns:
            (B, 1, H, W).

        Raises:
            ValueError: ``features`` does not have ``embed_dim`` channels.
        """
        check_map("features", features)
        if features.shape[1] != self.embed_dim:
            shape = tuple(features.shape)
            raise ValueError(
                f"features must have shape (B, {self.embed_dim}, H, W), got {shape}; if these are "
                "projected values, pass the saliency of the whole features as saliency="
            )
        weight = self.saliency_weight[..., None, None].to(features)
        return functional.conv2d(features, weight, self.saliency_bias.to(features))

    def weights(
        self,
        saliency: Tensor,
        output_size: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the weights of every cell, non-negative and of sum 1.

        Args:
            saliency: (B, 1, H, W) from :meth:`saliency`, at the resolution of the values.
            output_size: (h, w) of the backbone's grid, in cells.
            generator: source of the dropout in training; ``None`` for PyTorch's global generator.

        Returns:
            (B, h, w, K, K), where K is k, or k + 4 with ``blur``, which the weights include.
        """
        check_grid(saliency, output_size)
        if saliency.shape[1] != 1:
            raise ValueError(f"saliency must have one channel, got {tuple(saliency.shape)}")
        if self.blur:
            saliency = gaussian_blur(saliency)
        patches = sample_patches(saliency, output_size, self.kernel_size)
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
        jitter: Jitter | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Downsample maps to the backbone's grid.

        Args:
            values: (B, C, H, W), features at image resolution, or any linear map of their channels
                if ``saliency`` is given.
            output_size: (h, w) of the backbone's grid, in cells, at most (H, W).
            saliency: (B, 1, H, W); ``None`` to compute it from ``values``.
            jitter: N views, view n of map n mod B, to downsample instead of the maps. The result is
                that of warping values and saliency first, but only the saliency is warped.
            generator: source of the dropout in training; ``None`` for PyTorch's global generator.

        Returns:
            (B, C, h, w); with ``jitter``, (N, C, h, w).

        Raises:
            ValueError: the shapes of values, saliency, views and grid do not match.
        """
        check_map("values", values)
        if saliency is None:
            saliency = self.saliency(values)
        elif saliency.shape[-2:] != values.shape[-2:] or len(saliency) != len(values):
            raise ValueError(
                f"saliency must match values {tuple(values.shape)} in batch and size, got "
                f"{tuple(saliency.shape)}; upsample and warp both alike"
            )
        views = _matrices(jitter, values)
        if views is not None:
            saliency = warp(repeat_maps(saliency, len(views[0])), *views)
        weights = self.weights(saliency, output_size, generator=generator)
        return pool_patches(values, weights, views=views)

    def _kept(self, patches: Tensor, generator: torch.Generator | None) -> Tensor:
        shape = (*patches.shape[:3], 1, 1)
        device = device_of(generator, patches.device)
        draw = torch.rand(shape, generator=generator, device=device)
        return (draw >= self.dropout).to(patches)


def gaussian_blur(x: Tensor) -> Tensor:
    """Blur maps with a 5×5 Gaussian of sigma 1 pixel, reflected at the border.

    Args:
        x: (B, C, H, W), any size.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: ``x`` is not (B, C, H, W).
    """
    check_map("x", x)
    channels = x.shape[1]
    taps = _gaussian().to(x)
    margin = _BLUR_SIZE // 2
    if min(x.shape[2:]) > margin:
        x = functional.pad(x, (margin,) * 4, mode="reflect")
    else:  # PyTorch cannot reflect a map that is smaller than the margin
        for axis in (2, 3):
            n = x.shape[axis]
            index = reflect(torch.arange(-margin, n + margin, device=x.device), n)
            x = x.index_select(axis, index)
    x = functional.conv2d(x, taps.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return functional.conv2d(
        x, taps.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels
    )


def _matrices(jitter: Jitter | None, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Matrices, one set per axis, that warp maps to the views; ``None`` without views."""
    check_map("values", values)
    if jitter is None:
        return None
    instance("jitter", jitter, Jitter, "give views, as sample_jitters() draws them")
    size = (values.shape[2], values.shape[3])
    work = torch.promote_types(values.dtype, torch.float32)
    return jitter.matrices(size, dtype=work, device=values.device)


def _blurred_weights(weights: Tensor) -> Tensor:
    """Combine weights of blurred values with the blur: (…, k, k) -> (…, k + 4, k + 4)."""
    kernel_size, taps = weights.shape[-1], _gaussian().to(weights)
    matrix = weights.new_zeros(kernel_size + _BLUR_SIZE - 1, kernel_size)
    for shift, tap in enumerate(taps):
        matrix.diagonal(-shift).fill_(tap)
    return matrix @ weights @ matrix.T


def _gaussian() -> Tensor:
    offset = torch.arange(_BLUR_SIZE, dtype=torch.float64) - _BLUR_SIZE // 2
    taps = torch.exp(-offset.square() / (2 * _BLUR_SIGMA**2))
    return taps / taps.sum()
