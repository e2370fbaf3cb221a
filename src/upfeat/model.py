"""A backbone and an upsampler as one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.alignment import align_for
from upfeat.backbones import Backbone, load_backbone
from upfeat.bounds import flag, indices, shown
from upfeat.budget import free_bytes
from upfeat.feature_map import blank
from upfeat.features import UpsampledFeatures
from upfeat.guided import Guided, has_early_layers
from upfeat.images import fill_missing, resize_mask
from upfeat.machine import parse_memory
from upfeat.mosaic import see_within
from upfeat.operator_checks import check_image
from upfeat.scales import guidance_for
from upfeat.types import Filled, Size
from upfeat.upsamplers import Upsampler
from upfeat.upsamplers.checks import check_output_size
from upfeat.upsamplers.pretrained import require_upsampler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from upfeat.images import ImageLike


class FeatUp(nn.Module):
    """Drop-in replacement for a backbone: a module that returns features at the image's own size.

    Source: FeatUp (Fu, Hamilton et al., ICLR 2024).
    """

    def __init__(
        self,
        backbone: Backbone | Callable[[Tensor], Tensor],
        upsampler: Upsampler,
        *,
        bands: Sequence[int] | None = None,
        early: bool = False,
        max_memory: int | str | None = None,
    ) -> None:
        """Combine a backbone and an upsampler; both are put in eval mode and frozen, in place.

        Frozen parameters record no autograd graph. To train the upsampler, call
        ``model.upsampler.train().requires_grad_()``; for the backbone, the same methods.

        Args:
            backbone: a :class:`Backbone`, or a module or function to wrap as one.
            upsampler: any upsampler; its ``embed_dim``, unless ``None``, must equal the backbone's.
            bands: for images that are not RGB: the three bands, counted from 0, that the upsampler
                gets as red, green and blue; ``None`` for all bands.
            early: whether the upsampler also gets features of early layers, on a finer grid
                (:meth:`Backbone.with_hidden`): the backbone's own, or, if it has none, those of the
                embedded EfficientNet-Lite0 (:class:`upfeat.guided.Guided`); see :func:`load`.
            max_memory: most memory that the process may use, including the memory that it uses
                already, in bytes or as "2GB"; ``None`` for no bound. With a bound, backbones with a
                limited receptive field are run in tiles, and maps are computed part by part; on one
                thread the results are the same bit by bit.

        Raises:
            TypeError: ``upsampler`` is not an upsampler.
            ValueError: the numbers of channels differ, ``bands`` are not three of the backbone's,
                ``early`` is set for an upsampler or images that do not support it, or the upsampler
                was trained on early layers of another backbone.
        """
        super().__init__()
        require_upsampler(upsampler)
        self.early = flag("early", early) or upsampler.wants_hidden
        if self.early and not upsampler.takes_hidden:
            raise ValueError(
                f"early=True: {upsampler.name} makes no use of early layers; take detail"
            )
        self.backbone: Backbone = align_for(upsampler, load_backbone(backbone))
        self.upsampler = upsampler
        expected = getattr(upsampler, "embed_dim", None)
        if expected not in (None, self.backbone.embed_dim):
            raise ValueError(
                f"upsampler expects {expected} channels but {self.backbone.name} has "
                f"{self.backbone.embed_dim}; use an upsampler made for it, or embed_dim=None"
            )
        count = self.backbone.in_channels
        self.bands = None if bands is None else tuple(indices(bands, 0, count - 1))
        if self.bands is not None and len(self.bands) != 3:
            raise ValueError(
                f"bands={shown(bands)} must be three of the {count} bands that "
                f"{self.backbone.name} takes, counted from 0"
            )
        self.max_memory = None if max_memory is None else parse_memory(max_memory)
        if self.early and not has_early_layers(self.backbone):
            if upsampler.wants_hidden:
                raise ValueError(
                    f"{upsampler.name} was trained on early layers, and {self.backbone.name} has "
                    "none; use another upsampler, or override Backbone.extract_with_hidden"
                )
            guided = Guided(self.backbone, bands=self.bands)
            self.backbone = guided.to(self.backbone.mean.device)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FeatUp:
        """Set the mode; a backbone or upsampler without trainable parameters stays in eval mode.

        So batch statistics of a frozen model do not change while a network around it is trained.
        """
        super().train(mode)
        for part in (self.backbone, self.upsampler):
            if not any(one.requires_grad for one in part.parameters()):
                part.eval()
        return self

    def __repr__(self) -> str:
        """One line: names, channels, stride, numbers of parameters, data type and device."""
        backbone, upsampler = self.backbone, self.upsampler
        counts = [
            f"{sum(one.numel() for one in part.parameters()):,}" for part in (backbone, upsampler)
        ]
        first = next(self.parameters(), backbone.mean)
        dtype = str(first.dtype).removeprefix("torch.")
        early = " with early layers" if self.early else ""
        if isinstance(self.backbone, Guided):
            early += f" of {self.backbone.guide.name}"
        return (
            f"{type(self).__name__}({backbone.name} + {upsampler.name}{early}: "
            f"{backbone.embed_dim} channels, stride {backbone.stride}; {' + '.join(counts)} "
            f"parameters, {dtype} on "
            f"{first.device})"
        )

    @property
    def passes(self) -> float:
        """Cost of the features, in passes of the backbone network over the image."""
        return getattr(self.backbone, "passes", 1)

    @property
    def embed_dim(self) -> int:
        """Number C of feature channels."""
        return self.backbone.embed_dim

    def preprocess(
        self, image: ImageLike, size: int | None = None, *, align: bool = False, **reading: Any
    ) -> Tensor:
        """Read and normalise an image; see :meth:`Backbone.preprocess`."""
        return self.backbone.preprocess(image, size, align=align, **reading)

    if TYPE_CHECKING:  # nn.Module declares the result of every call as Any

        @overload
        def __call__(
            self,
            x: Tensor,
            output_size: tuple[int, int] | None = ...,
            *,
            mask: Tensor | NDArray[Any] | None = ...,
            out: None = ...,
        ) -> Tensor: ...
        @overload
        def __call__(
            self,
            x: Tensor,
            output_size: tuple[int, int] | None = ...,
            *,
            mask: Tensor | NDArray[Any] | None = ...,
            out: Filled,
        ) -> Filled: ...
        def __call__(self, *args: Any, **options: Any) -> Any:
            """See :meth:`forward`."""
            ...

    def forward(
        self,
        x: Tensor,
        output_size: tuple[int, int] | None = None,
        *,
        mask: Tensor | NDArray[Any] | None = None,
        out: Any = None,
    ) -> Any:
        """Compute features at full resolution.

        Args:
            x: (B, 3, H, W), normalised image; each side at least the backbone's stride.
            output_size: (height, width) of the result; ``None`` for the image's own size.
            mask: a tensor or an array, (height, width) or (B, 1, height, width) of any size, true
                where the image has no data. Masked pixels have no influence on other features, and
                features at masked pixels are 0.
            out: a tensor or an array, in memory or in a file, to write the features to part by
                part; see :meth:`UpsampledFeatures.full`.

        Returns:
            Features (B, C, *output_size), or ``out``.

        Raises:
            ValueError: the shape or size of ``x`` is wrong, the backbone returns NaN, or
                ``max_memory`` is too small; the message names the smallest sufficient bound.
        """
        if out is not None or self.max_memory is not None:
            return self.lazy(x, output_size, mask=mask).full(out=out)
        if mask is None:
            return self._upsample(x, *self._seen(x), output_size)
        x, features, hidden = self._without_data(x, mask)
        out = self._upsample(x, features, hidden, output_size)
        return blank(out, resize_mask(mask, (out.shape[2], out.shape[3])).to(out.device))

    def _seen(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of an image, and with ``early`` those of early layers (else ``None``)."""
        if self.max_memory is None or (torch.is_grad_enabled() and self._trains(x)):
            return self.backbone.with_hidden(x) if self.early else (self.backbone(x), None)
        free, label = free_bytes(self.max_memory), f"max_memory={self.max_memory}"
        return see_within(self.backbone, x, free, early=self.early, label=label)

    def _trains(self, x: Tensor) -> bool:
        return x.requires_grad or any(one.requires_grad for one in self.backbone.parameters())

    def _upsample(
        self, x: Tensor, features: Tensor, hidden: Tensor | None, output_size: Size | None
    ) -> Tensor:
        inputs = self._inputs(features, x)
        if hidden is None:
            return self.upsampler(*inputs, output_size)
        return self.upsampler(*inputs, output_size, hidden=hidden.to(inputs[0]))

    def _without_data(self, x: Tensor, mask: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Image, features and early layers' features, each filled in where there are no data."""
        check_image(x, self.backbone.in_channels)
        missing = resize_mask(mask, (x.shape[2], x.shape[3])).to(x.device)
        if len(missing) not in (1, len(x)):
            raise ValueError(f"mask is of {len(missing)} images and x of {len(x)}; give as many")
        x = fill_missing(x, missing)

        def filled(maps: Tensor) -> Tensor:
            share = F.adaptive_avg_pool2d(missing.to(maps.dtype), (maps.shape[-2], maps.shape[-1]))
            return fill_missing(maps, share == 1)

        features, hidden = self._seen(x)
        return x, filled(features), None if hidden is None else filled(hidden)

    def guidance(self, x: Tensor) -> Tensor:
        """Guidance of an image: its bands, normalised as the upsampler expects.

        Args:
            x: (B, 3, H, W), normalised as for the backbone.

        Raises:
            TypeError: x is no tensor.
            ValueError: x is not (B, 3, H, W).
        """
        check_image(x, self.backbone.in_channels)
        return guidance_for(self.upsampler, x, self.backbone, self.bands)

    def _inputs(self, features: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and guidance of an image, in the dtype of the upsampler's parameters."""
        floating = (one.dtype for one in self.upsampler.parameters() if one.is_floating_point())
        dtype = next(floating, x.dtype)
        return features.to(dtype), self.guidance(x).to(dtype)

    def lazy(
        self,
        x: Tensor,
        output_size: tuple[int, int] | None = None,
        *,
        mask: Tensor | NDArray[Any] | None = None,
    ) -> UpsampledFeatures:
        """Features as :meth:`forward` returns them, upsampled only where they are requested.

        Args:
            x: see :meth:`forward`.
            output_size: see :meth:`forward`.
            mask: see :meth:`forward`.
        """
        missing = None
        if mask is None:
            features, hidden = self._seen(x)
        else:
            x, features, hidden = self._without_data(x, mask)
            size = (x.shape[2], x.shape[3])
            size = size if output_size is None else check_output_size(output_size)
            missing = resize_mask(mask, size).to(x.device)
        inputs = self._inputs(features, x)
        mean, std = self.upsampler.normalization or self.backbone.normalization
        if len(mean) != inputs[1].shape[1]:  # bands, which the upsampler standardises
            mean = std = None
        return UpsampledFeatures(
            inputs[0],
            inputs[1],
            self.upsampler,
            output_size,
            mean=mean,
            std=std,
            missing=missing,
            hidden=None if hidden is None else hidden.to(inputs[0]),
            max_memory=self.max_memory,
        )
