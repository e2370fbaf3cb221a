"""Items of a set: files of folders and lists, members of tar archives, frames of videos."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from upfeat.bounds import paths_of
from upfeat.failures import one_line
from upfeat.frames import VIDEO_SUFFIXES, DamagedVideo, read_frames
from upfeat.photo_search import is_image, search

_PACK = "pack copies in place of links"
_ENDLESS = "a pipe or a device, not a file"
_UNREADABLE = (EOFError, OSError, ValueError, LookupError, ArithmeticError, RecursionError)
"""Errors that tarfile raises for damaged archives, in addition to its own."""


@dataclass(frozen=True)
class Item:
    """One image of a set.

    Attributes:
        key: name of the item, unique in the set: a relative path with ``/``, also of the output.
        read: function that returns the encoded file, or a video's frame as (H, W, 3) uint8.
    """

    key: str
    read: Callable[[], bytes | Any]


@dataclass(frozen=True)
class Damaged:
    """A source, or an entry of one, that cannot be read, with the reason."""

    key: str
    reason: str


def list_items(sources: str | Path | Sequence[str | Path]) -> Iterator[Item | Damaged]:
    """List the items of sources, in an order that depends on their names alone.

    Args:
        sources: one or several folders (searched to any depth), image files, ``.txt`` lists of
            image files (one a line, relative to the list), ``.tar`` archives, and videos.

    Yields:
        Items, and the sources or entries that cannot be read. An archive's members must be read in
        the order in which they are yielded, each before the next item is requested.

    Raises:
        FileNotFoundError: a source does not exist.
        TypeError: a source is no path.
        ValueError: a folder or list contains no image, a list is no text, or two sources have the
            same name and would give equal keys.
    """
    times: dict[str, int] = {}
    for item in _list_all(paths_of("sources", sources)):
        times[item.key] = times.get(item.key, 0) + 1
        if times[item.key] == 1:
            yield item
        else:  # a key of its own, so that the first item's result is kept
            reason = f"{item.key} is in the set already; two of one name need two runs"
            yield Damaged(f"{item.key} ({times[item.key]})", reason)


def _list_all(sources: list[Path]) -> Iterator[Item | Damaged]:
    prefixes: dict[str, Path] = {}
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"{source}: no such file or folder")
        if not source.is_file() and not source.is_dir():
            raise ValueError(f"{source}: {_ENDLESS}")
        if (
            source.suffix.lower() == ".tar"
            or source.suffix.lower() in VIDEO_SUFFIXES
            or source.is_dir()
        ):
            # The items of a single folder need no prefix.
            prefix = "" if source.is_dir() and len(sources) == 1 else f"{source.resolve().name}/"
            if prefix in prefixes:
                raise ValueError(
                    f"{source}: has the same name as {prefixes[prefix]}; their items could not be "
                    "told apart: give them in two runs"
                )
            prefixes[prefix] = source
    for source in sources:
        single = len(sources) == 1
        if source.is_dir():
            yield from _folder(source, "" if single else f"{source.resolve().name}/")
        elif source.suffix.lower() == ".tar":
            yield from _archive(source)
        elif source.suffix.lower() in VIDEO_SUFFIXES:
            yield from _video(source)
        elif source.suffix.lower() == ".txt":
            yield from _list(source)
        else:
            yield Item(source.name, source.read_bytes)


def _folder(folder: Path, prefix: str) -> Iterator[Item | Damaged]:
    try:
        photos = search(folder)
    except OSError as error:
        yield Damaged(folder.name, str(error))
        return
    if not photos:
        raise ValueError(f"{folder}: no image file in this folder")
    for name in sorted(photo.path.relative_to(folder).as_posix() for photo in photos):
        yield Item(prefix + name, partial(_read_file, folder / name))


def _list(path: Path) -> Iterator[Item | Damaged]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no list of names in UTF-8 ({error})") from None
    names = [line.strip() for line in text.splitlines()]
    names = [name for name in names if name and not name.startswith("#")]
    if not names:
        raise ValueError(f"{path}: holds no name of an image")
    for name in names:
        file, given = path.parent / name, PurePath(name)
        # The key names the output, so it must not lead out of the folder of results.
        key = "/".join(part for part in given.parts if part not in (given.anchor, ".."))
        yield Item(key, partial(_read_file, file))


def _read_file(path: Path) -> bytes:
    """Read a file that a list names, or that is in a folder, perhaps as a link."""
    if path.is_fifo() or path.is_char_device():
        raise ValueError(f"{path}: {_ENDLESS}")
    return path.read_bytes()


def _archive(path: Path) -> Iterator[Item | Damaged]:
    """Yield the images of a tar archive, for example a shard of WebDataset."""
    empty = True
    length = path.stat().st_size
    try:
        with tarfile.open(path, "r|") as archive:
            for member in archive:
                # One key for all spellings of a name, as "./a.png": they name one output.
                inner = PurePosixPath(member.name).parts
                key = "/".join((path.name, *(part for part in inner if part not in ("/", "//"))))
                file_or_link = member.isfile() or member.issym() or member.islnk()
                wanted = file_or_link and is_image(member.name) and not _is_hidden(inner)
                # The next header is claimed to be where tarfile would get by reading for ever.
                beyond = archive.offset - tarfile.BLOCKSIZE >= length
                if beyond or member.size < 0 or archive.offset < member.offset_data:
                    how = "truncated" if beyond else "damaged"
                    yield Damaged(key if wanted else path.name, f"the archive is {how}")
                    return
                if not wanted:
                    continue
                empty = False
                if member.issparse():  # a few bytes may stand for any number of zeros
                    yield Damaged(key, "is stored as a sparse file; pack it whole")
                    continue
                if not member.isfile():
                    yield Damaged(key, f"is a link to {member.linkname}; {_PACK}")
                    continue
                if ".." in PureWindowsPath(member.name).parts:  # Windows has two separators
                    yield Damaged(key, "leads out of the archive")
                    continue
                file = archive.extractfile(member)
                assert file is not None
                content = file.read()
                if len(content) < member.size:
                    yield Damaged(key, "the archive is truncated")
                    return
                yield Item(key, io.BytesIO(content).getvalue)
            end = archive.offset
        # tarfile takes any header that it cannot read, except the first, for the end.
        if length % tarfile.BLOCKSIZE:
            yield Damaged(path.name, "the archive is truncated")
        elif not _is_end(path, end):
            yield Damaged(path.name, "the archive is damaged")
        elif empty:
            yield Damaged(path.name, "holds no image")
    except (tarfile.TarError, *_UNREADABLE) as error:
        yield Damaged(path.name, f"a damaged archive ({one_line(error)})")


def _is_end(path: Path, offset: int) -> bool:
    """Return whether an archive ends at a place: with a block of zeros, or with the file."""
    with path.open("rb") as file:
        file.seek(offset)
        return not any(file.read(tarfile.BLOCKSIZE))


def _is_hidden(parts: Sequence[str]) -> bool:
    """Return whether a name is hidden, such as ._a.jpg of macOS; folders skip such files too."""
    return any(part.startswith(".") and part != ".." for part in parts)


def _video(path: Path) -> Iterator[Item | Damaged]:
    """Yield the frames of a file's first video stream."""
    try:
        for index, frame in enumerate(read_frames(path)):
            pixels = frame.pixels
            yield Item(f"{path.name}/{index:06d}", lambda pixels=pixels: pixels)
    except DamagedVideo as error:
        yield Damaged(path.name, str(error))


def content_hash(content: bytes | Any) -> str:
    """Return the SHA-256 of an encoded file, or of a frame's pixels and shape."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(f"{content.shape}".encode() + content.tobytes()).hexdigest()
