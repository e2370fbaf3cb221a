"""Time two versions of the code in turns, to show that no job has become slower.

    python benchmarks/versions.py --before OLD/src --commits OLD NEW [--threads 2] [--jobs NAME …]

Each version runs in its own process, and the versions run each job by turns. Medians of wall-clock
time and of processor time, and the growth of memory, go to benchmarks/versions.json. If ``--jobs``
names jobs, only their rows in the file are replaced; otherwise the file is written anew.
``--before`` is the ``src`` of another checkout that contains its compiled library.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

TARGET = Path(__file__).with_name("versions.json")
NOW = Path(__file__).parents[1] / "src"
PHOTO = Path(__file__).parents[1] / "examples" / "photos" / "coffee.jpg"
ROUNDS, SECONDS = 9, 4.0  # limits of one job and version
POINTS = [(1500.0, 2000.0), (1700.0, 900.0), (333.0, 3777.0), (2211.0, 1234.5), (1000.0, 3000.0)]


def jobs() -> dict[str, Callable[[], object]]:
    """Return the jobs to time, by name; all versions must be able to run them."""
    import torch
    import torch.nn.functional as F
    from training_step import reduced_loss, stepper

    import upfeat
    from upfeat import functional
    from upfeat.training import TrainConfig
    from upfeat.training.objective import make_batch
    from upfeat.upsamplers import create_upsampler

    def random(*shape: int, gradient: bool = False) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(shape) + shape[-1])
        return torch.randn(*shape, generator=generator).requires_grad_(gradient)

    def backward(*leaves: torch.Tensor, run: Callable[[], torch.Tensor]) -> None:
        run().sum().backward()
        for leaf in leaves:
            leaf.grad = None

    small, wide = random(1, 384, 14, 14), random(1, 3, 224, 224)
    coarse, photo = random(1, 112, 19, 26), random(1, 3, 304, 416)
    large_coarse, large = random(1, 112, 56, 56), random(1, 3, 896, 896)
    head = random(8, 112)
    queries, keys = (F.normalize(random(1, 32, n, n), dim=1) for n in (224, 14))
    temperature, sigma = torch.tensor(10.0), torch.tensor(0.75)
    weights = functional.neighbourhood_weights(queries, keys, temperature, sigma, radius=2)
    few, taps = random(1, 31, 14, 14, gradient=True), random(1, 25, 224, 224, gradient=True)
    stage, filters = random(1, 31, 112, 112, gradient=True), random(1, 49, 224, 224, gradient=True)
    upsamplers = {
        "detail": upfeat.DetailUpsampler(384),
        "detail_universal": upfeat.DetailUpsampler(),
        "neighbourhood": upfeat.NeighbourhoodUpsampler(back_projections=2),
        "jbu_stack": upfeat.JBUStack(384),
        "bilinear": create_upsampler("bilinear"),
    }
    upsamplers = {name: one.eval().requires_grad_(False) for name, one in upsamplers.items()}
    default = create_upsampler("detail_efficientnet_lite0")
    universal = create_upsampler("detail_universal")

    def photograph() -> torch.Tensor:
        return F.interpolate(random(1, 3, 60, 80), size=(3000, 4000), mode="bicubic")

    points = random(1000, 2).abs() * 1000 % 1  # in [0, 1)

    def lazy(large_image: bool) -> Any:
        given = (large_coarse, large) if large_image else (small[:, :112], wide)
        return upfeat.UpsampledFeatures(*given, default)

    found: dict[str, Callable[[], object]] = {
        f"{name}, 14→224, C = 384": (lambda one=one: one(small, wide))
        for name, one in upsamplers.items()
    }
    found |= {
        "default, 304×416, C = 112": lambda: default(coarse, photo),
        "default, a head of 8 classes": lambda: upfeat.UpsampledFeatures(
            coarse, photo, default
        ).project(head),
        "sum over 25 cells, 14→224, C = 384": lambda: functional.neighbourhood_upsample(
            small, weights
        ),
        "weights over 25 cells": lambda: functional.neighbourhood_weights(
            queries, keys, temperature, sigma, radius=2
        ),
        "sum over 25 cells, forward and backward, C = 31": lambda: backward(
            few, taps, run=lambda: functional.neighbourhood_upsample(few, taps)
        ),
        "JBU stage 112→224, forward and backward, C = 31": lambda: backward(
            stage, filters, run=lambda: functional.joint_bilateral_upsample(stage, filters)
        ),
    }
    for side, is_large in ((224, False), (896, True)):
        found |= {
            f"lazy, {side} px, 1,000 points": lambda side=side, large=is_large: lazy(large).at(
                points * (side - 1)
            ),
            f"lazy, {side} px, similarity": lambda large=is_large: lazy(large).similarity(
                torch.tensor([30.0, 40.0])
            ),
            f"lazy, {side} px, a window of 33×33": lambda large=is_large: lazy(large).crop(
                20, 30, 33, 33
            ),
        }
    given, places = (random(1, 112, 188, 250), photograph()), itertools.cycle(POINTS)
    found["a point of 12 megapixels"] = lambda: upfeat.UpsampledFeatures(*given, universal).at(
        torch.tensor([next(places)])
    )
    config, backbone = TrainConfig.reference(), upfeat.load_backbone("efficientnet_lite0")
    images = F.interpolate(random(config.batch_size, 3, 28, 28), size=(config.size, config.size))
    batch = make_batch(backbone, images, config, torch.Generator().manual_seed(4))
    for trained in (upfeat.JBUStack(backbone.embed_dim), upfeat.NeighbourhoodUpsampler()):
        found[f"training step, forward and backward, {type(trained).__name__}"] = stepper(
            trained, batch, config, reduced_loss
        )
    found["a fit to one image of 112 pixels"] = lambda: upfeat.fit_implicit(
        PHOTO, "efficientnet_lite0", upfeat.FitConfig(size=112)
    )
    return found


def work() -> None:
    """Run the jobs whose names arrive on standard input, and print the time of each."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    table = jobs()
    print(json.dumps(list(table)), flush=True)
    for line in sys.stdin:
        run = table[json.loads(line)]
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current memory
        held = peak_bytes()
        clock, processor = time.perf_counter(), time.process_time()
        with torch.set_grad_enabled("backward" in line):
            run()
        spent = time.perf_counter() - clock, time.process_time() - processor
        print(json.dumps([*spent, peak_bytes() - held]), flush=True)


