"""The detail upsampler with a network that reads features of a backbone's early layers."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from upfeat.bounds import MOST_CHANNELS, whole
from upfeat.upsamplers.base import UPSAMPLERS, Size
from upfeat.upsamplers.detail import FINER, DetailUpsampler
from upfeat.upsamplers.early_network import EarlyMaps, EarlyNetwork
from upfeat.upsamplers.maps import Map
from upfeat.upsamplers.neighbourhood import MOST_WIDTH

logger = logging.getLogger(__name__)

MOST_DISPLACEMENT = 64
"""Largest displacement, pixels: less than half of the largest strides."""


@UPSAMPLERS.register
class EarlyDetailUpsampler(DetailUpsampler):
    """Detail upsampler that predicts detail from a backbone's early layers.

    As :class:`DetailUpsampler`, whose regression uses early layers too where they are given, but
    the network that predicts the remaining difference reads early layers in place of pixels:

        up(F) = K₂(g)·S(g, e)·[(K₁(g) + R(g, e))·F + P·z(e) + b]

    e are the features of early layers, z(e) ``width`` maps of them; :class:`DetailUpsampler`
    defines the other symbols. The network learns, from photographs alone, what features of the
    image at twice its size add (``benchmarks/learn_early.py``): much of the gain of five passes can
    be predicted from one. Without early layers this is the detail upsampler without a network, and
    a warning is logged.

    Source: ours.
    """

    name = "early_detail"
    wants_hidden = True

    def __init__(
        self,
        embed_dim: int,
        *,
        hidden_dim: int,
        radius: int = 2,
        query_dim: int = 32,
        levels: int = 4,
        back_projections: int = 1,
        width: int = 128,
        depth: int = 4,
        widening: float = 1.25,
        ridge: float = 0.3,
        smoothing: int = 0,
        least_contrast: float = 0.0,
        displacement: int = 0,
        backend: str = "auto",
    ) -> None:
        """Make an upsampler with initial (untrained) weights.

        Args:
            embed_dim: number of feature channels C.
            hidden_dim: number of channels of the early layers, as
                :meth:`upfeat.Backbone.with_hidden` returns them.
            radius: radius of both steps, in cells; see :class:`DetailUpsampler`.
            query_dim: number of channels of queries and keys, as in :class:`DetailUpsampler`.
            levels: scales of the encoder, as in :class:`DetailUpsampler`.
            back_projections: corrections in each step, as in :class:`DetailUpsampler`.
            width: number of the network's maps, from 2 to 1024.
            depth: number of residual blocks in the network, from 0 to 64.
            widening: ratio of the steps' σ, as in :class:`DetailUpsampler`.
            ridge: penalty of the regression, as in :class:`DetailUpsampler`.
            smoothing: radius of the smoothing, as in :class:`DetailUpsampler`.
            least_contrast: contrast of both steps, as in :class:`DetailUpsampler`.
            displacement: see :attr:`Upsampler.displacement`; from -64 to 64.
            backend: backend of the operators; see :mod:`upfeat.functional`.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__(
            radius=radius,
            query_dim=query_dim,
            levels=levels,
            back_projections=back_projections,
            widening=widening,
            ridge=ridge,
            smoothing=smoothing,
            least_contrast=least_contrast,
        )
        self.displacement = whole(
            "displacement", displacement, -MOST_DISPLACEMENT, MOST_DISPLACEMENT
        )
        self.embed_dim = whole("embed_dim", embed_dim, 1, MOST_CHANNELS)
        self.hidden_dim = whole("hidden_dim", hidden_dim, 1, MOST_CHANNELS)
        self.width = whole("width", width, 2, MOST_WIDTH)
        self.depth = whole("depth", depth, 0, 64)
        self.early_network = EarlyNetwork(self.hidden_dim, self.width, self.depth)
        self.detail = nn.Conv2d(self.width, self.embed_dim, 1)
        nn.init.zeros_(self.detail.weight)
        nn.init.zeros_(self.detail.bias)  # pyright: ignore[reportArgumentType]
        self._warned = False
        self.set_backend(backend)

    def config(self) -> dict[str, Any]:
        """See :meth:`Upsampler.config`."""
        network = {"hidden_dim": self.hidden_dim, "width": self.width, "depth": self.depth}
        network["displacement"] = self.displacement
        return super().config() | network

    @property
    def reach(self) -> int:
        """See :attr:`Upsampler.reach`; counts early layers that are given too."""
        network = self._last_reach + self.early_network.reach // FINER + 2
        return max(super().reach, network)

    def _warn(self) -> None:
        """Log, once, that the network is not used."""
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            logger.warning(
                "early_detail is used without early layers, so without its network: give "
                "hidden=backbone.with_hidden(x)[1], as upfeat.FeatUp does by itself"
            )

    def _maps(
        self, guidance: Tensor, hidden: Tensor | None, finer: Size, *, whole: bool
    ) -> Map | None:
        """See :meth:`DetailUpsampler._maps`; computed from ``hidden``, ``None`` without it."""
        del guidance
        if hidden is None:
            self._warn()
            return None
        if hidden.shape[1] != self.hidden_dim:
            raise ValueError(
                f"hidden has {hidden.shape[1]} channels but this EarlyDetailUpsampler is made for "
                f"{self.hidden_dim}; give the early layers of the backbone that it was trained for"
            )
        return EarlyMaps(self.early_network, hidden, finer, whole=whole)
