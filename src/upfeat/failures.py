"""Classification of errors: errors caused by a file, the disk or the memory, and program faults.

After an error of the first kind, a batch continues and a command prints one line. Any other error
is a fault of the program and keeps its traceback. No other module makes this distinction.
"""

from __future__ import annotations

import re
import struct
import zlib

from PIL import Image
from safetensors import SafetensorError

from upfeat.machine import readable

_FAILURES = (
    OSError,
    ValueError,
    EOFError,
    SyntaxError,  # Pillow's, for damaged PNG files
    struct.error,
    zlib.error,
    SafetensorError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# PyTorch raises RuntimeError if an allocation fails; only the message identifies it.
_ALLOCATOR = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad_alloc|"
    r"Storage size calculation overflowed|Invalid buffer size",
    re.IGNORECASE,
)
_TRIED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")


def failure_reason(error: BaseException) -> str | None:
    """One-line message for an error caused by a file, the disk or the memory.

    Args:
        error: any exception.

    Returns:
        The line; ``None`` for a fault of the program, which the caller should raise again.
    """
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _ALLOCATOR.search(str(error))
    ):
        return f"not enough memory{_tried(str(error))}; give a smaller size"
    return one_line(error) if isinstance(error, _FAILURES) else None


def one_line(error: BaseException) -> str:
    """Message of an error without line breaks; for a system error, with the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """First line of a library's message, at most 200 characters; the class if it is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _tried(text: str) -> str:
    found = _TRIED.search(text)
    if found is None:
        return ""
    amount, _, unit = found[1].partition(" ")
    shown = readable(float(amount)) if unit == "bytes" else found[1].rstrip(".")
    return f" (tried to allocate {shown})"
