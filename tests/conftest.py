"""What all tests share."""

import importlib.util

import pytest
import torch

from upfeat import machine


@pytest.fixture(autouse=True)
def _one_draw():
    """Every test draws the same values, alone or after others, in one process or in several."""
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Set the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def held(monkeypatch):
    """Bytes that this process is said to hold: what it does hold, earlier tests decide."""
    monkeypatch.setattr(machine, "resident_memory", lambda: 10**9)
    return 10**9


@pytest.fixture(scope="session")
def torchvision_operators():
    """Declare two operators that torchvision's wheel lacks beside a CPU build of PyTorch.

    timm and open_clip import torchvision, which fails without them; none of their models runs them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return declared
