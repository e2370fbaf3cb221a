"""Fields, the functions of place and image content that implicit features consist of.

A :class:`KernelField`, fitted in closed form, is a sum of Gaussian bumps around anchors. Distances
to anchors are measured in place and in query, the descriptor of colour and texture by which the
neighbourhood upsampler compares pixels. A :class:`NetworkField`, fitted by gradient descent, is the
published network of Fourier features of place and colour (FeatUp, section 3.3). The value of either
field at a point depends on that point alone, so all resolutions and windows agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from upfeat.implicit.guides import QueryGuide, colours

MOST_ANCHORS = 1 << 14
"""Most anchors of a kernel field: the table that compares all pairs of anchors has 2 GiB then."""
MOST_SCALES = 16

_TILE_CELLS = 4
# Standard deviations at which a bump is cut off: it is below 2e-8 of its height there.
_REACH = 6.0
# Points evaluated together, so few that their table of bumps, points × anchors, fits in the cache.
_CHUNK = 512
_SMALLEST_LOGIT = -60.0
_NETWORK_CHUNK = 8192


class Field(Protocol):
    """A function of the place and of a map of the image, such as its colours, at the place."""

    kind: ClassVar[str]

    @property
    def width(self) -> int:
        """Number k of values at a point."""
        ...

    def look(self, guidance: Tensor) -> Tensor:
        """Compute the map that the field needs: image (3, H, W) uint8 -> (H', W', D) float32."""
        ...

    def __call__(self, places: Tensor, seen: Tensor) -> Tensor:
        """Evaluate the field at N points.

        Args:
            places: (N, 2), (y, x) in [0, 1] over the image.
            seen: (N, D), the map from :meth:`look`, sampled at the places.

        Returns:
            (N, k).
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that :func:`upfeat.implicit.stored.rebuild` needs."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return the settings that :func:`upfeat.implicit.stored.rebuild` needs, as JSON values."""
        ...


