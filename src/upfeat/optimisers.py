"""PyTorch's optimisers without the compiler that they import.

``torch.optim`` marks its methods for ``torch.compile``, and the marks import ``torch._dynamo``,
which takes as long as all the rest of PyTorch. Nothing here compiles a step of an optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_MARKED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def _unmarked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Unwrap a method that PyTorch decorates; the method itself where it is not wrapped."""
    return getattr(method, "__wrapped__", method)


class NAdam(torch.optim.NAdam):
    """``torch.optim.NAdam``, to the bit."""

    # Its own decorator turns gradients off as well, but imports the compiler to do so.
    step = torch.no_grad()(_unmarked(torch.optim.NAdam.step))


class LBFGS(torch.optim.LBFGS):
    """``torch.optim.LBFGS``, to the bit."""


for _optimiser in (NAdam, LBFGS):
    for _name in _MARKED:
        setattr(_optimiser, _name, _unmarked(getattr(_optimiser, _name)))
