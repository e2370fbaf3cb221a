"""What the tests of several kernels share."""

import pytest
import torch

from upfeat.backends.cpu import library as cpu_library
from upfeat.backends.cpu import operators as cpu


@pytest.fixture(params=cpu_library.ISAS)
def isa(request, monkeypatch):
    """Every instruction set that this machine and build have."""
    if request.param not in cpu.library_info()["available"]:
        pytest.skip(f"this machine or build has no {request.param}")
    monkeypatch.setenv("UPFEAT_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def threads():
    """Set the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
