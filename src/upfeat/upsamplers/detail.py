"""The neighbourhood step twice, with detail in between that is read off the image."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.upsamplers.base import Kernels, Size, Upsampler, Window, apply_head
from upfeat.upsamplers.joint_bilateral import NeighbourhoodKernels
from upfeat.upsamplers.neighbourhood import NeighbourhoodUpsampler, pointwise, pooled_unit

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

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> the same."""
        return x + pointwise(self.last, F.gelu(self.hidden(x)))


class DetailKernels:
    """Both steps of one guidance, and the maps of its detail."""

    def __init__(
        self,
        first: NeighbourhoodKernels,
        last: NeighbourhoodKernels,
        maps: Tensor,
        detail: Tensor | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            first: from the grid of the features to the finer one.
            last: from there to the output.
            maps: (B, width, *finer grid).
            detail: (B, C, *finer grid), what is added between the steps; ``None`` for nothing.
        """
        self.first, self.last, self.maps, self.detail = first, last, maps, detail

    def __call__(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W)."""
        return self.last(self._on_finer_grid(features))

    def crop(self, features: Tensor, window: Window) -> Tensor:
        """See :meth:`Kernels.crop`."""
        return self.last.crop(self._on_finer_grid(features), window)

    def settle(self, features: Tensor) -> tuple[NeighbourhoodKernels, Tensor]:
        """See :meth:`NeighbourhoodKernels.settle`; the first step and the detail are done too."""
        return self.last.settle(self._on_finer_grid(features))

    def _on_finer_grid(self, features: Tensor) -> Tensor:
        fine = self.first(features)
        return fine if self.detail is None else fine + self.detail.to(fine.dtype)


class DetailUpsampler(Upsampler):
    """Follows edges, and predicts from the image what the backbone would see at twice its size.

    Features go through the neighbourhood step to a grid twice as fine; a small network adds to
    them, there, what the coarse features lack of those of the enlarged image, as far as the image
    tells; a second neighbourhood step of the same weights goes to the output size:

        up(F) = K₂(g)·[K₁(g)·M(F) + P·z(g) + b]

    z(g) are ``width`` maps of the image, P a basis of channels, M the channel mix x + W·x. It is
    affine in the features. A head of K outputs costs K channels as everywhere, since it applies to
    P as well. Untrained, P, W and b are 0, and it is a neighbourhood upsampler in two steps. It
    belongs to one backbone.

    Source: ours; the neighbourhood step is that of :class:`NeighbourhoodUpsampler`.
    """

    name = "detail"

    def __init__(
        self,
        embed_dim: int,
        *,
        radius: int = 2,
        query_dim: int = 32,
        levels: int = 4,
        back_projections: int = 1,
        width: int = 64,
        depth: int = 3,
        widening: float = 1.25,
        start: str | Path | None = None,
        backend: str = "auto",
    ) -> None:
        """Make an upsampler with initial (untrained) weights.

        Args:
            embed_dim: number of feature channels C.
            radius: of both steps, in cells; see :class:`NeighbourhoodUpsampler`, as for the next
                three.
            query_dim: width of queries and keys.
            levels: scales of the encoder.
            back_projections: corrections of each step.
            width: maps of detail, ≥ 2.
            depth: blocks of the network that makes them, ≥ 0.
            widening: σ of the second step, in cells of the finer grid, over that of the first, > 0.
            start: name or folder of a trained neighbourhood upsampler, whose encoder is taken;
                it must have the same radius, query_dim and levels.
            backend: of the operators; see :mod:`upfeat.functional`.

        Raises:
            FileNotFoundError: ``start`` is a folder that is not there.
            ValueError: an argument is out of range, or ``start`` is another upsampler.
        """
        super().__init__()
        for label, value, least in (("embed_dim", embed_dim, 1), ("width", width, 2)):
            if value < least:
                raise ValueError(f"{label}={value} must be {least} or more")
        if depth < 0:
            raise ValueError(f"depth={depth} must be 0 or more")
        if not widening > 0:
            raise ValueError(f"widening={widening} must be above 0")
        self.embed_dim, self.width, self.depth = embed_dim, width, depth
        self.widening = widening
        self.neighbourhood = NeighbourhoodUpsampler(
            radius=radius,
            query_dim=query_dim,
            levels=levels,
            back_projections=back_projections,
            backend=backend,
        )
        # Channels last: a third faster on a CPU.
        self.network = DetailNetwork(width, depth).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.detail = nn.Conv2d(width, embed_dim, 1)
        self.channel_mix = nn.Conv2d(embed_dim, embed_dim, 1, bias=False)
        for layer in (self.detail, self.channel_mix):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.detail.bias)  # pyright: ignore[reportArgumentType]
        if start is not None:
            self._start_from(start)

    @property
    def back_projections(self) -> int:
        """Corrections of each step."""
        return self.neighbourhood.back_projections

    def config(self) -> dict[str, Any]:
        """See :meth:`Upsampler.config`."""
        steps = self.neighbourhood.config()
        own = {"width": self.width, "depth": self.depth, "widening": self.widening}
        return {"embed_dim": self.embed_dim, **steps, **own}

    def prepare(self, guidance: Tensor, grid_size: Size, output_size: Size) -> DetailKernels:
        """See :meth:`Upsampler.prepare`."""
        step = self.neighbourhood
        finer = (FINER * grid_size[0], FINER * grid_size[1])
        queries = step.queries(guidance, output_size)
        middle = pooled_unit(queries, finer)  # keys of the last step, queries of the first
        first = step.attend(middle, pooled_unit(queries, grid_size), grid_size, finer)
        last = step.attend(queries, middle, finer, output_size, widening=self.widening)
        seen = guidance
        size = (_PIXELS * finer[0], _PIXELS * finer[1])
        if guidance.shape[-2:] != size:
            seen = F.interpolate(
                guidance, size=size, mode="bilinear", align_corners=False, antialias=True
            )
        seen = seen.contiguous(memory_format=torch.channels_last)
        return DetailKernels(first, last, self.network(seen).contiguous())

    def mix(self, features: Tensor) -> Tensor:
        """X + W·x on the coarse grid, (B, C, h, w) -> (B, C, h, w).

        Raises:
            ValueError: C is not the upsampler's ``embed_dim``.
        """
        if features.shape[1] != self.embed_dim:
            raise ValueError(
                f"features has {features.shape[1]} channels but this DetailUpsampler is made for "
                f"{self.embed_dim}; use NeighbourhoodUpsampler for any number"
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
            kernels = self._adding(kernels, head)
        return super().through(kernels, mixed, head=head, window=window)

    def settle(self, kernels: DetailKernels, mixed: Tensor) -> tuple[NeighbourhoodKernels, Tensor]:
        """Do what no window changes, once for any number of them.

        Args:
            kernels: of the image, from :meth:`prepare`.
            mixed: (B, C, h, w), the coarse features after :meth:`mix`.

        Returns:
            The last step, and the features (B, C, 2h, 2w) with detail that it takes:
            :meth:`render` gives the same of them, with any head.
        """
        return self._adding(kernels, None).settle(mixed)

    def detail_on_finer_grid(self, kernels: DetailKernels) -> Tensor:
        """What is added to the features between the steps, (B, C, 2h, 2w)."""
        return self._detail(kernels.maps, None)

    def _adding(self, kernels: DetailKernels, head: Tensor | slice | None) -> DetailKernels:
        """The kernels with what a head makes of the detail."""
        detail = self._detail(kernels.maps, head)
        return DetailKernels(kernels.first, kernels.last, kernels.maps, detail)

    def _detail(self, maps: Tensor, head: Tensor | slice | None) -> Tensor:
        """Detail on the finer grid after a head, (B, width, …) -> (B, K, …)."""
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

    @torch.no_grad()
    def scale_mix(self, share: float) -> None:
        """Keep only a share of the channel mix: 0 leaves channels as they are."""
        self.channel_mix.weight.mul_(share)
