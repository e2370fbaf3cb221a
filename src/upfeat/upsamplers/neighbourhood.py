"""One step across scales: every pixel takes a weighted mean of the coarse cells around its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat import functional
from upfeat.bounds import whole
from upfeat.geometry import cell_of_pixels
from upfeat.randomness import stream
from upfeat.upsamplers.bands import even_bands
from upfeat.upsamplers.base import UPSAMPLERS, Kernels, Size, Upsampler, Window

MOST_RADIUS, MOST_WIDTH, MOST_LEVELS, MOST_BACK_PROJECTIONS = 16, 1024, 16, 100
"""Far beyond use; a configuration from anywhere builds nothing larger."""

INITIAL_TEMPERATURE = 8.0
INITIAL_SIGMA = 0.6
INITIAL_COLOUR_SCALE = 0.8
"""Colours that differ by this, in units of the normalised guidance, start half unlike."""


class PyramidEncoder(nn.Module):
    """A query at every pixel, from the image at several scales.

    The first layer is a sine of random projections of the colour, whose inner products are a
    Gaussian kernel of colour distance (random Fourier features). Each coarser scale is the mean of
    the finer one, plus a learned correction that starts at 0: a mean of such features describes the
    colours of a window, so queries start as descriptors of colour and texture, and training goes on
    from there. Scales are added up, coarser ones laid over finer ones bilinearly; a query knows a
    neighbourhood of about 2^levels pixels at the cost of little more than one layer at full size.
    """

    def __init__(self, width: int, levels: int, channels: int = 3) -> None:
        """Make an encoder with initial weights.

        Args:
            width: channels of every level and of the queries, ≥ 1.
            levels: how many scales, ≥ 1.
            channels: bands of the guidance, ≥ 1.
        """
        super().__init__()
        self.entry = _window_of_three(channels, width)
        self.coarser = nn.ModuleList(_Correction(width) for _ in range(levels - 1))
        self.join = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(levels))
        # Without values ("meta") only shapes are asked for, and arithmetic would import a compiler.
        if not self.entry.weight.is_meta:
            self._initialise()

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None = None) -> None:
        """Set the weights that descriptors of colour and texture start from."""
        width, channels = self.entry.weight.shape[:2]
        window = torch.tensor([0.25, 0.5, 0.25])
        colours = torch.randn(width, channels, generator=generator) / INITIAL_COLOUR_SCALE
        self.entry.weight.copy_(colours[:, :, None, None] * (window[:, None] * window))
        assert self.entry.bias is not None
        nn.init.uniform_(self.entry.bias, -math.pi, math.pi, generator=generator)
        for join in self.join:
            assert isinstance(join, nn.Conv2d)
            nn.init.orthogonal_(join.weight.view(width, width), generator=generator)
            nn.init.zeros_(join.bias)  # pyright: ignore[reportArgumentType]

    @classmethod
    def untrained(cls, width: int, levels: int, channels: int) -> PyramidEncoder:
        """Make the encoder that training would start from, always the same for its arguments."""
        with torch.device("meta"):  # whose initial values take nothing from the global generator
            encoder = cls(width, levels, channels)
            encoder.coarser = nn.ModuleList(nn.Identity() for _ in encoder.coarser)
        encoder = encoder.to_empty(device="cpu")
        encoder._initialise(stream("bands", width, levels, channels))
        return encoder

    def forward(self, guidance: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, width, H, W), any size, channels last."""
        entry = self.entry(guidance.contiguous(memory_format=torch.channels_last))
        scales = [torch.sin(entry) if torch.is_grad_enabled() else entry.sin_()]
        del entry
        for correction in self.coarser:
            if min(scales[-1].shape[-2:]) < 2:
                break
            scales.append(correction(_halve(scales[-1])))
        out = pointwise(self.join[len(scales) - 1], scales.pop())
        while scales:  # each is let go once it is used: at full size they are the largest tensors
            finer = pointwise(self.join[len(scales) - 1], scales.pop())
            size = (finer.shape[2], finer.shape[3])
            above = F.interpolate(out, size=size, mode="bilinear", align_corners=False)
            out = finer + above if torch.is_grad_enabled() else finer.add_(above)
            del finer, above
        return out


class _Correction(nn.Module):
    """A scale and what is learned of it; the identity at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = _window_of_three(width, width)
        self.last = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> the same."""
        return x + pointwise(self.last, F.gelu(self.hidden(x)))


def _window_of_three(before: int, after: int) -> nn.Conv2d:
    """A 3×3 convolution for channels-last maps: on a CPU twice as fast."""
    layer = nn.Conv2d(before, after, 3, padding=1, padding_mode="replicate")
    return layer.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """A 1×1 convolution of channels-last maps as the matrix product that it is.

    On a CPU several times as fast as the convolution.
    """
    assert isinstance(layer, nn.Conv2d)
    out = F.linear(x.permute(0, 2, 3, 1), layer.weight.flatten(1), layer.bias)
    return out.permute(0, 3, 1, 2)


