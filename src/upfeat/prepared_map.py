"""Kernels of an image, and values that all windows of its map share, kept between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from upfeat.feature_map import FeatureMap
from upfeat.snapshots import Snapshot
from upfeat.upsamplers import Kernels, Upsampler
from upfeat.upsamplers.maps import Map
from upfeat.upsamplers.step import Corrected

__all__ = [
    "PreparedMap",
]


class PreparedMap(FeatureMap):
    """A map of an upsampler and its inputs; kernels are computed when they are first needed.

    Attributes:
        features: (B, C, h, w), coarse features.
        guidance: the image that guides the upsampler.
        hidden: features of early layers, or ``None``.
        upsampler: upsampler of the features.
        max_memory: bound in bytes, or ``None``: with a bound, less is kept.
    """

    features: Tensor
    guidance: Tensor
    hidden: Tensor | None
    upsampler: Upsampler
    max_memory: int | None

    # Replaced as a whole by each thread, so that another one sees the old or the new.
    _made: tuple[Any, Snapshot, tuple[Kernels, Tensor]] | None = None
    _precomputed: tuple[Kernels, Snapshot, tuple[Kernels, Tensor | Map]] | None = None

    @property
    def mixed(self) -> Tensor:
        """The coarse features after the upsampler's channel mix, (B, C, h, w)."""
        return self._parts()[1]

    @property
    def kernels(self) -> Kernels:
        """The upsampling weights of the image."""
        return self._parts()[0]

    def __getstate__(self) -> dict[str, Any]:
        """Copy or pickle the inputs alone; a copy computes kernels and features again."""
        state = {**self.__dict__, "_made": None, "_precomputed": None}
        for name in ("features", "guidance", "hidden"):
            # Only leaf tensors can be copied with their autograd graph.
            if state[name] is not None and not state[name].is_leaf:
                state[name] = state[name].detach()
        return state

    def _precompute(self) -> tuple[Kernels, Tensor | Map]:
        """Kernels and features of the same map, after the computations that all windows share.

        Both are kept for the next window, unless an autograd graph would be kept with them.
        """
        kernels, mixed = self._parts()
        kept = self._precomputed  # another thread may replace it
        if kept is not None and kept[0] is kernels and kept[1].holds([mixed]):
            return kept[2]
        found = self.upsampler.precompute(kernels, mixed)
        if self.max_memory is not None and isinstance(found[1], Corrected):
            found[1].keep_less()
        recorded = found[1].requires_grad if isinstance(found[1], Tensor) else found[1].recorded
        if found[1] is not mixed and not recorded:
            self._precomputed = kernels, Snapshot([mixed]), found
        return found

    def _parts(self) -> tuple[Kernels, Tensor]:
        """Kernels and mixed features; kept until an input, a weight or :meth:`_way` changes."""
        sources, way = self._sources(), self._way()
        kept = self._made  # another thread may replace it
        if kept is None or kept[0] != way or not kept[1].holds(sources):
            grid = (self.features.shape[2], self.features.shape[3])
            size = (self.shape[2], self.shape[3])
            given = self.guidance, grid, size, self.features, self.hidden
            kernels = self.upsampler.prepare_with(*given)
            mixed = self.upsampler.mix(self.features)
            self._made = kept = way, Snapshot(sources), (kernels, mixed)
            self._precomputed = None
        return kept[2]

    def _way(self) -> tuple[str, torch.dtype | None]:
        """The backend of the operators, and the precision of products under autocast."""
        kind = self.features.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return self.upsampler.backend, torch.get_autocast_dtype(kind) if autocast else None

    def _sources(self) -> list[Tensor]:
        weights = (*self.upsampler.parameters(), *self.upsampler.buffers())
        hidden = [] if self.hidden is None else [self.hidden]
        return [self.features, self.guidance, *hidden, *weights]
