"""Tensors of ``torch.func`` (vmap, jvp, grad): recognised, and spared what they cannot do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)


def is_transformed(x: Tensor) -> bool:
    """Tell tensors of a transform, whose values and memory are not to be had."""
    # A compiler cannot trace the question, and answers it for itself.
    return not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(x)


def is_transforming() -> bool:
    """Tell a running transform: whatever is computed in it is one of its tensors."""
    return not torch.compiler.is_compiling() and peek_interpreter_stack() is not None


def channels_last(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) with channels last in memory, which convolutions are faster on.

    Those of a transform stay as they are: PyTorch knows no such order under vmap, and has operators
    whose forward derivative fails on it.
    """
    return x if is_transformed(x) else x.contiguous(memory_format=torch.channels_last)
