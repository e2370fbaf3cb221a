"""Derivatives other than plain gradients, as compiled code must treat them.

Tensors of ``torch.func`` (vmap, jvp, grad) and dual numbers, the tensors with tangents of
``torch.autograd.forward_ad``, need special treatment. So do gradients that are differentiated
again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode


def is_transformed(x: Tensor) -> bool:
    """Return whether a tensor belongs to a transform, or has a tangent.

    The values and memory of the former are inaccessible; compiled kernels would lose the latter.
    """
    # The compiler cannot trace the checks, and handles transforms itself.
    if torch.compiler.is_compiling():
        return False
    if is_functorch_wrapped_tensor(x):
        return True
    return _derives_forward() and forward_ad.unpack_dual(x).tangent is not None


def is_plain(x: Tensor) -> bool:
    """Return whether nothing watches or replaces operations on a tensor, whose values are at hand.

    False in the compiler, tracers, transforms and dispatch modes, such as counters of operations,
    and for subclasses, such as tensors without values.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if type(x) not in (Tensor, nn.Parameter) or _get_current_dispatch_mode() is not None:
        return False
    return not is_transformed(x)


def is_transforming() -> bool:
    """Return whether a transform or forward differentiation is running.

    All tensors computed in a transform belong to it.
    """
    if torch.compiler.is_compiling():
        return False
    return peek_interpreter_stack() is not None or _derives_forward()


def lasting() -> AbstractContextManager[object]:
    """Context for tensors that are kept for later calls, which may run in other modes.

    Tensors made in inference mode cannot take part in training, and those of tracers have no
    values. The default device is not changed: name one.
    """
    if torch.compiler.is_compiling():  # the compiler keeps its own results
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    if _get_current_dispatch_mode() is not None:
        stack.enter_context(_disable_current_modes())
    return stack


def recorded_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of a function's tensors that autograd can differentiate again.

    Custom gradients use it if ``torch.is_grad_enabled()``, as under ``create_graph=True``: results
    of kernels and in-place operations would silently count as constants.

    Args:
        function: the function, in operators that autograd records.
        tensors: its arguments.
        needed: whether the gradient of each is needed.
        grad: gradient of the result.

    Returns:
        The gradient of each tensor; ``None`` where it is not needed.
    """
    # Views, since one tensor may depend on another, and that is not this function's gradient.
    views = [one.view_as(one) for one in tensors]
    wanted = [one for one, need in zip(views, needed, strict=True) if need]
    found = iter(torch.autograd.grad(function(*views), wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needed]


def _derives_forward() -> bool:
    return forward_ad._current_level >= 0


def channels_last(x: Tensor) -> Tensor:
    """Convert maps (B, C, H, W) to channels-last memory format, in which convolutions are faster.

    Tensors of a transform, and those with tangents, are returned unchanged: PyTorch does not
    support the format under vmap, and the forward derivatives of some operators fail on it.
    """
    return x if is_transformed(x) else x.contiguous(memory_format=torch.channels_last)
