"""Time of a training step on a CPU, against the same recipe computed as published.

    python benchmarks/training_step.py [--json benchmarks/training-step.json] [--threads 1]

All variants run in one process, by turns. Results are medians of time by the clock, and of
processor time, which depends less on other load on the machine. On a busy machine, use one thread:
the waiting of several threads for each other would count as processor time.

The recipe is ``TrainConfig.reference()``. A step consists of the loss, its gradients and the
optimiser; the backbone is timed separately. The rival computes the same loss from the same random
draws, which is checked: it upsamples all channels with tap-major operators of plain PyTorch, warps
and downsamples all of them for every view, and projects last.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import upfeat
from upfeat.benchmark import machine
from upfeat.downsamplers import AttentionDownsampler
from upfeat.losses import crf_pairwise, gaussian_reconstruction, random_projection
from upfeat.training import TrainConfig
from upfeat.training.objective import Objective, ViewBatch, make_batch
from upfeat.upsamplers import Upsampler
from upfeat.views import apply_jitter

BACKBONE = "efficientnet_lite0"
ROUNDS = 3
SECONDS = 90.0  # approximate time spent after the warm-up
STEPS = 2000
TARGET_RATIO, TARGET_HOURS = 10.0, 2.5

Times = dict[str, list[tuple[float, float]]]


def published_loss(objective: Objective, batch: ViewBatch, generator: torch.Generator) -> Tensor:
    """Compute the loss from all channels at the image's size: warp, downsample, then project."""
    count, channels = objective.config.projection_dim, batch.features.shape[1]
    assert count is not None
    drawn = [random_projection(channels, count, generator=generator) for _ in batch.features]
    directions = torch.stack(drawn)  # (B, C, P)
    assert isinstance(objective.downsampler, AttentionDownsampler)
    upsampled = objective.upsampler(batch.features, batch.guidance)  # (B, C, H, W)
    likelihoods = []
    for jitter, target in zip(batch.jitters, batch.targets, strict=True):
        size = (target.shape[2], target.shape[3])
        warped = apply_jitter(upsampled, jitter)
        guess = objective.downsampler(warped, size, generator=generator)
        guess, seen = (directions.mT @ x.flatten(2) for x in (guess, target))  # (B, P, h·w)
        scale = objective.uncertainty(target).flatten(2)
        likelihoods.append(gaussian_reconstruction(guess, seen, scale))
    projected = (directions.mT @ upsampled.flatten(2)).unflatten(2, upsampled.shape[2:])
    crf = crf_pairwise(projected, batch.guidance, generator=generator)
    return torch.stack(likelihoods).mean() + objective.config.crf_weight * crf


def reduced_loss(objective: Objective, batch: ViewBatch, generator: torch.Generator) -> Tensor:
    """Compute the loss as this package's training does, with projection before upsampling."""
    return objective(batch, generator)["loss"]


def stepper(
    upsampler: Upsampler, batch: ViewBatch, config: TrainConfig, loss: Callable[..., Tensor]
) -> Callable[[], float]:
    """Return a function that runs a training step with fixed draws and returns its loss."""
    channels = batch.features.shape[1]
    stride = batch.guidance.shape[2] // batch.features.shape[2]
    generator = torch.Generator().manual_seed(1)
    objective = Objective(upsampler, channels, stride, config, generator=generator).train()
    optimizer = torch.optim.NAdam(objective.parameters(), lr=config.learning_rate)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(2)
        value = loss(objective, batch, torch.Generator().manual_seed(3))
        value.backward()
        optimizer.step()
        return float(value.detach())

    return step


def jobs(config: TrainConfig) -> dict[str, Callable[[], object]]:
    backbone = upfeat.load_backbone(BACKBONE)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(config.batch_size, 3, 28, 28, generator=generator)
    size = (config.size, config.size)
    images = 2 * torch.nn.functional.interpolate(coarse, size=size, mode="bilinear") - 1
    batch = make_batch(backbone, images, config, torch.Generator().manual_seed(4))

    def stack(backend: str) -> upfeat.JBUStack:
        torch.manual_seed(0)
        return upfeat.JBUStack(backbone.embed_dim, backend=backend)

    torch.manual_seed(0)
    neighbourhood = upfeat.NeighbourhoodUpsampler()
    return {
        "jbu_stack": stepper(stack("auto"), batch, config, reduced_loss),
        "neighbourhood": stepper(neighbourhood, batch, config, reduced_loss),
        "backbone": lambda: make_batch(backbone, images, config, torch.Generator().manual_seed(4)),
        "jbu_stack, all channels, eager": stepper(stack("eager"), batch, config, published_loss),
    }


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Run a function; return seconds by the clock and of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def measure(runs: dict[str, Callable[[], object]], found: Times) -> None:
    """Add times to ``found``: every round times the rival once and the others three times."""
    *own, rival = runs
    begin = time.perf_counter()
    for number in range(ROUNDS):
        for _ in range(3):
            for name in own:
                found[name].append(timed(runs[name]))
        if time.perf_counter() - begin < SECONDS * (number + 1) / (number + 2):  # time for one more
            found[rival].append(timed(runs[rival]))


def summary(found: Times, threads: int) -> dict[str, object]:
    parts = {
        name: {
            "seconds": statistics.median(clock for clock, _ in times),
            "processor_seconds": statistics.median(processor for _, processor in times),
            "runs": len(times),
        }
        for name, times in found.items()
    }
    *own, rival = parts
    ratios = {
        name: {
            kind: parts[rival][kind] / parts[name][kind]
            for kind in ("seconds", "processor_seconds")
        }
        for name in own
        if name != "backbone"
    }
    hours = {
        name: {
            "as_measured": STEPS * (parts[name]["seconds"] + parts["backbone"]["seconds"]) / 3600,
            "processor": STEPS
            * (parts[name]["processor_seconds"] + parts["backbone"]["processor_seconds"])
            / 3600,
        }
        for name in ratios
    }
    return {"threads": threads, "parts": parts, "ratios": ratios, f"hours_of_{STEPS}_steps": hours}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch and the kernels")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = [os.getloadavg()]
    config = TrainConfig.reference()
    runs = jobs(config)
    *own, rival = runs
    losses: dict[str, object] = {name: runs[name]() for name in own}  # also warms up
    found: Times = {name: [] for name in runs}
    found[rival].append(timed(lambda: losses.update({rival: runs[rival]()})))
    ours, same = losses["jbu_stack"], losses[rival]
    assert isinstance(ours, float)
    assert isinstance(same, float)
    if abs(ours - same) > 1e-4 * abs(same):
        print(f"the losses differ: {ours} and {same}")
        return 1
    measure(runs, found)
    load.append(os.getloadavg())
    result = {"machine": machine(), "load_average": load, **summary(found, options.threads)}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    ratio = result["ratios"]["jbu_stack"]["processor_seconds"]
    hours = result[f"hours_of_{STEPS}_steps"]["jbu_stack"]["as_measured"]
    return 0 if ratio >= TARGET_RATIO and hours <= TARGET_HOURS else 1


if __name__ == "__main__":
    sys.exit(main())
