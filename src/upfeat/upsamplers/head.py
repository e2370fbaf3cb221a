"""Linear heads, and their application to features, to a basis of channels, and to constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from upfeat.types import Window
from upfeat.upsamplers.maps import Map, is_recorded


@dataclass(frozen=True)
class Head:
    """A linear map of channels, a range of channels, or all channels unchanged; plus a constant.

    Attributes:
        weight: (K, C); or (B, K, C), a map for each image; or a range of channels; or ``None`` for
            all channels unchanged.
        bias: (K,), added to the result; ``None`` for no constant.
    """

    weight: Tensor | slice | None = None
    bias: Tensor | None = None

    @staticmethod
    def of(head: Head | Tensor | slice | None) -> Head:
        """Return ``head`` as a :class:`Head`; anything else is the weight of a new head."""
        return head if isinstance(head, Head) else Head(head)

    def on_channels(self, values: Tensor) -> Tensor:
        """Apply the weight to a tensor with a value per channel, (C, …) -> (K, …) or (B, K, …)."""
        if self.weight is None:
            return values
        return values[self.weight] if isinstance(self.weight, slice) else self.weight @ values

    def constant(self, offset: Tensor | None) -> Tensor | None:
        """Compute the constant, (K,), of the head's output for features with ``offset`` (C,)."""
        if offset is None:
            return self.bias
        moved = self.on_channels(offset)
        return moved if self.bias is None else moved + self.bias


@overload
def apply_head(features: Tensor, head: Tensor | slice | None) -> Tensor: ...
@overload
def apply_head(features: Tensor | Map, head: Tensor | slice | None) -> Tensor | Map: ...
def apply_head(features: Tensor | Map, head: Tensor | slice | None) -> Tensor | Map:
    """Apply a head's weight, or select channels, at every cell.

    Args:
        features: (B, C, h, w).
        head: as :attr:`Head.weight`; ``None`` returns the features themselves.

    Returns:
        (B, K, h, w).
    """
    if head is None:
        return features
    if not isinstance(features, Tensor):
        return Headed(features, head)
    if isinstance(head, slice):
        return features[:, head].contiguous()
    # On a CPU a matrix product is faster than a 1×1 convolution.
    return (head @ features.flatten(2)).unflatten(2, features.shape[2:])


class Headed:
    """A map to whose windows a head is applied when they are read."""

    def __init__(self, source: Map, head: Tensor | slice, bias: Tensor | None = None) -> None:
        """Keep the map, the head (see :func:`apply_head`) and the bias, (K,) or (B, K)."""
        self.source, self.head, self.bias = source, head, bias
        self.size = source.size
        added = [one for one in (head, bias) if isinstance(one, Tensor)]
        self.recorded = source.recorded or is_recorded(*added)

    def at(self, window: Window) -> Tensor:
        """See :meth:`Map.at`."""
        out = apply_head(self.source.at(window), self.head)
        return out if self.bias is None else out + self.bias[..., None, None]


def add_offset(out: Tensor, offset: Tensor) -> Tensor:
    """Add a constant per channel; in place unless gradients are recorded, as the output is large.

    Args:
        out: (B, C, H, W).
        offset: (C,), or (B, C).
    """
    shaped = offset[..., None, None]
    return out + shaped if torch.is_grad_enabled() and out.requires_grad else out.add_(shaped)
