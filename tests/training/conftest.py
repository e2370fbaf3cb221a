"""Generated photographs, and a backbone that sees their colours."""

import pytest
import torch
from training.small import small_backbone, write_photographs


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def photos(tmp_path):
    return write_photographs(tmp_path / "photos")


@pytest.fixture
def backbone():
    return small_backbone()
