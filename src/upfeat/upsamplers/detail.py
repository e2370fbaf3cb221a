"""Two neighbourhood steps; between them, detail inferred from the image is added."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upfeat.bounds import MOST_CHANNELS, number, whole
from upfeat.upsamplers.bands import even_bands
from upfeat.upsamplers.base import UPSAMPLERS, Kernels, Size, Upsampler, Window
from upfeat.upsamplers.checks import check_precision, check_preparation
from upfeat.upsamplers.detail_kernels import DetailKernels
from upfeat.upsamplers.detail_network import DetailMaps, DetailNetwork
from upfeat.upsamplers.head import Head, Headed, apply_head
from upfeat.upsamplers.maps import Map
from upfeat.upsamplers.neighbourhood import (
    MOST_RADIUS,
    MOST_WIDTH,
    NeighbourhoodUpsampler,
    cells_of_pixels,
)
from upfeat.upsamplers.queries import CellMeans, Coarser, Queries, Units
from upfeat.upsamplers.regression import STEP, ImageRegression
from upfeat.upsamplers.saved import load_named
from upfeat.upsamplers.smoothing import Smoothing

FINER = 2
"""Ratio of the finer grid, on which detail is added, to the grid of the features."""


@UPSAMPLERS.register
class DetailUpsampler(Upsampler):
    """Upsampler that follows edges and adds detail inferred from the image, in two ways.

    A neighbourhood step upsamples the features to a grid twice as fine, and a second step, with the
    same learned weights, to the output size. Detail is added on the finer grid, between the steps:

    1. Within one image, features are correlated with colours and textures. When the image is
       upsampled, its features are ridge-regressed on the mean queries of their cells. The finer
       cells' mean queries, less those that the first step predicts, are multiplied by the
       coefficients (:class:`ImageRegression`). This needs no training and serves any backbone.
    2. With ``embed_dim``, a small network trained for one backbone predicts the difference that
       remains to the backbone's features of the enlarged image.

    With ``smoothing``, and where early layers of a network are given, the sum is smoothed among
    cells that look alike to them (:class:`.smoothing.Smoothing`):

        up(F) = K₂(g)·S(g, e)·[(K₁(g) + R(g))·M(F) + P·z(g) + b]

    F are the features, g is the guidance, e are the early layers, K₁ and K₂ are the steps, R is the
    regression, S the smoothing, z(g) are ``width`` maps of the image, P is a basis of channels and
    b a constant, M the channel mix x + W·x. The result is affine in the features, and linear
    without the second part. A head of K outputs costs K channels as elsewhere, since it is applied
    to P as well. Untrained, P, W and b are 0.

    Source: ours; the neighbourhood step is that of :class:`NeighbourhoodUpsampler`; the regression
    is related to the guided filter (He, Sun and Tang, 2010), but uses the whole image, and queries
    in place of colours.
    """

    name = "detail"
    takes_hidden = True
    magnitudes = NeighbourhoodUpsampler.magnitudes

    def __init__(
        self,
        embed_dim: int | None = None,
        *,
        radius: int = 2,
        query_dim: int = 32,
        levels: int = 4,
        back_projections: int = 1,
        width: int = 64,
        depth: int = 3,
        widening: float = 1.25,
        ridge: float = 0.3,
        smoothing: int = 0,
        least_contrast: float = 0.0,
        start: str | Path | None = None,
        backend: str = "auto",
    ) -> None:
        """Make an upsampler with initial (untrained) weights.

        Args:
            embed_dim: number of feature channels C, for a network and a channel mix made for one
                backbone; ``None`` for any backbone, without network and channel mix.
            radius: radius of both steps, in cells; see :class:`NeighbourhoodUpsampler`.
            query_dim: channels of queries and keys, as in :class:`NeighbourhoodUpsampler`.
            levels: scales of the encoder, as in :class:`NeighbourhoodUpsampler`.
            back_projections: corrections in each step, as in :class:`NeighbourhoodUpsampler`.
            width: number of the network's maps, from 2 to 1024.
            depth: number of residual blocks in the network, from 0 to 64.
            widening: σ of the second step in cells of the finer grid, divided by σ of the first in
                cells of the coarse grid; from 0.05 to 100.
            ridge: penalty of the regression, in units of the queries' mean variance, from 0 to 1e6;
                0 leaves the regression out.
            smoothing: radius of the smoothing of the finer grid among cells that look alike to
                early layers (:class:`.smoothing.Smoothing`), in its cells, from 0 to 16; 0, or
                features without early layers, for none.
            least_contrast: contrast of both steps and of the smoothing, as in
                :class:`NeighbourhoodUpsampler`.
            start: name or folder of a trained neighbourhood upsampler, whose weights are copied;
                its radius, query_dim and levels must equal these arguments.
            backend: backend of the operators; see :mod:`upfeat.functional`.

        Raises:
            FileNotFoundError: ``start`` is a folder that does not exist.
            ValueError: an argument is out of range, or ``start`` is not a neighbourhood upsampler
                with the same settings.
        """
        super().__init__()
        embed_dim = whole("embed_dim", embed_dim, 1, MOST_CHANNELS, optional=True)
        self.embed_dim = embed_dim
        self.guidance_bands = None if embed_dim is None else 3  # the network takes RGB alone
        self.width = whole("width", width, 2, MOST_WIDTH)
        self.depth = whole("depth", depth, 0, 64)
        self.widening = number("widening", widening, 0.05, 100)
        self.ridge = number("ridge", ridge, 0, 1e6)
        self.smoothing = whole("smoothing", smoothing, 0, MOST_RADIUS)
        self.neighbourhood: NeighbourhoodUpsampler = NeighbourhoodUpsampler(
            radius=radius,
            query_dim=query_dim,
            levels=levels,
            back_projections=back_projections,
            least_contrast=least_contrast,
        )
        self.network: DetailNetwork | None = None
        if embed_dim is not None:
            # With channels last the network is a third faster on a CPU.
            self.network = DetailNetwork(self.width, self.depth).to(
                memory_format=torch.channels_last  # pyright: ignore[reportCallIssue]
            )
            self.detail = nn.Conv2d(self.width, embed_dim, 1)
            self.channel_mix = nn.Conv2d(embed_dim, embed_dim, 1, bias=False)
            for layer in (self.detail, self.channel_mix):
                nn.init.zeros_(layer.weight)
            nn.init.zeros_(self.detail.bias)  # pyright: ignore[reportArgumentType]
        self.set_backend(backend)
        if start is not None:
            self._start_from(start)

    @property
    def back_projections(self) -> int:
        """Number of corrections of the features in each step."""
        return self.neighbourhood.back_projections

    def config(self) -> dict[str, Any]:
        """See :meth:`Upsampler.config`."""
        steps = self.neighbourhood.config()
        network = {} if self.network is None else {"width": self.width, "depth": self.depth}
        own = {"widening": self.widening, "ridge": self.ridge, "smoothing": self.smoothing}
        return {"embed_dim": self.embed_dim, **steps, **network, **own}

    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> DetailKernels:
        """See :meth:`Upsampler.prepare`."""
        return self.prepare_with(guidance, grid_size, output_size, features)

    def prepare_with(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> DetailKernels:
        """See :meth:`Upsampler.prepare_with`; the regression uses ``hidden`` as well."""
        del features
        return self._prepare(guidance, grid_size, output_size, hidden=hidden)

    @property
    def means_halo(self) -> int | None:
        """See :attr:`Upsampler.means_halo`; the means are those that the regression reads."""
        if not self.ridge:
            return None
        finer = self._last_reach
        halos = [finer + cells_of_pixels(self.neighbourhood.encoder.halo)]
        if self.network is not None:
            halos.append(finer + self.network.reach // FINER + 2)
        step = self.neighbourhood.step
        return step * -(-max(halos) // step)

    def cell_means(self, guidance: Tensor, grid_size: Size, cells: Window) -> Tensor:
        """See :meth:`Upsampler.cell_means`; here the mean queries of the finer cells."""
        step, size = self.neighbourhood, (guidance.shape[2], guidance.shape[3])
        queries = Queries(step.encoder, guidance, size, self.backend)
        finer = (FINER * grid_size[0], FINER * grid_size[1])
        return CellMeans(queries, finer).at(Window(*(FINER * side for side in cells)))

    def prepare_tile(
        self,
        guidance: Tensor,
        grid_size: Size,
        features: Tensor,
        means: Tensor | None,
        hidden: Tensor | None = None,
    ) -> DetailKernels:
        """See :meth:`Upsampler.prepare_tile`."""
        del features
        size = (guidance.shape[2], guidance.shape[3])
        return self._prepare(guidance, grid_size, size, hidden=hidden, means=means)

    def _prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        *,
        hidden: Tensor | None = None,
        means: Tensor | None = None,
    ) -> DetailKernels:
        """Make the weights of a guidance, from its mean queries (B, D, 2h, 2w) if given."""
        bands = self.guidance_bands
        grid_size, output_size = check_preparation(guidance, grid_size, output_size, bands=bands)
        guidance = even_bands(guidance)
        step = self.neighbourhood.for_bands(guidance)
        finer = (FINER * grid_size[0], FINER * grid_size[1])
        queries = Queries(step.encoder, guidance, output_size, self.backend)
        finer_means = CellMeans(queries, finer)
        if means is not None:
            finer_means.start_from(means)
        coarse_means = Coarser(finer_means, FINER)
        middle = Units(finer_means)  # keys of the last step, queries of the first
        first = step.attend(middle, Units(coarse_means))
        last = step.attend(queries, middle, widening=self.widening)
        regression = None
        if self.ridge:
            regression = ImageRegression(
                coarse_means, finer_means, first, penalty=self.ridge, step=STEP, hidden=hidden
            )
        maps = self._maps(guidance, hidden, finer, whole=queries.whole)
        smoothing = None
        if self.smoothing and hidden is not None:
            compared = step.lengthened(middle, middle)
            smoothing = Smoothing(compared, hidden, radius=self.smoothing, backend=self.backend)
        return DetailKernels(first, last, regression=regression, maps=maps, smoothing=smoothing)

    def _maps(
        self, guidance: Tensor, hidden: Tensor | None, finer: Size, *, whole: bool
    ) -> Map | None:
        """The network's maps of the image, (B, width, *finer grid); ``None`` without a network."""
        del hidden
        if self.network is None:
            return None
        return DetailMaps(self.network, guidance, finer, whole=whole)

    @torch.no_grad()
    def last_step(self) -> NeighbourhoodUpsampler:
        """Return the second step as an upsampler of features on the finer grid; in eval mode."""
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then replaced
            step = NeighbourhoodUpsampler(**self.neighbourhood.config(), backend=self.backend)
        step.load_state_dict(self.neighbourhood.state_dict())
        step.log_sigma.add_(math.log(self.widening))
        step.mean, step.std = self.mean, self.std
        return step.to(self.neighbourhood.log_sigma).eval()

    @property
    def _last_reach(self) -> int:
        """Cells that the last step, and the smoothing before it, read."""
        finer = self.neighbourhood.radius * (1 + self.back_projections) + self.smoothing
        return -(-finer // FINER) + 1

    @property
    def reach(self) -> int:
        """See :attr:`Upsampler.reach`."""
        finer = self._last_reach
        pixels = cells_of_pixels(self.neighbourhood.encoder.halo)
        reaches = [finer + self.neighbourhood.reach_of_weights + pixels]
        if self.ridge:
            reaches.append(finer + 2 * STEP + 1 + pixels)
        if self.network is not None:
            reaches.append(finer + self.network.reach // FINER + 2)
        return max(reaches)

    @property
    def step(self) -> int:
        """See :attr:`Upsampler.step`."""
        return math.lcm(self.neighbourhood.step, STEP if self.ridge else 1)

    def mix(self, features: Tensor) -> Tensor:
        """Return x + W·x for features x, (B, C, h, w); x itself without a channel mix.

        Raises:
            ValueError: C is not the upsampler's ``embed_dim``, or features and weights differ in
                dtype.
        """
        if self.embed_dim is None:
            return features
        if features.shape[1] != self.embed_dim:
            raise ValueError(
                f"features has {features.shape[1]} channels but this {type(self).__name__} is made "
                f"for {self.embed_dim}; DetailUpsampler() takes any number"
            )
        if self.network is None:
            return features
        check_precision("features", features, self.channel_mix.weight)
        return features + apply_head(features, self.channel_mix.weight.flatten(1))

    def render_linear(
        self,
        kernels: Kernels,
        mixed: Tensor | Map,
        *,
        head: Tensor | slice | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """See :meth:`Upsampler.render_linear`; heads are applied to the detail's basis as well."""
        if isinstance(kernels, DetailKernels):  # precomputed features already contain their detail
            kernels = self._with_detail(kernels, head)
        return super().render_linear(kernels, mixed, head=head, window=window)

    def precompute(self, kernels: Kernels, mixed: Tensor) -> tuple[Kernels, Tensor | Map]:
        """See :meth:`Upsampler.precompute`; returns the last step, and features with detail."""
        assert isinstance(kernels, DetailKernels)
        return self._with_detail(kernels, None).precompute(mixed)

    def on_finer_grid(self, kernels: DetailKernels, features: Tensor) -> Tensor:
        """Features as the last step reads them, with detail and smoothing, (B, C, 2h, 2w)."""
        return self._with_detail(kernels, None).finished(features)

    def detail_on_finer_grid(self, kernels: DetailKernels) -> Tensor:
        """The network's detail, which is added between the steps, (B, C, 2h, 2w)."""
        assert kernels.maps is not None, "there is no network without embed_dim"
        return self._detail(kernels.maps, None).at(Window(0, 0, *kernels.maps.size))

    def _with_detail(self, kernels: DetailKernels, head: Tensor | slice | None) -> DetailKernels:
        """Return the kernels with the network's detail; a given head is applied to the detail."""
        if kernels.maps is None:
            return kernels
        return kernels.adding(self._detail(kernels.maps, head))

    def _detail(self, maps: Map, head: Tensor | slice | None) -> Map:
        """The network's detail after a head, (B, width, …) -> (B, K, …)."""
        basis, constant = self.detail.weight.flatten(1), self.detail.bias
        assert constant is not None
        linear = Head(head)
        # (K, width) or (B, K, width), and (K,) or (B, K)
        return Headed(maps, linear.on_channels(basis), linear.on_channels(constant))

    def _start_from(self, start: str | Path) -> None:
        trained = load_named(start, UPSAMPLERS)
        if not isinstance(trained, NeighbourhoodUpsampler):
            raise ValueError(
                f"start={start!s} holds a {type(trained).__name__}; give a neighbourhood upsampler"
            )
        own, given = self.neighbourhood.config(), trained.config()
        for name in ("radius", "query_dim", "levels"):
            if own[name] != given[name]:
                raise ValueError(
                    f"{name}={own[name]} but {start!s} has {given[name]}; give the same"
                )
        self.neighbourhood.load_state_dict(trained.state_dict())
        self.mean, self.std = trained.mean, trained.std

    @torch.no_grad()
    def scale_mix(self, share: float) -> None:
        """Multiply the channel mix W, if any, by ``share``; 0 leaves channels unchanged."""
        if self.network is None:
            return
        self.channel_mix.weight.mul_(share)
