"""``upfeat convert``: conversion of a published checkpoint to safetensors with provenance."""

from __future__ import annotations

import argparse

from upfeat.cli.choices import path_of
from upfeat.cli.streams import say

HELP = "Convert a published upsampler's checkpoint to safetensors with a record of its origin."
EXAMPLE = (
    "  upfeat convert naf_release.pth naf.safetensors\n"
    "  upfeat run photo.jpg -o out/ --upsampler naf.safetensors"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "checkpoint",
        type=path_of,
        help="checkpoint of FeatUp (.ckpt), AnyUp, JAFAR, NAF or UPLiFT (.pth, .safetensors); "
        "recognised by its tensors, and nothing else in it is read",
    )
    parser.add_argument("output", type=path_of, help="safetensors file to write")
    parser.add_argument("--sha256", metavar="HEX", help="SHA-256 that the checkpoint must have")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def execute(options: argparse.Namespace) -> int:
    """Convert the checkpoint and print a description of the upsampler."""
    from upfeat.storage import sweep
    from upfeat.upsamplers.checkpoints import write_checkpoint

    if options.output.exists() and not options.overwrite:
        raise ValueError(f"{options.output}: exists; name another file, or give --overwrite")
    sweep(options.output.parent)
    facts = write_checkpoint(options.checkpoint, options.output, sha256=options.sha256)
    say(f"{options.output}  {facts['about']}")
    return 0
