"""Interface of the upsampling weights of one image."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from upfeat.types import Window


class Kernels(Protocol):
    """Per-pixel upsampling weights of one guidance, ready for any features on its grid.

    If they have a ``grid_size``, (h, w), or an ``output_size``, (height, width),
    :meth:`Upsampler.render` checks features and windows against them.
    """

    def __call__(self, features: Any) -> Tensor:
        """Upsample features, (B, C, h, w) or from :meth:`Upsampler.precompute`, -> (B, C, H, W)."""
        ...

    def crop(self, features: Any, window: Window) -> Tensor:
        """A window of the result of :meth:`__call__`, computed without the rest of the result.

        (B, C, h, w) -> (B, C, window.height, window.width).
        """
        ...
