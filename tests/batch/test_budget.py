"""A bound of memory holds whatever many threads ask for, and all of them get through."""

import math
import threading
import time

import numpy as np
import pytest

from upfeat.batch.budget import Budget


def test_threads_never_hold_more_than_the_bound():
    budget, lock = Budget(100), threading.Lock()
    held, most, done = 0.0, 0.0, 0

    def work(seed):
        nonlocal held, most, done
        for needed in np.random.default_rng(seed).integers(0, 101, 20).tolist():
            with budget.take(needed):
                with lock:
                    held += needed
                    most = max(most, held)
                time.sleep(1e-4)
                with lock:
                    held, done = held - needed, done + 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (held, done) == (0, 160)
    assert 50 < most <= 100


def test_what_an_error_held_is_free_again():
    budget = Budget(10)
    for _ in range(3):
        with pytest.raises(KeyError), budget.take(10):
            raise KeyError
    with budget.take(4), budget.take(6):
        pass


@pytest.mark.parametrize(
    ("limit", "needed", "fits"),
    [(10, 10, True), (10, 10.5, False), (0, 0, True), (-5, 0, True), (-5, 1, False)],
)
def test_one_that_never_fits_is_told_and_does_not_wait(limit, needed, fits):
    budget = Budget(limit)
    if fits:
        with budget.take(needed):
            pass
    else:
        with pytest.raises(ValueError, match="give a smaller size, or a larger max_memory"):
            budget.take(needed).__enter__()


def test_no_bound_lets_everything_through():
    budget = Budget(math.inf)
    with budget.take(1e18), budget.take(1e18):
        pass
