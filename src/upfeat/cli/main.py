"""Entry point of the command: parsing, dispatch, and user errors as one line and exit code 2."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
        The exit code: 0, 2 for bad input, 130 when interrupted, 143 when terminated (129 when the
        terminal was closed), 141 if nobody reads the output.
    """
    accept_all_characters()
    name = "upfeat"
    try:
        with _signals_as_interrupts(), _log_as_notes(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options = build_parser().parse_args(arguments)
            name = f"upfeat {options.command}"
            calm_threads()
            code = COMMANDS[options.command].execute(options)
            print(end="", flush=True)  # standard output may be closed, and is None then
            return code
    except BrokenPipeError:  # the reader of the output, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as interrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 128 + next(iter(interrupt.args), signal.SIGINT)
    except Exception as error:
        from upfeat.failures import failure_reason

        reason = failure_reason(error)
        if reason is None:
            raise
        say(f"{name}: error: {reason}", error=True)
        return 2


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Context in which SIGTERM and SIGHUP, as Ctrl-C, let a command remove what is unfinished.

    Signals that are ignored, as by ``nohup``, or handled stay so. Outside the main thread, no
    signals are handled.
    """
    taken: list[int] = []

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # Windows lacks the second
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)
                taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


class _Notes(logging.Handler):
    """Handler that prints records as the command's notes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        _note(record.getMessage())


@contextmanager
def _log_as_notes() -> Iterator[None]:
    """Context in which warnings of logs look like all notes, unless the caller handles them."""
    before = logging.lastResort
    logging.lastResort = _Notes(logging.WARNING)
    try:
        yield
    finally:
        logging.lastResort = before


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
    _note(str(message))


def _note(text: str) -> None:
    say(f"upfeat: note: {' '.join(text.split())}", error=True)
