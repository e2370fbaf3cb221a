"""Training objective: upsampled features must predict the backbone's features of views.

A step uses several views of each image. The image's features are upsampled once, warped like each
view, downsampled to the backbone's grid by a learned downsampler, and compared with the backbone's
features of the view by a Gaussian likelihood whose standard deviation depends on the view's
features (FeatUp, section 3).

Since upsampling, warp and downsampling are linear in the features, both sides of the comparison are
projected to a few random directions on the coarse grid. Then 31 channels are upsampled (30
directions and the downsampler's saliency) instead of all, and the loss has the same expectation.
The directions of an image are the same for all its views, so that it is upsampled once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.downsamplers import AttentionDownsampler, CellDownsampler, SimpleDownsampler
from upfeat.losses import (
    SpatialUncertainty,
    crf_pairwise,
    gaussian_reconstruction,
    magnitude,
    magnitude_consistency,
    random_projection,
    total_variation,
    unit_of,
)
from upfeat.normalization import IMAGENET
from upfeat.randomness import stream
from upfeat.training.recipes import recipe_for
from upfeat.training.recipes.base import ENLARGEMENT
from upfeat.views import Jitter, apply_jitter, sample_jitters

if TYPE_CHECKING:
    from upfeat.backbones import Backbone
    from upfeat.normalization import Normalization
    from upfeat.training.config import TrainConfig
    from upfeat.upsamplers import Kernels, Upsampler


_LEAST_DEVIATION = 0.05
"""Least standard deviation of an image's channels, in units of its features' root mean square, that
they are standardised by."""
_LARGEST = 16.0
"""Largest root mean square of an image's features that the uncertainty is given; most backbones'
is below 10."""

_IMAGE = 8


class ViewBatch(NamedTuple):
    """Images, their views, and the backbone's features of both."""

    guidance: Tensor
    """(B, 3, H, W), normalised images for the upsampler."""
    features: Tensor
    """(B, C, h, w), the backbone's features of the images."""
    jitters: list[Jitter]
    """V entries of B views, one view of each image."""
    targets: Tensor
    """(V, B, C, h, w), the backbone's features of the views."""
    enlarged: Tensor | None = None
    """(B, C, 2h, 2w), the backbone's features of the images at twice their size, or ``None`` if
    the loss does not need them."""

    def in_unit(self, unit: float) -> ViewBatch:
        """Return the batch with all features divided by ``unit``."""
        if unit == 1:
            return self
        enlarged = None if self.enlarged is None else self.enlarged / unit
        features, targets = self.features / unit, self.targets / unit
        return self._replace(features=features, targets=targets, enlarged=enlarged)


class _Upsampled(NamedTuple):
    """Features of a batch of images, upsampled to the images' size."""

    values: Tensor
    """(B, P, H, W), coordinates along the P directions of each image, without the offset."""
    offset: Tensor
    """(B, P, 1, 1), or a scalar 0, to be added to every pixel."""
    saliency: Tensor
    """(B, 1, H, W), saliency for the attention downsampler; (B, 0, H, W) for others."""


@torch.no_grad()
def measure_unit(backbone: Backbone, size: int) -> float:
    """Return the number by which to divide a backbone's features to bring them to a usual size.

    It is measured on one synthetic image, so that every process and every resumed run has the same.

    Args:
        backbone: frozen backbone, in eval mode.
        size: side of the image, pixels.
    """
    small = torch.rand(1, 3, _IMAGE, _IMAGE, generator=stream("image of the unit"))
    image = F.interpolate(small, size=(size, size), mode="bilinear").to(backbone.mean.device)
    features = backbone((image - backbone.mean) / backbone.std).cpu().double()
    return unit_of(float(features.square().mean().sqrt()))


