"""Memory and devices of the machine: free memory, and checks that a task fits into it."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from upfeat.bounds import quoted, shown

if TYPE_CHECKING:
    import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
# Control groups of version 1 write "no limit" as a number near 2⁶³; any above this is read as none.
_NO_LIMIT = 1 << 60
DECODING = 40
"""Peak memory of decoding a file to floats, in bytes per pixel, measured."""


def available_memory(device: torch.device | str | None = None) -> int | None:
    """Number of bytes that can be allocated before an allocation fails or the process is killed.

    For the CPU, this is the least of the system's available memory, the remainders of the limits of
    control groups (containers, batch systems; versions 1 and 2), and the remainders of the limits
    of ``ulimit -v`` and ``-d``.

    Args:
        device: device of the memory, such as a GPU; ``None`` for the CPU.

    Returns:
        Number of bytes, at least 0; ``None`` if the system does not provide it.
    """
    kind = str("cpu" if device is None else device).partition(":")[0]
    if kind == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        # Memory that PyTorch has reserved but not allocated to tensors is free for new tensors.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if kind != "cpu":
        return None
    known = [*_system(), *_control_groups(), *_own_limits()]
    return max(min(known), 0) if known else None


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the most precise floating-point type of a device: float64; float32 on MPS."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def find_device(device: torch.device | str | int) -> torch.device:
    """Check that tensors with values can be allocated on a device.

    Raises:
        ValueError: ``device`` is not the name of a device, or the device cannot be used.
    """
    import torch

    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        raise ValueError(f"device={shown(device)} must be the name of one, as cpu or cuda")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, NotImplementedError):  # whose message lists all of PyTorch's devices
            reason = "PyTorch has none here; give cpu"
        raise ValueError(f"device={quoted(device)} cannot be used: {reason[:200]}") from None
    if found.type == "meta":
        raise ValueError('device="meta" cannot be used: tensors have no values there')
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
    """Check that memory suffices to decode an image and compute its features, before either starts.

    Args:
        label: name of the image, for error messages.
        own: (height, width) of the image file, in pixels.
        size: shorter side in pixels to which the image is resized; ``None`` for no resizing.
        a_pixel: bytes needed per pixel of the resized image.
        fixed: bytes needed whatever the size.
        device: device of the features; images are decoded on the CPU.
        free: bytes that may be allocated; ``None`` for the available memory.

    Raises:
        ValueError: memory does not suffice; the message names a size for which it does.
    """
    bound, free = free, available_memory() if free is None else max(free, 0)
    decoding = own[0] * own[1] * DECODING
    if free is not None:
        check_decoding(label, own, free)
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


def check_decoding(label: object, own: tuple[int, int], free: float) -> None:
    """Check that memory suffices to decode an image; see :func:`check_fits`."""
    decoding = own[0] * own[1] * DECODING
    if decoding > 0.9 * free:
        raise ValueError(
            f"{label}: decoding its {own[0]}×{own[1]} pixels needs about {readable(decoding)} and "
            f"{readable(free)} of memory are free; give a smaller size of the image itself"
        )


def resized(own: tuple[int, int], size: int | None) -> tuple[int, int]:
    """(height, width) of an image after its shorter side is resized to ``size`` pixels."""
    if size is None:
        return own
    scale = size / min(own)
    return max(round(own[0] * scale), 1), max(round(own[1] * scale), 1)


def readable(size: float) -> str:
    """Format a number of bytes with a unit, such as "53.8 MB" or "1.2 GB"."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = next((n for n in range(len(units) - 1) if size < 999.5 * 1000**n), len(units) - 1)
    return f"{size / 1000**power:.{1 if power else 0}f} {units[power]}"


def _system() -> Iterator[int]:
    with suppress(OSError, ValueError, IndexError):
        for line in (_PROC / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _control_groups() -> Iterator[int]:
    """Remaining bytes of each memory limit from this process's control group up to the root."""
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
    # In a container the root is often the container's own group, and the path does not exist below.
    parts = [part for part in group.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        folder = root.joinpath(*parts[:depth])
        with suppress(OSError, ValueError):
            allowed = int((folder / limit).read_text())  # "max", no limit, raises ValueError
            if allowed < _NO_LIMIT:
                used = int((folder / usage).read_text())
                yield allowed - used + _cached(folder / "memory.stat", cache)


def _cached(path: Path, name: str) -> int:
    """Number of bytes of cached files, which the system frees when memory is needed."""
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _own_limits() -> Iterator[int]:
    """Remaining bytes of the limits of ``ulimit`` on address space and data."""
    if resource is None:
        return
    limits = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}
    for name, field in limits.items():
        soft, _ = resource.getrlimit(getattr(resource, name))
        used = status(field)
        if soft != resource.RLIM_INFINITY and used is not None:
            yield soft - used


def status(field: str) -> int | None:
    """Read a field of ``/proc/self/status``, such as the process's resident memory.

    Args:
        field: name of the field, such as "VmRSS".

    Returns:
        Number of bytes; ``None`` on systems without ``/proc``.
    """
    with suppress(OSError, ValueError, IndexError):
        for line in (_PROC / "self" / "status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def resident_memory() -> int | None:
    """Resident memory of this process in bytes; ``None`` on systems without ``/proc``."""
    return status("VmRSS")


def release_memory() -> None:
    """Collect garbage, and return freed memory to the system; it may take 0.2 seconds."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Return freed memory to the system, with glibc.

    glibc's allocator keeps memory freed by a thread for that thread, so that a server with many
    threads grows far beyond the memory it uses.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def parse_memory(text: str | int) -> int:
    """Convert an amount of memory to bytes.

    Args:
        text: number of bytes, or a number with a unit, such as "2GB", "500 MB" or "1.5GiB".

    Returns:
        Number of bytes.

    Raises:
        ValueError: ``text`` is not an amount of memory, or is 0.

    Example:
        >>> parse_memory("1.5 GB")
        1500000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", str(text).lower())
    if match is None:
        raise ValueError(f'max_memory={quoted(text)} must be an amount such as "2GB" or "500MiB"')
    amount = int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS.get(match[2], 0))
    if amount < 1:
        raise ValueError(f"max_memory={quoted(text)} must be above 0")
    return amount
