"""What an upsampler costs, and whether it changes what the features mean."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from upfeat.backbones import Backbone
from upfeat.evaluation.prepared import PreparedSet, normalised
from upfeat.upsamplers import Upsampler

N_MEASURED = 8
"""Images on which time, memory and drift are measured."""


def measure(
    upsampler: Upsampler, images: PreparedSet, backbone: Backbone
) -> tuple[dict[str, float | None], float]:
    """Upsample all channels of a few images.

    Args:
        upsampler: to measure.
        images: the first few are taken.
        backbone: whose features and normalisation they have.

    Returns:
        ``seconds`` (median per image), ``memory_mib`` (largest rise of the process's peak memory
        during one image, ``None`` where the system does not tell); and the mean cosine between the
        upsampled features, averaged over each cell, and the coarse ones: 1 means unchanged.
    """
    seconds, rises, cosines = [], [], []
    for index in range(min(N_MEASURED, len(images))):
        sample = images[index]
        features, guidance = sample.features[None], normalised(sample.image, backbone)
        before = _reset_peak()
        start = time.perf_counter()
        with torch.no_grad():
            upsampled = upsampler(features, guidance)
        seconds.append(time.perf_counter() - start)
        after = _status("VmHWM")
        if before is not None and after is not None:
            rises.append(max(after - before, 0) / 1024)
        pooled = F.adaptive_avg_pool2d(upsampled, (features.shape[2], features.shape[3]))
        cosines.append(float(F.cosine_similarity(pooled, features, dim=1).mean()))
    cost = {"seconds": median(seconds), "memory_mib": max(rises) if rises else None}
    return cost, sum(cosines) / len(cosines)


def _reset_peak() -> int | None:
    """Make the peak equal to what the process holds now; return that, KiB (Linux, glibc)."""
    try:
        # Memory that was freed but kept for reuse would hide what the next call needs.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    """A memory figure of this process, KiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
