"""Choice of the backend that runs an operator.

A backend is a namespace with one function per operator and, for an operator that cannot always run,
a function ``can_run_<operator>`` of the same arguments, which returns the reason why it cannot run,
or ``None`` if it can. ``"auto"`` chooses the first backend in :data:`AUTO_ORDER` that can run; a
backend that the caller names and that cannot run raises an error with the reason.
"""

import logging
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import TypeAlias

import torch
from torch import Tensor

from upfeat.backends import eager, reference, torch_operators
from upfeat.bounds import quoted

logger = logging.getLogger(__name__)

Argument: TypeAlias = Tensor | list[Tensor] | int | float | Sequence[int] | None

BACKENDS: dict[str, ModuleType | SimpleNamespace] = {
    "triton": torch_operators.TRITON,
    "cpu": torch_operators.CPU,
    "eager": eager,
    "reference": reference,
}
AUTO_ORDER = ("triton", "cpu", "eager")


def call(operator: str, backend: str, *arguments: Argument) -> Tensor:
    """Run ``operator`` on ``backend``, or for ``"auto"`` on the first backend that can run it.

    Raises:
        ValueError: the backend is unknown, or cannot run these arguments.
    """
    if backend == "auto":
        # Some backend always can: eager has every public operator, and callers of the internal
        # operators first ask whether cpu can run them.
        backend = next(
            name for name in AUTO_ORDER if reason_against(operator, name, *arguments) is None
        )
        if not torch.compiler.is_compiling():
            logger.debug("%s: backend %s", operator, backend)
    else:
        reason = reason_against(operator, backend, *arguments)
        if reason is not None:
            raise ValueError(f'backend="{backend}" cannot run {operator}: {reason}')
    run = getattr(BACKENDS[backend], operator)
    kind = next(one.device.type for one in arguments if isinstance(one, Tensor))
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return run(*arguments)
    # Autocast would round the products of operators in PyTorch, and not those of kernels.
    with torch.autocast(kind, enabled=False):
        return run(*arguments)


def check_name(backend: str) -> None:
    """Check that ``backend`` is one of :data:`BACKENDS` or ``"auto"``.

    Raises:
        ValueError: there is no backend of that name.
    """
    if not isinstance(backend, str) or (backend not in BACKENDS and backend != "auto"):
        known = ", ".join(f'"{name}"' for name in ("auto", *BACKENDS))
        raise ValueError(f"backend={quoted(backend)} is unknown; choose from {known}")


def reason_against(operator: str, backend: str, *arguments: Argument) -> str | None:
    """Return why ``backend`` cannot run ``operator`` on these arguments, or ``None``.

    Raises:
        ValueError: there is no backend of that name.
    """
    check_name(backend)
    module = BACKENDS[backend]
    if not hasattr(module, operator):
        return "this backend has no such operator"
    check = getattr(module, f"can_run_{operator}", None)
    return None if check is None else check(*arguments)


def availability() -> dict[str, str | None]:
    """Map each backend's name to the reason why it cannot run on this machine, or ``None``."""
    reasons: dict[str, str | None] = {}
    for name, module in BACKENDS.items():
        check = getattr(module, "unavailable_reason", None)
        reasons[name] = None if check is None else check()
    return reasons
