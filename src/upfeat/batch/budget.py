"""A bound of memory for items that are worked on at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from upfeat.machine import readable


class Budget:
    """Bytes that items in the making may take together; whoever needs more waits for the others."""

    def __init__(self, limit: float) -> None:
        """Keep the limit.

        Args:
            limit: bytes, at least 0; infinity for none.
        """
        self._limit, self._taken = max(limit, 0), 0.0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, needed: float) -> Iterator[None]:
        """Hold bytes for as long as the block runs.

        Raises:
            ValueError: there are not so many, even for one item alone.
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
