"""One step across scales: every pixel takes a weighted mean of the coarse cells around its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from upfeat.bounds import whole
from upfeat.upsamplers.bands import even_bands
from upfeat.upsamplers.base import UPSAMPLERS, Kernels, Size, Upsampler, cells_of_pixels
from upfeat.upsamplers.encoder import PyramidEncoder
from upfeat.upsamplers.maps import Computed, Map
from upfeat.upsamplers.queries import CellMeans, Queries, Units
from upfeat.upsamplers.step import NeighbourhoodKernels

MOST_RADIUS, MOST_WIDTH, MOST_LEVELS, MOST_BACK_PROJECTIONS = 16, 1024, 16, 100
"""Far beyond use; a configuration from anywhere builds nothing larger."""

INITIAL_TEMPERATURE = 8.0
INITIAL_SIGMA = 0.6


@UPSAMPLERS.register
class NeighbourhoodUpsampler(Upsampler):
    """Pixels attend to the coarse cells around them: like colours and textures share features.

    A small convolutional encoder gives a query at every pixel; a cell's key is the mean of its
    pixels' queries; both have unit length. Pixel p in cell c takes the mean of cells c + δ,
    |δ|∞ ≤ radius, weighted by softmax(τ·⟨query, key⟩ − distance²/(2σ²)), distances in cells.

    The weights are positive and sum to 1: constants stay constant, nothing leaves the range of the
    features, and features of any backbone, stride and number of channels will do. Without training
    it is a soft interpolation.

    Source: ours; related to neighbourhood attention, trained by FeatUp's views (section 3.1) alone.
    """

    name = "neighbourhood"
    guidance_bands = None
    magnitudes: ClassVar[Mapping[str, tuple[float, float]]] = {
        "log_temperature": (0.0, 10.0),
        "log_sigma": (0.0, 5.0),
    }

    def __init__(
        self,
        *,
        radius: int = 2,
        query_dim: int = 32,
        levels: int = 4,
        back_projections: int = 0,
        backend: str = "auto",
    ) -> None:
        """Make an upsampler with initial (untrained) weights.

        Args:
            radius: how many cells to each side take part, from 1 to 16.
            query_dim: width of queries and keys, from 1 to 1024.
            levels: scales of the encoder, from 1 to 16.
            back_projections: how often to correct the coarse features by what the output, averaged
                over each cell, lacks of them (iterative back-projection, Irani and Peleg,
                1991), from 0 to 100.
                Without, the output is a weighted mean and never leaves the range of the features;
                each time, its means over cells come closer to the features, at next to no cost.
            backend: of the operators; see :mod:`upfeat.functional`.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__()
        self.radius = whole("radius", radius, 1, MOST_RADIUS)
        self.query_dim = whole("query_dim", query_dim, 1, MOST_WIDTH)
        self.levels = whole("levels", levels, 1, MOST_LEVELS)
        self.back_projections = whole(
            "back_projections", back_projections, 0, MOST_BACK_PROJECTIONS
        )
        self.set_backend(backend)
        self.encoder = PyramidEncoder(self.query_dim, self.levels)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(INITIAL_TEMPERATURE)))
        self.log_sigma = nn.Parameter(torch.tensor(math.log(INITIAL_SIGMA)))
        # A plain dictionary: made from the other settings, they are no part of the state.
        self._for_bands: dict[tuple[object, ...], NeighbourhoodUpsampler] = {}

    def for_bands(self, guidance: Tensor) -> NeighbourhoodUpsampler:
        """The same step for guidance that is not RGB: without training, by all of its bands.

        The entry of its encoder is random Fourier features of the bands, which make a Gaussian
        kernel of the distance between them; they are drawn once and for all. Temperature and σ are
        those that training starts from; everything else is as here.

        Args:
            guidance: (B, N, H, W), as :func:`upfeat.upsamplers.bands.even_bands` returns it.

        Returns:
            An upsampler for N bands, on the guidance's device and of its dtype; this one for 3.
        """
        channels = guidance.shape[1]
        if channels == self.encoder.entry.in_channels:
            return self
        key = (channels, guidance.device, guidance.dtype, *self.config().values())
        if key not in self._for_bands:
            # Kept for the next guidance, which may want gradients where this one does not.
            with torch.inference_mode(False):
                with torch.device("meta"):
                    step = NeighbourhoodUpsampler(**self.config())
                step.encoder = PyramidEncoder.untrained(self.query_dim, self.levels, channels)
                step.log_temperature = nn.Parameter(torch.tensor(math.log(INITIAL_TEMPERATURE)))
                step.log_sigma = nn.Parameter(torch.tensor(math.log(INITIAL_SIGMA)))
                step.to(device=guidance.device, dtype=guidance.dtype).eval().requires_grad_(False)
            self._for_bands[key] = step
        step = self._for_bands[key]
        step.set_backend(self.backend)
        return step

    def config(self) -> dict[str, Any]:
        """See :meth:`Upsampler.config`."""
        return {
            "radius": self.radius,
            "query_dim": self.query_dim,
            "levels": self.levels,
            "back_projections": self.back_projections,
        }

    def queries(self, guidance: Tensor, output_size: Size) -> Tensor:
        """Unit queries, (B, 3, H, W) -> (B, query_dim, *output_size)."""
        return Queries(self.encoder, guidance, output_size, self.backend).all()

    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> NeighbourhoodKernels:
        """See :meth:`Upsampler.prepare`."""
        guidance = even_bands(guidance)
        step = self.for_bands(guidance)
        queries = Queries(step.encoder, guidance, output_size, self.backend)
        return step.attend(queries, Units(CellMeans(queries, grid_size)))

    @property
    def reach(self) -> int:
        """See :attr:`Upsampler.reach`."""
        # The pixels of the farthest cell whose key counts, and how far their queries look.
        return self.radius * (1 + self.back_projections) + 1 + cells_of_pixels(self.encoder.halo)

    @property
    def step(self) -> int:
        """See :attr:`Upsampler.step`."""
        return self.encoder.period

    def precompute(self, kernels: Kernels, mixed: Tensor) -> tuple[Kernels, Tensor | Map]:
        """See :meth:`Upsampler.precompute`; the corrections are made."""
        assert isinstance(kernels, NeighbourhoodKernels)
        return kernels.precompute(mixed)

    def attend(
        self, queries: Computed, keys: Computed, *, widening: float = 1.0
    ) -> NeighbourhoodKernels:
        """The step from keys' cells to queries' pixels.

        Args:
            queries: (B, query_dim, H, W), of unit length.
            keys: (B, query_dim, h, w), likewise.
            widening: factor of σ.
        """
        return NeighbourhoodKernels(
            queries,
            keys,
            self.log_temperature.exp(),
            widening * self.log_sigma.exp(),
            radius=self.radius,
            back_projections=self.back_projections,
            backend=self.backend,
        )
