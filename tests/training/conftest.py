"""Generated photographs, and a backbone that sees their colours."""

import pytest
from training.small import small_backbone, write_photographs


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Tiny tensors gain nothing from threads."""
    threads(1)


@pytest.fixture
def photos(tmp_path):
    return write_photographs(tmp_path / "photos")


@pytest.fixture
def backbone():
    return small_backbone()
