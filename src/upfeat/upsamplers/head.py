"""Linear heads: one rule for features, for a basis of channels, and for constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from upfeat.types import Window
from upfeat.upsamplers.maps import Map, is_recorded


@dataclass(frozen=True)
class Head:
    """A linear map of channels, a range of them, or all as they are; and a constant.

    Attributes:
        weight: (K, C), one for each image (B, K, C), a range of channels, or ``None`` for all.
        bias: (K,), added at last; ``None`` for nothing.
    """

    weight: Tensor | slice | None = None
    bias: Tensor | None = None

    @staticmethod
    def of(head: Head | Tensor | slice | None) -> Head:
        """The head itself, or one of this weight."""
        return head if isinstance(head, Head) else Head(head)

    def on_channels(self, values: Tensor) -> Tensor:
        """Apply the weight to values of every channel, (C, …) -> (K, …), or (B, K, …)."""
        if self.weight is None:
            return values
        return values[self.weight] if isinstance(self.weight, slice) else self.weight @ values

    def constant(self, offset: Tensor | None) -> Tensor | None:
        """The constant after the head, (K,), of features with a constant ``offset`` (C,)."""
        if offset is None:
            return self.bias
        moved = self.on_channels(offset)
        return moved if self.bias is None else moved + self.bias


@overload
def apply_head(features: Tensor, head: Tensor | slice | None) -> Tensor: ...
@overload
def apply_head(features: Tensor | Map, head: Tensor | slice | None) -> Tensor | Map: ...
def apply_head(features: Tensor | Map, head: Tensor | slice | None) -> Tensor | Map:
    """Apply a head's weight, or choose channels, at every cell.

    Args:
        features: (B, C, h, w).
        head: (K, C), one for each image (B, K, C), a range of channels, or ``None`` for nothing.

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
    """A map after a head."""

    def __init__(self, source: Map, head: Tensor | slice, bias: Tensor | None = None) -> None:
        """Keep them; see :func:`apply_head`. The bias is (K,) or (B, K)."""
        self.source, self.head, self.bias = source, head, bias
        self.size = source.size
        self.recorded = source.recorded or (isinstance(head, Tensor) and is_recorded(head))

    def at(self, window: Window) -> Tensor:
        """See :meth:`Map.at`."""
        out = apply_head(self.source.at(window), self.head)
        return out if self.bias is None else out + self.bias[..., None, None]


def add_offset(out: Tensor, offset: Tensor) -> Tensor:
    """Add a constant per channel; in place when autograd does not watch (the output is large).

    Args:
        out: (B, C, H, W).
        offset: (C,).
    """
    shaped = offset[:, None, None]
    return out + shaped if torch.is_grad_enabled() and out.requires_grad else out.add_(shaped)