def peak_bytes() -> int:
    """Return the peak memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


class Version:
    """Process that runs one version of the code."""

    def __init__(self, source: Path, threads: int) -> None:
        """Start the process and wait until it is ready."""
        environment = os.environ | {
            "PYTHONPATH": str(source),
            "OMP_NUM_THREADS": str(threads),
            "GOMP_SPINCOUNT": "1000",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.names: list[str] = json.loads(self._pipe(self.process.stdout).readline())

    def seconds(self, job: str) -> list[float]:
        """Run a job once; return seconds by the clock, processor seconds, and bytes of memory."""
        into = self._pipe(self.process.stdin)
        into.write(json.dumps(job) + "\n")
        into.flush()
        return json.loads(self._pipe(self.process.stdout).readline())

    def end(self) -> None:
        """End the process."""
        self._pipe(self.process.stdin).close()
        self.process.wait()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def measured(versions: dict[str, Version], job: str) -> dict[str, float]:
    """Time a job in both versions by turns; return the medians."""
    taken: dict[str, list[list[float]]] = {name: [] for name in versions}
    for version in versions.values():
        version.seconds(job)  # to warm up
    start = time.perf_counter()
    while len(taken["now"]) < ROUNDS and time.perf_counter() - start < SECONDS * len(versions):
        for name, version in versions.items():
            taken[name].append(version.seconds(job))
    found: dict[str, float] = {}
    for name, pairs in taken.items():
        found[name] = statistics.median(pair[0] for pair in pairs)
        found[f"{name}_processor"] = statistics.median(pair[1] for pair in pairs)
        found[f"{name}_bytes"] = max(pair[2] for pair in pairs)
    return found


def main() -> None:
    """Time both versions and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--commits", nargs=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", nargs="*")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    versions = {
        "before": Version(options.before, options.threads),
        "now": Version(NOW, options.threads),
    }
    rows = json.loads(TARGET.read_text())["rows"] if options.jobs else {}
    for job in options.jobs or versions["now"].names:
        rows[job] = measured(versions, job)
        print(f"{job}: {rows[job]['before']:.4f} {rows[job]['now']:.4f}", flush=True)
    for version in versions.values():
        version.end()
    content = {"commits": options.commits, "threads": options.threads, "rows": rows}
    TARGET.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
