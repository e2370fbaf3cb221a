"""Files that a command reads and writes: names, and protection of files from overwriting.

A command replaces only its own earlier results, which have upfeat's mark (:mod:`upfeat.marks`);
with ``--overwrite`` also other files, but never an input.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from upfeat._version import __version__
from upfeat.machine import readable
from upfeat.marks import kind_of, picture_facts
from upfeat.photo_search import Photo
from upfeat.storage import check_writable, sweep


@dataclass(frozen=True)
class Outputs:
    """Paths of one photograph's results."""

    features: Path
    picture: Path | None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All paths of results."""
        return (self.features,) if self.picture is None else (self.features, self.picture)


def plan_outputs(
    photos: Sequence[Path | Photo], folder: Path, *, picture: bool = True
) -> list[tuple[Path, Outputs]]:
    """Choose paths for the results of every photograph, without writing anything.

    Results have the name of the photograph, with a number if several have the same name.

    Args:
        photos: the photographs; repeated paths count once. Results of photographs found in
            subfolders go to the same subfolders of ``folder``.
        folder: folder of the results.
        picture: whether there is a picture for every photograph.

    Returns:
        The path of every photograph with the paths of its results.
    """
    planned = []
    taken: set[str] = set()
    for photo in _once(photos):
        stem, number = photo.path.stem, 2
        below = photo.below.as_posix()
        while unified(f"{below}/{stem}") in taken:
            stem = f"{photo.path.stem}-{number}"
            number += 1
        taken.add(unified(f"{below}/{stem}"))
        features = folder / photo.below / f"{stem}.safetensors"
        planned.append((photo.path, Outputs(features, picture_of(features) if picture else None)))
    return planned


def unified(name: str) -> str:
    """Return one form for all names that Windows or macOS take for the same file.

    Both ignore case; macOS also ignores whether an accent is a character of its own.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _once(photos: Sequence[Path | Photo]) -> Iterable[Photo]:
    """Remove repeated paths; the first of each is kept."""
    known: dict[Path, Photo] = {}
    for photo in photos:
        whole = photo if isinstance(photo, Photo) else Photo(photo)
        known.setdefault(whole.path, whole)
    return known.values()


def picture_of(features: Path) -> Path:
    """Path of the picture of a file of features: ``photo.features.png``."""
    return features.with_name(f"{features.stem}.features.png")


