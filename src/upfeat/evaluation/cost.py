"""Cost of a method, and its drift: the change of features averaged back over cells."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.evaluation.data.prepared import Prepared, PreparedSet, normalised
from upfeat.evaluation.methods import Method
from upfeat.linear import unit_vectors

N_MEASURED = 8
"""Images on which time, memory and drift are measured."""


@torch.no_grad()
def measure(method: Method, images: PreparedSet) -> tuple[dict[str, float | None], float]:
    """Measure a method's passes, time, memory and drift.

    Args:
        method: method to measure.
        images: prepared images; only the first ``N_MEASURED`` are used.

    Returns:
        A dictionary of costs, and the drift.

        * ``passes`` of the backbone over an image (``None``: many).
        * ``seconds``, the median time per image. A method that starts from coarse features is timed
          without the pass that computes them.
        * ``total_seconds``, the same with that pass.
        * ``memory_mib``, the peak over all images of the memory, MiB, that upsampling an image
          added, its result included: memory of the process on the CPU, of PyTorch on a GPU;
          ``None`` where the system does not report it.

        The drift is the mean cosine between the coarse features and the upsampled features averaged
        over each cell: 1 means unchanged.
    """
    method = method.fresh()
    passes = None if method.passes is None else float(method.passes)
    seconds, totals, rises, cosines = [], [], [], []
    if passes is not None:  # a first call may take several times as long; a fit is not repeated
        method(images[0]).full()
    for index in range(min(N_MEASURED, len(images))):
        sample = images[index]
        features = sample.features[None]
        upsampled, elapsed, rise = _watched(method, sample)
        seconds.append(elapsed)
        totals.append(elapsed + _seconds_before(method, sample))
        rises.append(rise)
        pooled = F.adaptive_avg_pool2d(upsampled, (features.shape[2], features.shape[3]))
        cosines.append(float((unit_vectors(pooled) * unit_vectors(features)).sum(1).mean()))
        # Otherwise the next image would reuse this memory, and its own need would not be measured.
        del upsampled
    known = [rise for rise in rises if rise is not None]
    cost = {
        "passes": passes,
        "seconds": median(seconds),
        "total_seconds": median(totals),
        "memory_mib": max(known) if known else None,
    }
    return cost, sum(cosines) / len(cosines)


def _seconds_before(method: Method, sample: Prepared) -> float:
    """Time the backbone's pass that a method leaves out, in seconds."""
    if method.before is None:
        return 0.0
    image = normalised(sample.image, method.before)
    on_gpu = image.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    method.before(image)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _watched(method: Method, sample: Prepared) -> tuple[Tensor, float, float | None]:
    """Upsample an image; return its features, the time in seconds and the rise of memory in MiB."""
    device = sample.features.device.type
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _reset_peak() if device == "cpu" else None
    start = time.perf_counter()
    upsampled = method(sample).full()
    if on_gpu:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    after = torch.cuda.max_memory_allocated() if on_gpu else _status("VmHWM")
    if before is None or after is None:
        return upsampled, elapsed, None
    # A rise below the size of the result is not credible: the process reused memory that it held.
    rise = after - before
    credible = rise >= upsampled.numel() * upsampled.element_size() // 2
    return upsampled, elapsed, rise / 2**20 if credible else None


def _reset_peak() -> int | None:
    """Reset the process's peak memory to its current memory; return this, bytes (Linux, glibc)."""
    try:
        # Freed memory is returned to the system, since reuse would hide the need of the next call.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    """Return a field of ``/proc/self/status``, such as VmRSS, in bytes; ``None`` if missing."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = (int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    return next((kibibytes * 1024 for kibibytes in found), None)