class BilateralKernel:
    """A weighted sum of Gaussians of the distance in place (cells) and in query (unit vectors)."""

    def __init__(self, scales: Tensor) -> None:
        """Store the scales.

        Args:
            scales: (S, 3), a row for each Gaussian: standard deviation in cells, standard deviation
                in query, and weight; weights sum to 1.
        """
        self.scales = scales

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare positions (y, x, query): (N, 2 + D), (M, 2 + D) -> (N, M), 1 where equal."""
        # In double precision: bumps overlap and their heights nearly cancel, which magnifies
        # rounding errors of the distances.
        total, dtype = None, a.dtype
        a, b = a.double(), b.double()
        for place, query, weight in self.scales.tolist():
            scale = a.new_tensor([place, place] + [query] * (a.shape[1] - 2))
            # log weight − |a − b|²/2 as one matrix product: the squares are two more columns.
            near, far = a / scale, b / scale
            near = torch.cat([near, _half_square(near) + math.log(weight), _ones(near)], dim=1)
            far = torch.cat([far, _ones(far), _half_square(far)], dim=1)
            logits = (near @ far.T).to(dtype)
            # Bounded below, because processors are slow with denormal numbers.
            part = logits.clamp_(min=_SMALLEST_LOGIT).exp_()
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    @property
    def reach(self) -> float:
        """Distance in cells beyond which the kernel is negligible."""
        return _REACH * float(self.scales[:, 0].max())


def _half_square(x: Tensor) -> Tensor:
    """Return −|x|²/2 of each row: (N, D) -> (N, 1)."""
    return x.square().sum(1, keepdim=True) / -2


def _ones(x: Tensor) -> Tensor:
    """Return a column of ones, one for each row: (N, D) -> (N, 1)."""
    return x.new_ones(len(x), 1)


class KernelField:
    """Gaussian bumps around anchors: the mean of a Gaussian process given linear observations.

    With k the kernel, K its matrix for all pairs of anchors and L Lᵀ = K + nugget·I, the values at
    a point are k(point, anchors) · L⁻ᵀ · coefficients. Under the process's prior, the coefficients
    are independent and have unit variance. Hence a plain ridge penalty on them expresses the prior,
    and half precision stores them well.
    """

    kind: ClassVar[str] = "kernel"

    def __init__(
        self,
        anchors: Tensor,
        scales: Tensor,
        coefficients: Tensor,
        guide: QueryGuide,
        *,
        grid_size: tuple[int, int],
        nugget: float = 1e-3,
    ) -> None:
        """Compute the heights of the bumps from the coefficients.

        Args:
            anchors: (M, 2 + D) float32, positions: (y, x) in cells, then the query; files store
                queries in half precision.
            scales: (S, 3), scales for :class:`BilateralKernel`.
            coefficients: (M, k); files store them in half precision.
            guide: computes the queries, vectors of length D.
            grid_size: (h, w), the cells over the image, in which places are measured.
            nugget: number added to the diagonal of K.

        Raises:
            ValueError: the anchors' queries are not as wide as the guide's.
        """
        if anchors.shape[1] != 2 + guide.width:
            raise ValueError(f"anchors are {anchors.shape[1]} wide, not {2 + guide.width}")
        self.guide = guide
        self.anchors, self.scales, self.coefficients = anchors, scales, coefficients
        self.grid_size, self.nugget = grid_size, nugget
        self.kernel = BilateralKernel(scales)
        factor = whitening(self.kernel, anchors, nugget)
        self._heights = torch.linalg.solve_triangular(
            factor.mT, coefficients.double(), upper=True
        ).float()  # (M, k)

    @property
    def width(self) -> int:
        """Number k of values at a point."""
        return self.coefficients.shape[1]

    def look(self, guidance: Tensor) -> Tensor:
        """Compute the queries; see :class:`Field`."""
        return self.guide(guidance)

    def __call__(self, places: Tensor, seen: Tensor) -> Tensor:
        """See :class:`Field`. Points are grouped by tiles that depend on the grid alone."""
        positions = torch.cat([places * places.new_tensor(self.grid_size), seen], dim=1)
        out = places.new_empty(len(places), self.width)
        for index, nearby in self._tiles(positions[:, :2]):
            anchors, heights = self.anchors[nearby], self._heights[nearby]
            for part in index.split(_CHUNK):
                out[part] = self.kernel(positions[part], anchors) @ heights
        return out

    def _tiles(self, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each tile, the indices of its points and of the anchors within reach of it."""
        tiles = (places / _TILE_CELLS).floor().long()  # (N, 2)
        across = math.ceil(self.grid_size[1] / _TILE_CELLS) + 2
        number = (tiles[:, 0] + 1) * across + tiles[:, 1] + 1
        order = number.argsort(stable=True)
        found, counts = number[order].unique_consecutive(return_counts=True)
        for tile, index in zip(found.tolist(), order.split(counts.tolist()), strict=True):
            row, column = tile // across - 1, tile % across - 1
            low = places.new_tensor([row, column]) * _TILE_CELLS
            away = (low - self.anchors[:, :2]).clamp(min=0)
            away = away + (self.anchors[:, :2] - low - _TILE_CELLS).clamp(min=0)
            yield index, (away < self.kernel.reach).all(1).nonzero()[:, 0]

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Field`."""
        return {
            "anchor_places": self.anchors[:, :2],
            "anchor_queries": self.anchors[:, 2:].half(),
            "scales": self.scales,
            "coefficients": self.coefficients.half(),
            **{f"guide.{name}": value for name, value in self.guide.tensors().items()},
        }

    def facts(self) -> dict[str, Any]:
        """See :class:`Field`."""
        return {
            "grid_size": list(self.grid_size),
            "nugget": self.nugget,
            "guide": self.guide.facts(),
        }


def whitening(kernel: BilateralKernel, anchors: Tensor, nugget: float) -> Tensor:
    """Return the lower triangular L, L Lᵀ = kernel(anchors, anchors) + nugget·I: (M, M) float64."""
    anchors = anchors.double()
    matrix = kernel(anchors, anchors)
    matrix.diagonal().add_(nugget)
    return torch.linalg.cholesky(matrix)


class NetworkField(nn.Module):
    """The published network: Fourier features of place and colour, and a small MLP.

    The inputs (y, x, r, g, b) are scaled to [−½, ½]. The sines and cosines of each input at 30
    frequencies from e⁻² to e¹⁰, with learned phases, and the scaled colours are 303 channels. Layer
    norm and an MLP 303→128→128→k with ReLU, layer norm and dropout follow.

    Source: FeatUp, section 3.3; the sizes are the published code's.
    """

    kind: ClassVar[str] = "network"

    def __init__(
        self,
        width: int,
        *,
        hidden: int = 128,
        frequencies: int = 30,
        dropout: float = 0.2,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw initial weights.

        Args:
            width: number k of values at a point.
            hidden: width of the hidden layers.
            frequencies: number of frequencies of each of the five inputs.
            dropout: fraction of channels dropped in training, before both hidden layers.
            generator: random generator of the weights and, in training, of the dropout.
        """
        super().__init__()
        self._width, self.hidden, self.n_frequencies = width, hidden, frequencies
        self.dropout, self.generator = dropout, generator
        inputs = 2 * 5 * frequencies + 3
        # Whatever PyTorch's defaults are: in float64, a generator draws other numbers.
        kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        self.low = nn.Buffer(torch.zeros(3, **kind))
        self.high = nn.Buffer(torch.ones(3, **kind))
        self.phases = nn.Parameter(torch.randn(2, 5, frequencies, generator=generator, **kind))
        self.norm_inputs = nn.LayerNorm(inputs, **kind)
        # PyTorch's initialisation is skipped, since it would draw from the global generator.
        self.first = skip_init(nn.Linear, inputs, hidden, **kind)
        self.norm_hidden = nn.LayerNorm(hidden, **kind)
        self.second = skip_init(nn.Linear, hidden, hidden, **kind)
        self.last = skip_init(nn.Linear, hidden, width, **kind)
        with torch.no_grad():
            for layer in (self.first, self.second, self.last):
                assert isinstance(layer, nn.Linear)
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)

    @property
    def width(self) -> int:
        """Number k of values at a point."""
        return self._width

    def set_range(self, guidance: Tensor) -> None:
        """Store the range of each colour of an image (3, H, W), to scale colours to [−½, ½]."""
        low, high = guidance.flatten(1).aminmax(dim=1)
        self.low.copy_(low)
        # A colour that never changes stays at −½.
        self.high.copy_(torch.where(high > low, high, low + 1))

    def look(self, guidance: Tensor) -> Tensor:
        """Return the colours; see :class:`Field`."""
        return colours(guidance)

    def forward(self, places: Tensor, seen: Tensor) -> Tensor:
        """See :class:`Field`."""
        if torch.is_grad_enabled() or len(places) <= _NETWORK_CHUNK:
            return self._evaluate(places, seen)
        parts = zip(places.split(_NETWORK_CHUNK), seen.split(_NETWORK_CHUNK), strict=True)
        return torch.cat([self._evaluate(*part) for part in parts])

    def angles(self, places: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
        """Return the arguments of the sines without phases, (N, 150), and scaled colours (N, 3)."""
        colours = (colours - self.low) / (self.high - self.low) - 0.5
        inputs = torch.cat([places - 0.5, colours], dim=1)  # (N, 5)
        like = {"dtype": places.dtype, "device": places.device}
        frequencies = torch.linspace(-2, 10, self.n_frequencies, **like).exp()
        return (inputs[:, :, None] * frequencies).flatten(1), colours

    def kept(self, channels: int) -> Tensor:
        """Draw the factors of dropout, (channels,); ones when not training.

        Whole channels are dropped at all points, as by 2-D dropout of one image.
        """
        ones = self.phases.new_ones(channels)
        if not self.training or self.dropout == 0:
            return ones
        drawn = torch.rand(ones.shape, generator=self.generator, out=torch.empty_like(ones))
        return (drawn >= self.dropout).to(drawn) / (1 - self.dropout)

    def after_first(self, x: Tensor) -> Tensor:
        """Apply the layers after the first linear layer: (N, hidden) -> (N, k)."""
        x = self.norm_hidden(F.relu(x) * self.kept(x.shape[1]))
        return self.last(F.relu(self.second(x)))

    def _evaluate(self, places: Tensor, colours: Tensor) -> Tensor:
        angles, colours = self.angles(places, colours)
        first, second = self.phases.flatten(1)
        x = torch.cat([(angles + first).sin(), (angles + second).cos(), colours], dim=1)  # (N, 303)
        x = self.norm_inputs(x)
        return self.after_first(self.first(x * self.kept(x.shape[1])))

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Field`."""
        return {name: value.detach() for name, value in self.state_dict().items()}

    def facts(self) -> dict[str, Any]:
        """See :class:`Field`."""
        return {
            "width": self.width,
            "hidden": self.hidden,
            "frequencies": self.n_frequencies,
            "dropout": self.dropout,
        }
