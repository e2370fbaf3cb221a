"""Speed of the operators and the JBU stack compared with plain PyTorch, within one run.

Every rival but ``bilinear`` computes the same numbers from the same weights:

* ``unfold``: copies of the features for every tap, then an einsum;
* ``pixel_major``: one multiply-add per tap, over weights with the layout (H, W, taps);
* ``tap_major``: one multiply-add per tap, over weights with the layout (taps, H, W); this is the
  library's ``eager`` backend;
* ``bilinear``: bilinear interpolation alone, which no filter can be expected to beat.

Rivals compute the filters with eager PyTorch. Like the library, they mix the channels on the coarse
grid.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat import functional
from upfeat._version import __version__
from upfeat.environment import describe
from upfeat.geometry import reflect_pad
from upfeat.upsamplers import JBUStack
from upfeat.upsamplers.jbu import JBUStage, stage_sizes

SIZES = ((14, 224), (28, 448), (64, 1024))
CHANNELS = (64, 384, 1024)
JOBS = ("stack", "operator", "operator+backward")
RIVALS = ("ours", "tap_major", "pixel_major", "unfold", "bilinear")
_TAPS = 49
FORMAT = "upfeat-bench-1"
"""Name of the format, in every file of measurements."""


@dataclass(frozen=True)
class Measurement:
    """Time and memory of one rival at one job and size."""

    job: str
    grid: int
    size: int
    channels: int
    rival: str
    seconds: float | None
    """Median of the repeats, in seconds; ``None`` if the rival was skipped."""
    spread: float | None
    """Largest minus smallest of the repeats, in seconds."""
    peak_bytes: int | None
    """Peak memory during one call less the memory in use before it; Linux only."""
    skipped: str | None = None
    """Reason for skipping the rival."""


def run_benchmark(
    *,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    channels: tuple[int, ...] = CHANNELS,
    jobs: tuple[str, ...] = JOBS,
    rivals: tuple[str, ...] = RIVALS,
    repeats: int = 7,
    memory_limit: int = 8 * 2**30,
    report: Callable[[Measurement], None] | None = None,
) -> list[Measurement]:
    """Measure time and memory of every job, size and rival that fits in memory.

    Args:
        sizes: pairs of the side of the square grid, in cells, and the side of the square output, in
            pixels.
        channels: numbers of feature channels.
        jobs: jobs to measure, from :data:`JOBS`.
        rivals: rivals to measure, from :data:`RIVALS`.
        repeats: number of timed calls, after one call to warm up; if the first takes more than two
            seconds, it is the only one.
        memory_limit: limit in bytes; a rival that would need more is skipped.
        report: function that is called with every measurement; ``None`` for none.
    """
    found = []
    for job in jobs:
        for grid, size in sizes:
            for width in channels:
                for rival in rivals:
                    one = _measure(job, grid, size, width, rival, repeats, memory_limit)
                    found.append(one)
                    if report is not None:
                        report(one)
    return found


def machine() -> dict[str, Any]:
    """Versions and properties of this machine that measurements depend on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "upfeat": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "kernels": describe()["kernels"],
    }


def as_json(measurements: list[Measurement]) -> dict[str, Any]:
    """Machine and measurements as JSON values."""
    return {
        "format": FORMAT,
        "machine": machine(),
        "measurements": [asdict(one) for one in measurements],
    }


