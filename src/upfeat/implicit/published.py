"""The published fit: a network trained by gradient descent on thousands of views."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from upfeat import losses
from upfeat.downsamplers import AttentionDownsampler, SimpleDownsampler
from upfeat.implicit.fields import NetworkField
from upfeat.implicit.guides import sample
from upfeat.implicit.observe import Basis, Observer
from upfeat.optimisers import NAdam
from upfeat.randomness import stream
from upfeat.views import Jitter


class Waves(NamedTuple):
    """Precomputed parts of the network's inputs at N pixels, independent of the learned phases.

    With the angles a and the phases p, sin(a + p) = sin a · cos p + cos a · sin p. The network's
    inputs are therefore linear in constants, and this linear map is merged into the first layer.
    The sum of the inputs' squares, which the layer norm needs, is linear in the waves of 2a. No
    training step computes the 303 inputs of every pixel or their gradients.
    """

    inputs: Tensor
    """(N, 303): sin a, cos a, and the scaled colours."""
    squares: Tensor
    """(N, 301): cos 2a, sin 2a, and the sum of the colours' squares."""

    @staticmethod
    @torch.no_grad()
    def of(field: NetworkField, places: Tensor, colours: Tensor) -> Waves:
        """Precompute the waves of N pixels from their places (N, 2) and colours (N, 3)."""
        angles, colours = field.angles(places, colours)
        angles = angles.double()
        inputs = torch.cat([angles.sin(), angles.cos(), colours], dim=1)
        length = colours.square().sum(1, keepdim=True)
        squares = torch.cat([(2 * angles).cos(), (2 * angles).sin(), length], dim=1)
        return Waves(inputs.to(places.dtype), squares.to(places.dtype))


def evaluate_waves(field: NetworkField, waves: Waves) -> Tensor:
    """Evaluate the field from precomputed waves: (N, k), equal to ``field(places, colours)``."""
    n = waves.inputs.shape[1]
    kept, first = field.kept(n), field.first
    assert isinstance(first, nn.Linear)
    weight = first.weight * (field.norm_inputs.weight * kept)  # (hidden, 303)
    offset = first.bias + first.weight @ (field.norm_inputs.bias * kept)
    mean = weight.new_full((1, n), 1 / n)
    (sin1, sin2), (cos1, cos2) = field.phases.flatten(1).sin(), field.phases.flatten(1).cos()
    sines, cosines, rest = torch.cat([weight, mean]).tensor_split([len(sin1), 2 * len(sin1)], dim=1)
    turned = torch.cat([sines * cos1 - cosines * sin2, sines * sin1 + cosines * cos2, rest], dim=1)
    x, mean = (waves.inputs @ turned.T).split([len(weight), 1], dim=1)
    twice_cos, twice_sin = (2 * field.phases.flatten(1)).cos(), (2 * field.phases.flatten(1)).sin()
    parts = [twice_cos[1] - twice_cos[0], twice_sin[0] - twice_sin[1], twice_sin.new_full((1,), 2)]
    # sin²(a + p) + cos²(a + q) = 1 + (cos(2a + 2q) − cos(2a + 2p)) / 2
    square = (len(sin1) + (waves.squares @ torch.cat(parts) / 2)[:, None]) / n
    scale = (square - mean.square() + field.norm_inputs.eps).rsqrt()
    return field.after_first((x - mean * weight.sum(1)) * scale + offset)


