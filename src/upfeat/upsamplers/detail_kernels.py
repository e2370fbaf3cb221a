"""Weights of the detail upsampler for one image, and its features on the finer grid."""

from __future__ import annotations

import torch
from torch import Tensor

from upfeat.types import Window
from upfeat.upsamplers.maps import Computed, Map, as_map
from upfeat.upsamplers.regression import ImageRegression
from upfeat.upsamplers.smoothing import Smoothing
from upfeat.upsamplers.step import NeighbourhoodKernels


class FinerFeatures(Computed):
    """Features on the finer grid, with detail, (B, C, *finer grid)."""

    def __init__(self, kernels: DetailKernels, features: Map) -> None:
        """Keep the kernels and the coarse features, (B, C, h, w)."""
        recorded = torch.is_grad_enabled() and (kernels.recorded or features.recorded)
        whole = kernels.first.whole or recorded
        super().__init__(kernels.first.output_size, whole=whole, recorded=recorded, step=2)
        self.kernels, self.features = kernels, features

    def keep_less(self) -> None:
        """See :meth:`Computed.keep_less`."""
        if self.kernels.regression is not None:
            self.kernels.regression.lacking.keeps = False

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        smoothing = self.kernels.smoothing
        if smoothing is None:
            return self._rough(window)
        return smoothing.smooth(self._rough(smoothing.around(window)), window)

    def _rough(self, window: Window) -> Tensor:
        """The values in a window before they are smoothed."""
        kernels = self.kernels
        parts = []
        # Before the first step, which reads a part of the same means: they are then kept.
        if kernels.regression is not None:
            parts.append(kernels.regression.at(self.features, window))
        fine = sum(parts, kernels.first.at(self.features, window))
        if kernels.detail is not None:
            fine = fine + kernels.detail.at(window).to(fine.dtype)
        return fine


class DetailKernels:
    """Both steps of one guidance, and the detail that is added between them."""

    def __init__(
        self,
        first: NeighbourhoodKernels,
        last: NeighbourhoodKernels,
        *,
        regression: ImageRegression | None = None,
        maps: Map | None = None,
        detail: Map | None = None,
        smoothing: Smoothing | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            first: step from the grid of the features to the finer grid.
            last: step from the finer grid to the output.
            regression: regression whose detail is added to the result of ``first``; ``None`` for
                no regression.
            maps: (B, width, *finer grid), the network's maps from which ``detail`` is computed;
                ``None`` without a network.
            detail: (B, C, *finer grid), the network's detail, added to the result of ``first``;
                ``None`` for none.
            smoothing: weights by which the sum of all is smoothed; ``None`` for none.
        """
        self.first, self.last, self.regression = first, last, regression
        self.grid_size, self.output_size = first.grid_size, last.output_size
        self.maps, self.detail, self.smoothing = maps, detail, smoothing
        self.recorded = any(
            part is not None and part.recorded for part in (last, detail, smoothing)
        )

    def __call__(self, features: Tensor) -> Tensor:
        """Upsample features, (B, C, h, w) -> (B, C, H, W)."""
        return self.last(self._on_finer_grid(features))

    def crop(self, features: Tensor, window: Window) -> Tensor:
        """See :meth:`Kernels.crop`."""
        return self.last.crop(self._on_finer_grid(features), window)

    def precompute(self, features: Tensor) -> tuple[NeighbourhoodKernels, Tensor | Map]:
        """See :meth:`NeighbourhoodKernels.precompute`; the first step and detail are applied."""
        return self.last.precompute(self._on_finer_grid(features))

    def to_finer_grid(self, features: Tensor) -> Tensor:
        """Upsample to the finer grid, (B, C, h, w) -> (B, C, 2h, 2w); neither detail nor smoothing.

        The detail that is left out is the network's.
        """
        rough = DetailKernels(self.first, self.last, regression=self.regression)
        return FinerFeatures(rough, as_map(features)).all()

    def finished(self, features: Tensor) -> Tensor:
        """Upsample to the finer grid, with all that is added there, (B, C, 2h, 2w)."""
        return self._on_finer_grid(features).all()

    def adding(self, detail: Map | None) -> DetailKernels:
        """Return kernels that add ``detail``, (B, C, *finer grid), and otherwise equal these."""
        return DetailKernels(
            self.first,
            self.last,
            regression=self.regression,
            maps=self.maps,
            detail=detail,
            smoothing=self.smoothing,
        )

    def _on_finer_grid(self, features: Tensor) -> FinerFeatures:
        return FinerFeatures(self, as_map(features))