def make_folder(folder: Path) -> None:
    """Make a folder for results, remove abandoned temporary files, and check that it is writable.

    Raises:
        ValueError: the folder cannot be made or written.
    """
    if folder.is_file():
        raise ValueError(f"{folder}: cannot be written as a folder, it is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        check_writable(folder, folder)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None


class Inputs:
    """Input files of a command, recognised under any path: links, other case, ``.``."""

    def __init__(self, paths: Iterable[str | Path | None]) -> None:
        """Record the identity of the file at each path.

        Args:
            paths: files; folders, which stand for the files directly in them; and names of
                backbones or upsamplers, which may contain paths.
        """
        self._known: dict[object, Path] = {}
        for path in _parts(paths):
            inside = []
            with suppress(OSError):
                inside = [Path(entry.path) for entry in os.scandir(path)] if path.is_dir() else []
            for one in (path, *inside):
                for key in _identities(one):
                    self._known.setdefault(key, one)

    def find(self, output: Path) -> Path | None:
        """Return the input that an output would replace; ``None`` if there is none."""
        return next((self._known[key] for key in _identities(output) if key in self._known), None)


def _parts(paths: Iterable[str | Path | None]) -> Iterator[Path]:
    """Yield paths, and the paths in names: "hf:folder", "file.py:name", "hub:C:/folder:name"."""
    for path in paths:
        if path is None:
            continue
        yield Path(path)
        if isinstance(path, str):
            parts = path.split(":")
            yield from (
                Path(":".join(parts[start:end]))  # one part, or two: a drive letter has a colon too
                for start in range(len(parts))
                for end in range(start + 1, min(start + 3, len(parts) + 1))
                if parts[start:end] != parts
            )


def _identities(path: Path) -> list[object]:
    """Identities of a path: the resolved path, and device and inode of the file if it exists."""
    found: list[object] = [os.path.normcase(os.path.realpath(path))]
    with suppress(OSError, ValueError):
        state = path.stat()
        if state.st_ino:
            found.append((state.st_dev, state.st_ino))
    return found


def check_output(output: Path, inputs: Inputs, kind: str, *, overwrite: bool = False) -> None:
    """Refuse to write to an input, or over a file that is not an earlier result of the same kind.

    Args:
        output: the file, or folder (zarr), to write.
        inputs: all files that the command reads.
        kind: mark of the output, such as "upfeat-features".
        overwrite: also allow files of another kind or origin, but never an input, or a folder that
            is not an earlier result.

    Raises:
        ValueError: the output may not be written.
    """
    given = inputs.find(output)
    if given is not None:
        raise ValueError(f"{output}: is the input {given}; give another output")
    if not os.path.lexists(output):
        return
    found = kind_of(output)
    if found == kind:
        return
    if output.is_dir():
        raise ValueError(f"{output}: exists already and is a folder; remove it, or give another")
    if not overwrite:
        what = "was not made by upfeat" if found is None else f"holds {found}, not {kind}"
        raise ValueError(
            f"{output}: exists already and {what}; give --overwrite, or another output"
        )


def prepare_output(output: Path, inputs: Inputs, kind: str, *, overwrite: bool = False) -> None:
    """Check, before minutes of work, that a command's only output can be written at its end.

    Abandoned temporary files in its folder are removed.

    Args:
        output: the file to write.
        inputs: see :func:`check_output`.
        kind: see :func:`check_output`.
        overwrite: see :func:`check_output`.

    Raises:
        ValueError: the output may not be written, or its folder does not exist.
        OSError: its folder cannot be written.
    """
    check_output(output, inputs, kind, overwrite=overwrite)
    if not output.parent.is_dir():
        raise ValueError(f"{output}: there is no folder {output.parent}; make it first")
    sweep(output.parent)
    check_writable(output.parent, output)


@contextmanager
def watched(photo: Path) -> Iterator[str]:
    """Context that gives the SHA-256 of a file, and checks that the file does not change in it.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file changed before the end of the block, so that the digest may not be that
            of the content read in the block.
    """
    _check_file(photo)
    before = _state(photo)
    yield file_digest(photo)
    if _state(photo) != before:
        raise ValueError(f"{photo}: changed while it was read; try again")


def _check_file(path: Path) -> None:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}")


def _state(path: Path) -> tuple[int, ...]:
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: the file cannot be read.
    """
    _check_file(path)
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def digest(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe: everything that a result depends on, as JSON values by name."""
    text = json.dumps({**recipe, "upfeat_version": __version__}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_done(outputs: Outputs, recipe: str) -> bool:
    """Return whether complete results of a recipe exist already.

    Args:
        outputs: paths of the results.
        recipe: :func:`digest` of the recipe, which the files of results contain.
    """
    try:
        with safe_open(outputs.features, framework="pt") as file:
            facts = file.metadata() or {}
        written = facts.get("recipe") or json.loads(facts.get("facts", "{}")).get("recipe")
        picture = outputs.picture
        drawn = recipe if picture is None else picture_facts(picture).get("recipe")
    except (SafetensorError, OSError, ValueError, AttributeError):
        return False
    return written == recipe == drawn


def check_space(output: Path, needed: int | None) -> None:
    """Check that the disk has room for a file, before its content is computed.

    Args:
        output: the file; its folder, or a parent of the folder, exists.
        needed: size of the file in bytes; ``None`` if unknown.

    Raises:
        OSError: the disk has less free space.
    """
    folder = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if needed is not None and needed > free:
        reason = f"No space left on device: {readable(needed)} needed, {readable(free)} free"
        raise OSError(errno.ENOSPC, reason, str(output))
