"""What all tests share."""

import errno
import importlib
import importlib.util
import os
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch

from upfeat import machine


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip, on Windows, tests that themselves need what it lacks, such as fork and links."""
    try:
        return (yield)
    except (AttributeError, OSError) as error:
        if os.name == "nt" and _lacks(error):
            pytest.skip(f"Windows: {error}")
        raise


def _lacks(error):
    if getattr(error, "winerror", None) == 1314:  # the right to make links
        return True
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    ours = Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)
    module = getattr(error, "obj", None)
    return ours and isinstance(module, types.ModuleType) and module.__name__ in ("os", "signal")


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


@pytest.fixture
def fill_disk(monkeypatch):
    """Let the disk be full from the call on, when the second temporary file is made."""
    make, made = tempfile.mkstemp, []

    def full(**options):
        made.append(options)
        if len(made) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return make(**options)

    return lambda: monkeypatch.setattr(tempfile, "mkstemp", full)


@pytest.fixture(scope="session")
def torchvision_operators():
    """Declare two operators that torchvision's wheel lacks beside another build of PyTorch.

    timm and open_clip import torchvision, which fails without them; none of their models runs them.
    Where it has them, a second declaration would end the process.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError as error:  # operator torchvision::nms does not exist
        if "torchvision::" not in str(error):
            raise
    for name in [each for each in sys.modules if each.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what was imported before the failure
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return declared
