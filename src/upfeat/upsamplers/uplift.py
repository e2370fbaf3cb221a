"""UPLiFT: the grid is doubled up to four times; each pixel sums 17 cells around its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat import functional
from upfeat.backends import dispatch
from upfeat.bounds import MOST_CHANNELS, shown, whole
from upfeat.resampling import bilinear, resample, resize
from upfeat.transforms import is_transforming
from upfeat.types import Size, Window
from upfeat.upsamplers.base import UPSAMPLERS, Kernels
from upfeat.upsamplers.convolution_block import ConvolutionBlock, convolve
from upfeat.upsamplers.maps import Map, is_recorded
from upfeat.upsamplers.published import PublishedUpsampler, in_own_precision

_CELL = 16
"""Pixels per cell of the image that the encoder reads, whatever the backbone's patches."""
_MOST_DOUBLINGS = 4
"""After four, a cell has become 16×16 pixels, and the encoder has no finer map to offer."""
MOST_BLOCKS = 8
"""Most blocks of the encoder; the published have 5."""
_CHANNELS = 64
"""Channels whose last map is computed at once."""
_WINDOW = tuple((row, column) for row in range(-2, 3) for column in range(-2, 3))
NEIGHBOURS = tuple(at for at in _WINDOW if sorted(map(abs, at)) != [1, 2])
"""The 17 cells that a pixel sums, as rows and columns counted from its own cell: of 5×5 cells, all
but those a knight's move away."""


