"""PyTorch's optimisers without the import of the compiler.

``torch.optim`` decorates its methods for ``torch.compile``, and the decorators import
``torch._dynamo``, which takes as long as the import of all other parts of PyTorch. This library
does not compile the steps of its optimisers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_MARKED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def _unmarked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that PyTorch's decorator wraps, or a method without decorator itself."""
    return getattr(method, "__wrapped__", method)


class NAdam(torch.optim.NAdam):
    """``torch.optim.NAdam``, with results that are equal bit by bit."""

    # The decorator of PyTorch's ``step`` also disables gradients, but imports the compiler.
    step = torch.no_grad()(_unmarked(torch.optim.NAdam.step))


class LBFGS(torch.optim.LBFGS):
    """``torch.optim.LBFGS``, with results that are equal bit by bit."""


for _optimiser in (NAdam, LBFGS):
    for _name in _MARKED:
        setattr(_optimiser, _name, _unmarked(getattr(_optimiser, _name)))
