"""``upfeat fit``: fits of implicit features to photographs, stored as small files."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from upfeat.cli.choices import add_backbone, add_reading, folder_of, load_model, matching, path_of
from upfeat.cli.streams import say

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from upfeat.cli.console import Plan
    from upfeat.implicit.features import ImplicitFeatures
    from upfeat.implicit.fit import FitConfig, FitProgress, OnFit
    from upfeat.photo_search import Photo

HELP = "Fit implicit features to photographs; write small files to render at any resolution."
EXAMPLE = (
    "  upfeat fit photo.jpg -o photo.safetensors\n"
    "  upfeat fit photos/ -o fitted/\n"
    "  upfeat render photo.safetensors --size 1024x768 -o features.npy"
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
        type=_output_of,
        required=True,
        metavar="PATH",
        help=".safetensors file for one photograph, or folder, in which photographs fitted before "
        "are skipped; a picture, NAME.features.png, is written next to each file",
    )
    add_backbone(parser)
    parser.add_argument(
        "--preset",
        default="fast",
        choices=("fast", "reference"),
        help="closed-form solution (fast, default), or published recipe (reference), which takes "
        "about sixty times as long",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="shorter side of the fit (default: the photograph's own, at most 224)",
    )
    parser.add_argument("--views", type=int, metavar="N", help="largest number of jittered views")
    parser.add_argument(
        "--share",
        type=float,
        metavar="S",
        help="fast: weight of the views in the result, 0 to 1; the rest is given to the map of "
        "eight passes (default: 0.2)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)"
    )
    parser.add_argument(
        "--no-guidance",
        action="store_true",
        help="store no image in the file; rendering then needs the photograph",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=1 << 28,
        metavar="N",
        help="refuse photographs with more pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files that upfeat did not write (never an input file)",
    )
    parser.add_argument("--no-picture", action="store_true", help="write the features only")
    add_reading(parser)
    parser.add_argument("--device", metavar="DEVICE", help="cpu (default), cuda, mps, …")


def execute(options: argparse.Namespace) -> int:
    """Fit all photographs; those that fail are reported at the end."""
    from rich.progress import Progress, TimeRemainingColumn

    from upfeat.cli.console import Batch, note_unused, progress_bar
    from upfeat.implicit.features import FORMAT
    from upfeat.implicit.files import fit_photograph, recipe_of
    from upfeat.implicit.fit import FitConfig
    from upfeat.provenance import identify_backbone

    config = FitConfig(
        preset=options.preset, size=options.size, views=options.views, seed=options.seed
    )
    if options.share is not None:
        config = replace(config, share=options.share)
    if config.preset == "reference":
        note_unused("fit", options, ["share"], "with --preset reference")
    guidance = not options.no_guidance
    given = {"bands": options.bands, "max_value": options.max_value}
    reading = {name: value for name, value in given.items() if value is not None}
    if reading and not guidance:
        raise ValueError(
            "--no-guidance leaves the photograph to upfeat render, which has neither --bands nor "
            "--max-value; leave it out, or convert the photograph"
        )
    shared = {"config": config, "guidance": guidance, "reading": reading}
    with Batch("fit", matching(options.photos)) as batch:
        plan, folder = _plan(batch.photos, options.output, not options.no_picture)
        plan = batch.permitted(plan, (options.backbone,), FORMAT, overwrite=options.overwrite)
        if not plan:
            return batch.exit_code
        model = load_model(options, upsampler="bilinear")
        batch.make_folder(folder)
        made_by = identify_backbone(model.backbone)
        recipe = partial(recipe_of, made_by=made_by, **shared)
        if folder == options.output:
            plan = batch.pending(plan, recipe)
        columns = (
            *Progress.get_default_columns()[:3],
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with progress_bar(*columns, keep=True) as progress:
            for photo, outputs in plan:
                task, features = progress.add_task(photo.name), None
                with batch.attempt(photo):
                    features = fit_photograph(
                        photo,
                        model.backbone,
                        output=outputs.features,
                        picture=outputs.picture,
                        **shared,
                        max_pixels=options.max_pixels,
                        made_by=made_by,
                        on_step=_bar_updater(progress, task, photo.name),
                    )
                if features is not None:
                    say(f"{outputs.features}  {_outcome(features, config)}")
                progress.remove_task(task)
    return batch.exit_code


def _output_of(text: str) -> Path:
    return path_of(text) if text.endswith(".safetensors") else folder_of(text)


def _plan(photos: list[Photo], output: Path, picture: bool) -> tuple[Plan, Path]:
    """Return every photograph with the paths of its results, and the folder of all results."""
    from upfeat.outputs import Outputs, picture_of, plan_outputs

    if output.suffix == ".safetensors" and not output.is_dir():
        if len(photos) > 1:
            raise ValueError(f"{output}: is one file for {len(photos)} photographs; give a folder")
        one = Outputs(output, picture_of(output) if picture else None)
        return [(photo.path, one) for photo in photos], output.parent
    return plan_outputs(photos, output, picture=picture), output


def _outcome(features: ImplicitFeatures, config: FitConfig) -> str:
    """Describe a fit in one line: shape, views, held-out loss."""
    facts = features.facts
    shape, views = "×".join(map(str, features.shape[1:])), f"{facts['views']} views"
    if config.preset == "fast":  # this preset counts all passes, that of the whole photograph too
        views = (
            f"{facts['views'] - config.zoomed_views - 1} + {config.zoomed_views} magnified views"
        )
    return f"{shape}, {views}, held-out loss {facts['held_out']:.4f}"


def _bar_updater(progress: Progress, task: TaskID, name: str) -> OnFit:
    """Return a callback that moves one photograph's bar and shows its held-out loss."""

    def show(step: FitProgress) -> None:
        progress.update(task, completed=step.done, total=step.total)
        if step.held_out is not None:
            progress.update(task, description=f"{name}  held-out loss {step.held_out:.4f}")

    return show
