"""Training target of an upsampler's detail: the backbone's features of the enlarged image.

The backbone's features of an image at twice its size have finer detail, but they drift: features
depend on magnification. A linear map, fitted to all images so far, corrects the drift. A second
linear map predicts the corrected features from the upsampled coarse features, and its prediction is
subtracted. The network learns to predict the residual, which depends on the image alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.linear import ridge
from upfeat.training.recipes.base import ENLARGEMENT, RECIPES, Recipe, Term
from upfeat.upsamplers.base import UPSAMPLERS
from upfeat.upsamplers.detail import FINER, DetailKernels, DetailUpsampler

assert ENLARGEMENT == FINER, "features of the enlarged image are those of the finer grid"

_RIDGE = 1e-2
"""Penalty of coefficients, in units of each input's variance."""


class RunningRegression(nn.Module):
    """A linear map with a constant, fitted by ridge regression to all pairs shown so far.

    Pairs affect the map from the next :meth:`absorb` on, so that it is the same for all parts and
    processes of a step.
    """

    sums: Tensor
    """(1 + 2C, 1 + 2C) float64: sums over pairs of the products of (1, inputs, outputs) with
    themselves; part of checkpoints."""

    def __init__(self, channels: int) -> None:
        """Create a map without pairs.

        Args:
            channels: number C of inputs and of outputs.
        """
        super().__init__()
        self.channels = channels
        side = 1 + 2 * channels
        self.register_buffer("sums", torch.zeros(side, side, dtype=torch.float64))
        self._pending: Tensor | None = None
        self._solved: tuple[Tensor, Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningRegression:
        """Move like any module, but not to MPS, which has no float64."""
        stays = fn(torch.empty(0)).device.type == "mps"
        return self if stays else super()._apply(fn, recurse)

    @torch.no_grad()
    def show(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add the pairs of vectors of two maps, (B, C, h, w) each, for the next :meth:`absorb`."""
        pairs = torch.cat([torch.ones_like(inputs[:, :1]), inputs, outputs], dim=1)
        rows = pairs.transpose(0, 1).flatten(1)
        new = rows @ rows.T
        new = (new.cpu() if new.device.type == "mps" else new).to(self.sums)
        self._pending = new if self._pending is None else self._pending + new

    def absorb(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Include the pairs since the last call in the fit; ``mean`` averages over processes."""
        if self._pending is not None:
            self.sums += mean(self._pending)
            self._pending = self._solved = None

    @property
    def ready(self) -> bool:
        """Return whether the map has been fitted to any pairs."""
        return bool(self.sums[0, 0] > 0)

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Map vectors: (B, C, h, w) -> the same shape."""
        if self._solved is None:
            self._solved = self._solve()
        weight, constant = (part.to(inputs) for part in self._solved)
        return F.conv2d(inputs, weight[:, :, None, None], constant)

    def deviation(self) -> Tensor:
        """Return the standard deviation of every output, (C,)."""
        mean, square = self.sums[0] / self.sums[0, 0], self.sums.diagonal() / self.sums[0, 0]
        found = (square - mean.square()).clamp(min=0).sqrt()[1 + self.channels :]
        return found.clamp(min=1e-6 * float(found.max()) + 1e-12)

    def _solve(self) -> tuple[Tensor, Tensor]:
        moments = self.sums / self.sums[0, 0]
        mean = moments[0, 1:]
        covariance = moments[1:, 1:] - torch.outer(mean, mean)
        n = self.channels
        inputs = covariance[:n, :n]
        variance = inputs.diagonal()
        # The covariance of constant inputs is rounding error of their squares, hence the bound.
        least = 1e-9 * variance.max() + 1e-12 * mean.square().max() + 1e-30
        weight = ridge(inputs, covariance[:n, n:], _RIDGE * variance + least).T  # (out, in)
        return weight, mean[n:] - weight @ mean[:n]


class DetailTarget(Term):
    """Loss of an upsampler's detail, for one backbone."""

    def __init__(self, channels: int) -> None:
        """Create both linear maps, without pairs.

        Args:
            channels: number C of the backbone's channels.
        """
        super().__init__()
        self.drift = RunningRegression(channels)
        self.known = RunningRegression(channels)

    def forward(
        self, upsampler: DetailUpsampler, kernels: DetailKernels, features: Tensor, seen: Tensor
    ) -> Tensor:
        """Compute the mean squared error of the detail, in units of the features' variance.

        Args:
            upsampler: upsampler whose detail is compared.
            kernels: kernels of the images.
            features: (B, C, h, w), the backbone's features of the images.
            seen: (B, C, h', w'), its features of the images at twice their size.

        Returns:
            A scalar; 0 until both linear maps have been fitted to any pairs.
        """
        detail = upsampler.detail_on_finer_grid(kernels)  # (B, C, 2h, 2w)
        with torch.no_grad():
            if seen.shape[-2:] != detail.shape[-2:]:
                size = (detail.shape[2], detail.shape[3])
                seen = F.interpolate(seen, size=size, mode="bilinear", align_corners=False)
            grid = (features.shape[2], features.shape[3])
            upsampled = kernels.to_finer_grid(features)
            if self.training:
                self.drift.show(F.adaptive_avg_pool2d(seen, grid), features)
            if not self.drift.ready:
                return detail.new_zeros(())
            translated = self.drift(seen)
            if self.training:
                self.known.show(upsampled, translated)
            if not self.known.ready:
                return detail.new_zeros(())
            target = translated - self.known(upsampled)
            deviation = self.drift.deviation().to(target)[:, None, None]
        return ((detail - target) / deviation).square().mean()

    def absorb(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Include the pairs of the last step in both linear maps."""
        self.drift.absorb(mean)
        self.known.absorb(mean)


@RECIPES.register
class DetailRecipe(Recipe[DetailUpsampler]):
    """Recipe with a term for the detail, which scales the channel mix after the last step."""

    name = DetailUpsampler.name

    def finish(self) -> None:
        """See :meth:`Recipe.finish`."""
        self.upsampler.scale_mix(self.config.mix_share)

    def cautions(self) -> list[str]:
        """See :meth:`Recipe.cautions`."""
        config, lines = self.config, []
        frozen = any(part.partition(".")[0] == "neighbourhood" for part in config.frozen)
        drawn = config.upsampler in UPSAMPLERS and config.upsampler_options.get("start") is None
        if frozen and drawn:
            lines.append(
                f"frozen={list(config.frozen)} without a start: the neighbourhood steps are "
                "untrained and stay so; give --option start=neighbourhood_efficientnet_lite0, or "
                "the folder of trained ones"
            )
        if self.upsampler.network is not None and not config.detail_weight:
            lines.append(
                "detail_weight=0: the detail learns from the views alone, not from the features of "
                "the enlarged image; give --detail-weight 1, or --preset detail"
            )
        return lines

    def term(self, embed_dim: int) -> DetailTarget | None:
        """See :meth:`Recipe.term`."""
        weight = self.config.detail_weight
        if not weight:
            return None
        if self.upsampler.network is None:
            raise ValueError(
                f"detail_weight={weight:g} trains the detail of one backbone; give one backbone, "
                "or detail_weight=0"
            )
        return DetailTarget(embed_dim)