@dataclass
class NetworkFit:
    """The network of a fit, and the downsampler and the uncertainty that are trained with it.

    Source: FeatUp, section 3.3; the weights of the losses are those of the published code.
    """

    field: NetworkField
    downsampler: AttentionDownsampler | SimpleDownsampler
    uncertainty: losses.SpatialUncertainty
    waves: Waves
    size: tuple[int, int]

    def coordinates(self) -> Tensor:
        """Evaluate the whole map of coordinates in the basis, (1, k, H, W)."""
        values = evaluate_waves(self.field, self.waves)  # (H·W, k)
        return values.T.reshape(1, -1, *self.size)

    def backward(self, views: Jitter, targets: Tensor, generator: torch.Generator) -> float:
        """Add the objective's gradient for N views to the parameters' gradients.

        Gradients are first summed over views at the map of coordinates, then propagated through the
        network once.

        Args:
            views: N views.
            targets: (N, k, h, w), coordinates of the views' features in the basis.
            generator: random generator of the downsampler's dropout.

        Returns:
            The value of the objective.
        """
        drawn = self.coordinates()
        values = drawn.detach().requires_grad_()
        loss = self.views_loss(values, views, targets, generator) + self.prior_loss(values)
        loss.backward()
        drawn.backward(values.grad)
        return float(loss.detach())

    def views_loss(
        self, values: Tensor, views: Jitter, targets: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Return the mean loss of the map (1, k, H, W) against features of views, (N, k, h, w).

        The map itself is not warped to the views. Instead, the downsampler's weights, which have
        one channel, are warped back to the map.
        """
        grid_size = (targets.shape[2], targets.shape[3])
        both = torch.cat([losses.magnitude(values), values], dim=1)
        shown = self.downsample(both, grid_size, views, generator)
        reconstruction = losses.gaussian_reconstruction(
            shown[:, 1:], targets, self.uncertainty(targets)
        )
        lengths = losses.magnitude_consistency(shown[:, :1], targets)
        return reconstruction + losses.IMPLICIT_MAGNITUDE_WEIGHT * lengths

    def prior_loss(self, values: Tensor) -> Tensor:
        """Return the penalties that keep the map itself, (1, k, H, W), smooth."""
        variation = losses.magnitude_variation(values)
        return (
            losses.IMPLICIT_MAGNITUDE_VARIATION_WEIGHT * variation
            + losses.IMPLICIT_BLUR_PIN_WEIGHT * losses.blur_pin(values)
        )

    def downsample(
        self,
        values: Tensor,
        grid_size: tuple[int, int],
        views: Jitter,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Downsample a map to the backbone's grid in each view.

        Args:
            values: (1, 1 + k, H, W), magnitude and coordinates.
            grid_size: (h, w) of the result, cells.
            views: N views.
            generator: random generator of the downsampler's dropout.

        Returns:
            (N, 1 + k, h, w).
        """
        if isinstance(self.downsampler, SimpleDownsampler):
            return self.downsampler(values, grid_size, jitter=views)
        return self.downsampler(values, grid_size, jitter=views, generator=generator)

    @torch.no_grad()
    def own_held_out_loss(self, observer: Observer, basis: Basis) -> float:
        """Return the held-out loss with the learned downsampler, in units of the features squared.

        :meth:`Observer.held_out_loss` averages over cells instead.
        """
        self.eval()
        values = self.coordinates()
        values = torch.cat([losses.magnitude(values), values], dim=1)
        total = 0.0
        for view, target in zip(observer.held, observer.held_features, strict=True):
            shown = self.downsample(values, observer.grid_size, view)[0, 1:]
            guess = torch.einsum("khw,kc->chw", shown, basis.components)
            total += float((guess + basis.mean[:, None, None] - target).square().mean())
        return total / len(observer.held)

    def train(self) -> None:
        """Switch to training mode, with dropout."""
        self.field.train()
        self.downsampler.train()

    def eval(self) -> None:
        """Switch to evaluation mode, without dropout."""
        self.field.eval()
        self.downsampler.eval()

    def parameters(self) -> list[nn.Parameter]:
        """Return all trained parameters."""
        modules = (self.field, self.downsampler, self.uncertainty)
        return [parameter for module in modules for parameter in module.parameters()]


def create_network_fit(
    guidance: Tensor, basis: Basis, *, stride: int, downsampler: str, seed: int
) -> NetworkFit:
    """Draw the initial network and downsampler.

    Args:
        guidance: (3, H, W) uint8, the image.
        basis: basis of the targets.
        stride: stride of the backbone; the downsampler's kernel is about twice as large.
        downsampler: kind of downsampler, "attention" or "simple".
        seed: seed of the weights and of the network's dropout.
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
    colours = sample(field.look(guidance), places)
    waves = Waves.of(field, places.float(), colours)
    return NetworkFit(field, made.float(), uncertainty.float(), waves, size)


def train_network(
    fit: NetworkFit,
    views: Jitter,
    targets: Tensor,
    *,
    steps: int,
    views_per_step: int,
    learning_rate: float,
    seed: int,
) -> Iterator[int]:
    """Train a fit step by step; after the last step it is in evaluation mode.

    Args:
        fit: fit from :func:`create_network_fit`; it is modified.
        views: V observed views.
        targets: (V, k, h, w), coordinates of the views' features in the basis.
        steps: number of steps of NAdam.
        views_per_step: number of views drawn for each step.
        learning_rate: step size of NAdam.
        seed: seed of the views of each step and of the downsampler's dropout.

    Yields:
        The number of steps done.

    Raises:
        ValueError: the loss is not finite.
    """
    optimiser = NAdam(fit.parameters(), lr=learning_rate)
    generator = stream(seed, "dropout of the downsampler")
    order = stream(seed, "order of views")
    fit.train()
    for step in range(1, steps + 1):
        chosen = torch.randperm(len(views), generator=order)[:views_per_step]
        optimiser.zero_grad()
        with torch.enable_grad():
            loss = fit.backward(views[chosen], targets[chosen], generator)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}; lower learning_rate")
        optimiser.step()
        if step == steps:
            fit.eval()
            fit.field.requires_grad_(False)
        yield step
