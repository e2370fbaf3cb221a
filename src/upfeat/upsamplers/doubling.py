"""Repeated doubling of a grid by weights of 5×5 cells, and resampling of the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upfeat import functional
from upfeat.resampling import along, bilinear, resample, resize
from upfeat.transforms import is_transforming
from upfeat.types import Size, Window
from upfeat.upsamplers.maps import TILE, cut, is_recorded, windows

_CHANNELS = 64
"""Channels whose last map is computed at once."""
_ROWS = {"cpu": 32}
"""Rows of the result that are computed at once, so that they stay in the processor's cache."""


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
        recorded = is_recorded(features, *self.weights)
        if recorded or torch.compiler.is_compiling() or is_transforming():
            return self._upsample(features)
        # Maps before the result are as large, so only some of their channels and rows exist at a
        # time. Memory that is used again takes less time, too: new pages cost more than the sums.
        out = features.new_empty(*features.shape[:2], *self.output_size)
        rows = _ROWS.get(features.device.type, TILE)
        for part, target in zip(features.split(_CHANNELS, 1), out.split(_CHANNELS, 1), strict=True):
            kernels, finer = self.precompute(part)
            for window in windows(self.output_size, rows, self.output_size[1]):
                cut(target, window).copy_(kernels._part(finer, window))
        return out

    @property
    def _last_size(self) -> Size:
        return self.weights[-1].shape[2], self.weights[-1].shape[3]

    def _upsample(self, features: Tensor) -> Tensor:
        for weights in self.weights:
            features = double(features, weights, backend=self.backend)
        size = (features.shape[2], features.shape[3])
        return features if size == self.output_size else resize(features, self.output_size)

    def crop(self, features: Tensor, window: Window) -> Tensor:
        """See :meth:`Kernels.crop`; the last doubling is computed in the window alone."""
        kernels, features = self.precompute(features)
        return kernels._part(features, window)

    def _part(self, features: Tensor, window: Window) -> Tensor:
        """Apply the last doubling to features on its grid, and resample it, in a window."""
        last, backend = self.weights[-1], self.backend
        if self._last_size == self.output_size:
            return double(features, last, window, backend=backend)
        rows, columns = (
            bilinear(
                length,
                target,
                torch.arange(start, stop, device="cpu"),
                antialias=True,
                dtype=features.dtype,
            )
            for length, target, start, stop in zip(
                self._last_size,
                self.output_size,
                (window.top, window.left),
                (window.bottom, window.right),
                strict=True,
            )
        )
        read = Window(
            rows.first, columns.first, rows.stop - rows.first, columns.stop - columns.first
        )
        part = double(features, last, read, backend=backend)
        if window.width < self.output_size[1]:
            return resample(part, rows, columns, (read.top, read.left))
        if part.dtype.itemsize < 4:
            part = part.float()
        # PyTorch resamples along whole rows, faster than by indices and weights.
        whole = resize(along(part, 2, rows), (window.height, window.width))
        return whole.to(features.dtype)

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
