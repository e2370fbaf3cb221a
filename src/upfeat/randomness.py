"""Random streams that depend on the seed and a name alone, not on numbers drawn before.

Every step, photograph and epoch has a stream of its own, named by its position. A resumed run
therefore continues identically without a saved generator state, and the division of the work among
processes does not change the numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from upfeat.bounds import instance


def derive(*names: object) -> int:
    """Derive the seed of a stream from its names; different names give unrelated seeds.

    Args:
        *names: numbers and words, such as (seed, "views", step).

    Returns:
        An integer from 0 to 2⁶³ − 1.
    """
    text = "/".join(str(name) for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(*names: object) -> torch.Generator:
    """Make a generator on the CPU for the stream with the given names; see :func:`derive`."""
    return torch.Generator().manual_seed(derive(*names))


def device_of(
    generator: torch.Generator | None, otherwise: torch.device | str | None = None
) -> torch.device | str | None:
    """Return the device on which a generator draws.

    Args:
        generator: source of randomness; ``None`` for PyTorch's global generator.
        otherwise: the device without a generator.

    Raises:
        TypeError: ``generator`` is no generator, for example a seed.
    """
    if generator is None:
        return otherwise
    fix = "give torch.Generator().manual_seed(0)"
    return instance("generator", generator, torch.Generator, fix).device


@torch.no_grad()
def draw_uniform(
    parameter: Tensor, low: float, high: float, generator: torch.Generator | None = None
) -> None:
    """Draw a parameter's values in float32, since other numbers are drawn in other types."""
    device_of(generator)
    drawn = torch.empty_like(parameter, dtype=torch.float32)
    parameter.copy_(drawn.uniform_(low, high, generator=generator))


@torch.no_grad()
def draw_normal(
    parameter: Tensor, mean: float, std: float, generator: torch.Generator | None = None
) -> None:
    """Draw a parameter's values in float32; see :func:`draw_uniform`."""
    device_of(generator)
    drawn = torch.empty_like(parameter, dtype=torch.float32)
    parameter.copy_(drawn.normal_(mean, std, generator=generator))


@contextmanager
def global_stream(device: torch.device, *names: object) -> Iterator[None]:
    """Context in which the global generators, from which dropout draws, are set to a stream.

    The generators are restored afterwards.

    Args:
        device: device whose generator is set in addition to the CPU's.
        *names: names of the stream; see :func:`derive`.
    """
    seed = derive(*names)
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        # Not torch.manual_seed: it would also seed generators that fork_rng does not restore.
        torch.default_generator.manual_seed(seed)
        if gpus:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
