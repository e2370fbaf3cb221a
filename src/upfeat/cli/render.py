"""``upfeat render``: implicit features at any size, as values or as a picture."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

HELP = "Draw fitted implicit features at any size."
EXAMPLE = (
    "  upfeat render photo.safetensors --size 1024x768 -o features.safetensors\n"
    "  upfeat render photo.safetensors --size 1024x768 -o picture.png"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("file", type=Path, help="what upfeat fit wrote")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=".safetensors, .npy or .zarr for values; .png or .jpg for a picture",
    )
    parser.add_argument(
        "--size", metavar="WIDTHxHEIGHT", help="in pixels (default: the size of the fit)"
    )
    parser.add_argument(
        "--image", type=Path, metavar="PHOTO", help="the photograph, where the file lacks it"
    )
    parser.add_argument(
        "--dtype", choices=("fp16", "fp32"), default="fp16", help="of values (default: %(default)s)"
    )


def execute(options: argparse.Namespace) -> int:
    """Render."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from upfeat.implicit.features import ImplicitFeatures
    from upfeat.implicit.files import write_rendering

    size = _parse_size(options.size)
    features = ImplicitFeatures.load(options.file, options.image)
    dtype = torch.float16 if options.dtype == "fp16" else torch.float32
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(options.output.name)
        write_rendering(
            features,
            options.output,
            size,
            dtype=dtype,
            on_rows=lambda done, total: progress.update(task, completed=done, total=total),
        )
    height, width = size or (features.shape[2], features.shape[3])
    print(f"{options.output}  {features.shape[1]}×{height}×{width}")
    return 0


def _parse_size(text: str | None) -> tuple[int, int] | None:
    """WIDTHxHEIGHT to (height, width)."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)[x×](\d+)", text.strip())
    if not found or 0 in (int(found[1]), int(found[2])):
        raise ValueError(f"--size {text} must be WIDTHxHEIGHT in pixels, such as 1024x768")
    return int(found[2]), int(found[1])
