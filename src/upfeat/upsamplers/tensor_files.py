"""Reading of tensor files, without running code that they contain."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")
"""File-name suffixes of checkpoints."""

UNREADABLE = (
    *(OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, MemoryError, AssertionError),
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
    try:
        with warnings.catch_warnings():
            # PyTorch warns of pickle protocols that it does not write, and then reads or refuses
            # the file; the error suffices.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Only its first line: PyTorch's message goes on to advise to switch its protection off.
        reason = str(error).partition("\n")[0].partition("WeightsUnpickler error")[0].strip()
        raise ValueError(
            f"{path}: holds more than tensors, so it was not loaded (it could run code); save its "
            f"state_dict alone with torch.save [{type(error).__name__}: {reason[:80]}]"
        ) from None
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0].partition(". ")[0][:120]
        if isinstance(error, KeyError) or not reason:  # the message is a bare opcode, or empty
            reason = type(error).__name__
        raise ValueError(f"{path}: not a whole PyTorch checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not a dictionary of tensors")
    return content


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors files do: an 8-byte length, then JSON."""
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
