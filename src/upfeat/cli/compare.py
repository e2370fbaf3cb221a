"""``upfeat compare``: gains of upsamplers over several backbones and data sets."""

from __future__ import annotations

import argparse

from upfeat.cli.choices import path_of
from upfeat.cli.streams import printable

HELP = "Compare results of upfeat eval: gains of upsamplers over nearest, by backbone and data."
EXAMPLE = (
    "  upfeat compare out_dino/ out_clip/\n"
    "  upfeat compare out_*/ --over bilinear --score boundary_f -o table.md"
)
_WIDEST = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "results",
        nargs="+",
        type=path_of,
        metavar="OUT",
        help="folder that upfeat eval wrote, or its results.json; one for each column",
    )
    parser.add_argument(
        "--over",
        default="nearest",
        metavar="NAME",
        help="upsampler over which gains are computed (default: %(default)s)",
    )
    parser.add_argument(
        "--score",
        metavar="NAME",
        help="name of a score in results.json, such as boundary_f (default: the task's main score)",
    )
    parser.add_argument(
        "-o", "--output", type=path_of, metavar="FILE", help="file to write: .md, .csv or .json"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def execute(options: argparse.Namespace) -> int:
    """Print a table for each protocol, and write the file; notes go to stderr."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from upfeat.cli.console import note
    from upfeat.evaluation.comparison import (
        cells,
        check_suffix,
        compare,
        headings,
        title,
        write_comparison,
    )
    from upfeat.outputs import Inputs

    output = options.output
    if output is not None:
        check_suffix(output)
        given = Inputs(options.results).find(output)
        if given is not None:
            raise ValueError(f"{output}: is the input {given}; name another file")
        if output.exists() and not options.overwrite:
            raise ValueError(f"{output}: exists; name another file, or give --overwrite")
    comparison = compare(options.results, over=options.over, score=options.score)
    if output is not None:
        write_comparison(comparison, output)
    # Cells are never cut off: a narrow terminal wraps the lines, and a file contains them whole.
    wide = Console(width=_WIDEST)
    for protocol, lines in cells(comparison).items():
        table = Table(title=escape(printable(f"{protocol}: {title(comparison)}")))
        for index, heading in enumerate(headings(comparison)):
            table.add_column(escape(printable(heading)), justify="right" if index else "left")
        for line in lines:
            table.add_row(*(escape(printable(cell)) for cell in line))
        needed = min(wide.measure(table).maximum, _WIDEST)
        Console(width=max(Console().width, needed)).print(table)
    for text in comparison.notes:
        note("compare", text)
    return 0
