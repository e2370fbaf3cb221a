"""``upfeat eval``: comparison of upsamplers on photographs, as a table."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from upfeat.cli.choices import (
    BACKBONE_HELP,
    BASELINES,
    DEFAULT_BACKBONE,
    add_layer,
    name_of,
    path_of,
    with_layers,
)
from upfeat.cli.streams import printable
from upfeat.evaluation.tasks import list_tasks

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from upfeat.evaluation import Results
    from upfeat.evaluation.data.prepared import OnStep

HELP = "Compare upsamplers on photographs: probes, activation maps, unseen views, videos."
EXAMPLE = (
    "  upfeat eval seg data/clothing -o out/\n"
    "  upfeat eval seg data/clothing --upsamplers bilinear my_stack/ --seeds 5 -o out/\n"
    "  upfeat eval consistency photos/ --downsampler attention -o out/"
)
_PROBLEMS_SHOWN = 10
_WIDEST = 1000
_PROTOCOLS = {
    "own": ("own",),
    "transfer": ("transfer", "probabilities"),
    "both": ("own", "transfer", "probabilities"),
}
_PROBES = ("seg", "depth", "normals")
_TASKS = {
    "protocol": _PROBES,
    "pixels": _PROBES,
    "probe": _PROBES,  # depth and normals refuse any but the default
    "downsampler": ("consistency",),
    "views": ("consistency",),
}
"""Tasks on which an option has an effect; other options have one on all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "task",
        choices=list_tasks(),
        metavar="task",
        help="; ".join(f"{name}: {meaning.rstrip('.')}" for name, meaning in list_tasks().items()),
    )
    parser.add_argument(
        "folder",
        type=path_of,
        help="folder with images/ and labels/ (seg) or depth/ (depth, normals), within train/ and "
        "test/ if the set is split; for propagation, images/ and labels/ with a folder of frames "
        "for each video; for cam and consistency, any folder of photographs; for correspondence, "
        "images/ and pairs.json",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=path_of,
        required=True,
        metavar="FOLDER",
        help="folder of the results",
    )
    parser.add_argument(
        "--layout",
        default="folder",
        choices=(
            "folder",
            "coco_stuff",
            "coco_stuff27",
            "ade20k",
            "cityscapes",
            "voc",
            "nyuv2",
            "spair",
            "davis",
        ),
        help="layout of the data on disk (default: %(default)s)",
    )
    parser.add_argument(
        "--upsamplers",
        nargs="+",
        metavar="NAME",
        help="names, folders that save_pretrained wrote, published checkpoints (AnyUp, JAFAR, NAF, "
        "UPLiFT, FeatUp), or implicit, which fits every image in about 10 s (default: "
        f"{' '.join(BASELINES)}, and the backbone's default)",
    )
    parser.add_argument(
        "--protocol",
        choices=("own", "transfer", "both"),
        help="seg, depth and normals: train probes on the upsampled features (own), or train them "
        "on the coarse features and apply them to the upsampled features (transfer) (default: "
        "both)",
    )
    parser.add_argument(
        "--downsampler",
        nargs="+",
        choices=("box", "simple", "attention"),
        metavar="KIND",
        help="consistency: downsamplers to the backbone's grid, one row for each: box (mean over "
        "each cell), simple or attention (fitted to each upsampler) (default: box attention)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="number of seeds (default: %(default)s)",
    )
    parser.add_argument(
        "--backbone",
        type=name_of,
        metavar="NAME",
        help=f"{BACKBONE_HELP} (default: {DEFAULT_BACKBONE}, for cam {DEFAULT_BACKBONE}.stride32)",
    )
    add_layer(parser)
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="shorter side to which images and labels are resized (default: 224; 448 with --probe "
        "adamw)",
    )
    parser.add_argument(
        "--probe",
        choices=("regression", "adamw"),
        help="seg: regression is logistic regression on --pixels of each image; adamw is the probe "
        "of published comparisons (JAFAR, AnyUp, NAF), a 1×1 convolution on all pixels of images "
        "of 448 pixels, trained for 20 epochs (default: regression)",
    )
    parser.add_argument(
        "--pixels",
        type=int,
        metavar="N",
        help="seg, depth and normals: pixels drawn from each training image (default: 256)",
    )
    parser.add_argument(
        "--views",
        type=int,
        metavar="N",
        help="consistency: jittered views of each test image (default: 5)",
    )
    parser.add_argument("--max-train", type=int, metavar="N", help="use at most N training images")
    parser.add_argument(
        "--max-test",
        type=int,
        metavar="N",
        help="use at most N test images, pairs for correspondence, or videos for propagation",
    )
    parser.add_argument(
        "--split-seed",
        type=int,
        default=0,
        metavar="SEED",
        help="seed of automatic splits, and of draws by --max-train and --max-test (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="cpu, cuda, cuda:1, … (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a results.json or report.html that upfeat did not write",
    )


def execute(options: argparse.Namespace) -> int:
    """Evaluate and print the tables; the first problems, such as bad images, go to stderr."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from upfeat.cli.console import note, note_unused, progress_bar
    from upfeat.evaluation import EvalConfig, evaluate

    config = EvalConfig(**_settings(options))
    for name, tasks in _TASKS.items():
        if options.task not in tasks:
            note_unused("eval", options, [name], f"on {options.task}")
    if options.task == "seg" and options.probe == "adamw":
        note_unused("eval", options, ["pixels"], "with --probe adamw")
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with progress_bar(*columns) as progress:
        results = evaluate(
            options.task,
            options.folder,
            options.output,
            upsamplers=options.upsamplers,
            backbone=with_layers(options.backbone, options.layer),
            config=config,
            layout=options.layout,
            device=options.device,
            overwrite=options.overwrite,
            on_step=_bars(progress),
        )
    for problem in results.problems[:_PROBLEMS_SHOWN]:
        note("eval", str(problem))
    more = len(results.problems) - _PROBLEMS_SHOWN
    if more > 0:
        note("eval", f"and {more} more, in results.json")
    tables = [_table(results)]
    if results.differences:
        tables.append(_differences(results))
    # Rows are never truncated: a narrow terminal wraps them, and a file contains them whole.
    wide = Console(width=_WIDEST)
    for table in tables:
        needed = wide.measure(table).maximum
        Console(width=max(Console().width, min(needed, _WIDEST))).print(table)
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given, by their names in ``EvalConfig``."""
    published = options.task == "seg" and options.probe == "adamw"
    given = {
        "size": 448 if published and options.size is None else options.size,
        "protocols": _PROTOCOLS.get(options.protocol),
        "downsamplers": options.downsampler and tuple(options.downsampler),
    }
    for name in ("seeds", "pixels", "probe", "max_train", "max_test", "split_seed", "views"):
        given[name] = getattr(options, name)
    return {name: value for name, value in given.items() if value is not None}


def _bars(progress: Progress) -> OnStep:
    """Return a callback that shows a bar for the current step and hides the steps before it."""
    tasks: dict[str, int] = {}

    def show(label: str, done: int, total: int) -> None:
        if label not in tasks:
            for task in tasks.values():
                progress.update(task, visible=False)  # pyright: ignore[reportArgumentType]
            tasks[label] = progress.add_task(label, total=total)
        progress.update(tasks[label], completed=done)  # pyright: ignore[reportArgumentType]

    return show


def _table(results: Results) -> Table:
    """Make the table of scores: rows grouped by protocol, the best of each group in bold."""
    from rich.markup import escape
    from rich.table import Table

    from upfeat.environment import counted
    from upfeat.evaluation.report.page import COSTS, best_mean, heading, shown
    from upfeat.evaluation.results import summary
    from upfeat.evaluation.tasks import find_task

    data = results.data
    counts = ", ".join(
        counted(data[part]["images"], f"{part} image") for part in ("train", "test") if part in data
    )
    if "pairs" in data:
        counts += f", {counted(data['pairs']['number'], 'pair')}"
    title = f"{data['name']}: {counts}, {results.backbone['name']}"
    table = Table(title=escape(printable(title)))
    names = list(results.rows[0].scores)
    for name in ("protocol", "upsampler"):
        table.add_column(name, no_wrap=True)
    scores = find_task(results.task).scores
    headings = [heading(scores[name]) for name in names]
    for title in (*headings, "passes", "s/image", "MiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for protocol in results.protocols:
        rows = [row for row in results.rows if row.protocol == protocol]
        best = {name: best_mean(rows, name, scores[name]) for name in names}
        for row in rows:
            cells = []
            for name in names:
                mean, spread = shown(scores[name], row.scores[name])
                exact = summary(row.scores[name])["mean"]  # unrounded
                mean = f"[bold]{mean}[/]" if exact is not None and exact == best[name] else mean
                cells.append(f"{mean} [dim]{spread}[/]" if spread else mean)
            for name, digits in COSTS.items():
                value = row.cost.get(name)
                cells.append("–" if value is None else f"{value:.{digits}f}")
            table.add_row(protocol, escape(printable(row.upsampler)), *cells)
        table.add_section()
    return table


def _differences(results: Results) -> Table:
    """Make the table of each row's differences from bilinear and from the best other row.

    A difference is bold if its 95 % interval excludes 0.
    """
    from rich.markup import escape
    from rich.table import Table

    from upfeat.evaluation.report.page import differences

    table = Table(
        title="differences: mean, 95 % interval from 1,000 draws of the test set, each seed"
    )
    for name in ("protocol", "upsampler", "minus", "score"):
        table.add_column(name, no_wrap=True)
    for name in ("mean", "95 %", "seeds"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for one in differences(results):
        if last not in (None, one.protocol):
            table.add_section()
        last = one.protocol
        mean = f"[bold]{one.mean}[/]" if one.certain else one.mean
        pair = (escape(printable(one.upsampler)), escape(printable(one.against)))
        table.add_row(one.protocol, *pair, one.score, mean, escape(one.interval), one.seeds)
    return table
