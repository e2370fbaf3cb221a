"""Engines of a batch: threads of this process, or workers of Ray on one machine or a cluster.

Every worker does whole tasks, from reading to writing, with one thread of PyTorch. On CPUs many
images side by side are faster than many threads for one image; and the bits of a result depend on
the number of threads (kernels are chosen by it), so that one engine's files equal another's.

Tasks write their results themselves, whole or not at all and always the same bytes, so a task of
a worker that was killed is simply done again by another. What is done is recorded by the driver
alone.
"""

from __future__ import annotations

import importlib
import os
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from upfeat.bounds import shown, whole

Task = TypeVar("Task")
Result = TypeVar("Result")

_SECONDS = 10
_MOST_WORKERS = 1 << 16
_AHEAD = 2
"""Tasks that wait at each worker."""


@dataclass(frozen=True)
class Engine:
    """Place where the work of a batch is done.

    Attributes:
        name: "local", in this process, or "ray".
        workers: threads, or workers of Ray; ``None`` for one on each CPU.
        address: of a Ray cluster, as ``ray.init`` takes it; ``None`` for one of this machine that
            begins and ends with the work.
    """

    name: str = "local"
    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: one is out of range, or of no use.
        """
        if self.name not in ("local", "ray"):
            raise ValueError(f'engine="{self.name}" must be local or ray')
        whole("workers", self.workers, 1, _MOST_WORKERS, optional=True)
        if self.address is not None and self.name != "ray":
            raise ValueError(f'address={shown(self.address)} is for engine="ray"')

    @property
    def threads(self) -> int:
        """Workers of the local engine."""
        return self.workers or torch.get_num_threads()


def map_with_threads(
    workers: Sequence[Callable[[Task], Result]], tasks: Iterable[Task]
) -> Generator[Result]:
    """Do tasks on threads, one for each worker; results come in the order of the tasks.

    Args:
        workers: what does a task, one at a time.
        tasks: taken from the iterable a little ahead of the work.

    Yields:
        Results.
    """
    free: queue.SimpleQueue[Callable[[Task], Result]] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)
    own = threading.local()

    def begin() -> None:
        torch.set_num_threads(1)
        own.worker = free.get()

    pending: deque[Future[Result]] = deque()
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(len(workers), initializer=begin)
    try:
        for task in tasks:
            pending.append(pool.submit(lambda task: own.worker(task), task))
            if len(pending) > _AHEAD * len(workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        # Set in a thread, it holds there and in threads that begin later; here only that is undone.
        torch.set_num_threads(threads)


def map_with_ray(
    engine: Engine,
    make_worker: Callable[[], Callable[[Task], Result]],
    tasks: Iterable[Task],
) -> Generator[Result]:
    """Do tasks on a pool of workers; see :func:`ray_pool`."""
    with ray_pool(engine, make_worker) as do:
        yield from do(tasks)


@contextmanager
def ray_pool(
    engine: Engine, make_worker: Callable[[], Callable[[Task], Result]]
) -> Iterator[Callable[[Iterable[Task]], Generator[Result]]]:
    """Start a pool of workers of Ray.

    Args:
        engine: a Ray engine.
        make_worker: is called once in each worker and gives what does a task; picklable.

    Yields:
        A function from picklable tasks, taken from their iterable as workers get free, to results
        in the order in which they are ready. Those of killed workers are computed by new ones.

    Raises:
        ValueError: Ray is not installed, or the cluster cannot be reached.
    """
    # Read when it is imported: an address that is no cluster would be complained of line by line.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ValueError("engine=ray needs the package ray: pip install 'upfeat[ray]'") from None
    with _connected(ray, engine):
        # A worker that dies is started again, and its tasks with it.
        options = {"max_restarts": -1, "max_task_retries": -1, "num_cpus": 1}
        actor = ray.remote(**options)(_Worker)
        count = engine.workers or int(ray.cluster_resources().get("CPU", 1))
        # Kept here for as long as workers may be started again: Ray forgets what nobody holds.
        made = ray.put(make_worker)
        workers = [actor.remote(made) for _ in range(count)]
        yield lambda tasks: _do(ray, workers, tasks)


def _do(ray: Any, workers: list[Any], tasks: Iterable[Any]) -> Generator[Any]:
    """Keep every worker busy until no task is left."""
    running: dict[Any, Any] = {}
    free = workers * _AHEAD
    for task in tasks:
        if not free:
            yield _next(ray, running, free)
        worker = free.pop(0)
        running[worker.run.remote(task)] = worker
    while running:
        yield _next(ray, running, free)


def _next(ray: Any, running: dict[Any, Any], free: list[Any]) -> Any:
    ready, _ = ray.wait(list(running), num_returns=1)
    free.append(running.pop(ready[0]))
    try:
        return ray.get(ready[0])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


class _Worker:
    """Ray actor that makes its task function at the first task, then calls it for each."""

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]]) -> None:
        torch.set_num_threads(1)
        self._make_worker = make_worker
        self._do: Callable[[Any], Any] | None = None

    def run(self, task: Any) -> Any:
        """Do one task; the first begins with what does them, so that its errors are the task's."""
        if self._do is None:
            self._do = self._make_worker()
        return self._do(task)


@contextmanager
def _connected(ray: Any, engine: Engine) -> Iterator[None]:
    """Ray, started or found; what was started here is stopped afterwards."""
    if ray.is_initialized():  # somebody else's, who will stop it
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if engine.address is None:
        options |= {"num_cpus": engine.workers, "include_dashboard": False}
    else:
        _check_answers(engine.address)
        options["address"] = engine.address
    # On a machine that is busy with other work, Ray's own 30 seconds are too few.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises what it likes, also plain exceptions
        reason = " ".join(str(error).split())
        if engine.address is None:
            raise ValueError(f"engine=ray: Ray does not start here ({reason})") from None
        raise ValueError(f'address="{engine.address}": no Ray cluster answers ({reason})') from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuse a cluster that nobody answers for: Ray itself would go on trying for minutes.

    Raises:
        ValueError: nobody answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # "auto", "local" or a name: Ray knows at once
        return
    try:
        socket.create_connection((host or "127.0.0.1", int(port)), _SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f'address="{address}": no Ray cluster answers ({error})') from None
