"""The published fit: a network trained by gradient descent on thousands of views."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upfeat import losses
from upfeat.downsamplers import AttentionDownsampler, SimpleDownsampler
from upfeat.training.implicit_views import Basis, Observer
from upfeat.training.randomness import stream
from upfeat.upsamplers.implicit import sample_colours
from upfeat.upsamplers.implicit_fields import NetworkField
from upfeat.views import Jitter, apply_jitter


@dataclass
class NetworkFit:
    """A network, and what is trained beside it.

    Source: FeatUp, section 3.3; the weights of the losses are the published code's.
    """

    field: NetworkField
    downsampler: AttentionDownsampler | SimpleDownsampler
    uncertainty: losses.SpatialUncertainty
    places: Tensor
    colours: Tensor
    size: tuple[int, int]

    def coordinates(self) -> Tensor:
        """The whole map in the basis, (1, k, H, W)."""
        values = self.field(self.places, self.colours)  # (H·W, k)
        return values.T.reshape(1, -1, *self.size)

    def backward(self, views: Jitter, targets: Tensor, generator: torch.Generator) -> float:
        """Add the objective's gradient for views and their features (N, k, h, w) in the basis.

        Views go one by one, from the drawn map and back to it, so that memory holds one of them;
        the network is passed through once.

        Returns:
            The objective.
        """
        drawn = self.coordinates()
        values = drawn.detach().requires_grad_()
        total = 0.0
        for view, target in zip(views, targets.split(1), strict=True):
            loss = self.view_loss(values, view, target, generator) / len(views)
            loss.backward()
            total += float(loss.detach())
        loss = self.prior_loss(values)
        loss.backward()
        drawn.backward(values.grad)
        return total + float(loss.detach())

    def view_loss(
        self, values: Tensor, view: Jitter, target: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """How badly the map (1, k, H, W) explains one view's features (1, k, h, w)."""
        grid_size = (target.shape[2], target.shape[3])
        shown = apply_jitter(torch.cat([losses.magnitude(values), values], dim=1), view)
        shown = self.downsample(shown, grid_size, generator)
        reconstruction = losses.gaussian_reconstruction(
            shown[:, 1:], target, self.uncertainty(target)
        )
        lengths = losses.magnitude_consistency(shown[:, :1], target)
        return reconstruction + losses.IMPLICIT_MAGNITUDE_WEIGHT * lengths

    def prior_loss(self, values: Tensor) -> Tensor:
        """What holds the map itself, (1, k, H, W), smooth."""
        variation = losses.magnitude_variation(values)
        return (
            losses.IMPLICIT_MAGNITUDE_VARIATION_WEIGHT * variation
            + losses.IMPLICIT_BLUR_PIN_WEIGHT * losses.blur_pin(values)
        )

    def downsample(
        self, shown: Tensor, grid_size: tuple[int, int], generator: torch.Generator | None = None
    ) -> Tensor:
        """(N, 1 + k, H, W), magnitude first, to (N, 1 + k, h, w)."""
        if isinstance(self.downsampler, SimpleDownsampler):
            return self.downsampler(shown, grid_size)
        return self.downsampler(shown, grid_size, generator=generator)

    @torch.no_grad()
    def own_held_out_loss(self, observer: Observer, basis: Basis) -> float:
        """Held-out loss through the learned downsampler, in the space of features."""
        self.eval()
        values = self.coordinates()
        values = torch.cat([losses.magnitude(values), values], dim=1)
        total = 0.0
        for view, target in zip(observer.held, observer.held_features, strict=True):
            shown = self.downsample(apply_jitter(values, view), observer.grid_size)[0, 1:]
            guess = torch.einsum("khw,kc->chw", shown, basis.components)
            total += float((guess + basis.mean[:, None, None] - target).square().mean())
        return total / len(observer.held)

    def train(self) -> None:
        """Drop out from now on."""
        self.field.train()
        self.downsampler.train()

    def eval(self) -> None:
        """Drop nothing out from now on."""
        self.field.eval()
        self.downsampler.eval()

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        modules = (self.field, self.downsampler, self.uncertainty)
        return [parameter for module in modules for parameter in module.parameters()]


def create_network_fit(
    guidance: Tensor, basis: Basis, *, stride: int, downsampler: str, seed: int
) -> NetworkFit:
    """Draw the initial network and downsampler.

    Args:
        guidance: (3, H, W) uint8.
        basis: of the targets.
        stride: of the backbone; the downsampler's kernel is about twice as large.
        downsampler: "attention" or "simple".
        seed: draws the weights and the dropout.
    """
    k = len(basis.components)
    size = (guidance.shape[1], guidance.shape[2])
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in size)
    places = torch.cartesian_prod(y, x)
    field = NetworkField(k, generator=stream(seed, "network"))
    field.set_range(guidance.float() / 255)
    # 29 taps for a stride of 16, as published.
    taps = max(2 * stride - 3, 1)
    if downsampler == "attention":
        made: AttentionDownsampler | SimpleDownsampler = AttentionDownsampler(
            k + 1, taps, generator=stream(seed, "downsampler")
        )
    else:
        made = SimpleDownsampler(taps)
    uncertainty = losses.SpatialUncertainty(k, generator=stream(seed, "uncertainty"))
    colours = sample_colours(guidance, places)
    return NetworkFit(field, made, uncertainty, places.float(), colours, size)


def train_network(
    fit: NetworkFit,
    views: Jitter,
    targets: Tensor,
    *,
    steps: int,
    views_per_step: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int], None],
) -> None:
    """Train in place; leaves the network in eval mode.

    Args:
        fit: from :func:`create_network_fit`.
        views: that were looked at.
        targets: (V, k, h, w), their features in the basis.
        steps: of NAdam.
        views_per_step: drawn for each step.
        learning_rate: of NAdam.
        seed: draws the views of each step.
        on_step: is told how many steps are done.
    """
    optimiser = torch.optim.NAdam(fit.parameters(), lr=learning_rate)
    generator = stream(seed, "dropout of the downsampler")
    order = stream(seed, "order of views")
    fit.train()
    with torch.enable_grad():
        for step in range(steps):
            chosen = torch.randperm(len(views), generator=order)[:views_per_step]
            optimiser.zero_grad()
            loss = fit.backward(views[chosen], targets[chosen], generator)
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {step + 1}; lower learning_rate")
            optimiser.step()
            on_step(step + 1)
    fit.eval()
    fit.field.requires_grad_(False)
