"""``upfeat fit``: photographs in, small files of implicit features out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from upfeat.cli.choices import DEFAULT_BACKBONE

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from upfeat.implicit.fit import FitProgress, OnFit

HELP = "Fit implicit features to photographs: small files that draw features at any resolution."
EXAMPLE = (
    "  upfeat fit photo.jpg -o photo.safetensors\n"
    "  upfeat fit photos/ -o fitted/\n"
    "  upfeat render photo.safetensors --size 1024x768 -o features.npy"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "photos", nargs="+", type=Path, metavar="photo", help="image file, or a folder of them"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="a .safetensors file for one photograph, or a folder; what a folder already holds is "
        "not fitted again",
    )
    parser.add_argument(
        "--backbone", default=DEFAULT_BACKBONE, metavar="NAME", help="default: %(default)s"
    )
    parser.add_argument(
        "--preset",
        default="fast",
        choices=("fast", "reference"),
        help="a closed-form solution (default), or the published recipe (hours on a CPU)",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="shorter side of the fit (default: the photograph's own, at most 224)",
    )
    parser.add_argument("--views", type=int, metavar="N", help="jittered views to look at, at most")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--no-guidance",
        action="store_true",
        help="leave the image out of the file; rendering then needs it",
    )
    parser.add_argument("--no-picture", action="store_true", help="write the features only")
    parser.add_argument("--device", metavar="DEVICE", help="cpu (default), cuda, mps, …")


def execute(options: argparse.Namespace) -> int:
    """Fit; bad photographs are reported at the end and the others done."""
    from rich.console import Console
    from rich.progress import Progress, TimeRemainingColumn

    import upfeat
    from upfeat.cli.main import one_line
    from upfeat.implicit.files import find_photographs, fit_photograph, is_fitted
    from upfeat.implicit.fit import FitConfig

    config = FitConfig(
        preset=options.preset, size=options.size, views=options.views, seed=options.seed
    )
    backbone = upfeat.load(options.backbone, upsampler="bilinear", device=options.device).backbone
    plan = _plan(find_photographs(options.photos), options.output, not options.no_picture)
    failures = 0
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for photo, output, picture in plan:
            if len(plan) > 1 and is_fitted(photo, backbone, config, output):
                print(f"{output}  done before")
                continue
            task = progress.add_task(photo.name)
            try:
                features = fit_photograph(
                    photo,
                    backbone,
                    config,
                    output,
                    picture=picture,
                    guidance=not options.no_guidance,
                    on_step=_shower(progress, task, photo.name),
                )
            except (ValueError, OSError) as error:
                failures += 1
                reason = one_line(error)
                shown = reason if str(photo) in reason else f"{photo}: {reason}"
                print(f"upfeat fit: error: {shown}", file=sys.stderr)
            else:
                facts = features.facts
                print(
                    f"{output}  {'×'.join(map(str, features.shape[1:]))}, {facts['views']} views, "
                    f"held-out loss {facts['held_out']:.4f}"
                )
            progress.remove_task(task)
    if failures and len(plan) > 1:
        print(f"upfeat fit: {failures} of {len(plan)} photographs failed", file=sys.stderr)
    return 2 if failures else 0


def _plan(photos: list[Path], output: Path, picture: bool) -> list[tuple[Path, Path, Path | None]]:
    """Every photograph with its file and its picture."""
    from upfeat.run import plan_outputs

    if output.suffix == ".safetensors" and not output.is_dir():
        if len(photos) > 1:
            raise ValueError(f"{output}: is one file for {len(photos)} photographs; give a folder")
        plan_outputs([], output.parent)
        return [(photos[0], output, output.with_suffix(".png") if picture else None)]
    planned = plan_outputs(photos, output, picture=picture)
    return [(photo, outputs.features, outputs.picture) for photo, outputs in planned]


def _shower(progress: Progress, task: TaskID, name: str) -> OnFit:
    def show(step: FitProgress) -> None:
        progress.update(task, completed=step.done, total=step.total)
        if step.held_out is not None:
            progress.update(task, description=f"{name}  held-out loss {step.held_out:.4f}")

    return show
