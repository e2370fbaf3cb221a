"""One thread, as for the other fits: tiny tensors gain nothing from more."""

import pytest


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)
