"""Files on disk: written whole or not at all, equal bytes for equal content, swept after a kill.

What is being written lies under a hidden name of its own beside its destination, locked for as long
as its writer lives; what no writer holds any more is removed by the next one (:func:`sweep`).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TEMPORARY = re.compile(r"\.upfeat-(\d+)-[a-z0-9_]+(\.\w+)?")
# Without locks, only age tells a killed writer's file from a slow one's.
_ABANDONED_SECONDS = 24 * 3600
# Between the making of a file and its locking; a process of the same number may be another by now.
_UNLOCKED_SECONDS = 60

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# One NumPy never writes for an array of three axes (128 bytes): the mark of our own .npy files,
# which every reader takes for padding.
_NPY_HEADER = 1088

# Below this, asking the system for space costs more than the writing that it would save.
_RESERVED = 1 << 20

_open_handles: set[int] = set()
_MASK = threading.Lock()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; rename it into place on success.

    A reader sees the old file or the new one, never a part; a failure leaves the old one and no
    temporary behind.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        OSError: writing failed; the error names ``path``, not the temporary.
    """
    if path.is_dir():  # known before the work, not at its end
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with _naming(path), _temporary(path, folder=False) as temporary:
        yield temporary
        # mkstemp makes files private; a result gets the permissions any new file would.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; put it in the place of ``path`` on success.

    Raises:
        OSError: as :func:`replacing`.
    """
    with _naming(path), _temporary(path, folder=True) as temporary:
        inside = temporary / "new"
        yield inside
        if path.is_dir() and not path.is_symlink():
            # A folder cannot be renamed over another: for a moment there is none.
            path.rename(temporary / "old")
        inside.rename(path)


@contextmanager
def _temporary(path: Path, *, folder: bool) -> Iterator[Path]:
    """A hidden file or folder beside ``path``, locked, and gone afterwards."""
    prefix = f".upfeat-{os.getpid()}-"
    suffix = path.suffix if re.fullmatch(r"\.\w{1,16}", path.suffix) else ""
    if folder:
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
        handle = os.open(temporary, os.O_RDONLY) if fcntl is not None else None
    else:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=suffix)
        temporary = Path(name)
    try:
        if handle is not None:
            _lock(handle)
            _open_handles.add(handle)
            if os.name == "nt":
                _close(handle)  # Windows renames no open file
                handle = None
        yield temporary
    finally:
        if handle is not None:
            _close(handle)
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let system errors about a temporary, or about nothing, speak of ``path``."""
    try:
        yield
    except OSError as error:
        about = "" if error.filename is None else os.fsdecode(error.filename)
        if error.errno is None or (about and not _TEMPORARY.search(about)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def sweep(folder: Path) -> None:
    """Remove what killed processes were writing to a folder.

    Only names that this module gives are looked at, and of those only what no process holds.

    Args:
        folder: looked through without the folders below it; it need not exist.
    """
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            match = _TEMPORARY.fullmatch(entry.name)
            if match is not None:
                with suppress(OSError):
                    _remove_stale(Path(entry.path), int(match[1]))


def _remove_stale(path: Path, pid: int) -> None:
    if path.is_symlink():
        return
    age = time.time() - path.stat().st_mtime
    handle = os.open(path, os.O_RDONLY) if fcntl is not None else None
    try:
        locked = _lock(handle) if handle is not None else None
        if locked is None and age < _ABANDONED_SECONDS:
            return
        if locked is False or (_is_alive(pid) and age < _UNLOCKED_SECONDS):
            return
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int) -> bool | None:
    """Lock without waiting: ``False`` if another holds it, ``None`` if there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_alive(pid: int) -> bool:
    if os.name == "nt":
        return False  # there, asking would be a signal
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _close(handle: int) -> None:
    _open_handles.discard(handle)
    os.close(handle)


def _close_in_child() -> None:
    """Let a forked child hold nothing: one that outlives a killed parent would lock on."""
    for handle in list(_open_handles):
        with suppress(OSError):
            os.close(handle)
    _open_handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        _reserve(file, len(content))
        file.write(content)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and string metadata as one safetensors file, atomically.

    Equal content gives equal bytes (the safetensors library shuffles its metadata).

    Args:
        path: the file.
        tensors: name to tensor, on any device.
        metadata: name to string.

    Raises:
        ValueError: a tensor is of a type that the format does not know.
        OSError: writing failed.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{path}: {name} is {tensor.dtype}, which safetensors cannot hold")
    # Wide types first, as the safetensors library does: every tensor is then aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    sizes = [tensor.numel() * tensor.dtype.itemsize for _, tensor in ordered]
    kinds = [(name, _DTYPES[tensor.dtype], list(tensor.shape)) for name, tensor in ordered]
    header = _header(kinds, sizes, metadata)
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        _reserve(file, len(header) + sum(sizes))
        file.write(header)
        for _, tensor in ordered:
            file.write(_bytes(tensor))


def _header(
    kinds: Sequence[tuple[str, str, list[int]]], sizes: Sequence[int], metadata: dict[str, str]
) -> bytes:
    """The length and the JSON at the start of a safetensors file."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for (name, dtype, shape), size in zip(kinds, sizes, strict=True):
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    # Half of a pair of surrogates, as in names that no encoding allows, is no JSON elsewhere.
    content = text.encode("utf-8", "replace")
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


