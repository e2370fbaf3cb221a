"""``upfeat probe``: training of a linear head for run, extract, raster, video and export."""

from __future__ import annotations

import argparse
from pathlib import Path

from upfeat.cli.choices import (
    add_backbone,
    add_early,
    add_passes,
    add_upsampler,
    bands_of,
    load_model,
    path_of,
)
from upfeat.cli.raster import scale_of
from upfeat.cli.streams import printable, say

HELP = "Train a linear head on labelled photographs or a labelled raster; print its scores."
EXAMPLE = (
    "  upfeat probe labelled/ -o head.safetensors\n"
    "  upfeat probe scene.tif --labels fields.geojson -o head.safetensors\n"
    "  upfeat raster scene.tif -o landcover.tif --head head.safetensors"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source",
        type=path_of,
        help="folder with images/, labels/ and classes.json, or raster with --labels",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=path_of,
        required=True,
        metavar="FILE",
        help="file to write, .safetensors",
    )
    parser.add_argument(
        "--labels",
        type=path_of,
        metavar="FILE",
        help="labels of a raster: class indices on the same grid, or GeoJSON with a class property",
    )
    parser.add_argument(
        "--classes",
        type=_names,
        metavar="A,B,…",
        help="names of the classes, in the order of their indices",
    )
    add_backbone(parser)
    add_upsampler(parser)
    add_passes(parser)
    add_early(parser)
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="resize photographs' shorter side (default: no)",
    )
    parser.add_argument(
        "--bands", type=bands_of, metavar="N,N,N", help="bands of a raster, as in upfeat raster"
    )
    parser.add_argument(
        "--scale",
        type=scale_of,
        metavar="LOW,HIGH",
        help="range of values, as in upfeat raster",
    )
    parser.add_argument(
        "--max-memory",
        metavar="AMOUNT",
        help="memory limit for a raster (default: 4GB)",
    )
    parser.add_argument(
        "--pixels",
        type=int,
        default=2000,
        metavar="N",
        help="pixels drawn from each image (default: %(default)s)",
    )
    parser.add_argument(
        "--folds",
        type=int,
        default=5,
        metavar="N",
        help="folds of the cross-validation (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu (default), cuda, mps, …")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def execute(options: argparse.Namespace) -> int:
    """Train a head, write it, and print its cross-validated scores."""
    from rich.console import Console
    from rich.markup import escape

    from upfeat.cli.console import note_unused
    from upfeat.heads import save_head
    from upfeat.labelled import train_on_folder, train_on_raster
    from upfeat.raster import Scene, parse_memory

    _check_output(options)
    _check_source(options)
    max_memory = parse_memory("4GB" if options.max_memory is None else options.max_memory)
    if options.labels is None:
        note_unused("probe", options, ["max_memory"], "for a folder of photographs")
    model = load_model(options)
    shared = {"pixels": options.pixels, "folds": options.folds, "seed": options.seed}
    console = Console(stderr=True)
    with console.status("reading …") as status:

        def tell(name: str) -> None:
            status.update(escape(printable(name)))

        if options.labels is None:
            head, scores = train_on_folder(
                model, options.source, size=options.size, on_image=tell, **shared
            )
        else:
            with Scene(options.source, bands=options.bands, scale=options.scale) as scene:
                head, scores = train_on_raster(
                    model,
                    scene,
                    options.labels,
                    options.classes,
                    max_memory=max_memory,
                    on_tile=tell,
                    **shared,
                )
    save_head(options.output, head)
    folds = len(scores.matrices)
    print(f"cross-validated, {scores.groups} images or tiles in {folds} folds, IoU of pixels")
    print("of all folds together, ± standard deviation of the folds:")
    for line in scores.lines(head.names):
        say(f"  {line}")
    say(f"{options.output}  {len(head.names)} classes")
    return 0


def _check_output(options: argparse.Namespace) -> None:
    from upfeat.heads import FORMAT
    from upfeat.outputs import Inputs, prepare_output

    output: Path = options.output
    if output.suffix != ".safetensors":
        raise ValueError(f"{output}: must end in .safetensors")
    inputs = Inputs([options.source, options.labels, options.backbone, options.upsampler])
    prepare_output(output, inputs, FORMAT, overwrite=options.overwrite)


def _check_source(options: argparse.Namespace) -> None:
    """Refuse options that apply only to the other kind of source: a folder or a raster."""
    others = ("bands", "scale", "classes") if options.labels is None else ("size",)
    for name in others:
        if getattr(options, name) is not None:
            if options.labels is None:
                raise ValueError(f"--{name} is about a raster; give its --labels, or leave it out")
            raise ValueError(f"--{name} is about photographs; a raster is taken as it is")
    if options.labels is not None and options.source.is_dir():
        raise ValueError(f"{options.source}: is a folder, which holds its labels; give no --labels")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
