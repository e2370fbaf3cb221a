"""Files on disk: written completely or not at all, with equal bytes for equal content.

While a file is written, it has a temporary hidden name in the destination's folder, and a lock of
the process that writes it. Temporary files of killed processes, whose locks the system has
released, are removed by the next process that writes to the folder (:func:`sweep`).
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
from typing import IO, Any

import torch
from torch import Tensor

from upfeat.bounds import path_of
from upfeat.tensor_checks import opened_tensors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TEMPORARY = re.compile(r"\.upfeat-(\d+)-[a-z0-9_]+(\.\w+)?")
# Without locks, a temporary file of this age counts as that of a killed process.
_ABANDONED_SECONDS = 24 * 3600
# A younger temporary file may be not yet locked, if the process in its name is alive; an older one
# may be that of an earlier process of the same number.
_UNLOCKED_SECONDS = 60

DTYPES = {
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
"""Types that safetensors files can hold, with their names in the files."""
# Bytes below which reserving disk space costs more time than it saves.
_RESERVED = 1 << 20

_open_handles: set[int] = set()
_MASK = threading.Lock()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context that gives a temporary path to write to, and renames it to ``path`` on success.

    A reader sees either the old file or the complete new one. After a failure, the old file is
    unchanged and the temporary file is removed.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        OSError: ``path`` is a device or a pipe, or writing failed; the error names ``path``, not
            the temporary.
    """
    if path.is_dir():  # fail now rather than after the content is computed
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # root can rename a file over /dev/null
        reason = "Is a device or a pipe, which a file would replace; give the path of a file"
        raise OSError(errno.EINVAL, reason, str(path))
    with naming(path), _temporary(path, folder=False) as temporary:
        yield temporary
        # mkstemp makes files private; give the result the permissions of any new file.
        temporary.chmod(0o666 & ~_umask())
        move(temporary, path)


def move(source: Path, target: Path) -> None:
    """Rename a file over an existing one, or a folder to a free name.

    Windows renames nothing that is open in any program. Virus scanners open new files for a moment,
    so the attempt is repeated there for a second.

    Raises:
        OSError: it cannot be renamed.
    """
    for left in reversed(range(20 if os.name == "nt" else 1)):
        try:
            source.replace(target)
            return
        except PermissionError as error:  # noqa: PERF203
            if os.name != "nt":
                raise
            if not left:
                reason = f"{error.strerror} (is it open in another program?)"
                raise PermissionError(error.errno, reason, str(target)) from None
            time.sleep(0.05)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Context that gives a temporary folder to fill, and renames it to ``path`` on success.

    Raises:
        OSError: writing failed; see :func:`replacing`.
    """
    with naming(path), _temporary(path, folder=True) as temporary:
        inside = temporary / "new"
        yield inside
        if path.is_dir() and not path.is_symlink():
            # A folder cannot replace another atomically: for a moment ``path`` does not exist.
            move(path, temporary / "old")
        try:
            move(inside, path)
        except BaseException:
            if (temporary / "old").exists():
                move(temporary / "old", path)
            raise


@contextmanager
def _temporary(path: Path, *, folder: bool) -> Iterator[Path]:
    """Context with a locked hidden file or folder next to ``path``, which is removed afterwards."""
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


def check_writable(folder: Path, name: Path) -> None:
    """Check that files can be made in a folder, by a temporary one.

    Args:
        folder: the folder.
        name: path for the error to name.

    Raises:
        OSError: no file can be made there.
    """
    try:
        with _temporary(folder / "trial", folder=False):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(name)) from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context in which system errors about a temporary file, or without a file, name ``path``."""
    try:
        yield
    except OSError as error:
        about = "" if error.filename is None else os.fsdecode(error.filename)
        if error.errno is None or (about and not _TEMPORARY.search(about)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def sweep(folder: Path) -> None:
    """Remove temporary files that killed processes left in a folder.

    Only files with a temporary name of this module are removed, and only if no process has their
    lock.

    Args:
        folder: the folder, which need not exist; its subfolders are not searched.
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
    """Lock an open file without waiting.

    Returns:
        ``False`` if another process has the lock, ``None`` if the system has no locks.
    """
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
        return False  # on Windows, os.kill would send a signal instead of checking
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
    """Close inherited temporary files in a forked child, which may outlive a killed parent."""
    for handle in list(_open_handles):
        with suppress(OSError):
            os.close(handle)
    _open_handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically; see :func:`replacing`."""
    with replacing(path_of("path", path)) as temporary, temporary.open("wb") as file:
        reserve(file, len(content))
        file.write(content)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and string metadata as one safetensors file, atomically.

    Equal content gives equal bytes. (The safetensors library writes metadata in random order.)

    Args:
        path: the safetensors file.
        tensors: tensors by name, on any device.
        metadata: strings by name.

    Raises:
        ValueError: the format does not support the data type of a tensor.
        OSError: writing failed.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is {tensor.dtype}, which safetensors cannot hold")
    # Wide types first, as in files of the safetensors library, so that all tensors are aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    sizes = [tensor.numel() * tensor.dtype.itemsize for _, tensor in ordered]
    kinds = [(name, DTYPES[tensor.dtype], list(tensor.shape)) for name, tensor in ordered]
    header = tensor_header(kinds, sizes, metadata)
    with replacing(path_of("path", path)) as temporary, temporary.open("wb") as file:
        reserve(file, len(header) + sum(sizes))
        file.write(header)
        for _, tensor in ordered:
            file.write(_bytes(tensor))


def tensor_header(
    kinds: Sequence[tuple[str, str, list[int]]], sizes: Sequence[int], metadata: dict[str, str]
) -> bytes:
    """Encode the start of a safetensors file: the length of the header, and the header as JSON."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for (name, dtype, shape), size in zip(kinds, sizes, strict=True):
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    # Replace lone surrogates, which names of undecodable files contain: UTF-8 cannot encode them.
    content = text.encode("utf-8", "replace")
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def reserve(file: IO[bytes], size: int) -> None:
    """Reserve the disk space of a file, where supported, so that a full disk fails immediately.

    Raises:
        OSError: the disk has too little space.
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
        path: the safetensors file.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a safetensors file, or is truncated.
    """
    with opened_tensors(path) as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
        if os.name == "nt":  # a file that tensors are mapped to cannot be replaced there
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        return tensors, file.metadata() or {}


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file, even if the file is truncated after its header.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file does not start with a safetensors header.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # The format's limit of the header; an untrusted file may contain any length.
        content = file.read(min(length, 100_000_000)) if 2 <= length <= 100_000_000 else b""
    try:
        found = json.loads(content).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{path}: not a safetensors file") from None
    return found if isinstance(found, dict) else {}


def _umask() -> int:
    # The mask can be read only by setting it; without the lock, two threads could leave it at 0.
    with _MASK:
        mask = os.umask(0)
        os.umask(mask)
    return mask