class ArrayFile:
    """A (C, H, W) array in a file, filled some rows at a time by plain writes.

    Not mapped into memory: a disk that fills up under a mapping kills the process.
    """

    def __init__(self, file: IO[bytes], header: bytes, shape: Sequence[int], itemsize: int) -> None:
        """Reserve the space, all of it, and write the header."""
        self._file, self._start = file, len(header)
        self._shape, self._itemsize = shape, itemsize
        _reserve(file, len(header) + int(np.prod(shape)) * itemsize)
        file.write(header)

    def write_rows(self, top: int, values: NDArray[Any]) -> None:
        """Write rows from ``top`` on, (C, rows, W)."""
        _, height, width = self._shape
        for channel, rows in enumerate(values):
            place = (channel * height + top) * width
            self._file.seek(self._start + place * self._itemsize)
            self._file.write(np.ascontiguousarray(rows).data)


@contextmanager
def create_array(
    path: Path, shape: Sequence[int], dtype: str, metadata: dict[str, str]
) -> Iterator[ArrayFile]:
    """Create a file for an array (C, H, W): it appears, whole, when the block ends.

    Args:
        path: ``.npy``, or else a safetensors file of one tensor, ``features``.
        shape: (C, H, W).
        dtype: "float16", "float32", or of a safetensors file "bfloat16", whose rows are written as
            int16 of the same bits.
        metadata: of the safetensors file.

    Raises:
        OSError: there is no space for it, or writing failed.
    """
    kind = np.dtype("int16" if dtype == "bfloat16" else dtype).newbyteorder("<")
    size = int(np.prod(shape)) * kind.itemsize
    if path.suffix.lower() == ".npy":
        header = _npy_header(shape, kind.str)
    else:
        name = _DTYPES[getattr(torch, dtype)]
        header = _header([("features", name, list(shape))], [size], metadata)
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield ArrayFile(file, header, shape, kind.itemsize)


def _npy_header(shape: Sequence[int], dtype: str) -> bytes:
    """Of version 1.0, padded to the length by which :func:`is_our_npy` knows it again."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    content = text.encode().ljust(_NPY_HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content


def is_our_npy(path: Path) -> bool:
    """Return whether a ``.npy`` file has the header that :func:`create_array` writes."""
    with path.open("rb") as file:
        start = file.read(_NPY_HEADER)
    length = (_NPY_HEADER - 10).to_bytes(2, "little")
    whole = len(start) == _NPY_HEADER and start.endswith(b" \n")
    return whole and start.startswith(b"\x93NUMPY\x01\x00" + length)


def _reserve(file: IO[bytes], size: int) -> None:
    """Take the space for a file at once, where the system can: a full disk is known before work.

    Raises:
        OSError: there is no such space.
    """
    if size < _RESERVED or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV):
            raise


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


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file, even of one that is cut off after its header.

    Raises:
        OSError: it cannot be read.
        ValueError: it does not start as such a file does.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # The limit of the format: a stranger's file says any number here.
        content = file.read(min(length, 100_000_000)) if 2 <= length <= 100_000_000 else b""
    try:
        found = json.loads(content).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{path}: not a safetensors file") from None
    return found if isinstance(found, dict) else {}


def _umask() -> int:
    # The only way to read the mask is to set it; of two threads that do, one would leave it at 0.
    with _MASK:
        mask = os.umask(0)
        os.umask(mask)
    return mask
