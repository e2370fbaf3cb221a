"""Functions of a place and of what the image shows there: what implicit features are made of.

Two kinds. A :class:`KernelField` is a sum of Gaussian bumps around anchors in place and query, the
descriptor of colour and texture by which the neighbourhood upsampler compares pixels; it is fitted
in closed form. A :class:`NetworkField` is the published network of Fourier features of place and
colour (FeatUp, section 3.3), fitted by gradient descent. Both are evaluated point by point: the
value at a point depends on nothing but the point, so every resolution and every window agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from upfeat.bounds import number, whole
from upfeat.implicit.guides import QueryGuide, colours
from upfeat.tensor_checks import check_values

MOST_ANCHORS = 1 << 14
"""Of a kernel field: they are compared with one another, in a table of 2 GiB."""
MOST_SCALES = 16

_TILE_CELLS = 4
# Bumps further than this many standard deviations are below 2e-8.
_REACH = 6.0
# Points evaluated together: the table of bumps, this by the number of anchors, stays in the cache.
_CHUNK = 512
_SMALLEST_LOGIT = -60.0
_NETWORK_CHUNK = 8192


class Field(Protocol):
    """A function of place and of what a map of the image says there."""

    kind: ClassVar[str]

    @property
    def width(self) -> int:
        """Number k of values."""
        ...

    def look(self, guidance: Tensor) -> Tensor:
        """The map that the field wants to know: (3, H, W) uint8 -> (H', W', D) float32."""
        ...

    def __call__(self, places: Tensor, seen: Tensor) -> Tensor:
        """Evaluate: (N, 2) places (y, x) in [0, 1], (N, D) of the map there -> (N, k)."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for :func:`rebuild`."""
        ...

    def facts(self) -> dict[str, Any]:
        """Settings that :func:`rebuild` needs, as JSON values."""
        ...


class BilateralKernel:
    """A sum of Gaussians of the distance in place (cells) and in query (unit vectors)."""

    def __init__(self, scales: Tensor) -> None:
        """Keep the parts.

        Args:
            scales: (S, 3) rows (standard deviation in cells, in query, weight); weights sum to 1.
        """
        self.scales = scales

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare positions (y, x, query): (N, 2 + D), (M, 2 + D) -> (N, M), 1 for the same."""
        # In double precision: bumps overlap and their heights nearly cancel, so an error of single
        # precision in the distance would show.
        total, dtype = None, a.dtype
        a, b = a.double(), b.double()
        for place, query, weight in self.scales.tolist():
            scale = a.new_tensor([place, place] + [query] * (a.shape[1] - 2))
            # log weight − |a − b|²/2 as one product: the squares are two more columns.
            near, far = a / scale, b / scale
            near = torch.cat([near, _half_square(near) + math.log(weight), _ones(near)], dim=1)
            far = torch.cat([far, _ones(far), _half_square(far)], dim=1)
            logits = (near @ far.T).to(dtype)
            # Processors are slow with numbers too small for single precision's normal range.
            part = logits.clamp_(min=_SMALLEST_LOGIT).exp_()
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    @property
    def reach(self) -> float:
        """Distance in cells beyond which nothing is felt."""
        return _REACH * float(self.scales[:, 0].max())


def _half_square(x: Tensor) -> Tensor:
    """−|x|²/2: (N, D) -> (N, 1)."""
    return x.square().sum(1, keepdim=True) / -2


def _ones(x: Tensor) -> Tensor:
    """(N, D) -> (N, 1)."""
    return x.new_ones(len(x), 1)


class KernelField:
    """Gaussian bumps around anchors: the mean of a Gaussian process given linear observations.

    With K the kernel between anchors and L Lᵀ = K + nugget·I, the values at a point are
    k(point, anchors) · L⁻ᵀ · coefficients: the coefficients are of independent unit variance in the
    prior, so a plain ridge on them is the process's prior, and half precision stores them well.
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
        """Keep the parts.

        Args:
            anchors: (M, 2 + D) float32 positions: (y, x) in cells, query; files hold the query in
                half precision.
            scales: (S, 3), of :class:`BilateralKernel`.
            coefficients: (M, k); files hold them in half precision.
            guide: gives the queries, D wide.
            grid_size: (h, w) cells over the image: the unit of places.
            nugget: added to K's diagonal.

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
        """Number k of values."""
        return self.coefficients.shape[1]

    def look(self, guidance: Tensor) -> Tensor:
        """See :class:`Field`; the queries."""
        return self.guide(guidance)

    def __call__(self, places: Tensor, seen: Tensor) -> Tensor:
        """See :class:`Field`. Points are taken in tiles of the image that are always the same."""
        positions = torch.cat([places * places.new_tensor(self.grid_size), seen], dim=1)
        out = places.new_empty(len(places), self.width)
        for index, nearby in self._tiles(positions[:, :2]):
            anchors, heights = self.anchors[nearby], self._heights[nearby]
            for part in index.split(_CHUNK):
                out[part] = self.kernel(positions[part], anchors) @ heights
        return out

    def _tiles(self, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Points of one tile with the anchors that reach it, both as indices."""
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
    """The lower triangular L with L Lᵀ = K(anchors, anchors) + nugget·I, (M, M) float64."""
    anchors = anchors.double()
    matrix = kernel(anchors, anchors)
    matrix.diagonal().add_(nugget)
    return torch.linalg.cholesky(matrix)


