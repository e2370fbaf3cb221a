"""Forms of the neighbourhood, the detail, the early detail and the joint bilateral upsampler."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.portable import axes
from upfeat.portable.form import PORTABLE, Form
from upfeat.portable.regression import Regression
from upfeat.portable.smoothing import Smoothing
from upfeat.portable.step import Layout, Step, encode, unit
from upfeat.types import Size
from upfeat.upsamplers import (
    DetailUpsampler,
    EarlyDetailUpsampler,
    JointBilateral,
    NeighbourhoodUpsampler,
)
from upfeat.upsamplers.detail import FINER, DetailMaps
from upfeat.upsamplers.detail_network import DetailNetwork
from upfeat.upsamplers.head import Head


@PORTABLE.register
class PortableNeighbourhood(Form):
    """Form of :class:`NeighbourhoodUpsampler`."""

    name = NeighbourhoodUpsampler.name

    def __init__(self, upsampler: NeighbourhoodUpsampler, head: Head) -> None:
        """See :class:`Form`."""
        super().__init__(upsampler, head)
        self.encoder = copy.deepcopy(upsampler.encoder)
        self.step = step_of(upsampler)
        self.least_side = smallest_side(upsampler)

    def kernels(
        self,
        features: Tensor,
        guidance: Tensor,
        size: Size | None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Form.kernels`."""
        queries = encode(self.encoder, guidance, size)
        keys = unit(cell_means(queries, features.shape[2:]))
        layout = Layout(queries, keys, self.step.radius)
        return self.step(layout, self.step.weights(layout, queries, keys), features)


@PORTABLE.register
class PortableDetail(Form):
    """Form of :class:`DetailUpsampler`."""

    name = DetailUpsampler.name

    def __init__(self, upsampler: DetailUpsampler, head: Head) -> None:
        """See :class:`Form`."""
        super().__init__(upsampler, head)
        steps = upsampler.neighbourhood
        self.encoder = copy.deepcopy(steps.encoder)
        self.first, self.last = step_of(steps), step_of(steps, widening=upsampler.widening)
        self.regression = Regression(upsampler.ridge, steps.query_dim) if upsampler.ridge else None
        self.smoothing = Smoothing(upsampler.smoothing) if upsampler.smoothing else None
        self.network = self._network_of(upsampler)
        if self.network is not None:
            basis, constant = upsampler.detail.weight.detach(), upsampler.detail.bias
            assert constant is not None
            self.basis: Tensor
            self.level: Tensor
            self.register_buffer("basis", head.on_channels(basis.flatten(1)).clone())
            self.register_buffer("level", head.on_channels(constant.detach()).clone())
        self.least_side = smallest_side(steps)

    def kernels(
        self,
        features: Tensor,
        guidance: Tensor,
        size: Size | None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Form.kernels`."""
        queries = encode(self.encoder, guidance, size)
        height, width = features.shape[2:]
        finer_means = cell_means(queries, (FINER * height, FINER * width))
        means = F.avg_pool2d(finer_means, FINER)
        middle, keys = unit(finer_means), unit(means)
        layout = Layout(middle, keys, self.first.radius)
        weights = self.first.weights(layout, middle, keys)
        fine = self.first(layout, weights, features)
        if hidden is not None:
            hidden = axes.on_grid(hidden, (FINER * height, FINER * width))
            finer_means = torch.cat([finer_means, hidden], dim=1)
            means = F.avg_pool2d(finer_means, FINER)
        if self.regression is not None:
            lacking = finer_means - self.first(layout, weights, means)
            fine = fine + self.regression(features, means, lacking)
        maps = self._maps(guidance, hidden, (FINER * height, FINER * width))
        if maps is not None:
            detail = (self.basis @ maps.flatten(2)).unflatten(2, maps.shape[2:])
            fine = fine + detail + self.level[:, None, None]
        if self.smoothing is not None and hidden is not None:
            fine = self.smoothing(fine, self.last.lengths(middle) * middle, middle, hidden)
        layout = Layout(queries, middle, self.last.radius)
        return self.last(layout, self.last.weights(layout, queries, middle), fine)

    def _network_of(self, upsampler: DetailUpsampler) -> nn.Module | None:
        """Copy the network of an upsampler; ``None`` if it has none."""
        return copy.deepcopy(upsampler.network)

    def _maps(self, guidance: Tensor, hidden: Tensor | None, finer: Size) -> Tensor | None:
        """Compute the network's maps, (B, width, *finer); ``None`` without a network."""
        del hidden
        if not isinstance(self.network, DetailNetwork):
            return None
        seen = DetailMaps(self.network, guidance, finer, whole=True).seen
        return self.network(axes.resize(guidance, seen))


@PORTABLE.register
class PortableEarlyDetail(PortableDetail):
    """Form of :class:`EarlyDetailUpsampler`."""

    name = EarlyDetailUpsampler.name

    def _network_of(self, upsampler: DetailUpsampler) -> nn.Module | None:
        """See :class:`PortableDetail`."""
        assert isinstance(upsampler, EarlyDetailUpsampler)
        return copy.deepcopy(upsampler.early_network)

    def _maps(self, guidance: Tensor, hidden: Tensor | None, finer: Size) -> Tensor | None:
        """See :class:`PortableDetail`; computed from early layers on the finer grid."""
        del guidance, finer
        assert self.network is not None
        return None if hidden is None else self.network(hidden)


@PORTABLE.register
class PortableJointBilateral(Form):
    """Form of :class:`JointBilateral`."""

    name = JointBilateral.name

    def __init__(self, upsampler: JointBilateral, head: Head) -> None:
        """See :class:`Form`."""
        super().__init__(upsampler, head)
        self.sigma = upsampler.sigma_range
        spatial = torch.tensor(upsampler.sigma_spatial)
        self.step = Step(torch.tensor(1.0), spatial, radius=upsampler.radius)

    def kernels(
        self,
        features: Tensor,
        guidance: Tensor,
        size: Size | None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`Form.kernels`; queries and keys are those of :class:`JointBilateral`."""
        colours = (guidance if size is None else cell_means(guidance, size)) / self.sigma
        means = cell_means(colours, features.shape[2:])
        keys = torch.cat([means, means.square().sum(1, keepdim=True) / -2], dim=1)
        queries = torch.cat([colours, torch.ones_like(colours[:, :1])], dim=1)
        layout = Layout(queries, keys, self.step.radius)
        return self.step(layout, self.step.weights(layout, queries, keys), features)


def step_of(upsampler: NeighbourhoodUpsampler, widening: float = 1.0) -> Step:
    """Make a step with an upsampler's temperature, σ (times ``widening``) and radius."""
    return Step(
        upsampler.log_temperature.exp(),
        widening * upsampler.log_sigma.exp(),
        radius=upsampler.radius,
        back_projections=upsampler.back_projections,
        least_contrast=upsampler.least_contrast,
    )


def smallest_side(upsampler: NeighbourhoodUpsampler) -> int:
    """Return the least side, pixels, of images on which every scale of the encoder is used."""
    return 2 ** max(upsampler.levels - 2, 0) + 1


def cell_means(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Average over cells, (B, K, H, W) -> (B, K, *grid); a pixel across a border counts in both."""
    rows, columns = (
        axes.pooled(length, cells, x.device)
        for length, cells in zip(x.shape[2:], grid, strict=True)
    )
    return axes.resample(x, rows, columns)
