"""A second scale: features of the enlarged image, translated into features of the original image.

The backbone sees the image, its mirror image, and the image enlarged to √3 times its sides, which
costs five passes in all. F are the mean features of the image and its mirror image. The features of
the enlarged image F₂ differ from F in kind, not only in detail: a linear map of channels T with a
constant c, learnt in closed form, translates F₂ into the space of F. The translated features,
interpolated (bicubic) to a grid twice as fine as that of F, are X. Three quarters of the difference
of their mean over each coarse cell from F are then taken back: what the enlarged image says of
whole cells is of use, too, but differs more in kind from F than its detail. With weights a and
1 − a, the result is added to the features that one pass predicts on the finer grid:

    X = up(T·F₂ + c),    a·[X + ¾·K₁(g)·(F − mean₂ₓ₂ X)] + (1 − a)·[K₁(g) + R(g)]·F

g is the guidance, K₁(g) the first step of the detail upsampler and R(g) its regression. The errors
of the two brackets differ, and their weighted mean has a smaller error than either. The result is
affine in F and F₂, has half the stride, and passes for the output of a backbone, so that heads,
points, crops and files need no code of their own for it.

With early layers of the backbone, the regression reads them, an upsampler with a network adds the
network's detail to the second bracket, and all of this is applied to the enlarged image as well: X
then lies on a grid of a quarter of the stride (interpolated bilinearly), to which the last step
brings the rest. An upsampler that smooths smooths the features of the enlarged image on their finer
grid, and the sum of all on the grid of half the stride, among cells that are alike in this sum as
well; the result on the grid of a quarter of the stride is smoothed among cells that are alike in
their queries and in the result itself, so that outlines are as sharp as the image's and regions
flat. It is then not affine in F and F₂.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backbones import Backbone, OuterBackbone
from upfeat.bounds import instance, number
from upfeat.mirrored import Mirrored
from upfeat.normalization import Normalization
from upfeat.resampling import on_grid
from upfeat.translation import (
    PENALTY,
    Translation,
    fit_to_image,
    learn_from,
    shipped_translation,
)
from upfeat.types import Window
from upfeat.upsamplers import DetailUpsampler, Upsampler, create_upsampler
from upfeat.upsamplers.detail import FINER
from upfeat.upsamplers.maps import Computed, as_map
from upfeat.upsamplers.smoothing import ON_A_FINE_GRID, Smoothing, centred

RATIO = 3**0.5
"""Ratio of the enlarged image's sides to the image's own: its features cost three passes."""

FINER_WEIGHTS = "detail_universal"
"""Name of the detail upsampler whose steps are used if no upsampler is named."""

SHARE = 0.75
"""Weight a of the second scale in the result."""
SHARE_WITH_EARLY = 0.65
"""Weight a if the upsampler gets early layers, which make one pass more accurate."""
CORRECTION = 0.75
"""Share of the difference between both scales' means over coarse cells that is taken back."""
SMOOTHINGS = 6
"""Number of smoothings of the sum of both scales, if the upsampler smooths: among cells that are
alike in this sum, too, so that thin objects are not lost."""
FINE_SMOOTHINGS = 2
"""Number of smoothings of the result on the grid of a quarter of the stride …"""
FINE_RADIUS = 4
"""… and their radius, in its cells."""
FINE_CELL = 4
"""Width of a cell, in pixels, for which :data:`.smoothing.ON_A_FINE_GRID` was chosen."""


@torch.no_grad()
def fit_translation(
    backbone: Backbone,
    images: Iterable[Tensor],
    *,
    penalty: float = PENALTY,
    ratio: float = RATIO,
) -> Translation:
    """Learn a translation from images in closed form, without labels, in one pass over the images.

    Args:
        backbone: backbone whose features are translated.
        images: batches of normalised images, (B, 3, H, W) each; sizes may differ. 80 photographs of
            256 pixels are enough for about a hundred channels.
        penalty: ridge penalty of the map's coefficients, in units of the features' mean variance,
            > 0.
        ratio: ratio of the enlarged image's sides to the image's own; see :class:`SecondScale`.

    Raises:
        TypeError: ``backbone`` is no :class:`upfeat.Backbone`, for example a name.
        ValueError: ``images`` is empty, or the penalty is not above 0.

    Example:
        >>> from upfeat.backbones import load_backbone
        >>> backbone = load_backbone(torch.nn.Conv2d(3, 4, 8, 8))
        >>> images = (backbone.preprocess(image, 64) for image in torch.rand(2, 3, 80, 64))
        >>> fit_translation(backbone, images).weight.shape
        torch.Size([4, 4])
    """
    instance("backbone", backbone, Backbone, "give what load_backbone() returns")

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        own = backbone(x)
        return own, _means(_enlarged(backbone, x, ratio)[0], own)

    return learn_from((pair(x) for x in images), penalty, "images")


