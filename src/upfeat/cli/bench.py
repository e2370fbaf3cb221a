"""``upfeat bench``: timing of the operators and the JBU stack against eager PyTorch."""

from __future__ import annotations

import argparse
import json
import sys

from upfeat.cli.choices import path_of

HELP = "Time the operators and the JBU stack against plain PyTorch; print ratios, write JSON."
EXAMPLE = (
    "  upfeat bench --quick\n  upfeat bench --sizes 14:224 --channels 384 -o bench.json\n"
    "  upfeat bench --rivals anyup_multi_backbone.pth"
)

_SIZES = ("14:224", "28:448", "64:1024")
_CHANNELS = (64, 384, 1024)
_JOBS = ("stack", "operator", "operator+backward")
_MOST_REPEATS = 1000
_ROOMY = 96
_TIGHT = 78
"""Columns of a terminal in which all fits with its headings, and with broken headings."""
_LARGEST = 1 << 14


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="GRID:SIZE",
        help=f"cells and output pixels per side (default: {' '.join(_SIZES)})",
    )
    parser.add_argument(
        "--channels",
        nargs="+",
        type=int,
        metavar="C",
        help=f"numbers of channels (default: {' '.join(map(str, _CHANNELS))})",
    )
    parser.add_argument(
        "--jobs",
        nargs="+",
        choices=_JOBS,
        help="jobs to time (default: all)",
    )
    parser.add_argument(
        "--repeats", type=int, default=7, metavar="N", help="calls to time (default: %(default)s)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only 14:224 with 64 channels, without unfold",
    )
    parser.add_argument(
        "--rivals",
        nargs="*",
        type=path_of,
        metavar="FILE",
        help="time AnyUp, JAFAR, NAF and UPLiFT instead, against plain PyTorch implementations of "
        "them, with the weights of these checkpoints or random weights of equal cost",
    )
    parser.add_argument("-o", "--output", type=path_of, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file that upfeat bench did not write"
    )


def execute(options: argparse.Namespace) -> int:
    """Measure, print a table of ratios, and write the file."""
    from rich.console import Console

    from upfeat.benchmark import FORMAT, RIVALS, as_json, run_benchmark
    from upfeat.bounds import MOST_CHANNELS, whole
    from upfeat.cli.console import progress_bar
    from upfeat.environment import counted
    from upfeat.outputs import Inputs, prepare_output
    from upfeat.storage import write_bytes

    if options.output is not None:
        prepare_output(options.output, Inputs(()), FORMAT, overwrite=options.overwrite)
    whole("--repeats", options.repeats, most=_MOST_REPEATS)
    if options.rivals is not None:
        for name in ("sizes", "channels", "jobs", "quick"):
            if getattr(options, name):
                raise ValueError(f"--{name}: --rivals has its own; leave out one of both")
        return _rivals(options)

    for name in ("sizes", "channels"):
        if options.quick and getattr(options, name) is not None:
            raise ValueError(f"--{name}: --quick chooses it; leave out one of both")
    sizes = ((14, 224),) if options.quick else tuple(map(_size, options.sizes or _SIZES))
    channels = (64,) if options.quick else tuple(options.channels or _CHANNELS)
    rivals = tuple(name for name in RIVALS if not (options.quick and name == "unfold"))
    for count in channels:
        whole("--channels", count, most=MOST_CHANNELS)
    jobs = tuple(options.jobs or _JOBS)
    total = len(jobs) * len(sizes) * len(channels) * len(rivals)
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=total)
        found = run_benchmark(
            sizes=sizes,
            channels=channels,
            jobs=jobs,
            rivals=rivals,
            repeats=options.repeats,
            report=lambda _: progress.advance(task),
        )
    content = as_json(found)
    facts = content["machine"]
    threads = counted(facts["threads"], "thread")
    print(f"{facts['cpu']} ({facts['capability']}), {threads}, torch {facts['torch']}")
    console = Console(highlight=False, width=_width())
    console.print(_table(found, console.width))
    if options.output is not None:
        write_bytes(options.output, (json.dumps(content, indent=1) + "\n").encode())
    return 0


