"""Recognition of tensors of ``torch.func`` (vmap, jvp, grad), which need special treatment."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)


def is_transformed(x: Tensor) -> bool:
    """Return whether a tensor belongs to a transform; its values and memory are inaccessible."""
    # The compiler cannot trace the check, and handles transforms itself.
    return not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(x)


def is_transforming() -> bool:
    """Return whether a transform is running; all tensors computed in it belong to it."""
    return not torch.compiler.is_compiling() and peek_interpreter_stack() is not None


def channels_last(x: Tensor) -> Tensor:
    """Convert maps (B, C, H, W) to channels-last memory format, in which convolutions are faster.

    Tensors of a transform are returned unchanged: PyTorch does not support the format under vmap,
    and the forward derivatives of some operators fail on it.
    """
    return x if is_transformed(x) else x.contiguous(memory_format=torch.channels_last)
