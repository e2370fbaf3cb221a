"""Upsamplers as graphs for other run-times: PyTorch's plain operators, and no choice by size.

A form computes the same as its upsampler, whole maps only, in an arithmetic that one traced graph
can do for every size: exchange formats know neither lists nor branches. A linear head is folded in.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from upfeat.registry import Registry
from upfeat.types import Size
from upfeat.upsamplers.base import Upsampler
from upfeat.upsamplers.head import Head, apply_head


class Form(nn.Module):
    """Features and guidance in, what a head makes of the upsampled features out."""

    name: ClassVar[str]
    """Of the upsampler."""
    least_side: int = 1
    """Pixels of the guidance's sides, at least."""

    def __init__(self, upsampler: Upsampler, head: Head) -> None:
        """Fold head, channel mix and constant into one.

        Args:
            upsampler: in eval mode.
            head: whose weight is (K, C) or ``None``.
        """
        super().__init__()
        weight = channel_mix(upsampler)
        if weight is None:
            weight = head.weight
        elif head.weight is not None:
            weight = head.on_channels(weight)
        constant = head.constant(upsampler.offset)
        self.weight: Tensor | None
        self.constant: Tensor | None
        for name, value in (("weight", weight), ("constant", constant)):
            assert not isinstance(value, slice)
            self.register_buffer(name, None if value is None else value.detach().clone())

    def forward(self, features: Tensor, guidance: Tensor, size: Size | None = None) -> Tensor:
        """(B, C, h, w), (B, 3, H, W) -> (B, K, *size), the guidance's size by default."""
        out = self.kernels(apply_head(features, self.weight), guidance, size)
        return out if self.constant is None else out + self.constant[:, None, None]

    @abstractmethod
    def kernels(self, features: Tensor, guidance: Tensor, size: Size | None) -> Tensor:
        """Upsample what the head made of the coarse features, (B, K, h, w) -> (B, K, *size)."""


@torch.no_grad()
def channel_mix(upsampler: Upsampler) -> Tensor | None:
    """The matrix (C, C) of an upsampler's channel mix; ``None`` where it mixes none."""
    channels = getattr(upsampler, "embed_dim", None)
    if channels is None or type(upsampler).mix is Upsampler.mix:
        return None
    first = next(upsampler.parameters())
    eye = torch.eye(channels, dtype=first.dtype, device=first.device)
    return upsampler.mix(eye[..., None, None]).flatten(1).T


PORTABLE = Registry[type[Form]]("form for export")
"""Forms by the upsampler's name."""


class FixedForm(Form):
    """Any other upsampler by its own code, on the portable backend, for one size."""

    name = "any"

    def __init__(self, upsampler: Upsampler, head: Head) -> None:
        """See :class:`Form`."""
        nn.Module.__init__(self)
        self.upsampler, self.head = copy.deepcopy(upsampler), head
        self.upsampler.set_backend("eager")

    def forward(self, features: Tensor, guidance: Tensor, size: Size | None = None) -> Tensor:
        """See :meth:`Form.forward`."""
        size = (guidance.shape[2], guidance.shape[3]) if size is None else size
        grid = (features.shape[2], features.shape[3])
        kernels = self.upsampler.prepare(guidance, grid, size, features)
        return self.upsampler.render(kernels, self.upsampler.mix(features), head=self.head)

    def kernels(self, features: Tensor, guidance: Tensor, size: Size | None) -> Tensor:
        """Unused: the upsampler applies the head itself."""
        raise NotImplementedError


def form_of(upsampler: Upsampler, head: Head) -> Form:
    """The form of an upsampler; :class:`FixedForm` where it has none of its own."""
    names = (getattr(cls, "name", "") for cls in type(upsampler).__mro__)
    made = next((PORTABLE[name] for name in names if name in PORTABLE), FixedForm)
    return made(upsampler, head)
