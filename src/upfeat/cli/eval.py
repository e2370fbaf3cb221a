"""``upfeat eval``: labelled photographs in, a table of upsamplers out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from upfeat.evaluation import Results
    from upfeat.evaluation.prepared import OnStep

HELP = "Compare upsamplers by linear probes on labelled photographs."
EXAMPLE = (
    "  upfeat eval seg data/clothing -o out/\n"
    "  upfeat eval seg data/clothing --upsamplers bilinear my_stack/ --seeds 5 -o out/"
)
_PROBLEMS_SHOWN = 10
_TABLE_WIDTH = 140


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "task",
        choices=("seg", "depth", "cam", "consistency"),
        help="probe of classes; probe of depth; class activation maps; unseen views",
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="train/ and test/ (or neither), with images/ and labels/ or depth/; cam and "
        "consistency take any folder of photographs",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="where results go"
    )
    parser.add_argument(
        "--layout",
        default="folder",
        choices=("folder", "coco_stuff", "ade20k", "cityscapes", "voc", "nyuv2"),
        help="how the data lies on disk (default: %(default)s)",
    )
    parser.add_argument(
        "--upsamplers",
        nargs="+",
        default=["nearest", "bilinear", "bicubic", "joint_bilateral", "jbu_stack"],
        metavar="NAME",
        help="names, folders that save_pretrained wrote, or .ckpt files (default: %(default)s)",
    )
    parser.add_argument(
        "--protocol",
        choices=("own", "transfer", "both"),
        default="both",
        help="train probes on the upsampled features, or on the coarse ones (default: both)",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="repetitions (default: %(default)s)"
    )
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        help="default: efficientnet_lite0, for cam efficientnet_lite0.stride32",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=224,
        metavar="PIXELS",
        help="shorter side at which images and labels are compared (default: %(default)s)",
    )
    parser.add_argument(
        "--pixels",
        type=int,
        default=256,
        metavar="N",
        help="drawn from each training image (default: %(default)s)",
    )
    parser.add_argument("--max-train", type=int, metavar="N", help="use N training images")
    parser.add_argument("--max-test", type=int, metavar="N", help="use N test images")
    parser.add_argument(
        "--split-seed",
        type=int,
        default=0,
        metavar="SEED",
        help="of automatic splits and --max-train, --max-test (default: %(default)s)",
    )


def execute(options: argparse.Namespace) -> int:
    """Evaluate; what was left out is summarised on stderr."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from upfeat.evaluation import EvalConfig, evaluate

    protocols = {
        "own": ("own",),
        "transfer": ("transfer", "probabilities"),
        "both": ("own", "transfer", "probabilities"),
    }[options.protocol]
    config = EvalConfig(
        size=options.size,
        seeds=options.seeds,
        protocols=protocols,
        pixels=options.pixels,
        max_train=options.max_train,
        max_test=options.max_test,
        split_seed=options.split_seed,
    )
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        results = evaluate(
            options.task,
            options.folder,
            options.output,
            upsamplers=options.upsamplers,
            backbone=options.backbone,
            config=config,
            layout=options.layout,
            on_step=_shower(progress),
        )
    for problem in results.problems[:_PROBLEMS_SHOWN]:
        print(f"upfeat eval: note: {problem}", file=sys.stderr)
    more = len(results.problems) - _PROBLEMS_SHOWN
    if more > 0:
        print(f"upfeat eval: note: and {more} more, in results.json", file=sys.stderr)
    # Rows are never cut: a narrow terminal wraps them, a file keeps them whole.
    Console(width=max(Console().width, _TABLE_WIDTH)).print(_table(results))
    return 0


def _shower(progress: Progress) -> OnStep:
    """Progress that shows one bar, renamed and restarted for each step."""
    bars: dict[str, int] = {}

    def show(label: str, done: int, total: int) -> None:
        if label not in bars:
            for task in bars.values():
                progress.update(task, visible=False)  # pyright: ignore[reportArgumentType]
            bars[label] = progress.add_task(label, total=total)
        progress.update(bars[label], completed=done)  # pyright: ignore[reportArgumentType]

    return show


def _table(results: Results) -> Table:
    from rich.table import Table

    from upfeat.evaluation.report import SCORE_NAMES, shown

    data = results.data
    counts = ", ".join(
        f"{data[part]['images']} {part} images" for part in ("train", "test") if part in data
    )
    table = Table(title=f"{data['name']}: {counts}, {results.backbone['name']}")
    names = list(results.rows[0].scores)
    for name in ("upsampler", "protocol"):
        table.add_column(name, no_wrap=True)
    for name in (*(SCORE_NAMES[name] for name in names), "s/image", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in results.rows:
        cells = [" ".join(shown(name, row.scores[name])).strip() for name in names]
        for name, digits in (("seconds", 3), ("memory_mib", 0)):
            value = row.cost.get(name)
            cells.append("–" if value is None else f"{value:.{digits}f}")
        table.add_row(row.upsampler, row.protocol, *cells)
    return table
