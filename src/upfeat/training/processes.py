"""Training in one process, or in several that torchrun starts and that average their gradients."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from upfeat.machine import find_device

Result = TypeVar("Result")


class Processes:
    """Rank of this process in a distributed training, and communication with the others.

    Attributes:
        rank: number of this process, from 0.
        count: number of all processes.
        device: device of this process.
    """

    def __init__(self, rank: int, count: int, device: torch.device) -> None:
        """Store rank, count and device."""
        self.rank, self.count, self.device = rank, count, device

    @property
    def is_main(self) -> bool:
        """Return whether this process writes files and shows progress."""
        return self.rank == 0

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Run an action in the first process; return its result, or raise its error, in all.

        Raises:
            ValueError: ``action`` raised a ValueError.
            OSError: ``action`` raised an OSError.
        """
        if self.count == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except (ValueError, OSError) as error:
                outcome[1] = error
        torch.distributed.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all processes, in the order of ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Return the elementwise mean over processes."""
        if self.count == 1:
            return values
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values / self.count

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace gradients by their means over processes, in one message for all parameters."""
        if self.count == 1:
            return
        gradients = [one.grad for one in parameters if one.grad is not None]
        flat = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


@contextmanager
def processes(device: str | None) -> Iterator[Processes]:
    """Join the processes that torchrun started; without torchrun there is a single process.

    Args:
        device: device of this process, see ``TrainConfig.device``.

    Raises:
        ValueError: there is no such device.
    """
    joined_before = torch.distributed.is_available() and torch.distributed.is_initialized()
    if joined_before:
        count, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    else:
        count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    own = _device(device, int(os.environ.get("LOCAL_RANK", rank)) if count > 1 else None)
    if count == 1:
        yield Processes(0, 1, own)
        return
    if not joined_before:
        torch.distributed.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count, own)
    finally:
        if not joined_before:
            torch.distributed.destroy_process_group()


def _device(name: str | None, local_rank: int | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = find_device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank if local_rank is not None else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
