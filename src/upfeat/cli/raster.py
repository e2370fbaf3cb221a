"""``upfeat raster``: upsampling of a georeferenced raster into a map of features or classes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from upfeat.cli.choices import (
    add_backbone,
    add_early,
    add_engine,
    add_passes,
    bands_of,
    load_with_head,
    path_of,
)
from upfeat.cli.streams import say

if TYPE_CHECKING:
    from upfeat.heads import SavedHead
    from upfeat.model import FeatUp
    from upfeat.raster.outputs import Output

HELP = "Upsample the features of a georeferenced raster of any size, in tiles."
EXAMPLE = (
    "  upfeat raster scene.tif -o scene.zarr\n"
    "  upfeat raster scene.tif -o landcover.tif --head probe.safetensors\n"
    "  upfeat raster scene.tif -o scene.zarr --bands 4,3,2 --max-memory 2GB --resume"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "raster", type=path_of, help="raster that GDAL can read: GeoTIFF, COG, VRT, …"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=path_of,
        required=True,
        metavar="PATH",
        help="result: .zarr, or .tif (a Cloud Optimized GeoTIFF)",
    )
    add_backbone(parser)
    parser.add_argument(
        "--upsampler",
        metavar="NAME",
        help="upsampler, as in upfeat run, but for published checkpoints of AnyUp, JAFAR, NAF and "
        "UPLiFT, which need the whole image (default: the backbone's best)",
    )
    add_passes(parser, "raster")
    add_early(parser)
    parser.add_argument(
        "--head",
        type=path_of,
        metavar="FILE",
        help="head trained by upfeat probe; its output is written instead of the features",
    )
    parser.add_argument(
        "--write",
        choices=("classes", "probabilities", "values"),
        help="output of the head to write (default: classes for a classifier, else values)",
    )
    parser.add_argument(
        "--bands",
        type=bands_of,
        metavar="N,N,N",
        help="three bands, or one, counted from 1 (default: the bands marked red, green, blue)",
    )
    parser.add_argument(
        "--scale",
        type=scale_of,
        metavar="LOW,HIGH",
        help="values that become black and white (default: 0,255 for 8 bits, else the 2nd and 98th "
        "percentile of each band)",
    )
    parser.add_argument(
        "--max-memory",
        default="4GB",
        metavar="AMOUNT",
        help="memory limit of the process, such as 2GB or 500MiB (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp16", "fp32"),
        help="number type of features (default: fp16)",
    )
    add_engine(parser, "tile")
    parser.add_argument("--device", metavar="DEVICE", help="cpu (default), cuda, mps, …")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished output")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def execute(options: argparse.Namespace) -> int:
    """Upsample the raster and print the path, shape and type of the result."""
    from rich.progress import Progress, TimeRemainingColumn

    from upfeat.cli.console import note_unused, progress_bar
    from upfeat.engines import Engine
    from upfeat.raster import Scene, make_plan, parse_memory, unfinished_tiles, upsample_raster
    from upfeat.raster.cog import file_dtype

    budget = parse_memory(options.max_memory)
    if options.head is not None:
        note_unused("raster", options, ["dtype"], "with --head")
    model, head = load_with_head(options)
    what = _output(options, model, head)
    columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn(elapsed_when_finished=True))
    with (
        Scene(options.raster, bands=options.bands, scale=options.scale) as scene,
        progress_bar(*columns, keep=True) as progress,
    ):
        begun = unfinished_tiles(options.output) if options.resume else {}
        plan = make_plan(scene.size, model, what, max_memory=budget, **begun)
        task = progress.add_task(options.raster.name)
        upsample_raster(
            scene,
            options.output,
            model,
            what,
            plan,
            engine=Engine(options.engine, workers=options.workers, address=options.address),
            resume=options.resume,
            overwrite=options.overwrite,
            on_tile=lambda done, total: progress.update(task, completed=done, total=total),
        )
        size = f"{what.count}×{scene.size[0]}×{scene.size[1]}"
    dtype = what.dtype if options.output.suffix.lower() == ".zarr" else file_dtype(what.dtype)
    say(f"{options.output}  {size} {dtype}")
    return 0


def _output(options: argparse.Namespace, model: FeatUp, head: SavedHead | None) -> Output:
    from upfeat.heads import describe_backbone
    from upfeat.raster.outputs import Features, HeadOutput

    facts = {"backbone": describe_backbone(model.backbone), "upsampler": model.upsampler.name}
    if head is None:
        if options.write is not None:
            raise ValueError(f"--write {options.write} is about a head; give one by --head")
        dtype = {"fp16": "float16", "fp32": "float32"}[options.dtype or "fp16"]
        return Features(model.embed_dim, facts, dtype)
    form = options.write or head.kind
    if head.kind == "values" and form != "values":
        raise ValueError(f"--write {form}: {options.head} has no classes but values")
    return HeadOutput(head.weight, head.bias, head.names, facts, form=form)


def scale_of(text: str) -> tuple[float, float]:
    """Read a range (low, high) such as "0,3000"."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" must be two numbers such as 0,3000') from None
    return low, high
