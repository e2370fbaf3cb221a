"""The neighbourhood step twice, and in between detail that the image tells of."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.bounds import MOST_CHANNELS, number, whole
from upfeat.upsamplers.bands import even_bands
from upfeat.upsamplers.base import UPSAMPLERS, Kernels, Size, Upsampler, Window, apply_head
from upfeat.upsamplers.neighbourhood import (
    MOST_WIDTH,
    NeighbourhoodKernels,
    NeighbourhoodUpsampler,
    pointwise,
    unit,
)

FINER = 2
"""The grid on which detail is added is so many times finer than that of the features."""
_PIXELS = 8
"""Image pixels for each side of its cells, as the network sees the image."""


class DetailNetwork(nn.Sequential):
    """A small convolutional network, image to maps at an eighth of its size."""

    def __init__(self, width: int, depth: int) -> None:
        """Make it with PyTorch's initial weights.

        Args:
            width: number of maps, ≥ 2.
            depth: residual blocks on the last grid, ≥ 0.
        """
        widths = (3, max(width * 3 // 8, 1), max(width * 3 // 4, 1), width)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            halve = nn.Conv2d(before, after, 3, 2, 1, padding_mode="replicate")
            layers += [halve, nn.GELU()]
        super().__init__(*layers, *(_Block(width) for _ in range(depth)))


class _Block(nn.Module):
    """Its input and a correction, which is 0 at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate")
        self.last = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> the same."""
        return x + pointwise(self.last, F.gelu(self.hidden(x)))


class ImageRegression:
    """What features lack between cells, by a linear map from queries that is fitted to themselves.

    The features of the cells, less their mean over the 3×3 cells around, are regressed on the mean
    queries of the cells, less theirs; what the first step leaves out of the mean queries of the
    finer cells goes through the same map. Both are linear in the features, constants give nothing,
    and features that are a linear map of the queries are found exactly but for the penalty.
    """

    def __init__(
        self, queries: Tensor, finer: Tensor, first: NeighbourhoodKernels, penalty: float
    ) -> None:
        """Prepare the regression of one guidance.

        Args:
            queries: (B, D, h, w), means over cells.
            finer: (B, D, 2h, 2w), means over finer cells.
            first: from the one grid to the other.
            penalty: of the coefficients, in units of the queries' mean variance, > 0.
        """
        with torch.autocast(queries.device.type, enabled=False):
            exact = torch.promote_types(queries.dtype, torch.float32)
            rows, columns = (_mean_of_three(side, queries, exact) for side in queries.shape[2:])
            inputs = queries.to(exact)
            inputs = (inputs - rows @ inputs @ columns.T).flatten(2)  # (B, D, N)
            gram = inputs @ inputs.mT
            # The constant is for images without any colour or texture.
            least = penalty * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-6
            eye = torch.eye(gram.shape[1], dtype=exact, device=gram.device)
            factor = torch.linalg.cholesky(gram + least[:, None, None] * eye)
            fit = torch.cholesky_solve(inputs, factor).unflatten(2, queries.shape[2:])
            # The features lose the mean around them by the adjoint, on fewer channels than theirs.
            self.fit = (fit - rows.T @ fit @ columns).flatten(2).mT  # (B, N, D)
        self.lacking = finer - first(queries)

    def __call__(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        out = features.flatten(2) @ self.fit.to(features.dtype)  # (B, C, D)
        out = out @ self.lacking.flatten(2).to(features.dtype)
        return out.unflatten(2, self.lacking.shape[2:])


def _mean_of_three(length: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean of each value and its two neighbours, edges replicated, (length, length)."""
    eye = torch.eye(length, dtype=dtype, device=like.device)
    return (torch.cat([eye[:1], eye[:-1]]) + eye + torch.cat([eye[1:], eye[-1:]])) / 3


