"""Common base of published upsamplers that use ImageNet's normalisation and large networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from upfeat.normalization import IMAGENET
from upfeat.types import Size, Window
from upfeat.upsamplers import compiled_encoders
from upfeat.upsamplers.base import Upsampler
from upfeat.upsamplers.checks import check_buffer, check_inputs, check_preparation

Prepare = TypeVar("Prepare", bound=Callable[..., Any])

_BAND_BYTES = 32 * 2**20
"""Approximate size of a band of rows, before it is copied into a caller's buffer."""


def in_own_precision(prepare: Prepare) -> Prepare:
    """Make ``prepare`` check its arguments, and compute in their precision under autocast, too."""

    @wraps(prepare)
    def exact(
        self: PublishedUpsampler,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
        **options: Any,
    ) -> Any:
        needed = features if self.needs_features else None
        sizes = check_preparation(guidance, grid_size, output_size, needed)
        if self.needs_features:
            self.check_features(features)
        if not torch.is_autocast_enabled(guidance.device.type):
            return prepare(self, guidance, *sizes, features, **options)
        with torch.autocast(guidance.device.type, enabled=False):
            return prepare(self, guidance, *sizes, features, **options)

    return cast(Prepare, exact)


class PublishedUpsampler(Upsampler):
    """An upsampler of a fixed output size, which can fill a caller's buffer by bands of rows."""

    mean, std = IMAGENET

    if TYPE_CHECKING:  # nn.Module declares the result of every call as Any

        def __call__(
            self,
            features: Tensor,
            guidance: Tensor,
            output_size: Size | None = None,
            *,
            hidden: Tensor | None = None,
            out: Tensor | None = None,
        ) -> Tensor:
            """See :meth:`forward`."""
            ...

    def check_features(self, features: Tensor | None) -> None:
        """Check features on which the weights depend.

        Raises:
            ValueError: they are ``None``, or have another number of channels than ``embed_dim``.
        """
        name, channels = type(self).__name__, getattr(self, "embed_dim", None)
        if features is None:
            raise ValueError(
                f"features are missing: {name}'s weights depend on them; pass features="
            )
        if channels is not None and features.shape[1] != channels:
            raise ValueError(
                f"features has {features.shape[1]} channels but this {name} is made for "
                f"{channels}; take the checkpoint of the features' backbone, or AnyUp"
            )

    def exact(self, x: Tensor, *beside: Tensor) -> Tensor:
        """Convert to a precision that holds the parameters and ``beside`` too: float32 at least.

        The cost of the encoders hardly depends on the number of feature channels, and five layers
        in half precision would cost the weights two digits.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        for other in (next(self.parameters()), *beside):
            dtype = torch.promote_types(dtype, other.dtype)
        return x.to(dtype)

    def compiled(self, *tensors: Tensor) -> bool:
        """Return whether the compiled library can run the image encoders on these tensors."""
        return self.backend in ("auto", "cpu") and compiled_encoders.can_run(self, *tensors)

    def forward(
        self,
        features: Tensor,
        guidance: Tensor,
        output_size: Size | None = None,
        *,
        hidden: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Upsample features; see :meth:`Upsampler.forward`.

        Args:
            features: (B, C, h, w).
            guidance: (B, 3, H, W) normalised by :attr:`mean` and :attr:`std`.
            output_size: (height, width); ``None`` for the guidance's size.
            hidden: ``None``; these upsamplers make no use of it.
            out: a buffer (B, C, *output_size) of any floating-point type, on any device, that is
                filled one band of rows at a time, so that no other tensor of that size is
                allocated. No gradients are recorded.

        Returns:
            ``out``, or (B, C, *output_size).

        Raises:
            ValueError: as :meth:`Upsampler.forward`, or the buffer has another shape, or shares
                memory with the features or the guidance.
        """
        given = [one for one in (features, guidance) if isinstance(one, Tensor)]
        if any(isinstance(side, torch.SymInt) for one in given for side in one.shape[2:]):
            raise ValueError(
                f"{self.name} cannot be exported for a height and width yet unknown: its weights "
                "are made for one size; export it for fixed ones, a dynamic batch included"
            )
        if out is None:
            return super().forward(features, guidance, output_size, hidden=hidden)
        size = check_inputs(features, guidance, output_size)
        check_buffer(out, (*features.shape[:2], *size), features, guidance)
        with torch.no_grad():
            grid = (features.shape[2], features.shape[3])
            kernels = self.prepare_with(guidance, grid, size, features, hidden)
            kernels, mixed = self.precompute(kernels, self.mix(features))
            row_bytes = 4 * features.shape[0] * features.shape[1] * size[1]
            band = max(1, _BAND_BYTES // row_bytes)
            for top in range(0, size[0], band):
                window = Window(top, 0, min(band, size[0] - top), size[1])
                out[:, :, top : window.bottom] = self.render(kernels, mixed, window=window)
        return out
