"""``upfeat run``: photographs in, features and pictures out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from upfeat.cli.choices import DEFAULT_BACKBONE, UPSAMPLER_HELP

HELP = "Upsample the features of photographs; write them, and a picture of each."
EXAMPLE = "  upfeat run photo.jpg -o out/\n  upfeat run *.jpg -o out/ --size 448 --dtype fp32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("photos", nargs="+", type=Path, metavar="photo", help="image file")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="where results go"
    )
    parser.add_argument(
        "--backbone", default=DEFAULT_BACKBONE, metavar="NAME", help="default: %(default)s"
    )
    parser.add_argument(
        "--upsampler",
        metavar="NAME",
        help=UPSAMPLER_HELP,
    )
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
        help="of the stored features (default: %(default)s)",
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu (default), cuda, mps, …")
    parser.add_argument("--no-picture", action="store_true", help="write the features only")


def execute(options: argparse.Namespace) -> int:
    """Run; bad photographs are reported at the end and the others done."""
    from rich.console import Console
    from rich.progress import Progress

    import upfeat
    from upfeat.cli.main import one_line
    from upfeat.run import DTYPES, plan_outputs, run_photo

    model = upfeat.load(options.backbone, upsampler=options.upsampler, device=options.device)
    plan = plan_outputs(options.photos, options.output, picture=not options.no_picture)
    failures = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(plan))
        for photo, outputs in plan:
            progress.update(task, description=photo.name)
            try:
                stored = run_photo(
                    model, photo, outputs, size=options.size, dtype=DTYPES[options.dtype]
                )
            except (ValueError, OSError) as error:
                failures.append((photo, one_line(error)))
            else:
                written = " ".join(
                    str(path) for path in (outputs.features, outputs.picture) if path
                )
                progress.console.file.flush()
                print(f"{written}  {'×'.join(map(str, stored.shape))}")
            progress.advance(task)
    for photo, reason in failures:
        shown = reason if str(photo) in reason else f"{photo}: {reason}"
        print(f"upfeat run: error: {shown}", file=sys.stderr)
    if failures and len(plan) > 1:
        print(f"upfeat run: {len(failures)} of {len(plan)} photographs failed", file=sys.stderr)
    return 2 if failures else 0
