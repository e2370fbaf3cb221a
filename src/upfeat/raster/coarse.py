"""Coarse features of a raster, and means of its image, for one tile after the other.

They are made on the way down, rows kept for as long as a tile may need them; or, by many workers,
part by part into files, of which each tile then reads what it needs. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from upfeat.model import FeatUp
from upfeat.mosaic import Rows, Strip, backbone_tiles, extract_tile, join_tiles, strips
from upfeat.raster.plan import Plan
from upfeat.raster.scene import Scene
from upfeat.storage import read_tensors, write_tensors
from upfeat.tiling import Tile, split
from upfeat.types import Window, scaled


class Source(NamedTuple):
    """Coarse features and cell means of tiles, from windows of cells."""

    features: Callable[[Window], Tensor]
    """(1, C, height, width)."""
    means: Callable[[Window], Tensor] | None
    """Of :meth:`Upsampler.cell_means`; ``None`` for upsamplers that have none."""


class Part(NamedTuple):
    """One tile of features or of means, which is made at once."""

    kind: str
    """"features" or "means"."""
    number: int
    tile: Tile


def read_image(scene: Scene, model: FeatUp, cells: Window) -> Tensor:
    """Read a window of cells as the backbone wants it, (1, 3, H, W)."""
    backbone = model.backbone
    pixels = scene.read(scaled(cells, backbone.stride))[0][None]
    return (pixels.to(backbone.mean.device) - backbone.mean).div_(backbone.std)


def streamed(scene: Scene, model: FeatUp, plan: Plan, first_row: int) -> Source:
    """Make features and means from top to bottom, as windows ask; none may go back up.

    Args:
        scene: an open raster.
        model: backbone and upsampler.
        plan: how it is cut.
        first_row: rows of cells above it are not needed.
    """
    stride = model.backbone.stride
    rows = Rows(
        strips(
            model.backbone,
            lambda window: read_image(scene, model, scaled(window, 1, stride)),
            plan.grid,
            tile=plan.backbone_tile,
            halo=plan.backbone_halo,
            first_row=first_row,
        )
    )

    def features(cells: Window) -> Tensor:
        return rows(cells.top, cells.bottom)[:, :, :, cells.left : cells.right]

    return Source(features, _streamed_means(scene, model, plan, first_row))


def _streamed_means(
    scene: Scene, model: FeatUp, plan: Plan, first_row: int
) -> Callable[[Window], Tensor] | None:
    """Means that tiles share, from windows of cells that only go down.

    Every cell is computed once, in tiles that always begin at the same places.
    """
    if model.upsampler.means_halo is None:
        return None

    def made() -> Iterator[Strip]:
        row: Tensor | None = None
        for part in list_parts(model, plan, "means"):
            core = part.tile.core
            if core.bottom <= first_row:
                continue
            means = make_part(scene, model, part)
            factor = means.shape[2] // core.height
            if row is None:
                shape = (*means.shape[:2], means.shape[2], factor * plan.grid[1])
                row = means.new_empty(shape)
            row[..., factor * core.left : factor * core.right] = means
            if core.right == plan.grid[1]:
                strip, row = Strip(factor * core.top, row), None
                factors.append(factor)
                yield strip
                del strip

    factors: list[int] = []
    source = made()
    first = next(source)  # tells the factor
    rows, factor = Rows(chain([first], source)), factors[0]
    del first

    def read(cells: Window) -> Tensor:
        kept = rows(factor * cells.top, factor * cells.bottom)
        return kept[:, :, :, factor * cells.left : factor * cells.right].contiguous()

    return read


def list_parts(model: FeatUp, plan: Plan, kind: str) -> list[Part]:
    """List the parts of one kind, "features" or "means", row by row."""
    if kind == "features":
        tiles = backbone_tiles(plan.grid, plan.backbone_tile, plan.backbone_halo)
    elif model.upsampler.means_halo is None:
        return []
    else:
        tiles = list(split(plan.grid, plan.tile, halo=model.upsampler.means_halo))
    return [Part(kind, number, tile) for number, tile in enumerate(tiles)]


@torch.inference_mode()
def make_part(scene: Scene, model: FeatUp, part: Part) -> Tensor:
    """Compute a part, (1, C, height, width), of features or of means."""
    stride, tile = model.backbone.stride, part.tile
    if part.kind == "features":
        return extract_tile(
            model.backbone,
            lambda window: read_image(scene, model, scaled(window, 1, stride)),
            tile,
        )
    guidance = model.guidance(read_image(scene, model, tile.outer))
    grid = (tile.outer.height, tile.outer.width)
    return model.upsampler.cell_means(guidance, grid, tile.inner)


class Files:
    """Parts as files of a folder."""

    def __init__(self, folder: Path, model: FeatUp, plan: Plan) -> None:
        """Know which parts there are; nothing is read yet.

        Args:
            folder: that holds them.
            model: backbone and upsampler.
            plan: how the raster is cut.
        """
        self._folder, self._plan = folder, plan
        self.parts = {kind: list_parts(model, plan, kind) for kind in ("features", "means")}

    def missing(self, windows: list[Window]) -> list[Part]:
        """Parts that windows of cells need and that are not there."""
        return [
            part
            for parts in self.parts.values()
            for part in parts
            if not self._path(part).is_file()
            and any(_meet(part.tile.core, window) for window in windows)
        ]

    def write(self, part: Part, values: Tensor) -> None:
        """Write a part, whole or not at all."""
        write_tensors(self._path(part), {"values": values}, {})

    def source(self) -> Source:
        """Give what tiles are made of from the files."""
        return Source(self._features, self._means if self.parts["means"] else None)

    def _features(self, cells: Window) -> Tensor:
        plan = self._plan
        blended = plan.backbone_tile if plan.backbone_halo is None else None
        return join_tiles(self._read("features", cells), plan.grid, cells, blended)

    def _means(self, cells: Window) -> Tensor:
        found = list(self._read("means", cells))
        factor = found[0][1].shape[2] // found[0][0].core.height
        finer = [(Tile(scaled(t.core, factor), scaled(t.outer, factor)), m) for t, m in found]
        grid = (factor * self._plan.grid[0], factor * self._plan.grid[1])
        return join_tiles(finer, grid, scaled(cells, factor))

    def _read(self, kind: str, cells: Window) -> Iterator[tuple[Tile, Tensor]]:
        for part in self.parts[kind]:
            if _meet(part.tile.core, cells):
                yield part.tile, read_tensors(self._path(part))[0]["values"]

    def _path(self, part: Part) -> Path:
        return self._folder / f"{part.kind}-{part.number}.safetensors"


def _meet(a: Window, b: Window) -> bool:
    return a.top < b.bottom and b.top < a.bottom and a.left < b.right and b.left < a.right
