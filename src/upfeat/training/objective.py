"""What training minimises: upsampled features must explain what the backbone sees in views.

One step shows each image as several views. The image's features are upsampled once, warped as each
view is, brought to the backbone's grid by a learned downsampler, and compared with the backbone's
features of the view under a Gaussian whose width depends on them (FeatUp, section 3).

Everything is linear in the features, so both sides are projected to a few random directions on the
coarse grid, before upsampling: 31 channels are upsampled (30 directions and the downsampler's
saliency), not all of them, and the loss has the same expectation. An image keeps its directions
for all of its views, so that it is upsampled once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.downsamplers import AttentionDownsampler, SimpleDownsampler
from upfeat.losses import (
    SpatialUncertainty,
    crf_pairwise,
    gaussian_reconstruction,
    magnitude,
    magnitude_consistency,
    random_projection,
    total_variation,
)
from upfeat.views import Jitter, apply_jitter, sample_jitters

if TYPE_CHECKING:
    from upfeat.backbones import Backbone
    from upfeat.training.config import TrainConfig
    from upfeat.upsamplers import Upsampler


class ViewBatch(NamedTuple):
    """Images, their views, and what the backbone makes of both."""

    guidance: Tensor
    """(B, 3, H, W) normalised images."""
    features: Tensor
    """(B, C, h, w) of the images."""
    jitters: list[Jitter]
    """V entries of B views, one for each image."""
    targets: Tensor
    """(V, B, C, h, w) the backbone's features of the views."""


@torch.no_grad()
def make_batch(
    backbone: Backbone, images: Tensor, config: TrainConfig, generator: torch.Generator
) -> ViewBatch:
    """Draw views of images and run the backbone on all of them.

    Args:
        backbone: frozen, in eval mode.
        images: (B, 3, S, S) normalised, S ≥ ``config.size``. Views are cut from these; the image
            that is upsampled is reduced to ``config.size``, so that zoomed views show detail which
            it lacks.
        config: of the views.
        generator: draws them.
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
    # One image count at a time: a small batch stays in the caches of a CPU.
    seen = [backbone(x) for x in (guidance, *views)]
    return ViewBatch(guidance, seen[0], jitters, torch.stack(seen[1:]))


class Objective(nn.Module):
    """An upsampler with the downsampler and the uncertainty that it is trained with."""

    def __init__(
        self,
        upsampler: Upsampler,
        embed_dim: int,
        stride: int,
        config: TrainConfig,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make the downsampler and the uncertainty.

        Args:
            upsampler: to be trained.
            embed_dim: channels C of the backbone.
            stride: of the backbone, the downsampler's size unless the configuration gives one.
            config: of the loss.
            generator: draws initial values.
        """
        super().__init__()
        self.upsampler = upsampler
        self.config = config
        kernel_size = config.downsampler_size or stride
        self.downsampler: AttentionDownsampler | SimpleDownsampler
        if config.downsampler == "attention":
            self.downsampler = AttentionDownsampler(
                embed_dim, kernel_size, dropout=config.saliency_dropout, generator=generator
            )
        else:
            self.downsampler = SimpleDownsampler(kernel_size)
        self.uncertainty = SpatialUncertainty(embed_dim, generator=generator)

    def forward(self, batch: ViewBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Compare one batch.

        Args:
            batch: from :func:`make_batch`.
            generator: draws projections, saliency dropout and the points of the CRF term.

        Returns:
            Scalars: ``loss``, and the terms it is made of.
        """
        directions = self._directions(batch.features, generator)  # (B, C, P)
        projected, saliency = self._upsample(batch, directions)
        likelihoods, magnitudes = [], []
        for jitter, target in zip(batch.jitters, batch.targets, strict=True):
            guess = self._to_grid(projected, saliency, jitter, target.shape[-2:], generator)
            seen = _project(target, directions)
            likelihoods.append(gaussian_reconstruction(guess, seen, self.uncertainty(target)))
            if self.config.magnitude_weight:
                magnitudes.append(magnitude_consistency(guess, seen))
        terms = {"reconstruction": torch.stack(likelihoods).mean()}
        if magnitudes:
            terms["magnitude"] = torch.stack(magnitudes).mean()
        if self.config.crf_weight:
            terms["crf"] = crf_pairwise(projected, batch.guidance, generator=generator)
        if self.config.tv_weight:
            terms["tv"] = total_variation(magnitude(projected))
        loss = self._weighted(terms)
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        weights = {
            "reconstruction": 1.0,
            "magnitude": self.config.magnitude_weight,
            "crf": self.config.crf_weight,
            "tv": self.config.tv_weight,
        }
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def _directions(self, features: Tensor, generator: torch.Generator) -> Tensor | None:
        """Random unit directions of every image, (B, C, P); ``None`` for all channels as is."""
        count, channels = self.config.projection_dim, features.shape[1]
        if count is None:
            return None
        drawn = [random_projection(channels, count, generator=generator) for _ in features]
        return torch.stack(drawn).to(features)

    def _upsample(self, batch: ViewBatch, directions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Projected features (B, P, H, W) and the downsampler's saliency (B, 1, H, W)."""
        features = self.upsampler.mix(batch.features)
        coarse = _project(features, directions)
        attention = isinstance(self.downsampler, AttentionDownsampler)
        parts = [coarse]
        if attention:
            weight = self.downsampler.saliency_weight[..., None, None]
            parts.append(F.conv2d(features, weight))
        size = (batch.guidance.shape[2], batch.guidance.shape[3])
        grid = (features.shape[2], features.shape[3])
        kernels = self.upsampler.prepare(batch.guidance, grid, size)
        out = kernels(torch.cat(parts, dim=1))
        count = coarse.shape[1]
        projected, saliency = out[:, :count], out[:, count:]
        offset = self.upsampler.offset
        if offset is not None:
            shape = offset[None, :, None, None].expand(len(out), -1, 1, 1)
            projected = projected + _project(shape, directions)
        if attention:
            saliency = saliency + self.downsampler.saliency_bias
            if offset is not None:
                saliency = saliency + self.downsampler.saliency_weight @ offset
        return projected, saliency

    def _to_grid(
        self,
        projected: Tensor,
        saliency: Tensor,
        jitter: Jitter,
        grid: torch.Size,
        generator: torch.Generator,
    ) -> Tensor:
        """Show upsampled features as a view does, at the backbone's grid."""
        size = (grid[0], grid[1])
        if isinstance(self.downsampler, SimpleDownsampler):
            return self.downsampler(apply_jitter(projected, jitter), size)
        warped = apply_jitter(torch.cat([projected, saliency], dim=1), jitter)
        return self.downsampler(warped[:, :-1], size, saliency=warped[:, -1:], generator=generator)


def _project(features: Tensor, directions: Tensor | None) -> Tensor:
    """Coordinates along each image's directions: (B, C, h, w), (B, C, P) -> (B, P, h, w)."""
    if directions is None:
        return features
    return (directions.mT @ features.flatten(2)).unflatten(2, features.shape[2:])
