"""The machine: how much memory new data may take, and whether a task fits."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from upfeat.bounds import shown

if TYPE_CHECKING:
    import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
# Beyond this a limit of version 1 means none: it is written as the largest number there is.
_NO_LIMIT = 1 << 60
DECODING = 40
"""Bytes a pixel while a file is decoded to floats, measured."""


def available_memory(device: torch.device | str | None = None) -> int | None:
    """Bytes of memory that new data may take before something fails or the system kills.

    The least of what the system has available, what the limits of the control groups leave
    (containers, batch systems; versions 1 and 2), and what ``ulimit -v`` and ``-d`` leave.

    Args:
        device: a GPU, whose own memory is asked for then; ``None`` for the CPU.

    Returns:
        Bytes, at least 0; ``None`` where the system does not tell.
    """
    kind = str("cpu" if device is None else device).partition(":")[0]
    if kind == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch keeps for reuse is taken, but not by anything.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if kind != "cpu":
        return None
    known = [*_system(), *_control_groups(), *_own_limits()]
    return max(min(known), 0) if known else None


def find_device(device: torch.device | str | int) -> torch.device:
    """Check that tensors can be put on a device.

    Raises:
        ValueError: they cannot, or it is no name of one.
    """
    import torch

    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        raise ValueError(f"device={shown(device)} must be the name of one, as cpu or cuda")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f'device="{device}" cannot be used: {reason}') from None
    return found


def check_fits(
    label: object,
    own: tuple[int, int],
    size: int | None,
    a_pixel: float,
    *,
    fixed: int = 0,
    device: torch.device | str | None = None,
    free: float | None = None,
) -> None:
    """Refuse an image whose decoding and features would not fit, before either is begun.

    Args:
        label: what errors call the image.
        own: its (height, width).
        size: the shorter side it is brought to; ``None`` for its own.
        a_pixel: bytes that the work takes for each pixel of that.
        fixed: bytes that it takes besides.
        device: where the work is done; images are decoded by the CPU.
        free: bytes that may be taken; ``None`` for what the machine has.

    Raises:
        ValueError: it would not fit; the message says what size would.
    """
    bound, free = free, available_memory() if free is None else max(free, 0)
    decoding = own[0] * own[1] * DECODING
    if free is not None and decoding > 0.9 * free:
        raise ValueError(
            f"{label}: decoding its {own[0]}×{own[1]} pixels needs about {readable(decoding)} and "
            f"{readable(free)} of memory are free; give a smaller size of the image itself"
        )
    if device is not None and not str(device).startswith("cpu"):
        free, decoding = available_memory(device) if bound is None else bound, 0
    height, width = resized(own, size)
    work = height * width * a_pixel
    needed = decoding + fixed + work
    if free is None or needed <= free:
        return
    share = max(0.9 * free - decoding - fixed, 0) / work
    fitting = int(share**0.5 * min(height, width))
    advice = f", at most about {fitting}" if fitting >= 1 else ""
    raise ValueError(
        f"{label}: {height}×{width} pixels need about {readable(needed)} and {readable(free)} of "
        f"memory are free; give a smaller size{advice}"
    )


def resized(own: tuple[int, int], size: int | None) -> tuple[int, int]:
    """(height, width) of an image whose shorter side is brought to ``size`` pixels."""
    if size is None:
        return own
    scale = size / min(own)
    return max(round(own[0] * scale), 1), max(round(own[1] * scale), 1)


def readable(size: float) -> str:
    """Bytes as people write them: "53.8 MB", "1.2 GB"."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = next((n for n in range(len(units) - 1) if size < 999.5 * 1000**n), len(units) - 1)
    return f"{size / 1000**power:.{1 if power else 0}f} {units[power]}"


def _system() -> Iterator[int]:
    with suppress(OSError, ValueError, IndexError):
        for line in (_PROC / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _control_groups() -> Iterator[int]:
    """Bytes that each limit on the way from this process's group to the root leaves."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            yield from _left(_CGROUPS, group, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _left(_CGROUPS / "memory", group, *names)


def _left(root: Path, group: str, limit: str, usage: str, cache: str) -> Iterator[int]:
    # In a container the root is often its own group, and the path below it not there.
    parts = [part for part in group.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        folder = root.joinpath(*parts[:depth])
        with suppress(OSError, ValueError):
            allowed = int((folder / limit).read_text())  # "max" is none
            if allowed < _NO_LIMIT:
                used = int((folder / usage).read_text())
                yield allowed - used + _cached(folder / "memory.stat", cache)


def _cached(path: Path, name: str) -> int:
    """Bytes of files kept in memory, which the system gives up when memory is asked for."""
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _own_limits() -> Iterator[int]:
    """Bytes that ``ulimit`` leaves of address space and of data."""
    if resource is None:
        return
    limits = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}
    for name, field in limits.items():
        soft, _ = resource.getrlimit(getattr(resource, name))
        used = status(field)
        if soft != resource.RLIM_INFINITY and used is not None:
            yield soft - used


def status(field: str) -> int | None:
    """A memory figure of this process from ``/proc/self/status``, bytes.

    Args:
        field: such as "VmRSS".

    Returns:
        ``None`` where the system does not tell.
    """
    with suppress(OSError, ValueError, IndexError):
        for line in (_PROC / "self" / "status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def resident_memory() -> int | None:
    """Bytes of memory that this process holds; ``None`` where the system does not tell."""
    return status("VmRSS")


def release_memory() -> None:
    """Give memory that is no longer used back to the system (glibc; elsewhere it is collected).

    The allocator keeps what each thread has freed for that thread alone, so a server whose threads
    take turns grows by far more than it holds.
    """
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def parse_memory(text: str | int) -> int:
    """Read an amount of memory.

    Args:
        text: bytes, or a number with a unit: "2GB", "500 MB", "1.5GiB".

    Returns:
        Bytes.

    Raises:
        ValueError: it is no such amount.

    Example:
        >>> parse_memory("1.5 GB")
        1500000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", str(text).lower())
    if match is None:
        raise ValueError(f'max_memory="{text}" must be an amount such as "2GB" or "500MiB"')
    amount = int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS.get(match[2], 0))
    if amount < 1:
        raise ValueError(f'max_memory="{text}" must be above 0')
    return amount
