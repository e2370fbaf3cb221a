"""Reasons why kernels cannot run on this machine, or on given tensors."""

import importlib.util
import os
import shutil
from functools import lru_cache

import torch
from torch import Tensor

from upfeat.backends.triton import launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


SMALLEST_CAPABILITY = (8, 0)


def unavailable_reason() -> str | None:
    """Return why the kernels cannot run on this machine, or ``None`` if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if launch.interpreted():
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if torch.version.hip is not None:
        return "the kernels were never run on ROCm"
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    if not any(name and shutil.which(name) for name in compilers):
        return "Triton needs a C compiler to start kernels (install gcc or clang, or set CC)"
    return None


# torch.compile cannot trace the checks, so it takes the result for a constant. This is the
# attribute that torch.compiler.assume_constant_result sets; calling that function here would import
# the whole compiler.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _too_old(index: int) -> str | None:
    found = torch.cuda.get_device_capability(index)
    if found >= SMALLEST_CAPABILITY:
        return None
    return f"compute capability {found[0]}.{found[1]} is below 8.0"


def reason_against(*tensors: Tensor) -> str | None:
    """Return why the kernels cannot run on these tensors, or ``None`` if they can."""
    reason = unavailable_reason()
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype} is not float32, bfloat16 or float16"
        if tensor.device != tensors[0].device:
            return f"tensors are on {tensors[0].device} and {tensor.device}"
        if tensor.layout != torch.strided:
            return f"layout {tensor.layout} is not strided"
        if tensor.is_cuda:
            reason = _too_old(tensor.get_device())
        elif not launch.interpreted():
            reason = f"a tensor is on {tensor.device}, not on a CUDA device"
        if reason is not None:
            return reason
    return None
