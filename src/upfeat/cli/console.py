"""Terminal code that the commands share: progress bars, failures of a batch, safe printing."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from upfeat.cli.streams import printable, say
from upfeat.failures import failure_reason, one_line
from upfeat.machine import readable
from upfeat.marks import PICTURE
from upfeat.outputs import (
    Inputs,
    Outputs,
    check_output,
    is_done,
    make_folder,
)
from upfeat.photo_search import Photo, find_photographs
from upfeat.storage import sweep

if TYPE_CHECKING:
    import argparse

    from rich.progress import Progress, ProgressColumn

Plan = list[tuple[Path, Outputs]]
"""Photographs and the paths of their results."""


def note(command: str, text: str) -> None:
    """Print a note to the user on standard error, since standard output is for results."""
    say(f"upfeat {command}: note: {text}", error=True)


def note_unused(
    command: str, options: argparse.Namespace, names: Sequence[str], where: str
) -> None:
    """Note options that were given, and have no effect in the place that ``where`` describes.

    Args:
        command: name of the command.
        options: the parsed options, ``None`` where nothing was given.
        names: names of the options, as in ``options``.
        where: end of the sentence, such as "with --head".
    """
    for name in names:
        if getattr(options, name) is not None:
            note(command, f"--{name.replace('_', '-')} has no effect {where}")


@contextmanager
def progress_bar(*columns: str | ProgressColumn, keep: bool = False) -> Iterator[Progress]:
    """Show a progress bar on standard error, if that is a terminal.

    Args:
        columns: columns of the bar; none for rich's default columns.
        keep: leave the bar on the screen when the work has ended.
    """
    from rich.console import Console
    from rich.progress import Progress, Task, TextColumn
    from rich.text import Text

    class Name(TextColumn):
        """File name, not markup: brackets would be taken for styles, or be an error."""

        def render(self, task: Task) -> Text:
            return Text(printable(task.description), style="progress.description")

    plain = Name("{task.description}")
    described = [
        plain if "task.description" in getattr(column, "text_format", "") else column
        for column in columns or Progress.get_default_columns()
    ]
    # Lines printed meanwhile go through the bar's console, which must not break long paths. If
    # standard output is a file, the lines belong there.
    console = Console(stderr=True, soft_wrap=True)
    with Progress(
        *described,
        console=console,
        transient=not keep,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
    ) as progress:
        yield progress


class Batch:
    """Context for many photographs: failures are collected and reported at the end."""

    def __init__(self, command: str, paths: Sequence[Path]) -> None:
        """Find the photographs.

        Args:
            command: name of the command, for error messages.
            paths: files, and folders to search.
        """
        self.command = command
        self.found = find_photographs(paths)
        self.photos = [one for one in self.found if isinstance(one, Photo)]
        self._order = {photo.path: place for place, photo in enumerate(self.photos)}
        self._failures: list[tuple[int, str]] = []
        self._made: list[Path] = []
        for one in self.found:
            if not isinstance(one, Photo):
                self._failures.append((-1, one_line(one)))

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Report all failures in the order of the photographs, also after an interruption.

        Folders that :meth:`make_folder` made are removed if they are empty.
        """
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()
        for _, line in sorted(self._failures, key=lambda failure: failure[0]):
            say(f"upfeat {self.command}: error: {line}", error=True)
        total = len(self._order) + len(self.found) - len(self.photos)
        if self._failures and total > 1:
            count = f"{len(self._failures)} of {total} photographs failed"
            say(f"upfeat {self.command}: {count}", error=True)

    def make_folder(self, folder: Path) -> None:
        """Make the folder of results, which is removed at the end if it is still empty.

        Raises:
            ValueError: the folder cannot be made; see :func:`upfeat.outputs.make_folder`.
        """
        self._made = [one for one in (folder, *folder.parents) if not one.exists()]
        make_folder(folder)

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 2 if any photograph failed, else 0."""
        return 2 if self._failures else 0

    @contextmanager
    def attempt(self, photo: Path) -> Iterator[None]:
        """Run the block for one photograph: record a failure; errors of the program propagate."""
        try:
            yield
        except Exception as error:
            reason = failure_reason(error)
            if reason is None:
                raise
            line = reason if str(photo) in reason else f"{photo}: {reason}"
            self._failures.append((self._order.get(photo, -1), line))

    def permitted(
        self, plan: Plan, others: Sequence[str | Path | None], kind: str, *, overwrite: bool
    ) -> Plan:
        """Drop, as failed, photographs whose results would overwrite a file that must be kept.

        Args:
            plan: photographs and their outputs.
            others: other files that the command reads, which must not be overwritten.
            kind: format of the files of features; files of this format may be replaced.
            overwrite: see :func:`upfeat.outputs.check_output`.
        """
        inputs = Inputs([*(photo for photo, _ in plan), *others])
        kept = []
        for photo, outputs in plan:
            with self.attempt(photo):
                check_output(outputs.features, inputs, kind, overwrite=overwrite)
                if outputs.picture is not None:
                    check_output(outputs.picture, inputs, PICTURE, overwrite=overwrite)
                kept.append((photo, outputs))
        return kept

    def pending(self, plan: Plan, recipe: Callable[[Path], str]) -> Plan:
        """Drop photographs that are done, and print them; sweep the output folders of all.

        Args:
            plan: photographs and their outputs.
            recipe: function from a photograph to a digest of everything its results depend on.
        """
        for folder in {outputs.features.parent for _, outputs in plan}:
            sweep(folder)
        kept = []
        for photo, outputs in plan:
            done = None
            with self.attempt(photo):
                done = is_done(outputs, recipe(photo))
            if done:
                say(f"{outputs.features}  done before")
            elif done is not None:
                kept.append((photo, outputs))
        return kept


def announce_size(command: str, sizes: Sequence[int | None], folder: Path) -> None:
    """Print the disk space that several results will need, before they are written.

    Args:
        command: name of the command that writes the results.
        sizes: bytes of each result; unknown sizes, ``None``, count as 0.
        folder: folder of the results.
    """
    total, free = sum(size or 0 for size in sizes), shutil.disk_usage(folder).free
    if len(sizes) < 2 or not total:
        return
    text = f"{len(sizes)} photographs take about {readable(total)} in {folder}"
    if total > free:
        text += f", where only {readable(free)} are free: some will fail; give a smaller --size"
    else:
        text += f" ({readable(free)} free)"
    note(command, text)
