"""Places of a fit: the pixels on which its functions are evaluated, and its anchors among them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from upfeat.implicit.guides import sample
from upfeat.randomness import stream

_CANDIDATES = 8192
# Most numbers in the table of basis functions over the map: 512 MiB.
_TABLE = 1 << 27


def choose_map_size(
    size: tuple[int, int], grid_size: tuple[int, int], anchors: int
) -> tuple[int, int]:
    """Return the size (H', W') of the map on which functions are evaluated, pixels.

    Half the image's size where cells are at least 16 pixels wide, and less where the table of
    functions would be too large.
    """
    step = 2 if min(size[0] / grid_size[0], size[1] / grid_size[1]) >= 16 else 1
    step = max(step, math.sqrt(math.prod(size) * anchors / _TABLE))
    return max(round(size[0] / step), grid_size[0]), max(round(size[1] / step), grid_size[1])


def find_positions(
    queries: Tensor, map_size: tuple[int, int], grid_size: tuple[int, int]
) -> Tensor:
    """Return the positions, (y, x) in cells and query, of all pixels of a map.

    Args:
        queries: (…, …, D), queries of the image at any resolution.
        map_size: (H', W') of the map, pixels.
        grid_size: (h, w) of the backbone's grid, cells.

    Returns:
        (H'·W', 2 + D).
    """
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in map_size)
    places = torch.cartesian_prod(y, x)
    cells = (places * places.new_tensor(grid_size)).float()
    return torch.cat([cells, sample(queries, places)], dim=1)


def spread_anchors(positions: Tensor, n: int, scale: Tensor, seed: int) -> Tensor:
    """Choose anchors that cover places and queries: each is the farthest from all chosen before.

    Args:
        positions: (P, 2 + D), place in cells and query of the pixels.
        n: largest number of anchors.
        scale: (3,), the units of distance: standard deviation in cells and in query; the third
            number, a weight, is not used.
        seed: seed of the draw of candidate pixels.

    Returns:
        (M, 2 + D), positions of M ≤ n anchors.
    """
    order = torch.randperm(len(positions), generator=stream(seed, "anchors"))[:_CANDIDATES]
    candidates = positions[order]
    place, query = scale[:2].tolist()
    scaled = candidates / candidates.new_tensor([place, place] + [query] * (positions.shape[1] - 2))
    square = scaled.square().sum(1)
    chosen = torch.empty(min(n, len(candidates)), dtype=torch.long)
    distance = torch.full((len(candidates),), math.inf)
    for index in range(len(chosen)):
        last = chosen[index] = distance.argmax()
        distance[last] = -math.inf  # not to be chosen again
        away = torch.addmv(square, scaled, scaled[last], alpha=-2).add_(square[last])
        torch.minimum(distance, away, out=distance)
    return candidates[chosen]
