"""Upsampling of a raster by workers of Ray: first parts into files, then tiles from these files.

A task computes and writes one part or one tile, whole or not at all, so a task whose worker was
killed can be repeated. Only the driver records finished tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upfeat.engines import Engine, ray_pool
from upfeat.model import FeatUp
from upfeat.raster.coarse import Files, Part, make_part
from upfeat.raster.outputs import Output
from upfeat.raster.pieces import make_piece, render
from upfeat.raster.plan import Plan
from upfeat.raster.scene import Scene
from upfeat.raster.store import Store, TileWriter
from upfeat.tiling import Tile, split

Task = Part | tuple[int, Tile]
"""A part of the coarse features or cell means, or a tile and its index."""


def make_by_workers(
    engine: Engine,
    scene: Scene,
    model: FeatUp,
    what: Output,
    plan: Plan,
    store: Store,
    tell: Callable[[int, int], None],
) -> None:
    """Compute and write the tiles that a store does not contain yet.

    Args:
        engine: a Ray engine.
        scene: an open raster; each worker opens it again by its path.
        model: backbone and upsampler.
        what: output to write at every pixel.
        plan: division of the raster.
        store: store of the output's tiles.
        tell: called with (steps done, total steps) after each step, a part or a tile.

    Raises:
        ValueError: no Ray cluster answers, or a worker finds another raster under the path.
        OSError: a worker could not write.
    """
    split_up = split(plan.grid, plan.tile, halo=plan.halo, step=plan.step)
    tiles = [(index, tile) for index, tile in enumerate(split_up) if index not in store.done]
    if not tiles:
        return
    store.parts.mkdir(exist_ok=True)
    parts = Files(store.parts, model, plan).missing([tile.outer for _, tile in tiles])
    job = _Job(scene.path.resolve(), scene.bands, scene.scales, scene.facts, model, what, plan)
    folder, writer = store.parts.resolve(), store.writer()
    done, total = len(store.done), len(store.done) + len(parts) + len(tiles)
    with ray_pool(engine, lambda: _Worker(job, folder, writer)) as do:
        for tasks in (parts, tiles):
            for index in do(tasks):
                done += 1
                if index is not None:
                    store.record(index)
                tell(done, total)


@dataclass(frozen=True)
class _Job:
    """Picklable description of the work, from which a worker opens the raster."""

    raster: Path
    bands: list[int]
    scales: list[tuple[float, float]]
    facts: dict[str, Any]
    model: FeatUp
    what: Output
    plan: Plan


class _Worker:
    """Callable that does one task at a time in a process of Ray."""

    def __init__(self, job: _Job, folder: Path, writer: TileWriter) -> None:
        """Open the raster.

        Raises:
            FileNotFoundError: the raster does not exist on the worker's machine.
            ValueError: the raster differs from the driver's.
        """
        self._job, self._writer = job, writer
        self._scene = Scene(job.raster, bands=job.bands, scale=job.scales)
        if self._scene.facts != job.facts:
            raise ValueError(f"{job.raster}: is another raster where a worker runs")
        self._files = Files(folder, job.model, job.plan)

    def __call__(self, task: Task) -> int | None:
        """Do one task; return the index of the tile that was written, or ``None`` for a part."""
        job = self._job
        if isinstance(task, Part):
            self._files.write(task, make_part(self._scene, job.model, task))
            return None
        index, tile = task
        piece = make_piece(self._scene, job.model, self._files.source(), index, tile)
        self._writer.write(piece.pixels, render(piece, job.model, job.what))
        return index