def _halve(x: Tensor) -> Tensor:
    """Mean over 2×2, sides rounded up; over wider, overlapping cells where a side is odd."""
    height, width = x.shape[-2:]
    if height % 2 == 0 and width % 2 == 0:
        return F.avg_pool2d(x, 2)  # the same, twice as fast
    return F.adaptive_avg_pool2d(x, (-(-height // 2), -(-width // 2)))


def unit(x: Tensor, *, over: bool = False) -> Tensor:
    """Vectors over channels at unit length, 0 where they are 0.

    Args:
        x: (B, D, H, W); channels last it is several times as fast on a CPU.
        over: the result may be written over ``x`` where autograd does not watch.

    Returns:
        (B, D, H, W).
    """
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    length = length.clamp(min=torch.finfo(x.dtype).tiny)
    return x.div_(length) if over and not torch.is_grad_enabled() else x / length


class NeighbourhoodKernels:
    """Weights over the coarse cells around every pixel, made for the pixels that are asked for."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        temperature: Tensor,
        sigma: Tensor,
        *,
        radius: int,
        back_projections: int = 0,
        backend: str = "auto",
    ) -> None:
        """Keep what weights are made of; see :func:`upfeat.functional.neighbourhood_weights`.

        Args:
            queries: (B, D, H, W).
            keys: (B, D, h, w).
            temperature: scalar.
            sigma: scalar, in cells.
            radius: in cells.
            back_projections: how often the coarse features are corrected by what their mean over
                each cell of the output lacks, before they are upsampled.
            backend: of the operators.
        """
        self.queries, self.keys = queries, keys
        self.temperature, self.sigma = temperature, sigma
        self.radius, self.back_projections, self.backend = radius, back_projections, backend
        self.grid_size: Size = (keys.shape[2], keys.shape[3])
        self.output_size: Size = (queries.shape[2], queries.shape[3])
        self._pooled: Tensor | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W)."""
        whole = Window(0, 0, *self.output_size)
        weights = self.weights(whole)
        return self._sum(self._correct(features, weights), weights, whole)

    def crop(self, features: Tensor, window: Window) -> Tensor:
        """See :meth:`Kernels.crop`."""
        if window == (0, 0, *self.output_size):
            return self(features)
        return self._sum(self._correct(features), self.weights(window), window)

    def settle(self, features: Tensor) -> tuple[NeighbourhoodKernels, Tensor]:
        """Do what no window changes, once for any number of them.

        Args:
            features: (B, C, h, w).

        Returns:
            Kernels and features that give the same, with the corrections made already.
        """
        if not self.back_projections:
            return self, features
        plain = NeighbourhoodKernels(
            self.queries,
            self.keys,
            self.temperature,
            self.sigma,
            radius=self.radius,
            backend=self.backend,
        )
        return plain, self._correct(features)

    def weights(self, window: Window) -> Tensor:
        """The weights of a window's pixels, (B, (2r+1)², window.height, window.width)."""
        return functional.neighbourhood_weights(
            self.queries[:, :, window.top : window.bottom, window.left : window.right],
            self.keys,
            self.temperature,
            self.sigma,
            radius=self.radius,
            output_size=self.output_size,
            window=window,
            backend=self.backend,
        )

    def _sum(self, features: Tensor, weights: Tensor, window: Window) -> Tensor:
        return functional.neighbourhood_upsample(
            features,
            weights.to(features.dtype),
            output_size=self.output_size,
            window=window,
            backend=self.backend,
        )

    def _correct(self, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """Add what is lost when the output is averaged over cells, (B, C, h, w) -> the same.

        ``weights`` are those of all pixels, where they are at hand.
        """
        if self.back_projections and self._pooled is None:
            if weights is None:
                weights = self.weights(Window(0, 0, *self.output_size))
            self._pooled = self._pool(weights)
        corrected = features
        for _ in range(self.back_projections):
            assert self._pooled is not None
            means = functional.neighbourhood_upsample(
                corrected, self._pooled.to(features.dtype), backend=self.backend
            )
            corrected = corrected + (features - means)
        return corrected

    def _pool(self, weights: Tensor) -> Tensor:
        """Mean weights over the pixels of each cell, (B, T, H, W) -> (B, T, h, w).

        They upsample to the grid itself: what comes out is the mean over each cell of the whole
        output. A cell in which no pixel of a small output lies keeps its own features.
        """
        down, across = (
            divmod(length, cells)
            for cells, length in zip(self.grid_size, self.output_size, strict=True)
        )
        if not (down[1] or across[1]):
            return F.avg_pool2d(weights, (down[0], across[0]))
        rows, columns = (
            _membership(cells, length, weights)
            for cells, length in zip(self.grid_size, self.output_size, strict=True)
        )
        pooled = rows @ weights @ columns.T
        empty = 1 - rows.sum(1)[:, None] * columns.sum(1)
        own = torch.zeros_like(pooled)
        own[:, weights.shape[1] // 2] = empty
        return pooled + own


def _membership(cells: int, length: int, like: Tensor) -> Tensor:
    """The mean over the pixels of each cell along one axis, as a matrix (cells, length)."""
    own = cell_of_pixels(cells, length, 0, length, like.device)
    inside = (own == torch.arange(cells, device=like.device)[:, None]).to(like.dtype)
    return inside / inside.sum(1, keepdim=True).clamp(min=1)


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
        queries = self.encoder(guidance)
        if queries.shape[-2:] != output_size:
            queries = F.interpolate(
                queries, size=output_size, mode="bilinear", align_corners=False, antialias=True
            )
        return unit(queries, over=True)

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
        queries = step.queries(guidance, output_size)
        return step.attend(queries, unit(F.adaptive_avg_pool2d(queries, grid_size)))

    def settle(self, kernels: Kernels, mixed: Tensor) -> tuple[Kernels, Tensor]:
        """See :meth:`Upsampler.settle`; the corrections are made."""
        assert isinstance(kernels, NeighbourhoodKernels)
        return kernels.settle(mixed)

    def attend(
        self, queries: Tensor, keys: Tensor, *, widening: float = 1.0
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
