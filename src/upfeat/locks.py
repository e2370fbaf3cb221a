"""Locks on outputs, so that only one process writes an output at a time.

The operating system manages the locks (``flock``, on Windows ``msvcrt``) and releases them when the
process ends, in whatever way; the lock file that a killed process leaves behind locks nothing. The
file contains the process that has the lock and the time, for messages. On file systems without
locks, the file itself counts as a lock, as long as the process that wrote it is alive.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
# Windows locks bytes, which cannot then be read: this byte is far beyond the file's content.
_LOCKED_BYTE = 1 << 30
_held: set[int] = set()


def lock_file(output: Path) -> Path:
    """Path of an output's lock file: ``.lock`` in a folder, ``.NAME.lock`` next to a file NAME.

    Args:
        output: an existing folder, or a file that need not exist.
    """
    return output / ".lock" if output.is_dir() else output.parent / f".{output.name}.lock"


@contextmanager
def hold(output: str | Path) -> Iterator[None]:
    """Lock an output against other threads of this process and other processes of this machine.

    Args:
        output: an existing folder, or a file in an existing folder.

    Raises:
        ValueError: another process, or another thread of this process, has the lock; the message
            names the process.
        OSError: the lock file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, hold(folder):
        ...     (Path(folder) / ".lock").is_file()
        True
    """
    output = Path(output)
    path = lock_file(output)
    handle = _take(path, output)
    _held.add(handle)
    try:
        yield
    finally:
        _held.discard(handle)
        if os.name == "nt":  # no open file can be removed there, neither ours nor the next holder's
            os.close(handle)
            with suppress(OSError):
                path.unlink()
        else:
            # Before the lock is released, lest the file of the next holder be removed.
            if _is_file_of(path, handle):
                with suppress(OSError):
                    path.unlink()
            os.close(handle)


@contextmanager
def hold_folder(folder: str | Path) -> Iterator[None]:
    """Make a folder for results and lock it; afterwards, remove it if it is new and empty.

    Args:
        folder: the folder; its parents are made, and removed, too.

    Raises:
        ValueError: another process has the lock, or the folder cannot be written.
    """
    folder = Path(folder)
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        with hold(folder):
            yield
    except OSError as error:
        if str(error.filename) != str(lock_file(folder)):  # of another file, such as an input
            raise
        raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            for made in missing:
                made.rmdir()


def _take(path: Path, output: Path) -> int:
    """Open the lock file and lock it; return its handle."""
    while True:
        handle = _open(path)
        try:
            if not _is_ours(handle):
                raise _foreign(path)
            locked = _lock(handle)
            if locked is None:
                locked = not _is_alive(_read(handle))
            if not locked:
                raise ValueError(_refusal(output, path, _read(handle)))
            # The previous holder may have removed the file after it was opened here.
            if _is_file_of(path, handle):
                _write(handle, path)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _open(path: Path) -> int:
    """Open or create a lock file, but no file behind a link, since its content is replaced.

    Raises:
        ValueError: the path is a link, or is no file.
        OSError: the file cannot be opened.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise _foreign(path)
    # Not followed either if it becomes a link now. Windows has no such flag.
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _foreign(path: Path) -> ValueError:
    return ValueError(f"{path}: is no lock file of upfeat; remove it, or give another output")


def _is_ours(handle: int) -> bool:
    """Return whether an open file is empty, or contains what a holder writes."""
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        content = os.read(handle, 4096)
    except OSError:  # locked, on Windows
        return True
    return not content or content.startswith(b"{")


def _lock(handle: int) -> bool | None:
    """Lock an open file without waiting.

    Returns:
        ``False`` if another process has the lock, ``None`` if the file system has no locks.
    """
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif sys.platform == "win32":
            import msvcrt

            os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            return None
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


def _is_file_of(path: Path, handle: int) -> bool:
    """Return whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _write(handle: int, path: Path) -> None:
    """Write this process and the time to the lock file; remove the file if the disk is full."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    content = json.dumps(holder).encode()
    try:
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        if os.write(handle, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def _read(handle: int) -> dict[str, Any]:
    """Read the process and the time from the lock file; empty if it contains none."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        holder = json.loads(os.read(handle, 4096))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Return whether the lock's process is alive; one that cannot be checked counts as alive."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid < 1:
        return False
    if holder.get("host") != socket.gethostname() or os.name == "nt":
        return True  # on Windows, os.kill would send a signal instead of checking
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _refusal(output: Path, path: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if {"pid", "host", "since"} <= set(holder):
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        if holder["host"] != socket.gethostname() or os.name == "nt":
            who += f" (if it is gone, remove {path})"
    return f"{output}: is being written by {who}; wait for it, or give another output"


def _close_in_child() -> None:
    """Close inherited lock files in a forked child, which may outlive a killed parent."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