class NetworkField(nn.Module):
    """The published network: Fourier features of place and colour, and a small MLP.

    Inputs (y, x, r, g, b), each brought to [−½, ½]; sine and cosine of each at 30 frequencies from
    e⁻² to e¹⁰ with learned phases, beside the raw colours: 303 channels. Then channel norm and
    303→128→128→k with ReLU, channel norm and dropout.

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
            width: number k of values.
            hidden: width of the hidden layers.
            frequencies: of each of the five inputs.
            dropout: share of channels dropped in training, before both hidden layers.
            generator: source of the weights and, in training, of the dropout.
        """
        super().__init__()
        self._width, self.hidden, self.n_frequencies = width, hidden, frequencies
        self.dropout, self.generator = dropout, generator
        inputs = 2 * 5 * frequencies + 3
        self.low = nn.Buffer(torch.zeros(3))
        self.high = nn.Buffer(torch.ones(3))
        self.phases = nn.Parameter(torch.randn(2, 5, frequencies, generator=generator))
        self.norm_inputs = nn.LayerNorm(inputs)
        # Left uninitialised, since that would draw from the global generator.
        self.first = skip_init(nn.Linear, inputs, hidden)
        self.norm_hidden = nn.LayerNorm(hidden)
        self.second = skip_init(nn.Linear, hidden, hidden)
        self.last = skip_init(nn.Linear, hidden, width)
        with torch.no_grad():
            for layer in (self.first, self.second, self.last):
                assert isinstance(layer, nn.Linear)
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
        self.float()

    @property
    def width(self) -> int:
        """Number k of values."""
        return self._width

    def set_range(self, guidance: Tensor) -> None:
        """Take the range of colours of an image (3, H, W), to bring them to [−½, ½]."""
        low, high = guidance.flatten(1).aminmax(dim=1)
        self.low.copy_(low)
        # A colour that never changes stays at −½.
        self.high.copy_(torch.where(high > low, high, low + 1))

    def look(self, guidance: Tensor) -> Tensor:
        """See :class:`Field`; the colours."""
        return colours(guidance)

    def forward(self, places: Tensor, seen: Tensor) -> Tensor:
        """See :class:`Field`."""
        if torch.is_grad_enabled() or len(places) <= _NETWORK_CHUNK:
            return self._evaluate(places, seen)
        parts = zip(places.split(_NETWORK_CHUNK), seen.split(_NETWORK_CHUNK), strict=True)
        return torch.cat([self._evaluate(*part) for part in parts])

    def angles(self, places: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments of the waves, without their phases: (N, 150), and the scaled colours (N, 3)."""
        colours = (colours - self.low) / (self.high - self.low) - 0.5
        inputs = torch.cat([places - 0.5, colours], dim=1)  # (N, 5)
        like = {"dtype": places.dtype, "device": places.device}
        frequencies = torch.linspace(-2, 10, self.n_frequencies, **like).exp()
        return (inputs[:, :, None] * frequencies).flatten(1), colours

    def kept(self, channels: int) -> Tensor:
        """Draw factors (channels,): whole channels are dropped, the same at every point.

        As 2-D dropout does for one image; ones when not training.
        """
        ones = self.phases.new_ones(channels)
        if not self.training or self.dropout == 0:
            return ones
        drawn = torch.rand(ones.shape, generator=self.generator, out=torch.empty_like(ones))
        return (drawn >= self.dropout).to(drawn) / (1 - self.dropout)

    def after_first(self, x: Tensor) -> Tensor:
        """The layers after the first linear one: (N, hidden) -> (N, k)."""
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


def rebuild(kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Field:
    """Make a field from what its ``kind``, ``tensors()`` and ``facts()`` said, of any file.

    Raises:
        ValueError: they do not fit together, or are out of bounds or not finite.
    """
    anything = {name.rpartition(".")[2]: (0.0, math.inf) for name in tensors}
    check_values("field", tensors, magnitudes=anything, floating=True)
    try:
        if kind == KernelField.kind:
            return _rebuild_kernel(tensors, facts)
        if kind == NetworkField.kind:
            return _rebuild_network(tensors, facts)
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"its parts do not fit together ({' '.join(str(error).split())})"
        ) from None
    raise ValueError(f"field {kind[:60]!r} is unknown; known: kernel, network")


def _rebuild_kernel(tensors: dict[str, Tensor], facts: dict[str, Any]) -> KernelField:
    height, width = facts["grid_size"]
    grid_size = whole("grid_size", height, 1, 1 << 20), whole("grid_size", width, 1, 1 << 20)
    places, queries = tensors["anchor_places"], tensors["anchor_queries"]
    scales, coefficients = tensors["scales"], tensors["coefficients"]
    count = len(places)
    if not 1 <= count <= MOST_ANCHORS or len(queries) != count or len(coefficients) != count:
        raise ValueError(f"it has {count} anchors, which do not fit its coefficients")
    if {places.dim(), queries.dim(), coefficients.dim()} != {2} or places.shape[1] != 2:
        raise ValueError("its anchors and coefficients are not tables")
    if scales.dim() != 2 or scales.shape[1] != 3 or not 1 <= len(scales) <= MOST_SCALES:
        raise ValueError(f"scales is {tuple(scales.shape)}, not (up to {MOST_SCALES}, 3)")
    for value in scales.flatten().tolist():
        number("scales", value, 1e-6, 1e6)
    number("sum of scales' weights", float(scales[:, 2].sum()), 0.999, 1.001)
    weights = {k[6:]: v for k, v in tensors.items() if k.startswith("guide.")}
    guide = QueryGuide.rebuild(weights, facts["guide"])
    anchors = torch.cat([places.float(), queries.float()], dim=1)
    parts = anchors, scales.float(), coefficients.float(), guide
    return KernelField(
        *parts, grid_size=grid_size, nugget=number("nugget", facts["nugget"], 1e-9, 1)
    )


def _rebuild_network(tensors: dict[str, Tensor], facts: dict[str, Any]) -> NetworkField:
    width, hidden = whole("width", facts["width"]), whole("hidden", facts["hidden"])
    frequencies = whole("frequencies", facts["frequencies"])
    # Before it is built: it is no larger than the file.
    for name, shape in (
        ("phases", (2, 5, frequencies)),
        ("first.weight", (hidden, 10 * frequencies + 3)),
        ("last.weight", (width, hidden)),
    ):
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not {shape}")
    number("dropout", facts["dropout"], 0, 1, below=True)
    with torch.random.fork_rng(devices=[]):
        field = NetworkField(**facts)
    field.load_state_dict(tensors)
    return field.eval().requires_grad_(False)
