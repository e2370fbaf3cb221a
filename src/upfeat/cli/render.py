"""``upfeat render``: rendering of implicit features at any size, as values or as a picture."""

from __future__ import annotations

import argparse
import logging

from upfeat.cli.choices import path_of, size_of
from upfeat.cli.streams import say

HELP = "Render fitted implicit features at any size."
EXAMPLE = (
    "  upfeat render photo.safetensors --size 1024x768 -o features.safetensors\n"
    "  upfeat render photo.safetensors --size 1024x768 -o picture.png"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("file", type=path_of, help="file written by upfeat fit")
    parser.add_argument(
        "-o",
        "--output",
        type=path_of,
        required=True,
        metavar="FILE",
        help=".safetensors, .npy or .zarr for values; .png or .jpg for a picture",
    )
    parser.add_argument(
        "--size", metavar="WIDTHxHEIGHT", help="size in pixels (default: the size of the fit)"
    )
    parser.add_argument(
        "--image", type=path_of, metavar="PHOTO", help="photograph, if the file does not contain it"
    )
    parser.add_argument(
        "--dtype",
        choices=("fp16", "fp32"),
        help="number type of values (default: fp16)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a file that upfeat did not write (never an input file)",
    )


def execute(options: argparse.Namespace) -> int:
    """Render the features and write them, or a picture of them."""
    import torch

    from upfeat.cli.console import note_unused, progress_bar
    from upfeat.implicit.features import ImplicitFeatures
    from upfeat.implicit.files import write_rendering
    from upfeat.marks import FEATURES, PICTURE
    from upfeat.outputs import Inputs, prepare_output

    # When a full disk has stopped zarr's writers, asyncio reports the error a second time as they
    # are garbage-collected.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    size, output = size_of(options.size), options.output
    picture = output.suffix.lower() in (".png", ".jpg", ".jpeg")
    if picture:
        note_unused("render", options, ["dtype"], "on a picture")
    inputs = Inputs([options.file, options.image])
    prepare_output(output, inputs, PICTURE if picture else FEATURES, overwrite=options.overwrite)
    features = ImplicitFeatures.load(options.file, options.image)
    dtype = torch.float32 if options.dtype == "fp32" else torch.float16
    with progress_bar() as progress:
        task = progress.add_task(output.name)
        write_rendering(
            features,
            output,
            size,
            dtype=dtype,
            on_rows=lambda done, total: progress.update(task, completed=done, total=total),
        )
    height, width = size or (features.shape[2], features.shape[3])
    say(f"{output}  {features.shape[1]}×{height}×{width}")
    return 0