@torch.no_grad()
def make_batch(
    backbone: Backbone,
    images: Tensor,
    config: TrainConfig,
    generator: torch.Generator,
    *,
    upsampler: Upsampler | None = None,
) -> ViewBatch:
    """Draw views of images and run the backbone on all of them.

    Args:
        backbone: frozen backbone, in eval mode.
        images: (B, 3, S, S) normalised, S ≥ ``config.size``. Views are cut from these images, while
            the guidance is reduced to ``config.size``; hence magnified views show detail that the
            guidance lacks.
        config: settings of the views and of the guidance's colours.
        generator: random generator of the views and colours.
        upsampler: upsampler whose normalisation the guidance has; ``None`` for the backbone's.
    """
    size = (config.size, config.size)
    guidance = images
    if tuple(images.shape[-2:]) != size:
        guidance = F.interpolate(
            images, size=size, mode="bilinear", align_corners=False, antialias=True
        )
    jitters = [
        sample_jitters(
            len(images),
            size=size,
            max_pad=config.max_pad,
            max_zoom=config.max_zoom,
            zoom_probability=config.zoom_probability,
            flip_probability=config.flip_probability,
            generator=generator,
        )
        for _ in range(config.views)
    ]
    views = [apply_jitter(images, jitter, output_size=size) for jitter in jitters]
    # One view of all images at a time, because a small batch stays in the caches of a CPU.
    seen = [backbone(x) for x in (guidance, *views)]
    enlarged = None
    if config.detail_weight:
        enlarged = torch.cat([backbone(_enlarge(x, config.size)) for x in images.split(1)])
    if upsampler is not None:
        guidance = upsampler.guidance_from(guidance, backbone)
    own = (upsampler and upsampler.normalization) or backbone.normalization
    shown = _recolour(guidance, own, config, generator)
    return ViewBatch(shown, seen[0], jitters, torch.stack(seen[1:]), enlarged)


def _enlarge(images: Tensor, size: int) -> Tensor:
    """Resize the finest available images to twice the size of the guidance."""
    target = (ENLARGEMENT * size, ENLARGEMENT * size)
    if tuple(images.shape[-2:]) == target:
        return images
    return F.interpolate(images, size=target, mode="bicubic", align_corners=False, antialias=True)


def _recolour(
    guidance: Tensor, own: Normalization, config: TrainConfig, generator: torch.Generator
) -> Tensor:
    """Augment colours like those of other cameras and of other backbones' normalisations."""
    shape = (len(guidance), 3, 1, 1)
    if config.mixed_normalization:
        common = own.convert(guidance, IMAGENET)
        chosen = torch.rand(shape[0], 1, 1, 1, generator=generator) < 0.5
        guidance = torch.where(chosen.to(guidance.device), common, guidance)
    if config.colour_jitter:
        scale, shift = config.colour_jitter * torch.randn(2, *shape, generator=generator)
        guidance = guidance * (1 + scale.to(guidance)) + shift.to(guidance)
    return guidance