def _rivals(options: argparse.Namespace) -> int:
    """Measure published upsamplers, print a table, and write the file."""
    from rich.console import Console

    from upfeat.environment import counted
    from upfeat.rivals import as_json, run_rivals
    from upfeat.storage import write_bytes

    status = Console(stderr=True)
    with status.status("measuring") as shown:
        rows = run_rivals(tuple(options.rivals), repeats=options.repeats, report=shown.update)
    content = as_json(rows)
    facts = content["machine"]
    print(f"{facts['cpu']}, {counted(facts['threads'], 'thread')}, torch {facts['torch']}")
    Console(highlight=False, width=_width()).print(_rivals_table(rows))
    if options.output is not None:
        write_bytes(options.output, (json.dumps(content, indent=1) + "\n").encode())
    return 0


def _rivals_table(rows: list) -> object:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("upsampler", "way", "size", "C"):
        table.add_column(heading, overflow="fold")
    for heading in ("median", "of ours", "processor", "of ours", "peak memory"):
        table.add_column(heading, justify="right")
    base = None
    for row in rows:
        # Each published upsampler's own row is the base of the rows up to the next one's. Among
        # them is the row of the default, whose way is "ours" too: it is compared, no new base.
        if row.way == "ours" and row.name != "detail":
            base = row
        cells = [row.name, row.way, f"{row.grid}→{row.size}", str(row.channels)]
        if row.seconds is None:
            table.add_row(*cells, "—", row.skipped or "", "", "", "")
            continue
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"
        for name in ("seconds", "processor_seconds"):
            value = getattr(row, name)
            cells += [
                f"{value * 1e3:.0f} ms",
                f"{value / getattr(base, name):.2f}×" if base else "",
            ]
        table.add_row(*cells, peak)
    return table


def _table(measurements: list, width: int) -> object:
    from rich.table import Table

    # On narrow terminals, headings are broken between words; on the narrowest, names are, too.
    table = Table(box=None, padding=(0, 2 if width >= _ROOMY else 1, 0, 0))
    for heading in ("job", "size", "C", "rival"):
        table.add_column(heading, overflow="fold", no_wrap=width >= _TIGHT)
    for heading in ("median", "of ours", "peak memory", "of output"):
        table.add_column(heading, justify="right")
    ours = {
        (one.job, one.grid, one.size, one.channels): one.seconds
        for one in measurements
        if one.rival == "ours"
    }
    for one in measurements:
        key = (one.job, one.grid, one.size, one.channels)
        before = f"{one.grid}→{one.size}" if one.job == "stack" else f"{one.size // 2}→{one.size}"
        row = [one.job, before, str(one.channels), one.rival]
        if one.seconds is None:
            table.add_row(*row, "—", one.skipped or "", "", "")
            continue
        base = ours.get(key)
        ratio = f"{one.seconds / base:.2f}×" if base else ""
        output = 4 * one.size**2 * one.channels
        peak = "" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:.0f} MiB"
        share = "" if one.peak_bytes is None else f"{one.peak_bytes / output:.2f}×"
        table.add_row(*row, f"{one.seconds * 1e3:.1f} ms", ratio, peak, share)
    return table


def _width() -> int | None:
    """Return the table's width: ``None``, a terminal's width; in a file, enough for every name."""
    return None if sys.stdout.isatty() else 120


def _size(text: str) -> tuple[int, int]:
    grid, _, size = text.partition(":")
    digits = grid.isdecimal() and size.isdecimal()
    if not (digits and 0 < int(grid) <= _LARGEST and 8 <= int(size) <= _LARGEST):
        raise ValueError(
            f"--sizes {text} must be GRID:SIZE in pixels, as 14:224; SIZE from 8 to {_LARGEST}"
        )
    return int(grid), int(size)
