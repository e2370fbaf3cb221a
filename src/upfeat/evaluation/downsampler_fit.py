"""Fit of a downsampler, and of the uncertainty of its results, to one frozen upsampler.

The consistency task warps upsampled features like a view, downsamples them to the backbone's grid
and compares them with the backbone's features of that view. The errors depend on the downsampler,
so each upsampler gets its own. It is fitted on training images by the squared error (FeatUp,
section 3.2); then a standard deviation for each cell is fitted by maximum likelihood (section 3.3).

Both are fitted on cells: patches of warped features, with the backbone's feature of the cell as the
target. Errors are measured along random directions, drawn anew for every image, so that all
channels count equally. Saliency and standard deviation are functions of the leading principal
components of the features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from upfeat.downsamplers import AttentionDownsampler, SimpleDownsampler
from upfeat.evaluation.data.prepared import PreparedSet
from upfeat.linear import leading_axes
from upfeat.losses import SpatialUncertainty, gaussian_reconstruction, unit_of
from upfeat.optimisers import LBFGS, NAdam

N_DIRECTIONS = 30
"""Random directions along which the error is measured while fitting (FeatUp, section 3.3)."""

N_COMPONENTS = 32
"""Leading principal components on which the saliency and the standard deviation depend."""

MAX_CELLS = 4096
MAX_VALUES = 2**26
"""Most numbers in the cells of one seed: 256 MiB."""

_STEPS = 150
_BATCH = 256
_LEARNING_RATE = 2e-2


@dataclass(frozen=True)
class Cells:
    """Cells of training views.

    Attributes:
        values: (N, 30, k, k), warped features of each cell's pixels along random directions, in the
            unit of :func:`leading_components`.
        leading: (N, D, k, k), leading components of the warped features.
        target: (N, 30), the backbone's features of the cells along the same directions.
        seen: (N, D), leading components of the backbone's features.
    """

    values: Tensor
    leading: Tensor
    target: Tensor
    seen: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: Tensor) -> Cells:
        parts = (self.values, self.leading, self.target, self.seen)
        return Cells(*(part[index] for part in parts))

    @staticmethod
    def cat(cells: list[Cells]) -> Cells:
        """Join cells in order."""
        names = ("values", "leading", "target", "seen")
        return Cells(*(torch.cat([getattr(each, name) for each in cells]) for name in names))


@dataclass(frozen=True)
class Fitted:
    """A fitted downsampler and its uncertainty; both take all C channels of features."""

    downsampler: AttentionDownsampler | SimpleDownsampler
    uncertainty: SpatialUncertainty


def count_cells(kernel_size: int, n_components: int) -> int:
    """Return the number of cells, of k×k pixels with k = ``kernel_size``, to draw for one seed."""
    return max(1, min(MAX_CELLS, MAX_VALUES // (kernel_size**2 * (N_DIRECTIONS + n_components))))


def leading_components(images: PreparedSet) -> tuple[Tensor, float]:
    """Compute the leading principal components of coarse features, and the features' unit.

    Args:
        images: images of the training split.

    Returns:
        (D, C), projections to components of variance 1; D is :data:`N_COMPONENTS`, but at most C.
        The unit to divide features by before a fit; see :func:`upfeat.losses.unit_of`.
    """
    total, square, count = 0, 0, 0
    for sample in images:
        cells = sample.features.flatten(1).cpu().double()  # (C, h·w)
        total = total + cells.sum(1)
        square = square + cells @ cells.T
        count += cells.shape[1]
    mean = torch.as_tensor(total) / count
    covariance = torch.as_tensor(square) / count - mean[:, None] * mean
    axes, variances = leading_axes(covariance, N_COMPONENTS)
    unit = unit_of(float(torch.as_tensor(square).diagonal().mean() / count) ** 0.5)
    deviation = variances.clamp(min=1e-12 * unit**2).sqrt()
    return (axes / deviation[:, None]).float().to(images.device), unit


@torch.no_grad()
def fit(kind: str, cells: Cells, leading: Tensor, seed: int) -> Fitted:
    """Fit a downsampler, then its standard deviation.

    Args:
        kind: ``box`` (the mean over the cell, which needs no fit), ``simple`` or ``attention``.
        cells: cells to fit on.
        leading: (D, C), the projection to the components that the cells contain.
        seed: seed of initial values and batches.
    """
    generator = torch.Generator().manual_seed(seed)
    kernel_size = cells.leading.shape[2]
    downsampler = SimpleDownsampler(kernel_size)
    if kind == "attention":
        downsampler = _attention(len(leading), kernel_size, generator)
    downsampler.to(cells.values.device)
    if kind != "box":
        _fit_downsampler(downsampler, cells, generator)
    uncertainty = _fit_uncertainty(downsampler, cells)
    if isinstance(downsampler, AttentionDownsampler):
        whole = _attention(leading.shape[1], kernel_size, generator).to(leading.device)
        state = downsampler.state_dict()
        whole.load_state_dict({**state, "saliency_weight": state["saliency_weight"] @ leading})
        downsampler = whole
    trust = SpatialUncertainty(leading.shape[1], generator=generator).to(leading.device)
    trust.weight.copy_((uncertainty.weight[..., 0, 0] @ leading)[..., None, None])
    trust.bias.copy_(uncertainty.bias)
    return Fitted(downsampler.eval(), trust)


def _attention(
    embed_dim: int, kernel_size: int, generator: torch.Generator
) -> AttentionDownsampler:
    return AttentionDownsampler(embed_dim, kernel_size, dropout=0.0, generator=generator)


def _pooled(downsampler: AttentionDownsampler | SimpleDownsampler, cells: Cells) -> Tensor:
    """Downsample cells: (N, 30)."""
    if isinstance(downsampler, AttentionDownsampler):
        saliency = downsampler.saliency(cells.leading)
        return downsampler(cells.values, (1, 1), saliency=saliency)[..., 0, 0]
    return downsampler(cells.values, (1, 1))[..., 0, 0]


def _fit_downsampler(
    downsampler: AttentionDownsampler | SimpleDownsampler,
    cells: Cells,
    generator: torch.Generator,
) -> None:
    optimiser = NAdam(downsampler.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    scale = cells.target.var().clamp(min=1e-12)
    for index in _batches(len(cells), generator):
        batch = cells[index]
        with torch.enable_grad():
            loss = (_pooled(downsampler, batch) - batch.target).square().mean() / scale
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def _batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of each step's cells: every cell is used once before any is repeated."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(_STEPS):
        while len(order) < min(_BATCH, count):
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:_BATCH]
        order = order[_BATCH:]


def _fit_uncertainty(
    downsampler: AttentionDownsampler | SimpleDownsampler, cells: Cells
) -> SpatialUncertainty:
    """Fit the standard deviations of cells by maximum likelihood, starting from one common value.

    The problem is convex.
    """
    batches = torch.arange(len(cells)).split(_BATCH)
    predicted = torch.cat([_pooled(downsampler, cells[index]) for index in batches])
    error = (predicted - cells.target)[..., None, None]  # (N, 30, 1, 1)
    seen = cells.seen[..., None, None]
    uncertainty = SpatialUncertainty(seen.shape[1], generator=torch.Generator()).to(seen.device)
    uncertainty.weight.zero_()
    # The bias is the logarithm less 0.1, since the module adds 0.1.
    uncertainty.bias.fill_(math.log(float(error.square().mean().sqrt().clamp(min=1e-4))) - 0.1)
    optimiser = LBFGS(uncertainty.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        with torch.enable_grad():
            loss = gaussian_reconstruction(error, torch.zeros_like(error), uncertainty(seen))
        loss.backward()
        return loss

    optimiser.step(closure)  # pyright: ignore[reportArgumentType]
    return uncertainty


def to_cells(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut maps into the cells of a grid (h, w), row by row: (V, C, H, W) -> (V·h·w, C, k, k)."""
    height, width = maps.shape[2] // grid[0], maps.shape[3] // grid[1]
    cut = maps.unflatten(3, (grid[1], width)).unflatten(2, (grid[0], height))  # V C h k w k
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
