"""A raster in, a map of its features or of a head out, tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat._version import __version__
from upfeat.model import FeatUp
from upfeat.mosaic import Rows, strips
from upfeat.raster.outputs import Output
from upfeat.raster.plan import MASK_HALO, Plan
from upfeat.raster.scene import Scene
from upfeat.raster.store import Store
from upfeat.tiling import Tile, split
from upfeat.upsamplers import Window

OnTile = Callable[[int, int], None]
"""Is told how many tiles are done, of how many."""


def upsample_raster(
    scene: Scene,
    output: str | Path,
    model: FeatUp,
    what: Output,
    plan: Plan,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_tile: OnTile | None = None,
) -> Path:
    """Upsample a raster's features, or a head of them, and write them with its georeference.

    Every pixel of the output is the pixel of the raster at the same place. Masked pixels are not
    used and are written as no-data. Tiles equal the whole.

    Args:
        scene: an open raster.
        output: ``.zarr`` or ``.tif``; appears when it is complete.
        model: backbone and upsampler.
        what: is written at every pixel.
        plan: of :func:`upfeat.raster.plan.make_plan`.
        resume: go on with what a killed run left.
        overwrite: remove what is there.
        on_tile: is told of progress.

    Returns:
        The path of the output.

    Raises:
        ValueError: the output cannot be written, or the raster is damaged.
        OSError: writing failed; what was done is kept.
    """
    stride = model.backbone.stride
    provenance = {"upfeat_version": __version__, **what.facts, "raster": scene.facts}
    store = Store(
        Path(output),
        (what.count, *scene.size),
        what.dtype,
        plan.tile * stride,
        {"what": what.facts, "raster": scene.facts, "backbone_tile": plan.backbone_tile},
        resume=resume,
        overwrite=overwrite,
    )
    tiles = list(split(plan.grid, plan.tile, halo=plan.halo, step=plan.step))
    tell = on_tile or (lambda done, total: None)
    try:
        with ThreadPoolExecutor(1) as pool:
            writing: Future[None] | None = None
            for index, tile, values in _compute(scene, model, what, plan, tiles, store.done):
                if writing is not None:
                    writing.result()
                core = _pixels(tile.core, stride, scene.size)
                writing = pool.submit(store.write, index, core, values)
                tell(index + 1, len(tiles))
            if writing is not None:
                writing.result()
    except BaseException:
        store.close()
        raise
    store.finish(scene, what.names, provenance)
    return Path(output)


def _pixels(cells: Window, stride: int, size: tuple[int, int]) -> Window:
    """Pixels of a window of cells, as far as the raster goes."""
    top, left = cells.top * stride, cells.left * stride
    bottom, right = min(cells.bottom * stride, size[0]), min(cells.right * stride, size[1])
    return Window(top, left, bottom - top, right - left)


@torch.inference_mode()
def _compute(
    scene: Scene, model: FeatUp, what: Output, plan: Plan, tiles: list[Tile], done: set[int]
) -> Iterator[tuple[int, Tile, Any]]:
    """Index, tile and values (K, height, width) of all tiles that are not done."""
    backbone, stride = model.backbone, model.backbone.stride

    def normalized(pixels: Tensor) -> Tensor:
        return (pixels[None].to(backbone.mean.device) - backbone.mean) / backbone.std

    waiting = [(index, tile) for index, tile in enumerate(tiles) if index not in done]
    if not waiting:
        return
    source = strips(
        backbone,
        lambda window: normalized(scene.read(window)[0]),
        plan.grid,
        tile=plan.backbone_tile,
        halo=plan.backbone_halo,
        first_row=waiting[0][1].outer.top,
    )
    rows = Rows(source)
    for index, tile in waiting:
        outer = tile.outer
        coarse = rows(outer.top, outer.bottom)[:, :, :, outer.left : outer.right]
        pixels = Window(*(stride * side for side in outer))
        image, valid = scene.read(pixels)
        core = _pixels(tile.core, stride, scene.size)
        inside = valid[core.top - pixels.top :, core.left - pixels.left :]
        inside = inside[: core.height, : core.width].numpy()
        if not inside.any():
            yield index, tile, what.empty(core)
            continue
        coarse = _fill_cells(coarse, valid, stride)
        guidance = model.guidance(normalized(image))
        inner = Window(core.top - pixels.top, core.left - pixels.left, core.height, core.width)
        values = what.render(model, coarse, guidance, inner)
        values[:, ~inside] = what.nodata
        yield index, tile, values


def _fill_cells(coarse: Tensor, valid: Tensor, stride: int) -> Tensor:
    """Replace features of cells that are mostly masked by those of valid cells near them."""
    if bool(valid.all()):
        return coarse
    share = F.avg_pool2d(valid[None, None].to(coarse.dtype), stride)
    known = (share >= 0.5).to(coarse.device, coarse.dtype)
    filled = coarse * known
    for _ in range(MASK_HALO):
        count = F.avg_pool2d(known, 3, 1, 1, count_include_pad=False)
        mean = F.avg_pool2d(filled, 3, 1, 1, count_include_pad=False) / count.clamp(min=1e-6)
        reached = (count > 0).to(coarse.dtype)
        filled = torch.where(known > 0, filled, mean * reached)
        known = reached
    return filled
