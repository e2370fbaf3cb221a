"""Observations to which an image's fit is made: features of views, and a basis for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.linear import principal_components
from upfeat.randomness import stream
from upfeat.views import Jitter, sample_jitters

_BATCH, _BATCH_ON_CPU = 16, 4
# Deviation of features, in units of the length of their mean, that rounding alone may cause.
_ROUNDING = 1e-7
# Views in a batch of the backbone. On the CPU a small batch is faster, since it stays in the cache.


class Observer:
    """Extracts a backbone's features of one image and of views of it.

    Attributes:
        size: (H, W) of the image, pixels.
        grid_size: (h, w) of the features, cells.
        held: the held-out views, which no fit uses.
        held_features: (V, C, h, w), the backbone's features of the held-out views.
    """

    def __init__(
        self,
        guidance: Tensor,
        backbone: Backbone,
        *,
        held_out: int,
        max_pad: float,
        max_zoom: float,
        seed: int,
    ) -> None:
        """Draw the held-out views and extract their features.

        Args:
            guidance: (3, H, W) uint8, the image.
            backbone: extracts the features.
            held_out: number of held-out views.
            max_pad: largest padding of the views, pixels.
            max_zoom: largest magnification of the views.
            seed: seed of the draw of held-out views.

        Raises:
            ValueError: the backbone gives NaN or infinity.
        """
        self.backbone = backbone
        self.size = (guidance.shape[1], guidance.shape[2])
        pixels = guidance[None].to(backbone.mean.device)
        mean, std = backbone.mean.float(), backbone.std.float()
        self.image = (pixels.float() / 255 - mean) / std
        self.max_pad, self.max_zoom = max_pad, max_zoom
        self.held = sample_jitters(
            held_out,
            size=self.size,
            max_pad=max_pad,
            max_zoom=max_zoom,
            generator=stream(seed, "held-out views"),
        )
        self.held_features = self.observe(self.held)
        self.grid_size = (self.held_features.shape[2], self.held_features.shape[3])

    def observe(self, views: Jitter) -> Tensor:
        """Extract the backbone's features of views.

        Args:
            views: N views of the image.

        Returns:
            (N, C, h, w) float32 on the CPU.

        Raises:
            ValueError: the backbone gives NaN or infinity.
        """
        return torch.cat(list(self.batches(views)))

    @torch.no_grad()
    def batches(self, views: Jitter) -> Iterator[Tensor]:
        """Yield the features that :meth:`observe` returns, a batch of views at a time."""
        batch = _BATCH_ON_CPU if self.image.device.type == "cpu" else _BATCH
        for start in range(0, len(views), batch):
            part = views[slice(start, start + batch)]
            rows, columns = part.matrices(device=self.image.device)
            # With three channels, a dense product is faster than one that skips the zeros.
            shown = rows[:, None] @ self.image @ columns.mT[:, None]
            yield self._checked(self.backbone(shown))

    @torch.no_grad()
    def look_at_image(self, backbone: Backbone | None = None) -> tuple[Tensor, Tensor | None]:
        """Extract the features of the image itself: the backbone's output and earlier layers.

        Args:
            backbone: the backbone in several passes over the image; ``None`` for one pass.

        Returns:
            The output (1, C, h, w), and the features (1, D, h', w') of earlier layers, or ``None``
            if the backbone gives none; float32 on the CPU.

        Raises:
            ValueError: the backbone gives NaN or infinity.
        """
        features, hidden = (backbone or self.backbone).with_hidden(self.image)
        return self._checked(features), None if hidden is None else self._checked(hidden)

    def _checked(self, features: Tensor) -> Tensor:
        """Return features as float32 on the CPU, after a check that they are finite."""
        features = features.float().cpu()
        if not bool(torch.isfinite(features).all()):
            raise ValueError(
                f"{self.backbone.name} gives features with NaN or infinity; check its weights "
                "and its precision"
            )
        return features

    def held_out_loss(self, features: Tensor) -> float:
        """Return the mean squared error on the held-out views, in units of the features squared.

        The features are warped like the views and averaged over each cell, then compared with the
        backbone's features of the views.

        Args:
            features: (1, C, H', W'), fine features of the image at any resolution.
        """
        rows, columns = pooled_matrices(self.held, features.shape[2:], self.grid_size)
        return float((show(features[0], rows, columns) - self.held_features).square().mean())

    @property
    def held_out_variance(self) -> float:
        """Variance of the held-out features about their mean: the loss of a constant map."""
        flat = self.held_features.transpose(0, 1).flatten(1)
        return float(flat.var(1, correction=0).mean())

    @property
    def held_out_square(self) -> float:
        """Mean square of the held-out features."""
        return float(self.held_features.square().mean())


def zoomed_jitters(
    n: int,
    *,
    size: tuple[int, int],
    lowest: float = 1.7,
    highest: float = 3.5,
    pad: float = 4,
    generator: torch.Generator,
) -> Jitter:
    """Draw magnified views that cover place and magnification evenly.

    Args:
        n: number of views; may be 0.
        size: (height, width) of the image, pixels.
        lowest: smallest magnification; logarithms of magnifications are spread evenly.
        highest: largest magnification.
        pad: width of the reflected border, pixels.
        generator: random generator that scrambles the Sobol sequence.
    """
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    uniform = torch.quasirandom.SobolEngine(4, scramble=True, seed=seed)
    drawn = uniform.draw(n, dtype=torch.float64) if n else torch.zeros(0, 4, dtype=torch.float64)
    zoom = lowest * (highest / lowest) ** drawn[:, 0]
    extent = drawn.new_tensor(size)
    room = ((extent + 2 * pad) * zoom[:, None] - extent).floor()
    offset = (drawn[:, 1:3] * (room + 1)).floor().minimum(room)
    return Jitter(size, torch.full((n, 2), float(pad)), zoom, offset, drawn[:, 3] < 0.5)


def pooled_matrices(
    views: Jitter, map_size: tuple[int, int] | torch.Size, grid_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the warp of each view followed by the mean over each cell, as one matrix per axis.

    Args:
        views: N views.
        map_size: (H', W') of the map to be warped, pixels.
        grid_size: (h, w) of the result, cells.

    Returns:
        Matrices of rows, (N, h, H'), and of columns, (N, w, W').
    """
    matrices = views.matrices((map_size[0], map_size[1]))
    rows, columns = (
        F.adaptive_avg_pool1d(matrix.mT, cells).mT.contiguous()
        for matrix, cells in zip(matrices, grid_size, strict=True)
    )
    return rows, columns