class Objective(nn.Module):
    """An upsampler, with the downsampler and the uncertainty that are trained with it."""

    def __init__(
        self,
        upsampler: Upsampler,
        embed_dim: int,
        stride: int,
        config: TrainConfig,
        *,
        unit: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """Create the downsampler and the uncertainty.

        Args:
            upsampler: upsampler to train.
            embed_dim: number C of the backbone's channels.
            stride: stride of the backbone, which is the downsampler's kernel size unless the
                configuration has another.
            config: settings of the loss.
            unit: number that features are divided by before anything else.
            generator: random generator of initial values.
        """
        super().__init__()
        self.upsampler = upsampler
        self.config, self.unit = config, unit
        kernel_size = config.downsampler_size or stride
        self.downsampler: AttentionDownsampler | SimpleDownsampler | CellDownsampler
        if config.downsampler == "attention":
            self.downsampler = AttentionDownsampler(
                embed_dim, kernel_size, dropout=config.saliency_dropout, generator=generator
            )
        elif config.downsampler == "simple":
            self.downsampler = SimpleDownsampler(kernel_size)
        else:
            self.downsampler = CellDownsampler()
        self.uncertainty = SpatialUncertainty(embed_dim, generator=generator)
        # Checkpoints contain this attribute's name.
        self.detail_target = recipe_for(upsampler, config).term(embed_dim)

    def forward(self, batch: ViewBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Compute the loss of one batch.

        Args:
            batch: a batch from :func:`make_batch`.
            generator: random generator of projections, saliency dropout and the CRF term's points.

        Returns:
            Scalars: ``loss``, and its terms before they are weighted, without gradients.
        """
        batch = batch.in_unit(self.unit)
        directions = self._directions(batch, generator)  # (B, C, P)
        grid = (batch.features.shape[2], batch.features.shape[3])
        size = (batch.guidance.shape[2], batch.guidance.shape[3])
        kernels = self.upsampler.prepare(batch.guidance, grid, size, batch.features)
        upsampled = self._upsample(batch, kernels, directions)
        guess = self._to_grid(upsampled, batch, generator)  # (V·B, P, h, w)
        seen = _project(batch.targets, directions).flatten(0, 1)
        # The initial uncertainty is the exponential of features, which overflows if they are large.
        bounded = batch.targets * (_LARGEST / _rms(batch.targets)).clamp(max=1)
        scale = self.uncertainty(bounded.flatten(0, 1))
        terms = {"reconstruction": gaussian_reconstruction(guess, seen, scale)}
        if self.config.magnitude_weight:
            terms["magnitude"] = magnitude_consistency(guess, seen)
        if self.config.crf_weight:
            # The CRF term depends on differences between pixels, which the offset does not change.
            terms["crf"] = crf_pairwise(upsampled.values, batch.guidance, generator=generator)
        if self.config.tv_weight:
            terms["tv"] = total_variation(magnitude(upsampled.values + upsampled.offset))
        if self.detail_target is not None and batch.enlarged is not None:
            terms["detail"] = self.detail_target(
                self.upsampler, kernels, batch.features, batch.enlarged
            )
        loss = self._weighted(terms)
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        weights = {
            "reconstruction": 1.0,
            "magnitude": self.config.magnitude_weight,
            "crf": self.config.crf_weight,
            "tv": self.config.tv_weight,
            "detail": self.config.detail_weight,
        }
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def _directions(self, batch: ViewBatch, generator: torch.Generator) -> Tensor | None:
        """Draw the directions along which features are compared, (B, C, P); ``None``: channels.

        These are P random unit directions for each image, or all channels if ``projection_dim`` is
        ``None``. With ``standardize``, channels are divided by their standard deviation over the
        image's views, so that all have equal weight.
        """
        count, (images, channels) = self.config.projection_dim, batch.features.shape[:2]
        if count is None:
            if not self.config.standardize:
                return None
            directions = torch.eye(channels).expand(images, -1, -1)
        else:
            drawn = [random_projection(channels, count, generator=generator) for _ in range(images)]
            directions = torch.stack(drawn)
        directions = directions.to(batch.features)
        if self.config.standardize:
            # Per image, so that results do not depend on the division into parts and processes.
            deviation = batch.targets.std((0, 3, 4), correction=0)  # (B, C)
            # The features of a blank image may not vary at all, and must not weigh without bound.
            size = _LEAST_DEVIATION * _rms(batch.targets).flatten()[:, None]
            least = torch.maximum(0.05 * deviation.mean(1, keepdim=True), size) + 1e-12
            directions = directions / torch.maximum(deviation, least)[:, :, None]
        return directions

    def _upsample(
        self, batch: ViewBatch, kernels: Kernels, directions: Tensor | None
    ) -> _Upsampled:
        """Upsample the projected features and the downsampler's saliency in one call."""
        features = self.upsampler.mix(batch.features)
        own = self.downsampler
        attention = own if isinstance(own, AttentionDownsampler) else None
        head = None if directions is None else directions.mT  # (B, P, C)
        count = features.shape[1] if head is None else head.shape[1]
        if attention is not None:
            if head is None:
                head = torch.eye(count).to(features).expand(len(features), -1, -1)
            saliency = attention.saliency_weight.expand(len(features), -1, -1)
            head = torch.cat([head, saliency], dim=1)
        out = self.upsampler.render_linear(kernels, features, head=head)
        # Split, because the backward of slices would allocate a whole map for each of them.
        values, saliency = out.split([count, out.shape[1] - count], dim=1)
        offset = self.upsampler.offset
        offset = None if offset is None else offset / self.unit
        shift = features.new_zeros(())
        if offset is not None:
            shift = _project(offset[None, :, None, None].expand(len(out), -1, 1, 1), directions)
        if attention is not None:
            saliency = saliency + attention.saliency_bias
            if offset is not None:
                saliency = saliency + attention.saliency_weight @ offset
        return _Upsampled(values, shift, saliency)

    def _to_grid(
        self, upsampled: _Upsampled, batch: ViewBatch, generator: torch.Generator
    ) -> Tensor:
        """Warp upsampled features like all views and downsample them: (V·B, P, h, w)."""
        values, shift, saliency = upsampled
        views = Jitter.cat(batch.jitters)
        size = (batch.targets.shape[-2], batch.targets.shape[-1])
        if isinstance(self.downsampler, AttentionDownsampler):
            guess = self.downsampler(
                values, size, saliency=saliency, jitter=views, generator=generator
            )
        else:
            guess = self.downsampler(values, size, jitter=views)
        # The offset may be added after downsampling, because the weights of a cell sum to 1.
        return (guess.unflatten(0, (len(batch.jitters), -1)) + shift).flatten(0, 1)


def _rms(targets: Tensor) -> Tensor:
    """Return the root mean square of every image's features: (V, B, C, h, w) -> (1, B, 1, 1, 1)."""
    return targets.square().mean((0, 2, 3, 4), keepdim=True).sqrt()


def _project(features: Tensor, directions: Tensor | None) -> Tensor:
    """Project features to directions: (…, B, C, h, w), (B, C, P) -> (…, B, P, h, w)."""
    if directions is None:
        return features
    return (directions.mT @ features.flatten(-2)).unflatten(-1, features.shape[-2:])
