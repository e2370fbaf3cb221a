"""Files of tensors, read without running anything that is in them."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")
"""Endings of the names of checkpoint files."""

UNREADABLE = (
    *(OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, MemoryError, AssertionError),
)
"""Errors that PyTorch raises of damaged files, beside ``UnpicklingError``."""


def load_pickled(path: Path) -> dict[str, Any]:
    """Read what ``torch.save`` wrote, tensors and plain values only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds more than tensors (code, perhaps), is no checkpoint or not a whole one,
            or holds something other than a dictionary.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            # A pickle of another protocol than PyTorch writes is refused or read, as it deserves.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's message goes on for lines with advice to switch its protection off.
        reason = str(error).partition("\n")[0].partition("WeightsUnpickler error")[0].strip()
        raise ValueError(
            f"{path}: holds more than tensors, so it was not loaded (it could run code); save its "
            f"state_dict alone with torch.save [{type(error).__name__}: {reason[:80]}]"
        ) from None
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0].partition(". ")[0][:120]
        if isinstance(error, KeyError) or not reason:  # a byte that it has no name for, or nothing
            reason = type(error).__name__
        raise ValueError(f"{path}: not a whole PyTorch checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not a dictionary of tensors")
    return content


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do: a length, then an object."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{"


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
