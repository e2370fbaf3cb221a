"""Upsampling of a whole raster into a map of its features or of a head's output."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from upfeat._version import __version__
from upfeat.bounds import check_callback, flag, instance, path_of
from upfeat.engines import Engine
from upfeat.heads import describe_backbone
from upfeat.locks import hold
from upfeat.machine import release_memory
from upfeat.model import FeatUp
from upfeat.outputs import Inputs, check_output
from upfeat.provenance import digest
from upfeat.raster.outputs import Output
from upfeat.raster.pieces import pieces, render
from upfeat.raster.plan import Plan
from upfeat.raster.scene import Scene
from upfeat.raster.store import FORMAT, Store, is_finished, sweep_finished
from upfeat.raster.workers import make_by_workers
from upfeat.tiling import split

LOCAL = Engine()
_RELEASED = 1 << 22
"""Pixels after which unused memory is returned to the system, which takes a tenth of a second."""

OnTile = Callable[[int, int], None]
"""Callback (steps done, total steps): a step is a tile, or a part that workers of Ray compute."""


def upsample_raster(
    scene: Scene,
    output: str | Path,
    model: FeatUp,
    what: Output,
    plan: Plan,
    *,
    engine: Engine = LOCAL,
    resume: bool = False,
    overwrite: bool = False,
    on_tile: OnTile | None = None,
) -> Path:
    """Upsample a raster's features, or a head of them, and write them with its georeference.

    The output has the raster's grid, pixel for pixel. Masked pixels have no influence and are
    written as no-data. The borders between the upsampler's tiles do not change the result.

    Args:
        scene: an open raster.
        output: path of the result, ``.zarr`` or ``.tif``; exists only once it is complete.
        model: backbone and upsampler.
        what: output to write at every pixel.
        plan: division of the raster by :func:`upfeat.raster.plan.make_plan`, whose memory budget
            bounds each worker of Ray.
        engine: where tiles are computed; the workers of a cluster must reach the raster and the
            output's folder under the same paths.
        resume: continue an unfinished output; a complete output is left as it is.
        overwrite: remove an existing output, finished or not.
        on_tile: called after each step; see :data:`OnTile`.

    Returns:
        The path of the output.

    Raises:
        TypeError: an argument has another type.
        ValueError: the output cannot be written, another process is writing it, the raster is
            damaged, or no Ray cluster answers.
        OSError: writing failed; finished tiles are kept.
    """
    instance("scene", scene, Scene, "give a Scene, as Scene(path) opens one")
    instance("model", model, FeatUp, "give a model, as upfeat.load() makes one")
    instance("plan", plan, Plan, "give a plan, as make_plan() makes one")
    instance("engine", engine, Engine, 'give an Engine, as Engine("local")')
    check_callback("on_tile", on_tile)
    resume, overwrite = flag("resume", resume), flag("overwrite", overwrite)
    if engine.name == "local" and engine.workers is not None:
        raise ValueError(f"workers={engine.workers} is for engine=ray; one process makes all tiles")
    own = {"model": _identify(model), "raster": scene.facts}
    provenance = {"upfeat_version": __version__, **what.facts, **own}
    output = path_of("output", output)
    if resume and is_finished(output, provenance):
        sweep_finished(output)
        return output
    check_output(output, Inputs([scene.path]), FORMAT, overwrite=overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"what": what.facts, **own, "backbone_tile": plan.backbone_tile}
    # Not continued: outputs of earlier versions, whose backbone saw cells beyond the raster.
    facts["cells"] = list(plan.seen)
    shape, tile = (what.count, *scene.size), plan.tile * model.backbone.stride
    # A lock of a folder lies inside the folder; no folder has this name, so the path never changes.
    with hold(output.with_name(output.name + ".unfinished")):
        store = Store(output, shape, what.dtype, tile, facts, resume=resume, overwrite=overwrite)
        make = _make_here if engine.name == "local" else partial(make_by_workers, engine)
        try:
            make(scene, model, what, plan, store, on_tile or (lambda done, total: None))
        except BaseException:
            store.close()
            raise
        store.finish(scene, what.names, provenance)
    return output


def _identify(model: FeatUp) -> dict[str, Any]:
    """Return what determines a model's features, so that no other model continues its output."""
    upsampler = model.upsampler
    return {
        "backbone": describe_backbone(model.backbone),
        "displacement": model.backbone.displacement,
        "early layers": model.early,
        "upsampler": upsampler.name,
        "settings of the upsampler": upsampler.config(),
        "weights of the upsampler": digest(upsampler),
    }


def _make_here(
    scene: Scene, model: FeatUp, what: Output, plan: Plan, store: Store, tell: OnTile
) -> None:
    """Make tiles from top to bottom in this process, writing one while computing the next."""
    total = sum(1 for _ in split(plan.grid, plan.tile))
    with ThreadPoolExecutor(1) as pool:
        writing: Future[None] | None = None
        since = 0
        for piece in pieces(scene, model, plan, lambda index, _: index not in store.done):
            number, pixels = piece.number, piece.pixels
            values = render(piece, model, what)
            del piece  # frees its memory before the next piece is made
            if writing is not None:
                writing.result()
            writing = pool.submit(store.write, number, pixels, values)
            del values
            since += pixels.height * pixels.width
            if since >= _RELEASED:
                # The allocator keeps freed memory for every thread that writes or computes.
                release_memory()
                since = 0
            tell(number + 1, total)
        if writing is not None:
            writing.result()
