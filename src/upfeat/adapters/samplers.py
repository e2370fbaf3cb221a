"""Sampler of a map's tiles for geographic data sets, and reassembly of the results to a map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from upfeat.bounds import instance, number, shown, whole
from upfeat.tiling import Tile, split
from upfeat.types import Size

Query = tuple[slice, slice]
"""Region (x, y) in units of the coordinate system: x from west to east, y from south to north; the
step of each slice is the resolution."""

_MOST_TILES = 1_000_000


class TileSampler:
    """Sampler of tiles with halos for a geographic data set, such as a data set of torchgeo.

    A tile is a core, which is written, and a halo around it, which is only read. Pass the sampler
    to ``torch.utils.data.DataLoader(dataset, sampler=...)``. Every query is the outer window of a
    tile: the core and its halo, cut at the map's border. :func:`stitch` cuts the halo from each
    result and joins the cores.

    The result equals that of the whole image, up to floating-point errors, if the halo is at least
    ``receptive_halo(model.backbone, early=model.early) + model.upsampler.reach`` cells, in pixels,
    and if the least common multiple of ``model.backbone.step`` and ``model.upsampler.step``, times
    the backbone's stride, divides ``step`` and both sides of the image. If
    :func:`upfeat.receptive_field.receptive_halo` or :attr:`upfeat.upsamplers.Upsampler.reach` is
    ``None``, no halo is enough.

    Attributes:
        resolution: side of a pixel, in units of the coordinate system.
        size: (height, width) of the map, pixels.
        tiles: tiles in the order of the queries: row by row, from the north-west corner.

    Example:
        >>> sampler = TileSampler((500.0, 0.0, 540.0, 20.0), 0.5, tile=32, halo=8)
        >>> sampler.size, len(sampler), next(iter(sampler))
        ((40, 80), 6, (slice(500.0, 520.0, 0.5), slice(0.0, 20.0, 0.5)))
    """

    def __init__(
        self,
        bounds: tuple[float, float, float, float],
        resolution: float,
        *,
        tile: int,
        halo: int = 0,
        step: int = 1,
    ) -> None:
        """Cut the ground into tiles.

        Args:
            bounds: (west, south, east, north), in units of the coordinate system.
            resolution: side of a pixel, in units of the coordinate system.
            tile: side of a core, pixels.
            halo: width of the halo on every side of a core, pixels; rounded up to a multiple of
                ``step``.
            step: number of pixels of which the start of every core and outer window is a multiple;
                see above.

        Raises:
            ValueError: the bounds are empty, a number is out of range, ``tile`` is not a multiple
                of ``step``, or there are millions of tiles.
        """
        resolution = number("resolution", resolution, 0, above=True)
        try:
            west, south, east, north = (number("bounds", one) for one in bounds)
        except (TypeError, ValueError):
            west = south = east = north = 0.0  # refused below
        if west >= east or south >= north:
            raise ValueError(
                f"bounds={shown(bounds)} must be (west, south, east, north), and not empty"
            )
        self.resolution, self._west, self._north = resolution, west, north
        # Incomplete pixels at the south and east are dropped, except one that lacks at most a
        # hundredth of its side (a rounding error). Bounds smaller than a pixel give one pixel.
        self.size: Size = (
            max(math.floor((north - south) / resolution + 0.01), 1),
            max(math.floor((east - west) / resolution + 0.01), 1),
        )
        tile, halo, step = whole("tile", tile), whole("halo", halo, 0), whole("step", step)
        if math.prod(-(-side // tile) for side in self.size) > _MOST_TILES:
            raise ValueError(
                f"tile={tile}: {self.size[0]}×{self.size[1]} pixels are more than {_MOST_TILES} "
                f"tiles; check resolution={resolution:g}, whose unit must be that of the bounds"
            )
        self.tiles: list[Tile] = list(split(self.size, tile, halo=halo, step=step))

    def __repr__(self) -> str:
        """One line: size of the map and number of tiles."""
        height, width = self.size
        return f"{type(self).__name__}({height}×{width} in {len(self)} tiles)"

    def __len__(self) -> int:
        return len(self.tiles)

    def __iter__(self) -> Iterator[Query]:
        for tile in self.tiles:
            outer = tile.outer
            left = self._west + outer.left * self.resolution
            top = self._north - outer.top * self.resolution
            yield (
                slice(left, left + outer.width * self.resolution, self.resolution),
                slice(top - outer.height * self.resolution, top, self.resolution),
            )


def stitch(parts: Iterable[Tensor], sampler: TileSampler) -> Tensor:
    """Join the maps of a sampler's tiles to one map.

    Args:
        parts: maps (C, height, width) of all outer windows, in the order of the queries.
        sampler: the sampler that yielded the queries.

    Returns:
        (C, *sampler.size), of the parts' dtype, on the device of the first part.

    Raises:
        TypeError: a part is not a tensor, or ``sampler`` no :class:`TileSampler`.
        ValueError: there are fewer or more parts than tiles, or a part's size, number of channels
            or dtype does not fit.
    """
    instance("sampler", sampler, TileSampler, "give the TileSampler of the parts")
    out: Tensor | None = None
    count = 0
    for count, part in enumerate(parts, start=1):
        if count > len(sampler):
            raise ValueError(f"parts are more than the {len(sampler)} tiles of the sampler")
        tile = sampler.tiles[count - 1]
        instance(f"part {count}", part, Tensor, "give a tensor")
        if tuple(part.shape[1:]) != (tile.outer.height, tile.outer.width):
            raise ValueError(
                f"part {count} has {tuple(part.shape[1:])} pixels, not "
                f"{(tile.outer.height, tile.outer.width)}"
            )
        if out is None:
            out = torch.empty((part.shape[0], *sampler.size), dtype=part.dtype, device=part.device)
        if len(part) != len(out) or part.dtype != out.dtype:
            raise ValueError(
                f"part {count} has {len(part)} channels of {part.dtype}, and those before "
                f"{len(out)} of {out.dtype}"
            )
        core, inner = tile.core, tile.inner
        out[:, core.top : core.bottom, core.left : core.right] = part[
            :, inner.top : inner.bottom, inner.left : inner.right
        ]
    if out is None or count < len(sampler):
        raise ValueError(f"parts are {count}, and the sampler has {len(sampler)} tiles")
    return out