class DetailKernels:
    """Both steps of one guidance, and the detail in between."""

    def __init__(
        self,
        first: NeighbourhoodKernels,
        last: NeighbourhoodKernels,
        *,
        regression: ImageRegression | None = None,
        maps: Tensor | None = None,
        detail: Tensor | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            first: from the grid of the features to the finer one.
            last: from there to the output.
            regression: adds to the first step; ``None`` for nothing.
            maps: (B, width, *finer grid), what ``detail`` is made of; ``None`` without a network.
            detail: (B, C, *finer grid), what is added between the steps; ``None`` for nothing.
        """
        self.first, self.last, self.regression = first, last, regression
        self.maps, self.detail = maps, detail

    def __call__(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W)."""
        return self.last(self._on_finer_grid(features))

    def crop(self, features: Tensor, window: Window) -> Tensor:
        """See :meth:`Kernels.crop`."""
        return self.last.crop(self._on_finer_grid(features), window)

    def settle(self, features: Tensor) -> tuple[NeighbourhoodKernels, Tensor]:
        """See :meth:`NeighbourhoodKernels.settle`; the first step and the detail are done too."""
        return self.last.settle(self._on_finer_grid(features))

    def to_finer_grid(self, features: Tensor) -> Tensor:
        """What the features themselves tell of the finer grid, (B, C, h, w) -> (B, C, 2h, 2w)."""
        fine = self.first(features)
        return fine if self.regression is None else fine + self.regression(features)

    def adding(self, detail: Tensor) -> DetailKernels:
        """The same kernels with this detail, (B, C, *finer grid)."""
        return DetailKernels(
            self.first, self.last, regression=self.regression, maps=self.maps, detail=detail
        )

    def _on_finer_grid(self, features: Tensor) -> Tensor:
        fine = self.to_finer_grid(features)
        return fine if self.detail is None else fine + self.detail.to(fine.dtype)


@UPSAMPLERS.register
class DetailUpsampler(Upsampler):
    """Follows edges, and adds detail that the image tells of, in two ways.

    Features go through the neighbourhood step to a grid twice as fine, and through a second one, of
    the same weights, to the output size. In between, where cells are half as wide, detail is added:

    1. Within one image, features go with colours and textures. A ridge regression of the features
       on the mean queries of their cells, fitted to this image when it is upsampled, says how;
       what the finer cells' queries have beyond the first step's goes through it
       (:class:`ImageRegression`). It needs no training and serves any backbone.
    2. For a backbone of its own (``embed_dim``), a small network predicts what is still lacking of
       the backbone's features of the enlarged image:

        up(F) = K₂(g)·[(K₁(g) + R(g))·M(F) + P·z(g) + b]

    R is the regression, z(g) are ``width`` maps of the image, P a basis of channels, M the channel
    mix x + W·x. It is affine in the features, and linear without the second part. A head of K
    outputs costs K channels as everywhere, since it applies to P as well. Untrained, P, W and b
    are 0.

    Source: ours; the neighbourhood step is that of :class:`NeighbourhoodUpsampler`, the regression
    a relative of the guided filter (He, Sun and Tang, 2010), over the whole image and on queries
    in place of colours.
    """

    name = "detail"
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
        start: str | Path | None = None,
        backend: str = "auto",
    ) -> None:
        """Make an upsampler with initial (untrained) weights.

        Args:
            embed_dim: number of feature channels C, for a network and a channel mix of one
                backbone; ``None`` for neither, and for any backbone.
            radius: of both steps, in cells; see :class:`NeighbourhoodUpsampler`, as for the next
                three.
            query_dim: width of queries and keys.
            levels: scales of the encoder.
            back_projections: corrections of each step.
            width: maps of detail, from 2 to 1024.
            depth: blocks of the network that makes them, from 0 to 64.
            widening: σ of the second step, in cells of the finer grid, over that of the first, from
                0.05 to 100.
            ridge: penalty of the regression, in units of the queries' mean variance, from 0 to 1e6;
                0 leaves the regression out.
            start: name or folder of a trained neighbourhood upsampler, whose encoder is taken;
                it must have the same radius, query_dim and levels.
            backend: of the operators; see :mod:`upfeat.functional`.

        Raises:
            FileNotFoundError: ``start`` is a folder that is not there.
            ValueError: an argument is out of range, or ``start`` is another upsampler.
        """
        super().__init__()
        embed_dim = whole("embed_dim", embed_dim, 1, MOST_CHANNELS, optional=True)
        self.embed_dim = embed_dim
        self.guidance_bands = None if embed_dim is None else 3  # the network sees RGB
        self.width = whole("width", width, 2, MOST_WIDTH)
        self.depth = whole("depth", depth, 0, 64)
        self.widening = number("widening", widening, 0.05, 100)
        self.ridge = number("ridge", ridge, 0, 1e6)
        self.neighbourhood = NeighbourhoodUpsampler(
            radius=radius,
            query_dim=query_dim,
            levels=levels,
            back_projections=back_projections,
        )
        if embed_dim is not None:
            # Channels last: a third faster on a CPU.
            self.network = DetailNetwork(self.width, self.depth).to(
                memory_format=torch.channels_last
            )  # pyright: ignore[reportCallIssue]
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
        """Corrections of each step."""
        return self.neighbourhood.back_projections

    def config(self) -> dict[str, Any]:
        """See :meth:`Upsampler.config`."""
        steps = self.neighbourhood.config()
        network = {} if self.embed_dim is None else {"width": self.width, "depth": self.depth}
        own = {"widening": self.widening, "ridge": self.ridge}
        return {"embed_dim": self.embed_dim, **steps, **network, **own}

    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> DetailKernels:
        """See :meth:`Upsampler.prepare`."""
        guidance = even_bands(guidance)
        step = self.neighbourhood.for_bands(guidance)
        finer = (FINER * grid_size[0], FINER * grid_size[1])
        queries = step.queries(guidance, output_size)
        finer_means = F.adaptive_avg_pool2d(queries, finer)
        means = F.avg_pool2d(finer_means, FINER)
        middle = unit(finer_means)  # keys of the last step, queries of the first
        first = step.attend(middle, unit(means))
        last = step.attend(queries, middle, widening=self.widening)
        regression = None
        if self.ridge:
            regression = ImageRegression(means, finer_means, first, self.ridge)
        maps = None if self.embed_dim is None else self._maps(guidance, finer)
        return DetailKernels(first, last, regression=regression, maps=maps)

    def _maps(self, guidance: Tensor, finer: Size) -> Tensor:
        """What the network makes of an image, (B, 3, H, W) -> (B, width, *finer)."""
        size = (_PIXELS * finer[0], _PIXELS * finer[1])
        if guidance.shape[-2:] != size:
            guidance = F.interpolate(
                guidance, size=size, mode="bilinear", align_corners=False, antialias=True
            )
        seen = guidance.contiguous(memory_format=torch.channels_last)
        return self.network(seen).contiguous()

    def mix(self, features: Tensor) -> Tensor:
        """X + W·x on the coarse grid, (B, C, h, w) -> (B, C, h, w); without a mix the same.

        Raises:
            ValueError: C is not the upsampler's ``embed_dim``.
        """
        if self.embed_dim is None:
            return features
        if features.shape[1] != self.embed_dim:
            raise ValueError(
                f"features has {features.shape[1]} channels but this DetailUpsampler is made for "
                f"{self.embed_dim}; DetailUpsampler() takes any number"
            )
        return features + apply_head(features, self.channel_mix.weight.flatten(1))

    def through(
        self,
        kernels: Kernels,
        mixed: Tensor,
        *,
        head: Tensor | slice | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """See :meth:`Upsampler.through`; heads apply to the detail's basis too."""
        if isinstance(kernels, DetailKernels):  # else settled: the features have their detail
            kernels = self._with_detail(kernels, head)
        return super().through(kernels, mixed, head=head, window=window)

    def settle(self, kernels: Kernels, mixed: Tensor) -> tuple[Kernels, Tensor]:
        """See :meth:`Upsampler.settle`; the last step, and features (B, C, 2h, 2w) with detail."""
        assert isinstance(kernels, DetailKernels)
        return self._with_detail(kernels, None).settle(mixed)

    def detail_on_finer_grid(self, kernels: DetailKernels) -> Tensor:
        """What the network adds between the steps, (B, C, 2h, 2w)."""
        assert kernels.maps is not None, "there is no network without embed_dim"
        return self._detail(kernels.maps, None)

    def _with_detail(self, kernels: DetailKernels, head: Tensor | slice | None) -> DetailKernels:
        """The kernels with what a head makes of the network's detail."""
        if kernels.maps is None:
            return kernels
        return kernels.adding(self._detail(kernels.maps, head))

    def _detail(self, maps: Tensor, head: Tensor | slice | None) -> Tensor:
        """The network's detail after a head, (B, width, …) -> (B, K, …)."""
        basis, constant = self.detail.weight.flatten(1), self.detail.bias
        assert constant is not None
        if isinstance(head, slice):
            basis, constant = basis[head], constant[head]
        elif head is not None:
            basis, constant = head @ basis, head @ constant  # (K, width) or (B, K, width)
        return apply_head(maps, basis) + constant[..., None, None]

    def _start_from(self, start: str | Path) -> None:
        from upfeat.upsamplers.pretrained import create_upsampler

        trained = create_upsampler(start)
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
        """Keep only a share of the channel mix, if there is one: 0 leaves channels as they are."""
        if self.embed_dim is None:
            return
        self.channel_mix.weight.mul_(share)