class SecondScale(OuterBackbone):
    """Backbone of half the stride, or a quarter, made of another's features at two scales.

    Attributes:
        early: whether the upsampler gets early layers, of the image and of the enlarged image.
        backbone: the wrapped backbone.
        own: applied to the image: the mean over the image and its mirror image
            (:class:`upfeat.mirrored.Mirrored`).
        enlarged: applied to the enlarged image: ``backbone``, or its mean over mirror images.
        ratio: ratio of the enlarged image's sides to the image's own.
        passes: cost of the features, in passes of the innermost backbone over the image: 5, or 8
            if the enlarged image is mirrored too, with the default ratio.
    """

    def __init__(
        self,
        backbone: Backbone,
        upsampler: DetailUpsampler | None = None,
        *,
        bands: Sequence[int] | None = None,
        translation: Translation | None = None,
        share: float | None = None,
        mirrored: bool = False,
        early: bool = False,
        ratio: float = RATIO,
    ) -> None:
        """Make a backbone of half the stride; of a quarter, with early layers.

        Args:
            backbone: backbone of even stride that accepts images of any size.
            upsampler: detail upsampler whose first step and regression are used; ``None`` for
                the universal weights.
            bands: bands of the image that the upsampler gets; see :class:`upfeat.FeatUp`.
            translation: result of :func:`fit_translation`; ``None`` for the shipped translation,
                or, if the package has none for the backbone, a translation of each image learnt
                from its own cells.
            share: weight of the second scale in the result, from 0 to 1; ``None`` for 0.75, or 0.65
                with early layers.
            mirrored: whether to average the features of the enlarged image, too, with those of its
                mirror image.
            early: whether the upsampler also gets early layers of ``backbone``; always so if it was
                trained on them.
            ratio: ratio of the enlarged image's sides to the image's own, from 1 to 2. Sides are
                rounded down to whole cells.

        Raises:
            TypeError: ``translation`` is not a :class:`Translation`, or ``upsampler`` not a
                :class:`DetailUpsampler`.
            ValueError: ``share`` or ``ratio`` is out of range, the stride is odd, or the
                translation has another number of channels than the backbone.
        """
        ratio = number("ratio", ratio, 1, 2)
        own = Mirrored(backbone)
        enlarged = own if mirrored else backbone
        cost = own.passes + ratio**2 * getattr(enlarged, "passes", 1)
        passes = round(cost) if math.isclose(cost, round(cost)) else cost
        first = upsampler or create_upsampler(FINER_WEIGHTS)
        if not isinstance(first, DetailUpsampler):
            raise TypeError(
                f"upsampler is of type {type(first).__name__}; give a DetailUpsampler, or None for "
                "the universal weights"
            )
        early = early or first.wants_hidden
        finer = FINER**2 if early else FINER
        if backbone.stride % finer:
            kind = f"a stride that {finer} divides" if early else "an even stride"
            raise ValueError(
                f"passes={passes:g} needs a backbone of {kind}, and {backbone.name} has "
                f"{backbone.stride}; use passes=1"
            )
        super().__init__(backbone, suffix=f".passes{passes:g}", finer=finer)
        self.own, self.enlarged, self.ratio, self.passes = own, enlarged, ratio, passes
        self.early = early
        self.bands = None if bands is None else tuple(bands)
        self.first = first
        self.last = first.last_step() if early else None
        if share is None:
            share = SHARE_WITH_EARLY if early else SHARE
        self.share = number("share", share, 0, 1)
        if translation is None:
            translation = shipped_translation(backbone)
        elif not isinstance(translation, Translation):
            kind = type(translation).__name__
            raise TypeError(f"translation is of type {kind}; give a Translation, or a file of one")
        channels = backbone.embed_dim
        if translation is not None and translation.weight.shape != (channels, channels):
            raise ValueError(
                f"translation is of {translation.weight.shape[0]} channels and {backbone.name} has "
                f"{channels}; learn one by upfeat.scales.fit_translation"
            )
        self.weight: Tensor | None
        self.bias: Tensor | None
        for label in Translation._fields:
            self.register_buffer(
                label, None if translation is None else getattr(translation, label)
            )
        self.to(backbone.mean.device)

    @property
    def dtype(self) -> torch.dtype:
        """Data type that the first step computes in; the inner backbone converts its own input."""
        return next(self.first.parameters()).dtype

    def aligned(self, displacement: int) -> SecondScale:
        """See :meth:`Backbone.aligned`; the inner backbone is aligned, and with it both scales."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.backbone = self.backbone.aligned(displacement)
        other.own = self.own.aligned(displacement)
        other.enlarged = self.enlarged.aligned(displacement)
        other.displacement = displacement
        return other

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        if not self.early:
            own = self.own(x)
            return self.join(x, own, _enlarged(self.enlarged, x, self.ratio)[0])
        own, hidden = self.own.with_hidden(x)
        if hidden is None:
            raise ValueError(
                f"passes={self.passes:g}: {self.first.name} needs early layers, and "
                f"{self.backbone.name} has none; use another upsampler, or early=False"
            )
        second, early = _enlarged(self.enlarged, x, self.ratio, early=True)
        return self.join(x, own, second, hidden, early)

    def join(
        self,
        x: Tensor,
        own: Tensor,
        second: Tensor,
        hidden: Tensor | None = None,
        early: Tensor | None = None,
    ) -> Tensor:
        """Join the features of both scales.

        Args:
            x: (B, 3, H, W), normalised image.
            own: (B, C, h, w), features of ``x``.
            second: (B, C, h₂, w₂), features of the enlarged image.
            hidden: (B, C', h', w'), features of early layers of ``x``; ``None`` for none.
            early: (B, C', h₂', w₂'), the same of the enlarged image; ``None`` for none.

        Returns:
            Features on this backbone's grid, (B, C, 2h, 2w) or (B, C, 4h, 4w); affine in
            ``own`` and ``second``, unless the translation is learnt from the image or the upsampler
            smooths.
        """
        if self.weight is None or self.bias is None:
            translation = fit_to_image(own, _means(second, own))
        else:
            translation = Translation(self.weight.to(own.dtype), self.bias.to(own.dtype))
        guidance = guidance_for(self.first, x, self.backbone, self.bands)
        grid, size = (own.shape[2], own.shape[3]), (x.shape[2], x.shape[3])
        kernels = self.first.prepare_with(guidance, grid, size, hidden=hidden)
        times = self.backbone.stride // self.stride
        enlarged = translation(self._with_detail(guidance, second, early))
        # On the finest grid there is detail already, which bicubic interpolation would overshoot.
        way = "bilinear" if self.early else "bicubic"
        finer = self.share * on_grid(enlarged, (times * grid[0], times * grid[1]), way)
        # K₁ is linear, so that one call computes its terms in both brackets of the formula.
        taken = CORRECTION * (self.share * own - F.avg_pool2d(finer, times))
        out = kernels.first(taken + (1 - self.share) * own)
        whole = Window(0, 0, FINER * grid[0], FINER * grid[1])
        if kernels.regression is not None and self.share < 1:
            told = kernels.regression.at(as_map(own), whole)
            if kernels.maps is not None and hidden is not None:
                told = told + self.first.detail_on_finer_grid(kernels)
            out = out + (1 - self.share) * told
        if kernels.smoothing is not None:
            rough = out + F.avg_pool2d(finer, times // FINER)
            out = out + kernels.smoothing.smooth_among_alike(rough, SMOOTHINGS) - rough
        if self.last is None:
            return finer + out
        finest = (finer.shape[2], finer.shape[3])
        step = self.last.prepare(guidance, (out.shape[2], out.shape[3]), finest)
        out = finer + self.last.render(step, out)
        if kernels.smoothing is None:
            return out
        return smooth_on_fine_grid(out, step.queries, self.stride, self.first.backend)

    def _with_detail(self, guidance: Tensor, second: Tensor, early: Tensor | None) -> Tensor:
        """Bring features of the enlarged image to a grid twice as fine, with all its detail.

        Args:
            guidance: (B, 3, H, W), of the image.
            second: (B, C, h₂, w₂).
            early: features of early layers of the enlarged image, which tell of its detail;
                ``None`` for no change.

        Returns:
            (B, C, 2h₂, 2w₂), or ``second``.
        """
        if early is None:
            return second
        grid = (second.shape[2], second.shape[3])
        size = tuple(side * self.backbone.stride for side in grid)
        larger = F.interpolate(guidance, size=size, mode="bicubic", align_corners=False)
        kernels = self.first.prepare_with(larger, grid, (size[0], size[1]), hidden=early)
        return self.first.on_finer_grid(kernels, second)


def smooth_on_fine_grid(
    features: Tensor, queries: Computed, cell: float, backend: str, alike: Tensor | None = None
) -> Tensor:
    """Smooth features among cells that are alike in their queries and their features.

    Queries of wider cells must be more alike, by their area: more of a thin object's cells contain
    what surrounds it, too.

    Args:
        features: (B, C, h, w), on a grid of a quarter of the backbone's stride.
        queries: (B, D, h, w), of length 1 or more, from the image.
        cell: width of a cell, pixels.
        backend: backend of the operators.
        alike: (B, C', h, w), features to compare; ``None`` for ``features``.
    """
    area = max(cell / FINE_CELL, 1) ** 2
    terms = ON_A_FINE_GRID._replace(queries=area * ON_A_FINE_GRID.queries)
    compared = centred(features if alike is None else alike)
    made = Smoothing(
        queries, None, radius=FINE_RADIUS, backend=backend, likeness=terms, features=compared
    )
    return made.smooth_often(features, FINE_SMOOTHINGS)


def guidance_for(
    upsampler: Upsampler, x: Tensor, backbone: Backbone, bands: Sequence[int] | None
) -> Tensor:
    """Guidance for an upsampler: bands of the image, normalised as the upsampler expects.

    Args:
        upsampler: upsampler; without a normalisation of its own it takes ``x`` unchanged.
        x: (B, C, H, W), image normalised for the backbone.
        backbone: backbone for which ``x`` is normalised.
        bands: three bands, counted from 0, to select; ``None`` for all bands.
    """
    if bands is None:
        return upsampler.guidance_from(x, backbone)
    mean, std = (tuple(values[band] for band in bands) for values in backbone.normalization)
    own, x = upsampler.normalization, x[:, list(bands)]
    return x if own is None else Normalization(mean, std).convert(x, own)


def _means(second: Tensor, own: Tensor) -> Tensor:
    """Means of (B, C, h₂, w₂) over the cells of (B, C, h, w); cells at a boundary count in both."""
    return on_grid(second, (own.shape[2], own.shape[3]))


def _enlarged(
    backbone: Backbone, x: Tensor, ratio: float, *, early: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Features of an enlarged image, (B, C, h₂, w₂), and of its early layers if asked.

    Args:
        backbone: backbone of the features.
        x: (B, 3, H, W), normalised image.
        ratio: ratio of the enlarged image's sides to the image's own, before they are rounded down
            to whole cells.
        early: whether to return features of early layers of the enlarged image too.

    Raises:
        ValueError: the grid of the enlarged image does not have the expected size.
    """
    stride, sides = backbone.stride, backbone.grid_aligned((x.shape[2], x.shape[3]))
    grid = [int(side // stride * ratio) for side in sides]
    size = [stride * cells for cells in grid]
    larger = F.interpolate(x, size=size, mode="bicubic", align_corners=False)
    second, hidden = backbone.with_hidden(larger) if early else (backbone(larger), None)
    if list(second.shape[2:]) != grid:
        raise ValueError(
            "passes=5 and 8 need a backbone whose grid grows with the image: "
            f"{backbone.name} gives {tuple(second.shape[2:])} cells for an enlarged image of "
            f"{size[0]}×{size[1]} pixels, where its stride has {tuple(grid)}; use passes=1"
        )
    return second, hidden