def show(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply one matrix per axis for each view: (C, H', W') -> (N, C, h, w)."""
    n, h = rows.shape[:2]
    tall = rows.flatten(0, 1) @ x  # (C, N·h, W')
    tall = tall.view(len(x), n, h, -1).transpose(0, 1)  # (N, C, h, W')
    return tall @ columns.mT[:, None]


class Basis(NamedTuple):
    """Principal components of features: features ≈ coordinates · components + mean."""

    components: Tensor
    """(k, C), orthogonal; each is the change of the features by one unit of its coordinate."""
    mean: Tensor
    """(C,), mean of the features."""

    @property
    def inverse(self) -> Tensor:
        """(k, C), the matrix that turns features less their mean into coordinates."""
        return self.components / self.components.square().sum(1, keepdim=True)

    def encode(self, features: Tensor) -> Tensor:
        """Return the coordinates of features: (N, C, h, w) -> (N, k, h, w)."""
        inverse = self.inverse[:, :, None, None]
        return F.conv2d(features - self.mean[:, None, None], inverse)

    def loss(self, features: Tensor) -> float:
        """Return the mean squared residual of features (N, C, h, w) outside the basis."""
        said = torch.einsum("nkhw,kc->nchw", self.encode(features), self.components)
        return float((said + self.mean[:, None, None] - features).square().mean())


def feature_basis(features: Tensor, n: int, *, whiten: bool) -> Basis:
    """Fit a basis of at most ``n`` components; fewer if there are fewer channels or samples.

    Args:
        features: (N, C, h, w), features of N views.
        n: largest number of components.
        whiten: scale every coordinate that varies to variance 1. Otherwise one factor scales all
            coordinates, so that the channels of the features have variance 1 on average: the
            published weights of losses and step size suit features of about this scale.
    """
    samples = features.transpose(0, 1).flatten(1).double().T  # (S, C)
    channels = samples.shape[1]
    n = max(1, min(n, channels, len(samples) - 1))
    mean, axes, variances = principal_components(samples, channels)
    # Features of a blank image differ by rounding alone: their variation is not amplified.
    rounding = _ROUNDING * float(mean.norm()) or 1e-6
    if whiten:
        deviation = variances[:n].sqrt()
        smallest = max(float(deviation[0]) * 1e-4, rounding)
        components = axes[:n] * deviation.clamp(min=smallest)[:, None]
    else:
        components = axes[:n] * max(float(variances.mean()) ** 0.5, rounding)
    return Basis(components.float().contiguous(), mean.float())
