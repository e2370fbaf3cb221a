"""Upsamplers with the call signature of AnyUp, JAFAR, NAF and LoftUp, the image first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from upfeat.bounds import instance
from upfeat.types import Size
from upfeat.upsamplers.base import Upsampler


class ImageFirst(nn.Module):
    """An upsampler that is called as ``(image, features, output_size)``.

    For code that was written for ``torch.hub.load("valeoai/NAF", "naf")`` or similar loaders: only
    the line that loads the upsampler changes.
    """

    if TYPE_CHECKING:  # nn.Module declares the result of every call as Any

        def __call__(
            self,
            image: Tensor,
            features: Tensor,
            output_size: Size | None = None,
            *,
            out: Tensor | None = None,
            q_chunk_size: int | None = None,
        ) -> Tensor:
            """See :meth:`forward`."""
            ...

    def __init__(self, upsampler: Upsampler) -> None:
        """Wrap an upsampler.

        Args:
            upsampler: any upsampler of this library.

        Raises:
            TypeError: ``upsampler`` is no upsampler, for example a name.
        """
        super().__init__()
        fix = "give an Upsampler, as upfeat.load_upsampler(name) returns it"
        self.upsampler = instance("upsampler", upsampler, Upsampler, fix)

    def forward(
        self,
        image: Tensor,
        features: Tensor,
        output_size: Size | None = None,
        *,
        out: Tensor | None = None,
        q_chunk_size: int | None = None,
    ) -> Tensor:
        """Upsample features.

        Args:
            image: (B, 3, H, W), normalised as in the training of the upsampler: by ImageNet's mean
                and standard deviation for published weights.
            features: (B, C, h, w).
            output_size: (height, width); ``None`` for the image's size.
            out: a buffer to fill; see :meth:`upfeat.AnyUp.forward`.
            q_chunk_size: AnyUp's bound on memory; accepted and ignored.

        Returns:
            (B, C, *output_size).

        Raises:
            ValueError: as :meth:`Upsampler.forward`.
        """
        options: dict[str, Any] = {} if out is None else {"out": out}
        return self.upsampler(features, image, output_size, **options)
