"""Entry point of the command: parsing, dispatch, and user errors as one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from upfeat._version import __version__
from upfeat.cli import (
    bench,
    compare,
    convert,
    demo,
    export,
    extract,
    fit,
    info,
    probe,
    raster,
    render,
    run,
    train,
    video,
)
from upfeat.cli import eval as evaluate
from upfeat.cli.streams import accept_all_characters, say

COMMANDS = {
    "run": run,
    "train": train,
    "fit": fit,
    "render": render,
    "extract": extract,
    "probe": probe,
    "raster": raster,
    "video": video,
    "eval": evaluate,
    "compare": compare,
    "bench": bench,
    "export": export,
    "convert": convert,
    "demo": demo,
    "info": info,
}

_SPINS = "1000"
"""Iterations that a waiting thread spins before it sleeps: some microseconds."""


class Parser(argparse.ArgumentParser):
    """Argument parser whose error messages are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """Build the parser of ``upfeat`` with all its commands."""
    parser = Parser(
        prog="upfeat", description="Features of any vision backbone, at any resolution."
    )
    parser.add_argument("--version", action="version", version=f"upfeat {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"example:\n{module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: arguments after ``upfeat``; ``None`` for those of the process.

    Returns:
        The exit code: 0, 2 for bad input, 130 when interrupted, 141 if nobody reads the output.
    """
    accept_all_characters()
    options = build_parser().parse_args(arguments)
    calm_threads()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = COMMANDS[options.command].execute(options)
            print(end="", flush=True)  # standard output may be closed, and is None then
            return code
    except BrokenPipeError:  # the reader of the output, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"upfeat {options.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from upfeat.failures import failure_reason

        reason = failure_reason(error)
        if reason is None:
            raise
        say(f"upfeat {options.command}: error: {reason}", error=True)
        return 2


def calm_threads() -> None:
    """Let waiting threads of PyTorch sleep early, unless an environment variable decides otherwise.

    A waiting thread of GNU OpenMP spins. On a busy machine it thereby takes the core from the very
    thread that it waits for, which makes work up to ten times slower; on an idle machine spinning
    gains nothing. OpenMP reads the variable when it is loaded, together with PyTorch, so this
    function has no effect afterwards.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys() and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    say(f"upfeat: note: {' '.join(str(message).split())}", error=True)
