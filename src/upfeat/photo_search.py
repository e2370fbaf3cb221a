"""Search of photographs in folders; masks and pictures that upfeat wrote are left out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from upfeat.marks import kind_of

_UNDECODED = ("BUFR", "GRIB", "HDF5", "MPEG", "EPS")
"""Data and videos, which Pillow recognises, but never decodes; and programs, which are not run."""
_MASKS = ("labels", "depth")
"""Folders of pictures that belong to the photographs of the same names beside them."""


@dataclass(frozen=True)
class Photo:
    """A photograph to process.

    Attributes:
        path: path of the file.
        below: folder of the file, relative to the folder on the command line; empty for a file
            given by name.
    """

    path: Path
    below: Path = Path()


def find_photographs(paths: Iterable[Path]) -> list[Photo | OSError | ValueError]:
    """Replace every folder by the photographs in it and in its subfolders, sorted by name.

    Hidden files, hidden folders and pictures that upfeat wrote are skipped in folders; files given
    by name are never skipped.

    Returns:
        The photographs; and an error for each folder that contains none or cannot be read.
    """
    found: list[Photo | OSError | ValueError] = []
    for path in paths:
        try:
            inside = search(path) if path.is_dir() else [Photo(path)]
        except OSError as error:
            found.append(error)
            continue
        found += inside or [ValueError(f"{path}: no image file in this folder")]
    return found


def is_image(name: str) -> bool:
    """Return whether a file's suffix is that of an image, including HEIC, which needs an extra."""
    suffix = Path(name).suffix.lower()
    kind = Image.registered_extensions().get(suffix)
    return suffix in (".heic", ".heif") or (kind in Image.OPEN and kind not in _UNDECODED)


def search(folder: Path) -> list[Photo]:
    """Find photographs in a folder and its subfolders; see :func:`find_photographs`.

    Links to folders are followed, except to folders in or around those that are searched. Links to
    missing files count as photographs, since reading them is an error that tells of the loss.
    Labels and depth maps of photographs, in folders beside them, are left out with a warning.

    Raises:
        OSError: a folder cannot be read.
    """
    found = []
    entered = [folder.resolve()]
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        visible = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in visible if _enter(Path(place, name), entered)]
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith(".") or not is_image(name):
                continue
            if not path.is_file() and not path.is_symlink():
                continue
            if not (name.endswith(".features.png") and _is_ours(path)):
                found.append(Photo(path, Path(place).relative_to(folder)))
    return _without_masks(folder, found)


def _without_masks(folder: Path, found: list[Photo]) -> list[Photo]:
    """Leave out, with a warning, masks and depth maps: labels/NAME.png beside images/NAME.jpg."""
    names = {(photo.below / photo.path.stem).parts for photo in found}

    def is_mask(photo: Photo) -> bool:
        parts = (photo.below / photo.path.stem).parts
        return any(
            part in _MASKS and (*parts[:place], *beside, *parts[place + 1 :]) in names
            for place, part in enumerate(parts[:-1])
            for beside in ((), ("images",))
        )

    masks = {photo: None for photo in found if is_mask(photo)}
    if masks:
        warnings.warn(
            f"{folder}: {len(masks)} labels beside photographs of the same names, such as "
            f"{next(iter(masks)).path.relative_to(folder)}, are left out",
            stacklevel=3,
        )
    return [photo for photo in found if photo not in masks]


def _enter(folder: Path, entered: list[Path]) -> bool:
    """Return whether to search a subfolder; add the folder behind a link to ``entered``."""
    if not folder.is_symlink():
        return True
    real = folder.resolve()
    if any(one in (real, *real.parents) or real in one.parents for one in entered):
        return False
    entered.append(real)
    return True


def _raise(error: OSError) -> None:
    raise error


def _is_ours(path: Path) -> bool:
    try:
        return kind_of(path) is not None
    except OSError:
        return False
