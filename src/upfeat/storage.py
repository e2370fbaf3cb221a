"""Tensors on disk: safetensors, written whole or not at all, read without running any code."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; rename it into place on success.

    A reader sees the old file or the new one, never a part; a failure leaves the old one and no
    temporary behind.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        PermissionError: the folder cannot be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; a result gets the permissions any new file would.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and string metadata as one safetensors file, atomically.

    Args:
        path: the file.
        tensors: name to tensor; contiguous, on any device.
        metadata: name to string.
    """
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Args:
        path: the file.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file, or a truncated one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def _umask() -> int:
    # The only way to read the mask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
