"""Locks on what is being written: held by one process, let go by its end, however it ends.

The operating system keeps them (``flock``, on Windows ``msvcrt``), so a killed holder leaves a file
that locks nothing. What the file says, who holds it and since when, is for the message alone. On
file systems without such locks the file's existence counts instead, as long as its writer lives.
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
# Windows locks bytes, and what is locked cannot be read: far past what the file says.
_LOCKED_BYTE = 1 << 30
_held: set[int] = set()


def lock_file(output: Path) -> Path:
    """Path of the lock of an output: ``.lock`` in a folder, ``.NAME.lock`` beside a file.

    Args:
        output: a folder that exists, or a file that may not.
    """
    return output / ".lock" if output.is_dir() else output.parent / f".{output.name}.lock"


@contextmanager
def hold(output: str | Path) -> Iterator[None]:
    """Be the only one to write an output, in this process and among all of this machine.

    Args:
        output: a folder that exists, or a file in one.

    Raises:
        ValueError: another process, or another thread of this one, holds it; the message says who.
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
        # While it is still held, so that nobody's newer file is removed. Windows removes no open
        # file: there it stays, and locks nothing.
        if _is_file_of(path, handle):
            with suppress(OSError):
                path.unlink()
        os.close(handle)


@contextmanager
def hold_folder(folder: str | Path) -> Iterator[None]:
    """Make a folder and be the only one to write it; gone after if nothing is in it.

    Args:
        folder: that results go to.

    Raises:
        ValueError: another process holds it, or it cannot be written.
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
    except PermissionError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            for made in missing:
                made.rmdir()


def _take(path: Path, output: Path) -> int:
    """Open the lock file and lock it; return its handle."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock(handle)
            if locked is None:
                locked = not _is_alive(_read(handle))
            if not locked:
                raise ValueError(_refusal(output, path, _read(handle)))
            # The holder before may have removed the file between our opening and our locking.
            if _is_file_of(path, handle):
                _write(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Lock without waiting: ``False`` if another holds it, ``None`` if the system has no locks."""
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


def _write(handle: int) -> None:
    """Say who holds the lock."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(holder).encode())


def _read(handle: int) -> dict[str, Any]:
    """Describe the holder of the lock, as far as the file says."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        holder = json.loads(os.read(handle, 4096))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Return whether a lock file's writer still runs; one on another machine counts as running."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid < 1:
        return False
    if holder.get("host") != socket.gethostname():
        return True
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
        if holder["host"] != socket.gethostname():
            who += f" (if it is gone, remove {path})"
    return f"{output}: is being written by {who}; wait for it, or give another output"


def _close_in_child() -> None:
    """Let a forked child hold nothing: workers that outlive a killed parent would lock on."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
