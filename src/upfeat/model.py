"""A backbone and an upsampler as one module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.backbones import Backbone, load_backbone
from upfeat.backbones.efficientnet_lite import EfficientNetLite
from upfeat.bounds import PASSES, flag, indices, one_of, shown
from upfeat.budget import free_bytes
from upfeat.feature_map import blank
from upfeat.features import UpsampledFeatures
from upfeat.guided import Guided, early_by_default, has_early_layers, has_layers_at_both_sizes
from upfeat.images import fill_missing, resize_mask
from upfeat.machine import find_device, parse_memory
from upfeat.mirrored import Mirrored
from upfeat.mosaic import see_within
from upfeat.operator_checks import check_image
from upfeat.scales import FINER_WEIGHTS, SecondScale, guidance_for
from upfeat.translation import Translation
from upfeat.types import Filled, Size
from upfeat.upsamplers import DetailUpsampler, Upsampler, create_upsampler
from upfeat.upsamplers.pretrained import DEFAULT_UPSAMPLER, require_upsampler, trained_for_early

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from upfeat.images import ImageLike

DEFAULT_BACKBONE = "efficientnet_lite0"


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
            size = output_size or (x.shape[2], x.shape[3])
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


def default_upsampler(backbone: Backbone, *, early: bool | None = None) -> str:
    """Return the name of the best upsampler for a backbone, as :func:`load` chooses it.

    Args:
        backbone: the backbone.
        early: False for none that was trained on early layers.

    Returns:
        A name for :func:`upfeat.upsamplers.create_upsampler`, to be given with the backbone's name.
    """
    trained = None if early is False else trained_for_early(backbone.name)
    # A model of one's own may have the name of an embedded backbone, and other layers.
    known = isinstance(backbone.origin, EfficientNetLite)
    return trained if trained is not None and known else DEFAULT_UPSAMPLER


def align_for(upsampler: Upsampler, backbone: Backbone) -> Backbone:
    """Align a backbone as the upsampler was trained, unless it is aligned already.

    Raises:
        ValueError: the upsampler was trained on early layers of another backbone.
    """
    name, expected = backbone.origin.name, upsampler.trained_for
    if upsampler.wants_hidden and expected not in (None, name):
        raise ValueError(
            f"upsampler={upsampler.name!r} was trained on early layers of {expected}, not of "
            f"{name}; give one for it or any other, as detail, or set upsampler.trained_for=None "
            "if its layers are the same"
        )
    displacement = 0 if backbone.displacement else upsampler.displacement
    return backbone.aligned(displacement) if displacement else backbone


def load(
    name: str | Backbone | Callable[[Tensor], Tensor] = DEFAULT_BACKBONE,
    *,
    upsampler: str | Path | Upsampler | None = None,
    device: str | torch.device | None = None,
    bands: Sequence[int] | None = None,
    passes: int = 1,
    early: bool | None = None,
    max_memory: int | str | None = None,
    translation: Translation | str | Path | None = None,
) -> FeatUp:
    """Load a backbone with an upsampler, in eval mode and frozen.

    Args:
        name: name of a backbone, or a model, as :func:`upfeat.load_backbone` accepts them: one of
            ``upfeat.list_backbones()``, ``"timm:NAME"``, ``"hf:ID-OR-FOLDER"``, a model of the timm
            or transformers library, or any module or function from images to features. A module's
            parameters are frozen in place. For options, such as a layer, call
            :func:`upfeat.load_backbone` and pass its result.
        upsampler: one of ``upfeat.list_upsamplers()``, a folder that ``save_pretrained`` wrote, a
            published FeatUp checkpoint (``.ckpt``), or an :class:`Upsampler`; ``None`` for the best
            upsampler for the backbone: one trained on its early layers, as for EfficientNet-Lite0
            and Lite1, else detail, trained for it or universal, with early layers.
        device: device of the model's parameters; ``None`` for the CPU.
        bands: see :class:`FeatUp`.
        passes: cost of the features, in passes of the backbone over the image. 2: its features and
            those of the mirror image are averaged (:class:`upfeat.mirrored.Mirrored`). 5: it is
            also applied to the image at √3 times its sides (:class:`upfeat.scales.SecondScale`),
            and ``model.backbone`` has half the stride. Early layers of the backbone's own are used
            at both sizes, and the stride is a quarter; those of the guide follow, at half the
            stride. 8: also to the mirror image of the enlarged one.
        early: whether the upsampler also gets features of early layers, on a finer grid. True: the
            backbone's own if it returns any, as convolutional networks do; otherwise, as for
            transformers, those of the embedded EfficientNet-Lite0, which then sees the image too;
            the regression of a detail upsampler uses them. False: no, and ``upsampler=None``
            chooses none that was trained on them; one that is named gets them even so. ``None``:
            with ``upsampler=None``, wherever they are to be had; with a named one, only if it was
            trained on them. Maps of :meth:`FeatUp.lazy` contain and save the early layers.
        max_memory: see :class:`FeatUp`.
        translation: for ``passes=5`` and 8: the translation learnt for this backbone by
            :func:`upfeat.scales.fit_translation`, or a file of it; ``None`` for the shipped
            translation, or, if the package has none for the backbone, a translation of each image
            learnt from its own cells.

    Raises:
        FileNotFoundError: ``upsampler`` is a path that does not exist.
        ValueError: there is no such backbone or upsampler (close names are suggested), the model's
            output is not a feature map, the device does not exist, or an option does not fit the
            others.

    Example:
        >>> model = load("efficientnet_lite0", upsampler="bilinear")
        >>> model(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 112, 64, 96])
    """
    network = load_backbone(name)
    passes = one_of("passes", passes, PASSES)
    if early is None and upsampler is None:
        early = early_by_default(network, bands, passes)
    wanted = False if early is None else flag("early", early)
    if passes in (1, 2):
        if translation is not None:
            raise ValueError(
                f"translation is for passes=5 and 8; with passes={passes} there is nothing for it"
            )
        if not isinstance(upsampler, Upsampler):
            if upsampler is None:
                upsampler = default_upsampler(network, early=early)
            upsampler = create_upsampler(upsampler, network.embed_dim, backbone=network.name)
        network = Mirrored(network) if passes == 2 else network
        model = FeatUp(network, upsampler, bands=bands, early=wanted)
    else:
        every = passes == 8
        model = _two_scales(network, upsampler, bands, translation, early=early, mirrored=every)
    model.max_memory = None if max_memory is None else parse_memory(max_memory)
    return model if device is None else model.to(find_device(device))


def _two_scales(
    network: Backbone,
    upsampler: str | Path | Upsampler | None,
    bands: Sequence[int] | None,
    translation: Translation | str | Path | None,
    *,
    early: bool | None,
    mirrored: bool,
) -> FeatUp:
    """Make a model whose backbone is applied to the image at two scales."""
    if isinstance(translation, str | Path):
        translation = Translation.load(translation, network)
    if not isinstance(upsampler, Upsampler):
        if upsampler is None:
            name = default_upsampler(network, early=early)
            upsampler = FINER_WEIGHTS if name == DEFAULT_UPSAMPLER else name
        upsampler = create_upsampler(upsampler, network.embed_dim, backbone=network.name)
    steps = upsampler if isinstance(upsampler, DetailUpsampler) else None
    network = align_for(upsampler, network)
    layers = steps is not None and (
        steps.wants_hidden or (bool(early) and has_layers_at_both_sizes(network))
    )
    scales = SecondScale(
        network, steps, bands=bands, translation=translation, mirrored=mirrored, early=layers
    )
    if steps is None or (early and not layers):  # a guide helps both steps, from the finer grid on
        return FeatUp(scales, upsampler, bands=bands, early=bool(early))
    return FeatUp(scales, steps.last_step(), bands=bands)
