"""``upfeat info``: versions, devices and backends of this installation."""

from __future__ import annotations

import argparse

HELP = "Show versions, devices and kernel backends, with the reason if a backend cannot run."
EXAMPLE = "  upfeat info"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments: none."""


def execute(options: argparse.Namespace) -> int:
    """Print a section for each subject; lines are never broken, so that names can be copied."""
    from upfeat.environment import describe

    sections = describe()
    width = max(map(len, sections)) + 2
    for section, lines in sections.items():
        for index, line in enumerate(lines):
            print(f"{section if index == 0 else '':{width}}{line}")
    return 0