class DoublingKernels:
    """Weights of every doubling of one image's grid, and the size that the last map is brought to.

    Attributes:
        weights: of each doubling, (B, 25, H, W) for the 5×5 cells around each pixel's own.
    """

    def __init__(self, weights: Sequence[Tensor], output_size: Size, backend: str) -> None:
        """Keep the weights.

        Args:
            weights: at least one, see :attr:`weights`.
            output_size: (height, width) of the result.
            backend: backend of the operator; see :mod:`upfeat.functional`.
        """
        self.weights = list(weights)
        self.grid_size = (self.weights[0].shape[2] // 2, self.weights[0].shape[3] // 2)
        self.output_size = output_size
        self.backend = backend

    def __call__(self, features: Tensor) -> Tensor:
        """Upsample features, (B, C, h, w) -> (B, C, H, W)."""
        last = self.weights[-1]
        fits = (last.shape[2], last.shape[3]) == self.output_size
        recorded = is_recorded(features, *self.weights)
        if fits or recorded or torch.compiler.is_compiling() or is_transforming():
            return self._upsample(features)
        # The last map is as large as the result, so only some of its channels exist at a time.
        out = features.new_empty(*features.shape[:2], *self.output_size)
        for part, target in zip(features.split(_CHANNELS, 1), out.split(_CHANNELS, 1), strict=True):
            target.copy_(self._upsample(part))
        return out

    def _upsample(self, features: Tensor) -> Tensor:
        for weights in self.weights:
            features = double(features, weights, backend=self.backend)
        size = (features.shape[2], features.shape[3])
        return features if size == self.output_size else resize(features, self.output_size)

    def crop(self, features: Tensor, window: Window) -> Tensor:
        """See :meth:`Kernels.crop`; the last doubling is computed in the window alone."""
        _, features = self.precompute(features)
        last = self.weights[-1]
        whole_size = (last.shape[2], last.shape[3])
        if whole_size == self.output_size:
            return double(features, last, window, backend=self.backend)
        rows, columns = (
            bilinear(
                length, target, torch.arange(start, stop), antialias=True, dtype=features.dtype
            )
            for length, target, start, stop in zip(
                whole_size,
                self.output_size,
                (window.top, window.left),
                (window.bottom, window.right),
                strict=True,
            )
        )
        read = Window(
            rows.first, columns.first, rows.stop - rows.first, columns.stop - columns.first
        )
        part = double(features, last, read, backend=self.backend)
        return resample(part, rows, columns, (read.top, read.left))

    def precompute(self, features: Tensor) -> tuple[DoublingKernels, Tensor]:
        """Apply all doublings but the last to the features; return the kernels of the last."""
        for weights in self.weights[:-1]:
            features = double(features, weights, backend=self.backend)
        return DoublingKernels(self.weights[-1:], self.output_size, self.backend), features


def double(
    features: Tensor, weights: Tensor, window: Window | None = None, *, backend: str = "auto"
) -> Tensor:
    """Sum the cells around the own cell of each pixel of a grid twice as fine.

    Args:
        features: (B, C, h, w).
        weights: (B, 25, 2h, 2w).
        window: window of the result; ``None`` for all of it.
        backend: backend of the operator; see :mod:`upfeat.functional`.

    Returns:
        (B, C, 2h, 2w), or (B, C, window.height, window.width), in the dtype of the features.
    """
    size = (weights.shape[2], weights.shape[3])
    place = None
    if window is not None:
        weights = weights[:, :, window.top : window.bottom, window.left : window.right]
        place = (window.top, window.left, window.height, window.width)
    return functional.neighbourhood_upsample(
        features, weights.to(features.dtype), output_size=size, window=place, backend=backend
    )


@UPSAMPLERS.register
class UPLiFT(PublishedUpsampler):
    """Repeated doubling of the grid by weights from a convolutional network of image and features.

    In each doubling, a pixel is a weighted mean of the 17 cells around its own, edges replicated.
    The network of all doublings is the same; it reads the features that the doubling before it
    returned, and two maps of an encoder of the image, which has 16 pixels per cell here, whatever
    the image's size. The grid is doubled until it is at least as large as the output, at most four
    times, and then brought to the output's size by antialiased bilinear interpolation. The weights
    depend on the features; for given weights, the output is linear in the features that they are
    applied to. An instance serves one backbone, as the network reads ``embed_dim`` channels.

    Source: Walmer et al., UPLiFT: Efficient Pixel-Dense Feature Upsampling with Local Attenders,
    2026.
    """

    name = "uplift"
    published_by = "mwalmer-umd/UPLiFT"
    needs_features = True

    def __init__(
        self,
        embed_dim: int,
        *,
        encoder_widths: Sequence[int] = (16, 32, 64, 128, 128),
        width: int = 64,
        backend: str = "auto",
    ) -> None:
        """Make an untrained upsampler; :func:`upfeat.load_upsampler` reads published weights.

        Args:
            embed_dim: number C of feature channels.
            encoder_widths: number of channels of each block of the image's encoder, 2 to 8 blocks.
            width: number of channels of the network that makes the weights, at least 17.
            backend: backend of the operators; see :mod:`upfeat.functional`.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__()
        dispatch.check_name(backend)
        self.backend = backend
        self.embed_dim = whole("embed_dim", embed_dim, 1, MOST_CHANNELS)
        self.encoder_widths = _widths(encoder_widths)
        self.width = whole("width", width, len(NEIGHBOURS), 1024)
        *_, fine, deep = self.encoder_widths
        self.encoder = nn.ModuleList(
            ConvolutionBlock(before, after, 1)
            for before, after in pairwise((3, *self.encoder_widths))
        )
        self.coarse_block = ConvolutionBlock(self.embed_dim + deep, self.width, 2)
        self.doubling = nn.ConvTranspose2d(self.width, self.width, 2, stride=2)
        self.fine_block = ConvolutionBlock(self.width + fine, self.width, 2)
        self.scores = nn.Conv2d(self.width, len(NEIGHBOURS), 1)

    def config(self) -> dict[str, Any]:
        """See :meth:`Upsampler.config`."""
        return {
            "embed_dim": self.embed_dim,
            "encoder_widths": list(self.encoder_widths),
            "width": self.width,
        }

    @in_own_precision
    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> DoublingKernels:
        """See :meth:`Upsampler.prepare`.

        Raises:
            ValueError: ``features`` is ``None``, or has another number of channels.
        """
        assert features is not None
        doublings = _doublings(grid_size, output_size)
        image, x = self.exact(guidance, features), self.exact(features, guidance)
        compiled = self.compiled(image, x)
        fine, deep = self._encode(image, grid_size, 2**doublings, compiled)
        weights: list[Tensor] = []
        for index in range(doublings):
            # Of the maps at 2^doublings pixels per cell, nearest-neighbour resampling takes the
            # first pixel of each cell of the current grid, and of the grid twice as fine.
            step = 2 ** (doublings - index - 1)
            seen = deep[:, :, ::step, ::step], fine[:, :, ::step, ::step]
            weights.append(self._weights(x, *seen, compiled))
            if index + 1 < doublings:
                x = double(x, weights[-1], backend=self.backend)
        return DoublingKernels(weights, output_size, self.backend)

    def precompute(self, kernels: Kernels, mixed: Tensor) -> tuple[Kernels, Tensor | Map]:
        """See :meth:`Upsampler.precompute`; all doublings but the last are applied."""
        assert isinstance(kernels, DoublingKernels)
        return kernels.precompute(mixed)

    def _encode(
        self, image: Tensor, grid_size: Size, finest: int, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        """Last two maps of the image's encoder: (B, ·, finest·h, finest·w), and half of that."""
        size = (_CELL * grid_size[0], _CELL * grid_size[1])
        x = image if tuple(image.shape[2:]) == size else resize(image, size)
        *blocks, last = self.encoder
        for block in blocks:
            x = block(x, compiled=compiled)
        step = _CELL // finest
        return x[:, :, ::step, ::step], last(x, 2 * step, compiled=compiled)

    def _weights(self, features: Tensor, deep: Tensor, fine: Tensor, compiled: bool) -> Tensor:
        """Weights of one doubling, (B, 25, 2h, 2w), from features (B, C, h, w) and the maps."""
        x = self.coarse_block(torch.cat([features, deep], dim=1), compiled=compiled)
        finer = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        weight, bias = self.doubling.weight.to(x.dtype), self.doubling.bias
        assert bias is not None
        x = F.conv_transpose2d(x, weight, bias.to(x.dtype), stride=2) + finer
        x = self.fine_block(torch.cat([x, fine], dim=1), compiled=compiled)
        scores = convolve(x, self.scores.weight, self.scores.bias)
        weights = (scores + x[:, : len(NEIGHBOURS)]).softmax(1)
        share = dict(zip(NEIGHBOURS, weights.unbind(1), strict=True))
        none = torch.zeros_like(weights[:, 0])
        return torch.stack([share.get(at, none) for at in _WINDOW], dim=1)


def _doublings(grid_size: Size, output_size: Size) -> int:
    """Doublings until the grid has the output's size on both axes, from one to four."""
    for doublings in range(1, _MOST_DOUBLINGS):
        if all(
            cells * 2**doublings >= side for cells, side in zip(grid_size, output_size, strict=True)
        ):
            return doublings
    return _MOST_DOUBLINGS


def _widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Check the widths of the encoder's blocks.

    Raises:
        ValueError: they are not 2 to 8 whole numbers in range.
    """
    if not isinstance(widths, list | tuple) or not 2 <= len(widths) <= MOST_BLOCKS:
        raise ValueError(f"encoder_widths={shown(widths)} must be 2 to {MOST_BLOCKS} widths")
    return tuple(whole("encoder_widths", width, 1, 1024) for width in widths)
