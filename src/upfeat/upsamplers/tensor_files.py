"""Reading of tensor files, without running code that they contain."""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")
"""File-name suffixes of checkpoints."""

_MOST_EXPANSION = 20
"""Largest ratio of the unpacked size of an archive to the size of its file."""

UNREADABLE = (
    *(OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, MemoryError, AssertionError, SafetensorError, struct.error, zlib.error),
)
"""Errors that PyTorch raises for damaged files, in addition to ``UnpicklingError``."""


def load_pickled(path: Path) -> dict[str, Any]:
    """Read a dictionary that ``torch.save`` wrote, with tensors and plain values only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file contains other objects (possibly code), is damaged or no checkpoint,
            or contains something other than a dictionary.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    check_archive(path)
    try:
        with warnings.catch_warnings():
            # PyTorch warns of pickle protocols that it does not write, and then reads or refuses
            # the file; the error suffices.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            start = file.read(1)
        if "Unsupported operand" in str(error) and start != pickle.PROTO:  # no pickle at all
            raise ValueError(
                f"{path}: not a PyTorch checkpoint, perhaps a web page or a pointer of Git LFS; "
                "download the file itself"
            ) from None
        # Only the name of the object: PyTorch's message advises to switch its protection off.
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = "" if named is None else f", {named[1][:80]}"
        raise ValueError(
            f"{path}: holds more than tensors{what}, so it was not loaded (it could run code); "
            f"save its state_dict alone with torch.save [{type(error).__name__}]"
        ) from None
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0].partition(". ")[0][:120]
        if isinstance(error, KeyError) or not reason:  # the message is a bare opcode, or empty
            reason = type(error).__name__
        raise ValueError(f"{path}: not a whole PyTorch checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not a dictionary of tensors")
    return content


def check_archive(path: Path) -> None:
    """Check what PyTorch does not check before it reads a file that ``torch.save`` wrote.

    PyTorch writes the parts of a file uncompressed, but reads compressed ones too, and ignores
    their checksums.

    Raises:
        ValueError: the parts unpack to much more than the file, or one has another checksum than
            was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(part.file_size for part in archive.infolist())
            expands = total > _MOST_EXPANSION * path.stat().st_size
            damaged = None if expands else _damaged_part(archive)
    except (*UNREADABLE, zipfile.BadZipFile):  # an older format, or damaged: PyTorch tells
        return
    if expands:
        raise ValueError(
            f"{path}: unpacks to {total:,} bytes from {path.stat().st_size:,}; no checkpoint of "
            "weights does"
        )
    if damaged is not None:
        raise ValueError(f"{path}: damaged: the checksum of its part {damaged} is another")


def _damaged_part(archive: zipfile.ZipFile) -> str | None:
    """Return the name of a part whose content does not have the checksum that was written."""
    for part in archive.infolist():
        if part.CRC:  # 0 if PyTorch was told to write no checksums
            try:
                with archive.open(part) as file:
                    while file.read(2**20):
                        pass
            except zipfile.BadZipFile:
                return part.filename
    return None


def is_safetensors(path: Path) -> bool:
    """Return whether a file is named or begins as safetensors files: 8 bytes, then JSON."""
    if path.suffix.lower() == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{"


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