def _measure(
    job: str, grid: int, size: int, channels: int, rival: str, repeats: int, memory_limit: int
) -> Measurement:
    needed = _needed_bytes(job, size, channels, rival)
    if needed > memory_limit:
        reason = f"needs about {needed / 2**30:.0f} GiB"
        return Measurement(job, grid, size, channels, rival, None, None, None, reason)
    gc.collect()
    call = _job(job, grid, size, channels, rival)
    peak = peak_memory(call)  # also the call that warms up
    times: list[float] = []
    while len(times) < repeats and not (times and times[0] > 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    spread = max(times) - min(times)
    return Measurement(job, grid, size, channels, rival, statistics.median(times), spread, peak)


def _needed_bytes(job: str, size: int, channels: int, rival: str) -> int:
    output = 4 * size * size * channels
    filters = 4 * size * size * _TAPS
    copies = {"unfold": 2 * _TAPS + 3, "tap_major": 4, "pixel_major": 4}.get(rival, 1.6)
    # For rivals with one multiply-add per tap, autograd keeps a window and a product of each tap.
    if job == "operator+backward":
        copies = copies * 2 if rival == "unfold" else {"ours": 4, "bilinear": 3}.get(rival, 60)
    return int(output * copies + 3 * filters)


def _job(job: str, grid: int, size: int, channels: int, rival: str) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    if job == "stack":
        features = torch.randn(1, channels, grid, grid, generator=generator)
        guidance = torch.randn(1, 3, size, size, generator=generator)
        stack = JBUStack(channels).eval().requires_grad_(False)
        return lambda: _stack(stack, features, guidance, rival)
    features = torch.randn(1, channels, size // 2, size // 2, generator=generator)
    weights = torch.rand(1, _TAPS, size, size, generator=generator)
    if job == "operator":
        return torch.no_grad()(lambda: _upsample(features, weights, rival))
    features.requires_grad_()
    weights.requires_grad_()
    grad = torch.randn(1, channels, size, size, generator=generator)

    def forward_and_backward() -> None:
        inputs = [features] if rival == "bilinear" else [features, weights]
        torch.autograd.grad(_upsample(features, weights, rival), inputs, grad)

    return forward_and_backward


@torch.no_grad()
def _stack(stack: JBUStack, features: Tensor, guidance: Tensor, rival: str) -> Tensor:
    size = (guidance.shape[2], guidance.shape[3])
    if rival == "ours":
        return stack(features, guidance)
    if rival == "bilinear":
        return F.interpolate(features, size=size, mode="bilinear")
    stack.set_backend("eager")
    out = stack.mix(features)
    grid = (features.shape[2], features.shape[3])
    for stage, stage_size in zip(stack.stages, stage_sizes(grid, size, 4), strict=True):
        assert isinstance(stage, JBUStage)
        weights = stage(F.adaptive_avg_pool2d(guidance, stage_size))
        out = _upsample(out, weights, rival)
    assert stack.offset is not None
    return out.add_(stack.offset[:, None, None])


def _upsample(features: Tensor, weights: Tensor, rival: str) -> Tensor:
    size = (weights.shape[2], weights.shape[3])
    if rival == "bilinear":
        return F.interpolate(features, size=size, mode="bilinear")
    if rival == "pixel_major":
        resized = F.interpolate(features, size=size, mode="bicubic", align_corners=False)
        return _pixel_major(reflect_pad(resized, 3), weights.permute(0, 2, 3, 1).contiguous())
    backend = {"ours": "auto", "tap_major": "eager", "unfold": "reference"}[rival]
    return functional.joint_bilateral_upsample(features, weights, backend=backend)


def _pixel_major(padded: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of 7×7 taps, one multiply-add per tap, with weights (B, H, W, taps)."""
    height, width = weights.shape[1:3]
    out = torch.zeros((*padded.shape[:2], height, width))
    for tap in range(_TAPS):
        row, column = divmod(tap, 7)
        window = padded[:, :, row : row + height, column : column + width]
        out = torch.addcmul(out, window, weights[:, None, :, :, tap])
    return out


def peak_memory(call: Callable[[], object]) -> int | None:
    """Peak memory during a call less the memory in use before it, in bytes.

    Args:
        call: function to measure; it is called once.

    Returns:
        The difference, sampled every millisecond; ``None`` on systems without ``/proc``.
    """
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        call()
        return None
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    done = threading.Event()
    before = resident()
    highest = before

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
        highest = max(highest, resident())
        del result
    finally:
        done.set()
        watcher.join()
    return highest - before
