"""What the tests of several kernels share."""

import pytest

from upfeat.backends.cpu import library as cpu_library
from upfeat.backends.cpu import operators as cpu


def _hold_to(isa, monkeypatch):
    if isa not in cpu.library_info()["available"]:
        pytest.skip(f"this machine or build has no {isa}")
    monkeypatch.setenv("UPFEAT_CPU_ISA", isa)


@pytest.fixture(params=[name for name in cpu_library.ISAS if name != "amx_high"])
def isa(request, monkeypatch):
    """Every instruction set that this machine and build have."""
    _hold_to(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=cpu_library.ISAS)
def rounding(request, monkeypatch):
    """Relative error of dense products, with every instruction set."""
    _hold_to(request.param, monkeypatch)
    return 8e-6 if request.param == "amx_high" else 1e-6
