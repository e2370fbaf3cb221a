"""``upfeat extract``: extraction of features from a large set of images."""

from __future__ import annotations

import argparse

from upfeat.cli.choices import (
    add_backbone,
    add_early,
    add_engine,
    add_passes,
    add_reading,
    add_upsampler,
    folder_of,
    load_with_head,
    matching,
    path_of,
)
from upfeat.cli.streams import say

HELP = "Extract features of large image sets: folders, lists, tar archives and videos; resumable."
EXAMPLE = (
    "  upfeat extract photos/ -o features/\n"
    "  upfeat extract shard-000.tar shard-001.tar -o features/ --kind features --size 224\n"
    "  upfeat extract photos/ -o maps/ --head probe.safetensors\n"
    "  upfeat extract photos/ -o features/ --engine ray --workers 2"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "sources",
        nargs="+",
        type=path_of,
        metavar="source",
        help="folder (searched recursively), image, .txt list, .tar archive or video",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=folder_of,
        required=True,
        metavar="FOLDER",
        help="folder of the results; items extracted there before are skipped",
    )
    parser.add_argument(
        "--kind",
        choices=("lazy", "features"),
        help="store coarse features and the image, to upsample when read (lazy, the default; a "
        "fiftieth of the size), or full maps (features)",
    )
    parser.add_argument(
        "--head",
        type=path_of,
        metavar="FILE",
        help="store this head's output instead of features",
    )
    add_backbone(parser)
    add_upsampler(parser)
    add_passes(parser)
    add_early(parser)
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="resize the shorter side first (default: no)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp16", "fp32"),
        help="number type of full maps and of a head's output (default: fp16)",
    )
    add_reading(parser)
    add_engine(parser, "image")
    parser.add_argument(
        "--max-memory",
        metavar="AMOUNT",
        help="memory limit of each process, such as 2GB or 500MiB (default: the machine's memory)",
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu (default), cuda, mps, …")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace features made with other settings"
    )


def execute(options: argparse.Namespace) -> int:
    """Extract features; items that fail are listed at the end and in the manifest."""
    from rich.progress import MofNCompleteColumn, TextColumn

    from upfeat.batch import Engine, Extraction, extract
    from upfeat.cli.console import note_unused, progress_bar

    if options.head is not None and options.kind is not None:
        raise ValueError(
            f"--kind {options.kind}: --head stores the head's output instead; leave out one of both"
        )
    kind = "head" if options.head is not None else options.kind or "lazy"
    if kind == "lazy":
        note_unused("extract", options, ["dtype"], "with --kind lazy")
    model, head = load_with_head(options)
    dtype = {"fp16": "float16", "fp32": "float32"}[options.dtype or "fp16"]
    extraction = Extraction(
        kind,
        size=options.size,
        dtype=dtype,
        head=head,
        bands=options.bands,
        max_value=options.max_value,
    )
    columns = (TextColumn("{task.description}"), MofNCompleteColumn())
    with progress_bar(*columns, keep=True) as progress:
        task = progress.add_task("", total=None)
        summary = extract(
            model,
            matching(options.sources),
            options.output,
            extraction,
            engine=Engine(options.engine, workers=options.workers, address=options.address),
            overwrite=options.overwrite,
            max_memory=options.max_memory,
            on_item=lambda key, done: progress.update(task, completed=done, description=key),
        )
    for key, reason in summary.failures:
        say(f"upfeat extract: error: {key}: {reason}", error=True)
    say(
        f"{options.output}  {summary.made} made, {summary.kept} there before, "
        f"{len(summary.failures)} failed"
    )
    return 2 if summary.failures else 0
