"""Store of visitors' photographs, bounded in number and time."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from upfeat.demo.session import Visit
from upfeat.machine import release_memory


class Visits:
    """Store of the visitors' photographs, bounded in number and time.

    A photograph is stored under its visitor's token, which only the server knows, so that nobody
    can request another visitor's photograph.
    """

    def __init__(
        self,
        most: int = 32,
        *,
        warm: int = 3,
        seconds: float = 1200,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with an empty store.

        Args:
            most: largest number of photographs; the least recently used is removed first.
            warm: number of the last used photographs whose upsampling weights are kept too.
            seconds: time after which an unused photograph is removed.
            clock: function that returns the time in seconds; replaced by tests.
        """
        self.most, self.warm, self.seconds = most, warm, seconds
        self._clock, self._lock = clock, threading.Lock()
        self._visits: OrderedDict[str, tuple[float, Visit]] = OrderedDict()
        self._watched = False

    def __len__(self) -> int:
        return len(self._visits)

    def put(self, token: str, visit: Visit) -> None:
        """Store a visitor's photograph, which replaces the visitor's previous photograph."""
        with self._lock:
            self._visits.pop(token, None)
            self._visits[token] = self._clock(), visit
            self._tidy()
            self._watch()
        release_memory()  # weights are in reference cycles, and allocators keep freed memory

    def get(self, token: str | None) -> Visit:
        """Return a visitor's photograph.

        Raises:
            ValueError: the visitor has no photograph, or it has been removed.
        """
        with self._lock:
            self._tidy()
            if token is None or token not in self._visits:
                raise ValueError("no photograph is loaded any more; choose one again")
            _, visit = self._visits.pop(token)
            self._visits[token] = self._clock(), visit
            self._tidy()
            return visit

    def _watch(self) -> None:
        """Remove photographs in time even if no request comes; the caller holds the lock."""
        if self._visits and not self._watched:
            self._watched = True
            timer = threading.Timer(self.seconds / 20, self._remove_unused)
            timer.daemon = True
            timer.start()

    def _remove_unused(self) -> None:
        with self._lock:
            self._watched = False
            self._tidy()
            self._watch()
        release_memory()

    def _tidy(self) -> None:
        oldest = self._clock() - self.seconds
        for token in [token for token, (used, _) in self._visits.items() if used < oldest]:
            del self._visits[token]
        while len(self._visits) > self.most:
            self._visits.popitem(last=False)
        for _, visit in list(self._visits.values())[: -self.warm]:
            visit.cool()
