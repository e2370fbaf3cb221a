"""A generated dataset, and a backbone that sees its colours."""

import pytest
import torch
from evaluation.scenes import write_dataset

import upfeat


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Tiny tensors gain nothing from threads."""
    threads(1)


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "scenes")


@pytest.fixture
def colour_backbone():
    """Mean colours of 8×8 cells, and their squares: six channels."""

    def extract(x):
        pooled = torch.nn.functional.avg_pool2d(x, 8)
        return torch.cat([pooled, pooled.square()], dim=1)

    return upfeat.load_backbone(extract)
