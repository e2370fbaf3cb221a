"""Bound on the memory of items that are processed at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from upfeat.machine import readable


class Budget:
    """Budget of bytes shared by threads; a request that exceeds the rest waits for a release."""

    def __init__(self, limit: float) -> None:
        """Keep the limit.

        Args:
            limit: bytes; a negative number counts as 0, infinity is no limit.
        """
        self._limit, self._taken = max(limit, 0), 0.0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, needed: float) -> Iterator[None]:
        """Reserve bytes while the block runs, after waiting until they are free.

        Raises:
            ValueError: ``needed`` exceeds the whole budget.
        """
        if needed > self._limit:
            raise ValueError(
                f"needs about {readable(needed)} of memory, and {readable(self._limit)} of the "
                f"bound are left beside the model; give a smaller size, or a larger max_memory"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._taken + needed <= self._limit)
            self._taken += needed
        try:
            yield
        finally:
            with self._changed:
                self._taken -= needed
                self._changed.notify_all()
