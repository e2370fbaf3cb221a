"""Engines of a batch: threads of this process, or workers of Ray on one machine or a cluster.

Every worker does whole tasks, from reading to writing, with one thread of PyTorch. On CPUs, many
images in parallel are faster than many threads for one image. A result also depends, in its last
bits, on the number of threads, by which PyTorch chooses kernels; with one thread per worker, all
engines write the same files.

Tasks write their own results, completely or not at all, and always the same bytes; a task whose
worker was killed can therefore be repeated by another worker. Only the driver records which tasks
are done.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeVar

import torch

from upfeat.bounds import quoted, shown, whole
from upfeat.optional import import_optional

Task = TypeVar("Task")
Result = TypeVar("Result")

_SECONDS = 10
_MOST_WORKERS = 1 << 16
_AHEAD = 2
"""Number of tasks queued for each worker."""


@dataclass(frozen=True)
class Engine:
    """Choice of the engine that runs a batch.

    Attributes:
        name: "local", for threads of this process, or "ray".
        workers: number of threads, or of Ray workers; ``None`` for one per CPU.
        address: address of a Ray cluster, as ``ray.init`` accepts it; ``None`` to start one on this
            machine for the duration of the batch.
    """

    name: str = "local"
    _: KW_ONLY
    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: a setting is out of range, or the engine does not use it.
        """
        if self.name not in ("local", "ray"):
            raise ValueError(f"engine={quoted(self.name)} must be local or ray")
        whole("workers", self.workers, 1, _MOST_WORKERS, optional=True)
        if self.address is not None and self.name != "ray":
            raise ValueError(f'address={shown(self.address)} is for engine="ray"')

    @property
    def threads(self) -> int:
        """Number of threads of the local engine."""
        return self.workers or torch.get_num_threads()


def map_with_threads(
    workers: Sequence[Callable[[Task], Result]], tasks: Iterable[Task]
) -> Generator[Result]:
    """Do tasks on threads, one for each worker; results come in the order of the tasks.

    Args:
        workers: functions from a task to its result, one per thread.
        tasks: tasks, read from the iterable a little ahead of the work.

    Yields:
        The results.
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
        # A number set in a worker thread also applies to threads started later; restore it.
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
        make_worker: function that returns a function from a task to its result; called once in each
            worker; picklable.

    Yields:
        A function from an iterable of picklable tasks, read as workers become free, to results in
        the order of their completion. Tasks of killed workers are repeated by new workers.

    Raises:
        ValueError: Ray is not installed, or the cluster cannot be reached.
    """
    # Set before Ray is imported, which reads it: an address without a cluster floods the log.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray = import_optional("ray", "engine=ray needs the package ray: pip install 'upfeat[ray]'")
    with _connected(ray, engine):
        # Restart workers that die, and repeat their tasks.
        options = {"max_restarts": -1, "max_task_retries": -1, "num_cpus": 1}
        actor = ray.remote(**options)(_Worker)
        count = engine.workers or int(ray.cluster_resources().get("CPU", 1))
        # Ray deletes unreferenced objects, and restarted workers need this one: keep a reference.
        made = ray.put(make_worker)
        workers = [actor.remote(made) for _ in range(count)]
        yield lambda tasks: _do(ray, workers, tasks)


def _do(ray: Any, workers: list[Any], tasks: Iterable[Any]) -> Generator[Any]:
    """Distribute tasks until none is left; yield results in the order of their completion."""
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
        """Do one task; the first call makes the task function, whose errors are the task's."""
        if self._do is None:
            self._do = self._make_worker()
        return self._do(task)


@contextmanager
def _connected(ray: Any, engine: Engine) -> Iterator[None]:
    """Connect to Ray, or start it; a connection made here is closed afterwards."""
    if ray.is_initialized():  # by the caller, who also closes it
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if engine.address is None:
        options |= {"num_cpus": engine.workers, "include_dashboard": False}
    else:
        _check_answers(engine.address)
        options["address"] = engine.address
    # On a machine that is busy with other work, Ray's default of 30 seconds is too short.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises errors of any class, plain Exception included
        reason = " ".join(str(error).split())
        if engine.address is None:
            raise ValueError(f"engine=ray: Ray does not start here ({reason})") from None
        raise ValueError(f'address="{engine.address}": no Ray cluster answers ({reason})') from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Check that a cluster's address accepts connections; Ray itself would retry for minutes.

    Raises:
        ValueError: the address does not answer.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # "auto", "local" or a name, which Ray checks without delay
        return
    try:
        socket.create_connection((host or "127.0.0.1", int(port)), _SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f'address="{address}": no Ray cluster answers ({error})') from None
