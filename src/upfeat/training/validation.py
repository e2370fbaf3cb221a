"""Validation on held-out photographs: the training's loss, and a relative squared error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.machine import exact_dtype
from upfeat.randomness import stream
from upfeat.training.config import TrainConfig
from upfeat.training.objective import Objective, ViewBatch, make_batch
from upfeat.training.photographs import Photographs
from upfeat.views import apply_jitter

_LEAST_VARIANCE = 1e-10
"""Variance of features over their mean square below which they vary by rounding alone."""


@torch.no_grad()
def validate(
    objectives: Sequence[Objective],
    backbones: Sequence[Backbone],
    photographs: Photographs,
    config: TrainConfig,
) -> dict[str, float]:
    """Score an upsampler with its downsamplers; views and projections are the same in every call.

    Args:
        objectives: an objective for each backbone; their mode is restored afterwards.
        backbones: frozen backbones.
        photographs: held-out photographs.
        config: settings of the views.

    Returns:
        ``reconstruction``, the mean of this term of the loss; and ``error``, the squared error of
        the downsampled views over the variance of the backbone's features within each view. Both
        are means over backbones.

    Raises:
        ValueError: features or scores are NaN or infinite, or features do not vary.
    """
    scores = []
    for objective, backbone in zip(objectives, backbones, strict=True):
        training = objective.training
        objective.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        for index in range(len(photographs)):
            images = normalised(photographs[index][None], backbone)
            batch = make_batch(
                backbone,
                images,
                config,
                stream(config.seed, "held out", index),
                upsampler=objective.upsampler,
            )
            if not bool(torch.isfinite(batch.features).all() & torch.isfinite(batch.targets).all()):
                raise ValueError(
                    f"held-out {photographs.name(index)}: NaN or infinity in the features of "
                    f"{backbone.name}"
                )
            draws = stream(config.seed, "held out loss", index)
            sums[0] += objective(batch, draws)["reconstruction"].cpu()
            sums[1:] += _squares(objective, batch).cpu()
        objective.train(training)
        if not sums[2] > _LEAST_VARIANCE * sums[3]:
            raise ValueError(
                f"the features of {backbone.name} do not vary within the {len(photographs)} "
                "held-out photographs, so errors have no scale; give other photographs, or "
                "validation_images=0"
            )
        scores.append(torch.stack([sums[0] / len(photographs), sums[1] / sums[2]]))
        if not bool(torch.isfinite(scores[-1]).all()):
            raise ValueError(
                "the weights give NaN or infinity on the held-out photographs; "
                f"learning_rate={config.learning_rate:g} may be too large"
            )
    mean = torch.stack(scores).mean(0)
    return {"reconstruction": float(mean[0]), "error": float(mean[1])}


def normalised(images: Tensor, backbone: Backbone) -> Tensor:
    """Normalise images (B, 3, H, W) uint8 for the backbone, on its device."""
    return (images.to(backbone.mean.device).float() / 255 - backbone.mean) / backbone.std


def _squares(objective: Objective, batch: ViewBatch) -> Tensor:
    """Sum squared error, variance and square of the features over the views of one image: (3,).

    All are in the objective's unit.
    """
    hires = objective.upsampler(batch.features.float(), batch.guidance) / objective.unit
    sums = torch.zeros(3, dtype=exact_dtype(hires.device), device=hires.device)
    for jitter, target in zip(batch.jitters, batch.targets.float() / objective.unit, strict=True):
        grid = (target.shape[2], target.shape[3])
        guess = objective.downsampler(apply_jitter(hires, jitter), grid)
        sums[0] += (guess - target).square().mean()
        sums[1] += (target - target.mean((2, 3), keepdim=True)).square().mean()
        sums[2] += target.square().mean()
    return sums
