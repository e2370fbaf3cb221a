"""One step across scales: each pixel is a weighted mean of the coarse cells around it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from upfeat.bounds import number, whole
from upfeat.upsamplers.bands import even_bands
from upfeat.upsamplers.base import UPSAMPLERS, Kernels, Size, Upsampler
from upfeat.upsamplers.checks import check_preparation
from upfeat.upsamplers.contrast import AROUND, Lengthened, Lengths
from upfeat.upsamplers.encoder import PyramidEncoder
from upfeat.upsamplers.maps import Computed, Map
from upfeat.upsamplers.queries import CellMeans, Queries, Units
from upfeat.upsamplers.step import NeighbourhoodKernels

MOST_RADIUS, MOST_WIDTH, MOST_LEVELS, MOST_BACK_PROJECTIONS = 16, 1024, 16, 100
"""Bounds far beyond any use, so that no configuration file can demand a huge module."""

INITIAL_TEMPERATURE = 8.0
INITIAL_SIGMA = 0.6


@UPSAMPLERS.register
class NeighbourhoodUpsampler(Upsampler):
    """Upsampler in which pixels attend to nearby coarse cells with similar colours and textures.

    A small convolutional encoder computes a query for every pixel; a cell's key is the mean of its
    pixels' queries; both are scaled to unit length. The output at pixel p of cell c is the mean of
    cells c + δ, |δ|∞ ≤ radius, weighted by softmax(τ·⟨query, key⟩ − distance²/(2σ²)), where τ and σ
    are learned and distances are measured in cells.

    The weights are positive and sum to 1: constants stay constant, and the output stays within the
    range of the features. Features of any backbone, stride and number of channels are accepted.
    Without training the result is a soft interpolation.

    With ``least_contrast``, queries are longer than 1 where neighbouring keys are nearly equal, as
    in fog and in the dark (:class:`.contrast.Lengths`).

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
        least_contrast: float = 0.0,
        backend: str = "auto",
    ) -> None:
        """Make an upsampler with initial (untrained) weights.

        Args:
            radius: number of cells to each side that a pixel attends to, from 1 to 16.
            query_dim: number of channels of queries and keys, from 1 to 1024.
            levels: number of scales of the encoder, from 1 to 16.
            back_projections: number of corrections, from 0 to 100, each of which adds to the coarse
                features their difference from the output's means over cells (iterative
                back-projection, Irani and Peleg, 1991). Each brings those means closer to the
                features, at next to no cost. With 0, the output is a weighted mean and never leaves
                the range of the features.
            least_contrast: mean difference of neighbouring keys, 1 − ⟨key, key⟩, from 0 to 1, below
                which queries are made longer, up to 64 times, as if the image had this contrast; 0
                for none. Photographs have 0.02 to 0.06 by the shipped weights, in the median 0.044.
            backend: backend of the operators; see :mod:`upfeat.functional`.

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
        self.least_contrast = number("least_contrast", least_contrast, 0, 1)
        self.set_backend(backend)
        self.encoder = PyramidEncoder(self.query_dim, self.levels)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(INITIAL_TEMPERATURE)))
        self.log_sigma = nn.Parameter(torch.tensor(math.log(INITIAL_SIGMA)))
        # A plain dictionary: the upsamplers in it follow from the settings, so are not saved.
        self._for_bands: dict[tuple[object, ...], NeighbourhoodUpsampler] = {}

    def for_bands(self, guidance: Tensor) -> NeighbourhoodUpsampler:
        """Return an untrained upsampler with these settings for guidance that is not RGB.

        The first layer of its encoder computes random Fourier features of all bands, whose inner
        products approximate a Gaussian kernel of the difference between two pixels' bands. Random
        weights come from a fixed seed. Temperature and σ have the values that training starts from.

        Args:
            guidance: (B, N, H, W), as :func:`upfeat.upsamplers.bands.even_bands` returns it.

        Returns:
            An upsampler for N bands, on the guidance's device and of its dtype; ``self`` if N is 3.
        """
        channels = guidance.shape[1]
        if channels == self.encoder.entry.in_channels:
            return self
        key = (channels, guidance.device, guidance.dtype, *self.config().values())
        if key not in self._for_bands:
            # Not inference tensors: the next guidance of this kind may need gradients.
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
            "least_contrast": self.least_contrast,
        }

    def queries(self, guidance: Tensor, output_size: Size) -> Tensor:
        """Compute unit queries, (B, 3, H, W) -> (B, query_dim, *output_size)."""
        return Queries(self.encoder, guidance, output_size, self.backend).all()

    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> NeighbourhoodKernels:
        """See :meth:`Upsampler.prepare`."""
        grid_size, output_size = check_preparation(guidance, grid_size, output_size, bands=None)
        guidance = even_bands(guidance)
        step = self.for_bands(guidance)
        queries = Queries(step.encoder, guidance, output_size, self.backend)
        return step.attend(queries, Units(CellMeans(queries, grid_size)))

    @property
    def reach(self) -> int:
        """See :attr:`Upsampler.reach`."""
        # Up to the pixels of the farthest cell whose key is read, and from there the distance to
        # which the encoder reads the image for their queries.
        return self.reach_of_weights + cells_of_pixels(self.encoder.halo)

    @property
    def reach_of_weights(self) -> int:
        """Cells from a pixel to the farthest cell whose key has an effect on the pixel."""
        contrast = AROUND if self.least_contrast else 0
        return self.radius * (1 + self.back_projections) + contrast + 1

    @property
    def step(self) -> int:
        """See :attr:`Upsampler.step`."""
        return self.encoder.period

    def precompute(self, kernels: Kernels, mixed: Tensor) -> tuple[Kernels, Tensor | Map]:
        """See :meth:`Upsampler.precompute`; the back-projections are applied."""
        assert isinstance(kernels, NeighbourhoodKernels)
        return kernels.precompute(mixed)

    def attend(
        self, queries: Computed, keys: Computed, *, widening: float = 1.0
    ) -> NeighbourhoodKernels:
        """Make the kernels of the step from the cells of the keys to the pixels of the queries.

        Args:
            queries: (B, query_dim, H, W), of unit length.
            keys: (B, query_dim, h, w), of unit length.
            widening: factor by which σ is multiplied.
        """
        return NeighbourhoodKernels(
            self.lengthened(queries, keys),
            keys,
            self.log_temperature.exp(),
            widening * self.log_sigma.exp(),
            radius=self.radius,
            back_projections=self.back_projections,
            backend=self.backend,
        )

    def lengthened(self, queries: Computed, keys: Computed) -> Computed:
        """Return queries that are longer where the keys around them are nearly equal.

        Args:
            queries: (B, query_dim, H, W), of unit length.
            keys: (B, query_dim, h, w), of unit length.
        """
        if not self.least_contrast:
            return queries
        return Lengthened(queries, Lengths(keys, self.radius, self.least_contrast))


def cells_of_pixels(pixels: int) -> int:
    """Most cells that a run of ``pixels`` touches, where cells are 4 or more pixels wide."""
    return -(-pixels // 4)
