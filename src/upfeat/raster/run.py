"""A raster in, a map of its features or of a head out, tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat._version import __version__
from upfeat.locks import hold
from upfeat.model import FeatUp
from upfeat.mosaic import Rows, Strip, strips
from upfeat.outputs import Inputs, check_output
from upfeat.raster.outputs import Output, RasterTile
from upfeat.raster.plan import MASK_HALO, Plan
from upfeat.raster.scene import Scene
from upfeat.raster.store import FORMAT, Store, is_finished
from upfeat.tiling import split
from upfeat.upsamplers import Window
from upfeat.upsamplers.maps import cut, inside

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
        resume: go on with what a killed run left; what is complete is left as it is.
        overwrite: remove what is there.
        on_tile: is told of progress.

    Returns:
        The path of the output.

    Raises:
        ValueError: the output cannot be written, another process writes it, or the raster is
            damaged.
        OSError: writing failed; what was done is kept.
    """
    provenance = {"upfeat_version": __version__, **what.facts, "raster": scene.facts}
    output = Path(output)
    if resume and is_finished(output, provenance):
        return output
    check_output(output, Inputs([scene.path]), FORMAT, overwrite=overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    # A name that is never a folder's: the lock then lies in one place.
    with hold(output.with_name(output.name + ".unfinished")):
        _write_tiles(scene, output, model, what, plan, provenance, resume, overwrite, on_tile)
    return output


def _write_tiles(
    scene: Scene,
    output: Path,
    model: FeatUp,
    what: Output,
    plan: Plan,
    provenance: dict[str, Any],
    resume: bool,
    overwrite: bool,
    on_tile: OnTile | None,
) -> None:
    stride = model.backbone.stride
    store = Store(
        output,
        (what.count, *scene.size),
        what.dtype,
        plan.tile * stride,
        {"what": what.facts, "raster": scene.facts, "backbone_tile": plan.backbone_tile},
        resume=resume,
        overwrite=overwrite,
    )
    total = sum(1 for _ in split(plan.grid, plan.tile))
    tell = on_tile or (lambda done, total: None)
    try:
        with ThreadPoolExecutor(1) as pool:
            writing: Future[None] | None = None
            for piece in pieces(scene, model, plan, lambda index, _: index not in store.done):
                values = _render(piece, model, what)
                if writing is not None:
                    writing.result()
                writing = pool.submit(store.write, piece.number, piece.pixels, values)
                tell(piece.number + 1, total)
            if writing is not None:
                writing.result()
    except BaseException:
        store.close()
        raise
    store.finish(scene, what.names, provenance)


@torch.inference_mode()
def _render(piece: Piece, model: FeatUp, what: Output) -> Any:
    """Values of a tile, masked pixels as no-data."""
    if piece.coarse is None:
        return what.empty(piece.pixels)
    tile = RasterTile(piece.coarse, piece.guidance, piece.means, piece.inner)
    values = what.render(model, tile)
    values[:, ~piece.valid] = what.nodata
    return values


def _pixels(cells: Window, stride: int, size: tuple[int, int]) -> Window:
    """Pixels of a window of cells, as far as the raster goes."""
    top, left = cells.top * stride, cells.left * stride
    bottom, right = min(cells.bottom * stride, size[0]), min(cells.right * stride, size[1])
    return Window(top, left, bottom - top, right - left)


class Piece(NamedTuple):
    """One tile, ready to be upsampled.

    Attributes:
        number: of the tile.
        pixels: of the raster, that the tile writes.
        coarse: (1, C, h, w) features of the tile and its halo; ``None`` where no pixel is valid.
        guidance: (1, 3, H, W) their image.
        means: of :meth:`Upsampler.cell_means`; ``None`` where there are none.
        inner: ``pixels`` in coordinates of ``guidance``.
        valid: (pixels.height, pixels.width) bool array.
    """

    number: int
    pixels: Window
    coarse: Tensor | None
    guidance: Tensor
    means: Tensor | None
    inner: Window
    valid: Any


@torch.inference_mode()
def pieces(
    scene: Scene, model: FeatUp, plan: Plan, wanted: Callable[[int, Window], bool]
) -> Iterator[Piece]:
    """Compute the coarse features of tiles from top to bottom.

    Args:
        scene: an open raster.
        model: backbone and upsampler.
        plan: how it is cut.
        wanted: whether a tile of an index and of pixels of the raster is to be made.
    """
    backbone, stride = model.backbone, model.backbone.stride

    def normalized(pixels: Tensor) -> Tensor:
        return (pixels[None].to(backbone.mean.device) - backbone.mean).div_(backbone.std)

    tiles = enumerate(split(plan.grid, plan.tile, halo=plan.halo, step=plan.step))
    waiting = [
        (index, tile, pixels)
        for index, tile in tiles
        if wanted(index, pixels := _pixels(tile.core, stride, scene.size))
    ]
    if not waiting:
        return
    rows = Rows(
        strips(
            backbone,
            lambda window: normalized(scene.read(window)[0]),
            plan.grid,
            tile=plan.backbone_tile,
            halo=plan.backbone_halo,
            first_row=waiting[0][1].outer.top,
        )
    )
    first_row = waiting[0][1].outer.top
    means = _mean_rows(scene, model, plan, normalized, first_row)
    for index, tile, pixels in waiting:
        outer = tile.outer
        seen = Window(*(stride * side for side in outer))
        valid = scene.read_valid(seen)
        inner = Window(pixels.top - seen.top, pixels.left - seen.left, *pixels[2:])
        usable = valid[inner.top : inner.bottom, inner.left : inner.right].numpy()
        coarse = None
        if usable.any():
            coarse = rows(outer.top, outer.bottom)[:, :, :, outer.left : outer.right]
            coarse = _fill_cells(coarse, valid, stride)
        shared = None if means is None or coarse is None else means(outer)
        shown = outer if means is None else _around(tile.core, model.upsampler.means_halo, outer)
        guidance = _guidance(scene, model, shown, outer, normalized)
        yield Piece(index, pixels, coarse, guidance, shared, inner, usable)


def _around(core: Window, halo: int | None, outer: Window) -> Window:
    """A window of cells with a halo, as far as the outer one goes."""
    assert halo is not None
    top, left = max(core.top - halo, outer.top), max(core.left - halo, outer.left)
    bottom, right = min(core.bottom + halo, outer.bottom), min(core.right + halo, outer.right)
    return Window(top, left, bottom - top, right - left)


def _guidance(
    scene: Scene,
    model: FeatUp,
    shown: Window,
    outer: Window,
    normalized: Callable[[Tensor], Tensor],
) -> Tensor:
    """The image of a window of cells, of which only a part is read; the rest is 0."""
    stride = model.backbone.stride
    guidance = model.guidance(normalized(scene.read(Window(*(stride * n for n in shown)))[0]))
    if shown == outer:
        return guidance
    place = Window(*(stride * n for n in inside(shown, outer)))
    # Memory that is not written takes no room.
    out = guidance.new_zeros(1, guidance.shape[1], stride * outer.height, stride * outer.width)
    cut(out, place).copy_(guidance)
    return out


def _mean_rows(
    scene: Scene,
    model: FeatUp,
    plan: Plan,
    normalized: Callable[[Tensor], Tensor],
    first_row: int,
) -> Callable[[Window], Tensor] | None:
    """Means of the image that tiles share, from windows of cells that only go down.

    Every cell is computed once, in tiles that always begin at the same places.
    """
    upsampler, stride = model.upsampler, model.backbone.stride
    halo = upsampler.means_halo
    if halo is None:
        return None
    factors: list[int] = []

    def made() -> Iterator[Strip]:
        parts: list[Tensor] = []
        for piece in split(plan.grid, plan.tile, halo=halo):
            core, outer = piece.core, piece.outer
            if core.bottom <= first_row:
                continue
            image = scene.read(Window(*(stride * side for side in outer)))[0]
            grid = (outer.height, outer.width)
            guidance = model.guidance(normalized(image))
            parts.append(upsampler.cell_means(guidance, grid, piece.inner))
            if core.right == plan.grid[1]:
                factors.append(parts[0].shape[2] // core.height)
                yield Strip(factors[0] * core.top, torch.cat(parts, dim=3))
                parts.clear()

    source = made()
    first = next(source)  # tells the factor
    rows, factor = Rows(chain([first], source)), factors[0]

    def read(cells: Window) -> Tensor:
        kept = rows(factor * cells.top, factor * cells.bottom)
        return kept[:, :, :, factor * cells.left : factor * cells.right].contiguous()

    return read


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
