"""``upfeat info``: versions, devices and backends of this installation."""

from __future__ import annotations

import argparse

HELP = "Show versions, devices and kernel backends, with the reason if a backend cannot run."
EXAMPLE = "  upfeat info"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments: none."""


def execute(options: argparse.Namespace) -> int:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    from upfeat.environment import describe

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for section, lines in describe().items():
        for index, line in enumerate(lines):
            table.add_row(section if index == 0 else "", line)
    Console(highlight=False).print(table)
    return 0
