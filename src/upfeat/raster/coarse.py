"""Coarse features and cell means of a raster: the inputs from which its tiles are upsampled.

One process computes them from top to bottom and keeps a row for as long as a tile may need it.
Many workers first write them to files, part by part, and each tile then reads the parts it needs.
Both ways give the same bits.
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
from upfeat.types import Size, Window, scaled


class Source(NamedTuple):
    """Functions that return the coarse features and the cell means of a window of cells."""

    features: Callable[[Window], Tensor]
    """From a window to (1, C, window.height, window.width); for a model that uses early layers,
    stacked on them as by :func:`upfeat.receptive_field.see`."""
    means: Callable[[Window], Tensor] | None
    """From a window to its :meth:`Upsampler.cell_means`; ``None`` if the upsampler has no means."""
    size: Size
    """(h, w) of the cells that have features, :attr:`Plan.seen`; those beyond have means alone."""


class Part(NamedTuple):
    """One tile of the coarse features or of the cell means, the unit that is computed at once."""

    kind: str
    """"features" or "means"."""
    number: int
    """Index among the parts of its kind."""
    tile: Tile
    """In cells."""


def read_image(scene: Scene, model: FeatUp, cells: Window) -> Tensor:
    """Read a window of cells as pixels, (1, 3, H, W), normalised for the backbone."""
    backbone = model.backbone
    pixels = scene.read(scaled(cells, backbone.stride))[0][None]
    return (pixels.to(backbone.mean.device) - backbone.mean).div_(backbone.std)


def streamed(scene: Scene, model: FeatUp, plan: Plan, first_row: int) -> Source:
    """Return a source that computes features and means on demand, from top to bottom.

    No window may begin above the window requested before it: rows already passed are dropped.

    Args:
        scene: an open raster.
        model: backbone and upsampler.
        plan: division of the raster.
        first_row: first row of cells that will be requested.
    """
    stride = model.backbone.stride
    rows = Rows(
        strips(
            model.backbone,
            lambda window: read_image(scene, model, scaled(window, 1, stride)),
            plan.seen,
            tile=plan.backbone_tile,
            halo=plan.backbone_halo,
            first_row=first_row,
            early=model.early,
        )
    )

    def features(cells: Window) -> Tensor:
        return rows(cells.top, cells.bottom, cells.left, cells.right)

    return Source(features, _streamed_means(scene, model, plan, first_row), plan.seen)


def _streamed_means(
    scene: Scene, model: FeatUp, plan: Plan, first_row: int
) -> Callable[[Window], Tensor] | None:
    """Return :attr:`Source.means` of :func:`streamed`.

    The mean of each cell is computed once, in tiles that do not depend on the requested windows.
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
    first = next(source)  # puts the factor into the list
    rows, factor = Rows(chain([first], source)), factors[0]
    del first

    def read(cells: Window) -> Tensor:
        finer = scaled(cells, factor)
        return rows(finer.top, finer.bottom, finer.left, finer.right).contiguous()

    return read


def list_parts(model: FeatUp, plan: Plan, kind: str) -> list[Part]:
    """List all parts of a raster of one kind, "features" or "means", row by row."""
    if kind == "features":
        backbone_step = model.backbone.step
        tiles = backbone_tiles(plan.seen, plan.backbone_tile, plan.backbone_halo, backbone_step)
    elif model.upsampler.means_halo is None:
        return []
    else:
        tiles = list(split(plan.grid, plan.tile, halo=model.upsampler.means_halo))
    return [Part(kind, number, tile) for number, tile in enumerate(tiles)]


@torch.inference_mode()
def make_part(scene: Scene, model: FeatUp, part: Part) -> Tensor:
    """Compute the features or means of a part's core, (1, C, height, width)."""
    stride, tile = model.backbone.stride, part.tile
    if part.kind == "features":
        return extract_tile(
            model.backbone,
            lambda window: read_image(scene, model, scaled(window, 1, stride)),
            tile,
            early=model.early,
        )
    guidance = model.guidance(read_image(scene, model, tile.outer))
    grid = (tile.outer.height, tile.outer.width)
    return model.upsampler.cell_means(guidance, grid, tile.inner)


class Files:
    """Parts of a raster's coarse features and cell means, each stored in a file of one folder."""

    def __init__(self, folder: Path, model: FeatUp, plan: Plan) -> None:
        """List the parts of the raster; no file is read yet.

        Args:
            folder: folder of the files.
            model: backbone and upsampler.
            plan: division of the raster.
        """
        self._folder, self._plan = folder, plan
        self.parts = {kind: list_parts(model, plan, kind) for kind in ("features", "means")}

    def missing(self, windows: list[Window]) -> list[Part]:
        """List the parts that windows of cells need and whose files do not exist yet."""
        return [
            part
            for parts in self.parts.values()
            for part in parts
            if not self._path(part).is_file()
            and any(_meet(part.tile.core, window) for window in windows)
        ]

    def write(self, part: Part, values: Tensor) -> None:
        """Write the file of a part, whole or not at all."""
        write_tensors(self._path(part), {"values": values}, {})

    def source(self) -> Source:
        """Return a source that reads features and means from the files."""
        means = self._means if self.parts["means"] else None
        return Source(self._features, means, self._plan.seen)

    def _features(self, cells: Window) -> Tensor:
        plan = self._plan
        blended = plan.backbone_tile if plan.backbone_halo is None else None
        return join_tiles(self._read("features", cells), plan.seen, cells, blended)

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
