"""``upfeat export``: export of a model to a file that runs without this package."""

from __future__ import annotations

import argparse

from upfeat.cli.choices import (
    add_backbone,
    add_early,
    add_upsampler,
    load_model,
    path_of,
    size_of,
)
from upfeat.cli.streams import say

HELP = "Export a backbone, an upsampler and an optional head to ONNX or a PyTorch exported program."
EXAMPLE = (
    "  upfeat export -o model.onnx\n"
    "  upfeat export --head head.safetensors --stride 4 -o classes.onnx\n"
    "  upfeat export --backbone timm:resnet18 --upsampler bilinear -o model.pt2"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "-o",
        "--output",
        type=path_of,
        required=True,
        metavar="FILE",
        help="file to write: .onnx (for onnxruntime) or .pt2 (for torch.export.load)",
    )
    parser.add_argument(
        "--format", metavar="onnx|pt2", help="format of the file (default: by its ending)"
    )
    add_backbone(parser)
    add_upsampler(parser)
    add_early(parser)
    parser.add_argument(
        "--head", type=path_of, metavar="FILE", help="linear head trained by upfeat probe"
    )
    parser.add_argument(
        "--size",
        metavar="WIDTHxHEIGHT",
        help="fixed size of the model's input images (default: any size)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=1,
        metavar="PIXELS",
        help="image pixels per output pixel (default: %(default)s, output of the image's size)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def execute(options: argparse.Namespace) -> int:
    """Export the model, check the file, and print the largest error."""
    from rich.console import Console

    import upfeat
    from upfeat.outputs import Inputs, prepare_output
    from upfeat.portable.formats import check_format

    kind = check_format(options.output, options.format)
    if options.output.exists() and not options.overwrite:
        raise ValueError(f"{options.output}: exists; name another file, or give --overwrite")
    inputs = Inputs([options.backbone, options.upsampler, options.head])
    prepare_output(options.output, inputs, kind, overwrite=True)
    size = size_of(options.size)
    with Console(stderr=True).status("tracing, and running the file at other sizes …"):
        facts = upfeat.export(
            load_model(options),
            options.output,
            format=options.format,
            head=options.head,
            size=size,
            stride=options.stride,
        )
    sides = f"sides from {facts['smallest_side']}" if size is None else options.size
    say(
        f"{options.output}  {', '.join((facts['backbone'], facts['upsampler']))}  "
        f"{facts['output_channels']} channels, {sides}, error {facts['largest_error']}"
    )
    return 0
