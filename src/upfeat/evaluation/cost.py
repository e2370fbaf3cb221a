"""Cost of an upsampler, and how far it changes what the features mean."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.evaluation.data.prepared import Prepared, PreparedSet
from upfeat.evaluation.methods import Method

N_MEASURED = 8
"""Images on which time, memory and drift are measured."""


@torch.no_grad()
def measure(method: Method, images: PreparedSet) -> tuple[dict[str, float | None], float]:
    """Measure a method's passes, time and memory, and how well it keeps the coarse features.

    Args:
        method: to measure.
        images: the first few are taken.

    Returns:
        ``passes`` of the backbone over an image (``None``: many); ``seconds``, the median an image,
        without the pass that makes the coarse features of methods that start from them;
        ``memory_mib``, the most that one image added to the memory in use at any moment of its
        upsampling, the result included (of the process on the CPU, of PyTorch on a GPU; ``None``
        where the system does not tell); and the mean cosine between the upsampled features,
        averaged over each cell, and the coarse ones: 1 means unchanged.
    """
    method = method.fresh()
    passes = None if method.passes is None else float(method.passes)
    seconds, rises, cosines = [], [], []
    for index in range(min(N_MEASURED, len(images))):
        sample = images[index]
        features = sample.features[None]
        upsampled, elapsed, rise = _watched(method, sample)
        seconds.append(elapsed)
        rises.append(rise)
        pooled = F.adaptive_avg_pool2d(upsampled, (features.shape[2], features.shape[3]))
        cosines.append(float(F.cosine_similarity(pooled, features, dim=1).mean()))
        # Its memory would serve the next image, whose need would then not be seen.
        del upsampled
    known = [rise for rise in rises if rise is not None]
    cost = {
        "passes": passes,
        "seconds": median(seconds),
        "memory_mib": max(known) if known else None,
    }
    return cost, sum(cosines) / len(cosines)


def _watched(method: Method, sample: Prepared) -> tuple[Tensor, float, float | None]:
    """The upsampled features, seconds, and the rise of memory in MiB."""
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
    # Less than the result itself cannot be: memory kept for reuse has hidden the need.
    rise = after - before
    credible = rise >= upsampled.numel() * upsampled.element_size() // 2
    return upsampled, elapsed, rise / 2**20 if credible else None


def _reset_peak() -> int | None:
    """Make the peak equal to what the process holds now; return that, bytes (Linux, glibc)."""
    try:
        # Memory that was freed but kept for reuse would hide what the next call needs.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    """A memory figure of this process, bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = (int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    return next((kibibytes * 1024 for kibibytes in found), None)
