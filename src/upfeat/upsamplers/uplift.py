"""UPLiFT: the grid is doubled up to four times; each pixel sums 17 cells around its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.backends import dispatch
from upfeat.bounds import MOST_CHANNELS, shown, whole
from upfeat.resampling import corners, resample, resize
from upfeat.transforms import is_transforming
from upfeat.types import Size, Window
from upfeat.upsamplers.base import UPSAMPLERS, Kernels
from upfeat.upsamplers.convolution_block import ConvolutionBlock, convolve
from upfeat.upsamplers.doubling import DoublingKernels, double
from upfeat.upsamplers.maps import (
    TILE,
    Assembled,
    Map,
    cut,
    inside,
    is_recorded,
    widened,
    windows,
)
from upfeat.upsamplers.published import PublishedUpsampler, in_own_precision

_CELL = 16
"""Pixels per cell of the image that the encoder reads, whatever the backbone's patches."""
_MOST_DOUBLINGS = 4
"""After four, a cell has become 16×16 pixels, and the encoder has no finer map to offer."""
MOST_BLOCKS = 8
"""Most blocks of the encoder; the published have 5."""
_SIDES = {"cpu": 192}
"""Side of tiles, in pixels: maps of 192 channels are then below 32 MiB, which the C library keeps.
"""
_WHOLE = 1 << 16
"""Most pixels of an encoder's image that is not cut into tiles, whose halos would cost a fifth."""
_WINDOW = tuple((row, column) for row in range(-2, 3) for column in range(-2, 3))
NEIGHBOURS = tuple(at for at in _WINDOW if sorted(map(abs, at)) != [1, 2])
"""The 17 cells that a pixel sums, as rows and columns counted from its own cell: of 5×5 cells, all
but those a knight's move away."""


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
        recorded = is_recorded(image, x, *self.parameters())
        whole = recorded or torch.compiler.is_compiling() or is_transforming()
        small = _CELL**2 * grid_size[0] * grid_size[1] <= _WHOLE
        side = None if whole or small else _SIDES.get(x.device.type, TILE)
        fine, deep = self._encode(image, grid_size, 2**doublings, compiled, side)
        weights: list[Tensor] = []
        for index in range(doublings):
            # Of the maps at 2^doublings pixels per cell, nearest-neighbour resampling takes the
            # first pixel of each cell of the current grid, and of the grid twice as fine.
            step = 2 ** (doublings - index - 1)
            seen = deep[:, :, ::step, ::step], fine[:, :, ::step, ::step]
            if whole and weights:
                x = double(x, weights[-1], backend=self.backend)
            # The finest features are large, and only their windows are computed.
            before = None if whole or not weights else weights[-1]
            weights.append(self._weights(x, before, *seen, compiled, side))
            if before is not None and index + 1 < doublings:
                x = double(x, before, backend=self.backend)
        return DoublingKernels(weights, output_size, self.backend)

    def precompute(self, kernels: Kernels, mixed: Tensor) -> tuple[Kernels, Tensor | Map]:
        """See :meth:`Upsampler.precompute`; all doublings but the last are applied."""
        assert isinstance(kernels, DoublingKernels)
        return kernels.precompute(mixed)

    def _encode(
        self, image: Tensor, grid_size: Size, finest: int, compiled: bool, side: int | None
    ) -> tuple[Tensor, Tensor]:
        """Last two maps of the image's encoder: (B, ·, finest·h, finest·w), and half of that."""
        size = (_CELL * grid_size[0], _CELL * grid_size[1])
        image = image if tuple(image.shape[2:]) == size else resize(image, size)
        *blocks, last = self.encoder
        step = _CELL // finest
        fine = Assembled((finest * grid_size[0], finest * grid_size[1]))
        deep = Assembled((fine.size[0] // 2, fine.size[1] // 2))
        for window in _tiles(size, side):
            # Each block reads a pixel more on every side. The last one has a result for every
            # 2·step-th row and column of the image, from the first.
            outer = widened(window, max(len(self.encoder), 2 * step), size)
            inner = widened(window, 2 * step, size)
            x = cut(image, outer)
            for block in blocks:
                x = block(x, compiled=compiled)
            found = last(cut(x, inside(inner, outer)), 2 * step, compiled=compiled)
            deep.put(_every(window, 2 * step), found, _every(inner, 2 * step))
            fine.put(_every(window, step), cut(x, inside(window, outer))[:, :, ::step, ::step])
        return fine.values(), deep.values()

    def _weights(
        self,
        x: Tensor,
        before: Tensor | None,
        deep: Tensor,
        fine: Tensor,
        compiled: bool,
        side: int | None,
    ) -> Tensor:
        """Weights of one doubling.

        Args:
            x: features, on the grid of the doubling before this one, if there is one.
            before: weights of the doubling before this one; ``None`` if this is the first.
            deep: last map of the encoder, at the cells of this doubling's grid, (B, ·, h, w).
            fine: the map before it, at those of the grid twice as fine.
            compiled: whether the compiled library runs the convolutions.
            side: side of tiles, in pixels of the finer grid; ``None`` to compute all at once.

        Returns:
            (B, 25, 2h, 2w).
        """
        size = (deep.shape[2], deep.shape[3])
        coarse = Assembled(size)
        for window in _tiles(size, side and side // 2):
            outer = widened(window, 2, size)  # two convolutions
            seen = (
                cut(x, outer) if before is None else double(x, before, outer, backend=self.backend)
            )
            seen = torch.cat([seen, cut(deep, outer)], dim=1)
            coarse.put(window, self.coarse_block(seen, compiled=compiled), outer)
        size, last = (2 * size[0], 2 * size[1]), coarse.values()
        weights = Assembled(size)
        for window in _tiles(size, side):
            outer = widened(window, 2, size)
            finer = self._finer(last, outer)
            finer = self.fine_block(torch.cat([finer, cut(fine, outer)], 1), compiled=compiled)
            weights.put(window, self._shares(cut(finer, inside(window, outer))))
        return weights.values()

    def _finer(self, x: Tensor, window: Window) -> Tensor:
        """Bring a map to a grid twice as fine, in a window that begins and ends between cells."""
        size = (2 * x.shape[2], 2 * x.shape[3])
        if window == (0, 0, *size):
            enlarged = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        else:
            spans = (window.top, window.bottom), (window.left, window.right)
            rows, columns = (
                corners(length // 2, length, torch.arange(*span, device="cpu"), dtype=x.dtype)
                for length, span in zip(size, spans, strict=True)
            )
            enlarged = resample(x, rows, columns)
        weight, bias = self.doubling.weight.to(x.dtype), self.doubling.bias
        assert bias is not None
        cells = cut(x, _every(window, 2))
        return F.conv_transpose2d(cells, weight, bias.to(x.dtype), stride=2) + enlarged

    def _shares(self, x: Tensor) -> Tensor:
        """Weights (B, 25, H, W) from the last map of the network, (B, width, H, W)."""
        scores = convolve(x, self.scores.weight, self.scores.bias)
        weights = (scores + x[:, : len(NEIGHBOURS)]).softmax(1)
        share = dict(zip(NEIGHBOURS, weights.unbind(1), strict=True))
        none = torch.zeros_like(weights[:, 0])
        return torch.stack([share.get(at, none) for at in _WINDOW], dim=1)


def _tiles(size: Size, side: int | None) -> Iterator[Window]:
    """Windows of at most ``side``² pixels, a single one if it is ``None``."""
    return windows(size, *(size if side is None else (side, side)))


def _every(window: Window, step: int) -> Window:
    """The window on a grid of every ``step``-th row and column."""
    return Window(*(-(-value // step) for value in window))


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
