"""Forms: upsamplers rewritten so that one traced graph serves every size.

Exchange formats support neither lists nor branches. A form computes the result of its upsampler,
for whole maps only, with PyTorch's plain operators and without a decision that depends on a size.
A linear head is folded in.
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
    """Exportable module from features and guidance to a head's output at every pixel."""

    name: ClassVar[str]
    """Name of the upsampler."""
    least_side: int = 1
    """Least length of the guidance's sides, pixels."""

    def __init__(self, upsampler: Upsampler, head: Head) -> None:
        """Fold head, channel mix and offset into one linear map.

        Args:
            upsampler: the upsampler, in eval mode.
            head: the head, with a weight (K, C) or ``None``.
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

    def forward(
        self,
        features: Tensor,
        guidance: Tensor,
        size: Size | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Upsample features, (B, C, h, w) -> (B, K, *size).

        Args:
            features: (B, C, h, w).
            guidance: (B, 3, H, W).
            size: (height, width) of the result; ``None`` for the guidance's size.
            hidden: (B, D', h', w'), features of early layers, for upsamplers with
                :attr:`Upsampler.takes_hidden`; ``None`` for none.
        """
        out = self.kernels(apply_head(features, self.weight), guidance, size, hidden)
        return out if self.constant is None else out + self.constant[:, None, None]

    @abstractmethod
    def kernels(
        self,
        features: Tensor,
        guidance: Tensor,
        size: Size | None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Upsample the coarse features after the head, (B, K, h, w) -> (B, K, *size).

        Early layers, ``hidden``, are ignored by forms whose upsamplers do not take them.
        """


@torch.no_grad()
def channel_mix(upsampler: Upsampler) -> Tensor | None:
    """Return the matrix (C, C) of an upsampler's channel mix; ``None`` if it has no mix."""
    channels = getattr(upsampler, "embed_dim", None)
    if channels is None or type(upsampler).mix is Upsampler.mix:
        return None
    first = next(upsampler.parameters())
    eye = torch.eye(channels, dtype=first.dtype, device=first.device)
    return upsampler.mix(eye[..., None, None]).flatten(1).T


PORTABLE = Registry[type[Form]]("form for export")
"""Forms by the names of their upsamplers."""


class FixedForm(Form):
    """Form for one size, which runs an upsampler's own code on the eager backend."""

    name = "any"

    def __init__(self, upsampler: Upsampler, head: Head) -> None:
        """See :class:`Form`."""
        nn.Module.__init__(self)
        self.upsampler, self.head = copy.deepcopy(upsampler), head
        self.upsampler.set_backend("eager")

    def forward(
        self,
        features: Tensor,
        guidance: Tensor,
        size: Size | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Form.forward`."""
        size = (guidance.shape[2], guidance.shape[3]) if size is None else size
        grid = (features.shape[2], features.shape[3])
        kernels = self.upsampler.prepare_with(guidance, grid, size, features, hidden)
        return self.upsampler.render(kernels, self.upsampler.mix(features), head=self.head)

    def kernels(
        self,
        features: Tensor,
        guidance: Tensor,
        size: Size | None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Unused: the upsampler applies the head itself."""
        raise NotImplementedError


def form_of(upsampler: Upsampler, head: Head) -> Form:
    """Return the form of an upsampler; :class:`FixedForm` if none is registered for it."""
    names = (getattr(cls, "name", "") for cls in type(upsampler).__mro__)
    made = next((PORTABLE[name] for name in names if name in PORTABLE), FixedForm)
    return made(upsampler, head)
