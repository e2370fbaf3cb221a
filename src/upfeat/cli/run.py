"""``upfeat run``: upsampled features and pictures of photographs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from upfeat.cli.choices import (
    add_backbone,
    add_early,
    add_passes,
    add_reading,
    add_upsampler,
    folder_of,
    load_with_head,
    matching,
    path_of,
)
from upfeat.cli.streams import say

if TYPE_CHECKING:
    from upfeat.cli.console import Batch, Plan
    from upfeat.outputs import Outputs

HELP = "Upsample the features of photographs; write the features, and a picture of each map."
EXAMPLE = (
    "  upfeat run photo.jpg -o out/\n"
    "  upfeat run photos/ -o out/\n"
    "  upfeat run *.jpg -o out/ --size 448 --dtype fp32\n"
    "  upfeat run photos/ -o classes/ --head head.safetensors"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "photos",
        nargs="+",
        type=path_of,
        metavar="photo",
        help="image file, or folder (searched recursively)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=folder_of,
        required=True,
        metavar="FOLDER",
        help="folder of the results: NAME.safetensors and NAME.features.png",
    )
    add_backbone(parser)
    add_upsampler(parser)
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="resize the shorter side first (default: the photograph's own size)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp16", "bf16", "fp32"),
        default="fp16",
        help="number type of the stored features (default: %(default)s)",
    )
    add_passes(parser)
    add_early(parser)
    parser.add_argument(
        "--head",
        type=path_of,
        metavar="FILE",
        help="head trained by upfeat probe; its output is written and drawn instead of features",
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu (default), cuda, mps, …")
    parser.add_argument("--no-picture", action="store_true", help="write the features only")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=1 << 28,
        metavar="N",
        help="refuse photographs with more pixels (default: %(default)s)",
    )
    add_reading(parser)
    parser.add_argument(
        "--max-memory",
        metavar="AMOUNT",
        help="memory limit of the process, such as 2GB or 500MiB (default: the machine's memory)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files that upfeat did not write (never an input file)",
    )


def execute(options: argparse.Namespace) -> int:
    """Upsample all photographs; those that fail are reported at the end."""
    from upfeat.cli.console import Batch, announce_size
    from upfeat.machine import parse_memory
    from upfeat.marks import FEATURES
    from upfeat.run import DTYPES, describe_model, plan_outputs, recipe_of, run_photo, size_on_disk

    pictures, dtype = not options.no_picture, DTYPES[options.dtype]
    with Batch("run", matching(options.photos)) as batch:
        plan = plan_outputs(batch.photos, options.output, picture=pictures)
        others = (options.backbone, options.upsampler, options.head)
        plan = batch.permitted(plan, others, FEATURES, overwrite=options.overwrite)
        if not plan:
            return batch.exit_code
        model, head = load_with_head(options)
        batch.make_folder(options.output)
        made_by = describe_model(model, head)
        given = {"bands": options.bands, "max_value": options.max_value}
        reading = {name: value for name, value in given.items() if value is not None}
        shared = {"size": options.size, "dtype": dtype, "reading": reading}
        # What determines the files of a photograph; those that have the same recipe are skipped.
        recipe = partial(recipe_of, made_by=made_by, **shared)
        plan = batch.pending(plan, recipe)
        stored = {"size": options.size, "dtype": dtype, "head": head}
        measure = partial(size_on_disk, model, picture=pictures, **stored)
        announce_size("run", [measure(photo) for photo, _ in plan], options.output)
        settings = {**shared, "max_pixels": options.max_pixels, "head": head}
        if options.max_memory is not None:
            settings["max_memory"] = parse_memory(options.max_memory)
        _run_all(batch, plan, partial(run_photo, model, made_by=made_by, **settings))
    return batch.exit_code


def _run_all(batch: Batch, plan: Plan, run: Callable[[Path, Outputs], Sequence[int]]) -> None:
    from upfeat.cli.console import progress_bar

    with progress_bar() as progress:
        task = progress.add_task("", total=len(plan))
        for photo, outputs in plan:
            progress.update(task, description=photo.name)
            shape = None
            with batch.attempt(photo):
                shape = run(photo, outputs)
            if shape is not None:
                # The bar and the line are written to two streams: keep their order.
                progress.console.file.flush()
                say(f"{' '.join(map(str, outputs.paths))}  {'×'.join(map(str, shape))}")
            progress.advance(task)
