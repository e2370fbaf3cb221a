"""Loading of the photographs of training steps, by worker processes or by this one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from upfeat.training.photographs import Photographs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GUARD = 'in a script, call train below `if __name__ == "__main__":`, or give workers=0'
"""Advice where processes are not forked, as on Windows and macOS: they import the script."""


class _Stacks(Dataset["NDArray[np.uint8] | OSError"]):
    """Stacked samples of a part, or the error that reading them raised.

    Samples are returned as arrays, which a worker sends through a pipe: tensors would be sent
    through shared memory, of which containers have little, and one that did not fit would be
    dropped, and waited for without end. Errors are returned, and raised by the main process,
    because the loader would replace the message of an exception from a worker by a traceback.
    """

    def __init__(self, samples: Photographs) -> None:
        self.samples = samples

    def __getitem__(self, numbers: list[int]) -> NDArray[np.uint8] | OSError:
        try:
            return torch.stack([self.samples[number] for number in numbers]).numpy()
        except OSError as error:
            return error


class _Parts:
    """Sampler of this process's parts of each step: a list of sample numbers for each part."""

    def __init__(self, first: int, last: int, batch: int, shares: list[slice]) -> None:
        self.first, self.last, self.batch, self.shares = first, last, batch, shares

    def __len__(self) -> int:
        return (self.last - self.first) * len(self.shares)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            numbers = range(step * self.batch, (step + 1) * self.batch)
            for share in self.shares:
                yield list(numbers[share])


def _unchanged(part: NDArray[np.uint8] | OSError) -> NDArray[np.uint8] | OSError:
    return part


def load_parts(
    photographs: Photographs,
    *,
    first: int,
    last: int,
    batch: int,
    shares: list[slice],
    workers: int = 0,
) -> Iterator[Tensor]:
    """Read the images of steps ``first`` to ``last - 1``, ahead of time if there are workers.

    Args:
        photographs: photographs to read.
        first: number of the first step, from 0.
        last: number of the last step plus 1.
        batch: number of images in a step.
        shares: slices of a step's images, one for each part that this process computes.
        workers: number of processes that read; 0 to read in this process.

    Yields:
        (part, 3, size, size) uint8, the parts of each step in order.
    """
    loader = DataLoader(
        _Stacks(photographs),
        sampler=_Parts(first, last, batch, shares),  # pyright: ignore[reportArgumentType]
        batch_size=None,
        num_workers=workers,
        # The default would make tensors of arrays.
        collate_fn=_unchanged,  # pyright: ignore[reportArgumentType]
        # Without a generator, the loader would draw from the global one.
        generator=torch.Generator(),
    )
    try:
        for part in loader:
            if isinstance(part, OSError):
                raise part
            yield torch.from_numpy(part)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"a process that loads photographs has ended ({error}); {GUARD}") from None
