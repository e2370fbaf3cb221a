"""Randomness that depends on the seed and on what is drawn, never on what was drawn before.

Every step, photograph and epoch has a stream of its own, named by its place. So a resumed run needs
no generator state to go on as it would have, and how the work is divided changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(*names: object) -> int:
    """A seed for the stream with these names; different names give unrelated seeds.

    Args:
        *names: numbers and words, as (seed, "views", step).

    Returns:
        0 to 2⁶³ − 1.
    """
    text = "/".join(str(name) for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(*names: object) -> torch.Generator:
    """A generator on the CPU for the stream with these names."""
    return torch.Generator().manual_seed(derive(*names))


@contextmanager
def global_stream(device: torch.device, *names: object) -> Iterator[None]:
    """Let the global generators, which dropout draws from, give this stream; restore them after.

    Args:
        device: whose generator is set, beside the CPU's.
        *names: of the stream.
    """
    seed = derive(*names)
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        # Generators one by one: torch.manual_seed would also seed those that are not restored.
        torch.default_generator.manual_seed(seed)
        if gpus:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
